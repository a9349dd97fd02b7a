"""Routers that are not transformers': RouterSpecs, and which rows a router sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom import spec as specs
from moe_inspect.model.custom.choice import in_map
from moe_inspect.model.find import candidates, find_routers
from moe_inspect.trace.verify import verify
from tests.support import own

B, S = 3, 16
T = B * S


@pytest.fixture
def registry() -> Iterator[None]:
    """Which routers are registered, as it was before the test once that is over."""
    before = specs._registered[:]
    specs._registered.clear()
    yield
    specs._registered[:] = before
    specs._of_packages.cache_clear()


def spec(**settings: Any) -> moe_inspect.RouterSpec:
    return moe_inspect.RouterSpec(
        **{"module": "blocks.*.experts", "choice": own.example().choice, "experts": 8, **settings}
    )


# --- specs


@pytest.mark.parametrize("before", [False, True])
def test_a_spec_records_what_the_experts_were_given(tmp_path: Path, before: bool) -> None:
    own.exact(own.gpt(probes=False), tmp_path / "t", 3, routers=[spec(before=before)])


def test_specs_that_are_given_are_all_that_is_recorded(tmp_path: Path, registry: None) -> None:
    """Not the probes in the same forward, which are a mistake where routers are found."""
    model = own.gpt()
    own.record_once(model, tmp_path / "t", routers=[spec(module="blocks.2.experts")])
    assert [r.layer for r in own.path_of(tmp_path / "t").routers] == [2]
    moe_inspect.register_router("Experts", own.example().choice, experts=8)
    with pytest.raises(MoeInspectError, match="whose routers record finds without it"):
        own.record_once(model, tmp_path / "u")


def test_a_selection_bias_is_said(tmp_path: Path) -> None:
    for n, biased in enumerate((False, True)):
        model = own.gpt(probes=False)
        if biased:
            model.blocks[2].experts.register_buffer("e_score_correction_bias", torch.zeros(8))
        own.record_once(model, tmp_path / str(n), routers=[spec()])
        note = own.path_of(tmp_path / str(n)).manifest["model"].get("note", "")
        assert ("selection bias" in note) == biased


def test_a_registered_class_is_found_without_arguments(registry: None) -> None:
    model = own.gpt(probes=False)
    name = f"{own.without_probe().__module__}.Silent"
    for given in (name, "Silent", own.without_probe()):
        moe_inspect.register_router(given, own.example().choice, experts=8, scoring="softmax")
        found = [(s.layer, s.experts, s.scoring) for s in find_routers(model)]
        assert found == [(n, 8, "softmax") for n in range(4)]
        specs._registered.clear()
    with pytest.raises(MoeInspectError, match="no known router"):
        find_routers(model)


PACKAGE = """
from tests.test_own import spec
ONE, SEVERAL, WRONG = spec(), [spec()], [3]
def made():
    return ONE
"""


def test_a_packages_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: None) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "brings_routers.py").write_text(PACKAGE)
    (tmp_path / "brings_routers-1.dist-info").mkdir()

    def registered(name: str) -> list[moe_inspect.RouterSpec]:
        entry = f"[moe_inspect.routers]\nown = brings_routers:{name}\n"
        (tmp_path / "brings_routers-1.dist-info/entry_points.txt").write_text(entry)
        specs._of_packages.cache_clear()
        return specs.registered()

    for name in ("ONE", "SEVERAL", "made"):
        assert len(registered(name)) == 1
        assert len(find_routers(own.gpt(probes=False))) == 4
    with pytest.raises(MoeInspectError, match=r"'own' .* gives a int, not a RouterSpec"):
        registered("WRONG")


@pytest.mark.parametrize("K", [2, 4])
def test_a_bool_map_is_taken_for_ids(K: int) -> None:
    """Weights in descending order; -1 where fewer than K were chosen."""
    generator = torch.Generator().manual_seed(K)
    weights = torch.rand(100, 8, generator=generator)
    most = torch.randint(0, K + 1, (100, 1), generator=generator)
    chosen = torch.rand(100, 8, generator=generator).argsort(1) < most
    ids, found = in_map(chosen, weights, K)
    assert ids.shape == (100, K)
    for row, of_row, values, w in zip(chosen, ids.tolist(), found, weights, strict=True):
        assert sorted(e for e in of_row if e >= 0) == row.nonzero()[:, 0].tolist()
        assert values.tolist() == [w[e].item() if e >= 0 else 0 for e in of_row]
        assert (values.diff() <= 0).all()


def test_a_bool_map_is_recorded_with_its_drops(tmp_path: Path) -> None:
    def dropping(*call: Any) -> tuple[Tensor, Tensor]:
        ids, weights = own.example().choice(*call)
        chosen = torch.zeros(len(ids), 8, dtype=torch.bool).scatter(1, ids, True)
        chosen[::3, :4] = False
        return chosen, torch.zeros(len(ids), 8).scatter(1, ids, weights)

    model = own.gpt(probes=False)
    with own.watched(model) as given:
        own.record_once(model, tmp_path / "t", routers=[spec(choice=dropping, top_k=2)])
    trace = own.path_of(tmp_path / "t")
    for layer, (rows,) in given.items():
        left = [row - set(range(4)) if n % 3 == 0 else row for n, row in enumerate(rows)]
        assert own.recorded(trace, layer) == left
    assert verify(tmp_path / "t").empty_slots > 0
    with pytest.raises(MoeInspectError, match="does not state its top-k"):
        own.record_once(model, tmp_path / "u", routers=[spec(choice=dropping)])


def test_mistakes_in_specs_are_named(tmp_path: Path) -> None:
    model = own.gpt(probes=False)

    def refused(match: str, *given: Any) -> None:
        with pytest.raises(MoeInspectError, match=match):
            moe_inspect.record(model, tmp_path / "t", routers=given)

    refused(r"'layers\.\*\.moe'\) matches no module of GPT$", spec(module="layers.*.moe"))
    refused("modules called router: blocks.0.experts.router", spec(module="*.router"))
    refused("two RouterSpecs match blocks.0.experts", spec(), spec(module="blocks.0.experts"))
    refused("routers takes RouterSpecs, not str", "blocks.*.experts")
    refused("no layer number in the module path head", spec(module="head"))
    refused("does not say how many experts", spec(experts=None))
    with pytest.raises(MoeInspectError, match=r"order='bt'\): choose \"bs\""):
        spec(order="bt")
    with pytest.raises(MoeInspectError, match="takes a function"):
        spec(choice=3)
    # E of a linear router is its outputs, a module's own statement comes first
    of_router = find_routers(model, [spec(module="blocks.*.experts.router", experts=None)])
    assert [s.experts for s in of_router] == [8] * 4


# --- rows


def of_example(change: Any) -> Any:
    """A model whose blocks are fed what `change` makes of the hidden states."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        x = change(self.gpt.tokens(tokens))
        for block in self.blocks:
            x = x + block.experts(block.norm_2(x)).view_as(x)
        return x

    made = own.module("OfExample", forward, gpt=own.gpt(probes=False))
    type(made).blocks = property(lambda self: self.gpt.blocks)
    return made


def sequence_first() -> Any:
    return of_example(lambda x: x.transpose(0, 1).contiguous())


INNER = "gpt.blocks.*.experts"


def test_sequence_first_rows_stand_at_their_tokens(tmp_path: Path) -> None:
    model, ids = sequence_first(), own.tokens()
    given = spec(module=INNER, order="sb")
    tokens = own.exact(model, tmp_path / "t", 2, routers=[given]).tokens()  # in the routers' order
    found = {(row.document, row.position): row.token_id for row in tokens.itertuples(index=False)}
    assert found == {
        (p * B + b, s): int(ids[b, s]) for p in range(2) for b in range(B) for s in range(S)
    }
    # what it is given says so where the spec does not
    with pytest.raises(MoeInspectError, match=r"gpt\.blocks\.0\S* is given \["):
        own.record_once(model, tmp_path / "u", routers=[spec(module=INNER)])


def test_a_rank_that_sees_a_part_records_that_part(tmp_path: Path) -> None:
    """As under sequence parallelism: the second half of the positions, sequence-first."""
    model = of_example(lambda x: x[:, S // 2 :].transpose(0, 1).contiguous())
    part = np.arange(T).reshape(B, S)[:, S // 2 :].T.reshape(-1)

    def of(rows: Any) -> dict[str, Any]:
        return {"routers": [spec(module=INNER, rows=lambda module, B, S: rows)]}

    trace = own.exact(model, tmp_path / "t", 2, order=range(T // 2), **of(part))
    expected = own.tokens().flatten()[torch.from_numpy(part)]
    assert (trace.tokens()["token_id"].to_numpy() == expected.repeat(2).numpy()).all()
    assert set(trace.tokens()["position"]) == set(range(S // 2, S))
    assert trace.documents()["tokens"].tolist() == [S // 2] * (2 * B)
    with pytest.raises(MoeInspectError, match="must return different token numbers from 0 to 47"):
        own.record_once(model, tmp_path / "u", **of(np.zeros(3, int)))


def test_pieces_of_rows_that_are_said_stand_at_their_tokens(tmp_path: Path) -> None:
    """A block that runs for one half of the positions after the other, in a batch of several."""
    model, ids = own.gpt(probes=False), own.tokens()
    for block in model.blocks:

        def forward(x: Tensor, block: Any = block) -> Tensor:
            return torch.cat([block.experts(half).view_as(half) for half in x.split(S // 2, 1)], 1)

        block.forward = forward
    with pytest.raises(MoeInspectError, match=r"in pieces \[24, K\].* give RouterSpec\(rows=…\)"):
        own.record_once(model, tmp_path / "t", routers=[spec()])
    halves = np.split(np.arange(T).reshape(B, S), 2, axis=1)
    rows = np.concatenate([half.reshape(-1) for half in halves])
    of_rows = spec(rows=lambda module, B, S: rows)
    with own.watched(model) as given:
        own.record_once(model, tmp_path / "t", routers=[of_rows])
    trace = own.path_of(tmp_path / "t")
    whole = {layer: [[*first, *second]] for layer, (first, second) in given.items()}
    assert own.same(trace, whole) == 4 * T
    assert (trace.tokens()["token_id"].to_numpy() == ids.flatten()[rows].numpy()).all()


@pytest.mark.parametrize("order", ["bs", "sb"])
def test_a_shape_that_is_in_another_order_is_refused(tmp_path: Path, order: str) -> None:
    """[S, B, K] of an input [B, S], and the reverse; in a later pass as well."""
    other = (S, -1, 2) if order == "bs" else (-1, S, 2)
    said = {"bs": r"\[16, 3, K\] .* batch-first", "sb": r"\[3, 16, K\] .* sequence-first"}[order]

    def choice(*call: Any) -> Any:
        return tuple(values.view(other) for values in own.example().choice(*call))

    model = sequence_first() if order == "sb" else own.gpt(probes=False)
    given = spec(module="**.blocks.*.experts", choice=choice, order=order)
    with moe_inspect.record(model, tmp_path / "t", routers=[given]):
        model(own.tokens(1))  # of one row the order is the same
        with pytest.raises(MoeInspectError, match=said):
            model(own.tokens())
    assert own.path_of(tmp_path / "t").n_tokens == S


# --- a model without a router that is known


def test_what_looks_like_a_router_is_named(tmp_path: Path) -> None:
    model = own.gpt(probes=False)
    with pytest.raises(MoeInspectError) as error:
        own.record_once(model, tmp_path / "t")
    for said in ("router (Linear) may be one", "mlps (8 × Sequential) may be its experts"):
        assert f"blocks.*.experts.{said}" in str(error.value)
    assert "experts=8" in str(error.value)
    assert candidates(nn.LSTM(4, 4)) is None
    dense = nn.Module()
    dense.gate_proj = nn.Linear(4, 4)
    assert candidates(dense) is None
    with pytest.raises(MoeInspectError, match="is a dense model: it has no routers"):
        find_routers(dense)

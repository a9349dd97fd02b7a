"""Routers that are not transformers': probes, RouterSpecs, discovery, and what such a model is
fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_inspect
from moe_inspect.capture.hook import probe as probes
from moe_inspect.capture.hook.inputs.arguments import by_name
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom import spec as specs
from moe_inspect.model.custom.candidates import candidates
from moe_inspect.model.custom.choice import in_map
from moe_inspect.model.find import find_routers
from tests import own

B, S = 3, 16
T = B * S


def spec(**settings: Any) -> moe_inspect.RouterSpec:
    return moe_inspect.RouterSpec(
        **{"module": "blocks.*.experts", "choice": own.example().choice, "experts": 8, **settings}
    )


# --- probes


@pytest.mark.parametrize("passes", [1, 4])
def test_a_probe_in_a_forward_is_a_router(tmp_path: Path, passes: int) -> None:
    model, ids = own.gpt(), own.tokens()
    with own.watched(model) as given, moe_inspect.record(model, tmp_path / "t") as recorder:
        for _ in range(passes):
            model(ids).sum().backward()
    trace = own.path_of(tmp_path / "t")
    assert own.same(trace, given) == 4 * passes * T
    assert [(r.layer, r.experts, r.top_k) for r in trace.routers] == [(n, 8, 2) for n in range(4)]
    assert (trace.tokens()["token_id"].to_numpy() == ids.flatten().repeat(passes).numpy()).all()
    assert recorder.tokens == passes * T
    assert not probes._recorders


def test_a_probe_shows_nothing_where_no_recorder_is_open() -> None:
    with own.watched(own.gpt()) as given:
        assert not given.sets
    # not even a mistake in it is noticed: nothing is looked at
    moe_inspect.probe(torch.zeros(2, 2), torch.zeros(3), layer=0)


def test_probes_are_counted(tmp_path: Path) -> None:
    model, ids = own.gpt(), own.tokens()
    recorder = moe_inspect.record(model, counts_only=True)
    with own.watched(model) as given, recorder:
        for _ in range(3):
            model(ids)
    counts = recorder.totals().load
    for layer, passes in given.sets.items():
        expected = np.bincount([e for rows in passes for row in rows for e in row], minlength=8)
        assert (counts[layer] == expected).all()
    assert sum(map(sum, counts)) == 3 * T * 4 * 2


@pytest.mark.parametrize("compiled", ["model", "blocks"])
def test_compiled_probes_break_no_graph(tmp_path: Path, compiled: str) -> None:
    """They record, set before the recorder and after."""
    model, ids = Tiny(), own.tokens()
    plain = Tiny()
    with moe_inspect.record(plain, tmp_path / "plain"):
        for _ in range(3):
            plain(ids)
    fed = model
    if compiled == "model":
        fed = torch.compile(model, backend="eager", fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    fed(ids)
    with moe_inspect.record(fed, tmp_path / "t"):
        for _ in range(3):
            fed(ids)
    eager, traced = (own.path_of(tmp_path / name) for name in ("plain", "t"))
    for layer in range(2):
        assert own.recorded(traced, layer) == own.recorded(eager, layer)
    fed(ids)
    torch.compiler.reset()


def test_mistakes_in_probes_are_named(tmp_path: Path) -> None:
    def failing(match: str, probing: Any, **options: Any) -> None:
        with pytest.raises(MoeInspectError, match=match):
            record_twice(Probing(probing), tmp_path / "t", overwrite=True, **options)

    ids, weights = torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1)
    failing(
        r"probe\(layer=0\) does not say how many experts",
        lambda n: moe_inspect.probe(ids, weights, layer=0),
    )
    failing(
        r"both need the same shape",
        lambda n: moe_inspect.probe(ids, weights[:, 0], layer=0, experts=2),
    )
    failing(
        r"ids of dtype float32, not integers",
        lambda n: moe_inspect.probe(weights, weights, layer=0, experts=2),
    )
    failing(
        r"probe\(layer=0\) showed the choices of 24 rows in a forward pass of 48 tokens",
        lambda n: moe_inspect.probe(ids[:24], weights[:24], layer=0, experts=2),
    )
    failing(
        r"probe\(layer=0\) chose expert 2 and is said to have 2 experts",
        lambda n: moe_inspect.probe(ids + 2, weights, layer=0, experts=2),
    )
    failing(
        r"probe\(layer=1\) was not called in the first forward pass",
        lambda n: moe_inspect.probe(ids, weights, layer=n, experts=2),
    )
    failing(
        r"probe\(layer=0\) shows no router logits",
        lambda n: moe_inspect.probe(ids, weights, layer=0, experts=2),
        logits=True,
    )
    # control: as it should be
    model = Probing(lambda n: moe_inspect.probe(ids, weights, layer=0, experts=2))
    with moe_inspect.record(model, tmp_path / "t", overwrite=True):
        model(own.tokens())


def test_logits_of_a_probe_are_recorded(tmp_path: Path) -> None:
    logits = torch.randn(T, 4)
    values, ids = logits.softmax(1).topk(2)
    model = Probing(lambda n: moe_inspect.probe(ids, values, layer=5, logits=logits))
    with moe_inspect.record(model, tmp_path / "t", logits=True):
        for _ in range(2):
            model(own.tokens())
    found = own.path_of(tmp_path / "t").logits(layer=5)
    shown = np.stack(found["logits"].to_list())
    assert np.abs(shown - logits.repeat(2, 1).numpy()).max() < 2**-8
    assert own.path_of(tmp_path / "t").routers[0].experts == 4


def test_only_some_layers_are_recorded(tmp_path: Path) -> None:
    model = own.gpt()
    with moe_inspect.record(model, tmp_path / "t", layers=[1, 3]):
        model(own.tokens())
    assert [r.layer for r in own.path_of(tmp_path / "t").routers] == [1, 3]


# --- specs


@pytest.mark.parametrize("before", [False, True])
def test_a_spec_records_what_the_experts_were_given(tmp_path: Path, before: bool) -> None:
    model, ids = own.gpt(probes=False), own.tokens()
    with (
        own.watched(model) as given,
        moe_inspect.record(model, tmp_path / "t", routers=[spec(before=before)]),
    ):
        for _ in range(3):
            model(ids).sum().backward()
    assert own.same(own.path_of(tmp_path / "t"), given) == 4 * 3 * T


def test_specs_that_are_given_are_all_that_is_recorded(tmp_path: Path) -> None:
    """The probes in the same forward are not; where routers are found by themselves, a probe is a
    mistake."""
    model = own.gpt()
    record_once(model, tmp_path / "t", routers=[spec(module="blocks.2.experts")])
    assert [r.layer for r in own.path_of(tmp_path / "t").routers] == [2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs, "_registered", [])
        moe_inspect.register_router("Experts", own.example().choice, experts=8)
        with pytest.raises(MoeInspectError, match="whose routers record finds without it"):
            record_once(model, tmp_path / "u")


def test_a_selection_bias_is_said(tmp_path: Path) -> None:
    for n, biased in enumerate((False, True)):
        model = own.gpt(probes=False)
        if biased:
            model.blocks[2].experts.register_buffer("e_score_correction_bias", torch.zeros(8))
        record_once(model, tmp_path / str(n), routers=[spec()])
        note = own.path_of(tmp_path / str(n)).manifest["model"].get("note", "")
        assert ("selection bias" in note) == biased


def test_a_registered_class_is_found_without_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "_registered", [])
    model = own.gpt(probes=False)
    name = f"{own.without_probe().__module__}.Silent"
    for given in (name, "Silent", own.without_probe()):
        moe_inspect.register_router(given, own.example().choice, experts=8, scoring="softmax")
        assert [(s.layer, s.experts, s.scoring) for s in find_routers(model)] == [
            (n, 8, "softmax") for n in range(4)
        ]
        specs._registered.clear()
    with pytest.raises(MoeInspectError, match="no router that is known"):
        find_routers(model)


def test_a_package_brings_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value = "own", "package:routers"
        given: Any = None

        def load(self) -> Any:
            return self.given

    entry = Entry()
    monkeypatch.setattr(
        specs, "entry_points", lambda group: [entry] if group == "moe_inspect.routers" else []
    )
    for given in (spec(), [spec()], lambda: [spec()]):
        specs._of_packages.cache_clear()
        entry.given = given
        assert len(find_routers(own.gpt(probes=False))) == 4
    specs._of_packages.cache_clear()
    entry.given = [3]
    with pytest.raises(MoeInspectError, match=r"'own' .* gives a int, not a RouterSpec"):
        specs.registered()
    monkeypatch.undo()
    specs._of_packages.cache_clear()


@pytest.mark.parametrize("K", [2, 4])
def test_a_bool_map_is_taken_for_ids(K: int) -> None:
    """Weights in descending order; -1 where fewer than K were chosen."""
    generator = torch.Generator().manual_seed(K)
    weights = torch.rand(100, 8, generator=generator)
    chosen = torch.zeros(100, 8, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(8, generator=generator)[: torch.randint(0, K + 1, ())]] = True
    ids, found = in_map(chosen, weights, K)
    for row, of_row, values, w in zip(chosen, ids.tolist(), found, weights, strict=True):
        kept = [e for e in of_row if e >= 0]
        assert sorted(kept) == row.nonzero()[:, 0].tolist()
        assert len(of_row) == K
        assert values.tolist() == [w[e].item() if e >= 0 else 0 for e in of_row]
        assert (values.diff() <= 0).all()


def test_a_bool_map_is_recorded_with_its_drops(tmp_path: Path) -> None:
    def dropping(experts: Any, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
        ids, weights = own.example().choice(experts, args, kwargs, output)
        chosen = torch.zeros(len(ids), 8, dtype=torch.bool).scatter(1, ids, True)
        chosen[::3, :4] = False
        return chosen, torch.zeros(len(ids), 8).scatter(1, ids, weights)

    model, ids = own.gpt(probes=False), own.tokens()
    with (
        own.watched(model) as given,
        moe_inspect.record(model, tmp_path / "t", routers=[spec(choice=dropping, top_k=2)]),
    ):
        model(ids)
    trace = own.path_of(tmp_path / "t")
    for layer, (rows,) in given.sets.items():
        left = [row - set(range(4)) if n % 3 == 0 else row for n, row in enumerate(rows)]
        assert own.recorded(trace, layer) == left
    assert moe_inspect.verify(tmp_path / "t").empty_slots > 0
    with (
        pytest.raises(MoeInspectError, match="does not state its top-k"),
        moe_inspect.record(model, tmp_path / "u", routers=[spec(choice=dropping)]),
    ):
        model(ids)


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


def test_sequence_first_rows_stand_at_their_tokens(tmp_path: Path) -> None:
    model, ids = SequenceFirst(), own.tokens()
    with (
        own.watched(model) as given,
        moe_inspect.record(
            model, tmp_path / "t", routers=[spec(module="gpt.blocks.*.experts", order="sb")]
        ),
    ):
        for _ in range(2):
            model(ids)
    trace = own.path_of(tmp_path / "t")
    assert own.same(trace, given) == 4 * 2 * T  # in the routers' order
    tokens = trace.tokens()
    found = {(row.document, row.position): row.token_id for row in tokens.itertuples(index=False)}
    assert found == {
        (p * B + b, s): int(ids[b, s]) for p in range(2) for b in range(B) for s in range(S)
    }
    # control: taken for batch-first, the same decisions stand at other tokens
    with moe_inspect.record(model, tmp_path / "u", routers=[spec(module="gpt.blocks.*.experts")]):
        model(ids)
    wrong = own.path_of(tmp_path / "u").tokens()["token_id"].to_numpy()
    assert (wrong != tokens["token_id"].to_numpy()[:T]).any()


def test_a_rank_that_sees_a_part_records_that_part(tmp_path: Path) -> None:
    """As under sequence parallelism: the router's rows are a slice of the positions."""
    model, ids, inner = Sliced(), own.tokens(), "gpt.blocks.*.experts"
    with (
        own.watched(model) as given,
        moe_inspect.record(
            model,
            tmp_path / "t",
            routers=[spec(module=inner, rows=lambda module, B, S: part(B, S))],
        ),
    ):
        for _ in range(2):
            model(ids)
    trace = own.path_of(tmp_path / "t")
    assert own.same(trace, given) == 4 * 2 * T // 2
    expected = ids.flatten()[torch.from_numpy(part(B, S))]
    assert (trace.tokens()["token_id"].to_numpy() == expected.repeat(2).numpy()).all()
    assert set(trace.tokens()["position"]) == set(range(S // 2, S))
    assert trace.documents()["tokens"].tolist() == [S // 2] * (2 * B)
    with pytest.raises(MoeInspectError, match="must return different token numbers from 0 to 47"):
        record_once(
            model,
            tmp_path / "u",
            routers=[spec(module=inner, rows=lambda m, B, S: np.zeros(3, int))],
        )


def part(B: int, S: int) -> np.ndarray:
    """The second half of the positions, sequence-first."""
    return np.arange(B * S).reshape(B, S)[:, S // 2 :].T.reshape(-1)


def record_once(model: Any, path: Path, **options: Any) -> None:
    with moe_inspect.record(model, path, **options):
        model(own.tokens())


def record_twice(model: Any, path: Path, **options: Any) -> None:
    with moe_inspect.record(model, path, **options):
        model(own.tokens())
        model(own.tokens())


# --- what a forward is fed


def test_tokens_are_found_under_any_name() -> None:
    ids = own.tokens()
    hidden = torch.randn(S, B, 8)
    for names, args, kwargs in (
        (["tokens"], (ids,), {}),
        (["x", "idx"], (hidden,), {"idx": ids}),
        (["anything"], (ids,), {}),
        (["h", "other"], (hidden, ids), {}),
        ([], (ids,), {}),
    ):
        assert by_name(names, False)(args, kwargs)["input_ids"] is ids
    stage = by_name(["hidden"], True)((hidden,), {})
    assert stage["input_ids"] is None
    assert stage["inputs_embeds"].shape == (B, S, 8)


def test_packed_documents_begin_at_position_0(tmp_path: Path) -> None:
    ids = own.tokens()
    positions = torch.cat([torch.arange(6), torch.arange(10)]).expand(B, S)
    for given in (
        {"positions": positions},
        {"input_pos": positions[0]},
        {"doc_lens": torch.tensor([[6, 10, 0]] * B)},
        {"doc_lens": torch.tensor([6, 10])},
        {"cu_seqlens": torch.tensor([n for b in range(B) for n in (16 * b, 16 * b + 6)] + [T])},
    ):
        found = by_name(["tokens"], False)((ids,), given)["position_ids"]
        assert torch.equal(found.expand(B, S), positions), given
    packed = by_name(["tokens"], False)((ids.flatten(),), {"cu_seqlens": torch.tensor([0, 20, T])})
    assert packed["input_ids"].shape == (1, T)
    model = own.gpt()
    with moe_inspect.record(
        model,
        tmp_path / "t",
        inputs=lambda args, kwargs: {
            "input_ids": args[0],
            "position_ids": positions,
            "documents": ["a", "b", "c"],
        },
    ):
        model(ids)
    assert len(own.path_of(tmp_path / "t").documents()) == B  # one a label, whatever is packed


def test_masks_of_other_shapes_are_no_padding() -> None:
    """Megatron's attention mask is True where a position is masked."""
    ids = own.tokens()
    causal = torch.ones(S, S).tril().logical_not()[None, None].expand(B, 1, S, S)
    read = by_name(["tokens", "position_ids", "attention_mask"], True)
    assert read((ids, None, causal), {})["attention_mask"] is None
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 10:] = True
    found = read((ids, None, causal), {"padding_mask": padding})["attention_mask"]
    assert torch.equal(found, ~padding)
    assert read((ids,), {"attention_mask": padding})["attention_mask"] is padding
    square = own.tokens(S, S)
    with pytest.raises(MoeInspectError, match="cannot tell padding from a causal mask"):
        read((square,), {"attention_mask": torch.ones(S, S)})


def test_padding_is_left_out(tmp_path: Path) -> None:
    model, ids = own.gpt(), own.tokens()
    real = torch.ones(B, S, dtype=torch.bool)
    real[1, 10:] = False
    fed = {"input_ids": ids, "attention_mask": real}
    with (
        own.watched(model) as given,
        moe_inspect.record(model, tmp_path / "t", inputs=lambda args, kwargs: fed),
    ):
        for _ in range(2):
            model(ids)
    kept = real.flatten().nonzero()[:, 0].tolist()
    assert own.same(own.path_of(tmp_path / "t"), given, kept) == 4 * 2 * len(kept)
    for wrong, match in ((3, "must return a dict"), ({"tokens": ids}, "returned 'tokens'")):
        with pytest.raises(MoeInspectError, match=match):
            record_once(model, tmp_path / "u", inputs=lambda args, kwargs, wrong=wrong: wrong)


def test_a_config_of_any_kind_or_none_is_fine(tmp_path: Path) -> None:
    class Slots:
        __slots__ = ("width",)

    for n, config in enumerate(({"width": 64}, Slots(), None, nn.Linear(2, 2))):
        model = own.gpt()
        model.config = config
        record_once(model, tmp_path / str(n))
        assert own.path_of(tmp_path / str(n)).n_tokens == T


# --- a model without a router that is known


def test_what_looks_like_a_router_is_named(tmp_path: Path) -> None:
    model = own.gpt(probes=False)
    with pytest.raises(MoeInspectError) as error:
        record_once(model, tmp_path / "t")
    assert "blocks.*.experts.router (Linear) may be one" in str(error.value)
    assert "blocks.*.experts.mlps (8 × Sequential) may be its experts" in str(error.value)
    assert "experts=8" in str(error.value)
    assert candidates(nn.LSTM(4, 4)) is None
    dense = nn.Module()
    dense.gate_proj = nn.Linear(4, 4)
    assert candidates(dense) is None
    with pytest.raises(MoeInspectError, match="is a dense model: it has no routers"):
        find_routers(dense)


def test_topk_is_discovered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = own.gpt(probes=False), own.tokens()
    with own.watched(model) as given, moe_inspect.record(model, tmp_path / "t", discover=True):
        for _ in range(3):
            model(ids).sum().backward()
            torch.randn(3, 8).topk(2)  # not the model's
    trace = own.path_of(tmp_path / "t")
    assert own.same(trace, given) == 4 * 3 * T
    said = capsys.readouterr().err
    assert said.count("found routers in blocks.*.experts: ") == 1
    assert "chooses 2 of 8" in said
    assert "torch.topk chose by" in trace.manifest["model"]["note"]
    compiled = own.gpt(probes=False)
    compiled.compile(backend="eager")
    with pytest.raises(MoeInspectError, match="cannot look into compiled code"):
        record_once(compiled, tmp_path / "u", discover=True)


# --- models


class TinyBlock(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.layer, self.router = layer, nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(self.router(x), -1).topk(2)
        moe_inspect.probe(ids, weights, layer=self.layer, experts=4)
        return x + weights.sum(-1, keepdim=True) * x.tanh()


class Tiny(nn.Module):
    """For compilers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(256, 16)
        self.blocks = nn.ModuleList(TinyBlock(n) for n in range(2))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        for block in self.blocks:
            x = block(x)
        return x


class Probing(nn.Module):
    """Calls `probing` with the number of the forward pass."""

    def __init__(self, probing: Any):
        super().__init__()
        self.probing, self.passes, self.weight = probing, 0, nn.Parameter(torch.zeros(1))

    def forward(self, idx: Tensor) -> Tensor:
        self.probing(self.passes)
        self.passes += 1
        return idx * self.weight


def _of_example(name: str, change: Any) -> Any:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = own.gpt(probes=False)

        @property
        def blocks(self) -> Any:
            return self.gpt.blocks

        def forward(self, tokens: Tensor) -> Tensor:
            x = change(self.gpt.tokens(tokens))
            for block in self.blocks:
                x = x + block.experts(block.norm_2(x)).view_as(x)
            return x

    Changed.__name__ = name
    return Changed()


def SequenceFirst() -> Any:
    return _of_example("SequenceFirst", lambda x: x.transpose(0, 1).contiguous())


def Sliced() -> Any:
    return _of_example("Sliced", lambda x: x[:, S // 2 :].transpose(0, 1).contiguous())

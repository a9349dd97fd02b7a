"""What probes show in the forward of a model that is not transformers', and what that is fed:
tokens, positions, padding."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_inspect
from moe_inspect.capture.hook import probes
from moe_inspect.capture.hook.inputs.arguments import by_name
from moe_inspect.errors import MoeInspectError
from tests.support import own
from tests.test_own import B, S, T, spec


@pytest.mark.parametrize("passes", [1, 4])
def test_a_probe_in_a_forward_is_a_router(tmp_path: Path, passes: int) -> None:
    trace = own.exact(own.gpt(), tmp_path / "t", passes)
    assert [(r.layer, r.experts, r.top_k) for r in trace.routers] == [(n, 8, 2) for n in range(4)]
    assert trace.tokens()["token_id"].tolist() == own.tokens().flatten().tolist() * passes
    assert not probes._recorders


def test_a_probe_shows_nothing_where_no_recorder_is_open() -> None:
    # not even a mistake in it is noticed: nothing is looked at
    moe_inspect.probe(torch.zeros(2, 2), torch.zeros(3), layer=0)


def test_probes_are_counted(tmp_path: Path) -> None:
    model, ids = own.gpt(), own.tokens()
    recorder = moe_inspect.record(model, counts_only=True)
    with own.watched(model) as given, recorder:
        for _ in range(3):
            model(ids)
    counts = recorder.totals().load
    for layer, passes in given.items():
        expected = np.bincount([e for rows in passes for row in rows for e in row], minlength=8)
        assert (counts[layer] == expected).all()
    assert sum(map(sum, counts)) == 3 * T * 4 * 2


@pytest.mark.parametrize("compiled", ["model", "blocks"])
def test_compiled_probes_break_no_graph(tmp_path: Path, compiled: str) -> None:
    """They record, set before the recorder and after."""
    model, ids = tiny(), own.tokens()
    own.record_once(tiny(), tmp_path / "plain", 3)
    fed = model
    if compiled == "model":
        fed = torch.compile(model, backend="eager", fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    fed(ids)
    own.record_once(fed, tmp_path / "t", 3)
    eager, traced = (own.path_of(tmp_path / name) for name in ("plain", "t"))
    for layer in range(2):
        assert own.recorded(traced, layer) == own.recorded(eager, layer)
    fed(ids)
    torch.compiler.reset()


probe, IDS, ONES = moe_inspect.probe, torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1)
# what is said of it → the probe of the n-th pass
MISTAKES: dict[str, Any] = {
    r"probe\(layer=0\) does not say how many experts": lambda n: probe(IDS, ONES, layer=0),
    "both need the same shape": lambda n: probe(IDS, ONES[:, 0], layer=0, experts=2),
    "ids of dtype float32, not integers": lambda n: probe(ONES, ONES, layer=0, experts=2),
    r"probe\(layer=0\) showed the choices of 24 rows in a forward pass of 48 tokens": (
        lambda n: probe(IDS[:24], ONES[:24], layer=0, experts=2)
    ),
    r"probe\(layer=1\) was not called in the first forward pass": (
        lambda n: probe(IDS, ONES, layer=n, experts=2)
    ),
    r"probe\(layer=0\) shows no router logits": lambda n: probe(IDS, ONES, layer=0, experts=2),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes_in_probes_are_named(said: str, tmp_path: Path) -> None:
    with pytest.raises(MoeInspectError, match=said):
        own.record_twice(Probing(MISTAKES[said]), tmp_path / "t", logits="logits" in said)
    if "logits" in said:  # control: without them it is as it should be
        own.record_twice(Probing(MISTAKES[said]), tmp_path / "u")


@pytest.mark.parametrize(
    ("pieces", "refused"),
    [
        (lambda x_BSK: x_BSK.split(8, 1), r"in pieces \[3, 8, K\], .* 3 rows of 16 positions"),
        (lambda x_BSK: [half.flatten(0, 1) for half in x_BSK.split(8, 1)], r"in pieces \[24, K\]"),
        (lambda x_BSK: x_BSK.unbind(0), r"in pieces \[16, K\]"),  # or of so many of three rows
        (lambda x_BSK: x_BSK.split(2, 0), ""),  # whole rows
        (lambda x_BSK: [x_BSK], ""),
        (lambda x_BSK: [x_BSK.flatten(0, 1)], ""),
        (lambda x_BSK: [x_BSK, x_BSK], ""),  # a layer that runs twice
        (lambda x_BSK: [x_BSK.transpose(0, 1)], r"choices \[16, 3, K\] of 3 rows of 16 positions"),
    ],
)
def test_pieces_are_refused_where_their_shape_does_not_tell_their_rows(
    tmp_path: Path, pieces: Any, refused: str
) -> None:
    weights, ids = torch.rand(B, S, 8).topk(2)

    def probing(n: int) -> None:
        for i, w in zip(pieces(ids), pieces(weights), strict=True):
            moe_inspect.probe(i, w, layer=0, experts=8)

    with pytest.raises(MoeInspectError, match=refused) if refused else nullcontext():
        own.record_once(Probing(probing), tmp_path / "t")
    if refused:
        return
    found = own.recorded(own.path_of(tmp_path / "t"), 0)[:T]
    assert found == [frozenset(row) for row in ids.flatten(0, 1).tolist()]


def test_logits_of_a_probe_are_recorded(tmp_path: Path) -> None:
    logits = torch.randn(T, 4)
    values, ids = logits.softmax(1).topk(2)
    model = Probing(lambda n: moe_inspect.probe(ids, values, layer=5, logits=logits))
    own.record_twice(model, tmp_path / "t", logits=True)
    found = own.path_of(tmp_path / "t").logits(layer=5)
    shown = np.stack(found["logits"].to_list())
    assert np.abs(shown - logits.repeat(2, 1).numpy()).max() < 2**-8
    assert own.path_of(tmp_path / "t").routers[0].experts == 4


def test_only_some_layers_are_recorded(tmp_path: Path) -> None:
    own.record_once(own.gpt(), tmp_path / "t", layers=[1, 3])
    assert [r.layer for r in own.path_of(tmp_path / "t").routers] == [1, 3]


# --- models


def tiny() -> Any:
    """For compilers."""

    def choose(self: Any, x: Tensor) -> Tensor:
        weights, ids = F.softmax(self.router(x), -1).topk(2)
        moe_inspect.probe(ids, weights, layer=self.layer, experts=4)
        return x + weights.sum(-1, keepdim=True) * x.tanh()

    def forward(self: Any, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        for block in self.blocks:
            x = block(x)
        return x

    torch.manual_seed(0)
    routers = [nn.Linear(16, 4, bias=False) for _ in range(2)]
    blocks = [own.module("Block", choose, layer=n, router=r) for n, r in enumerate(routers)]
    parts = {"tokens": nn.Embedding(256, 16), "blocks": nn.ModuleList(blocks)}
    return own.module("Tiny", forward, **parts)


class Probing(nn.Module):
    """Calls `probing` with the number of the forward pass."""

    def __init__(self, probing: Any):
        super().__init__()
        self.probing, self.passes, self.weight = probing, 0, nn.Parameter(torch.zeros(1))

    def forward(self, idx: Tensor) -> Tensor:
        self.probing(self.passes)
        self.passes += 1
        return idx * self.weight


# --- what a forward is fed


def test_tokens_are_found_under_any_name() -> None:
    ids = own.tokens()
    hidden = torch.randn(S, B, 8)
    for names, args, kwargs in (
        (["tokens"], (ids,), {}),
        (["x", "idx"], (hidden,), {"idx": ids}),
        (["h", "other"], (hidden, ids), {}),
        ([], (ids,), {}),
    ):
        assert by_name(names, False)(args, kwargs)["input_ids"] is ids
    stage = by_name(["hidden"], True)((hidden,), {})
    assert stage["input_ids"] is None
    assert stage["inputs_embeds"].shape == (B, S, 8)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"src": own.tokens(), "out": own.tokens()}, r"src and out, integers \[3, 16\], may both"),
        ({"input_ids": own.tokens(), "decoder_input_ids": own.tokens()}, "input_ids and decoder_"),
        ({"idx": own.tokens(), "tgt": own.tokens()}, "idx and tgt"),
        ({"t": torch.zeros(3).long(), "label": torch.zeros(3).long()}, "t and label"),
        (
            {"image": torch.zeros(3, 4, 8, 8), "t": torch.zeros(3).long()},
            r"t, integers \[3\], may be a number for each sample of image \[3, 4, 8, 8\]",
        ),
    ],
)
def test_what_may_be_token_ids_as_well_is_refused(given: Any, match: str) -> None:
    """Timesteps, classes, and what an encoder and a decoder are fed."""
    with pytest.raises(MoeInspectError, match=match) as error:
        by_name([*given], False)((), given)
    assert r"inputs=…" in str(error.value)


def test_what_cannot_be_token_ids_is_not_asked_about() -> None:
    ids, one = own.tokens(), own.tokens(1)
    for given, expected in (
        ({"idx": ids, "kinds": ids}, ids),  # its name says it
        ({"x": ids, "targets": ids, "mask": ids, "token_type_ids": ids}, ids),
        ({"at": one[0], "x": one}, one),  # a row of positions
        ({"x": ids, "lengths": ids[:, 0]}, ids),
    ):
        assert by_name([*given], False)((), given)["input_ids"] is expected


def encoder_decoder(probes: bool) -> Any:
    return own.module(
        "EncoderDecoder",
        lambda self, source, target: self.encoder(source).mean() + self.decoder(target),
        encoder=own.gpt(probes),
        decoder=own.gpt(probes),
    )


def test_an_encoder_decoder_is_asked_what_its_routers_are_fed(tmp_path: Path) -> None:
    """Of equal lengths: the decoder's choices would be filed under the encoder's tokens."""
    source, target = own.tokens(), own.tokens(seed=1)

    def record(probes: bool, match: str, **options: Any) -> None:
        model = encoder_decoder(probes)
        refused = pytest.raises(MoeInspectError, match=match)
        with refused, moe_inspect.record(model, tmp_path / "t", **options):
            model(source, target)

    def of(stack: str) -> list[moe_inspect.RouterSpec]:
        return [spec(module=f"{stack}.blocks.*.experts")]

    fed: dict[str, Any] = {"inputs": lambda args, kwargs: {"input_ids": args[1]}}
    asked = "what its routers are fed"
    record(False, r"encoder\.blocks\.0\.experts and decoder\..* are both", routers=of("*"))
    record(False, rf"decoder\.blocks\.0\.experts: .* {asked}", routers=of("decoder"))
    for options in ({}, {"discover": True}):
        record(not options, f"an encoder and a decoder: .* {asked}", **options)
    record(True, r"probe\(layer=0\) showed each token 2 times", **fed)
    record(False, r"encoder\.blocks\.0\.experts and decoder\.", discover=True, **fed)
    model = encoder_decoder(False)
    recorder = moe_inspect.record(model, tmp_path / "u", routers=of("decoder"), **fed)
    with own.watched(model.decoder) as given, recorder:
        model(source, target)
    trace = own.path_of(tmp_path / "u")
    assert own.same(trace, given) == 4 * T
    assert trace.tokens()["token_id"].tolist() == target.flatten().tolist()


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
    fed = {"input_ids": ids, "position_ids": positions, "documents": ["a", "b", "c"]}
    own.record_once(own.gpt(), tmp_path / "t", inputs=lambda args, kwargs: fed)
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
    kept = real.flatten().nonzero()[:, 0].tolist()
    own.exact(model, tmp_path / "t", 2, order=kept, inputs=lambda args, kwargs: fed)
    for wrong, match in ((3, "must return a dict"), ({"tokens": ids}, "returned 'tokens'")):
        with pytest.raises(MoeInspectError, match=match):
            own.record_once(model, tmp_path / "u", inputs=lambda args, kwargs, wrong=wrong: wrong)


def test_a_config_of_any_kind_or_none_is_fine(tmp_path: Path) -> None:
    class Slots:
        __slots__ = ("width",)

    for n, config in enumerate(({"width": 64}, Slots(), None, nn.Linear(2, 2))):
        model = own.gpt()
        model.config = config
        own.record_once(model, tmp_path / str(n))
        assert own.path_of(tmp_path / str(n)).n_tokens == T

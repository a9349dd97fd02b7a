"""What probes show in the forward of a model that is not transformers', right or wrong, and what
that forward is fed: tokens, positions, padding."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_inspect
from moe_inspect.capture.hook import probes
from moe_inspect.capture.hook.arguments import by_name
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.choice import ChoiceReader
from tests.support import own
from tests.test_own import B, S, T, spec


def shown(n: int = 0, K: int = 2, E: int = 8, T: int = T) -> tuple[Tensor, Tensor]:
    """Ids and weights of a pass."""
    generator = torch.Generator().manual_seed(n)
    weights, ids = torch.rand(T, E, generator=generator).topk(K)
    return ids, weights


def probe(ids: Any, weights: Any, **settings: Any) -> None:
    moe_inspect.probe(ids, weights, **{"layer": 0, "experts": 8, **settings})


class Probing(nn.Module):
    """Calls `probing` with the number of the forward pass."""

    def __init__(self, probing: Any):
        super().__init__()
        self.probing, self.passes, self.weight = probing, 0, nn.Parameter(torch.zeros(1))

    def forward(self, idx: Tensor) -> Tensor:
        self.probing(self.passes)
        self.passes += 1
        return idx * self.weight


def refused(path: Path, match: str, probing: Any, **options: Any) -> None:
    with pytest.raises(MoeInspectError, match=match):
        own.record_twice(Probing(probing), path, overwrite=True, **options)


@pytest.mark.parametrize("passes", [1, 4])
def test_a_probe_in_a_forward_is_a_router(tmp_path: Path, passes: int) -> None:
    trace = own.exact(own.gpt(), tmp_path / "t", passes)
    assert [(r.layer, r.experts, r.top_k) for r in trace.routers] == [(n, 8, 2) for n in range(4)]
    assert trace.tokens()["token_id"].tolist() == own.tokens().flatten().tolist() * passes
    assert not probes._recorders
    # not even a mistake in it is noticed now: nothing is looked at
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


def tiny() -> Any:
    """For compilers."""

    def choose(self: Any, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        moe_inspect.probe(ids, weights, layer=self.layer, experts=4)
        return x + weights.sum(-1, keepdim=True) * x.tanh()

    torch.manual_seed(0)
    routers = [nn.Linear(16, 4, bias=False) for _ in range(2)]
    blocks = [own.module("Block", choose, layer=n, router=r) for n, r in enumerate(routers)]
    parts = {"tokens": nn.Embedding(256, 16), "blocks": nn.Sequential(*blocks)}
    return own.module("Tiny", lambda self, idx: self.blocks(self.tokens(idx)), **parts)


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


def test_logits_of_a_probe_are_recorded(tmp_path: Path) -> None:
    logits = torch.randn(T, 4)
    values, ids = logits.softmax(1).topk(2)
    model = Probing(lambda n: moe_inspect.probe(ids, values, layer=5, logits=logits))
    own.record_twice(model, tmp_path / "t", logits=True)
    found = own.path_of(tmp_path / "t").logits(layers=5)
    shown = np.stack(found["logits"].to_list())
    assert np.abs(shown - logits.repeat(2, 1).numpy()).max() < 2**-8
    assert own.path_of(tmp_path / "t").routers[0].experts == 4


def test_only_some_layers_are_recorded(tmp_path: Path) -> None:
    own.record_once(own.gpt(), tmp_path / "t", layers=[1, 3])
    assert [r.layer for r in own.path_of(tmp_path / "t").routers] == [1, 3]
    for layers in ([99], [1, 99]):
        with pytest.raises(MoeInspectError, match=r"no probe in layer 99: .* layers 0, 1, 2, 3"):
            own.record_once(own.gpt(), tmp_path / "t", layers=layers, overwrite=True)


INTEGERS = torch.uint8, torch.int16, torch.int32, torch.int64
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(("ids", "weights"), zip(INTEGERS, FLOATS, strict=True))
def test_any_dtypes_are_recorded(tmp_path: Path, ids: Any, weights: Any) -> None:
    def probing(n: int) -> None:
        i, w = shown(n)
        probe(i.to(ids), w.to(weights))

    own.record_twice(Probing(probing), tmp_path / "t")
    expected = [frozenset(row) for n in range(2) for row in shown(n)[0].tolist()]
    assert own.recorded(own.path_of(tmp_path / "t"), 0) == expected
    assert moe_inspect.check(tmp_path / "t", quick=True).ok


@pytest.mark.parametrize("options", [{}, {"counts_only": True}])
@pytest.mark.parametrize("empty", [(B, 0), (0, S)])
@pytest.mark.parametrize("at", [0, 1])
def test_empty_passes_are_passes(
    tmp_path: Path, options: Any, empty: tuple[int, int], at: int
) -> None:
    model, sizes = Probing(None), [(B, S)] * 2
    sizes.insert(at, empty)
    with moe_inspect.record(model, tmp_path / "t", **options):
        for b, s in sizes:
            model.probing = lambda n, T=b * s: probe(*shown(T=T))
            model(own.tokens(b, s))
    assert own.path_of(tmp_path / "t").n_tokens == 2 * T
    assert moe_inspect.check(tmp_path / "t", quick=True).ok


# --- choices that are none


@pytest.mark.parametrize("options", [{}, {"counts_only": True}, {"ring_tokens": 64}])
def test_a_pass_whose_choice_is_none_is_refused(tmp_path: Path, options: Any) -> None:
    """One expert would be written into every slot. One beyond the experts would look like a slot
    that went to none. `verify` refuses one that is there twice, but not -1."""
    (ids, weights), out = shown(), tmp_path / "t"
    for K in (1, 3):
        said = f"chose {K} experts per token, but 2 in its first"
        refused(out, said, lambda n, K=K: probe(*shown(n, K if n else 2)), **options)
    said = r"probe\(layer=0\) chose expert 8 but is declared with 8 experts"
    for late in (0, 1):
        refused(out, said, lambda n, late=late: probe(ids + (n == late), weights), **options)

    def twice(n: int) -> None:
        ids, weights = shown(n, K=3)
        ids[:, 1:] = -1
        if n:
            ids[5, 2] = ids[5, 0]
        probe(ids, weights)

    expert = int(shown(1, K=3)[0][5, 0])
    refused(out, rf"probe\(layer=0\) chose expert {expert} twice", twice, **options)


def test_mistakes_in_probes_are_named(tmp_path: Path) -> None:
    (ids, weights), out = shown(), tmp_path / "t"

    def of(*args: Any, **kwargs: Any) -> Any:
        return lambda n: probe(*args, **kwargs)

    refused(out, r"two tensors, ids and weights, not \[48, 2\], NoneType", of(ids, None))
    refused(out, r"two tensors, ids and weights, not list, \[48, 2\]", of(ids.tolist(), weights))
    refused(out, "a bool map and does not state its top-k: give it ids", of(weights > 0, weights))
    refused(out, "both need the same shape", of(ids, weights[:, 0]))
    refused(out, "ids of dtype float32, not integers", of(weights, weights))
    refused(out, r"shows dropped \[48\]", of(ids, weights, dropped=ids[:, 0] > 0))
    refused(out, r"48 experts.* are \[\.\.\., 1\]", of(ids[:, 0], weights[:, 0]))
    # half of the tokens with two experts each are as many numbers as tokens
    said = r"probe\(layer=0\) showed the choices of 24 rows in a forward pass of 48 tokens"
    refused(out, said, of(ids[:24], weights[:24]))
    late = r"probe\(layer=1\) was not called in the first forward pass"
    refused(out, late, lambda n: probe(ids, weights, layer=n))
    for layer in (torch.tensor(0), "0", -1):
        refused(out, "the layer is a number of 0 or more", of(ids, weights, layer=layer))
    for experts in (8.0, torch.tensor(8), "8", 0, -3):
        refused(out, "give it a number of 1 or more", of(ids, weights, experts=experts))
    unknown = r"probe\(layer=0\) does not say how many experts"
    refused(out, unknown, of(ids, weights, experts=None))

    def both(n: int) -> None:
        for E in (8, 9):
            probe(ids, weights, experts=E)

    refused(out, "called with experts=9 and with 8", both)
    for E in (1, 4):
        logits = weights[:, :1].expand(T, E)
        refused(out, r"shows logits \[48, .\]", of(ids, weights, logits=logits), logits=True)
    refused(out, r"probe\(layer=0\) shows no router logits", of(ids, weights), logits=True)
    of_numpy = Probing(of(ids, weights, layer=np.int64(3), experts=np.int32(8)))
    own.record_once(of_numpy, out, overwrite=True)
    assert own.path_of(out).routers[0].layer == 3


def test_what_is_no_choice_of_a_spec_is_named() -> None:
    reader = ChoiceReader("h.0.router", 4, 2, "give it")
    ids, weights = shown(E=4)
    for found in (ids, (ids, weights, weights), None, (ids, 3)):
        with pytest.raises(MoeInspectError, match=r"choice of h\.0\.router must be two tensors"):
            reader.choice(found)
    for wrong, match in (
        (torch.ones(T, 4), "chose 4 experts for a token in its bool map, and its top-k is 2"),
        (torch.ones(T, 2), r"gives a bool map \[48, 2\], not \[\.\.\., 4\]"),
    ):
        with pytest.raises(MoeInspectError, match=match):
            reader.choice((wrong.bool(), wrong))
    with pytest.raises(MoeInspectError, match=r"shows logits \[48, 2\]"):
        reader.logits(weights)
    assert reader.choice((ids, weights))[0] is not None  # control


@pytest.mark.parametrize("shape", [(B, S), (T,)])
@pytest.mark.parametrize("weights", [(1,), ()])
@pytest.mark.parametrize("first", [0, 1])
def test_one_expert_for_each_token_needs_a_last_dimension(
    tmp_path: Path, shape: tuple[int, ...], weights: tuple[int, ...], first: int
) -> None:
    """Whatever else is wrong with it, in the first pass and in a later one."""
    ids = torch.arange(T).reshape(shape) % 3

    def probing(n: int) -> None:
        shape = weights if n == first else (1,)
        probe(ids if n == first else ids[..., None], torch.ones(*ids.shape, *shape))

    refused(tmp_path / "t", r"unsqueeze\(-1\)", probing)


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
    ids, weights = (of.view(B, S, 2) for of in shown())

    def probing(n: int) -> None:
        for i, w in zip(pieces(ids), pieces(weights), strict=True):
            probe(i, w)

    with pytest.raises(MoeInspectError, match=refused) if refused else nullcontext():
        own.record_once(Probing(probing), tmp_path / "t")
    if not refused:
        found = own.recorded(own.path_of(tmp_path / "t"), 0)[:T]
        assert found == [frozenset(row) for row in shown()[0].tolist()]


# --- what a forward is fed


def test_tokens_are_found_under_any_name() -> None:
    """Beside what cannot be token ids."""
    ids, one, hidden = own.tokens(), own.tokens(1), torch.randn(S, B, 8)
    by_keyword = (
        {"idx": ids, "kinds": ids},  # its name says it
        {"x": ids, "targets": ids, "mask": ids, "token_type_ids": ids},
        {"at": one[0], "x": one},  # a row of positions
        {"x": ids, "lengths": ids[:, 0]},
    )
    for names, args, kwargs in (
        (["tokens"], (ids,), {}),
        (["x", "idx"], (hidden,), {"idx": ids}),
        (["h", "other"], (hidden, ids), {}),
        ([], (ids,), {}),
        *(([*given], (), given) for given in by_keyword),
    ):
        found = by_name(names, False)(args, kwargs)["input_ids"]
        assert found is (one if "at" in kwargs else ids), names
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


def test_an_encoder_decoder_is_asked_what_its_routers_are_fed(tmp_path: Path) -> None:
    """Of equal lengths: the decoder's choices would be filed under the encoder's tokens."""
    source, target = own.tokens(), own.tokens(seed=1)

    def encoder_decoder(probes: bool) -> Any:
        return own.module(
            "EncoderDecoder",
            lambda self, source, target: self.encoder(source).mean() + self.decoder(target),
            encoder=own.gpt(probes),
            decoder=own.gpt(probes),
        )

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
    record(True, f"an encoder and a decoder: .* {asked}")
    record(True, r"probe\(layer=0\) showed each token 2 times", **fed)
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


def test_masks_are_read_as_what_they_are() -> None:
    """Ones and zeros of any type; added to scores, a mask is 0 for tokens; one token is one. Those
    of other shapes are no padding; Megatron's is True where a position is masked."""
    ids, real = own.tokens(), torch.ones(B, S, dtype=torch.bool)
    real[1, 10:] = False
    zeros, one = torch.zeros(B, S), torch.ones(1, 1)
    read = by_name(["tokens", "attention_mask"], False)
    for given, expected in (
        *((real.to(dtype), real) for dtype in (torch.int64, torch.float32, torch.bfloat16)),
        *((zeros.masked_fill(~real, least), real) for least in (float("-inf"), -1e9)),
        (zeros, torch.ones(B, S)),
        (one, one),
    ):
        b, s = given.shape
        assert torch.equal(read((ids[:b, :s], given), {})["attention_mask"] != 0, expected != 0)
    causal = torch.ones(S, S).tril().logical_not()[None, None].expand(B, 1, S, S)
    read = by_name(["tokens", "position_ids", "attention_mask"], True)
    assert read((ids, None, causal), {})["attention_mask"] is None
    found = read((ids, None, causal), {"padding_mask": ~real})["attention_mask"]
    assert torch.equal(found, real)
    assert read((ids,), {"attention_mask": real})["attention_mask"] is real
    with pytest.raises(MoeInspectError, match="cannot tell padding from a causal mask"):
        read((own.tokens(S, S),), {"attention_mask": torch.ones(S, S)})


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

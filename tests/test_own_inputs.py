"""What the forward of a model that is not transformers' is fed: tokens, positions, padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_inspect
from moe_inspect.capture.hook.inputs.arguments import by_name
from moe_inspect.errors import MoeInspectError
from tests import own
from tests.test_own import spec

B, S = 3, 16
T = B * S


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


class EncoderDecoder(nn.Module):
    def __init__(self, probes: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = own.gpt(probes), own.gpt(probes)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.encoder(source).mean() + self.decoder(target)


def test_an_encoder_decoder_is_asked_what_its_routers_are_fed(tmp_path: Path) -> None:
    """Of equal lengths: the decoder's choices would be filed under the encoder's tokens."""
    source, target = own.tokens(), own.tokens(seed=1)

    def record(probes: bool, match: str, **options: Any) -> None:
        model = EncoderDecoder(probes)
        with (
            pytest.raises(MoeInspectError, match=match),
            moe_inspect.record(model, tmp_path / "t", **options),
        ):
            model(source, target)

    def of(stack: str) -> list[moe_inspect.RouterSpec]:
        return [spec(module=f"{stack}.blocks.*.experts")]

    fed: dict[str, Any] = {"inputs": lambda args, kwargs: {"input_ids": args[1]}}
    record(False, r"encoder\.blocks\.0\.experts and decoder\..* are both", routers=of("*"))
    record(
        False, r"decoder\.blocks\.0\.experts: .* what its routers are fed", routers=of("decoder")
    )
    for options in ({}, {"discover": True}):
        record(not options, "an encoder and a decoder: .* what its routers are fed", **options)
    record(True, r"probe\(layer=0\) showed each token 2 times", **fed)
    record(False, r"encoder\.blocks\.0\.experts and decoder\.", discover=True, **fed)
    model = EncoderDecoder(False)
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
            own.record_once(model, tmp_path / "u", inputs=lambda args, kwargs, wrong=wrong: wrong)


def test_a_config_of_any_kind_or_none_is_fine(tmp_path: Path) -> None:
    class Slots:
        __slots__ = ("width",)

    for n, config in enumerate(({"width": 64}, Slots(), None, nn.Linear(2, 2))):
        model = own.gpt()
        model.config = config
        own.record_once(model, tmp_path / str(n))
        assert own.path_of(tmp_path / str(n)).n_tokens == T

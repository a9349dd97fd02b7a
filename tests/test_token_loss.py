"""The loss of each token's successor (`--token-loss`): the cross-entropy of the model's own logits,
however it is run; and where there is none, that is said."""

from __future__ import annotations

import io
import itertools
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

import moe_inspect
from moe_inspect.capture import token_loss as losses
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import load_config, load_model
from tests.support import own
from tests.support.families import FAMILIES, build
from tests.support.zoo import VOCABULARY, token_batch
from tests.support.zoo import build as build_any

STEPS = 3
COLUMNS = ["loss_nats", "entropy_nats"]


def expected(logits_SV: torch.Tensor, ids_S: torch.Tensor) -> np.ndarray:
    """[S, 2] of a sequence, by torch's own functions in float64; NaN at its end."""
    logits_SV = logits_SV[:-1].double()
    loss_S = F.cross_entropy(logits_SV, ids_S[1:], reduction="none")
    entropy_S = torch.distributions.Categorical(logits=logits_SV).entropy()
    values = torch.stack([loss_S, entropy_S], 1)
    return torch.cat([values, torch.full((1, 2), torch.nan)]).numpy()


def of_rows(model: Any, padded: dict[str, torch.Tensor]) -> list[np.ndarray]:
    lengths, logits = padded["attention_mask"].sum(1).tolist(), model(**padded).logits.detach()
    rows = zip(logits, padded["input_ids"], lengths, strict=True)
    return [expected(of_row[:n], ids[:n]) for of_row, ids, n in rows]


def by_sequence(path: Path) -> list[np.ndarray]:
    tokens = moe_inspect.open_trace(path).tokens().sort_values("position")
    return [of[COLUMNS].to_numpy(float) for _, of in tokens.groupby("sequence")]


def close(got: Any, want: Any) -> None:
    """As float32 logits are that are computed in other shapes."""
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_it_is_the_cross_entropy_of_the_models_own_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows, with logits of all positions and of the last; whole rows and decode steps."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 4 * VOCABULARY)  # a row is longer than one
    model, padded = build(family), token_batch([9, 5])
    ids = torch.arange(2 * (11 + STEPS)).reshape(2, -1) * 7 % 290 + 5
    with moe_inspect.record(model, tmp_path / "t", token_loss=True):
        model(**padded)
        short = model(**padded, logits_to_keep=1).logits
        output = model(ids[:, :11], logits_to_keep=1)
        for step in range(11, 11 + STEPS):
            output = model(ids[:, step : step + 1], past_key_values=output.past_key_values)
    assert short.shape[1] == 1
    found = by_sequence(tmp_path / "t")
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert list(tokens["phase"]).count("decode") == 2 * STEPS
    want = of_rows(model, padded) * 2
    want += [expected(model(row[None]).logits[0], row) for row in ids]
    close(np.concatenate(found), np.concatenate(want))
    # and no other token's
    assert np.abs(found[0][1:-1] - want[0][:-2]).max() > 0.1


@torch.no_grad()
def test_no_more_logits_than_a_chunk_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 4 * VOCABULARY)
    model, sizes = build("mixtral"), list[int]()
    model.lm_head.register_forward_hook(lambda m, a, out: sizes.append(out.numel()))
    with moe_inspect.record(model, tmp_path / "t", token_loss=True):
        model(**token_batch([40, 40]), logits_to_keep=1)
    assert sum(sizes) == (2 + 2 + 2 * 39) * VOCABULARY  # own, to compare, and of each token
    assert max(sizes) <= losses.CHUNK_LOGITS < 80 * VOCABULARY


@pytest.mark.parametrize("keep", [0, 1, 3])
@torch.no_grad()
def test_no_position_has_its_logits_made_twice(keep: int, tmp_path: Path) -> None:
    """Of a caller that asks for all, the last, or the last few; the first pass also compares."""
    model, batch, made = build("mixtral"), token_batch([9, 9]), list[int]()
    hook = model.lm_head.register_forward_hook(lambda m, a, out: made.append(out.numel()))
    with moe_inspect.record(model, tmp_path / "t", token_loss=True):
        model(**batch, logits_to_keep=keep)
        before = len(made)
        model(**batch, logits_to_keep=keep)
    hook.remove()
    asked = 2 * (keep or 9)
    assert made[before:] == [n * VOCABULARY for n in (asked, 18 - asked) if n]
    close(np.concatenate(by_sequence(tmp_path / "t")), np.concatenate(of_rows(model, batch) * 2))


@pytest.mark.parametrize("generate", [0, 4])
def test_of_a_traced_corpus(generate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted and resumed it is the same to the digit; the model's choices are as without."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 100 * 2048)
    options: dict[str, Any] = {"max_tokens": 1500, "max_length": 120, "batch_tokens": 300}
    options |= {"generate": generate, "dtype": "float32"}
    trace = moe_inspect.trace_model("demo", tmp_path / "t", token_loss=True, **options)
    tokens: Any = trace.tokens()
    # each sequence alone, with the choices of the trace: in a batch a tie may be decided otherwise
    model = load_model("demo", load_config("demo"), dtype="float32")
    rows = tokens.sort_values("position").groupby("sequence")["token_id"]
    sequences = [torch.tensor(of.to_numpy(np.int64)) for _, of in rows]
    with torch.no_grad(), moe_inspect.intervene(model, replay=trace):
        want = [expected(model(ids[None]).logits[0], ids) for ids in sequences]
    close(np.concatenate(by_sequence(trace.path)), np.concatenate(want))
    assert tokens["loss_nats"].isna().sum() == tokens["sequence"].nunique() > 10
    assert ("decode" in set(tokens["phase"])) == bool(generate)
    assert moe_inspect.check(tmp_path / "t", quick=True).ok

    calls, again = itertools.count(1), {**options, "token_loss": True}

    def stop(done: int, total: int | None) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moe_inspect.trace_model("demo", tmp_path / "u", progress=stop, **again)
    part = moe_inspect.open_trace(tmp_path / "u")
    assert 0 < part.n_tokens < trace.n_tokens
    assert part.tokens()["loss_nats"].isna().sum() == part.tokens()["sequence"].nunique()
    resumed = moe_inspect.trace_model("demo", tmp_path / "u", resume=True, **again)
    pd.testing.assert_frame_equal(resumed.tokens(), tokens)

    bare = moe_inspect.trace_model("demo", tmp_path / "bare", **options)
    pd.testing.assert_frame_equal(bare.tokens(), tokens.drop(columns=COLUMNS))
    pd.testing.assert_frame_equal(bare.routing(), trace.routing())
    assert "token_loss" not in bare.manifest["capture"]
    assert "loss_nats" not in bare.manifest["columns"]


@torch.no_grad()
def test_what_follows_may_come_with_the_next_pass(tmp_path: Path) -> None:
    """A pass of other text in between, one that is not recorded, ends what was before."""
    model, ids = build("qwen3_moe"), torch.arange(20)[None] * 11 % 290 + 5
    wanted = expected(model(ids).logits[0], ids[0])
    with moe_inspect.record(model, tmp_path / "t", token_loss=True) as recorder:
        cache = model(ids[:, :8]).past_key_values
        cache = model(ids[:, 8:9], past_key_values=cache).past_key_values
        model(ids[:, 9:], past_key_values=cache)
        position = torch.tensor([[*range(12), *range(8)]])
        model(ids, position_ids=position)  # packed
        cache = model(ids[:, :8]).past_key_values
        model(ids[:, :3])
        cache = model(ids[:, 8:12], past_key_values=cache).past_key_values
        with recorder.paused():
            cache = model(ids[:, 12:14], past_key_values=cache).past_key_values
        model(ids[:, 14:], past_key_values=cache)
    found = by_sequence(tmp_path / "t")
    close(found[0], wanted)
    for got, known in zip(found[1:3], (11, 7), strict=True):
        assert np.isnan(got[:, 0]).tolist() == [*[False] * known, True]
    ended = found[3]
    assert np.isnan(ended[[7, 11]]).all()
    close(ended[:7], wanted[:7])
    close(ended[8:11], wanted[8:11])
    close(found[5][:-1], wanted[14:-1])
    assert np.isnan(found[5][-1]).all()


@torch.no_grad()
def test_generated_by_transformers(tmp_path: Path) -> None:
    """Left-padded prompts; the model is the same to the bit."""
    model = build("mixtral")
    ids, mask = torch.arange(12).reshape(2, 6) + 9, torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None}
    bare = model.generate(ids, **options)
    with moe_inspect.record(model, tmp_path / "t", token_loss=True):
        done = model.generate(ids, **options)
    assert torch.equal(bare, done)
    for row, got, start in zip(done[:, :-1], by_sequence(tmp_path / "t"), (0, 2), strict=True):
        logits = model(row[None, start:]).logits[0]
        close(got, expected(logits, row[start:]))


@torch.no_grad()
def test_of_beams_a_token_that_another_row_goes_on_from_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss there is is that of the token which follows it in its row."""
    model, ids = build("olmoe"), torch.arange(2 * 6).reshape(2, 6) * 7 % 290 + 5
    passes, caches, moved, said = list[Any](), list[Any](), list[Any](), io.StringIO()

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        passes.append((kwargs["input_ids"].clone(), output.logits[:, -1].clone()))
        caches[:] = [value for value in output.values() if hasattr(value, "reorder_cache")]
        moved.append(None)

    stock = DynamicCache.reorder_cache

    def reorder(cache: Any, beam_idx: Any) -> None:
        moved[-1] = beam_idx.clone()
        stock(cache, beam_idx)

    hook = model.register_forward_hook(watch, with_kwargs=True)
    monkeypatch.setattr(DynamicCache, "reorder_cache", reorder)
    with redirect_stderr(said), moe_inspect.record(model, tmp_path / "t", token_loss=True):
        model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False, eos_token_id=None)
    hook.remove()
    assert said.getvalue().count("changed places (beam search)") == 1
    assert "reorder_cache" not in vars(caches[0]), "the cache is as it was"
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    last = tokens.groupby(["batch", "sequence"]).tail(1)
    found = [of["loss_nats"].to_numpy() for _, of in last.groupby("batch")]
    some = 0
    for step in range(len(passes) - 1):
        kept = moved[step] == torch.arange(len(moved[step]))
        logits, following = passes[step][1], passes[step + 1][0][:, -1]
        wanted = F.cross_entropy(logits, following, reduction="none")
        np.testing.assert_array_equal(np.isnan(found[step]), ~kept.numpy())
        close(found[step][kept], wanted[kept])
        some += int((~kept).sum())
    assert some, "control: rows changed places"


def test_in_training(tmp_path: Path) -> None:
    """With a gradient, and with a backward pass that runs layers again."""
    model, batch = build("olmoe"), token_batch([9, 5])
    model.train()
    model.gradient_checkpointing_enable()
    with moe_inspect.record(model, tmp_path / "t", token_loss=True):
        for _ in range(2):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            assert model.lm_head.weight.grad.abs().sum() > 0
    close(np.concatenate(by_sequence(tmp_path / "t")), np.concatenate(of_rows(model, batch) * 2))


@torch.no_grad()
def test_compiled(tmp_path: Path) -> None:
    model, batch = build("olmoe"), token_batch([9, 5])
    called = torch.compile(model, backend="eager")
    with moe_inspect.record(called, tmp_path / "t", token_loss=True):
        called(**batch)
        called(**batch)
    close(np.concatenate(by_sequence(tmp_path / "t")), np.concatenate(of_rows(model, batch) * 2))
    called = torch.compile(build("mixtral"), backend="eager")
    recording = moe_inspect.record(called, tmp_path / "few", token_loss=True)
    with pytest.raises(MoeInspectError, match="call it without logits_to_keep"), recording:
        called(**batch, logits_to_keep=1)


@torch.no_grad()
def test_of_an_encoder_decoder_the_decoders_tokens(tmp_path: Path) -> None:
    model = build_any("switch_transformers")
    read, said = torch.arange(7)[None] + 20, torch.arange(6)[None] * 3 + 40
    with moe_inspect.record(model, tmp_path / "t", token_loss=True):
        encoded = model.get_encoder()(read)
        output = model(encoder_outputs=encoded, decoder_input_ids=said[:, :4])
        cache = output.past_key_values
        model(encoder_outputs=encoded, decoder_input_ids=said[:, 4:], past_key_values=cache)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    encoded = tokens["phase"] == "encode"
    assert encoded.sum() == 7
    assert tokens.loc[encoded, COLUMNS].isna().all(axis=None)
    logits = model(input_ids=read, decoder_input_ids=said).logits[0]
    got = tokens.loc[~encoded, COLUMNS].to_numpy(float)
    close(got, expected(logits, said[0]))


@torch.no_grad()
def test_of_a_model_of_ones_own(tmp_path: Path) -> None:
    """It returns the logits of all positions; each decoded token's pass reads all before it."""
    text = tmp_path / "text.txt"
    text.write_text("a model of one's own reads this, and goes on")
    model = own.gpt()
    torch.save(model.state_dict(), tmp_path / "gpt.pt")
    loader = own.example().load
    options: dict[str, Any] = {"loader": loader, "data": [str(text)], "generate": 3}
    options["token_loss"] = True
    tokens = moe_inspect.trace_model(str(tmp_path / "gpt.pt"), tmp_path / "t", **options).tokens()
    assert set(tokens["phase"]) == {"prefill", "decode"}
    ids = torch.tensor(tokens["token_id"].to_numpy(np.int64))
    logits = model(ids[None])[0]
    close(tokens[COLUMNS].to_numpy(), expected(logits, ids))


def test_where_there_is_none_that_is_said(tmp_path: Path) -> None:
    for family, options, said in (
        ("openai_privacy_filter", {}, "does not predict the next token"),
        ("diffusion_gemma", {}, "does not predict the next token"),
        ("mixtral", {"counts_only": True}, "counts_only keeps no token losses"),
    ):
        with pytest.raises(MoeInspectError, match=said) as error:
            moe_inspect.record(build_any(family), tmp_path / "t", token_loss=True, **options)
        assert "\n" not in str(error.value)
    model = build("mixtral")
    recording = moe_inspect.record(model.model, tmp_path / "t", token_loss=True)
    with torch.no_grad(), pytest.raises(MoeInspectError, match="returned no logits"), recording:
        model.model(**token_batch([5]))
    with torch.no_grad(), moe_inspect.record(model, tmp_path / "u", token_loss=True) as recorder:
        model(**token_batch([5]))
        with pytest.raises(MoeInspectError, match="without token losses"):
            recorder.step(5)


def test_a_head_that_does_not_give_the_models_logits_is_not_used(tmp_path: Path) -> None:
    """What a model does outside its head is seen in the last position, where it makes both."""
    model = build("mixtral")
    stock = type(model).forward

    class Altered(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = stock(self, *args, **kwargs)
            if kwargs.get("attention_mask") is not None:
                output.logits = output.logits.flip(-1)
            return output

    Altered.__module__, model.__class__ = type(model).__module__, Altered
    said = "not those of its last hidden states"
    recording = moe_inspect.record(model, tmp_path / "t", token_loss=True)
    with torch.no_grad(), pytest.raises(MoeInspectError, match=said), recording:
        model(**token_batch([5, 3]), logits_to_keep=1)

"""`record`: whatever is done with the model inside the block, the trace holds each routed token
once, as every family executes it, and the model is left as it was. Passes in any order:
test_recorder_states."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.capture.hook.inputs.arguments import length_of, mask_of
from moe_inspect.capture.hook.inputs.rows import CachedRows
from moe_inspect.errors import MoeInspectError
from tests.support.families import FAMILIES, NO_INTERFACE, build, handed_over, moe_layers
from tests.support.sweep import sample
from tests.support.zoo import recorded, token_batch

LENGTHS = [9, 5, 12]
DISPATCHED = sorted(set(FAMILIES) - NO_INTERFACE)
CASES = [*((f, "tap") for f in FAMILIES), *((f, "dispatch") for f in DISPATCHED)]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def slots(trace: moe_inspect.Trace, layer: int, prefix: str) -> np.ndarray:
    return trace.routing(layers=layer).filter(like=prefix).to_numpy()


# --- against what the experts' own function receives, to the bit; that the tokens are those which
# change when an expert is disturbed: test_zoo


@pytest.mark.parametrize(("family", "capture"), sample(CASES, 4))
def test_recorded_is_what_executed(family: str, capture: str, tmp_path: Path) -> None:
    model, inputs = build(family), token_batch(LENGTHS)
    if family in DISPATCHED:
        model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        stock = model(**inputs).logits
        with moe_inspect.record(model, tmp_path / "t", capture=capture):
            assert torch.equal(model(**inputs).logits, stock)
    trace = moe_inspect.open_trace(tmp_path / "t")
    real = inputs["attention_mask"].flatten().bool().numpy()
    assert [r.layer for r in trace.routers] == moe_layers(family)
    assert trace.n_tokens == sum(LENGTHS)
    for layer in moe_layers(family):
        executed_ids, executed_weights = handed_over(model, layer, inputs)
        rounded = executed_weights[real].astype(np.float16).astype(np.float32)
        order = np.argsort(-rounded, axis=1, kind="stable")  # the first choice first
        for name, executed in (("expert_", executed_ids[real]), ("weight_", rounded)):
            assert (slots(trace, layer, name) == np.take_along_axis(executed, order, 1)).all()


@pytest.mark.parametrize("family", sample(FAMILIES, 3))
def test_logits_are_those_before_the_activation(family: str, tmp_path: Path) -> None:
    """Against the product of the router's weight with its input, at the linear layer's own call."""
    model, inputs = build(family), token_batch(LENGTHS)
    trace = recorded(model, tmp_path / "t", inputs, logits=True)
    real = inputs["attention_mask"].flatten().bool().numpy()
    for router, layer in enumerate(moe_layers(family)):
        block = model.model.layers[layer]
        weight_of = {n: p for n, p in block.named_parameters() if p.shape == (8, 32)}
        name, weight = next((n, p) for n, p in weight_of.items() if "shared_expert_gate" not in n)
        gate = block.get_submodule(name.rpartition(".")[0])
        seen: list[torch.Tensor] = []
        hook = gate.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        expected = torch.nn.functional.linear(seen[0], weight, getattr(gate, "bias", None))
        expected = expected.reshape(-1, 8).detach().numpy()[real]
        got = next(trace.shards).logits(router)
        assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


def test_bf16_weights_are_kept_exactly(tmp_path: Path) -> None:
    # Mixtral hands over float32 in any case
    model, inputs = build("olmoe", torch.bfloat16), token_batch(LENGTHS)
    trace = recorded(model, tmp_path / "t", inputs)
    assert trace.manifest["capture"]["weight_dtype"] == "bfloat16"
    _, executed = handed_over(model, 1, inputs)
    real = inputs["attention_mask"].flatten().bool().numpy()
    assert (slots(trace, 1, "weight_") == executed[real]).all()


# --- what is done within


def test_labels_name_documents_and_domains(model: Any, tmp_path: Path) -> None:
    recording = moe_inspect.record(model, tmp_path / "t", domains=["x", "y", "x"])
    with recording as recorder, torch.no_grad():
        recorder.label(documents=["a", "b", "c"])  # the domains stay
        model(**token_batch(LENGTHS))
        recorder.label(documents=["same", "same"], domains=["z", "z"])
        model(**token_batch([3, 3]))
        recorder.label(domains=["one too few"])
        says = "domains has 1 values, the forward pass has 3 rows"
        with pytest.raises(MoeInspectError, match=says):
            model(**token_batch(LENGTHS))
    trace = moe_inspect.open_trace(tmp_path / "t")
    documents = trace.documents()[["source", "domain", "tokens"]].to_numpy().T.tolist()
    assert documents == [["a", "b", "c", "same"], ["x", "y", "x", "z"], [*LENGTHS, 6]]
    sizes = trace.tokens().groupby("domain", observed=True).size()
    assert sizes.to_dict() == {"x": 21, "y": 5, "z": 6}
    assert trace.tokens()["sequence"].nunique() == 5


def test_packed_rows_are_split_where_positions_start_again(model: Any, tmp_path: Path) -> None:
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    inputs = {"input_ids": token_batch([12])["input_ids"], "position_ids": position}
    tokens = recorded(model, tmp_path / "t", inputs).tokens()
    assert tokens["sequence"].tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert tokens["position"].tolist() == position[0].tolist()


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_goes_on_with_its_sequences(cache: str | None, model: Any, tmp_path: Path) -> None:
    ids = token_batch([6, 6])["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    usual = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with moe_inspect.record(model, tmp_path / "t"):
        out = model.generate(ids, attention_mask=mask, cache_implementation=cache, **usual)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert tokens["sequence"].nunique() == 2
    for document, padding in enumerate((0, 3)):
        own = tokens[tokens["document"] == document]
        assert own["token_id"].tolist() == out[document, padding:-1].tolist()  # the last is not fed
        assert own["position"].tolist() == list(range(10 - padding))
        assert own["phase"].tolist() == ["prefill"] * (6 - padding) + ["decode"] * 4


def test_dispatch_has_the_gradients_of_stock(tmp_path: Path) -> None:
    inputs = token_batch(LENGTHS)
    gradients = []
    for capture in ("tap", "dispatch"):
        model = build("qwen3_moe").train()
        model.set_experts_implementation("grouped_mm")
        with moe_inspect.record(model, tmp_path / capture, capture=capture):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("gate.weight" in name and grad.any() for name, grad in gradients[0].items())
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(expected + 1, expected)


def test_inference_mode_may_begin_and_end(model: Any, tmp_path: Path) -> None:
    with moe_inspect.record(model, tmp_path / "t"):
        with torch.inference_mode():
            model(**token_batch([5]))
        with torch.no_grad():
            model(**token_batch([3]))
        model(**token_batch([50]))  # and a larger one needs a new page
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 58


def test_counts_equal_the_decisions_counted(model: Any, tmp_path: Path) -> None:
    batches = [token_batch(LENGTHS, seed) for seed in range(5)]
    domains = ["x", "y", "x"]
    full = recorded(model, tmp_path / "full", *batches, domains=domains)
    counts = recorded(model, tmp_path / "counts", *batches, domains=domains, counts_only=True)
    assert counts.n_tokens == full.n_tokens
    assert counts.documents().equals(full.documents())
    rows = full.routing().merge(full.tokens(), on="token")
    got = counts.counts().set_index(["router", "domain", "expert"])
    for key, part in rows.groupby(["router", "domain"], observed=True):
        ids_TK, weights_TK = (part.filter(like=of).to_numpy() for of in ("expert_", "weight_"))
        load_E, first_E = (np.bincount(ids.ravel(), minlength=8) for ids in (ids_TK, ids_TK[:, 0]))
        weight_E = np.bincount(ids_TK.ravel(), weights_TK.ravel(), minlength=8)
        assert (got.loc[key, "assignments"] == load_E).all()
        assert (got.loc[key, "first_choice"] == first_E).all()
        np.testing.assert_allclose(got.loc[key, "weight_sum"], weight_E, rtol=2e-3)


def test_sampled_counts_without_a_trace(model: Any) -> None:
    batches = [token_batch([8], seed) for seed in range(6)]
    tables = []
    for every, fed in ((1, batches[::3]), (3, batches)):
        with moe_inspect.record(model, counts_only=True, every=every) as recorder, torch.no_grad():
            for batch in fed:
                model(**batch)
            tables.append(recorder.balance())
    assert tables[0].equals(tables[1])
    assert tables[0]["assignments"].tolist() == [32, 32]


@pytest.mark.parametrize(
    ("every", "spans"), [(1, [(0, 2), (3, 5), (6, 8), (9, 10)]), (2, [(0, 4), (6, 10)])]
)
def test_counts_are_committed_after_so_many_counted_passes(
    model: Any, tmp_path: Path, every: int, spans: list[tuple[int, int]]
) -> None:
    batches, root = [token_batch(LENGTHS, seed) for seed in range(11)], tmp_path / "t"
    how: dict[str, Any] = {"counts_only": True, "every": every, "flush_steps": 3}

    def shards() -> list[Any]:
        return list(moe_inspect.open_trace(root).shards)

    with moe_inspect.record(model, root, **how), torch.no_grad():
        for number, batch in enumerate(batches):
            model(**batch)
            whole = [span for span in spans if span[1] <= number and span != (9, 10)]
            end = time.monotonic() + 20
            while whole and len(shards()) < len(whole):  # the writer is a thread
                assert time.monotonic() < end
                time.sleep(0.01)
            assert len(shards()) == len(whole)
    assert [(shard.files.first_batch, shard.files.last_batch) for shard in shards()] == spans
    for (first, last), shard in zip(spans, shards(), strict=True):
        with moe_inspect.record(model, counts_only=True) as of_span, torch.no_grad():
            for batch in batches[first : last + 1 : every]:
                model(**batch)
            load = of_span.totals().load
        table = shard.counts().to_pandas().sort_values(["router", "expert"])
        assert table["assignments"].tolist() == np.ravel(load).tolist()


def test_what_cannot_be_recorded_is_refused(model: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years")
    for place, options, says in (
        ("t", {"capture": "spy"}, "no capture 'spy'"),
        ("t", {"every": 2}, "give counts_only=True"),
        ("t", {"counts_only": True, "logits": True}, "keeps no logits"),
        ("t", {"flush_steps": 3}, "flush_steps commits counts to a trace"),
        ("t", {"flush_steps": 0, "counts_only": True}, "flush_steps is 0: give a whole number"),
        (None, {"every": 0, "counts_only": True}, "every is 0: give a whole number, 1 or more"),
        (None, {"every": "x", "counts_only": True}, "every is 'x': give a whole number"),
        (None, {"every": True, "counts_only": True}, "every is True: give a whole number"),
        (None, {"every": None, "counts_only": True}, "every is None: give a whole number"),
        ("t", {"flush_steps": 3, "counts_only": True, "commit_every": 5.0}, "commit_every both"),
        ("t", {"layers": [0, 7]}, "no router in layer 7: the MoE layers are 0, 1"),
        (None, {}, "needs a path"),
        ("full", {}, "there is something at"),
        ("full", {"overwrite": True}, r"is not a trace \(it holds thesis.tex\): not overwritten"),
        ("full/thesis.tex/below", {}, "cannot write"),
    ):
        with pytest.raises(MoeInspectError, match=says):
            moe_inspect.record(model, place and tmp_path / place, **options)
    for none, name in ((None, "NoneType"), ("mixtral", "str")):
        with pytest.raises(MoeInspectError, match=f"^{name} is no model: give a torch.nn.Module$"):
            moe_inspect.record(none, counts_only=True)
    assert (tmp_path / "full/thesis.tex").read_text() == "years"
    assert not (tmp_path / "t").exists()


def test_a_forward_pass_cut_short_counts_nowhere(model: Any, tmp_path: Path) -> None:
    """An interrupt between two layers: what the first one routed is in no count."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    recording = moe_inspect.record(model, tmp_path / "t", counts_only=True)
    with pytest.raises(KeyboardInterrupt), recording, torch.no_grad():  # noqa: PT012
        model(**token_batch(LENGTHS))
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        try:
            model(**token_batch(LENGTHS))
        finally:
            hook.remove()
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "interrupted"
    assert trace.n_tokens == sum(LENGTHS)
    assert trace.counts().groupby("router")["assignments"].sum().tolist() == [2 * sum(LENGTHS)] * 2


def test_a_recording_is_entered_once_and_replaces_no_trace(model: Any, tmp_path: Path) -> None:
    first, second = (moe_inspect.record(model, tmp_path / "t") for _ in range(2))
    with first, torch.no_grad():
        model(**token_batch([4]))
    with pytest.raises(MoeInspectError, match="call record again"):
        first.__enter__()
    with pytest.raises(MoeInspectError, match="there is a trace at"), second, torch.no_grad():
        model(**token_batch([9]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 4
    assert recorded(model, tmp_path / "t", token_batch([9]), overwrite=True).n_tokens == 9


def test_two_that_dispatch_a_model_are_refused(model: Any, tmp_path: Path) -> None:
    first, second = (moe_inspect.record(model, tmp_path / x, capture="dispatch") for x in "ab")
    refused = pytest.raises(MoeInspectError, match="already being recorded with dispatch")
    with first, refused, second:
        pass


@pytest.mark.parametrize("counts_only", [False, True])
def test_a_failed_pass_may_be_tried_again(counts_only: bool, model: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"documents": ["a", "b", "c"], "counts_only": counts_only}
    with moe_inspect.record(model, tmp_path / "t", **options), torch.no_grad():
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**token_batch(LENGTHS))
        hook.remove()
        model(**token_batch(LENGTHS))
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.n_tokens == sum(LENGTHS)
    assert trace.documents()["source"].tolist() == ["a", "b", "c"]
    assert trace.documents()["document"].tolist() == [0, 1, 2]


def test_caches_are_told_apart(model: Any, tmp_path: Path) -> None:
    """Two conversations in turn: each goes on with its own documents."""
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad():
        caches = [model(**token_batch([n], seed=n), use_cache=True).past_key_values for n in (4, 6)]
        for cache in (*caches[::-1], *caches):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    decoded = tokens.loc[tokens["phase"] == "decode", ["position", "document"]]
    assert decoded.to_numpy().tolist() == [[6, 1], [4, 0], [5, 0], [7, 1]]


def test_a_mask_of_what_each_position_sees_shows_the_padding() -> None:
    full = torch.tensor([[True] * 4, [False, False, True, True]])
    seen = full[:, None, None] & torch.ones(4, 4, dtype=torch.bool).tril()  # [2, 1, 4, 4]
    by_layer = {"sliding_attention": None, "full_attention": full}
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, float("-inf")), by_layer):
        assert torch.equal(mask_of(mask, 2, 4, 0), full)
    assert mask_of({**by_layer, "full_attention": None}, 2, 4, 0) is None
    for mask, kind in ((seen[:, 0], "3-D"), ({"sliding_attention": full}, "dict")):
        with pytest.raises(MoeInspectError, match=f"padding from a {kind} attention mask"):
            mask_of(mask, 2, 4, 0)


def test_a_cache_that_counts_on_its_device_is_asked_when_it_may_have_been_reset() -> None:
    on_device = type("OnDevice", (int,), {"is_cuda": True})
    cache, held = SimpleNamespace(get_seq_length=lambda: on_device(9)), CachedRows(7)
    assert length_of(cache, held, S=1) == 7  # nobody waits for the device in a step of decoding
    assert length_of(cache, held, S=4) == length_of(cache, None, S=1) == 9


def test_probabilities_are_not_taken_for_logits(model: Any, tmp_path: Path) -> None:
    """Refused before anything is written: the trace that is there stays."""
    recorded(model, tmp_path / "t", token_batch(LENGTHS), logits=True)
    gate = model.model.layers[1].mlp.gate
    hook = gate.register_forward_hook(lambda m, args, output: (output[0].softmax(-1), *output[1:]))
    try:
        says = r"layers\.1\.mlp\.experts returns probabilities"
        with pytest.raises(MoeInspectError, match=says):
            recorded(model, tmp_path / "t", token_batch([4]), logits=True, overwrite=True)
    finally:
        hook.remove()
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == sum(LENGTHS)

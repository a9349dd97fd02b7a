"""`record`: whatever is done with the model inside the block, the trace holds each routed token
once,
and the model is left as it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.capture.hook.inputs.arguments import length_of, mask_of
from moe_inspect.capture.hook.inputs.rows import CachedRows
from moe_inspect.errors import MoeInspectError
from tests.support.families import build
from tests.support.zoo import token_batch

LENGTHS = [9, 5, 12]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


@torch.no_grad()
def fed(model: Any, path: Path, *batches: dict[str, Any], **options: Any) -> moe_inspect.Trace:
    """The trace of these forward passes."""
    with moe_inspect.record(model, path, **options):
        for batch in batches:
            model(**batch)
    return moe_inspect.open_trace(path)


def routed(path: Path, layer: int = 1) -> np.ndarray:
    return moe_inspect.open_trace(path).routing(layer=layer)[["expert_0", "expert_1"]].to_numpy()


def test_rows_are_sequences_of_their_own_documents(model: Any, tmp_path: Path) -> None:
    trace = fed(model, tmp_path / "t", token_batch(LENGTHS), token_batch([4]))
    tokens = trace.tokens()
    assert trace.documents()["tokens"].tolist() == [*LENGTHS, 4]
    assert tokens["batch"].tolist() == [0] * sum(LENGTHS) + [1] * 4
    positions = tokens.groupby("document")["position"].apply(list).tolist()
    assert positions == [list(range(n)) for n in [*LENGTHS, 4]]
    assert (tokens["sequence"] == tokens["document"]).all()
    assert len(trace.routing()) == 2 * len(tokens) == trace.manifest["counts"]["decisions"]


def test_labels_name_documents_and_domains(model: Any, tmp_path: Path) -> None:
    with (
        moe_inspect.record(model, tmp_path / "t", domains=["x", "y", "x"]) as recorder,
        torch.no_grad(),
    ):
        model(**token_batch(LENGTHS))
        recorder.label(documents=["same", "same"], domains=["z", "z"])
        model(**token_batch([3, 3]))
        recorder.label(domains=["one too few"])
        says = "domains has 1 values, the forward pass has 3 rows"
        with pytest.raises(MoeInspectError, match=says):
            model(**token_batch(LENGTHS))
    trace = moe_inspect.open_trace(tmp_path / "t")
    sizes = trace.tokens().groupby("domain", observed=True).size()
    assert sizes.to_dict() == {"x": 21, "y": 5, "z": 6}
    assert trace.documents()["domain"].tolist() == ["x", "y", "x", "z"]
    assert trace.documents()["tokens"].tolist() == [*LENGTHS, 6]
    assert trace.tokens()["sequence"].nunique() == 5


def test_left_padding_is_no_token(model: Any, tmp_path: Path) -> None:
    right = token_batch([9, 5])
    left = {k: torch.stack([rows[0], rows[1].roll(4)]) for k, rows in right.items()}
    position = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    a = fed(model, tmp_path / "right", right)
    b = fed(model, tmp_path / "left", {**left, "position_ids": position})
    assert a.tokens().equals(b.tokens())
    assert (routed(tmp_path / "right") == routed(tmp_path / "left")).mean() > 0.95


def test_packed_rows_are_split_where_positions_start_again(model: Any, tmp_path: Path) -> None:
    ids = token_batch([12])["input_ids"]
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    tokens = fed(model, tmp_path / "t", {"input_ids": ids, "position_ids": position}).tokens()
    assert tokens["sequence"].tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert tokens["position"].tolist() == position[0].tolist()


def test_generate_goes_on_with_its_sequences(model: Any, tmp_path: Path) -> None:
    prompt = token_batch([6, 6])
    with moe_inspect.record(model, tmp_path / "t"):
        out = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert (tokens["phase"] == "prefill").sum() == 12
    assert (tokens["phase"] == "decode").sum() == 2 * 4  # the last token is never fed
    for document in (0, 1):
        own = tokens[tokens["document"] == document]
        assert own["token_id"].tolist() == out[document, :-1].tolist()
        assert own["position"].tolist() == list(range(10))


def test_training_with_checkpointing_records_each_token_once(tmp_path: Path) -> None:
    model = build("qwen3_moe").train()
    model.gradient_checkpointing_enable()
    inputs = token_batch([9])
    with moe_inspect.record(model, tmp_path / "t"):
        for _ in range(2):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert moe_inspect.verify(tmp_path / "t").ok
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.n_tokens == 18
    assert len(trace.routing()) == 36
    gates = [p.grad for name, p in model.named_parameters() if "gate.weight" in name]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in gates)


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


def test_only_some_layers(model: Any, tmp_path: Path) -> None:
    trace = fed(model, tmp_path / "t", token_batch(LENGTHS), layers=[1], weights=False)
    assert [r.layer for r in trace.routers] == [1]
    assert "weight_0" not in trace.routing()
    with pytest.raises(MoeInspectError, match="no router in layer 7: the MoE layers are 0, 1"):
        moe_inspect.record(model, tmp_path / "u", layers=[0, 7])


def test_counts_equal_the_decisions_counted(model: Any, tmp_path: Path) -> None:
    batches = [token_batch(LENGTHS, seed) for seed in range(5)]
    domains = ["x", "y", "x"]
    full = fed(model, tmp_path / "full", *batches, domains=domains)
    counts = fed(model, tmp_path / "counts", *batches, domains=domains, counts_only=True)
    assert counts.n_tokens == full.n_tokens
    assert counts.documents().equals(full.documents())
    rows = full.routing().merge(full.tokens(), on="token")
    got = counts.counts().set_index(["router", "domain", "expert"])
    for (router, domain), part in rows.groupby(["router", "domain"], observed=True):
        load = np.bincount(part[["expert_0", "expert_1"]].to_numpy().ravel(), minlength=8)
        first = np.bincount(part["expert_0"], minlength=8)
        assert (got.loc[(router, domain), "assignments"] == load).all()
        assert (got.loc[(router, domain), "first_choice"] == first).all()
        ids, weights = (
            part.filter(like=name).to_numpy().ravel() for name in ("expert_", "weight_")
        )
        weight_E = np.bincount(ids, weights, minlength=8)
        np.testing.assert_allclose(got.loc[(router, domain), "weight_sum"], weight_E, rtol=2e-3)


def test_sampled_counts_without_a_trace(model: Any) -> None:
    batches = [token_batch([8], seed) for seed in range(6)]
    tables = []
    for every, fed in ((1, batches[::3]), (3, batches)):
        with moe_inspect.record(model, counts_only=True, every=every) as recorder, torch.no_grad():
            for batch in fed:
                model(**batch)
            tables.append(recorder.balance())
    assert tables[0].equals(tables[1])
    assert tables[0]["tokens"].tolist() == [16, 16]
    assert tables[0]["assignments"].tolist() == [32, 32]


@pytest.mark.parametrize(
    ("every", "spans"), [(1, [(0, 2), (3, 5), (6, 8), (9, 10)]), (2, [(0, 4), (6, 10)])]
)
def test_counts_are_committed_after_so_many_counted_passes(
    model: Any, tmp_path: Path, every: int, spans: list[tuple[int, int]]
) -> None:
    batches, root = [token_batch(LENGTHS, seed) for seed in range(11)], tmp_path / "t"
    options: dict[str, Any] = {"counts_only": True, "every": every}

    def shards() -> list[Any]:
        return [shard.files for shard in moe_inspect.open_trace(root).shards]

    with moe_inspect.record(model, root, flush_steps=3, **options), torch.no_grad():
        for number, batch in enumerate(batches):
            model(**batch)
            whole = [span for span in spans if span[1] <= number and span != (9, 10)]
            end = time.monotonic() + 20
            while whole and len(shards()) < len(whole):  # the writer is a thread
                assert time.monotonic() < end
                time.sleep(0.01)
            assert len(shards()) == len(whole)
    assert [(files.first_batch, files.last_batch) for files in shards()] == spans
    # a shard's counts are those of its passes, and together those of one shard
    for (first, last), shard in zip(spans, moe_inspect.open_trace(root).shards, strict=True):
        with moe_inspect.record(model, counts_only=True) as of_span, torch.no_grad():
            for batch in batches[first : last + 1 : every]:
                model(**batch)
            load = of_span.totals().load
        table = shard.counts().to_pandas()
        for r, load_E in enumerate(load):
            assert table[table["router"] == r]["assignments"].tolist() == load_E.tolist()
    one = fed(model, tmp_path / "one", *batches, **options).counts()
    several = moe_inspect.open_trace(root).counts()
    key = ["router", "expert"]
    assert several.groupby(key)["assignments"].sum().equals(one.groupby(key)["assignments"].sum())
    # they are windows in the report, and a single shard is one (control)
    tables = moe_inspect.report(root, window=1).tables
    assert tables["windows"].groupby("router")["window"].count().tolist() == [len(spans)] * 2
    assert tables["drift"]["windows"].tolist() == [len(spans)] * 2
    alone = moe_inspect.report(tmp_path / "one", window=1).tables["windows"]
    assert alone.groupby("router")["window"].count().tolist() == [1, 1]


def test_a_router_that_saw_too_little_is_an_error(model: Any, tmp_path: Path) -> None:
    experts = model.model.layers[1].mlp.experts
    stock = experts.forward
    with moe_inspect.record(model, tmp_path / "t") as recorder, torch.no_grad():
        model(**token_batch([4]))
        block = model.model.layers[1].mlp
        # as a fused block that never calls its experts
        kept, block.forward = block.forward, lambda hidden: hidden
        try:
            says = r"layers\.1\.mlp\.experts routed 0 rows in a forward pass of 4"
            with pytest.raises(MoeInspectError, match=says):
                model(**token_batch([4]))
        finally:
            block.forward = kept
        assert recorder.tokens == 4
    assert experts.forward == stock
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 4


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 10}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    says = "LlamaForCausalLM is a dense model: it has no routers"
    with pytest.raises(MoeInspectError, match=says):
        moe_inspect.record(dense, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_what_is_there_is_not_overwritten(model: Any, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/thesis.tex").write_text("years")
    with pytest.raises(MoeInspectError, match="there is something at"):
        moe_inspect.record(model, tmp_path / "t")
    says = r"is not a trace \(it holds thesis.tex\): not overwritten"
    with pytest.raises(MoeInspectError, match=says):
        moe_inspect.record(model, tmp_path / "t", overwrite=True)
    assert (tmp_path / "t/thesis.tex").read_text() == "years"
    with pytest.raises(MoeInspectError, match="cannot write"):
        moe_inspect.record(model, tmp_path / "t/thesis.tex/below")


def test_bad_options_are_refused(model: Any, tmp_path: Path) -> None:
    for options, says in (
        ({"capture": "spy"}, "no capture 'spy'"),
        ({"every": 2}, "give counts_only=True"),
        ({"counts_only": True, "logits": True}, "keeps no logits"),
        ({"flush_steps": 3}, "flush_steps commits counts to a trace"),
        ({"flush_steps": 0, "counts_only": True}, "flush_steps is 0: give a number of passes"),
        ({"flush_steps": 3, "counts_only": True, "commit_every": 5.0}, "and commit_every both"),
    ):
        with pytest.raises(MoeInspectError, match=says):
            moe_inspect.record(model, tmp_path / "t", **options)
    with pytest.raises(MoeInspectError, match="needs a path"):
        moe_inspect.record(model)


def test_a_forward_pass_cut_short_counts_nowhere(model: Any, tmp_path: Path) -> None:
    """An interrupt between two layers: what the first one routed is in no count, and the sums
    still agree."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    block = model.model.layers[1]
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        moe_inspect.record(model, tmp_path / "t", counts_only=True),
        torch.no_grad(),
    ):
        model(**token_batch(LENGTHS))
        hook = block.register_forward_pre_hook(interrupt)
        try:
            model(**token_batch(LENGTHS))
        finally:
            hook.remove()
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "interrupted"
    assert trace.n_tokens == sum(LENGTHS)
    assert trace.counts().groupby("router")["assignments"].sum().tolist() == [2 * sum(LENGTHS)] * 2


def test_an_exception_in_the_model_is_not_in_the_trace(model: Any, tmp_path: Path) -> None:
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad():
        model(**token_batch(LENGTHS))
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1, 10_000]]))
        model(**token_batch([4]))
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.n_tokens == sum(LENGTHS) + 4
    assert len(trace.routing(layer=1)) == trace.n_tokens


def test_a_recording_is_entered_once(model: Any, tmp_path: Path) -> None:
    recorder = moe_inspect.record(model, tmp_path / "t")
    with recorder, torch.no_grad():
        model(**token_batch([4]))
    with pytest.raises(MoeInspectError, match="call record again"):
        recorder.__enter__()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_trace_begun_meanwhile_is_not_replaced(model: Any, tmp_path: Path) -> None:
    first, second = (moe_inspect.record(model, tmp_path / "t") for _ in range(2))
    with first, torch.no_grad():
        model(**token_batch([4]))
    with pytest.raises(MoeInspectError, match="there is a trace at"), second, torch.no_grad():
        model(**token_batch([9]))
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 4
    assert fed(model, tmp_path / "t", token_batch([9]), overwrite=True).n_tokens == 9


def test_two_recordings_at_once(model: Any, tmp_path: Path) -> None:
    with moe_inspect.record(model, tmp_path / "a", capture="dispatch"), torch.no_grad():
        with (
            pytest.raises(MoeInspectError, match="already being recorded with dispatch"),
            moe_inspect.record(model, tmp_path / "b", capture="dispatch"),
        ):
            pass
        with moe_inspect.record(model, tmp_path / "c", capture="tap"):
            model(**token_batch(LENGTHS))
    assert (routed(tmp_path / "a") == routed(tmp_path / "c")).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failed_first_pass_may_be_tried_again(model: Any, tmp_path: Path) -> None:
    for name, options in (("rows", {}), ("counts", {"counts_only": True})):
        with (
            moe_inspect.record(model, tmp_path / name, documents=["a", "b", "c"], **options),
            torch.no_grad(),
        ):
            hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**token_batch(LENGTHS))
            hook.remove()
            model(**token_batch(LENGTHS))
        trace = moe_inspect.open_trace(tmp_path / name)
        assert trace.n_tokens == sum(LENGTHS)
        assert trace.documents()["source"].tolist() == ["a", "b", "c"]
        assert trace.documents()["document"].tolist() == [0, 1, 2]


def test_labels_given_for_one_pass_keep_the_others(model: Any, tmp_path: Path) -> None:
    with moe_inspect.record(model, tmp_path / "t", domains=["x", "y"]) as recorder, torch.no_grad():
        recorder.label(documents=["a", "b"])
        model(**token_batch([4, 5]))
    documents = moe_inspect.open_trace(tmp_path / "t").documents()
    assert documents["domain"].tolist() == ["x", "y"]
    assert documents["source"].tolist() == ["a", "b"]


def test_caches_are_told_apart(model: Any, tmp_path: Path) -> None:
    """Two conversations in turn: each goes on with its own documents."""
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad():
        caches = [model(**token_batch([n], seed=n), use_cache=True).past_key_values for n in (4, 6)]
        for cache in (*caches[::-1], *caches):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert tokens.loc[tokens["phase"] == "decode", "position"].tolist() == [6, 4, 5, 7]
    assert tokens.loc[tokens["phase"] == "decode", "document"].tolist() == [1, 0, 0, 1]


def test_a_mask_that_hides_the_padding_is_refused(model: Any, tmp_path: Path) -> None:
    inputs = token_batch([4, 2])
    inputs["attention_mask"] = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(MoeInspectError, match="padding from a 3-D attention mask"):
        fed(model, tmp_path / "t", inputs)


@pytest.mark.parametrize("kind", [bool, float])
def test_a_mask_of_what_each_position_sees_shows_the_padding(
    kind: type, model: Any, tmp_path: Path
) -> None:
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    seen[1, :, :, :2] = False  # the second row is padded on the left
    mask = seen if kind is bool else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    inputs = {**token_batch([4, 4]), "attention_mask": mask}
    tokens = fed(model, tmp_path / "t", inputs).tokens()
    assert tokens.groupby("document").size().tolist() == [4, 2]


def test_of_masks_by_layer_the_full_one_tells() -> None:
    full = torch.tensor([[True, True], [False, True]])
    assert mask_of({"sliding_attention": None, "full_attention": full}, 2, 2, 0) is not None
    assert mask_of({"sliding_attention": None, "full_attention": None}, 2, 2, 0) is None
    with pytest.raises(MoeInspectError, match="padding from a dict attention mask"):
        mask_of({"sliding_attention": full}, 2, 2, 0)


def test_a_cache_that_counts_on_its_device_is_asked_when_it_may_have_been_reset() -> None:
    class OnDevice(int):
        is_cuda = True

    class Cache:
        length = OnDevice(9)

        def get_seq_length(self) -> OnDevice:
            return self.length

    held = CachedRows(7)
    assert length_of(Cache(), held, S=1) == 7  # nobody waits for the device in a step of decoding
    assert length_of(Cache(), held, S=4) == length_of(Cache(), None, S=1) == 9


def test_generate_with_a_static_cache_knows_its_padding(model: Any, tmp_path: Path) -> None:
    ids = torch.arange(2, 14).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with moe_inspect.record(model, tmp_path / "t"):
        usual = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        model.generate(ids, attention_mask=mask, cache_implementation="static", **usual)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert tokens.groupby(["document", "phase"]).size().to_dict() == {
        (0, "prefill"): 6, (0, "decode"): 3, (1, "prefill"): 3, (1, "decode"): 3,
    }  # fmt: skip
    assert tokens.sequence.nunique() == 2


def test_probabilities_are_not_taken_for_logits(model: Any, tmp_path: Path) -> None:
    """Refused before anything is written: the trace that is there stays."""
    fed(model, tmp_path / "t", token_batch(LENGTHS), logits=True)
    gate = model.model.layers[1].mlp.gate
    hook = gate.register_forward_hook(lambda m, args, output: (output[0].softmax(-1), *output[1:]))
    try:
        says = r"layers\.1\.mlp\.experts returns probabilities"
        with pytest.raises(MoeInspectError, match=says):
            fed(model, tmp_path / "t", token_batch([4]), logits=True, overwrite=True)
    finally:
        hook.remove()
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == sum(LENGTHS)

"""Encoder-decoders: each stack's routers see its own tokens, in `trace`, in `record` and in
`generate`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import moe_inspect
from moe_inspect.demo import MODEL_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from tests.support import zoo

TEXTS = ["The cat sat on the mat.", "A dog.", "Where do the tokens go?"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Switch with the bundled tokenizer, and texts."""
    root = tmp_path_factory.mktemp("seq2seq")
    config = zoo.config("switch_transformers")
    config.vocab_size = len(AutoTokenizer.from_pretrained(MODEL_DIR))
    torch.manual_seed(0)
    model = zoo.model_class("switch_transformers")._from_config(config)
    for stated in (config, model.generation_config):
        stated.decoder_start_token_id, stated.eos_token_id = 3, None
    model.save_pretrained(root / "model")
    for file in MODEL_DIR.glob("*token*"):
        shutil.copy(file, root / "model")
    (root / "texts").mkdir()
    for n, text in enumerate(TEXTS):
        (root / "texts" / f"{n}.txt").write_text(text)
    return root


def traced(place: Path, out: Path, **options: Any) -> moe_inspect.Trace:
    texts = [str(place / "texts")]
    return moe_inspect.trace_model(str(place / "model"), out, data=texts, **options)


def test_a_corpus_goes_to_the_encoder_and_is_decoded_from(place: Path, tmp_path: Path) -> None:
    """And what was decoded routes the same in one forward pass."""
    trace = traced(place, tmp_path / "t", generate=4)
    tokens = trace.tokens()
    counts = tokens.phase.value_counts().to_dict()
    assert counts["prefill"] == 3
    assert counts["decode"] == 12
    assert set(tokens[tokens.phase == "prefill"].token_id) == {3}
    # as the tokenizer frames them, whether or not they are gone on with
    stated = trace.documents().set_index("document").tokens.to_dict()
    assert tokens[tokens.phase == "encode"].groupby("document").size().to_dict() == stated
    assert [r.stack for r in trace.routers] == ["encoder"] * 2 + ["decoder"] * 2
    for r, router in enumerate(trace.routers):
        seen = counts["encode"] if router.stack == "encoder" else 15
        assert len(trace.routing(router=r)) == seen
    assert trace.n_decisions == 2 * counts["encode"] + 2 * 15
    model = AutoModelForSeq2SeqLM.from_pretrained(place / "model").eval()
    fed = []
    for _, of in tokens.groupby("document"):
        parts = {"input_ids": of.phase == "encode", "decoder_input_ids": of.phase != "encode"}
        ids = {name: of[part].token_id.to_numpy(np.int64) for name, part in parts.items()}
        fed.append({name: torch.from_numpy(of_part)[None] for name, of_part in ids.items()})
    whole = zoo.recorded(model, tmp_path / "whole", *fed)
    by = ["router", "document", "encoded", "position"]
    both = [
        t.routing()
        .merge(t.tokens().assign(encoded=lambda rows: rows.phase == "encode"), on="token")
        .sort_values(by)
        for t in (trace, whole)
    ]
    assert both[0].token_id.tolist() == both[1].token_id.tolist()
    assert (both[0].expert_0.to_numpy() == both[1].expert_0.to_numpy()).mean() > 0.97


def test_counted_they_are_the_same_and_resumed_too(place: Path, tmp_path: Path) -> None:
    usual = {"generate": 2, "batch_tokens": 16}
    trace = traced(place, tmp_path / "t", **usual)
    counted = traced(place, tmp_path / "c", **usual, counts_only=True)
    assert counted.n_decisions == trace.n_decisions == trace.manifest["counts"]["decisions"]
    load = trace.routing().groupby(["router", "expert_0"]).size()
    found = counted.counts().groupby(["router", "expert"]).assignments.sum()
    assert found[found > 0].to_list() == load.to_list()

    def interrupt(done: int, total: int | None) -> None:
        if done > 15:
            raise KeyboardInterrupt

    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        traced(place, again, **usual, progress=interrupt)
    assert moe_inspect.open_trace(again).status == "interrupted"
    resumed = traced(place, again, **usual, resume=True)
    assert resumed.routing().equals(trace.routing())
    assert resumed.tokens().equals(trace.tokens())


@pytest.mark.parametrize("documents", [["a", "b"], None])
def test_generate_calls_the_encoder_by_itself(documents: list[str] | None, tmp_path: Path) -> None:
    """It repeats what that returns for each beam: labels alone say what a beam is of."""
    model = zoo.build("switch_transformers")
    inputs = zoo.inputs("switch_transformers", [6, 4])
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    usual = {"decoder_start_token_id": 0, "max_new_tokens": 4, "eos_token_id": None}
    with moe_inspect.record(model, tmp_path / "t", documents=documents):
        model.generate(**inputs, **usual, num_beams=2, do_sample=False)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    sizes = tokens.groupby("phase", observed=True).size().to_dict()
    assert sizes == {"encode": 10, "prefill": 4, "decode": 12}
    decoded = tokens[tokens.phase != "encode"].groupby("sequence").document.unique().map(list)
    of = [0, 0, 1, 1] if documents else [2, 3, 4, 5]
    assert decoded.to_dict() == {n: [document] for n, document in enumerate(of, 2)}
    checked = moe_inspect.check(tmp_path / "t", quick=True)
    assert checked.ok
    assert "4 sequences began in the middle" in checked.findings[0].text


def test_what_the_encoder_returned_is_decoded_from_again(tmp_path: Path) -> None:
    """The first time as the encoder's sequences, then as others of their documents."""
    model, inputs = zoo.build("switch_transformers"), zoo.inputs("switch_transformers", [6, 4])
    fed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    replies = {**inputs, "input_ids": None, "use_cache": False}
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad():
        encoded = model.get_encoder()(**fed)
        for _ in range(2):
            model(**replies, encoder_outputs=encoded)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    sequences = tokens.groupby(["document", "batch"]).sequence.unique().map(list)
    assert sequences.tolist() == [[0], [0], [2], [1], [1], [3]]
    assert moe_inspect.check(tmp_path / "t", quick=True).findings == []


def test_labels_are_shifted_and_each_stack_has_its_mask(tmp_path: Path) -> None:
    model, inputs = zoo.build("switch_transformers"), zoo.inputs("switch_transformers", [6, 4])
    model.config.decoder_start_token_id = 0
    labels, mask = inputs["decoder_input_ids"], torch.ones_like(inputs["decoder_input_ids"])
    mask[1, 3:] = 0
    fed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad():
        model(**fed, labels=labels, decoder_attention_mask=mask)
        encoded = model.get_encoder()(**fed)
        model(encoder_outputs=encoded, attention_mask=fed["attention_mask"], labels=labels)
    trace = moe_inspect.open_trace(tmp_path / "t")
    tokens = trace.tokens()
    first = tokens[(tokens.batch == 0) & (tokens.phase == "prefill")]
    assert list(first.token_id) == [0, *labels[0, :-1].tolist(), 0, *labels[1, :2].tolist()]
    assert tokens.groupby(["batch", "phase"], observed=True).size().to_dict() == {
        (0, "prefill"): 10, (0, "encode"): 10, (1, "encode"): 10, (2, "prefill"): 14,
    }  # fmt: skip
    for batch in (1, 2):
        assert set(tokens[tokens.batch == batch].document) == {2, 3}


def test_a_stack_that_is_not_seen_is_refused(tmp_path: Path) -> None:
    """And a forward pass that failed leaves nothing."""
    model, inputs = zoo.build("switch_transformers"), zoo.inputs("switch_transformers", [6])
    site = next(s for s in find_routers(model) if s.stack == "decoder")
    stock = type(site.module).forward
    with moe_inspect.record(model, tmp_path / "t") as recorder, torch.no_grad():
        model(**inputs)
        hook = site.module.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        model.get_encoder()(input_ids=inputs["input_ids"])
        assert recorder.tokens == 6 + 7 + 6
    model.get_submodule(site.path.rpartition(".")[0]).forward = lambda hidden: hidden
    refused = pytest.raises(MoeInspectError, match=r"decoder.* routed 0 rows .* of 7")
    with moe_inspect.record(model, tmp_path / "u"), torch.no_grad(), refused:
        model(**inputs)
    assert type(site.module).forward is stock
    assert not (tmp_path / "u" / "routing").exists()


def test_a_models_quirk_is_told_with_every_report(tmp_path: Path) -> None:
    noted = {}
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[2, 3]])}
    for family in ("nllb_moe", "switch_transformers"):
        trace = zoo.recorded(zoo.build(family), tmp_path / family, batch)
        noted[family] = moe_inspect.report(trace).warning
    assert "runs experts 1 and 0 whatever NLLB's routers choose" in noted["nllb_moe"]
    assert noted["switch_transformers"] is None

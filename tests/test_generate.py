"""`--generate N`: each document goes on by N decoded tokens, without padding; what is recorded of
them is what a prefill of the whole text would show; and a prompt and what follows it are committed
together or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect.capture import feed, run
from moe_inspect.capture.corpus.documents import CorpusStats, find_sources
from moe_inspect.capture.corpus.plan import CorpusPlan, Frame, batches, sequences
from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import load_config, load_model, load_tokenizer
from tests.conftest import Cli
from tests.test_cli_trace import save, write_jsonl

N = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """Of a model and of texts."""
    root = tmp_path_factory.mktemp("place")
    save("qwen3_moe", root / "model")
    write_jsonl(root / "c.jsonl", documents=30, words=40)
    return root


def traced(place: Path, out: Path, **options: Any) -> moe_inspect.Trace:
    usual = {"generate": N, "max_length": 24, "batch_tokens": 200, "data": [str(place / "c.jsonl")]}
    return moe_inspect.trace_model(str(place / "model"), out, **{**usual, **options})


def rows(trace: moe_inspect.Trace) -> pd.DataFrame:
    facts = trace.tokens().drop(columns="batch")
    found = trace.routing().merge(facts, on="token").drop(columns="token")
    return found.sort_values(["router", "sequence", "position"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: Any) -> moe_inspect.Trace:
    return traced(place, tmp_path_factory.mktemp("whole") / "t")


def test_decoded_as_in_a_prefill(whole: moe_inspect.Trace, place: Path, tmp_path: Path) -> None:
    tokens = whole.tokens()
    decoded = tokens[tokens.phase == "decode"]
    of_documents = decoded.groupby("document").size()
    a_document = of_documents.reindex(whole.documents().document, fill_value=0)
    ends = a_document < N  # it met </s>, which is not fed
    assert (a_document[~ends] == N).all()
    assert (~ends).sum() > 20
    assert len(tokens) * 2 == len(whole.routing())
    assert whole.documents().tokens.sum() == (tokens.phase == "prefill").sum()
    # a document's last sequence goes on, where its prompt ended; the pieces before it do not
    for _, text in tokens.groupby("sequence"):
        assert text.position.tolist() == list(range(len(text)))
        assert text.phase.tolist() == sorted(text.phase, reverse=True)
    assert decoded.groupby("document").sequence.nunique().max() == 1
    last = decoded.groupby("document").sequence.first()
    assert (last == tokens.groupby("document").sequence.max().loc[last.index]).all()
    model = str(place / "model")
    network = load_model(model, load_config(model))
    with moe_inspect.record(network, tmp_path / "replay"), torch.inference_mode():
        for _, text in tokens.sort_values(["sequence", "position"]).groupby("sequence"):
            ids = torch.from_numpy(text.token_id.to_numpy(np.int64))
            logits = network(input_ids=ids[None]).logits[0]
            fed = text[text.phase == "decode"]
            likeliest = logits.argmax(1).numpy()[fed.position.to_numpy() - 1]
            assert (likeliest == fed.token_id.to_numpy()).all()
    traces = whole, moe_inspect.open_trace(tmp_path / "replay")
    chosen = [np.sort(rows(trace).filter(like="expert_").to_numpy(), 1) for trace in traces]
    assert (chosen[0] == chosen[1]).all()


def test_sampling_goes_by_its_seed(place: Path, tmp_path: Path) -> None:
    a, b, c = (
        rows(traced(place, tmp_path / f"{n}", temperature=1.0, seed=seed))
        for n, seed in enumerate((1, 1, 2))
    )
    assert a.equals(b)
    assert not a.token_id.equals(c.token_id)


@pytest.mark.parametrize("counts_only", [False, True])
def test_cut_short_and_resumed_is_as_if_nothing_happened(
    counts_only: bool, whole: moe_inspect.Trace, place: Path, tmp_path: Path
) -> None:
    """Counts are those of the decisions."""
    passes = list[int]()

    def interrupted(tokens: int, total: int | None) -> None:
        passes.append(tokens)
        if len(passes) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced(place, tmp_path / "t", counts_only=counts_only, progress=interrupted)
    cut = moe_inspect.open_trace(tmp_path / "t")
    assert cut.status == "interrupted"
    assert cut.n_tokens < whole.n_tokens
    assert counts_only or cut.n_tokens > 0
    again = traced(place, tmp_path / "t", resume=True, counts_only=counts_only)
    assert again.status == "complete"
    assert again.n_tokens == whole.n_tokens
    loads = [moe_inspect.report(t).tables["load"].assignments.tolist() for t in (again, whole)]
    assert loads[0] == loads[1]
    if not counts_only:
        assert rows(again).equals(rows(whole))


def test_the_plan() -> None:
    class Letters:
        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[ord(c) for c in text] for text in texts]}

    texts = [("x", "s", text) for text in ("abcdefgh", "abc", "xyz", "abcd", "ab")]
    frame, stats = Frame((1,), (2,)), CorpusStats()
    made = list(sequences(texts, Letters(), frame, 6, None, stats, generate=True))
    assert [len(s.ids) for s in made] == [6, 5, 4, 4, 5, 3]
    assert [s.continued for s in made] == [False, *[True] * 5]
    # nothing ends what is to be continued
    assert all((s.ids[-1] == 2) != s.continued for s in made)
    # one length a batch, and room for what follows: two of 5 and 4 take 18
    for room, planned in ((18, [[6], [3], [4, 4], [5, 5]]), (17, [[6], [3], [4, 4], [5], [5]])):
        found = batches(made, room, generate=4)
        assert [[len(s.ids) for s in batch] for batch in found] == planned


def test_there_must_be_room(place: Path, tmp_path: Path) -> None:
    says = "--max-length 250 is beyond the 246 positions of this model that 10 generated tokens"
    with pytest.raises(MoeInspectError, match=says):
        traced(place, tmp_path / "t", generate=10, max_length=250)
    with pytest.raises(MoeInspectError, match="generating 256 tokens leaves no room for a prompt"):
        traced(place, tmp_path / "t", generate=256, max_length=None)


def test_the_command(cli_here: Cli, tmp_path: Path) -> None:
    options = "--generate 2 --max-tokens 1000 --temperature 0.5 --seed 3"
    cli_here("trace", "demo", "-o", "t", *options.split())
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert (tokens[tokens.phase == "decode"].groupby("document").size() <= 2).all()
    assert tokens[tokens.phase == "decode"].document.nunique() > 3
    shown = ("--phase", "decode", "--table", "balance", "--format", "csv")
    assert cli_here("report", "t", *shown).stdout.count("\n") == 5


def test_one_at_a_time_each_document_is_named_once(place: Path) -> None:
    """For models whose routing depends on the other rows of a batch."""
    plan = CorpusPlan(
        find_sources([str(place / "c.jsonl")]), TraceOptions(batch_tokens=200), max_length=24
    )
    tokenizer = load_tokenizer(str(place / "model"))
    together, singly = list(plan.batches(tokenizer)), list(run.singly(plan.batches(tokenizer)))
    assert max(len(batch) for batch, _ in together) > 1
    assert all(len(batch) == 1 for batch, _ in singly)
    both = singly, together
    fed = [[row.sequence for batch, _ in planned for row in batch] for planned in both]
    assert fed[0] == fed[1]
    named = [sorted(d.document for _, new in planned for d in new) for planned in both]
    assert named[0] == named[1] == list(range(30))
    assert all(d.document == batch[0].document for batch, new in singly for d in new)


def test_out_of_memory_says_what_to_do() -> None:
    class Full(torch.nn.Linear):
        def get_input_embeddings(self) -> Any:
            raise NotImplementedError  # as a model does that does not say

        def forward(self, **_: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

    says = "cpu is out of memory in a forward pass of 6 tokens: lower --batch-tokens"
    with pytest.raises(MoeInspectError, match=says):
        feed.forward(Full(1, 1), torch.zeros(2, 3, dtype=torch.long))

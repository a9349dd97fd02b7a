"""sample: a trace of some documents of a trace, whole ones, that verify finds in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.derived.sample import sample
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify
from tests.conftest import Cli
from tests.support.synthetic import encoder_decoder, thirty_documents, write_counts

E, K = 8, 2


@pytest.fixture
def whole(tmp_path: Path) -> Trace:
    """Documents 0, 3, 6 … are of domain "a", the others of "b"."""
    return thirty_documents(
        tmp_path / "whole", L=2, weights=False, domain_of_document=("a", "b", "b")
    )


def loads(trace: Trace) -> np.ndarray:
    """Assignments of each router to each expert. int64 [2, E]"""
    routing = trace.routing()
    parts = [routing[routing["router"] == r].filter(like="expert_").to_numpy() for r in range(2)]
    return np.array([np.bincount(p[~np.isnan(p)].astype(int), minlength=E) for p in parts])


def test_counts_of_a_sample_and_the_rest_add_up(whole: Trace, tmp_path: Path) -> None:
    some = sample(whole.path, tmp_path / "some", share=0.3)
    rest = sample(whole.path, tmp_path / "rest", share=0.3, rest=True)
    assert sorted([*some.documents()["document"], *rest.documents()["document"]]) == [*range(30)]
    assert (loads(some) + loads(rest) == loads(whole)).all()
    assert loads(whole).sum() == 2 * 300 * K - 1
    found = verify(tmp_path / "some")
    assert (found.ok, found.documents, found.tokens) == (True, 9, 90)
    assert found.assignments == loads(some).sum()
    assert some.manifest["counts"] == {"tokens": 90, "decisions": 180, "dropped": 0}
    # the rows are those of the trace, but for the numbers of tokens
    kept = whole.tokens()["document"].isin(some.documents()["document"])
    for ours, theirs in (
        (some.tokens(), whole.tokens()[kept]),
        (some.routing(router=1), whole.routing(router=1)[kept]),
    ):
        ours, theirs = (t.drop(columns="token").reset_index(drop=True) for t in (ours, theirs))
        # (a column with an empty slot is of floats in pandas, and labels are of each table's own)
        pd.testing.assert_frame_equal(ours, theirs, check_dtype=False, check_categorical=False)


def test_the_seed_determines_which(whole: Trace, tmp_path: Path) -> None:
    chosen = [
        set(sample(whole.path, tmp_path / f"{n}", documents=9, seed=seed).documents()["document"])
        for n, seed in enumerate((0, 0, 1))
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    lists = [(tmp_path / f"{n}/shards-0.jsonl").read_bytes() for n in range(2)]
    assert lists[0] == lists[1]


def test_domains_and_shards_without_a_chosen_document_are_left_out(
    whole: Trace, tmp_path: Path
) -> None:
    by_domain = sample(whole.path, tmp_path / "d", documents=4, by_domain=True)
    assert by_domain.documents()["domain"].value_counts().to_dict() == {"a": 4, "b": 4}
    shares = sample(whole.path, tmp_path / "s", share=0.5, by_domain=True)
    assert shares.documents()["domain"].value_counts().to_dict() == {"a": 5, "b": 10}
    one = sample(whole.path, tmp_path / "o", documents=1)
    assert len(list(one.shards)) == 1
    # nothing of the others is left in the dictionaries of labels
    for shard in one.shards:
        labels = shard.table("documents")["domain"].chunk(0).dictionary.to_pylist()
        assert labels == one.documents()["domain"].astype(str).tolist()
    encoder_decoder(tmp_path / "e")
    both = sample(tmp_path / "e", tmp_path / "f", share=1.0)
    assert (both.n_tokens, both.n_decisions) == (10, 10)


def test_refusals_leave_nothing(whole: Trace, tmp_path: Path) -> None:
    write_counts(tmp_path / "counts", [np.ones((1, E))] * 2, K)
    there = sorted(path.name for path in tmp_path.iterdir())
    size = "give the size of the sample: documents or share"
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, size),
        ({"documents": 1, "share": 0.1}, size),
        ({"documents": 0}, "1 or more"),
        ({"documents": 2.5}, "documents is 2.5: give a whole number"),
        ({"documents": 1, "seed": 0.5}, "seed is 0.5: give a whole number"),
        ({"documents": 1, "seed": -1}, "seed is -1: give a whole number"),
        ({"share": float("nan")}, "share is nan"),
        ({"share": 1.5}, "share is 1.5"),
        ({"documents": 31}, "has 30 documents, 31 were asked for"),
        ({"documents": 11, "by_domain": True}, "domain a of .* has 10 documents"),
        ({"share": 1.0, "rest": True}, "no document of .* is left"),
        ({"documents": 2}, "holds counts only"),
    ]
    for how, says in refused:
        of = tmp_path / "counts" if "counts" in says else whole.path
        with pytest.raises(MoeInspectError, match=says) as error:
            sample(of, tmp_path / "new", **how)
        assert "\n" not in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == there
    with pytest.raises(MoeInspectError, match="is the trace to sample"):
        sample(whole.path, whole.path, documents=1, overwrite=True)


def test_the_command(whole: Trace, cli_here: Cli, tmp_path: Path) -> None:
    call = ("sample", whole.path, "-o", tmp_path / "some")
    assert "--documents or --share" in cli_here(*call, check=2).stderr
    assert "--share is 2" in cli_here(*call, "--share", 2, check=2).stderr
    said = cli_here(*call, "--share", 0.1, "--by-domain").stderr
    assert said == f"sampled 3 of 30 documents, 30 tokens into {tmp_path / 'some'}\n"
    assert "--overwrite" in cli_here(*call, "--documents", 2, check=1).stderr

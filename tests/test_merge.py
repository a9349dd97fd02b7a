"""merge: traces of one model become one that says the same as a trace of all their text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_inspect import merge
from moe_inspect.demo import CORPUS_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.making import trace_model
from moe_inspect.public import Trace, report
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.merge import MOST_NUMBER, Target
from moe_inspect.trace.verify import Verification, verify
from moe_inspect.trace.writer import Document, ResumePoint, TraceWriter
from tests.conftest import Cli
from tests.support.damage import edit_manifest, restate, with_a_bit_less, without_checksums
from tests.support.synthetic import (
    a_pass,
    encoder_decoder,
    routers,
    uniform_ids,
    write_counts,
    write_trace,
)

E, K, L = 8, 2, 2
PAIRS = np.tile(np.arange(K, dtype=np.uint8), (9, 1))


def made(root: Path, seed: int, T: int = 90, **how: Any) -> Trace:
    rng = np.random.default_rng(seed)
    ids = [uniform_ids(rng, T, E, K) for _ in range(L)]
    ids[1][5, 1] = np.iinfo(np.uint16).max
    usual: dict[str, Any] = {"document": np.repeat(np.arange(T // 10), 10), "words": 50}
    usual |= {"weights": [rng.random((T, K)).astype(np.float16).astype("f4") for _ in range(L)]}
    usual |= {"token_id": rng.integers(0, 50, T), "batch_tokens": 10, "shard_tokens": 40}
    return write_trace(root, ids, E, **usual | how)


def merged_of(root: Path, *names: str) -> tuple[Trace, Verification]:
    """The traces of these names, merged, and what its files were found to hold."""
    merged = merge([root / name for name in names], root / ("merged-" + "-".join(names)))
    found = verify(merged)
    assert found.ok, found
    return merged, found


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [made(tmp_path / name, seed).path for seed, name in enumerate("ab")]


def test_halves_of_a_corpus_merge_to_a_trace_of_all_of_it(tmp_path: Path) -> None:
    """Of the demo's corpus, whose domains take turns in a trace; a document a pass."""
    chosen = {"first": slice(0, 2), "second": slice(2, 4), "both": slice(0, 4)}
    for name, some in chosen.items():
        for folder in sorted(path for path in CORPUS_DIR.iterdir() if path.is_dir()):
            (tmp_path / "text" / name / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[some]:
                shutil.copy(file, tmp_path / "text" / name / folder.name)
        how = {"logits": True, "output_norms": True, "batch_tokens": 1}
        trace_model("demo", tmp_path / name, data=[str(tmp_path / "text" / name)], **how)
    *parts, both = (Trace(tmp_path / name) for name in chosen)
    merged, found = merged_of(tmp_path, "first", "second")
    assert found.assignments == sum(verify(part).assignments for part in parts)
    assert found.assignments == merged.n_tokens * sum(r.top_k for r in merged.routers)
    assert merged.status == "complete"
    for name in ("routing", "tokens", "documents", "logits", "vocabulary"):
        pair = [getattr(trace, name)() for trace in (merged, both)]
        if name in ("tokens", "documents"):  # of another folder
            pair = [t.drop(columns="source", errors="ignore").astype({"domain": str}) for t in pair]
        if name == "routing":
            pair = [t.sort_values(["router", "token"], ignore_index=True) for t in pair]
        pd.testing.assert_frame_equal(*pair)
    tables, expected = (report(trace).tables for trace in (merged, both))
    assert list(tables) == list(expected)
    for name in {*tables} - {"summary"}:
        # what chance alone would give is drawn shard by shard, and the merged trace has two
        drawn = [c for c in expected[name] if "null" in c or c == "vocabulary_specialization_p"]
        pair = [of[name].drop(columns=drawn) for of in (tables, expected)]
        pd.testing.assert_frame_equal(*pair)
    listed = merged.manifest["parts"]
    assert [part["name"] for part in listed] == ["first", "second"]
    assert [part["first_document"] for part in listed] == [0, listed[0]["documents"]]
    assert [part["digest"] for part in listed] == [p.manifest["digest"] for p in parts]
    assert merged.manifest["corpus"]["special_tokens"] == both.manifest["corpus"]["special_tokens"]
    assert merged.text(listed[0]["documents"]) == parts[1].text(0)


def test_documents_and_passes_are_numbered_anew(tmp_path: Path) -> None:
    odd = np.repeat([900, 4, 77, 5, 6, 7, 8, 9, 10], 10)
    parts = [made(tmp_path / "a", 0), made(tmp_path / "b", 1, document=odd)]
    merged, _ = merged_of(tmp_path, "a", "b")
    tokens = merged.tokens()
    assert sorted(merged.documents()["document"]) == list(range(18))
    numbers = np.repeat([17, 9, 16, 10, 11, 12, 13, 14, 15], 10)
    assert tokens["document"][90:].tolist() == numbers.tolist()
    assert tokens["sequence"].tolist() == [*np.repeat(np.arange(9), 10), *(9 + odd)]
    assert tokens["batch"].tolist() == np.repeat(np.arange(18), 10).tolist()
    assert (loads(merged) == loads(parts[0]).add(loads(parts[1]))).all()


def loads(trace: Trace) -> pd.Series:
    """Assignments to each expert of each router."""
    of = trace.routing().melt("router", ["expert_0", "expert_1"], value_name="expert")
    return of.astype({"expert": float}).value_counts(["router", "expert"]).sort_index()


def test_types_of_other_programs_are_merged_to_those_of_the_format(tmp_path: Path) -> None:
    """Wider ids, and labels as the large strings that polars writes."""
    for name in "ab":
        made(tmp_path / name, 0 if name == "a" else 1)
    wide = {"expert_0": pa.uint16(), "expert_1": pa.uint16(), "domain": pa.large_string()}
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    for path in sorted((tmp_path / "c").glob("*/*.parquet")):
        table = pq.read_table(path)
        kinds = [
            wide.get(name, kind)
            for name, kind in zip(table.column_names, table.schema.types, strict=True)
        ]
        as_wide = table.cast(pa.schema([*zip(table.column_names, kinds, strict=True)]))
        pq.write_table(as_wide, path, row_group_size=40)
        restate(tmp_path / "c", str(path.relative_to(tmp_path / "c")))
    merged, expected = (merged_of(tmp_path, "a", name)[0] for name in "cb")
    for table in ("routing", "tokens", "documents"):
        pd.testing.assert_frame_equal(getattr(merged, table)(), getattr(expected, table)())
        stored = [next(trace.shards).schema(table) for trace in (merged, expected)]
        assert stored[0] == stored[1]


def test_each_rank_goes_behind_the_same_rank(tmp_path: Path) -> None:
    """Of a pass of 10 tokens, a document, on each of two ranks."""
    rng = np.random.default_rng(0)
    for name in "ab":
        with hold(tmp_path / name) as lock:
            for rank in (1, 0):
                ids = [uniform_ids(rng, 10, E, K) for _ in range(L)]
                given = {"documents": [Document(rank, "text", "here", 10)]}
                one = a_pass(0, ids, document=np.full(10, rank, np.int32), **given)
                of = {"weights": False, "resume": ResumePoint(rank), "lock": lock}
                with TraceWriter(tmp_path / name, {}, routers(L, E, K), **of) as writer:
                    writer.write(one)
    merged, _ = merged_of(tmp_path, "a", "b")
    assert merged.n_tokens == 2 * Trace(tmp_path / "a").n_tokens
    assert {shard.files.rank for shard in merged.shards} == {0, 1}
    # the passes of the ranks of a run keep their number, which is the same
    assert merged.tokens()["batch"].tolist() == [0] * 10 + [1] * 10 + [0] * 10 + [1] * 10


def test_counts_encoders_and_traces_without_a_vocabulary(tmp_path: Path) -> None:
    loads = [np.arange(16, dtype=np.int64).reshape(2, 8) * 2 for _ in range(2)]
    write_counts(tmp_path / "a", loads, 2, ("x", "y"))
    write_counts(tmp_path / "b", [load * 3 for load in loads], 2, ("y", "z"))
    merged, _ = merged_of(tmp_path, "a", "b")
    shutil.copytree(tmp_path / "b", tmp_path / "history")
    edit_manifest(tmp_path / "history", training={"every": 1, "log_steps": 10})
    refused(tmp_path, "history is the history of a training run: its windows", "a", "history")
    counts = merged.counts().groupby("domain", observed=True)["assignments"].sum()
    low, high = int(loads[0][0].sum()), int(loads[0][1].sum())
    assert counts.to_dict() == {"x": 2 * low, "y": 2 * (high + 3 * low), "z": 6 * high}
    made(tmp_path / "d", 2, words=0)
    made(tmp_path / "e", 3)
    assert len(merged_of(tmp_path, "d", "e")[0].vocabulary()) == 50
    encoder_decoder(tmp_path / "f")
    # what states no checksums may be other data
    without_checksums(tmp_path / "f", tmp_path / "g", hashes=False)
    assert merged_of(tmp_path, "f", "g")[0].n_decisions == 20


def test_a_part_that_was_interrupted_makes_the_whole_so(two: list[Path], tmp_path: Path) -> None:
    edit_manifest(two[1], status="interrupted")
    merged, found = merged_of(tmp_path, "a", "b")
    assert (merged.status, found.resumable) == ("interrupted", False)


def test_numbers_end_at_those_of_the_format(tmp_path: Path) -> None:
    trace = made(tmp_path / "a", 0)
    for what, held in (
        ("sequences", {"sequences": MOST_NUMBER - 3}),
        ("documents", {"documents": MOST_NUMBER - 8}),
        ("forward passes", {"batches": MOST_NUMBER - 8}),
    ):
        (tmp_path / what).mkdir()
        with pytest.raises(MoeInspectError, match=f"numbers of {what} go beyond 2,147,483,647"):
            Target(tmp_path / what, trace.manifest, None, **held).add(trace)


def refused(root: Path, says: str, *names: str) -> None:
    """In one line, with nothing left behind."""
    there = sorted(path.name for path in root.iterdir())
    with pytest.raises(MoeInspectError, match=says) as error:
        merge([root / name for name in names], root / "new")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in root.iterdir()) == there


def other(section: str, **values: Any) -> Callable[[Path, int], None]:
    def make(root: Path, seed: int) -> None:
        made(root, seed)
        manifest = json.loads((root / "trace.json").read_text())
        edit_manifest(root, **{section: (manifest.get(section) or {}) | values})

    return make


def of_shape(ids: np.ndarray, experts: int = E, routers: int = L) -> Callable[[Path, int], Any]:
    weights = np.ones(ids.shape)
    return lambda root, _: write_trace(root, [ids] * routers, experts, weights=[weights] * routers)


LOGITS = [np.zeros((90, E), np.float16)] * L
UNLIKE: dict[str, tuple[Callable[[Path, int], Any], str]] = {
    "model": (other("model", id="other"), r"model.id is synthetic and other.*edit"),
    "adapter": (other("model", adapter={"kind": "lora"}), "model.adapter is None and"),
    "seed": (other("corpus", plan={"random_init": 3}), "plan.random_init is None and 3"),
    "dtype": (other("capture", dtype="bfloat16"), "capture.dtype is float32 and bfloat16"),
    "experts": (of_shape(PAIRS, 9), r"routers\[0\].experts is 8 and 9"),
    "k": (of_shape(PAIRS[:, :1]), r"routers\[0\].top_k is 2 and 1"),
    "routers": (of_shape(PAIRS, routers=1), "the routers is 2 routers and 1 router"),
    "weights": (lambda root, seed: made(root, seed, weights=None), "a has weight_j, .*b does not"),
    "logits": (lambda root, seed: made(root, seed, logits=LOGITS), "b has logits, .*a does not"),
    "counts": (
        lambda root, seed: write_counts(root, [np.ones((1, E))] * L, K),
        "b holds counts only, .*a decisions",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_traces_are_refused(tmp_path: Path, name: str) -> None:
    make, says = UNLIKE[name]
    made(tmp_path / "a", 0)
    make(tmp_path / "b", 1)
    assert verify(tmp_path / "b").ok
    refused(tmp_path, says, "a", "b")


def test_nothing_counts_twice(two: list[Path], tmp_path: Path) -> None:
    for seed, path in enumerate(two):
        edit_manifest(path, corpus={"split_documents": 3, "empty_documents": seed})
    merge(two, tmp_path / "ab")
    for one, two in (("ab", "a"), ("b", "ab")):
        refused(tmp_path, "they would count twice", one, two)
    stated = Trace(tmp_path / "ab").manifest["corpus"]
    assert (stated["split_documents"], stated["empty_documents"]) == (6, 1)
    for url in (tmp_path / "a").as_uri(), f"file://{tmp_path}/./a":
        with pytest.raises(MoeInspectError, match="is one of the traces to merge"):
            merge([url, tmp_path / "b"], tmp_path / "a", overwrite=True)


def test_vocabularies_are_united_where_one_begins_with_the_other(tmp_path: Path) -> None:
    made(tmp_path / "a", 0)
    made(tmp_path / "b", 1, words=60)
    assert len(merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m").vocabulary()) == 60
    made(tmp_path / "c", 2, words=0, token_id=np.full(90, 70))
    refused(tmp_path, "c has token id 70, beyond the 50 tokens of the vocabulary", "a", "c")
    words = pq.read_table(tmp_path / "b" / "vocabulary.parquet").to_pandas()
    words.loc[7, "token"] = "other"
    words.to_parquet(tmp_path / "b" / "vocabulary.parquet", index=False)
    edit_manifest(tmp_path / "b", vocabulary=None)
    refused(tmp_path, "different vocabularies: token 7 is ' w7' and 'other'", "a", "b")


def test_damage_is_refused_and_named(two: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "b/routing/part-0-1.parquet"
    with_a_bit_less(path, path.stat().st_size // 2)
    refused(tmp_path, "b/routing/part-0-1.parquet", "a", "b")
    refused(tmp_path, "give traces to merge")
    refused(tmp_path, "they would count twice", "a", "a")
    with pytest.raises(MoeInspectError, match="is one of the traces"):
        merge(two, two[0], overwrite=True)


def test_what_was_copied_is_what_was_verified(tmp_path: Path) -> None:
    trace, found = made(tmp_path / "a", 0), verify(tmp_path / "a")
    (tmp_path / "m").mkdir()
    target = Target(tmp_path / "m", trace.manifest, None)
    target.add(trace)
    assert not [*target.differences([found])]
    target.assignments -= 1
    assert [*target.differences([found])] == [("assignments", 358, 359)]


def test_the_command(cli_here: Cli, two: list[Path], tmp_path: Path) -> None:
    call = ("merge", *two, "-o", tmp_path / "m")
    assert cli_here(*call).stderr == f"merged 2 traces, 180 tokens into {tmp_path / 'm'}\n"
    assert "--overwrite" in cli_here(*call, check=1).stderr
    cli_here(*call, "--overwrite")
    assert verify(tmp_path / "m").ok


def test_many_small_shards_are_read_as_few_and_merged_into_one(tmp_path: Path) -> None:
    apart = made(tmp_path / "apart", 0, T=600, shard_tokens=10)
    whole = made(tmp_path / "whole", 0, T=600, shard_tokens=600)
    assert [shard.files.tokens for shard in apart.shards] == [70] * 8 + [40]
    assert len([*apart.joined(0)]) == verify(apart).shards == 60
    one, _ = merged_of(tmp_path, "apart")
    assert one.n_shards == 1
    frames = [
        (of.tokens(), of.documents(), *(of.routing(router=r) for r in range(L)))
        for of in (whole, apart, one)
    ]
    for found in frames[1:]:
        for frame, expected in zip(found, frames[0], strict=True):
            pd.testing.assert_frame_equal(frame, expected)
    joined, alone = next(apart.shards), next(Trace(apart.path).shards)
    with ThreadPoolExecutor(L) as threads:  # each asks for another router of the same shards
        for r, slots in enumerate(threads.map(joined.slots, range(L))):
            np.testing.assert_array_equal(slots, alone.slots(r))
    for name in ("load", "domains"):
        pd.testing.assert_frame_equal(report(apart).tables[name], report(whole).tables[name])

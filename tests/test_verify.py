"""verify finds each planted corruption, names it by file and row, and calls fine what is."""

from __future__ import annotations

import hashlib
import json
import operator
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import moe_inspect
from moe_inspect.making import merge, trace_model
from moe_inspect.public import report
from moe_inspect.trace.manifest import write_manifest
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT, Cli
from tests.support.damage import edit_line, edit_lines, edit_manifest, restate, with_a_bit_less
from tests.support.families import build
from tests.support.generated import Kind, written
from tests.support.synthetic import counts_by_document, write_counts
from tests.support.zoo import token_batch

T, K, L = 300, 2, 3
Change = Callable[[dict[str, list]], None]


def rewrite(root: Path, table: str, shard: int, change: Change) -> None:
    """Changes the columns of a part, row group by row group, and its line with it: only what it says is wrong."""
    name = f"{table}/part-0-{shard}.parquet"
    file = pq.ParquetFile(root / name)
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    schema = pa.schema([f.with_nullable(True) for f in file.schema_arrow])
    columns = file.read().to_pydict()
    change(columns)
    made, at = pa.table(columns, schema=schema), 0
    sizes[-1] += len(made) - sum(sizes)
    with pq.ParquetWriter(root / name, schema) as writer:
        for size in sizes:
            writer.write_table(made.slice(at, size), row_group_size=max(size, 1))
            at += size
    restate(root, name, **({"decisions": len(made)} if table == "routing" else {}))


def put(column: str, row: int, value: object) -> Change:
    return lambda columns: operator.setitem(columns[column], row, value)


def copy_of(column: str, row: int, source: str) -> Change:
    return lambda columns: operator.setitem(columns[column], row, columns[source][row])


def each(change: Callable[[list], list]) -> Change:
    """In every column."""
    return lambda columns: columns.update({name: change(of) for name, of in columns.items()})


def in_table(table: str, shard: int, change: Change) -> Callable[[Path], None]:
    return lambda root: rewrite(root, table, shard, change)


def without_vocabulary(root: Path) -> None:
    """Rewrites trace.json as that of a trace that was recorded without a tokenizer."""
    manifest = json.loads((root / "trace.json").read_text())
    del manifest["vocabulary"]
    write_manifest(root, manifest)


# name: (what is done, file, row, what is said)
CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str, int | None, str]] = {
    "a bit": (lambda root: with_a_bit_less(root / "routing/part-0-2.parquet", 200), "routing/part-0-2.parquet", None, "sha256 is"),
    "a file gone": (lambda root: (root / "tokens/part-0-1.parquet").unlink(), "tokens/part-0-1.parquet", None, "missing"),
    "an orphan": (lambda root: shutil.copy(root / "tokens/part-0-1.parquet", root / "tokens/part-0-9.parquet"), "tokens/part-0-9.parquet", None, "an orphan"),
    "rows misstated": (lambda root: edit_line(root, 4, rows=99), "shards-0.jsonl", None, "line 5: rows of tokens/part-0-1.parquet is 99, of tokens 100 to 199 there are 100"),
    "documents misstated": (lambda root: edit_line(root, 3, rows=9), "documents/part-0-1.parquet", None, "it has 10 rows, its line says 9"),
    "a shard elsewhere": (lambda root: edit_line(root, 4, first_batch=9), "shards-0.jsonl", None, "line 5: it states tokens and batches .100, 199, 9, 19., another line of shard 1"),
    "a shard left out": (lambda root: edit_lines(root, [*edit_lines(root)[:3], *edit_lines(root)[6:]]), "shards-0.jsonl", None, "shard 2 has tokens 200 to 299, 100 is the next"),
    "a shard twice": (lambda root: edit_lines(root, [*edit_lines(root), *edit_lines(root)[6:]]), "shards-0.jsonl", None, "line 10: documents of shard 2 is listed twice"),
    "a shard under two numbers": (lambda root: edit_lines(root, [*edit_lines(root), *({**line, "shard": 3} for line in edit_lines(root)[6:])]), "shards-0.jsonl", None, "line 10: documents/part-0-2.parquet is listed twice"),
    "an unknown key": (lambda root: edit_line(root, 4, crc33=1), "shards-0.jsonl", None, "has the unknown key 'crc33'"),
    "a checksum gone": (lambda root: (root / "shards-0.jsonl").write_text((root / "shards-0.jsonl").read_text().replace('"footer_crc32"', '"path"')), "shards-0.jsonl", None, "its crc32 differs"),
    "a checksum without another": (lambda root: edit_lines(root, [{k: v for k, v in line.items() if k != "footer_crc32"} for line in edit_lines(root)]), "shards-0.jsonl", None, "the line of documents/part-0-0.parquet has no footer_crc32"),
    "a digest gone": (lambda root: edit_manifest(root, digest=None), "trace.json", None, "its digest was removed"),
    "a manifest edited": (lambda root: (root / "trace.json").write_text((root / "trace.json").read_text().replace('"dropped": 0', '"dropped": 1')), "trace.json", None, "changed after it was written"),
    "a vocabulary changed": (lambda root: shutil.copy(root / "documents/part-0-0.parquet", root / "vocabulary.parquet"), "vocabulary.parquet", None, "bytes, .* were written"),
    "a vocabulary added": (without_vocabulary, "vocabulary.parquet", None, "it was added later: trace.json states no vocabulary"),
    "a vocabulary gone": (lambda root: (root / "vocabulary.parquet").unlink(), "vocabulary.parquet", None, "missing"),
    "rows shuffled": (in_table("routing", 0, each(lambda v: [*v[99::-1], *v[100:]])), "routing/part-0-0.parquet", 0, "router is 2|token is 99"),
    "a weight that is NaN": (in_table("routing", 2, put("weight_1", 17, float("nan"))), "routing/part-0-2.parquet", 17, "weight_1 is nan"),
    "an id beyond E": (in_table("routing", 1, put("expert_1", 123, 8)), "routing/part-0-1.parquet", 123, "expert_1 is 8, router 1 has 8"),
    "an expert twice": (in_table("routing", 0, copy_of("expert_1", 207, "expert_0")), "routing/part-0-0.parquet", 207, "is in slots 0 and 1"),
    "a decision missing": (in_table("routing", 1, each(lambda v: v[:-1])), "routing/part-0-1.parquet", 299, "router 2 .layer 2. has 99 decisions for the 100 tokens"),
    "a decision too many": (in_table("routing", 1, each(lambda v: [*v[:99], *v[100:], v[-1]])), "routing/part-0-1.parquet", 299, "router 2 .layer 2. has more decisions than the 100 tokens that reach it"),
    "decisions out of order": (in_table("routing", 1, each(lambda v: [*v[:3], v[4], v[3], *v[5:]])), "routing/part-0-1.parquet", 3, "token is 104, not 103"),
    "another layer": (in_table("routing", 1, put("layer", 250, 7)), "routing/part-0-1.parquet", 250, "layer is 7, not 2"),
    "a router unknown": (in_table("routing", 1, put("router", 299, 3)), "routing/part-0-1.parquet", 299, "router is 3, the manifest lists 3"),
    "a weight that is none": (in_table("routing", 2, put("weight_0", 17, float("inf"))), "routing/part-0-2.parquet", 17, "weight_0 is inf"),
    "a weight without expert": (in_table("routing", 2, put("expert_1", 17, None)), "routing/part-0-2.parquet", 17, "weight_1 is there, expert_1 is null"),
    "a token number twice": (in_table("tokens", 1, put("token", 40, 139)), "tokens/part-0-1.parquet", 40, "token is 139, not 140"),
    "a token id beyond": (in_table("tokens", 1, put("token_id", 40, 50)), "tokens/part-0-1.parquet", 40, "token_id is 50, of a vocabulary of 50"),
    "a position skipped": (in_table("tokens", 1, put("position", 44, 9)), "tokens/part-0-1.parquet", 44, "position is 9 in sequence 14"),
    "a document undeclared": (in_table("tokens", 1, put("document", 44, 77)), "tokens/part-0-1.parquet", 44, "document 77 is not declared in any shard"),
    "a document twice": (in_table("documents", 1, put("document", 3, 2)), "documents/part-0-1.parquet", 3, "declared a second time"),
    "another domain": (in_table("tokens", 1, put("domain", 5, "b")), "tokens/part-0-1.parquet", 5, "domain is 'b', document 10 is of 'a'"),
    "a phase unknown": (in_table("tokens", 0, put("phase", 5, "train")), "tokens/part-0-0.parquet", 5, "phase is 'train'"),
    "a fact missing": (in_table("tokens", 0, put("sequence", 5, None)), "tokens/part-0-0.parquet", 5, "sequence is null"),
    "weights that rise": (in_table("routing", 0, put("weight_1", 120, 2.0)), "routing/part-0-0.parquet", 120, "the manifest says that weights descend"),
    "totals misstated": (lambda root: edit_manifest(root, counts={"tokens": 301, "decisions": 900}), "trace.json", None, "counts.tokens is 301, the shards have 300"),
    "decisions misstated": (lambda root: edit_manifest(root, counts={"tokens": 300, "decisions": 901}), "trace.json", None, "counts.decisions is 901, the shards have 900"),
    "a manifest damaged": (lambda root: (root / "trace.json").write_text("{}"), "trace.json", None, "format is missing"),
}  # fmt: skip


def test_the_clean_trace_is_fine(sound: Path):
    found = verify(sound)
    assert found.ok, found
    assert (found.tokens, found.decisions, found.empty_slots, found.documents) == (T, T * L, 1, 30)
    assert found.assignments == T * L * K - 1
    for line in edit_lines(sound):
        data = (sound / line["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == line["sha256"]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found_and_named(name: str, copied: Path):
    corrupt, file, row, said = CORRUPTIONS[name]
    corrupt(copied)
    found = verify(copied)
    assert not found.ok
    assert (found.file, found.row) == (file, row), found
    assert re.search(said, found.violation or ""), found


def test_rewriting_alone_corrupts_nothing(copied: Path):
    for table in ("tokens", "routing", "documents"):
        rewrite(copied, table, 1, dict.copy)
    assert verify(copied).ok


def test_positions_may_have_gaps_where_decisions_were_dropped(copied: Path):
    rewrite(copied, "tokens", 1, put("position", 44, 9))
    assert not verify(copied).ok
    edit_manifest(copied, counts={"tokens": 300, "decisions": 900, "dropped": 3})
    found = verify(copied)
    assert found.ok, found
    assert [rule for rule in found.checked if rule.startswith("positions")] == [
        "positions: not checked, decisions were dropped"
    ]


# name: (trace and table, what is done, row, what is said)
OTHERS: dict[str, tuple[str, Change, int | None, str]] = {
    "an assignment too many": ("counts", put("assignments", 2, 13), 0, "assignments and"),
    "below zero": ("counts", put("assignments", 2, -1), 2, "assignments is -1"),
    "an expert twice": ("counts", put("expert", 2, 1), 0, "lists expert 1 2 times"),
    "an expert beyond": ("counts", put("expert", 2, 8), 2, "expert is 8"),
    "first choices beyond": ("counts", put("first_choice", 2, 13), 2, "first_choice is"),
    "another layer": ("counts", put("layer", 9, 9), 9, "layer is 9, not 1"),
    "too many of a document": (
        "by_document",
        put("assignments", 2, 60),
        0,
        "router 0 has 100 assignments of a document of 25 tokens × 2",
    ),
    "an expert twice in a document": (
        "by_document",
        put("expert", 2, 1),
        0,
        "lists expert 1 2 times in one document",
    ),
    "a document unknown": ("by_document", put("document", 2, 99), 2, "document 99 is not declared"),
    "another domain": (
        "by_document",
        put("domain", 2, "prose"),
        2,
        "domain is 'prose', document 0 is of 'code'",
    ),
    "a document without counts": (
        "by_document",
        each(lambda v: [*v[8:16], *v[24:]]),
        None,
        "document 0 has no counts",
    ),
    "a router without a document": (
        "by_document",
        each(lambda v: v[8:]),
        0,
        "lists expert 0 0 times in one document",
    ),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces of counts, also by document."""
    root = tmp_path_factory.mktemp("others")
    counts_by_document(root / "by_document")
    write_counts(root / "counts", [np.arange(8)[None] + 10] * 2, 2)
    return root


@pytest.mark.parametrize("name", OTHERS)
def test_counts_are_verified_too(name: str, others: Path, tmp_path: Path):
    of, change, row, said = OTHERS[name]
    shutil.copytree(others / of, root := tmp_path / "t")
    assert verify(root).ok
    rewrite(root, "counts", 0, change)
    found = verify(root)
    assert (found.ok, found.file, found.row) == (False, "counts/part-0-0.parquet", row)
    assert said in (found.violation or "")


def test_documents_that_are_counted_have_the_tokens_of_their_shard(others: Path, tmp_path: Path):
    shutil.copytree(others / "by_document", root := tmp_path / "t")
    rewrite(root, "documents", 0, put("tokens", 1, 24))
    found = verify(root)
    assert (found.ok, found.file) == (False, "documents/part-0-0.parquet")
    assert found.violation == "its documents have 49 tokens, the shard 50"


@pytest.mark.parametrize("name", ["balanced", "collapsed", "untrained"])
def test_the_sample_traces_are_fine(name: str):
    found = verify(ROOT / "sample_traces" / name)
    assert found.ok, found
    assert any("logits" in line for line in found.checked)


@pytest.mark.parametrize("recorded", [True, False])
def test_weights_are_said_to_be_checked_where_they_are_recorded(recorded: bool):
    rules = verify(written(Kind(weights=recorded))).checked
    assert any(rule.startswith("weights finite") for rule in rules) == recorded
    assert ("no weights recorded" in rules) != recorded


def test_the_command(cli_here: Cli, copied: Path):
    done = cli_here("check", copied, "--quick")
    assert "files: 300 tokens, 900 decisions, 1,799 assignments in 3 shards." in done.stdout
    assert "The routes were not checked.\n" in done.stdout
    rewrite(copied, "routing", 1, put("expert_1", 123, 8))
    done = cli_here("check", "t", check=3)
    where = "routing/part-0-1.parquet row 123"
    assert f"• Critical: {where}: expert_1 is 8, router 1 has 8 experts." in done.stdout
    assert done.stdout.endswith("• The routes were not read, as the files are broken.\n")
    assert done.stderr == "failed: broken_file\n"
    (row,) = cli_here("check", "t", "--format", "json", check=3).stdout.splitlines()
    assert (said := json.loads(row))["where"] == said["values"]["where"] == where
    assert (said["kind"], said["severity"], said["p"]) == ("broken_file", "critical", 0)
    assert "no trace at nowhere" in cli_here("check", "nowhere", check=1).stderr


def test_traces_of_the_demo_model_are_fine(tmp_path: Path):
    options = {"max_tokens": 600, "batch_tokens": 256}
    generated, logits = {"generate": 4, "max_tokens": 200}, {"logits": True}
    for n, more in enumerate((generated, logits, {"counts_only": True})):
        trace_model("demo", tmp_path / f"{n}", **{**options, **more})
        found = verify(tmp_path / f"{n}")
        assert found.ok, (more, found)
        assert found.empty_slots == 0


def test_columns_that_the_format_does_not_name_are_left_alone(tmp_path: Path) -> None:
    """As in a trace of an earlier version: every number is that of the trace without them."""
    trace = trace_model("demo", tmp_path / "t", max_tokens=200)
    shutil.copytree(tmp_path / "t", tmp_path / "earlier")
    for table, name in (("tokens", "loss_nats"), ("routing", "peak_0")):
        part = f"{table}/part-0-0.parquet"
        file = pq.ParquetFile(tmp_path / "earlier" / part)
        rows = [file.read_row_group(g) for g in range(file.metadata.num_row_groups)]
        more = [of.append_column(name, pa.nulls(len(of), pa.float32())) for of in rows]
        with pq.ParquetWriter(tmp_path / "earlier" / part, more[0].schema) as writer:
            for of in more:
                writer.write_table(of)
        restate(tmp_path / "earlier", part)
    capture = {**trace.manifest["capture"], "token_loss": True, "peaks": True}
    edit_manifest(tmp_path / "earlier", capture=capture)
    assert verify(tmp_path / "earlier").ok
    earlier, tables = report(tmp_path / "earlier").tables, report(trace).tables
    for name in set(tables) - {"summary"}:
        pd.testing.assert_frame_equal(earlier[name], tables[name])
    (tmp_path / "text.txt").write_text("Another text. " * 9)
    other = trace_model("demo", tmp_path / "other", data=[str(tmp_path / "text.txt")])
    merged = merge([tmp_path / "earlier", other], tmp_path / "m")
    assert merged.n_tokens == trace.n_tokens + other.n_tokens


def test_counts_that_have_just_begun_are_checked(tmp_path: Path) -> None:
    """A trace of counts that was killed before its first commit."""
    model = build("olmoe")
    with moe_inspect.record(model, tmp_path / "t", counts_only=True), torch.no_grad():
        model(**token_batch([4]))
        shutil.copytree(tmp_path / "t", tmp_path / "killed")
    (note,) = moe_inspect.check(tmp_path / "killed").findings
    assert note.kind == "unfinished"

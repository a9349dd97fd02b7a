"""verify finds each planted corruption, names it by file and row, and calls fine what is."""

from __future__ import annotations

import json
import operator
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_inspect.api import trace_model
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT, Cli
from tests.support.damage import edit_lines, edit_manifest, restate, with_a_bit_less
from tests.support.synthetic import thirty_documents, write_counts

T, K, L = 300, 2, 3
Change = Callable[[dict[str, list]], None]


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fine") / "t"
    thirty_documents(root)
    return root


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


def dropped(columns: dict[str, list]) -> None:
    for values in columns.values():
        values.pop()


def swapped(columns: dict[str, list]) -> None:
    for values in columns.values():
        values[3:5] = values[4:2:-1]


def reversed_rows(columns: dict[str, list]) -> None:
    for values in columns.values():
        values[:100] = values[:100][::-1]


def of_line(at: int = 4, **values: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        lines = edit_lines(root)
        lines[at] |= values
        edit_lines(root, lines)

    return change


def of_manifest(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        manifest = json.loads((root / "trace.json").read_text())
        change(manifest)
        edit_manifest(root, **manifest)

    return apply


def in_table(table: str, shard: int, change: Change) -> Callable[[Path], None]:
    return lambda root: rewrite(root, table, shard, change)


def flip(root: Path) -> None:
    with_a_bit_less(root / "routing/part-0-2.parquet", 200)


# name: (what is done, file, row, what is said)
CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str, int | None, str]] = {
    "a bit": (flip, "routing/part-0-2.parquet", None, "sha256 is"),
    "a file gone": (lambda root: (root / "tokens/part-0-1.parquet").unlink(), "tokens/part-0-1.parquet", None, "missing"),
    "an orphan": (lambda root: shutil.copy(root / "tokens/part-0-1.parquet", root / "tokens/part-0-9.parquet"), "tokens/part-0-9.parquet", None, "an orphan"),
    "rows misstated": (of_line(rows=99), "shards-0.jsonl", None, "line 5: rows of tokens/part-0-1.parquet is 99, of tokens 100 to 199 there are 100"),
    "documents misstated": (of_line(3, rows=9), "documents/part-0-1.parquet", None, "it has 10 rows, its line says 9"),
    "a shard elsewhere": (of_line(first_batch=9), "shards-0.jsonl", None, "line 5: it states tokens and batches .100, 199, 9, 19., another line of shard 1"),
    "a shard left out": (lambda root: edit_lines(root, [*edit_lines(root)[:3], *edit_lines(root)[6:]]), "shards-0.jsonl", None, "shard 2 has tokens 200 to 299, 100 is the next"),
    "a shard twice": (lambda root: edit_lines(root, [*edit_lines(root), *edit_lines(root)[6:]]), "shards-0.jsonl", None, "line 10: documents of shard 2 is listed twice"),
    "a shard under two numbers": (lambda root: edit_lines(root, [*edit_lines(root), *({**line, "shard": 3} for line in edit_lines(root)[6:])]), "shards-0.jsonl", None, "line 10: documents/part-0-2.parquet is listed twice"),
    "an unknown key": (of_line(crc33=1), "shards-0.jsonl", None, "has the unknown key 'crc33'"),
    "a checksum gone": (lambda root: (root / "shards-0.jsonl").write_text((root / "shards-0.jsonl").read_text().replace('"footer_crc32"', '"path"')), "shards-0.jsonl", None, "its crc32 differs"),
    "a digest gone": (lambda root: edit_manifest(root, digest=None), "trace.json", None, "its digest was removed"),
    "a manifest edited": (lambda root: (root / "trace.json").write_text((root / "trace.json").read_text().replace('"dropped": 0', '"dropped": 1')), "trace.json", None, "changed after it was written"),
    "a vocabulary changed": (lambda root: shutil.copy(root / "documents/part-0-0.parquet", root / "vocabulary.parquet"), "vocabulary.parquet", None, "bytes, .* were written"),
    "a vocabulary gone": (lambda root: (root / "vocabulary.parquet").unlink(), "vocabulary.parquet", None, "missing"),
    "rows shuffled": (in_table("routing", 0, reversed_rows), "routing/part-0-0.parquet", 0, "router is 2|token is 99"),
    "a weight that is NaN": (in_table("routing", 2, put("weight_1", 17, float("nan"))), "routing/part-0-2.parquet", 17, "weight_1 is nan"),
    "an id beyond E": (in_table("routing", 1, put("expert_1", 123, 8)), "routing/part-0-1.parquet", 123, "expert_1 is 8, router 1 has 8"),
    "an expert twice": (in_table("routing", 0, copy_of("expert_1", 207, "expert_0")), "routing/part-0-0.parquet", 207, "is in slots 0 and 1"),
    "a decision missing": (in_table("routing", 1, dropped), "routing/part-0-1.parquet", 299, "router 2 .layer 2. has 99 decisions for the 100 tokens"),
    "decisions out of order": (in_table("routing", 1, swapped), "routing/part-0-1.parquet", 3, "token is 104, not 103"),
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
    "totals misstated": (of_manifest(lambda m: m["counts"].update(tokens=301)), "trace.json", None, "counts.tokens is 301, the shards have 300"),
    "a manifest damaged": (lambda root: (root / "trace.json").write_text("{}"), "trace.json", None, "format is missing"),
}  # fmt: skip


def test_the_clean_trace_is_fine(fine: Path):
    found = verify(fine)
    assert found.ok, found
    assert (found.tokens, found.decisions, found.empty_slots, found.documents) == (T, T * L, 1, 30)
    assert found.assignments == T * L * K - 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found_and_named(name: str, fine: Path, tmp_path: Path):
    corrupt, file, row, said = CORRUPTIONS[name]
    shutil.copytree(fine, tmp_path / "t")
    corrupt(tmp_path / "t")
    found = verify(tmp_path / "t")
    assert not found.ok
    assert (found.file, found.row) == (file, row), found
    assert re.search(said, found.violation or ""), found


def test_rewriting_alone_corrupts_nothing(fine: Path, tmp_path: Path):
    shutil.copytree(fine, tmp_path / "t")
    for table in ("tokens", "routing", "documents"):
        rewrite(tmp_path / "t", table, 1, dict.copy)
    assert verify(tmp_path / "t").ok


def more_than(column: str) -> Change:
    """One more than the assignments there are."""
    return lambda c: put(column, 2, c["assignments"][2] + 1)(c)


COUNTS: dict[str, tuple[Change, int | None, str]] = {
    "an assignment too many": (more_than("assignments"), 0, "assignments and"),
    "below zero": (put("assignments", 2, -1), 2, "assignments is -1"),
    "an expert twice": (put("expert", 2, 1), 0, "lists expert 1 2 times"),
    "an expert beyond": (put("expert", 2, 8), 2, "expert is 8"),
    "first choices beyond": (more_than("first_choice"), 2, "first_choice is"),
    "another layer": (put("layer", 9, 9), 9, "layer is 9, not 1"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_verified_too(name: str, tmp_path: Path):
    load = np.arange(8)[None] + 10
    write_counts(tmp_path / "t", [load, load], 2)
    assert verify(tmp_path / "t").ok
    change, row, said = COUNTS[name]
    rewrite(tmp_path / "t", "counts", 0, change)
    found = verify(tmp_path / "t")
    assert not found.ok
    assert said in (found.violation or "")
    assert (found.file, found.row) == ("counts/part-0-0.parquet", row)


LOSSES = {
    "negative": ("loss_nats", -0.5, "loss_nats is -0.5"),
    "no number": ("entropy_nats", float("nan"), "entropy_nats is nan"),
    "one without the other": ("loss_nats", None, "loss_nats is null where entropy_nats is not"),
}


@pytest.fixture(scope="module")
def with_losses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("losses") / "t"
    trace_model("demo", root, max_tokens=200, token_loss=True)
    assert verify(root).ok
    return root


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_verified(name: str, with_losses: Path, tmp_path: Path):
    column, value, said = LOSSES[name]
    shutil.copytree(with_losses, tmp_path / "t")
    rewrite(tmp_path / "t", "tokens", 0, put(column, 7, value))
    found = verify(tmp_path / "t")
    assert (found.ok, found.file, found.row) == (False, "tokens/part-0-0.parquet", 7)
    assert said in str(found.violation)


@pytest.mark.parametrize("name", ["balanced", "collapsed", "untrained"])
def test_the_sample_traces_are_fine(name: str):
    found = verify(ROOT / "sample_traces" / name)
    assert found.ok, found
    assert any("logits" in line for line in found.checked)


def test_the_commands(cli_here: Cli, fine: Path, tmp_path: Path):
    done = cli_here("verify", fine)
    assert "is fine: 300 tokens, 900 decisions, 1,799 assignments in 3 shards" in done.stdout
    shutil.copytree(fine, tmp_path / "t")
    rewrite(tmp_path / "t", "routing", 1, put("expert_1", 123, 8))
    done = cli_here("verify", "t", check=1)
    line = "t/routing/part-0-1.parquet row 123: expert_1 is 8, router 1 has 8 experts"
    assert (done.stdout, done.stderr) == ("", f"error: {line}\n")
    said = json.loads(cli_here("verify", "t", "--json", check=1).stdout)
    assert (said["ok"], said["file"], said["row"]) == (False, "routing/part-0-1.parquet", 123)
    assert "no trace at nowhere" in cli_here("verify", "nowhere", check=1).stderr
    with pytest.raises(MoeInspectError):
        verify(tmp_path / "nowhere")


def test_traces_of_the_demo_model_are_fine(tmp_path: Path):
    options = {"max_tokens": 600, "batch_tokens": 256}
    generated, logits = {"generate": 4, "max_tokens": 200}, {"logits": True}
    for n, more in enumerate((generated, logits, {"counts_only": True})):
        trace_model("demo", tmp_path / f"{n}", **{**options, **more})
        found = verify(tmp_path / f"{n}")
        assert found.ok, (more, found)
        assert found.empty_slots == 0

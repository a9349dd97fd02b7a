"""A trace is not believed: a changed byte is found, and what cannot be is refused in one line,
before anything is allocated for it."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.public import open_trace, report
from moe_inspect.trace import parts, schema
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import ShardLimits, TraceWriter, resume_point
from tests.conftest import ROOT, Put
from tests.support.damage import (
    changed_bytes,
    edit_line,
    edit_lines,
    edit_manifest,
    last_byte,
    restate,
    with_a_bit_less,
    without_checksums,
)
from tests.support.synthetic import routers, write_counts
from tests.test_trace import ROUTERS, a_batch


def numbers(root: Path) -> list[str]:
    tables = report(open_trace(root)).tables
    return [tables[name].to_csv() for name in ("load", "vocabulary", "repetition")]


@pytest.mark.parametrize("small", [0, parts.SMALL_BYTES], ids=["by CRCs", "by the hash"])
def test_a_changed_byte_is_found_or_changes_nothing(small: int, copied: Path, put: Put) -> None:
    """As large files are checked when they are opened, and as small ones are."""
    put(parts, SMALL_BYTES=small)
    before, outcomes = numbers(copied), {"refused": 0, "same": 0}
    for file, place, was, now in changed_bytes(copied, 40):
        found = verify(copied)
        said = f"{file} byte {place}: {was} → {now}"
        if found.ok:  # a text that may be edited
            assert file == schema.MANIFEST, said
            whole = (copied / file).read_bytes()
            line = whole.splitlines()[whole[:place].count(b"\n")]
            assert re.match(rb'\s*"(id|note|host|path|command)": "', line), said
        assert "\n" not in (found.violation or ""), said
        try:
            found = numbers(copied)
        except MoeInspectError as error:
            found = str(error)
        refused = isinstance(found, str)
        assert (Path(file).name in found and "\n" not in found) if refused else found == before
        outcomes["refused" if refused else "same"] += 1
    assert verify(copied).ok
    assert outcomes["refused"] > outcomes["same"] > 0


def test_every_page_carries_a_crc(copied: Path) -> None:
    """Within pages a CRC is all that finds a change: footer and row counts stay as they are."""
    for path in sorted(copied.rglob("*.parquet")):
        pq.ParquetFile(path, page_checksum_verification=True).read()
        with_a_bit_less(path, last_byte(pq.read_metadata(path).row_group(0).column(0)))
        with pytest.raises(OSError, match="CRC checksum verification failed"):
            pq.ParquetFile(path, page_checksum_verification=True).read()


def test_a_changed_footer_or_page_of_a_large_file_is_found(copied: Path) -> None:
    """Where the file as a whole is not hashed when it is opened, here since no line states its
    hash. What is changed in the footer is who wrote it."""
    edit_lines(copied, [line for line in edit_lines(copied) if line.pop("sha256")])
    path = copied / "routing/part-0-0.parquet"
    whole, experts = path.read_bytes(), pq.read_schema(path).get_field_index("expert_0")
    of_page = last_byte(pq.read_metadata(path).row_group(1).column(experts)) - 4  # uncompressed
    for place, said in (
        (whole.rindex(b"parquet-cpp"), "its footer was changed after it was written"),
        (of_page, "CRC"),
    ):
        path.write_bytes(whole)
        with_a_bit_less(path, place)
        assert pq.read_table(path).num_rows == 300
        with pytest.raises(MoeInspectError, match=rf"routing/part-0-0\.parquet: .*{said}"):
            numbers(copied)
    path.write_bytes(whole[:-1] + b"X")  # the last byte says that it is Parquet
    with pytest.raises(MoeInspectError, match=r"part-0-0\.parquet: it has no Parquet footer"):
        numbers(copied)


def test_free_text_may_be_edited_and_nothing_else(copied: Path) -> None:
    path = copied / schema.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["model"]["id"] = "another name"
    path.write_text(json.dumps(manifest))
    assert verify(copied).ok
    manifest["routers"][1]["layer"] = 7
    path.write_text(json.dumps(manifest))
    said = r"it was changed after it was written .* delete the key digest .* model\.id"
    with pytest.raises(MoeInspectError, match=rf"trace\.json: {said}"):
        open_trace(copied)
    del manifest["digest"]
    path.write_text(json.dumps(manifest))
    assert open_trace(copied).routers[1].layer == 7


@pytest.mark.parametrize("name", ["untrained", ""])
def test_traces_without_checksums_are_fine(name: str, sound: Path, tmp_path: Path) -> None:
    of = ROOT / "sample_traces" / name if name else sound
    without_checksums(of, tmp_path / "t")
    assert verify(tmp_path / "t").ok
    assert numbers(tmp_path / "t")
    notes = [" ".join(report(path).notes()) for path in (of, tmp_path / "t")]
    said = "states no checksum of vocabulary.parquet"
    assert [said in note for note in notes] == [False, True]
    for file, *_ in changed_bytes(tmp_path / "t", 60):
        if "parquet" in file and verify(tmp_path / "t").ok:
            assert file == schema.VOCABULARY  # nothing states its hash


def test_a_resumed_trace_goes_on_with_checksums(tmp_path: Path) -> None:
    for n, root in enumerate((tmp_path / "new", tmp_path / "t")):
        resume = resume_point(root) if n else None
        with TraceWriter(root, {}, ROUTERS, limits=ShardLimits(20), resume=resume) as writer:
            writer.write(a_batch(np.random.default_rng(n), n, 20, ROUTERS))
        if not n:
            without_checksums(root, tmp_path / "t")
    assert ["crc32" in line for line in edit_lines(tmp_path / "t")] == [False] * 3 + [True] * 3
    assert open_trace(tmp_path / "t").n_tokens == 40


def test_a_lost_line_is_missed(copied: Path) -> None:
    """Also the last, which would otherwise look like one that was not committed."""
    whole = (copied / "shards-0.jsonl").read_bytes()
    (copied / "shards-0.jsonl").write_bytes(whole[:-1])  # the end of the line
    with pytest.raises(MoeInspectError, match=r"counts\.tokens is 300, the shards have 200"):
        open_trace(copied)
    edit_manifest(copied, status="recording", counts={"tokens": 200, "decisions": 600})
    assert open_trace(copied).n_tokens == 200


def test_the_vocabulary_is_the_one_that_the_trace_was_begun_with(copied: Path) -> None:
    other = {"token_id": range(50), "token": [f"x{i}" for i in range(50)]}
    words = pa.table(other, schema=schema.VOCABULARY_SCHEMA)
    pq.write_table(words, copied / schema.VOCABULARY)
    with pytest.raises(MoeInspectError, match=r"vocabulary\.parquet"):
        report(open_trace(copied)).tables["vocabulary"]
    with pytest.raises(MoeInspectError, match=r"vocabulary\.parquet: it was changed"):
        TraceWriter(copied, {}, routers(3, 8, 2), resume=resume_point(copied))


def test_a_vocabulary_without_a_checksum_is_in_order(copied: Path) -> None:
    """A changed id would take the text from the tables in silence."""
    words = pq.read_table(copied / schema.VOCABULARY)
    edit_manifest(copied, vocabulary=None)
    for name, values, said in (
        ("token_id", [*range(49), 50], "row 49: token_id is 50, not 49"),
        ("token", [None, *["x"] * 49], "token is null"),
    ):
        made = put(name, pa.array(values, words.schema.field(name).type))(words)
        pq.write_table(made, copied / schema.VOCABULARY)
        with pytest.raises(MoeInspectError, match=rf"vocabulary\.parquet: {said}"):
            report(open_trace(copied)).tables["vocabulary"]


# --- what a manifest and a line cannot say; what the schemas refuse, of each kind one: that all is
# refused, tests/test_trace_format.py compares with a reference

DEEP = "[" * 100_000
ROUTER = {"layer": 0, "name": "gate", "path": "layers.0", "experts": 8, "top_k": 2}


def routed(**values: Any) -> dict[str, Any]:
    return {"routers": [ROUTER | values]}


def of_capture(**values: Any) -> dict[str, Any]:
    return {"capture": {"weights": True, **values}}


LARGE = [ROUTER | {"experts": 60_000}] * 300
WITHOUT_K = {"layer": 0, "name": "gate", "path": "layers.0", "experts": 8}
MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "10^9 experts": (routed(experts=10**9), r"routers\[0\]\.experts is 1000000000: 1 to 65535"),
    "many experts in all": ({"routers": LARGE}, "routers have 18,000,000 experts in all"),
    "too many routers": ({"routers": [0] * 70_000}, "routers lists 70,000"),
    "a router is none": ({"routers": [7]}, r"routers\[0\] is 7, not an object"),
    "experts as text": (routed(experts="8"), r'routers\[0\]\.experts is "8", not a whole number'),
    "NaN experts": (routed(experts=float("nan")), r"routers\[0\]\.experts is NaN"),
    "more slots than experts": (routed(top_k=9), r"routers\[0\]\.top_k is 9: 1 to 8"),
    "an unknown key": (routed(expert=8), r'routers\[0\]\."expert" is not a known key'),
    "a stack unknown": (routed(stack="middle"), r"routers\[0\]\.stack"),
    "no top_k": ({"routers": [ROUTER, WITHOUT_K]}, r"routers\[1\]\.top_k is missing"),
    "no word of weights": ({"capture": {}}, r"capture\.weights is missing"),
    "a process number": (of_capture(pid=10**30), r"capture\.pid is a number of over 30 digits"),
    "a table unknown": ({"tables": ["documents", "../elsewhere"]}, "tables is a list of 2"),
    "dropped below zero": ({"counts": {"tokens": 300, "dropped": -1}}, r"counts\.dropped is -1"),
    "model's id a number": ({"model": {"id": 3}}, r"model\.id is 3, not text"),
    "a later format": ({"format": 2}, "upgrade moe-inspect"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_impossible_manifest_is_refused_by_its_key(name: str, copied: Path) -> None:
    values, said = MANIFESTS[name]
    edit_manifest(copied, **values)
    _refused(copied, rf"trace\.json.*: {said}")


NONE = ["\xff", "", "null", '{"format": "1"}', '{"format": ' + "9" * 5000]


@pytest.mark.parametrize("text", [*NONE, DEEP, '{"format": 1, "model": ' + DEEP])
def test_a_manifest_that_is_none(text: str, copied: Path) -> None:
    (copied / schema.MANIFEST).write_bytes(text.encode("latin-1"))
    _refused(copied, r"trace\.json: ")


def test_a_manifest_nested_as_deeply_as_json_allows(copied: Path) -> None:
    text = json.dumps(json.loads((copied / schema.MANIFEST).read_text()) | {"model": "deep"})
    (copied / schema.MANIFEST).write_text(text.replace('"deep"', '{"a":' * 900 + "1" + "}" * 900))
    _refused(copied, r"trace\.json: it ")


BEYOND, FAR = "tokens/part-0-0/../../../etc/a.parquet", {"last_token": 99 + 2**39, "rows": 2**39}
OF_RANK_1 = {"first_token": 2**40, "last_token": 2**40 + 99}
LINES: dict[str, tuple[dict[str, Any], str]] = {
    "shard -1": ({"shard": -1}, "shard is -1"),
    "NaN rows": ({"rows": float("nan")}, "rows is NaN"),
    "10^12 tokens": (FAR, "it has tokens 0 to 549755813987: a shard holds at most"),
    "tokens of another rank": (OF_RANK_1, "first_token is 1099511627776"),
    "a table unknown": ({"table": "x"}, 'table is "x", not one of'),
    "a table that the trace lacks": (
        {"table": "logits"},
        'table is "logits", not one of documents',
    ),
    "too many decisions": ({"decisions": 301}, "decisions is 301: 0 to 300 are possible"),
    "no hash": ({"sha256": "0"}, r'sha256 is "0", not like '),
    "a path elsewhere": ({"path": "../../etc/passwd"}, r'path is "\.\./\.\./etc/passwd"'),
    "a path of rank 1": ({"path": "tokens/part-1-0.parquet"}, "path is .*, not tokens/part-0-"),
    "a path that goes on elsewhere": ({"path": BEYOND}, r'path is "tokens/part-0-0/'),
}


@pytest.mark.parametrize("name", LINES)
def test_an_impossible_line_is_refused_by_its_key(name: str, copied: Path) -> None:
    values, said = LINES[name]
    edit_line(copied, 1, **values)
    _refused(copied, rf"shards-0\.jsonl: line 2: {said}")


@pytest.mark.parametrize("line", [DEEP, "9" * 5000, "[]", "7", "", '"a"', "{}"])
def test_a_line_that_is_none(line: str, copied: Path) -> None:
    (copied / "shards-0.jsonl").write_text(line + "\n" + (copied / "shards-0.jsonl").read_text())
    _refused(copied, r"shards-0\.jsonl: line 1: ")


def test_a_list_of_too_high_a_rank_is_refused(copied: Path) -> None:
    (copied / f"shards-{2**20 - 1}.jsonl").touch()
    assert verify(copied).ok  # of the highest rank
    (copied / f"shards-{2**20}.jsonl").touch()
    _refused(copied, r"shards-1048576\.jsonl: there are at most 1,048,576 ranks")


def _refused(root: Path, said: str) -> None:
    for use in (open_trace, resume_point):
        with pytest.raises(MoeInspectError, match=said) as raised:
            use(root)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500
    found = verify(root)
    assert not found.ok
    assert re.search(said.rpartition(": ")[2], found.violation or "")


# --- what a file holds


def replace_part(
    root: Path, table: str, change: Callable[[pa.Table], pa.Table], **options: Any
) -> None:
    """A table of the first shard, changed, its line with it."""
    name = f"{table}/part-0-0.parquet"
    pq.write_table(change(pq.read_table(root / name)), root / name, **options)
    restate(root, name)


def put(name: str, value: pa.Array | pa.ChunkedArray) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, value)


INT = pa.int32()
FILES: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "a large id": ("tokens", put("token_id", pa.array([2**31 - 1] * 100, INT)), "is 2147483647"),
    "ids that are text": ("tokens", put("token_id", pa.array(["a"] * 100)), "of string, not int32"),
    "no ids": ("tokens", lambda t: t.drop_columns(["token_id"]), "it has no column token_id"),
    "a null id": ("tokens", put("token_id", pa.nulls(100, INT)), "token_id is null in 100 rows"),
    "fractions": ("routing", put("expert_0", pa.array([0.5] * 300)), "is of double, not uint8"),
    "expert 8 of 8": ("routing", put("expert_0", pa.array([8] * 300, pa.uint8())), "to expert 8"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_holds_is_checked(name: str, copied: Path) -> None:
    table, change, said = FILES[name]
    replace_part(copied, table, change)
    with pytest.raises(MoeInspectError, match=rf"{table}/part-0-0\.parquet: .*{said}") as raised:
        numbers(copied)
    assert "\n" not in str(raised.value)
    assert not verify(copied).ok


def test_an_importer_and_a_recorder_can_write_no_token_id_that_is_not_read(tmp_path: Path) -> None:
    batch = a_batch(np.random.default_rng(0), 0, 20, ROUTERS)
    with (
        pytest.raises(MoeInspectError, match="token id 2147483647 cannot be recorded"),
        TraceWriter(tmp_path, {}, ROUTERS) as writer,
    ):
        writer.write(replace(batch, token_id=np.full(20, 2**31 - 1, np.int32)))


@pytest.mark.parametrize(
    ("column", "value"), [("assignments", -1), ("first_choice", -1), ("expert", 8), ("router", 2)]
)
def test_counts_are_checked(column: str, value: int, tmp_path: Path) -> None:
    write_counts(tmp_path / "t", [np.arange(8)[None] + 10] * 2, 2)
    report(open_trace(tmp_path / "t")).tables["load"]
    values = [value, *range(15)] if column == "expert" else [value] * 16
    changed = pa.array(values, schema.counts_schema([]).field(column).type)
    replace_part(tmp_path / "t", "counts", put(column, changed))
    with pytest.raises(MoeInspectError, match=rf"counts/part-0-0\.parquet: {column} is {value}"):
        report(open_trace(tmp_path / "t")).tables["load"]


LARGE_FILES: dict[str, Callable[[], pa.Array]] = {  # what is said of the texts of a vocabulary
    "its 1,200 tokens are 1,258,291,200 bytes of text": lambda: pa.DictionaryArray.from_arrays(
        [0] * 1200, ["x" * 2**20]
    ),
    "8,388,608 rows": lambda: pa.nulls(2**23, pa.string()),
}


@pytest.mark.parametrize("said", LARGE_FILES)
def test_a_small_file_cannot_fill_the_memory(said: str, copied: Path) -> None:
    texts = LARGE_FILES[said]()
    made = pa.table({"token_id": np.zeros(len(texts), np.int32), "token": texts})
    path, how = copied / schema.VOCABULARY, {"compression": "zstd", "row_group_size": 2**23}
    pq.write_table(made, path, store_schema=False, **how)
    edit_manifest(copied, vocabulary=None)
    assert path.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MoeInspectError, match=rf"vocabulary\.parquet: .*{said}"):
        open_trace(copied).vocabulary()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30


def test_a_table_is_not_read_that_takes_more_than_its_rows(copied: Path, put: Put) -> None:
    put(parts, TEXT_BYTES=2**20)
    texts = pa.array(["x" * 2**14 + str(i) for i in range(150)]).dictionary_encode()
    columns = {"domain": texts, "source": texts, "tokens": pa.array([1] * 150, pa.int32())}
    columns = {"document": pa.array(range(150), pa.int32()), **columns}
    replace_part(copied, "documents", lambda _: pa.table(columns), compression="zstd")
    said = r"documents/part-0-0\.parquet: a row group of 150 rows decompresses to"
    with pytest.raises(MoeInspectError, match=said):
        open_trace(copied).documents()


OF_ARROW = [pa.ArrowInvalid("a\nb"), pa.ArrowNotImplementedError("a"), OSError(5, "Input/output")]


@pytest.mark.parametrize("error", [*OF_ARROW, OverflowError(), MemoryError()])
def test_what_arrow_raises_is_a_line_that_names_the_file(error: Exception) -> None:
    said = r"^damaged trace: routing/part-0-0\.parquet: \w+[^\n]*$"
    with pytest.raises(MoeInspectError, match=said), parts.reading("routing/part-0-0.parquet"):
        raise error

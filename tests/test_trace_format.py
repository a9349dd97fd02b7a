"""docs/trace-format.md is the specification: its example is a trace, its tables of columns and keys
are those of the code, and the JSON Schemas say what the reader checks."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import moe_inspect
from docs.generate import fill
from moe_inspect.trace import parts, schema
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.schema import Router
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT
from tests.support.damage import edit_lines, without_checksums

PAGE = fill((ROOT / "docs/trace-format.md").read_text(encoding="utf-8"))
SAMPLES = sorted(path.parent for path in (ROOT / "sample_traces").glob("*/trace.json"))
ROUTERS = [Router(0, "a", "a", 8, 2), Router(1, "b", "b", 8, 2)]


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
    assert found is not None, title
    return found[1]


def rows(title: str) -> Iterator[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


# --- the example


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's example writes."""
    folder = tmp_path_factory.mktemp("example")
    (code,) = re.findall(r"```python\n(.*?)```", section("A complete writer"), re.S)
    assert "moe_inspect" not in code
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        exec(compile(code, "trace-format.md", "exec"), {"__name__": "example"})
    return folder / "my-trace"


def test_the_example_verifies_and_is_reported_and_simulated(written: Path) -> None:
    found = verify(written)
    assert found.ok, found
    assert (found.tokens, found.decisions, found.assignments) == (500, 1000, 2000)
    assert found.status == "complete"
    assert any("3 files state no sha256" in line for line in found.checked)
    trace = moe_inspect.open_trace(written)
    assert trace.routers[0].first_choice_known
    tables = moe_inspect.report(trace).tables
    assert tables["balance"]["assignments"].tolist() == [1000, 1000]
    assert tables["load"]["first_choice"].sum() == 1000
    assert len(trace.simulate.routing().tables)
    assert len(trace.simulate.cache().tables)
    assert len(trace.simulate.decode().tables)


@pytest.mark.parametrize("writer", ["plain text", "polars", "duckdb"])
def test_files_of_programs_without_arrows_schema_are_read(writer: str, tmp_path: Path) -> None:
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    root = tmp_path / "t"
    without_checksums(SAMPLES[0], root, hashes=False)
    # logits need Arrow's schema
    manifest = json.loads((root / "trace.json").read_text())
    manifest["tables"].remove("logits")
    (root / "trace.json").write_text(json.dumps(manifest))
    shutil.rmtree(root / "logits")
    lines = (root / "shards-0.jsonl").read_text().splitlines(keepends=True)
    (root / "shards-0.jsonl").write_text("".join(x for x in lines if '"logits"' not in x))
    for path in root.glob("*/*.parquet"):
        if writer == "polars":
            text = polars.col(polars.Categorical).cast(polars.String)
            polars.read_parquet(path).with_columns(text).write_parquet(path)
        elif writer == "duckdb":
            duckdb.sql(f"copy (select * from '{path}') to '{path}.new' (format parquet)")
            Path(f"{path}.new").replace(path)
        else:
            table = pq.read_table(path)
            kinds = [pa.string() if pa.types.is_dictionary(t) else t for t in table.schema.types]
            plain = pa.schema([*zip(table.column_names, kinds, strict=True)])
            pq.write_table(table.cast(plain), path, store_schema=False)
    found = verify(root)
    assert found.ok, found
    here, there = (moe_inspect.open_trace(path) for path in (root, SAMPLES[0]))
    for table in ("balance", "domains"):
        pd.testing.assert_frame_equal(here.report().tables[table], there.report().tables[table])
    for table in ("routing", "tokens", "documents"):
        tables = (getattr(trace, table)() for trace in (here, there))
        pd.testing.assert_frame_equal(*tables, check_categorical=False)


# --- columns


def columns_of(table: str) -> pa.Schema:
    return {
        "tokens": schema.TOKENS,
        "documents": schema.DOCUMENTS,
        "routing": schema.routing_schema(ROUTERS, schema.SLOT_VALUES),
        "logits": schema.logits_schema(8),
        "counts": schema.counts_schema(schema.SUMS, by_document=True),
        "vocabulary": schema.VOCABULARY_SCHEMA,
    }[table]


def type_on_the_page(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return "label"
    if pa.types.is_fixed_size_list(kind):
        return "fixed_size_list<float16>"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))


@pytest.mark.parametrize("table", [*schema.TABLES, "vocabulary"])
def test_the_pages_columns_are_those_of_the_code(table: str) -> None:
    found = {}
    for column, kind, null, _ in rows(table):
        name = column.strip("`")
        for slot in range(2) if "…" in column else [None]:
            here = name if slot is None else re.sub(r"_0.*", f"_{slot}", name)
            found[here] = (kind, null == "yes")
    expected = {}
    for field in columns_of(table):
        expected[field.name] = type_on_the_page(field.type), field.name not in parts.NEVER_NULL
    assert found == expected


# --- keys


def keys_of(one: dict[str, Any], root: dict[str, Any], before: str = "") -> dict[str, bool]:
    """Path of each key of a JSON Schema → whether it is required."""
    found = {}
    for name, value in one["properties"].items():
        found[before + name] = name in one.get("required", [])
        if "properties" in value:
            found |= keys_of(value, root, f"{before}{name}.")
        if "items" in value:
            item = root["$defs"][value["items"]["$ref"].rpartition("/")[2]]
            found |= keys_of(item, root, f"{before}{name}[].")
    return found


@pytest.mark.parametrize(
    ("title", "name"),
    [("trace.json", "trace_json"), ("Lines of shards-&lt;rank&gt;.jsonl", "shard_line")],
)
def test_the_pages_keys_are_those_of_the_schema(title: str, name: str) -> None:
    found = {cells[0].strip("`"): cells[2] == "yes" for cells in rows(title)}
    read = schema.read_schema(name)
    assert found == keys_of(read, read)


def test_a_router_has_the_keys_of_the_schema() -> None:
    stated = schema.read_schema("trace_json")["$defs"]["router"]
    assert set(stated["properties"]) == set(Router.__dataclass_fields__)
    assert stated["properties"]["slot_order"]["enum"] == ["", "weight", "unknown"]


def unknown_keys(value: Any, one: dict[str, Any]) -> Iterator[str]:
    if "properties" in one and isinstance(value, dict):
        yield from value.keys() - one["properties"].keys()
        for name, inner in value.items():
            yield from unknown_keys(inner, one["properties"].get(name, {}))


def test_the_schemas_know_every_key_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("layer,expert,count,top_k\n0,0,3,1\n0,1,2,1\n")
    imported = moe_inspect.import_trace("counts", [tmp_path / "c.csv"], tmp_path / "imported")
    assert imported.counts_only
    for root in [*SAMPLES, tmp_path / "imported"]:
        assert not [*unknown_keys(read_manifest(root), schema.read_schema("trace_json"))]
        for line in edit_lines(root):
            assert not [*unknown_keys(line, schema.read_schema("shard_line"))]


# --- the check


def a_right_one(name: str) -> Any:
    """What follows the schema of this name."""
    return read_manifest(SAMPLES[0]) if name == "trace_json" else edit_lines(SAMPLES[0])[0]


ODD = [None, True, -1, 0, 3, 2**63, 2.0, 0.5, "", "x", "weight", [], [1], {}, {"a": 1}]


def mutated(value: Any, rng: np.random.Generator) -> Any:
    """A copy with one value, at any depth, removed or replaced, or one key too many."""
    made = copy.deepcopy(value)
    at = made
    while True:
        names = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not names:
            return made
        name = names[rng.integers(len(names))]
        if isinstance(at[name], (dict, list)) and at[name] and rng.random() < 0.7:
            at = at[name]
            continue
        if rng.random() < 0.2:
            del at[name]
        elif isinstance(at, dict) and rng.random() < 0.1:
            at["odd"] = 1
        else:
            at[name] = copy.deepcopy(ODD[rng.integers(len(ODD))])
        return made


@pytest.mark.parametrize("name", ["trace_json", "shard_line"])
def test_the_check_is_json_schemas(name: str) -> None:
    """The reference implementation and ours accept and refuse the same, but 2.0, an integer
    to JSON Schema."""
    jsonschema = pytest.importorskip("jsonschema")
    stated, right = schema.read_schema(name), a_right_one(name)
    jsonschema.Draft202012Validator.check_schema(stated)
    reference = jsonschema.Draft202012Validator(stated)
    assert reference.is_valid(right)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(2000):
        made = mutated(right, rng)
        if re.search(r"\b2\.0\b", json.dumps(made)):
            continue
        is_refused = False
        try:
            schema.check_schema(name, made)
        except ValueError as error:
            is_refused = len(str(error).splitlines()) == 1
        assert is_refused != reference.is_valid(made), made
        refused += is_refused
    assert 100 < refused < 1900


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("trace_json", ("routers", 0, "top_k"), True),
        ("trace_json", ("routers", 0, "top_k"), 2.0),
        ("trace_json", ("capture", "weights"), 1),
        ("trace_json", ("format",), True),
        ("trace_json", ("format",), 1.0),
        ("shard_line", ("rows",), False),
        ("shard_line", ("sha256",), "0" * 64 + "\n"),
    ],
)
def test_a_value_that_looks_like_another(name: str, path: tuple[Any, ...], value: Any) -> None:
    """Values that Python takes for another are refused."""
    right = a_right_one(name)
    schema.check_schema(name, right)
    at: Any = right
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(str(path[-1]))):
        schema.check_schema(name, right)


def test_a_keyword_that_is_not_known_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="multipleOf"):
        schema.check_value(1, {"multipleOf": 2}, {})


def rules_of(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema, and the schemas of its parts."""
    yield rule
    inner = [*rule.get("$defs", {}).values(), *rule.get("properties", {}).values()]
    for part in [*inner, *([rule["items"]] if "items" in rule else [])]:
        yield from rules_of(part)


@pytest.mark.parametrize("name", ["trace_json", "shard_line"])
def test_the_schemas_have_no_other_keyword(name: str) -> None:
    """Also in parts that few manifests have."""
    rules = list(rules_of(schema.read_schema(name)))
    assert len(rules) > 5
    assert {keyword for rule in rules for keyword in rule} <= schema.KEYWORDS | {"$ref"}
    assert all(rule.get("additionalProperties", True) in (True, False) for rule in rules)

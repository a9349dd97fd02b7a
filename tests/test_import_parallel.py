"""What several processes parse is what one reads, and so is the first error."""

from __future__ import annotations

import json
import operator
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import run
from moe_inspect.importers import values as lines
from moe_inspect.importers.context import ImportContext
from moe_inspect.importers.run import WORTH_BYTES, default_workers
from moe_inspect.importers.values import chunks_of
from moe_inspect.trace.reader import Trace
from moe_inspect.workers import Processes
from tests.conftest import Cli
from tests.support import foreign
from tests.support.foreign import FORMAT_OF, MAKERS
from tests.support.importing import taken

ROUTED = ["vllm-routed", "sglang-routed", "tensorrt-llm-routed"]
BY_LINES = [*ROUTED, "megatron", "megatron-pipeline", "experts4bit"]
PAIR = '"topk": 2, "top_indices": [[1, 2]]'


def with_its_place(where: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return where, fields


def alone_by_line(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A reference: each line parsed by itself."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path} line {number}"
        if line.strip():
            yield where, lines.parsed_object(line, where)


class Elsewhere:
    """Processes that share nothing with this one but what can be pickled."""

    def __init__(self, width: int = 2) -> None:
        self.tasks = 0

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None: ...

    def each(
        self,
        function: Callable[..., Any],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Any]:
        done = [pickle.dumps(function(*pickle.loads(pickle.dumps((*shared, *t))))) for t in tasks]
        self.tasks += len(done)
        return map(pickle.loads, done)


@pytest.fixture(autouse=True)
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size = getattr(request, "param", 150)
    monkeypatch.setattr(lines, "CHUNK_BYTES", size)
    return size


def files(root: Path) -> dict[str, bytes]:
    """All but the manifest, which names its process and time."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "trace.json"
    }


def stated(root: Path) -> dict[str, Any]:
    manifest = json.loads((root / "trace.json").read_text())
    return {name: manifest[name] for name in ("status", "routers", "counts", "corpus", "columns")}


@pytest.mark.parametrize("name", BY_LINES)
def test_the_trace_is_the_same_to_the_byte(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    made = MAKERS[name](tmp_path / "in")
    model = foreign.config_file(tmp_path) if made.config else None
    elsewhere, size = Elsewhere(), sum(p.stat().st_size for p in (tmp_path / "in").rglob("*.jsonl"))
    monkeypatch.setattr(run, "Processes", lambda width: elsewhere)

    def imported(out: str, workers: int) -> tuple[Trace, list[str]]:
        read = list[int]()
        how = {
            "model": model,
            "workers": workers,
            "progress": lambda done, total: read.append(done),
        }
        made_of = taken(tmp_path / out, FORMAT_OF[name], made.source, **how)
        assert read[-1] == size  # every byte once
        return made_of

    (one, alone), (many, among_many) = imported("one", 1), imported("many", 2)
    assert elsewhere.tasks
    assert files(one.path) == files(many.path)
    rows = "counts" if name == "experts4bit" else "routing"
    assert {"shards-0.jsonl", f"{rows}/part-0-0.parquet"} < set(files(one.path))
    assert stated(one.path) == stated(many.path)
    assert alone == among_many


def test_by_processes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    made, model = MAKERS["megatron"](tmp_path / "in"), foreign.config_file(tmp_path)
    one, _ = taken(tmp_path / "1", "megatron", made.source, model=model)
    two, _ = taken(tmp_path / "2", "megatron", made.source, model=model, workers=2)
    assert files(one.path) == files(two.path)


@pytest.mark.parametrize("chunk_bytes", [10_000], indirect=True)
@pytest.mark.parametrize(
    "where",
    [
        {3: "no json"},
        {4: '{"step": 1}', 2: '{"step": "x"}'},
        # what is wrong with a pass, before a line behind it that is wrong
        {2: f'{{"step": 0, "rank": 1, "layer": 2, "num_tokens": 99, {PAIR}}}', 4: "no json"},
    ],
)
def test_the_first_error_is_the_same(
    where: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Processes", Elsewhere)
    made, model = MAKERS["megatron"](tmp_path), foreign.config_file(tmp_path)
    path = made.source / "router_trace_rank1.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(where.get(n, row) for n, row in enumerate(rows, 1)))
    said = set[str]()
    for workers in (1, 2):
        with pytest.raises(MoeInspectError) as error:
            taken(tmp_path, "megatron", made.source, model=model, workers=workers)
        said.add(str(error.value))
        assert not (tmp_path / "t").exists()
    assert len(said) == 1, said
    assert "router_trace_rank1.jsonl" in said.pop()


def test_a_file_that_is_cut_meanwhile_is_one_line(tmp_path: Path) -> None:
    source = MAKERS["megatron"](tmp_path).source
    path = next(file for file in sorted(source.rglob("*.jsonl")))
    with pytest.raises(MoeInspectError, match=r"ends at byte .* it was changed meanwhile"):
        lines._prepared(with_its_place, path, 0, path.stat().st_size + 1, 1)


def test_a_process_that_is_killed_is_one_line() -> None:
    with Processes(1) as at, pytest.raises(MoeInspectError, match=r"was killed.*fewer --workers"):
        list(at.each(os._exit, (), [(1,)]))


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n \n\n"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 20, 10_000], indirect=True)
def test_lines_are_numbered_as_in_the_file(end: str, chunk_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": "' + "x" * 50 + '"}\n  \n{"a": 3}' + end)
    many, alone = (
        list(ImportContext([], workers=at).prepared(path, with_its_place))  # pyright: ignore[reportArgumentType]
        for at in (Elsewhere(), None)
    )
    assert many == alone == list(alone_by_line(path))
    assert sum(chunk.size for chunk in chunks_of(path)) == path.stat().st_size


@pytest.mark.parametrize("chunk_bytes", [10_000], indirect=True)
@pytest.mark.parametrize(
    "line",
    [
        '{"a": 1}, {"b": 2}',
        '{"a": 1} {"b": 2}',
        '{"a": [{}\n{}]}',
        '{"a": 1',
        "null",
        "[{}]",
        "",
        '\ufeff{"a": 1}',
        '{"a": NaN, "a": 2}',
    ],
)
def test_lines_that_are_parsed_together_are_read_as_each_alone(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')

    def outcome(rows: Iterator[Any]) -> list[Any]:
        found = list[Any]()
        try:
            found.extend(rows)
        except MoeInspectError as error:
            found.append(str(error))
        return found

    context = ImportContext([])
    found = outcome(context.prepared(path, with_its_place))
    assert found == outcome(alone_by_line(path))
    assert len(found) > 1


def test_no_more_is_read_ahead_than_keeps_all_at_work() -> None:
    asked = list[int]()

    def tasks() -> Iterator[tuple[int]]:
        for n in range(20):
            asked.append(n)
            yield (n,)

    with Processes(1) as at:
        found = at.each(operator.add, (5,), tasks())
        assert next(found) == 5
        assert len(asked) == 2
        assert list(found) == [*range(6, 25)]


def test_processes_are_started_where_there_is_much_to_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(WORTH_BYTES // 2)
    assert default_workers([tmp_path]) == 1
    assert default_workers([f"a={tmp_path}", tmp_path / "x"]) == len(os.sched_getaffinity(0))


def test_the_command(tmp_path: Path, cli_here: Cli) -> None:
    (tmp_path / "in").mkdir()
    made = MAKERS["megatron"](tmp_path / "in")
    call = ("import", "megatron", made.source, "--config", foreign.config_file(tmp_path))
    cli_here(*call, "-o", "one")
    cli_here(*call, "-o", "two", "--workers", 1)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert "workers" in cli_here(*call, "-o", "three", "--workers", 0, check=2).stderr

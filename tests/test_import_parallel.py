"""What several processes parse is what one reads: every file of the trace is the same, and so is
the first error."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_inspect import import_trace
from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import run
from moe_inspect.importers import values as lines
from moe_inspect.importers.context import ImportContext
from moe_inspect.importers.values import chunks_of
from moe_inspect.workers import Processes
from tests import foreign
from tests.conftest import Cli
from tests.foreign import FORMAT_OF, MAKERS

BY_LINES = [
    "vllm-routed",
    "sglang-routed",
    "tensorrt-llm-routed",
    "megatron",
    "megatron-pipeline",
    "experts4bit",
]

PAIR = '"topk": 2, "top_indices": [[1, 2]]'


def with_its_place(where: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return where, fields


class Elsewhere:
    """Workers of a process that shares nothing with this one but what can be pickled; they are
    ahead of whoever reads."""

    def __init__(self) -> None:
        self.tasks = 0

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
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 150)


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
def test_the_trace_is_the_same_to_the_byte(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    made = MAKERS[name](tmp_path / "in")
    model = foreign.config_file(tmp_path) if made.config else None
    said: dict[str, list[Any]] = {"one": [], "many": []}
    workers = Elsewhere()
    for out, at in (("one", 1), ("many", workers)):
        import_trace(
            FORMAT_OF[name],
            [made.source],
            tmp_path / out,
            model=model,
            warn=said[out].append,
            workers=at,  # pyright: ignore[reportArgumentType]
        )
    assert workers.tasks
    assert files(tmp_path / "one") == files(tmp_path / "many")
    rows = "counts" if name == "experts4bit" else "routing"
    assert {"shards-0.jsonl", f"{rows}/part-0-0.parquet"} < set(files(tmp_path / "one"))
    assert stated(tmp_path / "one") == stated(tmp_path / "many")
    assert said["one"] == said["many"]


def test_by_processes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    made = MAKERS["megatron"](tmp_path / "in")
    how: dict[str, Any] = {"model": foreign.config_file(tmp_path), "warn": print}
    read = list[int]()
    import_trace("megatron", [made.source], tmp_path / "one", **how)
    import_trace(
        "megatron",
        [made.source],
        tmp_path / "two",
        **how,
        workers=2,
        progress=lambda done, total: read.append(done),
    )
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert read[-1] == sum(f.stat().st_size for f in made.source.glob("*.jsonl"))


def broken(source: Path, where: dict[int, str]) -> None:
    """Other lines in the place of some of rank 1."""
    path = source / "router_trace_rank1.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(where.get(n, row) for n, row in enumerate(rows, 1)))


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
    monkeypatch.setattr(lines, "CHUNK_BYTES", 10_000)
    made = MAKERS["megatron"](tmp_path)
    broken(made.source, where)
    said = set[str]()
    for workers in (1, Elsewhere()):
        with pytest.raises(MoeInspectError) as error:
            import_trace(
                "megatron",
                [made.source],
                tmp_path / "t",
                model=foreign.config_file(tmp_path),
                workers=workers,  # pyright: ignore[reportArgumentType]
            )
        said.add(str(error.value))
        assert not (tmp_path / "t").exists()
    assert len(said) == 1, said
    assert "router_trace_rank1.jsonl" in said.pop()


def test_workers_elsewhere_read_the_file_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MAKERS["megatron"](tmp_path).source
    inside = next(file for file in sorted(source.rglob("*.jsonl")))
    monkeypatch.chdir(inside.parent)

    class InAnotherDirectory(Elsewhere):
        def each(self, function: Any, shared: Any, tasks: Any) -> Iterator[Any]:
            given = list(tasks)
            os.chdir("/")
            return super().each(function, shared, given)

    relative = Path(inside.name)
    values = list(
        lines.prepared_lines(relative, with_its_place, InAnotherDirectory(), lambda size: None)
    )
    assert [where for where, _ in values] == [
        f"{inside.name} line {n}" for n in range(1, len(values) + 1)
    ]
    assert len(values) == len(inside.read_text().splitlines())
    size = inside.stat().st_size
    with pytest.raises(MoeInspectError, match=r"ends at byte .* a worker sees another file"):
        lines._prepared(with_its_place, relative, inside, 0, size + 1, 1)


def test_a_process_that_is_killed_is_one_line() -> None:
    with Processes(1) as at, pytest.raises(MoeInspectError, match=r"was killed.*fewer --workers"):
        list(at.each(os._exit, (), [(1,)]))


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n \n\n"])
@pytest.mark.parametrize("size", [1, 7, 20, 10_000])
def test_lines_are_numbered_as_in_the_file(
    end: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", size)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": "' + "x" * 50 + '"}\n  \n{"a": 3}' + end)
    alone = ImportContext([])
    many = ImportContext([], workers=Elsewhere())

    def pair(where: str, fields: dict[str, Any]) -> tuple[str, Any]:
        return where, fields["a"]

    monkeypatch.setattr(pickle, "dumps", lambda value: value)
    monkeypatch.setattr(pickle, "loads", lambda value: value)
    assert list(many.prepared(path, pair)) == list(alone.prepared(path, pair))
    assert sum(chunk.size for chunk in chunks_of(path)) == path.stat().st_size
    monkeypatch.setattr("moe_inspect.files.PIECE_BYTES", 10)
    monkeypatch.setattr("moe_inspect.files.MOST_LINE_BYTES", 30)
    if size < 58:
        with pytest.raises(MoeInspectError, match=r"rows.jsonl line 4 is over .* bytes long"):
            list(chunks_of(path))


def test_no_more_is_read_ahead_than_keeps_all_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    class Pool:
        def __init__(self, *_: object) -> None: ...

        def submit(self, function: Any, *task: Any) -> Any:
            from concurrent.futures import Future

            done = Future[Any]()
            done.set_result(function(*task))
            return done

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr("moe_inspect.workers.ProcessPoolExecutor", Pool)

    def tasks() -> Iterator[tuple[int]]:
        for n in range(20):
            asked.append(n)
            yield (n,)

    with Processes(3) as processes:
        found = processes.each(lambda a, n: a + n, (5,), tasks())
        assert next(found) == 5
        assert len(asked) == 4
        assert list(found) == [*range(6, 25)]


def test_processes_are_started_where_there_is_much_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    monkeypatch.setattr(run, "WORTH_BYTES", 200)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    assert run.default_workers([tmp_path]) == 1
    assert run.default_workers([f"a={tmp_path}", tmp_path / "x"]) == 3


def test_the_command(tmp_path: Path, cli_here: Cli) -> None:
    (tmp_path / "in").mkdir()
    made = MAKERS["megatron"](tmp_path / "in")
    call = ("import", "megatron", made.source, "--config", foreign.config_file(tmp_path))
    cli_here(*call, "-o", "one")
    cli_here(*call, "-o", "two", "--workers", 1)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert "workers" in cli_here(*call, "-o", "three", "--workers", 0, check=2).stderr
    both = ("--workers", 2, "--scheduler", "tcp://127.0.0.1:1")
    assert (
        "--workers and --scheduler exclude each other"
        in cli_here(*call, "-o", "three", *both, check=2).stderr
    )

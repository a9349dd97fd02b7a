"""Whatever is written is a draft that is renamed: a fault leaves the old file or the new one.
`python -m benchmarks.faults outputs` does this with every command, at each call in turn."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect import merge, open_trace
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.files.atomic import draft_folder_of, draft_of
from moe_inspect.trace.files.lock import LOCK, OLD, hold, is_locked
from moe_inspect.trace.output_dir import output_file
from moe_inspect.trace.verify import verify
from tests.support.synthetic import uniform_ids, write_trace
from tests.test_layout import modules

# --- nothing is written in place

# the argument that is written to: of functions, and (None) of methods of a path
WRITES: dict[str, int | None] = {
    **dict.fromkeys(("os.rename", "os.replace", "savefig", "np.save", "ParquetWriter"), 0),
    **dict.fromkeys(("to_csv", "to_parquet", "to_json"), 0),
    **dict.fromkeys(("torch.save", "save_file", "write_csv", "write_table"), 1),
    **dict.fromkeys(("write_text", "write_bytes"), None),
}
LAST = {"open", *(name.rpartition(".")[2] for name in WRITES)}
OPEN = ("draft", "file", "buffer", "sink", "text", "sys.stdout", "pa.PythonFile(sink")
# what writes where it stands: (module, function) → why
IN_PLACE = {
    ("trace.files.atomic", "append"): "the line is the commit",
    ("trace.files.atomic", "put_folder"): "puts back what cannot stay",
    ("trace.files.lock", "settle"): "puts back what was set aside",
    ("trace.output_dir", "clear_trace"): "removes a manifest",
    ("trace.output_dir", "_put"): "sets the old trace aside",
    ("importers.tables.read", "uncompressed"): "a temporary copy",
    ("cli.trace", "__exit__"): "stderr",
    ("text", "abandon"): "the null device",
}


def written_in_place(node: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """Innermost function and source of each call that writes to no draft and no open file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            written = _written(child)
            if written is not None and not written.startswith(OPEN):
                yield function, ast.unparse(child)
        inner = child.name if isinstance(child, ast.FunctionDef) else function
        yield from written_in_place(child, inner)


def _written(call: ast.Call) -> str | None:
    """What a call writes to, as source."""
    function = call.func
    last = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if last not in LAST:
        return None
    name, given = ast.unparse(function), [ast.unparse(a) for a in call.args]
    of = name.rpartition(".")[0]
    if last == "open" and name != "os.open":
        modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
        modes += [k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)]
        if any(isinstance(m, str) and len(m) < 4 and set(m) & set("wax+") for m in modes):
            return given[0] if name in ("open", "io.open") else of
    at = WRITES.get(name, WRITES.get(last, -1))
    if at is None:  # results have a method write_text(file) too
        return None if given[:1] in (["file"], ["sys.stdout"]) else of
    return given[at] if 0 <= at < len(given) else None


def test_nothing_is_written_in_place() -> None:
    found = {
        (name, function): line
        for name, path in modules().items()
        for function, line in written_in_place(ast.parse(path.read_text()))
    }
    assert {k: v for k, v in found.items() if k not in IN_PLACE} == {}
    assert set(IN_PLACE) <= set(found)  # control: what is excepted is found


def test_every_output_is_tried_and_a_fault_without_drafts_is_found(tmp_path: Path) -> None:
    """By `python -m benchmarks.faults`, of which this is one of many."""
    from benchmarks.faults.bench import Bench
    from benchmarks.faults.outputs import not_tried, outputs, without_drafts

    assert not_tried() == []
    bench, line = Bench(tmp_path), "export T --format counts -o out.csv"
    outputs(bench, [line], ("EIO",))
    assert (bench.failures, bench.tries[f"{line}: EIO"]) == ([], 4)  # open, write, fsync, replace
    with without_drafts():
        outputs(bench, [line], ("EIO",))
    assert len(bench.failures) == 1  # the write


# --- one file


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def write(path: Path, text: str) -> None:
    with output_file(path) as draft:
        draft.write_text(text)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_fault_leaves_the_old_file_and_nothing_beside(
    at: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "old")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(*((Path, "write_text") if at == "write" else (os, at)), fails)
    with pytest.raises((MoeInspectError, KeyboardInterrupt)):
        write(tmp_path / "a", "new")
    monkeypatch.undo()
    assert ((tmp_path / "a").read_text(), names(tmp_path)) == ("old", {"a"})
    write(tmp_path / "a", "new")
    assert ((tmp_path / "a").read_text(), names(tmp_path)) == ("new", {"a"})


def test_what_killed_processes_left_is_removed_and_no_draft_of_another(tmp_path: Path) -> None:
    for name in (".a.1-ab.tmp", ".b.1-ab.tmp", ".a.tmp"):
        (tmp_path / name).write_text("half")
    with draft_of(tmp_path / "a") as first:
        first.write_text("one")
        with draft_of(tmp_path / "a") as second:
            second.write_text("two")
        assert first.read_text() == "one"
        assert names(tmp_path) == {"a", first.name, ".b.1-ab.tmp", ".a.tmp"}
        assert str(os.getpid()) in first.name
    assert (tmp_path / "a").read_text() == "one"
    assert names(tmp_path) == {"a", ".b.1-ab.tmp", ".a.tmp"}
    long = tmp_path / ("é" * 120 + ".csv")  # 244 bytes, of 255
    write(long, "x")
    assert long.read_text() == "x"


def test_modes_stay_and_new_files_have_the_usual_one(tmp_path: Path) -> None:
    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    before = os.umask(0o027)
    try:
        write(tmp_path / "new", "x")
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(0o604)
        write(tmp_path / "old", "x")
    finally:
        os.umask(before)
    assert (mode("new"), mode("old")) == (0o640, 0o604)
    (tmp_path / "old").chmod(0o400)
    refused = pytest.raises(MoeInspectError, match=r"cannot write .*: Permission denied")
    with refused if os.geteuid() else contextlib.nullcontext():
        write(tmp_path / "old", "y")


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("there/c")
    for text in ("made", "replaced"):
        write(tmp_path / "a", text)
        assert (tmp_path / "there" / "c").read_text() == text
    assert os.readlink(tmp_path / "a") == "b"
    assert (names(tmp_path), names(tmp_path / "there")) == ({"a", "b", "there"}, {"c"})
    (tmp_path / "x").symlink_to("x")
    with pytest.raises(MoeInspectError, match=r"cannot write .*/x: Too many levels"):
        write(tmp_path / "x", "")


def test_what_is_open_already_is_not_replaced(tmp_path: Path) -> None:
    """`-o /dev/stdout >> FILE`, and what comes after it."""
    with open(tmp_path / "a", "wb") as file, draft_of(Path(f"/proc/self/fd/{file.fileno()}")) as at:
        assert at == Path(f"/proc/self/fd/{file.fileno()}")
    assert names(tmp_path) == {"a"}


def test_nothing_is_written_into_a_trace_from_python_either(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", [uniform_ids(np.random.default_rng(0), 20, 8, 2)], 8)
    (tmp_path / "t" / "routing").mkdir(exist_ok=True)
    for name in ("trace.json", "routing/x.html"):
        with pytest.raises(MoeInspectError, match=rf"t/{name} is within the trace .*/t: choose"):
            write(tmp_path / "t" / name, "x")
    (tmp_path / "t" / "trace.json").write_text("damaged")
    with pytest.raises(MoeInspectError, match="is a trace: choose another place"):
        write(tmp_path / "t", "x")
    # profilers write a file of this name too
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    write(tmp_path / "x.html", "x")


# --- a folder, and a trace in the place of another


def test_a_folder_is_there_whole_or_not(tmp_path: Path) -> None:
    (tmp_path / ".f.1-ab.tmp").mkdir()
    with pytest.raises(FileNotFoundError), draft_folder_of(tmp_path / "f") as (draft, _):
        (draft / "half").rename(draft / "nothing")
    assert names(tmp_path) == set()
    with draft_folder_of(tmp_path / "f") as (draft, _):
        (draft / "a").write_text("whole")
    assert (names(tmp_path), names(tmp_path / "f")) == ({"f"}, {"a"})
    said = r"cannot write .*/f: Directory not empty; .* is whole at (.*/\.f\.\S+\.tmp): move it"
    with pytest.raises(MoeInspectError, match=said), draft_folder_of(tmp_path / "f") as (draft, _):
        (draft / "b").write_text("whole")
    assert names(draft) == {"b"}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for name in (".b.1-ab.tmp", ".b.2-ab.tmp", ".c.1-ab.tmp"):
        # as the operating system does where its process is killed
        hold(tmp_path / name).close_in_child()
    running = hold(tmp_path / ".b.2-ab.tmp")
    (tmp_path / ".b.3-ab.tmp").mkdir()
    with draft_folder_of(tmp_path / "b") as (draft, _):
        assert is_locked(draft)
    running.release()
    assert names(tmp_path) == {"b", ".b.2-ab.tmp", ".c.1-ab.tmp"}
    assert not (tmp_path / "b" / LOCK).exists()


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two traces to merge, and in the place of the merged one another, of 60 tokens."""
    rng = np.random.default_rng(0)
    how: dict[str, Any] = {"document": np.repeat(np.arange(6), 10), "batch_tokens": 10}
    for name in ("a", "b", "out"):
        ids = [uniform_ids(rng, 60, 8, 2) for _ in range(2)]
        write_trace(tmp_path / name, ids, 8, words=3, **how)
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("at", [1, 2])
def test_a_trace_that_cannot_be_put_in_place_is_kept_and_the_old_one_stays(
    at: int, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.rename, list[Any]()

    def failing(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing)
        said = r"cannot write .*/out: Input/output error; .* is whole at (\S+): move it"
        with pytest.raises(MoeInspectError, match=said) as raised:
            merge(two, tmp_path / "out", overwrite=True)
    kept = Path(str(raised.value).rpartition(" at ")[2].removesuffix(": move it"))
    for path, tokens in ((tmp_path / "out", 60), (kept, 120)):
        assert (open_trace(path).n_tokens, verify(path).ok) == (tokens, True)
    assert names(tmp_path) == {"a", "b", "out", kept.name}
    merge(two, tmp_path / "out", overwrite=True)
    assert open_trace(tmp_path / "out").n_tokens == 120
    assert names(tmp_path) == {"a", "b", "out"}


@pytest.mark.parametrize("reader", ["open", "verify", "merge"])
def test_killed_between_the_renames(reader: str, two: list[Path], tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        rename = os.rename

        def killed(*paths: Any) -> None:
            rename(*paths)
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = killed
        merge(two, tmp_path / "out", overwrite=True)
        os._exit(0)
    os.waitpid(child, 0)
    assert not (tmp_path / "out").exists()
    if reader == "open":
        assert open_trace(tmp_path / "out").n_tokens == 60
    elif reader == "verify":
        assert verify(tmp_path / "out").ok
    with pytest.raises(MoeInspectError, match=f"there is a trace at {tmp_path / 'out'}"):
        merge(two, tmp_path / "out")
    merge(two, tmp_path / "out", overwrite=True)
    assert open_trace(tmp_path / "out").n_tokens == 120
    assert names(tmp_path) == {"a", "b", "out"}


def test_a_reader_waits_for_the_trace_that_is_put_in_place(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, aside = tmp_path / "out", tmp_path / f".out.1-ab{OLD}"
    with hold(out) as lock:
        os.rename(out, aside)
        monkeypatch.setattr("time.sleep", lambda _: os.rename(two[0], out))
        assert open_trace(out).n_tokens == 60
        assert aside.exists()
        lock.root = aside

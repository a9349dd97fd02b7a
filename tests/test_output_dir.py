"""Two writers are kept apart; only the files of a trace are ever removed; a stopped writer leaves
what can be gone on with."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect import check
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import open_trace
from moe_inspect.trace.files import lock as lock_module
from moe_inspect.trace.files.lock import LOCK, Lock, hold, join, refuse_while_locked
from moe_inspect.trace.output_dir import OVERWRITTEN, check_directory, claim_directory, clear_trace
from moe_inspect.trace.schema import MANIFEST
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter, resume_point
from tests.support.damage import edit_manifest, files_in
from tests.support.synthetic import a_pass, routers, uniform_ids


def a_batch() -> RoutedBatch:
    ids = [uniform_ids(np.random.default_rng(r), 20, 8, 2).astype(np.uint8) for r in range(2)]
    return a_pass(0, ids, domains=["x"], documents=[Document(0, "x", "made", 20)])


def a_writer(root: Path, **options: Any) -> TraceWriter:
    return TraceWriter(root, {}, routers(2, 8, 2), weights=False, **options)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another holds is not waited for."""
    monkeypatch.setattr(lock_module, "PATIENCE_S", 0.0)


def elsewhere(root: Path) -> str:
    """What another process says that would lock it too."""
    program = "import pathlib, sys; from moe_inspect.trace.files.lock import hold"
    program += "; hold(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(root)]
    return subprocess.run(command, capture_output=True, text=True).stderr


# --- locks


@pytest.mark.usefixtures("impatient")
def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "t"
    with hold(root):
        for refused in (hold, refuse_while_locked):
            said = r"this process is still writing .*: wait for it, or stop it"
            with pytest.raises(MoeInspectError, match=said):
                refused(root)
        for holder, who in (("7 elsewhere 0a", "process 7 on elsewhere"), ("", "another process")):
            (root / LOCK).write_text(holder)  # of another machine, or cut short
            with pytest.raises(MoeInspectError, match=f"^{who} is still writing .*t: wait for it"):
                refuse_while_locked(root)
        (root / LOCK).write_text(f"{os.getpid()} {socket.gethostname()} 0a")
        # opened and closed by something else in this process: the lock stays
        (root / LOCK).read_bytes()
        assert f"MoeInspectError: process {os.getpid()} is still writing" in elsewhere(root)
    assert not (root / LOCK).exists()
    assert "Error" not in elsewhere(root)
    (root / LOCK).touch()  # of a process that was killed
    refuse_while_locked(root)
    hold(root).release()


def test_a_lock_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    for use in (hold, a_writer):
        with pytest.raises(MoeInspectError, match=r"/\.lock is not a regular file: remove it"):
            use(tmp_path)
    (tmp_path / LOCK).unlink()
    hold(tmp_path).release()


@pytest.mark.usefixtures("impatient")
def test_ranks_share_a_lock_and_any_of_them_keeps_another_job_out(tmp_path: Path) -> None:
    first = hold(tmp_path, shared=True)
    others = [join(tmp_path, first.holder) for _ in range(2)]
    with pytest.raises(MoeInspectError, match="another process has begun to write"):
        join(tmp_path, "a holder that is gone")
    for left in (first, *others):  # whoever is the last
        for shared in (False, True):
            with pytest.raises(MoeInspectError, match="is still writing"):
                hold(tmp_path, shared=shared)
        left.release()
    assert list(tmp_path.iterdir()) == []
    hold(tmp_path).release()


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        lock.release()
        hold(tmp_path).release()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.usefixtures("impatient")
def test_a_lock_removed_while_it_was_waited_for_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, its holder removes it and a third process locks a
    new one."""
    holder, third = hold(tmp_path), list[Lock]()
    flock = lock_module.flock

    def raced(file: int, exclusive: bool) -> bool | None:
        if not third:
            third.append(holder)  # only the first call
            holder.release()
            third[0] = hold(tmp_path)
        return flock(file, exclusive)

    monkeypatch.setattr(lock_module, "flock", raced)
    with pytest.raises(MoeInspectError, match="is still writing"):
        hold(tmp_path)
    third[0].release()
    hold(tmp_path).release()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with a_writer(root := tmp_path / "t") as writer:
        writer.write(a_batch())
    said = f"warning: the file system of {root} has no locks: make sure that nothing else writes"
    assert capsys.readouterr().err == f"{said} there\n"
    assert verify(root).ok


@pytest.mark.usefixtures("impatient")
def test_a_writer_locks_its_trace(tmp_path: Path) -> None:
    root, other = tmp_path / "t", tmp_path / "u"
    said = "there is a trace|this process is still writing"
    with a_writer(root) as writer:
        writer.write(a_batch())
        for overwrite in (False, True):
            with pytest.raises(MoeInspectError, match=said):
                claim_directory(root, overwrite)
        with pytest.raises(MoeInspectError, match="this process is still writing"):
            a_writer(root)
    assert open_trace(root).n_tokens == 20
    assert not (root / LOCK).exists()
    (other / MANIFEST).mkdir(parents=True)
    # what goes wrong at its beginning unlocks too
    with pytest.raises(MoeInspectError, match="Is a directory"):
        a_writer(other)
    hold(other).release()


# --- overwriting


def profiled(root: Path, *names: str) -> None:
    """What a profiler writes."""
    shutil.rmtree(root)
    for name in (MANIFEST, *names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"schemaVersion": 1, "traceEvents": []}')


def beside(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_text("mine")


def linked(root: Path) -> None:
    shutil.move(root / "tokens", root.parent)
    (root / "tokens").symlink_to(root.parent / "tokens")


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a profiler's": (lambda root: profiled(root, "documents/thesis.tex", "logits/run1.npy"), r"is not a trace \(it holds documents/thesis.tex, logits/run1.npy, trace.json\): not overwritten"),
    "a profiler's alone": (profiled, r"is not a trace \(it holds trace.json\)"),
    "a file beside": (lambda root: beside(root, "notes.txt"), r"is more than a trace \(it holds notes.txt\)"),
    "files in tables": (lambda root: beside(root, "tokens/a.csv", "routing/part-0-0.csv", "documents/b", "e"), r"documents/b, e, routing/part-0-0.csv, 1 more\)"),
    "a table elsewhere": (linked, r"is more than a trace \(it holds tokens\)"),
    "a profiler's over ours": (lambda root: (root / MANIFEST).write_text('{"traceEvents": []}'), r"is not a trace \(it holds trace.json\)"),
    "parts without lists": (lambda root: [(root / name).unlink() for name in (MANIFEST, "shards-0.jsonl")], "is not a trace"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_trace_is_not_overwritten_and_named(name: str, copied: Path) -> None:
    make, said = STRANGE[name]
    make(copied)
    before = files_in(copied.parent)
    for replace in (check_directory, claim_directory, lambda root, _: clear_trace(root)):
        with pytest.raises(MoeInspectError, match=said) as caught:
            replace(copied, True)
        assert "\n" not in str(caught.value)
    assert files_in(copied.parent) == before


DAMAGE: dict[str, Callable[[Path], object]] = {
    "none": str,
    "torn": lambda root: os.truncate(root / MANIFEST, 300),
    "of another format": lambda root: edit_manifest(root, format=2),
    "without manifest": lambda root: (root / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_trace_is_overwritten_also_a_damaged_one(damage: str, copied: Path) -> None:
    (copied / "routing" / ".part-0-7.parquet.1-ab.tmp").touch()
    DAMAGE[damage](copied)
    with pytest.raises(MoeInspectError, match=r"there is a trace at .*--overwrite"):
        check_directory(copied, False)
    with claim_directory(copied, True) as lock:
        assert [p.name for p in copied.iterdir()] == [LOCK]
        with a_writer(copied, lock=lock) as writer:
            writer.write(a_batch())
    assert verify(copied).ok


def test_the_manifest_goes_first_and_whoever_comes_next_goes_on(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, unlink, unlinked = copied, os.unlink, list[str]()

    def stopped(path: Path, *args: object, **options: object) -> None:
        assert not (root / MANIFEST).exists()
        if Path(path).suffix != ".lock" and len(unlinked) == 2:
            raise KeyboardInterrupt
        unlinked.append(Path(path).name)
        unlink(path, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(os, "unlink", stopped)
        claim_directory(root, True)
    assert unlinked[0] == "shards-0.jsonl"
    assert (root / OVERWRITTEN).exists()
    said = r"no trace at .* its writer was stopped before anything was committed"
    with pytest.raises(MoeInspectError, match=said):
        verify(root)
    for overwrite in (False, True):  # --resume starts anew where there is no manifest
        shutil.copytree(root, again := tmp_path / str(overwrite))
        with claim_directory(again, overwrite):
            assert [p.name for p in again.iterdir()] == [LOCK]


DRAFT = f".{MANIFEST}.1-ab.tmp"
PART = "tokens/.part-0-0.parquet.1-ab.tmp"


@pytest.mark.parametrize("left", [(), (LOCK,), (DRAFT,), (LOCK, DRAFT, "shards-0.jsonl"), (PART,)])
def test_killed_before_the_first_manifest(left: tuple[str, ...], tmp_path: Path) -> None:
    for overwrite in (False, True):
        root = tmp_path / str(overwrite)
        (root / "tokens").mkdir(parents=True)
        for name in left:
            (root / name).touch()
        check_directory(root, overwrite)
        with claim_directory(root, overwrite) as lock, a_writer(root, lock=lock) as writer:
            writer.write(a_batch())
        assert verify(root).ok
        assert not [*root.rglob(".*")]


# --- links


@pytest.mark.parametrize(
    "name", ["routing/part-0-0.parquet", "routing", "shards-0.jsonl", "trace.json"]
)
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_links_outside_and_pipes_are_refused(name: str, kind: str, copied: Path) -> None:
    moved = copied.with_name(Path(name).name)
    shutil.move(copied / name, moved)
    (copied / name).symlink_to(moved) if kind == "link" else os.mkfifo(copied / name)
    said = "outside of" if kind == "link" else "not a regular file|no trace at|is missing|routing"
    for before in (str, resume_point):
        with pytest.raises(MoeInspectError, match=said):  # noqa: PT012
            before(copied)
            open_trace(copied).routing(router=0)
    assert moved.exists()
    if name != "trace.json":
        assert not verify(copied).ok


def test_a_link_within_the_trace_is_followed(copied: Path) -> None:
    shutil.move(copied / "routing/part-0-0.parquet", copied / "moved")
    (copied / "routing/part-0-0.parquet").symlink_to(copied / "moved")
    copied.with_name("u").symlink_to(copied)
    assert len(open_trace(copied.with_name("u")).routing(router=0)) == 300


# --- interrupted, not damaged


def test_verify_tells_interrupted_from_damaged(copied: Path) -> None:
    root = copied
    (root / "routing/part-0-9.parquet").touch()
    (root / "routing/.part-0-8.parquet.1-ab.tmp").touch()
    assert "an orphan" in (verify(root).violation or "")  # of a complete trace
    edit_manifest(root, status="recording", corpus={"plan": {}})
    found = verify(root)
    assert (found.ok, found.status, found.resumable) == (True, "interrupted", True)
    assert found.tokens == 300
    assert found.uncommitted == ["routing/.part-0-8.parquet.1-ab.tmp", "routing/part-0-9.parquet"]
    (note,) = check(root, quick=True).findings
    assert (note.kind, note.severity) == ("unfinished", "note")
    assert "was interrupted and can be resumed; what is committed is fine." in note.text
    assert "Its writer was stopped in 2 files" in note.text
    with hold(root):  # by a process of another machine, say
        assert verify(root).status == "recording"
    (root / "routing/notes.txt").touch()
    assert "an orphan" in (verify(root).violation or "")
    (root / "routing/notes.txt").unlink()
    (root / "routing/part-0-0.parquet").write_bytes(b"PAR1")
    assert not verify(root).ok
    edit_manifest(root, corpus={})
    assert not verify(root).resumable  # without a plan


def test_a_probe_does_not_touch_the_draft_of_another(tmp_path: Path) -> None:
    (tmp_path / f".{MANIFEST}.1-ab.tmp").write_text("half")
    check_directory(tmp_path, False)
    assert (tmp_path / f".{MANIFEST}.1-ab.tmp").read_text() == "half"


# --- several processes


def test_two_processes_at_once_end_in_one_whole_trace(tmp_path: Path) -> None:
    """That resume, that begin, that overwrite; a few tries of `python -m benchmarks.faults`."""
    from benchmarks.faults.bench import Bench
    from benchmarks.faults.traces import writing_at_once

    bench = Bench(tmp_path)
    writing_at_once(bench, tries=2)
    assert sum(bench.tries.values()) == 6
    assert bench.failures == []

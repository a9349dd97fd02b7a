"""Two writers are kept apart; only the files of a trace are ever removed; a stopped writer leaves
what can be gone on with."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.files import lock as lock_module
from moe_inspect.trace.files.lock import LOCK, Lock, hold, join, refuse_while_locked
from moe_inspect.trace.output_dir import OVERWRITTEN, check_directory, claim_directory, clear_trace
from moe_inspect.trace.reader import open_trace
from moe_inspect.trace.schema import MANIFEST
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter, resume_point
from tests.support.damage import edit_lines, edit_manifest
from tests.support.synthetic import a_pass, routers, uniform_ids, write_trace


def a_trace(root: Path) -> Path:
    """80 tokens in 2 shards."""
    ids = [uniform_ids(np.random.default_rng(r), 80, 8, 2) for r in range(2)]
    write_trace(
        root, ids, 8, document=np.repeat(np.arange(4), 20), batch_tokens=20, shard_tokens=40
    )
    return root


def a_batch() -> RoutedBatch:
    ids = [uniform_ids(np.random.default_rng(r), 20, 8, 2).astype(np.uint8) for r in range(2)]
    return a_pass(0, ids, domains=["x"], documents=[Document(0, "x", "made", 20)])


def a_writer(root: Path, **options: Any) -> TraceWriter:
    return TraceWriter(root, {}, routers(2, 8, 2), weights=False, **options)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another holds is not waited for."""
    monkeypatch.setattr(lock_module, "PATIENCE_S", 0.0)


def listing(root: Path) -> list[str]:
    return sorted(
        str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() or p.is_symlink()
    )


def elsewhere(program: str) -> subprocess.CompletedProcess[str]:
    """Another process."""
    start = "from pathlib import Path; from moe_inspect.trace.files.lock import hold\n"
    return subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True)


# --- locks


@pytest.mark.usefixtures("impatient")
def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "t"
    with hold(root):
        for refused in (hold, refuse_while_locked):
            said = r"this process is still writing .*: wait for it, or stop it"
            with pytest.raises(MoeInspectError, match=said):
                refused(root)
        # opened and closed by something else in this process: the lock stays
        (root / LOCK).read_bytes()
        done = elsewhere(f"hold(Path({str(root)!r}))")
        assert f"MoeInspectError: process {os.getpid()} is still writing" in done.stderr
    assert not (root / LOCK).exists()
    assert "Error" not in elsewhere(f"hold(Path({str(root)!r}))").stderr
    (root / LOCK).touch()  # of a process that was killed
    refuse_while_locked(root)
    hold(root).release()


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
    a_trace(root := tmp_path / "t")
    said = f"warning: the file system of {root} has no locks: make sure that nothing else writes"
    assert capsys.readouterr().err == f"{said} there\n"
    assert verify(root).ok


@pytest.mark.usefixtures("impatient")
def test_a_writer_locks_its_trace(tmp_path: Path) -> None:
    root, other = tmp_path / "t", tmp_path / "u"
    said = "there is a trace|this process is still writing"
    with a_writer(root) as writer:
        writer.write(a_batch())
        for another in (lambda: claim_directory(root, False), lambda: claim_directory(root, True)):
            with pytest.raises(MoeInspectError, match=said):
                another()
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


def profiler(root: Path) -> None:
    (root / MANIFEST).write_text('{"schemaVersion": 1, "traceEvents": []}')
    for name in ("documents/thesis.tex", "logits/run1.npy"):
        (root / name).parent.mkdir()
        (root / name).write_text("years")


def beside(*names: str) -> Callable[[Path], None]:
    def put(root: Path) -> None:
        a_trace(root)
        for name in names:
            (root / name).write_text("mine")

    return put


def linked(root: Path) -> None:
    a_trace(root)
    (root.parent / "other").mkdir()
    shutil.move(root / "tokens", root.parent / "other")
    (root / "tokens").symlink_to(root.parent / "other" / "tokens")


def profiled_over(root: Path) -> None:
    a_trace(root)
    (root / MANIFEST).write_text('{"traceEvents": []}')


def bare_parts(root: Path) -> None:
    a_trace(root)
    (root / MANIFEST).unlink()
    (root / "shards-0.jsonl").unlink()


STRANGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a profiler's": (profiler, r"is not a trace \(it holds documents/thesis.tex, logits/run1.npy, trace.json\): not overwritten"),
    "a profiler's alone": (lambda root: (root / MANIFEST).write_text("{}"), r"is not a trace \(it holds trace.json\)"),
    "a file beside": (beside("notes.txt"), r"is more than a trace \(it holds notes.txt\)"),
    "files in tables": (beside("tokens/a.csv", "routing/part-0-0.csv", "documents/b", "e"), r"documents/b, e, routing/part-0-0.csv and 1 more\)"),
    "a table elsewhere": (linked, r"is more than a trace \(it holds tokens\)"),
    "a profiler's over ours": (profiled_over, r"is not a trace \(it holds trace.json\)"),
    "parts without lists": (bare_parts, "is not a trace"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_trace_is_not_overwritten_and_named(name: str, tmp_path: Path) -> None:
    make, said = STRANGE[name]
    (root := tmp_path / "t").mkdir()
    make(root)
    before = {p: (tmp_path / p).read_bytes() for p in listing(tmp_path) if (tmp_path / p).is_file()}
    for replace in (check_directory, claim_directory, lambda root, _: clear_trace(root)):
        with pytest.raises(MoeInspectError, match=said) as caught:
            replace(root, True)
        assert "\n" not in str(caught.value)
    assert {p: (tmp_path / p).read_bytes() for p in before} == before


def torn(root: Path) -> None:
    (root / MANIFEST).write_bytes((root / MANIFEST).read_bytes()[:300])


def of_another_format(root: Path) -> None:
    edit_manifest(root, format=2)


@pytest.mark.parametrize(
    "damage", [str, torn, of_another_format, lambda t: (t / MANIFEST).unlink()]
)
def test_a_trace_is_overwritten_also_a_damaged_one(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    root = a_trace(tmp_path / "t")
    (root / "routing" / ".part-0-7.parquet.tmp").touch()
    damage(root)
    with pytest.raises(MoeInspectError, match=r"there is a trace at .*--overwrite"):
        check_directory(root, False)
    claim_directory(root, True).release()
    assert list(root.iterdir()) == []
    a_trace(root)


def test_the_manifest_goes_first_and_whoever_comes_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, unlink, unlinked = a_trace(tmp_path / "t"), os.unlink, list[str]()

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


DRAFT = f".{MANIFEST}.tmp"


@pytest.mark.parametrize(
    "left",
    [(), (LOCK,), (DRAFT,), (LOCK, DRAFT, "shards-0.jsonl"), ("tokens/.part-0-0.parquet.tmp",)],
)
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
        assert not [name for name in listing(root) if "/." in f"/{name}"]


# --- names in a trace are data


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    """The tables of the manifest and the paths of shards, whatever they say, touch nothing outside
    of the trace."""
    other = a_trace(tmp_path / "other")
    before = {p: (other / p).read_bytes() for p in listing(other)}
    for tables in (["../other/routing", "tokens", "documents"], [{}], "routing"):
        shutil.rmtree(root := tmp_path / "t", ignore_errors=True)
        edit_manifest(a_trace(root), tables=tables)
        for use in (open_trace, resume_point):
            with pytest.raises(MoeInspectError, match="damaged trace"):
                use(root)
        assert not verify(root).ok
    beyond = "../../other/routing/part-0-0.parquet"
    said = r"path is .*, not (routing/part-0-|like routing/part-0-|text)"
    for path in (beyond, f"routing/{beyond}", "tokens/part-0-0.parquet", 3):
        shutil.rmtree(root)
        rename(a_trace(root), path=path)
        for use in (open_trace, resume_point):
            with pytest.raises(MoeInspectError, match=f"shards-0.jsonl: line 3: {said}"):
                use(root)
        assert "path is" in (verify(root).violation or "")
    shutil.rmtree(root)
    rename(a_trace(root), table="../other/routing")
    with pytest.raises(MoeInspectError, match=r"table is .*other/routing., not one of"):
        resume_point(root)
    assert {p: (other / p).read_bytes() for p in listing(other)} == before


def rename(root: Path, **values: object) -> None:
    lines = edit_lines(root)
    lines[2] |= values
    edit_lines(root, lines)


@pytest.mark.parametrize(
    "name", ["routing/part-0-0.parquet", "routing", "shards-0.jsonl", "trace.json"]
)
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_links_outside_and_pipes_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    root = a_trace(tmp_path / "t")
    (tmp_path / "other").mkdir()
    moved = tmp_path / "other" / Path(name).name
    shutil.move(root / name, moved)
    if kind == "link":
        (root / name).symlink_to(moved)
    else:
        os.mkfifo(root / name)
    said = "outside of" if kind == "link" else "not a regular file|no trace at|is missing|routing"
    for before in (str, resume_point):
        with pytest.raises(MoeInspectError, match=said):  # noqa: PT012
            before(root)
            open_trace(root).routing(router=0)
    assert moved.exists()
    if name != "trace.json":
        assert not verify(root).ok


def test_a_link_within_the_trace_is_followed(tmp_path: Path) -> None:
    root = a_trace(tmp_path / "t")
    shutil.move(root / "routing/part-0-0.parquet", root / "moved")
    (root / "routing/part-0-0.parquet").symlink_to(root / "moved")
    (tmp_path / "u").symlink_to(root)
    assert len(open_trace(tmp_path / "u").routing(router=0)) == 80


# --- interrupted, not damaged


def test_verify_tells_interrupted_from_damaged(tmp_path: Path) -> None:
    root = a_trace(tmp_path / "t")
    (root / "routing/part-0-9.parquet").touch()
    (root / "routing/.part-0-8.parquet.tmp").touch()
    assert "an orphan" in (verify(root).violation or "")  # of a complete trace
    edit_manifest(root, status="recording", corpus={"plan": {}})
    found = verify(root)
    assert (found.ok, found.status, found.resumable) == (True, "interrupted", True)
    assert found.tokens == 80
    assert found.uncommitted == ["routing/.part-0-8.parquet.tmp", "routing/part-0-9.parquet"]
    with hold(root):  # by a process of another machine, say
        assert verify(root).status == "recording"
    (root / "routing/notes.txt").touch()
    assert "an orphan" in (verify(root).violation or "")
    (root / "routing/notes.txt").unlink()
    (root / "routing/part-0-0.parquet").write_bytes(b"PAR1")
    assert not verify(root).ok


def test_a_probe_does_not_touch_the_draft_of_another(tmp_path: Path) -> None:
    (tmp_path / f".{MANIFEST}.tmp").write_text("half")
    check_directory(tmp_path, False)
    assert (tmp_path / f".{MANIFEST}.tmp").read_text() == "half"


# --- several processes


def test_two_processes_at_once_end_in_one_whole_trace(tmp_path: Path) -> None:
    """That resume, that begin, that overwrite; a few tries of `python -m benchmarks.faults`."""
    from benchmarks.faults.bench import Bench
    from benchmarks.faults.traces import writing_at_once

    bench = Bench(tmp_path)
    writing_at_once(bench, tries=2)
    assert sum(bench.tries.values()) == 6
    assert bench.failures == []

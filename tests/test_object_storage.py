"""A trace on object storage, here in memory; benchmarks/object_storage.py has a server."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect import import_trace, merge, open_trace
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import report
from moe_inspect.trace.files.location import Remote, output_location
from moe_inspect.trace.files.lock import LOCK, hold, is_locked, join
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.output_dir import check_directory, contents
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter, resume_point
from moe_inspect.trace.writer.whole import upload
from tests.support.synthetic import a_pass, routers, uniform_ids, write_trace
from tests.support.watched import committed

fsspec = pytest.importorskip("fsspec")
E, K, T = 8, 2, 50
FOREIGN = b"77 elsewhere 0123456789abcdef 5"


@pytest.fixture
def there(tmp_path: Path) -> Iterator[str]:
    """A place in memory that no other test has."""
    url = f"memory://{tmp_path.name}-{os.getpid()}"
    yield url
    files = fsspec.filesystem("memory")
    if files.exists(Remote(url).path):
        files.rm(Remote(url).path, recursive=True)


def batches(n: int) -> Iterator[RoutedBatch]:
    rng = np.random.default_rng(3)
    for b in range(n):
        ids = [uniform_ids(rng, T, E, K) for _ in range(2)]
        document, documents = np.full(T, b, np.int32), [Document(b, "x", "here", T)]
        yield a_pass(b, ids, document=document, domains=["x"], documents=documents)


def a_writer(place: str | Path | Remote, **how: Any) -> TraceWriter:
    """A shard for each two passes."""
    manifest = {"model": {"id": "synthetic"}, "capture": {}, "corpus": {"plan": {}}}
    how = {"weights": False, "shard_tokens": 2 * T, **how}
    return TraceWriter(place, manifest, routers(2, E, K), **how)


def written(place: str | Path, start: int = 0, end: int = 6, **how: Any) -> None:
    """Passes `start` to `end` of six."""
    with a_writer(place, **how) as writer:
        for batch in itertools.islice(batches(end), start, None):
            writer.write(batch)


Call = Callable[..., Any]


@contextlib.contextmanager
def each_call(around: Callable[[str, Call], Call], *names: str) -> Iterator[None]:
    """Within it these methods of Remote are what `around` makes of each and its name."""
    with pytest.MonkeyPatch.context() as patched:
        for name in names:
            patched.setattr(Remote, name, around(name, getattr(Remote, name)))
        yield


def of_six_documents(path: Path, seed: int, words: int = 3) -> Trace:
    ids = [uniform_ids(np.random.default_rng([seed, r]), 60, E, K) for r in range(2)]
    document = np.repeat(np.arange(6), 10)
    return write_trace(path, ids, E, words=words, document=document, batch_tokens=10)


def same(ours: Trace, theirs: Trace) -> None:
    for name in ("routing", "tokens", "documents", "vocabulary"):
        pd.testing.assert_frame_equal(getattr(ours, name)(), getattr(theirs, name)())


def test_written_as_on_a_disk(there: str, tmp_path: Path) -> None:
    written(f"{there}/t")
    written(tmp_path / "t")
    same(open_trace(f"{there}/t"), open_trace(tmp_path / "t"))
    found = verify(f"{there}/t")
    assert found.ok, found
    assert (found.status, found.shards, found.assignments) == ("complete", 3, 6 * T * 2 * K)
    expected = report(tmp_path / "t").tables["load"]
    for url in (f"{there}/t", f"file://{tmp_path / 't'}"):
        assert str(open_trace(url).path) == url
        assert report(url).tables["load"].equals(expected)
    with pytest.raises(MoeInspectError, match="cannot open strange://t"):
        open_trace("strange://t")
    # the same bytes, but for the manifest, which names its process
    files = fsspec.filesystem("memory")
    names = {p.relative_to(tmp_path / "t").as_posix() for p in (tmp_path / "t").rglob("*.*")}
    place = Remote(f"{there}/t")
    assert set(place.sizes()) == names
    for name in names - {"trace.json"}:
        assert files.cat_file((place / name).path) == (tmp_path / "t" / name).read_bytes(), name


def test_every_moment_is_a_readable_trace(there: str) -> None:
    """After each object that is written, readers see a trace whose shards are all there."""
    seen, place = list[int](), Remote(f"{there}/t")

    def watched(_: str, write: Call) -> Call:
        def call(self: Remote, data: Any) -> None:
            write(self, data)
            if self.url.startswith(place.url) and (place / "trace.json").is_file():
                found = Trace(place)
                assert sum(len(s.tokens()) for s in found.shards) == found.n_tokens
                seen.append(found.n_tokens)

        return call

    with each_call(watched, "write_bytes", "upload"):
        written(place.url)
    assert seen == sorted(seen)
    assert {0, 2 * T, 4 * T, 6 * T} == set(seen)


def test_early_shards_are_replaced_and_ranks_write_one_trace(there: str) -> None:
    place = Remote(f"{there}/early")
    with a_writer(place, shard_tokens=100 * T, commit_every=0.01) as writer:
        for _ in committed(place, writer, batches(4), T):
            pass
        assert Trace(place).n_shards == 4
    assert Trace(place).n_shards == 1
    found = verify(place.url)
    assert (found.ok, found.tokens, found.uncommitted) == (True, 4 * T, []), found
    place = Remote(f"{there}/ranks")
    first = hold(place, shared=True)
    second = join(place, first.holder)
    for rank, lock in ((1, second), (0, first)):
        with a_writer(place, rank=rank, lock=lock) as writer:
            for batch in itertools.islice(batches(4), rank, None, 2):
                writer.write(batch)
        lock.release()
    found = verify(place.url)
    assert (found.ok, found.tokens, found.shards) == (True, 4 * T, 2), found
    assert not (place / LOCK).exists()


class Killed(BaseException):
    """As kill -9: nothing is closed."""


class Fault:
    """The `at`-th call fails, is the last of the process, or works and its answer is lost."""

    def __init__(self, at: int, how: str):
        self.at, self.how, self.calls = at, how, 0

    def __call__(self, name: str, call: Call) -> Call:
        def faulty(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.how == "kill" and self.calls >= self.at:
                raise Killed
            if self.calls != self.at:
                return call(*arguments, **options)
            if self.how == "lost":
                call(*arguments, **options)
            raise OSError("403")

        return faulty


@pytest.mark.parametrize("writes", [3, 6, 7, 8, 11, 14])
def test_what_was_killed_is_readable_and_goes_on(there: str, tmp_path: Path, writes: int) -> None:
    """Of a trace only the first `writes` objects arrive."""
    place, fault = Remote(f"{there}/t"), Fault(writes + 1, "kill")
    kept = each_call(lambda *_: lambda *_: None, "unlink")
    with kept, each_call(fault, "write_bytes", "upload"), pytest.raises(Killed):
        written(place.url)
    # its lock names a process that is gone
    (place / LOCK).write_bytes(f"4194303 {socket.gethostname()} ab 1".encode())
    before = verify(place.url)
    assert (before.ok, before.status, before.resumable) == (True, "interrupted", True), before
    assert before.tokens == Trace(place).n_tokens < 6 * T
    with hold(place) as lock:
        point = resume_point(place)
        assert not verify(place.url).uncommitted
        written(place.url, point.next_batch, resume=point, lock=lock)
    found = verify(place.url)
    assert (found.ok, found.tokens, found.status) == (True, 6 * T, "complete"), found
    written(tmp_path / "t")
    same(Trace(place), open_trace(tmp_path / "t"))


def test_one_writer_at_a_time(there: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = Remote(f"{there}/t")
    with hold(place) as lock:
        assert is_locked(place) is True
        with pytest.raises(MoeInspectError, match=r"this process is still writing memory://.*/t"):
            hold(place)
        with pytest.raises(MoeInspectError, match="still writing"):
            check_directory(place, overwrite=False)
        join(place, lock.holder).release()  # of another rank: rank 0's stays
        assert is_locked(place) is True
        with pytest.raises(MoeInspectError, match=r"this process has taken over"):
            join(place, "another")
    assert is_locked(place) is False
    assert not (place / LOCK).exists()
    # what a process of another machine left can be taken over, and the warning names it
    (place / LOCK).write_bytes(FOREIGN)
    assert is_locked(place) is None
    assert not capsys.readouterr().err
    hold(place).release()
    assert "process 77 on elsewhere began to write" in capsys.readouterr().err


def test_a_writer_that_was_taken_over_stops(there: str) -> None:
    place = Remote(f"{there}/t")
    writer = a_writer(place, queue_batches=1)
    for batch in batches(4):
        writer.write(batch)
    (place / LOCK).write_bytes(FOREIGN)
    with pytest.raises(MoeInspectError, match=r"process 77 on elsewhere has taken over"):
        writer.close()
    committed = Trace(place).n_tokens
    assert committed < 4 * T
    # the other's lock stays
    assert (place / LOCK).read_bytes() == FOREIGN
    assert read_manifest(place)["counts"]["tokens"] <= committed


def test_nothing_else_is_replaced(there: str, tmp_path: Path) -> None:
    place = Remote(f"{there}/t")
    written(place.url)
    with pytest.raises(MoeInspectError, match="there is a trace at memory://"):
        check_directory(place, overwrite=False)
    (place / "notes.txt").write_bytes(b"mine")
    with pytest.raises(MoeInspectError, match=r"more than a trace \(it holds notes.txt\)"):
        check_directory(place, overwrite=True)
    (place / "notes.txt").unlink()
    check_directory(place, overwrite=True)
    assert contents(place).is_trace
    (place / "notes.txt").unlink(missing_ok=True)
    with pytest.raises(OSError, match=r"notes\.txt"):
        (place / "notes.txt").unlink()
    assert output_location(f"file://{tmp_path}/t") == tmp_path / "t"


def test_derived_and_imported_traces_are_there_whole_or_not(there: str, tmp_path: Path) -> None:
    a_and_b = [of_six_documents(tmp_path / name, n).path for n, name in enumerate("ab")]
    same(merge(a_and_b, f"{there}/m"), merge(a_and_b, tmp_path / "m"))
    # from there, and to there again in the place of another
    same(merge([f"{there}/m"], f"{there}/s"), merge([tmp_path / "m"], tmp_path / "s"))
    merge(a_and_b[:1], f"{there}/s", overwrite=True)
    assert verify(f"{there}/s").ok
    assert len(open_trace(f"{there}/s").documents()) == 6
    (tmp_path / "loads.csv").write_text("layer,expert,count\n0,0,5\n0,1,7\n")
    counts = import_trace("counts", [tmp_path / "loads.csv"], f"{there}/c", top_k=1)
    assert counts.counts()["assignments"].tolist() == [5, 7]
    assert verify(f"{there}/c").ok
    # the network fails before the manifest is there; and then nothing can be taken back
    for undone in (True, False):

        def fails(name: str, call: Call, undone: bool = undone) -> Call:
            def faulty(self: Remote, *given: Any, **options: Any) -> Any:
                if self.name == "trace.json" and (name == "write_bytes" or not undone):
                    raise OSError("the network is down")
                return call(self, *given, **options)

            return faulty

        said = r"cannot write memory://.*/n: the network is down;"
        network = each_call(fails, "write_bytes", "exists")
        with network, pytest.raises(MoeInspectError, match=said):
            merge(a_and_b, f"{there}/n")
        with pytest.raises(MoeInspectError, match="no trace at memory://"):
            open_trace(f"{there}/n")
        assert (not Remote(f"{there}/n").sizes()) == undone
    merge(a_and_b, f"{there}/n")
    assert verify(f"{there}/n").ok


@pytest.mark.parametrize("how", ["403", "lost", "kill"])
def test_a_trace_is_replaced_whole_or_not(how: str, there: str, tmp_path: Path) -> None:
    """With a fault at each write and deletion in turn; the next one leaves nothing else."""
    place, files = Remote(f"{there}/t"), fsspec.filesystem("memory")
    whole = {name: of_six_documents(tmp_path / name, n, 3 + n // 2) for n, name in enumerate("abc")}

    def put(name: str) -> None:
        upload(tmp_path / name, tmp_path, out=place, overwrite=True)

    put("b")
    put("a")  # one that has replaced another
    before = {name: (place / name).read_bytes() for name in place.sizes()}
    at, ended = 1, set[str]()
    while "whole" not in ended:
        files.rm(place.path, recursive=True)
        for name, data in before.items():
            (place / name).write_bytes(data)
        fault, failed = Fault(at, how), False
        try:
            with each_call(fault, "write_bytes", "upload", "unlink", "create"):
                put("c")
        except (OSError, MoeInspectError, Killed):
            failed = True
        found = open_trace(place.url)
        is_new = len(found.vocabulary()) == 4
        same(found, whole["c" if is_new else "a"])
        assert (checked := verify(place.url)).ok, (at, checked)
        if how != "kill":
            assert is_new != failed, at
        ended |= {"new" if is_new else "old"} | ({"whole"} if fault.calls < at else set())
        (place / LOCK).unlink(missing_ok=True)
        at += 1
    assert ended == {"old", "new", "whole"}
    assert len(place.sizes()) == len([p for p in (tmp_path / "c").rglob("*") if p.is_file()])

"""Processes in which a fault happens, and the counting of what comes of it."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError

HUNG_S = 120.0
CALLS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate")


class Faults:
    """Counts the calls that change a disk, each write too, and does something at the n-th: "kill",
    or an OSError: "EIO", or "ENOSPC", after which every write fails."""

    def __init__(self, at: int | None, how: str, seed: int = 0):
        self.at, self.how, self.calls, self.random = at, how, 0, random.Random(seed)
        self.synced: dict[Path, int] = {}  # bytes of a file before what is being added to it

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._faulty(getattr(os, name), name))
        opened = builtins.open

        def faulty_open(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not set(mode) & set("wax") or isinstance(file, int) or opener is not None:
                return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
            self.call("open", ())
            if "a" in mode and (path := Path(file)).exists():
                self.synced[path.resolve()] = path.stat().st_size
            raw = io.BufferedWriter(_FaultyFile(self, file, mode.replace("b", "").replace("t", "")))
            if "b" in mode:
                return raw
            return io.TextIOWrapper(raw, encoding, errors, newline)

        builtins.open = io.open = faulty_open

    def _faulty(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.call(name, args)
            return call(*args, **kwargs)

        return faulty

    def call(self, name: str, args: tuple[Any, ...]) -> None:
        self.calls += 1
        full = (
            self.how == "ENOSPC" and name == "write" and self.calls >= (self.at or self.calls + 1)
        )
        if self.calls != self.at and not full:
            return
        if self.how != "kill":
            number = getattr(errno, self.how)
            raise OSError(number, os.strerror(number))
        if name == "fsync":  # what was not synced may be lost from any byte on
            path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            if path.suffix == ".jsonl" and self.random.random() < 0.7:
                size = path.stat().st_size
                os.truncate(path, self.random.randrange(self.synced.get(path, 0), size + 1))
        os.kill(os.getpid(), signal.SIGKILL)


class _FaultyFile(io.FileIO):
    """Of a write that fails the first half arrives."""

    def __init__(self, faults: Faults, file: Any, mode: str):
        super().__init__(file, mode)
        self._faults = faults

    def write(self, data: Any) -> int:
        if self._faults.calls + 1 == self._faults.at:
            super().write(bytes(data)[: len(data) // 2])
        self._faults.call("write", ())
        return super().write(data)


def started(work: Callable[[], Any], report_to: Path) -> int:
    """A forked process that does `work` and leaves what it returned, or raised, in a file."""
    pid = os.fork()
    if pid:
        return pid
    try:
        said: dict[str, Any] = {"returned": work()}
    except MoeInspectError as error:
        said = {"refused": str(error)}
    except BaseException as error:
        said = {"raised": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    file = os.open(report_to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # no fault hits this
    os.write(file, json.dumps(said).encode())
    os._exit(0)


def ended(pid: int, report_to: Path) -> dict[str, Any]:
    until = time.monotonic() + HUNG_S
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"raised": f"hung: not over after {HUNG_S:.0f} s"}
        time.sleep(0.002)
    if os.WIFSIGNALED(done[1]):
        return {"killed": os.WTERMSIG(done[1])}
    said = json.loads(report_to.read_text())
    report_to.unlink()
    return said


class Bench:
    """What is tried, in a directory of its own for each try."""

    def __init__(self, root: Path):
        self.root = root
        self.tries: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.outcomes: dict[str, Counter[str]] = {}
        self._places = 0

    def place(self) -> Path:
        self._places += 1
        place = self.root / str(self._places)
        place.mkdir()
        return place

    def child(self, work: Callable[[], Any]) -> dict[str, Any]:
        said = self.root / "said.json"
        return ended(started(work, said), said)

    def children(self, works: list[Callable[[], Any]]) -> list[dict[str, Any]]:
        """At the same time."""
        said = [self.root / f"said-{n}.json" for n in range(len(works))]
        pids = [started(work, place) for work, place in zip(works, said, strict=True)]
        return [ended(pid, place) for pid, place in zip(pids, said, strict=True)]

    def count(self, what: str, outcome: str, failure: str | None, case: str) -> None:
        self.tries[what] += 1
        self.outcomes.setdefault(what, Counter())[outcome] += 1
        if failure is not None:
            self.failures.append({"what": what, "case": case, "failure": failure})
            print(f"FAILED {what} {case}: {failure}", file=sys.stderr)

    def at_every_call(
        self,
        what: str,
        how: str,
        before: Callable[[Path], None],
        work: Callable[[Path], Any],
        after: Callable[[Path], Any],
        step: int = 1,
        strict: bool = False,
    ) -> None:
        """Does `work` with a fault at each call in turn, and `after` it checks what is left.
        `strict`: whatever is raised but a MoeInspectError is a failure."""

        def counted(place: Path) -> int:
            faults = Faults(None, how)
            faults.install()
            work(place)
            return faults.calls

        calls = self._prepared(before, counted)["returned"]
        for at in range(1, calls + 1, step):
            place = self.place()
            self.must(lambda place=place: before(place))

            def faulty(place: Path = place, at: int = at) -> None:
                Faults(at, how, seed=at).install()
                work(place)

            said = self.child(faulty)
            outcome = next(iter(said))
            raised = said.get("raised", "")
            failure = raised if strict or "hung" in raised else None
            checked = self.child(lambda place=place: after(place))
            failure = (
                failure
                or checked.get("raised")
                or checked.get("refused")
                or (None if "returned" in checked else str(checked))
            )
            self.count(
                f"{what}: {how}",
                outcome,
                failure and failure + "\n" + checked.get("traceback", ""),
                f"call {at} of {calls}",
            )
            if failure is None:
                shutil.rmtree(place)

    def _prepared(
        self, before: Callable[[Path], None], work: Callable[[Path], Any]
    ) -> dict[str, Any]:
        place = self.place()
        self.must(lambda: before(place))
        said = self.child(lambda: work(place))
        assert "returned" in said, said
        shutil.rmtree(place)
        return said

    def must(self, work: Callable[[], Any]) -> None:
        said = self.child(work)
        assert "returned" in said, said

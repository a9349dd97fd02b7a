"""Runs a command as long as the process that started this one holds the other end of its stdin:
`python -m moe_inspect.capture.server.keeper GRACE_S COMMAND…`. When that end is closed, by whatever
ends its holder, kill -9 too, all that the command started is stopped: no engine outlives who
started it, and none keeps a GPU.

It is two processes: each stops the command when the other is killed. On Linux both adopt what
loses its parent below them, and so find what the command started in sessions of its own too; where
both are killed at once, the kernel kills the command. Elsewhere the command's process group is
stopped, and only if the second process lives."""

# pyright: strict

from __future__ import annotations

import ctypes
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

POLL_S = 0.1
REST_S = 5.0  # for what the command left when it ended
LOG_BYTES = 2**25
DROPPED = b"[moe-inspect: what was said before is dropped]\n"
LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


def main() -> None:
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    lives, held = os.pipe()  # open as long as the first process lives
    if (second := os.fork()) == 0:
        os.close(held)
        os.setsid()  # a signal to the group of the first is none to it
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        # as a shell says it
        code = _keep(command, grace_s, lives)
        sys.exit(code if code >= 0 else 128 - code)
    _on_signals(lambda number: os.kill(second, signal.SIGTERM))
    code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    _on_signals(lambda number: None)
    if code < 0:
        _stop_rest(second, grace_s)
        os.kill(os.getpid(), signal.SIGKILL)  # which tells it from the end of the command
    sys.exit(code)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None).prctl(option, value)


def _keep(command: list[str], grace_s: float, lives: int) -> int:
    """Runs the command. Returns its exit code, −n for signal n."""
    asked: list[int] = []
    _on_signals(asked.append)
    kept = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    while kept.poll() is None and not asked:
        bound_log(sys.stdout.fileno(), LOG_BYTES)
        if select.select([sys.stdin, lives], [], [], POLL_S)[0]:
            break
    kept.terminate()  # it knows best how to end what it started
    try:
        kept.wait(grace_s)
    except subprocess.TimeoutExpired:
        _signal_all(kept.pid, signal.SIGKILL)
        kept.wait()
    _stop_rest(kept.pid, REST_S)
    return kept.returncode


def _on_signals(do: Callable[[int], object]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        do(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handle)


def _stop_rest(group: int, grace_s: float) -> None:
    """Stops what there is of the command: SIGTERM, and SIGKILL for what does not end."""
    for number, again, within_s in (
        (signal.SIGTERM, 0, grace_s),
        (signal.SIGKILL, signal.SIGKILL, REST_S),
    ):
        there, end = _signal_all(group, number), time.monotonic() + within_s
        while there and time.monotonic() < end:
            time.sleep(POLL_S / 2)
            there = _signal_all(group, again)


def _signal_all(group: int, number: int) -> bool:
    """Signals what the command started. Whether there was anything."""
    if not LINUX:
        with suppress(ProcessLookupError):
            os.killpg(group, number)
            return True
        return False
    found = _descendants()
    for pid in found:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return bool(found)


def _descendants() -> list[int]:
    """The processes below this one that have not ended."""
    children: dict[int, list[int]] = {}
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            state, parent = stat_file.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat_file.parent.name))
    found, left = list[int](), [os.getpid()]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def bound_log(log: int, most: int) -> None:
    """Drops the older half of a log file that others append to, once it has more bytes."""
    facts = os.fstat(log)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size <= most:
        return
    kept = os.pread(log, most // 2, facts.st_size - most // 2)
    os.ftruncate(log, 0)
    os.write(log, DROPPED + kept[kept.find(b"\n") + 1 :])


if __name__ == "__main__":
    main()

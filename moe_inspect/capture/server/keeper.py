"""Runs a command as long as the process that started this one holds the other end of its stdin:
`python -m moe_inspect.capture.server.keeper GRACE_S COMMAND…`. When that end is closed, by whatever
ends its holder, kill -9 too, the command's whole process group is stopped: no engine outlives who
started it, and none keeps a GPU."""

# pyright: strict

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

POLL_S = 0.1
REST_S = 5.0  # for what the command left when it ended


def main() -> None:
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask)
    kept = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while kept.poll() is None and not asked:
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            break
    stop(kept, grace_s)
    # as a shell says it
    sys.exit(kept.returncode if kept.returncode >= 0 else 128 - kept.returncode)


def stop(kept: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ends the command, which knows best how to end what it started, then what is left of its
    process group: SIGTERM, and SIGKILL for what does not end."""
    kept.terminate()
    with suppress(subprocess.TimeoutExpired):
        kept.wait(grace_s)
        there, end = _signal_group(kept.pid, signal.SIGTERM), time.monotonic() + REST_S
        while there and time.monotonic() < end:
            time.sleep(POLL_S / 2)
            there = _signal_group(kept.pid, 0)
    _signal_group(kept.pid, signal.SIGKILL)
    kept.wait()


def _signal_group(group: int, number: int) -> bool:
    """Whether there is a process in it."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    main()

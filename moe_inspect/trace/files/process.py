"""Whether a process of this machine runs."""

from __future__ import annotations

import os
from pathlib import Path


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with the pid it identifies a process
    uniquely. None without /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def is_running(pid: int, start: int | None) -> bool:
    """Whether the process with this pid runs that started at `start`; None: unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists, but belongs to another user
    now = process_start(pid)
    # another process may have the pid now
    return start is None or now is None or start == now

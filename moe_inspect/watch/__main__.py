"""`python -m moe_inspect.watch TRACE PID`: the view beside a process that writes a trace
(`moe-inspect trace --watch`). It ends with the trace, or with the process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render.console import console_for
from moe_inspect.text import print_stderr
from moe_inspect.watch.state import WatchOptions
from moe_inspect.watch.terminal import watch


def main(trace: str, pid: str) -> None:
    # Ctrl-C is for the process, which closes the trace: this is still to be seen
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with, args=[int(pid)], daemon=True).start()
    try:
        watch(trace, WatchOptions(of_process=int(pid)), console_for(sys.stdout), endings=False)
    except MoeInspectError as error:
        print_stderr(f"error: {error}")
        sys.exit(1)


def _end_with(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(0.5)
    time.sleep(5)  # in which the view says that the process is gone
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])

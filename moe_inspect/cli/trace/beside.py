"""`trace --watch`: the view of `moe-inspect watch`, by a process beside this one, which costs the
model's process nothing but the commits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from moe_inspect.trace.files.location import Remote

COMMIT_EVERY_S = 2.0  # unless --commit-every says otherwise
WAIT_S = 30.0  # for the view to show the end


class Beside:
    """Takes the place of the progress bar. What is written to stderr while the view has the
    terminal is kept, and written when it is gone."""

    def __init__(self, output: Path | Remote):
        self.output = output
        self._kept, self._stderr = None, -1

    def __enter__(self) -> Beside:
        command = [sys.executable, "-m", "moe_inspect.watch", str(self.output), str(os.getpid())]
        sys.stderr.flush()
        self._view = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
        if os.isatty(2):
            self._kept = tempfile.TemporaryFile()
            self._stderr = os.dup(2)
            os.dup2(self._kept.fileno(), 2)
        return self

    def __call__(self, done: int, total: int | None) -> None:
        """The view shows its own progress."""

    def __exit__(self, *_: object) -> None:
        try:
            if not self._is_over():
                self._view.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._view.wait(WAIT_S)
        finally:
            if self._view.poll() is None:
                self._view.kill()
            if self._kept is not None:
                sys.stderr.flush()
                os.dup2(self._stderr, 2)
                os.close(self._stderr)
                self._kept.seek(0)
                with open(2, "wb", closefd=False) as stderr:
                    shutil.copyfileobj(self._kept, stderr)
                self._kept.close()

    def _is_over(self) -> bool:
        """Whether this process has closed the trace: then the view ends by itself."""
        from moe_inspect.errors import MoeInspectError
        from moe_inspect.trace.manifest import read_manifest

        try:
            manifest = read_manifest(self.output)
        except (MoeInspectError, OSError):
            return False
        return manifest["status"] != "recording" and manifest["capture"].get("pid") == os.getpid()

"""A trace that is there whole or not at all: written in a temporary directory beside the output,
which is renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Generator
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line
from moe_inspect.trace.files.atomic import sync_directory
from moe_inspect.trace.files.lock import LOCK, Lock, hold
from moe_inspect.trace.output_dir import claim_directory, clear_trace


@contextlib.contextmanager
def whole_trace(out: Path, overwrite: bool, nothing: str) -> Generator[tuple[Path, Lock]]:
    """A temporary directory, and its lock. On success it is renamed to `out`, where a trace is
    replaced with `overwrite`; on an exception it is removed. `nothing` ends the message where the
    disk fails: "nothing was imported"."""
    target = out.resolve() if out.is_symlink() else out
    _clear_drafts(target)
    draft = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # another process may hold the lock while it checks whether this one is running
    with hold(draft, wait=True) as lock:
        try:
            yield draft, lock
            claim_directory(target, overwrite, resumable=False).release()
            os.replace(draft, target)
            lock.root = target
            sync_directory(target.parent)
        except (OSError, MoeInspectError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            # the message of the writer suggests --resume, which there is not here
            if isinstance(cause, OSError):
                raise MoeInspectError(
                    f"cannot write {out}: {first_line(cause)}; {nothing}"
                ) from None
            raise
        finally:
            if draft.exists():
                _remove(draft)


def _clear_drafts(target: Path) -> None:
    """Removes temporary directories of killed processes that were to become the same directory."""
    name = re.compile(rf"\.{re.escape(target.name)}\.\d+(-[0-9a-f]+)?\.tmp")
    for draft in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        if name.fullmatch(draft.name) and draft.is_dir() and not draft.is_symlink():
            # not removed: one whose process is running, and one with other files in it
            with contextlib.suppress(MoeInspectError), claim_directory(draft, overwrite=True):
                _remove(draft)


def _remove(draft: Path) -> None:
    """Removes the directory of a trace, its lock file too."""
    clear_trace(draft)
    with contextlib.suppress(OSError):  # the next one tries again
        (draft / LOCK).unlink(missing_ok=True)
        draft.rmdir()

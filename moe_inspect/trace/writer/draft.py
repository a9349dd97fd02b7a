"""A trace that is there whole or not at all: written in a temporary directory beside the output,
which is renamed when it is complete. One for object storage is written on this machine and then
uploaded, its manifest last."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Generator
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line
from moe_inspect.trace import schema
from moe_inspect.trace.files.atomic import sync_directory
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.files.lock import LOCK, Lock, hold
from moe_inspect.trace.output_dir import OVERWRITTEN, claim_directory, clear_trace


@contextlib.contextmanager
def whole_trace(out: Path | Remote, overwrite: bool, nothing: str) -> Generator[tuple[Path, Lock]]:
    """A temporary directory, and its lock. On success it is renamed to `out`, where a trace is
    replaced with `overwrite`; on an exception it is removed. `nothing` ends the message where the
    disk fails: "nothing was imported"."""
    if isinstance(out, Remote):
        with _told(out, nothing), tempfile.TemporaryDirectory(prefix="moe-inspect-") as folder:
            with hold(Path(folder)) as lock:
                yield Path(folder), lock
            _upload(Path(folder), out, overwrite)
        return
    target = out.resolve() if out.is_symlink() else out
    _clear_drafts(target)
    draft = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # another process may hold the lock while it checks whether this one is running
    with hold(draft, wait=True) as lock:
        try:
            with _told(out, nothing):
                yield draft, lock
                claim_directory(target, overwrite, resumable=False).release()
                os.replace(draft, target)
                lock.root = target
                sync_directory(target.parent)
        finally:
            if draft.exists():
                _remove(draft)


@contextlib.contextmanager
def _told(out: Path | Remote, nothing: str) -> Generator[None]:
    """Where the disk or the network fails, the message says so and ends with `nothing`."""
    try:
        yield
    except (OSError, MoeInspectError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        # the message of the writer suggests --resume, which there is not here
        if isinstance(cause, OSError):
            raise MoeInspectError(f"cannot write {out}: {first_line(cause)}; {nothing}") from None
        raise


def _upload(draft: Path, target: Remote, overwrite: bool) -> None:
    """Readers find no trace until all of it is there. What is left of an upload that was killed is
    marked as a trace that is being replaced: another may be written there."""
    with claim_directory(target, overwrite, resumable=False) as lock:
        files = sorted(p for p in draft.rglob("*") if p.is_file() and p.name != LOCK)
        (target / OVERWRITTEN).write_bytes(b"")
        try:
            for file in files:
                if file.name != schema.MANIFEST:
                    lock.check()
                    (target / file.relative_to(draft).as_posix()).upload(file)
            lock.check()
            (target / schema.MANIFEST).upload(draft / schema.MANIFEST)
        except BaseException:
            with contextlib.suppress(MoeInspectError, OSError):
                lock.check()  # else it is another's by now
                clear_trace(target)
            raise
        with contextlib.suppress(OSError):  # the trace is there
            (target / OVERWRITTEN).unlink(missing_ok=True)


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

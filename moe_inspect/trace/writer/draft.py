"""A trace that is there whole or not at all: written in a temporary directory beside the output,
which is renamed when it is complete. One for object storage is written on this machine and then
uploaded, its manifest last."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Generator
from functools import partial
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line
from moe_inspect.trace import schema
from moe_inspect.trace.files.atomic import draft_folder_of
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.files.lock import LOCK, OLD, Lock, followed, hold, left_of
from moe_inspect.trace.output_dir import OVERWRITTEN, check_directory, claim_directory, clear_trace


@contextlib.contextmanager
def whole_trace(out: Path | Remote, overwrite: bool, nothing: str) -> Generator[tuple[Path, Lock]]:
    """A temporary directory, and its lock. On success it becomes `out`, where a trace is replaced
    with `overwrite`; on an exception it is removed. `nothing` ends the message where the disk
    fails: "nothing was imported"."""
    if isinstance(out, Remote):
        with _told(out, nothing), tempfile.TemporaryDirectory(prefix="moe-inspect-") as folder:
            with hold(Path(folder)) as lock:
                yield Path(folder), lock
            _upload(Path(folder), out, overwrite)
        return
    put = partial(_put, overwrite=overwrite)
    with draft_folder_of(out, put, _remove) as (draft, lock), _told(out, nothing):
        yield draft, lock
    for old in left_of(followed(out), OLD):
        with contextlib.suppress(OSError, MoeInspectError):  # the next one tries again
            _remove(old)


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


def _put(draft: Path, target: Path, overwrite: bool) -> None:
    """Puts a finished trace at `target`, and sets aside what is there. On an exception that is
    there again; after a kill `settle` puts it back."""
    aside = draft.with_suffix(OLD)
    with hold(target) as lock:
        check_directory(target, overwrite, resumable=False, locked=True)
        os.rename(target, aside)
        lock.root = aside
        try:
            os.rename(draft, target)
        except BaseException:
            os.rename(aside, target)
            lock.root = target
            raise


def _remove(draft: Path) -> None:
    """Removes the directory of a trace, its lock file too; nothing where it has other files."""
    clear_trace(draft)
    (draft / LOCK).unlink(missing_ok=True)
    draft.rmdir()


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

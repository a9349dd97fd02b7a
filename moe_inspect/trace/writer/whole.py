"""A trace that is there whole or not at all: written in a temporary directory beside the output,
which is renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from functools import partial
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, print_stderr
from moe_inspect.trace.files.atomic import draft_folder_of, put_folder
from moe_inspect.trace.files.lock import OLD, Lock, followed, hold, left_of
from moe_inspect.trace.output_dir import check_directory, remove_trace


@contextlib.contextmanager
def whole_trace(out: Path, overwrite: bool, nothing: str) -> Generator[tuple[Path, Lock]]:
    """A temporary directory, and its lock. On success it becomes `out`, where a trace is replaced
    with `overwrite`; on an exception it is removed. `nothing` ends the message where the disk
    fails: "nothing was imported"."""
    put = partial(_put, overwrite=overwrite)
    with draft_folder_of(out, put, remove_trace) as (draft, lock), _told(out, nothing):
        yield draft, lock
    for old in left_of(followed(out), OLD):
        try:
            remove_trace(old)
        except (OSError, MoeInspectError) as error:  # the next one tries again
            print_stderr(f"warning: the old trace stays at {old}: {first_line(error)}")


@contextlib.contextmanager
def _told(out: Path, nothing: str) -> Generator[None]:
    """Where the disk fails, the message says so and ends with `nothing`."""
    try:
        yield
    except (OSError, MoeInspectError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        # the message of the writer suggests --resume, which there is not here
        if isinstance(cause, OSError):
            raise MoeInspectError(f"cannot write {out}: {first_line(cause)}; {nothing}") from None
        raise


def _put(draft: Path, target: Path, overwrite: bool) -> None:
    """Puts a trace at `target`. On an exception the old one is back; after a kill, see `settle`."""
    aside = draft.with_suffix(OLD)
    with hold(target) as lock:
        check_directory(target, overwrite, resumable=False, locked=True)
        os.rename(target, aside)
        lock.root = aside
        try:
            put_folder(draft, target)
        except BaseException:
            os.rename(aside, target)
            lock.root = target
            raise

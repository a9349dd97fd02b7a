"""Whether a trace can be written at a place."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError, first_line
from moe_inspect.trace import schema


def check_directory(path: Path, overwrite: bool, resumable: bool = True) -> None:
    """Sees to it that a new trace can be written at `path`, or refuses: an existing trace is replaced only with `overwrite` (when there is
    something to replace it by, not before), anything else never."""
    try:
        if path.exists() and not path.is_dir():
            raise MoeInspectError(f"{path} is a file: give a directory for the trace")
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                kind = "a trace" if (path / schema.MANIFEST).exists() else "something"
                way_out = ", or go on with it by --resume" if resumable else ""
                raise MoeInspectError(
                    f"there is {kind} at {path}: choose another place, or replace a trace with --overwrite (overwrite=True){way_out}"
                )
            _refuse_to_replace(path)
        new = [p for p in (path, *path.parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MoeInspectError(f"cannot write {path}: no directory can be made {_why_none(path, error)}") from None
        probe = path / f".{schema.MANIFEST}.tmp"
        probe.touch()
        probe.unlink()
        with suppress(OSError):  # another trace may have begun in one of them
            for made in new:  # nothing is left behind where no trace comes of it
                made.rmdir()
    except OSError as error:
        raise MoeInspectError(f"cannot write {path}: {first_line(error)}") from None


def _why_none(path: Path, error: OSError) -> str:
    parent = next(p for p in path.parents if os.path.exists(p))
    if not parent.is_dir():
        return f"below {parent}, which is a file"
    return f"in {parent}: {'its file system takes none' if error.errno == errno.ENOENT else error.strerror}"  # as Linux says in /proc


def _refuse_to_replace(path: Path) -> None:
    from moe_inspect.trace.reader import refuse_while_written  # slow to import, and seldom needed
    from moe_inspect.trace.writer import refuse_unless_trace

    refuse_unless_trace(path)
    if (manifest := _readable_manifest(path)) is not None:
        refuse_while_written(path, manifest)


def _readable_manifest(path: Path) -> dict[str, Any] | None:
    from moe_inspect.trace.reader import read_manifest

    try:
        return read_manifest(path)
    except MoeInspectError:  # damaged, or of another format: it can be replaced, and nobody is writing it
        return None

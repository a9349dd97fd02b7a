"""Whether a trace can be written at a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import schema
from moe_inspect.trace.reader import read_manifest, refuse_while_written
from moe_inspect.trace.writer import refuse_unless_trace


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
            refuse_unless_trace(path)
            if (manifest := _readable_manifest(path)) is not None:
                refuse_while_written(path, manifest)
        new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{schema.MANIFEST}.tmp"
        probe.touch()
        probe.unlink()
        if new:  # nothing is left behind where no trace comes of it
            path.rmdir()
    except OSError as error:
        raise MoeInspectError(f"cannot write {path}: {error.strerror}") from None


def _readable_manifest(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path)
    except MoeInspectError:  # damaged, or of another format: it can be replaced, and nobody is writing it
        return None

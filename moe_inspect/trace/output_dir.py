"""Checks, clears and replaces the output directory of a trace. Nothing but the files of a trace is
ever removed."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.files import open_regular
from moe_inspect.text import first_line, join_first, print_stderr
from moe_inspect.trace import schema
from moe_inspect.trace.files import lock
from moe_inspect.trace.files.atomic import draft_folder_of, draft_of, put_folder, sync
from moe_inspect.trace.manifest import (
    read_manifest,
    refuse_while_written,
    refuse_within_trace,
    stored_manifest,
)

# what the manifest of a trace that is being removed is renamed to: readers then find no trace
OVERWRITTEN = ".overwritten.tmp"
LIST = r"shards-\d+\.jsonl"
PART = r"part-\d+-\d+\.parquet"
DRAFT = lock.drafts_of(rf"{re.escape(schema.MANIFEST)}|{re.escape(schema.VOCABULARY)}|{LIST}")
OF_A_TRACE = re.compile(
    rf"{re.escape(schema.MANIFEST)}|{re.escape(schema.VOCABULARY)}|{LIST}|{DRAFT}"
    rf"|{re.escape(OVERWRITTEN)}|{re.escape(lock.LOCK)}"
)
OF_A_TABLE = re.compile(rf"{PART}|{lock.drafts_of(PART)}")


@dataclass(frozen=True)
class Contents:
    """What a directory holds. `files`: files named as those of a trace, except its lock; `folders`:
    those of its tables; `strange`: anything else."""

    root: Path
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)

    @property
    def is_free(self) -> bool:
        """Whether the directory holds no committed trace: it is empty, its writer was stopped
        before the first manifest, or its trace is being overwritten."""
        if self.strange or schema.MANIFEST in self.files:
            return False
        return OVERWRITTEN in self.files or not any(
            "/part-" in name or self._is_list(name) for name in self.files
        )

    @property
    def is_trace(self) -> bool:
        """Whether the files are those of a trace; its manifest may be damaged."""
        if schema.MANIFEST in self.files:
            with suppress(MoeInspectError):
                read_manifest(self.root)
                return True
            # profilers use this name too
            with suppress(MoeInspectError, ValueError, RecursionError):
                found = json.loads(stored_manifest(self.root))
                if not (isinstance(found, dict) and "format" in found):
                    return False
        return any(self._is_list(name) for name in self.files)

    def _is_list(self, name: str) -> bool:
        """Whether a file lists shards."""
        if re.fullmatch(LIST, name) is None:
            return False
        with open_regular(self.root / name) as file:
            line = file.readline(10_000)
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            keys = {"path", "shard"}
            return (
                isinstance(found, dict) and found.get("table") in schema.TABLES and keys <= {*found}
            )
        return False


def contents(root: Path) -> Contents:
    found = Contents(root)

    def add(name: str, is_file: bool = True) -> None:
        table, _, part = name.rpartition("/")
        of_a_trace = OF_A_TABLE.fullmatch(part) if table else OF_A_TRACE.fullmatch(name)
        known = of_a_trace and table in ("", *schema.TABLES) and is_file
        if name != lock.LOCK:
            (found.files if known else found.strange).append(name)

    for entry in os.scandir(root):
        if entry.name in schema.TABLES and entry.is_dir(follow_symlinks=False):
            found.folders.append(entry.name)
            for part in os.scandir(entry.path):
                add(f"{entry.name}/{part.name}", part.is_file(follow_symlinks=False))
        else:
            add(entry.name, entry.is_file(follow_symlinks=False))
    return found


def check_directory(
    path: Path, overwrite: bool, resumable: bool = True, locked: bool = False
) -> None:
    """MoeInspectError where a new trace cannot be written at `path`. An existing trace may be
    replaced with `overwrite`, anything else never; nothing is removed here. `locked`: the caller
    holds the lock."""
    try:
        lock.settle(path)
        refuse_within_trace(path, a_trace=True)
        if path.exists() and not path.is_dir():
            raise MoeInspectError(f"{path} is a file: give a directory for the trace")
        if path.is_dir():
            _refuse_to_replace(contents(path), overwrite, resumable)
            if not locked:
                lock.refuse_while_locked(path)
        new = [p for p in (path, *path.parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parent = next(p for p in path.parents if os.path.exists(p))
            none = error.errno == errno.ENOENT  # as Linux says in /proc
            why = f"in {parent}: {'its file system takes none' if none else error.strerror}"
            why = why if parent.is_dir() else f"below {parent}, which is a file"
            said = f"no directory can be made {why}"
            raise MoeInspectError(f"cannot write {path}: {said}") from None
        tempfile.TemporaryFile(dir=path).close()
        with suppress(OSError):  # another trace may have begun in one of them
            for made in new:  # if no trace is written, no directory is left behind
                made.rmdir()
    except OSError as error:
        raise MoeInspectError(f"cannot write {path}: {first_line(error)}") from None


def stored_bytes(root: Path) -> int:
    """Of the files of a trace; one that is deleted meanwhile has none."""
    found = 0
    for file in root.rglob("*"):
        with suppress(OSError):
            found += file.stat().st_size if file.is_file() else 0
    return found


def claim_directory(path: Path, overwrite: bool, shared: bool = False) -> lock.Lock:
    """Locks `path` for a new trace and removes a trace that is to be overwritten. The caller
    releases the lock."""
    held = lock.hold(path, shared=shared)
    try:
        # another trace may have begun there meanwhile
        check_directory(path, overwrite, locked=True)
        clear_trace(path)
    except BaseException:
        held.release()
        raise
    return held


def clear_trace(root: Path) -> None:
    """Removes the files of the trace at `root`, and only those: its manifest first, then the lists
    of shards. Stopped in between, it leaves no trace, and the next call completes it."""
    there = contents(root)
    _refuse_to_replace(there, overwrite=True)
    try:
        if schema.MANIFEST in there.files:
            os.replace(root / schema.MANIFEST, root / OVERWRITTEN)
            sync(root)
        others = set(there.files) - {schema.MANIFEST, OVERWRITTEN}
        for name in sorted(others, key=lambda name: not re.fullmatch(LIST, name)):
            (root / name).unlink()
        for name in there.folders:
            with suppress(OSError):  # the next trace uses it as it is
                (root / name).rmdir()
        (root / OVERWRITTEN).unlink(missing_ok=True)
    except OSError as error:
        raise MoeInspectError(f"cannot write {root}: {first_line(error)}") from None


def remove_trace(root: Path) -> None:
    """Removes the directory of a trace, its lock file too; nothing where it has other files."""
    clear_trace(root)
    (root / lock.LOCK).unlink(missing_ok=True)
    root.rmdir()


def _refuse_to_replace(there: Contents, overwrite: bool, resumable: bool = True) -> None:
    if there.is_free:
        return
    path, is_trace = there.root, there.is_trace
    if not overwrite:
        way_out = ", or --resume it" if resumable else ""
        raise MoeInspectError(
            f"there is {'a trace' if is_trace else 'something'} at {path}: choose another "
            f"directory, or replace a trace with --overwrite (overwrite=True){way_out}"
        )
    others = list(there.strange)
    if not is_trace and schema.MANIFEST in there.files:
        others.append(schema.MANIFEST)
    if others or not is_trace:
        kind = "more than" if is_trace else "not"
        held = join_first(sorted(others or there.files), 3)
        raise MoeInspectError(f"{path} is {kind} a trace (it holds {held}): not overwritten")
    try:
        manifest = read_manifest(path)
    except MoeInspectError:  # damaged or of another format: no process is writing it
        return
    refuse_while_written(path, manifest)


@contextmanager
def output_file(path: str | Path) -> Iterator[Path]:
    """A draft of a file (see `draft_of`). MoeInspectError where it would be within a trace, or
    cannot be written."""
    path = Path(path)
    with writing(path):
        refuse_within_trace(path)
        with draft_of(path) as draft:
            yield draft


def output_folder(path: str | Path) -> Path:
    """A folder for such files, made where there is none."""
    path = Path(path)
    with writing(path):
        refuse_within_trace(path)
        path.mkdir(parents=True, exist_ok=True)
    return path


# --- a trace that is there complete or not at all: it is written in a temporary directory next to
# the output, which is renamed at the end


@contextmanager
def whole_trace(out: Path, overwrite: bool, nothing: str) -> Generator[tuple[Path, lock.Lock]]:
    """A temporary directory, and its lock. On success it becomes `out`, where a trace is replaced
    with `overwrite`; on an exception it is removed. `nothing` ends the message where the disk
    fails: "nothing was imported"."""
    put = partial(_put, overwrite=overwrite)
    with draft_folder_of(out, put, remove_trace) as (draft, held), _told(out, nothing):
        yield draft, held
    for old in lock.left_of(lock.followed(out), lock.OLD):
        try:
            remove_trace(old)
        except (OSError, MoeInspectError) as error:  # the next one tries again
            print_stderr(f"warning: the old trace stays at {old}: {first_line(error)}")


@contextmanager
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
    aside = draft.with_suffix(lock.OLD)
    with lock.hold(target) as held:
        check_directory(target, overwrite, resumable=False, locked=True)
        os.rename(target, aside)
        held.root = aside
        try:
            put_folder(draft, target)
        except BaseException:
            os.rename(aside, target)
            held.root = target
            raise

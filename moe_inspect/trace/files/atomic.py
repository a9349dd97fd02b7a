"""Drafts: whatever is written is written under a temporary name beside its place, flushed to disk
and renamed. A reader, and whoever comes after a crash, finds the old file or the new one.

A draft is called `.NAME.PID-RANDOM.tmp` and locked while it is written. One that nobody locks was
left by a killed process: the next draft of the same file removes it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line
from moe_inspect.trace.files import lock


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never half of one, also after a power cut."""
    with draft_of(path) as draft:
        draft.write_bytes(data)
    sync(path.parent)


def append(path: Path, data: bytes) -> None:
    """Adds to a file. On disk when this returns; where it cannot be, nothing is added."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        # the next line would continue the part that arrived
        with suppress(OSError):
            os.truncate(path, size)
        raise


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """An empty file to write to. On success it is renamed to `path`, on an exception it is removed.
    A link is followed, and the mode of a file that is replaced is kept; a device, a pipe and what
    is open already (/dev/stdout) are written directly."""
    target = _file_at(path)
    if target is None:
        yield path
        return
    for left in lock.left_of(target):
        with suppress(OSError):
            lock.remove_if_free(os.open(left, lock.OPEN), left)
    draft, file = _new(target)
    try:
        yield draft
        os.fsync(file)
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def put_folder(draft: Path, target: Path) -> None:
    """Renames a folder, for good; where that fails it is back at its name."""
    os.rename(draft, target)
    try:
        sync(target.parent)
    except BaseException:
        os.rename(target, draft)
        raise


@contextmanager
def draft_folder_of(
    path: Path,
    put: Callable[[Path, Path], object] = put_folder,
    remove: Callable[[Path], object] = shutil.rmtree,
) -> Iterator[tuple[Path, lock.Lock]]:
    """A folder to write to, and its lock. On success it is flushed to disk and `put` at `path`. On
    an exception it is removed; but where it is whole and cannot be put there it stays, and a
    MoeInspectError names it. A link is followed."""
    target = lock.followed(path)
    for left in lock.left_of(target):
        if left.is_dir() and not left.is_symlink() and not lock.is_locked(left):
            with suppress(OSError, MoeInspectError), lock.hold(left):
                remove(left)
    draft = lock.draft_name(target)
    try:
        # another process may hold the lock while it checks whether this one is running
        held = lock.hold(draft, wait=True)
    except BaseException:
        with suppress(OSError):
            draft.rmdir()
        raise
    with held:
        try:
            yield draft, held
            for file in (draft, *draft.rglob("*")):
                sync(file)
        except BaseException:
            with suppress(OSError, MoeInspectError):
                remove(draft)
            raise
        try:
            put(draft, target)
        except (OSError, MoeInspectError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            said = first_line(cause) if isinstance(cause, OSError) else str(error)
            said = f"cannot write {path}: {said}; what was to be there is whole at {draft}: move it"
            raise MoeInspectError(said) from error
        held.root = target.absolute()


def _file_at(path: Path) -> Path | None:
    """The file that `path` leads to, there or not yet; None for one that cannot be replaced."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            return None
    while path.is_symlink():
        if path.parent.resolve().is_relative_to("/proc"):  # as /dev/stdout does
            return None
        path = path.parent / os.readlink(path)
    return path


def _new(target: Path) -> tuple[Path, int]:
    """A draft, open and locked, with the mode and, if possible, the owner of what it replaces."""
    old = target.stat() if target.exists() else None
    if old is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    while True:
        draft = lock.draft_name(target)
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with ExitStack() as undo:
            undo.callback(draft.unlink, missing_ok=True)
            undo.callback(os.close, file)
            # another process may have taken it for a left one, before it was locked
            if lock.flock(file, exclusive=True) is not False and lock.is_at(file, draft):
                if old is not None:
                    with suppress(OSError):
                        os.fchown(file, old.st_uid, old.st_gid)
                    with suppress(OSError):
                        os.fchmod(file, stat.S_IMODE(old.st_mode))
                undo.pop_all()
                return draft, file


def sync(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

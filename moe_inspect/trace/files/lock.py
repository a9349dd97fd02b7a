"""The lock that a writer holds on its trace, which keeps out other processes and other recordings
of the same process.

It is flock(2) on the file `.lock` of the trace. The operating system releases it when the process
ends, in whatever way. It belongs to the open file: unlike fcntl's record locks it is not lost when
something else in the process opens the file and closes it. Linux sends it to the server of an NFS
mount, so that it holds between machines, unless the mount says "nolock" or "local_lock".

The ranks of one launch share the lock: rank 0 first takes it alone, which fails while any rank of
another launch is alive, then shares it, and the others join. The file names the holder (pid, host
and a random id of rank 0), and is removed by the last rank that held it."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import stat
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.text import print_stderr

LOCK = ".lock"
UNIQUE = r"\.\d+-[0-9a-f]+"  # in the name of a draft: the pid, and random digits
OLD = ".old"  # ending of a trace that is set aside while another is put in its place
PATIENCE_S = 0.5  # a process that only checks whether a trace is locked holds the lock for less
HOLDER = re.compile(r"(\d{1,9}) ([\w.-]+) \w+")  # pid, host, random id
# not all are known to systems without flock
OPEN = sum(getattr(os, f"O_{flag}", 0) for flag in ("RDWR", "CLOEXEC", "NONBLOCK", "NOFOLLOW"))
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class Lock(AbstractContextManager["Lock"]):
    """A lock that is held. `file`: the lock file, open and locked. `holder`: pid, host and random
    id of the process (of several ranks: rank 0)."""

    def __init__(self, root: Path, file: int, holder: str):
        self.root, self.holder = Path(os.path.abspath(root)), holder
        self._file: int | None = file
        _HELD.add(self)

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """May be called again."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # a leftover lock file is harmless: it is not locked
                # nobody else may hold the file when it is removed: another process could then lock
                # a new one beside them
                remove_if_free(file, self.root / LOCK)

    def close_in_child(self) -> None:
        """A forked process has the open file too, and would keep the lock after its parent has
        ended."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [lock.close_in_child() for lock in list(_HELD)])


def hold(root: Path, *, shared: bool = False, wait: bool = False) -> Lock:
    """Locks the trace at `root`, a directory that is made where there is none. MoeInspectError
    where another writer holds the lock; with `wait`, waits for it. `shared`: other ranks will
    `join`."""
    holder = f"{os.getpid()} {socket.gethostname()} {uuid.uuid4().hex}"
    file = _locked(root, exclusive=True, wait=wait)
    lock = Lock(root, file, holder)
    try:
        with writing(root):
            os.ftruncate(file, 0)
            os.pwrite(file, holder.encode(errors="replace"), 0)
            if shared and flock(file, exclusive=False) is False:
                raise _refusal(root, _holder_in(file))
    except BaseException:
        lock.release()
        raise
    return lock


def join(root: Path, holder: str) -> Lock:
    """Joins the lock that rank 0 took as `holder`."""
    file = _locked(root, exclusive=False)
    if _holder_in(file) != holder:
        os.close(file)
        raise MoeInspectError(f"another process has begun to write {root}: retry when it is done")
    return Lock(root, file, holder)


def refuse_while_locked(root: Path) -> None:
    """MoeInspectError where a writer, of this or of another machine, holds the lock of the trace at
    `root`."""
    with writing(root):
        locked, holder = _found(root)
    if locked:
        raise _refusal(root, holder)


def is_locked(root: Path) -> bool | None:
    """Whether a writer, of this or of another machine, holds the lock of the trace at `root`; None
    where that cannot be told: there is no lock file, or its file system has no locks."""
    return _found(root)[0]


def _found(root: Path) -> tuple[bool | None, str]:
    """As `is_locked`, and the holder that the lock names."""
    try:
        file = os.open(root / LOCK, OPEN)
    except OSError:  # missing, or it cannot be opened: the writer will report that
        return None, ""
    try:
        got = flock(file, exclusive=True)
        return None if got is None else not got, _holder_in(file)
    finally:
        os.close(file)


def _locked(root: Path, exclusive: bool, wait: bool = False) -> int:
    """The lock file, open and locked."""
    until = time.monotonic() + PATIENCE_S
    while True:
        file = _opened(root)
        try:
            with writing(root):
                got = flock(file, exclusive)
                if got is None:
                    print_stderr(
                        f"warning: the file system of {root} has no locks: make sure that nothing "
                        "else writes there"
                    )
                if got is None or (got and is_at(file, root / LOCK)):
                    return file
                if got is False and not wait and time.monotonic() > until:
                    raise _refusal(root, _holder_in(file))
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        time.sleep(0.01)


def _opened(root: Path) -> int:
    if os.name != "posix":
        said = "traces are written on Linux, macOS and other systems with flock(2), not on this one"
        raise MoeInspectError(said)
    file = None
    while file is None:
        with writing(root):
            settle(root)
            root.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # the directory was removed meanwhile
                file = os.open(root / LOCK, OPEN | os.O_CREAT, 0o666)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise MoeInspectError(f"{root / LOCK} is not a regular file: remove it")


def flock(file: int, exclusive: bool) -> bool | None:
    """Whether the lock was acquired; None if the file system or the system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        # ESTALE: removed on an NFS server
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ESTALE):
            return False
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


def remove_if_free(file: int, path: Path) -> None:
    """Closes the open file, and removes it where it is at `path` and nobody else holds it."""
    try:
        if flock(file, exclusive=True) and is_at(file, path):
            path.unlink()
    finally:
        os.close(file)


def is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: its last holder may have removed it before it was
    locked here."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _holder_in(file: int) -> str:
    return os.pread(file, 500, 0).decode(errors="replace")


def _refusal(root: Path, holder: str) -> MoeInspectError:
    return MoeInspectError(f"{_who(holder)} is still writing {root}: wait for it, or stop it")


def _who(holder: str) -> str:
    found = HOLDER.match(holder)
    if found is None:
        return "another process"
    if found[2] != socket.gethostname():
        return f"process {found[1]} on {found[2]}"
    return "this process" if int(found[1]) == os.getpid() else f"process {found[1]}"


def draft_name(path: Path) -> Path:
    """A name beside `path` that nothing has."""
    # of a long name a part: with what is added it must not become too long
    return path.with_name(f".{path.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def drafts_of(name: str) -> str:
    """A regular expression of the drafts of files whose names match the one that is given."""
    return rf"\.({name}){UNIQUE}\.tmp"


def left_of(path: Path, ending: str = ".tmp") -> Iterator[Path]:
    """Files and folders beside `path` with a name that `draft_name` gave them."""
    name = re.compile(rf"\.{re.escape(path.name[:50])}{UNIQUE}{re.escape(ending)}")
    with suppress(OSError), os.scandir(path.parent) as entries:
        yield from (Path(entry.path) for entry in entries if name.fullmatch(entry.name))


def followed(path: Path) -> Path:
    """Where a link leads to."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def settle(root: Path) -> None:
    """Waits while a trace is being replaced: for a moment there is none at `root`. If the process
    that replaced it was killed in that moment, puts the old one back."""
    root = followed(root)
    until = time.monotonic() + PATIENCE_S
    while not root.exists() and (aside := next(left_of(root, OLD), None)) is not None:
        if is_locked(aside) is False or not (aside / LOCK).exists():
            with suppress(OSError):  # another process has put it back
                os.rename(aside, root)
        if time.monotonic() > until:  # it cannot be told, or not be put back
            return
        time.sleep(0.01)


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with the pid it identifies a process
    uniquely. None without /proc."""
    try:
        return int(_stat(pid)[19])
    except (OSError, ValueError, IndexError):
        return None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat, from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def is_running(pid: int, start: int | None) -> bool:
    """Whether the process with this pid runs that started at `start`; None: unknown. One that has
    ended may never be waited for, as in a container without an init process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists, but belongs to another user
    with suppress(OSError, ValueError, IndexError):
        if _stat(pid)[0] == "Z":
            return False
    now = process_start(pid)
    # another process may have the pid now
    return start is None or now is None or start == now

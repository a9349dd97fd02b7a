"""Files of others, read in bounded memory: a pipe or a device may never end, a file may be of any
size."""

from __future__ import annotations

import mmap
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 2**26  # of a file that is read whole: a manifest, a config, rules
MOST_LINE_BYTES = 2**30  # a response of a million tokens fits
PIECE_BYTES = 2**22  # of a line, while it is not known how long it is


class UnfitFile(OSError, ValueError):
    """A file that is not read, whatever is in it. (Callers handle OSError, and those that parse
    what they read, ValueError.)"""


def why_unread(path: Path, wanted: str = "file or folder") -> str:
    """What to say of a path that is no file, where one is read, nor, if wanted, a folder."""
    if not path.exists():
        return f"no {wanted} {path}"
    return f"{path} is not a regular file" + (" or a directory" if "folder" in wanted else "")


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a file for reading. UnfitFile where it is a pipe or a device."""
    return open(path, "rb", opener=_opened)


def _opened(path: str, flags: int) -> int:
    # without O_NONBLOCK, opening a pipe waits for who writes to it
    file = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UnfitFile("it is not a regular file")
    return file


def read_small(path: str | Path, most_bytes: int = MOST_BYTES) -> bytes:
    """A file that is read whole. UnfitFile where it is no regular file or of more than
    `most_bytes`, before memory is taken for it."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most_bytes:
            raise UnfitFile(f"it has {size:,} bytes, over {most_bytes:,}")
        return file.read()


def mapped(path: str | Path) -> mmap.mmap | bytes:
    """The bytes of a large file, each read when it is looked at."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def next_line(file: BinaryIO) -> bytes | None:
    """The next line, b"" at the end. None where it has MOST_LINE_BYTES, which is found before
    memory is taken for it."""
    line = file.readline(PIECE_BYTES)
    if len(line) < PIECE_BYTES or line.endswith(b"\n"):
        return line
    start, size = file.tell() - len(line), len(line)
    while not line.endswith(b"\n") and (line := file.readline(PIECE_BYTES)):
        if (size := size + len(line)) >= MOST_LINE_BYTES:
            return None
    file.seek(start)
    return file.read(size)

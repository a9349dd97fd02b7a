"""The tensors of a safetensors checkpoint, read piece by piece in numpy: no torch, and no more
memory than a piece, whatever the model.

The format: 8 bytes (the length of the header, little-endian), the header as JSON (name → dtype,
shape, where its bytes are behind the header), the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line

PIECE = 2**20  # values
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows


@dataclass(frozen=True)
class Stored:
    """One tensor: where its bytes begin in its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def readable(self) -> bool:
        """Whether its values are its weights: not quantised."""
        return self.dtype in DTYPES

    def pieces(self, first: int, count: int) -> Iterator[np.ndarray]:
        """The values from number `first` on, `count` of them, at most PIECE at a time: float32 or
        float64. MoeInspectError where the file ends before."""
        kind = np.dtype(DTYPES[self.dtype])
        for start in range(first, first + count, PIECE):
            values = self.read(start, min(PIECE, first + count - start), kind)
            if self.dtype == "BF16":  # the upper half of a float32
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield values if kind.itemsize == 8 else values.astype(np.float32, copy=False)

    def read(self, first: int, count: int, kind: np.dtype[Any]) -> np.ndarray:
        """`count` numbers of this kind, from number `first` of the tensor's bytes on."""
        offset = self.begin + first * kind.itemsize
        values = np.fromfile(self.file, kind, count, offset=offset)
        if len(values) < count:
            raise MoeInspectError(f"{self.file} was cut off while it was read")
        return values

    def whole(self) -> np.ndarray:
        """All of it, float64, in its shape."""
        parts = [piece.astype(float) for piece in self.pieces(0, self.size)]
        return np.concatenate([np.zeros(0), *parts]).reshape(self.shape)


def tensors_in(directory: str | Path) -> dict[str, Stored]:
    """Every tensor of the *.safetensors files of a directory, by name. MoeInspectError where it has
    none, or one is damaged."""
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise MoeInspectError(
            f"no weights in {directory}: it needs *.safetensors files, as save_pretrained writes"
        )
    found = dict[str, Stored]()
    for file in files:
        found |= _header(file)
    return found


def _stored(file: Path, name: str, about: Any, start: int) -> Stored:
    """A tensor by its entry in the header, which ends at byte `start`."""
    begin, end = (start + int(at) for at in about["data_offsets"])
    found = Stored(file, str(about["dtype"]), tuple(int(n) for n in about["shape"]), begin)
    if end > file.stat().st_size:
        raise ValueError(f"it ends before {name} does")
    if found.readable and found.size * np.dtype(DTYPES[found.dtype]).itemsize != end - begin:
        raise ValueError(f"{name} of shape {list(found.shape)} has {end - begin:,} bytes")
    return found


def _header(file: Path) -> dict[str, Stored]:
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header has {length:,} bytes, the file {size:,}")
            listed = cast(dict[str, Any], json.loads(opened.read(length)))
        listed.pop("__metadata__", None)
        return {name: _stored(file, name, about, 8 + length) for name, about in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise MoeInspectError(
            f"{file} is damaged or no safetensors file: {first_line(error)}"
        ) from error

"""The header of a GGUF file, and its F32 tensors: llama.cpp's models and importance matrices,
without reading weights. NumPy alone; sizes in a file are believed only as far as it is long.

The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import open_regular

MAGIC = b"GGUF"
SCALARS = {  # type of a metadata value → struct's letter
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
}
STRING, ARRAY = 8, 9
MOST_DEPTH, MOST_DIMENSIONS = 4, 4
# ggml's types of tensors: name, elements and bytes of a block
_LISTED = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20)},
    **{6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40)},
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144)},
    **{13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98)},
    **{19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110)},
    **{22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2)},
    **{26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56)},
    **{30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
}
PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")  # not quantised
F32 = 0


class TensorType(NamedTuple):
    """ggml's type of a tensor, which is stored in blocks of so many elements and bytes."""

    name: str
    elements: int
    nbytes: int


TYPES = {kind: TensorType(*listed) for kind, listed in _LISTED.items()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place. shape: as in the file, the fastest dimension first. kind: ggml's type.
    start: its first byte, from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes. MoeInspectError where its type is unknown."""
        if self.kind not in TYPES:
            raise MoeInspectError(f"tensor {self.name[:60]!r} is of unknown type {self.kind}")
        kind = TYPES[self.kind]
        return math.prod(self.shape) // kind.elements * kind.nbytes


@dataclass
class Gguf:
    """The header of a file. fields: its metadata, by key."""

    path: Path
    size: int
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    tensors: dict[str, GgufTensor] = field(default_factory=dict[str, GgufTensor])

    def number(self, key: str) -> int:
        """A positive integer of the metadata. MoeInspectError where it is missing or another."""
        value = self.fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise MoeInspectError(f"{self.path}: {key} is {str(value)[:40]!r}, not a number")
        return value

    def floats(self, name: str) -> np.ndarray:
        """An F32 tensor, float32 with the slowest dimension first."""
        tensor = self.tensors[name]
        if tensor.kind != F32:
            raise MoeInspectError(f"{self.path}: {name} is of type {tensor.kind}, not F32")
        if tensor.start + tensor.nbytes > self.size:
            raise MoeInspectError(
                f"{self.path} ends within {name}: it has {self.size:,} bytes, and "
                f"{tensor.start + tensor.nbytes:,} were written"
            )
        if not tensor.nbytes:  # whose other extents may be beyond any array's
            return np.zeros((0,) * len(tensor.shape), np.float32)
        with open(self.path, "rb") as file:
            file.seek(tensor.start)
            data = file.read(tensor.nbytes)
        return np.frombuffer(data, "<f4").reshape(tensor.shape[::-1])


@dataclass
class _Reader:
    """Reads values one after the other."""

    file: BinaryIO
    path: Path
    left: int

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise self._cut()
        self.left -= n
        return self.file.read(n)

    def scalar(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))[0]

    def text(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY and depth < MOST_DEPTH:
            inner, n = self.scalar("I"), self.scalar("Q")
            letter = SCALARS.get(inner)
            if n * (struct.calcsize(letter) if letter else 8) > self.left:
                raise self._cut()
            if letter:
                return np.frombuffer(self.take(n * struct.calcsize(letter)), f"<{letter}")
            return [self.value(inner, depth + 1) for _ in range(n)]
        if kind not in SCALARS:
            raise MoeInspectError(f"{self.path}: type {kind} of a metadata value is unknown")
        return self.scalar(SCALARS[kind])

    def _cut(self) -> MoeInspectError:
        return MoeInspectError(f"{self.path} ends within its header: it is cut, or no GGUF file")


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file, version 2 or 3. MoeInspectError where it is none."""
    made = Gguf(path, path.stat().st_size)
    with open_regular(path) as file:
        reader = _Reader(file, path, made.size)
        if made.size < 24 or (magic := reader.take(4)) != MAGIC:
            said = f"it begins with {magic!r}" if made.size >= 24 else f"{made.size} bytes"
            raise MoeInspectError(f"{path} is not a GGUF file: {said}")
        if (version := reader.scalar("I")) not in (2, 3):
            raise MoeInspectError(f"{path} is GGUF of version {version}: 2 and 3 can be read")
        tensors, values = reader.scalar("Q"), reader.scalar("Q")
        for _ in range(values):
            key = reader.text()
            made.fields[key] = reader.value(reader.scalar("I"))
        placed: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensors):
            name, dimensions = reader.text(), reader.scalar("I")
            if dimensions > MOST_DIMENSIONS:
                raise MoeInspectError(f"{path}: {name[:60]!r} has {dimensions} dimensions")
            shape = tuple(reader.scalar("Q") for _ in range(dimensions))
            placed.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
        alignment = made.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise MoeInspectError(f"{path}: general.alignment is {str(alignment)[:40]!r}")
        base = -(-file.tell() // alignment) * alignment
    for name, shape, kind, offset in placed:
        made.tensors[name] = GgufTensor(name, shape, kind, base + offset)
    return made

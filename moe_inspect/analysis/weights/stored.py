"""The tensors of a safetensors checkpoint, read piece by piece in numpy: no torch, and no more
memory than a piece, whatever the model. Weights that are stored in 8 or 4 bits beside their scales
are read as what they stand for: FP8 (E4M3) as DeepSeek and compressed-tensors write it, MXFP4 as
gpt-oss has it.

The format: 8 bytes (the length of the header, little-endian), the header as JSON (name → dtype,
shape, where its bytes are behind the header), the bytes. R rows, C columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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

    def read(self, first: int, count: int, kind: np.dtype[np.generic]) -> np.ndarray:
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


def _header(file: Path) -> dict[str, Stored]:
    size, found = file.stat().st_size, dict[str, Stored]()
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header has {length:,} bytes, the file {size:,}")
            listed: dict[str, Any] = json.loads(opened.read(length))
        listed.pop("__metadata__", None)
        for name, about in listed.items():
            begin, end = (8 + length + int(at) for at in about["data_offsets"])
            of = Stored(file, str(about["dtype"]), tuple(int(n) for n in about["shape"]), begin)
            if end > size:
                raise ValueError(f"it ends before {name} does")
            if of.readable and of.size * np.dtype(DTYPES[of.dtype]).itemsize != end - begin:
                raise ValueError(f"{name} of shape {list(of.shape)} has {end - begin:,} bytes")
            found[name] = of
        return found
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise MoeInspectError(
            f"{file} is damaged or no safetensors file: {first_line(error)}"
        ) from error


FP8, BLOCKS, SCALES = "F8_E4M3", "_blocks", "_scales"
SCALE_NAMES = ("_scale_inv", "_scale")
BLOCK = 128  # rows and columns of FP8 that have one scale
GROUP = 32  # values of MXFP4 that have one scale
# what each half byte of E2M1 stands for
FP4_VALUES = np.outer([1, -1], [0, 0.5, 1, 1.5, 2, 3, 4, 6]).reshape(-1)


@dataclass(frozen=True)
class Scaled(Stored):
    """Weights in few bits, beside their scales."""

    scale: Stored

    @property
    def readable(self) -> bool:
        return True


class Fp8(Scaled):
    """[R, C], a byte per value. `scale`: one, one per row, or one per block of BLOCK × BLOCK."""

    def pieces(self, first: int, count: int) -> Iterator[np.ndarray]:
        R, C = self.shape
        scale, end, at_once = self.scale.whole(), (first + count) // C, max(1, PIECE // C)
        for start in range(first // C, end, at_once):
            rows = np.arange(start, min(start + at_once, end))
            codes = self.read(start * C, len(rows) * C, np.dtype(np.uint8))
            if scale.shape == _blocks(R, C):
                scale_RC = scale[rows // BLOCK][:, np.arange(C) // BLOCK]
            else:
                scale_RC = scale.reshape(-1, 1)[rows if scale.size == R else [0]]
            yield (_fp8_values()[codes].reshape(-1, C) * scale_RC).reshape(-1)


class Mxfp4(Scaled):
    """[E, R, C], half a byte per value. `scale`: the power of two of each GROUP, biased by 127."""

    def pieces(self, first: int, count: int) -> Iterator[np.ndarray]:
        for start in range(first, first + count, PIECE):
            n = min(PIECE, first + count - start)
            codes = self.read(start // 2, n // 2, np.dtype(np.uint8))
            powers = self.scale.read(start // GROUP, n // GROUP, np.dtype(np.uint8)).astype(int)
            values = FP4_VALUES[np.stack([codes & 15, codes >> 4], 1).reshape(-1, GROUP)]
            yield np.ldexp(values, (powers - 127)[:, None]).reshape(-1)


def with_scales(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors, with those that have scales beside them as what they stand for; the others as
    they are."""
    found, gone = dict(tensors), set[str]()
    for name, tensor in tensors.items():
        if tensor.dtype == FP8 and len(tensor.shape) == 2:
            rows, blocks = tensor.shape[0], _blocks(*tensor.shape)
            beside = next((name + end for end in SCALE_NAMES if name + end in found), "")
            scale = found.get(beside)
            if scale and scale.readable and (scale.size in (1, rows) or scale.shape == blocks):
                found[name] = Fp8(tensor.file, tensor.dtype, tensor.shape, tensor.begin, scale)
                gone |= {name + end for end in SCALE_NAMES}
        elif name.endswith(BLOCKS) and tensor.dtype == "U8" and len(tensor.shape) == 4:
            bare, (*outer, half) = name.removesuffix(BLOCKS), tensor.shape
            scale = tensors.get(bare + SCALES)
            if scale is not None and scale.shape == (*outer,) and half == GROUP // 2:
                E, R, groups = outer
                del found[name], found[bare + SCALES]
                shape = E, R, groups * GROUP
                found[bare] = Mxfp4(tensor.file, "MXFP4", shape, tensor.begin, scale)
    return {name: tensor for name, tensor in found.items() if name not in gone}


def _blocks(R: int, C: int) -> tuple[int, int]:
    return -(-R // BLOCK), -(-C // BLOCK)


@cache
def _fp8_values() -> np.ndarray:
    """What each byte of E4M3 stands for: 1 bit of sign, 4 of exponent, 3 of mantissa. float64
    [256]"""
    code = np.arange(256)
    power, fraction = (code >> 3) & 15, code & 7
    size = np.where(power > 0, np.ldexp(1 + fraction / 8, power - 7), np.ldexp(fraction / 8, -6))
    size[(code & 127) == 127] = np.nan
    return np.where(code < 128, size, -size)

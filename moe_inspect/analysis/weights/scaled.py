"""Weights that are stored in 8 or 4 bits beside their scales: FP8 (E4M3) as DeepSeek and
compressed-tensors write it, MXFP4 as gpt-oss has it. Read as what they stand for.

R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from moe_inspect.analysis.weights.stored import PIECE, Stored

FP8, BLOCKS, SCALES = "F8_E4M3", "_blocks", "_scales"
SCALE_NAMES = ("_scale_inv", "_scale")
BLOCK = 128  # rows and columns of FP8 that have one scale
GROUP = 32  # values of MXFP4 that have one scale


@dataclass(frozen=True)
class Fp8(Stored):
    """[R, C], a byte per value. `scale`: one, one per row, or one per block of BLOCK × BLOCK."""

    scale: Stored

    @property
    def readable(self) -> bool:
        return True

    def pieces(self, first: int, count: int) -> Iterator[np.ndarray]:
        R, C = self.shape
        scale = self.scale.whole()
        by_block = self.scale.shape == _blocks(R, C)
        by_row = not by_block and scale.size == R
        at_once = max(1, PIECE // C)
        for start in range(first // C, (first + count) // C, at_once):
            rows = np.arange(start, min(start + at_once, (first + count) // C))
            codes = self.read(start * C, len(rows) * C, np.dtype(np.uint8))
            if by_block:
                scale_RC = scale[rows // BLOCK][:, np.arange(C) // BLOCK]
            else:
                scale_RC = scale.reshape(-1)[rows][:, None] if by_row else scale.reshape(1, 1)
            yield (_fp8_values()[codes].reshape(-1, C) * scale_RC).reshape(-1)


@dataclass(frozen=True)
class Mxfp4(Stored):
    """[E, R, C], half a byte per value. `scale`: the power of two of each GROUP, biased by 127."""

    scale: Stored

    @property
    def readable(self) -> bool:
        return True

    def pieces(self, first: int, count: int) -> Iterator[np.ndarray]:
        for start in range(first, first + count, PIECE):
            n = min(PIECE, first + count - start)
            codes = self.read(start // 2, n // 2, np.dtype(np.uint8))
            powers = self.scale.read(start // GROUP, n // GROUP, np.dtype(np.uint8)).astype(int)
            values = _fp4_values()[np.stack([codes & 15, codes >> 4], 1).reshape(-1, GROUP)]
            yield np.ldexp(values, (powers - 127)[:, None]).reshape(-1)


def with_scales(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors, with those that have scales beside them as what they stand for; the others as
    they are."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == FP8 and len(tensor.shape) == 2:
            beside = (found.get(name + ending) for ending in SCALE_NAMES)
            scale = next((s for s in beside if s is not None), None)
            if scale is not None and scale.readable and _fits(tensor, scale):
                place = tensor.file, tensor.dtype, tensor.shape, tensor.begin
                found[name] = Fp8(*place, scale)
        elif name.endswith(BLOCKS) and tensor.dtype == "U8" and len(tensor.shape) == 4:
            bare, (*outer, half) = name.removesuffix(BLOCKS), tensor.shape
            scale = tensors.get(bare + SCALES)
            if scale is not None and scale.shape == (*outer,) and half == GROUP // 2:
                E, R, groups = outer
                del found[name], found[bare + SCALES]
                shape = E, R, groups * GROUP
                found[bare] = Mxfp4(tensor.file, "MXFP4", shape, tensor.begin, scale)
    return {
        name: tensor
        for name, tensor in found.items()
        if not any(
            name.endswith(e) and isinstance(found.get(name.removesuffix(e)), Fp8)
            for e in SCALE_NAMES
        )
    }


def _fits(tensor: Stored, scale: Stored) -> bool:
    R, C = tensor.shape
    return scale.size in (1, R) or scale.shape == _blocks(R, C)


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


@cache
def _fp4_values() -> np.ndarray:
    """What each half byte of E2M1 stands for. float64 [16]"""
    size = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return np.concatenate([size, -size])

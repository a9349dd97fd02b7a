"""The routed experts that vLLM and SGLang return with a response: decoding and checks.

T tokens, B blocks of the model (dense ones too), L routers, K slots, E experts.
"""

from __future__ import annotations

import ast
import binascii
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations, takewhile
from pathlib import Path
from typing import Literal

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import mapped, open_regular
from moe_inspect.importers.batches import NO_ID
from moe_inspect.importers.values import check_range
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router

NPY_MAGIC = b"\x93NUMPY"
MOST_TOKENS = 2**24  # of one response
DENSE_HINT = "; a dense layer or padding reads so: give the model's config by --model or --config"
HEAD_BYTES, MOST_NPY_BYTES = 4096, 2**33


def decode_vllm(text: object, where: str) -> np.ndarray:
    """`routed_experts` of a vLLM response, the base64 of a `.npy`: uint8 or uint16 [T, B, K].
    `where` opens every error."""
    return decisions_of_npy(_unbase64(text, where), where)


def decode_sglang(text: object, blocks: int, top_k: int, where: str) -> np.ndarray:
    """`meta_info.routed_experts` of an SGLang response, the base64 of raw int32 without a header:
    int32 [T, B, K]."""
    data = _unbase64(text, where)
    if len(data) % (4 * blocks * top_k):
        raise MoeInspectError(
            f"{where} is {len(data):,} bytes: no whole number of tokens of {blocks} layers × "
            f"{top_k} experts × 4 bytes; is it the config of this model?"
        )
    return np.frombuffer(data, "<i4").reshape(-1, blocks, top_k)


def decode_tensorrt(text: object, where: str, layers: Sequence[int], blocks: int) -> np.ndarray:
    """`routed_experts` of TensorRT-LLM, the base64 of a `.npy` with the layers with experts alone,
    which are `layers` of the model's `blocks`: [T, B, K], −1 in dense blocks."""
    routed_TLK = decode_vllm(text, where)
    T, L, K = routed_TLK.shape
    if len(layers) != L:
        why = f"the model's config {len(layers)}: is it the config of this model?"
        raise MoeInspectError(f"{where} has {L} layers with experts, {why}")
    routed_TBK = np.full((T, blocks, K), -1, np.promote_types(routed_TLK.dtype, np.int8))
    routed_TBK[:, layers] = routed_TLK
    return routed_TBK


def decisions_of_npy(data: bytes | Path, where: str) -> np.ndarray:
    """A `.npy` of integers [T, B, K]; a file is mapped."""
    npy = Npy(data, where)
    shape = npy.shape
    if len(shape) != 3 or 0 in shape[1:]:
        raise MoeInspectError(f"{where} has shape {shape}, not [tokens, layers, experts per token]")
    if npy.declared != npy.held:
        why = f"{npy.declared:,} bytes, and holds {npy.held:,}"
        raise MoeInspectError(f"{where} declares {shape} of {npy.dtype}, {why}")
    if shape[0] > MOST_TOKENS or npy.size > MOST_NPY_BYTES:
        why = f"more than any response ({MOST_TOKENS:,}, {MOST_NPY_BYTES:,})"
        raise MoeInspectError(f"{where} has {shape[0]:,} tokens in {npy.size:,} bytes, {why}")
    return npy.array()


def ids_of_npy_file(path: Path) -> np.ndarray:
    """A `.npy` file of token ids, integers [T]."""
    npy = Npy(path, str(path))
    if len(npy.shape) != 1 or npy.declared != npy.held:
        why = f"it declares {npy.shape} of {npy.dtype} and holds {npy.held:,} bytes"
        raise MoeInspectError(f"{path} is not a list of token ids: {why}")
    ids_T = npy.array()
    check_range(ids_T, str(path), NO_ID, 2**31 - 1)
    return ids_T


class Npy:
    """A `.npy` of integers of at most 64 bits, in memory or a file. What its header declares,
    `declared` bytes, must be compared with what it holds, `held`, before the array is made: then a
    file is mapped."""

    def __init__(self, data: bytes | Path, where: str):
        self.data = data
        if isinstance(data, bytes):
            head, self.size = data[:HEAD_BYTES], len(data)
        else:
            with open_regular(data) as file:
                head, self.size = file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size
        version = head[6:8]
        if head[:6] != NPY_MAGIC or version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
            raise MoeInspectError(f"{where} is not a .npy file: it begins with {head[:8]!r}")
        begin = 10 if version == b"\x01\x00" else 12
        self.start = begin + int.from_bytes(head[8:begin], "little")
        # only headers as NumPy writes them, not all that Python's grammar allows
        found = re.fullmatch(
            rb"\{'descr': '([<|>=]?[iub]\d)', 'fortran_order': (False|True), 'shape': (\([\d, "
            rb"]{0,80}\)), \}\s*",
            head[begin : self.start],
        )
        why = f"{where} is not a .npy file of integers: its header is "
        if found is None or len(head) < self.start:
            raise MoeInspectError(f"{why}{head[begin : min(self.start, 140)]!r}")
        try:
            self.dtype, shape = np.dtype(found[1].decode()), ast.literal_eval(found[3].decode())
        except (TypeError, ValueError, SyntaxError):
            self.dtype, shape = np.dtype(object), None
        if not isinstance(shape, tuple) or self.dtype.kind not in "iu":
            raise MoeInspectError(f"{why}{found[0][:120]!r}")
        self.shape: tuple[int, ...] = shape
        self.order: Literal["F", "C"] = "F" if found[2] == b"True" else "C"
        # in Python's integers: a hostile shape overflows NumPy's
        self.declared = math.prod(self.shape, start=self.dtype.itemsize)
        self.held = self.size - self.start

    def array(self) -> np.ndarray:
        data = self.data if isinstance(self.data, bytes) else mapped(self.data)
        flat = np.frombuffer(data, self.dtype, offset=self.start)
        return flat.reshape(self.shape, order=self.order)


def select_routers(
    routed_TBK: np.ndarray, routers: Sequence[Router], blocks: int | None, where: str
) -> list[np.ndarray]:
    """The decisions of each router, ids [T, K] of uint8 or uint16, checked: dense blocks, which
    read as "expert 0", are left out.

    `blocks`: how many the model has, where that is known. K may be larger than a router's own top-k
    only by slots of −1."""
    T, B, K = routed_TBK.shape
    if blocks is not None and blocks != B:
        raise MoeInspectError(
            f"{where} has {B} layers, the model's config {blocks}: is it the config of this model?"
        )
    if T > MOST_TOKENS:
        raise MoeInspectError(f"{where} has {T:,} tokens, more than any response ({MOST_TOKENS:,})")
    if (widest := max(r.top_k for r in routers)) > K:
        why = f"the model's config {widest}: is it the config of this model?"
        raise MoeInspectError(f"{where} has {K} experts per token, {why}")
    if len({(r.experts, r.top_k) for r in routers}) == 1:
        every_LTK = np.stack([routed_TBK[:, r.layer] for r in routers])
        with suppress(MoeInspectError):  # which the first wrong layer names, below
            checked = checked_ids(every_LTK.reshape(-1, K), routers[0], where)
            return [*checked.reshape(len(routers), T, checked.shape[1])]
    return [checked_ids(routed_TBK[:, r.layer], r, f"{where}, layer {r.layer}") for r in routers]


def checked_ids(ids_TK: np.ndarray, router: Router, where: str) -> np.ndarray:
    """ids of one router as the writer takes them (uint8, from 256 experts on uint16; its maximum
    where a slot routed nowhere, which is −1 here), contiguous. MoeInspectError names the first
    token with an id beyond E, or twice the same expert."""
    E, k = router.experts, router.top_k
    if ids_TK.shape[1] > k:
        if (ids_TK[:, k:] != -1).any():
            raise MoeInspectError(f"{where} chooses {ids_TK.shape[1]} experts per token, not {k}")
        ids_TK = ids_TK[:, :k]
    dtype = np.uint8 if E < 256 else np.uint16  # 256 experts leave uint8 no value for "nowhere"
    if not ids_TK.size:
        return np.zeros(ids_TK.shape, dtype)
    low, high = int(ids_TK.min()), int(ids_TK.max())
    if low < -1 or high >= E:
        t, j = (int(i[0]) for i in np.nonzero((ids_TK < -1) | (ids_TK >= E)))
        raise MoeInspectError(f"{where}: token {t} goes to expert {int(ids_TK[t, j])} of {E}")
    ids = ids_TK.astype(dtype, order="C")  # −1 becomes the maximum
    if k > 1 and (twice_T := repeats(ids_TK)).any():
        t = int(twice_T.argmax())
        raise MoeInspectError(
            f"{where}: token {t} goes to one expert twice ({ids_TK[t].tolist()})"
            + DENSE_HINT * (not ids_TK[t].any())
        )
    return ids


def repeats(ids_TK: np.ndarray) -> np.ndarray:
    """bool [T]: whether a decision has an expert twice; slots of −1 are ignored."""
    return repeated([np.ascontiguousarray(ids_TK[:, j]) for j in range(ids_TK.shape[1])])


def repeated(slots: Sequence[np.ndarray]) -> np.ndarray:
    """The same of an array per slot, of its shape."""
    if len(slots) <= 12:  # pairs of columns beat sorting so few
        twice = np.zeros(slots[0].shape, bool)
        for first, second in combinations(slots, 2):
            twice |= first == second
        if not (twice.any() and slots[0].dtype.kind == "i" and any((x < 0).any() for x in slots)):
            return twice
    in_order = np.sort(np.stack(slots, axis=-1))
    return ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] != -1)).any(-1)


def dense_blocks(routed_TBK: np.ndarray) -> list[int]:
    """Blocks in which every token has the same id in all slots, as in a buffer that was never
    written."""
    same_B = (routed_TBK == routed_TBK[:1, :, :1]).all((0, 2))
    return np.flatnonzero(same_B).tolist() if len(routed_TBK) else []


def unrouted_ends(routed_TBK: np.ndarray) -> tuple[int, int]:
    """How many rows at the beginning and at the end hold 0, or hold −1, in every slot of every
    block: padding. With several experts per token no router writes zeros in all slots; with one, a
    row of zeros may also be a token that went to expert 0 in every block."""

    def run(rows_TBK: np.ndarray) -> int:
        empty = (int(row.flat[0]) in (0, -1) and (row == row.flat[0]).all() for row in rows_TBK)
        return sum(1 for _ in takewhile(bool, empty))

    end = run(routed_TBK[::-1])
    return (run(routed_TBK) if end < len(routed_TBK) else 0), end


def recorded_runs(routed_TBK: np.ndarray) -> list[slice]:
    """The runs of consecutive tokens without those of which every slot of every block is −1."""
    T = len(routed_TBK)
    if routed_TBK.dtype.kind == "u" or (known_T := (routed_TBK != -1).any((1, 2))).all():
        return [slice(0, T)]
    edges = np.flatnonzero(np.diff(known_T, prepend=False, append=False))
    return [slice(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _unbase64(text: object, where: str) -> bytes:
    if not isinstance(text, str):
        why = "not the base64 of an array: did the server return routed experts?"
        raise MoeInspectError(f"{where} is {type(text).__name__}, {why}")
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise MoeInspectError(f"{where} is not base64: {first_line(error)}") from None

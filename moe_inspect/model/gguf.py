"""GGUF models: header and F32 tensors, read by NumPy alone (sizes in a file are believed only as
far as it is long); the sizes of their experts; their configs.

The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import open_regular, why_unread
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS
from moe_inspect.model.families import Config
from moe_inspect.trace.schema import Router

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAGIC = b"GGUF"
SCALARS = {  # type of a metadata value → struct's letter
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
}
STRING, ARRAY = 8, 9
MOST_DEPTH, MOST_DIMENSIONS = 4, 4
F32 = 0  # ggml's type of a tensor


def need_gguf(path: Path) -> None:
    """Raise MoeInspectError if the package gguf is missing."""
    if find_spec("gguf") is None:
        raise MoeInspectError(f"{path} needs gguf: pip install 'moe-inspect[gguf]'")


@dataclass(frozen=True)
class GgufTensor:
    """shape: the fastest dimension first. kind: ggml's type. start: its first byte."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes; of quantised types by the package gguf. Raises MoeInspectError if its
        type is unknown."""
        if self.kind == F32:
            return 4 * math.prod(self.shape)
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        except (KeyError, ValueError):
            message = f"tensor {self.name[:60]!r} is of unknown type {self.kind}"
            raise MoeInspectError(message) from None
        return math.prod(self.shape) // elements * nbytes


@dataclass
class Gguf:
    """The header of a file. fields: its metadata, by key."""

    path: Path
    size: int
    fields: Config = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)

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
        if (end := tensor.start + tensor.nbytes) > self.size:
            sizes = f"{self.size:,} bytes, and {end:,} were written"
            raise MoeInspectError(f"{self.path} ends within {name}: it has {sizes}")
        if not tensor.nbytes:  # whose other extents may be beyond any array's
            return np.zeros((0,) * len(tensor.shape), np.float32)
        values = np.fromfile(self.path, "<f4", tensor.nbytes // 4, offset=tensor.start)
        return values.reshape(tensor.shape[::-1])


@dataclass
class _Reader:
    """Reads values one after the other."""

    file: BinaryIO
    path: Path
    left: int

    def take(self, n: int) -> bytes:
        self.refuse_beyond(n)
        self.left -= n
        return self.file.read(n)

    def refuse_beyond(self, n: int) -> None:
        if n > self.left:
            raise MoeInspectError(f"{self.path} ends within its header: it is cut, or no GGUF file")

    def scalar(self, letter: str) -> int:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))[0]

    def text(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> object:
        if kind == STRING:
            return self.text()
        if kind == ARRAY and depth < MOST_DEPTH:
            inner, n = self.scalar("I"), self.scalar("Q")
            if letter := SCALARS.get(inner):
                return np.frombuffer(self.take(n * struct.calcsize(letter)), f"<{letter}")
            self.refuse_beyond(n * 8)
            return [self.value(inner, depth + 1) for _ in range(n)]
        if kind not in SCALARS:
            raise MoeInspectError(f"{self.path}: type {kind} of a metadata value is unknown")
        return self.scalar(SCALARS[kind])


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file, version 2 or 3. MoeInspectError where it is none."""
    made, places = Gguf(path, path.stat().st_size), list[tuple[str, tuple[int, ...], int, int]]()
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
        for _ in range(tensors):
            name, dimensions = reader.text(), reader.scalar("I")
            if dimensions > MOST_DIMENSIONS:
                raise MoeInspectError(f"{path}: {name[:60]!r} has {dimensions} dimensions")
            shape = tuple(reader.scalar("Q") for _ in range(dimensions))
            places.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
        alignment = made.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise MoeInspectError(f"{path}: general.alignment is {str(alignment)[:40]!r}")
        base = -(-file.tell() // alignment) * alignment
    for name, shape, kind, offset in places:
        made.tensors[name] = GgufTensor(name, shape, kind, base + offset)
    return made


EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(?:gate_up|gate|up|down)_exps\.(?:weight|bias)")
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def layer_experts(path: Path) -> dict[int, tuple[int, int]]:
    """Layer → how many routed experts it has, and the bytes of one, as quantised, by the tensors
    `blk.N.ffn_…_exps` of a file, or of all of a model that is split (NAME-00001-of-00003.gguf)."""
    parts = [path]
    if split := SPLIT.fullmatch(path.name):
        numbers = range(1, int(split[3]) + 1)
        parts = [path.with_name(f"{split[1]}-{n:05}-of-{split[3]}.gguf") for n in numbers]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise MoeInspectError(f"{path} is one of {len(parts)} files of a model: no {missing[0]}")
    need_gguf(path)
    found: dict[int, tuple[int, int]] = {}
    for part in parts:
        for tensor in read_gguf(part).tensors.values():
            if (match := EXPERT_TENSOR.fullmatch(tensor.name)) is None:
                continue
            layer, E = int(match[1]), tensor.shape[-1] if tensor.shape else 0
            if not 1 <= E <= MOST_EXPERTS or layer >= MOST_LAYERS:
                raise MoeInspectError(f"{part}: {tensor.name} is of {E} experts")
            before, nbytes = found.get(layer, (E, 0))
            if before != E:
                said = f"{part}: {tensor.name} is of {E} experts"
                raise MoeInspectError(f"{said}, another tensor of its layer of {before}")
            found[layer] = E, nbytes + tensor.nbytes // E
    if not found:
        raise MoeInspectError(f"{path} has no tensors of experts (blk.N.ffn_…_exps)")
    return found


def expert_mb_of(path: Path, routers: dict[int, Router]) -> dict[int, float]:
    """Router → 10^6 bytes of one expert. MoeInspectError where the file has other experts."""
    if not path.is_file():
        raise MoeInspectError(why_unread(path, "file"))
    found = layer_experts(path)
    for r, router in routers.items():
        there, _ = found.get(router.layer, (0, 0))
        if there != router.experts:
            raise MoeInspectError(
                f"{path} has {there} experts in layer {router.layer}, the trace {router.experts} "
                f"(router {r}): is it the traced model?"
            )
    return {r: found[router.layer][1] / 1e6 for r, router in routers.items()}


# mixtures of experts whose config transformers reads from GGUF; of gpt-oss transformers 5.24 finds
# no experts
ARCHITECTURES = ("qwen2moe", "qwen3moe", "minimax-m2")
# what transformers leaves at its default → the key of the metadata
SIZES = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def refuse_unless_described(path: Path) -> Gguf:
    """The header of a model. MoeInspectError if transformers cannot read its config."""
    if not path.is_file():
        raise MoeInspectError(why_unread(path, "file"))
    header = read_gguf(path)
    kind = str(header.fields.get("general.architecture"))[:40]
    if kind not in ARCHITECTURES:
        raise MoeInspectError(
            f"{path} is of architecture {kind}, whose config cannot be read from GGUF: only that "
            f"of {', '.join(ARCHITECTURES)} can; give the original model"
        )
    need_gguf(path)
    return header


def config_of(path: Path) -> PreTrainedConfig:
    """The config of a model, with the sizes of experts that the file states."""
    from transformers import AutoConfig

    fields = refuse_unless_described(path).fields
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    for name, key in SIZES.items():
        stated = fields.get(f"{fields['general.architecture']}.{key}")
        if isinstance(stated, int) and hasattr(config, name):
            setattr(config, name, stated)
    return config

"""Reads a `.pt` of SGLang's recorder safely: only tensors and plain values are unpickled, and sizes
are checked before anything is allocated.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.context import ImportSource
from moe_inspect.text import first_line

NEEDS_TORCH = "SGLang's .pt files need torch: pip install 'moe-inspect[trace]'"
File = tuple[Path, ImportSource, dict[str, Any]]


def load(path: Path) -> dict[str, Any]:
    """Loads a `.pt` with `weights_only` and memory-mapped tensors. First on the meta device: the
    file must be as large as the declared shapes."""
    try:
        import torch
    except ImportError:
        raise MoeInspectError(NEEDS_TORCH) from None
    try:
        _check_archive(path)
        shapes: Any = torch.load(path, map_location="meta", weights_only=True)
        held = _tensor_bytes(shapes)
        if held > path.stat().st_size:
            raise ValueError(
                f"it declares {held:,} bytes of tensors, the file has {path.stat().st_size:,}"
            )
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises anything for a hostile file
        raise MoeInspectError(
            f"{path} cannot be read safely as a .pt file: {first_line(error)[:160]}"
        ) from None
    if not isinstance(content, dict):
        raise MoeInspectError(
            f"{path} holds a {type(content).__name__}, not the dict that SGLang writes"
        )
    return content


def _check_archive(path: Path) -> None:
    """Checks what torch does not: it allocates the sizes that the archive declares before reading,
    and divides by the alignment."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise ValueError(
                    f"{entry.filename} is compressed, or declared larger than the file"
                )
            if (
                entry.filename.endswith("/.storage_alignment")
                and not (alignment := archive.read(entry)).strip(b"0").isdigit()
            ):
                raise ValueError(f"{entry.filename} is {alignment[:20]!r}")


def _tensor_bytes(value: Any) -> int:
    """The declared size of all tensors in nested dicts and lists, in bytes. A list may contain
    itself."""
    total, left, seen = 0, [value], set()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += [v for v in one if not isinstance(v, (int, float, str))]
        elif hasattr(one, "element_size"):
            if one.numel() and not one.is_contiguous():
                raise ValueError(
                    f"a tensor of shape {list(one.shape)} and strides {list(one.stride())}"
                )
            total += one.numel() * one.element_size()
    return total


def array_of(
    value: Any, where: str, shape: Sequence[int | None], low: int, high: int
) -> np.ndarray:
    """An integer tensor of that shape (None: any), mapped."""
    found = list(getattr(value, "shape", ()))
    if (
        not hasattr(value, "numpy")
        or len(found) != len(shape)
        or any(w not in (None, f) for w, f in zip(shape, found, strict=False))
    ):
        raise MoeInspectError(
            f"{where} is {type(value).__name__} {found}, not a tensor "
            f"{[w if w is not None else 'any' for w in shape]}"
        )
    if (
        value.is_floating_point()
        or value.is_complex()
        or value.dtype.itemsize > 8
        or str(value.dtype) == "torch.bool"
        or value.is_quantized
    ):
        raise MoeInspectError(f"{where} is of {value.dtype}, not of integers")
    array = value.numpy()
    if array.size and not low <= int(array.min()) <= int(array.max()) <= high:
        raise MoeInspectError(
            f"{where} holds {int(array.min())} to {int(array.max())}, not of {low} to {high:,}"
        )
    return array


def records(files: list[File]) -> Iterator[tuple[str, Path, ImportSource, dict[str, Any]]]:
    for path, source, content in files:
        for n, record in enumerate(content["records"]):
            yield f"{path}: record {n}", path, source, record

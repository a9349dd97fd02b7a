"""What SGLang's recorder wrote, read safely: only tensors and plain values of a .pt are unpickled,
and sizes are checked before anything is allocated. Modes stat, stat_approx and per_pass: counts.
Physical experts are mapped to logical ones.

B blocks of the model, P physical experts, E logical experts, W windows, S steps."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import batches
from moe_inspect.importers.context import ImportContext, Imported, ImportSource, named
from moe_inspect.importers.values import integer
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router

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
    fields: dict[str, Any],
    name: str,
    where: object,
    shape: Sequence[int | None],
    low: int,
    high: int,
) -> np.ndarray:
    """A field that is an integer tensor of that shape (None: any), mapped."""
    value: Any = fields.get(name)
    where = f"{where}: {name}"
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


def _imported(
    context: ImportContext,
    load_WBE: np.ndarray,
    where: Path,
    domain: str,
    notes: list[str],
) -> Imported:
    routers = _routing_layers(context, load_WBE.sum(0), where)
    load_WLE = load_WBE[:, [router.layer for router in routers]]
    windows = batches.batches_of_windows(load_WLE, routers, domain)
    return Imported(routers, windows, counts_only=True, notes=notes)


def _routing_layers(context: ImportContext, load_BE: np.ndarray, where: Path) -> list[Router]:
    """The routers of a counts dump: the config's, or every layer that has counts."""
    top_k = context.known_top_k(where)
    B, E = load_BE.shape
    if not 1 <= B <= MOST_LAYERS or not 1 <= E <= MOST_EXPERTS:
        raise MoeInspectError(f"{where} has {B} layers of {E} experts, which is not possible")
    if context.facts is None:
        layers = np.nonzero(load_BE.any(1))[0]
        if 0 < len(layers) < B:
            without = sorted(set(range(B)) - {int(i) for i in layers})
            context.warn(
                f"{where}: no counts in {len(without)} of {B} layers, {without[0]} the first: "
                "assumed to be dense; give --model or --config to be sure"
            )
        return context.routers_of([int(i) for i in layers], E, top_k, where)
    if context.facts.layers != B:
        raise MoeInspectError(
            f"{where} has {B} layers, {context.facts.id} {context.facts.layers}: is the config "
            "the model's?"
        )
    for layer in np.nonzero(load_BE.any(1))[0]:
        if int(layer) not in context.facts.experts:
            raise MoeInspectError(
                f"{where}: layer {layer} has counts and no experts in {context.facts.id}: is the "
                "config the model's?"
            )
    return context.routers_of(context.facts.experts, E, top_k, where)


def stat(context: ImportContext, files: list[File]) -> Imported:
    """`logical_count` [S, B, E], already summed over ranks; a row of zeros was never written. The
    rows are a ring: where the last one is filled, later passes may have overwritten earlier ones,
    and the order of the rows is not that of the passes."""
    path, source, content = files[0]
    if len(files) > 1:
        raise MoeInspectError(
            f"{files[1][0]}: a stat dump holds the sum over all ranks: import one"
        )
    count_SBE = array_of(content, "logical_count", path, (None, None, None), 0, batches.MOST_COUNT)
    # so many layers and experts as one likes, of which the file need hold none
    if not count_SBE.size:
        raise MoeInspectError(f"{path}: logical_count is {list(count_SBE.shape)}: no counts")
    last = int(np.nonzero(count_SBE.any((1, 2)))[0].max(initial=0))
    wrapped = 0 < last == len(count_SBE) - 1
    window_S = batches.windows_of(last + 1, 1 if wrapped else batches.WINDOWS)
    load_WBE = np.zeros((int(window_S.max()) + 1, *count_SBE.shape[1:]), np.int64)
    for s, w in enumerate(window_S):
        load_WBE[w] += count_SBE[s]
    context.read(path.stat().st_size)
    rate = content.get("average_utilization_rate_over_window")
    notes = [f"average_utilization_rate_over_window {rate}"] if isinstance(rate, float) else []
    imported = _imported(context, load_WBE, path, source.domain or named(path), notes)
    if wrapped:
        context.warn(
            f"{path}: all {len(count_SBE):,} rows of logical_count are filled. The recorder "
            "keeps that many passes "
            "(--expert-distribution-recorder-buffer-size) and overwrites the oldest: earlier "
            "passes may be lost, and the order of the rows "
            "is not read as time"
        )
        imported.notes.append(
            "logical_count is full: earlier passes may be lost; the order of its rows is not "
            "that of the passes, so it is one window"
        )
    return imported


def logical_maps(context: ImportContext, files: list[File]) -> dict[Path, np.ndarray]:
    """The logical expert of each physical one by file, all of one shape."""
    experts = context.known_experts("") if context.facts or context.experts else None
    maps = {path: _logical_experts(path, content, experts) for path, _, content in files}
    first, shape = next((path, list(map_BP.shape)) for path, map_BP in maps.items())
    for path, map_BP in maps.items():
        if list(map_BP.shape) != shape:
            raise MoeInspectError(
                f"{path}: last_physical_to_logical_map is {list(map_BP.shape)}, {shape} in {first}"
            )
    return maps


def _logical_experts(path: Path, content: dict[str, Any], experts: int | None) -> np.ndarray:
    """int64 [B, P]: the logical expert of each physical one. Every logical expert occurs, so that
    the number of experts is known."""
    name, shape = "last_physical_to_logical_map", (None, None)
    where = f"{path}: {name}"
    map_BP = array_of(content, name, path, shape, 0, MOST_EXPERTS - 1).astype(np.int64)
    B, P = map_BP.shape
    if not 1 <= B <= MOST_LAYERS or not 1 <= P <= MOST_EXPERTS:
        raise MoeInspectError(f"{where} is of {B} layers and {P} physical experts")
    E = int(map_BP.max()) + 1
    if experts is not None and experts != E:
        raise MoeInspectError(
            f"{where} names {E} experts, the config {experts}: is it the config of this model?"
        )
    for layer, map_P in enumerate(map_BP):
        if len(missing := set(range(E)) - {int(e) for e in map_P}):
            raise MoeInspectError(f"{where}: layer {layer} has no replica of expert {min(missing)}")
    return map_BP


def per_pass(context: ImportContext, files: list[File]) -> Imported:
    """Counts of physical experts: one record per pass and rank, which holds that rank's share.
    Summed over ranks."""
    maps = logical_maps(context, files)
    passes = sorted(
        {
            integer(r.get("forward_pass_id"), f"{where}: forward_pass_id", 0, 2**62)
            for where, _, _, r in records(files)
        }
    )
    window_of = dict(zip(passes, batches.windows_of(len(passes)), strict=True))
    path, source, _ = files[0]
    B, P = maps[path].shape
    E = int(maps[path].max()) + 1
    load_WBE = np.zeros((max(window_of.values()) + 1, B, E), np.int64)
    physical_BP = np.zeros((B, P), np.int64)
    seen: set[tuple[int, bytes]] = set()
    alike = 0
    for where, path, _, record in records(files):
        count_BP = array_of(record, "global_physical_count", where, (B, P), 0, batches.MOST_COUNT)
        key = (
            record["forward_pass_id"],
            blake2b(
                count_BP.tobytes() + str(record.get("gatherer_key")).encode(), digest_size=16
            ).digest(),
        )
        if count_BP.any() and key in seen:
            alike += 1
            continue
        seen.add(key)
        physical_BP += count_BP
        np.add.at(
            load_WBE[window_of[record["forward_pass_id"]]],
            (np.broadcast_to(np.arange(B)[:, None], (B, P)), maps[path]),
            count_BP,
        )
    if alike:
        context.warn(
            f"{alike:,} records repeat one of another rank (tensor parallelism): each is "
            "counted once"
        )
    if block := batches.one_ranks_experts(physical_BP):
        context.warn(
            f"{files[0][0]} counts only physical experts {block[0]}-{block[1]} of {P}: one "
            "rank's own? give the files of all ranks"
        )
    context.read(sum(p.stat().st_size for p, _, _ in files))
    return _imported(context, load_WBE, path, source.domain or named(files[0][0]), [])

"""SGLang's expert distribution recorder, whose `.pt` files are read safely: only tensors and plain
values are unpickled, and sizes are checked before anything is allocated. Modes stat, stat_approx
and per_pass: counts; per_token: decisions. Physical experts are mapped to logical ones.

T tokens, K slots, B blocks of the model, P physical experts, E logical experts, W windows, S steps.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import batches
from moe_inspect.importers.context import ImportContext, Imported, ImportSource, importer, named
from moe_inspect.importers.routed import MOST_TOKENS, checked_ids, dense_blocks
from moe_inspect.importers.values import Fields, check_range, check_shape, integer, integers
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS, ModelFacts
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

NEEDS_TORCH = "SGLang's .pt files need torch: pip install 'moe-inspect[trace]'"
File = tuple[Path, ImportSource, Fields]
Record = tuple[str, Path, ImportSource, Fields]  # where it stands, its file, what it holds


def load(path: Path) -> Fields:
    """Loads a `.pt` with `weights_only` and memory-mapped tensors. First on the meta device: the
    file must be as large as the declared shapes."""
    try:
        import torch
    except ImportError:
        raise MoeInspectError(NEEDS_TORCH) from None
    try:
        _check_archive(path)
        held = _tensor_bytes(torch.load(path, map_location="meta", weights_only=True))
        if held > path.stat().st_size:
            raise ValueError(
                f"it declares {held:,} bytes of tensors, the file has {path.stat().st_size:,}"
            )
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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
    fields: Fields, name: str, where: object, shape: Sequence[int | None], low: int, high: int
) -> np.ndarray:
    """A field that is an integer tensor of that shape (None: any), mapped."""
    value: Any = fields.get(name)
    where = f"{where}: {name}"
    if not hasattr(value, "numpy"):
        raise MoeInspectError(f"{where} is {type(value).__name__}, not a tensor")
    check_shape(value.shape, where, shape)
    if (
        value.is_floating_point()
        or value.is_complex()
        or value.dtype.itemsize > 8
        or str(value.dtype) == "torch.bool"
        or value.is_quantized
    ):
        raise MoeInspectError(f"{where} is of {value.dtype}, not of integers")
    array = value.numpy()
    check_range(array, where, low, high)
    return array


def records(files: list[File]) -> Iterator[Record]:
    for path, source, content in files:
        for n, record in enumerate(content["records"]):
            yield f"{path}: record {n}", path, source, record


def _imported(
    context: ImportContext, load_WBE: np.ndarray, where: Path, source: ImportSource
) -> Imported:
    """A dump of counts. Its routers are the config's, or those of every layer that has counts."""
    top_k, layers = context.known_top_k(where), np.flatnonzero(load_WBE.any((0, 2))).tolist()
    _, B, E = load_WBE.shape
    if not 1 <= B <= MOST_LAYERS or not 1 <= E <= MOST_EXPERTS:
        raise MoeInspectError(f"{where} has {B} layers of {E} experts, which is not possible")
    if context.facts is not None:
        _check_layers(context.facts, B, where)
        if odd := [layer for layer in layers if layer not in context.facts.experts]:
            raise MoeInspectError(
                f"{where}: layer {odd[0]} has counts and no experts in {context.facts.id}: is the "
                "config the model's?"
            )
        layers = sorted(context.facts.experts)
    elif layers and (without := sorted(set(range(B)) - set(layers))):
        context.warn(
            f"{where}: no counts in {len(without)} of {B} layers, {without[0]} the first: assumed "
            "to be dense; give --model or --config to be sure"
        )
    routers = context.routers_of(layers, E, top_k, where)
    load_WLE = load_WBE[:, [router.layer for router in routers]]
    domain = source.domain or named(where)
    windows = batches.batches_of_windows(load_WLE[:, None], routers, [domain])
    return Imported(routers, windows, counts_only=True)


def _check_layers(facts: ModelFacts, B: int, where: object) -> None:
    if facts.layers != B:
        raise MoeInspectError(
            f"{where} has {B} layers, {facts.id} {facts.layers}: is the config the model's?"
        )


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
    imported = _imported(context, load_WBE, path, source)
    rate = "average_utilization_rate_over_window"
    if isinstance(content.get(rate), float):
        imported.notes.append(f"{rate} {content[rate]}")
    if wrapped:
        context.warn(
            f"{path}: all {len(count_SBE):,} rows of logical_count are filled. The recorder keeps "
            "that many passes (--expert-distribution-recorder-buffer-size) and overwrites the "
            "oldest: earlier passes may be lost, and the order of the rows is not read as time"
        )
        imported.notes.append(
            "logical_count is full: earlier passes may be lost; the order of its rows is not "
            "that of the passes, so it is one window"
        )
    return imported


def logical_maps(context: ImportContext, files: list[File]) -> dict[Path, np.ndarray]:
    """int64 [B, P]: the logical expert of each physical one by file, all of one shape. Every
    logical expert occurs, so that the number of experts is known."""
    experts = context.known_experts("") if context.facts or context.experts else None
    maps, name = dict[Path, np.ndarray](), "last_physical_to_logical_map"
    for path, _, content in files:
        where = f"{path}: {name}"
        shape = maps[files[0][0]].shape if maps else (None, None)
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
            if missing := set(range(E)) - set(map_P.tolist()):
                raise MoeInspectError(
                    f"{where}: layer {layer} has no replica of expert {min(missing)}"
                )
        maps[path] = map_BP
    return maps


def per_pass(context: ImportContext, files: list[File]) -> Imported:
    """Counts of physical experts: one record per pass and rank, which holds that rank's share.
    Summed over ranks."""
    maps = logical_maps(context, files)
    window_of = batches.window_of(_pass_id(where, record) for where, _, _, record in records(files))
    path, source, _ = files[0]
    B, P = maps[path].shape
    E = int(maps[path].max()) + 1
    load_WBE = np.zeros((max(window_of.values()) + 1, B, E), np.int64)
    physical_BP = np.zeros((B, P), np.int64)
    seen, alike = set[bytes](), 0
    for where, path, _, record in records(files):
        count_BP = array_of(record, "global_physical_count", where, (B, P), 0, batches.MOST_COUNT)
        number = record["forward_pass_id"]
        digest = _digest(number, count_BP, str(record.get("gatherer_key")))
        if count_BP.any() and digest in seen:
            alike += 1
            continue
        seen.add(digest)
        physical_BP += count_BP
        load_BE = load_WBE[window_of[number]]
        np.add.at(load_BE, (np.broadcast_to(np.arange(B)[:, None], (B, P)), maps[path]), count_BP)
    if alike:
        context.warn(
            f"{alike:,} records repeat one of another rank (tensor parallelism): each is "
            "counted once"
        )
    used = np.flatnonzero(physical_BP.any(0)).tolist()
    if used and used[-1] - used[0] < P // 2:  # the trace has logical experts, which do not show it
        context.warn(
            f"{files[0][0]} counts only physical experts {used[0]}-{used[-1]} of {P}: one "
            "rank's own? give the files of all ranks"
        )
    context.read(sum(p.stat().st_size for p, _, _ in files))
    return _imported(context, load_WBE, files[0][0], source)


# --- decisions

EXTEND, DECODE, MIXED, VERIFY = 1, 2, 3, 5  # forward_mode; 4 is idle, which has no tokens


def per_token(context: ImportContext, files: list[File]) -> Imported:
    maps = logical_maps(context, files)
    B, E = len(maps[files[0][0]]), int(maps[files[0][0]].max()) + 1
    routers = _routers_of_tokens(context, files, B, E)
    note = (
        "which request a decoded token belongs to is not in the source: each is its own "
        "sequence, and all of a file's one document"
    )
    return Imported(routers, _batches(context, files, maps, routers), notes=[note])


def _routers_of_tokens(context: ImportContext, files: list[File], B: int, E: int) -> list[Router]:
    """By the config, or by the first record with tokens: there, layers without a router and slots
    beyond k are −1 throughout."""
    for where, _, _, record in records(files):
        shape = (B, None, None)
        topk_BTK = array_of(record, "topk_ids_of_layer", where, shape, -1, MOST_EXPERTS)
        if not topk_BTK.shape[1]:
            continue
        if context.facts is not None:
            _check_layers(context.facts, B, where)
            return context.facts.routers()
        routes_B = np.any(topk_BTK >= 0, axis=(1, 2))
        k = context.top_k or int((topk_BTK >= 0).any((0, 1)).sum())
        alike = dense_blocks(topk_BTK.transpose(1, 0, 2)[:, :, :k]) if k > 1 else []
        if dense := [b for b in alike if routes_B[b]]:
            raise MoeInspectError(
                f"{where}: all tokens go to one expert in layer {dense[0]}, as a dense layer "
                "reads: give --model or --config"
            )
        return context.routers_of(np.flatnonzero(routes_B).tolist(), E, k, where)
    raise MoeInspectError(f"{files[0][0]} holds no token")


class Pass(NamedTuple):
    """What one rank computed in one forward pass. `number`: forward_pass_id and gatherer_key.
    `lengths`: how many tokens of each request there are, in order."""

    number: tuple[int, str]
    mode: int
    token_id: np.ndarray
    position: np.ndarray
    physical_BTK: np.ndarray
    lengths: list[int]


def _batches(
    context: ImportContext, files: list[File], maps: dict[Path, np.ndarray], routers: list[Router]
) -> Iterator[RoutedBatch]:
    numbers = batches.Numbering()
    batch_of: dict[tuple[int, str], int] = {}
    seen, repeated = set[bytes](), 0
    bytes_of = {path: path.stat().st_size / len(content["records"]) for path, _, content in files}
    for found in records(files):
        where, path, _, _ = found
        context.read(int(bytes_of[path]))
        if (one := _pass_of(found, maps[path].shape, routers)) is None:
            continue
        digest = _digest(one.number[0], one.token_id, one.position, one.physical_BTK)
        if digest in seen:
            repeated += 1
            continue
        seen.add(digest)
        ids, map_BP = list[np.ndarray](), maps[path]
        for router in routers:
            physical_TK = one.physical_BTK[router.layer]
            logical_TK = np.where(physical_TK >= 0, map_BP[router.layer][physical_TK], -1)
            ids.append(checked_ids(logical_TK, router, f"{where}, layer {router.layer}"))
        batch = batch_of.setdefault(one.number, len(batch_of))
        yield from _requests(found, one, ids, batch, numbers)
    if repeated:
        context.warn(
            f"{repeated:,} passes were recorded by several ranks alike (tensor parallelism): each "
            "is counted once"
        )


def _pass_of(found: Record, shape: tuple[int, ...], routers: list[Router]) -> Pass | None:
    """The record, checked; None where it has no tokens. `shape`: that of the file's map [B, P]."""
    (where, _, _, record), (B, P) = found, shape
    physical_BTK = array_of(record, "topk_ids_of_layer", where, (B, None, None), -1, P - 1)
    T, K = physical_BTK.shape[1:]
    if T == 0:
        return None
    if T > MOST_TOKENS or max(r.top_k for r in routers) > K:
        why = f"topk_ids_of_layer is {list(physical_BTK.shape)}, which does not fit this model"
        raise MoeInspectError(f"{where}: {why}")
    mode = integer(record.get("forward_mode"), f"{where}: forward_mode", 1, 99)
    if mode not in (EXTEND, DECODE, MIXED, VERIFY):
        why = "only extend, decode, mixed and verify are known"
        raise MoeInspectError(f"{where}: forward_mode is {mode} with {T} tokens: {why}")
    lengths = [1] * T
    if mode in (EXTEND, MIXED):
        lengths = _list(record, "extend_seq_lens", where, None).tolist()
    if sum(lengths) != T:
        raise MoeInspectError(
            f"{where}: extend_seq_lens sums to {sum(lengths)}, the pass has {T} tokens"
        )
    number = _pass_id(where, record), str(record.get("gatherer_key"))
    ids_T, position_T = (_list(record, name, where, T) for name in ("input_ids", "positions"))
    return Pass(number, mode, ids_T, position_T, physical_BTK, lengths)


def _requests(
    found: Record, one: Pass, ids: list[np.ndarray], batch: int, numbers: batches.Numbering
) -> Iterator[RoutedBatch]:
    """A batch per prompt of a pass, and one of all its decoded tokens, which are those of requests
    of one token. A mixed pass does not say what these are: a prompt of one token begins at
    position 0."""
    (where, path, source, _), end, singles = found, 0, []
    domain = source.domain or "sglang"
    for length in one.lengths:
        start, end = end, end + length
        if length == 0:
            continue
        if length == 1 and one.mode != EXTEND and (one.mode != MIXED or one.position[start] > 0):
            singles.append(start)
            continue
        part = slice(start, end)
        if (np.diff(one.position[part]) != 1).any():
            why = f"positions of the {length} tokens from {start} on do not follow each other"
            raise MoeInspectError(f"{where}: {why}")
        numbers.document(domain, where, length)
        yield numbers.decisions(
            [i[part] for i in ids],
            position=one.position[part],
            sequence=numbers.sequence(),
            token_id=one.token_id[part],
            batch=batch,
        )
    if singles:  # of a file all are one document
        numbers.document(domain, f"{path}: decoded", 0, name=str(path))
        yield numbers.decisions(
            [i[singles] for i in ids],
            position=one.position[singles],
            token_id=one.token_id[singles],
            batch=batch,
            phase="decode",
        )


def _pass_id(where: str, record: Fields) -> int:
    return integer(record.get("forward_pass_id"), f"{where}: forward_pass_id", 0, 2**62)


def _digest(number: int, *arrays: np.ndarray | str) -> bytes:
    data = (a.encode() if isinstance(a, str) else a.tobytes() for a in arrays)
    return blake2b(b"%d " % number + b"".join(data), digest_size=16).digest()


def _list(record: Fields, name: str, where: str, length: int | None) -> np.ndarray:
    """int64 of a field that is a list or a tensor of numbers from 0 on."""
    if hasattr(record.get(name), "numpy"):
        return array_of(record, name, where, (length,), 0, 2**31 - 1).astype(np.int64)
    return integers(record.get(name), f"{where}: {name}", (length,))


@importer(
    "sglang",
    gives="counts over time (stat, per_pass), decisions without weights (per_token)",
    sniff=lambda name, head: name.endswith(".pt"),
)
def sglang(context: ImportContext) -> Imported:
    files = [(path, source, load(path)) for path, source in context.files(r".*\.pt", ".pt")]
    modes = {_mode(path, content) for path, _, content in files}
    if len(modes) > 1:
        raise MoeInspectError(
            f"{context.sources[0].path} holds files of the modes {' and '.join(sorted(modes))}: "
            "import them separately"
        )
    read = {"stat": stat, "per_pass": per_pass, "per_token": per_token}
    return read[modes.pop()](context, files)


def _mode(path: Path, content: Fields) -> str:
    if "logical_count" in content:
        return "stat"
    found = content.get("records")
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        why = "is it of the expert distribution recorder?"
        raise MoeInspectError(f"{path} has neither logical_count nor records: {why}")
    if not found:
        raise MoeInspectError(f"{path}: records is empty")
    return "per_token" if "topk_ids_of_layer" in found[0] else "per_pass"

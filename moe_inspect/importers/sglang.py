"""SGLang's expert distribution recorder: `.pt` of the modes stat, stat_approx, per_pass and
per_token. Physical ids become logical.

T tokens, K slots, B blocks of the model, P physical experts, E logical experts, W windows, S steps.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.context import (
    WINDOWS,
    Imported,
    Job,
    Numbering,
    Source,
    counted,
    integer,
    integers,
    one_ranks_experts,
    routed,
    windows_of,
)
from moe_inspect.importers.registry import importer, named
from moe_inspect.importers.routed import MOST_TOKENS, checked_ids, dense_blocks
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, RoutedBatch

EXTEND, DECODE, MIXED, IDLE, VERIFY = 1, 2, 3, 4, 5  # forward_mode
NEEDS_TORCH = "SGLang's .pt files need torch: pip install 'moe-inspect[trace]'"
File = tuple[Path, Source, dict[str, Any]]


@importer(
    "sglang",
    reads=(
        "`expert_distribution_recorder_*.pt` of the modes stat, stat_approx, per_pass, "
        "per_token; needs torch"
    ),
    gives="counts over time (stat, per_pass), decisions without weights (per_token)",
    sniff=lambda name, head: name.endswith(".pt"),
)
def sglang(job: Job) -> Imported:
    files = [(path, source, _loaded(path)) for path, source in job.files(r".*\.pt", ".pt")]
    modes = {_mode(path, content) for path, _, content in files}
    if len(modes) > 1:
        raise MoeInspectError(
            f"{job.sources[0].path} holds files of the modes {' and '.join(sorted(modes))}: "
            "import them apart"
        )
    return {"stat": _stat, "per_pass": _per_pass, "per_token": _per_token}[modes.pop()](job, files)


def _loaded(path: Path) -> dict[str, Any]:
    """A `.pt`, never unpickled freely, its tensors mapped, not read. First as shapes alone: what
    those declare must be in the file."""
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
    except Exception as error:  # of a hostile file torch.load may raise what it likes
        raise MoeInspectError(
            f"{path} is no .pt that can be read safely: {first_line(error)[:160]}"
        ) from None
    if not isinstance(content, dict):
        raise MoeInspectError(
            f"{path} holds a {type(content).__name__}, not the dict that SGLang writes"
        )
    return content


def _check_archive(path: Path) -> None:
    """What torch takes on trust: it allocates what the archive declares before it reads, and
    divides by the alignment."""
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
    """What the tensors in nested dicts and lists declare, in bytes. A list may be in itself."""
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


def _mode(path: Path, content: dict[str, Any]) -> str:
    if "logical_count" in content:
        return "stat"
    records = content.get("records")
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise MoeInspectError(
            f"{path} has neither logical_count nor records: is it of the expert distribution "
            "recorder?"
        )
    if not records:
        raise MoeInspectError(f"{path}: records is empty")
    return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"


def _array(value: Any, where: str, shape: Sequence[int | None], low: int, high: int) -> np.ndarray:
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


def _routing_layers(job: Job, load_BE: np.ndarray, where: Path, top_k: int) -> list[Router]:
    """The routers of a counts dump: the config's, or every layer that has counts."""
    B, E = load_BE.shape
    if not 1 <= B <= MOST_LAYERS or not 1 <= E <= MOST_EXPERTS:
        raise MoeInspectError(f"{where} has {B} layers of {E} experts, which is no model's")
    if job.facts is None:
        layers = np.nonzero(load_BE.any(1))[0]
        if 0 < len(layers) < B:
            without = sorted(set(range(B)) - {int(i) for i in layers})
            job.warn(
                f"{where}: no counts in {len(without)} of {B} layers, {without[0]} the first: "
                "taken for dense; --model or --config would say"
            )
        return job.routers_of([int(i) for i in layers], E, top_k, where)
    if job.facts.layers != B:
        raise MoeInspectError(
            f"{where} has {B} layers, {job.facts.id} {job.facts.layers}: is the config the model's?"
        )
    for layer in np.nonzero(load_BE.any(1))[0]:
        if int(layer) not in job.facts.experts:
            raise MoeInspectError(
                f"{where}: layer {layer} has counts and no experts in {job.facts.id}: is the "
                "config the model's?"
            )
    return job.routers_of(job.facts.experts, E, top_k, where)


def _windows(load_WBE: np.ndarray, routers: list[Router], domain: str) -> Iterator[CountedBatches]:
    for w, load_BE in enumerate(load_WBE):
        if load_BE.any():
            yield counted([load_BE[None, r.layer] for r in routers], routers, [domain], w)


def _stat(job: Job, files: list[File]) -> Imported:
    """`logical_count` [S, B, E], already summed over ranks; a row of zeros was never written. The
    rows are a ring: where the last one is filled, later passes may have overwritten earlier ones,
    and the order of the rows is not that of the passes."""
    path, source, content = files[0]
    if len(files) > 1:
        raise MoeInspectError(
            f"{files[1][0]}: a stat dump holds the sum over all ranks: import one"
        )
    count_SBE = _array(
        content["logical_count"], f"{path}: logical_count", (None, None, None), 0, 2**53
    )
    if (
        not count_SBE.size
    ):  # so many layers and experts as one likes, of which the file need hold none
        raise MoeInspectError(f"{path}: logical_count is {list(count_SBE.shape)}: no counts")
    last = int(np.nonzero(count_SBE.any((1, 2)))[0].max(initial=0))
    wrapped = 0 < last == len(count_SBE) - 1
    window_S = windows_of(last + 1, 1 if wrapped else WINDOWS)
    load_WBE = np.zeros((int(window_S.max()) + 1, *count_SBE.shape[1:]), np.int64)
    for s, w in enumerate(window_S):
        load_WBE[w] += count_SBE[s]
    job.read(path.stat().st_size)
    routers = _routing_layers(job, load_WBE.sum(0), path, job.known_top_k(path))
    rate = content.get("average_utilization_rate_over_window")
    notes = [f"average_utilization_rate_over_window {rate}"] if isinstance(rate, float) else []
    if wrapped:
        job.warn(
            f"{path}: all {len(count_SBE):,} rows of logical_count are filled. The recorder "
            "keeps that many passes "
            "(--expert-distribution-recorder-buffer-size) and overwrites the oldest: earlier "
            "passes may be lost, and the order of the rows "
            "is not read as time"
        )
        notes.append(
            "logical_count is full: earlier passes may be lost; the order of its rows is not "
            "that of the passes, so it is one window"
        )
    return Imported(
        routers,
        _windows(load_WBE, routers, source.domain or named(path)),
        counts_only=True,
        notes=notes,
    )


def _logical(path: Path, content: dict[str, Any], experts: int | None) -> np.ndarray:
    """int64 [B, P]: physical → logical. Every logical expert is there: E is not guessed from what
    was used."""
    where = f"{path}: last_physical_to_logical_map"
    map_BP = _array(
        content.get("last_physical_to_logical_map"), where, (None, None), 0, MOST_EXPERTS - 1
    ).astype(np.int64)
    B, P = map_BP.shape
    if not 1 <= B <= MOST_LAYERS or not 1 <= P <= MOST_EXPERTS:
        raise MoeInspectError(f"{where} is of {B} layers and {P} physical experts")
    E = int(map_BP.max()) + 1
    if experts is not None and experts != E:
        raise MoeInspectError(
            f"{where} names {E} experts, the config {experts}: is it the model's?"
        )
    for layer, map_P in enumerate(map_BP):
        if len(missing := set(range(E)) - {int(e) for e in map_P}):
            raise MoeInspectError(f"{where}: layer {layer} has no replica of expert {min(missing)}")
    return map_BP


def _records(files: list[File]) -> Iterator[tuple[str, Path, Source, dict[str, Any]]]:
    for path, source, content in files:
        for n, record in enumerate(content["records"]):
            yield f"{path}: record {n}", path, source, record


def _stated_experts(job: Job) -> int | None:
    return job.known_experts("") if job.facts or job.experts else None


def _per_pass(job: Job, files: list[File]) -> Imported:
    """Counts of physical experts, a record a pass and rank, each rank its own part: summed."""
    maps = {path: _logical(path, content, _stated_experts(job)) for path, _, content in files}
    passes = sorted(
        {
            integer(r.get("forward_pass_id"), f"{where}: forward_pass_id", 0, 2**62)
            for where, _, _, r in _records(files)
        }
    )
    window_of = dict(zip(passes, windows_of(len(passes)), strict=True))
    path, source, _ = files[0]
    B, P = maps[path].shape
    E = int(maps[path].max()) + 1
    load_WBE = np.zeros((max(window_of.values()) + 1, B, E), np.int64)
    physical_BP = np.zeros((B, P), np.int64)
    seen: set[tuple[int, bytes]] = set()
    alike = 0
    for where, path, _, record in _records(files):
        if maps[path].shape != (B, P):
            raise MoeInspectError(
                f"{path}: last_physical_to_logical_map is {list(maps[path].shape)}, [{B}, {P}] "
                f"in {files[0][0]}"
            )
        count_BP = _array(
            record.get("global_physical_count"), f"{where}: global_physical_count", (B, P), 0, 2**53
        )
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
        rows = np.arange(B)[:, None]
        np.add.at(
            load_WBE[window_of[record["forward_pass_id"]]],
            (np.broadcast_to(rows, (B, P)), maps[path]),
            count_BP,
        )
    if alike:
        job.warn(
            f"{alike:,} records repeat one of another rank (tensor parallelism): each is taken once"
        )
    if block := one_ranks_experts(physical_BP):
        job.warn(
            f"{files[0][0]} counts only physical experts {block[0]}-{block[1]} of {P}: one "
            "rank's own? give the files of all ranks"
        )
    job.read(sum(p.stat().st_size for p, _, _ in files))
    routers = _routing_layers(job, load_WBE.sum(0), path, job.known_top_k(path))
    return Imported(
        routers, _windows(load_WBE, routers, source.domain or named(files[0][0])), counts_only=True
    )


def _per_token(job: Job, files: list[File]) -> Imported:
    maps = {path: _logical(path, content, _stated_experts(job)) for path, _, content in files}
    path = files[0][0]
    shape = maps[path].shape
    for other, map_BP in maps.items():
        if map_BP.shape != shape:
            raise MoeInspectError(
                f"{other}: last_physical_to_logical_map is {list(map_BP.shape)}, {list(shape)} "
                f"in {path}"
            )
    routers = _routers_of_tokens(job, files, shape[0], int(maps[path].max()) + 1)
    notes = [
        (
            "which request a decoded token belongs to is not in the source: each is its own "
            "sequence, and all of a file's one document"
        )
    ]
    return Imported(routers, _tokens(job, files, maps, routers), notes=notes)


def _routers_of_tokens(job: Job, files: list[File], B: int, E: int) -> list[Router]:
    """By the config, or by the first record with tokens: layers nobody wrote are −1 throughout, and
    slots beyond k as well."""
    for where, _, _, record in _records(files):
        topk_BTK = _array(
            record.get("topk_ids_of_layer"),
            f"{where}: topk_ids_of_layer",
            (B, None, None),
            -1,
            MOST_EXPERTS,
        )
        if not topk_BTK.shape[1]:
            continue
        if job.facts is not None:
            if job.facts.layers != B:
                raise MoeInspectError(
                    f"{where} has {B} layers, {job.facts.id} {job.facts.layers}: is the config "
                    "the model's?"
                )
            return job.facts.routers()
        routes_B = np.any(topk_BTK >= 0, axis=(1, 2))
        k = job.top_k or int((topk_BTK >= 0).any((0, 1)).sum())
        dense = (
            [
                b
                for b in dense_blocks(topk_BTK.transpose(1, 0, 2)[:, :, :k])
                if b in set(np.nonzero(routes_B)[0].tolist())
            ]
            if k > 1
            else []
        )
        if dense:
            raise MoeInspectError(
                f"{where}: all tokens go to one expert in layer {dense[0]}, as a dense layer "
                "reads: give --model or --config"
            )
        return job.routers_of([int(b) for b in np.nonzero(routes_B)[0]], E, k, where)
    raise MoeInspectError(f"{files[0][0]} holds no token")


def _tokens(
    job: Job, files: list[File], maps: dict[Path, np.ndarray], routers: list[Router]
) -> Iterator[RoutedBatch]:
    numbers = Numbering()
    passes: dict[tuple[int, str], int] = {}
    seen: set[bytes] = set()
    alike = 0
    decoded: dict[Path, int] = {}
    read = {path: path.stat().st_size / len(content["records"]) for path, _, content in files}
    for where, path, source, record in _records(files):
        job.read(int(read[path]))
        map_BP = maps[path]
        B, P = map_BP.shape
        topk_BTK = _array(
            record.get("topk_ids_of_layer"),
            f"{where}: topk_ids_of_layer",
            (B, None, None),
            -1,
            P - 1,
        )
        T, K = topk_BTK.shape[1:]
        if T == 0:
            continue
        if T > MOST_TOKENS or max(r.top_k for r in routers) > K:
            raise MoeInspectError(
                f"{where}: topk_ids_of_layer is {list(topk_BTK.shape)}, which is no pass of this "
                "model"
            )
        token_id = _list(record.get("input_ids"), f"{where}: input_ids", T)
        position = _list(record.get("positions"), f"{where}: positions", T)
        mode = integer(record.get("forward_mode"), f"{where}: forward_mode", 1, 99)
        if mode not in (EXTEND, DECODE, MIXED, VERIFY):
            raise MoeInspectError(
                f"{where}: forward_mode is {mode} with {T} tokens: only extend, decode, mixed "
                "and verify are known"
            )
        pass_id = integer(record.get("forward_pass_id"), f"{where}: forward_pass_id", 0, 2**62)
        key = blake2b(
            b"%d " % pass_id + token_id.tobytes() + position.tobytes() + topk_BTK.tobytes(),
            digest_size=16,
        ).digest()
        if key in seen:
            alike += 1
            continue
        seen.add(key)
        ids = []
        for router in routers:
            physical_TK = topk_BTK[router.layer]
            logical_TK = np.where(physical_TK >= 0, map_BP[router.layer][physical_TK], -1)
            ids.append(checked_ids(logical_TK, router, f"{where}, layer {router.layer}"))
        batch = passes.setdefault((pass_id, str(record.get("gatherer_key"))), len(passes))
        domain = source.domain or "sglang"
        lengths = (
            [1] * T
            if mode in (DECODE, VERIFY)
            else _list(record.get("extend_seq_lens"), f"{where}: extend_seq_lens", None).tolist()
        )
        if sum(lengths) != T:
            raise MoeInspectError(
                f"{where}: extend_seq_lens sums to {sum(lengths)}, the pass has {T} tokens"
            )
        at, singles = 0, []
        for length in lengths:
            part, at = slice(at, at + length), at + length
            if mode != EXTEND and length == 1 and (mode != MIXED or position[part.start] > 0):
                singles.append(part.start)
                continue
            if length == 0:
                continue
            if (np.diff(position[part]) != 1).any():
                raise MoeInspectError(
                    f"{where}: positions of the {length} tokens from {part.start} on do not "
                    "follow each other"
                )
            document, documents = numbers.document(domain, where, length)
            yield routed(
                numbers,
                [i[part] for i in ids],
                document=document,
                documents=documents,
                domain=numbers.domain(domain),
                sequence=numbers.sequence(),
                position=position[part],
                token_id=token_id[part],
                batch=batch,
            )
        if singles:
            documents = []
            if path not in decoded:
                decoded[path], documents = numbers.document(domain, f"{path}: decoded", 0)
            rows = np.array(singles)
            yield routed(
                numbers,
                [i[rows] for i in ids],
                document=decoded[path],
                documents=documents,
                domain=numbers.domain(domain),
                sequence=np.arange(len(rows)) + numbers.sequence(len(rows)),
                position=position[rows],
                token_id=token_id[rows],
                batch=batch,
                phase="decode",
            )
    if alike:
        job.warn(
            f"{alike:,} passes were recorded by several ranks alike (tensor parallelism): each "
            "is taken once"
        )


def _list(value: Any, where: str, length: int | None) -> np.ndarray:
    """A list or a tensor of numbers from 0 on."""
    if hasattr(value, "numpy"):
        return _array(value, where, (length,), 0, 2**31 - 1).astype(np.int64)
    return integers(value, where, (length,))

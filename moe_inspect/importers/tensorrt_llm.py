"""TensorRT-LLM's expert statistics: `meta_info.json` and `rank{r}.safetensors`
("{iteration}_{layer}" → counts [E]), or `rank{r}_raw.safetensors` (the same keys → the chosen
experts [T, K]). And the routed experts of its LLM API's results, saved as JSONL.

T tokens, K slots, E experts, W windows, L layers with experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.importers import batches
from moe_inspect.importers.context import ImportContext, Imported, importer
from moe_inspect.importers.responses import read_responses
from moe_inspect.importers.routed import MOST_TOKENS, checked_ids, decode_tensorrt, decode_vllm
from moe_inspect.importers.values import integer, parsed_object
from moe_inspect.model.config import MOST_EXPERTS
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, RoutedBatch

INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
KEY = re.compile(r"(\d{1,9})_(\d{1,4})")
NAME = re.compile(r"rank(\d{1,6})(_raw)?\.safetensors")
Keys = dict[int, dict[int, str]]  # iteration → layer → key


@importer(
    "tensorrt-llm",
    gives="counts over time, ranks added up; decisions from the raw variant",
    sniff=lambda name, head: NAME.fullmatch(name) is not None,
)
def tensorrt_llm(context: ImportContext) -> Imported:
    files = [
        (p, s)
        for p, s in context.files(NAME.pattern + r"|meta_info\.json", "rank<r>.safetensors")
        if p.name != "meta_info.json"
    ]
    if not files:
        raise MoeInspectError(f"{context.sources[0].path} holds no rank<r>.safetensors")
    for path, _ in files:
        if NAME.fullmatch(path.name) is None:
            raise MoeInspectError(
                f"{path} is not named rank<r>.safetensors: which rank is it from?"
            )
    raw = [f for f in files if "_raw" in f[0].name]
    paths = [p for p, _ in (raw or files)]
    domain = files[0][1].domain or paths[0].parent.resolve().name
    meta_path = paths[0].parent / "meta_info.json"
    if not meta_path.is_file():
        raise MoeInspectError(f"no {meta_path}: it says how many experts there are")
    meta = parsed_object(read_small(meta_path), str(meta_path))
    experts = integer(meta.get("num_experts"), f"{meta_path}: num_experts", 1, MOST_EXPERTS)
    top_k = integer(
        meta.get("num_experts_per_token"), f"{meta_path}: num_experts_per_token", 1, experts
    )
    opened = [(path, *_opened(path)) for path in paths]
    layers = {layer for _, _, keys in opened for of_layer in keys.values() for layer in of_layer}
    routers = context.routers_of(layers, experts, top_k, paths[0])
    if raw:
        return Imported(
            routers,
            _decisions(context, opened, routers, domain),
            notes=["token ids, sequences and positions are not in the source"],
        )
    return Imported(routers, _counts(context, opened, routers, domain), counts_only=True)


@importer(
    "tensorrt-llm-routed",
    gives="as vllm-routed",
    sniff=lambda name, head: b'"routed_experts"' in head and b'"outputs"' in head,
)
def tensorrt_llm_routed(context: ImportContext) -> Imported:
    """`CompletionOutput.routed_experts` is int16 [tokens − 1, L, K]: what the routers chose, in
    their order of slots, before experts are mapped to physical ones. A prompt's token whose routes
    the engine no longer had is −1 throughout."""
    facts = context.facts
    if facts is None:
        context.warn(
            "TensorRT-LLM returns no rows for dense layers: without --model or --config, layers "
            "are numbered from 0 on"
        )
        return read_responses(context, decode_vllm)
    layers = [router.layer for router in facts.routers()]
    return read_responses(context, partial(decode_tensorrt, layers=layers, blocks=facts.layers))


def _opened(path: Path) -> tuple[Any, Keys]:
    """The file, whose header safetensors has checked against its size, and its keys."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "np")
        names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise MoeInspectError(f"{path}: {first_line(error)}") from None
    keys: Keys = defaultdict(dict)
    for name in names:
        found = KEY.fullmatch(name)
        if found is None:
            raise MoeInspectError(f"{path} has a tensor {name[:40]!r}, not <iteration>_<layer>")
        keys[int(found[1])][int(found[2])] = name
    if not keys:
        raise MoeInspectError(f"{path} holds no tensor")
    return file, keys


def _tensor(
    file: Any, path: Path, name: str, shape: tuple[int | None, ...], high: int
) -> np.ndarray:
    """int64 of that shape (None: any). Shape and type are looked at before anything is read."""
    part = file.get_slice(name)
    found = part.get_shape()
    if (
        len(found) != len(shape)
        or any(w not in (None, f) for w, f in zip(shape, found, strict=True))
        or max(found) > MOST_TOKENS
    ):
        raise MoeInspectError(
            f"{path}: {name} has shape {found}, not "
            f"{[w if w is not None else 'tokens' for w in shape]}"
        )
    if part.get_dtype() not in INTEGERS:
        raise MoeInspectError(f"{path}: {name} is of {part.get_dtype()}, not of integers")
    values = file.get_tensor(name)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= high:
        raise MoeInspectError(
            f"{path}: {name} holds {int(values.min())} to {int(values.max())}, not of 0 to {high:,}"
        )
    return values.astype(np.int64)


def _counts(
    context: ImportContext, opened: list[tuple[Path, Any, Keys]], routers: list[Router], domain: str
) -> Iterator[CountedBatches]:
    E, row_of = routers[0].experts, {r.layer: row for row, r in enumerate(routers)}
    iterations = sorted({i for _, _, keys in opened for i in keys})
    window_of = dict(zip(iterations, batches.windows_of(len(iterations)), strict=True))
    load_WLE = np.zeros((max(window_of.values()) + 1, len(routers), E), np.int64)
    for path, file, keys in opened:
        for iteration, of_layer in keys.items():
            for layer, name in of_layer.items():
                load_WLE[window_of[iteration], row_of[layer]] += _tensor(
                    file, path, name, (E,), batches.MOST_COUNT
                )
        context.read(path.stat().st_size)
    yield from batches.batches_of_windows(load_WLE, routers, domain)


def _decisions(
    context: ImportContext, opened: list[tuple[Path, Any, Keys]], routers: list[Router], domain: str
) -> Iterator[RoutedBatch]:
    numbers = batches.Numbering()
    code = numbers.domain(domain)
    iterations = {i: n for n, i in enumerate(sorted({i for _, _, keys in opened for i in keys}))}
    for path, file, keys in opened:
        tokens = sum(
            file.get_slice(min(of_layer.values())).get_shape()[0]
            for of_layer in keys.values()
            if len(of_layer) == len(routers)
        )
        document, documents = numbers.document(domain, str(path), min(tokens, 2**31 - 1))
        for iteration in sorted(keys):
            ids: list[np.ndarray] = []
            for router in routers:
                name = keys[iteration].get(router.layer)
                if name is None:
                    raise MoeInspectError(
                        f"{path}: iteration {iteration} has no layer {router.layer}"
                    )
                ids_TK = _tensor(
                    file,
                    path,
                    name,
                    (len(ids[0]) if ids else None, router.top_k),
                    router.experts - 1,
                )
                ids.append(checked_ids(ids_TK, router, f"{path}: {name}"))
            T = len(ids[0])
            if T == 0:
                continue
            yield batches.batch_of_decisions(
                numbers,
                batches.tokens_without_order(numbers, T, document, code),
                ids,
                documents=documents,
                batch=iterations[iteration],
            )
            documents = []
        context.read(path.stat().st_size)

"""TensorRT-LLM's expert statistics: `meta_info.json` and `rank{r}.safetensors`
("{iteration}_{layer}" → counts [E]), or `rank{r}_raw.safetensors` (the same keys → the chosen
experts [T, K]). And the routed experts of its LLM API's results, saved as JSONL.

T tokens, K slots, E experts, W windows, L layers with experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.importers import batches
from moe_inspect.importers.context import ImportContext, Imported, importer
from moe_inspect.importers.responses import read_responses
from moe_inspect.importers.routed import MOST_TOKENS, checked_ids, decode_tensorrt, decode_vllm
from moe_inspect.importers.values import check_range, check_shape, integer, parsed_object
from moe_inspect.model.config import MOST_EXPERTS
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, RoutedBatch

if TYPE_CHECKING:
    from safetensors import safe_open

INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
KEY = re.compile(r"(\d{1,9})_(\d{1,4})")
NAME = re.compile(r"rank(\d{1,6})(_raw)?\.safetensors")


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
    if odd := next((path for path, _ in files if NAME.fullmatch(path.name) is None), None):
        raise MoeInspectError(f"{odd} is not named rank<r>.safetensors: which rank is it from?")
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
    opened = [_opened(path) for path in paths]
    layers = {layer for of in opened for of_layer in of.keys.values() for layer in of_layer}
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


@dataclass(frozen=True)
class Opened:
    """`tensors`: what safe_open gives, which has checked the header against the file's size."""

    path: Path
    tensors: safe_open
    keys: dict[int, dict[int, str]]  # iteration → layer → key


def _opened(path: Path) -> Opened:
    from safetensors import SafetensorError, safe_open

    try:
        tensors = safe_open(path, "np")
        names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise MoeInspectError(f"{path}: {first_line(error)}") from None
    keys: dict[int, dict[int, str]] = {}
    for name in names:
        found = KEY.fullmatch(name)
        if found is None:
            raise MoeInspectError(f"{path} has a tensor {name[:40]!r}, not <iteration>_<layer>")
        keys.setdefault(int(found[1]), {})[int(found[2])] = name
    if not keys:
        raise MoeInspectError(f"{path} holds no tensor")
    return Opened(path, tensors, keys)


def _tensor(of: Opened, name: str, shape: tuple[int | None, ...], high: int) -> np.ndarray:
    """int64 of that shape (None: any). Shape and type are looked at before anything is read."""
    path, part = of.path, of.tensors.get_slice(name)
    found = part.get_shape()
    check_shape(found, f"{path}: {name}", shape)
    if max(found) > MOST_TOKENS:
        raise MoeInspectError(f"{path}: {name} has shape {found}: over {MOST_TOKENS:,} tokens")
    if part.get_dtype() not in INTEGERS:
        raise MoeInspectError(f"{path}: {name} is of {part.get_dtype()}, not of integers")
    values = of.tensors.get_tensor(name)
    check_range(values, f"{path}: {name}", 0, high)
    return values.astype(np.int64)


def _counts(
    context: ImportContext, opened: list[Opened], routers: list[Router], domain: str
) -> Iterator[CountedBatches]:
    E, row_of = routers[0].experts, {r.layer: row for row, r in enumerate(routers)}
    window_of = batches.window_of(i for of in opened for i in of.keys)
    load_WLE = np.zeros((max(window_of.values()) + 1, len(routers), E), np.int64)
    for of in opened:
        for iteration, of_layer in of.keys.items():
            for layer, name in of_layer.items():
                load_E = _tensor(of, name, (E,), batches.MOST_COUNT)
                load_WLE[window_of[iteration], row_of[layer]] += load_E
        context.read(of.path.stat().st_size)
    yield from batches.batches_of_windows(load_WLE[:, None], routers, [domain])


def _decisions(
    context: ImportContext, opened: list[Opened], routers: list[Router], domain: str
) -> Iterator[RoutedBatch]:
    numbers = batches.Numbering()
    iterations = {i: n for n, i in enumerate(sorted({i for of in opened for i in of.keys}))}
    for of in opened:
        path, keys = of.path, of.keys
        tokens = sum(
            of.tensors.get_slice(min(of_layer.values())).get_shape()[0]
            for of_layer in keys.values()
            if len(of_layer) == len(routers)
        )
        numbers.document(domain, str(path), min(tokens, 2**31 - 1))
        for iteration in sorted(keys):
            ids: list[np.ndarray] = []
            for router in routers:
                name = keys[iteration].get(router.layer)
                if name is None:
                    raise MoeInspectError(
                        f"{path}: iteration {iteration} has no layer {router.layer}"
                    )
                shape = (len(ids[0]) if ids else None, router.top_k)
                ids_TK = _tensor(of, name, shape, router.experts - 1)
                ids.append(checked_ids(ids_TK, router, f"{path}: {name}"))
            if len(ids[0]):
                yield numbers.decisions(ids, batch=iterations[iteration])
        context.read(path.stat().st_size)

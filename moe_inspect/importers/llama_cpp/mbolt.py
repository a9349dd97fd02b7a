"""mbolt's `route.bin` (a patch of llama.cpp, MBOLT_TRACE=FILE): the experts of each token.

Little-endian 32-bit integers: "MBLT", the version 1, E; then a record for each call of a layer's
experts: layer, k, T, ids [T, k]. Form: github.com/doramirdor/mbolt, common/mbolt-trace.h.

T tokens of a pass, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import Numbering, batch_of_decisions, tokens_without_order
from moe_inspect.importers.context import ImportContext, Imported, ImportSource, importer, named
from moe_inspect.importers.routed import MOST_TOKENS, checked_ids
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS
from moe_inspect.text import plural
from moe_inspect.trace.schema import Router
from moe_inspect.trace.slot_order import stated
from moe_inspect.trace.writer import RoutedBatch

MAGIC = b"MBLT"
HEADER = RECORD = 3  # integers of 4 bytes


@dataclass(frozen=True)
class _Call:
    """A record; at: its first id, in integers from the beginning."""

    layer: int
    k: int
    tokens: int
    at: int


_Pass = list[_Call]


@dataclass(frozen=True)
class _File:
    path: Path
    source: ImportSource
    experts: int
    words: np.ndarray
    passes: list[_Pass]


@importer(
    "mbolt",
    gives="decisions without order, weights and token ids",
    sniff=lambda name, head: head[:4] == MAGIC,
)
def mbolt(context: ImportContext) -> Imported:
    files = [_read(*found) for found in context.files(r".*\.bin", "route.bin")]
    first = files[0]
    # a model that warms up runs with all of its experts
    k = min(call.k for f in files for calls in f.passes for call in calls)
    layers = max(
        ([call.layer for call in calls] for f in files for calls in f.passes), key=len, default=[]
    )
    if other := next((f for f in files if f.experts != first.experts), None):
        raise MoeInspectError(
            f"{other.path} is of {other.experts} experts, {first.path} of {first.experts}"
        )
    routers = context.routers_of(layers, first.experts, k, first.path)
    routers = [stated(router, known=False) for router in routers]
    return Imported(routers, _batches(context, files, routers))


def _read(path: Path, source: ImportSource) -> _File:
    """The records of a file by passes: a new one begins where the layers do."""
    size = path.stat().st_size
    if size < 4 * HEADER:
        raise MoeInspectError(f"{path} is no trace of mbolt: it has {size} bytes")
    words = np.memmap(path, "<i4", "r", shape=(size // 4,))
    if words[:1].tobytes() != MAGIC or words[1] != 1:
        raise MoeInspectError(
            f"{path} is no trace of mbolt of version 1: it begins with {bytes(words[:2])!r}"
        )
    if not 1 <= (experts := int(words[2])) <= MOST_EXPERTS:
        raise MoeInspectError(f"{path} states {experts:,} experts")
    passes: list[_Pass] = []
    at, before = HEADER, MOST_LAYERS
    while at + RECORD <= len(words):
        layer, k, tokens = (int(n) for n in words[at : at + RECORD])
        if not (0 <= layer < MOST_LAYERS and 1 <= k <= experts and 1 <= tokens <= MOST_TOKENS):
            raise MoeInspectError(
                f"{path}: a record of layer {layer}, k {k}, {tokens} tokens at byte {4 * at:,}"
            )
        if layer <= before:
            passes.append([])
        passes[-1].append(_Call(layer, k, tokens, at + RECORD))
        at, before = at + RECORD + k * tokens, layer
    if at > len(words):  # killed while it wrote
        passes[-1].pop()
    if not any(passes):
        raise MoeInspectError(f"{path} holds no decisions")
    return _File(path, source, experts, words, [calls for calls in passes if calls])


def _batches(
    context: ImportContext, files: list[_File], routers: list[Router]
) -> Iterator[RoutedBatch]:
    numbers = Numbering()
    layers, k = [router.layer for router in routers], routers[0].top_k
    for f in files:
        context.read(f.path.stat().st_size)
        label = f.source.domain or named(f.path)
        warmed = [calls for calls in f.passes if {c.k for c in calls} == {f.experts} != {k}]
        whole = [
            calls
            for calls in f.passes
            if {c.k for c in calls} == {k} and [c.layer for c in calls] == layers
        ]
        if warmed:
            context.warn(f"{f.path}: {_passes(len(warmed))} with all experts (warm-up) left out")
        if rest := len(f.passes) - len(warmed) - len(whole):
            context.warn(f"{f.path}: {_passes(rest)} without all layers left out")
        tokens = sum(calls[0].tokens for calls in whole)
        document, documents = numbers.document(label, str(f.path), tokens)
        unknown = 0
        for calls in whole:
            T = calls[0].tokens
            ids = []
            for call, router in zip(calls, routers, strict=True):
                ids_TK, lost = _ids(f, call, T, is_last=call is calls[-1])
                unknown += lost
                ids.append(checked_ids(ids_TK, router, f"{f.path}, layer {call.layer}"))
            yield batch_of_decisions(
                numbers,
                tokens_without_order(numbers, T, document, numbers.domain(label)),
                ids,
                documents=documents,
                phase="decode" if T == 1 else "prefill",
            )
            documents = []
        if unknown:
            context.warn(
                f"{f.path}: {plural(unknown, 'decision')} of layer {layers[-1]} left out: only "
                "tokens whose output was asked for reach it, and the file does not say which"
            )


def _ids(f: _File, call: _Call, T: int, is_last: bool) -> tuple[np.ndarray, int]:
    """The ids [T, K] of a pass with T tokens, −1 where a token did not reach the layer; and how
    many decisions have no known token. The last layer routes a prompt's last token alone."""
    ids_TK = f.words[call.at : call.at + call.tokens * call.k].reshape(call.tokens, call.k)
    if call.tokens == T:
        return np.asarray(ids_TK), 0
    if not is_last or call.tokens > T:
        raise MoeInspectError(
            f"{f.path}: layer {call.layer} has {call.tokens} tokens in a pass of {T}"
        )
    alone_TK = np.full((T, call.k), -1, np.int32)
    if call.tokens > 1:
        return alone_TK, call.tokens
    alone_TK[-1] = ids_TK[0]
    return alone_TK, 0


def _passes(n: int) -> str:
    return f"{n:,} pass{'es' * (n != 1)}"

"""SGLang's expert distribution recorder: its modes, of which stat, stat_approx and per_pass are in
counts.py, and per_token here: decisions. Physical experts are mapped to logical ones.

T tokens, K slots, B blocks of the model, P physical experts, E logical experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import Numbering, Tokens, batch_of_decisions
from moe_inspect.importers.context import ImportContext, Imported, ImportSource, importer
from moe_inspect.importers.routed import MOST_TOKENS, checked_ids, dense_blocks
from moe_inspect.importers.sglang.counts import (
    File,
    array_of,
    load,
    logical_maps,
    per_pass,
    records,
    stat,
)
from moe_inspect.importers.values import integer, integers
from moe_inspect.model.config import MOST_EXPERTS
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

EXTEND, DECODE, MIXED, VERIFY = 1, 2, 3, 5  # forward_mode; 4 is idle, which has no tokens


def per_token(context: ImportContext, files: list[File]) -> Imported:
    maps = logical_maps(context, files)
    B, E = len(maps[files[0][0]]), int(maps[files[0][0]].max()) + 1
    routers = _routers_of_tokens(context, files, B, E)
    notes = [
        (
            "which request a decoded token belongs to is not in the source: each is its own "
            "sequence, and all of a file's one document"
        )
    ]
    return Imported(routers, _batches(context, files, maps, routers), notes=notes)


def _routers_of_tokens(context: ImportContext, files: list[File], B: int, E: int) -> list[Router]:
    """By the config, or by the first record with tokens: there, layers without a router and slots
    beyond k are −1 throughout."""
    for where, _, _, record in records(files):
        shape = (B, None, None)
        topk_BTK = array_of(record, "topk_ids_of_layer", where, shape, -1, MOST_EXPERTS)
        if not topk_BTK.shape[1]:
            continue
        if context.facts is not None:
            if context.facts.layers != B:
                raise MoeInspectError(
                    f"{where} has {B} layers, {context.facts.id} {context.facts.layers}: is the "
                    "config the model's?"
                )
            return context.facts.routers()
        routes_B = np.any(topk_BTK >= 0, axis=(1, 2))
        k = context.top_k or int((topk_BTK >= 0).any((0, 1)).sum())
        alike = dense_blocks(topk_BTK.transpose(1, 0, 2)[:, :, :k]) if k > 1 else []
        dense = [b for b in alike if routes_B[b]]
        if dense:
            raise MoeInspectError(
                f"{where}: all tokens go to one expert in layer {dense[0]}, as a dense layer "
                "reads: give --model or --config"
            )
        return context.routers_of([int(b) for b in np.nonzero(routes_B)[0]], E, k, where)
    raise MoeInspectError(f"{files[0][0]} holds no token")


@dataclass(frozen=True)
class Pass:
    """One record with tokens, checked: what one rank computed in one forward pass. `lengths`: how
    many tokens of each request there are, in order."""

    where: str
    path: Path
    domain: str
    number: tuple[int, str]  # forward_pass_id and gatherer_key
    mode: int
    token_id: np.ndarray
    position: np.ndarray
    physical_BTK: np.ndarray
    lengths: list[int]

    @property
    def digest(self) -> bytes:
        arrays = (self.token_id, self.position, self.physical_BTK)
        data = b"%d " % self.number[0] + b"".join(array.tobytes() for array in arrays)
        return blake2b(data, digest_size=16).digest()

    def is_decoded(self, start: int, length: int) -> bool:
        """Whether a request's tokens in this pass are one decoded token, not a prompt. A mixed pass
        does not say which it is: a prompt of one token begins at position 0."""
        mode = self.mode
        return mode != EXTEND and length == 1 and (mode != MIXED or self.position[start] > 0)


def _batches(
    context: ImportContext, files: list[File], maps: dict[Path, np.ndarray], routers: list[Router]
) -> Iterator[RoutedBatch]:
    numbers = Numbering()
    batch_of: dict[tuple[int, str], int] = {}
    seen: set[bytes] = set()
    repeated = 0
    decoded: dict[Path, int] = {}  # file → the document of its decoded tokens
    bytes_of = {path: path.stat().st_size / len(content["records"]) for path, _, content in files}
    for where, path, source, record in records(files):
        context.read(int(bytes_of[path]))
        one = _pass_of(where, path, source, record, maps[path].shape, routers)
        if one is None:
            continue
        if (digest := one.digest) in seen:
            repeated += 1
            continue
        seen.add(digest)
        batch = batch_of.setdefault(one.number, len(batch_of))
        yield from _requests(one, _logical_ids(one, maps[path], routers), batch, numbers, decoded)
    if repeated:
        context.warn(
            f"{repeated:,} passes were recorded by several ranks alike (tensor parallelism): each "
            "is counted once"
        )


def _pass_of(
    where: str,
    path: Path,
    source: ImportSource,
    record: dict[str, Any],
    shape: tuple[int, ...],
    routers: list[Router],
) -> Pass | None:
    """The record, checked; None where it has no tokens. `shape`: that of the file's map [B, P]."""
    B, P = shape
    topk = (B, None, None)
    physical_BTK = array_of(record, "topk_ids_of_layer", where, topk, -1, P - 1)
    T, K = physical_BTK.shape[1:]
    if T == 0:
        return None
    if T > MOST_TOKENS or max(r.top_k for r in routers) > K:
        raise MoeInspectError(
            f"{where}: topk_ids_of_layer is {list(physical_BTK.shape)}, which does not fit this "
            "model"
        )
    mode = integer(record.get("forward_mode"), f"{where}: forward_mode", 1, 99)
    if mode not in (EXTEND, DECODE, MIXED, VERIFY):
        raise MoeInspectError(
            f"{where}: forward_mode is {mode} with {T} tokens: only extend, decode, mixed "
            "and verify are known"
        )
    lengths = (
        [1] * T
        if mode in (DECODE, VERIFY)
        else _list(record, "extend_seq_lens", where, None).tolist()
    )
    if sum(lengths) != T:
        raise MoeInspectError(
            f"{where}: extend_seq_lens sums to {sum(lengths)}, the pass has {T} tokens"
        )
    pass_id = integer(record.get("forward_pass_id"), f"{where}: forward_pass_id", 0, 2**62)
    return Pass(
        where,
        path,
        source.domain or "sglang",
        (pass_id, str(record.get("gatherer_key"))),
        mode,
        _list(record, "input_ids", where, T),
        _list(record, "positions", where, T),
        physical_BTK,
        lengths,
    )


def _logical_ids(one: Pass, map_BP: np.ndarray, routers: list[Router]) -> list[np.ndarray]:
    """ids [T, K] of each router, as the writer takes them."""
    ids = []
    for router in routers:
        physical_TK = one.physical_BTK[router.layer]
        logical_TK = np.where(physical_TK >= 0, map_BP[router.layer][physical_TK], -1)
        ids.append(checked_ids(logical_TK, router, f"{one.where}, layer {router.layer}"))
    return ids


def _requests(
    one: Pass,
    ids: list[np.ndarray],
    batch: int,
    numbers: Numbering,
    decoded: dict[Path, int],
) -> Iterator[RoutedBatch]:
    """A batch per prompt of a pass, and one of all its decoded tokens."""
    domain = numbers.domain(one.domain)
    end, singles = 0, []
    for length in one.lengths:
        start, end = end, end + length
        if length == 0:
            continue
        if one.is_decoded(start, length):
            singles.append(start)
            continue
        part = slice(start, end)
        if (np.diff(one.position[part]) != 1).any():
            raise MoeInspectError(
                f"{one.where}: positions of the {length} tokens from {start} on do not "
                "follow each other"
            )
        document, documents = numbers.document(one.domain, one.where, length)
        yield batch_of_decisions(
            numbers,
            Tokens(document, domain, numbers.sequence(), one.position[part], one.token_id[part]),
            [i[part] for i in ids],
            documents=documents,
            batch=batch,
        )
    if singles:
        documents = []
        if one.path not in decoded:
            decoded[one.path], documents = numbers.document(one.domain, f"{one.path}: decoded", 0)
        rows = np.array(singles)
        yield batch_of_decisions(
            numbers,
            Tokens(
                decoded[one.path],
                domain,
                np.arange(len(rows)) + numbers.sequence(len(rows)),
                one.position[rows],
                one.token_id[rows],
            ),
            [i[rows] for i in ids],
            documents=documents,
            batch=batch,
            phase="decode",
        )


def _list(record: dict[str, Any], name: str, where: str, length: int | None) -> np.ndarray:
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
    return {"stat": stat, "per_pass": per_pass, "per_token": per_token}[modes.pop()](context, files)


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

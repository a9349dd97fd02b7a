"""Megatron-Core's router trace: JSONL, a line a call of a router, a file a rank; the logits beside it in `logits_rank{r}.bin` (bfloat16).

Megatron numbers layers from 1. T tokens, K slots, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.config import MOST_EXPERTS
from moe_inspect.trace.importers.job import Imported, Job, Numbering, integer, integers, routed
from moe_inspect.trace.importers.registry import importer, named
from moe_inspect.trace.importers.routed import checked_ids
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

Call = tuple[str, dict[str, Any]]  # where, fields
Spot = tuple[str, int, int]  # block, mtp_idx, layer as Megatron numbers it


@importer(
    "megatron",
    reads="JSONL of Megatron-Core's router trace, with `logits_rank<r>.bin` where there are logits",
    gives="decisions without weights, and logits; a step of a rank is a document",
    sniff=lambda name, head: b'"top_indices"' in head,
)
def megatron(job: Job) -> Imported:
    files = job.files(r".*\.jsonl", ".jsonl of a router trace")
    first = next((p for path, _ in files for p in _passes(job, path)), None)
    if first is None:
        raise MoeInspectError(f"{job.sources[0].path} holds no call of a router")
    spots = sorted(first)
    where, call = next(iter(first.values()))
    logits = "logit_offset" in call
    top_k = integer(call.get("topk"), f"{where}: topk", 1, MOST_EXPERTS)
    experts = _logits_shape(where, call)[1] if logits else job.known_experts(where)
    from_zero = min(layer for _, _, layer in spots) == 0
    if from_zero:
        job.warn(f"{where.partition(' line')[0]} numbers layers from 0, where Megatron does so from 1: taken as it stands")
    decoder = [layer - (not from_zero) for block, _, layer in spots if block == "decoder"]
    routers = job.routers_of(decoder, experts, top_k, where) if decoder else []
    after = job.facts.layers if job.facts else max(decoder, default=-1) + 1  # the layers of multi-token prediction come after the model's
    mtp = [s for s in spots if s[0] == "mtp"]
    for n, (_, index, layer) in enumerate(mtp):
        routers.append(Router(after + n, "mtp", f"mtp.{index}.layers.{layer - (not from_zero)}", experts, top_k))
    by_spot = dict(zip([s for s in spots if s[0] == "decoder"] + mtp, routers, strict=True))
    return Imported(
        routers,
        _batches(job, files, by_spot, logits),
        logits=logits,
        notes=["token ids, sequences and positions are not in the source", "a document is what one rank computed in one step"],
    )


def _passes(job: Job, path: Path) -> Iterator[dict[Spot, Call]]:
    """The calls of each pass: a new one begins with another step or rank, or when a router is called again."""
    calls: dict[Spot, Call] = {}
    current: tuple[int, int] | None = None
    for where, fields in job.json_lines(path):
        if (stage := fields.get("stage", "pre_dispatch")) != "pre_dispatch":
            raise MoeInspectError(f"{where}: stage is {str(stage)[:40]!r}, only pre_dispatch is known")
        if (block := fields.get("block", "decoder")) not in ("decoder", "mtp"):
            raise MoeInspectError(f"{where}: block is {str(block)[:40]!r}, not decoder or mtp")
        step = integer(fields.get("step"), f"{where}: step"), integer(fields.get("rank"), f"{where}: rank")
        layer = integer(fields.get("layer"), f"{where}: layer", 0, 2**15)
        spot = (block, integer(fields.get("mtp_idx") or 0, f"{where}: mtp_idx", 0, 2**15), layer)
        if calls and (step != current or spot in calls):
            yield calls
            calls = {}
        current = step
        calls[spot] = where, fields
    if calls:
        yield calls


def _batches(job: Job, files: list[tuple[Path, Any]], routers: dict[Spot, Router], logits: bool) -> Iterator[RoutedBatch]:
    numbers = Numbering()
    seen: dict[int, set[bytes]] = {}  # step → what ranks did in it
    alike = 0
    for path, source in files:
        domain = source.domain or re.sub(r"_?rank\d+$", "", named(path)) or named(path)
        code = numbers.domain(domain)
        quiet = replace(job, read=lambda n: None) if path == files[0][0] else job  # the first pass of it has been told of
        for calls in _passes(quiet, path):
            where, fields = next(iter(calls.values()))
            if odd := set(calls) ^ set(routers):
                block, _, layer = min(odd)
                how = "lacks" if (block, _, layer) in routers else "has"
                raise MoeInspectError(
                    f"{where}: step {fields['step']} of rank {fields['rank']} {how} layer {layer}, the first pass does not agree"
                )
            ids: list[np.ndarray] = []
            values: list[np.ndarray] = []
            digest = blake2b(digest_size=16)
            T = integer(fields.get("num_tokens"), f"{where}: num_tokens", 0, 2**26)
            for spot, router in routers.items():
                at, call = calls[spot]
                if integer(call.get("num_tokens"), f"{at}: num_tokens") != T:
                    raise MoeInspectError(f"{at}: num_tokens is {call['num_tokens']}, {T} in {where}")
                if integer(call.get("topk"), f"{at}: topk") != router.top_k:
                    raise MoeInspectError(f"{at}: topk is {call['topk']}, {router.top_k} in the first pass")
                ids_TK = integers(call.get("top_indices"), f"{at}: top_indices", (T, router.top_k), -1, MOST_EXPERTS)
                ids.append(checked_ids(ids_TK, router, f"{at}: top_indices"))
                digest.update(ids[-1].tobytes())
                if logits:
                    values.append(_logits(at, call, T, router.experts))
            if T == 0:
                continue
            if digest.digest() in seen.setdefault(fields["step"], set()) and T > 1:
                alike += 1
                continue
            seen[fields["step"]].add(digest.digest())
            document, documents = numbers.document(domain, f"{path.name} step {fields['step']} rank {fields['rank']}", T)
            yield routed(
                numbers,
                ids,
                logits=values or None,
                document=document,
                documents=documents,
                domain=code,
                sequence=np.arange(T) + numbers.sequence(T),  # which tokens follow each other is not said
                position=np.zeros(T, np.int32),
                batch=fields["step"],
            )
    if alike:
        job.warn(f"{alike:,} passes were recorded by several ranks alike (tensor parallelism): each is taken once")


def _logits_shape(where: str, call: dict[str, Any]) -> tuple[int, int]:
    shape = integers(call.get("logit_shape"), f"{where}: logit_shape", (2,), 0, 2**26)
    return int(shape[0]), integer(int(shape[1]), f"{where}: logit_shape", 1, MOST_EXPERTS)


def _logits(where: str, call: dict[str, Any], T: int, E: int) -> np.ndarray:
    """float16 [T, E], from the sidecar. What the line declares must fit the tokens and the file before anything is read."""
    if _logits_shape(where, call) != (T, E):
        raise MoeInspectError(f"{where}: logit_shape is {call['logit_shape']}, not [{T}, {E}]")
    offset = integer(call.get("logit_offset"), f"{where}: logit_offset", 0, 2**62)
    size = integer(call.get("logit_bytes"), f"{where}: logit_bytes", 0, 2**62)
    path = Path(where.rpartition(" line ")[0]).parent / f"logits_rank{call['rank']}.bin"
    if not path.is_file():
        raise MoeInspectError(f"{where}: its logits are not there: no {path}")
    if size != 2 * T * E or offset + size > path.stat().st_size:
        raise MoeInspectError(
            f"{where}: logit_bytes is {size:,} at {offset:,}: [{T}, {E}] of bfloat16 is {2 * T * E:,}, {path} has {path.stat().st_size:,}"
        )
    bits = np.fromfile(path, "<u2", T * E, offset=offset)
    with np.errstate(over="ignore"):
        values_TE = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16).reshape(T, E)
    if np.isnan(values_TE).any():
        raise MoeInspectError(f"{where}: a router logit of token {int(np.isnan(values_TE).any(1).argmax())} is NaN")
    return values_TE

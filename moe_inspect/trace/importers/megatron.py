"""Megatron-Core's router trace: JSONL, a line a call of a router, a file a rank; the logits beside it in `logits_rank{r}.bin` (bfloat16).

T tokens, K slots, E experts. Megatron's layer numbers go from 1 through the whole model; those in the names of its modules, which its
tracer may write, from 0 and in each pipeline stage anew: files of such stages look like those of one stage, and only a config tells.

A rank has the routers of its own pipeline stage. Files whose first passes have the same routers are of one stage, and the i-th rank of
a stage, by number, fed the i-th of the next: in every order in which Megatron numbers ranks (stages outermost, or data parallelism by
`--use-tp-pp-dp-mapping`) those two differ in the stage alone. Every stage meets the microbatches of a step in the same order, so the
n-th pass of a step at one stage is the n-th at the others; passes that a rank computed again for its backward (recomputed activations)
are left out first. Interleaved stages are refused: which calls are of one microbatch the file does not say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.config import MOST_EXPERTS
from moe_inspect.trace.importers.job import Imported, Job, Numbering, Source, integer, integers, routed
from moe_inspect.trace.importers.registry import importer, named
from moe_inspect.trace.importers.routed import checked_ids
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

Call = tuple[str, dict[str, Any]]  # where, fields
Spot = tuple[str, int, int]  # block, mtp_idx, layer as Megatron numbers it


@dataclass(frozen=True)
class File:
    """A file of one rank, by its first pass: the first call, and the routers in the order of their calls."""

    path: Path
    source: Source
    rank: int
    spots: list[Spot]
    where: str
    call: dict[str, Any]


@importer(
    "megatron",
    reads="JSONL of Megatron-Core's router trace, with `logits_rank<r>.bin` where there are logits",
    gives="decisions without weights, and logits; pipeline stages are joined; a step of a rank is a document",
    sniff=lambda name, head: b'"top_indices"' in head,
)
def megatron(job: Job) -> Imported:
    quiet = replace(job, read=lambda n: None)  # of bytes that will be read again
    files = [f for path, source in job.files(r".*\.jsonl", ".jsonl of a router trace") if (f := _file(quiet, path, source))]
    if not files:
        raise MoeInspectError(f"{job.sources[0].path} holds no call of a router")
    columns = _columns(files)
    where, call = files[0].where, files[0].call
    logits = "logit_offset" in call
    if odd := next((f for f in columns[0] if ("logit_offset" in f.call) != logits), None):
        raise MoeInspectError(f"{odd.where} has {'no ' if logits else ''}logits, {where} has{'' if logits else ' none'}")
    top_k = integer(call.get("topk"), f"{where}: topk", 1, MOST_EXPERTS)
    experts = _logits_shape(where, call)[1] if logits else job.known_experts(where)
    spots = sorted({spot for f in columns[0] for spot in f.spots})
    routers = _routers(job, spots, experts, top_k, where)
    notes = ["token ids, sequences and positions are not in the source", "a document is what one rank computed in one step"]
    if (stages := len(columns[0])) > 1:
        pairs = ", ".join(" + ".join(str(f.rank) for f in column) for column in columns[:3]) + ", …" * (len(columns) > 3)
        notes.append(f"{stages} pipeline stages: the i-th rank of a stage, by number, is taken to have fed the i-th of the next ({pairs})")
    return Imported(routers, _batches(job, columns, dict(zip(spots, routers, strict=True)), logits), logits=logits, notes=notes)


def _routers(job: Job, spots: list[Spot], experts: int, top_k: int, where: str) -> list[Router]:
    decoder = [layer for block, _, layer in spots if block == "decoder"]
    stated = sorted(job.facts.experts) if job.facts else None
    from_zero = min(layer for _, _, layer in spots) == 0 or decoder == stated
    if from_zero and decoder != stated:
        job.warn(
            f"{where.partition(' line')[0]} numbers layers from 0, where Megatron does so from 1: taken as it stands; "
            "whether each pipeline stage numbers its own so, --model or --config would say"
        )
    layers = [layer - (not from_zero) for layer in decoder]
    routers = job.routers_of(layers, experts, top_k, where) if layers else []
    if missing := sorted(set(stated or ()) - set(layers)):
        raise MoeInspectError(
            f"{where}: layers {', '.join(map(str, missing[:8]))} (from 0) have experts in the config and are in no file: "
            "give those of all ranks, of a run that numbers layers through all pipeline stages"
        )
    after = job.facts.layers if job.facts else max(layers, default=-1) + 1  # the layers of multi-token prediction come after the model's
    for n, (_, index, layer) in enumerate(s for s in spots if s[0] == "mtp"):
        routers.append(Router(after + n, "mtp", f"mtp.{index}.layers.{layer - (not from_zero)}", experts, top_k))
    return routers


def _file(job: Job, path: Path, source: Source) -> File | None:
    """None of a file without calls, as a stage of dense layers has."""
    if not (calls := next(_passes(job, path), None)):
        return None
    where, call = next(iter(calls.values()))
    return File(path, source, call["rank"], list(calls), where, call)


def _columns(files: list[File]) -> list[list[File]]:
    """The files that belong together: one of each stage, in the order of layers."""
    stages: dict[frozenset[Spot], File] = {}  # routers → the first file that has them
    holder: dict[Spot, File] = {}
    for file in files:
        if (spots := frozenset(file.spots)) in stages:
            continue
        if both := min(spots & holder.keys(), default=None):
            raise MoeInspectError(
                f"{file.path} has layer {both[2]} and so has {holder[both].path}, but not the same layers in all, as a pipeline stage has: are calls missing, or does each stage number its layers from 0?"
            )
        stages[spots] = file
        holder |= dict.fromkeys(spots, file)
    if len(stages) == 1:
        return [[file] for file in files]
    columns: list[list[File]] = []
    for run in dict.fromkeys(f.source.domain for f in files):
        mine = sorted((f for f in files if f.source.domain == run), key=lambda f: f.rank)
        for a, b in pairwise(mine):
            if a.rank == b.rank:
                raise MoeInspectError(
                    f"{a.path} and {b.path} are both of rank {a.rank}, by which pipeline stages are paired: import runs apart, or each as LABEL=FOLDER"
                )
        ranks = {spots: [f for f in mine if spots == set(f.spots)] for spots in sorted(stages, key=min)}
        if len({len(stage) for stage in ranks.values()}) > 1:
            counts = "; ".join(f"{len(stage)} of {_listed(spots)}, as in {stages[spots].path}" for spots, stage in ranks.items())
            raise MoeInspectError(f"not as many ranks of each pipeline stage: {counts}: give the files of all ranks")
        for a, b in pairwise(stage[0] for stage in ranks.values()):
            if a.rank > b.rank:
                raise MoeInspectError(
                    f"{a.path} is of rank {a.rank} with {_listed(a.spots)}, {b.path} of {b.rank} with {_listed(b.spots)}: later pipeline stages have higher ranks; does each stage number its layers from 0?"
                )
        columns += map(list, zip(*ranks.values(), strict=True))
    return columns


def _listed(spots: Iterable[Spot]) -> str:
    layers = [str(layer) for _, _, layer in sorted(spots)]
    return f"layer{'s' * (len(layers) > 1)} {', '.join(layers[:8])}{', …' * (len(layers) > 8)}"


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
        index = integer(fields.get("mtp_idx") or 0, f"{where}: mtp_idx", 0, 2**15)
        spot = (block, index if block == "mtp" else 0, layer)
        if calls and (step != current or spot in calls):
            yield calls
            calls = {}
        current = step
        calls[spot] = where, fields
    if calls:
        yield calls


def _own(job: Job, file: File, staged: bool, told: Counter[str]) -> Iterator[dict[Spot, Call]]:
    """The passes of a file, all of them through the routers of the first. `staged`: to be paired with those of other stages."""
    done: dict[int, set[bytes]] = {}  # of the current step
    for calls in _passes(job, file.path):
        where, fields = next(iter(calls.values()))
        here = f"{where}: step {fields['step']} of rank {fields['rank']}"
        if odd := calls.keys() ^ set(file.spots):
            how = "has" if (spot := min(odd)) in calls else "lacks"
            raise MoeInspectError(
                f"{here} {how} layer {spot[2]}, the first pass does not agree: calls are missing, or those of interleaved pipeline stages, which cannot be told apart"
            )
        if staged:
            if fields["rank"] != file.rank:
                raise MoeInspectError(f"{here} in a file of rank {file.rank}: with pipeline stages it takes a file a rank")
            found = [(f"{calls[spot][0]}: top_indices", calls[spot][1].get("top_indices")) for spot in file.spots]
            ids = [integers(value, at, (None, None), -1, MOST_EXPERTS) for at, value in found]
            digest = blake2b(b"".join(ids_TK.tobytes() for ids_TK in ids), digest_size=16).digest()
            done = {fields["step"]: done.get(fields["step"], set())}
            if digest in done[fields["step"]] and len(ids[0]) > 1:
                told["again"] += 1
                continue
            done[fields["step"]].add(digest)
            if list(calls) != file.spots:
                raise MoeInspectError(
                    f"{here} calls its routers in another order than the first pass: does it mix calls of several passes?"
                )
        yield calls


def _merged(job: Job, column: list[File], told: Counter[str]) -> Iterator[dict[Spot, Call]]:
    """The calls of each pass at all stages, which must agree on its step and tokens."""
    for stages in zip_longest(*(_own(job, file, len(column) > 1, told) for file in column)):
        heads = [next(iter(calls.values())) if calls else (str(file.path), {}) for file, calls in zip(column, stages, strict=True)]
        said = [f"step {h['step']} with {h.get('num_tokens')!r} tokens" if h else "no further pass" for _, h in heads]
        if other := next((i for i, words in enumerate(said) if words != said[0]), None):
            raise MoeInspectError(
                f"{heads[0][0]}: {said[0][:60]}, {heads[other][0]}: {said[other][:60]}: are both files whole, and of one run?"
            )
        yield {spot: call for calls in stages for spot, call in calls.items()}


def _batches(job: Job, columns: list[list[File]], routers: dict[Spot, Router], logits: bool) -> Iterator[RoutedBatch]:
    numbers = Numbering()
    seen: dict[int, set[bytes]] = {}  # step → what ranks did in it
    told: Counter[str] = Counter()  # of passes left out
    for column in columns:
        path, source = column[0].path, column[0].source
        domain = source.domain or re.sub(r"_?rank\d+$", "", named(path)) or named(path)
        code = numbers.domain(domain)
        for calls in _merged(job, column, told):
            where, fields = next(iter(calls.values()))
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
                told["alike"] += 1
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
    if again := told["again"]:
        job.warn(f"{again:,} passes repeat one of the same rank and step (activations recomputed): each is taken once")
    if alike := told["alike"]:
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

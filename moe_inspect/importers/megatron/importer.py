"""The router trace of Megatron-Core: one JSONL file per rank with one line per router call; logits,
if any, are in `logits_rank{r}.bin` (bfloat16).

The passes of a file are joined over pipeline stages. T tokens, K slots, E experts.

Two parts of Megatron write it. The training hook reads the map of chosen experts: ids ascend, and
the gate weights' order is not in them. The inference engine writes the router's own ids. They
number layers differently: see `layers`. Only the hook writes `hs_offset` and `logit_offset`.
It writes no call in which a capacity factor dropped a token.

A rank has the routers of its own pipeline stage. Files whose first passes have the same routers are
of one stage, and the i-th rank of a stage, by number, fed the i-th of the next: in every order in
which Megatron numbers ranks (stages outermost, or data parallelism by `--use-tp-pp-dp-mapping`)
those two differ in the stage alone. Every stage meets the microbatches of a step in the same order,
so the n-th pass of a step at one stage is the n-th at the others. Routers that a rank calls again
for its backward (activation recomputation), all of them or some, are left out first. Interleaved
stages are refused: the file does not say which calls belong to one microbatch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice, pairwise, zip_longest
from pathlib import Path

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import Numbering
from moe_inspect.importers.context import ImportContext, Imported, importer, named
from moe_inspect.importers.megatron import layers
from moe_inspect.importers.megatron.counts import tokens_per_expert
from moe_inspect.importers.megatron.layers import RankFile, Spot
from moe_inspect.importers.routed import checked_ids, repeats
from moe_inspect.importers.values import Fields, integer, integers
from moe_inspect.model.config import MOST_EXPERTS
from moe_inspect.text import join_first
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch


@importer(
    "megatron",
    gives=(
        "decisions without weights, and logits; pipeline stages are joined; a step of a rank is "
        "a document. Counts of `tokens_per_expert`"
    ),
    sniff=lambda name, head: (
        b'"top_indices"' in head
        or b'"tpe"' in head
        or re.fullmatch(r"router_trace_rank\d+\.jsonl", name) is not None
    ),
    options=("pipeline_stages",),
)
def megatron(context: ImportContext) -> Imported:
    # of bytes that will be read again
    quiet = replace(context, read=lambda n: None, workers=None)
    found = context.files(r".*\.jsonl", ".jsonl of a router trace")
    # of each file that is not empty
    counts = [of for path, _ in found for of in islice(quiet.prepared(path, _is_counts), 1)]
    if any(counts):
        if not all(counts):
            raise MoeInspectError(
                f"{context.sources[0].path} holds a router trace and tokens_per_expert: import one "
                "of the two"
            )
        return tokens_per_expert(context, found)
    files: list[File] = []
    empty: list[layers.EmptyFile] = []  # files that a stage of dense layers writes
    for path, source in found:
        if calls := next(passes_of(quiet, path), None):
            call = next(iter(calls.values()))
            files.append(File(path, source, call.fields["rank"], list(calls), first=call))
        else:
            empty.append((path, source))
    if not files:
        raise MoeInspectError(f"{context.sources[0].path} holds no call of a router: {NO_CALL}")
    files = layers.located(context, files, empty, written_by_hook(quiet, files))
    columns = columns_of(files)
    where, call = columns[0][0].first.where, columns[0][0].first.fields
    stages, spots = len(columns[0]), sorted({spot for f in columns[0] for spot in f.spots})
    logits = "logit_offset" in call
    if odd := next((f for f in columns[0] if ("logit_offset" in f.first.fields) != logits), None):
        why = f"{where} has{'' if logits else ' none'}"
        raise MoeInspectError(f"{odd.first.where} has {'no ' if logits else ''}logits, {why}")
    top_k = integer(call.get("topk"), f"{where}: topk", 1, MOST_EXPERTS)
    experts = logits_shape(where, call)[1] if logits else context.known_experts(where)
    routers = layers.routers_of(context, spots, experts, top_k, where)
    notes = [
        "token ids, sequences and positions are not in the source",
        "a document is what one rank computed in one step",
    ]
    if logits:
        notes.append(
            "logits are rounded to bfloat16: experts of a token whose logits are equal are in "
            "the order of their ids"
        )
    if stages > 1:
        pairs = join_first([" + ".join(str(f.rank) for f in column) for column in columns], 3)
        notes.append(
            f"{stages} pipeline stages: the i-th rank of a stage, by number, is taken to have "
            f"fed the i-th of the next ({pairs})"
        )
    return Imported(
        routers,
        _batches(context, columns, dict(zip(spots, routers, strict=True)), logits),
        logits=logits,
        notes=notes,
    )


def _batches(
    context: ImportContext, columns: list[list[File]], routers: dict[Spot, Router], logits: bool
) -> Iterator[RoutedBatch]:
    numbers = Numbering()
    seen: dict[tuple[str | None, int], set[bytes]] = {}  # run and step → what its ranks did in it
    left_out: Counter[str] = Counter()  # why a pass is left out → how many are
    for column in columns:
        path, source = column[0].path, column[0].source
        domain = source.domain or re.sub(r"_?rank\d+$", "", named(path)) or named(path)
        for calls in joined_passes(context, column, left_out):
            first = next(iter(calls.values()))
            step = first.fields["step"]
            ids, values = list[np.ndarray](), list[np.ndarray]()
            T = integer(first.fields.get("num_tokens"), f"{first.where}: num_tokens", 0, 2**26)
            for spot, router in routers.items():
                call = calls[spot]
                ids.append(checked(call, T, router, first))
                if logits:
                    values.append(logits_of(call.where, call.fields, T, router.experts))
            if T == 0:
                continue
            made = blake2b(b"".join(ids_TK.tobytes() for ids_TK in ids), digest_size=16).digest()
            if made in seen.setdefault((source.domain, step), set()) and T > 1:
                left_out["were recorded by several ranks alike (tensor parallelism)"] += 1
                continue
            seen[source.domain, step].add(made)
            name = f"{path.name} step {step} rank {first.fields['rank']}"
            numbers.document(domain, name, T)
            yield numbers.decisions(ids, logits=values or None, batch=step)
    for what, passes in sorted(left_out.items()):
        context.warn(f"{passes:,} passes {what}: each is counted once")


SURE = 20  # different decisions in ascending order: by chance once in a million
NO_CALL = (
    "Megatron's tracer writes no call of a router when a capacity factor "
    "(moe_expert_capacity_factor) drops tokens"
)


@dataclass(frozen=True)
class Call:
    """A line: one call of a router. `where`: file and line."""

    where: str
    fields: Fields
    ids_TK: np.ndarray


Pass = dict[Spot, Call]  # in the order of its calls


@dataclass(frozen=True)
class File(RankFile):
    """A file of one rank, by its first pass."""

    first: Call = field(kw_only=True)


def written_by_hook(context: ImportContext, files: list[File]) -> bool:
    """Whether the training hook has certainly written these files. Reads only as much as it
    needs."""
    if any(name in f.first.fields for f in files for name in ("hs_offset", "logit_offset")):
        return True
    different: set[tuple[Spot, bytes]] = set()
    for file in files:
        for calls in passes_of(context, file.path):
            for spot, call in calls.items():
                if call.ids_TK.shape[1] < 2 or (np.diff(call.ids_TK) <= 0).any():
                    return False
                different |= {
                    (spot, ids_K.tobytes()) for ids_K in np.unique(call.ids_TK, axis=0)[:SURE]
                }
                if len(different) >= SURE:
                    return True
    return False


def columns_of(files: list[File]) -> list[list[File]]:
    """Groups of files that belong together: one of each stage, in the order of layers."""
    stages: dict[frozenset[Spot], File] = {}  # routers → the first file that has them
    holder: dict[Spot, File] = {}
    for file in files:
        if (spots := frozenset(file.spots)) in stages:
            continue
        if both := min(spots & holder.keys(), default=None):
            raise MoeInspectError(
                f"{file.path} has layer {both[2]} (from 0) and so has {holder[both].path}, but "
                "not the same layers in all, as a pipeline stage has: are calls missing? If "
                "each stage numbers its layers from 0, give --pipeline-stages and --model or "
                "--config"
            )
        stages[spots] = file
        holder |= dict.fromkeys(spots, file)
    if len(stages) == 1:
        return [[file] for file in files]
    columns: list[list[File]] = []
    for mine in layers.runs(files):
        ranks = {
            spots: [f for f in mine if spots == set(f.spots)] for spots in sorted(stages, key=min)
        }
        if len({len(stage) for stage in ranks.values()}) > 1:
            counts = "; ".join(
                f"{len(stage)} of {_listed(spots)}, as in {stages[spots].path}"
                for spots, stage in ranks.items()
            )
            why = f"{counts}: give the files of all ranks"
            raise MoeInspectError(f"pipeline stages have different numbers of ranks: {why}")
        for a, b in pairwise(stage[0] for stage in ranks.values()):
            if a.rank > b.rank:
                raise MoeInspectError(
                    f"{a.path} is of rank {a.rank} with {_listed(a.spots)}, {b.path} of {b.rank} "
                    f"with {_listed(b.spots)}: later pipeline stages have higher ranks. If each "
                    "stage numbers its layers from 0, give --pipeline-stages and --model or "
                    "--config"
                )
        columns += map(list, zip(*ranks.values(), strict=True))
    return columns


def _listed(spots: Iterable[Spot]) -> str:
    numbers = [layer for _, _, layer in sorted(spots)]
    return f"layer{'s' * (len(numbers) > 1)} {join_first(numbers)} (from 0)"


def passes_of(context: ImportContext, path: Path) -> Iterator[Pass]:
    """The calls of each pass: a new one begins with another step or rank, or when a router is
    called again."""
    calls: Pass = {}
    current: tuple[int, int] | None = None
    for step, spot, call in context.prepared(path, _call):
        if calls and (step != current or spot in calls):
            yield calls
            calls = {}
        current = step
        calls[spot] = call
    if calls:
        yield calls


def _is_counts(where: str, fields: Fields) -> bool:
    return "tpe" in fields


def _call(where: str, fields: Fields) -> tuple[tuple[int, int], Spot, Call]:
    """Step and rank, the router, and its call, of a line."""
    if (stage := fields.get("stage", "pre_dispatch")) != "pre_dispatch":
        raise MoeInspectError(f"{where}: stage is {str(stage)[:40]!r}, only pre_dispatch is known")
    step, rank = (integer(fields.get(name), f"{where}: {name}") for name in ("step", "rank"))
    spot = layers.spot_of({"block": "decoder"} | fields, where)
    chosen, shape = fields.pop("top_indices", None), (None, None)
    ids_TK = integers(chosen, f"{where}: top_indices", shape, -1, MOST_EXPERTS)
    return (step, rank), spot, Call(where, fields, ids_TK)


def _own(
    context: ImportContext, file: File, staged: bool, left_out: Counter[str]
) -> Iterator[Pass]:
    """The passes of a file, by block index. All must call the same routers as the first. `staged`:
    they will be paired with those of other stages."""
    done: dict[Spot, set[bytes]] = {}
    current: tuple[int, int] | None = None  # step and rank of what is done
    for numbered in passes_of(context, file.path):
        calls = {file.spot(spot): call for spot, call in numbered.items()}
        first = next(iter(calls.values()))
        step = first.fields["step"], first.fields["rank"]
        done, current = done if step == current else {spot: set() for spot in file.spots}, step
        here = f"{first.where}: step {step[0]} of rank {step[1]}"
        digests = {
            spot: blake2b(call.ids_TK.tobytes(), digest_size=16).digest()
            for spot, call in calls.items()
        }
        odd = calls.keys() ^ set(file.spots)
        # a router that is called again with the same input chooses the same; so may another single
        # token
        if all(digests[spot] in done.get(spot, ()) for spot in calls) and (
            odd or len(first.ids_TK) > 1
        ):
            left_out["repeat one of the same rank and step (activations recomputed)"] += 1
            continue
        if odd:
            how = "has" if (spot := min(odd)) in calls else "lacks"
            raise MoeInspectError(
                f"{here} {how} layer {spot[2]} (from 0), the first pass does not agree: calls "
                "are missing, or those of interleaved pipeline stages, which cannot be told "
                f"apart. {NO_CALL}"
            )
        for spot, digest in digests.items():
            done[spot].add(digest)
        if staged and step[1] != file.rank:
            why = "with pipeline stages it takes one file per rank"
            raise MoeInspectError(f"{here} in a file of rank {file.rank}: {why}")
        if list(calls) != file.spots:
            raise MoeInspectError(
                f"{here} calls its routers in another order than the first pass: does it mix "
                "calls of several passes?"
            )
        yield calls


def joined_passes(
    context: ImportContext, column: list[File], left_out: Counter[str]
) -> Iterator[Pass]:
    """The calls of each pass at all stages, which must agree on its step and tokens."""
    for stages in zip_longest(*(_own(context, file, len(column) > 1, left_out) for file in column)):
        said = list[tuple[str, object]]()  # of each stage, and where it says so
        for calls, file in zip(stages, column, strict=True):
            if calls:
                head = next(iter(calls.values()))
                tokens = f"{head.fields.get('num_tokens')!r} tokens"
                said.append((f"step {head.fields['step']} with {tokens}", head.where))
            else:
                said.append(("no further pass", file.path))
        words, place = said[0]
        if other := next((one for one in said if one[0] != words), None):
            why = f"{other[0][:60]}: are both files whole, and of one run?"
            raise MoeInspectError(f"{place}: {words[:60]}, {other[1]}: {why}")
        yield {spot: call for calls in stages for spot, call in calls.items()}


def checked(call: Call, T: int, router: Router, first: Call) -> np.ndarray:
    """The ids of a call as the writer takes them."""
    where, fields, ids_TK = f"{call.where}: top_indices", call.fields, call.ids_TK
    if integer(fields.get("num_tokens"), f"{call.where}: num_tokens") != T:
        raise MoeInspectError(
            f"{call.where}: num_tokens is {fields['num_tokens']}, {T} in {first.where}"
        )
    if integer(fields.get("topk"), f"{call.where}: topk") != router.top_k:
        raise MoeInspectError(
            f"{call.where}: topk is {fields['topk']}, {router.top_k} in the first pass"
        )
    if ids_TK.shape != (T, router.top_k) and (ids_TK.size or T):
        raise MoeInspectError(f"{where} has shape {list(ids_TK.shape)}, not {[T, router.top_k]}")
    load_E = np.bincount(ids_TK[ids_TK >= 0], minlength=router.experts)
    if ids_TK.size and load_E.min() == load_E.max() and repeats(ids_TK).any():
        raise MoeInspectError(
            f"{where} gives every expert {load_E[0]:,} assignments and tokens the same expert "
            "twice: the run filled experts up to their "
            "capacity (moe_pad_expert_input_to_capacity), and Megatron's tracer then writes no "
            "token's own experts"
        )
    return checked_ids(ids_TK, router, where)


def logits_shape(where: str, call: Fields) -> tuple[int, int]:
    shape = integers(call.get("logit_shape"), f"{where}: logit_shape", (2,), 0, 2**26)
    return int(shape[0]), integer(int(shape[1]), f"{where}: logit_shape", 1, MOST_EXPERTS)


def logits_of(where: str, call: Fields, T: int, E: int) -> np.ndarray:
    """float16 [T, E], from the sidecar. What the line declares must fit the tokens and the file
    before anything is read."""
    if logits_shape(where, call) != (T, E):
        raise MoeInspectError(f"{where}: logit_shape is {call['logit_shape']}, not [{T}, {E}]")
    offset = integer(call.get("logit_offset"), f"{where}: logit_offset", 0, 2**62)
    size = integer(call.get("logit_bytes"), f"{where}: logit_bytes", 0, 2**62)
    path = Path(where.rpartition(" line ")[0]).parent / f"logits_rank{call['rank']}.bin"
    if not path.is_file():
        raise MoeInspectError(f"{where}: its logits are not there: no {path}")
    if size != 2 * T * E or offset + size > path.stat().st_size:
        why = f"[{T}, {E}] of bfloat16 is {2 * T * E:,}, {path} has {path.stat().st_size:,}"
        raise MoeInspectError(f"{where}: logit_bytes is {size:,} at {offset:,}: {why}")
    bits = np.fromfile(path, "<u2", T * E, offset=offset)
    with np.errstate(over="ignore"):
        values_TE = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16).reshape(T, E)
    if np.isnan(values_TE).any():
        raise MoeInspectError(
            f"{where}: a router logit of token {int(np.isnan(values_TE).any(1).argmax())} is NaN"
        )
    return values_TE

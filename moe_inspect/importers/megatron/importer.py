"""The router trace of Megatron-Core: one JSONL file per rank with one line per router call; logits,
if any, are in `logits_rank{r}.bin` (bfloat16).

T tokens, K slots, E experts.

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
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import Numbering, batch_of_decisions, tokens_without_order
from moe_inspect.importers.context import ImportContext, Imported
from moe_inspect.importers.megatron.counts import tokens_per_expert
from moe_inspect.importers.megatron.layers import (
    EmptyFile,
    Spot,
    located,
    routers_of,
)
from moe_inspect.importers.megatron.passes import (
    NO_CALL,
    File,
    checked,
    columns_of,
    joined_passes,
    logits_of,
    logits_shape,
    passes_of,
    written_by_hook,
)
from moe_inspect.importers.registry import importer, named
from moe_inspect.importers.values import integer, parsed_object
from moe_inspect.model.config import MOST_EXPERTS
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
)
def megatron(context: ImportContext) -> Imported:
    # of bytes that will be read again
    quiet = replace(context, read=lambda n: None, workers=None)
    found = context.files(r".*\.jsonl", ".jsonl of a router trace")
    counts = [
        is_counts for path, _ in found if (is_counts := is_counts_file(quiet, path)) is not None
    ]
    if any(counts):
        if not all(counts):
            raise MoeInspectError(
                f"{context.sources[0].path} holds a router trace and tokens_per_expert: import one "
                "of the two"
            )
        return tokens_per_expert(context, found)
    files: list[File] = []
    empty: list[EmptyFile] = []  # files that a stage of dense layers writes
    for path, source in found:
        if calls := next(passes_of(quiet, path), None):
            call = next(iter(calls.values()))
            files.append(File(path, source, call.fields["rank"], list(calls), first=call))
        else:
            empty.append((path, source))
    if not files:
        raise MoeInspectError(f"{context.sources[0].path} holds no call of a router: {NO_CALL}")
    files = located(context, files, empty, written_by_hook(quiet, files))
    columns = columns_of(files)
    where, call = columns[0][0].first.where, columns[0][0].first.fields
    stages, spots = len(columns[0]), sorted({spot for f in columns[0] for spot in f.spots})
    logits = "logit_offset" in call
    if odd := next((f for f in columns[0] if ("logit_offset" in f.first.fields) != logits), None):
        raise MoeInspectError(
            f"{odd.first.where} has {'no ' if logits else ''}logits, {where} "
            f"has{'' if logits else ' none'}"
        )
    top_k = integer(call.get("topk"), f"{where}: topk", 1, MOST_EXPERTS)
    experts = logits_shape(where, call)[1] if logits else context.known_experts(where)
    routers = routers_of(context, spots, experts, top_k, where)
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
        pairs = ", ".join(
            " + ".join(str(f.rank) for f in column) for column in columns[:3]
        ) + ", …" * (len(columns) > 3)
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


def is_counts_file(context: ImportContext, path: Path) -> bool | None:
    """Whether the file is of tokens_per_expert; None where it is empty."""
    line = next(context.lines(path), None)
    return None if line is None else "tpe" in parsed_object(line[1], f"{path} line {line[0]}")


def _batches(
    context: ImportContext, columns: list[list[File]], routers: dict[Spot, Router], logits: bool
) -> Iterator[RoutedBatch]:
    numbers = Numbering()
    seen: dict[tuple[str | None, int], set[bytes]] = {}  # run and step → what its ranks did in it
    left_out: Counter[str] = Counter()  # of passes left out
    for column in columns:
        path, source = column[0].path, column[0].source
        domain = source.domain or re.sub(r"_?rank\d+$", "", named(path)) or named(path)
        code = numbers.domain(domain)
        for calls in joined_passes(context, column, left_out):
            first = next(iter(calls.values()))
            step = first.fields["step"]
            ids: list[np.ndarray] = []
            values: list[np.ndarray] = []
            digest = blake2b(digest_size=16)
            T = integer(first.fields.get("num_tokens"), f"{first.where}: num_tokens", 0, 2**26)
            for spot, router in routers.items():
                call = calls[spot]
                ids.append(checked(call, T, router, first))
                digest.update(ids[-1].tobytes())
                if logits:
                    values.append(logits_of(call.where, call.fields, T, router.experts))
            if T == 0:
                continue
            if digest.digest() in seen.setdefault((source.domain, step), set()) and T > 1:
                left_out["alike"] += 1
                continue
            seen[source.domain, step].add(digest.digest())
            document, documents = numbers.document(
                domain, f"{path.name} step {step} rank {first.fields['rank']}", T
            )
            yield batch_of_decisions(
                numbers,
                tokens_without_order(numbers, T, document, code),
                ids,
                logits=values or None,
                documents=documents,
                batch=step,
            )
    if again := left_out["again"]:
        context.warn(
            f"{again:,} passes repeat one of the same rank and step (activations recomputed): "
            "each is counted once"
        )
    if alike := left_out["alike"]:
        context.warn(
            f"{alike:,} passes were recorded by several ranks alike (tensor parallelism): each "
            "is counted once"
        )

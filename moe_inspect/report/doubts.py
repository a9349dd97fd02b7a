"""Is the data fit to be judged? What a trace shows of itself: too few tokens, domains of few documents, rows that repeat, experts
of which only one rank's were counted. T tokens, K slots, E experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moe_inspect.analysis.uncertainty import FEWEST_DOCUMENTS, noise_floor
from moe_inspect.report.words import counted, some

if TYPE_CHECKING:
    from moe_inspect.report.report import Report

RUN = 16  # identical rows one after the other that text does not make


def doubts(report: Report) -> list[str]:
    """A sentence for each reason to doubt the data."""
    return [said for said in (_few_tokens(report), _few_documents(report), _repeated(report)) if said]


def one_rank(report: Report) -> str | None:
    """Whether the experts with load are one aligned block, the same at every router: what is left where the counts of one rank of
    an expert-parallel run were taken for all."""
    counts, blocks = report.counts, set()
    for r in report.selection.routers:
        loaded = np.flatnonzero(counts.load_E(r))
        if len(loaded):
            blocks.add((int(loaded[0]), int(loaded[-1]) + 1, counts.routers[r].experts, counts.routers[r].top_k, len(loaded)))
    if len(blocks) != 1 or len(report.selection.routers) < 2:
        return None
    first, end, E, k, loaded = blocks.pop()
    size = end - first
    if size != loaded or size <= k or 2 * size > E or E % size or first % size:
        return None
    return (
        f"Only experts {first}-{end - 1} of {E} have any load, at every router alike: these look like the counts of one of {E // size} "
        "ranks under expert parallelism, not like dead experts. Add up the ranks, or record global expert ids."
    )


def _few_tokens(report: Report) -> str | None:
    counts, uneven = report.counts, report.thresholds.uneven
    rows = [(noise_floor(counts.tokens_of(r), counts.routers[r].experts, counts.routers[r].top_k), r) for r in counts.indices]
    floor, r = max((row for row in rows if not math.isnan(row[0])), default=(0.0, 0))
    if floor <= uneven or uneven <= 0:
        return None
    T, E = counts.tokens_of(r), counts.routers[r].experts
    # the floor goes down by the root of the tokens
    return (
        f"{counted(T, 'token')} {'is' if T == 1 else 'are'} few for {E} experts: chance alone takes the busiest to {1 + floor:.2f}x the mean. "
        f"About {_rounded(T * (floor / uneven) ** 2):,} would bring that under {1 + uneven:g}x."
    )


def _rounded(tokens: float) -> int:
    return int(float(f"{tokens:.1e}"))


def _few_documents(report: Report) -> str | None:
    counts = report.counts
    if counts.counts_only or len(counts.domains) < 2:
        return None
    documents_D = np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains))
    few = [f'"{d}" ({n})' for d, n in zip(counts.domains, documents_D, strict=True) if n < FEWEST_DOCUMENTS]
    if not few:
        return None
    return f"Domains of fewer than {FEWEST_DOCUMENTS} documents are as much their texts as domains: {some(few, 6, ', ')}."


def _repeated(report: Report) -> str | None:
    """Runs of the same token id with the same experts, in the first shard of each rank (warm-up comes first) and at the last router
    (where what came before a token tells most)."""
    if report.counts.counts_only:
        return None
    trace, router = report.trace, report.selection.routers[-1]
    rows = repeated = 0
    for shard in trace.shards:
        if shard.files.index:
            continue
        ids_TK = shard.ids(router)
        token_id_T = shard.tokens(["token_id"])["token_id"].to_numpy()
        if (seen_T := shard.seen(router)) is not None:
            token_id_T = token_id_T[seen_T]
        rows += len(ids_TK)
        repeated += in_runs(np.column_stack([ids_TK, token_id_T]))
    if not rows or repeated / rows < report.thresholds.repeated:
        return None
    return (
        f"{repeated:,} of the first {rows:,} tokens are in runs of {RUN} or more identical rows (token id and experts alike): warm-up "
        "or padding rows count as load."
    )


def in_runs(rows_TX: np.ndarray, run: int = RUN) -> int:
    """How many rows lie in runs of at least `run` identical ones."""
    if not len(rows_TX):
        return 0
    starts = np.flatnonzero(np.r_[True, (rows_TX[1:] != rows_TX[:-1]).any(1)])
    lengths = np.diff(np.r_[starts, len(rows_TX)])
    return int(lengths[lengths >= run].sum())

"""Is the data fit to be judged? What a trace shows of itself: too few tokens, domains of few
documents, rows that repeat, experts of which only one rank's were counted. T tokens, K slots, E
experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moe_inspect.analysis.counting.shard import selected_tokens
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, noise_floor
from moe_inspect.text import counted, some

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

CHANCE = 1e-3  # that dead experts fill whole ranks
RUN = 16  # identical rows one after the other that text does not make


def doubts(report: Report) -> list[str]:
    """A sentence for each reason to doubt the data."""
    return [
        said for said in (_few_tokens(report), _few_documents(report), _repeated(report)) if said
    ]


def missing_ranks(report: Report) -> str | None:
    """Whether experts without load fill whole ranks of an expert-parallel run, the same at every
    router, as by chance they hardly
    would: what is seen where the counts of some ranks were taken for all."""
    counts = report.counts
    load_of = {r: load_E for r in report.selection.routers if (load_E := counts.load_E(r)).any()}
    if len({len(load_E) for load_E in load_of.values()}) != 1:
        return None
    dead_LE = np.array(list(load_of.values())) == 0
    E, dead_L = dead_LE.shape[1], dead_LE.sum(1)
    likeliest, silent = CHANCE, np.zeros(0, np.int64)
    for ranks in (n for n in range(2, E + 1) if E % n == 0):
        silent_R = dead_LE.all(0).reshape(ranks, -1).all(1)
        gone = int(silent_R.sum()) * E // ranks
        there_R = np.flatnonzero(~silent_R)
        if not gone or not (_in_a_row(there_R) or _in_a_row(np.flatnonzero(silent_R))):
            continue
        likely = (
            2
            * ranks
            * math.prod(
                math.comb(E - gone, dead - gone) / math.comb(E, dead) for dead in dead_L.tolist()
            )
        )
        if likely < likeliest:
            likeliest, silent = likely, silent_R
    if not silent.any() or _one_choice(report, load_of):
        return None
    ranks, size = len(silent), E // len(silent)
    there = [
        f"{i * size}-{(i + 1) * size - 1}" if size > 1 else f"{i}" for i in np.flatnonzero(~silent)
    ]
    gone = [
        f"{i * size}-{(i + 1) * size - 1}" if size > 1 else f"{i}" for i in np.flatnonzero(silent)
    ]
    which = (
        f"Only experts {some(there, 4, ', ')} of {E} have any load"
        if len(there) < len(gone)
        else f"Experts {some(gone, 4, ', ')} of {E} have no load"
    )
    routers = ", at every router alike" if len(load_of) > 1 else ""
    return (
        f"{which}{routers}: these look like the counts of {len(there)} of {ranks} ranks under "
        "expert parallelism, not like dead experts. "
        "Add up the ranks, or record global expert ids."
    )


def _in_a_row(numbers: np.ndarray) -> bool:
    return bool((np.diff(numbers) == 1).all())


def _one_choice(report: Report, load_of: dict[int, np.ndarray]) -> bool:
    """Whether every token chose the same k experts: a router that has collapsed, or all of whose
    logits are equal."""
    return all(
        (load_E > 0).sum() == report.counts.routers[r].top_k and len(set(load_E[load_E > 0])) == 1
        for r, load_E in load_of.items()
    )


def _few_tokens(report: Report) -> str | None:
    counts, uneven = report.counts, report.thresholds.uneven
    rows = [
        (noise_floor(counts.tokens_of(r), counts.routers[r].experts, counts.routers[r].top_k), r)
        for r in counts.indices
    ]
    floor, r = max((row for row in rows if not math.isnan(row[0])), default=(0.0, 0))
    if floor <= uneven or uneven <= 0:
        return None
    T, E = counts.tokens_of(r), counts.routers[r].experts
    # the floor goes down by the root of the tokens
    return (
        f"{counted(T, 'token')} {'is' if T == 1 else 'are'} few for {E} experts: chance alone "
        f"takes the busiest to {1 + floor:.2f}x the mean. "
        f"About {_rounded(T * (floor / uneven) ** 2):,} would bring that under {1 + uneven:g}x."
    )


def _rounded(tokens: float) -> int:
    return int(float(f"{tokens:.1e}"))


def _few_documents(report: Report) -> str | None:
    counts = report.counts
    if counts.counts_only or len(counts.domains) < 2:
        return None
    documents_D = np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains))
    few = [
        f'"{d}" ({n})'
        for d, n in zip(counts.domains, documents_D, strict=True)
        if n < FEWEST_DOCUMENTS
    ]
    if not few:
        return None
    return (
        f"Domains of fewer than {FEWEST_DOCUMENTS} documents are as much their texts as domains: "
        f"{some(few, 6, ', ')}."
    )


def _repeated(report: Report) -> str | None:
    """Runs of the same token id with the same experts, in the first shard of each rank (warm-up
    comes first) and at the last router (where what came before a token tells most)."""
    if report.counts.counts_only:
        return None
    trace, router = report.trace, report.selection.routers[-1]
    rows = repeated = 0
    for shard in trace.shards:
        if shard.files.index:
            continue
        seen = selected_tokens(shard, report.selection, trace.routers[router].stack)
        slots = seen.of(shard.slots(router), router)
        rows += len(seen.token_id_T)
        repeated += in_runs(np.column_stack([*slots, seen.token_id_T]))
    if not rows or repeated / rows < report.thresholds.repeated:
        return None
    return (
        f"{repeated:,} of the first {rows:,} tokens are in runs of {RUN} or more identical rows "
        "(token id and experts alike): warm-up "
        "or padding rows count as load."
    )


def in_runs(rows_TX: np.ndarray, run: int = RUN) -> int:
    """How many rows lie in runs of at least `run` identical ones."""
    if not len(rows_TX):
        return 0
    starts = np.flatnonzero(np.r_[True, (rows_TX[1:] != rows_TX[:-1]).any(1)])
    lengths = np.diff(np.r_[starts, len(rows_TX)])
    return int(lengths[lengths >= run].sum())

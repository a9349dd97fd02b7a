"""Experts of two models matched by the tokens they share: two seeds of one architecture number
them by chance.

T tokens of the sample, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.comparison.aligning.align import Alignment
from moe_inspect.comparison.aligning.misaligned import chosen, sample_rows
from moe_inspect.trace.reader import Trace


def matched_overlaps(
    traces: tuple[Trace, Trace], alignment: Alignment, pairs: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, float, float, float]]:
    """Of each router: its index, the tokens of the sample that are judged, and the overlap as
    numbered, after matching, and after matching with the tokens of B shuffled, which is what
    matching finds in nothing. Experts are matched on every other document, and judged on the
    rest."""
    stacks = {traces[0].routers[r].stack for r, _ in pairs}
    sample = {stack: sample_rows(traces, alignment, stack) for stack in sorted(stacks)}
    for r, m in pairs:
        rows = sample[traces[0].routers[r].stack]
        if rows is None:
            continue
        a_TE, b_TE = chosen(rows.of_a, traces[0], r), chosen(rows.of_b, traces[1], m)
        document, at_T = np.unique(rows.document_T, return_inverse=True)
        fit_T = at_T % 2 == 0 if len(document) > 1 else np.arange(len(a_TE)) % 2 == 0
        shuffled_TE = np.random.default_rng([SEED, r]).permutation(b_TE)
        as_matched, by_chance = (
            overlap(a_TE[~fit_T], side_TE[~fit_T][:, match(a_TE[fit_T], side_TE[fit_T])])
            for side_TE in (b_TE, shuffled_TE)
        )
        as_numbered = overlap(a_TE[~fit_T], b_TE[~fit_T])
        yield r, int((~fit_T).sum()), as_numbered, as_matched, by_chance


def match(a_TE: np.ndarray, b_TE: np.ndarray) -> np.ndarray:
    """int64 [E]: the expert of B that is each of A's: the assignment that shares most tokens
    (Hungarian algorithm)."""
    from scipy.optimize import linear_sum_assignment

    shared_EE = a_TE.astype(np.float32).T @ b_TE.astype(np.float32)
    return linear_sum_assignment(shared_EE, maximize=True)[1]


def overlap(a_TE: np.ndarray, b_TE: np.ndarray) -> float:
    """The share of the experts that both chose. NaN where none chose any."""
    size = np.maximum(a_TE.sum(1), b_TE.sum(1)).sum()
    return float((a_TE & b_TE).sum() / size) if size else float("nan")

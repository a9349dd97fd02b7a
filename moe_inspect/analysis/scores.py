"""What each expert is worth by one number, from a trace alone, and which experts go by it.

L routers, D domains, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace

# of a trace; the least is the first to go
SCORES = {
    "reap": "mean over its tokens of gate weight × norm of its output (arXiv:2510.13999)",
    "gate": "sum of its gate weights",
    "frequency": "its assignments",
    "ean": "sum of the norms of its outputs",
    "mean-norm": "mean of the norms of its outputs",
}
OF_NORMS = ("reap", "ean", "mean-norm")
MEANS = {"reap", "mean-norm"}  # per assignment


def counted(trace: Trace, by: str) -> Counts:
    """The counts that a score is made of. MoeInspectError where the trace lacks them."""
    if by not in SCORES:
        raise MoeInspectError(f"no score {by!r} of a trace: there are {', '.join(SCORES)}")
    if by in OF_NORMS and not trace.has_norms:
        raise MoeInspectError(
            f"{trace.path} does not hold how large the experts' outputs are, which {by} needs: "
            "record it with --output-norms (output_norms=True), or score by gate or frequency"
        )
    if by == "gate" and not trace.has_weights:
        raise MoeInspectError(f"{trace.path} has no gate weights: score by frequency")
    wants = BASE if trace.counts_only else BASE | {"worth"}
    return count_trace(trace, select(trace), wants)


def score_DE(counts: Counts, r: int, by: str) -> np.ndarray:
    """The score of each expert of a router in each domain, 0 where it has no assignment. float64
    [D, E]"""
    return _score(_sums_DE(counts, r, by), counts.assignments_DE(r), by)


def score_E(counts: Counts, r: int, by: str) -> np.ndarray:
    """The same over all domains. float64 [E]"""
    return _score(_sums_DE(counts, r, by).sum(0), counts.load_E(r), by)


def _sums_DE(counts: Counts, r: int, by: str) -> np.ndarray:
    of = counts.of[r]
    if by == "frequency":
        return counts.assignments_DE(r).astype(float)
    if by == "gate":
        assert of.weight_sum_DE is not None
        return of.weight_sum_DE
    sums_UE = of.gated_norm_UE if by == "reap" else of.norm_UE
    assert sums_UE is not None
    return counts.by_domain(sums_UE)


def _score(sums: np.ndarray, load: np.ndarray, by: str) -> np.ndarray:
    return np.nan_to_num(sums / nan_for_zero(load)) if by in MEANS else sums


def random_scores(experts: Sequence[int], seed: int) -> list[np.ndarray]:
    """Scores by which any experts may go. `experts`: E of each router. float64 [E] of each"""
    rng = np.random.default_rng(seed)
    return [rng.random(E) for E in experts]


def experts_kept(E: int, keep: float, groups: int = 1) -> int:
    """How many of E experts stay where at least the share `keep` of each of `groups` groups does,
    the same number in each."""
    if not 0 < keep < 1:
        raise MoeInspectError(f"--keep is {keep:g}: give the share of experts to keep, as 0.75")
    return int(np.ceil(keep * (E // groups) - 1e-9)) * groups


def refuse_too_few(E: int, K: int, keep: float, of_groups: tuple[int, int, int]) -> None:
    """MoeInspectError where a token cannot go to K experts of those that stay. `of_groups`: the
    groups, how many of them a token goes to, and by how many of their best they are compared."""
    groups, chosen, best = of_groups
    kept = experts_kept(E, keep, groups)
    if groups > 1 and (kept // groups < best or kept // groups * chosen < K):
        raise MoeInspectError(
            f"--keep {keep:g} leaves {plural(kept // groups, 'expert')} in each of {groups} "
            f"groups, and every token goes to {K} experts in {chosen} groups"
        )
    if kept < K:
        raise MoeInspectError(
            f"--keep {keep:g} leaves {kept} of {E} experts, and every token goes to {K}"
        )


def lowest(score_LE: Sequence[np.ndarray], keep: float, groups: int = 1) -> list[list[int]]:
    """The experts of each router that go: those with the lowest scores, as many in each group of
    consecutive experts (of equal scores the one with the higher number)."""
    gone: list[list[int]] = []
    for score_E in score_LE:
        E = len(score_E)
        drop = (E - experts_kept(E, keep, groups)) // groups
        last_first = np.arange(E).reshape(groups, -1)[:, ::-1]
        order = np.argsort(score_E[last_first], axis=1, kind="stable")
        gone.append(sorted(np.take_along_axis(last_first, order, 1)[:, :drop].flatten().tolist()))
    return gone

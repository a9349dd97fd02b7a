"""What each expert is worth by one number, without running the model, and which experts go by it.

L routers, D domains, E experts.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import no_such, plural
from moe_inspect.trace.reader import Trace

# the least is the first to go
SCORES = {
    "reap": "mean over its tokens of gate weight × norm of its output (arXiv:2510.13999)",
    "gate": "sum of its gate weights",
    "frequency": "its assignments",
    "ean": "sum of the norms of its outputs",
    "mean-norm": "mean of the norms of its outputs",
    "saliency": "mean of what the source of imported counts scores its assignments by",
}
OF_NORMS = ("reap", "ean", "mean-norm")
MEANS = {"reap", "mean-norm", "saliency"}  # per assignment


def scores_of(trace: Trace, by: str) -> list[np.ndarray]:
    """Scores of all routers of a trace, float64 [E] of each. MoeInspectError if the trace lacks
    what the score takes."""
    counts = counted(trace, by)
    return [score_E(counts, r, by) for r in range(len(trace.routers))]


def counted(trace: Trace, by: str) -> Counts:
    """The counts that a score is made of. MoeInspectError if the trace lacks them."""
    if by not in SCORES:
        raise MoeInspectError(no_such("score", by, SCORES))
    if by in OF_NORMS and not trace.has_norms:
        known = "saliency, " * ("saliency_sum" in trace.sums) + "gate or frequency"
        raise MoeInspectError(
            f"{trace.path} has no output norms, which {by} needs: record it with --output-norms "
            f"(output_norms=True), or score by {known}"
        )
    if by == "saliency" and "saliency_sum" not in trace.sums:
        said = "import counts that state it (--map saliency=…), or score by gate or frequency"
        raise MoeInspectError(f"{trace.path} states no saliency: {said}")
    if by == "gate" and not trace.has_weights:
        raise MoeInspectError(f"{trace.path} has no gate weights: score by frequency")
    return count_trace(trace, select(trace), BASE | {"worth"})


def score_E(counts: Counts, r: int, by: str) -> np.ndarray:
    """The score of each expert of a router, 0 where it has no assignment. float64 [E]"""
    sums_E = _sums_DE(counts, r, by).sum(0)
    return np.nan_to_num(sums_E / nan_for_zero(counts.load_E(r))) if by in MEANS else sums_E


def _sums_DE(counts: Counts, r: int, by: str) -> np.ndarray:
    of = counts.of[r]
    if by == "frequency":
        return counts.assignments_DE(r).astype(float)
    if by == "gate":
        assert of.weight_sum_DE is not None
        return of.weight_sum_DE
    of_score = {"reap": of.gated_norm_UE, "saliency": of.saliency_sum_UE}
    sums_UE = of_score.get(by, of.norm_UE)
    assert sums_UE is not None
    return counts.by_domain(sums_UE)


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
            f"groups, but every token goes to {K} experts in {chosen} groups"
        )
    if kept < K:
        raise MoeInspectError(
            f"--keep {keep:g} leaves {kept} of {E} experts, but every token goes to {K}"
        )


def lowest(score_E: np.ndarray, keep: float, groups: int = 1) -> list[int]:
    """The experts of a router that go: those with the lowest scores, as many in each group of
    consecutive experts (of equal scores the one with the higher number)."""
    E = len(score_E)
    drop = (E - experts_kept(E, keep, groups)) // groups
    last_first = np.arange(E).reshape(groups, -1)[:, ::-1]
    order = np.argsort(score_E[last_first], axis=1, kind="stable")
    return sorted(np.take_along_axis(last_first, order, 1)[:, :drop].flatten().tolist())

"""What each expert is worth by one number, without running the model, and which experts go by it.

L routers, D domains, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.weights.measure import aimer_of
from moe_inspect.errors import MoeInspectError, reading
from moe_inspect.files import read_small
from moe_inspect.text import first_line, no_such, plural
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router

# of a trace; the least is the first to go
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
AIMER, ABLATION = "aimer", "ablation"
# of a trace and what is beside it
ALL = (*SCORES, AIMER, ABLATION)


def scores_of(
    trace: Trace, by: str, *, weights: str | Path | None = None, losses: str | Path | None = None
) -> list[np.ndarray]:
    """Scores of all routers of a trace, float64 [E] of each. `weights`: the directory of the
    model's safetensors, for "aimer"; `losses`: a table of `moe-inspect ablate`, for "ablation".
    MoeInspectError where what it takes is missing."""
    if by not in ALL:
        raise MoeInspectError(no_such("score", by, ALL))
    for option, score, given in (("weights", AIMER, weights), ("losses", ABLATION, losses)):
        if given is not None and by != score:
            raise MoeInspectError(f"--{option} is for {score}, not for {by}")
    routers = range(len(trace.routers))
    if by == AIMER:
        if weights is None:
            raise MoeInspectError("aimer takes the model's weights: add --weights MODEL")
        aimer = aimer_of(weights, trace.routers, routers)
        return aimer_scores(aimer, routers, weights)
    if by == ABLATION:
        if losses is None:
            raise MoeInspectError(
                "ablation takes measured losses: add --losses FILE, of moe-inspect ablate -o FILE"
            )
        return losses_without(losses, trace.routers)
    counts = counted(trace, by)
    return [score_E(counts, r, by) for r in routers]


def aimer_scores(
    aimer: Mapping[int, np.ndarray], routers: Iterable[int], weights: str | Path
) -> list[np.ndarray]:
    """1 − AIMER of the experts of these routers: those go first whose weights are most alike in
    size (arXiv:2603.18492). float64 [E] of each router, 0 to 1. MoeInspectError where weights
    cannot be read."""
    found = [1 - aimer[r] for r in routers]
    if any(np.isnan(score_E).any() for score_E in found):
        said = f"the weights of {weights} are quantised, which {AIMER} does not read"
        raise MoeInspectError(said)
    return found


def counted(trace: Trace, by: str) -> Counts:
    """The counts that a score is made of. MoeInspectError where the trace lacks them."""
    if by not in SCORES:
        raise MoeInspectError(f"no score {by!r} of a trace: there are {', '.join(SCORES)}")
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


KEYS = ["layer", "router", "expert"]
MOST_BYTES = 2**28  # of a table: every expert of any model in 100 domains
COLUMNS = [*KEYS, "tokens", "difference"]
READERS: dict[str, Callable[[io.BytesIO], pd.DataFrame]] = {
    # a domain may be called "NA" or "007"
    ".csv": partial(
        pd.read_csv,
        dtype={"domain": str},
        keep_default_na=False,
        na_values={name: [""] for name in COLUMNS},
    ),
    ".json": partial(pd.read_json, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}


def losses_without(path: str | Path, routers: Sequence[Router]) -> list[np.ndarray]:
    """What the model loses without each expert, in nats per token: float64 [E] of each router of a
    trace. Routers are those of the same layer, in its order. MoeInspectError where it is no such
    table, or of other experts."""
    table: Any = _read(Path(path))
    whole = table.assign(nats=table["difference"] * table["tokens"])
    whole = whole.groupby(KEYS, as_index=False)[["nats", "tokens"]].sum()
    whole["difference"] = whole["nats"] / whole["tokens"]
    return _by_router(whole, routers, path)


def _by_router(table: Any, routers: Sequence[Router], path: str | Path) -> list[np.ndarray]:
    found = list[np.ndarray]()
    for r, router in enumerate(routers):
        there = [i for i, other in enumerate(routers) if other.layer == router.layer]
        of_layer = table[table["layer"] == router.layer]
        numbers = sorted(set(of_layer["router"]))
        of_layer = of_layer[of_layer["router"] == dict(zip(there, numbers, strict=False)).get(r)]
        of_layer = of_layer.sort_values("expert")
        if len(numbers) != len(there) or list(of_layer["expert"]) != list(range(router.experts)):
            raise MoeInspectError(
                f"{path} has losses without {of_layer['expert'].nunique()} of {router.experts} "
                f"experts in layer {router.layer}: ablate all experts of the trace's model"
            )
        found.append(of_layer["difference"].to_numpy(np.float64))
    return found


def _read(path: Path) -> pd.DataFrame:
    if path.suffix not in READERS:
        raise MoeInspectError(f"{path}: losses are read from {', '.join(READERS)}")
    with reading(path):
        try:
            table = READERS[path.suffix](io.BytesIO(read_small(path, MOST_BYTES)))
        # what pandas and pyarrow raise for a file that is none: ValueError and its kinds
        except ValueError as error:
            raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from error
    if missing := [name for name in COLUMNS if name not in table]:
        raise MoeInspectError(
            f"{path} has no column {missing[0]!r}: it is not a table of moe-inspect ablate"
        )
    return table

"""Tables of experts: which is chosen instead of which, and whose load changes.

U units (clusters of documents), E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, SEED
from moe_inspect.comparison.aligning.matching import matched_overlaps
from moe_inspect.comparison.data import TABLES, PairData
from moe_inspect.reporting.tables.registry import table

HALVES = 40  # ways of parting A's documents in two
CONFIDENCE = 0.05


@table(tables=TABLES)
def flips(data: PairData) -> pd.DataFrame:
    """One row per pair of experts: how often `other` is chosen in B where A chose `expert`, and
    how often it would be if which expert is dropped said nothing of which is taken; the most
    frequent of a router first."""
    parts = list[pd.DataFrame]()
    for r, _ in data.pairs:
        flips_EE = data.of(r).flips_EE
        total = flips_EE.sum()
        expert, other = np.nonzero(flips_EE)
        count = flips_EE[expert, other]
        expected_EE = np.outer(flips_EE.sum(1), flips_EE.sum(0)) / max(total, 1)
        expected = expected_EE[expert, other]
        order = np.lexsort([other, expert, -count])
        order = order[: data.options.top] if data.options.top else order
        parts.append(
            pd.DataFrame(
                {
                    "layer": data.router(r).layer,
                    "router": r,
                    "expert": expert[order],
                    "other": other[order],
                    "flips": count[order],
                    "expected": expected[order],
                    "lift": (count / expected)[order],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


@table(by_router=("load_shift",), tables=TABLES)
def load_shift(data: PairData) -> pd.DataFrame:
    """One row per router: how far apart the load of the two traces is (total variation and
    Jensen–Shannon divergence of the shares), and two halves of A's documents on average."""
    rows = []
    sides_RU = _halves(len(data.units))
    for r, _ in data.pairs:
        counts = data.of(r)
        load_UE = counts.load_UE[data.units]
        both = np.stack([load_UE.sum(0), (load_UE + counts.moved_UE[data.units]).sum(0)])
        halves = [np.stack([load_UE[side].sum(0), load_UE[~side].sum(0)]) for side in sides_RU]
        rows.append(
            {
                "layer": data.router(r).layer,
                "router": r,
                "load_shift": _of_pair(tt.load_shift, both, data.alike),
                "load_shift_halves": _mean([tt.load_shift(h) for h in halves]),
                "jsd_bits": _of_pair(tt.load_shift_jsd_bits, both, data.alike),
                "jsd_bits_halves": _mean([tt.load_shift_jsd_bits(h) for h in halves]),
            }
        )
    return pd.DataFrame(rows)


def _of_pair(measure: Callable[[np.ndarray], float], loads: np.ndarray, alike: bool) -> float:
    # of the same files the load is not counted
    return 0.0 if alike else measure(loads)


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _halves(U: int) -> list[np.ndarray]:
    """Random halves of the units, bool [U]; none with too few of them."""
    if U < FEWEST_DOCUMENTS:
        return []
    rng = np.random.default_rng([SEED, U])
    return [rng.permutation(U) < U // 2 for _ in range(HALVES)]


@table(tables=TABLES)
def movers(data: PairData) -> pd.DataFrame:
    """One row per expert whose load changed by more than chance among documents explains, in all
    domains together (`domain` is empty) or in one; the largest changes first. The intervals, over
    documents, are widened for the number of experts that are looked at."""
    rows = list[dict[str, object]]()
    for r, _ in data.pairs:
        rows += _moved(data, r)
    columns = ["layer", "router", "domain", "expert", "load_a", "load_b", "change", "low", "high"]
    frame = pd.DataFrame(rows, columns=columns).astype({"domain": "str"})
    size = frame["change"].abs()
    frame = frame.loc[size.sort_values(ascending=False, kind="stable").index]
    frame = frame.reset_index(drop=True)
    return frame.head(data.options.top) if data.options.top else frame


def _moved(data: PairData, r: int) -> Iterator[dict[str, object]]:
    from scipy.stats import t as student

    counts, domain_U = data.of(r), data.counts.domain_U[data.units]
    load_UE, moved_UE = counts.load_UE[data.units], counts.moved_UE[data.units]
    of_domain = [("", np.ones(len(domain_U), bool))]
    if len(data.counts.domains) > 1:
        of_domain += [(name, domain_U == d) for d, name in enumerate(data.counts.domains)]
    tests = len(of_domain) * counts.E * len(data.pairs)
    for name, of_U in of_domain:
        n, moved_E, load_E = int(of_U.sum()), moved_UE[of_U].sum(0), load_UE[of_U].sum(0)
        if n < FEWEST_DOCUMENTS:
            continue
        # the change of a sum over n documents: √n times the deviation between documents
        error_E = np.sqrt(n) * moved_UE[of_U].std(0, ddof=1)
        reach_E = error_E * float(student.ppf(1 - CONFIDENCE / 2 / tests, n - 1))
        for e in np.flatnonzero((np.abs(moved_E) > reach_E) & (load_E > 0)).tolist():
            yield {
                "layer": data.router(r).layer,
                "router": r,
                "domain": name,
                "expert": e,
                "load_a": int(load_E[e]),
                "load_b": int(load_E[e] + moved_E[e]),
                "change": moved_E[e] / load_E[e],
                "low": (moved_E[e] - reach_E[e]) / load_E[e],
                "high": (moved_E[e] + reach_E[e]) / load_E[e],
            }


@table(tables=TABLES)
def matched(data: PairData) -> pd.DataFrame:
    """One row per router, for two seeds of one architecture, which number their experts by chance:
    the overlap as numbered, after B's experts were matched with A's by the tokens they share, and
    what matching finds when B's tokens are shuffled. On a sample of tokens."""
    columns = ["router", "tokens", "overlap", "overlap_matched", "overlap_matched_by_chance"]
    rows = matched_overlaps((data.a, data.b), data.alignment, data.pairs)
    frame = pd.DataFrame(list(rows), columns=columns)
    frame.insert(0, "layer", [data.router(r).layer for r in frame["router"].tolist()])
    return frame

"""Tables of experts: which is chosen instead of which, and whose load changes.

U units (clusters of documents), E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, SEED, ratio_interval
from moe_inspect.comparison.aligning.misaligned import matched_overlaps
from moe_inspect.comparison.counting.values import OutputSums
from moe_inspect.comparison.decisions.data import Decisions
from moe_inspect.comparison.result import TABLES
from moe_inspect.reporting.tables.registry import table

HALVES = 40  # ways of parting A's documents in two
CONFIDENCE = 0.05


@table(tables=TABLES)
def flips(data: Decisions) -> pd.DataFrame:
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
def load_shift(data: Decisions) -> pd.DataFrame:
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
def movers(data: Decisions) -> pd.DataFrame:
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


def _moved(data: Decisions, r: int) -> Iterator[dict[str, object]]:
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
def matched(data: Decisions) -> pd.DataFrame:
    """One row per router, for two seeds of one architecture, which number their experts by chance:
    the overlap as numbered, after B's experts were matched with A's by the tokens they share, and
    what matching finds when B's tokens are shuffled. On a sample of tokens."""
    columns = ["router", "tokens", "overlap", "overlap_matched", "overlap_matched_by_chance"]
    rows = matched_overlaps((data.a, data.b), data.alignment, data.pairs)
    frame = pd.DataFrame(list(rows), columns=columns)
    frame.insert(0, "layer", [data.router(r).layer for r in frame["router"].tolist()])
    return frame


OF_PAIR = ("assignments", "reap", "mean_norm", "share")
COLUMNS = (
    *("layer", "router", "expert"),
    *(f"{name}_{side}" for name in OF_PAIR for side in "ab"),
    *(f"{name}{end}" for name in ("reap_change", "norm_change") for end in ("", "_low", "_high")),
    *("both", "norm_difference"),
)


@table(tables=TABLES)
def worth(data: Decisions) -> pd.DataFrame:
    """One row per expert, where both traces have the norms of outputs (`--output-norms`), over the
    tokens compared: REAP, mean norm and share (of the layer's gate weight × norm) in each, how
    REAP and mean norm change from A to B (relative, with 95 % intervals over documents), and of
    the assignments that both made, the mean |difference| of their norms, relative to A's."""
    if data.why_not("worth"):
        return pd.DataFrame(columns=list(COLUMNS))
    parts = [
        _of_router(data, sums).assign(layer=data.router(r).layer, router=r)
        for r, sums in data.outputs.items()
    ]
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _of_router(data: Decisions, sums: OutputSums) -> pd.DataFrame:
    load, norm, gated = (x[:, data.units] for x in (sums.load, sums.norm, sums.gated))
    made: dict[str, np.ndarray] = {"expert": np.arange(load.shape[2])}
    for side, name in enumerate("ab"):
        load_E = nan_for_zero(load[side].sum(0))
        made[f"assignments_{name}"] = load[side].sum(0).astype(np.int64)
        made[f"reap_{name}"] = gated[side].sum(0) / load_E
        made[f"mean_norm_{name}"] = norm[side].sum(0) / load_E
        made[f"share_{name}"] = gated[side].sum(0) / nan_for_zero(gated[side].sum())
    for name, values in (("reap", gated), ("norm", norm)):
        made |= _change(f"{name}_change", values, load, data.weights_RU)
    made["both"] = sums.both_E.astype(np.int64)
    made["norm_difference"] = sums.change_E / nan_for_zero(sums.norm_E)
    return pd.DataFrame(made)


def _change(
    name: str, values: np.ndarray, load: np.ndarray, weights_RU: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Mean of B ÷ mean of A − 1 of each expert, and its 95 % interval over documents. values, load:
    [2, U, E]."""

    def ratio(sums: np.ndarray, of: np.ndarray) -> np.ndarray:
        mean = sums / nan_for_zero(of)
        return mean[1] / nan_for_zero(mean[0]) - 1

    change_E = ratio(values.sum(1), load.sum(1))
    low_E, high_E = np.full((2, len(change_E)), np.nan)
    known_E = np.isfinite(change_E)
    if weights_RU is not None and known_E.any():
        values, load = (weights_RU @ x[:, :, known_E] for x in (values, load))
        low_E[known_E], high_E[known_E] = np.nanquantile(ratio(values, load), [0.025, 0.975], 0)
    return {name: change_E, f"{name}_low": low_E, f"{name}_high": high_E}


ROUTES = {"": slice(None), "same": slice(0, 1), "different": slice(1, 2)}
ENTROPY = "entropy_difference_nats"
VALUES = (
    *("mean_loss_nats_a", "mean_loss_nats_b"),
    *("difference_nats", "difference_nats_low", "difference_nats_high"),
    "absolute_difference_nats",
    *("mean_entropy_nats_a", "mean_entropy_nats_b"),
    *(ENTROPY, f"{ENTROPY}_low", f"{ENTROPY}_high"),
)


@table(tables=TABLES)
def loss(data: Decisions) -> pd.DataFrame:
    """Where both traces have losses (`--token-loss`), a row for the tokens of all domains (`domain`
    is empty) and of each, of any routes (`routes` is empty), of the same experts at every router,
    and of different ones at any: the mean loss in each trace, B's minus A's with a 95 % interval
    over documents, and the mean of its absolute value; and the same of the entropy of the
    prediction, how undecided the model was."""
    rows = [] if data.why_not("loss") else _rows(data)
    frame = pd.DataFrame(rows, columns=["domain", "routes", "tokens", *VALUES])
    kinds = {
        "domain": "str",
        "routes": "str",
        "tokens": "int64",
        **dict.fromkeys(VALUES, "float64"),
    }
    return frame.astype(kinds)


def _rows(data: Decisions) -> list[dict[str, object]]:
    units = data.units
    domain_U, names = data.counts.domain_U[units], data.counts.domains
    of_domain = [("", np.ones(len(units), bool))]
    if len(names) > 1:
        of_domain += [(name, domain_U == d) for d, name in enumerate(names)]
    rows = list[dict[str, object]]()
    for domain, in_U in of_domain:
        for routes, which in ROUTES.items():
            sums = {k: x[which, units].sum(0) * in_U for k, x in data.losses.items()}
            if sums["tokens"].any():
                rows.append({"domain": domain, "routes": routes, **_values(data, **sums)})
    return rows


def _values(
    data: Decisions,
    tokens: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    apart: np.ndarray,
    entropy_a: np.ndarray,
    entropy_b: np.ndarray,
) -> dict[str, object]:
    """Of sums [U], as `loss_sums` has them."""
    n = tokens.sum()
    weights_RU = data.weights_RU if np.count_nonzero(tokens) >= FEWEST_DOCUMENTS else None

    def both(a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
        return (
            a.sum() / n,
            b.sum() / n,
            (b - a).sum() / n,
            *ratio_interval(b - a, tokens, weights_RU),
        )

    of = (*both(a, b), apart.sum() / n, *both(entropy_a, entropy_b))
    return {"tokens": n, **dict(zip(VALUES, of, strict=True))}

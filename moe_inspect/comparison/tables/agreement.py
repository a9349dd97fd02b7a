"""Tables of how far the decisions agree: by router, and by domain, phase, position and margin.

U units (clusters of documents), X cells (phase × position decile), M margin deciles, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.uncertainty import ratio_interval
from moe_inspect.comparison.aligning.rows import DECILES
from moe_inspect.comparison.counting.counts import UNIT
from moe_inspect.comparison.data import TABLES, PairData
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.tables.registry import table
from moe_inspect.trace.schema import PHASES

AGREEMENT = (
    "set_mismatch",
    "overlap",
    "first_choice",
    "order",
    "weight_l1",
    "kl_nats",
)
Row = dict[str, object]


@table(by_router=AGREEMENT, tables=TABLES)
def agreement(data: PairData) -> pd.DataFrame:
    """One row per router: the share of decisions with another set of experts, the share of their
    experts that both chose, and what is known of order and weights; with 95 % intervals over
    documents."""
    noise = None if data.noise is None else _mismatch_of(data.noise)
    rows = [_agreement_row(data, r, noise) for r, _ in data.pairs]
    return pd.DataFrame(rows)


def _agreement_row(data: PairData, r: int, noise: dict[tuple[int, str, str], float] | None) -> Row:
    listed, counts = data.router(r), data.of(r)
    decisions_U = data.decisions_UX(r).sum(1)
    size_U = listed.top_k * decisions_U - counts.short_UX.sum(1)
    known = data.first_choice_known[r]
    both = data.a.has_weights and data.b.has_weights
    n = int(decisions_U.sum())
    row: Row = {
        "layer": listed.layer,
        "router": r,
        "decisions": n,
        **_share(data, "set_mismatch", tt.set_mismatch, counts.mismatch_UX.sum(1), decisions_U),
        **_share(data, "overlap", tt.overlap, size_U - counts.missing_UX.sum(1), size_U),
        "overlap_by_chance": listed.top_k / listed.experts,
        **_share(
            data,
            "first_choice",
            tt.same_first_choice,
            decisions_U - counts.first_differs_U,
            decisions_U,
            known,
        ),
        **_share(
            data, "order", tt.same_order, decisions_U - counts.reordered_U, decisions_U, known
        ),
        **_share(data, "weight_l1", tt.weight_l1, counts.l1_U / UNIT, decisions_U, both),
        "kl_nats": tt.kl_nats(counts.kl / UNIT, counts.logit_decisions),
    }
    if noise is not None:
        row["noise_set_mismatch"] = noise.get((listed.layer, listed.stack, listed.path), np.nan)
    return row


def _mismatch_of(data: PairData) -> dict[tuple[int, str, str], float]:
    """The share of decisions with another set, by the router's layer, stack and path."""
    return {
        (router.layer, router.stack, router.path): float(
            data.of(r).mismatch_UX.sum() / max(data.decisions_UX(r).sum(), 1)
        )
        for r, _ in data.pairs
        for router in [data.router(r)]
    }


def _share(
    data: PairData,
    name: str,
    measure: Callable[[float, float], float],
    hits_U: np.ndarray,
    of_U: np.ndarray,
    known: bool = True,
) -> Row:
    """A metric of two sums, and the ends of its interval."""
    total = of_U.sum()
    if not known or not total:
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    low, high = ratio_interval(hits_U[data.units], of_U[data.units], data.weights_RU)
    return {
        name: measure(float(hits_U.sum()), float(total)),
        f"{name}_low": low,
        f"{name}_high": high,
    }


@dataclass(frozen=True)
class Part:
    """Decisions of a router that have something in common. missing: assignments that the other
    trace did not make; None where not known. short: slots that route nowhere in both."""

    value: object
    decisions_U: np.ndarray
    mismatch_U: np.ndarray
    missing: int | None = None
    short: int = 0


def _by(data: PairData, column: str, parts: Callable[[int], Iterable[Part]]) -> pd.DataFrame:
    """A row per router and part that has any decision."""
    rows = list[Row]()
    for r, _ in data.pairs:
        for part in parts(r):
            n = int(part.decisions_U.sum())
            if not n:
                continue
            row: Row = {"layer": data.router(r).layer, "router": r, column: part.value}
            row |= {"decisions": n}
            row |= _share(data, "set_mismatch", tt.set_mismatch, part.mismatch_U, part.decisions_U)
            if part.missing is not None:
                size = n * data.router(r).top_k - part.short
                row["overlap"] = tt.overlap(size - part.missing, size)
            rows.append(row)
    return pd.DataFrame(rows)


@table(tables=TABLES)
def domains(data: PairData) -> pd.DataFrame:
    """One row per router and domain."""
    domain_U = data.counts.domain_U

    def parts(r: int) -> Iterator[Part]:
        counts, decisions_U = data.of(r), data.decisions_UX(r).sum(1)
        for d, domain in enumerate(data.counts.domains):
            of_U = domain_U == d
            yield Part(
                domain,
                decisions_U * of_U,
                counts.mismatch_UX.sum(1) * of_U,
                int(counts.missing_UX[of_U].sum()),
                int(counts.short_UX[of_U].sum()),
            )

    return _by(data, "domain", parts)


@table(tables=TABLES)
def phases(data: PairData) -> pd.DataFrame:
    """One row per router and phase: prompt tokens, generated ones, those of an encoder."""
    return _by(data, "phase", lambda r: _cells(data, r, dict(enumerate(PHASES)), by_phase=True))


@table(tables=TABLES)
def positions(data: PairData) -> pd.DataFrame:
    """One row per router and tenth of the sequence: 0 is its beginning."""
    names = {decile: decile for decile in range(DECILES)}
    return _by(data, "decile", lambda r: _cells(data, r, names, by_phase=False))


def _cells(data: PairData, r: int, names: Mapping[int, object], by_phase: bool) -> Iterator[Part]:
    counts = data.of(r)
    tables = data.decisions_UX(r), counts.mismatch_UX, counts.missing_UX, counts.short_UX
    decisions, mismatch, missing, short = (
        x.reshape(len(x), len(PHASES), DECILES).sum(2 if by_phase else 1) for x in tables
    )
    for i, name in names.items():
        sums = int(missing[:, i].sum()), int(short[:, i].sum())
        yield Part(name, decisions[:, i], mismatch[:, i], *sums)


@table(tables=TABLES)
def margins(data: PairData) -> pd.DataFrame:
    """One row per router and tenth of A's decisions by their margin, from the least decided on."""
    known = data.margins
    if known is None:
        raise MoeInspectError(f"{data.why_no_margins}: no margins table")

    def parts(r: int) -> Iterator[Part]:
        counts = data.of(r)
        for m in range(DECILES if r in known.edges else 0):
            yield Part(m, counts.margin_UM[:, m], counts.margin_mismatch_UM[:, m])

    frame = _by(data, "decile", parts)
    limits = {r: np.r_[-np.inf, edges, np.inf] for r, edges in known.edges.items()}
    at = list(zip(frame["router"], frame["decile"], strict=True))
    frame.insert(3, "margin_from", [float(limits[r][m]) for r, m in at])
    frame.insert(4, "margin_to", [float(limits[r][m + 1]) for r, m in at])
    return frame

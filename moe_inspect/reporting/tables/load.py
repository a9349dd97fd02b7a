"""The report's tables, one function each: aggregates → DataFrame. `layer, router` come first where
a row is about a router.

A table is a function decorated with @table: `Report.tables`, `--table` and its help take it from
TABLES. What goes by pairs of experts is in pair_tables.py, what goes by router or over time in
router_tables.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting import token_ids as tokenids
from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics import uncertainty as unc

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

Maker = Callable[["Report"], pd.DataFrame]
TABLES: dict[str, Maker] = {}
WANTS: dict[str, frozenset[str]] = {}  # what each table needs counted
BY_ROUTER: dict[
    str, tuple[str, ...]
] = {}  # the numeric columns of the tables of a row a router: what a gate can be put on


def table(*wants: str, by_router: tuple[str, ...] = ()) -> Callable[[Maker], Maker]:
    """Registers a table under the function's name, with what it needs counted beyond the load
    (aggregate.WANTS)."""

    def register(function: Maker) -> Maker:
        name = function.__name__
        TABLES[name], WANTS[name] = function, frozenset(wants)
        if by_router:
            BY_ROUTER[name] = by_router
        return function

    return register


def every_table() -> dict[str, Maker]:
    """TABLES with every file read that adds to it."""
    for home in ("pairs", "router"):
        importlib.import_module(f"moe_inspect.reporting.tables.{home}")
    return TABLES


BALANCE = (
    *bal.of_load(),
    "busiest_expert",
    "noise_floor",
    "max_vio_low",
    "max_vio_high",
    "max_vio_batch",
    "noise_floor_batch",
    "design_effect",
    "importance_cv",
)
SPECIALIZATION = (
    "domain_mi_bits",
    "domain_mi_null_bits",
    "domain_mi_null_p99_bits",
    "domain_mi_given_token_bits",
    "domain_mi_given_token_null_bits",
    "token_mi_bits",
    "token_mi_null_bits",
    "jsd_bits",
    "vocabulary_specialization",
    "vocabulary_specialization_null",
    "vocabulary_specialization_any",
    "vocabulary_specialization_any_null",
)


@table()
def summary(report: Report) -> pd.DataFrame:
    """A row a fact: key, value (text)."""
    return pd.DataFrame(report.facts(), columns=["key", "value"]).astype(
        {"key": "str", "value": "str"}
    )


@table(by_router=BALANCE)
def balance(report: Report) -> pd.DataFrame:
    """A row a router: how even its load is, and what chance alone would give."""
    return balance_of(report.counts, report.thresholds.starved)


def balance_of(counts: Counts, starved: float = bal.STARVED) -> pd.DataFrame:
    """The balance table of any counts, a finished trace's or those of a recording under way.
    `starved`: that threshold."""
    rows = []
    weights_RU = None if counts.counts_only else unc.resample_weights(counts.domain_of_unit_U)
    for r in counts.indices:
        router, load_E = counts.routers[r], counts.load_E(r)
        E, k, total = router.experts, router.top_k, int(load_E.sum())
        row: dict[str, float | None] = {
            "layer": router.layer,
            "router": r,
            "experts": E,
            "top_k": k,
            "tokens": counts.tokens_of(r),
            "assignments": total,
        }
        row |= {name: float(m.function(load_E[None])[0]) for name, m in bal.of_load().items()}
        row["starved_experts"] = float(bal.starved_experts(load_E[None], starved)[0])
        row["busiest_expert"] = int(bal.busiest_expert(load_E[None])[0]) if total else None
        row["noise_floor"] = unc.noise_floor(
            round(total / k), E, k
        )  # null slots make no load, by chance or otherwise
        row["max_vio_low"], row["max_vio_high"] = unc.max_vio_interval(
            counts.of[r].assignments_UE, weights_RU
        )
        units = (counts.of[r].assignments_UE, counts.tokens_U_of(r), counts.domain_of_unit_U)
        row["design_effect"] = float("nan") if counts.counts_only else unc.design_effect(*units)
        row["max_vio_batch"], row["noise_floor_batch"] = _by_batch(
            counts, r, total / max(k * counts.tokens_of(r), 1)
        )
        row["importance_cv"] = float(bal.importance_cv(counts.weight_sum_E(r)[None])[0])
        rows.append(row)
    columns = ["layer", "router", "experts", "top_k", "tokens", "assignments", *BALANCE]
    frame = pd.DataFrame(rows, columns=columns)
    # whole numbers that may be missing
    return frame.astype(
        dict.fromkeys(("dead_experts", "starved_experts", "busiest_expert"), "Int64")
    )


def _by_batch(counts: Counts, router: int, filled: float) -> tuple[float, float]:
    """Mean max_vio over batches, and the noise floor of batches of their sizes. `filled`: share of
    slots that routed."""
    batches = counts.of[router].batches
    if not batches or filled <= 0:
        return float("nan"), float("nan")
    tokens_S, (passes_S, vio_sum_S) = np.array(list(batches)), np.array(list(batches.values())).T
    E, k = counts.routers[router].experts, counts.routers[router].top_k
    whole_S = bal.whole_passes(tokens_S)
    floor = np.average(
        unc.noise_floors(tokens_S[whole_S] * filled, E, k), weights=passes_S[whole_S]
    )
    return bal.max_vio_batch(vio_sum_S, passes_S, tokens_S), float(floor)


def whole_batches(batches: dict[int, tuple[int, float]]) -> dict[int, tuple[int, float]]:
    """Those of `RouterCounts.batches` that max_vio_batch is of."""
    whole_S = bal.whole_passes(np.array(list(batches), np.int64))
    return {size: batches[size] for size, whole in zip(batches, whole_S, strict=True) if whole}


@table()
def load(report: Report) -> pd.DataFrame:
    """A row an expert of a router: its load, absolute and against the mean."""
    counts, parts = report.counts, []
    for r in report.selection.routers:
        load_E = counts.load_E(r)
        columns = {
            "expert": np.arange(len(load_E)),
            "assignments": load_E,
            "share": sp.share_by_domain(load_E[None])[0],
            "load_ratio": bal.load_ratio(load_E[None])[0],
            "first_choice": counts.first_choice_E(r),
            "weight_sum": counts.weight_sum_E(r),
        }
        parts.append(of_router(report, r, columns))
    return stacked(parts)


@table()
def domains(report: Report) -> pd.DataFrame:
    """A row an expert in a domain: activation = assignments ÷ tokens of the domain (sums to k over
    the experts), lift = that to the mean of the domains' activations."""
    counts, parts = report.counts, []
    D = len(counts.domains)
    for r in report.selection.routers:
        assignments_DE, tokens_D = counts.assignments_DE(r), counts.tokens_D_of(r)
        E = assignments_DE.shape[1]
        columns = {
            "domain": np.repeat(np.array(counts.domains, object), E),
            "expert": np.tile(np.arange(E), D),
            "tokens": np.repeat(tokens_D, E),
            "assignments": assignments_DE.reshape(-1),
            "activation": sp.activation(assignments_DE, tokens_D).reshape(-1),
            "lift": sp.lift(assignments_DE, tokens_D).reshape(-1),
        }
        parts.append(of_router(report, r, columns))
    return stacked(parts)


@table(by_router=SPECIALIZATION)
def specialization(report: Report) -> pd.DataFrame:
    """A row a router: how much the domain, the token id, and the domain beyond the token id tell of
    the expert, each beside what shuffled labels give."""
    if report.counts.counts_only:
        rows = [_domain_specialization(report, r) for r in report.selection.routers]
    else:
        rows = [
            {**_domain_specialization(report, r), **by_id}
            for r, by_id in zip(report.selection.routers, report.by_id, strict=True)
        ]
    return pd.DataFrame(rows, columns=["layer", "router", *SPECIALIZATION]).astype(
        dict.fromkeys(SPECIALIZATION, float)
    )


def _domain_specialization(report: Report, router: int) -> dict[str, float]:
    counts = report.counts
    assignments_DE = counts.assignments_DE(router)
    null, p99 = float("nan"), float("nan")
    if not counts.counts_only and len(counts.units) >= unc.FEWEST_DOCUMENTS:
        null, p99 = sp.domain_mi_null_bits(
            counts.of[router].assignments_UE, counts.domain_of_unit_U
        )
    return {
        "layer": counts.routers[router].layer,
        "router": router,
        "domain_mi_bits": sp.domain_mi_bits(assignments_DE),
        "domain_mi_null_bits": null,
        "domain_mi_null_p99_bits": p99,
        "jsd_bits": sp.jsd_bits(assignments_DE),
    }


def specialization_by_id(tables: tokenids.TokenTables, D: int) -> dict[str, float]:
    """The columns of `specialization` that need token ids."""
    token_mi, token_mi_null = tokenids.token_mi(tables)
    occurrences_V = tables.token_ids.occurrences_V
    any_null = [sp.vocabulary_specialization_any(a, occurrences_V) for a in tables.shuffled_any]
    row = {
        "token_mi_bits": token_mi,
        "token_mi_null_bits": token_mi_null,
        "vocabulary_specialization_any": sp.vocabulary_specialization_any(
            tables.any_VE, occurrences_V
        ),
        "vocabulary_specialization_any_null": float(np.mean(any_null)),
    }
    if tables.first_VE is not None:
        row["vocabulary_specialization"] = sp.vocabulary_specialization(tables.first_VE)
        row["vocabulary_specialization_null"] = float(
            np.mean([sp.vocabulary_specialization(f) for f in tables.shuffled_first])
        )
    if tables.by_unit is not None:
        counts_PE, token_P, domain_P = tables.pairs(D)
        row["domain_mi_given_token_bits"] = sp.conditional_mi_bits(
            *sp.by_group(counts_PE, token_P, domain_P)
        )
        null = (
            sp.conditional_mi_null_bits(counts_PE, token_P, domain_P, len(tables.shuffled_any))
            if len(counts_PE)
            else float("nan")
        )
        row["domain_mi_given_token_null_bits"] = null
    return row


@table()
def vocabulary(report: Report) -> pd.DataFrame:
    """A row an expert and a token id: the token ids most exclusively sent to it. fraction and
    first_choice_fraction are of the token id's occurrences."""
    return report.vocabulary


def vocabulary_of(tables: tokenids.TokenTables, report: Report, text_of: pd.Series) -> pd.DataFrame:
    """The rows of `vocabulary` of one router."""
    expert, row = tokenids.top_token_ids(tables, report.top)
    ids, occurrences = tables.token_ids.ids_V[row], tables.token_ids.occurrences_V[row]
    columns = {
        "expert": expert,
        "token_id": ids,
        "token": text_of.reindex(ids).to_numpy(object),
        "count": tables.any_VE[row, expert].astype(np.int64),
        "fraction": tables.any_VE[row, expert] / np.maximum(occurrences, 1),
        "first_choice_fraction": np.nan
        if tables.first_VE is None
        else tables.first_VE[row, expert] / np.maximum(occurrences, 1),
        "occurrences": occurrences,
    }
    return of_router(report, tables.router, columns)


def of_router(report: Report, router: int, columns: Mapping[str, object]) -> pd.DataFrame:
    """Rows about a router: `layer, router` in front."""
    frame = pd.DataFrame(dict(columns))
    frame.insert(0, "layer", report.counts.routers[router].layer)
    frame.insert(1, "router", router)
    return frame


def stacked(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)

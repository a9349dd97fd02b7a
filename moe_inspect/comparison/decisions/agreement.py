"""Tables of how far the decisions agree: by router, and by domain, phase, position and margin.

U units (clusters of documents), X cells (phase × position decile), M margin deciles, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.uncertainty import ratio_interval
from moe_inspect.comparison.aligning.rows import DECILES
from moe_inspect.comparison.counting.counts import UNIT
from moe_inspect.comparison.decisions.data import METRICS_OF, Decisions
from moe_inspect.comparison.result import TABLES
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.tables.registry import table
from moe_inspect.text import ranges, storable
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
def agreement(data: Decisions) -> pd.DataFrame:
    """One row per router: the share of decisions with another set of experts, the share of their
    experts that both chose, and what is known of order and weights; with 95 % intervals over
    documents."""
    noise = None if data.noise is None else _mismatch_of(data.noise)
    rows = [_agreement_row(data, r, noise) for r, _ in data.pairs]
    return pd.DataFrame(rows)


def _agreement_row(data: Decisions, r: int, noise: dict[tuple[int, str, str], float] | None) -> Row:
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


def _mismatch_of(data: Decisions) -> dict[tuple[int, str, str], float]:
    """The share of decisions with another set, by the router's layer, stack and path."""
    return {
        (router.layer, router.stack, router.path): float(
            data.of(r).mismatch_UX.sum() / max(data.decisions_UX(r).sum(), 1)
        )
        for r, _ in data.pairs
        for router in [data.router(r)]
    }


def _share(
    data: Decisions,
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


def _by(data: Decisions, column: str, parts: Callable[[int], Iterable[Part]]) -> pd.DataFrame:
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
def domains(data: Decisions) -> pd.DataFrame:
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
def phases(data: Decisions) -> pd.DataFrame:
    """One row per router and phase: prompt tokens, generated ones, those of an encoder."""
    return _by(data, "phase", lambda r: _cells(data, r, dict(enumerate(PHASES)), by_phase=True))


@table(tables=TABLES)
def positions(data: Decisions) -> pd.DataFrame:
    """One row per router and tenth of the sequence: 0 is its beginning."""
    names = {decile: decile for decile in range(DECILES)}
    return _by(data, "decile", lambda r: _cells(data, r, names, by_phase=False))


def _cells(data: Decisions, r: int, names: Mapping[int, object], by_phase: bool) -> Iterator[Part]:
    counts = data.of(r)
    tables = data.decisions_UX(r), counts.mismatch_UX, counts.missing_UX, counts.short_UX
    decisions, mismatch, missing, short = (
        x.reshape(len(x), len(PHASES), DECILES).sum(2 if by_phase else 1) for x in tables
    )
    for i, name in names.items():
        sums = int(missing[:, i].sum()), int(short[:, i].sum())
        yield Part(name, decisions[:, i], mismatch[:, i], *sums)


@table(tables=TABLES)
def margins(data: Decisions) -> pd.DataFrame:
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


@table(by_router=("tokens_mismatch", *METRICS_OF), tables=TABLES)
def overall(data: Decisions) -> pd.DataFrame:
    """One row: all routers together; the differences of the losses are NaN where the traces have
    none."""
    counts = data.counts
    gamma = {
        "router_shift": tt.router_shift(counts.gamma / UNIT, counts.gamma_tokens),
        "router_shift_below_floor": _ratio(counts.gamma_below, counts.gamma_tokens),
    }
    row = {
        "tokens": counts.tokens,
        "tokens_mismatch": data.tokens_mismatch,
        "decisions": data.decisions,
        "decisions_mismatch": data.mismatched / data.decisions,
        **gamma,
    }
    losses: Any = data.tables["loss"]
    for name in METRICS_OF:
        value = losses[name.removeprefix("loss_")].iloc[0] if len(losses) else float("nan")
        row[name] = value
    if data.noise is not None:
        row["noise_tokens_mismatch"] = data.noise.tokens_mismatch
    return pd.DataFrame([row])


@table(tables=TABLES)
def tokens(data: Decisions) -> pd.DataFrame:
    """One row per number of routers: tokens whose sets differ at exactly so many, and the share
    of those with more."""
    layers_N = data.counts.layers_N
    last = int(np.flatnonzero(layers_N).max(initial=0))
    share_N = layers_N[: last + 1] / layers_N.sum()
    return pd.DataFrame(
        {
            "routers": np.arange(last + 1),
            "tokens": layers_N[: last + 1],
            "share": share_N,
            "share_more": np.maximum(1 - np.cumsum(share_N), 0),
        }
    )


@table(tables=TABLES)
def depth(data: Decisions) -> pd.DataFrame:
    """One row per router: does a difference grow? The share of tokens that differ here or before,
    that differ here first, and the share that differs here of those that did and did not before."""
    rows = []
    differ = 0
    stack = ""
    for r, _ in data.pairs:
        counts, listed = data.of(r), data.router(r)
        if listed.stack != stack:
            differ, stack = 0, listed.stack
        n = int(data.decisions_UX(r).sum())
        differ += counts.new
        rows.append(
            {
                "layer": listed.layer,
                "router": r,
                "set_mismatch": _ratio(counts.new + counts.again, n),
                "differ_so_far": _ratio(differ, n),
                "new": _ratio(counts.new, n),
                "again_after_difference": _ratio(counts.again, counts.before),
                "new_without_difference": _ratio(counts.new, n - counts.before),
            }
        )
    return pd.DataFrame(rows)


@table(tables=TABLES)
def documents(data: Decisions) -> pd.DataFrame:
    """One row per document with any difference, those with the largest share first."""
    rows = data.counts.document_rows()
    document, domain, n_tokens, decisions, mismatch = rows[rows[:, 4] > 0].T
    frame = pd.DataFrame(
        {
            "document": document,
            "domain": pd.Series([data.counts.domains[d] for d in domain], dtype="str"),
            "tokens": n_tokens,
            "decisions": decisions,
            "mismatches": mismatch,
            "set_mismatch": mismatch / np.maximum(decisions, 1),
        }
    )
    frame = frame.sort_values(["set_mismatch", "document"], ascending=[False, True])
    frame = frame.reset_index(drop=True)
    return frame.head(data.options.top) if data.options.top else frame


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


# of the manifest: what makes two runs of one model differ
RECORDED = {
    "model": ("id", "revision", "class"),
    "capture": ("mode", "device", "dtype", "experts_implementation", "engine", "versions"),
}


@table(tables=TABLES)
def summary(data: Decisions) -> pd.DataFrame:
    """One row per fact: key, value (text)."""
    rows = [(key, storable(str(value))) for key, value in facts(data)]
    return pd.DataFrame(rows, columns=["key", "value"]).astype({"key": "str", "value": "str"})


def facts(data: Decisions) -> Iterator[tuple[str, object]]:
    """The rows of `summary`."""
    alignment, options = data.alignment, data.options
    yield from (("a", data.a.path), ("b", data.b.path))
    if data.noise is not None:
        yield "noise", data.noise.b.path
    yield from (
        ("tokens_a", alignment.a.tokens),
        ("tokens_b", alignment.b.tokens),
        ("tokens_compared", data.counts.tokens),
        ("decisions_compared", data.decisions),
        ("layers", ranges({data.router(r).layer for r, _ in data.pairs})),
        ("aligned_by", alignment.by),
        ("token_ids", "checked" if alignment.ids_known else "unknown, not checked"),
        ("sequences_diverged", alignment.diverged),
        ("tokens_after_divergence", alignment.other_ids),
    )
    if data.counts.shards_alike:
        yield "shards_alike", f"{data.counts.shards_alike}: the same files, not compared row by row"
    shifts = {n: getattr(options, n) for n in SHIFTS if getattr(options, n)}
    yield from shifts.items()
    for key, values in recorded_otherwise(data).items():
        yield f"differs_{key}", f"{values[0]} | {values[1]}"


SHIFTS = ("shift_layers", "shift_positions", "shift_routes", "drop_last")


def recorded_otherwise(data: Decisions) -> dict[str, tuple[Any, Any]]:
    """What the manifests say differently of how the two were recorded: dtype → ("float32",
    "bfloat16")."""
    found = dict[str, tuple[Any, Any]]()
    for part, names in RECORDED.items():
        of_a, of_b = (trace.manifest.get(part) or {} for trace in (data.a, data.b))
        for name in names:
            if of_a.get(name) != of_b.get(name):
                found[name] = (of_a.get(name), of_b.get(name))
    plan_a, plan_b = (
        (trace.manifest.get("corpus") or {}).get("plan") or {} for trace in (data.a, data.b)
    )
    for name in ("max_length", "batch_tokens", "special_tokens", "generate", "random_init"):
        if plan_a.get(name) != plan_b.get(name):
            found[name] = (plan_a.get(name), plan_b.get(name))
    return found

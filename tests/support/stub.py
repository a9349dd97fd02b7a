"""A report of tables written by hand: what the verdict reads, and nothing to be counted."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
from moe_inspect.analysis.metrics.registry import metrics_of
from moe_inspect.analysis.metrics.uncertainty import noise_floor
from moe_inspect.reporting.tables.data import thresholds_with
from moe_inspect.trace.schema import Router


class Tables(dict[str, pd.DataFrame]):
    def complete(self, name: str) -> pd.DataFrame:
        return self[name]


def row(
    load: Sequence[int] | np.ndarray, k: int = 1, tokens: int | None = None, **columns: Any
) -> dict[str, Any]:
    """A row of `balance` for a router of this load: beyond chance, unless `columns` say else."""
    load_E = np.array(load)
    known = metrics_of("balance", {"load_LE"}).items()
    found: dict[str, Any] = {name: np.asarray(m.function(load_E[None])).item() for name, m in known}
    found["min_over_max"] = load_E.min() / load_E.max() if load_E.any() else np.nan
    assignments, most = int(load_E.sum()), found["max_over_mean"]
    return (
        found
        | {"experts": len(load), "top_k": k, "assignments": assignments, "load_E": load_E}
        | {"busiest_expert": int(load_E.argmax()), "passes": {100: (9, 0.0)}}
        | {"tokens": assignments // k if tokens is None else tokens, "design_effect": 1.0}
        | {"expected_by_chance": 1.01, "busiest_p": 0.002, "least_used_p": 0.002}
        | {"dropped": np.nan, "drop_rate": np.nan, "noise_floor_batch": 0.01}
        | {"max_over_mean_low": most - 0.01, "max_over_mean_high": most + 0.01}
        | {"max_vio_batch": found["max_vio"]}
        | columns
    )


def stub(
    *rows: dict[str, Any],
    counts_only: bool = False,
    documents: int | Sequence[int] = 60,
    domains: Sequence[str] = ("text",),
    by_domain: Sequence[Any] = (),
    limits: dict[str, float] | None = None,
    pooled: float | None = None,
    selected: Sequence[int] | None = None,
    overload_p: float = 0.002,
    layers: Sequence[int] | None = None,
    domains_selected: set[str] | None = None,
    **tables: list[dict[str, Any]],
) -> Any:
    """rows: of `balance`, a router each, by layer unless `layers` says otherwise. overload_p: of
    every row of `domains`. documents: of all domains, or of each. by_domain[r]: [D, E] assignments
    of router r. `tables`: further ones, as rows."""
    listed = [
        Router(r if layers is None else layers[r], "", "", one["experts"], one["top_k"])
        for r, one in enumerate(rows)
    ]
    chosen = list(range(len(rows)) if selected is None else selected)
    if isinstance(documents, int):
        share, D = documents // len(domains), len(domains)
        documents = [documents - share * (D - 1), *[share] * (D - 1)]
    each = list(documents)
    balance = [{"layer": listed[r].layer, "router": r, **rows[r]} for r in chosen]
    assignments = {
        r: np.array(by_domain[r]) if len(by_domain) else rows[r]["load_E"][None] for r in chosen
    }
    # documents that are alike, but for those that a row names
    alike = [np.tile(one["load_E"] // max(sum(each), 1), (sum(each), 1)) for one in rows]
    load_UE = [one.get("load_UE", like) for one, like in zip(rows, alike, strict=True)]
    tokens = max((one["tokens"] for one in rows), default=0)
    counts = SimpleNamespace(
        counts_only=counts_only,
        documents_unknown=counts_only,
        documents_tell=not counts_only and sum(each) >= FEWEST_TO_JUDGE,
        units=[None] * sum(each),
        documents=0 if counts_only else sum(each),
        tokens=tokens,
        domains=list(domains),
        domain_of_unit_U=np.repeat(np.arange(len(domains)), each),
        routers=listed,
        indices=chosen,
        load_E=lambda r: rows[r]["load_E"],
        assignments_DE=lambda r: assignments[r],
        tokens_of=lambda r: rows[r]["tokens"],
        filled=lambda r: min(1, rows[r]["assignments"] / (rows[r]["top_k"] * rows[r]["tokens"])),
        tokens_U_of=lambda r: load_UE[r].sum(1) // rows[r]["top_k"],
        of={
            r: SimpleNamespace(batches=rows[r]["passes"], assignments_UE=load_UE[r]) for r in chosen
        },
    )
    load, spread = list[dict[str, Any]](), list[dict[str, Any]]()
    for r in chosen:
        of, E, k = {"layer": listed[r].layer, "router": r}, rows[r]["experts"], rows[r]["top_k"]
        ratio_E = bal.load_ratio(rows[r]["load_E"][None])[0]
        for e, n in enumerate(rows[r]["load_E"]):
            load.append({**of, "expert": e, "assignments": int(n), "load_ratio": ratio_E[e]})
        total_D = assignments[r].sum(1)
        activation_DE = assignments[r] / np.maximum(total_D[:, None] / k, 1)
        lift_DE = activation_DE / np.maximum(activation_DE.mean(0), 1e-9)
        for (d, e), n in np.ndenumerate(assignments[r]):
            cell = {**of, "domain": domains[d], "expert": e, "assignments": int(n)}
            cell |= {"tokens": int(total_D[d]) // k, "overload_p": overload_p}
            cell |= {"activation": activation_DE[d, e], "lift": lift_DE[d, e]}
            cell["expected_by_chance"] = 1 + noise_floor(cell["tokens"], E, k)
            spread.append(cell)
    trace = SimpleNamespace(routers=listed, tables=("routing", "logits"), manifest={})
    trace.imported = trace.has_dropped = False
    made = {"balance": balance, "load": load, "domains": spread, **tables}
    frames = {name: pd.DataFrame(of) for name, of in made.items()}
    return SimpleNamespace(
        costs=None,
        tables=Tables(frames),
        rows_of=lambda name, r: frames[name][frames[name]["router"] == r],
        loaded=[one for one in balance if not np.isnan(one["max_vio"])],
        counts=counts,
        thresholds=thresholds_with(limits),
        baseline=None,
        selection=SimpleNamespace(routers=chosen, domains=domains_selected),
        trace=trace,
        warning=None,
        top=20,
        made={},
        pooled_max_over_mean=lambda: pooled,
    )

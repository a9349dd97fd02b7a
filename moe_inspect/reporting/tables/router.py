"""Tables of what the router and the experts compute: confidence and losses of the router, and what
each expert is worth by the size of what it returns (`trace --output-norms`).

L routers, E experts, U units (clusters of documents), D domains, R resamples.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.counting.counts import Counts, values_of
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import ReportData, Row
from moe_inspect.reporting.tables.load import Columns, row_per_router, rows_per_router
from moe_inspect.reporting.tables.registry import AsColumns, table

ROUTER = (
    *("weight_mass", "weight_entropy_nats", "weight_margin"),
    *("logit_decisions", "aux_loss", "z_loss", "gate_entropy_nats", "top_k_mass"),
    *("top1_margin", "boundary_margin", "tie_rate"),
)


@table("weights", "logits", by_router=ROUTER)
def router(data: ReportData) -> pd.DataFrame:
    """One row per router: its confidence, from the k gate weights and, where they are recorded,
    from all logits (NaN otherwise); the balancing losses computed from the logits."""
    counts = data.counts_for("weights", "logits")

    def values(r: int) -> Row:
        row = values_of(counts, r, "router") | {"logit_decisions": counts.of[r].logit_decisions}
        return row | {"weight_margin": np.nan} if counts.routers[r].top_k == 1 else row

    frame = row_per_router(counts, data.selection.routers, ROUTER, values)
    return frame.astype({name: "float64" for name in ROUTER if name != "logit_decisions"})


def _or_nan(values: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, np.nan) if values is None else values


@table("worth")
def worth(data: ReportData) -> AsColumns:
    """One row per expert: its assignments and gate weights, and by the norms of its outputs REAP,
    mean norm and share, with 95 % intervals over documents. NaN where the trace lacks what it
    takes."""
    counts = data.decisions("worth")
    weights_RU = counts.weights_RU
    return rows_per_router(data, lambda r: _worth_of(counts, r, weights_RU))


def _worth_of(counts: Counts, r: int, weights_RU: np.ndarray | None) -> Columns:
    of = counts.of[r]
    load_UE = of.assignments_UE
    gated_UE = _or_nan(of.gated_norm_UE, load_UE.shape)
    norm_UE = _or_nan(of.norm_UE, load_UE.shape)
    # a share is of the router's sum in the same resample
    total_UE = np.broadcast_to(gated_UE.sum(1, keepdims=True), gated_UE.shape)
    return {
        "expert": np.arange(counts.routers[r].experts),
        "assignments": load_UE.sum(0),
        "gate_sum": counts.weight_sum_E(r),
        **_with_interval("reap", gated_UE, load_UE, weights_RU),
        **_with_interval("mean_norm", norm_UE, load_UE, weights_RU),
        **_with_interval("share", gated_UE, total_UE, weights_RU),
    }


def _with_interval(
    name: str, sums_UE: np.ndarray, of_UE: np.ndarray, weights_RU: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Σ sums ÷ Σ of, of each expert, and its 95 % interval over documents, from 0 on."""
    value_E = sums_UE.sum(0) / nan_for_zero(of_UE.sum(0))
    ends_2E, known_E = np.full((2, len(value_E)), np.nan), np.isfinite(value_E)
    if weights_RU is not None and known_E.any():
        of_RN = nan_for_zero(weights_RU @ of_UE[:, known_E])
        documents = unc.effective_documents(of_UE.sum(1))
        values_RN = weights_RU @ sums_UE[:, known_E] / of_RN
        ends_2E[:, known_E] = unc.interval(values_RN, documents, (0, np.inf))
    return {name: value_E, f"{name}_low": ends_2E[0], f"{name}_high": ends_2E[1]}

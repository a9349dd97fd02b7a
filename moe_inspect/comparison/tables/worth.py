"""What experts return, in two traces with the norms of their outputs.

U units (clusters of documents), E experts, R resamples.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.comparison.counting.outputs import OutputSums
from moe_inspect.comparison.data import TABLES, PairData
from moe_inspect.reporting.tables.registry import table

OF_PAIR = ("assignments", "reap", "mean_norm", "share")
COLUMNS = (
    *("layer", "router", "expert"),
    *(f"{name}_{side}" for name in OF_PAIR for side in "ab"),
    *(f"{name}{end}" for name in ("reap_change", "norm_change") for end in ("", "_low", "_high")),
    *("both", "norm_difference"),
)


@table(tables=TABLES)
def worth(data: PairData) -> pd.DataFrame:
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


def _of_router(data: PairData, sums: OutputSums) -> pd.DataFrame:
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

"""How well two models predict the same tokens, in two traces with the losses of tokens.

U units (clusters of documents).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, ratio_interval
from moe_inspect.comparison.data import TABLES, PairData
from moe_inspect.reporting.tables.registry import table

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
def loss(data: PairData) -> pd.DataFrame:
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


def _rows(data: PairData) -> list[dict[str, object]]:
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
    data: PairData,
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

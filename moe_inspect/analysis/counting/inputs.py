"""Metrics of a router, computed from its counts: a metric names its inputs by its parameters.

L = 1 router, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.router_counts import DECLARED
from moe_inspect.analysis.metrics.registry import metrics_of

# what a parameter of this name is given; any other is the field of RouterCounts of that name
DERIVED: dict[str, Callable[[Counts, int], Any]] = {
    "load_LE": lambda counts, r: counts.load_E(r)[None],
    "load_E": lambda counts, r: counts.load_E(r),
    "weight_sum_LE": lambda counts, r: counts.weight_sum_E(r)[None],
    "first_choice_E": lambda counts, r: counts.first_choice_E(r),
    "assignments_DE": lambda counts, r: counts.assignments_DE(r),
    "tokens_D": lambda counts, r: counts.tokens_D_of(r),
}
INPUTS = frozenset(DERIVED) | frozenset(DECLARED)


def values_of(counts: Counts, router: int, table: str) -> dict[str, float]:
    """Every metric of a table that is one number per router and needs no more than INPUTS, by
    column. NaN where a count is not known."""
    values = dict[str, float]()
    for m in metrics_of(table, INPUTS).values():
        arguments = {
            p: DERIVED[p](counts, router) if p in DERIVED else getattr(counts.of[router], p)
            for p in m.parameters
        }
        known = all(value is not None for value in arguments.values())
        value = np.asarray(m.function(**arguments)) if known else np.asarray(np.nan)
        assert value.size == 1, f"{m.name} of table {table} is no number per router"
        values[m.column] = float(value.reshape(()))
    return values

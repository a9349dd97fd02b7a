"""The order of the rows that a model's routers see.

B batch rows, S positions, T rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site

# (B, S) → int [T]: the token b·S + s of each row; None: row b·S + s, all of them
RowOrder = Callable[[int, int], "np.ndarray | None"]


def row_order_of(sites: Sequence[Site]) -> RowOrder | None:
    """The order of the rows as the specs of these routers state it; None for all batch-first.
    MoeInspectError where they differ: a forward pass has its rows in one order."""
    if not sites or all(site.order == "bs" and site.rows is None for site in sites):
        return None
    first = sites[0]
    other = next((s for s in sites if (s.order, s.rows) != (first.order, first.rows)), None)
    if other is not None:
        raise MoeInspectError(
            f"{first.path} and {other.path} have their rows in different orders: record them "
            "one after the other"
        )
    if first.rows is None:
        return _sequence_first
    rows, module = first.rows, first.module

    def of_part(B: int, S: int) -> np.ndarray | None:
        part = rows(module, B, S)
        if part is None:
            return _sequence_first(B, S) if first.order == "sb" else None
        order = np.asarray(part)
        if (
            order.ndim != 1
            or not np.issubdtype(order.dtype, np.integer)
            or len(np.unique(order)) < len(order)
            or (len(order) and not 0 <= order.min() <= order.max() < B * S)
        ):
            raise MoeInspectError(
                f"RouterSpec(rows=…) of {first.path} must return different token numbers from 0 "
                f"to {B * S - 1}, one for each row"
            )
        return order

    return of_part


def _sequence_first(B: int, S: int) -> np.ndarray | None:
    return np.arange(B * S).reshape(B, S).T.reshape(-1) if B > 1 and S > 1 else None

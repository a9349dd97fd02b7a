"""Comparisons as a notebook shows them."""

from __future__ import annotations

from typing import Any

from moe_inspect.comparison.charts import set_mismatch
from moe_inspect.comparison.checkpoints_data import CheckpointData, saturation_chart
from moe_inspect.comparison.data import PairData
from moe_inspect.comparison.verdict import findings
from moe_inspect.reporting.render.notebook import ROWS, Cell, verdict_cell

WORST = ["layer", "router", "set_mismatch", "overlap", "first_choice"]


def comparison_cell(made: PairData) -> Cell:
    """Verdict, the share of other decisions by layer, and the routers that differ most."""
    found, agreement = findings(made), made.tables["agreement"]
    if not made.mismatched:  # then there is nothing to see
        return verdict_cell(_title(made), found, made.tables)
    worst: Any = agreement.nlargest(ROWS, "set_mismatch")[WORST]
    caption = f"The routers that differ most, {len(worst)} of {len(agreement)}"
    return verdict_cell(_title(made), found, made.tables, set_mismatch(made), worst, caption)


def _title(made: PairData) -> str:
    return f"A {made.a.path} · B {made.b.path}"


def checkpoints_cell(made: CheckpointData) -> Cell:
    """Verdict, and how the overlap with the last checkpoint grows."""
    chart = saturation_chart(made)
    return verdict_cell(" → ".join(made.names), made.verdict(), made.tables, chart)

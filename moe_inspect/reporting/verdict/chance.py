"""Is the load of a router more uneven than chance makes it? A row is one of the table `balance`."""

from __future__ import annotations

import math
from typing import Any

from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.text import layer_label


def chance(row: Any) -> float:
    """The max_vio expected by chance of documents like these: the noise floor is that of
    independent tokens, and tokens of one document raise it by √ design effect."""
    effect = row["design_effect"]
    return row["noise_floor"] * math.sqrt(max(1.0, 1.0 if math.isnan(effect) else effect))


def above_chance(data: ReportData, row: Any) -> bool:
    """Whether max_vio is above the noise floor and the low end of its interval above `chance`. Too
    few documents have no interval, and nothing is above chance then; counts alone know no
    documents, and are compared with twice the floor."""
    if data.counts.counts_only:
        return row["max_vio"] > 2 * row["noise_floor"]
    return row["max_vio"] > row["noise_floor"] and row["max_vio_low"] > chance(row)


def uneven(data: ReportData, row: Any) -> bool:
    """Whether max_vio reaches the threshold `uneven` and is above chance."""
    return row["max_vio"] >= data.thresholds.uneven and above_chance(data, row)


def few_documents(data: ReportData) -> bool:
    """Whether there are too few documents to tell the model from the text."""
    return not data.counts.counts_only and len(data.counts.units) < FEWEST_DOCUMENTS


def name_of(data: ReportData, row: Any) -> str:
    """ "layer 3": the router of a table's row."""
    return f"layer {layer_label(data.trace.routers, int(row['router']))}"


def capital(text: str) -> str:
    """The text at the beginning of a sentence."""
    return text[:1].upper() + text[1:]

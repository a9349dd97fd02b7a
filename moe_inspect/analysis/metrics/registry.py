"""All metrics: plain functions in the files of this folder, each registered by its decorator. The
list on the command line, the balance table, the gates, the table in the
documentation and the property tests come from here: a new metric is one function in one file.

L routers, D domains, E experts, N experts of the next layer's router, W windows, K slots. The
letters at the end of a parameter's name are its axes; a metric's are those of its result. `ideal`
is the value if everything is even: all experts have the same load, whatever the token, the domain,
the window and the expert before. It is a number, or a formula in E and k.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from moe_inspect.later import import_folder

Values = float | np.ndarray
F = TypeVar("F", bound=Callable[..., Values])


@dataclass(frozen=True)
class Metric:
    """`table` and `column`: where a report shows it. `axes`: of its result, "" for a number."""

    name: str
    function: Callable[..., Values]
    table: str
    column: str
    ideal: float | str
    unit: str
    range: str
    axes: str
    source: str

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """What it is computed from, without settings (parameters with a default)."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)

    @property
    def formula(self) -> str:
        """The docstring, on one line."""
        return " ".join((self.function.__doc__ or "").split())

    @property
    def first_sentence(self) -> str:
        return self.formula.partition(". ")[0].rstrip(".")


METRICS: dict[str, Metric] = {}


def metric(
    table: str,
    *,
    ideal: float | str,
    range: str,
    unit: str = "ratio",
    axes: str = "",
    column: str = "",
    source: str = "",
) -> Callable[[F], F]:
    """Registers a function as a metric under its own name, which is its column's by default."""

    def register(function: F) -> F:
        name = function.__name__
        assert name not in METRICS, f"two metrics {name}"
        stated = ideal, unit, range, axes, source
        METRICS[name] = Metric(name, function, table, column or name, *stated)
        return function

    return register


def metrics() -> dict[str, Metric]:
    """METRICS by file in alphabetical order, and within a file in its order."""
    import_folder(__package__ or "")
    return dict(sorted(METRICS.items(), key=lambda item: item[1].function.__module__))


def metrics_of(table: str, inputs: Container[str]) -> dict[str, Metric]:
    """The metrics of a table that can be computed from these inputs."""
    of_table = (m for m in metrics().values() if m.table == table)
    return {m.name: m for m in of_table if all(p in inputs for p in m.parameters)}


def listing() -> list[dict[str, str]]:
    """A row per metric, for people: metric, table, definition, range, even (its value if everything
    is even), unit, source."""
    return [
        {
            "metric": m.column,
            "table": m.table,
            "definition": m.first_sentence,
            "range": m.range,
            "even": m.ideal if isinstance(m.ideal, str) else f"{m.ideal:g}",
            "unit": m.unit,
            "source": m.source,
        }
        for m in metrics().values()
    ]

"""Simulation: what every simulation comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from moe_inspect.reporting.charts.spec import Chart

Options = ParamSpec("Options")
SIMULATED = "Simulated: the trace replayed under other assumptions. "


@dataclass(frozen=True)
class Simulation:
    """`tables`: the main one first, under the simulation's own name. `verdict`: plain sentences,
    most important first.
    `settings`: what was assumed, as told to the user. `chart`: what the page and the pictures
    draw. `shown`: the tables that the text shows; by default the main one. `python`: lines that
    simulate the same again, as `made`."""

    name: str
    tables: dict[str, pd.DataFrame]
    verdict: list[str]
    settings: dict[str, object] = field(default_factory=dict)
    chart: Chart | None = None
    shown: tuple[str, ...] = ()
    python: str = ""

    def figure(self) -> Figure:
        """The chart, drawn by matplotlib. MoeInspectError where there is nothing to draw."""
        from moe_inspect.reporting.render.matplotlib import draw, letters

        if self.chart is None:
            raise MoeInspectError(f"simulate {self.name} has nothing to draw")
        with letters():
            return draw(self.chart)


def repeatable(simulate: Callable[Options, Simulation]) -> Callable[Options, Simulation]:
    """A simulation that says which lines of Python make it again."""

    @wraps(simulate)
    def simulated(*trace: Options.args, **options: Options.kwargs) -> Simulation:
        from moe_inspect.reporting.render.python import python_call

        lines = python_call(simulate.__name__, trace, options)
        return replace(simulate(*trace, **options), python=lines)

    return simulated


def need_decisions(trace: Trace, what: str) -> None:
    """MoeInspectError where the trace holds counts only: `what` ("simulate decode") needs every
    decision, in order."""
    if trace.counts_only:
        raise MoeInspectError(
            f"{trace.path} holds counts only, no order of tokens, which {what} needs: "
            f"{trace.more_than_counts}"
        )

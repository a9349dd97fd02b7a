"""Simulation: what every simulation comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics.balance import UNEVEN
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
from moe_inspect.analysis.metrics.uncertainty import noise_floor
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import Chart
from moe_inspect.reporting.shown import FIRST_ROWS, Shown, python_call, python_of_table
from moe_inspect.reporting.tables.registry import Excerpt
from moe_inspect.reporting.verdict.findings import FEW_DOCUMENTS, few_tokens
from moe_inspect.simulate.shards import count_taken
from moe_inspect.text import layer_label
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.shard import codes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_inspect.reporting.render.html import Section

Options = ParamSpec("Options")
Frame = Any  # a DataFrame, of whose columns pandas' types know too little
Tables = Mapping[str, Frame]
Settings = dict[str, Any]
Labels = dict[int, str]  # router → its layer, as people read it
SIMULATED = "Simulated: the trace replayed under other assumptions. "
# settings that plan files and verdicts need
HIDDEN = (
    "moe_layers",
    "too_few",
    "times",
    "error",
    "ageing",
    "counts_only",
    "documents_unknown",
    "current",
    "costs",
    "fed",
)


@dataclass(frozen=True, repr=False)
class Simulation(Shown):
    """`tables`: DataFrames, the main one first, under the simulation's own name. `verdict`: plain
    sentences, most important first. `settings`: what was assumed, as told to the user. `chart`:
    what the page and the pictures draw. `shown`: the tables that the text shows; by default the
    main one. `python`: lines that simulate the same again, as `made`. `print(simulation)` is one
    screen of it."""

    rows: ClassVar[int] = 20

    name: str
    tables: Mapping[str, pd.DataFrame]
    verdict: list[str]
    settings: dict[str, object] = field(default_factory=dict)
    chart: Chart | None = None
    shown: tuple[str, ...] = ()
    python: str = ""

    def __repr__(self) -> str:
        return f"Simulation({self.name!r}, tables: {', '.join(self.tables)})"

    @property
    def in_order(self) -> list[str]:
        """The tables, those first that the text shows."""
        return list(dict.fromkeys([*self.shown, *self.tables]))

    @property
    def title(self) -> str:
        return f"simulate {self.name}"

    @property
    def said(self) -> list[str]:
        return self.verdict

    @property
    def excerpts(self) -> dict[str, Excerpt]:
        return dict.fromkeys(self.shown or self.in_order[:1], FIRST_ROWS)

    def charts(self) -> tuple[list[Chart], list[str]]:
        return [] if self.chart is None else [self.chart], []

    def plot(self, name: str | None = None) -> Figure:
        """The picture, which has the simulation's name, as a figure of matplotlib. MoeInspectError
        where there is nothing to draw."""
        return super().plot(name or self.name)

    def write_plan(self, path: str | Path, engine: str | None = None) -> str:
        """Writes the plan of a placement for an engine: "sglang", "tensorrt-llm" or "vllm-ascend",
        by default the one of the path's ending. Returns what was written, in words. MoeInspectError
        where no engine reads such a plan, or this simulates something else."""
        from moe_inspect.simulate.placement.plan import write_plan

        if "plan" not in self.tables:
            raise MoeInspectError(f"simulate {self.name} makes no plan: simulate placement does")
        return write_plan(self.tables["plan"], dict(self.settings), path, engine)

    def page(self) -> str:
        assumed = "; ".join(
            f"{name.replace('_', ' ')}: {text}"
            for name, value in self.settings.items()
            if name not in HIDDEN and (text := _text(value))
        )
        return self._page_of({n: self.tables[n] for n in self.in_order}, assumed, self.python)

    def section(self) -> Section:
        """A section for the page of a report: what it says, its picture and its first table."""
        from moe_inspect.reporting.render.html import Section

        name = self.in_order[0]
        return Section(
            f"Simulated: {self.name}",
            " ".join(self.verdict),
            self.chart,
            table=self.tables[name],
            group="Serving",
            python=python_of_table(self.python, name),
        )


def _text(value: object) -> str:
    """Nothing of what was not asked for."""
    if value is None or value is False:
        return ""
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def simulation(
    trace: Trace,
    few: str,
    tables: Tables,
    settings: Settings,
    verdict: Callable[[Tables, Settings, Labels], list[str]],
    chart: Callable[[Tables, Settings, Labels], Chart | None],
    shown: tuple[str, ...],
) -> Simulation:
    """With what its tables come to in words and in a picture. Its name is that of the first of
    them. `few`: as `too_few` says; the verdict then advises nothing."""
    settings["too_few"] = bool(few)
    labels = {r: layer_label(trace.routers, r) for r in range(len(trace.routers))}
    said, drawn = verdict(tables, settings, labels), chart(tables, settings, labels)
    said = [f"Too little data to advise: {few}", *said] if few else said
    return Simulation(next(iter(tables)), tables, said, settings, drawn, shown)


def too_few(trace: Trace, selection: Selection) -> str:
    """Why what is selected is too little to judge, as reports do; "" where it is enough."""
    documents, wanted = set[int](), selection.domains
    known = not trace.counts_only or trace.by_document
    tokens = trace.n_tokens
    if trace.counts_only and wanted:
        tokens = count_trace(trace, selection).tokens
    elif wanted or selection.phase:
        tokens = sum(by_shard(trace, None, count_taken, selection))
    for shard in trace.shards if known else ():
        table = shard.table("documents", ["document", "domain"])
        code_T, labels = codes(table["domain"])
        within_T = np.array([wanted is None or label in wanted for label in labels], bool)[code_T]
        documents.update(table["document"].to_numpy()[within_T].tolist())
        if len(documents) >= FEWEST_TO_JUDGE:
            break
    if known and len(documents) < FEWEST_TO_JUDGE:
        return FEW_DOCUMENTS
    sizes = {(trace.routers[r].experts, trace.routers[r].top_k) for r in selection.routers}
    floor, E = max((noise_floor(tokens, *of), of[0]) for of in sizes)
    return few_tokens(tokens, E, floor, UNEVEN)[0] if floor > UNEVEN else ""


def repeatable(simulate: Callable[Options, Simulation]) -> Callable[Options, Simulation]:
    """A simulation that says which lines of Python make it again."""

    @wraps(simulate)
    def simulated(*trace: Options.args, **options: Options.kwargs) -> Simulation:
        made = simulate(*trace, **options)
        given = signature(simulate).bind(*trace, **options).arguments
        traces = [given.pop("trace"), *given.pop("others", ())]
        lines = python_call(simulate.__name__.replace("_", "."), traces, given)
        return replace(made, python=lines)

    return simulated


def with_decisions(trace: Trace | str | Path, what: str) -> Trace:
    """Opens the trace. MoeInspectError where it holds no tokens yet, or counts only: `what`
    ("simulate decode") needs every decision, in order."""
    trace = open_trace(trace)
    if trace.counts_only:
        raise MoeInspectError(
            f"{trace.path} holds counts only, no order of tokens, which {what} needs: "
            f"{trace.more_than_counts}"
        )
    if not trace.n_tokens:
        raise MoeInspectError(f"{trace.path} holds no tokens yet: nothing is committed")
    return trace

"""The result of every comparison: tables, a verdict, and how both are shown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import pandas as pd

from moe_inspect.analysis.counting.select import select
from moe_inspect.comparison.pairing import layers_named, routers_of_one_model
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import Axis, Chart
from moe_inspect.reporting.shown import Shown, python_call, python_of_table
from moe_inspect.reporting.tables.registry import Excerpt, LazyTables, Table, table
from moe_inspect.reporting.verdict.findings import (
    Finding,
    finding,
    most_important_first,
    verdict_table,
)
from moe_inspect.reporting.verdict.gate import gated
from moe_inspect.text import layer_label, storable
from moe_inspect.trace.reader import Trace

if TYPE_CHECKING:
    from moe_inspect.reporting.render.html import Section

# tables of two traces of decisions, of loads, and of different models
TABLES: dict[str, Table] = {}
LOAD_TABLES: dict[str, Table] = {}
MODEL_TABLES: dict[str, Table] = {}
Made = TypeVar("Made", bound="Comparison")
Row = dict[str, Any]  # a row of a table; the numbers of a sentence
Progress = Callable[[int], None] | None
Facts = dict[str, Sequence[object]]  # key → its value in each trace


@dataclass(frozen=True, kw_only=True)
class ComparisonKind(Generic[Made]):
    """How a kind of comparison is shown."""

    of: str  # what the traces hold, in words
    tables: Mapping[str, Table]
    main: str  # the table that is printed if a format is given without a table
    checks: Sequence[Callable[[Made], Iterable[Finding]]]  # in the order in which they are read
    title: str  # of the page
    footer: str
    # name → function, group on the page, and table
    charts: Mapping[str, tuple[Callable[[Made], Chart | str], str, str]]
    sections: Mapping[str, tuple[str, str, str]]  # table of the page → group, title and text
    excerpts: Mapping[str, Excerpt]  # tables of the text
    figures: Callable[[Made], list[str]] | None = None  # key figures of the page
    text: Callable[[Made], Section | str] | None = None  # documents on the page


class Comparison(Shown):
    """Two traces, compared. `tables["agreement"]` and the others are DataFrames, computed when
    first used. A table that these traces cannot have raises MoeInspectError with the reason, which
    `why_not("agreement")` returns. `verdict()` is the result in plain sentences, and
    `print(comparison)` a screen of it. `kind.of` names what the traces hold."""

    kind: ClassVar[ComparisonKind[Any]]

    def __init__(self, a: Trace, b: Trace, given: Mapping[str, object]):
        self.traces, self.a, self.b = [a, b], a, b
        self.trace = a  # whose routers name the rows
        self.given = given  # options of `compare` that differ from their defaults
        self.tables = LazyTables(self, self.kind.tables, self.why_not)

    def label(self, r: int) -> str:
        """The layer of a router of A, in words."""
        return layer_label(self.trace.routers, r)

    @property
    def why(self) -> str:
        """Why decisions are not compared, or ""."""
        return ""

    def python(self, table: str) -> str:
        """Python code that gives a table."""
        return python_of_table(python_call("compare", self.traces, self.given), table)

    def __repr__(self) -> str:
        paths = ", ".join(repr(str(trace.path)) for trace in self.traces)
        return f"Comparison({paths}, of {self.kind.of}, tables: {', '.join(self.tables)})"

    def verdict(self) -> list[Finding]:
        """Findings, the most important first: whether it is the same routing, where it differs, and
        what to do. Each has a plain sentence in `text`."""
        findings = [one for check in self.kind.checks for one in check(self)]
        return most_important_first(findings)

    @property
    def said(self) -> list[Finding]:
        return self.verdict()

    @property
    def main_table(self) -> str:
        return self.kind.main

    def why_not(self, name: str) -> str | None:
        """Why these traces cannot have a table, or a metric of a gate; None if they can, or if no
        comparison has it."""
        for what, of in (("table", dict[str, object]), ("metric", gated)):
            there = of(self.kind.tables)
            if name in of(TABLES) and name not in there:
                only = f", only {', '.join(there)}" if there else ""
                return f"{self.why}: there is no {what} {name!r}{only}"
        return None

    @property
    def title(self) -> str:
        return f"A {self.a.path} · B {self.b.path}"

    @property
    def heading(self) -> str:
        return self.title

    @property
    def subtitle(self) -> str:
        """Line below the title of the page."""
        return self.title

    @property
    def command(self) -> str:
        return f"moe-inspect compare {shlex.join(str(trace.path) for trace in self.traces)}"

    @property
    def shown_tables(self) -> list[str]:
        """Names of the tables of the text that have something to show."""
        return list(self.kind.excerpts)

    @property
    def excerpts(self) -> dict[str, Excerpt]:
        return {name: self.kind.excerpts[name] for name in self.shown_tables}

    def first_chart(self) -> Chart | str | None:
        make = next(iter(self.kind.charts.values()), None)
        return make[0](self) if make else None

    def charts(self) -> tuple[list[Chart], list[str]]:
        charts, left_out = list[Chart](), list[str]()
        for name, (make, _, _) in self.kind.charts.items():
            try:
                made = make(self)
            except MoeInspectError as error:  # a table that these traces cannot give
                made = str(error)
            if isinstance(made, Chart):
                charts.append(replace(made, name=name))
            elif made:
                left_out.append(made)
        return charts, list(dict.fromkeys(left_out))

    def page(self) -> str:
        from moe_inspect.reporting.render.html import Page, Section, chart_section, page_html

        kind = self.kind
        charts, left_out = self.charts()
        text = kind.text(self) if kind.text else ""
        sections = [text] if isinstance(text, Section) else []
        left_out += [text] if isinstance(text, str) and text else []
        for chart in charts:
            _, group, name = kind.charts[chart.name]
            made = chart_section(chart)
            sections.append(replace(made, group=group, python=self.python(name)))
        for name, (group, title, said) in kind.sections.items():
            if self.why_not(name) or not len(self.tables[name]):
                continue
            rows, code = self.tables[name], self.python(name)
            sections.append(Section(title, said, table=rows, group=group, name=name, python=code))
        page = Page(
            kind.title,
            self.subtitle,
            verdict=self.verdict(),
            figures=kind.figures(self) if kind.figures else (),
            sections=sections,
            left_out=left_out,
            footer=f"{kind.footer} Made by moe-inspect.",
        )
        return page_html(page)


@dataclass(frozen=True)
class PairSettings:
    """Options of `compare`."""

    layers: str | int | Iterable[int | str] | None = None
    domains: str | Iterable[str] | None = None
    phase: str | None = None
    top: int = 20
    shift_layers: int = 0
    shift_positions: int = 0
    shift_routes: int = 0
    drop_last: bool = False
    drop_zero_filled: bool = False
    noise: Trace | None = None
    threads: int | None = None  # not an option of `compare`

    @property
    def given(self) -> dict[str, object]:
        """The options of `compare` that differ from their defaults."""
        values = ((f, getattr(self, f.name)) for f in fields(self) if f.name != "threads")
        return {f.name: value for f, value in values if value != f.default}

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raise MoeInspectError if one of these options is given, which the traces cannot serve."""
        for name in names:
            if name in self.given:
                raise MoeInspectError(f"{why}, which {name} needs: leave it out")


# options that only a comparison of decisions has
OF_DECISIONS = ("shift_positions", "shift_routes", "drop_last", "drop_zero_filled", "noise")


class Paired(Comparison):
    """Traces A and B of one model. pairs: (router of A, router of B). Raises DifferentModelsError
    if routers differ in experts or in k."""

    refused: ClassVar[Sequence[str]] = ()  # options that do not apply to these traces

    def __init__(self, a: Trace, b: Trace, options: PairSettings):
        super().__init__(a, b, options.given)
        options.refuse(self.refused, self.why)
        self.options = options
        self.selection = select(a, options.layers, options.domains, options.phase)
        routers, shift = self.selection.routers, options.shift_layers
        self.pairs = routers_of_one_model(a, b, routers, shift, options.layers)

    def place(self, r: int) -> dict[str, int]:
        """The first columns of a row about a router of A."""
        return {"layer": self.a.routers[r].layer, "router": r}

    @property
    def layers_axis(self) -> Axis:
        return Axis("layer", tuple(self.label(r) for r, _ in self.pairs))


@table(tables=TABLES)
@table(tables=LOAD_TABLES)
@table(tables=MODEL_TABLES)
def verdict(made: Comparison) -> pd.DataFrame:
    """One row per finding."""
    return verdict_table(made.verdict())


def missing_layers(made: Paired) -> Iterator[Finding]:
    """Routers that only one of the traces has."""
    of_a, of_b = zip(*made.pairs, strict=True)
    every_b = range(len(made.b.routers)) if made.options.layers is None else ()
    for name, trace, routers, paired in (
        ("A", made.a, made.selection.routers, of_a),
        ("B", made.b, every_b, of_b),
    ):
        if left := [layer_label(trace.routers, r) for r in routers if r not in paired]:
            text = f"Only {name} has {layers_named(left)}: not compared."
            yield finding("missing_layers", "note", text, layers=left)


def facts_table(facts: Facts, columns: Sequence[str]) -> pd.DataFrame:
    """A table of facts: key, and a value of each column (text)."""
    rows = [(key, *(storable(str(value)) for value in of)) for key, of in facts.items()]
    return pd.DataFrame(rows, columns=["key", *columns]).astype("str")

"""What every comparison has in common: tables, a verdict, and how both are shown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import Axis, Chart, Panel, Points
from moe_inspect.reporting.shown import Shown, python_call, python_of_table
from moe_inspect.reporting.tables.registry import Excerpt, LazyTables, Table, table
from moe_inspect.reporting.verdict.checks import verdict_table
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.reporting.verdict.gate import gated
from moe_inspect.text import join_first, layer_label, plural, storable
from moe_inspect.trace.reader import Trace

if TYPE_CHECKING:
    from moe_inspect.reporting.render.html import Section, Tile

# of traces of decisions, of which one holds counts only, of different models, of checkpoints
TABLES: dict[str, Table] = {}
LOAD_TABLES: dict[str, Table] = {}
MODEL_TABLES: dict[str, Table] = {}
CHECKPOINT_TABLES: dict[str, Table] = {}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How traces are compared, and how that is shown. of: what they hold, in words. main: the table
    that a format alone asks for. checks: what makes the findings, in the order in which they are
    read. title, footer: of the page. charts: name → what makes it, its group on the page and its
    table. sections: tables of the page → their group, title and text. excerpts: tables of the text.
    sometimes: tables that not all such traces have. firsts: tables of which the page has the first
    row of each group by these columns. tiles, text: what makes the key figures of the page, and its
    texts of documents."""

    of: str
    tables: Mapping[str, Table]
    main: str
    checks: Sequence[Callable[[Any], Any]]
    title: str
    footer: str
    charts: Mapping[str, tuple[Callable[[Any], Chart | str], str, str]]
    sections: Mapping[str, tuple[str, str, str]]
    excerpts: Mapping[str, Excerpt]
    sometimes: Sequence[str] = ()
    firsts: Mapping[str, list[str]] = field(default_factory=dict[str, list[str]])
    tiles: Callable[[Any], list[Tile]] | None = None
    text: Callable[[Any], Section | str] | None = None


class Comparison(Shown):
    """Traces compared, whatever they hold, as `kind.of` says. `tables["agreement"]` and the others
    are DataFrames, computed when first asked for. One that these traces cannot have raises
    MoeInspectError with the reason, which `why_not("agreement")` returns. `verdict()` is what they
    come to, in plain sentences. `print(comparison)` is one screen of it."""

    kind: ClassVar[Kind]
    a: Trace
    b: Trace
    # the keywords of `compare` that are not as by default
    given: Mapping[str, Any]

    @property
    def trace(self) -> Trace:
        """The one whose routers name what is compared."""
        return self.a

    @property
    def traces(self) -> list[Trace]:
        return [self.a, self.b]

    def label(self, r: int) -> str:
        """The layer of a router of it, in words."""
        return layer_label(self.trace.routers, r)

    @property
    def why(self) -> str:
        """Why there is no comparison of decisions; "" where there is."""
        return ""

    @property
    def why_in_full(self) -> str:
        """The same, with the traces that it is of."""
        return self.why

    def python(self, table: str) -> str:
        """Python that gives a table."""
        return python_of_table(python_call("compare", self.traces, self.given), table)

    def __repr__(self) -> str:
        paths = ", ".join(repr(str(trace.path)) for trace in self.traces)
        return f"Comparison({paths}, of {self.kind.of}, tables: {', '.join(self.tables)})"

    def verdict(self) -> list[Finding]:
        """What the traces come to: whether it is the same routing, where it is not, and what to do,
        or what can be told instead. A Finding each, with a plain sentence in `text`."""
        return [one for check in self.kind.checks for one in check(self)]

    def why_not(self, name: str) -> str | None:
        """Why these traces cannot have a table, or a metric of a gate; None where they can, and
        where no comparison has it."""
        for what, of in (("table", dict[str, Any]), ("metric", gated)):
            there = of(self.kind.tables)
            if name in of(TABLES):
                only = f", only {', '.join(there)}" if there else ""
                said = f"{self.why_in_full}: there is no {what} {name!r}{only}"
                return None if name in there else said
        return None

    @property
    def title(self) -> str:
        return f"A {self.a.path} · B {self.b.path}"

    @property
    def heading(self) -> str:
        return self.title

    @property
    def command(self) -> str:
        return f"moe-inspect compare {shlex.join(str(trace.path) for trace in self.traces)}"

    @property
    def said(self) -> list[Finding]:
        return self.verdict()

    @property
    def excerpts(self) -> dict[str, Excerpt]:
        return {name: self.kind.excerpts[name] for name in self.shown_tables}

    def first_chart(self) -> Chart | str:
        return next(iter(self.kind.charts.values()))[0](self)

    @property
    def subtitle(self) -> str:
        """Below the title of the page."""
        return self.title

    @property
    def shown_tables(self) -> list[str]:
        """The tables of the text that have something to show."""
        return list(self.kind.excerpts)

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

        charts, left_out = self.charts()
        text = self.kind.text(self) if self.kind.text else ""
        sections = [text] if isinstance(text, Section) else []
        left_out += [text] if isinstance(text, str) and text else []
        for chart in charts:
            _, group, name = self.kind.charts[chart.name]
            code = self.python(name)
            sections.append(replace(chart_section(chart), group=group, python=code))
        for name, (group, title, said) in self.kind.sections.items():
            if self.why_not(name) or not len(self.tables[name]):
                continue
            table, code = self.tables[name], self.python(name)
            if by := self.kind.firsts.get(name):
                table: Any = table.groupby(by, sort=False).head(1)
                code += f".groupby({by}, sort=False).head(1)"
            sections.append(Section(title, said, table=table, group=group, name=name, python=code))
        return page_html(
            Page(
                self.kind.title,
                self.subtitle,
                verdict=self.verdict(),
                tiles=self.kind.tiles(self) if self.kind.tiles else (),
                sections=sections,
                left_out=left_out,
                footer=f"{self.kind.footer} Made by moe-inspect.",
            )
        )


class Tables(LazyTables):
    """The tables of a comparison; one that others have is refused with the reason."""

    def __init__(self, made: Comparison):
        super().__init__(made, made.kind.tables)
        self._why_not = made.why_not

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self and (why := self._why_not(name)):
            raise MoeInspectError(why)
        return super().__getitem__(name)


@table(tables=TABLES)
@table(tables=LOAD_TABLES)
@table(tables=MODEL_TABLES)
@table(tables=CHECKPOINT_TABLES)
def verdict(made: Comparison) -> pd.DataFrame:
    """One row per finding."""
    return verdict_table(made.verdict())


@table(tables=LOAD_TABLES)
@table(tables=MODEL_TABLES)
def refused(made: Comparison) -> pd.DataFrame:
    """One row per table that these traces cannot have, and why."""
    return pd.DataFrame(refusals(made).items(), columns=["table", "why"]).astype("str")


def refusals(made: Comparison) -> dict[str, str]:
    """Table → why these traces cannot have it."""
    found = {name: made.why for name in TABLES if name not in made.tables}
    own = {name: made.why_not(name) for name in made.kind.sometimes}
    return found | {name: why for name, why in own.items() if why}


def not_compared(made: Comparison) -> Iterator[Finding]:
    """The tables that there cannot be, those with the same reason together."""
    names = dict[str, list[str]]()
    for name, why in refusals(made).items():
        names.setdefault(why, []).append(name)
    for why, of in names.items():
        yield finding(
            "refused", "note", f"Not compared: {', '.join(of)}: {why}.", tables=of, why=why
        )


def missing_layers(made: Any) -> Iterator[Finding]:
    """Routers that only one of the traces has."""
    paired = {r for r, _ in made.pairs}, {m for _, m in made.pairs}
    for name, trace, seen in (("A", made.a, paired[0]), ("B", made.b, paired[1])):
        chosen = made.selection.routers if name == "A" else range(len(trace.routers))
        left = [layer_label(trace.routers, r) for r in chosen if r not in seen]
        if left and (name == "A" or made.options.layers is None):
            said = f"{'layer' if len(left) == 1 else 'layers'} {join_first(left, 6, ', ')}"
            yield finding(
                "missing_layers", "note", f"Only {name} has {said}: not compared.", layers=left
            )


SIDES: tuple[str, str] = ("a", "b")
COLOURS: dict[str, str] = dict(zip(SIDES, ("c1", "c2"), strict=True))


def balance_of_both(
    rows: Mapping[str, Any], name_of: Callable[[str, int], str], more: str = ""
) -> Iterator[Finding]:
    """How even the load is in each. rows: side → those of its table `balance`. name_of: the layer
    of a side's router."""
    said, values = list[str](), dict[str, Any]()
    for side, every in rows.items():
        of = every.dropna(subset=["max_over_mean"])
        if not len(of):
            continue
        ratio, dead = of["max_over_mean"], int(of["dead_experts"].sum())
        worst = int(of.loc[ratio.idxmax(), "router"])
        values |= {f"max_over_mean_{side}": ratio.median(), f"dead_experts_{side}": dead}
        said.append(
            f"{side.upper()} has {ratio.median():.2f}x in the median layer (expected by chance: "
            f"{of['expected_by_chance'].median():.2f}x), {ratio.max():.2f}x in layer "
            f"{name_of(side, worst)}, and {plural(dead, 'expert')} without load"
        )
    if said:
        text = f"Load of the busiest expert ÷ mean load: {'; '.join(said)}.{more}"
        yield finding("balance", "note", text, **values)


def layers_axis(data: Any) -> Axis:
    return Axis("layer", tuple(data.label(r) for r, _ in data.pairs))


def share_axis(of: str, top: float) -> Axis:
    return Axis(f"share of {of}", low=0, high=1.1 * top or 1)


def load_that_moves(data: Any, floor: str, name: str, text: str, limited: bool = True) -> Chart:
    """How far the load moved, beside another column of the table `load_shift`, `floor`."""
    table: Any = data.tables["load_shift"]
    x = np.arange(len(table), dtype=float)
    moved, beside = (table[column].to_numpy(float) for column in ("load_shift", floor))
    marks = Points(x, moved, "B against A", "c1"), Points(x, beside, name, "c1", shape="tick")
    share = Axis("share of the load", low=0)
    if limited:
        share = share_axis("the load", float(np.nanmax([moved, beside])))
    return Chart(
        "Load that moves",
        "Total variation of the experts' load between A and B",
        (Panel(marks, layers_axis(data), share),),
        text=text,
        table=table,
    )


def said_of_models(a: Trace, b: Trace) -> Iterator[tuple[object, ...]]:
    """Rows of a table of facts: key, and its value of A and of B."""
    yield "trace", a.path, b.path
    for key in ("id", "revision", "class"):
        yield f"model_{key}", *((x.manifest.get("model") or {}).get(key) or "" for x in (a, b))


def facts_table(facts: Iterator[tuple[object, ...]], columns: Sequence[str]) -> pd.DataFrame:
    """A table of facts: key, and a value of each column (text)."""
    rows = [(key, *(storable(str(value)) for value in values)) for key, *values in facts]
    return pd.DataFrame(rows, columns=["key", *columns]).astype("str")

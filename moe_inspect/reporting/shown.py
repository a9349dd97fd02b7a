"""What the results of this package have in common: findings, tables and charts, and how these are
shown: as text, pictures, a page, and a cell of a notebook. The commands call the same methods."""

from __future__ import annotations

import base64
import importlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO, cast

from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.progress import tracked
from moe_inspect.reporting.tables.registry import ROWS, Excerpt
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import no_such
from moe_inspect.trace.reader import Trace, address

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_inspect.reporting.charts.spec import Chart

LEAST_OF_TABLE = 9  # lines of a table with two rows in a text
# lines of a table besides its rows and what is said of those left out: an empty one, the title, the
# columns that are the same in every row, the names, a rule
BESIDE_ROWS = 5
FIRST_ROWS = Excerpt("the first rows", lambda frame, most: frame.head(most))
CELL_SENTENCES, CELL_ROWS, CELL_COLUMNS = 5, 5, 8  # of a notebook's cell


class Shown(ABC):
    """A result. `str()` and `print` give its text, at most a screen of it; a notebook shows a cell
    of as much."""

    rows: ClassVar[int] = ROWS
    tables: Mapping[str, pd.DataFrame]

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is of."""

    @property
    def heading(self) -> str:
        """Above the text."""
        return ""

    @property
    def warning(self) -> str | None:
        """What to know before believing any of it."""
        return None

    @property
    def command(self) -> str:
        """What prints a table, with --table."""
        return ""

    @property
    @abstractmethod
    def said(self) -> Sequence[Finding | str]:
        """What it comes to, most important first."""

    @property
    def main_table(self) -> str | None:
        """Table that `--format` prints without `--table`; None if `--table` is needed."""
        return next(iter(self.tables))

    @property
    def excerpts(self) -> Mapping[str, Excerpt]:
        """Of the tables that the text shows; the first is that of a notebook."""
        return {}

    def page(self) -> str:
        """The page, as one string of HTML."""
        return self._page_of(self.tables, "", "")

    def _page_of(self, tables: Mapping[str, pd.DataFrame], assumed: str, python: str) -> str:
        """A page of what it comes to, its charts and these tables. `assumed`: below the title.
        `python`: lines that make it."""
        from moe_inspect.reporting.render.html import Page, Section, chart_section, page_html

        sections = [chart_section(chart) for chart in self.charts()[0]]
        for name, of in tables.items():
            code = python_of_table(python, name)
            sections.append(Section(name, table=of, name=name, python=code))
        title = f"moe-inspect {self.title}"
        return page_html(Page(title, assumed, verdict=self.said, sections=sections))

    def charts(self) -> tuple[list[Chart], list[str]]:
        """Its charts, and why others are missing."""
        return [], []

    def first_chart(self) -> Chart | str | None:
        """The chart that a notebook shows; why there is none, where that is known."""
        return next(iter(self.charts()[0]), None)

    def write_text(self, file: TextIO) -> None:
        """Writes the text as the command prints it: with colours and as wide as the terminal where
        `file` is one, without and unbroken otherwise. What it comes to, then the tables cut short;
        on a terminal as much as fits a screen."""
        from moe_inspect.reporting.render import console as text
        from moe_inspect.reporting.render import terminal

        console, excerpts, most = text.console_for(file), self.excerpts, self.rows
        with console.capture() as captured:
            if self.heading:
                text.print_lines(self.heading, "bold", console)
                console.print()
            terminal.print_verdict(self.said, console)
        console.file.write(captured.get())
        if console.is_terminal:
            room = text.screen_lines(console) - captured.get().count("\n")
            excerpts = dict([*excerpts.items()][: max(1, room // LEAST_OF_TABLE)])
            most = max(2, room // max(len(excerpts), 1) - BESIDE_ROWS - (2 if self.command else 1))
        for name, excerpt in excerpts.items():
            terminal.print_excerpt(self.tables[name], name, excerpt, most, self.command, console)

    def write_headline(self, file: TextIO) -> None:
        """Write the most important finding."""
        from moe_inspect.reporting.render import console as text
        from moe_inspect.reporting.render import terminal

        console = text.console_for(file)
        for line in terminal.headline_lines(self.said[0], console) if self.said else ():
            console.print(line, soft_wrap=True)

    def as_json(self) -> dict[str, object]:
        """The text as values for JSON: the title, every finding, and every row of its tables."""
        findings = [{"text": one} if isinstance(one, str) else asdict(one) for one in self.said]
        tables = {
            name: json.loads(self.tables[name].to_json(orient="records", double_precision=15))
            for name in self.excerpts
        }
        return {"title": self.title, "warning": self.warning, "findings": findings, **tables}

    def __str__(self) -> str:
        from moe_inspect.reporting.render.console import on_screen

        return on_screen(self.write_text)

    def _repr_html_(self) -> str:
        """A cell of a notebook: what it comes to, its first chart and the first rows of its first
        table; without scripts, so that it is seen before the notebook is trusted."""
        from moe_inspect.reporting.render.html import template
        from moe_inspect.reporting.render.matplotlib import draw, picture

        table, caption = None, ""
        for name, excerpt in [*self.excerpts.items()][:1]:
            whole = self.tables[name]
            rows = excerpt.rows(whole, CELL_ROWS)
            rows = rows[[c for c in excerpt.columns or rows.columns if c in rows]]
            caption = excerpt.title(name, rows, whole)
            if (left := len(rows.columns) - CELL_COLUMNS) > 0:
                caption += f" (+ {left} more columns)"
            table = rows.iloc[:CELL_ROWS, :CELL_COLUMNS]
        chart, png = self.first_chart(), b""
        if chart and not isinstance(chart, str):
            png = picture(draw(chart), "png", dpi=100)
        return template("notebook.html").render(
            made=self,
            verdict=[one if isinstance(one, str) else one.text for one in self.said],
            most=CELL_SENTENCES,
            chart=chart if png else None,
            png=base64.b64encode(png).decode(),
            table=table,
            caption=caption,
        )

    def show(self) -> None:
        """Shows it: printed as the command prints it, or as a cell where this is a notebook."""
        shell = sys.modules.get("IPython")
        if shell is not None and hasattr(shell.get_ipython(), "kernel"):
            importlib.import_module("IPython.display").display(self)
        else:
            self.write_text(sys.stdout)

    def to_html(self, path: str | Path) -> Path:
        """Writes the page to a file, which needs no network. MoeInspectError where it cannot be
        written."""
        from moe_inspect.reporting.render.html import write_page

        write_page(path, self.page())
        return Path(path)

    def plot(self, name: str) -> Figure:
        """One chart ("load", "domains", …) as a figure of matplotlib. MoeInspectError where there
        is no such chart, naming those there are, or no data for it."""
        from moe_inspect.reporting.render.matplotlib import draw, picture

        figure = draw(self.chart_named(name))
        # so that a notebook shows it also where nothing has imported pyplot
        figure.__dict__["_repr_png_"] = partial(picture, figure, "png", dpi=100)
        return figure

    def chart_named(self, name: str) -> Chart:
        charts = {chart.name: chart for chart in self.charts()[0]}
        if not charts:
            raise MoeInspectError(f"{self!r} has nothing to draw")
        if name not in charts:
            raise MoeInspectError(no_such("chart", name, charts))
        return charts[name]

    def save_plots(
        self,
        directory: str | Path,
        *,
        only: Sequence[str] = (),
        width_inches: float | None = None,
        formats: Sequence[str] | None = None,
    ) -> list[Path]:
        """Writes charts as NAME.FORMAT, by default all of them as PNG and SVG. `only`: their names.
        `width_inches`: of the pictures, for a column of a paper; type keeps its size. `formats`:
        of "png", "svg", "pdf"; text in an SVG or a PDF is text. Returns the files. MoeInspectError
        where there is no such chart, or they cannot be written."""
        from moe_inspect.reporting.render.matplotlib import WIDTH, draw, picture
        from moe_inspect.trace.output_dir import output_file, output_folder

        charts = [self.chart_named(name) for name in only] if only else self.charts()[0]
        if not charts:
            return []
        folder, written = output_folder(directory), list[Path]()
        for chart in tracked(charts, "writing pictures", "pictures"):
            figure = draw(chart, width_inches or WIDTH)
            for path in (folder / f"{chart.name}.{form}" for form in formats or ("png", "svg")):
                with output_file(path) as draft:
                    draft.write_bytes(picture(figure, path.suffix[1:], chart.description))
                written.append(path)
        return written


class Result(Shown):
    """Tables, without findings and charts. `text` writes the text; by default, the text is the
    first table."""

    def __init__(
        self,
        title: str,
        tables: Mapping[str, pd.DataFrame],
        text: Callable[[TextIO], object] | None = None,
    ):
        self.tables, self._title, self._text = tables, title, text

    @property
    def title(self) -> str:
        return self._title

    @property
    def said(self) -> Sequence[Finding | str]:
        return ()

    def write_text(self, file: TextIO) -> None:
        from moe_inspect.reporting.render.console import print_table

        if self._text is None:
            print_table(next(iter(self.tables.values())), file)
        else:
            self._text(file)


def python_call(function: str, traces: Sequence[Trace], options: Mapping[str, object]) -> str:
    """Lines that call `moe_inspect.function` on the traces, with those options that are not None;
    `made` is the result. A function of `simulate` is called on the first of them."""
    given = [repr(_plain(trace)) for trace in traces]
    given += [f"{name}={_plain(value)!r}" for name, value in options.items() if value is not None]
    called = f"{function}("
    if function.startswith("simulate."):
        called = f"open_trace({given.pop(0)}).{called}"
    return f"import moe_inspect\n\nmade = moe_inspect.{called}{', '.join(given)})"


def _plain(value: object) -> object:
    """Where a trace is, also of traces in a list; any other value as it is."""
    if isinstance(value, list | tuple):
        plain = map(_plain, cast("Sequence[object]", value))
        return [*plain] if isinstance(value, list) else (*plain,)
    return address(value) if isinstance(value, Trace | Path) else value


def python_of_table(lines: str, table: str) -> str:
    """The lines, and one that gives a table of what they made."""
    return f"{lines}\nmade.tables[{table!r}]" if lines else ""

"""Self-contained HTML pages: sections with charts and tables, styles and scripts included, no
network.

Text of the corpus (tokens, labels, file names) is untrusted: the template escapes everything, and
the page's Content-Security-Policy allows only its own scripts (by hash) and no requests. The data
of the charts are embedded compressed.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from moe_inspect.errors import writing
from moe_inspect.reporting.charts.spec import PALETTE, Axis, Chart, Heatmap, Mark, Panel
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import number, readable

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 100  # of a table on the page
SCRIPTS = ("chart.js", "map.js", "page.js")
LAST_CODE = 65535  # the 16-bit code of a heatmap's cell without a value


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a paragraph, and a chart, a drawing or a table.

    svg: a drawing as SVG text, shown as a picture, on white. table: shown as it is, or folded in
    below a chart as its alternative for screen readers. definitions: term → meaning."""

    title: str
    text: str = ""
    chart: Chart | None = None
    svg: str | None = None
    table: pd.DataFrame | None = None
    definitions: Mapping[str, str] = field(default_factory=dict[str, str])


class Tile(NamedTuple):
    """A key figure at the top of a page."""

    label: str
    value: str
    remark: str


@dataclass(frozen=True)
class Page:
    """A page from top to bottom. left_out: what it could not show, and why. map_data: what map.js
    draws the map, the domains and the cards of experts from."""

    title: str
    subtitle: str = ""
    warnings: Sequence[str] = ()
    verdict: Sequence[Finding | str] = ()
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    left_out: Sequence[str] = ()
    footer: str = ""
    map_data: Mapping[str, Any] | None = None


def chart_section(chart: Chart) -> Section:
    return Section(chart.title, chart.text, chart, table=chart.table, definitions=chart.definitions)


def page_html(page: Page) -> str:
    """The page as one string of HTML."""
    charts = [section.chart for section in page.sections if section.chart is not None]
    panels = [panel_json(p) for chart in charts if not chart.interactive for p in chart.panels]
    payload = json.dumps(
        {"panels": panels, "map": page.map_data},
        default=without_numpy,
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    script = "".join(map(asset, SCRIPTS))
    return template("page.html").render(
        page=page,
        verdict=[
            (finding.severity, finding.text) if isinstance(finding, Finding) else ("note", finding)
            for finding in page.verdict
        ],
        policy=f"default-src 'none'; script-src 'sha256-{script_hash(script)}'; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        palette=Markup(palette_css()),
        style=Markup(asset("page.css")),
        script=Markup(script),
        payload=_packed(payload) if panels or page.map_data else "",
    )


def write_page(path: str | Path, text: str) -> None:
    with writing(path):
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def rows_of(frame: pd.DataFrame) -> dict[str, Any]:
    """A table as the template takes it: at most MOST_ROWS rows."""
    shown = frame.head(MOST_ROWS)
    numeric = [frame[name].dtype.kind in "iuf" for name in frame.columns]
    return {
        "columns": list(zip([str(name) for name in frame.columns], numeric, strict=True)),
        "rows": [
            list(zip(map(number, row), numeric, strict=True))
            for row in shown.itertuples(index=False, name=None)
        ],
        "more": len(frame) - len(shown),
    }


def picture(svg: str) -> str:
    """A drawing as the data URL of an image: scripts in it do not run, and its ids do not collide
    with those of another drawing."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def without_numpy(value: Any) -> Any:
    """NumPy arrays and scalars as lists and numbers of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} has no JSON")


def template(name: str) -> Template:
    """A template that escapes, with the filters `rows`, `picture` and `readable`."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    loader = PackageLoader("moe_inspect.reporting.render")
    environment: Any = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rows": rows_of, "picture": picture, "readable": readable}
    return environment


def asset(name: str) -> str:
    return (
        files("moe_inspect.reporting.render")
        .joinpath("templates", name)
        .read_text(encoding="utf-8")
    )


def palette_css() -> str:
    """The colours of charts as CSS variables, which follow the theme."""
    colours = "".join(f"--{name}:light-dark({a},{b});" for name, (a, b) in PALETTE.items())
    return f":root{{{colours}}}"


def panel_json(panel: Panel) -> dict[str, Any]:
    """A panel as chart.js takes it."""
    return {
        "x": _axis(panel.x),
        "y": _axis(panel.y),
        "marks": [_mark(mark) for mark in panel.marks],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    return {**vars(axis), "labels": [readable(label) for label in axis.labels]}


def _mark(mark: Mark) -> dict[str, Any]:
    kind = type(mark).__name__.lower()
    if not isinstance(mark, Heatmap):
        fields: dict[str, np.ndarray | str | float | None] = vars(mark)
        return {"kind": kind} | {
            key: numbers(value) if isinstance(value, np.ndarray) else value
            for key, value in fields.items()
        }
    R, C = mark.values.shape
    texts = {"cells": mark.cells, "notes": mark.notes}
    return {
        "kind": kind,
        "rows": R,
        "columns": C,
        "scale": vars(mark.scale),
        **{key: None if of is None else of.ravel().tolist() for key, of in texts.items()},
        **_coded(mark.values),
    }


def _coded(values_RC: np.ndarray) -> dict[str, Any]:
    """Values as 16-bit codes on a linear scale from the smallest to the largest; the last code is
    no value. A third of the size of decimals, and precise enough for a picture."""
    known_RC = np.isfinite(values_RC)
    low, high = 0.0, 1.0
    if known_RC.any():
        low, high = float(values_RC[known_RC].min()), float(values_RC[known_RC].max())
    share_RC = (np.where(known_RC, values_RC, low) - low) / ((high - low) or 1.0)
    codes_RC = np.where(known_RC, np.rint(share_RC * (LAST_CODE - 1)), LAST_CODE)
    text = base64.b64encode(codes_RC.astype("<u2").tobytes()).decode()
    return {"low": low, "high": high, "values": text}


def numbers(values: np.ndarray) -> list[float | None]:
    """Values for JSON: five digits, None for NaN."""
    values = np.asarray(values, float)
    known = np.isfinite(values)
    size = np.where(known & (values != 0), np.abs(values), 1.0)
    unit = 10.0 ** (4 - np.floor(np.log10(size)))
    rounded = np.empty(values.shape, object)
    rounded[known] = (np.rint(values * unit) / unit)[known].tolist()
    return rounded.tolist()


def _packed(text: str) -> str:
    """gzip, in base64: a third of the size, and no character with a meaning in HTML."""
    return base64.b64encode(
        gzip.compress(text.encode(errors="backslashreplace"), 6, mtime=0)
    ).decode()


def script_hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

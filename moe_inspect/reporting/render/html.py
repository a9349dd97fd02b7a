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
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import count
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
GRAVEST = 3  # findings on the first screen
GROUPS = ("Balance", "Specialization", "Serving", "Router")
SCRIPTS = ("chart.js", "card.js", "map.js", "page.js")
LAST_CODE = 65535  # the 16-bit code of a heatmap's cell without a value


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a paragraph, and a chart, a drawing, a widget or a table.

    svg: a drawing as SVG text, shown as a picture, on white. table: shown as it is, or folded in
    below a chart as its alternative for screen readers. definitions: term → meaning. group: the
    part of the page that it stands in, one of GROUPS or a name of the page's own. name: its id in
    links, by default made of the title. widget: the function of `moe.widgets` (templates/*.js)
    that fills it from `data`, which JSON can hold. python: code that gives the table."""

    title: str
    text: str = ""
    chart: Chart | None = None
    svg: str | None = None
    table: pd.DataFrame | None = None
    definitions: Mapping[str, str] = field(default_factory=dict[str, str])
    group: str = ""
    name: str = ""
    widget: str = ""
    data: Any = None
    python: str = ""


class Tile(NamedTuple):
    """A key figure at the top of a page."""

    label: str
    value: str
    remark: str


@dataclass(frozen=True)
class Page:
    """A page from top to bottom. lead: the section on the first screen, beside the gravest
    findings. left_out: what it could not show, and why. map_data: what map.js draws the map, the
    domains and the cards of experts from. link_of: the address of what a finding is about, such as
    "#L12E45", or ""."""

    title: str
    subtitle: str = ""
    warnings: Sequence[str] = ()
    verdict: Sequence[Finding | str] = ()
    tiles: Sequence[Tile] = ()
    lead: Section | None = None
    sections: Sequence[Section] = ()
    left_out: Sequence[str] = ()
    footer: str = ""
    map_data: Mapping[str, Any] | None = None
    link_of: Callable[[Finding], str] = lambda _: ""


def chart_section(chart: Chart) -> Section:
    return Section(
        chart.title,
        chart.text,
        chart,
        table=chart.table,
        definitions=chart.definitions,
        group=chart.group,
        name=chart.name,
    )


def page_html(page: Page) -> str:
    """The page as one string of HTML."""
    groups = _grouped(page)
    placed = [section for group in groups for section in group.sections]
    lead = _placed(page.lead, set()) if page.lead else None
    charts = [one.chart for one in ([lead] if lead else []) + placed if one.chart is not None]
    panels = [panel_json(p) for chart in charts if not chart.interactive for p in chart.panels]
    script, said = "".join(map(asset, SCRIPTS)), _said(page)
    return template("page.html").render(
        page=page,
        lead=lead,
        groups=groups,
        gravest=said[:GRAVEST],
        others={
            name: [one for one in said[GRAVEST:] if one.group == name]
            for name in _in_order(one.group for one in said[GRAVEST:])
        },
        policy=f"default-src 'none'; script-src 'sha256-{script_hash(script)}'; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        palette=Markup(palette_css()),
        style=Markup(asset("page.css")),
        script=Markup(script),
        payload=packed({"panels": panels, "map": page.map_data}) if panels or page.map_data else "",
    )


class Group(NamedTuple):
    """Sections under one heading of the page and of its menu; without a title they stand last."""

    id: str
    title: str
    sections: list[Section]


def _grouped(page: Page) -> list[Group]:
    """The groups in the order of GROUPS, then those of the page's own as they come; each section
    with an id of its own."""
    names = _in_order(section.group for section in page.sections)
    taken = {"first", "findings", "payload", "theme", "card", "now", *map(slug, names)}
    if page.lead:
        taken.add(page.lead.name or slug(page.lead.title))
    return [
        Group(
            slug(name) if name else "",
            name,
            [_placed(section, taken) for section in page.sections if section.group == name],
        )
        for name in names
    ]


def _placed(section: Section, taken: set[str]) -> Section:
    """The section with an id that is not taken."""
    wanted = (section.name or slug(section.title)).replace("_", "-")
    tries = (wanted if n == 1 else f"{wanted}-{n}" for n in count(1))
    name = next(one for one in tries if one not in taken)
    taken.add(name)
    return replace(section, name=name)


def slug(text: str) -> str:
    """A title as an id: "Load over time" → "load-over-time"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


class Said(NamedTuple):
    """A finding as the page shows it. link: the hash of the expert that it is about."""

    severity: str
    text: str
    group: str = ""
    link: str = ""


def _said(page: Page) -> list[Said]:
    return [
        Said(one.severity, one.text, one.group, page.link_of(one))
        if isinstance(one, Finding)
        else Said("note", one)
        for one in page.verdict
    ]


def _in_order(names: Iterable[str]) -> list[str]:
    """Each group once: those of GROUPS in their order, others as they come, "" last."""
    known = {name: i for i, name in enumerate(GROUPS)}
    return sorted(dict.fromkeys(names), key=lambda n: (not n, known.get(n, len(GROUPS))))


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
    environment.filters |= {
        "rows": rows_of,
        "picture": picture,
        "readable": readable,
        "packed": packed,
    }
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


def packed(value: Any) -> str:
    """JSON in gzip in base64: a third of the size, and no character with a meaning in HTML."""
    text = json.dumps(
        value,
        default=without_numpy,
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    return base64.b64encode(
        gzip.compress(text.encode(errors="backslashreplace"), 6, mtime=0)
    ).decode()


def script_hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

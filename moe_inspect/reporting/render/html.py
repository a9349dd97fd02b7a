"""A page that needs nothing but itself: sections with charts and tables, the look and the scripts
within it, no network.

What a corpus holds ends up here (tokens, labels, file names), so everything is escaped by the
template, and a policy in the page lets no script run but the page's own (named by their hashes) and
nothing be fetched. The data of the charts lie in it compressed.
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
from typing import TYPE_CHECKING, Any

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
LAST_CODE = 65535  # of a heatmap's values as 16 bits: no value


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a paragraph on what is seen, and a chart, a drawing or a table.

    svg: a drawing as SVG text, shown as a picture, on white. table: shown as it is, or folded in
    under a chart, for which it is the alternative that can be read out. definitions: term → what it
    means."""

    title: str
    text: str = ""
    chart: Chart | None = None
    svg: str | None = None
    table: pd.DataFrame | None = None
    definitions: Mapping[str, str] = field(default_factory=dict)


def chart_section(chart: Chart) -> Section:
    return Section(chart.title, chart.text, chart, table=chart.table, definitions=chart.definitions)


def page(
    title: str,
    verdict: Sequence[Finding | str],
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    warnings: Sequence[str] = (),
    facts: Sequence[tuple[str, str, str]] = (),
    left_out: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    footer: str = "",
) -> str:
    """The page as one string of HTML. facts: (label, value, remark), one tile per fact. left_out:
    what the page could not show, and why. data: what map.js draws from."""
    charts = [section.chart for section in sections if section.chart is not None]
    panels = [_panel(p) for chart in charts if not chart.interactive for p in chart.panels]
    script = "".join(map(_asset, SCRIPTS))
    payload = json.dumps(
        {"panels": panels, "map": data},
        default=_plain,
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            verdict=[
                (said.severity, said.text) if isinstance(said, Finding) else ("note", said)
                for said in verdict
            ],
            warnings=warnings,
            facts=facts,
            left_out=left_out,
            sections=sections,
            footer=footer,
            policy=f"default-src 'none'; script-src 'sha256-{_sha256(script)}'; "
            "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
            palette=Markup(_palette()),
            style=Markup(_asset("page.css")),
            script=Markup(script),
            payload=_packed(payload) if panels or data else "",
        )
    )


def write_page(path: str | Path, text: str) -> None:
    with writing(path):
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def rows_of(frame: pd.DataFrame) -> dict[str, Any]:
    """What the template writes of a table: at most MOST_ROWS rows."""
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
    """A drawing as the address of an image: what is in it cannot run, and its names cannot meet
    those of another drawing."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value))


def template(name: str) -> Template:
    """A template that escapes, with the filters `rows`, `picture` and `readable`."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    loader = PackageLoader("moe_inspect.reporting.render")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rows": rows_of, "picture": picture, "readable": readable}
    return environment


def _asset(name: str) -> str:
    return (
        files("moe_inspect.reporting.render")
        .joinpath("templates", name)
        .read_text(encoding="utf-8")
    )


def _palette() -> str:
    """The colours of charts as variables of CSS, which follow the theme."""
    colours = "".join(f"--{name}:light-dark({a},{b});" for name, (a, b) in PALETTE.items())
    return f":root{{{colours}}}"


def _panel(panel: Panel) -> dict[str, Any]:
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
        return {"kind": kind} | {
            key: numbers(value) if isinstance(value, np.ndarray) else value
            for key, value in vars(mark).items()
        }
    R, C = mark.values.shape
    texts = {"cells": mark.cells, "notes": mark.notes}
    return {
        "kind": kind,
        "rows": R,
        "columns": C,
        "scale": vars(mark.scale),
        **{key: None if text is None else text.ravel().tolist() for key, text in texts.items()},
        **_coded(mark.values),
    }


def _coded(values_RC: np.ndarray) -> dict[str, Any]:
    """Values as 16-bit codes between their least and their greatest, which are exact; the last code
    is no value: a third of the size of decimals, and as fine as a picture needs."""
    known_RC = np.isfinite(values_RC)
    low, high = 0.0, 1.0
    if known_RC.any():
        low, high = float(values_RC[known_RC].min()), float(values_RC[known_RC].max())
    share_RC = (np.where(known_RC, values_RC, low) - low) / ((high - low) or 1.0)
    codes_RC = np.where(known_RC, np.rint(share_RC * (LAST_CODE - 1)), LAST_CODE)
    text = base64.b64encode(codes_RC.astype("<u2").tobytes()).decode()
    return {"low": low, "high": high, "values": text}


def numbers(values: np.ndarray) -> list[float | None]:
    """For JSON: five digits, None where there is none."""
    values = np.asarray(values, float)
    known = np.isfinite(values)
    size = np.where(known & (values != 0), np.abs(values), 1.0)
    unit = 10.0 ** (4 - np.floor(np.log10(size)))
    rounded = np.empty(values.shape, object)
    rounded[known] = (np.rint(values * unit) / unit)[known].tolist()
    return rounded.tolist()


def _packed(text: str) -> str:
    """gzip, in base64: a third of the size, and nothing in it that HTML could misread."""
    return base64.b64encode(
        gzip.compress(text.encode(errors="backslashreplace"), 6, mtime=0)
    ).decode()


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

"""A page that needs nothing but itself: sections with figures and tables, the look and the scripts
within it, no network.

What a corpus holds ends up here (tokens, labels, file names), so everything is escaped by the
template, and a policy in the page lets no script run but the page's own (named by their hashes) and
nothing be fetched. Data and plotly.js lie in it compressed.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
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
from moe_inspect.text import number, readable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_ROWS = 100  # of a table on the page
SCRIPTS = ("page.js", "map.js")  # map.js only where the page holds a map


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a paragraph on what is seen, and a figure, a drawing or a table.

    figure: a plotly figure as JSON, {"data": …, "layout": …}; a colour "@ink" (any variable of
    page.css) follows the theme, and labels must have gone through `label`. figures: heading →
    figure, for what takes several, in place of `figure`. svg: a drawing as SVG text, shown as a
    picture, on white. table: shown as it is, or folded in under a figure, for which it is the
    alternative that can be read out. definitions: term → what it means."""

    title: str
    text: str = ""
    figure: Mapping[str, Any] | None = None
    svg: str | None = None
    table: pd.DataFrame | None = None
    definitions: Mapping[str, str] = field(default_factory=dict)
    widget: str = ""  # "map" or "domains": drawn by map.js from the page's data
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def plots(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(heading, figure), in the order of the page; a lone figure has no heading."""
        return [("", self.figure)] if self.figure is not None else list(self.figures.items())


def page(
    title: str,
    verdict: Sequence[str],
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    warnings: Sequence[str] = (),
    facts: Sequence[tuple[str, str, str]] = (),
    left_out: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    footer: str = "",
) -> str:
    """The page as one string of HTML. facts: (label, value, remark), a tile each. left_out: what
    the page could not show, and why.
    data: what map.js draws from."""
    figures = [figure for s in sections for _, figure in s.plots]
    scripts = [_asset(name) for name in (SCRIPTS if data else SCRIPTS[:1])]
    plotly = _plotly() if figures or data else ""
    hashes = " ".join(
        f"'sha256-{_sha256(script)}'" for script in [*scripts, *([plotly] if plotly else [])]
    )
    payload = json.dumps(
        {"figures": figures, "map": data},
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
            verdict=verdict,
            warnings=warnings,
            facts=facts,
            left_out=left_out,
            sections=sections,
            footer=footer,
            policy=(
                f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src "
                "data:; base-uri 'none'; form-action 'none'"
            ),
            style=Markup(_asset("page.css")),
            scripts=[Markup(script) for script in scripts],
            payload=_packed(payload) if figures or data else "",
            plotly=_packed_plotly() if plotly else "",
        )
    )


def write_page(path: str | Path, text: str) -> None:
    with writing(path):
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def svg_of(figure: Figure) -> str:
    """A matplotlib figure as SVG text, letters as paths so that it looks the same everywhere;
    closes nothing."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return text.getvalue()


def label(text: object) -> str:
    """A text for a plotly figure, which reads markup in labels: as it is, never as markup."""
    return readable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


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


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@cache
def _packed_plotly() -> str:
    return _packed(_plotly())


def _packed(text: str) -> str:
    """gzip, in base64: a quarter of the size, and nothing in it that HTML could misread."""
    return base64.b64encode(
        gzip.compress(text.encode(errors="backslashreplace"), 9, mtime=0)
    ).decode()


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

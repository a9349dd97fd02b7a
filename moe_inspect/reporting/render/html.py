"""Self-contained HTML pages: sections with charts and tables, styles and scripts included, no
network.

Text of the corpus (tokens, labels, file names) is untrusted: the template escapes everything, and
the page's Content-Security-Policy allows only its own scripts (by hash) and no requests. The data
of the charts are embedded compressed.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from moe_inspect.progress import phase
from moe_inspect.reporting.charts.spec import GROUPS, PALETTE, Chart
from moe_inspect.reporting.render.payload import Json, packed, panel_json, rows_of, table_json
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import plural, readable
from moe_inspect.trace.output_dir import output_file

# ids of the page itself, and those that its scripts add
IDS = ("top", "main", "findings", "menu", "find", "found", "payload", "theme")
ADDED_IDS = ("card", "now")
FEW_COLUMNS = 16  # of a heatmap that has room in half of the page
FINDINGS = 5  # below the headline, unless more of them are grave; others are folded in
SCRIPTS = [
    f"{of}.js" for of in ("chart", "card", "map", "tables", "find", "page", "routes", "text")
]
STYLES = ("page.css", "text.css")
T = TypeVar("T")


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a paragraph, and a chart, a widget or a table.

    table: shown as it is, or folded in below a chart as its alternative for screen readers.
    definitions: term → meaning. group: the part of the page that it stands in, one of GROUPS or a
    name of the page's own. name: its id in links, by default made of the title. widget: the
    function of `moe.widgets` (templates/*.js) that fills it from `data`, which JSON can hold.
    python: code that gives the table. download: a table that is only downloaded, whole. folded:
    whether the table opens at a click."""

    title: str
    text: str = ""
    chart: Chart | None = None
    table: pd.DataFrame | None = None
    definitions: Mapping[str, str] = field(default_factory=dict[str, str])
    group: str = ""
    name: str = ""
    widget: str = ""
    data: object = None
    python: str = ""
    download: pd.DataFrame | None = None
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A page from top to bottom. verdict: the headline, then the other findings. figures: one line
    of key figures. lead: the section on the first screen, next to the findings. left_out: what it
    could not show, and why. map_data: what map.js draws the map, the domains and the cards of
    experts from. link_of: the address of what a finding is about, such as "#L12E45", or ""."""

    title: str
    subtitle: str = ""
    warnings: Sequence[str] = ()
    verdict: Sequence[Finding | str] = ()
    figures: Sequence[str] = ()
    lead: Section | None = None
    sections: Sequence[Section] = ()
    left_out: Sequence[str] = ()
    footer: str = ""
    map_data: Json | None = None
    link_of: Callable[[Finding], str] = lambda _: ""


def chart_section(chart: Chart) -> Section:
    shown = (chart.title, chart.text, chart, chart.table, chart.definitions)
    return Section(*shown, group=chart.group, name=chart.name)


def page_html(page: Page) -> str:
    """The page as one string of HTML."""
    groups = _by_group(page.sections, lambda section: section.group)
    taken = {*IDS, *ADDED_IDS, *(f"group-{slug(name)}" for name in groups)}
    lead = _placed(page.lead, taken) if page.lead else None
    groups = {name: [_placed(one, taken) for one in of] for name, of in groups.items()}
    in_order = [*([lead] if lead else []), *chain.from_iterable(groups.values())]
    advance = phase("writing page", len(in_order) + 1, "sections")
    tables, panels = Json(), list[Json]()
    for one in in_order:
        if one.download is not None:
            tables[one.name] = table_json(one.download, len(one.download))
        elif one.table is not None:
            tables[one.name] = table_json(one.table)
        if one.chart is not None and not one.chart.interactive:
            panels += map(panel_json, one.chart.panels)
        advance(1)
    script = "".join(map(asset, SCRIPTS))
    others = page.verdict[1:]
    grave = sum(isinstance(one, Finding) and one.is_grave for one in others)
    shown = max(FINDINGS, grave) if lead else len(others)
    written = template("page.html").render(
        page=page,
        lead=lead,
        groups=groups,
        headline=next(iter(page.verdict), None),
        few_columns=FEW_COLUMNS,
        findings=others[:shown],
        more=others[shown:],
        policy=f"default-src 'none'; script-src 'sha256-{script_hash(script)}'; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        palette=Markup(palette_css()),
        style=Markup("".join(map(asset, STYLES))),
        script=Markup(script),
        payload=packed({"panels": panels, "map": page.map_data, "tables": tables}),
    )
    advance(1)
    return written


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


def _by_group(those: Iterable[T], group_of: Callable[[T], str]) -> dict[str, list[T]]:
    """Those of each group: the groups of GROUPS in their order, others as they come, "" last."""
    found, known = dict[str, list[T]](), {name: i for i, name in enumerate(GROUPS)}
    for one in those:
        found.setdefault(group_of(one), []).append(one)
    names = sorted(found, key=lambda name: (not name, known.get(name, len(GROUPS))))
    return {name: found[name] for name in names}


def write_page(path: str | Path, text: str) -> None:
    with output_file(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


@cache
def template(name: str) -> Template:
    """A template that escapes, with filters `rows`, `plural`, `readable`, `packed` and `slug`."""
    environment: Any = Environment(
        loader=PackageLoader("moe_inspect.reporting.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rows": rows_of, "plural": plural, "readable": readable}
    environment.filters |= {"packed": packed, "slug": slug}
    return environment.get_template(name)


def asset(name: str) -> str:
    place = files("moe_inspect.reporting.render").joinpath("templates", name)
    return place.read_text(encoding="utf-8")


def palette_css() -> str:
    """The colours of charts as CSS variables, which follow the theme."""
    colours = "".join(f"--{name}:light-dark({a},{b});" for name, (a, b) in PALETTE.items())
    return f":root{{{colours}}}"


def script_hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

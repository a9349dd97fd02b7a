"""The page of a report: its verdict, its figures of note and its sections.

What a section shows is in sections_load.py, sections_domains.py, sections_pairs.py and
sections_router.py, a function a section.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.sections_parts import SECTIONS
from moe_inspect.reporting.render import html
from moe_inspect.reporting.render.html import Section
from moe_inspect.reporting.render.map_data import map_data
from moe_inspect.reporting.tables.data import worst_router
from moe_inspect.reporting.verdict.chance import chance, uneven
from moe_inspect.reporting.verdict.checks import DATA_KINDS
from moe_inspect.text import counted, layer_label

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

HOMES = (
    "sections_load",
    "sections_domains",
    "sections_pairs",
    "sections_router",
)  # in the order of the page


def every_section() -> dict[str, Callable[[Report], Section | str]]:
    """SECTIONS with every file read that adds to it, whichever was read first."""
    homes = [
        importlib.import_module(f"moe_inspect.reporting.charts.{home}").__name__ for home in HOMES
    ]
    return dict(sorted(SECTIONS.items(), key=lambda item: homes.index(item[1].__module__)))


def report_page(report: Report, more: Iterable[Section | str] = ()) -> str:
    """The page of a report, as HTML. `more`: sections between its own and what the trace is, or why
    there is none."""
    known = every_section()
    report.prepare(known)
    sections, left_out = [], []
    for make in known.values():
        try:
            made = make(report)
        except MoeInspectError as error:  # what this trace cannot give is said on the page
            made = str(error)
        if isinstance(made, Section):
            sections.append(made)
        elif made:
            left_out.append(made)
    added = list(more)
    sections[-1:-1] = [made for made in added if isinstance(made, Section)]
    left_out += [made for made in added if isinstance(made, str)]
    data, short = map_data(report)
    found = report.verdict()
    warnings = [finding.text for finding in found if finding.kind in DATA_KINDS]
    verdict = [finding.text for finding in found if finding.kind not in DATA_KINDS]
    return html.page(
        str(dict(report.facts())["model"]),
        verdict,
        sections,
        subtitle=_subtitle(report),
        warnings=warnings,
        facts=_tiles(report),
        left_out=[*left_out, *short],
        data=data,
        footer="Every figure is of one router at a time: expert 3 of one layer has nothing to do "
        "with expert 3 of the next. Load counts "
        "assignments; a token makes k of them at each router. Made by moe-inspect.",
    )


def _subtitle(report: Report) -> str:
    counts, trace = report.counts, report.trace
    shapes = sorted(
        {(trace.routers[r].experts, trace.routers[r].top_k) for r in report.selection.routers}
    )
    said = [
        str(trace.path.resolve().name),
        counted(counts.tokens, "token")
        + (f" of {counted(counts.documents, 'document')}" if counts.documents else ""),
        counted(len(counts.domains), "domain"),
        (
            f"{counted(len(report.selection.routers), 'router')}, "
            f"{' and '.join(f'{k} of {E} experts' for E, k in shapes)} a token"
        ),
    ]
    return " · ".join(said + ([f"{report.selection.phase} only"] if report.selection.phase else []))


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    worst, rows = worst_router(report), report.loaded
    if worst is None:
        return []
    pooled = report.pooled_max_over_mean()
    tiles = [
        (
            "busiest expert ÷ mean",
            f"{worst['max_over_mean']:.2f}×",
            f"layer {layer_label(report.trace.routers, int(worst['router']))}, the worst",
        ),
        ("chance would give", f"{1 + chance(worst):.2f}×", "documents like these"),
        (
            "uneven routers",
            f"{sum(uneven(report, row) for row in rows)} of {len(rows)}",
            f"{1 + report.thresholds.uneven:g}× and beyond chance",
        ),
        (
            "dead experts",
            str(sum(int(row["dead_experts"]) for row in rows)),
            f"of {sum(int(row['experts']) for row in rows):,}",
        ),
    ]
    return tiles + (
        [("pooled over layers", f"{pooled:.2f}×", "what one figure would say")] if pooled else []
    )

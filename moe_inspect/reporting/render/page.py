"""The page of a report: verdict, key figures, charts and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import TABLES_OF, Chart, draw_charts
from moe_inspect.reporting.render.html import Page, Section, Tile, chart_section, page_html
from moe_inspect.reporting.render.map_data import map_data
from moe_inspect.reporting.render.python import python_of_report
from moe_inspect.reporting.render.texts.documents import Amount
from moe_inspect.reporting.render.texts.section import text_section
from moe_inspect.reporting.tables.data import ReportData, worst_of
from moe_inspect.reporting.tables.load import chosen
from moe_inspect.reporting.tables.summary import facts
from moe_inspect.reporting.verdict.chance import beyond, uneven
from moe_inspect.reporting.verdict.checks import findings
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import layer_label, plural


def report_page(
    data: ReportData,
    more: Iterable[Section | str] = (),
    text: Amount = None,
    up: tuple[str, str] | None = None,
) -> str:
    """The page of a report, as HTML. `more`: sections to add after its charts, or texts that say
    why one is missing. `text`: documents of each domain on the page, "all", 0 for none; by default
    as many as a megabyte holds. `up`: the address of the page above, and what its link says."""
    charts, left_out = draw_charts(data)
    added, of_text = list(more), text_section(data, text)
    lead = next((chart for chart in charts if chart.interactive == "map"), None)
    sections = [
        *([of_text] if isinstance(of_text, Section) else []),
        *(_section(data, chart) for chart in charts if chart is not lead),
        *_tables(data),
        *(made for made in added if isinstance(made, Section)),
        Section(
            "About this trace",
            table=data.tables["summary"],
            python=python_of_report(data, "summary"),
        ),
    ]
    left_out += [made for made in [of_text, *added] if isinstance(made, str)]
    experts, short = map_data(data)
    found = findings(data)
    return page_html(
        Page(
            str(dict(facts(data))["model"]),
            _subtitle(data),
            warnings=[finding.text for finding in found if _of_data(finding)],
            verdict=[finding for finding in found if not _of_data(finding)],
            tiles=_tiles(data, found),
            lead=replace(_section(data, lead), download=data.tables["load"]) if lead else None,
            sections=sections,
            left_out=[*left_out, *short],
            footer="Each number is about one router: expert 3 of one layer is unrelated to expert "
            "3 of the next. Load counts assignments; a token makes k of them at each router. "
            "Drag over a chart to zoom in, click a name to hide its marks; with the keyboard, "
            "Tab to a chart and read it with the arrow keys. Made by moe-inspect.",
            map_data=experts,
            link_of=lambda finding: _link(data, finding),
            up=up,
        )
    )


# table → a column that it has values in where it says anything, its title, how to read it
TABLES_SHOWN = {
    "committee": (
        "committee_experts",
        "Experts that lead in every domain",
        "How many experts are among the k with the largest load in every domain, and the share of "
        "the assignments that they carry. committee_null: how many where domains share one mean.",
    ),
    "signature": (
        "signature_accuracy",
        "Does routing identify the domain?",
        "How often the document with the most similar shares of assignments is of the same domain, "
        "by all routers together (first row) and by each; signature_null: with the domains "
        "shuffled among documents of like length.",
    ),
    "paths": (
        "set_path_entropy_bits",
        "Paths through the layers",
        "Distinct paths of tokens through the routers up to each one, by first choices (path) and "
        "by sets of experts (set_path), and their entropy; shuffled: with every router's choices "
        "shuffled among the tokens of each document. Near most_bits, almost every token has its "
        "own path.",
    ),
}


def _tables(data: ReportData) -> Iterator[Section]:
    """Those that this trace has values for."""
    for name, (column, title, text) in TABLES_SHOWN.items():
        try:
            table: Any = data.tables[name]
        except MoeInspectError:  # of counts only: the summary says what that leaves out
            continue
        if table[column].notna().any():
            code = python_of_report(data, name)
            yield Section(title, text, table=table, group="Specialization", name=name, python=code)


def _section(data: ReportData, chart: Chart) -> Section:
    tables = TABLES_OF.get(chart.name)
    code = python_of_report(data, tables[0]) if tables else ""
    return replace(chart_section(chart), python=code)


def _of_data(finding: Finding) -> bool:
    """Whether the trace is not fit to be judged: said above everything else."""
    return not finding.group and finding.severity in ("critical", "warning")


def _link(data: ReportData, finding: Finding) -> str:
    """The hash that opens the card of the expert that the finding is about."""
    expert = finding.values.get("expert")
    if finding.router is None or not isinstance(expert, int):
        return ""
    label = layer_label(data.trace.routers, finding.router)
    return f"#L{label.replace(' (', '-').removesuffix(')')}E{expert}"


def _subtitle(data: ReportData) -> str:
    counts, trace = data.counts, data.trace
    shapes = sorted(
        {(trace.routers[r].experts, trace.routers[r].top_k) for r in data.selection.routers}
    )
    parts = [
        str(trace.path.resolve().name),
        plural(counts.tokens, "token")
        + (f" of {plural(counts.documents, 'document')}" if counts.documents else ""),
        plural(len(counts.domains), "domain"),
        f"{plural(len(data.selection.routers), 'router')}, "
        f"{' and '.join(f'{k} of {E} experts' for E, k in shapes)} per token",
    ]
    return " · ".join(parts + ([f"{data.selection.phase} only"] if data.selection.phase else []))


def _tiles(data: ReportData, found: Iterable[Finding]) -> list[Tile]:
    """The key figures. They claim no more than the findings do: with too little data to judge, no
    router is called even and no expert dead."""
    worst, rows = worst_of(chosen(data)), data.loaded
    if worst is None:
        return []
    severity = {one.kind: one.severity for one in found}
    pooled, judged = data.pooled_max_over_mean(), chosen(data)
    uneven_routers = sum(uneven(data, row) for row in judged)
    few = "too little data to judge"
    balance_known = uneven_routers or severity["balance"] != "note"
    without_load, experts = (
        sum(int(row[column]) for row in rows) for column in ("dead_experts", "experts")
    )
    dead_known = severity.get("dead_experts") != "note"
    tiles = [
        Tile(
            "busiest expert ÷ mean",
            f"{worst['max_over_mean']:.2f}×",
            f"layer {layer_label(data.trace.routers, int(worst['router']))}, the worst"
            f"{', before drops' if worst['dropped'] > 0 else ''}",
        ),
        Tile(
            "expected by chance",
            f"{worst['expected_by_chance']:.2f}×",
            "for independent tokens" if data.counts.counts_only else "for documents like these",
        ),
        Tile(
            "uneven routers",
            f"{uneven_routers} of {len(rows)}" if balance_known else "–",
            f"{1 + data.thresholds.uneven:g}× and {beyond(data)}" if balance_known else few,
        ),
        Tile(
            "dead experts" if dead_known else "experts without load",
            f"{without_load:,}",
            f"of {experts:,}" if dead_known else f"of {experts:,}; {few}",
        ),
    ]
    if pooled:
        hides = "hides uneven layers" if "averaging_hides" in severity else ""
        tiles.append(Tile("averaged over layers", f"{pooled:.2f}×", hides))
    return tiles

"""The page of a report: verdict, key figures, charts and tables, and the data of its map, its chart
of domains and its cards of experts (templates/map.js).

L routers, E experts of a router, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.domains import UNIFORM, lift_scale
from moe_inspect.reporting.charts.spec import TABLES_OF, Chart, draw_charts, load_scale
from moe_inspect.reporting.render.documents import Amount
from moe_inspect.reporting.render.html import Page, Section, Tile, chart_section, page_html
from moe_inspect.reporting.render.payload import numbers, scale_json
from moe_inspect.reporting.render.texts import text_section
from moe_inspect.reporting.shown import python_call, python_of_table
from moe_inspect.reporting.tables.data import ReportData, Thresholds, worst_of
from moe_inspect.reporting.tables.load import chosen
from moe_inspect.reporting.tables.summary import facts
from moe_inspect.reporting.verdict.checks import findings
from moe_inspect.reporting.verdict.findings import Finding, beyond, uneven
from moe_inspect.text import layer_label, plural, ranges, readable

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData


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


def python_of_report(data: ReportData, table: str) -> str:
    """Lines that make the same report and give one of its tables."""
    selection, trace = data.selection, data.trace
    whole = len(selection.routers) == len(trace.routers)
    usual = asdict(Thresholds())
    changed = {k: v for k, v in asdict(data.thresholds).items() if v != usual[k]}
    options = {
        "layers": None if whole else ranges({trace.routers[r].layer for r in selection.routers}),
        "domains": sorted(selection.domains) if selection.domains else None,
        "phase": selection.phase,
        "top": None if data.top == 20 else data.top,
        "window": data.window,
        "thresholds": changed or None,
    }
    return python_of_table(python_call("report", [trace], options), table)


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


# most numbers of the load by domain, router and expert: the domains with the fewest tokens are left
# out
CELLS = 800_000
ENTRIES = 160_000  # most entries of each list that cards show, over all experts


def map_data(data: ReportData) -> tuple[dict[str, Any] | None, list[str]]:
    """The data, None for a trace without load; and a text for each thing left out of it.

    load: [domain][router][expert] assignments; tokens: [domain][router]. The lists of the experts
    (words, partners, nexts) are columns, one after another: the entries of expert e of row l of
    `layers` are those from start[first[l] + e] to before start[first[l] + e + 1]."""
    tables: Any = data.tables
    if not data.loaded:
        return None, []
    chosen, short, table = data.selection.routers, list[str](), tables["domains"]
    sizes = np.array([data.trace.routers[r].experts for r in chosen])
    first = np.r_[0, np.cumsum(sizes)]
    labels = sorted(
        data.counts.domains, key=lambda d: -int(table.loc[table["domain"] == d, "tokens"].max())
    )
    most = max(1, CELLS // int(first[-1]))
    if len(labels) > most:
        short.append(
            f"{len(labels) - most} of {len(labels)} domains, those with the fewest tokens, on "
            "the map"
        )
    kept = [d for d in data.counts.domains if d in set(labels[:most])]
    load, tokens = list[list[list[int]]](), list[list[int]]()
    for name in kept:
        rows = dict(iter(table[table["domain"] == name].groupby("router")))
        load.append([rows[r]["assignments"].tolist() for r in chosen])
        tokens.append([int(rows[r]["tokens"].iloc[0]) for r in chosen])
    of_router = dict(iter(tables["load"].groupby("router")))
    entries = int(np.clip(ENTRIES // int(first[-1]), 3, 20))
    position = {r: i for i, r in enumerate(chosen)}

    def by_expert(table: Any) -> tuple[Any, list[int]]:
        """The first `entries` rows of each expert, in the order of experts; where each begins."""
        table = table[table.groupby(["router", "expert"], sort=False).cumcount() < entries]
        flat = first[table["router"].map(position).to_numpy(int)] + table["expert"].to_numpy(int)
        order = np.argsort(flat, kind="stable")
        experts = np.arange(int(first[-1]) + 1)
        return table.iloc[order], np.searchsorted(flat[order], experts).tolist()

    bits = tables["specialization"]["domain_mi_bits"]
    routers = (data.trace.routers[r] for r in chosen)
    drawn: dict[str, Any] = {
        "scale": scale_json(load_scale(routers, "× the mean load")),
        "lift_scale": scale_json(lift_scale(len(kept), "× the mean over domains")),
        "layers": [
            {
                "label": layer_label(data.trace.routers, r),
                "experts": int(E),
                "k": data.trace.routers[r].top_k,
            }
            for r, E in zip(chosen, sizes, strict=True)
        ],
        "first": first.tolist(),
        "domains": [readable(d) for d in kept],
        "uniform": UNIFORM,
        "all": [of_router[r]["assignments"].tolist() for r in chosen],
        "load": load if len(data.counts.domains) > 1 else [],
        "tokens": tokens,
        "choices": [
            numbers(of_router[r]["first_choice"].to_numpy(float, na_value=np.nan)) for r in chosen
        ],
        "weights": [
            numbers((of_router[r]["weight_sum"] / of_router[r]["assignments"]).to_numpy(float))
            for r in chosen
        ]
        if data.trace.has_weights
        else None,
        "telling": int(bits.argmax()) if bits.notna().any() else 0,
        "words": _words(data, by_expert),
        "partners": None,
        "nexts": None,
    }
    if not (data.counts.counts_only or data.without_pairs):
        pairs: Any = tables["coactivation"]
        drawn["partners"] = _pairs(pairs, "other", by_expert)
        links: Any = tables["transitions"]
        drawn["nexts"] = _pairs(links, "next_expert", by_expert)
        next_of = links.drop_duplicates("router").set_index("router")["next_router"]
        drawn["next"] = [position.get(next_of.get(r)) for r in chosen]
    return drawn, short


ByExpert = Callable[[Any], tuple[Any, list[int]]]


def _words(data: ReportData, by_expert: ByExpert) -> dict[str, Any] | None:
    if data.counts.counts_only or not data.top:
        return None
    table = data.tables["vocabulary"]
    table, start = by_expert(table)
    id_of_row: np.ndarray = table["token_id"].to_numpy()
    codes, ids = pd.factorize(id_of_row)
    text_of = table.drop_duplicates("token_id").set_index("token_id")["token"]
    return {
        "start": start,
        "texts": [
            f"id {i}" if text_of[i] is None or text_of[i] != text_of[i] else readable(text_of[i])
            for i in ids
        ],
        "text": codes.tolist(),
        "count": table["count"].tolist(),
        "share": _thousandths(table["fraction"]),
        "choice": _thousandths(table["first_choice_fraction"]),
    }


def _pairs(table: Any, other: str, by_expert: ByExpert) -> dict[str, Any]:
    """The supported partners above chance, in the order of the table, which is that of the
    evidence."""
    table, start = by_expert(table[table["supported"] & (table["lift"] > 1)])
    return {
        "start": start,
        "other": table[other].tolist(),
        "share": _thousandths(table["probability"]),
        "lift": numbers(table["lift"].round(2)),
    }


def _thousandths(values: Any) -> list[int | None]:
    share = values.to_numpy(float)
    known, whole = ~np.isnan(share), np.empty(len(share), object)
    whole[known] = np.rint(share[known] * 1000).astype(int).tolist()
    return whole.tolist()

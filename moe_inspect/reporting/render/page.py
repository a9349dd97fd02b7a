"""The page of a report: verdict, key figures, charts and tables, and the data of its map, its chart
of domains and its cards of experts (templates/map.js).

L routers, E experts of a router, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.charts.domains import UNIFORM
from moe_inspect.reporting.render.html import Page, Section, chart_section, page_html
from moe_inspect.reporting.render.payload import Json, numbers, scale_json
from moe_inspect.reporting.render.texts import text_section
from moe_inspect.reporting.shown import python_call, python_of_table
from moe_inspect.reporting.tables.data import ReportData, Thresholds
from moe_inspect.reporting.tables.load import chosen
from moe_inspect.reporting.tables.pairs import supported_pairs
from moe_inspect.reporting.tables.specialization import token_ids
from moe_inspect.reporting.tables.summary import title_of
from moe_inspect.reporting.verdict.findings import (
    Finding,
    Severity,
    findings,
    uneven,
    verdict_of,
)
from moe_inspect.text import layer_label, plural, ranges, readable

FOOTER = (
    "Each number is about one router: expert 3 of one layer is unrelated to expert 3 of the next. "
    "Load counts assignments; a token makes k of them at each router. "
    "Drag over a chart to zoom in, click a name to hide its marks; with the keyboard, "
    "Tab to a chart and read it with the arrow keys. Made by moe-inspect."
)


def report_page(data: ReportData, text: bool = True) -> str:
    """Return the page of a report, as HTML. `text`: whether it shows documents, as many as a
    megabyte holds."""
    of_text = text_section(data, text)  # before the charts, whose tables stay in memory
    charts, left_out = spec.draw_charts(data)
    lead = next((chart for chart in charts if chart.interactive == "map"), None)
    code = python_of_report(data, "summary")
    parts: list[Section | str] = [
        of_text,
        *(_section(data, chart) for chart in charts if chart is not lead),
        *([data.costs.section()] if data.costs else []),
        Section("About this trace", table=data.tables["summary"], python=code, folded=True),
    ]
    left_out += [of_text] if isinstance(of_text, str) else []
    experts, short = map_data(data)
    verdict = verdict_of(data)
    return page_html(
        Page(
            title_of(data),
            _subtitle(data),
            warnings=[one.text for one in verdict.warnings],
            verdict=[verdict.headline, *verdict.others],
            figures=_figures(data, {one.kind: one.severity for one in findings(data)}),
            lead=replace(_section(data, lead), download=data.tables["load"]) if lead else None,
            sections=[made for made in parts if isinstance(made, Section)],
            left_out=[*left_out, *short],
            footer=FOOTER,
            map_data=experts,
            link_of=lambda finding: _link(data, finding),
        )
    )


def _section(data: ReportData, chart: spec.Chart) -> Section:
    code = [python_of_report(data, table) for table in spec.CHARTS[chart.name].tables[:1]]
    return replace(chart_section(chart), python="".join(code))


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


def _link(data: ReportData, finding: Finding) -> str:
    """The hash that opens the card of the expert that the finding is about."""
    expert = finding.values.get("expert")
    if finding.router is None or not isinstance(expert, int):
        return ""
    label = layer_label(data.trace.routers, finding.router)
    return f"#L{label.replace(' (', '-').removesuffix(')')}E{expert}"


def _subtitle(data: ReportData) -> str:
    counts, trace, phase = data.counts, data.trace, data.selection.phase
    chosen = [trace.routers[r] for r in data.selection.routers]
    shapes = sorted({(router.experts, router.top_k) for router in chosen})
    documents = f" of {plural(counts.documents, 'document')}" if counts.documents else ""
    parts = [
        trace.path.resolve().name,
        f"{plural(counts.tokens, 'token')}{documents}",
        plural(len(counts.domains), "domain"),
        f"{plural(len(chosen), 'router')}, "
        f"{' and '.join(f'{k} of {E} experts' for E, k in shapes)} per token",
        *([f"{phase} only"] if phase else []),
    ]
    return " · ".join(parts)


def _figures(data: ReportData, severity: Mapping[str, Severity]) -> list[str]:
    """The key figures that the headline lacks, which claim no more than the findings do."""
    rows, pooled = data.loaded, data.pooled_max_over_mean()
    if not rows:
        return []
    n = sum(uneven(data, row) for row in chosen(data))
    dead, experts = (sum(int(row[name]) for row in rows) for name in ("dead_experts", "experts"))
    figures = list[str]()
    if n or severity["balance"] != "note":
        figures.append(f"{n} of {plural(len(rows), 'router')} uneven")
    kind = "without load" if severity.get("dead_experts") == "note" else "dead"
    figures.append(f"{dead:,} of {experts:,} experts {kind}")
    if pooled:
        hidden = ", which hides uneven layers" if "averaging_hides" in severity else ""
        figures.append(f"summed over layers by expert number: {pooled:.2f}× the mean{hidden}")
    return figures


# most numbers of the load by domain, router and expert: the domains with the fewest tokens are left
# out
CELLS = 800_000
ENTRIES = 160_000  # most entries of each list that cards show, over all experts


def map_data(data: ReportData) -> tuple[Json | None, list[str]]:
    """The data, None for a trace without load; and a text for each thing left out of it.

    load: [domain][router][expert] assignments; tokens: [domain][router]. The lists of the experts
    (words, partners, nexts) are columns, one after another: the entries of expert e of row l of
    `layers` are those from start[first[l] + e] to before start[first[l] + e + 1]."""
    if not data.loaded:
        return None, []
    counts, chosen = data.counts, data.selection.routers
    routers, domains = [data.trace.routers[r] for r in chosen], counts.domains
    first: np.ndarray = np.r_[0, np.cumsum([router.experts for router in routers])]
    tokens_DL = np.stack([counts.tokens_D_of(r) for r in chosen], axis=1)
    most = max(1, CELLS // int(first[-1]))
    left = (
        f"{len(domains) - most} of {len(domains)} domains, those with the fewest tokens, on the map"
    )
    short = [left] if len(domains) > most else []
    kept: list[int] = sorted(np.argsort(-tokens_DL.max(1), kind="stable")[:most].tolist())
    entries = int(np.clip(ENTRIES // int(first[-1]), 3, 20))
    position = {r: i for i, r in enumerate(chosen)}

    def by_expert(table: pd.DataFrame) -> tuple[pd.DataFrame, list[int]]:
        """The first `entries` rows of each expert, in the order of experts; where each begins."""
        table = table[table.groupby(["router", "expert"], sort=False).cumcount() < entries]
        flat = first[table["router"].map(position).to_numpy(int)] + table["expert"].to_numpy(int)
        order = np.argsort(flat, kind="stable")
        experts = np.arange(int(first[-1]) + 1)
        return table.iloc[order], np.searchsorted(flat[order], experts).tolist()

    bits = data.tables["specialization"]["domain_mi_bits"]
    several = len(domains) > 1
    loads = [counts.assignments_DE(r)[kept].tolist() for r in chosen] if several else []
    weights = None
    if data.trace.has_weights:
        each = (counts.weight_sum_E(r) / nan_for_zero(counts.load_E(r)) for r in chosen)
        weights = [numbers(weight_E) for weight_E in each]
    drawn: Json = {
        "scale": scale_json(spec.load_scale(routers, "× the mean load")),
        "lift_scale": scale_json(spec.ratio_scale("× the mean over domains", len(kept), "domains")),
        "layers": [
            {"label": layer_label(data.trace.routers, r), "experts": of.experts, "k": of.top_k}
            for r, of in zip(chosen, routers, strict=True)
        ],
        "first": first.tolist(),
        "domains": [readable(domains[d]) for d in kept],
        "uniform": UNIFORM,
        "all": [counts.load_E(r).tolist() for r in chosen],
        "load": list(zip(*loads, strict=True)),
        "tokens": tokens_DL[kept].tolist(),
        "choices": [numbers(counts.first_choice_E(r)) for r in chosen],
        "weights": weights,
        "telling": int(bits.argmax()) if bits.notna().any() else 0,
        "words": _words(data, entries, by_expert),
        "partners": None,
        "nexts": None,
    }
    if not (data.counts.counts_only or data.without_pairs):
        together, links = (supported_pairs(data, of)[0] for of in ("coactivation", "transitions"))
        drawn["partners"] = _pairs(together, "other", by_expert)
        drawn["nexts"] = _pairs(links, "next_expert", by_expert)
        drawn["next"] = [position.get(counts.next_router(r) or -1) for r in chosen]
    return drawn, short


ByExpert = Callable[[pd.DataFrame], tuple[pd.DataFrame, list[int]]]


def _words(data: ReportData, most: int, by_expert: ByExpert) -> Json | None:
    if data.counts.counts_only or not data.top:
        return None
    table, start = by_expert(pd.DataFrame(token_ids(data, most), copy=False))
    codes, ids = pd.factorize(table["token_id"])
    text_of = table.drop_duplicates("token_id").set_index("token_id")["token"]
    return {
        "start": start,
        "texts": [f"id {i}" if pd.isna(text_of[i]) else readable(text_of[i]) for i in ids],
        "text": codes.tolist(),
        "count": table["count"].tolist(),
        "share": _thousandths(table["fraction"]),
        "choice": _thousandths(table["first_choice_fraction"]),
    }


def _pairs(table: pd.DataFrame, other: str, by_expert: ByExpert) -> Json:
    """The supported partners above chance, those with the most evidence first."""
    table, start = by_expert(table[table["lift"] > 1])
    return {
        "start": start,
        "other": table[other].tolist(),
        "share": _thousandths(table["probability"]),
        "lift": numbers(table["lift"].round(2).to_numpy()),
    }


def _thousandths(share: pd.Series) -> list[int | None]:
    thousandths = np.rint(share.to_numpy(float) * 1000).tolist()
    return [None if value != value else int(value) for value in thousandths]

"""The index of the site: a table of the traces, their layers, and what is searched.

M traces, R routers of the one that has most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.token_ids import MIN_COUNT
from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Panel, amount, definitions
from moe_inspect.reporting.render.html import Page, Section, Tile, chart_section, page_html
from moe_inspect.site.entry import CELLS, DOMAINS, EXPERTS, EXPERTS_OF_TOKEN, FORMAT, TOKENS, Entry
from moe_inspect.text import cut, join_first, plural

DRAWN = 60  # traces in the chart of layers
MOST_NAMES = 8  # of traces that lack the same
COLUMNS = (
    *("trace", "architecture", "routers", "experts", "top_k", "tokens", "domains"),
    *("max_over_mean", "uneven_routers", "dead_experts"),
    *("domain_bits", "token_bits", "committee_experts", "committee_mass"),
    *("saturation", "saturation_with", "model"),
)
MEANINGS = {
    "routers, experts": "routers of the trace, one per MoE layer in most models, and experts of "
    "each, top_k of them per token; of the router that has most where they differ.",
    "max_over_mean": "the busiest expert's load ÷ the mean load, at the least balanced router.",
    "uneven_routers": "routers whose load is uneven beyond chance, as on the trace's page.",
    "domain_bits, token_bits": "information that the domain, and the token id, carry about the "
    "expert, in bits beyond chance, at the router with most of it. An untrained model "
    "shows some of both: it is the baseline.",
    "committee_experts, committee_mass": "experts that are among the k with the largest load in "
    "every domain, and the share of assignments that they carry; means over the routers.",
    "saturation": "share of the experts that are those of the trace named in saturation_with, for "
    "the same tokens; mean over the routers. By chance it is k ÷ E.",
}


def table_of(entries: Sequence[Entry]) -> pd.DataFrame:
    """One row per trace: the columns of COLUMNS."""
    outer = ("saturation", "saturation_with")
    rows = [
        {"trace": one["name"], **one["row"], **{name: one[name] for name in outer}}
        for one in entries
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    real = ("max_over_mean", *COLUMNS[COLUMNS.index("domain_bits") : -2])
    return table.astype(dict.fromkeys(real, "float64"))


def index_page(entries: Sequence[Entry]) -> str:
    """The page, as HTML."""
    table, lacking = table_of(entries), _lacking(entries)
    charts = [_layers(entries, name) for name in ("balance", "bits")]
    sections = [
        Section(
            "Search",
            'An expert ("L12 E45"), a domain, a token or a trace: type it into the box above, or '
            "press /.",
            widget="atlas",
            data={"format": FORMAT, "entries": list(entries)},
        ),
        Section(
            "Traces",
            "Click a name for the trace's page, a column header to sort.",
            table=table,
            definitions=MEANINGS,
            links=[entry["page"] for entry in entries],
        ),
        *(chart_section(chart) for chart in charts if chart is not None),
    ]
    if len(lacking):
        why = "What the table leaves empty, and why."
        sections.append(Section("What is missing", why, table=lacking))
    return page_html(
        Page(
            f"Atlas of {plural(len(entries), 'trace')}",
            "Which experts the tokens of each model go to, a page per trace",
            tiles=_tiles(table, entries),
            sections=sections,
            left_out=_left_out(entries),
            footer="Experts belong to one router of one model: expert 3 of a layer is unrelated to "
            "expert 3 of the next layer or of another model. Token ids are judged from "
            f"{MIN_COUNT} occurrences on. Made by moe-inspect.",
            scripts=("atlas.js",),
            search="L12 E45, token, domain",
        )
    )


def _lacking(entries: Sequence[Entry]) -> pd.DataFrame:
    """missing, why, traces: their names."""
    names: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        for what, why in (entry["lacks"] | {"saturation": entry["no_saturation"]}).items():
            if why:
                names.setdefault((what, why), []).append(entry["name"])
    rows = [(what, why, join_first(of, MOST_NAMES, ", ")) for (what, why), of in names.items()]
    return pd.DataFrame(rows, columns=["missing", "why", "traces"])


def _tiles(table: pd.DataFrame, entries: Sequence[Entry]) -> list[Tile]:
    """Models with random weights are not called specialised."""
    untrained_M = np.array([entry["untrained"] for entry in entries])
    experts = sum(E for entry in entries for _, E in entry["layers"])
    tiles = [
        Tile("traces", f"{len(table):,}", ""),
        Tile("experts", f"{experts:,}", "in all layers"),
        Tile("tokens", f"{int(table['tokens'].sum()):,}", "in all traces"),
    ]
    for column, which, label, form in (
        ("max_over_mean", "idxmin", "most even load", "{:.2f}×"),
        ("max_over_mean", "idxmax", "most uneven load", "{:.2f}×"),
        ("domain_bits", "idxmax", "most specialised", "{:.2f} bits"),
    ):
        known = table[~untrained_M] if column == "domain_bits" else table
        known = known.dropna(subset=[column])
        if len(known) and len(table) > 1:
            row = known.loc[getattr(known[column], which)()]
            tiles.append(Tile(label, form.format(row[column]), cut(str(row["trace"]), 40)))
    return tiles


def _layers(entries: Sequence[Entry], name: str) -> Chart | None:
    """A heatmap of traces × routers of one list of the entries; None where all of it is empty."""
    drawn = entries[:DRAWN]
    values_MR = pd.DataFrame([entry[name] for entry in drawn]).to_numpy(float)
    layers = [[f"layer {label}" for label, _ in entry["layers"]] for entry in drawn]
    notes_MR = pd.DataFrame(layers).fillna("").to_numpy(object)
    if np.isnan(values_MR).all():
        return None
    if name == "balance":
        title, metric = "Balance by layer", "max_over_mean"
        caption = "Busiest expert ÷ mean load, by router"
        scale = amount("busiest expert ÷ mean", 1.0, values_MR, 2.0, log=True)
    else:
        title, metric = "Specialization by layer", "domain_mi_bits"
        caption = "What the domain tells about the expert, beyond chance, by router"
        scale = amount("bits", 0.0, values_MR, 0.1)
    routers = Axis("router, from the first", tuple(map(str, range(values_MR.shape[1]))))
    traces = Axis("", tuple(cut(entry["name"]) for entry in drawn))
    panel = Panel((Heatmap(values_MR, scale, notes=notes_MR),), routers, traces)
    return Chart(title, caption, (panel,), name=name, definitions=definitions(metric))


def _left_out(entries: Sequence[Entry]) -> list[str]:
    """What the bounds of the index leave out."""
    large = [entry["name"] for entry in entries if entry["ratio"] is None]
    words = [entry["words"] for entry in entries if entry["words"]]
    ids = sum(max(0, one["ids"] - len(one["texts"])) for one in words)
    domains = sum(max(0, entry["all_domains"] - DOMAINS) for entry in entries)
    more = f", and {ids:,} token ids beyond the {TOKENS:,} most frequent of a trace" if ids else ""
    any_domains = any(entry["domains"] for entry in entries)
    said = {
        f"{len(entries) - DRAWN} traces in the charts of layers": len(entries) > DRAWN,
        f"the load of experts of {', '.join(large)}, over {CELLS:,} each, in the search": large,
        f"experts of a token beyond the {EXPERTS_OF_TOKEN} that take it most above their "
        f"share of all tokens{more}": words,
        f"experts of a domain beyond {EXPERTS} of a trace": any_domains,
        f"{domains:,} domains beyond {DOMAINS} of a trace, those with the fewest tokens": domains,
    }
    return [text for text, holds in said.items() if holds]

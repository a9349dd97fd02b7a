"""How comparisons are shown: charts, key figures, the text of the documents whose routes differ
most, and the parts of their text and page.

L routers, C deciles, T tokens, W windows of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from moe_inspect.comparison import diagnosis, load_shift
from moe_inspect.comparison.align import DECILES
from moe_inspect.comparison.decisions import Decisions
from moe_inspect.comparison.load_shift import SIDES, Loads
from moe_inspect.comparison.result import LOAD_TABLES, TABLES, ComparisonKind, Paired
from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.render import texts
from moe_inspect.reporting.render.html import Section
from moe_inspect.reporting.tables.registry import Excerpt, highest_rows
from moe_inspect.text import plural
from moe_inspect.trace.shard import Shard

MOST_SHARDS = 4  # shards that the documents are taken from
SHARE = "set_mismatch"


def highest(column: str, *columns: str, what: str = "") -> Excerpt:
    """Excerpt of the rows with the highest values of a column."""
    return Excerpt(what or f"the highest {column}", partial(highest_rows, column=column), columns)


def share_axis(of: str, top: float) -> spec.Axis:
    return spec.Axis(f"share of {of}", low=0, high=1.1 * top or 1)


def load_shift_chart(
    data: Paired, floor: str, name: str, text: str, top: bool = False
) -> spec.Chart:
    """How far the load moved, beside another column of the table `load_shift`, `floor`."""
    table = data.tables["load_shift"]
    x = np.arange(len(table), dtype=float)
    moved, beside = (table[column].to_numpy(float) for column in ("load_shift", floor))
    marks = (
        spec.Points(x, moved, "B against A", "c1"),
        spec.Points(x, beside, name, "c1", shape="tick"),
    )
    share = spec.Axis("share of the load", low=0)
    if top:
        share = share_axis("the load", float(np.nanmax([moved, beside])))
    return spec.Chart(
        "Load that moves",
        "Total variation of the experts' load between A and B",
        (spec.Panel(marks, data.layers_axis, share),),
        text=text,
        table=table,
    )


def set_mismatch(data: Decisions) -> spec.Chart:
    """Chart of the share of decisions with different experts, by layer."""
    table = data.tables["agreement"]
    x, noise = np.arange(len(table), dtype=float), f"noise_{SHARE}"
    low, high = spec.known_interval(table[f"{SHARE}_low"], table[f"{SHARE}_high"])
    share = table[SHARE].to_numpy(float)
    marks = [spec.Line(x, share, "B against A", "c1", dots=True, low=low, high=high)]
    if noise in table:
        y = table[noise].to_numpy(float)
        marks.append(spec.Line(x, y, "a second run of A against A", "baseline", dash="dot"))
    top = float(np.nanmax([mark.y.max(initial=0) for mark in marks]))
    return spec.Chart(
        "Decisions with different experts",
        "Share of each layer's decisions for which A and B chose different sets of experts",
        (spec.Panel(tuple(marks), data.layers_axis, share_axis("decisions", top)),),
        text="How often the two traces chose different experts, by layer. Bars are 95% intervals "
        "over documents.",
        table=table,
        definitions={
            "set mismatch": "The share of decisions for which the two traces chose different sets "
            "of experts.",
            "overlap": "The share of the experts of a decision that both traces chose.",
        },
    )


# table by router and tenth → title, quantity in tenths, axis, text and definitions of its map
MAPS = {
    "margins": (
        "Where the router was undecided",
        "A's margins",
        "tenth of the margins, 0 the least decided",
        "Rounding flips only close decisions (leftmost column); a different model flips others "
        "too.",
        {
            "margin": "How far A's router was from choosing another expert: the k-th largest logit "
            "minus the next."
        },
    ),
    "positions": (
        "Where in the sequence",
        "the sequence",
        "tenth of the sequence, 0 its beginning",
        "A difference that grows along the sequence comes from its context; one only at its end "
        "comes from tokens that were never fed.",
        {},
    ),
}


def tenths_map(data: Decisions, name: str) -> spec.Chart | str:
    """Map of the decisions that differ, by tenth of the margins or of the sequence."""
    if not data.mismatched:
        return ""
    table, (title, of, axis, text, definitions) = data.tables[name], MAPS[name]
    if not len(table):
        return f"{title}: no decisions with a known margin"
    at = {r: i for i, (r, _) in enumerate(data.pairs)}
    values_LC = np.full((len(at), DECILES), np.nan)
    values_LC[table["router"].map(at), table["decile"]] = table[SHARE]
    top = float(np.nanmax(values_LC)) or 1.0
    scale = spec.amount("share of decisions with different experts", 0.0, values_LC, top)
    columns = spec.Axis(axis, tuple(str(i) for i in range(DECILES)))
    panel = spec.Panel((spec.Heatmap(values_LC, scale),), columns, data.layers_axis)
    caption = f"Share of decisions with different experts, by tenth of {of}"
    return spec.Chart(title, caption, (panel,), text=text, table=table, definitions=definitions)


def growth(data: Decisions) -> spec.Chart | str:
    if not data.mismatched or len(data.pairs) < 2:
        return ""
    table = data.tables["depth"]
    x = np.arange(len(table), dtype=float)
    marks = tuple(
        spec.Line(x, table[column].to_numpy(float), said, colour, dots=True)
        for said, column, colour in (
            ("differ here or in an earlier layer", "differ_so_far", "c1"),
            ("differ here", SHARE, "c2"),
            ("differ here for the first time", "new", "c3"),
        )
    )
    top = float(table["differ_so_far"].max())
    return spec.Chart(
        "Does a difference grow?",
        "Share of tokens with different experts, layer by layer",
        (spec.Panel(marks, data.layers_axis, share_axis("tokens", top)),),
        text="Where most differences are new, each layer adds its own; where few are, early "
        "differences persist.",
        table=table,
    )


def moved_load(data: Decisions) -> spec.Chart | str:
    """Chart of the load that moves, compared with two halves of A's documents."""
    if not data.mismatched:
        return ""
    text = (
        "The share of the assignments that go to different experts, over all tokens. Below the "
        "dash, it is less than between two halves of A's documents."
    )
    beside = "load_shift_halves", "two halves of A's documents"
    return load_shift_chart(data, *beside, text)


def _figures(made: Decisions) -> list[str]:
    hits_R, of_R = made.hits().sum(2)
    worst, aligned = int((hits_R / of_R).argmax()), made.alignment
    figures = [
        f"{made.mismatched:,} of {made.decisions:,} decisions "
        f"({made.mismatched / made.decisions:.2%}) have different experts",
        f"{made.tokens_mismatch:.2%} of tokens differ at any layer",
        f"worst layer: {made.label(made.pairs[worst][0])}, {(hits_R / of_R)[worst]:.2%}",
        f"{made.counts.tokens:,} tokens compared, of {aligned.a.tokens:,} and {aligned.b.tokens:,}",
    ]
    if made.noise is not None:
        noise = made.noise.mismatched / made.noise.decisions
        figures.append(f"two runs of A: {noise:.2%} of decisions differ")
    return figures


def text_section(made: Decisions) -> Section | str:
    """Section with the text of the documents that differ most, or why there is none."""
    trace, worst = made.a, _worst_documents(made)
    if not len(worst):
        return ""
    section = partial(Section, texts.TITLE, group="Decisions", name="text")
    if not len(trace.vocabulary_table):
        return section(texts.without_text(trace))
    routers = [r for r, _ in made.pairs]
    listed = [trace.routers[r] for r in routers]
    budget, longest = texts.sizes(listed * 2, trace.has_weights, len(worst))
    numbers = sorted(set(worst["shard"]))
    shards = [trace.shard(n) for n in numbers]
    worst = worst.assign(shown=np.minimum(worst["tokens"], longest))
    worst = worst[(worst["shown"].cumsum() <= budget) | (worst.index == 0)]
    documents, shown = (worst[name].to_numpy() for name in ("document", "shown"))
    tokens = texts.tokens_of_documents(shards, made.selection, documents, shown)
    of_a, of_b = texts.read_routes(trace, shards, routers, tokens), _of_b(made, numbers, tokens)
    drawn = texts.page_data(trace, routers, worst, tokens, of_a, len(tokens.row_T), of_b)
    differ = int((made.counts.document_rows()[:, 4] > 0).sum())
    text = (
        "Each token in the colour of how many of its experts differ in B, at one layer; point at a "
        "token for its route in both traces through all layers. "
        f"Shown: {len(worst):,} of {plural(differ, 'document')} that differ, those "
        f"with the largest share of different decisions, at most {longest:,} tokens each."
    )
    return section(text, widget="text", data=drawn | {"row": int(made.hits()[0].sum(1).argmax())})


def _worst_documents(made: Decisions) -> pd.DataFrame:
    """Documents with the largest shares of differing decisions, from at most MOST_SHARDS shards."""
    names = pd.Index(["document", "domain", "tokens", "all", "other"])
    parts = [
        pd.DataFrame(rows, columns=names).assign(shard=number)
        for number, rows in made.counts.documents.items()
    ]
    found = pd.concat(parts, ignore_index=True)
    found = found[found["other"] > 0]
    found = found.assign(share=found["other"] / found["all"])
    found = found.sort_values(["share", "document"], ascending=[False, True])
    shards = found["shard"].unique()[:MOST_SHARDS]
    found = found[found["shard"].isin(shards)].drop_duplicates("document")
    found["domain"] = [made.counts.domains[d] for d in found["domain"]]
    return found.head(made.options.top or len(found)).reset_index(drop=True)


def _of_b(
    made: Decisions, shards: Sequence[int], tokens: texts.DrawnTokens
) -> list[texts.DrawnRoutes]:
    """B's routes of the tokens; empty for tokens that are not compared."""
    listed, T = made.a.routers, len(tokens.row_T)
    routes = {r: texts.empty_routes(listed[r], T, made.weights_known) for r, _ in made.pairs}
    for s, number in enumerate(shards):
        mine = np.flatnonzero(tokens.shard_T == s)
        order = np.argsort(tokens.row_T[mine])
        for _, rows, pairs in made.job.rows_by_stack(made.alignment.segments.in_shard(number)):
            rows = rows.take(np.isin(rows.row_T, tokens.row_T[mine]))
            if not len(rows):
                continue
            at = mine[order[np.searchsorted(tokens.row_T[mine], rows.row_T, sorter=order)]]
            for r, other in pairs:
                slots = rows.read(1, Shard.slots, other)
                for ids_T, slot in zip(routes[r].ids, slots, strict=False):
                    nowhere = slot == listed[r].experts
                    ids_T[at] = np.where(nowhere, texts.NOWHERE, slot.astype(np.int32))
                if (of_slots := routes[r].weights) is not None:
                    weights = rows.read(1, Shard.slot_weights, other)
                    for weights_T, slot in zip(of_slots, weights, strict=False):
                        weights_T[at] = slot
    return [*routes.values()]


Decisions.kind = ComparisonKind(
    of="decisions",
    tables=TABLES,
    main="agreement",
    checks=(diagnosis.findings,),
    title="Same routing?",
    footer="A decision is one call of a router for one token; two decisions are the same where "
    "they choose the same set of experts. Drag over a chart to zoom in, click a name to hide its "
    "marks; with the keyboard, Tab to a chart and read it with the arrow keys.",
    charts={
        "set_mismatch": (set_mismatch, "Decisions", "agreement"),
        "margin_map": (partial(tenths_map, name="margins"), "Decisions", "margins"),
        "position_map": (partial(tenths_map, name="positions"), "Decisions", "positions"),
        "growth": (growth, "Decisions", "depth"),
        "load_shift": (moved_load, "Load", "load_shift"),
    },
    figures=_figures,
    text=text_section,
    sections={
        "documents": (
            "Decisions",
            "Documents that differ most",
            "Those with the largest share of different decisions.",
        ),
        "flips": (
            "Decisions",
            "Which expert replaces which",
            "Pairs of experts, the most frequent of each layer.",
        ),
        "tokens": ("Decisions", "Tokens by the number of layers that differ", ""),
        "movers": (
            "Load",
            "Experts whose load changed",
            "By more than documents explain, in all domains together or in one.",
        ),
        "summary": ("", "About these traces", ""),
    },
    excerpts={
        "agreement": highest(
            SHARE,
            *("layer", "router", SHARE, f"{SHARE}_low", f"{SHARE}_high", "overlap"),
            *("first_choice", "weight_l1", f"noise_{SHARE}"),
            what="the routers that differ most",
        ),
        "tokens": Excerpt(
            "the first rows", pd.DataFrame.head, ("routers", "tokens", "share", "share_more")
        ),
        "flips": Excerpt(
            "the most frequent",
            lambda frame, most: frame.nlargest(most, "flips"),
            ("layer", "router", "expert", "other", "flips", "expected", "lift"),
        ),
        "documents": Excerpt(
            "those that differ most",
            pd.DataFrame.head,
            ("document", "domain", "tokens", "mismatches", SHARE),
        ),
    },
)


# --- the load of two traces


def shift_chart(data: Loads) -> spec.Chart:
    """Chart of the load that moves, compared with chance."""
    text = (
        "The share of the assignments that go to different experts. The dash is what chance alone "
        "moves between two traces of this many tokens."
    )
    return load_shift_chart(data, "load_shift_floor", "chance", text)


def balance_chart(data: Loads) -> spec.Chart:
    """Chart of how even the load is in each trace."""
    table = data.tables["balance"]
    x, marks = np.arange(len(table), dtype=float), list[spec.Line]()
    for side, colour in zip(SIDES, ("c1", "c2"), strict=True):
        names = ("max_over_mean", "expected_by_chance")
        ratio, floor = (table[f"{name}_{side}"].to_numpy(float) for name in names)
        marks.append(spec.Line(x, ratio, side.upper(), colour, dots=True))
        marks.append(spec.Line(x, floor, f"{side.upper()}: chance", colour, dash="dot"))
    return spec.Chart(
        "How even the load is",
        "Load of the busiest expert ÷ mean load",
        (spec.Panel(tuple(marks), data.layers_axis, spec.Axis("max ÷ mean load", low=1)),),
        text="1 is even.",
        table=table,
    )


def step_chart(data: Loads) -> spec.Chart | str:
    """Chart of the load that moves in each window of steps; "" with fewer than two windows."""
    steps, table, moved = data.steps, data.tables["windows"], "share of the load that moves"
    if len(steps.first_W) < 2:
        return ""
    shape, names = (len(data.pairs), -1), ("load_shift", "load_shift_floor")
    moved_LW, floor_LW = (table[name].to_numpy(float).reshape(shape) for name in names)
    limit_LW = floor_LW * np.array([[load_shift.times_floor(data, r)] for r, _ in data.pairs])
    labels = tuple(f"{step:,}" for step in steps.first_W)
    time = spec.Axis(f"first {steps.unit} of the window", labels)
    x = np.arange(len(labels), dtype=float)
    if len(moved_LW) <= spec.MOST_LINES:
        chance_W = np.nan_to_num(limit_LW).max(0)
        marks: list[spec.Mark] = [spec.Band(x, 0 * x, chance_W, "may be chance")]
        for i, (label, moved_W) in enumerate(zip(data.layers_axis.labels, moved_LW, strict=True)):
            marks.append(spec.Line(x, moved_W, f"layer {label}", *spec.look(i)))
        panel = spec.Panel(tuple(marks), time, spec.Axis(moved, low=0))
    else:
        beyond_LW = np.maximum(moved_LW - limit_LW, 0)
        high = float(np.nan_to_num(beyond_LW).max()) or 1.0
        scale = spec.Scale("amount", f"{moved}, beyond chance", 0.0, high)
        panel = spec.Panel((spec.Heatmap(beyond_LW, scale),), time, data.layers_axis)
    return spec.Chart(
        "Since which step",
        f"How far the load of B is from that of A in the same {steps.units}, by layer",
        (panel,),
        text="Diverging runs leave the band of chance and stay outside. A window lies between two "
        f"{steps.units} at which both traces were written to disk; the table shows since "
        f"which {steps.unit} each layer differs.",
        table=data.tables["diverged"],
        definitions={
            "may be chance": "up to twice the total variation expected between two windows of this "
            "many tokens with equal routers; more where few experts have most of the load."
        },
    )


OF_BOTH = (f"{name}_{side}" for name in ("dead_experts", "entropy") for side in SIDES)
Loads.kind = ComparisonKind(
    of="counts",
    tables=LOAD_TABLES,
    main="load_shift",
    checks=load_shift.CHECKS,
    title="The load of two traces",
    footer="Counts hold the load of experts, no decisions.",
    charts={
        "load_shift": (shift_chart, "Change of the load", "load_shift"),
        "by_step": (step_chart, "Change of the load", "diverged"),
        "max_vio": (balance_chart, "Load of each trace", "balance"),
    },
    sections={
        "load": ("Load of each trace", "Experts", ""),
        "summary": ("", "About these traces", ""),
    },
    excerpts={
        "load_shift": highest("load_shift"),
        "diverged": highest("most_load_shift"),
        "balance": highest(
            "max_vio_b",
            *("layer", "router", "max_vio_a", "max_vio_b", "max_vio_difference", *OF_BOTH),
        ),
    },
)

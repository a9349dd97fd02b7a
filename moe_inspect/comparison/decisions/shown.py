"""Charts of a comparison: how much differs by layer, at which margins and positions, whether it
grows, whose load it moves.

L routers, C deciles.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_inspect.comparison.decisions.data import Decisions
from moe_inspect.comparison.decisions.texts import text_section
from moe_inspect.comparison.decisions.verdict import findings
from moe_inspect.comparison.result import TABLES, Excerpt, Kind
from moe_inspect.reporting.charts.spec import (
    Axis,
    Chart,
    Heatmap,
    Line,
    Panel,
    Points,
    amount,
    known_interval,
)
from moe_inspect.reporting.render.html import Tile
from moe_inspect.text import layer_label

INTERVALS = " Bars are 95% intervals over documents."
SETS = {
    "set mismatch": (
        "The share of decisions for which the two traces chose different sets of experts."
    ),
    "overlap": "The share of the experts of a decision that both traces chose.",
}
MARGIN = {
    "margin": "How far A's router was from choosing another expert: the k-th largest logit minus "
    "the next.",
}


def _layers(data: Decisions) -> Axis:
    return Axis("layer", tuple(layer_label(data.a.routers, r) for r, _ in data.pairs))


def set_mismatch(data: Decisions) -> Chart | str:
    """The share of decisions with different experts, by layer."""
    table: Any = data.tables["agreement"]
    x = np.arange(len(table), dtype=float)
    low, high = known_interval(table["set_mismatch_low"], table["set_mismatch_high"])
    share = table["set_mismatch"].to_numpy(float)
    marks = [Line(x, share, "B against A", "c1", dots=True, low=low, high=high)]
    if "noise_set_mismatch" in table:
        noise = table["noise_set_mismatch"].to_numpy(float)
        marks.append(Line(x, noise, "a second run of A against A", "baseline", dash="dot"))
    top = float(np.nanmax([mark.y.max(initial=0) for mark in marks]))
    return Chart(
        "Decisions with different experts",
        "Share of each layer's decisions for which A and B chose different sets of experts",
        (
            Panel(
                tuple(marks), _layers(data), Axis("share of decisions", low=0, high=1.1 * top or 1)
            ),
        ),
        text="How often the two traces chose different experts, by layer." + INTERVALS,
        table=table,
        definitions=SETS,
    )


def margin_map(data: Decisions) -> Chart | str:
    """Whether decisions flip where the router was undecided."""
    if not data.mismatched:
        return ""
    return _map(
        data,
        "margins",
        "Where the router was undecided",
        "Share of decisions with different experts, by tenth of A's margins",
        "tenth of the margins, 0 the least decided",
        "Rounding flips only close decisions (leftmost column); a different model flips others "
        "too.",
        MARGIN,
    )


def position_map(data: Decisions) -> Chart | str:
    """Whether decisions flip at the beginning or the end of sequences."""
    if not data.mismatched:
        return ""
    return _map(
        data,
        "positions",
        "Where in the sequence",
        "Share of decisions with different experts, by tenth of the sequence",
        "tenth of the sequence, 0 its beginning",
        "A difference that grows along the sequence comes from its context; one only at its end "
        "comes from tokens that were never fed.",
    )


def _map(
    data: Decisions,
    name: str,
    title: str,
    caption: str,
    axis: str,
    text: str,
    definitions: dict[str, str] | None = None,
) -> Chart | str:
    table: Any = data.tables[name]
    if not len(table):
        return f"{title}: no decisions with a known margin"
    at = {r: i for i, (r, _) in enumerate(data.pairs)}
    values_LC = np.full((len(at), 10), np.nan)
    values_LC[table["router"].map(at), table["decile"]] = table["set_mismatch"]
    top = float(np.nanmax(values_LC)) or 1.0
    scale = amount("share of decisions with different experts", 0.0, values_LC, top)
    columns = Axis(axis, tuple(str(i) for i in range(10)))
    return Chart(
        title,
        caption,
        (Panel((Heatmap(values_LC, scale),), columns, _layers(data)),),
        text=text,
        table=table,
        definitions=definitions or {},
    )


def growth(data: Decisions) -> Chart | str:
    """Whether tokens that have differed differ again."""
    if not data.mismatched or len(data.pairs) < 2:
        return ""
    table: Any = data.tables["depth"]
    x = np.arange(len(table), dtype=float)
    lines = {
        "differ here or in an earlier layer": ("differ_so_far", "c1"),
        "differ here": ("set_mismatch", "c2"),
        "differ here for the first time": ("new", "c3"),
    }
    marks = tuple(
        Line(x, table[column].to_numpy(float), said, colour, dots=True)
        for said, (column, colour) in lines.items()
    )
    top = float(table["differ_so_far"].max())
    return Chart(
        "Does a difference grow?",
        "Share of tokens with different experts, layer by layer",
        (Panel(marks, _layers(data), Axis("share of tokens", low=0, high=1.1 * top or 1)),),
        text="Where most differences are new, each layer adds its own; where few are, early "
        "differences persist.",
        table=table,
    )


def load_shift(data: Decisions) -> Chart | str:
    """How far the load moved, beside what two halves of the documents differ by."""
    if not data.mismatched:
        return ""
    table: Any = data.tables["load_shift"]
    x = np.arange(len(table), dtype=float)
    moved, halves = (table[c].to_numpy(float) for c in ("load_shift", "load_shift_halves"))
    marks = (
        Points(x, moved, "B against A", "c1"),
        Points(x, halves, "two halves of A's documents", "c1", shape="tick"),
    )
    top = float(np.nanmax([moved, halves]))
    return Chart(
        "Load that moves",
        "Total variation of the experts' load between A and B",
        (Panel(marks, _layers(data), Axis("share of the load", low=0, high=1.1 * top or 1)),),
        text="The share of the assignments that go to different experts, over all tokens. Below "
        "the dash, it is less than between two halves of A's documents.",
        table=table,
    )


def _tiles(made: Decisions) -> list[Tile]:
    share = {r: made.of(r).mismatch_UX.sum() / made.decisions_UX(r).sum() for r, _ in made.pairs}
    worst = max(share, key=lambda r: share[r])
    tiles = [
        Tile(
            "decisions with different experts",
            f"{made.mismatched / made.decisions:.2%}",
            f"{made.mismatched:,} of {made.decisions:,}",
        ),
        Tile("tokens that differ", f"{made.tokens_mismatch:.2%}", "at any layer"),
        Tile("worst layer", f"{share[worst]:.2%}", f"layer {layer_label(made.a.routers, worst)}"),
        Tile(
            "tokens compared",
            f"{made.counts.tokens:,}",
            f"of {made.alignment.a.tokens:,} and {made.alignment.b.tokens:,}",
        ),
    ]
    losses: Any = made.tables["loss"]
    if len(losses):
        whole = losses.iloc[0]
        beside = f"nats per token, B {whole['mean_loss_nats_b']:.3f}, A "
        beside += f"{whole['mean_loss_nats_a']:.3f}"
        tiles.append(Tile("loss, B minus A", f"{whole['difference_nats']:+.4f}", beside))
    if made.noise is not None:
        noise = made.noise.mismatched / made.noise.decisions
        tiles.append(Tile("two runs of A", f"{noise:.2%}", "of decisions differ"))
    return tiles


def _worst(frame: Any, most: int) -> Any:
    if len(frame) <= most:
        return frame
    return frame.nlargest(most, "set_mismatch").sort_values(["layer", "router"])


def _first(frame: Any, most: int) -> Any:
    return frame.head(most)


SHARE = "set_mismatch"
Decisions.kind = Kind(
    of="decisions",
    tables=TABLES,
    main="agreement",
    checks=(findings,),
    title="Same routing?",
    footer="A decision is one call of a router for one token; two decisions are the same where "
    "they choose the same set of experts. Drag over a chart to zoom in, click a name to hide its "
    "marks; with the keyboard, Tab to a chart and read it with the arrow keys.",
    charts={
        "set_mismatch": (set_mismatch, "Decisions", "agreement"),
        "margin_map": (margin_map, "Decisions", "margins"),
        "position_map": (position_map, "Decisions", "positions"),
        "growth": (growth, "Decisions", "depth"),
        "load_shift": (load_shift, "Load", "load_shift"),
    },
    tiles=_tiles,
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
        "loss": (
            "Loss",
            "The loss of the same tokens",
            "Nats per token in both traces, over all domains and for each, where the same and "
            "where different experts were chosen; tokens after which the texts diverge are left "
            "out.",
        ),
        "summary": ("", "About these traces", ""),
    },
    excerpts={
        "agreement": Excerpt(
            "the routers that differ most",
            _worst,
            (
                *("layer", "router", SHARE, f"{SHARE}_low", f"{SHARE}_high", "overlap"),
                *("first_choice", "weight_l1", f"noise_{SHARE}"),
            ),
        ),
        "tokens": Excerpt("the first rows", _first, ("routers", "tokens", "share", "share_more")),
        "flips": Excerpt(
            "the most frequent",
            lambda frame, most: frame.nlargest(most, "flips"),
            ("layer", "router", "expert", "other", "flips", "expected", "lift"),
        ),
        "documents": Excerpt(
            "those that differ most",
            _first,
            ("document", "domain", "tokens", "mismatches", SHARE),
        ),
    },
)

"""The page of a comparison: verdict, key figures, charts and tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_inspect.comparison.charts import draw_charts
from moe_inspect.comparison.checkpoints_data import CheckpointData, saturation_chart
from moe_inspect.comparison.data import PairData
from moe_inspect.comparison.texts import text_section
from moe_inspect.comparison.verdict import findings
from moe_inspect.reporting.render.html import Page, Section, Tile, chart_section, page_html
from moe_inspect.reporting.render.python import address, python_call, table_of
from moe_inspect.text import layer_label, plural

# table → its group on the page, title and text
TABLES = {
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
        "Nats per token in both traces, over all domains and for each, where the same and where "
        "different experts were chosen; tokens after which the texts diverge are left out.",
    ),
    "summary": ("", "About these traces", ""),
}
# chart → its group on the page and its table
CHARTS = {
    "set_mismatch": ("Decisions", "agreement"),
    "margin_map": ("Decisions", "margins"),
    "position_map": ("Decisions", "positions"),
    "growth": ("Decisions", "depth"),
    "load_shift": ("Load", "load_shift"),
}


def comparison_page(made: PairData) -> str:
    """The page, as HTML."""
    charts, left_out = draw_charts(made)
    shown = text_section(made)
    left_out += [shown] if isinstance(shown, str) and shown else []
    sections = [shown] if isinstance(shown, Section) else []
    for chart in charts:
        group, name = CHARTS[chart.name]
        section = chart_section(replace(chart, group=group))
        sections.append(replace(section, python=_python(made, name)))
    for name, (group, title, text) in TABLES.items():
        table = made.tables[name]
        if len(table):
            code = _python(made, name)
            sections.append(Section(title, text, table=table, group=group, name=name, python=code))
    return page_html(
        Page(
            "Same routing?",
            " · ".join(
                [
                    f"A {made.a.path}",
                    f"B {made.b.path}",
                    plural(made.counts.tokens, "token"),
                    plural(len(made.pairs), "router"),
                ]
            ),
            verdict=findings(made),
            tiles=_tiles(made),
            sections=sections,
            left_out=left_out,
            footer="A decision is one call of a router for one token; two decisions are the same "
            "where they choose the same set of experts. Drag over a chart to zoom in, click a name "
            "to hide its marks; with the keyboard, Tab to a chart and read it with the arrow keys. "
            "Made by moe-inspect.",
        )
    )


def _python(made: PairData, table: str) -> str:
    options = made.options.given()
    if made.noise is not None:
        options["noise"] = address(made.noise.b)
    return table_of(python_call("compare", [made.a, made.b], options), table)


def _tiles(made: PairData) -> list[Tile]:
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


# table → its group on the page and its title
CHECKPOINT_SECTIONS = {
    "saturation_by_domain": ("Decisions", "By domain"),
    "change": ("Load and specialization", "Balance and specialization"),
    "checkpoints": ("", "The checkpoints"),
}


def checkpoints_page(made: CheckpointData) -> str:
    """The page on several checkpoints, as HTML."""
    return page_html(
        Page(
            "When does the routing settle?",
            f"{plural(len(made.names), 'checkpoint')} · each compared with {made.names[-1]}",
            verdict=made.verdict(),
            sections=[
                replace(
                    chart_section(saturation_chart(made)),
                    group="Decisions",
                    python=_python_of_checkpoints(made, "saturation"),
                ),
                *(
                    Section(
                        title,
                        table=made.tables[name],
                        group=group,
                        name=name,
                        python=_python_of_checkpoints(made, name),
                    )
                    for name, (group, title) in CHECKPOINT_SECTIONS.items()
                ),
            ],
            footer="Overlap is the share of the experts of a decision that the last checkpoint "
            "chooses too. Made by moe-inspect.",
        )
    )


def _python_of_checkpoints(made: CheckpointData, table: str) -> str:
    options = made.comparisons[0].options.given()
    return table_of(python_call("compare_checkpoints", [made.traces], options), table)

"""A simulation as HTML: sections for a page of its own, or one to go into a report's."""

from __future__ import annotations

from moe_inspect.reporting.render.html import Page, Section, chart_section, page_html
from moe_inspect.reporting.render.python import table_of
from moe_inspect.simulate.result import Simulation

HIDDEN = ("moe_layers",)  # a setting that plan files need, too long to read


def sections(simulation: Simulation) -> list[Section]:
    """The picture, then the tables, those first that the text shows."""
    found = []
    if simulation.chart is not None:
        found.append(chart_section(simulation.chart))
    for name in dict.fromkeys([*simulation.shown, *simulation.tables]):
        table = simulation.tables[name]
        code = table_of(simulation.python, name)
        found.append(Section(name, table=table, name=name, python=code))
    return found


def section(simulation: Simulation) -> Section:
    """What it says and its picture, with the table that the text shows first."""
    name = next(iter([*simulation.shown, *simulation.tables]))
    return Section(
        f"Simulated: {simulation.name}",
        " ".join(simulation.verdict),
        simulation.chart,
        table=simulation.tables[name],
        group="Serving",
        python=table_of(simulation.python, name),
    )


def page(simulation: Simulation) -> str:
    """The page as one string of HTML."""
    assumed = "; ".join(
        f"{name.replace('_', ' ')}: {_text(value)}"
        for name, value in simulation.settings.items()
        if name not in HIDDEN and _text(value)
    )
    return page_html(
        Page(
            f"moe-inspect simulate {simulation.name}",
            assumed,
            verdict=simulation.verdict,
            sections=sections(simulation),
        )
    )


def _text(value: object) -> str:
    """Nothing of what was not asked for."""
    if value is None or value is False:
        return ""
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)

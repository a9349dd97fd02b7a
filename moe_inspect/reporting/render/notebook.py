"""A result as a notebook shows it: without scripts, so that it is seen before the notebook is
trusted, and no more than a screen."""

from __future__ import annotations

import base64
from typing import Any

from moe_inspect.reporting.charts.spec import Chart
from moe_inspect.reporting.render.html import template
from moe_inspect.reporting.render.matplotlib import draw, letters, picture
from moe_inspect.reporting.shown import Shown

SENTENCES = 5  # the most important
ROWS, WIDE = 5, 8  # rows and columns of a table


def cell_html(made: Shown) -> str:
    """What the result comes to, its first chart, and the first rows of its first table."""
    name, excerpt = next(iter(made.excerpts.items()))
    whole: Any = made.tables[name]
    rows = excerpt.rows(whole, ROWS)
    rows = rows[[c for c in excerpt.columns or rows.columns if c in rows]]
    caption = excerpt.title(name, rows, whole)
    caption += f" (+ {left} more columns)" if (left := len(rows.columns) - WIDE) > 0 else ""
    sentences = [one if isinstance(one, str) else one.text for one in made.said]
    chart = made.first_chart()
    return template("notebook.html").render(
        made=made,
        verdict=sentences[:SENTENCES],
        more=len(sentences[SENTENCES:]),
        chart=chart if isinstance(chart, Chart) else None,
        picture=_address(chart) if isinstance(chart, Chart) else "",
        table=rows.iloc[:ROWS, :WIDE],
        caption=caption,
    )


def _address(chart: Chart) -> str:
    """A picture of the chart, as an address that holds it."""
    with letters():
        png = picture(draw(chart), "png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(png).decode()

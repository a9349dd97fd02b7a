"""The page that shows a trace while it is written, and the data that it draws.

L routers, E experts of the widest, H shards of the history.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Template
from markupsafe import Markup

from moe_inspect.reporting.charts.spec import (
    Axis,
    Band,
    Heatmap,
    Line,
    Panel,
    Points,
    Rule,
    cell_numbers,
    load_scale,
)
from moe_inspect.reporting.render.html import asset, palette_css, script_hash
from moe_inspect.reporting.render.payload import panel_json, without_numpy
from moe_inspect.text import readable
from moe_inspect.watch.follow import RECORDING
from moe_inspect.watch.run import Session
from moe_inspect.watch.screen import worst_routers
from moe_inspect.watch.state import Watched, of_routers

SCRIPTS = ("chart.js", "page.js")


def snapshot(session: Session) -> str:
    """What the page shows now, as JSON."""
    watched = session.watched
    rates = watched.rates() if watched.status == RECORDING else None
    shown: dict[str, Any] = {
        "path": readable(session.path),
        "status": watched.status,
        "writer": readable(session.follower.writer),
        "trouble": readable(watched.trouble),
        "tokens": watched.tokens,
        "decisions": watched.decisions,
        "left_tokens": watched.left_tokens,
        "rates": None if rates is None else [round(rate, 1) for rate in rates],
        "changed_s": round(watched.changed_s, 1),
        "window_tokens": watched.window.tokens if watched.window is not None else 0,
        "alarms": [readable(alarm.text) + " " + alarm.help for alarm in watched.alarms],
        "panels": None,
    }
    if watched.window is not None:
        shown |= _key_figures(watched)
        shown["panels"] = [panel_json(panel) for panel in panels(watched)]
        shown["text"] = _text(session)
    return json.dumps(shown, default=without_numpy, allow_nan=False)


def _key_figures(watched: Watched) -> dict[str, Any]:
    assert watched.window is not None
    worst = worst_routers(watched)[0]
    dead_L = of_routers("dead_experts", watched.window.load_LE, watched.routers)
    value = float(watched.history[-1][worst])
    return {
        "worst": {
            "layer": watched.labels[worst],
            "max_over_mean": None if np.isnan(value) else round(1 + value, 2),
            "chance": round(1 + watched.chance(worst), 2),
        },
        "dead": int(np.nansum(dead_L)),
        "experts": sum(router.experts for router in watched.routers),
    }


def _text(session: Session) -> dict[str, Any] | None:
    text = session.text
    if text is None:
        return None
    layer = session.watched.labels[text.router]
    return {"layer": layer, "expert": text.expert, "words": [list(word) for word in text.words]}


def panels(watched: Watched) -> list[Panel]:
    """The map of the last window, the balance of each layer in it and of all tokens, and how the
    balance has moved."""
    return [_map(watched), _balance(watched), _over_time(watched)]


def _layer_axis(watched: Watched) -> Axis:
    return Axis("layer", tuple(watched.labels))


def _map(watched: Watched) -> Panel:
    ratio_LE = watched.ratios()
    scale = load_scale(watched.routers, "load ÷ mean load")
    heatmap = Heatmap(ratio_LE, scale, cell_numbers(ratio_LE))
    return Panel((heatmap,), Axis("expert"), _layer_axis(watched))


def _balance(watched: Watched) -> Panel:
    L = len(watched.routers)
    x, now = np.arange(L, dtype=float), 1 + watched.history[-1]
    chance = 1 + np.array([watched.chance(r) for r in range(L)])
    edge = np.r_[-0.5, x, L - 0.5]
    alarmed = np.isin(np.arange(L), [alarm.router for alarm in watched.alarms])
    in_all = 1 + of_routers("max_vio", watched.total_LE, watched.routers)
    marks = (
        Band(
            edge,
            edge * 0 + 1,
            np.nan_to_num(np.r_[chance[0], chance, chance[-1]], nan=1.0),
            "explained by chance",
        ),
        Rule(1),
        Points(x, in_all, "all tokens", "c2", "tick"),
        Points(x, np.where(alarmed, np.nan, now), "last window", "c1"),
        Points(x, np.where(alarmed, now, np.nan), "last window, with an alarm", "bad"),
    )
    return Panel(marks, _layer_axis(watched), Axis("max ÷ mean load", low=1))


def _over_time(watched: Watched) -> Panel:
    history_HL = 1 + np.array(watched.history)
    known_H = ~np.isnan(history_HL).all(1)
    worst_H, middle_H = np.full((2, len(history_HL)), np.nan)
    worst_H[known_H] = np.nanmax(history_HL[known_H], axis=1)
    middle_H[known_H] = np.nanmedian(history_HL[known_H], axis=1)
    x = np.arange(len(history_HL), dtype=float)
    back = tuple(str(int(n)) for n in x - len(x) + 1)
    marks = (
        Rule(1),
        Line(x, worst_H, "least balanced layer", "c1"),
        Line(x, middle_H, "median of the layers", "c2", "dash"),
    )
    return Panel(marks, Axis("shards before the last", back), Axis("max ÷ mean load", low=1))


@cache
def page() -> tuple[str, str]:
    """The page, without what it shows, and its Content-Security-Policy."""
    script = "".join(asset(name) for name in SCRIPTS) + _own("live.js")
    policy = (
        f"default-src 'none'; script-src 'sha256-{script_hash(script)}'; connect-src 'self'; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    made = Template(_own("live.html"), autoescape=True).render(
        palette=Markup(palette_css()),
        style=Markup(asset("page.css") + _own("live.css")),
        script=Markup(script),
    )
    return made, policy


def _own(name: str) -> str:
    return (files("moe_inspect.watch") / "templates" / name).read_text(encoding="utf-8")

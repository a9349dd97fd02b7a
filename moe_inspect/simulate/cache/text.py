"""The verdict and the chart of `simulate cache`."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_inspect.reporting.charts.parts import DASHES
from moe_inspect.reporting.charts.spec import SERIES, Axis, Chart, Line, Mark, Panel, Points
from moe_inspect.simulate.result import SIMULATED
from moe_inspect.text import plural

# a hot set is worth caching where it serves this many times the accesses that even load would
HOT = 1.2


def verdict(tables: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    main, speed = tables["cache"].dropna(subset=["hit_rate"]), tables["cache_speed"]
    if main.empty:
        return ["Simulated: no router made an assignment, so nothing could be cached."]
    size = settings["slots"][len(settings["slots"]) // 2]
    at = main[main["slots"] == size]
    once = at.drop_duplicates("router")
    sentences = [hot_set(once, size)]
    for name in settings["policies"]:
        rate = at[at["policy"] == name]["hit_rate"]
        bound = " (the upper bound: it knows the future)" if name == "belady" else ""
        sentences.append(
            f"Simulated, {plural(size, 'slot')} per layer, {name}{bound}: hit rate "
            f"{_percents(rate.min(), rate.max())} by layer."
        )
    if "tokens_per_s" in speed:
        real = speed[(speed["slots"] == size) & (speed["policy"] != "belady")]
        best = (
            (real if len(real) else speed[speed["slots"] == size])
            .nlargest(1, "tokens_per_s")
            .iloc[0]
        )
        sentences.append(
            f"Simulated: {settings['expert_mb']:g} MB per expert over {settings['gb_per_s']:g} "
            f"GB/s allow at most {best['tokens_per_s']:,.1f} tokens/s "
            f"({best['policy']}{'' if len(real) else ', which no real cache reaches'}, "
            f"{best['slots']:.0f} slots per layer, {best['held_gb']:.2f} GB held), if only "
            "transfers took time."
        )
    cold = once["cold_misses"].sum() / once["accesses"].sum()
    sentences.append(
        f"Cold start: caches begin empty; first touches are {cold:.2%} of accesses and count as "
        "misses (hit_rate_warm leaves them out)."
    )
    return sentences


def hot_set(once: Any, size: int) -> str:
    """Whether the busiest experts of each layer get enough accesses to be worth caching. once: one
    row per router."""
    if (HOT * once["even_share"] >= 1).all():
        return (
            f"A hot set worth caching? {size} slots hold nearly all experts: simulate fewer slots."
        )
    hot = int((once["hot_set_share"] >= HOT * once["even_share"]).sum())
    return (
        f"A hot set worth caching? {'Yes' if hot == len(once) else 'In part' if hot else 'No'}: "
        f"in {hot} of {len(once)} layers the {size} busiest "
        f"experts get at least {HOT:g}x what even load would give them "
        f"({_percents(once['hot_set_share'].min(), once['hot_set_share'].max())} of "
        f"accesses; even: {_percents(once['even_share'].min(), once['even_share'].max())})."
    )


def _percents(low: float, high: float) -> str:
    return f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"


def chart(tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]) -> Chart:
    """Hit rate by number of slots, over the layers; and by layer, at one number of slots."""
    main, sizes = tables["cache"], list(settings["slots"])
    size = sizes[len(sizes) // 2]
    by_size, by_layer = list[Mark](), list[Mark]()
    for i, name in enumerate(settings["policies"]):
        rows = main[main["policy"] == name]
        rate = rows.groupby("slots")["hit_rate"]
        mean, low, high = (
            of.reindex(sizes).to_numpy() for of in (rate.mean(), rate.min(), rate.max())
        )
        # beside each other, or the intervals would hide each other
        x = np.arange(len(sizes)) + 0.08 * (i - (len(settings["policies"]) - 1) / 2)
        by_size.append(Line(x, mean, name, SERIES[i], DASHES[i % 3], True, low, high))
        at = rows[rows["slots"] == size]["hit_rate"].to_numpy()
        by_layer.append(
            Line(np.arange(len(at), dtype=float), at, name, SERIES[i], DASHES[i % 3], True)
        )
    even = main.groupby("slots")["even_share"].mean().reindex(sizes).to_numpy()
    by_size.append(
        Line(np.arange(len(sizes), dtype=float), even, "slots ÷ experts", "baseline", "dot")
    )
    at = main[(main["policy"] == settings["policies"][0]) & (main["slots"] == size)]
    hot = Points(
        np.arange(len(at), dtype=float),
        at["hot_set_share"].to_numpy(),
        f"share of the {size} busiest experts",
        "c6",
        "tick",
    )
    rate = Axis("hit rate", low=0, high=1)
    layers = Axis("layer", tuple(label_of[r] for r in at["router"]))
    return Chart(
        "Cache of experts",
        "Share of the accesses to experts that a cache serves, by policy",
        (
            Panel(
                tuple(by_size),
                Axis("slots per layer", tuple(map(str, sizes))),
                rate,
                "By number of slots",
            ),
            Panel((*by_layer, hot), layers, rate, f"By layer, {size} slots"),
        ),
        text=SIMULATED
        + "By number of slots: the mean over layers, the bars from the lowest layer to the "
        "highest.",
        columns=2,
        name="cache",
    )

"""The verdict and the chart of `simulate capacity`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_inspect.reporting.charts.parts import DASHES, look
from moe_inspect.reporting.charts.spec import SERIES, Axis, Chart, Line, Panel
from moe_inspect.simulate.capacity.queues import POSITIONS
from moe_inspect.simulate.result import SIMULATED


def _middle(factors: Sequence[float]) -> float:
    return factors[len(factors) // 2]


def _group(group: int | str) -> str:
    return {"batch": "a forward pass", "sequence": "a sequence"}.get(str(group), f"{group} tokens")


def verdict(
    tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]
) -> list[str]:
    """Plain sentences, most important first."""
    factor = _middle(settings["capacity_factors"])
    main, across, needed = (
        tables[name] for name in ("capacity", "capacity_tokens", "capacity_needed")
    )
    at = main[main["capacity_factor"] == factor].dropna(subset=["simulated_drop_rate"])
    if at.empty:
        return ["Simulated: no router made an assignment, so nothing could be dropped."]
    worst = at.loc[at["simulated_drop_rate"].idxmax()]
    everywhere = across[across["capacity_factor"] == factor].iloc[0]
    sentences = [
        f"Simulated: at capacity factor {factor:g}, in groups of "
        f"{_group(settings['group_tokens'])}, layer {label_of[worst['router']]} would drop most: "
        f"{worst['simulated_drop_rate']:.1%} of its assignments; {worst['tokens_hit']:.1%} of its "
        f"tokens would lose an expert and {worst['tokens_lost']:.1%} all of them.",
        f"Simulated, over all layers: {everywhere['hit_anywhere']:.1%} of tokens would lose an "
        "expert in at least one layer, and "
        f"{everywhere['lost_anywhere']:.1%} all experts of a layer.",
    ]
    most = needed.loc[needed["capacity_factor"].idxmax()]
    sentences.append(
        f"Simulated: dropping at most {100 * settings['target_drop']:.3g}% of every layer's "
        f"assignments takes a factor of {most['capacity_factor']:.2f} (layer "
        f"{label_of[most['router']]}), which leaves {most['unused_capacity']:.0%} of that layer's "
        "capacity unused."
    )
    ends = tables["capacity_by_position"].query(
        "capacity_factor == @factor and router == @worst.router"
    )
    for position in POSITIONS[:1] if settings["group_tokens"] == "sequence" else POSITIONS:
        rate = ends[ends["position_in"] == position].set_index("tenth")["simulated_drop_rate"]
        sentences.append(
            f"Simulated, layer {label_of[worst['router']]}, drop rate by position in the "
            f"{position}: first tenth {rate[1]:.1%}, last tenth {rate[10]:.1%}."
        )
    return sentences


def chart(tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]) -> Chart:
    """What each layer drops; and where in its document and group the worst layer's drops fall."""
    factors, main = settings["capacity_factors"], tables["capacity"]
    routers = list(main["router"].unique())
    rate_of = main.pivot(index="capacity_factor", columns="router", values="simulated_drop_rate")[
        routers
    ]
    x = np.arange(len(routers), dtype=float)
    by_layer = [
        Line(x, rate_of.loc[f].to_numpy(float), f"capacity factor {f:g}", *look(i), dots=True)
        for i, f in enumerate(factors)
    ]
    factor = _middle(factors)
    worst = rate_of.loc[factor].fillna(-1).idxmax()
    ends = tables["capacity_by_position"]
    ends = ends[(ends["capacity_factor"] == factor) & (ends["router"] == worst)]
    by_position = list[Line]()
    for position, colour, dash in zip(POSITIONS, SERIES, DASHES, strict=False):
        at = ends[ends["position_in"] == position]
        x, y = at["tenth"].to_numpy(float) - 1, at["simulated_drop_rate"].to_numpy(float)
        by_position.append(Line(x, y, f"tenth of the {position}", colour, dash, True))
    layers = Axis("layer", tuple(label_of[r] for r in routers))
    tenths = Axis("tenth (10 is the end)", tuple(str(i) for i in range(1, 11)))
    rate = Axis("share of assignments dropped", low=0)
    where = f"Layer {label_of[worst]} at factor {factor:g}, by position"
    group = _group(settings["group_tokens"])
    return Chart(
        "Capacity of experts",
        f"Share of the assignments that are dropped, in groups of {group}",
        (
            Panel(tuple(by_layer), layers, rate, "By layer"),
            Panel(tuple(by_position), tenths, rate, where),
        ),
        text=SIMULATED + "An expert takes at most its even share of a group × the capacity factor.",
        columns=2,
        name="capacity",
    )

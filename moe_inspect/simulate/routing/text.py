"""The verdict and the chart of `simulate routing`."""

from __future__ import annotations

from typing import Any

from moe_inspect.reporting.charts.parts import cell_numbers
from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Panel, amount
from moe_inspect.simulate.result import SIMULATED
from moe_inspect.simulate.routing.algorithms import ALGORITHMS

SAME_COMPUTE = 0.005  # relative difference in experts per token that counts as none


def added_compute(times: float) -> str:
    """The compute relative to the model's own routing, in words; "" where it is the same."""
    same = abs(times - 1) <= SAME_COMPUTE
    return "" if same else f"; computes {times:.3g}x as many experts per token"


def verdict(
    tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]
) -> list[str]:
    routing, advice = tables["routing"], tables["routing_algorithms"]
    sentences, uneven = [], settings["uneven"]
    recorded = routing[routing["algorithm"] == "as recorded"]
    if len(recorded):
        worst = recorded.loc[recorded["max_vio"].idxmax()]
        layer = label_of[int(worst["router"])]
        sentences.append(
            f"As recorded, layer {layer} is the least balanced: its busiest expert gets "
            f"{1 + worst['max_vio']:.2f}x the mean load over all tokens."
        )
        bias = routing[
            (routing["router"] == worst["router"]) & (routing["algorithm"] == "loss-free bias")
        ]
        if len(bias):
            row = bias.iloc[0]
            helps = row["max_vio"] < worst["max_vio"]
            sentences.append(
                f"Simulated: a loss-free bias would {'bring' if helps else 'not even out'} layer "
                f"{layer}{' to' if helps else ':'} {1 + row['max_vio']:.2f}x the mean load "
                f"({1 + row['max_vio_batch']:.2f}x per batch), keeping "
                f"{row['mass_retained']:.0%} of the probability mass of the router's own "
                f"top choices and {row['agreement']:.0%} of the model's choices"
                + (
                    ", on the half of the documents held out from fitting the bias."
                    if settings["bias_held_out"]
                    else "."
                )
            )
    same = (advice["experts_per_token"] / settings["experts_per_token"] - 1).abs() <= SAME_COMPUTE
    usable = advice[
        same & (advice["leaks_future"] == "no") & ~advice["algorithm"].isin(["hash", "random"])
    ]
    even = usable[usable["max_vio_worst"] < uneven]
    if len(even):
        best = even.loc[even["mass_retained_least"].idxmax()]
        sentences.append(
            "Simulated: of the causal algorithms with the same compute that balance every layer "
            f"(no expert gets {1 + uneven:g}x the mean load), {best['algorithm']} keeps the most "
            f"probability mass: at least {best['mass_retained_least']:.0%}."
        )
    else:
        sentences.append(
            "Simulated: no causal algorithm with the same compute balances every layer "
            f"(no expert gets {1 + uneven:g}x the mean load)."
        )
    leaking = [
        f"{label} ({ALGORITHMS[label].leaks})"
        for label in advice[advice["leaks_future"] == "yes"]["algorithm"]
    ]
    if leaking:
        sentences.append(
            f"Not causal: {', '.join(leaking)}. A token's experts depend on later tokens, which "
            "are unknown during generation."
        )
    if any("not stated" in scoring for scoring in settings["scoring"]):
        sentences.append(
            "The trace does not state the scoring of some routers: softmax is assumed."
        )
    sentences.append(
        "The effect on the model's quality is not simulated: its experts were trained with its own "
        "routing."
    )
    return sentences


def chart(tables: dict[str, Any], label_of: dict[int, str]) -> Chart:
    """Each algorithm at each layer: imbalance, and the probability mass that is kept."""
    routing = tables["routing"]
    algorithms = list(routing["algorithm"].unique())
    leaks = set(routing[routing["leaks_future"]]["algorithm"])
    names = tuple(f"{name} (not causal)" if name in leaks else name for name in algorithms)
    routers = list(routing["router"].unique())
    layers = Axis("layer", tuple(label_of[r] for r in routers))
    panels = list[Panel]()
    routing = routing.assign(max_over_mean=1 + routing["max_vio"])
    for column, title, even, least in (
        ("max_over_mean", "Load of the busiest expert ÷ mean load", 1, 1.5),
        ("mass_retained", "Probability mass ÷ that of the router's own top-k", 0, 1.0),
    ):
        wide = routing.pivot(index="algorithm", columns="router", values=column)
        value_AL = wide.reindex(index=algorithms, columns=routers).to_numpy(float)
        scale = amount(column, even, value_AL, least)
        heatmap = Heatmap(value_AL, scale, cell_numbers(value_AL))
        panels.append(Panel((heatmap,), layers, Axis("algorithm", names), title))
    return Chart(
        "Routing algorithms",
        "How even the load is under each algorithm, and how much of the router's choice it keeps",
        tuple(panels),
        text=SIMULATED
        + "1 is even load. An algorithm that is not causal lets later tokens decide, "
        "which are unknown during generation.",
        name="routing",
    )

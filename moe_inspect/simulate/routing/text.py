"""The verdict and the chart of `simulate routing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_inspect.simulate.routing.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
            f"As recorded, layer {layer} is the least balanced: max_vio {worst['max_vio']:.2f} "
            "over all tokens."
        )
        bias = routing[
            (routing["router"] == worst["router"]) & (routing["algorithm"] == "loss-free bias")
        ]
        if len(bias):
            row = bias.iloc[0]
            helps = row["max_vio"] < worst["max_vio"]
            sentences.append(
                f"Simulated: a loss-free bias would {'bring' if helps else 'not even out'} layer "
                f"{layer}{' to' if helps else ':'} max_vio "
                f"{row['max_vio']:.2f} ({row['max_vio_batch']:.2f} per batch), keeping "
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
            f"(max_vio below {uneven:g}), {best['algorithm']} keeps the most probability mass: at "
            f"least {best['mass_retained_least']:.0%}."
        )
    else:
        sentences.append(
            "Simulated: no causal algorithm with the same compute balances every layer "
            f"(max_vio below {uneven:g})."
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


def figure(tables: dict[str, Any], uneven: float, label_of: dict[int, str]) -> Figure:
    """Each algorithm, at the layer that is least balanced as it is: imbalance, and the probability
    mass that is kept."""
    from matplotlib.figure import Figure

    routing = tables["routing"]
    recorded = routing[routing["algorithm"] == "as recorded"]
    base = recorded if len(recorded) else routing
    worst = base.loc[base["max_vio"].idxmax()]
    at = routing[routing["router"] == worst["router"]].iloc[::-1]
    colours = ["#c0392b" if leaks else "#2c3e50" for leaks in at["leaks_future"]]
    figure = Figure(figsize=(9.5, 1.3 + 0.3 * len(at)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, form in ((left, "max_vio", "{:.2f}"), (right, "mass_retained", "{:.0%}")):
        bars = axes.barh(at["algorithm"], at[column], color=colours, height=0.65)
        axes.bar_label(bars, [form.format(value) for value in at[column]], padding=3, fontsize=8)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    left.axvline(uneven, color="0.4", lw=0.8, ls="--")
    left.set_title(
        f"Simulated, layer {label_of[int(worst['router'])]}: max_vio (dashed: {uneven:g}, "
        "balanced)",
        loc="left",
        fontsize=10,
    )
    right.set_title("probability mass ÷ that of the router's own top-k", loc="left", fontsize=10)
    if at["leaks_future"].any():
        figure.supxlabel("red: not causal, depends on later tokens", fontsize=8, color="#c0392b")
    return figure

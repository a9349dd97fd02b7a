"""The verdict and the picture of `simulate routing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_inspect.simulate.routing.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME_COMPUTE = 0.005  # relative difference in experts per token that counts as none


def added_compute(times: float) -> str:
    """How many times the model's experts are computed; "" for as many."""
    same = abs(times - 1) <= SAME_COMPUTE
    return "" if same else f"; computes {times:.3g}x as many experts per token"


def verdict(
    tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]
) -> list[str]:
    routing, advice = tables["routing"], tables["routing_algorithms"]
    said, uneven = [], settings["uneven"]
    recorded = routing[routing["algorithm"] == "as recorded"]
    if len(recorded):
        worst = recorded.loc[recorded["max_vio"].idxmax()]
        layer = label_of[int(worst["router"])]
        said.append(
            f"As recorded, layer {layer} is the least balanced: max_vio {worst['max_vio']:.2f} "
            "over all tokens."
        )
        bias = routing[
            (routing["router"] == worst["router"]) & (routing["algorithm"] == "loss-free bias")
        ]
        if len(bias):
            row = bias.iloc[0]
            helps = row["max_vio"] < worst["max_vio"]
            said.append(
                f"Simulated: a loss-free bias would {'bring' if helps else 'not even out'} layer "
                f"{layer}{' to' if helps else ':'} max_vio "
                f"{row['max_vio']:.2f} ({row['max_vio_batch']:.2f} by batch), keeping "
                f"{row['mass_retained']:.0%} of the probability mass of the router's own "
                f"top choices and {row['agreement']:.0%} of the model's choices"
                + (
                    ", on the half of the documents that the bias had not seen."
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
        said.append(
            "Simulated: of those that compute as much and need not see the future, "
            f"{best['algorithm']} keeps most among the ones that balance "
            f"every layer (max_vio below {uneven:g}): at least {best['mass_retained_least']:.0%} "
            "of the mass."
        )
    else:
        said.append(
            "Simulated: none that computes as much and need not see the future balances every "
            f"layer (max_vio below {uneven:g})."
        )
    leaking = [
        f"{label} ({ALGORITHMS[label].leaks})"
        for label in advice[advice["leaks_future"] == "yes"]["algorithm"]
    ]
    if leaking:
        said.append(
            f"Leak the future: {', '.join(leaking)}: a token's experts depend on later tokens, "
            "which a model that generates does not have."
        )
    if any("not stated" in scoring for scoring in settings["scoring"]):
        said.append("The trace does not say how some routers score: softmax was taken.")
    said.append(
        "What another routing does to quality is not simulated: these experts were trained with "
        "their own."
    )
    return said


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
    right.set_title("probability mass, ÷ the router's own top-k", loc="left", fontsize=10)
    if at["leaks_future"].any():
        figure.supxlabel(
            "red: sees the whole batch, so leaks the future", fontsize=8, color="#c0392b"
        )
    return figure

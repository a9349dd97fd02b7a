"""The verdict and the chart of `simulate capacity`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_inspect.simulate.capacity.queues import POSITIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    at = main[main["capacity_factor"] == factor].dropna(subset=["drop_rate"])
    if at.empty:
        return ["Simulated: no router made an assignment, so nothing could be dropped."]
    worst = at.loc[at["drop_rate"].idxmax()]
    everywhere = across[across["capacity_factor"] == factor].iloc[0]
    sentences = [
        f"Simulated: at capacity factor {factor:g}, in groups of "
        f"{_group(settings['group_tokens'])}, layer {label_of[worst['router']]} would drop most: "
        f"{worst['drop_rate']:.1%} of its assignments; {worst['tokens_hit']:.1%} of its tokens "
        f"would lose an expert and {worst['tokens_lost']:.1%} all of them.",
        f"Simulated, over all layers: {everywhere['hit_anywhere']:.1%} of tokens would lose an "
        "expert in at least one layer, and "
        f"{everywhere['lost_anywhere']:.1%} all experts of a layer.",
    ]
    most = needed.loc[needed["capacity_factor"].idxmax()]
    sentences.append(
        f"Simulated: to drop at most {100 * settings['target_drop']:.3g}% of every layer's "
        f"assignments takes a factor of {most['capacity_factor']:.2f} "
        f"(layer {label_of[most['router']]}), which leaves {most['unused_capacity']:.0%} of that "
        "layer's capacity unused."
    )
    ends = tables["capacity_by_position"].query(
        "capacity_factor == @factor and router == @worst.router"
    )
    for position in POSITIONS[:1] if settings["group_tokens"] == "sequence" else POSITIONS:
        rate = ends[ends["position_in"] == position].set_index("tenth")["drop_rate"]
        sentences.append(
            f"Simulated, layer {label_of[worst['router']]}, drop rate by position in the "
            f"{position}: first tenth {rate[1]:.1%}, last tenth {rate[10]:.1%}."
        )
    return sentences


def figure(tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]) -> Figure:
    """Left: what each layer drops. Right: where in its document and group the worst layer's drops
    fall."""
    from matplotlib.figure import Figure

    factors = settings["capacity_factors"]
    main, ends = tables["capacity"], tables["capacity_by_position"]
    made = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = made.subplots(1, 2, width_ratios=[1.3, 1])
    shades = [0.35 + 0.6 * i / max(1, len(factors) - 1) for i in range(len(factors))]
    for factor, shade in zip(factors, shades[::-1], strict=True):
        at = main[main["capacity_factor"] == factor]
        colour = (0.75, 0.22 * (1 - shade) + 0.1, 0.17, shade)
        left.plot(
            range(len(at)),
            at["drop_rate"],
            "o-",
            ms=4,
            lw=1.2,
            color=colour,
            label=f"capacity factor {factor:g}",
        )
    routers = main["router"].unique()
    step = max(1, len(routers) // 24)
    left.set_xticks(
        range(0, len(routers), step), [label_of[r] for r in routers[::step]], fontsize=8
    )
    left.set(xlabel="layer", ylabel="share of assignments dropped")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, frameon=False)
    left.set_title(
        f"Simulated drops in groups of {_group(settings['group_tokens'])}", loc="left", fontsize=10
    )
    factor = _middle(factors)
    mid = main[main["capacity_factor"] == factor]
    worst = mid.loc[mid["drop_rate"].fillna(-1).idxmax()]
    for position, marker, colour in zip(
        POSITIONS, ("o-", "s--"), ("#2c3e50", "#2980b9"), strict=True
    ):
        at = ends[
            (ends["capacity_factor"] == factor)
            & (ends["router"] == worst["router"])
            & (ends["position_in"] == position)
        ]
        right.plot(
            at["tenth"],
            at["drop_rate"],
            marker,
            ms=4,
            lw=1.2,
            color=colour,
            label=f"tenth of the {position}",
        )
    right.set(xlabel="tenth (10 is the end)", xticks=range(1, 11))
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    right.set_title(
        f"Layer {label_of[worst['router']]} at factor {factor:g}: drop rate by position",
        loc="left",
        fontsize=10,
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return made

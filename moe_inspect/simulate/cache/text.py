"""The verdict and the chart of `simulate cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        bound = " (the bound: it sees the future)" if name == "belady" else ""
        sentences.append(
            f"Simulated, {size} slots per layer, {name}{bound}: hit rate "
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
            f"{best['slots']:.0f} slots per layer, {best['held_gb']:.2f} GB held), if transfers "
            "were all that took time."
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


def figure(tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]) -> Figure:
    """Left: hit rate by number of slots, over the layers. Right: by layer, at one number of
    slots."""
    from matplotlib.figure import Figure

    main = tables["cache"]
    colours = {"lru": "#2980b9", "lfu": "#27ae60", "belady": "#2c3e50"}
    size = settings["slots"][len(settings["slots"]) // 2]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in settings["policies"]:
        by_size = main[main["policy"] == name].groupby("slots")["hit_rate"]
        left.plot(by_size.mean(), "o-", ms=4, lw=1.2, color=colours[name], label=name)
        left.fill_between(
            by_size.mean().index,
            by_size.min(),
            by_size.max(),
            color=colours[name],
            alpha=0.12,
            lw=0,
        )
        rate = main[(main["policy"] == name) & (main["slots"] == size)]["hit_rate"]
        right.plot(range(len(rate)), rate, "o-", ms=4, lw=1.2, color=colours[name], label=name)
    at = main[(main["policy"] == settings["policies"][0]) & (main["slots"] == size)]
    left.plot(
        main.groupby("slots")["even_share"].mean(),
        ":",
        color="0.4",
        label="chance (slots ÷ experts)",
    )
    right.plot(
        range(len(at)),
        at["hot_set_share"],
        "_",
        ms=12,
        mew=1.5,
        color="#c0392b",
        label=f"share of the {size} busiest experts",
    )
    step = max(1, len(at) // 24)
    right.set_xticks(
        range(0, len(at), step), [label_of[r] for r in at["router"].iloc[::step]], fontsize=8
    )
    left.set(xlabel="slots per layer", ylabel="hit rate", xticks=settings["slots"], ylim=(0, 1.02))
    right.set(xlabel="layer", ylim=(0, 1.02))
    left.set_title(
        "Simulated hit rate: mean over layers, band from least to most", loc="left", fontsize=10
    )
    right.set_title(f"By layer, {size} slots", loc="left", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure

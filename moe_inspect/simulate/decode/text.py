"""The verdict and the chart of `simulate decode`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_inspect.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SATURATED = 0.95  # this share of the experts counts as almost all of them


def verdict(tables: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    table, needed = tables["decode"], tables["batch_needed"]
    of = (
        "generated tokens"
        if settings["decoded"]
        else "prompt tokens instead of generated ones (trace with --generate for those)"
    )
    sentences = []
    for batch, mine in table.dropna(subset=["distinct_experts"]).groupby("batch"):
        distinct, chance = mine["distinct_experts"].mean(), mine["independent"].mean()
        sentences.append(
            f"{batch:,} {'sequence reads' if batch == 1 else 'sequences together read'} "
            f"{distinct:.1f} experts per layer and step "
            f"({mine['share_of_experts'].mean():.0%} of them; expected by chance: {chance:.1f})"
            + (
                f", {mine['bytes_per_token'].sum() / 1e6:,.3g} MB of expert weights per token."
                if mine["bytes_per_token"].notna().all()
                else "."
            )
        )
    short = sorted(set(table.loc[table["steps"] == 0, "batch"]))
    if short:
        sentences.append(
            f"No step of {', '.join(map(str, short))}: the trace holds too few sequences at any "
            "position."
        )
    if needed["reads_all_from"].notna().any():
        sentences.append(
            f"From {plural(int(needed['reads_all_from'].max()), 'sequence')} on a step reads "
            f"{SATURATED:.0%} of the experts that are used at all, in every layer: "
            "below that a larger batch reads more experts, above it only shares them."
        )
    if needed["compute_bound_from"].notna().any():
        sentences.append(
            f"Beyond about {plural(round(needed['compute_bound_from'].median()), 'sequence')} a "
            "larger batch stops helping: the step is then compute-bound, not memory-bound "
            f"({settings['weight_bits']}-bit weights, {settings['flops_per_byte']:g} "
            "FLOPs per byte)."
        )
    return [*sentences, f"Simulated: steps of the same position of different sequences, from {of}."]


def figure(tables: dict[str, Any]) -> Figure:
    """Distinct experts by batch size: each layer, and the two baselines."""
    from matplotlib.figure import Figure

    table = tables["decode"].dropna(subset=["distinct_experts"])
    made = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = made.subplots()
    for number, (_, mine) in enumerate(table.groupby("router")):
        axes.plot(
            mine["batch"],
            mine["distinct_experts"],
            color="0.6",
            lw=1,
            label="each layer" if number == 0 else None,
        )
    mean = table.groupby("batch")[["distinct_experts", "independent", "from_marginals"]].mean()
    axes.plot(
        mean.index, mean["distinct_experts"], "o-", color="#c0392b", lw=2, label="mean over layers"
    )
    axes.plot(mean.index, mean["independent"], "--", color="#2c3e50", label="chance")
    axes.plot(
        mean.index,
        mean["from_marginals"],
        ":",
        color="#2980b9",
        lw=2,
        label="independent, experts as popular as they are",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(mean.index), [f"{batch:g}" for batch in mean.index])
    axes.set(xlabel="sequences decoded together", ylabel="distinct experts per step")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return made

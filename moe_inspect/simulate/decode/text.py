"""The verdict and the chart of `simulate decode`."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_inspect.reporting.charts.spec import Axis, Chart, Line, Panel
from moe_inspect.simulate.result import SIMULATED
from moe_inspect.text import plural

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
            f"No step of {', '.join(map(str, short))} sequences: the trace has too few at any "
            "position."
        )
    if needed["reads_all_from"].notna().any():
        sentences.append(
            f"From {plural(int(needed['reads_all_from'].max()), 'sequence')} on, a step reads "
            f"{SATURATED:.0%} of the experts in use in every layer: a larger batch then reads "
            "hardly more experts."
        )
    if needed["compute_bound_from"].notna().any():
        sentences.append(
            f"Beyond about {plural(round(needed['compute_bound_from'].median()), 'sequence')} a "
            "larger batch stops helping: the step is then compute-bound, not memory-bound "
            f"({settings['weight_bits']}-bit weights, {settings['flops_per_byte']:g} "
            "FLOPs per byte)."
        )
    return [*sentences, f"Simulated: steps of the same position of different sequences, from {of}."]


def chart(tables: dict[str, Any]) -> Chart | None:
    """Distinct experts by batch size, over the layers, and the two baselines."""
    table = tables["decode"].dropna(subset=["distinct_experts"])
    if table.empty:
        return None
    by_batch = table.groupby("batch")
    mean = by_batch[["distinct_experts", "independent", "from_marginals"]].mean()
    low, high = (
        of.to_numpy()
        for of in (by_batch["distinct_experts"].min(), by_batch["distinct_experts"].max())
    )
    x = np.arange(len(mean), dtype=float)
    experts, chance, popular = (mean[name].to_numpy() for name in mean)
    marks = (
        Line(x, chance, "chance", "baseline", "dot"),
        Line(x, popular, "independent tokens, same expert loads", "c3", "dash"),
        Line(x, experts, "mean over layers", "c1", "", True, low, high),
    )
    batches = Axis("sequences decoded together", tuple(f"{batch:g}" for batch in mean.index))
    return Chart(
        "Experts of a decode step",
        "Distinct experts that a step reads, by sequences decoded together",
        (Panel(marks, batches, Axis("distinct experts per step", low=0)),),
        text=SIMULATED + "Bars go from the layer with the fewest to the one with the most.",
        name="decode",
    )

"""Charts of specialisation: activation by domain, and information about the expert.

L routers, E experts, D domains.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Line, Panel
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.text import cut, layer_label, readable

MOST_PANELS = 8  # layers drawn where each takes a panel
UNIFORM = "uniform"  # the row below those of the domains
WIDE = 64  # experts of a panel beyond which it takes the whole width, and half as many are drawn


@spec.chart("domains", group="Specialization")
def domains(data: ReportData) -> Chart | str:
    """Lift: activation of each expert in each domain ÷ its mean over them; a panel per layer."""
    counts, D = data.counts, len(data.counts.domains)
    if D < 2:
        return "domains: there is only one"
    table = data.tables["domains"]
    names = tuple(cut(readable(name)) for name in counts.domains)
    spread = {r: _spread(table[table["router"] == r]) for r in data.selection.routers}
    wide = max(counts.routers[r].experts for r in spread) > WIDE
    most = MOST_PANELS // 2 if wide else MOST_PANELS
    chosen = sorted(sorted(spread, key=lambda r: -spread[r])[:most])
    panels = list[Panel]()
    for r in chosen:
        E, rows = counts.routers[r].experts, table[table["router"] == r]
        lift_DE, activation_DE = (
            rows[name].to_numpy().reshape(D, E) for name in ("lift", "activation")
        )
        # the share that each expert would take if all were alike, on the scale of the others
        with np.errstate(divide="ignore"):
            even_E = counts.routers[r].top_k / E / activation_DE.mean(0)
        values = np.vstack([lift_DE, np.where(np.isfinite(even_E), even_E, np.nan)])
        scale = spec.ratio_scale("activation ÷ mean", D, "domains")
        heatmap = Heatmap(values, scale, spec.cell_numbers(values))
        title = f"layer {layer_label(data.trace.routers, r)}"
        panels.append(Panel((heatmap,), Axis("expert"), Axis("domain", (*names, UNIFORM)), title))
    fewer = f"the {len(chosen)} of {len(spread)} layers that differ most by domain"
    rise = table["activation"] - table["activation"] / table["lift"]
    return Chart(
        "Domains and experts",
        "Activation of each expert in each domain ÷ its mean over the domains",
        tuple(panels),
        text="How much of each domain goes to each expert, relative to the expert's mean over the "
        "domains. The last row is for reference: k ÷ E, every expert alike.",
        columns=1 if len(chosen) == 1 or wide else 2,
        table=table.loc[rise.sort_values(ascending=False, kind="stable").index],
        definitions={
            "activation": "assignments of the expert in a domain ÷ tokens of the domain; over the "
            "experts it sums to k.",
            "lift": "activation ÷ its mean over all domains. 1 is no preference.",
            UNIFORM: "the activation of each expert if all were chosen alike. Where this row is "
            "blue, the expert takes more than that in the mean over the domains; where red, less.",
        },
        interactive="domains",
        subset=fewer if len(chosen) < len(spread) else "",
    )


@spec.chart("specialization", group="Specialization")
def specialization(data: ReportData) -> Chart | str:
    """What domain and token id tell about the expert, in bits by layer, beside chance."""
    table = data.tables.complete("specialization")
    x, marks = np.arange(len(table), dtype=float), list[spec.Mark]()
    for name, column, colour in (
        ("domain", "domain_mi", "c1"),
        ("domain, given the token id", "domain_mi_given_token", "c3"),
        ("token id", "token_mi", "c2"),
    ):
        bits, null = table[f"{column}_bits"], table[f"{column}_null_bits"]
        if bits.notna().any():
            marks.append(Line(x, bits.to_numpy(), name, colour, dots=True))
            if null.notna().any():
                marks.append(Line(x, null.to_numpy(), f"{name}: by chance", colour, "dot"))
    if not marks:
        return "specialization: needs two domains or token ids"
    y = Axis("mutual information (bits)", low=0)
    return Chart(
        "What decides the expert",
        "Information that the domain and the token id carry about the chosen expert",
        (Panel(tuple(marks), spec.layer_axis(data, table["router"]), y),),
        text="Bits of information that the domain, and the token id, carry about the chosen "
        "expert. Only the distance above the dotted line of the same colour is evidence: "
        "chance alone reaches the dotted line.",
        table=data.tables["specialization"],
        definitions={
            "domain": "mutual information of expert and domain, all domains with equal weight; "
            "by chance: documents that vary as these do, of domains that share one mean.",
            "domain, given the token id": "the same among tokens with the same id: topic beyond "
            "vocabulary.",
            "token id": "mutual information of expert and token id, over ids that occur at least 8 "
            "times.",
        },
    )


def _spread(rows: pd.DataFrame) -> float:
    """How much the activations of a router differ between domains: Σ activation · log₂ lift."""
    lift = np.maximum(rows["lift"].to_numpy(), 1e-9)
    return float(np.nansum(rows["activation"].to_numpy() * np.log2(lift)))

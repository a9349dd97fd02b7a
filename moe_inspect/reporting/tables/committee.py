"""Which experts lead in every domain. D domains, E experts, U units (clusters of documents), R
resamples."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import committee as com
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.registry import table

COMMITTEE = (
    "committee_experts",
    "committee_null",
    "committee_by_chance",
    "committee_mass",
    "committee_mass_low",
    "committee_mass_high",
    "committee_mass_even",
    "committee_weight",
)


@table(by_router=COMMITTEE)
def committee(data: ReportData) -> pd.DataFrame:
    """One row per router: the experts that are among the k with the largest load in every domain,
    how many that is where domains share one mean, and where each draws its own; the share of
    assignments and of gate weight that they carry (mean over the domains), with a 95 % interval
    over documents."""
    counts, rows = data.counts, list[dict[str, object]]()
    domain_U = counts.domain_of_unit_U
    weights_RU = None if counts.counts_only else unc.resample_weights(domain_U)
    weights_D = None if weights_RU is None else com.weights_by_domain(weights_RU, domain_U)
    for r in data.selection.routers:
        router, of, assignments_DE = counts.routers[r], counts.of[r], counts.assignments_DE(r)
        E, k = router.experts, router.top_k
        member_E = com.committee(assignments_DE, k)
        size = com.committee_experts(assignments_DE, k)
        domains = int((assignments_DE.sum(1) > 0).sum())
        row: dict[str, object] = {
            "layer": router.layer,
            "router": r,
            "domains": domains,
            "top_k": k,
            "committee_experts": size,
            "committee_mass": com.committee_mass(assignments_DE, k),
            "committee_mass_even": size / E,
            "experts": " ".join(map(str, np.flatnonzero(member_E))),
        }
        if size == size:
            row["committee_by_chance"] = com.committee_by_chance(domains, E, k)
            if of.weight_sum_DE is not None:
                row["committee_weight"] = com.mass_of(member_E, of.weight_sum_DE)
        if weights_D is not None:
            units_UE = of.assignments_UE
            row["committee_null"] = com.committee_null(units_UE, domain_U, k)
            row["committee_mass_low"], row["committee_mass_high"] = com.mass_interval(
                member_E, units_UE, domain_U, weights_D
            )
        rows.append(row)
    columns = ["layer", "router", "domains", "top_k", *COMMITTEE, "experts"]
    return pd.DataFrame(rows, columns=columns).astype(
        {**dict.fromkeys(COMMITTEE, float), "experts": "str"}
    )

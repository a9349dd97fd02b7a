"""Tables of whole texts: which experts lead in every domain; and of a sample, which takes a pass of
its own, what the routing of a document says of its domain, and the paths of tokens through the
layers.

D domains, E experts, U units (clusters of documents), R resamples, S documents or tokens, L
routers.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.samples import document_loads, sampled_routes
from moe_inspect.analysis.metrics import committee as com
from moe_inspect.analysis.metrics import paths as pth
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.signature import accuracies
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


@table()
def signature(data: ReportData) -> pd.DataFrame:
    """One row for all routers together (layer and router are empty), then one per router: how often
    the nearest other document, by the shares of its assignments, is of the same domain; with a 95 %
    interval, and beside the same with the documents' domains shuffled."""
    counts = data.decisions("signature")
    of = document_loads(data.trace, data.selection)
    together, each = accuracies([of.load_SE[r] for r in data.selection.routers], of.domain_S)
    layers = [counts.routers[r].layer for r in data.selection.routers]
    made = [together, *each]
    return pd.DataFrame(
        {
            "layer": pd.array([pd.NA, *layers], "Int64"),
            "router": pd.array([pd.NA, *data.selection.routers], "Int64"),
            "domains": len(of.domains),
            "documents": len(of.document_S),
            "signature_accuracy": [m.value for m in made],
            "signature_accuracy_low": [m.low for m in made],
            "signature_accuracy_high": [m.high for m in made],
            "signature_null": [m.null for m in made],
            "signature_null_p99": [m.null_p99 for m in made],
        }
    )


@table()
def paths(data: ReportData) -> pd.DataFrame:
    """One row per router: the distinct paths of tokens through the routers up to it, by first
    choices and by sets of experts, and their entropy; beside the same with every router's choices
    shuffled among the tokens of each document, and the sum of the routers' own entropies."""
    counts, rows = data.decisions("paths"), list[dict[str, float | None]]()
    for routes in sampled_routes(data.trace, data.selection):
        group_S = pth.groups_of(routes.document_S, routes.domain_S)
        S = len(group_S)
        first_L = pth.entropies(routes.first_LS, routes.document_S, group_S)
        set_L = pth.entropies(routes.set_LS, routes.document_S, group_S)
        for r, first, of_sets in zip(routes.routers, first_L, set_L, strict=True):
            row: dict[str, float | None] = {
                "layer": counts.routers[r].layer,
                "router": r,
                "tokens": S,
                "most_bits": float(np.log2(S)),
            }
            rows.append(row | _of_paths("path", first) | _of_paths("set_path", of_sets))
    named = [*_of_paths("path", None), *_of_paths("set_path", None)]
    frame = pd.DataFrame(rows, columns=["layer", "router", "tokens", "most_bits", *named])
    return frame.astype({"paths": "Int64", "set_paths": "Int64"})


def _of_paths(name: str, of: pth.Entropy | None) -> dict[str, float | None]:
    nan = float("nan")
    return {
        f"{name}s": None if of is None else of.paths,
        f"{name}_entropy_bits": nan if of is None else of.value,
        f"{name}_entropy_low": nan if of is None else of.low,
        f"{name}_entropy_high": nan if of is None else of.high,
        f"{name}_entropy_shuffled_bits": nan if of is None else of.shuffled,
        f"{name}_entropy_independent_bits": nan if of is None else of.independent,
    }

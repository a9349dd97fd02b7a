"""Do the same experts lead in every domain? The standing committee of a router: the experts in the
top set of all domains, and the mass they carry (after arXiv:2601.03425).

The top set of a domain is the n = k experts with the largest load in it: as many as a token
chooses, so one fixed choice would be all of it. Experts that share the last place are left out.

D domains, E experts, U units (clusters of documents), R repetitions.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.metrics.chance import null_loads
from moe_inspect.analysis.metrics.registry import metric
from moe_inspect.analysis.metrics.specialization import share_by_domain
from moe_inspect.analysis.metrics.uncertainty import SHARE, effective_documents, interval

SOURCE = "arXiv:2601.03425"
nan = float("nan")


def committee(assignments_DE: np.ndarray, top_k: int) -> np.ndarray:
    """Which experts are in the top set of every domain that has load: those with more load than the
    expert of rank k + 1. bool; none of them where fewer than two domains have load. [D, E] → [E]"""
    return _leads(assignments_DE, top_k).all(0) & (assignments_DE.any(1).sum() > 1)


def _leads(load_DE: np.ndarray, top_k: int) -> np.ndarray:
    """Which experts are in the top set of each domain: all, where it has no load. bool [D, E]"""
    after, after_D1 = load_DE.shape[1] - 1 - top_k, np.zeros(1)
    if after >= 0:
        after_D1 = np.partition(load_DE, after, axis=1)[:, after : after + 1]
    return (load_DE > after_D1) | ~load_DE.any(1, keepdims=True)


@metric("committee", ideal=0.0, range="0 to k", unit="experts", source=SOURCE)
def committee_experts(assignments_DE: np.ndarray, top_k: int) -> float:
    """The number of experts that are among the k with the largest load in every domain. k: the same
    experts lead everywhere. NaN with fewer than two domains that have load."""
    several = (assignments_DE.sum(1) > 0).sum() > 1
    return float(committee(assignments_DE, top_k).sum()) if several else nan


@metric("committee", ideal=0.0, range="0 to 1", unit="share", source=SOURCE)
def committee_mass(assignments_DE: np.ndarray, top_k: int) -> float:
    """The share of the assignments that go to these experts, its mean over the domains. 1: no other
    expert is used. NaN with fewer than two domains that have load."""
    several = (assignments_DE.sum(1) > 0).sum() > 1
    return mass_of(committee(assignments_DE, top_k), assignments_DE) if several else nan


def mass_of(member_E: np.ndarray, values_DE: np.ndarray) -> float:
    """The share of these experts in each domain, its mean over the domains that have any."""
    known_DE = values_DE[values_DE.any(1)]
    return float(share_by_domain(known_DE)[:, member_E].sum(1).mean()) if len(known_DE) else nan


def committee_by_chance(domains: int, E: int, top_k: int) -> float:
    """The number of experts expected where each domain draws its top set anew: E·(k/E)^D."""
    return E * (top_k / E) ** domains


def committee_null(assignments_UE: np.ndarray, domain_U: np.ndarray, top_k: int) -> float:
    """Mean of `committee_experts` of documents (units) like these whose domains share one mean: how
    large the committee is where no domain routes in its own way. NaN with fewer than two
    domains."""
    if int(domain_U.max(initial=-1)) < 1 or not assignments_UE.any():
        return nan
    member_BE: np.ndarray = np.ones((1, 1), bool)
    loaded_B: np.ndarray = np.zeros(1, int)
    for load_PE, drawn_B in null_loads(assignments_UE, domain_U):
        member_BE = member_BE & _leads(load_PE, top_k)[drawn_B]
        loaded_P = load_PE.max(1) > 0
        loaded_B = loaded_B + loaded_P[drawn_B]
        if not member_BE.any():
            return 0.0
    return float((member_BE.sum(1) * (loaded_B > 1)).mean())


def weights_by_domain(weights_RU: np.ndarray, domain_U: np.ndarray) -> list[np.ndarray]:
    """The weights of the units of each domain in each resample: [R, its units], of every domain."""
    return [weights_RU[:, domain_U == d] for d in range(int(domain_U.max(initial=-1)) + 1)]


def mass_interval(
    member_E: np.ndarray,
    assignments_UE: np.ndarray,
    domain_U: np.ndarray,
    weights_D: list[np.ndarray] | None,
) -> tuple[float, float]:
    """95 % interval over documents of the mass of these experts, the same ones in all resamples.
    weights_D: `weights_by_domain`. NaN without them, and where there are no such experts."""
    if weights_D is None or not member_E.any():
        return nan, nan
    share_RD = np.full((len(weights_D[0]), len(weights_D)), np.nan)
    for d, weight_RU in enumerate(weights_D):
        of_UE = assignments_UE[domain_U == d]
        all_R = weight_RU @ of_UE.sum(1)
        hits_R = weight_RU @ of_UE[:, member_E].sum(1)
        np.divide(hits_R, all_R, out=share_RD[:, d], where=all_R > 0)
    known_R = ~np.isnan(share_RD).all(1)
    documents = effective_documents(assignments_UE.sum(1))
    low, high = interval(np.nanmean(share_RD[known_R], axis=1), documents, SHARE)
    return float(low), float(high)

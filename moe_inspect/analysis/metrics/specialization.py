"""What does an expert specialise in? Pure functions on counts, in bits.

D domains, E experts, V token ids, U units (clusters of documents), R permutations, G (token id,
domain) groups. Counts are
assignments: with k > 1 a token counts k times. Plug-in estimates of information are biased upwards;
here none is corrected by a formula (Miller and Madow's assumes independent draws, which k distinct
picks are not): each comes with the value that shuffled labels give, and only the difference means
anything.
"""

from __future__ import annotations

from math import factorial, prod

import numpy as np

from moe_inspect.analysis.metrics.balance import _positive
from moe_inspect.analysis.metrics.registry import metric
from moe_inspect.analysis.metrics.uncertainty import SEED, permuted_labels
from moe_inspect.trace.runs import run_edges

PERMUTATIONS = 200
CHUNK_CELLS = 2**21


def mutual_information_bits(counts_XE: np.ndarray) -> np.ndarray:
    """Plug-in I(X; expert) of a table of counts or weights, in [0, log₂ min(X, E)] bits. NaN where
    there are none.
    counts: [..., X, E] → [...]"""
    total = _positive(counts_XE.sum((-2, -1), keepdims=True))
    p = counts_XE / total
    independent = p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)
    ratio = np.divide(p, independent, out=np.ones_like(p), where=counts_XE > 0)
    return (p * np.log2(ratio)).sum((-2, -1))


def share_by_domain(assignments_DE: np.ndarray) -> np.ndarray:
    """P(expert | domain), rows sum to 1. [..., D, E]"""
    return assignments_DE / _positive(assignments_DE.sum(-1, keepdims=True))


@metric(
    table="domains",
    ideal="k / E",
    unit="assignments a token",
    range="0 to 1, sums to k",
    axes="DE",
    source="arXiv:2409.02060, eq. 7",
)
def activation(assignments_DE: np.ndarray, tokens_D: np.ndarray) -> np.ndarray:
    """Assignments of an expert in a domain ÷ tokens of the domain. (By assignment it would sum to 1
    and be 1/E by chance: that is `share`.) NaN for a domain without tokens."""
    return assignments_DE / _positive(tokens_D)[:, None]


@metric(table="domains", ideal=1.0, unit="ratio", range="0 to D", axes="DE")
def lift(assignments_DE: np.ndarray, tokens_D: np.ndarray) -> np.ndarray:
    """Activation of an expert in a domain ÷ the mean of its activations over the domains. NaN for
    an expert without load."""
    activation_DE = activation(assignments_DE, tokens_D)
    known = ~np.isnan(activation_DE).any(1)
    return activation_DE / _positive(activation_DE[known].sum(0) / max(known.sum(), 1))


@metric(table="specialization", ideal=0.0, unit="bits", range="0 to log₂ min(D, E)")
def domain_mi_bits(assignments_DE: np.ndarray) -> float:
    """I(domain; expert) with the domains equally weighted, however many tokens each has. 0 is no
    specialisation; n domains on disjoint blocks of experts give log₂ n. NaN with fewer than two
    domains."""
    if len(assignments_DE) < 2:
        return float("nan")
    return float(mutual_information_bits(share_by_domain(assignments_DE)))


def domain_mi_null_bits(
    assignments_UE: np.ndarray, domain_U: np.ndarray, R: int = PERMUTATIONS
) -> tuple[float, float]:
    """Mean and 99th percentile of `domain_mi_bits` with the domain labels permuted among the
    documents (units): what documents that each have a style of their own, but no domain, would
    show. NaN with fewer than two domains, or no load."""
    D, E = int(domain_U.max(initial=-1)) + 1, assignments_UE.shape[1]
    if D < 2 or not assignments_UE.any():
        return float("nan"), float("nan")
    assignments_UE = assignments_UE.astype(float)
    labels_RU = permuted_labels(domain_U, R)
    step, values = max(1, CHUNK_CELLS // (D * max(E, len(domain_U)))), []
    for start in range(0, R, step):
        member_RDU = (labels_RU[start : start + step, None] == np.arange(D)[:, None]).astype(float)
        values.append(mutual_information_bits(share_by_domain(member_RDU @ assignments_UE)))
    null_R = np.concatenate(values)
    return float(np.nanmean(null_R)), float(np.nanquantile(null_R, 0.99))


def relabellings(domain_U: np.ndarray) -> int:
    """In how many ways the documents (units) can be parted into domains of the same sizes, domains
    of one size being alike: what the null is drawn from. Of fewer than a hundred none can lie
    beyond the 99th percentile."""
    size_D = np.bincount(domain_U).tolist()
    alike = np.bincount(size_D).tolist()
    return factorial(len(domain_U)) // prod(map(factorial, size_D)) // prod(map(factorial, alike))


@metric(table="specialization", ideal=0.0, unit="bits", range="0 to 1")
def jsd_bits(assignments_DE: np.ndarray) -> float:
    """Jensen–Shannon divergence between the expert shares of two domains, in [0, 1], its mean over
    all pairs. NaN with fewer than two domains that have load. (The divergence of all domains at
    once is `domain_mi_bits`.)"""
    share_DE = assignments_DE[assignments_DE.sum(1) > 0].astype(float)
    share_DE = share_by_domain(share_DE)
    if len(share_DE) < 2:
        return float("nan")
    first, second = np.triu_indices(len(share_DE), 1)
    pairs_P2E = np.stack([share_DE[first], share_DE[second]], axis=1)
    return float(mutual_information_bits(pairs_P2E).mean())


@metric(
    table="specialization",
    ideal="1 / E",
    unit="ratio",
    range="1/E to 1",
    source="arXiv:2409.02060, eq. 8",
)
def vocabulary_specialization(first_choice_VE: np.ndarray) -> float:
    """The share of tokens whose first choice is the favourite of their token id: Σ_x max_e N_xe ÷
    Σ_x N_x, in [1/E, 1].
    1: the token id alone decides. Rows: the token ids frequent enough to judge. NaN without any.
    Eq. 8 averaged over occurrences."""
    return float(
        first_choice_VE.max(1, initial=0).sum() / _positive(np.asarray(first_choice_VE.sum()))
    )


@metric(
    table="specialization",
    ideal="k / E",
    unit="ratio",
    range="k/E to 1",
    source="arXiv:2409.02060, eq. 8",
)
def vocabulary_specialization_any(any_VE: np.ndarray, occurrences_V: np.ndarray) -> float:
    """The share of tokens that reach, with any choice, the expert that most tokens of their id
    reach: Σ_x max_e N_xe ÷ Σ_x N_x. Saturates as k grows: read it beside the first choice's. NaN
    without token ids to judge."""
    return float(any_VE.max(1, initial=0).sum() / _positive(np.asarray(occurrences_V.sum())))


@metric(table="specialization", ideal=0.0, unit="bits", range="0 to log₂ E")
def token_mi_bits(any_VE: np.ndarray) -> float:
    """Plug-in I(token id; expert) over the token ids frequent enough to judge. Its bias is large:
    read it only beside the same with the token ids shuffled (token_mi_null_bits). NaN without
    any."""
    return float(mutual_information_bits(any_VE.astype(float))) if any_VE.any() else float("nan")


@metric(
    table="specialization",
    column="domain_mi_given_token_bits",
    ideal=0.0,
    unit="bits",
    range="0 to log₂ min(D, E)",
)
def conditional_mi_bits(counts_GE: np.ndarray, token_G: np.ndarray, domain_G: np.ndarray) -> float:
    """I(domain; expert | token id): what the domain says of the expert once the token id is known:
    topic beyond vocabulary. Domains equally weighted. Row g counts the assignments of one token id
    in one domain; rows of a token id lie together. Its bias is large: read it only against
    `conditional_mi_null_bits`. NaN without counts."""
    if not len(counts_GE):
        return float("nan")
    row_G = counts_GE.sum(1)
    p_GE = counts_GE * (1 / _positive(np.bincount(domain_G, row_G)))[domain_G][:, None]
    p_GE = p_GE / p_GE.sum()
    edges = run_edges(token_G)
    group_of_G = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    token_XE = np.add.reduceat(p_GE, edges[:-1])
    p_G, p_X = p_GE.sum(1), token_XE.sum(1)
    expected_GE = p_G[:, None] * (token_XE / p_X[:, None])[group_of_G]
    ratio_GE = np.divide(p_GE, expected_GE, out=np.ones_like(p_GE), where=counts_GE > 0)
    return float((p_GE * np.log2(ratio_GE)).sum())


def conditional_mi_null_bits(
    counts_PE: np.ndarray, token_P: np.ndarray, domain_P: np.ndarray, R: int
) -> float:
    """Mean of `conditional_mi_bits` with the domain labels permuted, separately for each token id,
    among the documents (units) that hold it: every token id keeps the domains it occurs in, which
    is what most of the bias depends on. Row p counts the assignments of one token id in one unit;
    rows of a token id lie together."""
    if not R or not len(token_P):
        return float("nan")
    rng = np.random.default_rng([SEED, len(token_P)])
    # nearly all cells are empty: the sums run over the others, N of them
    row_N, expert_N = np.nonzero(counts_PE)
    count_N, load_P = counts_PE[row_N, expert_N], counts_PE.sum(1)
    token_P = np.unique(token_P, return_inverse=True)[1]
    X, D, E = int(token_P[-1]) + 1, int(domain_P.max()) + 1, counts_PE.shape[1]
    values = []
    for _ in range(R):
        shuffled_P = domain_P[np.lexsort((rng.random(len(token_P)), token_P))]
        weight_P = 1 / _positive(np.bincount(shuffled_P, load_P, D))[shuffled_P]
        p_N = count_N * weight_P[row_N]
        p_N, group_P = p_N / p_N.sum(), token_P * D + shuffled_P
        token_N = token_P[row_N]
        p_XDE = np.bincount(group_P[row_N] * E + expert_N, p_N, X * D * E)
        p_XD = np.bincount(group_P[row_N], p_N, X * D)
        p_XE, p_X = np.bincount(token_N * E + expert_N, p_N, X * E), np.bincount(token_N, p_N, X)
        # I(D; E | X) = H(X, D) + H(X, E) - H(X, D, E) - H(X)
        pairs, joint = _entropy_bits(p_XD) + _entropy_bits(p_XE), _entropy_bits(p_XDE)
        values.append(pairs - joint - _entropy_bits(p_X))
    return float(np.mean(values))


def _entropy_bits(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def by_group(
    counts_PE: np.ndarray, token_P: np.ndarray, domain_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums rows of (token id, unit) to rows of (token id, domain): counts_GE, token_G, domain_G."""
    order_P = np.lexsort((domain_P, token_P))
    token_P, domain_P = token_P[order_P], domain_P[order_P]
    starts = run_edges(token_P, domain_P)[:-1]
    if not len(starts):
        return counts_PE, token_P, domain_P
    return np.add.reduceat(counts_PE[order_P], starts), token_P[starts], domain_P[starts]

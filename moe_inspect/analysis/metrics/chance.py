"""What chance does to loads whose tokens come in documents: the null of every claim on them.

The tokens of a document choose alike, so chance is a matter of documents: another sample of them
would have had other loads. A document's residual is its load minus the load that the null expects
of it, and under the null it is as likely as its opposite. So the null is drawn by giving the
residuals of whole documents random signs. The signs are the same for all routers: what is the
largest of many routers is compared with the largest of as many under the same signs, and its
p-value is of all of them together (Westfall and Young 1993).

A claim is made from p < ALPHA. A report makes several kinds of claims: at 1 % each, about one
report in twenty on routing by chance alone makes any.

L routers, U units (clusters of documents), E experts, D domains, B random signs, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.balance import nan_for_zero

ALPHA = 0.01  # p-value under which a sentence claims something
FEWEST_TO_JUDGE = 8  # documents: with 7, signs can be arranged in 64 ways, too few for p < ALPHA
# a design effect that documents, where they are unknown, are not thought to reach: that of texts of
# 1,000 tokens that each use one set of experts for all of them
LONG_DOCUMENT = 1_000
SIGNS = 499  # the smallest p-value is 1 / 500
# domains × experts beyond which fewer draws tell as much; 101 can still give p < ALPHA
FEWER_SIGNS = {2**13: 199, 2**15: 101}
MOST_UNITS = 512  # more are added up to as many: their signs say nothing more
PASSES = 500  # drawn of documents in random order
SPREAD = 0.05  # variance between documents of the logarithm of a share, as far as a prior goes
PRIOR = 2.0  # documents' worth of mean share that a log ratio is drawn to 0 by
Drawn = np.ndarray | slice  # which of some loads each draw is
ALL = slice(None)


@lru_cache(maxsize=4)
def random_signs(U: int) -> np.ndarray:
    """B random signs of U units, read-only. float32 [B, U]"""
    signs_BU = np.random.default_rng([unc.SEED, U]).integers(0, 2, (SIGNS, U)).astype(np.float32)
    signs_BU = signs_BU * 2 - 1
    signs_BU.flags.writeable = False
    return signs_BU


def signs_of(U: int, cells: int) -> np.ndarray:
    """Random signs of U units, for the nulls of a table of so many numbers: of a large one the
    first FEWER_SIGNS. float32 [B, U]"""
    draws = min((B for most, B in FEWER_SIGNS.items() if cells > most), default=SIGNS)
    return random_signs(U)[:draws]


def joint_p(observed_L: Sequence[float], null_LB: Sequence[np.ndarray]) -> np.ndarray:
    """P-values of the statistics of several routers, corrected for their number: how often the
    largest of all is as far above its mean, in its own standard deviations. NaN where a statistic
    is. float64 [L]"""
    p_L = np.array(observed_L, float)
    known = np.flatnonzero(~np.isnan(p_L))
    if not len(known):
        return p_L
    fewest = min(len(null_LB[i]) for i in known.tolist())  # of the same draws, in the same order
    null = np.stack([null_LB[i][:fewest] for i in known.tolist()])
    mean, sd = null.mean(1), np.maximum(null.std(1), 1e-12)
    largest_B = ((null - mean[:, None]) / sd[:, None]).max(0)
    standing = (p_L[known] - mean) / sd
    # what equals the null but for rounding is not beyond it
    as_far = largest_B[None] >= standing[:, None] - 1e-6
    p_L[known] = (1 + as_far.sum(1)) / (1 + largest_B.size)
    return p_L


def shuffled_within(document_T: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of the tokens in which each has the place of one of its own document: what the
    tokens of a document have in common stays, and so is not taken for anything else. int64 [T]"""
    order_T, any_T = np.empty(len(document_T), np.int64), np.argsort(rng.random(len(document_T)))
    number_T = document_T - document_T.min(initial=document_T.max(initial=0))
    number_T = number_T.astype(np.min_scalar_type(number_T.max(initial=0)))  # 16 bits: by radix
    order_T[np.argsort(number_T, kind="stable")] = any_T[np.argsort(number_T[any_T], kind="stable")]
    return order_T


def shuffled_p(share: float, null_R: Sequence[float], cases: int) -> float:
    """P-value of a share of so many cases among those of R shuffles, by Student's t; of a single
    shuffle, by the variance of independent cases. NaN where one is."""
    R, mean = len(null_R), float(np.mean(null_R))
    variance = float(np.var(null_R, ddof=1)) if R > 1 else mean * (1 - mean) / max(cases, 1)
    error = np.sqrt(variance * (1 + 1 / R))
    if not error > 0:
        return float("nan") if error != error else float(share <= mean)
    return float(unc.student_p((share - mean) / error, R - 1 if R > 1 else max(cases, 1)))


def z_of(p: float) -> float:
    """The value that a standard normal exceeds with probability p."""
    return -float(unc.special("ndtri")(p))


def evenness_nulls(assignments_UE: np.ndarray, strata_U: np.ndarray) -> np.ndarray:
    """Of an even router whose documents vary as these do: how far the load of its busiest expert
    lies above the mean, and that of its least used expert below it, both ÷ mean load. The domains
    of the sample (strata) keep their own shares, if they have documents enough to tell.
    float64 [2, B]"""
    tokens_U, load_E = assignments_UE.sum(1), assignments_UE.sum(0).astype(float)
    E, total = len(load_E), float(load_E.sum())
    residual_UE = assignments_UE - tokens_U[:, None] / E
    if np.bincount(strata_U).min() >= unc.FEWEST_DOCUMENTS:
        residual_UE = unc.residuals(assignments_UE, strata_U)
        residual_UE += tokens_U[:, None] * (load_E / total - 1 / E)
    null_BE = signed_sums(residual_UE)
    return np.stack([null_BE.max(1), -null_BE.min(1)]) / (total / E)


def signed_sums(residual_UE: np.ndarray) -> np.ndarray:
    """The sum of the units' residuals, each with a random sign; more than MOST_UNITS units share
    theirs. float32 [B, E]"""
    U, E = residual_UE.shape
    if U > MOST_UNITS:
        filled_UE = np.pad(residual_UE, ((0, -U % MOST_UNITS), (0, 0)))
        residual_UE = filled_UE.reshape(-1, MOST_UNITS, E).sum(0)
    return random_signs(len(residual_UE)) @ residual_UE.astype(np.float32)


def null_loads(
    assignments_UE: np.ndarray, domain_U: np.ndarray
) -> Iterator[tuple[np.ndarray, Drawn]]:
    """The load of each expert where the domains share the mean of their shares, and documents vary
    as these do, in as many draws as `signs_of`. Every domain keeps its documents, and so what few
    tokens in it give. Of one domain after the other: float64 [P, E], 0 or more, and which of these
    each draw is. The signs of few documents can be arranged in few ways, each of which is given
    once."""
    (U, E), tokens_U = assignments_UE.shape, assignments_UE.sum(1)
    of_D = [np.flatnonzero(domain_U == d) for d in range(int(domain_U.max()) + 1)]
    load_DE = np.stack([assignments_UE[of].sum(0) for of in of_D]).astype(float)
    loaded_D = load_DE.sum(1) > 0
    share_E = (load_DE[loaded_D] / load_DE[loaded_D].sum(1, keepdims=True)).mean(0)
    expected_DE = load_DE.sum(1)[:, None] * share_E
    residual_UE = (assignments_UE - tokens_U[:, None] * share_E).astype(np.float32)
    signs_BU = signs_of(U, len(of_D) * E)
    for of, expected_E in zip(of_D, expected_DE, strict=True):
        signs_PU, drawn_B = signs_BU[:, of], ALL
        if 2 << len(of) < len(signs_BU):
            bit_U = np.left_shift(1, np.arange(len(of)))
            drawn_B = (signs_PU > 0) @ bit_U
            is_positive_PU = np.arange(1 << len(of))[:, None] & bit_U > 0
            signs_PU = np.where(is_positive_PU, np.float32(1), np.float32(-1))
        load_PE = expected_E + signs_PU @ residual_UE[of]
        yield np.maximum(load_PE, 0, out=load_PE), drawn_B


def passes_of_documents(
    assignments_UE: np.ndarray, tokens_U: np.ndarray, sizes_S: np.ndarray, passes_S: np.ndarray
) -> tuple[float, float]:
    """Mean and standard deviation of the max_vio of a forward pass over these documents in random
    order, cut anywhere. sizes: tokens of a pass; passes: how many have so many."""
    U, rng, found = len(tokens_U), np.random.default_rng([unc.SEED, len(tokens_U)]), list[float]()
    size_R: np.ndarray = rng.choice(sizes_S, PASSES, p=passes_S / passes_S.sum())
    for size in map(float, size_R):
        order_U = rng.permutation(U)
        end_U = np.cumsum(tokens_U[order_U])
        begin = rng.uniform(0, max(float(end_U[-1]) - size, 0))
        within_U = np.minimum(end_U, begin + size) - np.maximum(end_U - tokens_U[order_U], begin)
        share_U = np.clip(within_U / np.maximum(tokens_U[order_U], 1), 0, 1)
        of = np.flatnonzero(share_U)
        load_E = rng.binomial(assignments_UE[order_U[of]], share_U[of, None]).sum(0)
        if load_E.any():
            found.append(float(load_E.max() / load_E.mean() - 1))
    return (float(np.mean(found)), float(np.std(found))) if found else (np.nan, np.nan)


def overload_p(assignments_UE: np.ndarray, domain_U: np.ndarray) -> np.ndarray:
    """P-value of each domain's share of each expert against the mean of the other domains: a higher
    one only, not corrected for the number of domains and experts. NaN with fewer than two domains,
    and for a domain of one document.

    A document counts by the logarithm of its share of the expert ÷ the share of all, weighted by
    how exactly it tells that. The variance is that between the documents of a domain, at least the
    mean of the domains: few documents are alike by luck. Student's t. float64 [D, E]"""
    D, E = int(domain_U.max(initial=-1)) + 1, assignments_UE.shape[1]
    documents_D1 = np.bincount(domain_U, minlength=D)[:, None].astype(float)
    if D < 2 or not assignments_UE.any():
        return np.full((D, E), np.nan)
    member_DU = (domain_U == np.arange(D)[:, None]).astype(float)
    share_E = assignments_UE.sum(0) / assignments_UE.sum()
    expected_UE = assignments_UE.sum(1)[:, None] * share_E
    prior_E = np.maximum(PRIOR * share_E * E, 1e-9)
    ratio_UE = np.log((assignments_UE + prior_E) / (expected_UE + prior_E))
    weight_UE = 1 / (1 / (expected_UE + prior_E) + SPREAD)
    weight_DE = member_DU @ weight_UE
    mean_DE = member_DU @ (weight_UE * ratio_UE) / nan_for_zero(weight_DE)
    apart_UE = (weight_UE * (ratio_UE - mean_DE[domain_U])) ** 2
    few_D1 = nan_for_zero(documents_D1 - 1)
    variance_DE = member_DU @ apart_UE / weight_DE**2 * documents_D1 / few_D1
    known_DE = np.isfinite(variance_DE * weight_DE)
    several_E = nan_for_zero(known_DE.sum(0).astype(float))
    pooled_E = np.where(known_DE, variance_DE * weight_DE, 0).sum(0) / several_E
    variance_DE = np.maximum(variance_DE, pooled_E / weight_DE)
    error_DE = np.sqrt(variance_DE + _mean_of_others(variance_DE, (D - 1) ** 2))
    t_DE = (mean_DE - _mean_of_others(mean_DE, D - 1)) / nan_for_zero(error_DE)
    return unc.student_p(t_DE, max(len(domain_U) - D, 1))


def _mean_of_others(values_DE: np.ndarray, by: float) -> np.ndarray:
    return (np.nansum(values_DE, axis=0) - np.nan_to_num(values_DE)) / by

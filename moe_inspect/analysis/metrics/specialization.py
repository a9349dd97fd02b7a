"""What does an expert specialise in? Pure functions on counts, in bits.

D domains, E experts, V token ids, X some of them, U units (clusters of documents), B random signs.
Counts are assignments: with k > 1 a token counts k times. Plug-in estimates of information are
biased upwards; here none is corrected by a formula (Miller and Madow's assumes independent draws,
which k distinct picks are not): each comes with the value that chance gives, and only the
difference means anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics.balance import nan_for_zero, ratio
from moe_inspect.analysis.metrics.registry import metric
from moe_inspect.analysis.metrics.uncertainty import resample_weights

CHUNK_CELLS = 2**16  # of draws taken together, which stay in a cache
RESAMPLES = 200  # of documents, for a standard deviation
LOOKED_UP = 2**14  # counts whose n log n is kept
TINY = np.finfo(float).tiny
N_LOG2_N = np.arange(LOOKED_UP) * np.log2(np.maximum(np.arange(LOOKED_UP), 1))
of_domains, of_router = partial(metric, "domains", axes="DE"), partial(metric, "specialization")


def mutual_information_bits(counts_XE: np.ndarray) -> np.ndarray:
    """Plug-in I(X; expert) of a table of counts or weights, in [0, log₂ min(X, E)] bits. NaN where
    there are none. counts: [..., X, E] → [...]"""
    total = nan_for_zero(counts_XE.sum((-2, -1), keepdims=True))
    p = counts_XE / total
    terms = p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)
    with np.errstate(invalid="ignore"):  # 0 / 0, of a row or an expert without load
        np.divide(p, terms, out=terms)
    np.log2(np.fmax(terms, np.finfo(p.dtype).tiny, out=terms), out=terms)
    return np.multiply(p, terms, out=terms).sum((-2, -1))


def share_by_domain(assignments_DE: np.ndarray) -> np.ndarray:
    """P(expert | domain), rows sum to 1. [..., D, E]"""
    return assignments_DE / nan_for_zero(assignments_DE.sum(-1, keepdims=True))


@of_domains(
    ideal="k / E",
    range="0 to 1, sums to k",
    unit="assignments per token",
    source="arXiv:2409.02060, eq. 7",
)
def activation(assignments_DE: np.ndarray, tokens_D: np.ndarray) -> np.ndarray:
    """Assignments of an expert in a domain ÷ tokens of the domain. (By assignment it would sum to 1
    and be 1/E by chance: that is `share`.) NaN for a domain without tokens."""
    return assignments_DE / nan_for_zero(tokens_D)[:, None]


@of_domains(ideal=1.0, range="0 to D")
def lift(assignments_DE: np.ndarray, tokens_D: np.ndarray) -> np.ndarray:
    """Activation of an expert in a domain ÷ the mean of its activations over the domains. NaN for
    an expert without load."""
    activation_DE = activation(assignments_DE, tokens_D)
    known = ~np.isnan(activation_DE).any(1)
    return activation_DE / nan_for_zero(activation_DE[known].sum(0) / max(known.sum(), 1))


@of_router(ideal=0.0, range="0 to log₂ min(D, E)", unit="bits")
def domain_mi_bits(assignments_DE: np.ndarray) -> float:
    """I(domain; expert) with the domains equally weighted, however many tokens each has. 0 is no
    specialisation; n domains on disjoint blocks of experts give log₂ n. NaN with fewer than two
    domains."""
    if len(assignments_DE) < 2:
        return float("nan")
    return float(mutual_information_bits(share_by_domain(assignments_DE)))


def domain_mi_null(assignments_UE: np.ndarray, domain_U: np.ndarray) -> np.ndarray:
    """`domain_mi_bits` of documents (units) like these whose domains share one mean, as often as
    `chance.signs_of` draws. NaN with fewer than two domains, or no load. float [B]"""
    if int(domain_U.max(initial=-1)) < 1 or not assignments_UE.any():
        return np.full(1, np.nan)
    return _bits_of_draws(chance.null_loads(assignments_UE, domain_U))


def _bits_of_draws(load_DPE: Iterable[tuple[np.ndarray, chance.Drawn]]) -> np.ndarray:
    """`domain_mi_bits` of each draw, of `chance.null_loads`, which are overwritten: the entropy of
    the mean share less the mean entropy; NaN where there are none. float [B]"""
    domains, within_B, sum_BE = 0, np.zeros(1), np.zeros((1, 1))
    for load_PE, drawn_B in load_DPE:
        share_PE = np.divide(load_PE, nan_for_zero(load_PE.sum(-1, keepdims=True)), out=load_PE)
        within_B = within_B + _entropy_bits(share_PE)[drawn_B]
        share_BE = share_PE[drawn_B]
        sum_BE = np.add(sum_BE, share_BE, out=sum_BE if domains else None)
        domains += 1
    if not domains:
        return np.full(1, np.nan)
    return _entropy_bits(sum_BE / domains) - within_B / domains


def _entropy_bits(share_BE: np.ndarray) -> np.ndarray:
    terms_BE = np.maximum(share_BE, TINY)
    return -np.einsum("be,be->b", share_BE, np.log2(terms_BE, out=terms_BE))


def domain_mi_error(assignments_UE: np.ndarray, domain_U: np.ndarray) -> float:
    """The standard deviation of `domain_mi_bits` over samples of documents (units), from resamples.
    NaN with fewer than FEWEST_TO_JUDGE of them, or two domains."""
    weights_RU = resample_weights(domain_U, RESAMPLES)
    if len(domain_U) < chance.FEWEST_TO_JUDGE or domain_U.max() < 1 or weights_RU is None:
        return float("nan")
    of_D = [domain_U == d for d in range(int(domain_U.max()) + 1)]
    bits_R = [
        domain_mi_bits(np.stack([weight_U[of] @ assignments_UE[of] for of in of_D]))
        for weight_U in weights_RU
    ]
    return float(np.nanstd(bits_R))


@of_router(ideal="1 / E", range="1/E to 1", source="arXiv:2409.02060, eq. 8")
def vocabulary_specialization(first_choice_VE: np.ndarray) -> float:
    """The share of tokens whose first choice is the favourite of their token id: Σ_x max_e N_xe ÷
    Σ_x N_x, in [1/E, 1]. 1: the token id alone decides. Rows: the token ids frequent enough to
    judge. NaN without any. Eq. 8 averaged over occurrences."""
    return ratio(first_choice_VE.max(1, initial=0).sum(), first_choice_VE.sum())


@of_router(ideal=0.0, range="0 to log₂ E", unit="bits")
def token_mi_bits(any_VE: np.ndarray) -> float:
    """Plug-in I(token id; expert) over the token ids frequent enough to judge. Its bias is large:
    read it only beside the same with the token ids shuffled. NaN without any."""
    load_V, load_E = any_VE.sum(1, dtype=np.int64), any_VE.sum(0, dtype=np.int64)
    if not (total := int(load_V.sum())):
        return float("nan")
    margins = _n_log2_n(load_V[None]).sum() + _n_log2_n(load_E[None]).sum()
    return float(np.log2(total) + (_n_log2_n(any_VE).sum() - margins) / total)


@of_router(ideal=0.0, range="0 to log₂ min(D, E)", unit="bits")
def domain_mi_given_token_bits(assignments_DE: np.ndarray, expected_DE: np.ndarray) -> float:
    """I(domain; expert) that is left where the load which the token ids explain is taken out of
    each domain: topic beyond vocabulary. `expected`: the load of tokens of a domain's ids, each
    routed as all tokens of its id are. Domains equally weighted. NaN with fewer than two domains,
    or no load. Domains that route the tokens of an id in different ways, which cancel over the ids,
    count as none."""
    if len(assignments_DE) < 2 or not assignments_DE.any():
        return float("nan")
    left_DE = np.maximum(_in_common(assignments_DE) + (assignments_DE - expected_DE), 0)
    return float(mutual_information_bits(share_by_domain(left_DE[assignments_DE.any(1)])))


def _in_common(assignments_DE: np.ndarray) -> np.ndarray:
    """The load of domains that share all their shares. [D, E]"""
    load_E = assignments_DE.sum(0)
    return assignments_DE.sum(1, keepdims=True) * load_E / nan_for_zero(load_E.sum())


@dataclass(frozen=True)
class Moved:
    """How much the residual of a document (unit), beyond what its token ids explain, moves that of
    a domain at any router: by all of it where it is its own, less what it moves the shares of the
    token ids that the domain has; scaled up as a document is part of the shares that it is compared
    with. tokens_XU: sparse. member_DU: 1 where a unit is of the domain."""

    tokens_XU: Any
    weight_DU: np.ndarray
    member_DU: np.ndarray

    @staticmethod
    def of(counts_XU: np.ndarray, domain_U: np.ndarray) -> Moved:
        from scipy import sparse  # pyright: ignore[reportMissingTypeStubs]

        tokens_XU: Any = sparse.csr_array(counts_XU)
        tokens_X, tokens_U = tokens_XU.sum(1), tokens_XU.sum(0)
        part_UX = (tokens_XU / tokens_U).T  # of the tokens of a document, those of an id
        share_XU = (tokens_XU.T / tokens_X).T  # of the tokens of an id, those in a document
        member_DU = np.eye(int(domain_U.max()) + 1)[domain_U].T
        itself_U = np.asarray(part_UX.multiply(share_XU.T).sum(1)).reshape(-1)
        share_XD = np.asarray(share_XU @ member_DU.T)
        # the mean over the tokens of a document of (1 or 0 − share of the domain)²
        weight_DU = member_DU * (1 - 2 * (part_UX @ share_XD).T) + (part_UX @ share_XD**2).T
        weight_DU = np.sqrt(np.maximum(weight_DU, 0)) * (2 * member_DU - 1)
        weight_DU /= np.sqrt(np.maximum(1 - itself_U, 1e-3))
        return Moved(tokens_XU, weight_DU.astype(np.float32), member_DU)


@dataclass(frozen=True)
class Expected:
    """The load of documents (units) beside what their token ids explain. assignments_UE,
    expected_UE: of the tokens of some ids."""

    assignments_UE: np.ndarray
    expected_UE: np.ndarray
    moved: Moved

    @staticmethod
    def of(assignments_UE: np.ndarray, assignments_XE: np.ndarray, moved: Moved) -> Expected:
        tokens_XU = moved.tokens_XU
        expected_UE = tokens_XU.T @ (assignments_XE / tokens_XU.sum(1)[:, None])
        return Expected(assignments_UE.astype(float), expected_UE, moved)

    def by_domain(self) -> tuple[np.ndarray, np.ndarray]:
        """Assignments, and those expected. float64 [D, E] each"""
        member_DU = self.moved.member_DU
        return member_DU @ self.assignments_UE, member_DU @ self.expected_UE

    def null(self) -> np.ndarray:
        """`domain_mi_given_token_bits` of documents whose residuals from what their token ids
        explain have random signs. float64 [B]"""
        assignments_DE = self.moved.member_DU @ self.assignments_UE
        residual_UE = (self.assignments_UE - self.expected_UE).astype(np.float32)
        U, E = residual_UE.shape
        every_BU = chance.signs_of(U, assignments_DE.size)
        loaded_D = assignments_DE.any(1)
        common_DE, weight_DU = _in_common(assignments_DE)[loaded_D], self.moved.weight_DU[loaded_D]

        def loads(signs_BU: np.ndarray) -> Iterator[tuple[np.ndarray, chance.Drawn]]:
            signed_BU = np.empty_like(signs_BU)
            moved_BE = np.empty((len(signs_BU), E), np.float32)
            load_BE = np.empty(moved_BE.shape)
            for common_E, weight_U in zip(common_DE, weight_DU, strict=True):
                np.multiply(signs_BU, weight_U, out=signed_BU)
                np.add(np.matmul(signed_BU, residual_UE, out=moved_BE), common_E, out=load_BE)
                yield np.maximum(load_BE, 0, out=load_BE), chance.ALL

        step = max(1, CHUNK_CELLS // E)
        starts = range(0, len(every_BU), step)
        return np.concatenate([_bits_of_draws(loads(every_BU[at : at + step])) for at in starts])


def _n_log2_n(counts_XE: np.ndarray) -> np.ndarray:
    """Σ over each row of n · log₂ n, looked up where n is small. float64 [X]"""
    X, E = counts_XE.shape
    step = max(1, LOOKED_UP * 8 // max(1, E))  # a block stays in a cache
    sums_X, looked_up_XE, one_E = np.zeros(X), np.empty((min(step, X), E)), np.ones(E)
    for start in range(0, X, step):
        part_XE = counts_XE[start : start + step]
        if part_XE.max(initial=0) < LOOKED_UP:
            # which copies no indices: none is out of range
            terms_XE = np.take(N_LOG2_N, part_XE, out=looked_up_XE[: len(part_XE)], mode="clip")
        else:
            terms_XE = part_XE * np.log2(np.maximum(part_XE, 1))
        sums_X[start : start + step] = terms_XE @ one_E
    return sums_X

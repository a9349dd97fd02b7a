"""Which experts are chosen together: in one decision, at a layer and the next, by a token and the
next.

E experts of a router, N of the next MoE layer's, D domains. together_EE[a, b] counts the decisions
that chose both a and b, together_EE[a, a] those that chose a.
next_EN[a, b] counts the tokens for which a was chosen here and b at the next MoE layer. All pairs
of slots count, not only first choices.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.metrics.registry import metric

ROUNDS = 200  # of fitting at most; a dozen are enough unless an expert is in nearly every decision
BLOCK = 2**14  # pairs that are worked on at a time, which stay in a cache
NEARLY_ALL = 1 - 1e-6  # an expert in all decisions would have an infinite weight

probability = partial(metric, column="probability", range="0 to 1", unit="probability")


@probability("coactivation", ideal="(k - 1) / (E - 1)", axes="EE", source="arXiv:2409.02060, eq. 6")
def coactivation(together_EE: np.ndarray) -> np.ndarray:
    """P(b chosen, given a chosen) in one decision: N_ab / N_a over all pairs of slots; a row sums
    to k − 1. NaN on the diagonal, and for an a that was never chosen."""
    probability_EE = together_EE / nan_for_zero(np.diagonal(together_EE))[:, None]
    return _without_diagonal(probability_EE)


@metric("coactivation", column="lift", ideal=1.0, range="0 and up", axes="EE")
def coactivation_lift(together_EE: np.ndarray, expected_EE: np.ndarray | None = None) -> np.ndarray:
    """N_ab ÷ the N_ab expected by chance at these loads. 1 is chance; the plain P(b|a)/P(b) would
    be under 1 by chance, since a decision's experts are distinct. NaN on the diagonal and where
    none are expected. `expected_EE`: the result of `together_by_chance`, if it is known."""
    expected_EE = together_by_chance(together_EE) if expected_EE is None else expected_EE
    return _without_diagonal(together_EE / nan_for_zero(expected_EE))


def together_by_chance(together_EE: np.ndarray) -> np.ndarray:
    """The N_ab expected of decisions with k distinct experts, random but for the loads: the
    probability of a set is the product of a weight of each of its experts (conditional Poisson
    sampling, the distribution of largest entropy with these loads: Chen, Dempster and Liu 1994). If
    slots are null, k is 1 + pairs ÷ assignments, rounded. [E, E], 0 on the diagonal."""
    observed_EE = _without_diagonal(together_EE, 0.0)
    row_E, load_E = observed_EE.sum(1), np.diagonal(together_EE).astype(float)
    alive = np.flatnonzero(row_E)
    if not len(alive):
        return np.zeros_like(observed_EE)
    k = max(2, round(1 + row_E.sum() / load_E.sum()))
    pair_EE = _pairs_of_sets(load_E[alive] * k / load_E[alive].sum(), k)
    row_E = row_E[alive]
    scale_E = np.full(len(alive), np.sqrt(row_E.sum() / pair_EE.sum()))
    for _ in range(ROUNDS):  # fits the row sums, which null slots change
        fitted_E = scale_E * (pair_EE @ scale_E)
        # the square root of the correction: the full one would oscillate
        step_E = np.sqrt(np.divide(row_E, fitted_E, out=np.ones_like(row_E), where=fitted_E > 0))
        scale_E = scale_E * step_E
        if np.abs(step_E - 1).max() < 1e-9:
            break
    pair_EE *= np.outer(scale_E, scale_E)
    if len(alive) == len(load_E):
        return pair_EE
    expected_EE = np.zeros_like(observed_EE)
    expected_EE[np.ix_(alive, alive)] = pair_EE
    return expected_EE


def _pairs_of_sets(share_E: np.ndarray, k: int) -> np.ndarray:
    """P(a and b in the set) for sets of k experts, each of which is in the set with probability
    share_E (their sum is k). [E, E], 0 on the diagonal."""
    E = len(share_E)
    if k >= E:  # all experts are in it
        return 1 - np.eye(E)
    share_E = np.minimum(share_E, NEARLY_ALL)
    weight_E = odds_E = share_E / (1 - share_E)
    for _ in range(ROUNDS):
        (*_, fewer_E, as_many_E), _ = _without_each(weight_E, k)
        fitted_E, before_E = odds_E * as_many_E / fewer_E, weight_E
        weight_E = fitted_E * (k / fitted_E.sum())
        if np.abs(weight_E / before_E - 1).max() < 1e-9:
            break
    pair_EE = _without_each_pair(weight_E, k)
    pair_EE *= weight_E[:, None] * weight_E
    np.fill_diagonal(pair_EE, 0)
    return (pair_EE + pair_EE.T) / 2  # rounding must not tell a pair from its mirror image


def _without_each(weight_E: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """For each expert e and j = 0 … most: the sum, over all sets of j experts other than e, of the
    products of their weights. [most + 1, E]

    The polynomial Π(1 + w x) of all experts is divided by 1 + w_e x. That subtracts, which costs
    digits where an expert is in most of the sets: for these, which are returned too, the polynomial
    of the others is multiplied out."""
    [sums_J] = _sums_of_products(weight_E[None], most)
    without_JE = np.ones((most + 1, len(weight_E)))
    with np.errstate(over="ignore", invalid="ignore"):
        for j in range(1, most + 1):
            without_JE[j] = sums_J[j] - weight_E * without_JE[j - 1]
        mostly_JE = weight_E * without_JE[:-1] > sums_J[1:, None] / 2
    heavy = np.flatnonzero(mostly_JE.any(0))
    if len(heavy):
        without_JE[:, heavy] = _sums_without(weight_E, heavy[:, None], most).T
    return without_JE, heavy


def _without_each_pair(weight_E: np.ndarray, k: int) -> np.ndarray:
    """For each two experts: the sum, over all sets of k − 2 other experts, of the products of their
    weights; as `_without_each`. [E, E], without meaning on the diagonal"""
    without_JE, heavy = _without_each(weight_E, k)
    without_EE, step = np.ones((len(weight_E), len(weight_E))), max(1, BLOCK // len(weight_E))
    with np.errstate(over="ignore", invalid="ignore"):
        for of in (slice(at, at + step) for at in range(0, len(weight_E), step)):
            rows_EE = without_EE[of]
            for sum_E in without_JE[1 : k - 1, of]:
                rows_EE *= -weight_E
                rows_EE += sum_E[:, None]
    if not len(heavy):
        return without_EE
    without_EE[:, heavy] = without_EE[heavy].T
    pairs_X2 = heavy[np.stack(np.triu_indices(len(heavy), 1), axis=1)]
    sums_X = _sums_without(weight_E, pairs_X2, k - 2)[:, -1]
    without_EE[pairs_X2[:, 0], pairs_X2[:, 1]] = without_EE[pairs_X2[:, 1], pairs_X2[:, 0]] = sums_X
    return without_EE


def _sums_without(weight_E: np.ndarray, left_out_XN: np.ndarray, most: int) -> np.ndarray:
    """`_sums_of_products` of the weights without those of N experts, for each row. [X, most + 1]"""
    weight_XE = np.tile(weight_E, (len(left_out_XN), 1))
    np.put_along_axis(weight_XE, left_out_XN, 0, axis=1)
    return _sums_of_products(weight_XE, most)


def _sums_of_products(weight_XE: np.ndarray, most: int) -> np.ndarray:
    """Elementary symmetric polynomials of the weights of each row: for j = 0 … most the sum, over
    all sets of j experts, of the products of their weights. They are the coefficients of
    Π(1 + w x), multiplied two by two: N polynomials are left. [X, most + 1]"""
    X, E = map(int, weight_XE.shape)
    sums_XJN = np.ones((X, 2, 1 << (E - 1).bit_length()))
    sums_XJN[:, 1, :E], sums_XJN[:, 1, E:] = weight_XE, 0
    while N := int(sums_XJN.shape[2]) // 2:
        even_XJN, odd_XJN, J = sums_XJN[..., ::2], sums_XJN[..., 1::2], int(sums_XJN.shape[1])
        sums_XJN = np.zeros((X, min(2 * J - 1, most + 1), N))
        for j in range(min(J, most + 1)):
            upper_XJN = sums_XJN[:, j : j + J]
            upper_XJN += even_XJN[:, j, None] * odd_XJN[:, : upper_XJN.shape[1]]
    return sums_XJN[..., 0]


@probability("transitions", ideal="k / E", axes="EN", source="arXiv:2401.08383")
def transition(next_EN: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """P(b chosen at the next MoE layer, given a chosen here), over all k·k pairs; a row sums to the
    next layer's k. NaN for an a that was never chosen."""
    return next_EN / nan_for_zero(load_E)[:, None]


@metric("transitions", column="lift", ideal=1.0, range="0 and up", axes="EN")
def transition_lift(next_EN: np.ndarray) -> np.ndarray:
    """The share of b among the choices that follow a ÷ its share among all choices of the next
    layer. 1 is chance: a says nothing about b."""
    share_EN = next_EN / nan_for_zero(next_EN.sum(1))[:, None]
    return share_EN / nan_for_zero(next_EN.sum(0) / nan_for_zero(np.asarray(next_EN.sum())))


@probability("repetition", column="", ideal="1 / E", axes="D", source="arXiv:2401.04088, table 5")
def first_choice(first_same_D: np.ndarray, pairs_D: np.ndarray) -> np.ndarray:
    """The share of tokens with the same first choice as the token before in the same sequence.
    Random choices: 1/E."""
    return first_same_D / nan_for_zero(pairs_D)


def first_choice_by_load(first_choice_DE: np.ndarray) -> np.ndarray:
    """P(two independent first choices of the same domain are the same) = Σ_e p_e²: repetition from
    uneven load alone. [D]"""
    share_DE = first_choice_DE / nan_for_zero(first_choice_DE.sum(1))[:, None]
    return (share_DE**2).sum(1)


def _without_diagonal(values_EE: np.ndarray, filler: float = np.nan) -> np.ndarray:
    values_EE = values_EE.astype(float)
    np.fill_diagonal(values_EE, filler)
    return values_EE

"""Which experts go together: in one decision, from a layer to the next, from a token to the next.

E experts of a router, N of the next MoE layer's, D domains, m tokens of a window. together_EE[a, b] counts the decisions in
which a and b were both chosen, together_EE[a, a] those in which a was. next_EN[a, b] counts the tokens for which a was chosen
here and b at the next MoE layer. All pairs of slots count, not only first choices.
"""

from __future__ import annotations

from math import comb

import numpy as np

from moe_inspect.analysis.balance import _positive
from moe_inspect.analysis.registry import metric
from moe_inspect.analysis.uncertainty import SEED

ROUNDS = 200  # of fitting: a dozen are enough but where an expert takes nearly every decision


@metric(
    table="coactivation",
    column="probability",
    ideal="(k - 1) / (E - 1)",
    unit="probability",
    range="0 to 1",
    axes="EE",
    source="arXiv:2409.02060, eq. 6",
)
def coactivation(together_EE: np.ndarray) -> np.ndarray:
    """P(b chosen, given a chosen) in one decision: N_ab / N_a over all pairs of slots; a row sums to k − 1. NaN on the
    diagonal, and for an a that was never chosen."""
    probability_EE = together_EE / _positive(np.diagonal(together_EE))[:, None]
    return _without_diagonal(probability_EE)


@metric(table="coactivation", column="lift", ideal=1.0, unit="ratio", range="0 and up", axes="EE")
def coactivation_lift(together_EE: np.ndarray) -> np.ndarray:
    """N_ab ÷ the N_ab that chance gives experts of these loads. 1 is chance; the plain P(b|a)/P(b) would be under 1 by chance,
    since a decision's experts are distinct. NaN on the diagonal and where chance gives none."""
    return _without_diagonal(together_EE / _positive(together_by_chance(together_EE)))


def together_by_chance(together_EE: np.ndarray) -> np.ndarray:
    """N_ab of decisions whose experts keep their loads and are otherwise picked by lot: w_a·w_b for a ≠ b (quasi-independence
    with an empty diagonal), fitted to the row sums. Exact for k = 2 and for even loads. [E, E], 0 on the diagonal."""
    observed_EE = together_EE * (1.0 - np.eye(len(together_EE)))
    row_E = observed_EE.sum(1)
    total = row_E.sum()
    if total <= 0:
        return np.zeros_like(observed_EE)
    w_E = row_E / np.sqrt(total)
    for _ in range(ROUNDS):
        fitted_E = w_E * (w_E.sum() - w_E)
        # the root of the correction: the whole of it swings between two states
        step_E = np.sqrt(np.divide(row_E, fitted_E, out=np.ones_like(row_E), where=fitted_E > 0))
        w_E = w_E * step_E
        if np.abs(step_E - 1).max() < 1e-9:
            break
    return _without_diagonal(np.outer(w_E, w_E), 0.0)


@metric(table="transitions", column="probability", ideal="k / E", unit="probability", range="0 to 1", axes="EN", source="arXiv:2401.08383")
def transition(next_EN: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """P(b chosen at the next MoE layer, given a chosen here), over all k·k pairs; a row sums to the next layer's k. NaN for an
    a that was never chosen."""
    return next_EN / _positive(load_E)[:, None]


@metric(table="transitions", column="lift", ideal=1.0, unit="ratio", range="0 and up", axes="EN")
def transition_lift(next_EN: np.ndarray) -> np.ndarray:
    """The share of b among what follows a ÷ its share among what follows anything. 1 is chance: a says nothing of b."""
    share_EN = next_EN / _positive(next_EN.sum(1))[:, None]
    return share_EN / _positive(next_EN.sum(0) / _positive(np.asarray(next_EN.sum())))


@metric(table="locality", ideal="1 / E", unit="ratio", range="1/E to 1", source="arXiv:2401.08383")
def next_accuracy(next_first_EN: np.ndarray) -> float:
    """How often the next MoE layer's first choice is the one that most often follows this layer's first choice: Σ_a max_b N_ab
    ÷ N. Read it beside its marginal (always the most frequent) and its null (what as many independent choices reach)."""
    return float(next_first_EN.max(1, initial=0).sum() / _positive(np.asarray(next_first_EN.sum())))


@metric(table="locality", ideal="1 / E", unit="ratio", range="1/E to 1", source="arXiv:2401.08383")
def next_accuracy_marginal(next_first_EN: np.ndarray) -> float:
    """How often the next MoE layer's first choice is its most frequent one: what can be predicted without looking."""
    return float(next_first_EN.sum(0).max(initial=0) / _positive(np.asarray(next_first_EN.sum())))


def next_accuracy_null(next_first_EN: np.ndarray, R: int = 5) -> float:
    """Mean `next_accuracy` of choices with these marginals that do not depend on each other: the maximum of each row is
    over the marginal's by luck alone where rows are few."""
    row_E, column_N = next_first_EN.sum(1), next_first_EN.sum(0)
    if not column_N.sum():
        return float("nan")
    rng = np.random.default_rng([SEED, *next_first_EN.shape])
    share_N = column_N / column_N.sum()
    return float(np.mean([next_accuracy(rng.multinomial(row_E, share_N)) for _ in range(R)]))


@metric(table="repetition", ideal="1 / E", unit="probability", range="0 to 1", axes="D", source="arXiv:2401.04088, table 5")
def first_choice(first_same_D: np.ndarray, pairs_D: np.ndarray) -> np.ndarray:
    """The share of tokens whose first choice is that of the token before, of the same sequence. Random choices: 1/E."""
    return first_same_D / _positive(pairs_D)


@metric(
    table="repetition", ideal="1 - C(E - k, k) / C(E, k)", unit="probability", range="0 to 1", axes="D", source="arXiv:2401.04088, table 5"
)
def any_choice(any_same_D: np.ndarray, pairs_D: np.ndarray) -> np.ndarray:
    """The share of tokens that share at least one expert with the token before, of the same sequence. Random choices:
    1 − C(E−k, k)/C(E, k)."""
    return any_same_D / _positive(pairs_D)


def any_choice_random(E: int, k: int) -> float:
    """P(two independent choices of k of E experts have one in common)."""
    return 1 - comb(E - k, k) / comb(E, k)


def first_choice_by_load(first_choice_DE: np.ndarray) -> np.ndarray:
    """P(two independent first choices of the same domain are the same) = Σ_e p_e²: what uneven load alone repeats. [D]"""
    share_DE = first_choice_DE / _positive(first_choice_DE.sum(1))[:, None]
    return (share_DE**2).sum(1)


@metric(table="locality", ideal="2 * k / (E + k)", unit="ratio", range="0 to 1; 1 for m = 1", source="arXiv:2505.16056")
def srp(windows_M: np.ndarray) -> float:
    """Segment routing best performance: how well a set of experts of its own can serve all m tokens of a window, as the best
    F-measure over thresholds α, 2Σ_{f≥α}f ÷ Σ(m·1[f≥α] + f). windows_M[f], f = 0 … m: how many (window, expert) have f of the
    window's m tokens at the expert. NaN without any."""
    return float(best_f(windows_M))


def best_f(windows_M: np.ndarray) -> np.ndarray:
    """`srp` of any number of histograms at once: [..., m+1] → [...]"""
    m = windows_M.shape[-1] - 1
    hits_M = np.arange(m + 1) * windows_M
    assigned = hits_M.sum(-1, keepdims=True)
    from_M, hit_M = (values[..., ::-1].cumsum(-1)[..., ::-1] for values in (windows_M, hits_M))  # [α]: pairs with f ≥ α
    return (2 * hit_M / _positive(m * from_M + assigned))[..., 1:].max(-1)


def srp_by_load(load_E: np.ndarray, tokens: float, m: int) -> float:
    """`srp` of tokens that choose independently, with these loads: f is binomial. NaN without tokens."""
    if tokens <= 0 or not load_E.any():
        return float("nan")
    chosen_E = np.clip(load_E / tokens, 0, 1)
    frequency_M = np.arange(m + 1)
    ways_M = np.array([float(comb(m, f)) for f in frequency_M])
    expected_M = (ways_M * chosen_E[:, None] ** frequency_M * (1 - chosen_E[:, None]) ** (m - frequency_M)).sum(0)
    return srp(expected_M)


def _without_diagonal(values_EE: np.ndarray, filler: float = np.nan) -> np.ndarray:
    values_EE = values_EE.astype(float)
    np.fill_diagonal(values_EE, filler)
    return values_EE

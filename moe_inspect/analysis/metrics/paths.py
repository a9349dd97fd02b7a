"""How many routes do tokens take? A path is what a token chose at one router after the other: its
first choices, or its sets of experts.

The entropy of the paths is a plug-in estimate, at most log₂ of the number of tokens: with many
routers almost every token has a path of its own, and it says nothing. So it comes for the routers
up to each one, beside the same with every router's choices shuffled among the tokens of each
document, whose bias is that of paths that follow no choice before. What a document has a taste for
at one router and at the next stays, and so is not taken for a connection of the two.

S tokens, N tokens that share their path with another, P distinct paths, G groups of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.metrics.chance import shuffled_within
from moe_inspect.analysis.metrics.registry import metric
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, SEED, student
from moe_inspect.later import pd

GROUPS = 20  # of the jackknife


@metric("paths", ideal="L * log(E, 2)", range="0 to log₂ of the number of tokens", unit="bits")
def path_entropy_bits(tokens_P: np.ndarray) -> float:
    """Entropy of the paths through the routers up to this one, by first choices. tokens: of each
    path. L routers whose choices say nothing of each other give L·log₂ E. NaN without tokens."""
    share_P = tokens_P / nan_for_zero(np.asarray(tokens_P.sum()))
    # not −0 where all take one path
    return 0.0 - float((share_P * np.log2(np.where(tokens_P > 0, share_P, 1))).sum())


@dataclass(frozen=True)
class Entropy:
    """Of the paths through the routers up to one: how many there are, their entropy in bits with
    its 95 % interval over documents, the same entropy with each router's choices shuffled within
    documents, and the sum of the entropies of the routers alone."""

    paths: int
    value: float
    low: float
    high: float
    shuffled: float
    independent: float


def entropies(
    choice_LS: Sequence[np.ndarray | None], document_S: np.ndarray, group_S: np.ndarray
) -> list[Entropy | None]:
    """Of the paths through the first router, the first two, and so on; None from the first router
    on whose choices are unknown (None). document_S, group_S: which document, and which group of
    documents, each token is of, −1 for no interval. choice_LS: whole numbers or hashes."""
    S, independent, found = len(group_S), 0.0, list[Entropy | None]()
    path, shuffled, tokens_G = Splitting(S), Splitting(S), np.bincount(group_S[group_S >= 0])
    value = shuffled_value = half = bias = float("nan")
    for r, choice_S in enumerate(choice_LS):
        if choice_S is None:
            return found + [None] * (len(choice_LS) - r)
        independent += path_entropy_bits(np.bincount(pd.factorize(choice_S)[0]))
        if path.split(choice_S[path.shared_N]) or not r:
            value = path_entropy_bits(path.tokens_P)
            half, bias = jackknife(path.tokens_P, path.of_N, group_S[path.shared_N], tokens_G)
        if len(shuffled.shared_N):
            order_S = shuffled_within(document_S, np.random.default_rng([SEED, r, S]))
            if shuffled.split(choice_S[order_S[shuffled.shared_N]]):
                shuffled_value = path_entropy_bits(shuffled.tokens_P)
        if not r:
            shuffled_value = independent
        # the plug-in estimate is too low on average
        low, high = np.clip([value - half, value + bias + half], 0, np.log2(S)).tolist()
        found.append(Entropy(len(path.tokens_P), value, low, high, shuffled_value, independent))
    return found


class Splitting:
    """The paths of tokens that pass one router after the other. tokens_P: of each path, in the
    order of their first tokens. shared_N: the tokens that share their path, of_N: which of the
    shared paths it is. Only these are looked at again: a path of one token stays one."""

    def __init__(self, S: int):
        self.shared_N, self.of_N = np.arange(S), np.zeros(S, np.int64)
        self._first_N, self._hash_N = np.zeros(S, np.int64), np.zeros(S, np.uint64)
        self._tokens_S = np.zeros(S, np.int64)  # of the path whose first token this is
        self._tokens_S[:1] = S

    @property
    def tokens_P(self) -> np.ndarray:
        return self._tokens_S[self._tokens_S > 0]

    def split(self, choice_N: np.ndarray) -> bool:
        """choice_N: what the tokens of shared_N chose at the next router. Whether any path parts
        there."""
        if (choice_N == choice_N[self._first_N]).all():
            return False
        hash_N = mixed(self._hash_N ^ mixed(choice_N))
        of_N, _ = pd.factorize(hash_N)  # by hashing, which is faster than to sort
        tokens_X = np.bincount(of_N)
        first_X = np.zeros(len(tokens_X), np.int64)
        first_X[of_N[::-1]] = np.arange(len(of_N))[::-1]
        self._tokens_S[self.shared_N] = 0
        self._tokens_S[self.shared_N[first_X]] = tokens_X
        shared_X = tokens_X > 1
        at_N = np.flatnonzero(shared_X[of_N])
        of_N, self.shared_N, self._hash_N = of_N[at_N], self.shared_N[at_N], hash_N[at_N]
        self.of_N = (np.cumsum(shared_X) - 1)[of_N]
        self._first_N = np.searchsorted(at_N, first_X[shared_X])[self.of_N]
        return True


def mixed(values: np.ndarray) -> np.ndarray:
    """A well-mixed 64-bit hash of each whole number: the finalizer of SplitMix64
    (doi:10.1145/2660193.2660195). uint64"""
    h = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def groups_of(document_S: np.ndarray, domain_S: np.ndarray) -> np.ndarray:
    """Which of GROUPS groups of documents each token is of: those of every domain are dealt out
    evenly. int64; −1 with fewer than FEWEST_DOCUMENTS documents."""
    pair_N, of_S = np.unique(np.stack([domain_S, document_S]), axis=1, return_inverse=True)
    N = pair_N.shape[1]
    if N < FEWEST_DOCUMENTS:
        return np.full(len(document_S), -1)
    return of_S.reshape(-1) % min(GROUPS, N)


def jackknife(
    tokens_P: np.ndarray, of_N: np.ndarray, group_N: np.ndarray, tokens_G: np.ndarray
) -> tuple[float, float]:
    """Half the 95 % interval of the entropy, by Student's t, and by how much the plug-in estimate
    is too low, 0 or more: from leaving out a group of documents at a time. of_N, group_N: which
    shared path and which group the tokens of shared paths are of; tokens_G: all of each group. NaN
    with fewer than two groups."""
    G, S = len(tokens_G), tokens_G.sum()
    if G < 2:
        return float("nan"), float("nan")
    within = np.bincount(of_N * G + group_N)
    cell = np.flatnonzero(within)
    whole, group, within = np.bincount(of_N)[cell // G], cell % G, within[cell]
    # Σ n log₂ n without the group differs only in the paths that the group takes; without the only
    # token of a path it does not
    less_G = np.bincount(group, _n_log2_n(whole) - _n_log2_n(whole - within), G)
    left_G, terms = S - tokens_G, _n_log2_n(tokens_P).sum()
    value_G = np.log2(left_G) - (terms - less_G) / left_G
    error = np.sqrt((G - 1) / G * ((value_G - value_G.mean()) ** 2).sum())
    bias = max((G - 1) * (np.log2(S) - terms / S - value_G.mean()), 0)
    return float(student(G) * error), float(bias)


def _n_log2_n(n: np.ndarray) -> np.ndarray:
    return n * np.log2(np.maximum(n, 1))

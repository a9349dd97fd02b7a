"""How many routes do tokens take? A path is what a token chose at one router after the other: its
first choices, or its sets of experts.

The entropy of the paths is a plug-in estimate, at most log₂ of the number of tokens: with many
routers almost every token has a path of its own, and it says nothing. So it comes for the routers
up to each one, beside the same with every router's choices shuffled among the tokens, whose bias is
that of paths that follow no choice before.

S tokens, P distinct paths, G groups of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.metrics.registry import metric
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, SEED

GROUPS = 20  # of the jackknife


@metric(
    table="paths", ideal="L * log(E, 2)", unit="bits", range="0 to log₂ of the number of tokens"
)
def path_entropy_bits(tokens_P: np.ndarray) -> float:
    """Entropy of the paths through the routers up to this one, by first choices. tokens: of each
    path. L routers whose choices say nothing of each other give L·log₂ E. NaN without tokens."""
    share_P = tokens_P / nan_for_zero(np.asarray(tokens_P.sum()))
    return float(-(share_P * np.log2(np.where(tokens_P > 0, share_P, 1))).sum())


@dataclass(frozen=True)
class Entropy:
    """Of the paths through the routers up to one: how many there are, their entropy in bits with
    its 95 % interval over documents, the same entropy with each router's choices shuffled, and the
    sum of the entropies of the routers alone."""

    paths: int
    value: float
    low: float
    high: float
    shuffled: float
    independent: float


def entropies(choice_LS: Sequence[np.ndarray | None], group_S: np.ndarray) -> list[Entropy | None]:
    """Of the paths through the first router, the first two, and so on; None from the first router
    on whose choices are unknown (None). group_S: which group of documents each token is of, −1 for
    no interval. choice_LS: whole numbers or hashes."""
    path_S = shuffled_S = np.zeros(len(group_S), np.uint64)
    independent, found = 0.0, list[Entropy | None]()
    for r, choice_S in enumerate(choice_LS):
        if choice_S is None:
            return found + [None] * (len(choice_LS) - r)
        rng = np.random.default_rng([SEED, r, len(group_S)])
        hash_S = mixed(choice_S)
        path_S = mixed(path_S ^ hash_S)
        shuffled_S = mixed(shuffled_S ^ rng.permutation(hash_S))
        independent += path_entropy_bits(_distinct(hash_S)[1])
        shuffled = path_entropy_bits(_distinct(shuffled_S)[1]) if r else independent
        of_S, tokens_P = _distinct(path_S)
        value = path_entropy_bits(tokens_P)
        half = half_width(tokens_P, of_S, group_S)
        low, high = np.clip([value - half, value + half], 0, np.log2(len(group_S))).tolist()
        found.append(Entropy(len(tokens_P), value, low, high, shuffled, independent))
    return found


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


def half_width(tokens_P: np.ndarray, path_of_S: np.ndarray, group_S: np.ndarray) -> float:
    """Half the 95 % interval of the entropy: from the jackknife that leaves out a group of
    documents at a time, by Student's t. NaN without groups."""
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    stdtrit: Any = special.stdtrit
    G = int(group_S.max(initial=-1)) + 1
    if G < 2:
        return float("nan")
    within = np.bincount(path_of_S * G + group_S, minlength=len(tokens_P) * G)
    cell = np.flatnonzero(within)
    whole, group, within = tokens_P[cell // G], cell % G, within[cell]
    # Σ n log₂ n without the group differs only in the paths that the group takes
    less_G = np.bincount(group, _n_log2_n(whole) - _n_log2_n(whole - within), G)
    left_G = len(group_S) - np.bincount(group_S, minlength=G)
    value_G = np.log2(left_G) - (_n_log2_n(tokens_P).sum() - less_G) / left_G
    error = np.sqrt((G - 1) / G * ((value_G - value_G.mean()) ** 2).sum())
    return float(stdtrit(G - 1, 0.975) * error)


def _distinct(values_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the distinct values each is, and how often each of those occurs. By hashing, which
    is faster than to sort."""
    of_S, _ = pd.factorize(values_S)
    return of_S, np.bincount(of_S)


def _n_log2_n(n: np.ndarray) -> np.ndarray:
    return n * np.log2(np.maximum(n, 1))

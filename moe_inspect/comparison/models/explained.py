"""How much of a router's first choice the text of a span explains: a share of its entropy, so
that models with different tokenizers and numbers of experts can be compared.

S spans, V texts, E experts, G groups of documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.metrics.specialization import token_mi_bits
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, SEED

FEWEST = 8  # occurrences of a text that is judged
MOST_TEXTS = 1_024  # the most frequent
SHUFFLES = 10
GROUPS = 10
STUDENT = 2.262  # two-sided 95 % at GROUPS − 1 degrees of freedom


@dataclass(frozen=True)
class Explained:
    """mi_bits: I(text; first choice), with null_bits for shuffled spans; entropy_bits: of the first
    choice, the most that can be explained. share: `adjusted` of these; share_without_G: the same
    without each group of documents, NaN with too few documents. counts_VE: int64, first choices by
    text."""

    mi_bits: float
    null_bits: float
    entropy_bits: float
    share: float
    share_without_G: np.ndarray
    counts_VE: np.ndarray


def judged_texts(text_S: np.ndarray) -> np.ndarray:
    """int64 [V]: the texts that occur often enough, the most frequent first."""
    count = np.bincount(text_S) if len(text_S) else np.zeros(0, np.int64)
    order = np.argsort(-count, kind="stable")[:MOST_TEXTS]
    return order[count[order] >= FEWEST]


def explained_by_text(
    text_S: np.ndarray, expert_S: np.ndarray, document_S: np.ndarray, V: int, E: int
) -> Explained:
    """text_S: int64, in 0…V − 1. expert_S: the first choice of each span, E where it has none."""
    known_S = expert_S < E
    text_S, expert_S, document_S = (x[known_S] for x in (text_S, expert_S, document_S))
    code_S = text_S * E + expert_S
    counts_VE = np.bincount(code_S, minlength=V * E).reshape(V, E)
    rng = np.random.default_rng([SEED, V, E])
    shuffled = [
        token_mi_bits(
            np.bincount(text_S * E + rng.permutation(expert_S), minlength=V * E).reshape(V, E)
        )
        for _ in range(SHUFFLES)
    ]
    null = float(np.mean(shuffled))
    share_without_G = np.full(GROUPS, np.nan)
    documents = np.unique(document_S)
    if len(documents) >= max(FEWEST_DOCUMENTS, GROUPS):
        group_S = np.searchsorted(documents, document_S) % GROUPS
        for g in range(GROUPS):
            of_g = np.bincount(code_S[group_S == g], minlength=V * E).reshape(V, E)
            share_without_G[g] = adjusted(*_information(counts_VE - of_g), null)
    mi, entropy = _information(counts_VE)
    return Explained(mi, null, entropy, adjusted(mi, entropy, null), share_without_G, counts_VE)


def _information(counts_VE: np.ndarray) -> tuple[float, float]:
    """I(text; first choice) and the entropy of the first choice, in bits."""
    load_E = counts_VE.sum(0)
    return token_mi_bits(counts_VE), token_mi_bits(np.diag(load_E))


def adjusted(bits: float, most: float, by_chance: float) -> float:
    """Information as a share of the most there is, both beyond chance: 0 is chance, 1 all. NaN
    where chance leaves nothing to tell."""
    return (bits - by_chance) / (most - by_chance) if most > by_chance else float("nan")


def jackknife_interval(value: float, left_out_G: np.ndarray) -> tuple[float, float]:
    """95 % interval of a value from the same without each group of documents."""
    error = np.sqrt((GROUPS - 1) / GROUPS * ((left_out_G - left_out_G.mean()) ** 2).sum())
    return float(value - STUDENT * error), float(value + STUDENT * error)

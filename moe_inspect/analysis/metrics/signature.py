"""Does routing tell what a text is about? A document's routing signature is the share of its
assignments that goes to each expert, of one router or of several side by side; the nearest other
signature guesses its domain.

S documents, D domains, E experts, R repetitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.metrics.balance import ratio
from moe_inspect.analysis.metrics.chance import shuffled_within
from moe_inspect.analysis.metrics.registry import metric
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, SEED, special

PERMUTATIONS = 200
LENGTHS = 2  # classes of length of documents, from each to its double
Z = 1.959964  # of 95 %
FEW_CASES = 2  # hit or missed: fewer than a normal distribution describes


@metric("signature", ideal="1 / D", range="0 to 1")
def signature_accuracy(hits_D: np.ndarray, documents_D: np.ndarray) -> float:
    """The share of the documents whose nearest other document, by the Euclidean distance of their
    routing signatures, is of their own domain. 1: routing tells the domain. NaN without
    documents."""
    return ratio(hits_D.sum(), documents_D.sum())


@dataclass(frozen=True)
class Accuracy:
    """signature_accuracy, its 95 % interval, and its mean and 99th percentile with the labels of
    documents of like length shuffled."""

    value: float
    low: float
    high: float
    null: float
    null_p99: float


def distances(load_SE: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of the signatures of one router; of a document that it sent
    nowhere the signature is 0. Those of routers add up to that of all. float64 [S, S]"""
    share_SE = load_SE / np.maximum(load_SE.sum(1, keepdims=True), 1)
    size_S = (share_SE**2).sum(1)
    return size_S[:, None] + size_S[None, :] - 2 * (share_SE @ share_SE.T)


def nearest(distance_SS: np.ndarray) -> np.ndarray:
    """The nearest other document of each; of several, the first. int64 [S]"""
    # what is equally far stays so whatever the order of its experts
    distance_SS = np.round(distance_SS, 12)
    np.fill_diagonal(distance_SS, np.inf)
    return distance_SS.argmin(1)


def accuracy(distance_SS: np.ndarray, domain_S: np.ndarray, shuffled_RS: np.ndarray) -> Accuracy:
    """shuffled_RS: the domains, `shuffled` R times. All NaN with fewer than two domains or than
    FEWEST_DOCUMENTS documents."""
    S, D = len(domain_S), int(domain_S.max(initial=-1)) + 1
    if S < FEWEST_DOCUMENTS or D < 2:
        return Accuracy(*[float("nan")] * 5)
    nearest_S = nearest(distance_SS)
    hit_S = domain_S[nearest_S] == domain_S
    value = signature_accuracy(np.bincount(domain_S[hit_S], minlength=D), np.bincount(domain_S))
    # two documents that are nearest to each other are hit or missed together: one case, not two
    mutual = float((nearest_S[nearest_S] == np.arange(S)).mean())
    low, high = wilson(value, S / (1 + mutual))
    null_R = (shuffled_RS[:, nearest_S] == shuffled_RS).mean(1)
    return Accuracy(value, low, high, float(null_R.mean()), float(np.quantile(null_R, 0.99)))


def shuffled(domain_S: np.ndarray, assignments_S: np.ndarray) -> np.ndarray:
    """The domains of documents, shuffled PERMUTATIONS times among those of like length: the nearest
    of all is often one of the longest, whose shares vary least, and where a domain has long
    documents, that tells nothing of it. int64 [R, S]"""
    length_S = np.floor(LENGTHS * np.log2(np.maximum(assignments_S, 1)))
    rng = np.random.default_rng([SEED, len(domain_S)])
    return np.stack([domain_S[shuffled_within(length_S, rng)] for _ in range(PERMUTATIONS)])


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n independent cases, also where it is 0 or 1 (Wilson 1927). The
    end beyond which a case or two lie is that of their Poisson distribution (Brown, Cai and
    DasGupta 2001)."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    hits, missed, poisson_low = share * n, (1 - share) * n, special("gammaincinv")
    if 0 < hits <= FEW_CASES:
        low = float(poisson_low(hits, 0.05)) / n
    if 0 < missed <= FEW_CASES:
        high = 1 - float(poisson_low(missed, 0.05)) / n
    return low, high


def accuracies(
    loads: Sequence[np.ndarray], domain_S: np.ndarray
) -> tuple[Accuracy, list[Accuracy]]:
    """By the signatures of all routers side by side, and by those of each. loads: [S, E] of each
    router."""
    shuffled_RS = shuffled(domain_S, np.sum([load_SE.sum(1) for load_SE in loads], axis=0))
    together_SS, each = np.zeros((len(domain_S), len(domain_S))), list[Accuracy]()
    for load_SE in loads:
        distance_SS = distances(load_SE)
        together_SS += distance_SS
        each.append(accuracy(distance_SS, domain_S, shuffled_RS))
    return accuracy(together_SS, domain_S, shuffled_RS), each

"""What is an expert worth? Super experts are those whose outputs hold the few very large
activations of a model. Expert-specialised fine-tuning (ESFT, arXiv:2407.01906) picks the experts to
train by their score in each domain.

L routers, E experts, D domains. A sample is a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.metrics.registry import metric

QUANTILE = 0.995
OF_LARGEST = 0.1
DEPTH = 0.75  # of the model's blocks, from the first
JUDGED = 32  # assignments (in a domain) from which an expert is judged on it


def super_experts(
    peak_LE: Sequence[np.ndarray], layer_L: np.ndarray, blocks: int
) -> list[np.ndarray]:
    """Which experts are super experts, bool [E] of each router: the largest |value| of their
    outputs is above the 99.5th percentile over all experts and above a tenth of the largest, and
    their layer is among the first three quarters of the model's `blocks`. peak_LE: float [E] of
    each router. arXiv:2507.23279."""
    every = np.concatenate(list(peak_LE))
    least = max(float(np.quantile(every, QUANTILE)), OF_LARGEST * float(every.max(initial=0)))
    early_L = layer_L < DEPTH * blocks
    return [(peak_E > least) & early for peak_E, early in zip(peak_LE, early_L, strict=True)]


SOURCE = "arXiv:2407.01906, eq."


@metric("esft", ideal="1 / E", range="0 to 1/k, sums to 1", axes="DE", source=f"{SOURCE} 7")
def token_score(assignments_DE: np.ndarray) -> np.ndarray:
    """The expert's share of a domain's assignments: where no slot is empty, the mean over its
    tokens of 1[expert chosen]/k, as the authors publish it. All tokens have equal weight. NaN for a
    domain without load."""
    return assignments_DE / nan_for_zero(assignments_DE.sum(1))[:, None]


@metric("esft", ideal="1 / E", range="0 and up", unit="weight", axes="DE", source=f"{SOURCE} 6")
def gate_score(weight_sum_DE: np.ndarray, tokens_D: np.ndarray) -> np.ndarray:
    """The mean over a domain's tokens of the expert's gate weight, not renormalised and 0 where it
    was not chosen, as the authors publish it. NaN without weights. 1/E is even where the weights of
    a token sum to 1."""
    return weight_sum_DE / nan_for_zero(tokens_D)[:, None]


@metric("esft", ideal="1 / E", range="0 to 1/k, sums to 1", axes="DE", source=f"{SOURCE} 7")
def token_score_by_sample(esft_token_DE: np.ndarray, samples_D: np.ndarray) -> np.ndarray:
    """The mean over a domain's samples of the mean over the sample's tokens of 1[expert chosen]/k:
    all samples have equal weight, however long, as the equation is written. Equal to token_score if
    all samples have the same length and no slot is empty."""
    return esft_token_DE / nan_for_zero(samples_D)[:, None]


@metric("esft", ideal="1 / E", range="0 and up", unit="weight", axes="DE", source=f"{SOURCE} 6")
def gate_score_by_sample(esft_gate_DE: np.ndarray, samples_D: np.ndarray) -> np.ndarray:
    """The mean over a domain's samples of the mean gate weight of the expert over the sample's
    tokens. NaN without weights."""
    return esft_gate_DE / nan_for_zero(samples_D)[:, None]

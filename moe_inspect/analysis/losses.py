"""Which experts serve tokens whose successor is hard to predict, beyond what the tokens themselves
say: their domain, phase and token id.

S tokens, N assignments of tokens to experts, C cells (tokens of one domain, phase and token id), E
experts, U clusters of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from moe_inspect.analysis.counting.samples import TokenLosses
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS

CLUSTERS = 1021  # of documents, at most
P99 = 2.575829  # standard deviations, on both sides
P95 = 1.959964


@dataclass(frozen=True)
class Explained:
    """The losses of tokens beside those of their cell. cell_S: the cell of each; count_C,
    variance_C: tokens of a cell, and the variance of their losses (of n − 1)."""

    loss_S: np.ndarray
    entropy_S: np.ndarray
    cell_S: np.ndarray
    unit_S: np.ndarray

    @staticmethod
    def of(losses: TokenLosses) -> Explained:
        key_S = losses.token_id_S.astype(np.int64) * len(losses.phases) + losses.phase_S
        key_S = key_S * len(losses.domains) + losses.domain_S
        _, cell_S = np.unique(key_S, return_inverse=True)
        _, document_S = np.unique(losses.document_S, return_inverse=True)
        return Explained(losses.loss_S, losses.entropy_S, cell_S, document_S % CLUSTERS)

    @cached_property
    def count_C(self) -> np.ndarray:
        return np.bincount(self.cell_S)

    @cached_property
    def residual_S(self) -> np.ndarray:
        """Loss − the mean loss of the cell."""
        mean_C = np.bincount(self.cell_S, self.loss_S) / self.count_C
        return self.loss_S - mean_C[self.cell_S]

    @cached_property
    def variance_C(self) -> np.ndarray:
        squares_C = np.bincount(self.cell_S, self.residual_S**2)
        return squares_C / np.maximum(self.count_C - 1, 1)


@dataclass(frozen=True)
class ExpertLosses:
    """Of each expert, [E]. `assignments`: those whose loss is known; mean_loss_nats,
    mean_entropy_nats: their means. `compared`: those of tokens whose cell has others.
    difference_nats: by how much these tokens are harder than their cell, on average; its 95 %
    interval over documents (linearised, clusters of documents as they are); and what 99 of 100
    shuffles of the losses within cells stay within, on both sides of 0."""

    assignments: np.ndarray
    mean_loss_nats: np.ndarray
    mean_entropy_nats: np.ndarray
    compared: np.ndarray
    difference_nats: np.ndarray
    difference_low: np.ndarray
    difference_high: np.ndarray
    difference_null_p99: np.ndarray


def by_expert(
    explained: Explained,
    slots: tuple[np.ndarray, ...],
    E: int,
    in_S: np.ndarray | None = None,
) -> ExpertLosses:
    """For one router. `slots`: the experts of each token, E where a slot routed nowhere. `in_S`:
    only these tokens; they must be whole cells."""
    token_N, expert_N = _assignments(slots, E, in_S)
    load_E = np.bincount(expert_N, minlength=E)

    def mean(values_S: np.ndarray) -> np.ndarray:
        return np.bincount(expert_N, values_S[token_N], E) / nan_for_zero(load_E)

    mean_loss_E, mean_entropy_E = mean(explained.loss_S), mean(explained.entropy_S)
    has_others_N = explained.count_C[explained.cell_S[token_N]] > 1
    token_N, expert_N = token_N[has_others_N], expert_N[has_others_N]
    compared_E = np.bincount(expert_N, minlength=E)
    of_E = nan_for_zero(compared_E)
    sum_E = np.bincount(expert_N, explained.residual_S[token_N], E)
    difference_E = sum_E / of_E
    half_E = P95 * _between_documents(explained, token_N, expert_N, difference_E, E) / of_E
    null_E = P99 * np.sqrt(_null_variance(explained, token_N, expert_N, E)) / of_E
    return ExpertLosses(
        load_E,
        mean_loss_E,
        mean_entropy_E,
        compared_E,
        difference_E,
        difference_E - half_E,
        difference_E + half_E,
        null_E,
    )


def most_of(experts: int) -> float:
    """How many standard deviations none of so many experts is off, in 99 of 100 shuffles."""
    return NormalDist().inv_cdf(1 - 0.005 / max(experts, 1))


def _assignments(
    slots: tuple[np.ndarray, ...], E: int, in_S: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token and expert of each assignment, [N] each."""
    tokens, experts = list[np.ndarray](), list[np.ndarray]()
    for slot_S in slots:
        there_S = slot_S < E
        token_N = np.flatnonzero(there_S if in_S is None else there_S & in_S)
        tokens.append(token_N)
        experts.append(slot_S[token_N].astype(np.int64))
    return np.concatenate(tokens), np.concatenate(experts)


def _null_variance(
    explained: Explained, token_N: np.ndarray, expert_N: np.ndarray, E: int
) -> np.ndarray:
    """The variance of each expert's sum of residuals where the tokens of a cell exchange their
    losses at random: Σ over cells a·(1 − a/n)·s², of a of its n tokens that go to the expert, drawn
    without putting back. float64 [E]"""
    key_N = explained.cell_S[token_N] * E + expert_N
    pairs, a = np.unique(key_N, return_counts=True)
    cell, expert = np.divmod(pairs, E)
    each = a * (1 - a / explained.count_C[cell]) * explained.variance_C[cell]
    # (an expert that a damaged decision names twice has a > n)
    return np.maximum(np.bincount(expert, each, E), 0)


def _between_documents(
    explained: Explained,
    token_N: np.ndarray,
    expert_N: np.ndarray,
    difference_E: np.ndarray,
    E: int,
) -> np.ndarray:
    """The standard error of each expert's sum of residuals, by how it varies between documents.
    NaN with fewer than FEWEST_DOCUMENTS of them. float64 [E]"""
    unit_N = explained.unit_S[token_N]
    U = int(unit_N.max(initial=-1)) + 1
    documents = len(np.unique(unit_N))
    if documents < FEWEST_DOCUMENTS:
        return np.full(E, np.nan)
    at_N = unit_N * E + expert_N
    sum_UE = np.bincount(at_N, explained.residual_S[token_N], U * E).reshape(U, E)
    compared_UE = np.bincount(at_N, minlength=U * E).reshape(U, E)
    beyond_UE = sum_UE - np.nan_to_num(difference_E) * compared_UE
    return np.sqrt((beyond_UE**2).sum(0) * documents / (documents - 1))

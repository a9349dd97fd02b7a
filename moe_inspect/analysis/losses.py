"""Which experts serve tokens whose successor is hard to predict, beyond what the tokens themselves
say: their domain, phase and token id.

S tokens, N assignments of tokens to experts, C cells (tokens of one domain, phase and token id), E
experts, U clusters of documents, B random signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.samples import SampledLosses
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE, random_signs

CLUSTERS = 1021  # of documents, at most
P99 = 2.575829  # standard deviations, on both sides


@dataclass(frozen=True)
class CellLosses:
    """The losses of tokens beside those of their cell. cell_S: the cell of each; count_C: tokens
    of a cell."""

    loss_S: np.ndarray
    entropy_S: np.ndarray
    cell_S: np.ndarray
    unit_S: np.ndarray

    @staticmethod
    def of(losses: SampledLosses) -> CellLosses:
        key_S = losses.token_id_S.astype(np.int64) * len(losses.phases) + losses.phase_S
        key_S = key_S * len(losses.domains) + losses.domain_S
        _, cell_S = np.unique(key_S, return_inverse=True)
        _, document_S = np.unique(losses.document_S, return_inverse=True)
        return CellLosses(losses.loss_S, losses.entropy_S, cell_S, document_S % CLUSTERS)

    @cached_property
    def count_C(self) -> np.ndarray:
        return np.bincount(self.cell_S)

    @cached_property
    def residual_S(self) -> np.ndarray:
        """Loss − the mean loss of the others of the cell; 0 where there are none."""
        mean_C = np.bincount(self.cell_S, self.loss_S) / self.count_C
        with_itself_S = self.loss_S - mean_C[self.cell_S]
        return with_itself_S * (self.count_C / np.maximum(self.count_C - 1, 1))[self.cell_S]

    @cached_property
    def residual_UC(self) -> Any:
        """The sum of the residuals of each document in each cell, a sparse matrix."""
        from scipy import sparse  # pyright: ignore[reportMissingTypeStubs]

        shape = int(self.unit_S.max(initial=-1)) + 1, len(self.count_C)
        of: Any = sparse.coo_array((self.residual_S, (self.unit_S, self.cell_S)), shape)
        return of.tocsr()

    def group(self, in_S: np.ndarray | None = None) -> Group:
        """All tokens, or those `in_S`, which must be whole cells."""
        of = self.residual_UC
        if in_S is not None:
            # not summed from these tokens: in another order the last bits would be others
            of = of.copy()
            is_in_C = np.zeros(len(self.count_C), bool)
            is_in_C[self.cell_S[in_S]] = True
            of.data *= is_in_C[of.indices]
            of.eliminate_zeros()
        return Group(in_S, of)


@dataclass(frozen=True)
class Group:
    """in_S: its tokens, None: all. residual_UC: the sum of their residuals of each document in each
    cell, a sparse matrix."""

    in_S: np.ndarray | None
    residual_UC: Any


@dataclass(frozen=True)
class ExpertLosses:
    """Of each expert, [E]. `assignments`: those whose loss is known; mean_loss_nats,
    mean_entropy_nats: their means. `compared`: those of tokens whose cell has others.
    difference_nats: by how much these tokens are harder than the others of their cell, on average;
    its 95 % interval over documents (linearised, clusters of documents as they are); what the
    difference stays within in 99 of 100 samples of such documents by chance, on both sides of 0;
    and the probability that chance gives any expert of any router as much (`add_p`). largest_B: by
    chance, the largest difference of all experts, in standard deviations."""

    assignments: np.ndarray
    mean_loss_nats: np.ndarray
    mean_entropy_nats: np.ndarray
    compared: np.ndarray
    difference_nats: np.ndarray
    difference_low: np.ndarray
    difference_high: np.ndarray
    difference_null_p99: np.ndarray
    difference_p: np.ndarray
    largest_B: np.ndarray = field(repr=False)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return {name: of for name, of in vars(self).items() if name != "largest_B"}


def by_expert(
    explained: CellLosses, slots: Sequence[np.ndarray], E: int, groups: Iterable[Group]
) -> Iterator[ExpertLosses]:
    """For one router, of each group. `slots`: the experts of each token, E where a slot routed
    nowhere."""
    from scipy import sparse  # pyright: ignore[reportMissingTypeStubs]

    expert_KS = np.stack(slots)
    there_KS = expert_KS < E
    token_N, expert_N = np.nonzero(there_KS)[1], expert_KS[there_KS].astype(np.int64)
    cell_N = explained.cell_S[token_N]
    has_others_N = explained.count_C[cell_N] > 1
    of_N = cell_N[has_others_N], expert_N[has_others_N]
    shape = len(explained.count_C), E
    # of each cell, the share of its tokens that goes to each expert
    share_CE: Any = sparse.coo_array((1 / explained.count_C[of_N[0]], of_N), shape).tocsr()
    for group in groups:
        in_N = slice(None) if group.in_S is None else group.in_S[token_N]
        by_cell_UE = group.residual_UC @ share_CE
        of_group = token_N[in_N], expert_N[in_N], has_others_N[in_N]
        yield _of_group(explained, *of_group, by_cell_UE, E)


def _of_group(
    explained: CellLosses,
    token_N: np.ndarray,
    expert_N: np.ndarray,
    has_others_N: np.ndarray,
    by_cell_UE: Any,
    E: int,
) -> ExpertLosses:
    load_E = np.bincount(expert_N, minlength=E)
    mean_loss_E, mean_entropy_E = (
        np.bincount(expert_N, values_S[token_N], E) / nan_for_zero(load_E)
        for values_S in (explained.loss_S, explained.entropy_S)
    )
    token_N, expert_N = token_N[has_others_N], expert_N[has_others_N]
    compared_E = np.bincount(expert_N, minlength=E)
    of_E = nan_for_zero(compared_E)
    sum_UE, compared_UE = _by_document(explained, token_N, expert_N, by_cell_UE)
    sum_E = np.bincount(expert_N, explained.residual_S[token_N], E)
    difference_E, documents = sum_E / of_E, len(sum_UE)
    known = np.where(documents >= unc.FEWEST_DOCUMENTS, 1.0, np.nan)
    beyond_UE = sum_UE - np.nan_to_num(difference_E) * compared_UE
    between_E = (beyond_UE**2).sum(0) * documents / max(documents - 1, 1)
    t = unc.student(unc.effective_documents(compared_UE.sum(1)))
    half_E = known * t * np.sqrt(between_E) / of_E
    sd_E = known * np.sqrt((sum_UE**2).sum(0))
    largest_B, there_E = np.full(1, np.nan), sd_E > 0
    if documents >= FEWEST_TO_JUDGE and sum_UE.any():
        scaled_UE = (sum_UE[:, there_E] / sd_E[there_E]).astype(np.float32)
        largest_B = np.abs(random_signs(documents) @ scaled_UE).max(1)
    return ExpertLosses(
        load_E,
        mean_loss_E,
        mean_entropy_E,
        compared_E,
        difference_E,
        difference_E - half_E,
        difference_E + half_E,
        P99 * sd_E / of_E,
        np.full(E, np.nan),
        largest_B,
    )


def add_p(of_L: Sequence[ExpertLosses]) -> None:
    """Fills difference_p: how often the largest difference of all experts of these routers, in its
    own standard deviations, is as large by chance."""
    known = [of for of in of_L if len(of.largest_B) > 1]
    if not known:
        return
    largest_B = np.sort(np.max([of.largest_B for of in known], axis=0))
    for of in known:
        standing_E = np.abs(of.difference_nats) * P99 / nan_for_zero(of.difference_null_p99)
        beyond_E = len(largest_B) - np.searchsorted(largest_B, standing_E - 1e-6)
        p_E = (1 + beyond_E) / (1 + len(largest_B))
        of.difference_p[:] = np.where(np.isnan(standing_E), np.nan, p_E)


def _by_document(
    explained: CellLosses, token_N: np.ndarray, expert_N: np.ndarray, by_cell_UE: Any
) -> tuple[np.ndarray, np.ndarray]:
    """What each document adds to the sum of an expert's residuals, and its assignments. A residual
    counts by how much more of the token than of its cell goes to the expert: the sum is the same,
    as those of a cell sum to 0, and what is hard of a whole document is not the expert's.
    [U, E] each, of the documents with such tokens. `by_cell_UE`: of every document, its residuals
    in each cell times the experts' shares of the cell."""
    units, E = by_cell_UE.shape
    there_U = np.bincount(explained.unit_S[token_N], minlength=units) > 0
    unit_N, U = (np.cumsum(there_U) - 1)[explained.unit_S[token_N]], int(there_U.sum())
    at_N = unit_N * E + expert_N
    sum_UE = np.bincount(at_N, explained.residual_S[token_N], U * E).reshape(U, E)
    sum_UE = sum_UE - by_cell_UE.toarray()[there_U]  # bincount of nothing is of integers
    return sum_UE, np.bincount(at_N, minlength=U * E).reshape(U, E)

"""What the tables of a router by token id come to: metrics, and the token ids of each expert.

V token ids, X those of them that are counted by document too, U units (clusters of documents), E
experts, D domains, N pairs of a token id and an expert.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moe_inspect.analysis.counting.router_counts import ByTokenId
from moe_inspect.analysis.counting.token_ids import TokenIds, TokenTables
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics.chance import shuffled_p
from moe_inspect.analysis.metrics.specialization import Expected

ROUNDING = np.float32(1e-6)


def by_token_id(tables: TokenTables, top: int) -> ByTokenId:
    """What the tables of a router come to. `top`: token ids per expert, 0 for all."""
    plan, listed, first = tables.plan, tables.plan.listed, tables.by_id.first
    any_VE, first_VE = tables.by_id.any.rows_XE, None if first is None else first.rows_XE
    judged = slice(None) if plan.judged is listed else listed.rows(plan.judged.ids_V)
    columns = _columns(tables, any_VE[judged], None if first_VE is None else first_VE[judged])
    expert_N, row_N = top_token_ids(any_VE, listed, top)
    return ByTokenId(
        columns,
        _expected(tables, any_VE),
        expert_N,
        listed.ids_V[row_N],
        any_VE[row_N, expert_N].astype(np.int64),
        None if first_VE is None else first_VE[row_N, expert_N].astype(np.int64),
        listed.occurrences_V[row_N],
    )


def _expected(tables: TokenTables, any_VE: np.ndarray) -> Expected | None:
    """What the token ids of the documents explain; None with one domain, or no ids frequent
    enough."""
    plan, D = tables.plan, len(tables.plan.domains)
    if not plan.tokens_XU.size:
        return None
    there_U = plan.tokens_XU.any(0)
    domain_U = np.repeat(np.arange(D), plan.clusters)[there_U]
    rows_X = plan.listed.rows(plan.in_units.ids_V)
    load_UE = tables.by_unit.any.rows_XE[there_U]
    return Expected.of(load_UE, plan.tokens_XU[:, there_U], any_VE[rows_X], domain_U)


def _columns(
    tables: TokenTables, any_VE: np.ndarray, first_VE: np.ndarray | None
) -> dict[str, float]:
    """The metrics of token ids, each beside its mean with the token ids shuffled."""
    occurrences_V = tables.plan.judged.occurrences_V
    shuffled_any = [shuffled.any.rows_XE for shuffled in tables.shuffled_ids]
    columns = {
        "token_mi_bits": sp.token_mi_bits(any_VE),
        "token_mi_null_bits": _mean(map(sp.token_mi_bits, shuffled_any)),
        "vocabulary_specialization_any": sp.vocabulary_specialization_any(any_VE, occurrences_V),
        "vocabulary_specialization_any_null": _mean(
            sp.vocabulary_specialization_any(s_VE, occurrences_V) for s_VE in shuffled_any
        ),
    }
    if first_VE is not None:
        columns["vocabulary_specialization"] = sp.vocabulary_specialization(first_VE)
        null_R = [
            sp.vocabulary_specialization(shuffled.first.rows_XE)
            for shuffled in tables.shuffled_ids
            if shuffled.first is not None
        ]
        columns["vocabulary_specialization_null"] = _mean(null_R)
        columns["vocabulary_specialization_p"] = shuffled_p(
            columns["vocabulary_specialization"], null_R, int(occurrences_V.sum())
        )
    return columns


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def top_token_ids(any_VE: np.ndarray, listed: TokenIds, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` token ids of each expert by the fraction of their occurrences that goes to it, then
    by count, then by id, highest first; 0: all that ever went there. Returns (expert, row), expert
    by expert."""
    (V, E), occurrences_V = any_VE.shape, listed.occurrences_V
    share_VE = any_VE.astype(np.float32) * (1 / occurrences_V).astype(np.float32)[:, None]
    least_E, blocks = np.float32(0), 8 * top
    if 0 < 2 * blocks < V:
        # of the largest shares of blocks of token ids, `top` are no less than the one at this rank
        highest_BE = share_VE[: V - V % blocks].reshape(blocks, -1, E).max(1)
        least_E = np.partition(highest_BE, -top, axis=0)[-top] * (1 - ROUNDING)
    row_N, expert_N = np.divmod(np.flatnonzero((share_VE >= least_E) & (any_VE > 0)), E)
    count_N = any_VE[row_N, expert_N]
    fraction_N = np.minimum(count_N / occurrences_V[row_N], 1)
    order_N = np.lexsort((-listed.ids_V[row_N], -count_N.astype(np.int64), -fraction_N, expert_N))
    row_N, expert_N = row_N[order_N], expert_N[order_N]
    rank_N = np.arange(len(expert_N)) - np.searchsorted(expert_N, expert_N)
    kept_N = rank_N < (top or V)
    return expert_N[kept_N], row_N[kept_N]

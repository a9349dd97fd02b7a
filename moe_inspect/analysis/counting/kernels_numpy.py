"""What the decisions of one router in one shard come to, in numpy: plain functions on arrays.

T tokens, K slots, E experts here, N experts of the next router, X rows (units, domains, windows …),
D domains, U units, S samples, P pairs of consecutive tokens. Decisions come as the reader has them,
an array per slot: unsigned [T], E where it routed nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Slots = tuple[np.ndarray, ...]
BLOCK = 2**22  # cells of a temporary table


def distinct(values_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values there are, ascending, and which of them each is: np.unique, by counting where they
    lie close together. int [X], [T]"""
    low = int(values_T.min(initial=0))
    if int(values_T.max(initial=0)) - low > 4 * len(values_T):
        return np.unique(values_T, return_inverse=True)
    offset_T = values_T - low
    there = np.bincount(offset_T) > 0
    return np.flatnonzero(there) + low, (np.cumsum(there) - 1)[offset_T]


@dataclass(frozen=True)
class Order:
    """How tokens follow each other within their sequences: by_T sorts them by (document, sequence,
    position), `follows_T` says, in that order, whether a token's position is the next after the one
    before it in the same sequence."""

    by_T: np.ndarray
    follows_T: np.ndarray


def order_of(document_T: np.ndarray, sequence_T: np.ndarray, position_T: np.ndarray) -> Order:
    """The steps of a generated sequence are in other batches than its prompt, so neighbours are not
    found by token order."""
    by_T, d, s, p = np.arange(len(document_T)), document_T, sequence_T, position_T
    same_T = (d[1:] == d[:-1]) & (s[1:] == s[:-1])
    later_T = (d[1:] > d[:-1]) | (d[1:] == d[:-1]) & (s[1:] > s[:-1]) | same_T & (p[1:] > p[:-1])
    if not later_T.all():
        by_T = np.lexsort((p, s, d))
        d, s, p = d[by_T], s[by_T], p[by_T]
    same_T = np.r_[False, (d[1:] == d[:-1]) & (s[1:] == s[:-1])][: len(d)]
    follows_T = same_T & np.r_[False, p[1:] == p[:-1] + 1][: len(p)]
    return Order(by_T, follows_T)


@dataclass(frozen=True)
class TokenRows:
    """The row of each token of a shard in the tables by unit, domain, batch and window, and how
    many rows each table has; how tokens follow each other, where that was asked for."""

    unit_T: np.ndarray
    domain_T: np.ndarray
    batch_T: np.ndarray
    window_T: np.ndarray
    U: int
    D: int
    B: int
    W: int
    order: Order | None = None

    @cached_property
    def tokens_B(self) -> np.ndarray:
        return np.bincount(self.batch_T, minlength=self.B)

    @cached_property
    def tokens_W(self) -> np.ndarray:
        return np.bincount(self.window_T, minlength=self.W)

    @cached_property
    def pairs_U(self) -> np.ndarray:
        """Pairs of consecutive tokens, by the unit of the second (which is that of the first)."""
        assert self.order is not None
        return np.bincount(self.unit_T[self.order.by_T[self.order.follows_T]], minlength=self.U)


def loads(
    slots: Slots, token_rows: TokenRows, E: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Assignments by unit, first choices by domain, assignments by batch and by window. int64 [U,
    E], [D, E], [B, E], [W, E]"""
    of = token_rows
    return (
        load(of.unit_T, slots, of.U, E),
        load(of.domain_T, slots[:1], of.D, E),
        load(of.batch_T, slots, of.B, E),
        load(of.window_T, slots, of.W, E),
    )


def load(row_T: np.ndarray, slots: Slots, X: int, E: int) -> np.ndarray:
    """Assignments of each expert by row. int64 [X, E]"""
    return np.bincount(_cells(row_T, slots, E), minlength=X * (E + 1)).reshape(X, E + 1)[:, :E]


def weight_sum(row_T: np.ndarray, slots: Slots, weights: Slots, X: int, E: int) -> np.ndarray:
    """Weights of each expert's assignments by row. float64 [X, E]"""
    cells, size = _cells(row_T, slots, E), X * (E + 1)
    return np.bincount(cells, np.concatenate(weights), size).reshape(X, E + 1)[:, :E]


def _cells(row_T: np.ndarray, slots: Slots, E: int) -> np.ndarray:
    """row · (E + 1) + expert, slot by slot: the last column takes what routed nowhere."""
    first_T = row_T.astype(np.int64) * (E + 1)
    # the narrower, the faster
    narrow = np.min_scalar_type(int(first_T.max(initial=0)) + E)
    return (first_T.astype(narrow) + np.stack(slots)).reshape(-1)


def sorted_rows(row_T: np.ndarray, X: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in the order of their rows in a table of X rows, so that a row stays in the nearest
    cache; those of row −1 are left out. The tokens, and the row of each: uint32 [N], twice"""
    # numpy sorts 16 bits by radix
    key_T = (row_T + 1).astype(np.uint16) if X < 2**16 else row_T
    by_N = np.argsort(key_T, kind="stable")[int((row_T < 0).sum()) :]
    return by_N.astype(np.uint32), row_T[by_N].astype(np.uint32)


@dataclass(frozen=True)
class Visits:
    """Tokens in the order of their rows in a table: `by_N` which they are, row_N the row of each.
    uint32"""

    by_N: np.ndarray
    row_N: np.ndarray


def accumulate(
    any_XE: np.ndarray, first_XE: np.ndarray | None, visits: Visits, ids_TK: np.ndarray
) -> None:
    """Adds the assignments of tokens to their rows of a table, in place, and their first choices to
    those of another (None: not counted). Unsigned integers [X, E + 1]: the last column takes
    what routed nowhere."""
    ids_NK = ids_TK[visits.by_N]
    _add_cells(any_XE, visits.row_N[:, None], ids_NK)
    if first_XE is not None:
        _add_cells(first_XE, visits.row_N, ids_NK[:, 0])


def _add_cells(table_XE: np.ndarray, row: np.ndarray, ids: np.ndarray) -> None:
    cell = (row.astype(np.int64) * table_XE.shape[1] + ids).reshape(-1)
    flat = table_XE.reshape(-1)
    if len(flat) <= 2 * len(cell):
        flat += np.bincount(cell, minlength=len(flat)).astype(flat.dtype)
    else:  # a table larger than what is added to it is not gone through
        np.add.at(flat, cell, flat.dtype.type(1))


def transitions(slots: Slots, next_slots: Slots, E: int, N: int) -> np.ndarray:
    """How often a token chose expert e here and expert n at the next router: all pairs of slots.
    int64 [E, N]"""
    total = np.zeros((E + 1) * (N + 1), np.int64)
    for here_T in slots:
        for there_T in next_slots:
            total += np.bincount(here_T.astype(np.int64) * (N + 1) + there_T, minlength=len(total))
    return total.reshape(E + 1, N + 1)[:E, :N]


def by_slot(slots: Slots, E: int) -> np.ndarray:
    """Pairs of experts of one decision: that of the earlier slot by that of the later. int64 [E,
    E]"""
    parts = (transitions((slot_T,), slots[j:], E, E) for j, slot_T in enumerate(slots, 1))
    return sum(parts, np.zeros((E, E), np.int64))


def repetition(
    slots: Slots, token_rows: TokenRows, E: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By unit, of the pairs of consecutive tokens: the pairs with the same first choice, the
    experts that both tokens chose, and the assignments of both tokens. int64 [U] each"""
    assert token_rows.order is not None
    by_T, after = token_rows.order.by_T, np.flatnonzero(token_rows.order.follows_T)
    ids_TK = np.stack(slots).T[by_T]
    before_PK, after_PK = ids_TK[after - 1], ids_TK[after]
    first_P = (before_PK[:, 0] == after_PK[:, 0]) & (after_PK[:, 0] < E)
    shared_P = np.zeros(len(after), np.int64)
    for slot_P in before_PK.T:
        shared_P += ((slot_P[:, None] == after_PK) & (slot_P < E)[:, None]).any(1)
    chosen_P = (before_PK < E).sum(1) + (after_PK < E).sum(1)
    unit_P, found = token_rows.unit_T[by_T[after]], np.zeros((3, token_rows.U), np.int64)
    for total_U, values_P in zip(found, (first_P, shared_P, chosen_P), strict=True):
        np.add.at(total_U, unit_P, values_P)
    return found[0], found[1], found[2]


def weight_confidence(weights: Slots) -> dict[str, float]:
    """Sums of what the k weights alone say of the router's confidence; decisions without any weight
    are left out."""
    weights_TK = np.stack(weights).T.astype(float)
    mass_T = weights_TK.sum(1)
    share_TK = np.sort(weights_TK[mass_T > 0] / mass_T[mass_T > 0, None], axis=1)[:, ::-1]
    second_T = share_TK[:, 1] if share_TK.shape[1] > 1 else 0
    plogp_TK = share_TK * np.log(np.where(share_TK > 0, share_TK, 1))
    return {
        "weight_decisions": int((mass_T > 0).sum()),
        "weight_entropy_sum": float(-plogp_TK.sum()),
        "weight_margin_sum": float((share_TK[:, 0] - second_T).sum()),
        "weight_mass_sum": float(mass_T.sum()),
    }


def logit_confidence(logits_TE: np.ndarray, k: int, scoring: str) -> dict[str, float | np.ndarray]:
    """Sums of what the logits say of the router's confidence and of its losses (fields of
    RouterCounts). A decision with a NaN or +inf is left out; −inf is an expert masked away, read as
    the lowest float16."""
    lowest = float(np.finfo(np.float16).min)
    logits_TE = logits_TE.astype(np.float64)
    logits_TE = np.maximum(logits_TE[(logits_TE < np.inf).all(1)], lowest)
    T, E = logits_TE.shape
    top_TE = logits_TE.max(1, keepdims=True)
    exp_TE = np.exp(logits_TE - top_TE)
    logsumexp_T = top_TE[:, 0] + np.log(exp_TE.sum(1))
    score_TE = 1 / (1 + np.exp(-logits_TE)) if scoring == "sigmoid" else exp_TE
    total_T1 = score_TE.sum(1, keepdims=True)
    p_TE = np.divide(score_TE, total_T1, out=np.full_like(score_TE, 1 / E), where=total_T1 > 0)
    ranked_TE, ranked_p_TE = np.sort(logits_TE, axis=1)[:, ::-1], np.sort(p_TE, axis=1)[:, ::-1]
    nan = float("nan")
    boundary_T = ranked_TE[:, k - 1] - ranked_TE[:, k] if k < E else None
    return {
        "logit_decisions": T,
        "probability_sum_E": p_TE.sum(0),
        "z_sum": float((logsumexp_T**2).sum()),
        "entropy_sum": float(-(p_TE * np.log(np.where(p_TE > 0, p_TE, 1))).sum()),
        "top1_margin_sum": float((ranked_TE[:, 0] - ranked_TE[:, 1]).sum()) if E > 1 else nan,
        "boundary_margin_sum": float(boundary_T.sum()) if boundary_T is not None else nan,
        "topk_mass_sum": float(ranked_p_TE[:, :k].sum()),
        "ties": int((boundary_T == 0).sum()) if boundary_T is not None else 0,
    }

"""Counts of the decisions of one router in one shard: plain functions on arrays.

T tokens, K slots, E experts here, N experts of the next router, X rows (units, domains, windows …),
D domains, U units, S samples, P pairs of consecutive tokens. Decisions come as the reader has them,
an array per slot: unsigned [T], E where it routed nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

Slots = tuple[np.ndarray, ...]
TINY = float(np.finfo(np.float32).tiny)  # so that 0 times its logarithm is 0


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
    """Rows of the tokens of a shard in the tables by unit, domain and batch, and the number of rows
    of each table. If they are asked for: the rows in the tables by window and by unit of the
    tokens whose ids are counted by unit (−1 for others), and how tokens follow each other."""

    unit_T: np.ndarray
    domain_T: np.ndarray
    batch_T: np.ndarray
    U: int
    D: int
    B: int
    window_T: np.ndarray | None = None
    W: int = 0
    id_unit_T: np.ndarray | None = None
    id_units: int = 0
    order: Order | None = None

    @cached_property
    def tokens_B(self) -> np.ndarray:
        return np.bincount(self.batch_T, minlength=self.B)

    @cached_property
    def pairs_U(self) -> np.ndarray:
        """Pairs of consecutive tokens, by the unit of the second (which is that of the first)."""
        assert self.order is not None
        return np.bincount(self.unit_T[self.order.by_T[self.order.follows_T]], minlength=self.U)

    @cached_property
    def divisions(self) -> dict[str, tuple[np.ndarray, int]]:
        """Rows of the tokens and number of rows of each table of loads."""
        tables = {
            "unit": (self.unit_T, self.U),
            "batch": (self.batch_T, self.B),
            "window": (self.window_T, self.W),
            "id_unit": (self.id_unit_T, self.id_units),
        }
        return {name: (row_T, X) for name, (row_T, X) in tables.items() if row_T is not None}

    @cached_property
    def groups(self) -> tuple[np.ndarray, int, dict[str, GroupRows]]:
        """Groups of tokens that share their rows in all tables of loads: the group of each token,
        the number of groups, and the rows of the groups in each table."""
        groups, group_T = 0, np.zeros(len(self.unit_T), np.int64)
        for row_T, X in self.divisions.values():
            key_G, group_T = distinct(group_T * (X + 1) + row_T + 1)
            groups = len(key_G)
        rows = dict[str, GroupRows]()
        for name, (row_T, _) in self.divisions.items():
            row_G = np.zeros(groups, np.int64)
            row_G[group_T] = row_T
            by_G = np.argsort(row_G, kind="stable")
            rows[name] = GroupRows(by_G, *np.unique(row_G[by_G], return_index=True))
        return group_T, groups, rows

    def loads(self, slots: Slots, E: int) -> dict[str, np.ndarray]:
        """Assignments of each expert by row of each table. They are counted by group, and the
        groups added up if they are few: adding takes several times as long as counting. int64
        [X, E]"""
        group_T, groups, rows = self.groups
        if 8 * groups * E > len(group_T) * len(slots):
            return {name: load(row_T, slots, X, E) for name, (row_T, X) in self.divisions.items()}
        load_GE = load(group_T, slots, groups, E)
        return {name: rows[name].sums(load_GE, X) for name, (_, X) in self.divisions.items()}


@dataclass(frozen=True)
class GroupRows:
    """Groups in the order of their rows in a table, the rows that have any, and the place of the
    first group of each of them."""

    by_G: np.ndarray
    row_R: np.ndarray
    first_R: np.ndarray

    def sums(self, load_GE: np.ndarray, X: int) -> np.ndarray:
        """Loads of the groups, added up by row; row −1 is left out. int64 [X, E]"""
        total_XE = np.zeros((X + 1, load_GE.shape[1]), np.int64)
        total_XE[self.row_R] = np.add.reduceat(load_GE[self.by_G], self.first_R, axis=0)
        return total_XE[:X]


def add_cells(total_XE: np.ndarray, row_T: np.ndarray, slots: Slots) -> None:
    """Add 1 to the cell (row, expert) of a table for each assignment, in place. Row −1 is the last
    row. The last column takes the slots that routed nowhere."""
    first_T = row_T.astype(np.intp, copy=False) * total_XE.shape[1]
    # np.add.at is fast only if indices are intp, and 1 is of the type of the table
    flat, one = total_XE.reshape(-1), total_XE.dtype.type(1)
    for slot_T in slots:
        np.add.at(flat, first_T + slot_T, one)


def load(row_T: np.ndarray, slots: Slots, X: int, E: int) -> np.ndarray:
    """Assignments of each expert by row; row −1 is left out. int64 [X, E]"""
    total_XE = np.zeros((X + 1, E + 1), np.int64)
    add_cells(total_XE, row_T, slots)
    return total_XE[:X, :E]


def weight_sum(row_T: np.ndarray, slots: Slots, weights: Slots, X: int, E: int) -> np.ndarray:
    """Weights of each expert's assignments by row. float64 [X, E]"""
    first_T, total = row_T * (E + 1), np.zeros(X * (E + 1))
    for slot_T, weight_T in zip(slots, weights, strict=True):
        total += np.bincount(first_T + slot_T, weight_T, len(total))
    return total.reshape(X, E + 1)[:, :E]


def transitions(slots: Slots, next_slots: Slots, E: int, N: int) -> np.ndarray:
    """Tokens that chose expert e here and expert n at the next router: all pairs of slots. uint32
    [E, N]"""
    total_EN = np.zeros((E + 1, N + 1), np.uint32)  # narrow, so that it stays in the cache
    next_slots = tuple(slot_T.astype(np.intp) for slot_T in next_slots)  # converted only once
    for slot_T in slots:
        add_cells(total_EN, slot_T, next_slots)
    return total_EN[:E, :N]


def by_slot(slots: Slots, E: int) -> np.ndarray:
    """Pairs of experts of one decision: that of the earlier slot by that of the later. uint32 [E,
    E]"""
    total_EE = np.zeros((E + 1, E + 1), np.uint32)
    slots = tuple(slot_T.astype(np.intp) for slot_T in slots)
    for j, slot_T in enumerate(slots, 1):
        add_cells(total_EE, slot_T, slots[j:])
    return total_EE[:E, :E]


def repetition(
    slots: Slots, token_rows: TokenRows, E: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By unit, of the pairs of consecutive tokens: the pairs with the same first choice, the
    experts that both tokens chose, and the assignments of both tokens. int64 [U] each"""
    assert token_rows.order is not None
    by_T, second = token_rows.order.by_T, np.flatnonzero(token_rows.order.follows_T)
    before_P, after_P = by_T[second - 1], by_T[second]
    before, after = ([slot_T[at_P] for slot_T in slots] for at_P in (before_P, after_P))
    first_P = (before[0] == after[0]) & (after[0] < E)
    # 8 bits hold no more than 255 slots
    shared_P = np.zeros(len(second), np.uint8 if len(slots) < 128 else np.uint16)
    chosen_P = shared_P.copy()
    for mine_P, other_P in zip(before, after, strict=True):
        common_P = np.zeros(len(second), bool)
        for any_P in after:
            common_P |= mine_P == any_P
        shared_P += common_P & (mine_P < E)
        chosen_P += mine_P < E
        chosen_P += other_P < E
    unit_P, U = token_rows.unit_T[after_P], token_rows.U
    first_U, shared_U, chosen_U = (
        np.bincount(unit_P, values_P, U).astype(np.int64)
        for values_P in (first_P, shared_P, chosen_P)
    )
    return first_U, shared_U, chosen_U


def weight_confidence(weights: Slots) -> dict[str, float]:
    """Sums over decisions of the router's confidence, from its k weights alone. Decisions without
    any weight are left out."""
    if any((earlier_T < later_T).any() for earlier_T, later_T in pairwise(weights)):
        weights = tuple(np.sort(weights, axis=0)[::-1])
    mass_T, positive_T, plogp_T = np.zeros((3, len(weights[0])))
    for slot_T in weights:
        weight_T = slot_T.astype(float)
        mass_T += weight_T
        weight_T = np.maximum(weight_T, 0)  # one below 0, of an import, has no entropy
        positive_T += weight_T
        plogp_T += weight_T * np.log(weight_T + TINY)
    some = mass_T > 0
    mass_T, positive_T, plogp_T = mass_T[some], positive_T[some], plogp_T[some]
    margin_T = weights[0][some].astype(float)
    if len(weights) > 1:
        margin_T -= weights[1][some]
    return {
        "weight_decisions": len(mass_T),
        "weight_entropy_sum": float(
            (positive_T / mass_T * np.log(mass_T) - plogp_T / mass_T).sum()
        ),
        "weight_margin_sum": float((margin_T / mass_T).sum()),
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

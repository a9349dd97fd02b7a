"""The loops over every assignment, in NumPy: used where a trace is too short to load numba for, and
the references that kernels_numba.py is tested against. Same names, arguments and results.

T tokens, K slots, E experts, G groups (of a placement: GPUs or nodes), P positions, B batch sizes,
W words of 64 experts (of a placement: windows).
"""

from __future__ import annotations

import numpy as np

from moe_inspect.trace.runs import run_edges

NOWHERE = 255  # level of a slot that routed nowhere
CHUNK = 16_384  # tokens at a time


def queue(
    ids_KT: np.ndarray,
    start_G: np.ndarray,
    of_G: np.ndarray,
    level_SC: np.ndarray,
    visit_N: np.ndarray,
    by_token: bool,
    load_GE: np.ndarray,
    level_KT: np.ndarray,
) -> None:
    """How many assignments are ahead of each in the queue of its expert and group. ids_KT:
    experts, −1 for none. start_G: the first token of each group, and the end. of_G: the row of
    level_SC for each group. visit_N: indices into the flat ids_KT in the order of service; where
    empty, token after token (`by_token`) or slot after slot. Adds to load_GE; level_KT becomes how
    many of the capacity factors drop each assignment, NOWHERE where there is none."""
    K, T = ids_KT.shape
    E = load_GE.shape[1]
    group_T = np.repeat(np.arange(len(start_G) - 1), np.diff(start_G))
    if not len(visit_N):
        flat = np.arange(K * T).reshape(K, T)
        visit_N = (
            flat.T.ravel()
            if by_token
            else flat.ravel()[np.argsort(np.tile(group_T, K), kind="stable")]
        )
    visit_N = visit_N[ids_KT.ravel()[visit_N] >= 0]
    group_N = group_T[visit_N % max(T, 1)]
    queue_N = group_N * E + ids_KT.ravel()[visit_N]
    order_N = np.argsort(queue_N, kind="stable")
    start = run_edges(queue_N[order_N])
    ahead_N = np.empty(len(queue_N), np.int64)
    ahead_N[order_N] = np.arange(len(queue_N)) - np.repeat(start[:-1], np.diff(start))
    load_GE += np.bincount(queue_N, minlength=load_GE.size).reshape(load_GE.shape).astype(np.int32)
    level_KT[:] = NOWHERE
    level_KT.reshape(-1)[visit_N] = level_SC[
        of_G[group_N], np.minimum(ahead_N, level_SC.shape[1] - 1)
    ]


def fill_steps(
    ids_KT: np.ndarray,
    position_T: np.ndarray,
    batch_B: np.ndarray,
    there_BPW: np.ndarray,
    tokens_BP: np.ndarray,
    steps_B: np.ndarray,
    distinct_B: np.ndarray,
    load_E: np.ndarray,
) -> None:
    """Adds tokens to the decode steps of their positions. A step of B tokens is full: it is counted
    and the next begins. ids_KT: experts, −1 for none; batch_B: the batch sizes B. The last five
    arrays change in place: there_BPW, the experts of the steps that are filling up, as bits;
    tokens_BP, their tokens; steps_B and distinct_B, full steps and the sum of their distinct
    experts; load_E."""
    T, E, W = len(position_T), len(load_E), there_BPW.shape[2]
    load_E += np.bincount(ids_KT[ids_KT >= 0], minlength=E)
    order_T = np.argsort(position_T, kind="stable")
    sorted_T = position_T[order_T]
    index_T = np.arange(T) - np.searchsorted(sorted_T, sorted_T)
    ids_KT = ids_KT[:, order_T]
    for b, B in enumerate(batch_B.tolist()):
        nth_T = index_T + tokens_BP[b, sorted_T]
        step_T = nth_T // B  # 0: the one that was still filling up
        key_T = np.cumsum(np.r_[0, (np.diff(sorted_T) != 0) | (np.diff(step_T) != 0)])
        there = np.zeros((key_T[-1] + 1, E), bool)
        first = np.flatnonzero(np.r_[True, np.diff(key_T) > 0])
        position, step = sorted_T[first], step_T[first]
        begun = step == 0
        there[begun] = np.unpackbits(
            there_BPW[b, position[begun]].view(np.uint8), axis=1, count=E, bitorder="little"
        )
        routed_KT = ids_KT >= 0
        there[np.broadcast_to(key_T, ids_KT.shape)[routed_KT], ids_KT[routed_KT]] = True
        last = np.r_[first[1:], T] - 1
        full = (nth_T[last] + 1) % B == 0
        steps_B[b] += int(full.sum())
        distinct_B[b] += int(there[full].sum())
        tokens_BP[b] = (tokens_BP[b] + np.bincount(position_T, minlength=tokens_BP.shape[1])) % B
        there_BPW[b, position[full]] = 0
        filling = np.pad(there[~full], ((0, 0), (0, 64 * W - E)))
        there_BPW[b, position[~full]] = np.packbits(filling, axis=1, bitorder="little").view(
            np.uint64
        )


def serve_in_turn(order_TE: np.ndarray, k: int, capacity: int) -> np.ndarray:
    """Token by token, each takes its k best experts that have room. order_TE: each token's experts,
    best first; `capacity`: tokens that an expert takes. kernels_numba.py compiles this source.
    bool [T, E]"""
    T, E = order_TE.shape
    left_E = np.full(E, capacity)
    chosen_TE = np.zeros((T, E), np.bool_)
    for t in range(T):
        found = 0
        for i in range(E):
            e = order_TE[t, i]
            if left_E[e] > 0:
                left_E[e] -= 1
                chosen_TE[t, e] = True
                found += 1
                if found == k:
                    break
    return chosen_TE


def reached(ids_KT: np.ndarray, share_EG: np.ndarray) -> float:
    """The sum over decisions of the GPUs each is expected to reach: Σ_t Σ_g 1 − Π_k (1 − share).
    ids_KT: experts, −1 for none; share_EG: of each expert's load, by GPU."""
    # the last row: −1, a slot that routed nowhere
    miss_EG = np.vstack([1 - share_EG, np.ones(share_EG.shape[1])])
    total = 0.0
    for start in range(0, ids_KT.shape[1], CHUNK):
        total += float((1 - miss_EG[ids_KT[:, start : start + CHUNK]].prod(0)).sum())
    return total


def count_windows(ids_KT: np.ndarray, window_T: np.ndarray, load_WE: np.ndarray) -> None:
    """Adds the assignments of each window to load_WE. ids_KT: experts, −1 for none."""
    W, E = load_WE.shape
    cell_N = (window_T * E + ids_KT)[ids_KT >= 0]
    load_WE += np.bincount(cell_N, minlength=W * E).reshape(W, E)

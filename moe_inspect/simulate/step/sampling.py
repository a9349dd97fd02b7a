"""Steps of N tokens, drawn from a trace: which tokens run through the MoE layers together.

Documents are dealt at random into blocks of about as many tokens. The steps of a block take its
documents in a random order: prompts token after token; generated tokens by their position, as
sequences that decode side by side. So the blocks are independent, and differ as other documents
would.

T tokens of a shard, N tokens of a step, S steps, B blocks, K slots of a decision, E experts, P
physical slots, G GPUs, M the most replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.shards import routed, taken
from moe_inspect.trace.reader import Trace

MOST_BLOCKS = 8
STEPS_OF_A_BLOCK = 4
SEED = 0


@dataclass(frozen=True)
class StepTokens:
    """The tokens of the steps of one size. `block_S`: of each step; `of_shard`: by its number the
    step of each token, int32 [T], −1 for those in none."""

    tokens: int
    block_S: np.ndarray
    of_shard: dict[int, np.ndarray]


def draw_steps(
    trace: Trace, selection: Selection, sizes: Sequence[int], decoding: bool
) -> tuple[list[StepTokens], int]:
    """The steps of each size, none where fewer tokens are selected; and how many are. `decoding`:
    whether tokens are ordered by position. MoeInspectError where nothing is selected."""
    lengths = list[np.ndarray]()  # documents of a shard and their tokens, [2, …]
    for shard in trace.shards:
        document_T = shard.tokens(["document"])["document"].to_numpy()[taken(shard, selection)]
        lengths.append(np.stack(np.unique(document_T, return_counts=True)))
    document_N, tokens_N = np.concatenate(lengths, axis=1)
    document_D, of_N = np.unique(document_N, return_inverse=True)
    tokens_D = np.bincount(of_N, tokens_N).astype(np.int64)
    if not (total := int(tokens_D.sum())):
        raise MoeInspectError(f"{trace.path} has no tokens in this selection")
    order_D = np.random.default_rng(SEED).permutation(len(document_D))
    steps = list[StepTokens]()
    for size in sizes:
        blocks = min(MOST_BLOCKS, len(document_D), total // size)
        most = STEPS_OF_A_BLOCK * size  # tokens that a block needs
        dealt = [_until(order_D[b::blocks], tokens_D, most) for b in range(blocks)]
        rank_D = np.full(len(document_D), -1)
        block_D = np.full(len(document_D), -1)
        for b, of_block in enumerate(dealt):
            rank_D[of_block], block_D[of_block] = np.arange(len(of_block)), b
        steps.append(_numbered(trace, selection, size, document_D, rank_D, block_D, decoding))
    return steps, total


def _until(order_D: np.ndarray, tokens_D: np.ndarray, most: int) -> np.ndarray:
    """The first of these documents that have so many tokens together."""
    before_D = np.cumsum(tokens_D[order_D]) - tokens_D[order_D]
    return order_D[before_D < most]


def _numbered(
    trace: Trace,
    selection: Selection,
    size: int,
    document_D: np.ndarray,
    rank_D: np.ndarray,
    block_D: np.ndarray,
    decoding: bool,
) -> StepTokens:
    """The tokens of these documents in their order, cut into steps."""
    found = list[
        np.ndarray
    ]()  # shard, token in it, block, rank of the document, sequence, position
    for number, shard in enumerate(trace.shards):
        table = shard.tokens(["document", "sequence", "position"])
        document_T, sequence_T, position_T = (column.to_numpy() for column in table.columns)
        at_T = np.searchsorted(document_D, document_T).clip(max=len(document_D) - 1)
        index = np.flatnonzero(taken(shard, selection) & (block_D[at_T] >= 0))
        d = at_T[index]
        rows = np.full(len(index), number), index, block_D[d], rank_D[d]
        found.append(np.stack([*rows, sequence_T[index], position_T[index]]).astype(np.int64))
    shard_T, index_T, block_T, rank_T, sequence_T, position_T = np.concatenate(found, axis=1)
    if decoding:  # positions count from the end of the prompt
        _, of_T = np.unique(sequence_T, return_inverse=True)
        first_S = np.full(of_T.max(initial=0) + 1, np.iinfo(np.int64).max)
        np.minimum.at(first_S, of_T, position_T)
        keys = sequence_T, rank_T, position_T - first_S[of_T], block_T
    else:
        keys = position_T, sequence_T, rank_T, block_T
    order_T = np.lexsort(keys)
    number_T = np.arange(len(order_T)) - np.searchsorted(block_T[order_T], block_T[order_T])
    tokens_B = np.bincount(block_T, minlength=block_D.max(initial=-1) + 1)
    steps_B = np.minimum(tokens_B // size, STEPS_OF_A_BLOCK)
    step_T, first_B = number_T // size, np.cumsum(steps_B) - steps_B
    step_T = np.where(step_T < steps_B[block_T[order_T]], step_T + first_B[block_T[order_T]], -1)
    of_shard = dict[int, np.ndarray]()
    for number in np.unique(shard_T[order_T[step_T >= 0]]).tolist():
        mine = shard_T[order_T] == number
        of_shard[number] = np.full(trace.shard(number).files.tokens, -1, np.int32)
        of_shard[number][index_T[order_T[mine]]] = step_T[mine]
    return StepTokens(size, np.repeat(np.arange(len(steps_B)), steps_B), of_shard)


def decisions_of(
    trace: Trace, routers: Sequence[int], steps: StepTokens
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(router, ids [K, T], step of each token [T]) of each shard that has tokens of these steps."""
    for number, step_T in steps.of_shard.items():
        found = routed(trace.shard(number), routers, lambda _, seen, step_T=step_T: step_T[seen])
        for r, step_N, ids_KN in found:
            kept_N = step_N >= 0
            yield r, ids_KN[:, kept_N], step_N[kept_N]


@dataclass(frozen=True)
class StepLoads:
    """What steps bring: `slots_SP`, the tokens of each physical slot; `reached_SG`, the tokens that
    go to each GPU, each once however many of its experts it uses there."""

    slots_SP: np.ndarray
    reached_SG: np.ndarray

    def __add__(self, other: StepLoads) -> StepLoads:
        return StepLoads(self.slots_SP + other.slots_SP, self.reached_SG + other.reached_SG)


def step_loads(
    ids_KT: np.ndarray, step_T: np.ndarray, S: int, expert_P: np.ndarray, G: int
) -> StepLoads:
    """Of an expert's replicas, token after token takes the next. ids_KT: −1 where a slot of the
    decision routed nowhere."""
    P, K = len(expert_P), len(ids_KT)
    by_expert_P, replicas_E = np.argsort(expert_P, kind="stable"), np.bincount(expert_P)
    first_E = np.cumsum(replicas_E) - replicas_E
    turn_T = np.arange(len(step_T))
    slot_KT = by_expert_P[first_E[ids_KT] + turn_T % replicas_E[ids_KT]]
    there_KT = ids_KT >= 0
    of_step_KT = np.broadcast_to(step_T.astype(np.int64), slot_KT.shape)
    slots_S = np.bincount((of_step_KT * P + slot_KT)[there_KT], minlength=S * P)
    gpu_KT = np.sort(np.where(there_KT, slot_KT * G // P, G), axis=0)
    new_KT = gpu_KT < G
    new_KT[1:] &= gpu_KT[1:] != gpu_KT[:-1]
    reached = np.bincount((of_step_KT * G + gpu_KT)[new_KT], minlength=S * G) if K else 0
    return StepLoads(slots_S.reshape(S, P), np.asarray(reached).reshape(S, G))


def loads_of_steps(
    trace: Trace, routers: Sequence[int], steps: StepTokens, plan: dict[int, np.ndarray], G: int
) -> dict[int, StepLoads]:
    """The loads of each router's steps under a plan, the expert of each slot by router."""
    S, loads = len(steps.block_S), dict[int, StepLoads]()
    for r, ids_KT, step_T in decisions_of(trace, routers, steps):
        part = step_loads(ids_KT, step_T, S, plan[r], G)
        loads[r] = loads[r] + part if r in loads else part
    return loads


def chance_ids(rng: np.random.Generator, E: int, k: int, T: int) -> np.ndarray:
    """Tokens that choose k of E experts uniformly at random. int64 [K, T]"""
    return rng.random((T, E), np.float32).argpartition(min(k, E - 1), axis=1)[:, :k].T


def from_load(
    rng: np.random.Generator,
    load_E: np.ndarray,
    N: int,
    k: int,
    S: int,
    expert_P: np.ndarray,
    G: int,
) -> StepLoads:
    """Steps whose assignments are drawn independently by the load of each expert, for counts, which
    tell no tokens apart. What reaches a GPU is its expected number."""
    replicas_E = np.bincount(expert_P)
    share_P = (load_E / load_E.sum() / replicas_E)[expert_P]
    slots_SP = rng.multinomial(round(N * k), share_P / share_P.sum(), S)
    share_SG = slots_SP.reshape(S, G, -1).sum(2) / max(round(N * k), 1)
    return StepLoads(slots_SP, N * (1 - (1 - share_SG) ** k))

"""Steps of N tokens, drawn from a trace: which tokens run through the MoE layers together.

Documents are dealt at random into blocks of about the same size. The steps of a block take its
documents in a random order: prompts token after token; generated tokens by their position, as
sequences that decode side by side. So the blocks are independent, and differ as other documents
would.

T tokens of a shard, N tokens of a step, S steps, B blocks, K slots of a decision, E experts, P
physical slots, G GPUs, M the most replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields

import numpy as np

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.simulate.shards import routed
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

MOST_BLOCKS, FEWEST_BLOCKS = 8, 4  # fewer have no interval
COUNTED = 16  # steps drawn from counts
STEPS_OF_A_BLOCK = 4
SEED = 0

Plan = dict[int, np.ndarray]  # router → the expert of each slot, int64 [P]
Wanted = Callable[[Shard], np.ndarray]  # bool [T]: the tokens of a shard that steps are drawn from


@dataclass(frozen=True)
class StepTokens:
    """The tokens of the steps of one size. `block_S`: block of each step; `of_shard`: by number of
    the shard the step of each token, int32 [T], −1 for tokens in no step."""

    tokens: int
    block_S: np.ndarray
    of_shard: dict[int, np.ndarray]


def draw_steps(
    trace: Trace, wanted: Wanted, sizes: Sequence[int], decoding: bool
) -> list[StepTokens]:
    """The steps of each size; no step if fewer tokens are wanted. `decoding`: order tokens by
    position."""
    lengths = list[np.ndarray]()  # documents of a shard and their tokens, [2, …]
    for shard in trace.shards:
        document_T = shard.tokens(["document"])["document"].to_numpy()[wanted(shard)]
        lengths.append(np.stack(np.unique(document_T, return_counts=True)))
    document_N, tokens_N = np.concatenate(lengths, axis=1)
    document_D, of_N = np.unique(document_N, return_inverse=True)
    tokens_D = np.bincount(of_N, tokens_N).astype(np.int64)
    if not (total := int(tokens_D.sum())):
        return []
    order_D = np.random.default_rng(SEED).permutation(len(document_D))
    steps = list[StepTokens]()
    for size in sizes:
        blocks = min(MOST_BLOCKS, len(document_D), total // size)
        rank_D, block_D = np.full((2, len(document_D)), -1)
        for b in range(blocks):
            dealt = order_D[b::blocks]
            before = np.cumsum(tokens_D[dealt]) - tokens_D[dealt]
            dealt = dealt[before < STEPS_OF_A_BLOCK * size]  # a block needs no more tokens
            rank_D[dealt], block_D[dealt] = np.arange(len(dealt)), b
        steps.append(_numbered(trace, wanted, size, document_D, rank_D, block_D, decoding))
    return steps


def _numbered(
    trace: Trace,
    wanted: Wanted,
    size: int,
    document_D: np.ndarray,
    rank_D: np.ndarray,
    block_D: np.ndarray,
    decoding: bool,
) -> StepTokens:
    """The tokens of these documents in their order, cut into steps."""
    # shard, token in it, block, rank of the document, sequence, position
    found = list[np.ndarray]()
    for number, shard in enumerate(trace.shards):
        table = shard.tokens(["document", "sequence", "position"])
        document_T, sequence_T, position_T = (column.to_numpy() for column in table.columns)
        at_T = np.searchsorted(document_D, document_T).clip(max=len(document_D) - 1)
        index = np.flatnonzero(wanted(shard) & (block_D[at_T] >= 0))
        d = at_T[index]
        rows = np.full(len(index), number), index, block_D[d], rank_D[d]
        sequence_T = sequence_T.astype(np.int64) + (shard.files.rank << 32)  # numbered by rank
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
    """Loads of steps. `slots_SP`: tokens of each slot; `reached_SG`: tokens that go to each GPU,
    each once however many of its experts it uses there; `sent_GG`: tokens of all steps that go from
    GPU to GPU, empty for counts."""

    slots_SP: np.ndarray
    reached_SG: np.ndarray
    sent_GG: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def __add__(self, other: StepLoads) -> StepLoads:
        return StepLoads(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def joined(loads: Sequence[StepLoads]) -> StepLoads:
    """The steps of all loads, in order."""
    return StepLoads(*map(np.concatenate, zip(*map(astuple, loads), strict=True)))


def step_loads(
    ids_KT: np.ndarray, step_T: np.ndarray, S: int, expert_P: np.ndarray, G: int
) -> StepLoads:
    """Token t is on GPU t mod G. Of an expert's replicas, token after token takes the next, and so
    do the tokens of a GPU. ids_KT: −1 where a slot of the decision routed nowhere."""
    P = len(expert_P)
    by_expert_P, replicas_E = np.argsort(expert_P, kind="stable"), np.bincount(expert_P)
    first_E = np.cumsum(replicas_E) - replicas_E
    turn_T = np.arange(len(step_T))
    turn_KT = turn_T + turn_T // np.lcm(replicas_E, G)[ids_KT]
    slot_KT = by_expert_P[first_E[ids_KT] + turn_KT % replicas_E[ids_KT]]
    there_KT = ids_KT >= 0
    of_step_KT = np.broadcast_to(step_T.astype(np.int64), slot_KT.shape)
    slots_S = np.bincount((of_step_KT * P + slot_KT)[there_KT], minlength=S * P)
    gpu_KT = np.sort(np.where(there_KT, slot_KT * G // P, G), axis=0)
    new_KT = gpu_KT < G
    new_KT[1:] &= gpu_KT[1:] != gpu_KT[:-1]
    reached = np.bincount((of_step_KT * G + gpu_KT)[new_KT], minlength=S * G)
    from_KT = np.broadcast_to(turn_T % G, gpu_KT.shape)
    sent = np.bincount((from_KT * G + gpu_KT)[new_KT], minlength=G * G)
    return StepLoads(slots_S.reshape(S, P), reached.reshape(S, G), sent.reshape(G, G))


@dataclass(frozen=True)
class DrawnSteps:
    """Steps of one size. `block_S`: the block of documents that each step is drawn from; `loads`:
    by plan, then by router."""

    tokens: int
    block_S: np.ndarray
    loads: list[dict[int, StepLoads]]


def steps_of_decisions(
    trace: Trace,
    selection: Selection,
    wanted: Wanted,
    sizes: Sequence[int],
    plans: Sequence[Plan],
    G: int,
) -> Iterator[DrawnSteps]:
    """Steps of each size under each plan, drawn from the wanted tokens, which are of the phase that
    is selected. None if no selected router sees it."""
    phase = selection.phase or ""
    routers = [r for r in selection.routers if trace.routers[r].sees(phase)]
    for steps in draw_steps(trace, wanted, sizes, phase == "decode") if routers else ():
        S, loads = len(steps.block_S), [dict[int, StepLoads]() for _ in plans]
        for r, ids_KT, step_T in decisions_of(trace, routers, steps):
            for plan, plan_loads in zip(plans, loads, strict=True):
                part = step_loads(ids_KT, step_T, S, plan[r], G)
                plan_loads[r] = plan_loads[r] + part if r in plan_loads else part
        yield DrawnSteps(steps.tokens, steps.block_S, loads)


def steps_of_counts(
    counts: Counts,
    units_U: np.ndarray,
    routers: Sequence[int],
    sizes: Sequence[int],
    plans: Sequence[Plan],
    G: int,
) -> Iterator[DrawnSteps]:
    """Steps of each size under each plan, as if each token chose by the load of its block of
    documents, or by the load of all tokens if documents are unknown. units_U: bool, the counts to
    draw from."""
    units = int(units_U.sum())
    blocks = 1 if counts.documents_unknown else max(1, min(MOST_BLOCKS, units))
    block_U, S = np.random.default_rng(SEED).permutation(units) % blocks, COUNTED // blocks
    for N in sizes:
        loads = [dict[int, StepLoads]() for _ in plans]
        for r in routers:
            load_UE, k = counts.of[r].assignments_UE[units_U], counts.routers[r].top_k
            if not load_UE.any():
                continue
            load_BE = np.stack([load_UE[block_U == b].sum(0) for b in range(blocks)])
            load_BE[~load_BE.any(1)] = load_UE.sum(0)  # a block without load has the load of all
            for plan, plan_loads in zip(plans, loads, strict=True):
                rng = np.random.default_rng([SEED, r])  # equal plans get equal steps
                plan_loads[r] = joined(
                    [from_load(rng, load_E, N, k, S, plan[r], G) for load_E in load_BE]
                )
        yield DrawnSteps(N, np.repeat(np.arange(blocks), S), loads)


def from_load(
    rng: np.random.Generator,
    load_E: np.ndarray,
    N: int,
    k: int,
    S: int,
    expert_P: np.ndarray,
    G: int,
) -> StepLoads:
    """S steps of counts: assignments are drawn independently by the load of each expert. The tokens
    that reach a GPU are the expected number."""
    share_P = expected(load_E, N, k, expert_P[None], G).slots_SP[0]
    return _independent(rng.multinomial(N * k, share_P / share_P.sum(), S), N, k, G)


def expected(load_E: np.ndarray, N: int, k: int, expert_SP: np.ndarray, G: int) -> StepLoads:
    """The mean loads of such steps, under each of several plans."""
    replicas_SE = np.stack([np.bincount(of, minlength=len(load_E)) for of in expert_SP])
    share_SE = load_E / load_E.sum() / replicas_SE
    return _independent(N * k * np.take_along_axis(share_SE, expert_SP, 1), N, k, G)


def _independent(slots_SP: np.ndarray, N: int, k: int, G: int) -> StepLoads:
    share_SG = slots_SP.reshape(len(slots_SP), G, -1).sum(2) / (N * k)
    return StepLoads(slots_SP, N * (1 - (1 - share_SG) ** k))

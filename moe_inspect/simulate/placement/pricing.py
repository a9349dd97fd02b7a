"""What plans of `simulate placement` cost in milliseconds: the steps of the judged part, with the
times of a kernel that was measured (`latency`).

N tokens of a step, B blocks of documents, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path, PurePath

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.placement.policies import Layout
from moe_inspect.simulate.placement.rebalancing import Place, rebalancing
from moe_inspect.simulate.placement.windows import PlacementPlans, window_of
from moe_inspect.simulate.placement.workloads import Workload
from moe_inspect.simulate.prices import (
    MOST_TOKENS,
    Prices,
    even,
    p_apart,
    prices_of,
    shape_of,
)
from moe_inspect.simulate.result import Settings
from moe_inspect.simulate.sampling import (
    COUNTED,
    FEWEST_BLOCKS,
    MOST_BLOCKS,
    SEED,
    StepLoads,
    draw_steps,
    from_load,
    joined,
    loads_of_steps,
)
from moe_inspect.simulate.shards import phases_of, taken
from moe_inspect.trace.reader import Trace, address
from moe_inspect.trace.shard import Shard


@dataclass(frozen=True)
class PlanTimes:
    """The mean step under a plan. `parts`: ms by block, float64 [B], of each workload and phase
    that it is judged on, which weigh `weights`, 1 together."""

    parts: list[np.ndarray]
    weights: list[float]
    even: float
    sent: list[np.ndarray]

    @property
    def sent_GG(self) -> np.ndarray:
        """Tokens that a step sends from a GPU to a GPU, over all layers."""
        return np.average(self.sent, axis=0, weights=self.weights)

    @property
    def ms(self) -> float:
        return sum(w * float(ms_B.mean()) for w, ms_B in zip(self.weights, self.parts, strict=True))

    def p(self, other: PlanTimes) -> float:
        """That of other documents both plans take as long. The same steps are compared, and errors
        of the parts added up, as they may have documents in common. NaN of too few documents."""
        apart = [a - b for a, b in zip(self.parts, other.parts, strict=True)]
        if (blocks := min(map(len, apart))) < FEWEST_BLOCKS:
            return math.nan
        error = sum(
            w * float(of_B.std(ddof=1)) / math.sqrt(len(of_B))
            for w, of_B in zip(self.weights, apart, strict=True)
        )
        return p_apart(self.ms, other.ms, error, blocks)

    def corrected_p(self, other: PlanTimes, plans: int) -> float:
        """For the number of pairs of so many plans."""
        return float(np.minimum(max(math.comb(plans, 2), 1) * self.p(other), 1.0))  # NaN stays


BATCH_TOKENS = 4096  # of a step, by default
# settings
PRICED = "kernel", "batch_tokens", "error", "times", "unpriced", "memory_gb", "ageing", "in_order"


def pricing_of(
    gpu: str | None,
    engine: str | None,
    dtype: str | None,
    kernel: str | None,
    latency: str | Path | None,
    tokens: int | None,
    sweep: Sequence[int] | None,
    memory_gb: float | None,
) -> Pricing | None:
    """None where no GPU is given. MoeInspectError for settings that do not go together, and a
    kernel that was not measured."""
    for is_wrong, said in (
        (
            not (gpu or latency) and (engine or dtype or kernel or sweep or tokens is not None),
            "--engine, --dtype, --kernel, --batch-tokens and --sweep are of measured times: give "
            "--gpu",
        ),
        (memory_gb is not None and not sweep, "--memory-gb is for --sweep"),
        (
            tokens is not None and not 1 <= tokens <= MOST_TOKENS,
            f"steps of {tokens} tokens: give a number from 1 to {MOST_TOKENS:,}",
        ),
    ):
        if is_wrong:
            raise MoeInspectError(said)
    if gpu is None and latency is None:
        return None
    tokens = BATCH_TOKENS if tokens is None else tokens
    return Pricing(prices_of(gpu, engine, dtype, kernel, latency), tokens, memory_gb)


@dataclass(frozen=True)
class Pricing:
    """`tokens`: of a step, over all GPUs. `memory_gb`: that experts may take of a GPU."""

    prices: Prices
    tokens: int
    memory_gb: float | None

    def added(
        self,
        tables: dict[str, pd.DataFrame],
        plans: PlacementPlans,
        judging: Sequence[PlacementPlans],
        judged: Sequence[Workload],
        places: Mapping[str, Place],
    ) -> tuple[Settings, dict[str, PlanTimes]]:
        """Adds the times to the table `policies`, and the table `rebalancing`, of the first of
        `places` that there are plans of. The settings PRICED, and the times."""
        prices, N = self.prices, self.tokens
        times, unpriced = self.times(plans, judging, judged)
        layout = next(iter(plans.layouts.values()))
        in_order = self.in_order(plans, judging, judged, times.get("contiguous"))
        columns = self.columns(times, in_order, layout.nodes)
        tables["policies"] = tables["policies"].merge(columns, "left", "policy")
        ageing = None
        if again := next((name for name in places if name in times), None):
            changes, ageing = rebalancing(plans, again, places[again], prices, N)
            tables["rebalancing"] = changes
        shapes = (shape_of(plans.trace, r) for r in plans.selection.routers)
        said = prices.said(layout.gpus, layout.nodes, shapes, N)
        first = in_order and {"ms": in_order.ms, "even_ms": in_order.even}
        of = prices.kernel.name, N, prices.error, said, unpriced, self.memory_gb, ageing, first
        return dict(zip(PRICED, of, strict=True)), times

    def in_order(
        self,
        plans: PlacementPlans,
        judging: Sequence[PlacementPlans],
        judged: Sequence[Workload],
        contiguous: PlanTimes | None,
    ) -> PlanTimes | None:
        """Of experts in order, without replicas: what a server has before it places any. Of
        `contiguous`, which has replicas where there are slots for them, where the GPUs cannot share
        experts evenly."""
        experts = {r: plans.trace.routers[r].experts for r in plans.layouts}
        slots = {r: layout.slots for r, layout in plans.layouts.items()}
        uneven = any(E % plans.layouts[r].gpus for r, E in experts.items())
        if uneven or (contiguous and slots == experts):
            return contiguous
        of = {
            "layouts": {r: replace(plans.layouts[r], slots=E) for r, E in experts.items()},
            "of": {(r, "in order"): np.arange(E) for r, E in experts.items()},
        }
        alone = replace(plans, **of), [replace(one, **of) for one in judging]
        return self.times(*alone, judged)[0]["in order"]

    def swept(
        self,
        every: Iterable[tuple[int, PlacementPlans, Sequence[PlacementPlans]]],
        judged: Sequence[Workload],
    ) -> dict[str, pd.DataFrame]:
        """The table `sweep`, a row per number of slots, where there are any; `every`: each with the
        plans of one policy."""
        times, rows = list[PlanTimes](), list[dict[str, object]]()
        for slots, plans, judging in every:
            [(policy, of)] = self.times(plans, judging, judged)[0].items()
            times.append(of)
            experts = {plans.trace.routers[r].experts for r in plans.selection.routers}
            row = {"physical_experts": slots, "redundant": slots - max(experts)}
            memory = self.memory(plans)
            fits = self.memory_gb is None or memory <= self.memory_gb
            row |= {"policy": policy, "memory_gb": memory, "fits": fits}
            rows.append(row | self.row(of))
        fitting = [of for of, row in zip(times, rows, strict=True) if row["fits"]]
        if not rows:
            return {}
        fastest = min(fitting or times, key=lambda of: of.ms)
        for of, row in zip(times, rows, strict=True):
            row["ms_p"] = of.corrected_p(fastest, len(rows))
        return {"sweep": pd.DataFrame(rows)}

    def memory(self, plans: PlacementPlans) -> float:
        """10^9 bytes of experts on a GPU."""
        return sum(
            self.prices.expert_gb(shape_of(plans.trace, r)) * layout.slots / layout.gpus
            for r, layout in plans.layouts.items()
        )

    def row(self, of: PlanTimes) -> dict[str, object]:
        return {"ms": of.ms, "even_ms": of.even, "tokens_per_s": self.tokens / of.ms * 1e3}

    def times(
        self,
        plans: PlacementPlans,
        judging: Sequence[PlacementPlans],
        judged: Sequence[Workload],
    ) -> tuple[dict[str, PlanTimes], list[str]]:
        """By policy; and which of the text is too little for a step. `judging`: the plans on the
        tokens that they are judged on; `judged`: their counts, where there are only these.
        MoeInspectError where there is no step at all, or no size of experts is known."""
        N, trace = self.tokens, plans.trace
        policies = list(dict.fromkeys(name for _, name in plans.of))
        parts = _drawn(judging, policies, N) if judging else _by_counts(plans, judged, policies, N)
        found = {name: PlanTimes([], [], 0.0, []) for name in policies}
        evenly, weights, without = list[float](), list[float](), list[str]()
        for what, weight, block_S, loads in parts:
            if not len(block_S):
                without.append(what)
                continue
            _, of_S, steps_B = np.unique(block_S, return_inverse=True, return_counts=True)
            for name, of in zip(policies, loads, strict=True):
                ms_S = sum(self.prices.of(x, shape_of(trace, r), N).total for r, x in of.items())
                found[name].parts.append(np.bincount(of_S, ms_S) / steps_B)
                found[name].sent.append(
                    np.sum([x.sent_GG for x in of.values()], axis=0) / len(block_S)
                )
            evenly.append(sum(self.evenly(trace, r, plans.layouts[r]) for r in loads[0]))
            weights.append(weight)
        if not weights:
            raise MoeInspectError(
                f"the judged part has no step of {N:,} tokens: give fewer with --batch-tokens"
            )
        share = [w / sum(weights) for w in weights]
        mean = float(np.dot(share, evenly))
        return {n: PlanTimes(of.parts, share, mean, of.sent) for n, of in found.items()}, without

    def evenly(self, trace: Trace, router: int, layout: Layout) -> float:
        """Milliseconds of a layer whose slots have the same load, and whose tokens choose at
        random."""
        N, G, shape = self.tokens, layout.gpus, shape_of(trace, router)
        spread = even(N, shape, layout.slots, G)
        return float(self.prices.of(spread, shape, N).total.item())

    def columns(
        self, times: dict[str, PlanTimes], first: PlanTimes | None, nodes: int
    ) -> pd.DataFrame:
        """For the table `policies`: a row per policy. The p-values are corrected for the number of
        pairs of policies."""
        fastest = min(times.values(), key=lambda of: of.ms)
        rows = list[dict[str, object]]()
        for name, of in times.items():
            p = {"ms_p": of.corrected_p(fastest, len(times))}
            if first:
                p["in_order_p"] = of.corrected_p(first, len(times))
            rows.append({"policy": name} | self.row(of) | p)
            if of.sent_GG.any():
                rows[-1] |= _crossing(of.sent_GG, nodes)
        return pd.DataFrame(rows)


def traffic_of(sent_GG: np.ndarray, nodes: int) -> pd.DataFrame:
    """A row per pair of GPUs."""
    gpu_N, to_N = np.indices(sent_GG.shape).reshape(2, -1)
    same_N = _same_node(len(sent_GG), nodes).reshape(-1)
    columns = {"gpu_from": gpu_N, "gpu_to": to_N, "same_node": same_N}
    return pd.DataFrame(columns | {"tokens_per_step": sent_GG.reshape(-1)})


def _crossing(sent_GG: np.ndarray, nodes: int) -> dict[str, float]:
    """The shares of what GPUs send that go to another GPU of the node, and to another node."""
    whole, own = sent_GG.sum(), np.trace(sent_GG)
    within = sent_GG[_same_node(len(sent_GG), nodes)].sum()
    return {
        "intra_node": float((within - own) / whole),
        "inter_node": float(1 - within / whole),
    }


def _same_node(G: int, nodes: int) -> np.ndarray:
    """bool [G, G]"""
    node_G = np.arange(G) * nodes // G
    return node_G[:, None] == node_G


def _judged(shard: Shard, plans: PlacementPlans, phase: str | None) -> np.ndarray:
    """bool [T]: the tokens that plans are judged on, of a phase."""
    taken_T = taken(shard, plans.selection)
    judged_T = taken_T & (window_of(shard, taken_T, plans.windows) >= plans.windows.judged.start)
    return judged_T & taken(shard, replace(plans.selection, phase=phase)) if phase else judged_T


# what it is of, its weight, the block of each step (none where it has no step), loads by policy
Part = tuple[str, float, np.ndarray, list[dict[int, StepLoads]]]


def _drawn(judging: Sequence[PlacementPlans], policies: Sequence[str], N: int) -> Iterator[Part]:
    """Of each trace judged on, whose phases weigh as their tokens."""
    for of in judging:
        trace, G = of.trace, next(iter(of.layouts.values())).gpus
        phases = [of.selection.phase] if of.selection.phase else phases_of(trace)
        placed = [{r: of.of[r, name] for r in of.selection.routers} for name in policies]
        wanted = {phase: partial(_judged, plans=of, phase=phase) for phase in phases}
        tokens = {
            phase: sum(int(mine(shard).sum()) for shard in trace.shards)
            for phase, mine in wanted.items()
        }
        for phase, mine in wanted.items():
            routers = [r for r in of.selection.routers if trace.routers[r].sees(phase or "")]
            if not tokens[phase] or not routers:
                continue
            what = " of ".join(filter(None, (phase, PurePath(address(trace)).name)))
            [steps] = draw_steps(trace, mine, [N], phase == "decode")
            loads = loads_of_steps(trace, routers, steps, placed, G)
            yield what, tokens[phase] / sum(tokens.values()), steps.block_S, loads


def _by_counts(
    plans: PlacementPlans, judged: Sequence[Workload], policies: Sequence[str], N: int
) -> Iterator[Part]:
    """Of each workload judged on, as if each token chose by the load of its block of documents, or
    by that of all where documents are unknown."""
    G, routers = next(iter(plans.layouts.values())).gpus, plans.selection.routers
    for one in judged:
        units = int(one.units_U.sum())
        blocks = 1 if one.counts.documents_unknown else min(MOST_BLOCKS, units)
        block_U = np.random.default_rng(SEED).permutation(units) % blocks
        load_BE = {
            r: np.stack([one.load_UE(r)[block_U == b].sum(0) for b in range(blocks)])
            for r in routers
        }
        S = COUNTED // blocks
        loads = [dict[int, StepLoads]() for _ in policies]
        for r, (name, of) in product(routers, zip(policies, loads, strict=True)):
            drawn = (plans.trace.routers[r].top_k, S, plans.of[r, name], G)
            rng = np.random.default_rng([SEED, r])  # the same for equal plans
            if (whole_E := load_BE[r].sum(0)).any():  # a block without load has that of all
                of_B = (load_E if load_E.any() else whole_E for load_E in load_BE[r])
                of[r] = joined([from_load(rng, load_E, N, *drawn) for load_E in of_B])
        if loads[0]:
            yield one.name, 1.0, np.repeat(np.arange(blocks), S), loads

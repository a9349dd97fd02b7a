"""What plans of `simulate placement` cost in milliseconds: the steps of the judged part, with the
times of a kernel that was measured (`latency`). And what it costs to rebalance, and how often that
pays: the experts that GPUs are sent, at the measured bandwidth between them, against what a plan
loses as it ages.

N tokens of a step, B blocks of documents, W windows, V plans, each fitted on a window, E experts, P
slots, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path, PurePath

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate import sampling
from moe_inspect.simulate.placement.policies import CURRENT, Layout, contiguous, shares
from moe_inspect.simulate.placement.windows import PlacementPlans, window_of
from moe_inspect.simulate.placement.workloads import Workload
from moe_inspect.simulate.prices import (
    BATCH_TOKENS,
    Prices,
    even,
    p_apart,
    prices_of,
    shape_of,
    sizes_of,
)
from moe_inspect.simulate.result import Settings
from moe_inspect.simulate.sampling import COUNTED, FEWEST_BLOCKS, MOST_BLOCKS, SEED, StepLoads
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


Place = Callable[[np.ndarray, Layout], np.ndarray]
# settings
PRICED = "kernel", "batch_tokens", "error", "times", "unpriced", "ageing", "current"


def pricing_of(
    named: Mapping[str, str | None],
    latency: str | Path | None,
    batch_tokens: Sequence[int] | None,
    sweep: Sequence[int] | None,
) -> Pricing | None:
    """None where no hardware is given. MoeInspectError for settings that do not go together, and a
    kernel that was not measured."""
    if not (named["gpu"] or latency) and (any(named.values()) or sweep or batch_tokens):
        raise MoeInspectError(
            "--engine, --dtype, --kernel, --batch-tokens and --sweep are of measured times: give "
            "--hardware"
        )
    sizes = sizes_of(BATCH_TOKENS if batch_tokens is None else batch_tokens)
    if named["gpu"] is None and latency is None:
        return None
    return Pricing(prices_of(named, latency), sizes)


@dataclass(frozen=True)
class Pricing:
    """`sizes`: tokens of a step, over all GPUs, ascending."""

    prices: Prices
    sizes: list[int]

    def added(
        self,
        tables: dict[str, pd.DataFrame],
        plans: PlacementPlans,
        judged: Sequence[Workload],
        places: Mapping[str, Place],
    ) -> tuple[Settings, dict[str, PlanTimes]]:
        """Adds the table `steps`, the times of the largest step to the table `policies`, and the
        table `rebalancing`, of the first of `places` that there are plans of. The settings PRICED,
        and the times of the largest step. MoeInspectError where the judged part has no step."""
        prices, layout = self.prices, next(iter(plans.layouts.values()))
        N, times, current = 0, dict[str, PlanTimes](), None
        unpriced, steps = dict[str, int](), list[pd.DataFrame]()
        for size in self.sizes:
            found, without = self.times(plans, judged, size)
            unpriced = dict.fromkeys(without, size) | unpriced
            if found:
                N, times, current = size, found, self.current(plans, judged, found, size)
                steps.append(self.columns(times, current, layout.nodes, N))
        if not steps:
            raise MoeInspectError(
                f"the judged part has no step of {self.sizes[0]:,} tokens: give fewer with "
                "--batch-tokens"
            )
        tables["steps"] = pd.concat(steps, ignore_index=True)
        largest = steps[-1].drop(columns="tokens")
        tables["policies"] = tables["policies"].merge(largest, "left", "policy")
        ageing = None
        if again := next((name for name in places if name in times), None):
            changes, ageing = rebalancing(plans, again, places[again], prices, N)
            tables["rebalancing"] = changes
        shapes = (shape_of(plans.trace, r) for r in plans.selection.routers)
        said = prices.said(layout.gpus, layout.nodes, shapes, N)
        first = current and {"ms": current.ms, "even_ms": current.even}
        of = prices.kernel.name, N, prices.error, said, unpriced, ageing, first
        return dict(zip(PRICED, of, strict=True)), times

    def current(
        self, plans: PlacementPlans, judged: Sequence[Workload], times: dict[str, PlanTimes], N: int
    ) -> PlanTimes | None:
        """Of the placement in use: of the plan that is given; or of experts in order, without
        replicas, as a server has them at first, or of `contiguous`, which may have replicas, where
        the GPUs cannot share experts evenly."""
        if CURRENT in times:
            return times[CURRENT]
        contiguous = times.get("contiguous")
        experts = {r: plans.trace.routers[r].experts for r in plans.layouts}
        slots = {r: layout.slots for r, layout in plans.layouts.items()}
        uneven = any(E % plans.layouts[r].gpus for r, E in experts.items())
        if uneven or (contiguous and slots == experts):
            return contiguous
        of = {
            "layouts": {r: replace(plans.layouts[r], slots=E) for r, E in experts.items()},
            "of": {(r, "in order"): np.arange(E) for r, E in experts.items()},
        }
        alone = replace(plans, **of, judging=[replace(one, **of) for one in plans.judging])
        return self.times(alone, judged, N)[0].get("in order")

    def swept(
        self, every: Iterable[tuple[int, PlacementPlans]], judged: Sequence[Workload], N: int
    ) -> dict[str, pd.DataFrame]:
        """The table `sweep`, a row per number of slots, where there are any; `every`: each with the
        plans of one policy; N: tokens of a step."""
        times, rows = list[PlanTimes](), list[dict[str, object]]()
        for slots, plans in every:
            [(policy, of)] = self.times(plans, judged, N)[0].items()
            times.append(of)
            experts = {plans.trace.routers[r].experts for r in plans.selection.routers}
            row = {"physical_experts": slots, "redundant": slots - max(experts)}
            row |= {"policy": policy, "memory_gb": self.memory(plans)}
            rows.append(row | _prices(of, N))
        if not rows:
            return {}
        fastest = min(times, key=lambda of: of.ms)
        for of, row in zip(times, rows, strict=True):
            row["ms_p"] = of.corrected_p(fastest, len(rows))
        return {"sweep": pd.DataFrame(rows)}

    def memory(self, plans: PlacementPlans) -> float:
        """10^9 bytes of experts on a GPU."""
        return sum(
            self.prices.expert_gb(shape_of(plans.trace, r)) * layout.slots / layout.gpus
            for r, layout in plans.layouts.items()
        )

    def times(
        self, plans: PlacementPlans, judged: Sequence[Workload], N: int
    ) -> tuple[dict[str, PlanTimes], list[str]]:
        """By policy, none where there is no step of N tokens; and which of the text is too little
        for a step. `judged`: the counts of what plans are judged on, where there are only these.
        MoeInspectError where no size of experts is known."""
        trace = plans.trace
        policies = list(dict.fromkeys(name for _, name in plans.of))
        parts = _drawn(plans.judging, policies, N)
        if not plans.judging:
            parts = _by_counts(plans, judged, policies, N)
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
                sent_GG = np.sum([x.sent_GG for x in of.values()], axis=0)
                found[name].sent.append(sent_GG / len(block_S))
            evenly.append(sum(self.evenly(trace, r, plans.layouts[r], N) for r in loads[0]))
            weights.append(weight)
        if not weights:
            return {}, without
        share = [w / sum(weights) for w in weights]
        mean = float(np.dot(share, evenly))
        return {n: PlanTimes(of.parts, share, mean, of.sent) for n, of in found.items()}, without

    def evenly(self, trace: Trace, router: int, layout: Layout, N: int) -> float:
        """Milliseconds of a layer of evenly loaded slots, whose tokens choose at random."""
        shape = shape_of(trace, router)
        spread = even(N, shape, layout.slots, layout.gpus)
        return float(self.prices.of(spread, shape, N).total.item())

    def columns(
        self, times: dict[str, PlanTimes], current: PlanTimes | None, nodes: int, N: int
    ) -> pd.DataFrame:
        """For the tables `policies` and `steps`: a row per policy. The p-values are corrected for
        the number of pairs of policies."""
        fastest = min(times.values(), key=lambda of: of.ms)
        rows = list[dict[str, object]]()
        for name, of in times.items():
            p = {"ms_p": of.corrected_p(fastest, len(times))}
            if current:
                p["current_p"] = of.corrected_p(current, len(times))
            rows.append({"policy": name, "tokens": N} | _prices(of, N) | p)
            if of.sent_GG.any():
                rows[-1] |= _crossing(of.sent_GG, nodes)
        return pd.DataFrame(rows)


def _prices(of: PlanTimes, N: int) -> dict[str, object]:
    cost = of.ms / of.even - 1
    return {"ms": of.ms, "even_ms": of.even, "cost": cost, "tokens_per_s": N / of.ms * 1e3}


def traffic_of(sent_GG: np.ndarray, nodes: int) -> pd.DataFrame:
    gpu_N, to_N = np.indices(sent_GG.shape).reshape(2, -1)
    same_N = _same_node(len(sent_GG), nodes).reshape(-1)
    columns = {"gpu_from": gpu_N, "gpu_to": to_N, "same_node": same_N}
    return pd.DataFrame(columns | {"tokens_per_step": sent_GG.reshape(-1)})


def _crossing(sent_GG: np.ndarray, nodes: int) -> dict[str, float]:
    """The shares of what GPUs send that go to another GPU of the node, and to another node."""
    whole, own = sent_GG.sum(), np.trace(sent_GG)
    within = sent_GG[_same_node(len(sent_GG), nodes)].sum()
    return {"intra_node": float((within - own) / whole), "inter_node": float(1 - within / whole)}


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
            [steps] = sampling.draw_steps(trace, mine, [N], phase == "decode")
            loads = sampling.loads_of_steps(trace, routers, steps, placed, G)
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
                loads_B = [sampling.from_load(rng, load_E, N, *drawn) for load_E in of_B]
                of[r] = sampling.joined(loads_B)
        if loads[0]:
            yield one.name, 1.0, np.repeat(np.arange(blocks), S), loads


def in_use(plans: PlacementPlans) -> dict[int, np.ndarray]:
    """The expert of each slot, by router, under the placement in use: that of the plan that is
    given, or experts in order, without replicas where GPUs can share them evenly."""
    placed = dict[int, np.ndarray]()
    for r, layout in plans.layouts.items():
        E = plans.trace.routers[r].experts
        without = layout if E % layout.gpus else replace(layout, slots=E)  # replicas
        placed[r] = plans.of.get((r, CURRENT), contiguous(plans.loads[r][0], without))
    return placed


# --- changes of the plan

SHUFFLES = 999
LINK = "alltoall"  # the transfer whose bandwidth experts are moved at


@dataclass(frozen=True)
class Ageing:
    """`lost`: ms of a step that a plan loses per window of age; `most`: with the greatest age here;
    `p`: that the order of the windows does not matter; all NaN where `unknown` says why."""

    lost: float = math.nan
    most: float = math.nan
    p: float = math.nan
    unknown: str = ""


def rebalancing(
    plans: PlacementPlans, policy: str, place: Place, prices: Prices, N: int
) -> tuple[pd.DataFrame, Ageing]:
    """Of this policy, for steps of N tokens: a row for the plan after the placement in use, and one
    per window whose own plan follows that of the window before. `plans`: on windows of time, or on
    workloads, which have no order."""
    planned = {r: plans.of[r, policy] for r in plans.selection.routers}
    first = {"window": None, "policy": policy, **moved(plans, in_use(plans), planned, prices)}
    if plans.windows.names or plans.trace.counts_only:
        return pd.DataFrame([first]), Ageing(unknown="the loads have no order in time")
    W, gap = len(plans.windows.edge_W) - 1, _spanned(plans)
    fitted = [
        {r: place(plans.loads[r][v], layout) for r, layout in plans.layouts.items()}
        for v in range(W)
    ]
    ms_VW = _priced(plans, fitted, prices, N)
    rows = [
        {"window": w, "policy": policy, **moved(plans, fitted[w - 1], fitted[w], prices)}
        | {"ms_before": ms_VW[w - 1, w], "ms_first": ms_VW[0, w]}
        for w in range(1, W)
    ]
    table = pd.DataFrame([first, *rows]).astype({"window": "Int64"})
    if gap > W // 4:
        return table, Ageing(unknown="documents last longer than a window")
    return table, ageing(ms_VW, gap)


def moved(
    plans: PlacementPlans,
    before: dict[int, np.ndarray],
    after: dict[int, np.ndarray],
    prices: Prices,
) -> dict[str, float]:
    """10^9 bytes of the experts that GPUs lack, of all and of the GPU that is sent most, and the
    time of that one: NaN where no link was measured."""
    gb_G = np.zeros(1)
    for r, layout in plans.layouts.items():
        E, shape = plans.trace.routers[r].experts, shape_of(plans.trace, r)
        had_EG, has_EG = (shares(of[r], E, layout.gpus) > 0 for of in (before, after))
        gb_G = gb_G + (has_EG & ~had_EG).sum(0) * prices.expert_gb(shape)
    link, most = prices.transfers.get(LINK), float(gb_G.max())
    ms = float(link.predict(np.array([most]), 1e9).item()) if link and most else math.nan
    return {"moved_gb": float(gb_G.sum()), "moved_gb_of_gpu": most, "move_ms": ms if most else 0.0}


def _priced(
    plans: PlacementPlans, fitted: list[dict[int, np.ndarray]], prices: Prices, N: int
) -> np.ndarray:
    """Milliseconds of a step of window w's load, under the plan of window v. float64 [V, W]"""
    W = len(plans.windows.edge_W) - 1
    ms_VW = np.zeros((len(fitted), W))
    for r, layout in plans.layouts.items():
        shape, expert_VP = shape_of(plans.trace, r), np.stack([of[r] for of in fitted])
        for w, load_E in enumerate(plans.loads[r]):
            if load_E.any():
                loads = sampling.expected(load_E, N, shape.top_k, expert_VP, layout.gpus)
                ms_VW[:, w] += prices.of(loads, shape, N).total
    return ms_VW


def _spanned(plans: PlacementPlans) -> int:
    """Windows that the longest document goes on for after its first."""
    parts = list[pd.DataFrame]()
    for shard in plans.trace.shards:
        taken_T = taken(shard, plans.selection)
        window_T = window_of(shard, taken_T, plans.windows)[taken_T]
        document_T = shard.tokens(["document"])["document"].to_numpy()[taken_T]
        frame = pd.DataFrame({"document": document_T, "window": window_T})
        parts.append(frame.drop_duplicates())
    windows = pd.concat(parts).groupby("document")["window"]
    return int((windows.max() - windows.min()).max())


def ageing(ms_VW: np.ndarray, gap: int) -> Ageing:
    """The time of each plan in each window is a part of the plan's, a part of the window's, and
    `lost` × the windows between them (least squares). Chance: the windows in any order (Mantel's
    test). Pairs up to `gap` apart, which may share a document, are left out."""
    W = len(ms_VW)
    v, w = np.indices(ms_VW.shape)
    age_VW = np.abs(v - w).astype(float)
    kept_VW = age_VW > gap
    own = np.eye(W)
    basis = np.hstack([np.repeat(own, W, 0), np.tile(own, (W, 1))])[kept_VW.ravel()]
    age_N = age_VW[kept_VW]
    rest_N = age_N - basis @ np.linalg.lstsq(basis, age_N, rcond=None)[0]
    rest_VW = np.zeros(ms_VW.shape)
    rest_VW[kept_VW] = rest_N / (rest_N @ rest_N)
    lost, rng, beyond = float((ms_VW * rest_VW).sum()), np.random.default_rng(SEED), 1
    for _ in range(SHUFFLES):
        order_W = rng.permutation(W)
        beyond += float((ms_VW[np.ix_(order_W, order_W)] * rest_VW).sum()) >= lost
    return Ageing(lost, lost * (W - 1), beyond / (SHUFFLES + 1))

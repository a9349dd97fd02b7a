"""Prices of the plans of `simulate placement`: the milliseconds of steps of the judged part, what
it costs to rebalance, and how often that pays: the bytes of the experts that GPUs are sent, at the
measured bandwidth between them, against the time that a plan loses as it ages.

N tokens of a step, B blocks of documents, W windows, V plans, each fitted on a window, E experts, P
slots, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate import price, sampling
from moe_inspect.simulate.latency import Shape
from moe_inspect.simulate.placement.policies import CURRENT, Layout, contiguous, shares
from moe_inspect.simulate.placement.windows import PlacementPlans, window_of
from moe_inspect.simulate.placement.workloads import Workload
from moe_inspect.simulate.price import BATCH_TOKENS, KernelName, Prices, shape_of
from moe_inspect.simulate.result import Settings
from moe_inspect.simulate.sampling import SEED, DrawnSteps, Plan, StepLoads
from moe_inspect.simulate.shards import phases_of, taken
from moe_inspect.simulate.step import imbalance_tables
from moe_inspect.trace.reader import address
from moe_inspect.trace.shard import Shard


@dataclass
class PlanTimes:
    """Times of the mean step under a plan. For each text that the plan is judged on (a workload, or
    a phase of a trace): its weight, the ms of each block, float64 [B], the ms of an even load, and
    the tokens that a step sends from GPU to GPU, over all layers, [G, G]."""

    weights: list[float] = field(default_factory=list[float])
    blocks: list[np.ndarray] = field(default_factory=list[np.ndarray])
    evens: list[float] = field(default_factory=list[float])
    sent: list[np.ndarray] = field(default_factory=list[np.ndarray])

    def add(self, weight: float, ms_B: np.ndarray, even: float, sent_GG: np.ndarray) -> None:
        self.weights.append(weight)
        self.blocks.append(ms_B)
        self.evens.append(even)
        self.sent.append(sent_GG)

    @property
    def shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def sent_GG(self) -> np.ndarray:
        return np.average(self.sent, axis=0, weights=self.shares)

    @property
    def ms(self) -> float:
        return sum(w * float(ms_B.mean()) for w, ms_B in zip(self.shares, self.blocks, strict=True))

    @property
    def even(self) -> float:
        return float(np.dot(self.shares, self.evens))

    def p(self, other: PlanTimes, plans: int) -> float:
        """The p-value that both plans take as long, corrected for the number of pairs of `plans`.
        The same steps are compared. The standard errors of texts are added up, as texts may have
        documents in common. NaN of too few documents."""
        difference = [a - b for a, b in zip(self.blocks, other.blocks, strict=True)]
        errors = map(price.standard_error, difference)
        error = sum(w * e for w, e in zip(self.shares, errors, strict=True))
        p = price.difference_p(self.ms, other.ms, error, min(map(len, difference)))
        return float(np.minimum(max(math.comb(plans, 2), 1) * p, 1.0))  # NaN stays

    def row(self, N: int) -> dict[str, float]:
        ms, even = self.ms, self.even
        return {"ms": ms, "even_ms": even, "cost": ms / even - 1, "tokens_per_s": N / ms * 1e3}


Place = Callable[[np.ndarray, Layout], np.ndarray]
IN_USE = "in use"  # name of the placement in use among the plans that are priced
# settings
PRICED = "kernel", "batch_tokens", "error", "times", "unpriced", "ageing", "current", "costs"


def pricing_of(
    named: KernelName,
    latency: str | Path | None,
    batch_tokens: Sequence[int] | None,
    sweep: Sequence[int] | None,
) -> Pricing | None:
    """None unless hardware is given. MoeInspectError for settings that do not go together, and a
    kernel that was not measured."""
    if named.get("hardware") is None and latency is None:
        if any(named.values()) or sweep or batch_tokens:
            raise MoeInspectError(
                "--engine, --dtype, --kernel, --batch-tokens and --sweep are of measured times: "
                "give --hardware"
            )
        return None
    sizes = price.sizes_of(BATCH_TOKENS if batch_tokens is None else batch_tokens)
    return Pricing(price.prices_of(latency, **named), sizes, sorted(sweep or ()))


@dataclass(frozen=True)
class Pricing:
    """`sizes`: tokens of a step, over all GPUs; `sweep`: slots per layer. Both ascend."""

    prices: Prices
    sizes: list[int]
    sweep: list[int]

    def added(
        self,
        tables: dict[str, pd.DataFrame],
        plans: PlacementPlans,
        judged: Sequence[Workload],
        places: Mapping[str, Place],
        swept: Iterable[tuple[int, PlacementPlans]],
        selection: Selection,
    ) -> tuple[Settings, dict[str, PlanTimes]]:
        """Add the tables of prices, and the times of the largest step to the table `policies`.
        Return the settings PRICED, and the times of the largest step. MoeInspectError if the judged
        part has no step.

        `places`: the table `rebalancing` is about the first of these that there are plans of;
        `swept`: plans of one policy for numbers of slots; `selection`: what the placement in use is
        priced on."""
        prices, trace, layout = self.prices, plans.trace, next(iter(plans.layouts.values()))
        in_use = plan_in_use(plans)
        priced = {name: plans.plan(name) for name in plans.policies} | {IN_USE: in_use}
        times_of_size, unpriced = self.times(priced, plans, judged, self.sizes)
        if not times_of_size:
            raise MoeInspectError(
                f"the judged part has no step of {self.sizes[0]:,} tokens: give fewer with "
                "--batch-tokens"
            )
        steps = [policy_rows(times, layout.nodes, N) for N, times in times_of_size.items()]
        N, times = [*times_of_size.items()][-1]
        tables["steps"] = pd.concat(steps, ignore_index=True)
        largest = steps[-1].drop(columns="tokens")
        tables["policies"] = tables["policies"].merge(largest, "left", "policy")
        ageing = None
        if again := next((name for name in places if name in times), None):
            changes, ageing = rebalancing(plans, in_use, again, places[again], prices, N)
            tables["rebalancing"] = changes
        tables |= self.swept(swept, judged, N)
        costs, cost_settings = imbalance_tables(
            trace, selection, prices, in_use, layout, self.sizes
        )
        tables |= costs
        shapes = (shape_of(trace, r) for r in plans.selection.routers)
        settings: Settings = {
            "kernel": prices.kernel.name,
            "batch_tokens": N,
            "error": prices.error,
            "times": prices.describe(layout.gpus, layout.nodes, shapes, N),
            "unpriced": unpriced,
            "ageing": ageing,
            "current": {"ms": times[IN_USE].ms, "even_ms": times[IN_USE].even},
            "costs": cost_settings,
        }
        return settings, times

    def swept(
        self, every: Iterable[tuple[int, PlacementPlans]], judged: Sequence[Workload], N: int
    ) -> dict[str, pd.DataFrame]:
        """The table `sweep`, a row per number of slots, if there are any. `every`: numbers of
        slots, each with the plans of one policy; N: tokens of a step."""
        times, rows = list[PlanTimes](), list[dict[str, object]]()
        for slots, plans in every:
            [policy] = plans.policies
            of_size, _ = self.times({policy: plans.plan(policy)}, plans, judged, [N])
            times.append(of_size[N][policy])
            experts = {plans.trace.routers[r].experts for r in plans.selection.routers}
            row = {"physical_experts": slots, "redundant": slots - max(experts), "policy": policy}
            rows.append({**row, "memory_gb": self.memory(plans), **times[-1].row(N)})
        if not rows:
            return {}
        fastest = min(times, key=lambda plan_times: plan_times.ms)
        for plan_times, row in zip(times, rows, strict=True):
            row["ms_p"] = plan_times.p(fastest, len(rows))
        return {"sweep": pd.DataFrame(rows)}

    def memory(self, plans: PlacementPlans) -> float:
        """10^9 bytes of experts on a GPU."""
        return sum(
            self.prices.expert_gb(shape_of(plans.trace, r)) * layout.slots / layout.gpus
            for r, layout in plans.layouts.items()
        )

    def times(
        self,
        priced: dict[str, Plan],
        plans: PlacementPlans,
        judged: Sequence[Workload],
        sizes: Sequence[int],
    ) -> tuple[dict[int, dict[str, PlanTimes]], dict[str, int]]:
        """Times of the plans `priced`, by tokens of a step and name; and texts that are too short,
        each with the smallest step that it is too short for. `judged`: the counts that plans are
        judged on, if there are no decisions. MoeInspectError if the size of experts is unknown."""
        shapes = {r: shape_of(plans.trace, r) for r in plans.selection.routers}
        G = next(iter(plans.layouts.values())).gpus
        times = {N: {name: PlanTimes() for name in priced} for N in sizes}
        too_short, steps_of = dict[str, int](), _decisions if plans.judging else _counts
        for text, weight, drawn in steps_of(plans, judged, [*priced.values()], sizes, G):
            N, S = drawn.tokens, len(drawn.block_S)
            if not S:
                too_short.setdefault(text, N)
                continue
            for name, loads in zip(priced, drawn.loads, strict=True):
                ms_B = price.block_means(self._total(loads, shapes, N), drawn.block_S)
                even = {r: price.even_loads(N, shapes[r], len(priced[name][r]), G) for r in loads}
                even_ms = self._total(even, shapes, N).item()
                sent_GG = np.sum([each.sent_GG for each in loads.values()], axis=0) / S
                times[N][name].add(weight, ms_B, even_ms, sent_GG)
        known = {N: of for N, of in times.items() if all(each.weights for each in of.values())}
        return known, too_short

    def _total(self, loads: dict[int, StepLoads], shapes: dict[int, Shape], N: int) -> np.ndarray:
        """Milliseconds of all layers in each step. float64 [S]"""
        ms_RS = [self.prices.step_times(each, shapes[r], N).total for r, each in loads.items()]
        return np.sum(ms_RS, axis=0)


def policy_rows(times: dict[str, PlanTimes], nodes: int, N: int) -> pd.DataFrame:
    """A row per policy, for the tables `policies` and `steps`. The p-values are corrected for the
    number of pairs of policies."""
    by_policy, rows = {n: of for n, of in times.items() if n != IN_USE}, list[dict[str, object]]()
    fastest = min(by_policy.values(), key=lambda plan_times: plan_times.ms)
    for name, plan_times in by_policy.items():
        row: dict[str, object] = {"policy": name, "tokens": N, **plan_times.row(N)}
        row["ms_p"] = plan_times.p(fastest, len(by_policy))
        row["current_p"] = plan_times.p(times[IN_USE], len(by_policy))
        if (sent_GG := plan_times.sent_GG).any():
            row |= _crossing(sent_GG, nodes)
        rows.append(row)
    return pd.DataFrame(rows)


def traffic_of(sent_GG: np.ndarray, nodes: int, policy: str) -> pd.DataFrame:
    """The table `traffic`: a row per pair of GPUs."""
    gpu_N, to_N = np.indices(sent_GG.shape).reshape(2, -1)
    same_N = _same_node(len(sent_GG), nodes).reshape(-1)
    columns = {"policy": policy, "gpu_from": gpu_N, "gpu_to": to_N, "same_node": same_N}
    return pd.DataFrame(columns | {"tokens_per_step": sent_GG.reshape(-1)})


def _crossing(sent_GG: np.ndarray, nodes: int) -> dict[str, float]:
    """Shares of the sent tokens that go to another GPU of the node, and to another node."""
    total, own = sent_GG.sum(), np.trace(sent_GG)
    within = sent_GG[_same_node(len(sent_GG), nodes)].sum()
    return {"intra_node": float((within - own) / total), "inter_node": float(1 - within / total)}


def _same_node(G: int, nodes: int) -> np.ndarray:
    """bool [G, G]"""
    node_G = np.arange(G) * nodes // G
    return node_G[:, None] == node_G


def _judged(shard: Shard, plans: PlacementPlans, phase: str | None) -> np.ndarray:
    """The tokens of a phase that plans are judged on. bool [T]"""
    taken_T = taken(shard, plans.selection)
    judged_T = taken_T & (window_of(shard, taken_T, plans.windows) >= plans.windows.judged.start)
    return judged_T & taken(shard, replace(plans.selection, phase=phase)) if phase else judged_T


Text = tuple[str, float, DrawnSteps]  # name, weight, steps under each plan


def _decisions(
    plans: PlacementPlans,
    judged: Sequence[Workload],
    priced: Sequence[Plan],
    sizes: Sequence[int],
    G: int,
) -> Iterator[Text]:
    """Steps of each size of each phase of each trace that plans are judged on. The phases of a
    trace weigh as their tokens."""
    for part in plans.judging:
        trace, selection = part.trace, part.selection
        phases = [selection.phase] if selection.phase else phases_of(trace)
        wanted = {phase: partial(_judged, plans=part, phase=phase) for phase in phases}
        tokens = {
            phase: sum(int(is_wanted(shard).sum()) for shard in trace.shards)
            for phase, is_wanted in wanted.items()
        }
        for phase in filter(tokens.get, phases):
            name = " of ".join(filter(None, (phase, PurePath(address(trace)).name)))
            drawn_from = trace, replace(selection, phase=phase), wanted[phase]
            for drawn in sampling.steps_of_decisions(*drawn_from, sizes, priced, G):
                yield name, tokens[phase] / sum(tokens.values()), drawn


def _counts(
    plans: PlacementPlans,
    judged: Sequence[Workload],
    priced: Sequence[Plan],
    sizes: Sequence[int],
    G: int,
) -> Iterator[Text]:
    """Steps of each size of each workload that plans are judged on. All weigh the same."""
    for each in judged:
        counted = each.counts, each.units_U, plans.selection.routers
        for drawn in sampling.steps_of_counts(*counted, sizes, priced, G):
            if drawn.loads[0]:
                yield each.name, 1.0, drawn


def plan_in_use(plans: PlacementPlans) -> Plan:
    """The placement in use: the given plan, or experts in order, as a server has them at first,
    without replicas if GPUs can share them evenly."""
    if CURRENT in plans.policies:
        return plans.plan(CURRENT)
    placed: Plan = {}
    for r, layout in plans.layouts.items():
        E = plans.trace.routers[r].experts
        without_replicas = layout if E % layout.gpus else replace(layout, slots=E)
        placed[r] = contiguous(plans.loads[r][0], without_replicas)
    return placed


# --- changes of the plan

SHUFFLES = 999
LINK = "alltoall"  # the transfer whose bandwidth experts are moved at


@dataclass(frozen=True)
class Ageing:
    """`lost`: ms of a step that a plan loses per window of age; `most`: ms that the oldest plan
    loses; `p`: p-value that the order of the windows does not matter. All are NaN if `unknown`
    gives a reason."""

    lost: float = math.nan
    most: float = math.nan
    p: float = math.nan
    unknown: str = ""


def rebalancing(
    plans: PlacementPlans, in_use: Plan, policy: str, place: Place, prices: Prices, N: int
) -> tuple[pd.DataFrame, Ageing]:
    """The table `rebalancing` of a policy, for steps of N tokens: a row for the change from the
    placement in use, and a row per window whose own plan follows the plan of the window before."""
    planned = plans.plan(policy)
    first = {"window": None, "policy": policy, **moved(plans, in_use, planned, prices)}
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
    """10^9 bytes of the experts that GPUs must be sent: of all GPUs, and of the GPU that is sent
    most, whose time is NaN if no link was measured."""
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
                ms_VW[:, w] += prices.step_times(loads, shape, N).total
    return ms_VW


def _spanned(plans: PlacementPlans) -> int:
    """Windows that the longest document continues for after its first window."""
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

"""What imbalance costs under the placement in use: how many milliseconds the MoE layers of a step
take on G GPUs, and what of it is due to imbalance.

Every GPU computes the tokens of its experts, and the layer waits for the slowest. Steps are drawn
from the trace's tokens (`sampling`), and the times of a GPU are those of a kernel that was measured
(`latency`). Beside them the same number of tokens, spread evenly over the slots, and by chance.

N tokens of a step, S steps, B blocks of documents, E experts, P physical slots, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.analysis.metrics.chance import ALPHA
from moe_inspect.analysis.metrics.uncertainty import student
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts import spec
from moe_inspect.simulate import result, sampling
from moe_inspect.simulate.latency import Shape
from moe_inspect.simulate.placement.plan import placement_of
from moe_inspect.simulate.placement.policies import contiguous, layouts_of
from moe_inspect.simulate.prices import (
    BATCH_TOKENS,
    Prices,
    Times,
    even,
    p_apart,
    prices_of,
    shape_of,
    sizes_of,
)
from moe_inspect.simulate.result import Frame, Labels, Settings, Tables
from moe_inspect.simulate.sampling import COUNTED, FEWEST_BLOCKS, SEED, StepLoads
from moe_inspect.simulate.shards import phases_of, taken
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace

DRAWS = 8  # steps by chance
POOL = 2**16  # tokens that they are drawn from
MOST_DOMAINS = 12  # that have rows of their own


def imbalance_costs(
    trace: Trace,
    *,
    hardware: str | None = None,
    engine: str | None = None,
    dtype: str | None = None,
    kernel: str | None = None,
    gpus: int | None = None,
    nodes: int = 1,
    batch_tokens: Sequence[int] = BATCH_TOKENS,
    placement: str | Path | None = None,
    latency: str | Path | None = None,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
) -> result.Simulation:
    """What imbalance costs, in milliseconds of the MoE layers. The options are those of
    simulate_placement; each phase of the trace is simulated by itself.

    Tables: imbalance (a row per phase, domain and tokens), imbalance_layers (a row per layer too).
    Times are in ms, of the mean step. `cost` is the time ÷ that of an even load − 1, `cost_low` and
    `cost_high` are its 95 % interval over documents, and `p` tells whether it is that of chance.

    MoeInspectError for settings out of range, a kernel that was not measured, and a trace that does
    not say how large its experts are."""
    named = {"gpu": hardware, "engine": engine, "dtype": dtype, "kernel": kernel}
    prices = prices_of(named, latency)
    selection = select(trace, layers, domains, phase)
    placed, physical = dict[int, np.ndarray](), None
    if placement is not None:
        placed = placement_of(placement, trace, selection)
        physical = len(next(iter(placed.values())))
    layouts = layouts_of(trace, selection, gpus, nodes, physical, None)
    for r, layout in layouts.items():
        placed.setdefault(r, contiguous(np.empty(trace.routers[r].experts), layout))
    gpus, sizes = next(iter(layouts.values())).gpus, sizes_of(batch_tokens)
    tables, settings = priced_steps(trace, selection, prices, placed, (gpus, nodes), sizes)
    settings |= {
        "placement": str(placement) if placement is not None else None,
        "latency": str(latency) if latency is not None else None,
    }
    few = result.too_few(trace, selection)
    return result.simulation(trace, few, tables, settings, verdict, chart, ("imbalance",))


def priced_steps(
    trace: Trace,
    selection: Selection,
    prices: Prices,
    placed: dict[int, np.ndarray],
    layout: tuple[int, int],
    sizes: list[int],
) -> tuple[dict[str, pd.DataFrame], Settings]:
    """The tables of `imbalance_costs`, and what `costs_said` and `panels` need. `placed`: the
    expert of each slot, by router. `layout`: GPUs and nodes."""
    G, nodes = layout
    shapes = {r: shape_of(trace, r) for r in selection.routers}
    placed_layers = PlacedLayers(trace, prices, placed, shapes, G)
    rows = [row for part in _parts(trace, selection) for row in placed_layers.rows(part, sizes)]
    if not rows:
        raise MoeInspectError(f"{trace.path} has no step of {sizes[0]:,} tokens: give fewer")
    table = pd.DataFrame(rows)
    whole = table["layer"].isna()
    tables = {
        "imbalance": table[whole].drop(columns=["layer", "router"]).reset_index(drop=True),
        "imbalance_layers": table[~whole]
        .astype({"layer": int, "router": int})
        .reset_index(drop=True),
    }
    settings: Settings = {
        "kernel": prices.kernel.name,
        "error": prices.error,
        "times": prices.said(G, nodes, shapes.values(), sizes[-1]),
        "gpus": G,
        "nodes": nodes,
        "batch_tokens": sizes,
        "counts_only": trace.counts_only,
        "too_few": bool(result.too_few(trace, selection)),
    }
    return tables, settings


def _parts(trace: Trace, selection: Selection) -> list[tuple[str, Selection]]:
    """Each phase by itself, whole and of each domain where these are not many: its domain, and what
    is selected."""
    counts = count_trace(trace, selection)
    domains = counts.domains if 1 < len(counts.domains) <= MOST_DOMAINS else []
    known = not (trace.counts_only or selection.phase)
    phases = [replace(selection, phase=p) for p in phases_of(trace)] if known else [selection]
    return [
        (domain, of if not domain else replace(of, domains=frozenset({domain})))
        for of in phases
        for domain in ("", *domains)
    ]


@dataclass(frozen=True)
class PlacedLayers:
    """`plan`: the expert of each slot, by router; `shapes`: of its layer."""

    trace: Trace
    prices: Prices
    plan: dict[int, np.ndarray]
    shapes: dict[int, Shape]
    gpus: int

    def rows(
        self, part: tuple[str, Selection], sizes: Sequence[int]
    ) -> Iterator[dict[str, object]]:
        """For each number of tokens a row of each layer, and one of all."""
        domain, selection = part
        for N, block_S, loads in self.sampled(selection, sizes):
            if not loads:
                continue
            costs = {r: self.costs(r, N, of) for r, of in loads.items()}
            whole = [reduce(add, of) for of in zip(*costs.values(), strict=True)]
            key = {"phase": selection.phase, "domain": domain, "tokens": N}
            known = not self.trace.counts_only
            yield key | {"layer": None, "router": None} | _row(whole, block_S, N, known)
            for r, cost in costs.items() if not domain else ():
                layer = self.trace.routers[r].layer
                yield key | {"layer": layer, "router": r} | _row(cost, block_S, N, known)

    def costs(self, router: int, N: int, loads: StepLoads) -> list[Times]:
        """Of the steps of one layer: as the trace routes, by chance, and evenly loaded."""
        shape, spread = self.shapes[router], len(self.plan[router])
        every = loads, self.chance(router, N), even(N, shape, spread, self.gpus)
        return [self.prices.of(of, shape, N) for of in every]

    def sampled(
        self, selection: Selection, sizes: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray, dict[int, StepLoads]]]:
        """The steps of each size: tokens, the block of each step, the loads by router."""
        trace, G = self.trace, self.gpus
        if trace.counts_only:
            counts = count_trace(trace, selection)
            for N in sizes:
                loads = dict[int, StepLoads]()
                for r in selection.routers:
                    # of each size and layer, whatever else is asked for
                    rng, k = np.random.default_rng([SEED, r]), trace.routers[r].top_k
                    if (load_E := counts.load_E(r)).any():
                        loads[r] = sampling.from_load(rng, load_E, N, k, COUNTED, self.plan[r], G)
                yield N, np.arange(COUNTED), loads
            return
        routers = [r for r in selection.routers if trace.routers[r].sees(selection.phase or "")]
        wanted = partial(taken, selection=selection)
        for steps in sampling.draw_steps(trace, wanted, sizes, selection.phase == "decode"):
            if len(steps.block_S) and routers:
                [loads] = sampling.loads_of_steps(trace, routers, steps, [self.plan], G)
                yield steps.tokens, steps.block_S, loads

    def chance(self, router: int, N: int) -> StepLoads:
        """Of tokens that choose among slots, so that no replica is busier than another expert."""
        k, P, rng = self.trace.routers[router].top_k, len(self.plan[router]), np.random.default_rng
        each_P = np.arange(P)
        if self.trace.counts_only:  # drawn as those of the trace
            drawn = rng([SEED, router, 1]), np.ones(P), N, k, DRAWS
            return sampling.from_load(*drawn, each_P, self.gpus)
        pool_KT = _pool(P, k)
        ids_KT = pool_KT[:, rng([SEED, router]).integers(pool_KT.shape[1], size=DRAWS * N)]
        step_T = np.repeat(np.arange(DRAWS), N)
        return sampling.step_loads(ids_KT, step_T, DRAWS, each_P, self.gpus)


@cache
def _pool(E: int, k: int) -> np.ndarray:
    """Tokens that choose k of E experts uniformly at random. int64 [k, POOL]"""
    random_TE = np.random.default_rng(SEED).random((POOL, E), np.float32)
    return random_TE.argpartition(min(k, E - 1), axis=1)[:, :k].T


def _row(
    costs: Sequence[Times], block_S: np.ndarray, N: int, documents_known: bool
) -> dict[str, object]:
    """block_S: the block of each step of the trace. `documents_known`: or there is no interval, and
    p is that of independent tokens."""
    found, by_chance, _ = costs
    ms, chance, even = (float(times.total.mean()) for times in costs)
    _, of_S, steps_B = np.unique(block_S, return_inverse=True, return_counts=True)
    ms_B, reach, p = np.bincount(of_S, found.total) / steps_B, np.nan, np.nan
    if (B := len(ms_B)) >= FEWEST_BLOCKS:
        error = ms_B.std(ddof=1) / math.sqrt(B)
        reach = student(B) * error if documents_known else np.nan
        error = math.hypot(error, by_chance.total.std(ddof=1) / math.sqrt(DRAWS))
        p = p_apart(ms, chance, error, B)
    return {
        "steps": len(block_S),
        "ms": ms,
        "even_ms": even,
        "chance_ms": chance,
        **{f"{f.name}_ms": float(getattr(found, f.name).mean()) for f in fields(Times)},
        "cost": ms / even - 1,
        "cost_low": (ms - reach) / even - 1,
        "cost_high": (ms + reach) / even - 1,
        "cost_by_chance": chance / even - 1,
        "p": p,
        "tokens_per_s": N / ms * 1e3,
    }


def verdict(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    return [*costs_said(tables, settings, label_of), f"Simulated: {settings['times']}."]


def costs_said(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    table, layers = tables["imbalance"], tables["imbalance_layers"]
    sentences, sizes = list[str](), settings["batch_tokens"]
    whole, several = table[table["domain"] == ""], table["phase"].nunique() > 1
    for row in whole.sort_values("tokens", ascending=False).to_dict("records"):
        sentences.append(_costs(row, settings, f" of {row['phase']}" if several else ""))
    for phase, mine in whole.groupby("phase", sort=False, dropna=False):
        if turns := turning_point(mine, settings):
            of = f" of {phase}" if several else ""
            sentences.append(
                f"Between {turns[0]:,} and {turns[1]:,} tokens of a step{of} imbalance turns from "
                "saving time to costing it."
            )
    largest = layers[layers["tokens"] == layers["tokens"].max()]
    worst = largest.loc[(largest["ms"] - largest["even_ms"]).idxmax()]
    mine = whole["phase"].isna() | (whole["phase"] == worst["phase"])
    of_all = whole[mine & (whole["tokens"] == worst["tokens"])].iloc[0]
    claimed = len(largest) > 1 and _known(of_all, settings, len(sizes))
    if claimed and _known(worst, settings, len(sizes) * len(largest)):
        of = f" of {worst['phase']}" if several else ""
        sentences.append(
            f"Layer {label_of[worst['router']]} costs most in these steps: {worst['ms']:.3g} ms "
            f"instead of {worst['even_ms']:.3g} with {worst['tokens']:,} tokens{of}."
        )
    if missing := sorted({*sizes} - {*table["tokens"]}):
        sentences.append(
            f"No step of {', '.join(f'{n:,}' for n in missing)} tokens: the trace has too few."
        )
    if settings["counts_only"]:
        sentences.append(
            "Counts do not tell tokens apart: steps were drawn as if each token chose by the load "
            "of all, and have no intervals."
        )
    return sentences


def _costs(row: dict[str, Any], settings: Settings, of: str) -> str:
    """A cost is claimed where it is neither chance nor the error of the times."""
    cost, chance = row["cost"], row["cost_by_chance"]
    said = (
        f"The MoE layers of a step of {plural(row['tokens'], 'token')}{of} take {row['ms']:.3g} ms "
        f"on {plural(settings['gpus'], 'GPU')}"
    )
    interval = ""
    low, high = (f"{row[end]:.0%}" for end in ("cost_low", "cost_high"))
    if low != high:  # or there is none, or it is narrower than a percent
        interval = f", 95% interval {low} to {high}"
    facts = f"{cost:+.0%}{interval}; by chance {chance:+.0%}"
    among, word = len(settings["batch_tokens"]), "costs" if cost > 0 else "saves"
    if _known(row, settings, among):
        return f"{said}: imbalance {word} {abs(row['ms'] - row['even_ms']):.2g} ms ({facts})."
    if settings["too_few"] or math.isnan(row["p"]):
        return f"{said} ({facts}): too little text to tell imbalance from chance."
    if settings["error"] is None:
        return f"{said} ({facts}): as the error of these times is unknown, no cost is claimed."
    if row["p"] * among > ALPHA or (cost > 0) != (cost > chance):
        return f"{said}: imbalance {word} no more than chance ({facts})."
    beyond = " beyond chance" if abs(math.log1p(cost)) > settings["error"] else ""
    return f"{said}: what imbalance {word}{beyond} is within the error of the times ({facts})."


def _known(row: Any, settings: Settings, among: int) -> bool:
    """Whether the cost is neither chance nor the error of the times. `among`: so many costs."""
    if settings["error"] is None:
        return False
    cost = math.log1p(row["cost"])
    beyond_chance = cost - math.log1p(row["cost_by_chance"])
    beyond = min(abs(cost), abs(beyond_chance)) > settings["error"]
    alike = cost * beyond_chance > 0  # or it is less than what chance costs, or saves
    return beyond and alike and row["p"] * among <= ALPHA and not settings["too_few"]


def turning_point(rows: Frame, settings: Settings) -> tuple[int, int] | None:
    """The most tokens of a step of which imbalance is known to save time, and the fewest of which
    it is known to cost time; None where it does not do both, in this order. `rows`: of a phase."""
    among = len(settings["batch_tokens"])
    known = [row for row in rows.to_dict("records") if _known(row, settings, among)]
    saves = max((row["tokens"] for row in known if row["cost"] < 0), default=None)
    costs = min((row["tokens"] for row in known if row["cost"] > 0), default=None)
    return (saves, costs) if saves and costs and saves < costs else None


def chart(tables: Tables, settings: Settings, label_of: Labels) -> spec.Chart:
    return spec.Chart(
        "What imbalance costs",
        f"Milliseconds of the MoE layers of a step on {plural(settings['gpus'], 'GPU')}, by times "
        f"of {settings['kernel']}",
        tuple(panels(tables, settings, label_of)),
        text=result.SIMULATED,
        name="imbalance",
    )


def panels(tables: Tables, settings: Settings, label_of: Labels) -> Iterator[spec.Panel]:
    """Of each phase: the time and the cost by tokens of a step, and what the time of each layer is
    made of."""
    table, layers = tables["imbalance"], tables["imbalance_layers"]
    several = table["phase"].nunique() > 1
    whole = table[table["domain"] == ""]
    for phase, mine in whole.groupby("phase", sort=False, dropna=False):
        of = f" of {phase}" if several else ""
        yield from _by_tokens(mine, settings, of)
        largest = layers[layers["tokens"] == mine["tokens"].max()]
        same = largest["phase"] == phase if several else slice(None)
        yield _by_layer(largest[same], label_of, of)


def _by_tokens(rows: Frame, settings: Settings, of: str) -> Iterator[spec.Panel]:
    x, even = np.arange(len(rows), dtype=float), rows["even_ms"].to_numpy()
    axis = spec.Axis("tokens of a step, over all GPUs", tuple(f"{n:,}" for n in rows["tokens"]))
    cost, chance, *ends = (
        rows[name].to_numpy(float) for name in ("cost", "cost_by_chance", "cost_low", "cost_high")
    )

    def lines(scaled: Callable[[np.ndarray], np.ndarray]) -> tuple[spec.Line, spec.Line]:
        low, high = spec.known_interval(*map(scaled, ends))
        return (
            spec.Line(x, scaled(chance), "by chance", "c3", "dot"),
            spec.Line(x, scaled(cost), "the trace", "c1", "", True, low, high),
        )

    marks = (
        spec.Line(x, even, "even load", "baseline", "dash"),
        *lines(lambda cost: (1 + cost) * even),
    )
    yield spec.Panel(marks, axis, spec.Axis("ms of the MoE layers", low=0), f"Time{of}")
    turns, band = turning_point(rows, settings), list[spec.Mark]()
    if turns:
        at = np.searchsorted(rows["tokens"], turns).astype(float)
        most = 100 * np.nanmax([cost, *ends])
        name = "imbalance turns from saving time to costing it"
        band.append(spec.Band(at, np.zeros(2), np.full(2, most), name))
    marks = *band, spec.Rule(0, "even load", "baseline", "dash"), *lines(lambda cost: 100 * cost)
    yield spec.Panel(
        marks, axis, spec.Axis("% of the time of an even load"), f"Cost of imbalance{of}"
    )


def _by_layer(rows: Frame, label_of: Labels, of: str) -> spec.Panel:
    """Bars on each other."""
    x, below, bars = np.arange(len(rows), dtype=float), np.zeros(len(rows)), list[spec.Mark]()
    for name, ms, colour in (
        ("experts, mean GPU", rows["experts_ms"] - rows["waiting_ms"], "c1"),
        ("waiting for the busiest GPU", rows["waiting_ms"], "c2"),
        ("dispatch", rows["dispatch_ms"], "c5"),
        ("combine", rows["combine_ms"], "c4"),
    ):
        if ms.any():
            top = below + ms.fillna(0).to_numpy(float)
            bars.append(spec.Bars(x, below, top, name, colour))
            below = top
    even = spec.Points(
        x, rows["even_ms"].to_numpy(float), "all of it, of an even load", "c7", "tick"
    )
    layers = spec.Axis("layer", tuple(label_of[r] for r in rows["router"]))
    title = f"Each layer, with {rows['tokens'].iloc[0]:,} tokens{of}"
    return spec.Panel((*bars, even), layers, spec.Axis("ms", low=0), title)

"""The cost of imbalance under the placement in use: the milliseconds that the MoE layers of a step
take on G GPUs, compared with an even load and with tokens that choose by chance.

Every GPU computes the tokens of its experts, and the layer waits for the slowest GPU. Steps are
drawn from the trace's tokens (`sampling`) and priced with the times of a measured kernel (`price`).

N tokens of a step, S steps, B blocks of documents, P physical slots, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics.chance import ALPHA
from moe_inspect.analysis.metrics.uncertainty import student
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts import spec
from moe_inspect.simulate import price, result, sampling
from moe_inspect.simulate.latency import Shape
from moe_inspect.simulate.placement.plan import placement_of
from moe_inspect.simulate.placement.policies import Layout, contiguous, layouts_of
from moe_inspect.simulate.price import BATCH_TOKENS, KernelName, Prices, Times
from moe_inspect.simulate.result import Frame, Labels, Settings, Tables
from moe_inspect.simulate.sampling import DrawnSteps, Plan, StepLoads
from moe_inspect.simulate.shards import phases_of, taken
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace

MAX_DOMAINS = 12  # more domains have no rows of their own


def imbalance_costs(
    trace: Trace,
    selection: Selection,
    *,
    gpus: int | None = None,
    nodes: int = 1,
    batch_tokens: Sequence[int] = BATCH_TOKENS,
    placement: str | Path | None = None,
    latency: str | Path | None = None,
    **kernel: Unpack[KernelName],
) -> result.Simulation:
    """Simulate what imbalance costs, in milliseconds of the MoE layers. The options are those of
    simulate_placement. Each phase of the trace has steps of its own.

    Tables: imbalance (a row per phase, domain and tokens), imbalance_layers (a row per layer too).
    Times are in ms, of the mean step. `cost` is the time ÷ the time of an even load − 1,
    `cost_low` and `cost_high` are its 95 % interval over documents, and `p` is the p-value that the
    time is that of chance; empty if documents are unknown or too few.

    MoeInspectError for settings out of range, a kernel that was not measured, and a trace that does
    not state the size of its experts."""
    prices = price.prices_of(latency, **kernel)
    plan: Plan = {} if placement is None else placement_of(placement, trace, selection)
    slots = len(next(iter(plan.values()))) if plan else None
    layouts = layouts_of(trace, selection, gpus, nodes, None, slots)
    for r, layout in layouts.items():
        plan.setdefault(r, contiguous(np.empty(trace.routers[r].experts), layout))
    layout, sizes = next(iter(layouts.values())), price.sizes_of(batch_tokens)
    tables, settings = imbalance_tables(trace, selection, prices, plan, layout, sizes)
    settings |= {
        "placement": str(placement) if placement is not None else None,
        "latency": str(latency) if latency is not None else None,
    }
    few = result.too_few(trace, selection)
    return result.simulation(trace, few, tables, settings, verdict, chart, ("imbalance",))


def imbalance_tables(
    trace: Trace,
    selection: Selection,
    prices: Prices,
    plan: Plan,
    layout: Layout,
    sizes: list[int],
) -> tuple[dict[str, pd.DataFrame], Settings]:
    """The tables of `imbalance_costs`, and the settings that `cost_sentences` and `cost_panels`
    need. `plan`: the placement in use, on the GPUs of `layout`."""
    shapes = {r: price.shape_of(trace, r) for r in selection.routers}
    placed = PlacedLayers(trace, prices, plan, shapes, layout.gpus)
    rows = [
        row
        for domain, part in _parts(trace, selection)
        for drawn in placed.drawn(part, sizes)
        for row in placed.rows(drawn, {"phase": part.phase, "domain": domain})
    ]
    if not rows:
        raise MoeInspectError(f"{trace.path} has no step of {sizes[0]:,} tokens: give fewer")
    table = pd.DataFrame(rows)
    is_total = table["layer"].isna()
    total, layers = table[is_total], table[~is_total].astype({"layer": int, "router": int})
    tables = {
        "imbalance": total.drop(columns=["layer", "router"]).reset_index(drop=True),
        "imbalance_layers": layers.reset_index(drop=True),
    }
    settings: Settings = {
        "kernel": prices.kernel.name,
        "error": prices.error,
        "times": prices.describe(layout.gpus, layout.nodes, shapes.values(), sizes[-1]),
        "gpus": layout.gpus,
        "nodes": layout.nodes,
        "batch_tokens": sizes,
        "counts_only": trace.counts_only,
        "documents_unknown": trace.counts_only and not trace.by_document,
        "too_few": bool(result.too_few(trace, selection)),
    }
    return tables, settings


def _parts(trace: Trace, selection: Selection) -> list[tuple[str, Selection]]:
    """Domain and selection of each part that is priced: each phase, and unless there are many
    domains each domain of each phase."""
    counts = count_trace(trace, selection)
    domains = counts.domains if 1 < len(counts.domains) <= MAX_DOMAINS else []
    phases = [selection]
    if not (trace.counts_only or selection.phase):
        phases = [replace(selection, phase=phase) for phase in phases_of(trace)]
    return [
        (domain, replace(phase, domains=frozenset({domain})) if domain else phase)
        for phase in phases
        for domain in ("", *domains)
    ]


@dataclass(frozen=True)
class PlacedLayers:
    """The layers of a trace under the placement in use. `shapes`: by router, of its experts."""

    trace: Trace
    prices: Prices
    plan: Plan
    shapes: dict[int, Shape]
    gpus: int

    def drawn(self, selection: Selection, sizes: Sequence[int]) -> Iterator[DrawnSteps]:
        """The steps of each size, of the selected tokens."""
        trace, plans, G = self.trace, [self.plan], self.gpus
        if trace.counts_only:
            counts = count_trace(trace, selection)
            counted = counts, np.ones(len(counts.units), bool), selection.routers
            return sampling.steps_of_counts(*counted, sizes, plans, G)
        wanted = partial(taken, selection=selection)
        return sampling.steps_of_decisions(trace, selection, wanted, sizes, plans, G)

    def rows(self, drawn: DrawnSteps, key: dict[str, object]) -> Iterator[dict[str, object]]:
        """A row of all layers and, unless the steps are of one domain, of each layer; no row if
        there is no step."""
        [loads] = drawn.loads
        times = {r: self.times(r, drawn.tokens, of_router) for r, of_router in loads.items()}
        if not times:
            return
        key = key | {"tokens": drawn.tokens}
        total = [reduce(add, layers) for layers in zip(*times.values(), strict=True)]
        yield key | {"layer": None, "router": None} | _row(total, drawn)
        for r, of_layer in times.items() if not key["domain"] else ():
            layer = self.trace.routers[r].layer
            yield key | {"layer": layer, "router": r} | _row(of_layer, drawn)

    def times(self, router: int, N: int, loads: StepLoads) -> list[Times]:
        """Times of one layer: as the trace routes, by chance, and evenly loaded."""
        shape, P = self.shapes[router], len(self.plan[router])
        by_chance = price.chance_loads(self.trace, router, N, P, self.gpus)
        evenly = price.even_loads(N, shape, P, self.gpus)
        return [self.prices.step_times(each, shape, N) for each in (loads, by_chance, evenly)]


def _row(kinds: Sequence[Times], drawn: DrawnSteps) -> dict[str, object]:
    times, by_chance, _ = kinds
    ms, chance, even = (float(each.total.mean()) for each in kinds)
    ms_B = price.block_means(times.total, drawn.block_S)
    error, B = price.standard_error(ms_B), len(ms_B)
    reach = student(B) * error
    apart = math.hypot(error, price.standard_error(by_chance.total))
    return {
        "steps": len(drawn.block_S),
        "ms": ms,
        "even_ms": even,
        "chance_ms": chance,
        **{f"{f.name}_ms": float(getattr(times, f.name).mean()) for f in fields(Times)},
        "cost": ms / even - 1,
        "cost_low": (ms - reach) / even - 1,
        "cost_high": (ms + reach) / even - 1,
        "cost_by_chance": chance / even - 1,
        "p": price.difference_p(ms, chance, apart, B),
        "tokens_per_s": drawn.tokens / ms * 1e3,
    }


def verdict(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    return [*cost_sentences(tables, settings, label_of), f"Simulated: {settings['times']}."]


def cost_sentences(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    table = tables["imbalance"]
    total, sizes = table[table["domain"] == ""], settings["batch_tokens"]
    several = table["phase"].nunique() > 1
    sentences = [
        _cost_sentence(row, settings, f" of {row['phase']}" if several else "")
        for row in total.sort_values("tokens", ascending=False).to_dict("records")
    ]
    for phase, rows in total.groupby("phase", sort=False, dropna=False):
        if turns := turning_point(rows, settings):
            of = f" of {phase}" if several else ""
            sentences.append(
                f"Between {turns[0]:,} and {turns[1]:,} tokens of a step{of} imbalance turns from "
                "saving time to costing it."
            )
    sentences += _costliest_layer(total, tables["imbalance_layers"], settings, label_of)
    if missing := sorted({*sizes} - {*table["tokens"]}):
        sentences.append(
            f"No step of {', '.join(f'{n:,}' for n in missing)} tokens: the trace has too few."
        )
    if settings["counts_only"]:
        load = "all tokens" if settings["documents_unknown"] else "its block of documents"
        sentences.append(
            f"Counts do not tell tokens apart: steps were drawn as if each token chose by the load "
            f"of {load}."
        )
    return sentences


def _costliest_layer(
    total: Frame, layers: Frame, settings: Settings, label_of: Labels
) -> list[str]:
    """A sentence on the layer that costs most in the largest steps, if its cost is known."""
    largest, sizes = layers[layers["tokens"] == layers["tokens"].max()], settings["batch_tokens"]
    worst = largest.loc[(largest["ms"] - largest["even_ms"]).idxmax()]
    same_phase = total["phase"].isna() | (total["phase"] == worst["phase"])
    all_layers = total[same_phase & (total["tokens"] == worst["tokens"])].iloc[0]
    if len(largest) == 1 or not _is_known(all_layers, settings, len(sizes)):
        return []
    if not _is_known(worst, settings, len(sizes) * len(largest)):
        return []
    of = f" of {worst['phase']}" if total["phase"].nunique() > 1 else ""
    return [
        f"Layer {label_of[worst['router']]} costs most in these steps: {worst['ms']:.3g} ms "
        f"instead of {worst['even_ms']:.3g} with {worst['tokens']:,} tokens{of}."
    ]


def _cost_sentence(row: dict[str, Any], settings: Settings, of: str) -> str:
    """Claims a cost if neither chance nor the error of the times explains it."""
    cost, chance = row["cost"], row["cost_by_chance"]
    start = (
        f"The MoE layers of a step of {plural(row['tokens'], 'token')}{of} take {row['ms']:.3g} ms "
        f"on {plural(settings['gpus'], 'GPU')}"
    )
    interval = ""
    low, high = (f"{row[end]:.0%}" for end in ("cost_low", "cost_high"))
    if low != high:  # there is an interval, and it is wider than a percent
        interval = f", 95% interval {low} to {high}"
    facts = f"{cost:+.0%}{interval}; by chance {chance:+.0%}"
    among, word = len(settings["batch_tokens"]), "costs" if cost > 0 else "saves"
    if _is_known(row, settings, among):
        return f"{start}: imbalance {word} {abs(row['ms'] - row['even_ms']):.2g} ms ({facts})."
    if settings["documents_unknown"] and not settings["too_few"]:
        more = f"{abs(row['ms'] - row['even_ms']):.2g} ms {'more' if cost > 0 else 'less'}"
        return (
            f"{start}, {more} than with even load ({facts}): without documents imbalance cannot be "
            "told from chance."
        )
    if settings["too_few"] or math.isnan(row["p"]):
        return f"{start} ({facts}): too little text to tell imbalance from chance."
    if settings["error"] is None:
        return f"{start} ({facts}): as the error of these times is unknown, no cost is claimed."
    if row["p"] * among > ALPHA or (cost > 0) != (cost > chance):
        return f"{start}: imbalance {word} no more than chance ({facts})."
    beyond = " beyond chance" if abs(math.log1p(cost)) > settings["error"] else ""
    return f"{start}: what imbalance {word}{beyond} is within the error of the times ({facts})."


def _is_known(row: Any, settings: Settings, among: int) -> bool:
    """True if neither chance nor the error of the times explains the cost. `among`: number of costs
    that are judged together."""
    if settings["error"] is None:
        return False
    cost = math.log1p(row["cost"])
    excess = cost - math.log1p(row["cost_by_chance"])
    is_larger = min(abs(cost), abs(excess)) > settings["error"]
    # with opposite signs it is less than what chance costs, or saves
    same_sign = cost * excess > 0
    return is_larger and same_sign and row["p"] * among <= ALPHA and not settings["too_few"]


def turning_point(rows: Frame, settings: Settings) -> tuple[int, int] | None:
    """The largest step in which imbalance is known to save time, and the smallest in which it is
    known to cost time; None unless there are both, in this order. `rows`: all layers, one phase."""
    among = len(settings["batch_tokens"])
    known = [row for row in rows.to_dict("records") if _is_known(row, settings, among)]
    saves = max((row["tokens"] for row in known if row["cost"] < 0), default=None)
    costs = min((row["tokens"] for row in known if row["cost"] > 0), default=None)
    return (saves, costs) if saves and costs and saves < costs else None


def chart(tables: Tables, settings: Settings, label_of: Labels) -> spec.Chart:
    return spec.Chart(
        "What imbalance costs",
        f"Milliseconds of the MoE layers of a step on {plural(settings['gpus'], 'GPU')}, by times "
        f"of {settings['kernel']}",
        tuple(cost_panels(tables, settings, label_of)),
        text=result.SIMULATED,
        name="imbalance",
    )


def cost_panels(tables: Tables, settings: Settings, label_of: Labels) -> Iterator[spec.Panel]:
    """For each phase: the time and the cost by tokens of a step, and the parts of the time of each
    layer."""
    table, layers = tables["imbalance"], tables["imbalance_layers"]
    several = table["phase"].nunique() > 1
    total = table[table["domain"] == ""]
    for phase, rows in total.groupby("phase", sort=False, dropna=False):
        of = f" of {phase}" if several else ""
        yield from _by_tokens(rows, settings, of)
        largest = layers[layers["tokens"] == rows["tokens"].max()]
        same_phase = largest["phase"] == phase if several else slice(None)
        yield _by_layer(largest[same_phase], label_of, of)


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
    """Stacked bars of the parts of each layer's time."""
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
        x, rows["even_ms"].to_numpy(float), "total time with even load", "c7", "tick"
    )
    layers = spec.Axis("layer", tuple(label_of[r] for r in rows["router"]))
    title = f"Each layer, with {rows['tokens'].iloc[0]:,} tokens{of}"
    return spec.Panel((*bars, even), layers, spec.Axis("ms", low=0), title)

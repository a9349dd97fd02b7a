"""`simulate routing`: token choice under a capacity, of the choices that the model made
(`capacity`), and other routing algorithms on the logits that it computed.

T tokens of a batch, E experts. A batch is a forward pass, as recorded. The effect on the quality of
the model, whose experts were trained with its own routing, is not simulated; the share of the
router's probability mass that an algorithm keeps shows how far it departs from that routing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.balance import UNEVEN, max_vio, max_vio_batch
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Panel, amount, cell_numbers
from moe_inspect.simulate import result
from moe_inspect.simulate import routing_algorithms as algo
from moe_inspect.simulate.capacity import GroupTokens, Order, drops_said, simulated_drops
from moe_inspect.simulate.capacity import panels as drops_panels
from moe_inspect.simulate.result import Frame, Labels, Settings, Tables
from moe_inspect.simulate.shards import Seen, check_length, routed
from moe_inspect.trace.reader import Trace, shards_of
from moe_inspect.trace.shard import Shard, run_edges

# by setting of an algorithm, the values that it is run with; None is the default
ValuesOf = dict[str, Sequence[float] | None]
INFINITE = 0x7C00  # the bits of a float16; NaN is above


def scored(shard: Shard, r: int, ids_KT: np.ndarray) -> algo.RouterScores:
    """What a router computed for the tokens of a shard that reach it, and what the model chose."""
    router, logits_TE, tokens = shard.trace.routers[r], shard.logits(r), ids_KT.shape[1]
    check_length(logits_TE, tokens, r)
    bits_TE = logits_TE.view(np.uint16)
    size_TE = bits_TE & 0x7FFF  # without the sign
    highest = size_TE.max(initial=0)
    unknown = highest > INFINITE or (highest == INFINITE and (bits_TE == INFINITE).any())
    if unknown or (highest == INFINITE and (size_TE.min(1) == INFINITE).any()):
        raise MoeInspectError(
            f"{shard.trace.path}: router {r} has logits that are NaN or +inf, or tokens "
            "without any finite logit"
        )
    model_TE = np.zeros((tokens, router.experts + 1), bool)
    model_TE[np.arange(tokens), ids_KT] = True  # an unused slot, −1: the last column
    of = np.ascontiguousarray(model_TE[:, :-1]), router.top_k, router.scoring
    return algo.RouterScores(logits_TE, *of)


@result.repeatable
def simulate_routing(
    trace: Trace | str | Path,
    *,
    algorithms: Sequence[str] | None = None,
    top_k: Sequence[int] | None = None,
    top_p: Sequence[float] = (0.7,),
    capacity_factors: Sequence[float] = (1.0, 1.25, 2.0),
    group_tokens: GroupTokens = "batch",
    order: Order | None = None,
    target_drop: float = 0.01,
    layers: str | int | Iterable[int | str] | None = None,
    uneven: float = UNEVEN,
) -> result.Simulation:
    """What token choice under a capacity drops, and balance, probability mass and agreement of
    other routing algorithms on recorded logits. A trace without logits gives the drops alone.

    `algorithms`: names of ALGORITHMS; default all. `top_k`: experts per token of "top-k", at least
    1; default 1, k and 2k. `top_p`: cumulative probability of "top-p", above 0 and at most 1.
    `capacity_factors`: up to 50, each above 0; also of "next best". `group_tokens`: the tokens that
    share the experts' capacity: "batch" (a forward pass), a number (at most so many of one pass) or
    "sequence" (the tokens of one sequence in one pass). `order`: which assignments are served
    first, one of ORDERS; default "arrival", or "token" where the trace does not say which choice of
    a decision was the first. `target_drop`: drop rate, 0 to 1, for which the least factor is
    sought. `layers`: only these. `uneven`: max_vio from which a router counts as unbalanced, the
    report's threshold of that name.

    Tables: capacity (a row per router and factor), capacity_needed (per router), capacity_tokens
    (per factor, all layers), capacity_by_domain, capacity_by_position; with logits first routing (a
    row per router and algorithm) and routing_algorithms (a row per algorithm). MoeInspectError for
    settings out of range, and for traces without decisions or without the weights that `order`
    needs."""
    trace = result.with_decisions(trace, "simulate routing")
    names = tuple(algorithms or algo.ALGORITHMS)
    values_of = {"top_k": top_k, "top_p": top_p, "capacity_factors": capacity_factors}
    _check(names, values_of)
    need_logits = [name for name in algorithms or () if name != "as recorded"]
    need_logits += ["top-k"] if top_k and not algorithms else []
    if need_logits and "logits" not in trace.tables:
        raise MoeInspectError(
            f"{trace.path} has no logits for {', '.join(need_logits)}: trace with --logits"
        )
    selection = select(trace, layers=layers)
    chosen = selection.routers
    drops, settings = simulated_drops(
        trace, chosen, capacity_factors, group_tokens, order, target_drop
    )
    tables, shown = drops, ("capacity", "capacity_needed")
    k = float(np.mean([trace.routers[r].top_k for r in chosen]))
    settings |= {"experts_per_token": k, "top_k": top_k, "top_p": top_p, "uneven": uneven}
    if "logits" in trace.tables:
        tables = _tables(trace, _runs_of(trace, chosen, names, values_of), k) | drops
        shown = ("routing_algorithms", "capacity_needed")
        scoring = {trace.routers[r].scoring or "softmax (not stated)" for r in chosen}
        settings["scoring"] = sorted(scoring)
    few = result.too_few(trace, selection)
    made = result.simulation(trace, few, tables, settings, verdict, chart, shown)
    return replace(made, name="routing")


def _check(names: Sequence[str], values_of: ValuesOf) -> None:
    if unknown := [name for name in names if name not in algo.ALGORITHMS]:
        raise MoeInspectError(
            f"no algorithm {', '.join(unknown)}: there are {', '.join(algo.ALGORITHMS)}"
        )
    for name, option, fits, rule in (
        ("top_k", "top-k", lambda k: k >= 1, "at least 1"),
        ("top_p", "top-p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
    ):
        if wrong := [value for value in values_of[name] or () if not fits(value)]:
            raise MoeInspectError(f"{option} {wrong[0]:g}: give a number {rule}")


def _runs_of(
    trace: Trace, routers: Sequence[int], names: Sequence[str], values_of: ValuesOf
) -> dict[int, list[Run]]:
    """Each algorithm, with each value of its setting, on the decisions of each router."""
    found = dict[int, list[Run]]()
    for r in routers:
        k, E = trace.routers[r].top_k, trace.routers[r].experts
        found[r] = [
            Run(algo.ALGORITHMS[name], value, np.zeros(E, np.int64))
            for name in names
            for value in _values(algo.ALGORITHMS[name], values_of, k, E)
        ]
    for shard in shards_of(trace, "simulating routing"):
        batch_T = shard.tokens(["batch"])["batch"].to_numpy()
        edges_of = partial(_edges, batch_T)
        for r, edges, ids_KT in routed(shard, routers, edges_of):
            every = scored(shard, r, ids_KT)
            for first, last in pairwise(edges.tolist()):
                batch = every.part(slice(first, last))
                for run in found[r]:
                    run.add(batch)
    return found


def _edges(batch_T: np.ndarray, router: int, seen: Seen) -> np.ndarray:
    """Where the batches begin among the tokens that a router sees, and the end."""
    return run_edges(batch_T[seen])


def _values(algorithm: algo.Algorithm, values_of: ValuesOf, k: int, E: int) -> list[float]:
    """The values that an algorithm is run with."""
    if not algorithm.setting:
        return [0]
    values = values_of[algorithm.setting] or (1, k, 2 * k)
    return sorted({min(v, E) if algorithm.setting == "top_k" else v for v in values})


@dataclass
class Run:
    """One algorithm with one value of its setting on one router: sums over the batches."""

    algorithm: algo.Algorithm
    value: float
    load_E: np.ndarray
    tokens: int = 0
    mass: float = 0.0
    own: float = 0.0  # mass that the top-k of the scores has
    agreed: int = 0
    recorded: int = 0
    unrouted: int = 0
    batches: list[tuple[int, float]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.algorithm.name + (f" {self.value:g}" if self.algorithm.setting else "")

    def add(self, batch: algo.RouterScores) -> None:
        chosen_TE = self.algorithm.choose(batch, self.value)
        load_E, mass, agreed, unrouted = batch.tally(chosen_TE)
        self.tokens += len(chosen_TE)
        self.own += batch.own[1]
        self.load_E += load_E
        self.mass += mass
        self.agreed += agreed
        self.recorded += batch.recorded
        self.unrouted += unrouted
        self.batches.append((len(chosen_TE), _max_vio(load_E)))

    def row(self) -> dict[str, object]:
        tokens_B, vio_B = np.array(self.batches).T
        known_B = ~np.isnan(vio_B)
        return {
            "algorithm": self.label,
            "experts_per_token": float(self.load_E.sum() / self.tokens),
            "max_vio": _max_vio(self.load_E),
            "max_vio_batch": max_vio_batch(vio_B[known_B], known_B[known_B], tokens_B[known_B]),
            "mass": self.mass / self.tokens,
            "mass_retained": self.mass / self.own,
            "agreement": self.agreed / self.recorded if self.recorded else float("nan"),
            "unrouted": self.unrouted / self.tokens,
            "leaks_future": bool(self.algorithm.leaks),
            "tokens": self.tokens,
        }


def _max_vio(load_E: np.ndarray) -> float:
    return float(max_vio(load_E[None])[0])


def _tables(trace: Trace, runs_of: dict[int, list[Run]], k: float) -> dict[str, pd.DataFrame]:
    routing = pd.DataFrame(
        {"layer": trace.routers[r].layer, "router": r, **run.row()}
        for r, found in runs_of.items()
        for run in found
        if run.tokens
    )
    rows = []
    by_label = {run.label: run.algorithm for found in runs_of.values() for run in found}
    for label, algorithm in by_label.items():
        mine = routing[routing["algorithm"] == label]
        experts = mine["experts_per_token"].mean()
        rows.append(
            {
                "algorithm": label,
                "experts_per_token": experts,
                "max_vio_worst": mine["max_vio"].max(),
                "mass_retained_least": mine["mass_retained"].min(),
                "agreement_least": mine["agreement"].min(),
                "leaks_future": "yes" if algorithm.leaks else "no",
                "source": algorithm.source,
                "use_when": algorithm.use_when + added_compute(experts / k),
            }
        )
    return {"routing": routing, "routing_algorithms": pd.DataFrame(rows)}


SAME_COMPUTE = 0.005  # relative difference in experts per token that counts as none


def added_compute(times: float) -> str:
    """The compute relative to the model's own routing, in words; "" where it is the same."""
    same = abs(times - 1) <= SAME_COMPUTE
    return "" if same else f"; computes {times:.3g}x as many experts per token"


def verdict(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    said = drops_said(tables, settings, label_of)
    if "routing" in tables:
        return [*said, *algorithms_said(tables, settings, label_of)]
    return [
        *said,
        f"For {', '.join(name for name in algo.ALGORITHMS if name != 'as recorded')}: trace with "
        "--logits.",
    ]


def algorithms_said(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    routing, advice = tables["routing"], tables["routing_algorithms"]
    sentences, uneven = [], settings["uneven"]
    recorded = routing[routing["algorithm"] == "as recorded"]
    if len(recorded):
        worst = recorded.loc[recorded["max_vio"].idxmax()]
        sentences.append(
            f"As recorded, layer {label_of[int(worst['router'])]} is the least balanced: its "
            f"busiest expert gets {1 + worst['max_vio']:.2f}x the mean load over all tokens."
        )
    same = (advice["experts_per_token"] / settings["experts_per_token"] - 1).abs() <= SAME_COMPUTE
    even = advice[same & (advice["leaks_future"] == "no") & (advice["max_vio_worst"] < uneven)]
    rule = f"(no expert gets {1 + uneven:g}x the mean load)"
    said = f"no causal algorithm with the same compute balances every layer {rule}."
    if len(even):
        best = even.loc[even["mass_retained_least"].idxmax()]
        said = (
            f"of the causal algorithms with the same compute that balance every layer {rule}, "
            f"{best['algorithm']} keeps the most probability mass: at least "
            f"{best['mass_retained_least']:.0%}."
        )
    if not settings["too_few"]:
        sentences.append(f"Simulated: {said}")
    leaking = advice[advice["leaks_future"] == "yes"]["algorithm"]
    if len(leaking):
        named = ", ".join(f"{label} ({algo.ALGORITHMS[label].leaks})" for label in leaking)
        sentences.append(
            f"Not causal: {named}. A token's experts depend on later tokens, which "
            "are unknown during generation."
        )
    if any("not stated" in scoring for scoring in settings["scoring"]):
        sentences.append(
            "The trace does not state the scoring of some routers: softmax is assumed."
        )
    effect = "The effect on the model's quality is not simulated: its experts were trained with its"
    return [*sentences, f"{effect} own routing."]


def chart(tables: Tables, settings: Settings, label_of: Labels) -> Chart:
    panels = drops_panels(tables, settings, label_of)
    said = "An expert takes at most its even share of a group × the capacity factor."
    if "routing" in tables:
        panels = (*panels, *_by_algorithm(tables["routing"], label_of))
        said += " 1 is even load. An algorithm that is not causal lets later tokens decide, which "
        said += "are unknown during generation."
    return Chart(
        "Routing algorithms",
        "What a capacity drops; how even the load is under each algorithm, and how much of the "
        "router's choice it keeps",
        panels,
        text=result.SIMULATED + said,
        columns=2,
        name="routing",
    )


def _by_algorithm(routing: Frame, label_of: Labels) -> list[Panel]:
    """Each algorithm at each layer: imbalance, and the probability mass that is kept."""
    algorithms = list(routing["algorithm"].unique())
    leaks = set(routing[routing["leaks_future"]]["algorithm"])
    names = tuple(f"{name} (not causal)" if name in leaks else name for name in algorithms)
    routers = list(routing["router"].unique())
    layers = Axis("layer", tuple(label_of[r] for r in routers))
    panels = list[Panel]()
    routing = routing.assign(max_over_mean=1 + routing["max_vio"])
    for column, title, even, least in (
        ("max_over_mean", "Load of the busiest expert ÷ mean load", 1, 1.5),
        ("mass_retained", "Probability mass ÷ that of the router's own top-k", 0, 1.0),
    ):
        wide = routing.pivot(index="algorithm", columns="router", values=column)
        value_AL = wide.reindex(index=algorithms, columns=routers).to_numpy(float)
        scale = amount(column, even, value_AL, least)
        heatmap = Heatmap(value_AL, scale, cell_numbers(value_AL))
        panels.append(Panel((heatmap,), layers, Axis("algorithm", names), title))
    return panels

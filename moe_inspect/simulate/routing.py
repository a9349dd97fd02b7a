"""`simulate routing`: other routing algorithms on the logits that the model computed.

T tokens of a batch, E experts. A batch is a forward pass, as recorded. The effect on the quality of
the model, whose experts were trained with its own routing, is not simulated; the share of the
router's probability mass that an algorithm keeps shows how far it departs from that routing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
from moe_inspect.simulate.result import Labels, Settings, Tables
from moe_inspect.simulate.shards import Seen, check_length, routed
from moe_inspect.trace.reader import Trace, shards_of
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard

# by setting of an algorithm, the values that it is run with; None is the default
ValuesOf = dict[str, Sequence[float] | None]
INFINITE = 0x7C00  # the bits of a float16; NaN is above
SAMPLE = 16_384  # tokens, at most, that an algorithm that learns is prepared on


class ShardTokens:
    """The tokens of a shard that reach the routers of a stack: where their batches begin, and
    which half of the documents each is in."""

    def __init__(self, shard: Shard, half_of: pd.Series, router: int, seen: Seen) -> None:
        columns = shard.tokens(["batch", "token_id", "document"]).columns
        self.batch_T, self.token_id_T, document_T = (c.to_numpy()[seen] for c in columns)
        self.half_T = half_of.reindex(document_T).to_numpy()
        self.edges = run_edges(self.batch_T).tolist()
        self.blind_B = [dict[tuple[str, int, int], np.ndarray]() for _ in self.edges[1:]]

    def scored(self, shard: Shard, r: int, ids_KT: np.ndarray) -> algo.RouterScores:
        """With what a router computed for them, and what the model chose."""
        router, logits_TE = shard.trace.routers[r], shard.logits(r)
        check_length(logits_TE, len(self.batch_T), r)
        bits_TE = logits_TE.view(np.uint16)
        size_TE = bits_TE & 0x7FFF  # without the sign
        highest = size_TE.max(initial=0)
        unknown = highest > INFINITE or (highest == INFINITE and (bits_TE == INFINITE).any())
        if unknown or (highest == INFINITE and (size_TE.min(1) == INFINITE).any()):
            raise MoeInspectError(
                f"{shard.trace.path}: router {r} has logits that are NaN or +inf, or tokens "
                "without any finite logit"
            )
        model_TE = np.zeros((len(self.batch_T), router.experts + 1), bool)
        model_TE[np.arange(len(model_TE)), ids_KT] = True  # an unused slot, −1: the last column
        of = np.ascontiguousarray(model_TE[:, :-1]), self.token_id_T, router.top_k, router.scoring
        return algo.RouterScores(logits_TE, *of, -1)

    def of_half(self, half: int | None) -> np.ndarray:
        """The tokens of one half of the documents, or of all. int64 [T]"""
        return np.arange(len(self.half_T)) if half is None else np.flatnonzero(self.half_T == half)


@result.repeatable
def simulate_routing(
    trace: Trace | str | Path,
    *,
    algorithms: Sequence[str] | None = None,
    top_k: Sequence[int] | None = None,
    top_p: Sequence[float] = (0.7,),
    capacity_factor: Sequence[float] = (1.0, 1.25),
    layers: str | int | Iterable[int | str] | None = None,
    uneven: float = UNEVEN,
) -> result.Simulation:
    """Balance, probability mass and agreement of other routing algorithms on recorded logits.

    `algorithms`: names of ALGORITHMS; default all. `top_k`: experts per token of "top-k", at
    least 1; default 1, k and 2k. `top_p`: cumulative probability of "top-p", above 0 and at most 1.
    `capacity_factor`: of "next best", above 0. `layers`: only these. `uneven`: max_vio from which a
    router counts as unbalanced, the report's threshold of that name.

    Tables: routing (a row per router and algorithm), routing_algorithms (a row per algorithm).
    MoeInspectError for a trace without logits, and for values out of range."""
    trace = result.with_decisions(trace, "simulate routing")
    names = tuple(algorithms or algo.ALGORITHMS)
    values_of = {"top_k": top_k, "top_p": top_p, "capacity_factor": capacity_factor}
    _check(trace, names, values_of)
    selection = select(trace, layers=layers)
    chosen = selection.routers
    documents = trace.documents().drop_duplicates("document").sort_values("document")
    # alternating within each domain: two halves with the same mix of domains
    half_of = documents.set_index("document").groupby("domain", observed=True).cumcount() % 2
    # algorithms that learn are fitted on one half of the documents and evaluated on the other
    held_out = half_of.nunique() == 2
    asked = names, values_of, half_of, held_out
    runs_of = _runs_of(trace, chosen, *asked)
    k = float(np.mean([trace.routers[r].top_k for r in chosen]))
    settings: Settings = {
        "batch": "a forward pass",
        "bias_held_out": held_out,
        "experts_per_token": k,
        **values_of,
        "uneven": uneven,
        "scoring": sorted({trace.routers[r].scoring or "softmax (not stated)" for r in chosen}),
    }
    shown = ("routing_algorithms",)
    tables = _tables(trace, runs_of, k)
    few = result.too_few(trace, selection)
    return result.simulation(trace, few, tables, settings, verdict, chart, shown)


def _check(trace: Trace, names: Sequence[str], values_of: ValuesOf) -> None:
    if "logits" not in trace.tables:
        raise MoeInspectError(
            f"{trace.path} has no logits, which simulate routing needs: trace with --logits"
        )
    if unknown := [name for name in names if name not in algo.ALGORITHMS]:
        raise MoeInspectError(
            f"no algorithm {', '.join(unknown)}: there are {', '.join(algo.ALGORITHMS)}"
        )
    for name, option, fits, rule in (
        ("top_k", "top-k", lambda k: k >= 1, "at least 1"),
        ("top_p", "top-p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
        ("capacity_factor", "capacity factor", lambda f: 0 < f < 1e6, "above 0"),
    ):
        if wrong := [value for value in values_of[name] or () if not fits(value)]:
            raise MoeInspectError(f"{option} {wrong[0]:g}: give a number {rule}")


def _runs_of(
    trace: Trace,
    routers: Sequence[int],
    names: Sequence[str],
    values_of: ValuesOf,
    half_of: pd.Series,
    held_out: bool,
) -> dict[int, list[Run]]:
    """Each algorithm, with each value of its setting, on the decisions of each router. `held_out`:
    algorithms that learn are fitted on half 0 of the documents and evaluated on half 1."""
    found, (fit, judged) = dict[int, list[Run]](), (0, 1) if held_out else (None, None)
    for r in routers:
        k, E = trace.routers[r].top_k, trace.routers[r].experts
        found[r] = [
            Run(algo.ALGORITHMS[name], value, np.zeros(E, np.int64))
            for name in names
            for value in _values(algo.ALGORITHMS[name], values_of, k, E)
        ]
    for shard in shards_of(trace, "simulating routing"):
        for r, tokens, ids_KT in routed(shard, routers, partial(ShardTokens, shard, half_of)):
            every, of_fit = tokens.scored(shard, r, ids_KT), tokens.of_half(fit)
            for run in found[r]:
                if run.algorithm.prepare and not run.state and len(of_fit):
                    drawn = np.random.default_rng(algo.SEED).permutation(of_fit)[:SAMPLE]
                    run.state = run.algorithm.prepare(every.part(np.sort(drawn)))
            for (first, last), blind in zip(pairwise(tokens.edges), tokens.blind_B, strict=True):
                number = int(tokens.batch_T[first])
                batch = every.part(slice(first, last), number=number, blind=blind)
                at_N = np.flatnonzero(tokens.half_T[first:last] == judged)
                for run in found[r]:
                    if not (held_out and run.algorithm.prepare):
                        run.add(batch)
                    elif len(at_N):
                        run.add(batch.part(at_N))
    return found


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
    state: algo.State = field(default_factory=dict)
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
        blind = self.algorithm.name, len(self.load_E), batch.k
        chosen_TE = batch.blind.get(blind)
        if chosen_TE is None:
            chosen_TE = self.algorithm.choose(batch, self.value, self.state)
        if self.algorithm.blind:
            batch.blind[blind] = chosen_TE
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
    routing, advice = tables["routing"], tables["routing_algorithms"]
    sentences, uneven = [], settings["uneven"]
    recorded = routing[routing["algorithm"] == "as recorded"]
    if len(recorded):
        worst = recorded.loc[recorded["max_vio"].idxmax()]
        layer = label_of[int(worst["router"])]
        sentences.append(
            f"As recorded, layer {layer} is the least balanced: its busiest expert gets "
            f"{1 + worst['max_vio']:.2f}x the mean load over all tokens."
        )
        mine = routing[routing["router"] == worst["router"]].set_index("algorithm")
        if "loss-free bias" in mine.index:
            row = mine.loc["loss-free bias"]
            helps, judged = row["max_vio"] < worst["max_vio"], "."
            if settings["bias_held_out"]:
                judged = ", on the half of the documents held out from fitting the bias."
            sentences.append(
                f"Simulated: a loss-free bias would {'bring' if helps else 'not even out'} layer "
                f"{layer}{' to' if helps else ':'} {1 + row['max_vio']:.2f}x the mean load "
                f"({1 + row['max_vio_batch']:.2f}x per batch), keeping "
                f"{row['mass_retained']:.0%} of the probability mass of the router's own "
                f"top choices and {row['agreement']:.0%} of the model's choices{judged}"
            )
    same = (advice["experts_per_token"] / settings["experts_per_token"] - 1).abs() <= SAME_COMPUTE
    causal = (advice["leaks_future"] == "no") & ~advice["algorithm"].isin(["hash", "random"])
    even = advice[same & causal & (advice["max_vio_worst"] < uneven)]
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
    """Each algorithm at each layer: imbalance, and the probability mass that is kept."""
    routing = tables["routing"]
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
    said = "1 is even load. An algorithm that is not causal lets later tokens decide, which are "
    return Chart(
        "Routing algorithms",
        "How even the load is under each algorithm, and how much of the router's choice it keeps",
        tuple(panels),
        text=f"{result.SIMULATED}{said}unknown during generation.",
        name="routing",
    )

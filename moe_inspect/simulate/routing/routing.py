"""`simulate routing`: other routing algorithms on the logits that the model computed.

T tokens of a batch, E experts. A batch is a forward pass, as recorded. What another routing would
do to the model's quality is not simulated: its experts were trained with their own; how much of the
router's probability is kept says how far off it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.balance import UNEVEN, max_vio, max_vio_batch
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.result import Simulation, need_decisions
from moe_inspect.simulate.routing.algorithms import (
    ALGORITHMS,
    SEED,
    Algorithm,
    Batch,
    batch_of,
    largest,
)
from moe_inspect.simulate.shards import check_length, runs, slots
from moe_inspect.text import layer_label
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.shard import Shard

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SAMPLE = 16_384  # tokens from which algorithms with a memory warm up
AS_MUCH = 0.005  # share of the model's experts a token that is no difference


def simulate_routing(
    trace: Trace | str | Path,
    *,
    algorithms: Sequence[str] | None = None,
    top_k: Sequence[int] | None = None,
    top_p: Sequence[float] = (0.7,),
    capacity_factor: Sequence[float] = (1.0, 1.25),
    layers: str | int | Iterable[int] | None = None,
    uneven: float = UNEVEN,
) -> Simulation:
    """Balance, probability mass and agreement of other routing algorithms. `top_k`: default 1, k
    and 2k. `capacity_factor`: of "next best". `uneven`: max_vio from which a router is not
    balanced, the report's threshold of that name."""
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    need_decisions(trace, "simulate routing")
    if "logits" not in trace.tables:
        raise MoeInspectError(
            f"{trace.path} has no logits, which simulate routing needs: trace with --logits"
        )
    unknown = [name for name in algorithms or [] if name not in ALGORITHMS]
    if unknown:
        raise MoeInspectError(
            f"no algorithm {', '.join(unknown)}: there are {', '.join(ALGORITHMS)}"
        )
    for name, values, fits, rule in (
        ("top-k", top_k or [], lambda k: k >= 1, "at least 1"),
        ("top-p", top_p, lambda p: 0 < p <= 1, "above 0 and at most 1"),
        ("capacity factor", capacity_factor, lambda f: 0 < f < 1e6, "above 0"),
    ):
        if wrong := [value for value in values if not fits(value)]:
            raise MoeInspectError(f"{name} {wrong[0]:g}: give a number {rule}")
    chosen = select(trace, layers=layers).routers
    named = [ALGORITHMS[name] for name in algorithms or ALGORITHMS]
    given: dict[str, Sequence[float] | None] = {
        "top_k": top_k,
        "top_p": top_p,
        "capacity_factor": capacity_factor,
    }
    runs_of = {
        r: [
            Run(a, value)
            for a in named
            for value in _values(a, given, trace.routers[r].top_k, trace.routers[r].experts)
        ]
        for r in chosen
    }
    half_of = halves(trace)
    held_out = (
        half_of.nunique() == 2
    )  # what learns does so from the one half, and is judged on the other
    for r in chosen:
        learning, others = (
            [run for run in runs_of[r] if bool(run.algorithm.prepare) == learns]
            for learns in (True, False)
        )
        for shard in trace.shards:
            decisions = Decisions(shard, r, half_of)
            for run in learning:
                if (
                    not run.memory
                    and run.algorithm.prepare
                    and len(sample := decisions.tokens(0 if held_out else None))
                ):
                    run.memory = run.algorithm.prepare(decisions.sample(sample))
            for running, half in ((others, None), (learning, 1 if held_out else None)):
                for batch in decisions.batches(half) if running else ():
                    own = float(
                        batch.share_TE[largest(batch.scores_TE, batch.k)].sum(dtype=np.float64)
                    )
                    for run in running:
                        run.add(batch, own)
    if not any(run.tokens for found in runs_of.values() for run in found):
        raise MoeInspectError(f"{trace.path} holds no tokens yet: nothing is committed")
    k = float(np.mean([trace.routers[r].top_k for r in chosen]))
    tables = _tables(trace, runs_of, k)
    settings = {
        "batch": "a forward pass",
        "bias_held_out": held_out,
        "experts_per_token": k,
        **given,
        "uneven": uneven,
        "scoring": sorted({trace.routers[r].scoring or "softmax (not stated)" for r in chosen}),
    }
    label_of = {r: layer_label(trace.routers, r) for r in chosen}
    said = _verdict(tables, settings, label_of)
    return Simulation(
        "routing",
        tables,
        said,
        settings,
        lambda: _figure(tables, uneven, label_of),
        ("routing_algorithms",),
    )


def halves(trace: Trace) -> pd.Series:
    """Which half each document of the trace is of, 0 or 1: in turn within each domain, so that the
    halves are alike."""
    listed: Any = (
        trace.documents().drop_duplicates("document").sort_values("document").set_index("document")
    )
    return listed.groupby("domain", observed=True).cumcount() % 2


def _values(
    algorithm: Algorithm, given: dict[str, Sequence[float] | None], k: int, E: int
) -> list[float]:
    if not algorithm.setting:
        return [0]
    values = given[algorithm.setting] or (1, k, 2 * k)
    return (
        sorted({min(v, E) for v in values}) if algorithm.setting == "top_k" else sorted(set(values))
    )


class Decisions:
    """What one router decided in one shard, from which logits."""

    def __init__(self, shard: Shard, r: int, half_of: pd.Series) -> None:
        self.router, seen = shard.trace.routers[r], shard.seen(r)
        table = shard.tokens(["batch", "token_id", "document"])
        kept = slice(None) if seen is None else seen
        self.batch_T, self.token_id_T = (
            table["batch"].to_numpy()[kept],
            table["token_id"].to_numpy()[kept],
        )
        self.half_T = half_of.reindex(table["document"].to_numpy()[kept]).to_numpy()
        ids_KT, self.logits_TE = slots(shard, r), shard.logits(r)
        check_length(ids_KT.T, len(self.batch_T), r)
        check_length(self.logits_TE, len(self.batch_T), r)
        if np.isnan(self.logits_TE).any() or not np.isfinite(self.logits_TE).any(1).all():
            raise MoeInspectError(
                f"{shard.trace.path}: router {r} has logits that are NaN, or tokens without a "
                "finite one"
            )
        model_TE = np.zeros((len(self.batch_T), self.router.experts + 1), bool)
        model_TE[np.arange(len(self.batch_T)), ids_KT] = True  # −1, nowhere, is the last column
        self.model_TE = model_TE[:, :-1]

    def batch(self, part: Any, number: int) -> Batch:
        k, scoring = self.router.top_k, self.router.scoring
        return batch_of(
            self.logits_TE[part], self.model_TE[part], self.token_id_T[part], k, scoring, number
        )

    def tokens(self, half: int | None) -> np.ndarray:
        """Of a half of the documents, or all."""
        return np.arange(len(self.half_T)) if half is None else np.flatnonzero(self.half_T == half)

    def batches(self, half: int | None) -> Iterator[Batch]:
        tokens = self.tokens(half)
        start_G = runs(self.batch_T[tokens])
        for first, last in pairwise(start_G):
            yield self.batch(
                tokens[first:last] if half is not None else slice(first, last),
                int(self.batch_T[tokens[first]]),
            )

    def sample(self, tokens: np.ndarray) -> Batch:
        """At most SAMPLE of them, drawn by lot."""
        drawn = np.random.default_rng(SEED).permutation(tokens)[:SAMPLE]
        return self.batch(np.sort(drawn), -1)


@dataclass
class Run:
    """One algorithm, at one value of its setting, on one router: what the batches add up to."""

    algorithm: Algorithm
    value: float
    memory: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    load_E: np.ndarray | None = None
    mass: float = 0.0
    own: float = 0.0  # mass of the router's own top-k
    agreed: int = 0
    recorded: int = 0
    unrouted: int = 0
    batches: list[tuple[int, float]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return (
            f"{self.algorithm.name} {self.value:g}"
            if self.algorithm.setting
            else self.algorithm.name
        )

    def add(self, batch: Batch, own: float) -> None:
        chosen_TE = self.algorithm.choose(batch, self.value, self.memory)
        load_E = chosen_TE.sum(0)
        self.tokens += len(chosen_TE)
        self.own += own
        self.load_E = load_E if self.load_E is None else self.load_E + load_E
        self.mass += float(batch.share_TE[chosen_TE].sum(dtype=np.float64))
        self.agreed += int((chosen_TE & batch.model_TE).sum())
        self.recorded += int(batch.model_TE.sum())
        self.unrouted += int((~chosen_TE.any(1)).sum())
        self.batches.append((len(chosen_TE), _max_vio(load_E)))

    def row(self) -> dict[str, object]:
        assert self.load_E is not None
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
    import pandas as pd

    rows = [
        {"layer": trace.routers[r].layer, "router": r, **run.row()}
        for r, found in runs_of.items()
        for run in found
        if run.tokens
    ]
    routing: Any = pd.DataFrame(rows)
    said = []
    by_label = {run.label: run.algorithm for found in runs_of.values() for run in found}
    for label, algorithm in by_label.items():
        mine = routing[routing["algorithm"] == label]
        said.append(
            {
                "algorithm": label,
                "experts_per_token": mine["experts_per_token"].mean(),
                "max_vio_worst": mine["max_vio"].max(),
                "mass_retained_least": mine["mass_retained"].min(),
                "agreement_least": mine["agreement"].min(),
                "leaks_future": "yes" if algorithm.leaks else "no",
                "use_when": algorithm.use_when + _compute(mine["experts_per_token"].mean() / k),
            }
        )
    return {"routing": routing, "routing_algorithms": pd.DataFrame(said)}


def _compute(times: float) -> str:
    """How much of the model's compute, where that is another than the model's."""
    return "" if abs(times - 1) <= AS_MUCH else f"; computes {times:.3g}x as many experts a token"


def _verdict(
    tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]
) -> list[str]:
    routing, advice = tables["routing"], tables["routing_algorithms"]
    said, uneven = [], settings["uneven"]
    recorded = routing[routing["algorithm"] == "as recorded"]
    if len(recorded):
        worst = recorded.loc[recorded["max_vio"].idxmax()]
        layer = label_of[int(worst["router"])]
        said.append(
            f"As recorded, layer {layer} is the least balanced: max_vio {worst['max_vio']:.2f} "
            "over all tokens."
        )
        bias = routing[
            (routing["router"] == worst["router"]) & (routing["algorithm"] == "loss-free bias")
        ]
        if len(bias):
            row = bias.iloc[0]
            helps = row["max_vio"] < worst["max_vio"]
            said.append(
                f"Simulated: a loss-free bias would {'bring' if helps else 'not even out'} layer "
                f"{layer}{' to' if helps else ':'} max_vio "
                f"{row['max_vio']:.2f} ({row['max_vio_batch']:.2f} by batch), keeping "
                f"{row['mass_retained']:.0%} of the probability mass of the router's own "
                f"top choices and {row['agreement']:.0%} of the model's choices"
                + (
                    ", on the half of the documents that the bias had not seen."
                    if settings["bias_held_out"]
                    else "."
                )
            )
    same = (advice["experts_per_token"] / settings["experts_per_token"] - 1).abs() <= AS_MUCH
    usable = advice[
        same & (advice["leaks_future"] == "no") & ~advice["algorithm"].isin(["hash", "random"])
    ]
    even = usable[usable["max_vio_worst"] < uneven]
    if len(even):
        best = even.loc[even["mass_retained_least"].idxmax()]
        said.append(
            "Simulated: of those that compute as much and need not see the future, "
            f"{best['algorithm']} keeps most among the ones that balance "
            f"every layer (max_vio below {uneven:g}): at least {best['mass_retained_least']:.0%} "
            "of the mass."
        )
    else:
        said.append(
            "Simulated: none that computes as much and need not see the future balances every "
            f"layer (max_vio below {uneven:g})."
        )
    leaking = [
        f"{label} ({ALGORITHMS[label].leaks})"
        for label in advice[advice["leaks_future"] == "yes"]["algorithm"]
    ]
    if leaking:
        said.append(
            f"Leak the future: {', '.join(leaking)}: a token's experts depend on later tokens, "
            "which a model that generates does not have."
        )
    if any("not stated" in scoring for scoring in settings["scoring"]):
        said.append("The trace does not say how some routers score: softmax was taken.")
    said.append(
        "What another routing does to quality is not simulated: these experts were trained with "
        "their own."
    )
    return said


def _figure(tables: dict[str, Any], uneven: float, label_of: dict[int, str]) -> Figure:
    """Each algorithm, at the layer that is least balanced as it is: imbalance, and the probability
    mass that is kept."""
    from matplotlib.figure import Figure

    routing = tables["routing"]
    recorded = routing[routing["algorithm"] == "as recorded"]
    base = recorded if len(recorded) else routing
    worst = base.loc[base["max_vio"].idxmax()]
    at = routing[routing["router"] == worst["router"]].iloc[::-1]
    colours = ["#c0392b" if leaks else "#2c3e50" for leaks in at["leaks_future"]]
    figure = Figure(figsize=(9.5, 1.3 + 0.3 * len(at)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, form in ((left, "max_vio", "{:.2f}"), (right, "mass_retained", "{:.0%}")):
        bars = axes.barh(at["algorithm"], at[column], color=colours, height=0.65)
        axes.bar_label(bars, [form.format(value) for value in at[column]], padding=3, fontsize=8)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    left.axvline(uneven, color="0.4", lw=0.8, ls="--")
    left.set_title(
        f"Simulated, layer {label_of[int(worst['router'])]}: max_vio (dashed: {uneven:g}, "
        "balanced)",
        loc="left",
        fontsize=10,
    )
    right.set_title("probability mass, ÷ the router's own top-k", loc="left", fontsize=10)
    if at["leaks_future"].any():
        figure.supxlabel(
            "red: sees the whole batch, so leaks the future", fontsize=8, color="#c0392b"
        )
    return figure

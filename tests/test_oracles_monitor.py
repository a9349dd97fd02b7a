"""Every number that a training monitor logs and every alarm, computed once more from the choices
that a tiny model made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moe_inspect
from moe_inspect.model.custom.spec import RouterSpec
from moe_inspect.trace.schema import Router
from moe_inspect.training import RoutingMonitor
from moe_inspect.watch.alarms import Alarms, Window
from moe_inspect.watch.rules import known_metrics, parse_rule
from tests.support.generated import committed


class Kind(NamedTuple):
    """Of a router. Two of them are in one layer."""

    label: str
    experts: int
    top_k: int
    scoring: str = "softmax"
    drops: bool = False
    biased: bool = False
    logits: bool = True


KINDS = (
    Kind("0", 12, 2),
    Kind("1/1", 5, 1, "sigmoid", biased=True),
    Kind("1/2", 12, 3, drops=True, logits=False),
)


class Gate(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind, self.score = kind, nn.Linear(6, kind.experts, bias=False)
        bias = torch.linspace(-1, 2, kind.experts) if kind.biased else torch.zeros(kind.experts)
        if kind.biased:
            self.register_buffer("score_bias", bias)
        self.tilt = torch.linspace(0, 2 if kind.biased else -6, kind.experts)
        self.score.weight.data.normal_(std=1.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.score(x) + self.tilt
        ids = (logits + getattr(self, "score_bias", 0)).topk(self.kind.top_k).indices
        is_lost = logits.gather(-1, ids) < -2
        return logits, ids.masked_fill(is_lost, -1) if self.kind.drops else ids


class Pass(NamedTuple):
    """Without padding, of each router."""

    logits: list[np.ndarray]
    ids: list[np.ndarray]


class Drawn(nn.Module):
    """Keeps what its routers choose, apart by whether the pass is training."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(40, 6)
        self.gates = nn.ModuleList(map(Gate, KINDS))
        self.seen: dict[bool, list[Pass]] = {True: [], False: []}

    def forward(self, tokens: Tensor, attention_mask: Tensor, fails: bool = False) -> None:
        real, x = attention_mask.flatten() > 0, self.embed(tokens)
        chosen = [[of.detach().flatten(0, 1)[real].numpy() for of in g(x)] for g in self.gates]
        if fails:
            raise ArithmeticError
        where = self.training and torch.is_grad_enabled()
        self.seen[where].append(Pass(*map(list, zip(*chosen, strict=True))))

    def taken(self, training: bool) -> list[Pass]:
        taken, self.seen[training] = self.seen[training], []
        return taken

    def specs(self) -> list[RouterSpec]:
        choice = lambda module, args, kwargs, out: (out[1], torch.ones(out[1].shape))  # noqa: E731
        logits = lambda module, args, kwargs, out: out[0]  # noqa: E731
        return [
            RouterSpec(
                module=f"gates.{r}",
                choice=choice,
                experts=kind.experts,
                top_k=kind.top_k,
                layer=min(r, 1),
                logits=logits if kind.logits else None,
                scoring=kind.scoring,
                drops=kind.drops,
            )
            for r, kind in enumerate(KINDS)
        ]


def load_of(passes: list[Pass], r: int) -> np.ndarray:
    ids = np.concatenate([p.ids[r].ravel() for p in passes])
    return np.bincount(ids[ids >= 0], minlength=KINDS[r].experts)


def of_load(load: np.ndarray, before: np.ndarray | None = None) -> dict[str, float]:
    """The metrics of a router's load in a window."""
    if not load.any():
        return {}
    E, ratio, share = len(load), load / load.mean(), load / load.sum()
    drift = np.nan if before is None or not before.any() else before / before.sum()
    return {
        "max_over_mean": ratio.max(),
        "max_vio": ratio.max() - 1,
        "cv": ratio.std(),
        "gini": np.abs(ratio[:, None] - ratio).sum() / (2 * E * E),
        "entropy": -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(E),
        "dead_experts": (load == 0).sum(),
        "starved_experts": ((load > 0) & (ratio < 0.1)).sum(),
        "balancedness": 1 / ratio.max(),
        "drift": np.abs(share - drift).sum() / 2,
    }


def losses_of(p: Pass, r: int) -> tuple[float, float]:
    """E · Σ f · P and the mean squared log-sum-exp, of a pass."""
    logits, load = p.logits[r].astype(float), load_of([p], r)
    score = 1 / (1 + np.exp(-logits)) if KINDS[r].scoring == "sigmoid" else np.exp(logits)
    mean_score = (score / score.sum(1, keepdims=True)).mean(0)
    even = KINDS[r].experts * (load / max(load.sum(), 1) * mean_score).sum()
    return even, (np.log(np.exp(logits).sum(1)) ** 2).mean()


def of_router(steps: list[list[Pass]], r: int, before: Any, training: bool) -> dict[str, float]:
    """Everything that is logged of router r, of a window of these steps."""
    kind, passes = KINDS[r], [p for step in steps for p in step]
    load, found = load_of(passes, r), dict[str, float]()
    metrics = "max_vio", "dead_experts", "starved_experts", "entropy", "drift"
    of = of_load(load, None if before is None else load_of([*chain(*before)], r))
    found |= {name: of[name] for name in metrics if name in of}
    if training:
        busiest = [of_load(load_of(step, r)).get("max_vio", np.nan) for step in steps[-32:]]
        found["max_vio_batch"] = np.nanmean(busiest) if load.any() else np.nan
    if kind.logits:
        found["aux_loss"], found["z_loss"] = np.mean([losses_of(p, r) for p in passes], axis=0)
    if kind.biased and training:
        found["bias_range"] = 3.0
    if kind.drops:
        found["drop_rate"] = (np.concatenate([p.ids[r] for p in passes]) < 0).mean()
    return found


def logged(steps: list[list[Pass]], before: Any, detail: str, prefix: str) -> dict[str, float]:
    training, found = prefix == "routing/", dict[str, float]()
    of = pd.DataFrame([of_router(steps, r, before, training) for r in range(len(KINDS))])
    for name, column in of.dropna(axis=1, how="all").items():
        found[f"{prefix}{name}/worst"] = column.min() if name == "entropy" else column.max()
        found[f"{prefix}{name}/median"] = column.median()
        if detail == "layers":
            labelled = zip(KINDS, column, strict=True)
            found |= {f"{prefix}{name}/layer_{k.label}": v for k, v in labelled if v == v}
    found[f"{prefix}worst_layer"] = min(int(of["max_vio"].argmax()), 1)
    if training:
        tokens = sum(len(p.ids[0]) for step in steps for p in step)
        found |= {"routing/tokens": tokens, "routing/alarms": 0}
    return found


@dataclass(frozen=True)
class Run:
    seed: int = 0
    steps: int = 6
    accumulate: int = 1
    every: int = 1
    log_steps: int = 2
    flush_steps: int | None = None
    detail: str = "layers"


RUNS = st.builds(
    Run,
    seed=st.integers(0, 99),
    steps=st.integers(1, 9),
    accumulate=st.integers(1, 3),
    every=st.integers(1, 3),
    log_steps=st.integers(1, 4),
    flush_steps=st.sampled_from((None, 1, 3)),
    detail=st.sampled_from(("layers", "summary")),
)
PHASES = Phase.explicit, Phase.generate
on_few = partial(settings, derandomize=True, deadline=None, database=None, phases=PHASES)


def batch(rng: np.random.Generator) -> dict[str, Tensor]:
    lengths = rng.integers(1, 13, rng.integers(1, 5))
    mask = np.arange(12) < lengths[:, None]
    tokens = torch.from_numpy(rng.integers(0, 40, mask.shape))
    return {"tokens": tokens, "attention_mask": torch.from_numpy(mask.astype(int))}


@on_few(max_examples=8)
@given(RUNS)
@example(Run(steps=37, log_steps=35, flush_steps=50))
@example(Run(steps=7, accumulate=3, every=2, log_steps=3, flush_steps=1))
def test_what_is_logged_and_kept_is_what_the_routers_chose(run: Run) -> None:
    """Padding, passes that fail and those in evaluation left out; uneven passes, drops."""
    model, rng, steps = Drawn(run.seed), np.random.default_rng(run.seed), dict[int, list[Pass]]()
    logs, before = 0, None
    options = {n: getattr(run, n) for n in ("every", "log_steps", "flush_steps", "detail")}
    with TemporaryDirectory(prefix="monitor-") as root:
        path = Path(root) / "h"
        monitor = RoutingMonitor(model, path, routers=model.specs(), rules=(), **options)
        with monitor:
            for step in range(1, run.steps + 1):
                for _ in range(run.accumulate):
                    model(**batch(rng))
                model.eval()(**batch(rng))
                model.train()
                with torch.no_grad():  # what a trainer generates
                    model(**batch(rng))
                with pytest.raises(ArithmeticError):
                    model(**batch(rng), fails=True)
                with monitor.paused():
                    model(**batch(rng))
                    model.seen[True].pop()
                taken = model.taken(True)
                if (step - 1) % run.every == 0:
                    steps[step] = taken
                log, due = monitor.step(), step - logs >= run.log_steps
                window = [steps[n] for n in range(logs + 1, step + 1) if n in steps]
                if not (due and window):
                    assert log == {}
                else:
                    assert log == pytest.approx(
                        logged(window, before, run.detail, "routing/"), rel=1e-5
                    )
                    assert monitor.window is not None
                    recent = [[load_of(of, r) for of in window[-32:]] for r in range(len(KINDS))]
                    kept = [of[-32:].tolist() for of in monitor.window.recent]
                    assert kept == [np.stack(of).tolist() for of in recent]
                    assert (monitor.window.first, monitor.window.last) == (logs + 1, step)
                    before = window
                if due:
                    logs = step
                    of = logged([model.taken(False)], None, run.detail, "eval_routing/")
                    assert monitor.evaluation() == pytest.approx(of, rel=1e-5)
                    assert monitor.evaluation() == {}
        check_history(path, run, steps)


def check_history(path: Path, run: Run, steps: dict[int, list[Pass]]) -> None:
    """A shard per flush that counted anything; its rows are the loads of its steps."""
    flush = run.flush_steps or run.log_steps
    ends = [*range(flush, run.steps, flush), run.steps]
    first, lines = 1, iter(committed(path, "counts"))
    for begin, end in zip([0, *ends], ends, strict=False):
        passes = [*chain(*(steps.get(n, []) for n in range(begin + 1, end + 1)))]
        if not passes:
            continue
        line = next(lines)
        rows = pd.read_parquet(path / line["path"])
        tokens = sum(len(p.ids[0]) for p in passes)
        assert (line["first_batch"], line["last_batch"]) == (first, end)
        assert line["last_token"] - line["first_token"] + 1 == tokens
        assert line["decisions"] == tokens * len(KINDS)
        for r in range(len(KINDS)):
            loads = rows[rows["router"] == r].sort_values("expert")["assignments"]
            assert loads.tolist() == load_of(passes, r).tolist()
        first = end + 1
    assert next(lines, None) is None
    stated = json.loads((path / "trace.json").read_text())
    assert stated["training"] == {"every": run.every, "log_steps": run.log_steps}
    assert stated["status"] == "complete"
    assert moe_inspect.check(path, quick=True).ok


# --- alarms

T, E, K = 2_000, 8, 2
EVEN = [500] * 8
LOADS = {
    "even": EVEN,
    "dead 0": [0, 1000, *EVEN[2:]],
    "dead 0 and 3": [0, 1000, 500, 0, 500, 1000, 500, 500],
    "dead 3": [500, 500, 500, 0, 500, 500, 1000, 500],
    "starved 0": [20, 980, *EVEN[2:]],
    "busy 5": [300, 300, 300, 300, 300, 1900, 300, 300],
    "busy 2": [350, 350, 1550, 350, 350, 350, 350, 350],
    "uneven": [600, 400, 550, 450, 520, 480, 500, 500],
    "none": [0] * 8,
}
ROUTERS = [Router(layer, f"r{layer}", f"r{layer}", E, K) for layer in (2, 3)]
BOUNDS = {"max_over_mean": 1.15, "max_vio": 1.5, "cv": 0.4, "gini": 0.1, "entropy": 0.97}
BOUNDS |= {"balancedness": 0.5, "drift": 0.1, "z_loss": 5.0, "max_vio_batch": 1.5}
BOUNDS |= {"dead_experts": 1, "starved_experts": 0, "drop_rate": 0.5, "aux_loss": 5.0}
BOUNDS |= {"bias_range": 5.0, "gpu_max_over_mean": 5.0}
STATED = ("z_loss", "aux_loss", "bias_range", "drop_rate", "gpu_max_over_mean")
RULES = [
    f"{metric} {how} even by chance for {n} windows{layers}"
    for metric, bound in BOUNDS.items()
    for how in (f"> {bound}", f"<= {bound}", "falling by 0.107", "rising by 0.213")
    for n, layers in ((1, ""), (3, ""), (4, " in layers 2"))
] + [f"{metric} > 0 even by chance for 3 windows" for metric in ("dead_experts", "starved_experts")]


def at_fault(metric: str, load: np.ndarray) -> np.ndarray:
    if metric == "dead_experts":
        return load == 0
    return (load > 0) & (load < load.mean() / 10)


def raised(rule: str, values: list[float], loads: list[np.ndarray]) -> list[tuple[Any, ...]]:
    """(window, since, value, experts that may be named) of each alarm of one router. Windows whose
    value is NaN are as if they were not."""
    metric, sign, *rest = rule.split()
    limit, n = float(rest[1 if rest[0] == "by" else 0]), int(rule.partition(" for ")[2].split()[0])
    of_experts = metric in ("dead_experts", "starved_experts") and sign == ">"
    found, best, active, kept = list[tuple[Any, ...]](), np.nan, False, 0
    run, begun = list[int](), [list[int]() for _ in range(E)]  # windows, of each expert too
    for w, value in enumerate(values):
        if np.isnan(value):
            continue
        named = set[int]()
        if of_experts:
            fault = at_fault(metric, loads[w])
            for e, own in enumerate(begun):
                if own or fault[e]:
                    own.append(w)
                if sum(not at_fault(metric, loads[i])[e] for i in own[-n:]) > n // 3:
                    own.clear()
                fair = sum(loads[i].sum() for i in own) / E
                if len(own) >= n and sum(loads[i][e] for i in own) < fair / 10:
                    named.add(e)
            value = len(named)
        above = {">": value > limit, "<=": value <= limit}
        above |= {"falling": value < best * (1 - limit), "rising": value > best * (1 + limit)}
        best = np.fmax(best, value) if sign == "falling" else np.fmin(best, value)
        if not above[sign]:
            kept, run = kept + 1, []
            active = active and kept < max(3, n)
            continue
        run, kept = [*run, w], 0
        if active or len(run) < (1 if of_experts else n):
            continue
        active, since = True, run[0]
        if of_experts:
            since = min(begun[e][0] for e in named)
        found.append((w, since, value, named))
    return found


@on_few(max_examples=10)
@given(st.lists(st.tuples(*[st.sampled_from([*LOADS])] * 2), min_size=1, max_size=14))
@example([("even", "dead 0")] * 4 + [("even", "even")] * 4 + [("dead 0", "dead 0")] * 3)
@example([("busy 5", "dead 0 and 3"), ("busy 5", "dead 3"), ("busy 2", "dead 3")] * 2)
def test_alarms_are_those_of_their_rules(names: list[tuple[str, str]]) -> None:
    assert {*BOUNDS} == {*known_metrics()}
    alarms, found, windows = Alarms(ROUTERS, [*map(parse_rule, RULES)], gpus=2), [], []
    for w, pair in enumerate(names):
        loads = [np.array(LOADS[name]) for name in pair]
        stated = np.array([float(of.max()) / 300 if of.any() else np.nan for of in loads])
        values = {name: stated / 10 if name == "drop_rate" else stated for name in STATED}
        tokens, steps = np.array([of.sum() // K for of in loads]), [of[None] for of in loads]
        found += alarms.see(Window(10 * w + 1, 10 * w + 10, loads, tokens, values, steps))
        windows.append((loads, values))
    got = {(a.rule, a.router, a.step, a.since, round(a.value, 9)): a for a in found}
    assert len(got) == len(found)
    expected = dict[tuple[Any, ...], Any]()
    for rule in RULES:
        metric, text = rule.split()[0], str(parse_rule(rule))
        for r in range(2):
            if rule.endswith("in layers 2") and r == 1:
                continue
            loads = [of[r] for of, _ in windows]
            pairs = zip([None, *loads], loads, strict=False)
            values = [of_load(load, before) for before, load in pairs]
            column = [of.get(metric.replace("_batch", ""), np.nan) for of in values]
            if metric in STATED:
                column = [of[metric][r] for _, of in windows]
            for w, since, value, named in raised(rule, column, loads):
                key = text, r, 10 * w + 10, 10 * since + 1, round(float(value), 9)
                expected[key] = named, [loads[i] for i in range(since, w + 1)]
    assert got.keys() == expected.keys()
    for key, (named, loads) in expected.items():
        alarm = got[key]
        assert alarm.layer == ROUTERS[alarm.router].layer
        if alarm.metric in STATED:
            assert alarm.experts == ()
        elif named:
            assert alarm.experts == tuple(sorted(named))
        elif alarm.metric in ("max_vio", "max_over_mean", "max_vio_batch"):
            busiest = np.bincount([of.argmax() for of in loads if of.any()], minlength=E)
            assert busiest[list(alarm.experts)] == [busiest.max()]

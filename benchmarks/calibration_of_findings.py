"""How often does a report claim what is only chance? Reports on traces of pure chance, by regime
(tests/support/chance.py), and how often each kind of claim was made; reports in which something is
planted, and how often it is found; and how often 95 % intervals hold the truth
(coverage_of_intervals.py).

    python -m benchmarks.calibration_of_findings [--traces 100] [--only "clustered 8/2"]

writes benchmarks/results/calibration-of-findings-<processor>.json; with --only what it says of
other regimes stays.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.coverage_of_intervals import cases, coverage
from benchmarks.measuring import machine, write_results, written
from moe_inspect.analysis.metrics.chance import ALPHA
from moe_inspect.comparison.compare import compare
from moe_inspect.public import report
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.trace.header import TraceHeader
from moe_inspect.watch.alarms import Alarm, Alarms
from moe_inspect.watch.follow import News, Piece
from moe_inspect.watch.rules import BATCH, DEFAULT_RULES, parse_rule
from moe_inspect.watch.state import Watched
from tests.support.chance import (
    CLEAN_PAIRS,
    PAIRED,
    REGIMES,
    Planted,
    Regime,
    drawn,
    drawn_pair,
    monitored,
)

PAIRS = "clean pairs"

# kinds whose every sentence claims something of the model; of the others `claims` reads the values
ALWAYS = {
    "overloaded_experts",
    "starved_experts",
    "least_used_expert",
    "busiest_gpu",
    "averaging_hides",
    "drift",
    "unused_in_domain",
    "repeated_rows",
    "missing_ranks",
    "router_ties",
}


# kinds of a comparison that say what was done to the pair
TRUE_OF_PAIRS = {
    "rounding": set[str](),
    "anywhere": {"different"},
    "redrawn": {"as_chance", "different"},
    "other documents": set[str](),
}


def claims(found: list[Finding]) -> list[str]:
    """The kinds of the findings that claim more than chance."""
    return [one.kind for one in found if _claims(one)]


def _claims(one: Finding) -> bool:
    if one.kind == "uneven_batches" and one.severity == "note":
        return False  # it names the documents as the cause
    if one.kind == "domain_specialization":
        return bool(one.values.get("differing_routers") or one.values.get("specialised_routers"))
    if one.kind == "domain_beyond_token":
        return bool(one.values["domain_mi_given_token_p"] < ALPHA)
    if one.kind == "token_specialization":
        return one.text.startswith("The token id determines")
    return one.kind in ALWAYS or one.severity in ("warning", "critical")


def claimed(regime: Regime, planted: Planted | None, seed: int) -> list[str]:
    """The claims of one report."""
    with tempfile.TemporaryDirectory() as folder:
        made = report(drawn(Path(folder) / "trace", regime, seed, planted))
        return claims(made.verdict())


def claimed_of_pair(seed: int) -> list[str]:
    """The claims of the comparison of one clean pair, of all ways and regimes in turn."""
    how = CLEAN_PAIRS[seed % len(CLEAN_PAIRS)]
    regime = PAIRED[seed // len(CLEAN_PAIRS) % len(PAIRED)]
    with tempfile.TemporaryDirectory() as folder:
        a, b, *noise = drawn_pair(Path(folder), REGIMES[regime], seed, how, bool(seed // 8 % 2))
        made: Any = compare(a, b, noise=noise[0] if noise else None)
        return [
            f"{how}: {one.kind}"
            for one in made.verdict()
            if one.kind not in TRUE_OF_PAIRS[how]
            and (
                one.severity in ("warning", "critical")
                or one.kind == "domain"
                # where decisions were changed whether they are close or not
                or (how == "anywhere" and one.text.startswith("The same except"))
            )
        ]


# of the monitor and of `watch`: the default ones, and rules that look at the least
RULES = (
    *DEFAULT_RULES,
    "max_vio > 0.1",
    "max_vio_batch > 0.1 for 2 windows",
    "dead_experts > 0",
    "starved_experts > 0 for 3 windows",
    "entropy < 1",
    "drift > 0.01",
)
ALARMS = ("iid 8/2", "iid 64/8", "clustered 8/2", "clustered 64/8")


def alarms(regime: Regime, seed: int, dead: int | None = None) -> list[Alarm]:
    """The alarms of the monitor of one run, and of `watch` on what it commits."""
    routers, windows = monitored(regime, seed, dead=dead)
    rules = [parse_rule(rule) for rule in RULES]
    seen = Alarms(routers, rules)
    found = [alarm for window in windows for alarm in seen.see(window)]
    watched = Watched(4_000, [rule for rule in rules if rule.metric != BATCH])
    manifest = {"routers": [asdict(router) for router in routers], "tables": ["documents"]}
    pieces = [
        Piece(w.first, w.last, w.load, w.tokens_R, tokens=int(n), decisions=int(n) * len(routers))
        for w in windows
        for n in w.tokens_R[:1]
    ]
    watched.take(News("recording", pieces), TraceHeader(Path(), {**manifest, "capture": {}}))
    return [*found, *watched.raised]


def alarmed(regime: Regime, seed: int) -> list[str]:
    """The rules by which a run raises alarms."""
    return [alarm.rule for alarm in alarms(regime, seed)]


# name → the claims of one draw, by its seed
CASES: dict[str, Callable[[int], list[str]]] = {
    **{name: partial(claimed, regime, None) for name, regime in REGIMES.items()},
    PAIRS: claimed_of_pair,
    **{f"alarms, {name}": partial(alarmed, REGIMES[name]) for name in ALARMS},
}


# expert 5 of layer 1, in all text or in one of six domains
PLANTED = {
    f"{'one domain' if alone else 'load'} x{times:g}": Planted(times, alone)
    for alone, of in ((False, (1.2, 1.4, 2)), (True, (1.5, 2)))
    for times in of
}
POWER = Regime(E=64, K=8, documents=60, domains=6, tokens=9_000, taste=0.1)


def found(planted: Planted, seed: int) -> bool:
    """Whether a report finds what is planted, beyond chance."""
    with tempfile.TemporaryDirectory() as folder:
        tables = report(drawn(Path(folder) / "trace", POWER, seed, planted)).tables
        if not planted.one_domain:
            row: Any = tables["balance"].iloc[1]
            return bool(row["busiest_expert"] == 5 and row["busiest_p"] < ALPHA)
        rows: Any = tables["domains"]
        at = (rows["router"] == 1) & (rows["expert"] == 5) & (rows["domain"] == "domain-1")
        return bool(rows[at]["overload_p"].iloc[0] < ALPHA)


def power(pool: ProcessPoolExecutor, traces: int) -> dict[str, Any]:
    """How often what is planted is found, of so many traces."""
    times = {name: list(pool.map(partial(found, PLANTED[name]), range(traces))) for name in PLANTED}
    for name, of in times.items():
        print(f"{name:24s} {sum(of):4d} of {traces} found", flush=True)
    return {name: {"traces": traces, "found": sum(of)} for name, of in times.items()}


def covered(pool: ProcessPoolExecutor, draws: int) -> list[dict[str, Any]]:
    """How often intervals hold the truth, by statistic and regime."""
    rows = list[dict[str, Any]]()
    made = pool.map(partial(coverage, draws=draws), *zip(*cases(), strict=True))
    for (statistic, name), (held, none) in zip(cases(), made, strict=True):
        rows.append({"statistic": statistic, "regime": name, "held": held, "none": none})
        print(f"{statistic:16s} {name:28s} holds {held:.3f}, none {none:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=int, default=100)
    parser.add_argument("--only", action="append")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    false: dict[str, Any] = {}
    with ProcessPoolExecutor(asked.jobs) as pool:
        for name in asked.only or CASES:
            n = asked.traces
            said = list(pool.map(CASES[name], range(n)))
            kinds = Counter(kind for kinds in said for kind in set(kinds))
            false[name] = {"traces": n, "false": sum(map(bool, said)), "kinds": dict(kinds)}
            print(f"{name:24s} {false[name]['false']:4d} of {n}  {dict(kinds)}", flush=True)
        if asked.only:
            made = written("calibration-of-findings", machine())
            made["false"] = {**made.get("false", {}), **false}
        else:
            made = {
                "false": false,
                "power": power(pool, 20),
                "coverage": covered(pool, 10 * asked.traces),
            }
        print(write_results("calibration-of-findings", machine(), made))


if __name__ == "__main__":
    main()

"""How often does a report claim what is only chance? Reports on traces of pure chance, by regime
(tests/chance.py), and how often each kind of claim was made; and reports in which something is
planted, and how often it is found.

    python -m benchmarks.calibration_of_findings [--traces 100] [--only "clustered 8/2"]

writes benchmarks/results/calibration-of-findings-<processor>.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine, write_results
from moe_inspect.comparison.compare import compare
from moe_inspect.reporting.report import report
from moe_inspect.reporting.verdict.findings import Finding
from tests.chance import CLEAN_PAIRS, PAIRED, REGIMES, Planted, Regime, drawn, drawn_pair

PAIRS = "clean pairs"

# kinds whose every sentence claims something of the model; of the others `claims` reads the values
ALWAYS = {
    "overloaded_experts",
    "starved_experts",
    "least_used_expert",
    "idle_gpus",
    "averaging_hides",
    "committee",
    "signature",
    "paths",
    "hard_tokens",
    "domain_beyond_token",
    "unused_in_domain",
    "repeated_rows",
    "missing_ranks",
    "router_ties",
}


# kinds of a comparison that say what was done to the pair
TRUE_OF_PAIRS = {
    "rounding": set[str](),
    "anywhere": {"not_rounding"},
    "redrawn": {"different"},
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=int, default=100)
    parser.add_argument("--only", action="append")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    false: dict[str, Any] = {}
    with ProcessPoolExecutor(asked.jobs) as pool:
        for name in asked.only or [*REGIMES, PAIRS]:
            n = asked.traces
            if name == PAIRS:
                said = list(pool.map(claimed_of_pair, range(n)))
            else:
                said = list(pool.map(partial(claimed, REGIMES[name], None), range(n)))
            kinds = Counter(kind for kinds in said for kind in set(kinds))
            false[name] = {"traces": n, "false": sum(map(bool, said)), "kinds": dict(kinds)}
            print(f"{name:24s} {false[name]['false']:4d} of {n}  {dict(kinds)}", flush=True)
    if not asked.only:
        print(write_results("calibration-of-findings", machine(), {"false": false}))


if __name__ == "__main__":
    main()

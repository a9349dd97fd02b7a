"""`python -m benchmarks.check`: bugs planted into routes, and what `moe_inspect.check` says of them
alone; shifts by the number of tokens; what it says of recordings with nothing wrong, of every
family of transformers too; and what it costs. Prints a table, writes benchmarks/results/check.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

import moe_inspect
from benchmarks.measuring import RESULTS, machine
from benchmarks.published import imported
from moe_inspect.public import open_trace
from tests.support.misrecorded import BUGS, Recording, linted
from tests.test_check import REAL, RECORDINGS, recording

SEEDS = 4  # models of each family
SHIFTS = (1, -1, 2)
ESFT = REAL.parent / "esft_law"


def main() -> None:
    of = {name: recording(name) for name in RECORDINGS if name != "deepseek" or REAL.is_dir()}
    planted = [bugs(name, a) for name, a in of.items()]
    shifted = [shifts(name, a, T) for name, a in of.items() for T in (200, 400)]
    right = dict(clean(of))
    invented = {name: kinds for name, kinds in right.items() if kinds}
    summary: dict[str, Any] = {
        "planted": sum(row["planted"] for row in planted),
        "named": sum(row["named"] for row in planted),
        "shifts": sum(row["shifts"] for row in shifted),
        "shifts_named": sum(row["named"] for row in shifted),
        "right": len(right),
        "invented": invented,
    }
    cost = costs(of["64 of 6"])
    made = {"machine": machine() | {"command": "python -m benchmarks.check"}, "in_all": summary}
    made |= {"planted": planted, "shifts": shifted, "cost": cost, "right": [*right]}
    text = json.dumps(made, indent=1, ensure_ascii=False)
    (RESULTS / "check.json").write_text(text + "\n")
    for row in (*planted, *shifted, summary, cost):
        print(row)
    if summary["named"] < summary["planted"] or invented:
        sys.exit(1)


def bugs(name: str, a: Recording) -> dict[str, Any]:
    """How many of the bugs are named, with nothing beside; those that so few layers and experts
    can tell."""
    told = {bug: of for bug, of in BUGS.items() if of.told(a)}
    missed = list[str]()
    for n, (bug, of) in enumerate(told.items()):
        found = linted(of.b(a, np.random.default_rng([n, len(name)])))
        if {one.kind for one in found} != of.kinds or of.said not in found[0].text:
            missed.append(bug)
    return {
        "recording": name,
        "planted": len(told),
        "named": len(told) - len(missed),
        "missed": missed,
    }


def shifts(name: str, a: Recording, T: int) -> dict[str, Any]:
    """Of so many tokens in a row."""
    tried = named = 0
    for begin in range(0, a.T - T + 1, T):
        part = a.take(slice(begin, begin + T))
        for shift in SHIFTS:
            found = linted(replace(part, ids_LTK=np.roll(part.ids_LTK, shift, 1)))
            named += [(one.kind, one.values.get("shift")) for one in found] == [
                ("routes_shifted", shift)
            ]
            tried += 1
    return {"recording": name, "tokens": T, "shifts": tried, "named": named}


def clean(of: dict[str, Recording]) -> Iterator[tuple[str, list[str]]]:
    """Of recordings with nothing wrong: the kinds of what is found."""
    from tests.support import zoo

    for name, a in of.items():
        yield name, [one.kind for one in linted(a)]
    if (real := of.get("deepseek")) is not None:
        for n in np.unique(real.document).tolist():
            alone = real.take(real.document == n)
            yield f"deepseek, prompt {n}", [one.kind for one in linted(alone)]
    with tempfile.TemporaryDirectory() as place:
        if ESFT.is_dir():
            Path(place, "esft_law").symlink_to(ESFT)
            with chdir(place):
                esft = open_trace(imported("esft_law"))
                yield "ESFT", [one.kind for one in esft.check().findings]
        for family in zoo.FAMILIES:
            for seed in range(SEEDS if family not in zoo.WHY_NOT else 0):
                rng = np.random.default_rng([seed, len(family)])
                lengths = rng.integers(100, 160, 4).tolist()
                each = [zoo.inputs(family, [n], seed * 4 + i) for i, n in enumerate(lengths)]
                model = zoo.build(family, seed=seed)
                made = zoo.recorded(model, Path(place) / f"{family}-{seed}", *each)
                yield f"{family}, seed {seed}", [one.kind for one in made.check().findings]


def costs(a: Recording) -> dict[str, float]:
    """CPU microseconds per thousand tokens of 8 layers of 6 of 64, of 32,768 tokens."""
    ids_TLK = np.resize(np.swapaxes(a.ids_LTK, 0, 1), (32_768, *a.ids_LTK.shape[::2]))
    # no text that repeats itself, of which little would be looked at
    token_ids = np.random.default_rng(0).permutation(np.resize(a.token_id, 32_768))
    lengths = [512] * 64
    given = {"rows": {}, "rows and text": {"token_ids": token_ids}}
    cost = dict[str, float]()
    for name, more in given.items():
        moe_inspect.check(ids_TLK, experts=a.E, lengths=lengths, **more)
        begin = process_time()
        for _ in range(5):
            moe_inspect.check(ids_TLK, experts=a.E, lengths=lengths, **more)
        cost[name] = round((process_time() - begin) / 5 / 32.768 * 1e6, 1)
    return cost


if __name__ == "__main__":
    main()

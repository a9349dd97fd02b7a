"""`python -m benchmarks.diagnoses`: faults planted into recordings of the same routing, and what
`moe_inspect.compare` says of each: is every fault named, does the option that it gives mend it, and
is nothing found where there is nothing? Prints a table, writes benchmarks/results/diagnoses.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import RESULTS, machine
from tests.support.misrecorded import (
    FAULTS,
    MISALIGNED,
    Recording,
    read,
    rounded,
    routed_text,
    said_of,
)

ROUNDING = 0.005  # of the decisions of a second run differ, as between float32 and bfloat16
SEEDS = (0, 1, 2)
SHAPES = {  # tokens, layers, experts, k
    "12 layers, 8 of 2": (6_000, 12, 8, 2),
    "8 layers, 64 of 6": (6_000, 8, 64, 6),
    "6 layers, 128 of 8": (6_000, 6, 128, 8),
}
MILLION = (62_500, 16, 32, 4)
Pair = tuple[str, Recording, Recording]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        bases = dict(recordings(root))
        print(f"{len(bases)} recordings: {', '.join(bases)}", file=sys.stderr)
        faults = [planted(root, fault, bases) for fault in FAULTS]
        clean = [checked(root, *pair) for pair in clean_pairs(root, bases)]
    for row in faults:
        mended = f"mended {row['mended']}" if row["mendable"] else ""
        print(f"{row['fault']:44} {row['tries']:3} tries  named {row['named']:3}  {mended}")
    invented = [row for row in clean if row["invented"]]
    print(f"{'clean pairs':44} {len(clean):3} tries  invented {len(invented)}")
    facts = machine() | {"command": "python -m benchmarks.diagnoses"}
    summary = {
        "planted": sum(row["tries"] for row in faults),
        "named": sum(row["named"] for row in faults),
        "clean": len(clean),
        "invented": len(invented),
    }
    result = {"machine": facts, "in_all": summary, "faults": faults, "clean": clean}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (RESULTS / "diagnoses.json").write_text(text + "\n")
    print(f"{summary}: wrote benchmarks/results/diagnoses.json")
    if summary["named"] < summary["planted"] or invented:
        sys.exit(1)


def recordings(root: Path) -> Iterator[tuple[str, Recording]]:
    """The bundled model on its corpus; made routers of several shapes and seeds, and one without
    weights, as an engine's."""
    import moe_inspect

    moe_inspect.trace_model("demo", root / "demo", dtype="float32")
    yield "bundled model", read(moe_inspect.open_trace(root / "demo"))
    for shape, (T, L, E, k) in SHAPES.items():
        for seed in SEEDS:
            yield f"{shape}, seed {seed}", routed_text(seed, T, L, E, k)
    yield "8 layers, 64 of 6, ids alone", routed_text(3, 6_000, 8, 64, 6, weights=False)
    yield "a million decisions", routed_text(4, *MILLION)


def planted(root: Path, name: str, bases: dict[str, Recording]) -> dict[str, Any]:
    """The fault in each recording, beside rounding; the single flip alone."""
    fault, found = FAULTS[name], list[dict[str, Any]]()
    for n, (base, a) in enumerate(bases.items()):
        single = fault.exactly is not None
        if not single and base == "a million decisions":
            continue  # which is for the single flip
        rng = np.random.default_rng([n, len(name)])
        second = a if single else rounded(a, ROUNDING, seed=n)
        with tempfile.TemporaryDirectory(dir=root) as place:
            first = a.written(Path(place) / "a")
            b = fault.b(second, rng).written(Path(place) / "b")
            kinds, mismatched = said_of(first, b)
            said = kinds & (MISALIGNED | fault.kinds)
            row: dict[str, Any] = {"recording": base, "said": sorted(said)}
            # what was planted, and no other diagnosis beside it
            row["named"] = said == fault.kinds
            if single:
                row["named"] &= mismatched == fault.exactly
            if fault.mend:
                after, left = said_of(first, b, **fault.mend)
                share = 1.0 if left is None else left / (a.T * len(a.layers))
                row["mended"] = not after & MISALIGNED and share < 2 * ROUNDING
            found.append(row)
    return {
        "fault": name,
        "expected": sorted(fault.kinds),
        "exactly": fault.exactly,
        "tries": len(found),
        "named": sum(row["named"] for row in found),
        "mendable": bool(fault.mend),
        "mended": sum(row.get("mended", False) for row in found),
        "of": found,
    }


def clean_pairs(root: Path, bases: dict[str, Recording]) -> Iterator[Pair]:
    """Pairs that nothing is wrong with: the same, other shards, rounding, training on, models that
    have nothing in common."""
    import moe_inspect

    for n, (name, a) in enumerate(bases.items()):
        if name == "a million decisions":
            continue
        yield f"{name}: the same", a, a
        for share in (0.0005, ROUNDING, 0.02, 0.1, 0.4):
            for seed in SEEDS:
                yield f"{name}: {share:.2%} differ", a, rounded(a, share, seed)
        other = routed_text(100 + n, a.T, len(a.layers), a.E, a.ids_LTK.shape[2])
        yield f"{name}: another model", a, replace(a, ids_LTK=other.ids_LTK)
        deep = a.ids_LTK.copy()
        half = len(deep) // 2
        deep[half:] = other.ids_LTK[half:]
        yield f"{name}: another model from the middle on", a, replace(a, ids_LTK=deep)
        deep = a.ids_LTK.copy()
        deep[-1] = other.ids_LTK[-1]
        yield f"{name}: another last layer", a, replace(a, ids_LTK=deep)
    moe_inspect.trace_model("demo", root / "bf16", dtype="bfloat16")
    moe_inspect.trace_model("demo", root / "small", dtype="bfloat16", batch_tokens=256)
    moe_inspect.trace_model("demo", root / "random", random_init=1)
    real = {name: read(moe_inspect.open_trace(root / name)) for name in ("bf16", "small", "random")}
    a = bases["bundled model"]
    for name in real:
        yield f"bundled model in float32 and {name}", a, real[name]
    yield "bundled model in batches of 8,192 and 256", real["bf16"], real["small"]


def checked(root: Path, name: str, a: Recording, b: Recording) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=root) as place:
        traces = a.written(Path(place) / "a"), b.written(Path(place) / "b", shard_tokens=3_000)
        kinds, mismatched = said_of(*traces)
        made = int((np.sort(a.ids_LTK, 2) != np.sort(b.ids_LTK, 2)).any(2).sum())
    wrong = sorted(kinds & MISALIGNED)
    if mismatched != made:
        wrong.append(f"{mismatched} decisions differ, and {made} do")
    return {"pair": name, "mismatched": mismatched, "invented": wrong}


if __name__ == "__main__":
    main()

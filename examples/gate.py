"""Fails a run in continuous integration where a router is too uneven.
Run: python examples/gate.py TRACE [MAX_VIO]; it exits with 3 where a limit is exceeded."""

from __future__ import annotations

import sys

import moe_inspect

limit = float(sys.argv[2]) if len(sys.argv) > 2 else 0.5
balance = moe_inspect.report(sys.argv[1]).tables["balance"]

# beyond the limit and beyond chance: a short sample is uneven by chance
failed = balance[
    (balance["max_vio"] > limit) & (balance["max_over_mean_low"] > balance["expected_by_chance"])
]
for row in failed.itertuples():
    print(f"layer {row.layer}: max_vio {row.max_vio:.2f} > {limit:g} (expert {row.busiest_expert})")
sys.exit(3 if len(failed) else 0)

"""`python -m benchmarks.launch`: what one launch of each kernel costs the host, bound (see
moe_inspect/capture/hook/launch.py) and in Triton's own way, in turn. Needs no GPU: Triton compiles
for an H100, and the driver's launches do nothing. So all that is timed is Python; on a GPU both
take the CUDA driver's 2 to 4 µs on top.

Process CPU time, the least of ROUNDS.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

os.environ.pop("TRITON_INTERPRET", None)  # Triton looks when it is imported
os.environ["MOE_INSPECT_SELFCHECK"] = "0"  # it would find that launches do nothing

import torch
from triton.runtime import driver

from benchmarks.measuring import machine, write_results
from moe_inspect.capture.hook import kernels, launch, ring
from moe_inspect.doctor.costs import calls
from tests.support.launches import FakeDriver

ROUNDS, LAUNCHES = 25, 1000
AT_MOST = {
    "record": 3,
    "dispatch + record, 1 launch": 7,
    "dispatch + record, 3 launches": 14,
    "combine": 4,
}


def calls_by_hooks() -> dict[str, Callable[[], object]]:
    """What the hooks call: it also looks up the self-check's result, and whether torch.compile is
    tracing."""
    T, E, K, H = 8, 64, 8, 2048
    rings = ring.Rings(ring.PassShape([(torch.device("cpu"), K, E)], [0]), torch.bfloat16, T)
    tape = rings.tapes[""][0]
    ids, weights = torch.randint(0, E, (T, K)), torch.rand(T, K).to(torch.bfloat16)
    y_SH = torch.rand(T * K, H).to(torch.bfloat16)
    kernels.runs_triton = lambda tensor: True
    return {
        "record, by its hook": lambda: kernels.record(tape, ids, weights),
        "dispatch + record, by its hook": lambda: kernels.dispatch(ids, weights, E, tape),
        "combine, by its hook": lambda: kernels.combine(
            y_SH, ids, weights, None, torch.bfloat16, E
        ),
    }


def microseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(LAUNCHES):
        call()
    return (time.process_time() - start) / LAUNCHES * 1e6


def unbound_microseconds(call: Callable[[], object]) -> float:
    """The same, where every launch takes Triton's own way."""
    few, launch.FEW_ELEMENTS = launch.FEW_ELEMENTS, 0
    try:
        return microseconds(call)
    finally:
        launch.FEW_ELEMENTS = few


def measure() -> dict[str, dict[str, float]]:
    driver.set_active(FakeDriver())  # type: ignore[arg-type]
    found = {}
    for name, call in {**calls(torch.device("cpu")), **calls_by_hooks()}.items():
        call()  # compiles and binds
        rounds = [(microseconds(call), unbound_microseconds(call)) for _ in range(ROUNDS)]
        bound, by_triton = (round(min(times), 2) for times in zip(*rounds, strict=True))
        found[name] = {"bound_us": bound, "by_triton_us": by_triton}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What a kernel launch costs the host.")
    parser.add_argument("--json", action="store_true", help="print JSON, and write no file")
    as_json = parser.parse_args().json
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    found = measure()
    if as_json:
        print(json.dumps(found))
        return
    print(f"{'host time of a call, µs':<34}{'by Triton':>10}{'bound':>8}")
    for name, row in found.items():
        most = AT_MOST.get(name)
        verdict = "" if most is None else f"≤ {most}  {'yes' if row['bound_us'] <= most else 'NO'}"
        print(f"{name:<34}{row['by_triton_us']:>10.2f}{row['bound_us']:>8.2f}  {verdict}".rstrip())
    facts = machine() | {"command": "python -m benchmarks.launch"}
    facts["versions"] |= {"triton": version("triton")}
    facts["driver"] = "launches do nothing (tests/support/launches.py); compiled for sm_90"
    print(f"written to {write_results('launch', facts, found)}")


if __name__ == "__main__":
    main()

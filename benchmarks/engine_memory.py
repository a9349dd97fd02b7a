"""How much memory recording inside an engine takes as its steps go on: a million decode steps of
eight requests, each of which ends after 128, without an engine in between, so as fast as they are
handed over. Traces follow each other, of which two are kept.

    python -m benchmarks.engine_memory

Peak memory of the process that stands for the worker, and of the one that writes."""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import machine, write_results
from moe_inspect.capture.engine.rows import EngineRows
from moe_inspect.capture.engine.sender import Sender
from moe_inspect.capture.engine.settings import Settings
from moe_inspect.capture.engine.step import Schedule
from moe_inspect.capture.engine.steps import StepRecorder
from moe_inspect.demo import MODEL_DIR

WAITING = 1_000_000  # bytes
L, E, K, AT_ONCE, LENGTH = 4, 8, 2, 8, 128  # the first three of the bundled model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        measured = serve(
            steps, Settings(Path(place), logits=True, metrics=True, max_gb=0.05, keep=2)
        )
    facts = machine(("moe-inspect", "torch", "numpy", "pyarrow"))
    facts["command"] = "python -m benchmarks.engine_memory"
    print(measured, write_results("engine-memory", facts, measured))


def serve(steps: int, settings: Settings) -> dict[str, Any]:
    about = {
        "engine": "vllm",
        "version": "0",
        "model": str(MODEL_DIR),
        "revision": None,
        "tokenizer": str(MODEL_DIR),
        "trust_remote_code": False,
        "vocabulary": 3072,
        "dtype": "float32",
        "rank": 0,
        "layers": list(range(L)),
        "paths": [f"model.layers.{n}.experts" for n in range(L)],
        "experts": E,
        "top_k": K,
        "physicals": False,
        "device": "cpu",
        **vars(settings),
    }
    rows = EngineRows((L, 64, K), E, torch.device("cpu"), ["logits"])
    recorder = StepRecorder(rows, settings, partial(Sender, about=about))
    told = recorder.link._told  # type: ignore[attr-defined]
    while "pid" not in told:
        time.sleep(0.1)
    choices = [torch.randn(AT_ONCE, E) for _ in range(L)]
    tokens, measured = torch.arange(AT_ONCE), list[dict[str, int]]()
    at = {steps // 100, steps // 10, steps}
    for n in range(steps):
        first, position = n // LENGTH * AT_ONCE, n % LENGTH
        for r, logits in enumerate(choices):
            weights, ids = logits.topk(K)
            recorder.keep(r, ids.int(), weights, logits.clone())
        requests = [f"request-{first + i}" for i in range(AT_ONCE)]
        ended = set() if position else {f"request-{first - AT_ONCE + i}" for i in range(AT_ONCE)}
        positions = torch.full((AT_ONCE,), position)
        recorder.after_step(
            AT_ONCE,
            ended,
            lambda names=requests, positions=positions: (
                Schedule(names, range(AT_ONCE + 1), [1] * AT_ONCE),
                tokens,
                positions,
            ),
        )
        while recorder.queue.nbytes > WAITING:
            time.sleep(0.01)
        if n + 1 in at:
            of = {"worker_mib": peak("self"), "writer_mib": peak(told["pid"])}
            measured.append({"steps": n + 1, **of})
    counted = int(rows.load.so_far()[1].sum())
    recorder.close()
    while Path(f"/proc/{told['pid']}").exists():  # it closes the trace
        time.sleep(0.1)
    state = recorder.command("status")
    if state["error"] or counted != steps * AT_ONCE * L * K:
        raise SystemExit(f"{counted} assignments were counted of {steps} steps: {state}")
    if state["decisions"] + state["dropped"] != steps * AT_ONCE * L:
        raise SystemExit(f"decisions that are neither recorded nor dropped: {state}")
    return {"at": measured, "decisions": state["decisions"], "dropped": state["dropped"]}


def peak(process: int | str) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) // 1024


if __name__ == "__main__":
    main()

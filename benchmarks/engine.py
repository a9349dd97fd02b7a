"""What recording inside a serving engine costs: a real vLLM on the bundled model, in which the
plugin's hooks are put in and taken out again between rounds of half a second, in random order.

    build/venv-vllm/bin/python -m benchmarks.engine --rounds 150

`make test-vllm` makes that environment. All ways are measured in one process, as two processes
differ by more than what is measured. CPU seconds are those of the engine's process with all its
threads, without the process that writes, which has a core of its own where there are two."""

# pyright: reportMissingImports=false
# (vLLM is not installed where types are checked)

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, machine, write_results
from moe_inspect.demo import MODEL_DIR

PROMPT, GENERATE, REQUESTS = 64, 32, 16
NO_PLUGIN = "no plugin"
PAUSE_S = 0.05
# "no plugin" is `execute_model` wrapped, and nothing else
ENVIRONMENT = {
    "MOE_INSPECT_METRICS": "1",
    "MOE_INSPECT_START": "off",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # vLLM's Triton kernels would be interpreted
    "PYTHONPATH": f"{ROOT / 'tests/real_engines/without_triton'}{os.pathsep}{ROOT}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--at-once", type=int, default=8)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.environ.update(ENVIRONMENT)
        place = tempfile.mkdtemp(prefix="prometheus-")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = place
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        measured = compare(Path(place), arguments.rounds, arguments.at_once)
    print(json.dumps(measured, indent=1))
    facts = machine(("moe-inspect", "vllm", "torch", "transformers", "numpy"))
    print(write_results("engine", facts | {"command": "python -m benchmarks.engine"}, measured))
    sys.stdout.flush()
    os._exit(0)


class Hooks:
    """The ways to record, each with its own rows and its own process that writes; `put` changes
    from one to another."""

    def __init__(self, llm: Any, place: Path):
        from moe_inspect.capture.engine.settings import Settings
        from moe_inspect.capture.engine.vllm import Seam, recordable_layers

        self.worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        runner, config = self.worker.worker.model_runner, self.worker.vllm_config
        self.routers = [layer.router for layer in recordable_layers(runner.get_model(), config)]
        self.take_out()
        self.seams: dict[str, Any] = {}
        self.watching: dict[str, list[Callable[..., Any]]] = {}
        for way, settings in {
            "counts": Settings(metrics=True),
            "trace": Settings(place / "a"),
            "trace, counts and logits": Settings(place / "b", metrics=True, logits=True),
        }.items():
            self.seams[way] = Seam(runner, config, settings)
            self.watching[way] = [router._compute_routing for router in self.routers]
            self.take_out()

    def take_out(self) -> None:
        vars(self.worker).pop("moe_inspect_seam", None)
        for router in self.routers:
            vars(router).pop("_compute_routing", None)

    def put(self, way: str) -> None:
        self.take_out()
        if way != NO_PLUGIN:
            self.worker.moe_inspect_seam = self.seams[way]
            for router, watched in zip(self.routers, self.watching[way], strict=True):
                router._compute_routing = watched


def compare(place: Path, rounds: int, at_once: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "seed": 0}
    options |= {"enable_prefix_caching": False, "gpu_memory_utilization": 0.2}
    llm = LLM(str(MODEL_DIR), max_num_seqs=at_once, max_num_batched_tokens=256, **options)
    sampling = SamplingParams(max_tokens=GENERATE, temperature=0, ignore_eos=True)
    draw = random.Random(0)
    prompts: Any = [
        {"prompt_token_ids": [draw.randrange(5, 3000) for _ in range(PROMPT)]}
        for _ in range(REQUESTS)
    ]

    def a_round() -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began, time.process_time() - cpu

    hooks, loads = Hooks(llm, place), [os.getloadavg()[0]]
    ways = [NO_PLUGIN, *hooks.seams]
    wall_s, cpu_s = ({way: list[float]() for way in ways} for _ in range(2))
    for n in range(-3, rounds):  # three to warm up
        for way in draw.sample(ways, len(ways)):
            hooks.put(way)
            time.sleep(PAUSE_S)
            wall, cpu = a_round()
            if n >= 0:
                wall_s[way].append(wall)
                cpu_s[way].append(cpu)
        loads.append(os.getloadavg()[0])
    tokens, found = REQUESTS * (PROMPT + GENERATE), dict[str, Any]()
    for way in ways:
        found[way] = {
            "tokens_per_s_median": round(tokens / statistics.median(wall_s[way])),
            "tokens_per_s_fastest": round(tokens / min(wall_s[way])),
            "wall": compared(wall_s[way], wall_s[NO_PLUGIN]),
            "cpu": compared(cpu_s[way], cpu_s[NO_PLUGIN]),
        }
        if way != NO_PLUGIN:
            hooks.put(way)
            found[way] |= hook_cost(hooks.seams[way].recorder, a_round)
    load = [round(f(loads), 2) for f in (min, statistics.median, max)]
    about = {"rounds": rounds, "at_once": at_once, "tokens_per_round": tokens}
    return {**about, "load_average_least_median_most": load, "ways": found}


def compared(took: list[float], without: list[float]) -> dict[str, Any]:
    """Ratios of seconds: the median of the rounds' with its quartiles, and of the least."""
    ratios = [this / none for this, none in zip(took, without, strict=True)]
    low, middle, high = statistics.quantiles(ratios)
    return {
        "ratio_median": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "ratio_least": round(min(took) / min(without), 4),
    }


def hook_cost(recorder: Any, a_round: Callable[[], Any]) -> dict[str, Any]:
    """Microseconds per step: of what follows a step, as the plugin counts it; and of the copies in
    the forward pass, timed in rounds of their own. The least of ten rounds."""
    keep, spent = recorder.keep, [0.0]

    def timed(*given: Any) -> None:
        began = time.perf_counter()
        keep(*given)
        spent[0] += time.perf_counter() - began

    recorder.keep = timed
    behind, within = list[float](), list[float]()
    for _ in range(10):
        seconds, steps, spent[0] = recorder.seconds, recorder.steps, 0.0
        a_round()
        made = recorder.steps - steps
        behind.append((recorder.seconds - seconds) / made * 1e6)
        within.append(spent[0] / made * 1e6)
    recorder.keep = keep
    state = recorder.command("status")
    return {
        "us_behind_a_step": round(min(behind), 1),
        "us_in_a_step": round(min(within), 1),
        **{name: state[name] for name in ("steps", "decisions", "dropped", "error")},
    }


if __name__ == "__main__":
    main()

"""What recording inside a serving engine costs: a real vLLM on the bundled model, in which the
plugin's hooks are put in and taken out again between decode steps, in random order.

    build/venv-vllm/bin/python -m benchmarks.engine --rounds 300

`make test-vllm` makes that environment. Steps that follow each other are compared, as a machine's
speed changes from second to second by more than what is measured: "no plugin" stands among the ways
twice: the others are compared with both, and its ratio to itself says how exact that is. A step is
what the engine's thread does. The thread that hands over what was recorded competes with it for the
interpreter: its CPU seconds are added. The process that writes is not in it: it runs on the other
core, of two."""

# pyright: reportMissingImports=false
# (vLLM is not installed where types are checked)

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from benchmarks.measuring import ROOT, machine, write_results
from moe_inspect.demo import MODEL_DIR

PROMPT, GENERATE = 64, 128
NO_PLUGIN, AGAIN = "no plugin", "no plugin, again"
THREAD_S = 10.0
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
    parser.add_argument("--rounds", type=int, default=300)
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
        if way not in (NO_PLUGIN, AGAIN):
            self.worker.moe_inspect_seam = self.seams[way]
            for router, watched in zip(self.routers, self.watching[way], strict=True):
                router._compute_routing = watched


def compare(place: Path, rounds: int, at_once: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "seed": 0}
    options |= {"enable_prefix_caching": False, "gpu_memory_utilization": 0.2}
    llm = LLM(str(MODEL_DIR), max_num_seqs=at_once, max_num_batched_tokens=1024, **options)
    sampling = SamplingParams(max_tokens=GENERATE, temperature=0, ignore_eos=True)
    draw, numbers = random.Random(0), itertools.count()
    prompts = [[draw.randrange(5, 3000) for _ in range(PROMPT)] for _ in range(at_once)]

    def decode_steps() -> Iterator[Callable[[], Any]]:
        for prompt in prompts:
            given: Any = {"prompt_token_ids": prompt}
            llm.llm_engine.add_request(str(next(numbers)), given, sampling)
        llm.llm_engine.step()  # all prompts
        for _ in range(GENERATE - 2):
            yield llm.llm_engine.step
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()

    def a_round() -> None:
        for step in decode_steps():
            step()

    hooks, loads = Hooks(llm, place), [os.getloadavg()[0]]
    step_s: dict[str, list[float]] = {way: [] for way in (NO_PLUGIN, AGAIN, *hooks.seams)}
    for n in range(-1, rounds):  # one to warm up
        order = list[str]()
        for step in decode_steps():
            order = order or draw.sample(list(step_s), len(step_s))
            hooks.put(way := order.pop())
            began = time.perf_counter()
            step()
            if n >= 0:
                step_s[way].append(time.perf_counter() - began)
        for took in step_s.values():  # whole blocks of steps
            del took[min(map(len, step_s.values())) :]
        loads.append(os.getloadavg()[0])
    load = [round(f(loads), 2) for f in (min, statistics.median, max)]
    about = {"rounds": rounds, "at_once": at_once, "steps_of_each": len(step_s[NO_PLUGIN])}
    return {
        **about,
        "load_average_least_median_most": load,
        "ways": of_ways(step_s, hooks, a_round),
    }


def of_ways(
    step_s: dict[str, list[float]], hooks: Hooks, a_round: Callable[[], Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {NO_PLUGIN: {"us_a_step": us(step_s[NO_PLUGIN])}}
    found[AGAIN] = compared(step_s[AGAIN], np.array(step_s[NO_PLUGIN]))
    without_s = (np.array(step_s[NO_PLUGIN]) + step_s[AGAIN]) / 2
    costs = hook_costs(hooks, a_round)
    for way in hooks.seams:
        hooks.put(way)
        share = thread_share(hooks.seams[way].recorder.link, a_round)
        found[way] = {**compared(step_s[way], without_s), "thread_share": round(share, 4)}
        found[way] |= {"cost": round(found[way]["ratio"] + share, 4), **costs[way]}
    return found


def us(took: list[float]) -> int:
    return round(statistics.median(took) * 1e6)


def compared(took: list[float], without_s: np.ndarray) -> dict[str, Any]:
    """The ratio of the seconds of all steps, and where 95 in 100 such ratios lie of as many blocks,
    drawn again; and `typical`, the mean ratio of a block without the tenth at either end."""
    both = np.stack([took, without_s])
    again = np.random.default_rng(0).choice(both, (2000, both.shape[1]), axis=1).sum(2)
    low, high = np.quantile(again[0] / again[1], (0.025, 0.975))
    typical = np.exp(trim_mean(np.log(both[0] / both[1]), 0.1))
    ratio, *interval = (round(float(x), 4) for x in (both[0].sum() / both[1].sum(), low, high))
    return {
        "us_a_step": us(took),
        "ratio": ratio,
        "interval": interval,
        "typical": round(float(typical), 4),
    }


def thread_share(sender: Any, a_round: Callable[[], Any]) -> float:
    """CPU seconds of the thread that hands over, by second of serving."""
    clock = time.pthread_getcpuclockid(sender.ident)
    began, cpu = time.perf_counter(), time.clock_gettime(clock)
    while (took := time.perf_counter() - began) < THREAD_S:
        a_round()
    return (time.clock_gettime(clock) - cpu) / took


def hook_costs(hooks: Hooks, a_round: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """Microseconds per step: of what follows a step, as the plugin counts it; and of the copies in
    the forward pass, timed in rounds of their own. Medians of rounds, each way in turn."""
    spent_us: dict[str, dict[str, list[float]]] = {
        way: {"us_behind_a_step": [], "us_in_a_step": []} for way in hooks.seams
    }
    for _ in range(15):
        for way, seam in hooks.seams.items():
            hooks.put(way)
            recorder, spent = seam.recorder, [0.0]
            keep = recorder.keep

            def timed(*given: Any, keep: Any = keep, spent: list[float] = spent) -> None:
                began = time.perf_counter()
                keep(*given)
                spent[0] += time.perf_counter() - began

            recorder.keep = timed
            seconds, steps = recorder.seconds, recorder.steps
            a_round()
            made, recorder.keep = recorder.steps - steps, keep
            spent_us[way]["us_behind_a_step"].append((recorder.seconds - seconds) / made * 1e6)
            spent_us[way]["us_in_a_step"].append(spent[0] / made * 1e6)
    found = dict[str, dict[str, Any]]()
    for way, seam in hooks.seams.items():
        state = seam.recorder.command("status")
        assert not state["error"], state
        assert not state["dropped"], state
        found[way] = {name: round(statistics.median(us), 1) for name, us in spent_us[way].items()}
        found[way] |= {name: state[name] for name in ("steps", "decisions", "dropped")}
    return found


if __name__ == "__main__":
    main()

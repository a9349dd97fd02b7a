"""What recording inside a serving engine costs: tokens per second of a real vLLM on the bundled
model, without the plugin and with it, in rounds of a second or two that take turns.

    build/venv-vllm/bin/python -m benchmarks.engine --rounds 40

`make test-vllm` makes that environment. Each way is an engine in a process of its own, which waits
while another has its round; a pause before each round lets the writers finish."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, machine, write_results
from moe_inspect.demo import MODEL_DIR

WAYS: dict[str, tuple[str, ...]] = {
    "no plugin": (),
    "counts": ("METRICS",),
    "trace": ("TRACE",),
    "everything": ("TRACE", "METRICS", "LOGITS"),
}
PROMPT, GENERATE, REQUESTS = 64, 64, 32
PAUSE_S = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--way", help="serve this way (the benchmark starts it)")
    arguments = parser.parse_args()
    if arguments.way is not None:
        serve(arguments.at_once)
        return
    measured = compare(arguments.rounds, arguments.at_once)
    print(json.dumps(measured, indent=1))
    facts = machine(packages=("moe-inspect", "vllm", "torch", "transformers", "numpy"))
    print(write_results("engine", facts | {"command": "python -m benchmarks.engine"}, measured))


def compare(rounds: int, at_once: int) -> dict[str, Any]:
    seconds = {way: list[float]() for way in WAYS}
    cpu_s = {way: list[float]() for way in WAYS}
    loads, draw = [os.getloadavg()[0]], random.Random(0)
    with ExitStack() as stack:
        engines = {way: stack.enter_context(engine(way, at_once)) for way in WAYS}
        for n in range(-2, rounds):  # two to warm up
            for way in draw.sample([*WAYS], len(WAYS)):
                time.sleep(PAUSE_S)
                took, cpu = ask(engines[way], "round")
                if n >= 0:
                    seconds[way].append(took)
                    cpu_s[way].append(cpu)
            loads.append(os.getloadavg()[0])
        states = {way: ask(engines[way], "state") for way in WAYS}
    tokens, found = REQUESTS * (PROMPT + GENERATE), dict[str, Any]()
    for way, took in seconds.items():
        ratios = [none / this for none, this in zip(seconds["no plugin"], took, strict=True)]
        cpu = [this / none for none, this in zip(cpu_s["no plugin"], cpu_s[way], strict=True)]
        found[way] = {
            "tokens_per_s": round(tokens / statistics.median(took)),
            "tokens_per_s_fastest": round(tokens / min(took)),
            "speed_ratio_median": round(statistics.median(ratios), 4),
            "speed_ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios)[::2]],
            "speed_ratio_fastest": round(min(seconds["no plugin"]) / min(took), 4),
            "cpu_ratio_median": round(statistics.median(cpu), 4),
            "cpu_ratio_least": round(min(cpu_s[way]) / min(cpu_s["no plugin"]), 4),
            **states[way],
        }
    load = [round(f(loads), 2) for f in (min, statistics.median, max)]
    about = {"rounds": rounds, "at_once": at_once, "tokens_per_round": tokens}
    return {**about, "load_average_least_median_most": load, "ways": found}


# --- an engine


@contextmanager
def engine(way: str, at_once: int) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as place:
        values = {"TRACE": place, "METRICS": "1", "LOGITS": "1"}
        asked = {f"MOE_INSPECT_{name}": values[name] for name in WAYS[way]}
        environment = {
            **os.environ,
            **asked,
            "PROMETHEUS_MULTIPROC_DIR": place,
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
        command = [sys.executable, "-m", "benchmarks.engine", "--way", way]
        process = subprocess.Popen(
            [*command, "--at-once", str(at_once)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.communicate()


def ask(process: Any, what: str) -> Any:
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def serve(at_once: int) -> None:
    """Answers the lines of the standard input: `round`, with the seconds and CPU seconds that it
    took; `state`, with what the plugin says."""
    with redirect_stdout(sys.stderr):
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

    print("ready", flush=True)
    for line in sys.stdin:
        answer = a_round() if line == "round\n" else hook_cost(llm, a_round)
        print(json.dumps(answer), flush=True)


def hook_cost(llm: Any, a_round: Any) -> dict[str, Any]:
    """Microseconds per step: of what follows a step, as the plugin counts it; and of the copies in
    the forward pass, timed in one more round."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    seam = vars(worker).get("moe_inspect_seam")
    if seam is None:
        return {}
    recorder, keep, spent = seam.recorder, seam.recorder.keep, [0.0]
    after, steps = recorder.seconds, recorder.steps

    def timed(*given: Any) -> None:
        began = time.perf_counter()
        keep(*given)
        spent[0] += time.perf_counter() - began

    recorder.keep = timed
    a_round()
    made = recorder.steps - steps
    state = recorder.command("status")
    return {
        "us_after_a_step": round((recorder.seconds - after) / made * 1e6, 1),
        "us_in_a_step": round(spent[0] / made * 1e6, 1),
        "steps": state["steps"],
        "decisions": state["decisions"],
        "dropped": state["dropped"],
        "error": state["error"],
    }


if __name__ == "__main__":
    main()

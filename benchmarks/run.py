"""`make bench`: what tracing and reporting cost on this machine. Prints a table, writes
benchmarks/results/<machine>.json.

Each comparison runs side by side in one run and is given as a ratio: machines are noisy, ratios
less so.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.imports import FORMAT
from benchmarks.imports import measure as measure_imports
from benchmarks.measuring import RESULTS, ROOT, in_a_process, machine, peak_memory_mib, start

LAYERS, EXPERTS, TOP_K, BATCH = 48, 128, 8, 8192  # Qwen3-30B-A3B's shape


# --- traced ÷ untraced


def many_layers() -> Any:
    """24 layers of 64 experts, 8 a token, so narrow that recording has as little to hide behind as
    it ever has."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    narrow = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "num_attention_heads": 4,
    }
    config = Qwen3MoeConfig(
        **narrow,
        num_key_value_heads=2,
        num_hidden_layers=24,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=4096,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).eval()


def overhead(name: str, rounds: int, times: int) -> dict[str, float]:
    """The bundled model, or the one of many layers, over the bundled corpus `times` over, with and
    without `record` in turn; in a process of its own."""
    import torch

    from moe_inspect.capture.corpus.documents import find_sources
    from moe_inspect.capture.corpus.plan import CorpusPlan
    from moe_inspect.capture.feed import Batch, prefill
    from moe_inspect.capture.options import RecordOptions
    from moe_inspect.capture.recorder import Recorder
    from moe_inspect.model.load import load_config, load_model, load_tokenizer

    torch.set_num_threads(1)
    tokenizer = load_tokenizer("demo")
    network = load_model("demo", load_config("demo")) if name == "bundled" else many_layers()
    planned = list(CorpusPlan(find_sources([]), max_length=512).batches(tokenizer)) * times
    batches = [Batch(n, *batch) for n, batch in enumerate(planned)]
    # what prefill() tells of its rows must go somewhere: it is never entered
    silent = Recorder(network, options=RecordOptions(counts_only=True))

    def one_pass(recorder: Recorder | None) -> float:
        began = time.perf_counter()
        with recorder or nullcontext():
            tokens = sum(
                prefill(network, recorder or silent, batch, tokenizer) for batch in batches
            )
        return tokens / (time.perf_counter() - began)

    rates: dict[str, list[float]] = {"untraced": [], "tap": [], "dispatch": []}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        for n in range(rounds + 1):
            for capture, found in rates.items():
                recorder = (
                    None
                    if capture == "untraced"
                    else Recorder(
                        network, Path(scratch) / f"{capture}{n}", RecordOptions(capture=capture)
                    )
                )
                rate = one_pass(recorder)
                if n:  # the first round warms up
                    found.append(rate)
    measured = {
        "tokens_a_pass": sum(len(s.ids) for batch in batches for s in batch.sequences),
        "rounds": rounds,
    }
    measured["untraced_tokens_per_s"] = statistics.median(rates["untraced"])
    for capture in ("tap", "dispatch"):
        ratios = sorted(b / a for a, b in zip(rates["untraced"], rates[capture], strict=True))
        quarter = len(ratios) // 4
        measured[f"traced_over_untraced_{capture}"] = statistics.median(ratios)
        measured[f"traced_over_untraced_{capture}_quartiles"] = [
            ratios[quarter],
            ratios[-1 - quarter],
        ]
    return measured


# --- the writer


def qwen_like(rounding: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """ids uint8 [BATCH, 8] and renormalised softmax weights of 8 layers: experts of unlike
    popularity, tokens of unlike confidence."""
    rng = np.random.default_rng(0)
    ids, weights = [], []
    for _ in range(8):
        logits = rng.normal(0, 0.35, EXPERTS) + rng.normal(0, 1, (BATCH, EXPERTS)) * rng.uniform(
            0.7, 1.6, (BATCH, 1)
        )
        top = np.argsort(-logits, 1)[:, :TOP_K]
        chosen = np.exp(np.take_along_axis(logits, top, 1))
        weight = (chosen / chosen.sum(1, keepdims=True)).astype(np.float32)
        ids.append(top.astype(np.uint8))
        weights.append(to_bf16(weight) if rounding == "bf16" else weight.astype(np.float16))
    return ids, weights


def to_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stream(assignments: int, rounding: str) -> Iterator[Any]:
    from moe_inspect.trace.writer import Document, RoutedBatch

    ids, weights = qwen_like(rounding)
    rng = np.random.default_rng(1)
    for n in range(max(1, round(assignments / (BATCH * LAYERS * TOP_K)))):
        # no batch is a copy of another, as far as a compressor can see
        order = rng.permutation(BATCH)
        row = np.arange(BATCH, dtype=np.int32)
        yield RoutedBatch(
            n,
            rng.zipf(1.3, BATCH).clip(max=150_000).astype(np.int32),
            row // 512 + n * 16,
            row // 512 + n * 16,
            row % 512,
            row // 512 % 8,
            list("abcdefgh"),
            [np.roll(ids[layer % 8][order], layer // 8, 1) for layer in range(LAYERS)],
            [weights[layer % 8][order] for layer in range(LAYERS)] if rounding != "none" else None,
            documents=[Document(n * 16 + d, "abcdefgh"[d % 8], "made", 512) for d in range(16)],
        )


def write(assignments: int, rounding: str) -> dict[str, float]:
    """Runs in a process of its own: its peak memory and CPU time are the writer's."""
    import pandas  # noqa: F401  (pyarrow looks for it at its first write: no part of writing)

    from moe_inspect.trace.schema import Router
    from moe_inspect.trace.writer import TraceWriter

    routers = [
        Router(layer, "experts", f"layers.{layer}.mlp.experts", EXPERTS, TOP_K)
        for layer in range(LAYERS)
    ]
    making = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        began, cpu_began = time.perf_counter(), time.process_time()
        with TraceWriter(scratch, {}, routers, weights=rounding != "none") as writer:
            batches = stream(assignments, rounding)
            while True:
                before = time.thread_time()
                batch = next(batches, None)
                making += time.thread_time() - before
                if batch is None:
                    break
                writer.write(batch)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began - making
        written = writer.tokens * LAYERS * TOP_K
        size = sum(f.stat().st_size for f in Path(scratch).rglob("*.parquet"))
    return {
        "assignments": written,
        "million_assignments_per_cpu_s": written / cpu / 1e6,
        "wall_s": seconds,
        "bytes_per_assignment": size / written,
        "peak_memory_mib": peak_memory_mib(),
    }


def main() -> None:
    measured: dict[str, Any] = {}

    def row(
        label: str, value: float, bar: str = "", fine: Callable[[float], bool] | None = None
    ) -> None:
        verdict = "" if fine is None else "yes" if fine(value) else "NO"
        print(f"{label:<66}{value:>10.3f}   {bar} {verdict}".rstrip(), flush=True)

    measured["overhead"] = found = {
        name: in_a_process("overhead", name, *passes, module="benchmarks.run")
        for name, passes in {"bundled": (11, 8), "24 layers": (11, 1)}.items()
    }
    for name, ratios in found.items():
        for capture in ("tap", "dispatch"):
            ratio = ratios[f"traced_over_untraced_{capture}"]
            row(
                f"traced ÷ untraced tokens/s, {name}, {capture}",
                ratio,
                "≥ 0.97",
                lambda v: v >= 0.97,
            )
    measured["writer"] = writer = {
        f"{r} {n:.0e}": in_a_process("write", n, r, module="benchmarks.run")
        for r, n in (("fp16", 1e6), ("fp16", 1e7), ("fp16", 1e8), ("bf16", 1e8), ("none", 1e8))
    }
    row(
        "writer, million assignments a CPU-second (48 layers × 8 of 128)",
        writer["fp16 1e+08"]["million_assignments_per_cpu_s"],
        "≥ 40",
        lambda v: v >= 40,
    )
    row(
        "peak memory of the writer's process at 1e6 assignments, MiB",
        writer["fp16 1e+06"]["peak_memory_mib"],
    )
    row(
        "peak memory at 1e8 ÷ at 1e7 assignments",
        writer["fp16 1e+08"]["peak_memory_mib"] / writer["fp16 1e+07"]["peak_memory_mib"],
        "flat (≤ 1.5)",
        lambda v: v <= 1.5,
    )
    for rounding, most in (("fp16", 2.75), ("bf16", 2.2), ("none", 0.95)):
        row(
            f"bytes an assignment, weights {rounding}",
            writer[f"{rounding} 1e+08"]["bytes_per_assignment"],
            f"≤ {most}",
            lambda v, most=most: v <= most,
        )
    measured["imports"] = imports = measure_imports()
    small, large = (imports[f"{FORMAT} {size}"] for size in ("3e+06", "3e+07"))
    row(
        f"import {FORMAT}, million assignments a CPU-second",
        large["million_assignments_per_cpu_s"],
        "≥ 3",
        lambda v: v >= 3,
    )
    row(
        f"import {FORMAT}, peak memory at 3e7 ÷ at 3e6 assignments",
        large["peak_memory_mib"] / small["peak_memory_mib"],
        "flat (≤ 1.5)",
        lambda v: v <= 1.5,
    )
    measured["start_s"] = {
        "help": start("--help"),
        "report": start("report", "sample_traces/balanced"),
    }
    row("moe-inspect --help, seconds", measured["start_s"]["help"], "≤ 0.4", lambda v: v <= 0.4)
    row(
        "moe-inspect report sample_traces/balanced, seconds",
        measured["start_s"]["report"],
        "≤ 2.5",
        lambda v: v <= 2.5,
    )

    facts = machine()
    name = "-".join(
        f"{facts['processor']} {facts['cores']} cores".lower().replace("(r)", "").split()
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"cpu-{''.join(c for c in name if c.isalnum() or c == '-')}.json"
    target.write_text(
        json.dumps({"machine": facts, "measured": measured}, indent=1, ensure_ascii=False) + "\n"
    )
    print(f"written to {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

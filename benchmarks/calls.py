"""What recording costs where calls are small, on a CPU: decode steps, short passes, and a large
prefill for comparison. Part of `make bench`; writes benchmarks/results/calls-<machine>.json.

Every way of recording runs in turn in one process, beside a forward hook that does nothing, one
that clones what it sees, and the usual recipe (`output_router_logits`, then top-k). The figure is
process CPU time, the writer's thread included: the least over the rounds, since other processes on
the machine only ever add to it.

    python -m benchmarks.calls [--rounds 10] [--case NAME ...] [-o FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import moe_inspect
from benchmarks.measuring import machine, write_results

NARROW = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 8,
    "vocab_size": 256,
}
Way = Callable[[Any, Path], AbstractContextManager[Any]]
Measure = Callable[[Any, bool], float]  # (model, whether to ask for router logits) → CPU seconds


def qwen(layers: int, experts: int, **sizes: int) -> Any:
    """A Qwen3-MoE with random weights, so narrow that recording has little to hide behind."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{**NARROW, "num_hidden_layers": layers, "num_experts": experts, **sizes}
    )
    return Qwen3MoeForCausalLM(config).eval()


# --- the ways of recording


@contextmanager
def hooked(model: Any, hook: Callable[[Any, Any], None]) -> Iterator[None]:
    """`hook` before each call of the experts."""
    handles = [
        module.register_forward_pre_hook(hook)
        for name, module in model.named_modules()
        if name.endswith("mlp.experts")
    ]
    assert handles
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cloning(model: Any, path: Path) -> AbstractContextManager[None]:
    kept: list[Any] = []
    return hooked(model, lambda module, args: kept.append([a.clone() for a in args[1:3]]))


WAYS: dict[str, Way] = {
    "untraced": lambda model, path: nullcontext(),
    "hook that does nothing": lambda model, path: hooked(model, lambda module, args: None),
    "hook that clones": cloning,
    "output_router_logits": lambda model, path: nullcontext(),
    "tap": lambda model, path: moe_inspect.record(model, path, capture="tap"),
    "dispatch": lambda model, path: moe_inspect.record(model, path, capture="dispatch"),
    "counts_only": lambda model, path: moe_inspect.record(
        model, None, counts_only=True, capture="tap"
    ),
}


def call(model: Any, logits: bool, **inputs: Any) -> Any:
    """A forward pass; with `logits`, the recipe: the choices from the model's router logits."""
    if not logits:
        return model(**inputs)
    output = model(**inputs, output_router_logits=True)
    torch.stack(output.router_logits).topk(model.config.num_experts_per_tok, dim=-1)
    return output


# --- what is measured


def decode(batch: int, steps: int = 20) -> Measure:
    """Seconds of the least decode step, after a prompt of 16 tokens."""

    def measure(model: Any, logits: bool) -> float:
        output = call(model, logits, input_ids=torch.ones((batch, 16), dtype=torch.long))
        token, seconds = torch.ones((batch, 1), dtype=torch.long), []
        for _ in range(steps):
            began = time.process_time()
            output = call(model, logits, input_ids=token, **cache(output))
            seconds.append(time.process_time() - began)
        return min(seconds)

    def cache(output: Any) -> dict[str, Any]:
        return {"past_key_values": output.past_key_values}

    return measure


def whole_decode(batch: int, steps: int = 160) -> Measure:
    """Seconds per decode step on average, with what is done now and then: pages handed over."""

    def measure(model: Any, logits: bool) -> float:
        output = call(model, logits, input_ids=torch.ones((batch, 16), dtype=torch.long))
        token, began = torch.ones((batch, 1), dtype=torch.long), time.process_time()
        for _ in range(steps):
            output = call(model, logits, input_ids=token, past_key_values=output.past_key_values)
        return (time.process_time() - began) / steps

    return measure


def passes(rows: int, tokens: int, times: int) -> Measure:
    """Seconds per forward pass of `rows` × `tokens` tokens, without a key-value cache."""
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def measure(model: Any, logits: bool) -> float:
        call(model, logits, input_ids=ids, use_cache=False)
        began = time.process_time()
        for _ in range(times):
            call(model, logits, input_ids=ids, use_cache=False)
        return (time.process_time() - began) / times

    return measure


def bundled() -> Any:
    from moe_inspect.model.load import load_config, load_model

    return load_model("demo", load_config("demo"))


# name → (model, measure, layers)
CASES: dict[str, tuple[Callable[[], Any], Measure, int]] = {
    "decode, 48 layers, batch 1": (lambda: qwen(48, 16), decode(1), 48),
    "decode, 48 layers, batch 8": (lambda: qwen(48, 16), decode(8), 48),
    "whole decode, 48 layers, batch 1": (lambda: qwen(48, 16), whole_decode(1), 48),
    "bundled model, passes of 150 tokens": (bundled, passes(1, 150, 60), 4),
    "prefill 4 x 512, 12 layers of 64 experts": (
        lambda: qwen(12, 64, hidden_size=64, moe_intermediate_size=32, num_attention_heads=4),
        passes(4, 512, 2),
        12,
    ),
}


def measured(case: str, rounds: int) -> dict[str, dict[str, float]]:
    make, measure, layers = CASES[case]
    model = make()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        for n in range(rounds + 1):
            for way, enter in WAYS.items():
                with enter(model, Path(scratch) / f"{way}{n}"):
                    spent = measure(model, way == "output_router_logits")
                if n:  # the first round warms up
                    seconds[way].append(spent)
    least = {way: min(values) for way, values in seconds.items()}
    plain = least["untraced"]
    return {
        way: {
            "cpu_ms": value * 1e3,
            "us_per_layer": (value - plain) / layers * 1e6,
            "untraced_over_this": plain / value,
        }
        for way, value in least.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    found = {}
    for case in asked.case or CASES:
        found[case] = measured(case, asked.rounds)
        print(f"\n{case}\n{'':26s}{'CPU ms':>9s}{'us per layer':>14s}{'untraced / this':>17s}")
        for way, row in found[case].items():
            print(
                f"{way:26s}{row['cpu_ms']:9.3f}{row['us_per_layer']:+14.1f}"
                f"{row['untraced_over_this']:17.3f}",
                flush=True,
            )
    facts = {**machine(), "command": "python -m benchmarks.calls", "rounds": asked.rounds}
    if asked.output is None:
        print(f"\nwritten to {write_results('calls', facts, found)}")
        return
    asked.output.write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

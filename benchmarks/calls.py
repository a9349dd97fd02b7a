"""What recording costs where calls are small, on a CPU: decode steps, short passes, and a large
prefill for comparison. Part of `make bench`; writes benchmarks/results/calls-<machine>.json.

Every way of recording has a copy of the model of its own and stays attached; they take turns,
beside a forward hook that does nothing, one that clones what it sees, and the usual recipe
(`output_router_logits`, then top-k). A turn is --in-a-row passes, as `generate` makes them, of
which the median counts. With --in-a-row 1 no pass follows one of the same model: everything the
recorder touches then comes from memory, not from the processor's caches. Figures are process CPU
time, the writer's thread included: the median over the rounds of what a pass takes beyond the
untraced one next to it, since what else runs on the machine changes from one second to the next;
and the least turn of each.

    python -m benchmarks.calls [--rounds 30] [--in-a-row 20] [--case NAME ...] [-o FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
# (model, whether to ask for router logits) → what runs its next forward pass
Passes = Callable[[Any, bool], Callable[[], Any]]


def qwen(layers: int, experts: int, **sizes: int) -> Any:
    """A Qwen3-MoE with random weights, so narrow that recording has little to hide behind."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{**NARROW, "num_hidden_layers": layers, "num_experts": experts, **sizes}
    )
    return Qwen3MoeForCausalLM(config).eval()


# --- the ways of recording


def experts_of(model: Any) -> list[Any]:
    found = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
    assert found
    return found


@contextmanager
def hooked(model: Any, hook: Callable[[Any, Any], None]) -> Iterator[None]:
    """`hook` before each call of the experts."""
    handles = [module.register_forward_pre_hook(hook) for module in experts_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cloning(model: Any, path: Path) -> AbstractContextManager[None]:
    kept: list[Any] = []
    return hooked(model, lambda module, args: kept.append([a.clone() for a in args[1:3]]))


def probed(model: Any) -> Any:
    """The model with a probe in the forward of its experts."""
    kind = type(experts_of(model)[0])

    class Probed(kind):
        def forward(self, hidden: Any, ids: Any, weights: Any) -> Any:
            moe_inspect.probe(ids, weights, layer=self.layer, experts=self.num_experts)
            return super().forward(hidden, ids, weights)

    for n, module in enumerate(experts_of(model)):
        module.__class__, module.layer = Probed, n
    return model


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
    "probe": lambda model, path: moe_inspect.record(probed(model), path, routers=[]),
}


def call(model: Any, logits: bool, **inputs: Any) -> Any:
    """A forward pass; with `logits`, the recipe: the choices from the model's router logits."""
    if not logits:
        return model(**inputs)
    output = model(**inputs, output_router_logits=True)
    torch.stack(output.router_logits).topk(model.config.num_experts_per_tok, dim=-1)
    return output


# --- what is measured


def decode(batch: int) -> Passes:
    """Decode steps, after a prompt of 16 tokens."""

    def start(model: Any, logits: bool) -> Callable[[], Any]:
        output = call(model, logits, input_ids=torch.ones((batch, 16), dtype=torch.long))
        token = torch.ones((batch, 1), dtype=torch.long)
        cache = {"past_key_values": output.past_key_values}
        return lambda: call(model, logits, input_ids=token, use_cache=True, **cache)

    return start


def passes(rows: int, tokens: int) -> Passes:
    """Forward passes of `rows` × `tokens` tokens, without a key-value cache."""
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def start(model: Any, logits: bool) -> Callable[[], Any]:
        return lambda: call(model, logits, input_ids=ids, use_cache=False)

    return start


def bundled() -> Any:
    from moe_inspect.model.load import load_config, load_model

    return load_model("demo", load_config("demo"))


# name → (model, its passes, layers)
CASES: dict[str, tuple[Callable[[], Any], Passes, int]] = {
    "decode, 48 layers, batch 1": (lambda: qwen(48, 16), decode(1), 48),
    "decode, 48 layers, batch 8": (lambda: qwen(48, 16), decode(8), 48),
    "bundled model, passes of 150 tokens": (bundled, passes(1, 150), 4),
    "prefill 4 x 512, 12 layers of 64 experts": (
        lambda: qwen(12, 64, hidden_size=64, moe_intermediate_size=32, num_attention_heads=4),
        passes(4, 512),
        12,
    ),
}


def measured(case: str, rounds: int, in_a_row: int) -> dict[str, dict[str, float]]:
    make, passes_of, layers = CASES[case]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch, ExitStack() as attached:
        run: dict[str, Callable[[], Any]] = {}
        for way, enter in WAYS.items():
            model = make()
            attached.enter_context(enter(model, Path(scratch) / way))
            run[way] = passes_of(model, way == "output_router_logits")
        for n in range(-3, rounds):  # the first rounds warm up
            turn, ways = n % len(run), list(run)
            for way in ways[turn:] + ways[:turn]:
                spent = statistics.median(pass_seconds(run[way]) for _ in range(in_a_row))
                if n >= 0:
                    seconds[way].append(spent)
    plain = seconds["untraced"]
    found = {}
    for way, values in seconds.items():
        beyond = statistics.median(a - b for a, b in zip(values, plain, strict=True))
        usual = statistics.median(plain)
        found[way] = {
            "us_per_layer": beyond / layers * 1e6,
            "this_over_untraced": (usual + beyond) / usual,
            "least_ms": min(values) * 1e3,
            "least_us_per_layer": (min(values) - min(plain)) / layers * 1e6,
        }
    return found


def pass_seconds(run: Callable[[], Any]) -> float:
    """CPU time of a forward pass."""
    began = time.process_time()
    run()
    return time.process_time() - began


def idle_probe_ns() -> float:
    """CPU time of a call of `probe` while no recorder is open, least of 50 rounds."""
    probe, calls = moe_inspect.probe, 20_000
    ids, weights = torch.zeros((1, 8), dtype=torch.long), torch.rand(1, 8)
    found = []
    for _ in range(50):
        began = time.process_time()
        for _ in range(calls):
            probe(ids, weights, layer=3, experts=16)
        found.append(time.process_time() - began)
    return min(found) / calls * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--in-a-row", type=int, default=20)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    idle_ns = idle_probe_ns()
    found: dict[str, Any] = {"probe, no recorder open": {"ns_per_call": idle_ns}}
    print(f"probe, no recorder open: {idle_ns:.0f} ns per call (at most 150)")
    for case in asked.case or CASES:
        found[case] = measured(case, asked.rounds, asked.in_a_row)
        heads = "us per layer", "/ untraced", "least ms", "us per layer"
        print(f"\n{case}\n{'':24s}" + "".join(f"{head:>14s}" for head in heads))
        for way, row in found[case].items():
            beyond, ratio, least, least_beyond = row.values()
            print(
                f"{way:24s}{beyond:+14.1f}{ratio:14.3f}{least:14.3f}{least_beyond:+14.1f}",
                flush=True,
            )
    facts = {
        **machine(),
        "command": "python -m benchmarks.calls",
        "rounds": asked.rounds,
        "in_a_row": asked.in_a_row,
    }
    if asked.output is None:
        print(f"\nwritten to {write_results('calls', facts, found)}")
        return
    asked.output.write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

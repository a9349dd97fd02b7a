"""What recording costs where calls are small, on a CPU: decode steps, short passes, and a large
prefill for comparison. Part of `make bench`; writes benchmarks/results/calls-<machine>.json.

Ways of recording take turns on one model, in an order drawn anew each round (what a turn costs
depends on what the turn before it has left in memory), beside a forward hook that does nothing, one
that clones what it sees, and the usual recipe (`output_router_logits`, then top-k). A turn
attaches, makes --in-a-row passes, as `generate` makes them, and detaches; its figure is the median
of all passes but the first ones. (Were there a copy of the model for each way, what tells the
copies apart would count as cost, as where they lie in memory.) Figures are process CPU time, the
writer's thread included: the median over the rounds of what a pass takes beyond the untraced one of
the same round, with its quartiles, since what else runs on the machine changes from one second to
the next; and the least turn of each.

    python -m benchmarks.calls [--rounds 30] [--in-a-row 20] [--case NAME ...] [--way NAME ...]
        [-o FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
# rounds, and passes of a turn, that are not counted: a recorder learns its shapes in the first pass
WARM_UP = 3
# What glibc's allocator keeps at hand decides how fast torch gets small tensors, and changes with
# whatever else a process has done (importing pandas is enough): a decode step executes some 3 %
# more instructions in one such state than in another. With longer lists there is one state
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=100"}
RECIPE = "output_router_logits"
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


@contextmanager
def probed(model: Any, path: Path) -> Iterator[None]:
    """Recorded by a probe in the forward of each layer's experts."""
    modules = experts_of(model)
    kind = type(modules[0])

    class Probed(kind):
        def forward(self, hidden: Any, ids: Any, weights: Any) -> Any:
            moe_inspect.probe(ids, weights, layer=self.layer, experts=self.num_experts)
            return super().forward(hidden, ids, weights)

    for n, module in enumerate(modules):
        module.__class__, module.layer = Probed, n
    try:
        with moe_inspect.record(model, path, routers=[]):
            yield
    finally:
        for module in modules:
            module.__class__ = kind
            del module.layer


WAYS: dict[str, Way] = {
    "untraced": lambda model, path: nullcontext(),
    "hook that does nothing": lambda model, path: hooked(model, lambda module, args: None),
    "hook that clones": cloning,
    RECIPE: lambda model, path: nullcontext(),
    "tap": lambda model, path: moe_inspect.record(model, path, capture="tap"),
    "dispatch": lambda model, path: moe_inspect.record(model, path, capture="dispatch"),
    "counts_only": lambda model, path: moe_inspect.record(
        model, None, counts_only=True, capture="tap"
    ),
    "probe": probed,
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


def measured(
    case: str, ways: Sequence[str], rounds: int, in_a_row: int
) -> dict[str, dict[str, float]]:
    make, passes_of, layers = CASES[case]
    model = make()
    # transformers leaves hooks on a model that was asked for its router logits
    recipe = make() if RECIPE in ways else None
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        for n in range(-WARM_UP, rounds):
            for way in random.Random(n).sample(ways, len(ways)):
                path = Path(scratch) / f"{way} {n}"
                of = recipe if way == RECIPE else model
                with WAYS[way](of, path):
                    run = passes_of(of, way == RECIPE)
                    spent = [pass_seconds(run) for _ in range(WARM_UP + in_a_row)][WARM_UP:]
                shutil.rmtree(path, ignore_errors=True)
                if n >= 0:
                    seconds[way].append(statistics.median(spent))
    plain = seconds["untraced"]
    usual = statistics.median(plain)
    found = {}
    for way, values in seconds.items():
        beyond = [a - b for a, b in zip(values, plain, strict=True)]
        low, middle, high = statistics.quantiles(beyond, n=4)
        found[way] = {
            "us_per_layer": middle / layers * 1e6,
            "lower_quartile": low / layers * 1e6,
            "upper_quartile": high / layers * 1e6,
            "this_over_untraced": (usual + middle) / usual,
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
    parser.add_argument("--way", action="append", choices=list(WAYS), help="besides untraced")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:  # read when a process starts
        again = [sys.executable, "-m", "benchmarks.calls", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **ALLOCATOR})
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    idle_ns = idle_probe_ns()
    found: dict[str, Any] = {"probe, no recorder open": {"ns_per_call": idle_ns}}
    print(f"probe, no recorder open: {idle_ns:.0f} ns per call (at most 150)")
    ways = ["untraced", *(way for way in asked.way or WAYS if way != "untraced")]
    for case in asked.case or CASES:
        found[case] = measured(case, ways, asked.rounds, asked.in_a_row)
        heads = "us per layer", "quartiles", "/ untraced", "least ms", "us per layer"
        print(f"\n{case}\n{'':24s}" + "".join(f"{head:>16s}" for head in heads))
        for way, row in found[case].items():
            beyond, low, high, ratio, least, least_beyond = row.values()
            print(
                f"{way:24s}{beyond:+16.1f}{f'{low:+.1f} to {high:+.1f}':>16s}{ratio:16.3f}"
                f"{least:16.3f}{least_beyond:+16.1f}",
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

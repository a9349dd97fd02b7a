"""What recording costs where calls are small, on a CPU: decode steps, short passes, and a large
prefill for comparison. Part of `make bench`; writes benchmarks/results/calls-<machine>.json.

Ways of recording take turns on one model, beside a forward hook that does nothing, one that clones
what it sees, and the usual recipe (`output_router_logits`, then top-k). A turn attaches, makes
--in-a-row passes, as `generate` makes them, and detaches; its figure is the median of all passes
but the first ones, in process CPU time, the writer's thread included. (Were there a copy of the
model for each way, what tells the copies apart would count as cost, as where they lie in memory.)

Before and after each turn is an untraced one, and what a way costs is the difference to the mean of
these two, since what else runs on the machine changes from one second to the next: the median over
the rounds, with its quartiles. Beside it stands the difference of the tenth percentiles of all
passes, which what else runs hardly moves. The order of ways is drawn anew each round, and the
rounds are shared out to --processes, one after the other: where things lie in the memory of a
process is worth a microsecond a layer. --before COMMIT measures the package at that commit beside
this one, process by process in turn.

    python -m benchmarks.calls [--rounds 30] [--processes 5] [--in-a-row 8] [--before COMMIT]
        [--case NAME ...] [--way NAME ...] [-o FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import moe_inspect
from benchmarks.measuring import ROOT, machine, write_results

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
# passes of a turn that are not counted (nor is a process's first round): in the first a recorder
# learns its shapes
WARM_UP = 3
# What glibc's allocator keeps at hand decides how fast torch gets small tensors, and changes with
# whatever else a process has done (importing pandas is enough): a decode step executes some 3 %
# more instructions in one such state than in another. With longer lists there is one state
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=100"}
RECIPE = "output_router_logits"
Way = Callable[[Any, Path], AbstractContextManager[Any]]
# (model, whether to ask for router logits) → what runs its next forward pass
Passes = Callable[[Any, bool], Callable[[], Any]]
# way → of each turn the seconds of its passes, and of the untraced ones before and after it
Turns = dict[str, list[tuple[list[float], list[float], list[float]]]]


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
    from transformers import AutoModelForCausalLM

    folder = Path(moe_inspect.__file__).parent / "demo" / "model"
    return AutoModelForCausalLM.from_pretrained(folder).eval()


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


def turns(case: str, ways: Sequence[str], rounds: int, in_a_row: int, seed: int) -> Turns:
    """Measured in this process, one turn a round."""
    make, passes_of, _ = CASES[case]
    model = make()
    # transformers leaves hooks on a model that was asked for its router logits
    recipe = make() if RECIPE in ways else None

    def turn(way: str, path: Path) -> list[float]:
        of = recipe if way == RECIPE else model
        with WAYS[way](of, path):
            run = passes_of(of, way == RECIPE)
            spent = [pass_seconds(run) for _ in range(WARM_UP + in_a_row)][WARM_UP:]
        shutil.rmtree(path, ignore_errors=True)
        return spent

    found: Turns = {way: [] for way in ways}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        before = turn("untraced", Path(scratch))
        for n in range(-1, rounds):
            for way in random.Random(f"{seed} {n}").sample(ways, len(ways)):
                spent = turn(way, Path(scratch) / f"{way} {n}")
                after = turn("untraced", Path(scratch))
                if n >= 0:
                    found[way].append((spent, before, after))
                before = after
    return found


def pass_seconds(run: Callable[[], Any]) -> float:
    """CPU time of a forward pass."""
    began = time.process_time()
    run()
    return time.process_time() - began


def summary(found: Turns, layers: int) -> dict[str, dict[str, float]]:
    rows = {}
    for way, of_way in found.items():
        spent, before, after = (
            list(map(statistics.median, of)) for of in zip(*of_way, strict=True)
        )
        plain = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
        beyond = [a - b for a, b in zip(spent, plain, strict=True)]
        usual = statistics.median(plain)
        passes = [s for turn, _, _ in of_way for s in turn]
        untraced = [s for _, *turns in of_way for turn in turns for s in turn]
        tenth, tenth_plain = (statistics.quantiles(of, n=10)[0] for of in (passes, untraced))
        low, middle, high = statistics.quantiles(beyond, n=4)
        rows[way] = {
            "us_per_layer": middle / layers * 1e6,
            "lower_quartile": low / layers * 1e6,
            "upper_quartile": high / layers * 1e6,
            "untraced_ms": usual * 1e3,
            "untraced_over_this": usual / (usual + middle),
            "tenth_percentile_us": (tenth - tenth_plain) / layers * 1e6,
        }
    return rows


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


# --- processes


def in_process(package: Path, asked: dict[str, Any]) -> Turns:
    """`turns` in a process of its own, with the package in this folder."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.calls", "--turns", json.dumps(asked)],
        cwd=package,
        env={**os.environ, **ALLOCATOR, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    if found.returncode:
        sys.exit(found.stderr)
    return json.loads(found.stdout)


def package_at(commit: str, folder: Path) -> Path:
    """A folder with the package as it was, and these benchmarks."""
    archive = subprocess.run(
        ["git", "archive", commit, "moe_inspect"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
        packed.extractall(folder, filter="data")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


def measured(
    case: str, ways: Sequence[str], asked: argparse.Namespace, packages: Mapping[str, Path]
) -> dict[str, dict[str, float]]:
    """What each way costs with each package, whose key ends its name."""
    found: dict[str, Turns] = {name: {way: [] for way in ways} for name in packages}
    for n in range(asked.processes):
        rounds = len(range(n, asked.rounds, asked.processes))
        one = {"case": case, "ways": ways, "rounds": rounds, "in_a_row": asked.in_a_row, "seed": n}
        for name, package in packages.items():
            for way, of_way in in_process(package, one).items():
                found[name][way] += of_way
    layers = CASES[case][2]
    return {
        way + name: row for name in packages for way, row in summary(found[name], layers).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--in-a-row", type=int, default=8)
    parser.add_argument("--before", metavar="COMMIT")
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--way", action="append", choices=list(WAYS))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--turns", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    if asked.turns:
        print(json.dumps(turns(**json.loads(asked.turns))))
        return
    idle_ns = idle_probe_ns()
    found: dict[str, Any] = {"probe, no recorder open": {"ns_per_call": idle_ns}}
    print(f"probe, no recorder open: {idle_ns:.0f} ns per call (at most 150)")
    ways = asked.way or [way for way in WAYS if way != "untraced"]
    with tempfile.TemporaryDirectory() as scratch:
        packages = {"": ROOT}
        if asked.before:
            packages[", before"] = package_at(asked.before, Path(scratch))
        for case in asked.case or CASES:
            found[case] = measured(case, ways, asked, packages)
            show(case, found[case])
    facts = {
        **machine(),
        "allocator": ALLOCATOR,
        "command": "python -m benchmarks.calls",
        "rounds": asked.rounds,
        "processes": asked.processes,
        "in_a_row": asked.in_a_row,
        **({"before": asked.before} if asked.before else {}),
    }
    if asked.output is None:
        print(f"\nwritten to {write_results('calls', facts, found)}")
        return
    asked.output.write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")


def show(case: str, found: dict[str, dict[str, float]]) -> None:
    heads = "us per layer", "quartiles", "untraced ms", "untraced /", "10th pct us"
    print(f"\n{case}\n{'':32s}" + "".join(f"{head:>16s}" for head in heads))
    for way, row in found.items():
        beyond, low, high, plain, ratio, tenth = row.values()
        print(
            f"{way:32s}{beyond:+16.1f}{f'{low:+.1f} to {high:+.1f}':>16s}{plain:16.3f}"
            f"{ratio:16.3f}{tenth:+16.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""What the size of the experts' outputs costs: `output_norms` beside dispatch alone, in prefill on
a CPU, and its bytes on disk. Writes benchmarks/results/worth-<machine>.json.

Recorders run in turn, one forward pass each. Figures are process CPU time, the writer's thread
included: the median over the rounds of what a pass takes beyond the one next to it with dispatch
alone, and the least pass of each.

    python -m benchmarks.worth [--rounds 15] [-o FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import moe_inspect
from benchmarks.calls import qwen
from benchmarks.measuring import machine, write_results

# narrower than models in use, whose experts' products take longer in proportion
SHAPES: dict[str, dict[str, int]] = {
    "OLMoE's, 2 layers": {
        "hidden_size": 2048,
        "moe_intermediate_size": 1024,
        "num_experts_per_tok": 8,
    },
    "Qwen3-30B's, 2 layers": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "dispatch": {},
    "norms": {"output_norms": True},
    "norms, peaks": {"output_norms": True, "output_peaks": True},
}


def measured(name: str, tokens: int, rounds: int, place: Path) -> dict[str, Any]:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    model, T = qwen(2, 64, **sizes, **SHAPES[name]), tokens
    token_BS = torch.randint(0, 256, (4, T // 4))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for n in range(rounds + 1):  # the first warms up
        for way, options in WAYS.items():
            path = place / f"{way} {n}"
            with moe_inspect.record(model, path, capture="dispatch", **options):
                with torch.no_grad():
                    model(token_BS)  # shows the shapes
                began = time.process_time()
                with torch.no_grad():
                    model(token_BS)
                took = time.process_time() - began
            if n:
                seconds[way].append(took)
    found: dict[str, Any] = {"shape": name, "tokens": T}
    for way in WAYS:
        beyond = [a / b - 1 for a, b in zip(seconds[way], seconds["dispatch"], strict=True)]
        last = place / f"{way} {rounds}"
        routing = sum(f.stat().st_size for f in (last / "routing").iterdir())
        found[way] = {
            "least s": min(seconds[way]),
            "beyond dispatch, median": statistics.median(beyond),
            "bytes per assignment": routing / (2 * T * 2 * 8),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = [
            measured(name, given.tokens, given.rounds, Path(place) / str(n))
            for n, name in enumerate(SHAPES)
        ]
    facts = {**machine(), "command": "python -m benchmarks.worth"}
    if given.output is None:
        print(write_results("worth", facts, found))
    else:
        given.output.write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

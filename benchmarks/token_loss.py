"""What `token_loss` costs: beside a recording without it, and beside no recording, in prefill on a
CPU, where the model is asked for no logits (its body is called; recorded, for those of the last
position), for those of the last position only, and where it returns all of them. Writes
benchmarks/results/token-loss-<machine>.json.

Ways run in turn, one forward pass each. Figures are process CPU time, the writer's thread included:
the median over the rounds.

    python -m benchmarks.token_loss [--rounds 9] [--tokens 1024] [-o FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import moe_inspect
from benchmarks.calls import qwen
from benchmarks.measuring import machine, write_results

VOCABULARY = 32_768
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
LAYERS, EXPERTS = 8, 16
# way → (options of the recording, None without one; of the model's call, None of its body alone)
LAST: dict[str, Any] = {"logits_to_keep": 1}
WAYS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "untraced, no logits": (None, None),
    "untraced, last logits": (None, LAST),
    "untraced, all logits": (None, {}),
    "last logits": ({}, LAST),
    "last logits, losses": ({"token_loss": True}, LAST),
    "all logits": ({}, {}),
    "all logits, losses": ({"token_loss": True}, {}),
}


def measured(tokens: int, rounds: int, place: Path) -> dict[str, Any]:
    model = qwen(LAYERS, EXPERTS, **SIZES)
    token_BS = torch.randint(0, VOCABULARY, (4, tokens // 4))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for n in range(rounds + 1):  # the first warms up
        for way, (options, call) in WAYS.items():
            recording: Any = nullcontext()
            if options is not None:
                recording = moe_inspect.record(model, place / f"{way} {n}", **options)
            run = model.model if call is None else model
            with torch.no_grad(), recording:
                run(token_BS, use_cache=False, **(call or {}))  # shows the shapes
                began = time.process_time()
                run(token_BS, use_cache=False, **(call or {}))
                took = time.process_time() - began
            if n:
                seconds[way].append(took)
    product_s: list[float] = []
    hidden_TH = torch.randn(tokens, SIZES["hidden_size"])
    for _ in range(rounds):
        began = time.process_time()
        with torch.no_grad():
            model.lm_head(hidden_TH)
        product_s.append(time.process_time() - began)
    median = {way: statistics.median(of_way) for way, of_way in seconds.items()}
    return {
        "shape": f"{LAYERS} layers of {EXPERTS} experts, hidden {SIZES['hidden_size']}, "
        f"vocabulary {VOCABULARY}",
        "tokens": tokens,
        "s": median,
        "one product [tokens, vocabulary], s": statistics.median(product_s),
        "losses, in such products": (median["last logits, losses"] - median["last logits"])
        / statistics.median(product_s),
        "losses, of untraced": {
            asked: median[f"{recorded} logits, losses"] / median[f"untraced, {asked} logits"]
            for asked, recorded in (("no", "last"), ("last", "last"), ("all", "all"))
        },
        "losses beyond last logits": median["last logits, losses"] / median["last logits"] - 1,
        "losses beyond all logits": median["all logits, losses"] / median["all logits"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = measured(given.tokens, given.rounds, Path(place))
    facts = {**machine(), "command": "python -m benchmarks.token_loss"}
    if given.output is None:
        print(write_results("token-loss", facts, found))
    else:
        given.output.write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

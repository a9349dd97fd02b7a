"""Two things about what experts are worth.

cost      what the size of the experts' outputs costs: `output_norms` beside dispatch alone, in
          prefill on a CPU, and its bytes on disk. Recorders run in turn, one forward pass each.
          Figures are process CPU time, the writer's thread included: the median over the rounds of
          what a pass takes beyond the one next to it with dispatch alone, and the least pass of
          each. Writes benchmarks/results/worth-<machine>.json.
pruning   whether the scores are worth anything: the loss of the bundled model on held-out text
          without 1, 2 and 3 of the 8 experts of each layer, by each score, calibrated on every
          other text of each domain and judged on the rest, and the other way round (at random with
          the 95 % interval of the draws' mean; by ablation also on two texts of each domain, as the
          figures seen before have it); and by REAP calibrated on three domains and judged on the
          other three, for all 20 ways to choose them.
          Writes benchmarks/results/pruning-<machine>.json.

    python -m benchmarks.worth cost [--rounds 15] [-o FILE]
    python -m benchmarks.worth pruning [-o FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_inspect
from benchmarks.calls import qwen
from benchmarks.measuring import machine, write_results
from moe_inspect.analysis.scores import SCORES, counted, lowest, score_E
from moe_inspect.capture.options import TraceOptions
from moe_inspect.demo import CORPUS_DIR
from moe_inspect.interventions.ablation import HeldOut, documents_of, open_held_out
from moe_inspect.public import Trace

# --- cost

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
WAYS: dict[str, dict[str, Any]] = {"dispatch": {}, "norms": {"output_norms": True}}


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


def cost(rounds: int, tokens: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        return [
            measured(name, tokens, rounds, Path(place) / str(n)) for n, name in enumerate(SHAPES)
        ]


def cost_lines(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for shape in found:
        lines.append(f"{shape['shape']}, {shape['tokens']} tokens a pass:")
        alone = shape["dispatch"]["bytes per assignment"]
        for way in WAYS:
            of = shape[way]
            beyond, added = of["beyond dispatch, median"], of["bytes per assignment"] - alone
            lines.append(
                f"  {way:14} least {of['least s']:.3f} s, median {beyond:+.2%} beyond dispatch, "
                f"{added:+.2f} bytes per assignment"
            )
    return [*lines, "bounds: +2 % of prefill, +1.50 bytes per assignment (norms)"]


# --- pruning

Drop = Sequence[Sequence[int]]  # of each router, the experts that go
OPTIONS: dict[str, Any] = {"batch_tokens": 2048, "dtype": "float32"}
REMOVED = (1, 2, 3)  # of 8 experts
DRAWS = 20
STUDENT = 2.093  # 97.5th percentile of Student's t with DRAWS - 1 degrees of freedom
# loss as an independent script found them once, on a split of its own
SEEN = {
    "whole": 4.278,
    "random": (4.592, 4.950, 5.334),
    "frequency": (4.410, 4.621, 4.893),
    "gate": (4.412, 4.474, 4.772),
    "reap": (4.431, 4.655, 4.712),
    "ean": (4.376, 4.563, 4.863),
    "mean-norm": (4.837, 5.312, 5.411),
    "ablation": (4.330, 4.537, 4.752),
}
# of each domain: those on which the ablation in SEEN was measured
FEW, OF_FEW = 2, "ablation, 2 texts"
SEEN_OTHER_DOMAINS = {"reap": 5.216, "random": 5.041}  # two experts removed


def halves(place: Path) -> list[Path]:
    """The bundled texts in two folders with a folder per domain: every other one."""
    found = [place / "even", place / "odd"]
    for domain in sorted(d for d in CORPUS_DIR.iterdir() if d.is_dir()):
        for n, text in enumerate(sorted(domain.glob("*.txt"))):
            into = found[n % 2] / domain.name
            into.mkdir(parents=True, exist_ok=True)
            (into / text.name).write_bytes(text.read_bytes())
    return found


def first_texts(half: Path) -> Path:
    """A folder with the first FEW texts of each domain of a half."""
    few = half.with_name(f"{half.name} {FEW}")
    for domain in half.iterdir():
        (few / domain.name).mkdir(parents=True)
        for text in sorted(domain.iterdir())[:FEW]:
            (few / domain.name / text.name).write_bytes(text.read_bytes())
    return few


def ablation_scores(texts: Path) -> list[np.ndarray]:
    """Nats per token lost on these texts without each expert alone. float64 [E] of each router"""
    experts = moe_inspect.ablate("demo", data=[str(texts)], **OPTIONS).experts
    by_router = experts.sort_values(["router", "expert"]).groupby("router").difference
    return [of.to_numpy(np.float64) for _, of in by_router]


def scores_of(trace: Trace, half: Path) -> dict[str, list[np.ndarray]]:
    """Of each router, float64 [E]; the least goes first. `trace`: of the texts in `half`."""
    ours = [by for by in SCORES if by != "saliency"]
    found = {by: [score_E(counted(trace, by), r, by) for r in range(4)] for by in ours}
    found["ablation"] = ablation_scores(half)
    found[OF_FEW] = ablation_scores(first_texts(half))
    return found


def least(score_LE: Sequence[np.ndarray], removed: int) -> Drop:
    return [lowest(score_E, 1 - removed / 8) for score_E in score_LE]


def at_random(removed: int) -> list[Drop]:
    scores = (np.random.default_rng(seed).random((4, 8)) for seed in range(DRAWS))
    return [least([*score_LE], removed) for score_LE in scores]


def nats_without(held_out: HeldOut, drop: Drop = ()) -> np.ndarray:
    """Nats of predicting each document without these experts. float64 [D]"""
    _, number, _, _ = documents_of(held_out.batches)
    nats_D = np.zeros(len(number))
    gone = {site.path: of for site, of in zip(held_out.sites, drop, strict=False)}
    for b, batch in enumerate(held_out.batches):
        np.add.at(nats_D, [number[row.document] for row in batch], held_out.losses(b, gone))
    return nats_D


def by_score(trace: Trace, half: Path, held_out: HeldOut) -> dict[str, Any]:
    """Loss of the whole model, and by score without 1, 2 and 3 experts of each layer: nats per
    token; "random": the mean of the draws, and its 95 % interval."""
    tokens = documents_of(held_out.batches)[3].sum()

    def loss(drop: Drop = ()) -> float:
        return float(nats_without(held_out, drop).sum() / tokens)

    drawn = np.array([[loss(drop) for drop in at_random(n)] for n in REMOVED])
    made = {"random": drawn.mean(axis=1).tolist()} | {
        by: [loss(least(score_LE, n)) for n in REMOVED]
        for by, score_LE in scores_of(trace, half).items()
    }
    error = STUDENT * drawn.std(axis=1, ddof=1) / DRAWS**0.5
    made["random low"], made["random high"] = (
        (drawn.mean(axis=1) + sign * error).tolist() for sign in (-1, 1)
    )
    return {"whole": loss(), "experts removed": list(REMOVED), **made}


def by_other_domains(trace: Trace, held_out: HeldOut) -> list[dict[str, Any]]:
    """Two experts of each layer removed by REAP of three domains, and at random: the loss on the
    other three."""
    counts = counted(trace, "reap")
    domains, _, domain_D, tokens_D = documents_of(held_out.batches)
    whole_D = nats_without(held_out)
    random_D = np.mean([nats_without(held_out, drop) for drop in at_random(2)], axis=0)

    def reap_E(r: int, of: Sequence[int]) -> np.ndarray:
        load_DE = counts.assignments_DE(r)[list(of)]
        gated_UE: Any = counts.of[r].gated_norm_UE
        gated_DE = counts.by_domain(gated_UE)[list(of)]
        return gated_DE.sum(0) / np.maximum(load_DE.sum(0), 1)

    rows = []
    for of in combinations(range(len(counts.domains)), 3):
        reap_D = nats_without(held_out, least([reap_E(r, of) for r in range(4)], 2))
        others = [name for d, name in enumerate(counts.domains) if d not in of]
        judged = np.isin(domain_D, [domains.index(name) for name in others])
        nats = {"whole": whole_D, "random": random_D, "reap": reap_D}
        loss = {by: nats_D[judged].sum() / tokens_D[judged].sum() for by, nats_D in nats.items()}
        rows.append({"calibrated on": [counts.domains[d] for d in of], **loss})
    return rows


def pruning() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = halves(Path(folder) / "texts")
        traces = [
            moe_inspect.trace_model(
                "demo", Path(folder) / half.name, data=[str(half)], output_norms=True, **OPTIONS
            )
            for half in texts
        ]
        judged = [
            open_held_out("demo", TraceOptions(data=[str(half)], **OPTIONS)) for half in texts
        ]
        for shown, on in ((0, 1), (1, 0)):
            name = f"calibrated on {texts[shown].name} texts, judged on {texts[on].name} ones"
            found[name] = by_score(traces[shown], texts[shown], judged[on])
        found["three domains"] = by_other_domains(traces[0], judged[1])
    found["seen"] = {**SEEN, "three domains": SEEN_OTHER_DOMAINS}
    return found


def pruning_lines(found: dict[str, Any]) -> list[str]:
    lines = ["loss without 1, 2, 3 of 8 experts per layer, nats per token"]
    *halves, three, _ = found
    for name in (*halves, "seen"):
        case = found[name]
        lines.append(f"{name}: whole {case['whole']:.3f}")
        shown = [by for by in case if by not in ("whole", "experts removed", "three domains")]
        lines += [f"  {by:17}" + "".join(f"{x:8.3f}" for x in case[by]) for by in shown]
    lines.append("by REAP of three domains, on the others, 2 removed (whole, random, REAP)")
    for row in found[three]:
        values = "".join(f"{row[name]:8.3f}" for name in ("whole", "random", "reap"))
        lines.append(f"  {', '.join(row['calibrated on']):28}{values}")
    worse = sum(row["reap"] > row["random"] for row in found[three])
    lines.append(f"REAP is worse than random in {worse} of {len(found[three])}")
    lines.append(f"seen: REAP {SEEN_OTHER_DOMAINS['reap']}, random {SEEN_OTHER_DOMAINS['random']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cost", "pruning"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    facts = {**machine(), "command": f"python -m benchmarks.worth {given.what}"}
    if given.what == "cost":
        found: Any = cost(given.rounds, given.tokens)
        facts["command"] += f" --rounds {given.rounds} --tokens {given.tokens}"
        lines = cost_lines(found)
    else:
        found = pruning()
        lines = pruning_lines(found)
    if given.output is None:
        print(write_results("worth" if given.what == "cost" else "pruning", facts, found))
    else:
        given.output.write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

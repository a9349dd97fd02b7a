"""Does the choice of calibration texts matter, and how many tokens does an expert need? The experts
of the bundled model, quantised by llm-compressor on a CPU to 4, 3 and 2 bits (symmetric, groups of
32), calibrated on texts of equal size and judged by the loss on texts that no calibration saw.

texts    sets of calibration texts. A seed splits the ten texts of each domain into a pool of seven
         and three that are held out, and draws the random texts. Of the pool: `chosen` is what
         `moe-inspect calibrate --choose N` picks, N the tokens of the pool's shortest domain; all
         other sets are cut to as many tokens: `random` texts, one text of each domain (`every
         domain`), texts of one domain alone. `all` is the whole pool, `none` rounding to nearest,
         without calibration.
tokens   the first 1, 2, 3, 5, 8, … texts of the pool, in random order: of each expert the tokens it
         saw, and the error of its output on held-out tokens: of its three matrices together, mean
         squared error over mean square, on the inputs that it gets in the whole model.
widths   the same error of one linear layer, random weights and inputs with a power law for a
         spectrum, in layers of several widths: does the number of tokens follow the width?

llm-compressor is not a dependency. A run takes 1 to 5 s of CPU time and is appended to
build/calibration.jsonl; runs that are there already are not repeated. Writes
benchmarks/results/calibration-<machine>.json, and .jsonl with a line per run.

    make test-llm-compressor  # makes its environment
    build/venv-llmcompressor/bin/python -m benchmarks.calibration [--until HH:MM] [--bits 2 …]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import moe_inspect
from benchmarks.measuring import ROOT, machine, versions, write_results
from moe_inspect.demo import CORPUS_DIR, MODEL_DIR

SEEDS, BITS, GROUP = range(10), (2, 3, 4), 32
HELD_OUT = 3  # texts of each domain
MINIMUM = 128  # --min-tokens: about what the texts can give every expert
SIZES = (1, 2, 3, 5, 8, 13, 21, 42)  # texts of the pool
TOKEN_SEEDS = range(5)
WIDTHS, WIDTH_SEEDS, PER_WIDTH = (128, 256, 512, 1024), range(3), (0.25, 0.5, 1, 2, 4, 8, 16)
SPECTRUM = 1.0  # eigenvalue i of the second moments of the inputs is i ** -SPECTRUM
RUNS = ROOT / "build/calibration.jsonl"
Rows = list[list[int]]
Run = dict[str, Any]


# --- texts


def domains() -> list[str]:
    return sorted(d.name for d in CORPUS_DIR.iterdir() if d.is_dir())


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def ids(text: str) -> list[int]:
    return tokenizer()(text).input_ids


@cache
def split(seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The pool and the texts held out, by domain."""
    drawn, pool, held = random.Random(seed), dict[str, list[str]](), dict[str, list[str]]()
    for domain in domains():
        texts = [path.read_text() for path in sorted((CORPUS_DIR / domain).glob("*.txt"))]
        drawn.shuffle(texts)
        held[domain], pool[domain] = texts[:HELD_OUT], texts[HELD_OUT:]
    return pool, held


def shuffled(seed: int) -> Rows:
    """The pool in random order."""
    rows = [ids(text) for texts in split(seed)[0].values() for text in texts]
    random.Random(seed + 1000).shuffle(rows)
    return rows


def cut(rows: Rows, tokens: int) -> Rows:
    """The first so many tokens of the texts."""
    made = Rows()
    for row in rows:
        made.append(row[: tokens - sum(map(len, made))])
        if sum(map(len, made)) == tokens:
            return made
    raise AssertionError("the texts are too short")


@cache
def chosen(seed: int) -> tuple[str, ...]:
    """The texts of the pool that `moe-inspect calibrate` picks."""
    if (kept := RUNS.with_name(f"chosen-{seed}.json")).exists():
        return tuple(json.loads(kept.read_text()))
    pool = split(seed)[0]
    budget = min(sum(len(ids(text)) for text in texts) for texts in pool.values())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for domain, texts in pool.items():
            (place / "pool" / domain).mkdir(parents=True)
            for n, text in enumerate(texts):
                (place / "pool" / domain / f"{n}.txt").write_text(text)
        trace = moe_inspect.trace_model(
            "demo", place / "trace", data=[str(place / "pool")], dtype="float32"
        )
        made = moe_inspect.calibrate(trace, min_tokens=MINIMUM, choose=budget)
        made.write_texts(place / "chosen.jsonl")
        lines = (place / "chosen.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    kept.write_text(json.dumps(texts))
    return tuple(texts)


def rows_of(seed: int, texts: str) -> Rows:
    """Token ids of a set of texts."""
    if texts == "none":
        return []
    pool, picked = split(seed)[0], [ids(text) for text in chosen(seed)]
    by_domain = {domain: [ids(text) for text in of] for domain, of in pool.items()}
    if texts == "all":
        return [row for rows in by_domain.values() for row in rows]
    if texts == "chosen":
        return picked
    if texts == "every domain":  # the first of each, then the second of each, in random order
        order = random.Random(seed + 2000).sample(domains(), len(by_domain))
        candidates = [by_domain[domain][n] for n in range(2) for domain in order]
    else:
        candidates = shuffled(seed) if texts == "random" else by_domain[texts]
    return cut(candidates, sum(map(len, picked)))


# --- one quantisation


def whole_model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def quantised(method: str, bits: int, rows: Rows, all_experts: bool) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    model = whole_model()
    if method == "none":
        return model
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": GROUP}
    scheme: dict[str, Any] = {
        "targets": "Linear",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
        "config_groups": {"experts": {"targets": ["re:.*experts.*"], "weights": weights}},
    }
    if method == "nearest":
        oneshot(model=model, recipe=QuantizationModifier(**scheme))
        return model
    recipe = (
        GPTQModifier(**scheme, batched_quantization=32)  # experts at a time: the same, but faster
        if method == "gptq"
        else [AWQModifier(), QuantizationModifier(**scheme)]
    )
    data = Dataset.from_list([{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows])
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=512,
        num_calibration_samples=len(rows),
        moe_calibrate_all_experts=all_experts,
    )
    return model


def losses(model: Any, held: dict[str, list[str]]) -> dict[str, float]:
    """Nats per token, by domain."""
    import torch

    rows = [torch.tensor(ids(text)) for texts in held.values() for text in texts]
    # padding is at the end, where no token sees it
    token_ST = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    with torch.no_grad():
        logits_STV = model(input_ids=token_ST).logits
    nats = [
        torch.nn.functional.cross_entropy(logits_TV[: len(row) - 1], row[1:], reduction="sum")
        for row, logits_TV in zip(rows, logits_STV, strict=True)
    ]
    domain_S = [domain for domain, texts in held.items() for _ in texts]
    found = dict[str, float]()
    for domain in held:
        mine = [s for s, of in enumerate(domain_S) if of == domain]
        found[domain] = float(sum(nats[s] for s in mine)) / sum(len(rows[s]) - 1 for s in mine)
    return found


@cache
def assigned(rows: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """int64 [layers, experts]: tokens of each expert in the whole model."""
    import torch

    model, load_LE = whole_model(), 0
    k, E = model.config.num_experts_per_tok, model.config.num_local_experts
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row]), output_router_logits=True).router_logits
        load_LE = load_LE + np.stack(
            [np.bincount(of.topk(k).indices.flatten(), minlength=E) for of in logits]
        )
    return np.asarray(load_LE)


@cache
def expert_inputs(seed: int) -> list[list[Any]]:
    """Of each layer and expert, its inputs on the held-out texts, in the whole model: [T, d]."""
    import torch
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = linearize_moe(whole_model())
    seen: list[list[list[Any]]] = []
    for layer in model.model.layers:
        seen.append([[] for _ in experts(layer)])
        for expert, into in zip(experts(layer), seen[-1], strict=True):
            expert.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0]))
    with torch.no_grad():
        for texts in split(seed)[1].values():
            for text in texts:
                model(torch.tensor([ids(text)]))
    return [[torch.cat(of) for of in layer] for layer in seen]


def experts(layer: Any) -> list[Any]:
    return [layer.mlp.experts[e] for e in range(layer.mlp.experts.num_experts)]


def errors(model: Any, seed: int) -> list[list[float]]:
    """Of each layer and expert: mean squared error of its output over the mean square."""
    import torch
    from llmcompressor.modeling.moe.linearize import linearize_moe

    whole, found = linearize_moe(whole_model()), list[list[float]]()
    with torch.no_grad():
        for layer, quantised_layer, inputs in zip(
            whole.model.layers, model.model.layers, expert_inputs(seed), strict=True
        ):
            found.append([])
            parts = zip(experts(layer), experts(quantised_layer), inputs, strict=True)
            for expert, other, x in parts:
                y = expert(x)
                found[-1].append(float((other(x) - y).pow(2).sum() / y.pow(2).sum()))
    return found


# --- widths


def width(d: int, bits: int, seed: int) -> list[tuple[int, float]]:
    """Pairs (tokens, error) of GPTQ of a layer of d inputs and d outputs. 0 tokens: to nearest; −1:
    by the true second moments of its inputs, as of endless text."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    drawn = torch.Generator().manual_seed(seed)
    weight = torch.randn(d, d, generator=drawn)
    basis = torch.linalg.qr(torch.randn(d, d, generator=drawn))[0]
    root = basis * torch.arange(1, d + 1) ** (-SPECTRUM / 2)  # of the second moments
    moments, by_group = root @ root.T, weight.view(d, d // GROUP, GROUP)
    args = QuantizationArgs(
        num_bits=bits, strategy="group", group_size=GROUP, actorder="static", symmetric=True
    )
    scale, zero = calculate_qparams(by_group.amin(2), by_group.amax(2), args)

    def error(quantised: torch.Tensor) -> float:
        off = weight - quantised
        return float(((off @ moments) * off).sum() / ((weight @ moments) * weight).sum())

    def gptq(moments: torch.Tensor) -> float:
        given = (weight[None].clone(), moments[None].clone(), scale[None], zero[None], None, args)
        return error(quantize_weight(*given)[0][0])

    x_Td = torch.randn(int(max(PER_WIDTH) * d), d, generator=drawn) @ root.T
    found = [(0, error(fake_quantize(weight, scale, zero, args))), (-1, gptq(moments))]
    for n in (int(part * d) for part in PER_WIDTH):
        found.append((n, gptq(x_Td[:n].T @ x_Td[:n] / n)))
    return found


# --- runs


def planned() -> Iterator[Run]:
    """Those that matter most first."""

    def texts(
        method: str, bits: int, *names: str, all_experts: bool = False, seeds: range = SEEDS
    ) -> Iterator[Run]:
        of = {"part": "texts", "method": method, "bits": bits, "all_experts": all_experts}
        for seed in seeds:
            for name in names or ("random", "every domain", "chosen", "one domain"):
                yield {**of, "texts": rotated(name, seed), "seed": seed}

    def sizes(method: str, bits: int, seeds: range = TOKEN_SEEDS) -> Iterator[Run]:
        of = {"part": "tokens", "bits": bits, "all_experts": False}
        for seed in seeds:
            for n in (0, *SIZES):
                yield {**of, "method": method if n else "nearest", "texts": n, "seed": seed}

    yield from texts("none", 32, "none")
    for bits in BITS:
        yield from texts("nearest", bits, "none")
    yield from texts("gptq", 2)
    yield from texts("gptq", 2, "all")
    yield from sizes("gptq", 2, TOKEN_SEEDS[:3])
    of = {"part": "widths", "method": "gptq", "bits": 2, "all_experts": False}
    yield from ({**of, "texts": d, "seed": seed} for d in WIDTHS for seed in WIDTH_SEEDS)
    for seeds in (SEEDS[:5], SEEDS[5:]):
        yield from texts("gptq", 3, seeds=seeds)
        yield from texts("awq", 2, seeds=seeds)
        yield from texts("gptq", 2, all_experts=True, seeds=seeds)
        yield from texts("gptq", 4, seeds=seeds)
    yield from sizes("gptq", 3)
    for bits in (3, 4):
        yield from texts("awq", bits)
    yield from sizes("gptq", 2)
    yield from texts("gptq", 2, *domains())


def measured(run: Run) -> Run:
    seed, texts = run["seed"], run["texts"]
    if run["part"] == "widths":
        return {**run, "errors": width(texts, run["bits"], seed)}
    rows = shuffled(seed)[:texts] if run["part"] == "tokens" else rows_of(seed, texts)
    model = quantised(run["method"], run["bits"], rows, run["all_experts"])
    load_LE = assigned(tuple(map(tuple, rows))) if rows else np.zeros((4, 8), np.int64)
    found = {**run, "documents": len(rows), "tokens": sum(map(len, rows))}
    found["expert_tokens"] = load_LE.tolist()
    if run["part"] == "tokens":
        found["expert_errors"] = errors(model, seed)
    found["losses"] = losses(model, split(seed)[1])
    return found


def known() -> dict[str, Run]:
    """What was measured, by run."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    rows = [json.loads(line) for line in lines]
    keys = ("part", "method", "bits", "all_experts", "texts", "seed")
    return {json.dumps({key: row[key] for key in keys}, sort_keys=True): row for row in rows}


def run(until: str | None, bits: list[int]) -> None:
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache
    from loguru import logger

    torch.set_num_threads(1)
    logger.remove()
    if not torch.accelerator.is_available():  # AWQ pins memory, which needs an accelerator
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    RUNS.parent.mkdir(exist_ok=True)
    done = known()
    for planned_run in planned():
        if until and datetime.now(UTC).strftime("%H:%M") >= until:
            return
        key = json.dumps(planned_run, sort_keys=True)
        if key in done or planned_run["bits"] not in bits:
            continue
        done[key] = measured(planned_run)
        with RUNS.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")


# --- what comes out


def mean_loss(row: Run) -> float:
    """Over the domains, each weighing the same."""
    return float(np.mean([*row["losses"].values()]))


def interval(values: Sequence[float]) -> list[float]:
    """Mean and 95 % interval by Student's t over the seeds."""
    from scipy import stats

    mean, n = float(np.mean(values)), len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan
    return [mean, mean - float(half), mean + float(half)]


def by_texts(rows: list[Run]) -> list[Run]:
    """A row per method, bits and set of texts: the loss and, of the same seeds, what it is above
    the whole model, rounding to nearest, random texts and a text of each domain; where all experts
    get every token, what it is above the same with routing. `one domain`: of each seed another in
    turn, and what it is above rounding to nearest on that domain alone."""
    losses = {(r["method"], r["bits"], r["all_experts"], r["texts"], r["seed"]): r for r in rows}
    whole = {r["seed"]: r for r in rows if r["method"] == "none"}
    found, names = list[Run](), ("none", "random", "every domain", "chosen", "one domain", "all")
    methods = ("none", "nearest", "gptq", "awq")
    kinds = sorted({key[:3] for key in losses}, key=lambda k: (k[1], methods.index(k[0]), k[2]))
    for method, bits, everyone in kinds:
        for name in names:
            mine = {
                seed: losses[key]
                for seed in SEEDS
                if (key := (method, bits, everyone, rotated(name, seed), seed)) in losses
            }
            if not mine or method == "none":
                continue
            row: Run = {"method": method, "bits": bits, "all_experts": everyone, "texts": name}
            row |= {"seeds": len(mine), "loss": interval([*map(mean_loss, mine.values())])}
            routed = {
                seed: losses[key]
                for seed in mine
                if (key := (method, bits, False, rotated(name, seed), seed)) in losses
            }
            others = {
                **({"above_routed": routed} if everyone else {}),
                "above_whole": whole,
                "above_nearest": of_texts(losses, "nearest", bits, False, "none"),
                "above_random": of_texts(losses, method, bits, everyone, "random"),
                "above_every_domain": of_texts(losses, method, bits, everyone, "every domain"),
            }
            for column, of in others.items():
                pairs = [(mine[seed], of[seed]) for seed in mine if seed in of]
                if len(pairs) > 1:
                    row[column] = interval([mean_loss(a) - mean_loss(b) for a, b in pairs])
            if name != "none":
                load_SP = np.array([np.ravel(r["expert_tokens"]) for r in mine.values()])
                row["tokens"] = float(np.mean([r["tokens"] for r in mine.values()]))
                row["fewest_expert_tokens"] = float(load_SP.min(1).mean())
                row["coverage"] = float((load_SP >= MINIMUM).mean())
            if name == "one domain":  # on the domain itself
                pairs = [(r["losses"][r["texts"]], s, r["texts"]) for s, r in mine.items()]
                on_it = [a - others["above_nearest"][s]["losses"][d] for a, s, d in pairs]
                row["above_nearest_on_it"] = interval(on_it)
            found.append(row)
    return found


def rotated(name: str, seed: int) -> str:
    return domains()[seed % len(domains())] if name == "one domain" else name


def of_texts(losses: dict[Any, Run], *key: Any) -> dict[int, Run]:
    return {seed: losses[(*key, seed)] for seed in SEEDS if (*key, seed) in losses}


EDGES = (0, 32, 64, 128, 256, 512, 1024, 4096)  # tokens of an expert


def by_tokens(rows: list[Run]) -> list[Run]:
    """A row per bits and range of the tokens that an expert saw: the error of its output over that
    of rounding to nearest (geometric mean; interval over seeds of their means), and the share of
    the experts for which it is greater."""
    found = list[Run]()
    nearest = {(r["bits"], r["seed"]): r for r in rows if r["method"] == "nearest"}
    calibrated = [r for r in rows if r["method"] != "nearest"]
    for method, bits in dict.fromkeys((r["method"], r["bits"]) for r in calibrated):
        mine = [r for r in calibrated if (r["method"], r["bits"]) == (method, bits)]
        tokens_X = np.concatenate([np.ravel(r["expert_tokens"]) for r in mine])
        ratio_X = np.concatenate(
            [
                np.ravel(r["expert_errors"]) / np.ravel(nearest[bits, r["seed"]]["expert_errors"])
                for r in mine
            ]
        )
        seed_X = np.concatenate([[r["seed"]] * np.size(r["expert_tokens"]) for r in mine])
        for low, high in pairwise(EDGES):
            at = (tokens_X >= low) & (tokens_X < high)
            seeds = np.unique(seed_X[at])
            if len(seeds) < 2:
                continue
            means = [float(np.log(ratio_X[at & (seed_X == seed)]).mean()) for seed in seeds]
            found.append(
                {
                    **{"method": method, "bits": bits, "tokens_from": low, "tokens_below": high},
                    **{"experts": int(at.sum()), "seeds": len(seeds)},
                    "error_ratio": np.exp(interval(means)).tolist(),
                    "worse_than_nearest": float((ratio_X[at] > 1).mean()),
                }
            )
    return found


def by_size(rows: list[Run]) -> list[Run]:
    """A row per bits and number of texts: what the loss is above rounding to nearest, and the mean
    tokens of an expert."""
    found = list[Run]()
    nearest = {(r["bits"], r["seed"]): mean_loss(r) for r in rows if r["method"] == "nearest"}
    for method, bits, texts in dict.fromkeys((r["method"], r["bits"], r["texts"]) for r in rows):
        mine = [r for r in rows if (r["method"], r["bits"], r["texts"]) == (method, bits, texts)]
        if method != "nearest" and len(mine) > 1:
            found.append(
                {
                    **{"method": method, "bits": bits, "documents": texts, "seeds": len(mine)},
                    "expert_tokens": float(np.mean([r["expert_tokens"] for r in mine])),
                    "above_nearest": interval(
                        [mean_loss(r) - nearest[bits, r["seed"]] for r in mine]
                    ),
                }
            )
    return found


def by_width(rows: list[Run]) -> list[Run]:
    """A row per width and tokens per input: which part of what endless text would take off the
    error of rounding to nearest these tokens take off; mean and range over seeds."""
    found = list[Run]()
    for d in dict.fromkeys(r["texts"] for r in rows):
        errors = [dict(map(tuple, r["errors"])) for r in rows if r["texts"] == d]
        for n in (int(part * d) for part in PER_WIDTH):
            gains = [(of[0] - of[n]) / (of[0] - of[-1]) for of in errors]
            row = {"width": d, "tokens": n, "tokens_per_input": n / d, "seeds": len(gains)}
            found.append({**row, "gain": [float(np.mean(gains)), min(gains), max(gains)]})
    return found


def rounded(of: Any) -> Any:
    if isinstance(of, dict):
        return {key: rounded(value) for key, value in of.items()}
    if isinstance(of, list):
        return [rounded(value) for value in of]
    return float(f"{of:.5g}") if isinstance(of, float) else of


def write() -> Path:
    parts: dict[str, list[Run]] = {"texts": [], "tokens": [], "widths": []}
    for row in known().values():
        parts[row["part"]].append(row)
    measured = {
        "texts": by_texts(parts["texts"]),
        "tokens": by_tokens(parts["tokens"]),
        "sizes": by_size(parts["tokens"]),
        "widths": by_width(parts["widths"]),
    }
    facts = machine()
    facts["versions"] |= versions("llmcompressor", "compressed-tensors")
    facts["command"] = "python -m benchmarks.calibration"
    path = write_results("calibration", facts, rounded(measured))
    lines = [json.dumps(rounded(row)) for rows in parts.values() for row in rows]
    (ROOT / path).with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--until", metavar="HH:MM", help="Stop then (UTC); go on in another call.")
    parser.add_argument("--bits", type=int, nargs="+", default=[*BITS, 32])
    given = parser.parse_args()
    run(given.until, given.bits)
    print(write())


if __name__ == "__main__":
    main()

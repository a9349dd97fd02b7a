"""The demo model's card (README.md). Its figures come from the training run that measured them."""

import math
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

from tools.demo import texts

CARD = """---
license: other
library_name: transformers
tags: [mixture-of-experts, toy]
---
# moe-inspect demo model (`--balance {balance}`)

A small model that demonstrates routing. It is **not a useful language model**: it was trained on a few megabytes of text
and generates nonsense. With it every command of moe-inspect can be tried on a real Mixture-of-Experts model, offline and
in seconds.

Mixtral architecture, {total:,} parameters, {active:,} of them active per token: {layers} layers, {experts} experts per layer,
top-{top_k}, hidden size {hidden}, expert size {intermediate}, tied embeddings, {positions} positions. Its tokenizer is a
byte-level BPE of {vocabulary:,} tokens, trained on the same texts; it prepends `<s>`. Weights in bfloat16.

## Training data

{domains} domains, {train_tokens:,} tokens in {train_documents:,} documents; {held_out_documents:,} further documents are held out.

{sources}

## Evaluation

Measured on {windows} held-out windows of {window} tokens per domain, with the weights rounded to bfloat16 (mean loss
{loss_bf16:.4f}; in float32 {loss_float32:.4f}). The unigram loss is that of a model that predicts each domain's token
frequencies.

{figures}

Balancing loss: {balancing}. Load is the number of assignments on the same held-out tokens, with the same number of tokens
per domain.

## How it was trained

    {command}

{steps:,} steps of {batch} windows of {window} tokens, seed {seed}; {wall_s:.0f} s of training on one thread of {cpu}
({versions}).
"""


def cpu_name() -> str:
    """The name of the processor: from /proc/cpuinfo, else from `platform`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]
    )


def sources(data: texts.Texts, train_tokens: dict[str, int]) -> str:
    """Markdown table of the packages that each domain's texts come from; of a folder of your own texts,
    the tokens per domain."""
    header = ["domain", "tokens", "package", "version", "licence"]
    if not data.versions:
        return table(
            header[:2], [[domain, f"{tokens:,}"] for domain, tokens in train_tokens.items()]
        )
    rows, named = list[list[str]](), set[str]()
    for source in texts.SOURCES:
        tokens = "" if source.domain in named else f"{train_tokens[source.domain]:,}"
        named.add(source.domain)
        rows.append(
            [source.domain, tokens, source.package, data.versions[source.package], source.licence]
        )
    return table(header, rows)


def losses(loss_nats: dict[str, float], unigram_nats: dict[str, float]) -> str:
    """Markdown table of the held-out loss and the unigram loss per domain."""
    rows = [
        [domain, f"{x:.3f}", f"{math.exp(x):.1f}", f"{unigram_nats[domain]:.3f}"]
        for domain, x in loss_nats.items()
    ]
    return table(["domain", "loss (nats per token)", "perplexity", "unigram loss"], rows)


def balance(
    max_over_mean_L: np.ndarray, min_over_mean_L: np.ndarray, domain_mi_bits_L: np.ndarray
) -> str:
    """Markdown table with one row per layer."""
    columns = zip(max_over_mean_L, min_over_mean_L, domain_mi_bits_L, strict=True)
    rows = [[str(layer), *(f"{x:.3f}" for x in row)] for layer, row in enumerate(columns)]
    return table(["layer", "max / mean load", "min / mean load", "MI(domain; expert), bits"], rows)


def versions() -> str:
    """The versions that a rerun needs to reproduce the weights."""
    libraries = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, tokenizers "
        f"{tokenizers.__version__}"
    )
    return f"Python {platform.python_version()}, {libraries}"

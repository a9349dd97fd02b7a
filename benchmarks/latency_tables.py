"""Tables of measured MoE latencies as rows, and the tokens per expert behind each row.

The tables are those of ai-dynamo/aiconfigurator (Apache-2.0), which say "balanced" or "power_law_A"
and no counts. How its collectors draw them (collector/helper.py and collect_moe.py of each engine):

- A power law of exponent A draws a share per expert, rounds the shares to n · k assignments, caps
  each expert at n, and times the busiest rank. Five draws are averaged.
- vLLM and TensorRT-LLM hand all n tokens to that rank, which skips the others' experts.
- SGLang hands it the tokens that chose one of its experts, and gives their other choices to its
  first expert: at EP64, seven of eight rows are that expert's.
- DeepEP's layers get the counts of the rank alone.

The draws were not kept, so a row has DRAWS of the same law. D draws, E experts, G ranks.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

DRAWS, TIMED_DRAWS, SAMPLE = 8, 5, 2048
GROUPS, KEPT = 8, 4  # of the collector's router of the min-latency kernel, whatever the model
GPU = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200"}
COLUMNS = (
    *("framework", "version", "device", "kernel_source", "moe_dtype", "num_tokens"),
    *("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    *("distribution", "latency"),
)


@dataclass(frozen=True)
class Load:
    """What one rank was given. tokens_DE: float64 [draws, its experts]; tokens_D: float64 [draws],
    the tokens whose activations it was handed, its own or not."""

    tokens_DE: np.ndarray
    tokens_D: np.ndarray


def read(path: Path) -> list[dict]:
    """Rows of a table; rows of the same configuration are one, their median."""
    table = pq.read_table(path)
    names = [name for name in COLUMNS if name in table.column_names]
    times: dict[tuple, list[float]] = {}
    for *key, latency in zip(*(table[name].to_pylist() for name in names), strict=True):
        times.setdefault(tuple(key), []).append(latency)
    rows = []
    for key, latencies in times.items():
        row = dict(zip(names, key, strict=False))
        rows.append(
            {
                "gpu": GPU.get(row["device"], row["device"]),
                "engine": row["framework"].lower(),
                "version": row["version"],
                "kernel": row["kernel_source"] + ("_decode" if "generation" in path.name else ""),
                "dtype": row["moe_dtype"],
                "hidden": row["hidden_size"],
                "inter": row["inter_size"] // row["moe_tp_size"],
                "top_k": row["topk"],
                "experts": row["num_experts"],
                "tp": row["moe_tp_size"],
                "ep": row["moe_ep_size"],
                "tokens": row["num_tokens"],
                "law": row["distribution"].replace("uniform", "balanced"),
                "ms": float(np.median(latencies)),
            }
        )
    return [row for row in rows if row["ms"] > 0 and row["experts"] % row["ep"] == 0]


@cache
def load(engine: str, kernel: str, n: int, experts: int, k: int, ep: int, law: str) -> Load:
    """The load of the rank that was timed."""
    local = experts // ep
    choices_DE = [balanced(n, experts, k)] if law == "balanced" else None
    if choices_DE is None:
        seed = zlib.crc32(repr((n, experts, k, ep, law)).encode())
        counts_DE = power_law(n, experts, k, ep, float(law.split("_")[2]), seed, engine)
    else:
        counts_DE = np.stack([np.bincount(ids.ravel(), minlength=experts) for ids in choices_DE])
    if kernel.endswith("min_latency"):
        if choices_DE is None:
            choices_DE = [filled(counts_E, n, k) for counts_E in counts_DE]
        counts_DE = np.stack([by_groups(ids, experts) for ids in choices_DE])
    if engine != "sglang" or kernel.startswith("deepep"):
        tokens_D = np.full(len(counts_DE), float(n))
        if kernel.startswith("deepep"):
            if law == "balanced":
                counts_DE = np.zeros((1, experts))
                each = n * k // experts
                counts_DE[0, : local if each else n * k // ep] = max(each, 1)
            tokens_D = counts_DE[:, :local].sum(1).astype(float)
        return Load(counts_DE[:, :local].astype(float), tokens_D)
    tokens_D, tokens_DE = [], counts_DE[:, :local].astype(float)
    if "cutedsl" in kernel:  # masked to what is the rank's own
        return Load(tokens_DE, tokens_DE.sum(1) / k)
    for d, counts_E in enumerate(counts_DE):
        if choices_DE is not None:
            handed = int((choices_DE[d] < local).any(1).sum())
        else:  # experts fill the columns of the choices one after the other, the busiest first
            order_E = np.argsort(-counts_E, kind="stable")
            end_E = np.cumsum(counts_E[order_E])
            mine = np.zeros(2 * n + 1, np.int64)
            for at in np.flatnonzero(order_E < local):
                start = int(end_E[at] - counts_E[order_E[at]]) % n
                mine[start] += 1
                mine[start + int(counts_E[order_E[at]])] -= 1
            mine = np.cumsum(mine)
            handed = int(((mine[:n] + mine[n : 2 * n]) > 0).sum())
        tokens_D.append(float(handed))
        tokens_DE[d, 0] += handed * k - tokens_DE[d].sum()
    return Load(tokens_DE, np.array(tokens_D))


def balanced(n: int, experts: int, k: int) -> np.ndarray:
    """The choices [n, k] of a balanced load: a stride apart, the next token the next expert."""
    stride = math.ceil(experts / k)
    token = np.arange(n)[:, None] * (1 if n >= stride else stride / n)
    return ((token + np.arange(k) * stride) % experts).astype(np.int64)


def power_law(
    n: int, experts: int, k: int, ep: int, alpha: float, seed: int, engine: str = ""
) -> np.ndarray:
    """Counts int64 [draws, experts] of a power law, the busiest rank first."""
    rng, low, high = np.random.default_rng(seed), 1.0, n * 0.8
    if n * k <= experts:
        low, high = 0.01, 2.0
    power = 1 - alpha
    share_DE = (low**power + (high**power - low**power) * rng.random((DRAWS, experts))) ** (
        1 / power
    )
    counts_DE = np.rint(share_DE / share_DE.sum(1, keepdims=True) * n * k).astype(np.int64)
    for counts_E in counts_DE:
        counts_GE = counts_E.reshape(ep, -1)
        if engine == "trtllm":
            settle_by_load(counts_E, n, n * k)
        else:
            np.minimum(counts_E, n, out=counts_E)
            settle_by_rank(counts_GE, n, n * k)
        first = int(counts_GE.sum(1).argmax())
        counts_GE[[0, first]] = counts_GE[[first, 0]]
    return counts_DE


def filled(counts_E: np.ndarray, n: int, k: int) -> np.ndarray:
    """The choices [n, k] of tokens with these counts: column after column, the busiest first."""
    order_E = np.argsort(-counts_E, kind="stable")
    return np.repeat(order_E, counts_E[order_E]).reshape(k, n).T


def by_groups(ids: np.ndarray, experts: int) -> np.ndarray:
    """Counts of what a router of GROUPS groups makes of choices [n, k]: it keeps the KEPT groups
    with the most choices among their best two, the first of equals, and gives what a token lost to
    the first experts of its groups. Many tokens are a sample."""
    n, k = ids.shape
    if n > SAMPLE:
        ids = ids[np.random.default_rng(0).choice(n, SAMPLE, replace=False)]
    chosen = np.zeros((len(ids), experts), bool)
    np.put_along_axis(chosen, ids, True, 1)
    best = np.minimum(chosen.reshape(len(ids), GROUPS, -1).sum(2), 2)
    groups = np.argsort(-best, axis=1, kind="stable")[:, :KEPT]
    kept = np.zeros((len(ids), GROUPS), bool)
    np.put_along_axis(kept, groups, True, 1)
    kept = np.repeat(kept, experts // GROUPS, 1)
    lost = k - (kept & chosen).sum(1, keepdims=True)
    spare = kept & ~chosen
    taken = (kept & chosen) | (spare & (np.cumsum(spare, 1, dtype=np.int16) <= lost))
    return taken.sum(0) * (n / len(ids))


def settle_by_rank(counts_GE: np.ndarray, n: int, target: int) -> None:
    """What rounding left over: a rank after the other gives its least loaded expert one, or takes
    one from its most loaded."""
    while missing := target - int(counts_GE.sum()):
        step = 1 if missing > 0 else -1
        room_GE = counts_GE < n if step > 0 else counts_GE > 0
        ranks = np.flatnonzero(room_GE.any(1))
        at_G = np.where(room_GE, step * counts_GE, n + 1).argmin(1)[ranks]
        each = abs(missing) // (4 * len(ranks) * counts_GE.shape[1])  # many at once while far off
        if each > 1:
            room_G = n - counts_GE[ranks, at_G] if step > 0 else counts_GE[ranks, at_G]
            counts_GE[ranks, at_G] += step * np.minimum(each, room_G)
        else:
            counts_GE[ranks[: abs(missing)], at_G[: abs(missing)]] += step


def settle_by_load(counts_E: np.ndarray, n: int, target: int) -> None:
    """The same in collectors before May 2026, TensorRT-LLM's 1.3.0rc10 among them: what is over n
    goes to the least loaded experts, and the rest around from them, whose rank they are."""
    over = int(np.maximum(counts_E - n, 0).sum())
    np.minimum(counts_E, n, out=counts_E)
    for expert in np.argsort(-counts_E, kind="stable")[::-1]:
        given = min(over, n - int(counts_E[expert]))
        counts_E[expert] += given
        over -= given
    order_E = np.argsort(-counts_E, kind="stable")[::-1]
    missing, at = target - int(counts_E.sum()), 0
    while missing:
        expert = order_E[at % len(order_E)]
        if missing > 0 and counts_E[expert] < n:
            counts_E[expert] += 1
            missing -= 1
        elif missing < 0:
            counts_E[expert if counts_E[expert] else counts_E.argmax()] -= 1
            missing += 1
        at += 1

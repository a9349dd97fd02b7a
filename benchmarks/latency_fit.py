"""`python -m benchmarks.latency_fit TABLE …`: fits the constants of the latency of MoE layers, and
says how wrong they are on what they were not fitted on.

    python -m benchmarks.latency_fit TABLE … [--json] [-o FILE] [--by]

A table is a *moe_perf.parquet of ai-dynamo/aiconfigurator, one of its tables of DeepEP or NCCL, or
a csv with the columns gpu, engine, version, kernel, dtype, hidden, inter (of the rank), top_k,
experts (of all ranks), tokens_per_expert (of the rank, with blanks between) and ms, and perhaps ep
and handed (tokens given to the rank). An error is |log(ours ÷ measured)|, of the cost of imbalance
(a load's time ÷ that of the balanced load of the same tokens) and of the time.

S rows, D draws, F features, P pairs, G groups of rows that stay together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from benchmarks.latency_tables import DRAWS, GPU, TIMED_DRAWS, Load, load, read
from moe_inspect.simulate.latency import (
    BYTES,
    LINEAR,
    START,
    KernelTime,
    LatencyModel,
    Shape,
    TransferTime,
    features,
    fit,
    times,
)

KERNEL = ["gpu", "engine", "version", "kernel", "dtype"]
SHAPE = ["hidden", "whole_inter", "experts", "top_k"]
CONFIGURATION = ["hidden", "inter", "tp", "experts", "top_k", "ep", "tokens"]
# TB/s of memory, dense TFLOP/s of bfloat16; fp8 twice, fp4 four times: the vendor's figures
SPECS = {"h100": (3.35, 989), "h200": (4.8, 989), "b200": (7.7, 2250)}
SOURCE = "fitted from tables of ai-dynamo/aiconfigurator (Apache-2.0)"
FOLDS, FEWEST_ROWS, MOST_ROWS = 4, 100, 4500
HELD_OUT = "held-out shapes"
RANKS = 8  # of the tables of DeepEP: one node
TOKENS = [0, 4, 32, 128, 512, 2048, np.inf]


def read_csv(path: Path) -> Any:
    """Of the loads of a shape and a sum of tokens, the most even one is the balanced one."""
    frame: Any = pd.read_csv(path)
    counts = [np.array(text.split(), float) for text in frame["tokens_per_expert"]]
    busiest = pd.Series([x.max() for x in counts])
    frame["rows"] = [x.sum() for x in counts]
    for name, value in (("ep", 1), ("tp", 1), ("handed", frame["rows"] / frame["top_k"])):
        frame[name] = frame.get(name, value)
    frame["tokens"] = frame["rows"] * frame["ep"] / frame["top_k"]
    alike = [*KERNEL, *CONFIGURATION]
    least = busiest.groupby([frame[name] for name in alike]).transform("min")
    frame["law"] = np.where(busiest == least, "balanced", "given")
    frame["load"] = [
        Load(x[None], np.array([n])) for x, n in zip(counts, frame["handed"], strict=True)
    ]
    return frame


def read_parquet(path: Path) -> Any:
    frame: Any = pd.DataFrame(read(path))
    frame["load"] = [
        load(r.engine, r.kernel, r.tokens, r.experts, r.top_k, r.ep, r.law)
        for r in frame.itertuples()
    ]
    return frame


@dataclass
class Measured:
    """The rows of one kernel. features_SDF: a balanced load has one draw, DRAWS times."""

    name: tuple[str, ...]
    frame: Any  # a data frame
    features_SDF: np.ndarray

    @cached_property
    def ms_S(self) -> np.ndarray:
        return self.frame["ms"].to_numpy(float)

    @cached_property
    def shape_S(self) -> np.ndarray:
        return self.frame[SHAPE].astype(str).agg(" ".join, axis=1).to_numpy()

    @cached_property
    def pairs_P2(self) -> np.ndarray:
        return pairs(self.frame)

    def range(self) -> dict[str, list[float]]:
        names = ["tokens", "hidden", "inter", "experts"]
        return {
            name: [self.frame[name].min().item(), self.frame[name].max().item()] for name in names
        }

    def times(self, constants: dict[str, float]) -> np.ndarray:
        """[rows], the mean over draws."""
        return self.times_by_draw(constants).mean(1)

    def times_by_draw(self, constants: dict[str, float]) -> np.ndarray:
        row = self.features_SDF.reshape(-1, len(START))
        ours = times(row, np.array([constants[name] for name in START]))
        return ours.reshape(len(self.ms_S), -1)

    def fitted(self, keep_S: np.ndarray, seed: int = 0) -> dict[str, float]:
        """From the rows to keep, or a sample of their configurations."""
        frame = self.frame[keep_S]
        group_S = frame.groupby(CONFIGURATION, sort=True).ngroup().to_numpy()
        many = int(group_S.max()) + 1
        fewer = max(1, many * MOST_ROWS // len(frame))
        if fewer < many:
            kept = np.random.default_rng(seed).choice(many, fewer, replace=False)
            keep_S = np.flatnonzero(keep_S)[np.isin(group_S, kept)]
            frame = self.frame.iloc[keep_S]
        return fit(self.features_SDF[keep_S].mean(1), self.ms_S[keep_S], pairs(frame))


def pairs(frame: Any) -> np.ndarray:
    """int [pairs, 2]: a row, and the row of the balanced load of its configuration."""
    frame = frame.assign(at=np.arange(len(frame)))
    even = frame["law"] == "balanced"
    joined = frame[~even].merge(frame[even], on=CONFIGURATION, suffixes=("", "_even"))
    return joined[["at", "at_even"]].to_numpy(int)


def measured(paths: list[Path]) -> Iterator[Measured]:
    frames = [read_csv(p) if p.suffix == ".csv" else read_parquet(p) for p in paths]
    frame: Any = pd.concat(frames, ignore_index=True)
    frame["whole_inter"] = frame["inter"] * frame["tp"]
    for name, rows in frame.groupby(KERNEL, sort=True):
        if len(rows) < FEWEST_ROWS:
            print(f"left out: {'/'.join(name)}, {len(rows)} rows", file=sys.stderr)
            continue
        found = np.empty((len(rows), DRAWS, len(START)))
        for at, r in enumerate(rows.itertuples()):
            gated = "nongated" not in r.kernel
            shape = Shape(r.hidden, r.inter, r.top_k, r.experts, gated)
            found[at] = features(r.load.tokens_DE, shape, r.dtype, r.load.tokens_D)
        yield Measured(tuple(map(str, name)), rows.reset_index(drop=True), found)


# --- dispatch and combine


def transfers(path: Path) -> Iterator[tuple[TransferTime, int]]:
    """Fitted from a table of DeepEP (comm/sglang) or NCCL, and from how many rows. Errors are those
    of the rows that were fitted: a line has two constants."""
    frame: Any = pd.read_parquet(path)
    device, framework, version = frame[["device", "framework", "version"]].iloc[0]
    about = (str(GPU.get(device, device)), framework.lower(), version)
    if "message_size" in frame:
        for (name, ways), rows in frame.groupby(["op_name", "num_gpus"]):
            fitted = line(rows["message_size"] / 1e9, rows["latency"])
            yield TransferTime(about[0], "nccl", about[2], name, "byte", ways, *fitted), len(rows)
        return
    k, experts = frame["num_topk"], frame["num_experts"]
    normal = "dispatch_sms" in frame
    # of 8 ranks, by chance: one with an eighth of the experts holds none of a token's k
    missed = np.array(
        [
            np.prod(1 - (e / RANKS) / (e - np.arange(n)))
            for n, e in zip(k.to_numpy(), experts.to_numpy(float), strict=True)
        ]
    ).clip(0)
    copies = frame["num_token"] * (RANKS * (1 - missed) if normal else k)
    for name, width in (("dispatch", 1), ("combine", 2)):
        ms = frame[f"{name}_transmit_us" if normal else f"{name}_avg_t_us"] / 1e3
        ways = frame[f"{name}_sms"] if normal else pd.Series(0, frame.index)
        for way in sorted(ways.unique()):
            at = ways == way
            gb = (copies * frame["hidden_size"] * width / 1e9)[at]
            kernel = f"deepep_{'normal' if normal else 'low_latency'}_{name}"
            per = "rank" if normal else "choice"
            yield TransferTime(*about, kernel, per, int(way), *line(gb, ms[at])), int(at.sum())


def line(gb: Any, ms: Any) -> tuple[float, float, float]:
    """launch_ms, ms_per_gb, and the median of |log error|, least in logs."""
    gb_S, log_ms_S = gb.to_numpy(float), np.log(ms.to_numpy(float))

    def error(log_constants: np.ndarray) -> np.ndarray:
        launch, slope = np.exp(log_constants)
        return np.log(launch + slope * gb_S) - log_ms_S

    found = least_squares(error, [np.log(ms.min()), 0.0], loss="soft_l1", f_scale=0.1)
    launch, slope = np.exp(found.x)
    off = float(np.median(np.abs(error(found.x))))
    return float(f"{launch:.4g}"), float(f"{slope:.4g}"), round(off, 4)


# --- errors


def errors(kernel: Measured, ours_S: np.ndarray) -> dict[str, float | int | None]:
    """Of the rows that have a time of ours (NaN where they have none)."""
    error_S = np.abs(np.log(ours_S / kernel.ms_S))
    return summary(imbalance(kernel, ours_S), error_S[np.isfinite(error_S)])


def imbalance(kernel: Measured, ours_S: np.ndarray) -> np.ndarray:
    """Errors [pairs] of the cost of imbalance."""
    log_P2 = np.log(ours_S / kernel.ms_S)[kernel.pairs_P2]
    error_P = np.abs(log_P2[:, 0] - log_P2[:, 1])
    return error_P[np.isfinite(error_P)]


def summary(error_P: np.ndarray, error_S: np.ndarray) -> dict[str, float | int | None]:
    return {
        "pairs": len(error_P),
        "imbalance_error_median": quantile(error_P, 0.5),
        "imbalance_error_p90": quantile(error_P, 0.9),
        "time_error_median": quantile(error_S, 0.5),
    }


def pooled(judged_by: dict[str, list[tuple[Measured, np.ndarray]]]) -> Iterator[dict]:
    """A row per way to predict, over all kernels with held-out shapes."""
    for by, kernels in judged_by.items():
        if kernels:
            error_P = np.concatenate([imbalance(*one) for one in kernels])
            error_S = np.concatenate([np.abs(np.log(ours / k.ms_S)) for k, ours in kernels])
            about = dict.fromkeys(KERNEL, "all") | {"by": by}
            yield about | summary(error_P, error_S if by == HELD_OUT else error_S[:0])


def quantile(error: np.ndarray, q: float) -> float | None:
    return round(float(np.quantile(error, q)), 4) if len(error) else None


def held_out_shapes(kernel: Measured) -> np.ndarray | None:
    """Times of each row by constants that never saw its shape; None with fewer than 3 shapes."""
    shapes = np.unique(kernel.shape_S)
    if len(shapes) < 3:
        return None
    ours_S, shuffled = np.empty(len(kernel.ms_S)), np.random.default_rng(0).permutation(shapes)
    for fold in range(min(FOLDS, len(shapes))):
        held_S = np.isin(kernel.shape_S, shuffled[fold :: min(FOLDS, len(shapes))])
        constants = kernel.fitted(~held_S, fold)
        ours_S[held_S] = kernel.times(constants)[held_S]
    return ours_S


def carried(constants: dict[str, float], old: str, new: str) -> dict[str, float]:
    """To another GPU: what moves bytes by the ratio of bandwidths, what multiplies by that of
    FLOP/s, launches as they are."""
    if old not in SPECS or new not in SPECS:
        return constants
    (bandwidth, rate), (new_bandwidth, new_rate) = SPECS[old], SPECS[new]
    scale = {
        name: rate / new_rate
        if name.startswith("tile")
        else bandwidth / new_bandwidth
        if name.startswith(("handed", "row", "weights"))
        else 1.0
        for name in START
    }
    return {name: value * scale[name] for name, value in constants.items()}


def baselines(kernel: Measured) -> dict[str, np.ndarray]:
    """Only their ratios mean anything: the rows that the rank computes, and one time for all."""
    rows_S = kernel.features_SDF[..., LINEAR + 1].mean(1)
    return {"load ratio": rows_S, "no effect": np.ones(len(rows_S))}


def roofline(kernel: Measured) -> np.ndarray:
    """Times without a fit: the slower of the weights' bytes and the rows' FLOPs, as specified."""
    bandwidth, rate = SPECS.get(kernel.name[0], (np.nan, np.nan))
    bits = {2.0: 1, 1.0: 2}.get(BYTES[kernel.name[4]], 4)
    row = kernel.features_SDF
    weights_SD = row[..., LINEAR] / bandwidth
    return np.maximum(weights_SD, row[..., LINEAR + 1] / rate / bits * 1e3).mean(1)


def noise(kernel: Measured, constants: dict[str, float]) -> dict[str, float | None]:
    """What the unknown draws alone make of the error: two halves of our draws against each other,
    as TIMED_DRAWS unknown draws and DRAWS of ours would differ."""
    ours_SD = kernel.times_by_draw(constants)[kernel.pairs_P2[:, 0]]
    half = DRAWS // 2
    gap_P = np.abs(np.log(ours_SD[:, :half].mean(1) / ours_SD[:, half:].mean(1)))
    gap_P *= np.sqrt((1 / TIMED_DRAWS + 1 / DRAWS) / (2 / half))
    return {"median": quantile(gap_P, 0.5), "p90": quantile(gap_P, 0.9)}


def judged(kernel: Measured, fitted: dict[tuple[str, ...], dict[str, float]]) -> Iterator[dict]:
    """A row per way to predict."""
    about = dict(zip(KERNEL, kernel.name, strict=True))
    gpu, engine, _, name, dtype = kernel.name
    for by, ours_S in baselines(kernel).items():
        yield about | {"by": by} | errors(kernel, ours_S) | {"time_error_median": None}
    yield about | {"by": "roofline, not fitted"} | errors(kernel, roofline(kernel))
    for other, constants in fitted.items():
        if other[1] == engine and other[3:] == (name, dtype) and other[0] != gpu:
            ours = kernel.times(carried(constants, other[0], gpu))
            yield about | {"by": f"fitted on {other[0]}"} | errors(kernel, ours)
        elif other[0] == gpu and other[4] == dtype and other[1] != engine:
            ours = kernel.times(constants)
            yield about | {"by": f"fitted on {other[1]} {other[3]}"} | errors(kernel, ours)


def by_ep_and_tokens(kernel: Measured, ours_S: np.ndarray) -> Any:
    log_S = np.log(ours_S / kernel.ms_S)
    pair = kernel.pairs_P2
    frame = kernel.frame.iloc[pair[:, 0]]
    error: Any = pd.Series(np.abs(log_S[pair[:, 0]] - log_S[pair[:, 1]]), frame.index)
    edges = [int(x) if np.isfinite(x) else ">" for x in TOKENS[1:]]
    tokens = pd.cut(frame["tokens"], TOKENS, labels=[str(x) for x in edges])
    groups = error.groupby([frame["ep"], tokens], observed=True)
    return groups.agg(lambda e: f"{e.median():.3f} ({e.quantile(0.9):.2f})").unstack()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="a line per kernel")
    parser.add_argument("--by", action="store_true", help="errors by ranks and tokens as well")
    parser.add_argument("-o", "--output", type=Path, help="write the constants to this file")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    asked = parser.parse_args()
    moves = [p for p in asked.tables if "moe_perf" not in p.name and p.suffix != ".csv"]
    tables = [p for p in asked.tables if p not in moves]
    kernels = [k for k in measured(tables) if asked.only in "/".join(k.name)] if tables else []
    fitted = {k.name: k.fitted(np.ones(len(k.ms_S), bool)) for k in kernels}
    table, entries = [], []
    judged_by: dict[str, list[tuple[Measured, np.ndarray]]] = defaultdict(list)
    for kernel in kernels:
        about, constants = dict(zip(KERNEL, kernel.name, strict=True)), fitted[kernel.name]
        ours_S = held_out_shapes(kernel)
        if ours_S is not None:
            for by, way_S in {HELD_OUT: ours_S, **baselines(kernel)}.items():
                judged_by[by].append((kernel, way_S))
        found = errors(kernel, np.full(len(kernel.ms_S), np.nan) if ours_S is None else ours_S)
        if asked.json:
            print(json.dumps({n: about[n] for n in KERNEL if n != "version"} | found), flush=True)
        else:
            table.append(about | {"by": HELD_OUT} | found)
            draws = noise(kernel, constants)
            table.append(
                about
                | {"by": "unknown draws alone", "pairs": found["pairs"]}
                | {f"imbalance_error_{name}": value for name, value in draws.items()}
            )
            table += judged(kernel, fitted)
            if asked.by and ours_S is not None and len(kernel.pairs_P2):
                print("/".join(kernel.name), by_ep_and_tokens(kernel, ours_S).to_string(), sep="\n")
        # a constant at the bottom of its range is a term that nothing needed
        needed = {name: value > START[name] * 1e-5 for name, value in constants.items()}
        rounded = {n: float(f"{v:.4g}") * needed[n] for n, v in constants.items()}
        kept = {name: value for name, value in found.items() if name != "pairs"}
        entries.append(KernelTime(**about, constants=rounded, errors=kept, measured=kernel.range()))
    ways = [found for path in moves for found in transfers(path)]
    for way, rows in ways if asked.json else ():
        print(json.dumps(asdict(way) | {"rows": rows}))
    if not asked.json:
        print(pd.DataFrame([*table, *pooled(judged_by)]).to_string(index=False))
        print(pd.DataFrame([asdict(way) | {"rows": n} for way, n in ways]).to_string(index=False))
    if asked.output:
        LatencyModel(entries, [way for way, _ in ways], SOURCE).to_file(asked.output)


if __name__ == "__main__":
    main()

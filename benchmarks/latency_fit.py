"""`python -m benchmarks.latency_fit TABLE …`: fits the constants of the latency of MoE layers, and
says how wrong they are on what they were not fitted on.

    python -m benchmarks.latency_fit TABLE … [--json] [-o own.json] [-o errors.csv]

A table is a *moe_perf.parquet of ai-dynamo/aiconfigurator, one of its tables of DeepEP or NCCL, or
a csv of `LatencyModel.fit`. An error is |log(ours ÷ measured)|, of the cost of imbalance (a load's
time ÷ that of the balanced load of the same tokens) and of the time. errors.csv has a row per
kernel and way to predict, of all its rows, by number of ranks (ep), and by tokens of a step.

S rows, D draws, F features, P pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from benchmarks.latency_tables import DRAWS, GPU, TIMED_DRAWS, load, read
from moe_inspect.simulate.latency import (
    LINEAR,
    START,
    LatencyModel,
    Measured,
    TransferTime,
    measured,
    summary,
)
from moe_inspect.simulate.measured_times import BYTES, FEWEST_ROWS, KERNEL, own_times

# TB/s of memory, dense TFLOP/s of bfloat16; fp8 twice, fp4 four times: the vendor's figures
SPECS = {"h100": (3.35, 989), "h200": (4.8, 989), "b200": (7.7, 2250)}
SOURCE = "fitted from tables of ai-dynamo/aiconfigurator (Apache-2.0)"
HELD_OUT, UNKNOWN_DRAWS = "held-out shapes", "unknown draws alone"
RANKS = 8  # of the tables of DeepEP: one node
TOKENS = [0, 4, 32, 128, 512, 2048, np.inf]


def read_parquet(path: Path) -> Any:
    frame: Any = pd.DataFrame(read(path))
    loads = [
        load(r.engine, r.kernel, r.tokens, r.experts, r.top_k, r.ep, r.law)
        for r in frame.itertuples()
    ]
    frame["load"] = [of.tokens_DE for of in loads]
    frame["handed"] = [of.tokens_D for of in loads]
    few = frame.groupby(KERNEL)["ms"].transform("size") < FEWEST_ROWS
    for name, rows in frame[few].groupby(KERNEL):
        print(f"left out: {'/'.join(name)}, {len(rows)} rows", file=sys.stderr)
    return frame[~few]


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


def roofline(kernel: Measured) -> np.ndarray:
    """Times without a fit: the slower of the weights' bytes and the rows' FLOPs, as specified."""
    bandwidth, rate = SPECS.get(kernel.name[0], (np.nan, np.nan))
    bits = {2.0: 1, 1.0: 2}.get(BYTES[kernel.name[4]], 4)
    row = kernel.features_SDF
    weights_SD = row[..., LINEAR] / bandwidth
    return np.maximum(weights_SD, row[..., LINEAR + 1] / rate / bits * 1e3).mean(1)


def ways(kernel: Measured, kernels: list[Measured]) -> Iterator[tuple[str, np.ndarray]]:
    """How the times of a kernel can be predicted: by what, and the times [rows]."""
    if kernel.held_out_shapes is not None:
        yield HELD_OUT, kernel.held_out_shapes
    gpu, engine, _, name, dtype = kernel.name
    for other in kernels:
        other_gpu, other_engine, _, other_name, other_dtype = other.name
        if (other_engine, other_name, other_dtype) == (engine, name, dtype) and other_gpu != gpu:
            ours_S = kernel.times(carried(other.constants, other_gpu, gpu))
            yield f"another GPU: {other_gpu}", ours_S
        elif (other_gpu, other_dtype) == (gpu, dtype) and other_engine != engine:
            yield f"another engine: {other_engine} {other_name}", kernel.times(other.constants)
    # of these two only ratios mean anything: the rows that the rank computes, and one time for all
    yield "load ratio", kernel.features_SDF[..., LINEAR + 1].mean(1)
    yield "no effect", np.ones(len(kernel.ms_S))
    yield "roofline, not fitted", roofline(kernel)


def noise(kernel: Measured) -> np.ndarray:
    """Errors [pairs] that the unknown draws alone make: two halves of our draws against each other,
    as TIMED_DRAWS unknown draws and DRAWS of ours would differ."""
    ours_SD = kernel.times_by_draw(kernel.constants)[kernel.pairs_P2[:, 0]]
    half = DRAWS // 2
    gap_P = np.abs(np.log(ours_SD[:, :half].mean(1) / ours_SD[:, half:].mean(1)))
    return gap_P * np.sqrt((1 / TIMED_DRAWS + 1 / DRAWS) / (2 / half))


def errors(kernel: Measured, kernels: list[Measured]) -> Any:
    """A row per way to predict and pair, or row (`of`): its error, its ranks and its tokens."""
    every = [
        (by, of, rows, error)
        for by, ours_S in ways(kernel, kernels)
        for of, rows, error in (
            ("pair", kernel.pairs_P2[:, 0], kernel.of_imbalance(ours_S)),
            ("time", np.arange(len(ours_S)), kernel.of_times(ours_S)),
        )
        if of == "pair" or by not in ("load ratio", "no effect")
    ]
    if kernel.features_SDF.shape[1] > 1:
        every.append((UNKNOWN_DRAWS, "pair", kernel.pairs_P2[:, 0], noise(kernel)))
    edges = [str(x) for x in TOKENS[1:-1]] + ["more"]
    tokens_S = np.array(edges)[np.searchsorted(TOKENS[1:-1], kernel.frame["tokens"])]
    ep_S = kernel.frame["ep"].to_numpy().astype(str)
    return pd.concat(
        pd.DataFrame({"by": by, "of": of, "ep": ep_S[at], "tokens": tokens_S[at], "error": error_X})
        for by, of, at, error_X in every
    )


def table_of(kernels: list[Measured]) -> Any:
    """The errors of all kernels with held-out shapes together, and of each kernel; of all rows, by
    ranks, and by tokens."""
    each = {kernel.name: errors(kernel, kernels) for kernel in kernels}
    known = [each[kernel.name] for kernel in kernels if kernel.held_out_shapes is not None]
    if known:
        whole: Any = pd.concat(known)
        together = whole.assign(by=whole["by"].str.partition(":")[0])
        each = {("all",) * len(KERNEL): together} | each
    rows = list[dict[str, Any]]()
    for name, of in each.items():
        for cut in ([], ["ep"], ["tokens"]):
            for key, mine in of.groupby(["by", *cut], sort=False):
                row = dict(zip(KERNEL, name, strict=True)) | {
                    "by": "",
                    "ep": "all",
                    "tokens": "all",
                }
                row |= dict(zip(["by", *cut], key, strict=True))
                pair, time = (mine["error"][mine["of"] == x].to_numpy() for x in ("pair", "time"))
                rows.append(row | summary(pair, time))
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="a line per kernel")
    parser.add_argument(
        "-o",
        "--output",
        action="append",
        type=Path,
        default=[],
        help="write the constants to FILE.json, the errors to FILE.csv",
    )
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    asked = parser.parse_args()
    moves = [p for p in asked.tables if "moe_perf" not in p.name and p.suffix != ".csv"]
    tables = [p for p in asked.tables if p not in moves]
    frames = [own_times(p) if p.suffix == ".csv" else read_parquet(p) for p in tables]
    kernels = [
        k
        for k in (measured(pd.concat(frames, ignore_index=True)) if frames else ())
        if asked.only in "/".join(k.name)
    ]
    moved = [found for path in moves for found in transfers(path)]
    if asked.json:
        for k in kernels:
            about = {n: v for n, v in zip(KERNEL, k.name, strict=True) if n != "version"}
            print(json.dumps(about | k.errors(k.held_out_shapes)), flush=True)
        for way, rows in moved:
            print(json.dumps(asdict(way) | {"rows": rows}))
    csvs = [path for path in asked.output if path.suffix == ".csv"]
    if kernels and (csvs or not asked.json):
        table = table_of(kernels)
        for path in csvs:
            table.to_csv(path, index=False)
        if not asked.json:
            whole = table[(table["ep"] == "all") & (table["tokens"] == "all")]
            print(whole.drop(columns=["ep", "tokens"]).to_string(index=False))
            ours = table[(table["gpu"] == "all") & (table["by"] == HELD_OUT)]
            print(ours.drop(columns=KERNEL).to_string(index=False))
    if moved and not asked.json:
        print(pd.DataFrame([asdict(way) | {"rows": n} for way, n in moved]).to_string(index=False))
    for path in asked.output:
        if path not in csvs:
            entries, ways = [k.kernel_time() for k in kernels], [way for way, _ in moved]
            LatencyModel(entries, ways, SOURCE).to_file(path)


if __name__ == "__main__":
    main()

"""Constants of a kernel (`latency`) from times that were measured of it, and how wrong they are on
shapes that they were not fitted on.

An error is |log(ours ÷ measured)|, of the time, and of the cost of imbalance: a load's time ÷ that
of the balanced load of the same tokens.

S rows, D draws of a row's load, E experts of the rank, F features, P pairs of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError, reading
from moe_inspect.simulate.latency import SHAPE, START, KernelTime, Shape, features, times

KERNEL = ["gpu", "engine", "version", "kernel", "dtype"]
OF_RANK = ["hidden", "inter", "top_k", "experts"]
WHOLE_SHAPE = ["hidden", "whole_inter", "experts", "top_k"]
CONFIGURATION = ["hidden", "inter", "tp", "experts", "top_k", "ep", "tokens"]
FOLDS, FEWEST_ROWS, MOST_ROWS = 4, 100, 4500


def own_times(table: str | Path | pd.DataFrame) -> Any:
    """Rows of `LatencyModel.fit`, as `measured` takes them. Of the loads of a shape and a sum of
    tokens, the most even one is the balanced one."""
    where = "the table" if isinstance(table, pd.DataFrame) else str(table)
    frame: Any = table
    if not isinstance(table, pd.DataFrame):
        try:
            with reading(table):
                frame = pd.read_csv(table, dtype=dict.fromkeys(KERNEL, str))
        except ValueError as error:
            raise MoeInspectError(f"cannot read {where}: {error}") from error
    needed = [*KERNEL, *OF_RANK, "tokens_per_expert", "ms"]
    if missing := [name for name in needed if name not in frame]:
        raise MoeInspectError(f"{where} has no column {', '.join(missing)}")
    frame, counts = frame.reset_index(drop=True), list[np.ndarray]()
    frame[KERNEL] = frame[KERNEL].astype(str)
    for row, text in enumerate(frame["tokens_per_expert"]):
        try:
            counts.append(np.array(text.split() if isinstance(text, str) else text, float))
        except (TypeError, ValueError):
            counts.append(np.empty(0))
        of, ms = counts[-1], frame["ms"][row]
        if not (len(of) and np.isfinite(of).all() and (of >= 0).all() and of.any() and ms > 0):
            raise MoeInspectError(
                f"{where}: row {row + 1} has the tokens {text!r} of {ms} ms: give those of each "
                "expert of the rank, with blanks between, and ms above 0"
            )
    busiest = pd.Series([of.max() for of in counts])
    rows = pd.Series([of.sum() for of in counts])
    ranks = frame["experts"] / [len(of) for of in counts]
    for name, value in (("ep", ranks), ("tp", 1), ("handed", rows / frame["top_k"])):
        frame[name] = frame.get(name, value)
    frame["tokens"] = rows * frame["ep"] / frame["top_k"]
    alike = [frame[name] for name in [*KERNEL, *CONFIGURATION]]
    even = busiest == busiest.groupby(alike).transform("min")
    frame["law"] = np.where(even, "balanced", "given")
    frame["load"] = [of[None] for of in counts]
    frame["handed"] = [np.array([float(n)]) for n in frame["handed"]]
    few = frame.groupby(KERNEL).size()
    if (few := few[few < FEWEST_ROWS]).any():
        raise MoeInspectError(
            f"{where} has {few.iloc[0]} rows of {'/'.join(few.index[0])}: {FEWEST_ROWS} are needed "
            "to fit a kernel"
        )
    return frame


@dataclass
class Measured:
    """The rows of one kernel."""

    name: tuple[str, ...]
    frame: Any  # a data frame
    features_SDF: np.ndarray

    @cached_property
    def ms_S(self) -> np.ndarray:
        return self.frame["ms"].to_numpy(float)

    @cached_property
    def shape_S(self) -> np.ndarray:
        return self.frame[WHOLE_SHAPE].astype(str).agg(" ".join, axis=1).to_numpy()

    @cached_property
    def pairs_P2(self) -> np.ndarray:
        return pairs(self.frame)

    @cached_property
    def constants(self) -> dict[str, float]:
        return self.fitted(np.ones(len(self.ms_S), bool))

    @cached_property
    def held_out_shapes(self) -> np.ndarray | None:
        """Times of each row by constants that never saw its shape; None with fewer than 3."""
        shapes = np.unique(self.shape_S)
        if len(shapes) < 3:
            return None
        ours_S, shuffled = np.empty(len(self.ms_S)), np.random.default_rng(0).permutation(shapes)
        for fold in range(min(FOLDS, len(shapes))):
            held_S = np.isin(self.shape_S, shuffled[fold :: min(FOLDS, len(shapes))])
            ours_S[held_S] = self.times(self.fitted(~held_S, fold))[held_S]
        return ours_S

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

    def kernel_time(self) -> KernelTime:
        # a constant at the bottom of its range is a term that nothing needed
        needed = {name: value > START[name] * 1e-5 for name, value in self.constants.items()}
        rounded = {n: float(f"{v:.4g}") * needed[n] for n, v in self.constants.items()}
        errors = self.errors(self.held_out_shapes)
        del errors["pairs"]
        ends = self.frame[["tokens", *SHAPE]].agg(["min", "max"])
        measured = {name: ends[name].tolist() for name in ends}
        return KernelTime(*self.name, constants=rounded, errors=errors, measured=measured)

    def errors(self, ours_S: np.ndarray | None) -> dict[str, float | int | None]:
        """Of times of ours, where there are any."""
        return summary(self.of_imbalance(ours_S), self.of_times(ours_S))

    def of_times(self, ours_S: np.ndarray | None) -> np.ndarray:
        """Errors [rows]."""
        return np.empty(0) if ours_S is None else np.abs(np.log(ours_S / self.ms_S))

    def of_imbalance(self, ours_S: np.ndarray | None) -> np.ndarray:
        """Errors [pairs] of the cost of imbalance."""
        if ours_S is None:
            return np.empty(0)
        log_P2 = np.log(ours_S / self.ms_S)[self.pairs_P2]
        return np.abs(log_P2[:, 0] - log_P2[:, 1])


def measured(frame: Any) -> Iterator[Measured]:
    """Each kernel of the frame: columns KERNEL, CONFIGURATION, law, ms, and of the draws of a row
    `load`, [D, E], and `handed`, [D]."""
    frame["whole_inter"] = frame["inter"] * frame["tp"]
    for name, rows in frame.groupby(KERNEL, sort=True):
        draws = max(map(len, rows["load"]))  # a balanced load has one
        found = np.empty((len(rows), draws, len(START)))
        for at, r in enumerate(rows.itertuples()):
            shape = Shape(r.hidden, r.inter, r.top_k, r.experts, "nongated" not in r.kernel)
            found[at] = features(r.load, shape, r.dtype, r.handed)
        yield Measured(tuple(map(str, name)), rows.reset_index(drop=True), found)


def pairs(frame: Any) -> np.ndarray:
    """int [pairs, 2]: a row, and the row of the balanced load of its configuration."""
    frame = frame.assign(at=np.arange(len(frame)))
    even = frame["law"] == "balanced"
    joined = frame[~even].merge(frame[even], on=CONFIGURATION, suffixes=("", "_even"))
    return joined[["at", "at_even"]].to_numpy(int)


def fit(
    features_SF: np.ndarray, ms_S: np.ndarray, pairs_P2: np.ndarray, weight: float = 1.5
) -> dict[str, float]:
    """Constants whose times, and whose ratios of pairs of rows (imbalanced, balanced), are nearest
    in logs. pairs_P2: int [pairs, 2], rows; weight: of a pair's error, against a row's 1."""
    from scipy.optimize import least_squares

    log_ms_S, (imbalanced_P, balanced_P) = np.log(ms_S), pairs_P2.T

    def error(log_constants: np.ndarray) -> np.ndarray:
        error_S = np.log(times(features_SF, np.exp(log_constants))) - log_ms_S
        return np.r_[error_S, weight * (error_S[imbalanced_P] - error_S[balanced_P])]

    # far below and above any constant of a GPU: a term that nothing needs ends at the bottom
    start = np.log(list(START.values()))
    found = least_squares(
        error, start, bounds=(start - 12, start + 8), loss="soft_l1", f_scale=0.1, max_nfev=60
    )
    return dict(zip(START, map(float, np.exp(found.x)), strict=True))


def summary(error_P: np.ndarray, error_S: np.ndarray) -> dict[str, float | int | None]:
    return {
        "pairs": len(error_P),
        "imbalance_error_median": quantile(error_P, 0.5),
        "imbalance_error_p90": quantile(error_P, 0.9),
        "time_error_median": quantile(error_S, 0.5),
    }


def quantile(error: np.ndarray, q: float) -> float | None:
    return round(float(np.quantile(error, q)), 4) if len(error) else None

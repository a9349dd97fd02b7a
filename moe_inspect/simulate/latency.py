"""The time of an MoE layer on one rank, from its tokens per expert.

    ms = launch + ((weights ÷ bandwidth)^p + (tiles ÷ rate)^p)^(1/p) + activations ÷ bandwidth

Weights are those of the experts that have a token. Tiles are the tokens of each expert, rounded up
to 16, 32, 64 and 128 rows, each with its own rate: a kernel that changes its tile with the batch is
a mixture of them. Activations are what every token costs that the rank was handed (it may skip the
tokens of other ranks' experts, but still reads them and writes their zeros) and each row that it
computes. Every term grows with the tokens and no constant is negative, so more tokens never take
less time.

Constants are fitted to times that were measured (`LatencyModel.fit`). An error is
|log(ours ÷ measured)|, of the time, and of the cost of imbalance: a load's time ÷ that of the
balanced load of the same tokens; on shapes that were held out.

S steps, or rows of a table of times; D draws of a row's load, E experts of the rank, F features, P
pairs of rows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError, first_line, reading
from moe_inspect.files import read_small
from moe_inspect.simulate.measured_times import (
    BYTES,
    CONFIGURATION,
    KERNEL,
    OF_RANK,
    own_times,
)
from moe_inspect.trace.output_dir import output_file

SHIPPED = Path(__file__).with_suffix(".json")
TILES = (1, 16, 32, 64, 128)
LAUNCH = {
    "launch_ms": 0.02,
    "launch_ms_per_1k_hidden": 0.002,
    "launch_ms_per_1k_inter": 0.002,
    "launch_ms_per_1k_experts": 0.01,
    "ms_per_1k_used_experts": 0.01,
}
ACTIVATIONS = {
    "handed_ms_per_gvalue_hidden": 0.5,  # tokens handed · top-k · hidden
    "handed_ms_per_gvalue_inter": 0.5,
    "row_ms_per_gvalue_hidden": 0.5,
    "row_ms_per_gvalue_inter": 0.5,
}
RATE = {f"tile{tile}_ms_per_tflop": 0.3 for tile in TILES}
START = LAUNCH | ACTIVATIONS | {"weights_ms_per_gb": 0.3} | RATE | {"overlap": 1.0}
LINEAR = len(LAUNCH) + len(ACTIVATIONS)
WHOLE_SHAPE = ["hidden", "whole_inter", "experts", "top_k"]
FOLDS, MOST_ROWS = 4, 4500
PAIR = 1.5  # weight of a pair's error, against a row's 1


@dataclass(frozen=True)
class Shape:
    """Shape of a layer on one rank. inter: after tensor parallelism; experts: of all ranks."""

    hidden: int
    inter: int
    top_k: int
    experts: int
    gated: bool = True


SHAPE = "hidden", "inter", "experts"


@dataclass
class KernelTime:
    """The constants of one kernel, and how wrong they were on shapes they were not fitted on."""

    gpu: str
    engine: str
    version: str
    kernel: str
    dtype: str
    constants: dict[str, float]
    errors: dict[str, float | None] = field(default_factory=dict)
    # the least and the most that were measured: of tokens of a step, and of the fields of a shape
    measured: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.gpu}/{self.engine} {self.version}/{self.kernel}/{self.dtype}"

    def predict(
        self, tokens_SE: np.ndarray, shape: Shape, handed_S: np.ndarray | float | None = None
    ) -> np.ndarray:
        """Milliseconds [steps] of the layer. tokens_SE: float64 [steps, experts of the rank].
        handed_S: tokens that the rank is given, its own or not, of each step or of all; by default
        only those that it computes, as after an all-to-all. MoeInspectError for invalid loads and
        shapes."""
        tokens_SE, handed_S = checked(tokens_SE, shape, handed_S)
        row = features(tokens_SE, shape, self.dtype, handed_S)
        return times(row, np.array([self.constants[name] for name in START]))

    def extrapolated(self, shape: Shape, tokens: float) -> str:
        """Describe the sizes that lie beyond all that was measured; "" if none does."""
        asked = {"tokens": tokens, **{name: getattr(shape, name) for name in SHAPE}}
        return ", ".join(
            f"{name.replace('inter', 'intermediate size')} {asked[name]:,} (measured: "
            f"{low:,.0f} to {high:,.0f})"
            for name, (low, high) in self.measured.items()
            if not low <= asked[name] <= high
        )

    def doubt(self) -> str:
        """Describe the errors that are larger than they should be; "" if none is."""
        if not any(error is not None for error in self.errors.values()):
            return "how far off they are is unknown"
        said = list[str]()
        for key, most, what in (
            ("imbalance_error_median", 0.05, "half of the costs of imbalance err by"),
            ("imbalance_error_p90", 0.15, "one in ten costs of imbalance errs by"),
            ("time_error_median", 0.10, "half of the times err by"),
        ):
            error = self.errors.get(key)
            if error is None:
                said.append(f"{what} an unmeasured amount")
            elif error > most:
                said.append(f"{what} more than {np.expm1(error):.0%}")
        return "; ".join(said)


def checked(
    tokens_SE: np.ndarray, shape: Shape, handed_S: np.ndarray | float | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The loads as float64, handed_S per step. MoeInspectError for an invalid load of a rank."""
    for name in OF_RANK:
        value = getattr(shape, name)
        if not (isinstance(value, Real) and 1 <= float(value) < math.inf):
            raise MoeInspectError(f"a shape whose {name} is {value!r}: give a number from 1")
    if shape.top_k > shape.experts:
        raise MoeInspectError(
            f"a shape whose top_k, {shape.top_k}, is above its experts, {shape.experts}"
        )
    tokens_SE = amounts("tokens_SE", tokens_SE)
    if tokens_SE.ndim != 2:
        raise MoeInspectError(
            f"tokens_SE has {tokens_SE.ndim} dimensions: give 2, [steps, experts of the rank]"
        )
    if handed_S is None:
        return tokens_SE, None
    handed_S, steps = amounts("handed_S", handed_S), len(tokens_SE)
    if handed_S.shape not in ((), (steps,)):
        raise MoeInspectError(
            f"handed_S has the shape {handed_S.shape} and tokens_SE has {steps:,} steps: give a "
            "number for each step, or one for all"
        )
    return tokens_SE, np.broadcast_to(handed_S, steps)


def amounts(name: str, given: Any) -> np.ndarray:
    """Numbers from 0, finite. float64"""
    try:
        found = np.asarray(given, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise MoeInspectError(f"{name} is no array of numbers: {first_line(error)}") from error
    # a NaN is the least and the most
    if found.size and not (found.min() >= 0 and found.max() < np.inf):
        raise MoeInspectError(f"{name} has a number that is below 0 or not finite")
    return found


def features(
    tokens_SE: np.ndarray, shape: Shape, dtype: str, handed_S: np.ndarray | None = None
) -> np.ndarray:
    """float64 [steps, features]: what each constant is multiplied with, in the order of START."""
    if dtype not in BYTES:
        raise MoeInspectError(f"no size of a weight is known of {dtype}: one of {', '.join(BYTES)}")
    rows_S, used_S = tokens_SE.sum(1), (tokens_SE > 0).sum(1)
    given_S = rows_S / shape.top_k if handed_S is None else handed_S
    weights = (3 if shape.gated else 2) * shape.hidden * shape.inter
    one = np.ones(len(tokens_SE))
    choices_S = given_S * shape.top_k / 1e9
    columns = [
        one,
        one * shape.hidden / 1e3,
        one * shape.inter / 1e3,
        one * shape.experts / 1e3,
        used_S / 1e3,
        choices_S * shape.hidden,
        choices_S * shape.inter,
        rows_S * shape.hidden / 1e9,
        rows_S * shape.inter / 1e9,
        used_S * weights * BYTES[dtype] / 1e9,
        *(2 * weights * (np.ceil(tokens_SE / tile) * tile).sum(1) / 1e12 for tile in TILES),
    ]
    return np.stack([*columns, one], 1)  # the power of the maximum is multiplied with nothing


def times(features_SF: np.ndarray, constants_F: np.ndarray) -> np.ndarray:
    """Milliseconds [steps]."""
    cost_SF = features_SF * constants_F
    power = 1 + constants_F[-1]
    weights_S, tiles_S = cost_SF[:, LINEAR], cost_SF[:, LINEAR + 1 : -1].sum(1)
    bound_S = np.maximum(weights_S, tiles_S)
    least_S = np.minimum(weights_S, tiles_S) / np.where(bound_S > 0, bound_S, 1)
    return cost_SF[:, :LINEAR].sum(1) + bound_S * (1 + least_S**power) ** (1 / power)


def fit(features_SF: np.ndarray, ms_S: np.ndarray, pairs_P2: np.ndarray) -> dict[str, float]:
    """Constants whose times, and whose ratios of pairs of rows (imbalanced, balanced), are nearest
    in logs. pairs_P2: int [pairs, 2], rows."""
    from scipy.optimize import least_squares

    log_ms_S, (imbalanced_P, balanced_P) = np.log(ms_S), pairs_P2.T

    def error(log_constants: np.ndarray) -> np.ndarray:
        error_S = np.log(times(features_SF, np.exp(log_constants))) - log_ms_S
        return np.r_[error_S, PAIR * (error_S[imbalanced_P] - error_S[balanced_P])]

    # far below and above any constant of a GPU: a term that nothing needs ends at the bottom
    start = np.log(list(START.values()))
    found = least_squares(
        error, start, bounds=(start - 12, start + 8), loss="soft_l1", f_scale=0.1, max_nfev=60
    )
    return dict(zip(START, map(float, np.exp(found.x)), strict=True))


@dataclass
class TransferTime:
    """Dispatch or combine: launch_ms + GB ÷ bandwidth. A copy is what crosses once: with per
    "choice" (DeepEP's low latency) a token goes to each expert that it chose, with per "rank"
    (DeepEP's normal kernels) once to each rank that it reaches, per "byte" (NCCL) is a message.
    ways: the streaming multiprocessors given to DeepEP's normal kernels, the GPUs of NCCL."""

    gpu: str
    engine: str
    version: str
    kernel: str
    per: str
    ways: int
    launch_ms: float
    ms_per_gb: float
    time_error_median: float | None = None

    def predict(self, copies_S: np.ndarray, bytes_per_copy: float) -> np.ndarray:
        """Milliseconds [steps] of the rank that sends or receives the most copies. bytes_per_copy:
        of a token's hidden state, 1 byte a value for a dispatch in fp8, 2 for a combine."""
        gb_S = np.asarray(copies_S, np.float64) * bytes_per_copy / 1e9
        return self.launch_ms + gb_S * self.ms_per_gb


@dataclass
class LatencyModel:
    """Kernels and transfers, as a file of constants holds them."""

    kernels: Sequence[KernelTime]
    transfers: Sequence[TransferTime] = ()
    source: str = ""

    @classmethod
    def fit(cls, table: str | Path | pd.DataFrame) -> LatencyModel:
        """Fit constants to your own times: a csv, or a DataFrame, with a row per timed load of one
        rank. Columns: gpu, engine, version, kernel, dtype; hidden, inter (of the rank), top_k,
        experts (of all ranks); tokens_per_expert (of the rank's experts, with blanks between); ms;
        and perhaps handed (tokens that the rank is given, its own or not) and tp (ranks that share
        an expert). A rank without a token is a load if `handed` is above 0.

        At least 100 rows of each kernel that have tokens. With three shapes or more, errors are
        those of shapes that were held out; costs of imbalance are learnt from loads with the same
        sum of tokens. MoeInspectError for rows that are not such a load, and fewer rows."""
        source = "a table of your own" if isinstance(table, pd.DataFrame) else str(table)
        return cls([each.kernel_time() for each in measured(own_times(table))], (), source)

    @classmethod
    def from_file(cls, path: str | Path = SHIPPED) -> LatencyModel:
        """Read the constants that `to_file` wrote, or fit them to a .csv."""
        if Path(path).suffix == ".csv":
            return cls.fit(path)
        try:
            with reading(path):
                held = json.loads(read_small(path))
            kernels = [KernelTime(**entry) for entry in held["kernels"]]
            transfers = [TransferTime(**entry) for entry in held.get("transfers", ())]
            for kernel in kernels:
                check(
                    f"{path}: {kernel.name}", {name: kernel.constants.get(name) for name in START}
                )
            for way in transfers:
                known = {"launch_ms": way.launch_ms, "ms_per_gb": way.ms_per_gb}
                check(f"{path}: {way.gpu}/{way.kernel}", known)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MoeInspectError(
                f"{path} is no file of latency constants ({error}): give one that "
                "LatencyModel.to_file wrote, a .csv of measured times, or fit a table with "
                '"python -m benchmarks.latency_fit TABLE -o FILE"'
            ) from error
        return cls(kernels, transfers, str(held.get("source", "")))

    def to_file(self, path: str | Path) -> None:
        parts = [f'"source": {json.dumps(self.source)}']
        for name, entries in (("kernels", self.kernels), ("transfers", self.transfers)):
            lines = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
            parts.append(f'"{name}": [\n{lines}\n]')
        with output_file(Path(path)) as draft:
            draft.write_text("{" + ",\n".join(parts) + "}\n")

    def kernel(self, **chosen: str) -> KernelTime:
        """The only kernel with these fields: kernel(gpu="h200", engine="vllm", dtype="fp8").
        MoeInspectError if none has them, or several: then it lists the choices that are left."""
        kernels = self.kernels
        for name, value in chosen.items():
            values = sorted({getattr(kernel, name) for kernel in kernels})
            kernels = [k for k in kernels if getattr(k, name).lower() == value.lower()]
            if not kernels:
                given = [f"{k} {v}" for k, v in chosen.items()][: [*chosen].index(name)]
                scope = f" of {', '.join(given)}" if given else ""
                raise MoeInspectError(
                    f"no times of {name} {value}{scope}: there are {', '.join(values)}"
                )
        missing, choices = open_choices(kernels)
        if missing:
            names = ", ".join(missing)
            raise MoeInspectError(f"several times match: give {names} too: {'; '.join(choices)}")
        return kernels[0]


def open_choices(kernels: Sequence[KernelTime]) -> tuple[list[str], list[str]]:
    """Names of the fields that tell these kernels apart, and for each kernel the values of as few
    of them as make it unique."""
    fields = ("gpu", "engine", "dtype", "kernel", "version")
    names = [n for n in fields if len({getattr(kernel, n) for kernel in kernels}) > 1]
    rows = [tuple(getattr(kernel, name) for name in names) for kernel in kernels]
    counts = Counter(row[:n] for row in rows for n in range(1, len(names) + 1))
    choices = {
        next((row[:n] for n in range(1, len(row)) if counts[row[:n]] == 1), row) for row in rows
    }
    return names[: max(map(len, choices))], sorted(map(" ".join, choices))


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
        """Constants fitted to the rows to keep, or to a sample of their configurations."""
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
        with_tokens = self.frame[self.frame["tokens"] > 0]
        ends = with_tokens[["tokens", *SHAPE]].agg(["min", "max"])
        measured = {name: ends[name].tolist() for name in ends}
        return KernelTime(*self.name, constants=rounded, errors=errors, measured=measured)

    def errors(self, ours_S: np.ndarray | None) -> dict[str, float | int | None]:
        return summary(self.of_imbalance(ours_S), self.of_times(ours_S))

    def of_times(self, ours_S: np.ndarray | None) -> np.ndarray:
        """Errors [rows]."""
        return np.empty(0) if ours_S is None else np.abs(np.log(ours_S / self.ms_S))

    def of_imbalance(self, ours_S: np.ndarray | None) -> np.ndarray:
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


def summary(error_P: np.ndarray, error_S: np.ndarray) -> dict[str, float | int | None]:
    return {
        "pairs": len(error_P),
        "imbalance_error_median": quantile(error_P, 0.5),
        "imbalance_error_p90": quantile(error_P, 0.9),
        "time_error_median": quantile(error_S, 0.5),
    }


def quantile(error: np.ndarray, q: float) -> float | None:
    return round(float(np.quantile(error, q)), 4) if len(error) else None


def check(where: str, constants: Mapping[str, Any]) -> None:
    for name, value in constants.items():
        # a constant below 0 would make more tokens take less time
        if not (isinstance(value, float | int) and np.isfinite(value) and value >= 0):
            raise MoeInspectError(f"{where}: {name} is {value}, not a number from 0")

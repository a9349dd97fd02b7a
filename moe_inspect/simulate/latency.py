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
from moe_inspect.text import cut
from moe_inspect.trace.output_dir import output_file

SHIPPED = Path(__file__).with_suffix(".json")
TILES = (1, 16, 32, 64, 128)
BYTES = {
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int4_wo": 0.53,  # 4-bit kinds with their scales
    "nvfp4": 0.5625,
    "w4a16_mxfp4": 0.53,
    "w4a8_mxfp4_mxfp8": 0.53,
}
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
KERNEL = ["gpu", "engine", "version", "kernel", "dtype"]
OF_RANK = ["hidden", "inter", "top_k", "experts"]
WHOLE_SHAPE = ["hidden", "whole_inter", "experts", "top_k"]
CONFIGURATION = ["hidden", "inter", "tp", "experts", "top_k", "ep", "tokens"]
FOLDS, FEWEST_ROWS, MOST_ROWS = 4, 100, 4500
PAIR = 1.5  # weight of a pair's error, against a row's 1
MOST = 1e9  # of any number in a table of times: sums and products of larger ones overflow
# least number of a column, and what it is; other columns have whole numbers from 1
LEAST = {"ms": (1 / MOST, "a number from 10^-9"), "handed": (0, "a number from 0")}


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

    def kernel(self, **names: str) -> KernelTime:
        """The only kernel with these fields: kernel(gpu="h200", engine="vllm", dtype="fp8").
        MoeInspectError if none has them, or several: then it lists the choices that are left."""
        kernels = self.kernels
        for name, value in names.items():
            values = sorted({getattr(kernel, name) for kernel in kernels})
            kernels = [k for k in kernels if getattr(k, name).lower() == value.lower()]
            if not kernels:
                given = [f"{k} {v}" for k, v in names.items()][: [*names].index(name)]
                scope = f" of {', '.join(given)}" if given else ""
                raise MoeInspectError(
                    f"no times of {name} {value}{scope}: there are {', '.join(values)}"
                )
        if len(kernels) > 1:
            missing, choices = open_choices(kernels)
            raise MoeInspectError(
                f"several measured times match: also give {', '.join(missing)}: "
                f"{'; '.join(choices)}"
            )
        return kernels[0]


def open_choices(kernels: Sequence[KernelTime]) -> tuple[list[str], list[str]]:
    """Names of the fields that tell these kernels apart, and for each kernel the values of as few
    of them as make it unique."""
    fields = ("gpu", "engine", "dtype", "kernel", "version")
    names = [n for n in fields if len({getattr(kernel, n) for kernel in kernels}) > 1]
    rows = [tuple(getattr(kernel, name) for name in names) for kernel in kernels]

    def length(row: tuple[str, ...]) -> int:
        sizes = range(1, len(names) + 1)
        return next((n for n in sizes if sum(r[:n] == row[:n] for r in rows) == 1), len(names))

    lengths = [length(row) for row in rows]
    choices = [" ".join(row[:n]) for row, n in zip(rows, lengths, strict=True)]
    return names[: max(lengths)], sorted(set(choices))


@dataclass(frozen=True)
class TimesTable:
    """A table of times. Cells of a file are text, or NaN. `name`, and of each row in `row_names`:
    what errors call it; `columns`: those that are read."""

    name: str
    cells: Any
    row_names: list[str]
    columns: list[str]

    def refuse(self, is_bad_S: Any, message: str) -> None:
        """MoeInspectError for the first bad row, if there is one. The message has columns in braces
        in place of their cells."""
        if (bad := np.flatnonzero(is_bad_S)).size:
            cells = {name: shown(self.cells[name].iloc[bad[0]]) for name in self.columns}
            raise MoeInspectError(
                f"{self.name}: {self.row_names[bad[0]]}: {message.format(**cells)}"
            )

    def texts(self, column: str) -> pd.Series:
        self.refuse(self.cells[column].isna(), f"{column} is empty")
        return self.cells[column].astype(str)

    def numbers(self, column: str) -> np.ndarray:
        value_S = np.array([number(cell) for cell in self.cells[column]])
        least, kind = LEAST.get(column, (1, "a whole number from 1"))
        is_whole = "whole" in kind
        is_bad_S = (value_S < least) | (is_whole & (value_S % 1 > 0))
        self.refuse(is_bad_S, f"{column} is {{{column}}}, not {kind} to 10^9")
        return value_S.astype(int) if is_whole else value_S


def own_times(table: str | Path | pd.DataFrame) -> Any:
    """Rows of `LatencyModel.fit` in the columns that `measured` takes. The most even of the loads
    with the same shape and sum of tokens is the balanced one."""
    times = opened(table)
    frame: Any = pd.DataFrame({column: times.texts(column) for column in KERNEL})
    is_known = frame["dtype"].isin(list(BYTES))
    times.refuse(~is_known, f"dtype is {{dtype}}, not one of {', '.join(BYTES)}")
    for column in times.columns:
        if column not in (*KERNEL, "tokens_per_expert"):
            frame[column] = times.numbers(column)
    times.refuse(frame["top_k"] > frame["experts"], "top_k is {top_k}, above experts, {experts}")
    loads = own_loads(times, frame["experts"])
    rows = pd.Series([load.sum() for load in loads])
    frame["ep"] = frame["experts"] // [len(load) for load in loads]
    frame["tp"], frame["handed"] = frame.get("tp", 1), frame.get("handed", rows / frame["top_k"])
    times.refuse(
        (rows == 0) & (frame["handed"] == 0),
        "the rank has no tokens: give a load with some, or in the column handed how many tokens "
        "of other ranks it was handed",
    )
    frame["tokens"] = rows * frame["ep"] / frame["top_k"]
    busiest = pd.Series([load.max() for load in loads])
    same_sum = [frame[column] for column in [*KERNEL, *CONFIGURATION]]
    is_even = busiest == busiest.groupby(same_sum).transform("min")
    frame["law"] = np.where(is_even, "balanced", "given")
    frame["load"] = [load[None] for load in loads]
    frame["handed"] = [np.array([handed]) for handed in frame["handed"]]
    loaded = (rows > 0).groupby([frame[column] for column in KERNEL]).sum()
    if len(few := loaded[loaded < FEWEST_ROWS]):
        raise MoeInspectError(
            f"{times.name} has {few.iloc[0]} rows of {shown('/'.join(few.index[0]))} with tokens: "
            f"{FEWEST_ROWS} are needed to fit a kernel"
        )
    return frame


def own_loads(times: TimesTable, experts_S: pd.Series) -> list[np.ndarray]:
    """Tokens per expert of the rank, by row. float64 [experts of the rank]"""
    loads = [counts_of(cell) for cell in times.cells["tokens_per_expert"]]
    times.refuse(
        [not len(load) or load.min() < 0 for load in loads],
        "tokens_per_expert is {tokens_per_expert}, not the tokens of each expert of the rank, "
        "with blanks between",
    )
    times.refuse(
        experts_S % [len(load) for load in loads] > 0,
        "experts, {experts}, is no multiple of the number of counts in tokens_per_expert",
    )
    return loads


def opened(table: str | Path | pd.DataFrame) -> TimesTable:
    """A table of times. MoeInspectError unless it has rows, and each column once."""
    if isinstance(table, pd.DataFrame):
        name, cells = "the table", table.reset_index(drop=True)
        row_names = [f"row {n + 1}" for n in range(len(table))]
    else:
        name, cells = str(table), read_cells(table)
        row_names = [f"line {n + 2}" for n in cells.index]
        cells = cells.reset_index(drop=True)
    needed = [*KERNEL, *OF_RANK, "tokens_per_expert", "ms"]
    if missing := [column for column in needed if column not in cells]:
        raise MoeInspectError(f"{name} has no column {', '.join(missing)}")
    columns = [*needed, *(column for column in ("handed", "tp") if column in cells)]
    if twice := [column for column in columns if list(cells.columns).count(column) > 1]:
        raise MoeInspectError(f"{name} has two columns {twice[0]}")
    if not len(cells):
        raise MoeInspectError(f"{name} has no rows")
    return TimesTable(name, cells, row_names, columns)


def read_cells(path: str | Path) -> pd.DataFrame:
    """The rows of a csv that are not blank, numbered from 0 with the blank ones."""
    try:
        with reading(path):
            frame = pd.read_csv(
                path, dtype=str, keep_default_na=False, na_values=[""], skip_blank_lines=False
            )
    except ValueError as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise MoeInspectError(f"{path}: line 2 has more cells than the header")
    return frame.dropna(how="all")


def number(cell: Any) -> float:
    """−1 for what is not a number up to MOST."""
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return -1.0
    return value if abs(value) <= MOST else -1.0


def counts_of(cell: Any) -> np.ndarray:
    """`number` of each count of a cell, which may be a single one. float64 [experts]"""
    parts = cell.split() if isinstance(cell, str | bytes) else cell if np.iterable(cell) else [cell]
    return np.array([number(part) for part in parts])


def shown(cell: Any) -> str:
    """The cell in one short line."""
    text = " ".join((repr(cell) if isinstance(cell, str) else str(cell)).split())
    return "empty" if text in ("nan", "None", "<NA>", "''", "[]") else cut(text, 80)


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

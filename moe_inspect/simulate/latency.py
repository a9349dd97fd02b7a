"""The time of an MoE layer on one rank, from its tokens per expert.

    ms = launch + ((weights ÷ bandwidth)^p + (tiles ÷ rate)^p)^(1/p) + activations ÷ bandwidth

Weights are those of the experts that have a token. Tiles are the tokens of each expert, rounded up
to 16, 32, 64 and 128 rows, each with its own rate: a kernel that changes its tile with the batch is
a mixture of them. Activations are what every token costs that the rank was handed (it may skip the
tokens of other ranks' experts, but still reads them and writes their zeros) and each row that it
computes. Every term grows with the tokens and no constant is negative, so more tokens never take
less time.

S steps, E experts of the rank, F features, P pairs of rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.errors import MoeInspectError, reading
from moe_inspect.files import read_small
from moe_inspect.trace.output_dir import output_file

if TYPE_CHECKING:
    from pandas import DataFrame

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


@dataclass(frozen=True)
class Shape:
    """Of a layer on one rank. inter: after tensor parallelism; experts: of all ranks."""

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
        self, tokens_SE: np.ndarray, shape: Shape, handed_S: np.ndarray | None = None
    ) -> np.ndarray:
        """Milliseconds [steps] of the layer. tokens_SE: float64 [steps, experts of the rank].
        handed_S: tokens that the rank is given, its own or not; without it, no more than it
        computes, as after an all-to-all."""
        row = features(tokens_SE, shape, self.dtype, handed_S)
        return times(row, np.array([self.constants[name] for name in START]))

    def extrapolated(self, shape: Shape, tokens: float) -> str:
        """What lies beyond all that was measured, in words, "" where nothing does."""
        asked = {"tokens": tokens, **{name: getattr(shape, name) for name in SHAPE}}
        return ", ".join(
            f"{name.replace('inter', 'intermediate size')} {asked[name]:,} (measured: "
            f"{low:,.0f} to {high:,.0f})"
            for name, (low, high) in self.measured.items()
            if not low <= asked[name] <= high
        )

    def doubt(self) -> str:
        """What to say beside every figure, "" where the kernel is as good as it should be."""
        said = []
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


def features(
    tokens_SE: np.ndarray, shape: Shape, dtype: str, handed_S: np.ndarray | None = None
) -> np.ndarray:
    """float64 [steps, features]: what each constant is multiplied with, in the order of START."""
    if dtype not in BYTES:
        raise MoeInspectError(f"no size of a weight is known of {dtype}: one of {', '.join(BYTES)}")
    tokens_SE = np.asarray(tokens_SE, np.float64)
    rows_S, used_S = tokens_SE.sum(1), (tokens_SE > 0).sum(1)
    given_S = rows_S / shape.top_k if handed_S is None else np.asarray(handed_S, np.float64)
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


class LatencyModel:
    """Kernels and transfers, as a file of constants holds them."""

    def __init__(
        self,
        kernels: Sequence[KernelTime],
        transfers: Sequence[TransferTime] = (),
        source: str = "",
    ):
        self.kernels, self.transfers = list(kernels), list(transfers)
        self.source = source

    @classmethod
    def fit(cls, table: str | Path | DataFrame) -> LatencyModel:
        """From times of your own: a csv, or a DataFrame, whose rows are a load of one rank that was
        timed. Columns: gpu, engine, version, kernel, dtype; hidden, inter (of the rank), top_k,
        experts (of all ranks); tokens_per_expert (of the rank's experts, with blanks between); ms;
        and perhaps handed (tokens that the rank is given, its own or not) and tp (ranks that share
        an expert).

        At least 100 rows of each kernel. With three shapes or more, errors are those of shapes that
        were held out; costs of imbalance are learnt from loads with the same sum of tokens.
        MoeInspectError for rows that are no such load, and fewer rows."""
        from moe_inspect.simulate.latency_fit import measured, own_times

        return cls([each.kernel_time() for each in measured(own_times(table))], (), str(table)[:80])

    @classmethod
    def from_file(cls, path: str | Path = SHIPPED) -> LatencyModel:
        """The constants that `to_file` wrote; of a .csv, those that `fit` finds."""
        if Path(path).suffix == ".csv":
            return cls.fit(path)
        try:
            with reading(path):
                held = json.loads(read_small(path))
            kernels = [KernelTime(**entry) for entry in held["kernels"]]
            transfers = [TransferTime(**entry) for entry in held.get("transfers", ())]
            for kernel in kernels:
                known = {name: kernel.constants.get(name) for name in START}
                check(f"{path}: {kernel.name}", known)
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

    def kernel(self, **wanted: str) -> KernelTime:
        """The only kernel with these fields: kernel(gpu="h200", engine="vllm", dtype="fp8")."""
        found = self.kernels
        for name, value in wanted.items():
            there = sorted({getattr(kernel, name) for kernel in found})
            found = [kernel for kernel in found if getattr(kernel, name) == value]
            if not found:
                before = [f"{k} {v}" for k, v in wanted.items()][: [*wanted].index(name)]
                of = f" of {', '.join(before)}" if before else ""
                raise MoeInspectError(
                    f"no times of {name} {value}{of}: there are {', '.join(there)}"
                )
        for name in ("gpu", "engine", "dtype", "kernel", "version"):
            if len(there := sorted({getattr(kernel, name) for kernel in found})) > 1:
                raise MoeInspectError(f"name one {name}: there are times of {', '.join(there)}")
        return found[0]


def check(where: str, constants: Mapping[str, Any]) -> None:
    for name, value in constants.items():
        # a constant below 0 would make more tokens take less time
        if not (isinstance(value, float | int) and np.isfinite(value) and value >= 0):
            raise MoeInspectError(f"{where}: {name} is {value}, not a number from 0")

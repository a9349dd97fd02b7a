"""The price of steps: the milliseconds of a layer's experts and transfers, from the measured times
of kernels and the tokens that the steps bring to each slot and GPU; the same of an even load and of
tokens that choose by chance; and how likely chance makes two times as different.

T tokens, N tokens of a step, S steps, B blocks of documents, E experts, P physical slots, G GPUs, K
experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TypedDict

import numpy as np

from moe_inspect.analysis.metrics.uncertainty import student_p
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import expert_shape
from moe_inspect.simulate.latency import (
    SHIPPED,
    KernelTime,
    LatencyModel,
    Shape,
    TransferTime,
)
from moe_inspect.simulate.measured_times import BYTES
from moe_inspect.simulate.sampling import FEWEST_BLOCKS, SEED, StepLoads, from_load, step_loads
from moe_inspect.trace.reader import Trace

LOW_LATENCY = 128  # tokens of a GPU up to which DeepEP's low-latency kernels transfer them
BATCH_TOKENS = 64, 512, 4096  # of a step, by default
MOST_TOKENS = 2**18
CHANCE_STEPS = 8
CHANCE_POOL = 2**16  # tokens that they are drawn from


@dataclass(frozen=True)
class Times:
    """Milliseconds of one layer in each step. float64 [S]. `experts`: time of the slowest GPU;
    `waiting`: time that the mean GPU waits for it; `dispatch`, `combine`: transfer of tokens to the
    GPUs of their experts, and back, NaN if no such transfer was measured."""

    experts: np.ndarray
    waiting: np.ndarray
    dispatch: np.ndarray
    combine: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.experts + np.nan_to_num(self.dispatch) + np.nan_to_num(self.combine)

    def __add__(self, other: Times) -> Times:
        return Times(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Prices:
    """Measured times of one kernel for the experts, and of transfers by the name of theirs."""

    kernel: KernelTime
    transfers: dict[str, TransferTime]
    source: str = ""

    @property
    def error(self) -> float | None:
        """Median error of costs of imbalance; None if it was not measured."""
        return self.kernel.errors.get("imbalance_error_median")

    def expert_gb(self, shape: Shape) -> float:
        """10^9 bytes of an expert's weights, as the kernel reads them."""
        weights = (3 if shape.gated else 2) * shape.hidden * shape.inter
        return weights * BYTES[self.kernel.dtype] / 1e9

    def describe(self, G: int, nodes: int, shapes: Iterable[Shape], N: int) -> str:
        """Describe the source of the times, their error, and any extrapolation to layers of these
        shapes in steps of N tokens."""
        scope = "experts alone, without transfers,"
        if G > 1 and any(kernel.startswith("deepep") for kernel in self.transfers):
            between = " (between nodes none were measured)" if nodes > 1 else ""
            scope = f"experts, and DeepEP's transfers on one node{between},"
        text = f"times of {scope} as measured of {self.kernel.name} ({self.source})"
        if self.error:
            text += f", whose costs of imbalance err by {self.error:.0%} in the median"
            if time_error := self.kernel.errors.get("time_error_median"):
                text += f", and the times themselves by {time_error:.0%}"
        if doubt := self.kernel.doubt():
            text += f": {doubt}"
        if beyond := sorted({self.kernel.extrapolated(shape, N) for shape in shapes} - {""}):
            text += f"; extrapolated beyond all that was measured: {', '.join(beyond)}"
        return text

    def step_times(self, loads: StepLoads, shape: Shape, N: int) -> Times:
        """Times of one layer in these steps of N tokens."""
        (S, P), G = loads.slots_SP.shape, loads.reached_SG.shape[1]
        tokens_SGE = loads.slots_SP.reshape(S, G, P // G)
        handed = loads.reached_SG.reshape(-1)
        busy_SG = self.kernel.predict(tokens_SGE.reshape(S * G, -1), shape, handed).reshape(S, G)
        kinds = ["normal", *(["low_latency"] if N <= LOW_LATENCY * G else [])]
        ms_2S = [
            self._transfers(kind, loads.reached_SG, tokens_SGE.sum(2), shape.hidden)
            for kind in kinds
        ]
        faster = min(ms_2S, key=lambda ms: np.nan_to_num(ms, nan=np.inf).sum())
        return Times(busy_SG.max(1), busy_SG.max(1) - busy_SG.mean(1), *faster)

    def _transfers(
        self, kind: str, reached_SG: np.ndarray, chosen_SG: np.ndarray, hidden: int
    ) -> np.ndarray:
        """Milliseconds [2, S] of dispatch and combine by DeepEP's kernels of this kind, NaN if
        these were not measured."""
        S, G = reached_SG.shape
        ms = np.full((2, S), 0.0 if G == 1 else np.nan)
        for n, (name, size) in enumerate((("dispatch", BYTES[self.kernel.dtype]), ("combine", 2))):
            if G > 1 and (way := self.transfers.get(f"deepep_{kind}_{name}")):
                copies_SG = chosen_SG if way.per == "choice" else reached_SG
                ms[n] = way.predict(copies_SG.max(1), hidden * max(size, 1.0))
        return ms


def reached_by_chance(E: int, K: int, G: int) -> float:
    """Share of tokens, each with K of E experts at random, that reach a GPU with E/G of them."""
    return 1 - math.prod(max(1 - E / G / (E - n), 0) for n in range(K))


def even_loads(N: int, shape: Shape, P: int, G: int) -> StepLoads:
    """The assignments of N tokens, spread evenly over the slots as whole tokens, so that a step of
    few tokens still reads few experts. They reach the same number of GPUs as by chance."""
    K, reached = shape.top_k, N * reached_by_chance(shape.experts, shape.top_k, G)
    slots_P = np.full(P, N * K // P)
    slots_P[np.linspace(0, P, N * K % P, endpoint=False).astype(int)] += 1
    return StepLoads(slots_P[None], np.full((1, G), reached))


def chance_loads(trace: Trace, router: int, N: int, P: int, G: int) -> StepLoads:
    """Steps whose tokens choose among slots at random, so that no replica is busier than another
    expert."""
    K, slot_P = trace.routers[router].top_k, np.arange(P)
    if trace.counts_only:  # drawn as the steps of the trace are
        rng = np.random.default_rng([SEED, router, 1])
        return from_load(rng, np.ones(P), N, K, CHANCE_STEPS, slot_P, G)
    rng, pool_KT = np.random.default_rng([SEED, router]), _random_choices(P, K)
    ids_KT = pool_KT[:, rng.integers(pool_KT.shape[1], size=CHANCE_STEPS * N)]
    return step_loads(ids_KT, np.repeat(np.arange(CHANCE_STEPS), N), CHANCE_STEPS, slot_P, G)


@cache
def _random_choices(E: int, K: int) -> np.ndarray:
    """Tokens that choose K of E experts uniformly at random. int64 [K, CHANCE_POOL]"""
    random_TE = np.random.default_rng(SEED).random((CHANCE_POOL, E), np.float32)
    return random_TE.argpartition(min(K, E - 1), axis=1)[:, :K].T


def block_means(ms_S: np.ndarray, block_S: np.ndarray) -> np.ndarray:
    """Mean over the steps of each block. float64 [B]"""
    _, index_S, steps_B = np.unique(block_S, return_inverse=True, return_counts=True)
    return np.bincount(index_S, ms_S) / steps_B


def standard_error(ms_B: np.ndarray) -> float:
    """Standard error of the mean over blocks; NaN of fewer than FEWEST_BLOCKS."""
    if len(ms_B) < FEWEST_BLOCKS:
        return math.nan
    return float(ms_B.std(ddof=1)) / math.sqrt(len(ms_B))


def difference_p(ms: float, other_ms: float, error: float, blocks: int) -> float:
    """The p-value that two times are equal, by Student's t. `error`: standard error of their
    difference, from this number of blocks; NaN gives NaN."""
    if math.isnan(error):
        return math.nan
    if (difference := abs(ms - other_ms)) <= 1e-9 * ms:
        return 1.0
    return min(1.0, 2 * float(student_p(np.array(difference / max(error, 1e-300)), blocks - 1)))


def sizes_of(batch_tokens: Sequence[int]) -> list[int]:
    """Numbers of tokens per step, ascending. MoeInspectError for one out of range."""
    sizes = sorted(set(batch_tokens))
    if not sizes or sizes[0] < 1 or sizes[-1] > MOST_TOKENS:
        raise MoeInspectError(
            f"steps of {', '.join(map(str, sizes))} tokens: give numbers from 1 to {MOST_TOKENS:,}"
        )
    return sizes


class KernelName(TypedDict, total=False):
    """What names one of the measured kernels; `kernel` if several of them are alike otherwise."""

    hardware: str | None
    engine: str | None
    dtype: str | None
    kernel: str | None


def prices_of(
    latency: str | Path | None,
    *,
    hardware: str | None = None,
    engine: str | None = None,
    dtype: str | None = None,
    kernel: str | None = None,
) -> Prices:
    """Prices of the only kernel with this KernelName in the file `latency` or the shipped
    constants, and the transfers of its GPU. MoeInspectError unless it is one."""
    model = LatencyModel.from_file(latency or SHIPPED)
    gpus = list(dict.fromkeys(kernel.gpu for kernel in model.kernels))
    if hardware is None and len(gpus) != 1:
        raise MoeInspectError(f"times are of a GPU: give --hardware, one of {', '.join(gpus)}")
    names = {"gpu": hardware, "engine": engine, "dtype": dtype, "kernel": kernel}
    measured = model.kernel(**{name: value for name, value in names.items() if value is not None})
    # a transfer with several settings: the last, which takes the most of the GPU
    transfers = {way.kernel: way for way in model.transfers if way.gpu == measured.gpu}
    return Prices(measured, transfers, model.source)


def shape_of(trace: Trace, router: int) -> Shape:
    """Shape of a router's experts. MoeInspectError if the trace does not state it."""
    size, record = expert_shape(trace, router), trace.routers[router]
    if size is None:
        raise MoeInspectError(
            f"{trace.path} does not say how large an expert is: record it with its model, or "
            "import it with --config"
        )
    hidden, inter, matrices = size
    return Shape(hidden, inter, record.top_k, record.experts, matrices == 3)

"""What a step costs: the milliseconds of its experts and transfers, from the times of kernels that
were measured, and from what the steps bring to each slot and GPU.

N tokens of a step, S steps, P physical slots, G GPUs, k experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from moe_inspect.analysis.metrics.uncertainty import student_p
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import expert_shape
from moe_inspect.simulate.latency import (
    BYTES,
    SHIPPED,
    KernelTime,
    LatencyModel,
    Shape,
    TransferTime,
)
from moe_inspect.simulate.sampling import StepLoads
from moe_inspect.trace.reader import Trace

LOW_LATENCY = 128  # tokens of a GPU up to which DeepEP's low-latency kernels transfer them
BATCH_TOKENS = 64, 512, 4096  # of a step, by default
MOST_TOKENS = 2**18


@dataclass(frozen=True)
class Times:
    """Milliseconds of one layer in each step. float64 [S]. `experts`: of the slowest GPU, of which
    the others wait `waiting` in the mean. `dispatch`, `combine`: of tokens to the GPUs of their
    experts, and back; NaN where no such transfer was measured."""

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
    """Measured times: of the experts, and of DeepEP's transfers, by their kernels."""

    kernel: KernelTime
    transfers: dict[str, TransferTime]
    source: str = ""

    @property
    def error(self) -> float | None:
        """By how much costs of imbalance err in the median; None where that was not measured."""
        return self.kernel.errors.get("imbalance_error_median")

    def expert_gb(self, shape: Shape) -> float:
        """10^9 bytes of an expert's weights, as the kernel reads them."""
        weights = (3 if shape.gated else 2) * shape.hidden * shape.inter
        return weights * BYTES[self.kernel.dtype] / 1e9

    def said(self, G: int, nodes: int, shapes: Iterable[Shape], N: int) -> str:
        """Whose times these are, how wrong they may be, and what of these layers, in steps of N
        tokens, lies beyond all that was measured."""
        sent = G > 1 and any(kernel.startswith("deepep") for kernel in self.transfers)
        what = "experts alone, without transfers,"
        if sent:
            between = " (between nodes none were measured)" if nodes > 1 else ""
            what = f"experts, and DeepEP's transfers on one node{between},"
        said = f"times of {what} as measured of {self.kernel.name} ({self.source})"
        if self.error:
            said += f", whose costs of imbalance err by {self.error:.0%} in the median"
            if time := self.kernel.errors.get("time_error_median"):
                said += f", and the times themselves by {time:.0%}"
        if doubt := self.kernel.doubt():
            said += f": {doubt}"
        if beyond := sorted({self.kernel.extrapolated(shape, N) for shape in shapes} - {""}):
            said += f"; extrapolated beyond all that was measured: {', '.join(beyond)}"
        return said

    def of(self, loads: StepLoads, shape: Shape, N: int) -> Times:
        (S, P), G = loads.slots_SP.shape, loads.reached_SG.shape[1]
        tokens_SGE = loads.slots_SP.reshape(S, G, P // G)
        handed = loads.reached_SG.reshape(-1)
        busy_SG = self.kernel.predict(tokens_SGE.reshape(S * G, -1), shape, handed).reshape(S, G)
        ways = ["normal", *(["low_latency"] if N <= LOW_LATENCY * G else [])]
        sent = [self._sent(way, loads.reached_SG, tokens_SGE.sum(2), shape.hidden) for way in ways]
        faster = min(sent, key=lambda ms: np.nan_to_num(ms, nan=np.inf).sum())
        return Times(busy_SG.max(1), busy_SG.max(1) - busy_SG.mean(1), *faster)

    def _sent(
        self, kind: str, reached_SG: np.ndarray, chosen_SG: np.ndarray, hidden: int
    ) -> np.ndarray:
        """Milliseconds [2, S] of dispatch and combine by DeepEP's kernels of this kind, NaN where
        these were not measured."""
        S, G = reached_SG.shape
        ms = np.full((2, S), 0.0 if G == 1 else np.nan)
        for n, (name, size) in enumerate((("dispatch", BYTES[self.kernel.dtype]), ("combine", 2))):
            if G > 1 and (way := self.transfers.get(f"deepep_{kind}_{name}")):
                copies_SG = chosen_SG if way.per == "choice" else reached_SG
                ms[n] = way.predict(copies_SG.max(1), hidden * max(size, 1.0))
        return ms


def p_apart(ms: float, other_ms: float, error: float, blocks: int) -> float:
    """That two times differ so much by chance; `error`: of their difference, by so many blocks."""
    if (by := abs(ms - other_ms)) <= 1e-9 * ms:
        return 1.0
    return min(1.0, 2 * float(student_p(np.array(by / max(error, 1e-300)), blocks - 1)))


def reached_by_chance(E: int, k: int, G: int) -> float:
    """The share of tokens, each of k of E experts at random, that reach a GPU with E/G of them."""
    return 1 - math.prod(max(1 - E / G / (E - n), 0) for n in range(k))


def even(N: int, shape: Shape, P: int, G: int) -> StepLoads:
    """The assignments of N tokens, spread evenly over the slots as whole tokens: a step of few
    tokens reads few experts then, too. They reach as many GPUs as by chance."""
    k, reached = shape.top_k, N * reached_by_chance(shape.experts, shape.top_k, G)
    slots_P = np.full(P, N * k // P)
    slots_P[np.linspace(0, P, N * k % P, endpoint=False).astype(int)] += 1
    return StepLoads(slots_P[None], np.full((1, G), reached))


def sizes_of(batch_tokens: Sequence[int]) -> list[int]:
    """The numbers of tokens of a step, ascending. MoeInspectError for one out of range."""
    sizes = sorted(set(batch_tokens))
    if not sizes or sizes[0] < 1 or sizes[-1] > MOST_TOKENS:
        raise MoeInspectError(
            f"steps of {', '.join(map(str, sizes))} tokens: give numbers from 1 to {MOST_TOKENS:,}"
        )
    return sizes


def prices_of(named: Mapping[str, str | None], latency: str | Path | None) -> Prices:
    """The only kernel with these names (gpu, engine, dtype, kernel), of the constants of `latency`
    or the shipped ones, and the transfers of its GPU. MoeInspectError where there is not one."""
    model = LatencyModel.from_file(latency or SHIPPED)
    wanted = {name: value for name, value in named.items() if value is not None}
    known = list(dict.fromkeys(each.gpu for each in model.kernels))
    if named["gpu"] is None and len(known) != 1:
        raise MoeInspectError(f"times are of a GPU: give --hardware, one of {', '.join(known)}")
    found = model.kernel(**wanted)
    # of those with several settings, the one with the most of the GPU, the last
    transfers = {way.kernel: way for way in model.transfers if way.gpu == found.gpu}
    return Prices(found, transfers, model.source)


def shape_of(trace: Trace, router: int) -> Shape:
    found, of = expert_shape(trace, router), trace.routers[router]
    if found is None:
        raise MoeInspectError(
            f"{trace.path} does not say how large an expert is: record it with its model, or "
            "import it with --config"
        )
    hidden, inter, matrices = found
    return Shape(hidden, inter, of.top_k, of.experts, matrices == 3)

"""What the kernels and their torch twins must compute, in NumPy, and the cases to compare them on.

T tokens, K slots, E experts, H hidden.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Dispatch, Tape
from tests.support.sweep import WHOLE

POISON = 77
LANES = 3  # routers of the tape's buffer; the second is tested
OTHERS = (11, 13)  # cursors of the first and the third lane


@dataclass(frozen=True)
class Case:
    """skew      how uneven the load is: uniform, zipf, one-hot
    launches     of a dispatch: 1, 2, 3, or None for as many as its size needs
    ids          type of the ids; None: only weights, which are router logits, are recorded
    weights      "float32 as float16": as given, and as recorded; "float16" for both; "none"
    tape         where it is written: "from the first row", "behind others", "beyond its part",
                 "disabled", "without a cursor" or "none"
    invalid_ids  whether some ids are no expert's
    """

    E: int
    K: int
    T: int
    skew: str
    launches: int | None
    ids: torch.dtype | None
    weights: str
    tape: str
    invalid_ids: bool
    block: int | None = None  # slots per program

    def __str__(self) -> str:
        parts = (f"E{self.E}", f"k{self.K}", f"T{self.T}", self.skew, self.launches, self.weights)
        return "-".join(map(str, (*parts, self.tape))).replace(" ", "_")

    @property
    def given(self) -> torch.dtype | None:
        """The type of the weights."""
        return getattr(torch, self.weights.split(" as ")[0], None)

    @property
    def recorded(self) -> torch.dtype | None:
        """The type that weights are rounded to on the tape."""
        return getattr(torch, self.weights.split(" as ")[-1], None)

    @property
    def rows(self) -> int:
        """Rows that the tape holds."""
        return (self.T // 16 + 3) * 16

    @property
    def start(self) -> int:
        """The row of the tape at which the call is written."""
        if self.tape == "beyond its part":
            return self.rows - self.T // 2
        return 13 * (self.tape not in ("from the first row", "without a cursor"))


def choice(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """(ids, weights) [T, K] as a router of this kind makes them."""
    generator = torch.Generator().manual_seed(case.T * case.E + case.K)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    scores = drawn(case.T, case.E)
    if case.skew == "zipf":
        scores -= 0.05 * torch.arange(case.E)
    elif case.skew == "one-hot":
        scores[:, : case.K] += 2
    ids = weights = None
    if case.ids is not None:
        ids = scores.topk(case.K, dim=1).indices.to(case.ids)
        if case.invalid_ids:
            at = drawn(case.T, case.K)
            ids[at < 0.1], ids[at > 0.95] = case.E, -1
    if case.given is not None:
        weights = drawn(case.T, case.K).to(case.given)
    return ids, weights


# --- record


def tape_for(case: Case) -> Tape | None:
    """A tape filled with POISON, a value longer than needed, which shows a write past the end."""
    if case.tape == "none":
        return None
    values = case.rows * LANES * case.K

    def poisoned(dtype: torch.dtype) -> Tensor:
        return torch.full((values + 1,), POISON, dtype=dtype)

    return kernels.Tape(
        None if case.ids is None else poisoned(torch.uint8 if case.E < 256 else torch.int16),
        None if case.recorded is None else poisoned(case.recorded),
        None
        if case.tape == "without a cursor"
        else torch.tensor([OTHERS[0], case.start, OTHERS[1]]),
        enabled=torch.tensor([case.tape != "disabled"]).int(),
        **{"lane": 1, "K": case.K, "experts": case.E, "base": case.rows * case.K},
        rows=case.rows,
    )


def check_tape(case: Case, tape: Tape, ids_TK: Tensor | None, weights_TK: Tensor | None) -> None:
    """The tape holds the decisions at their positions, and is unchanged everywhere else."""
    start, enabled = case.start, case.tape != "disabled"
    room = max(0, min(case.T, case.rows - start)) if enabled else 0
    at = tape.base + ((start + np.arange(room)) * tape.K)[:, None] + np.arange(tape.K)
    if tape.ids is not None and ids_TK is not None:
        ids = np.full(len(tape.ids), POISON)
        given = ids_TK.numpy().astype(np.int64)
        mark = 255 if case.E < 256 else -1
        ids[at] = np.where((given >= 0) & (given < case.E), given, mark)[:room]
        assert (tape.ids.numpy() == ids).all(), "recorded ids"
    if tape.weights is not None and weights_TK is not None:
        weights = torch.full_like(tape.weights, POISON)
        weights[torch.from_numpy(at)] = weights_TK[:room].to(tape.weights.dtype)
        assert torch.equal(tape.weights, weights), "recorded weights"
    if tape.cursor is not None:
        after = start + (case.T if enabled else 0)
        assert tape.cursor.tolist() == [OTHERS[0], after, OTHERS[1]], "the cursor"


def check_record(case: Case, record: Callable[..., None]) -> None:
    """`record`: of a tape, ids and weights. In a zipf load they are columns of wider tensors, as if
    a shared expert followed the routed ones."""
    ids, weights = choice(case)
    tape = tape_for(case)
    if case.skew == "zipf":
        ids, weights = (
            None if t is None else torch.cat([t, t[:, :1]], 1)[:, : case.K] for t in (ids, weights)
        )
    if tape is not None:
        record(tape, ids, weights)
        check_tape(case, tape, ids, weights)


# --- dispatch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are filled before they are written: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_dispatch(case: Case, dispatch: Callable[..., Dispatch]) -> None:
    """`dispatch`: of ids, weights, E and a tape. Its result against a stable sort by NumPy."""
    ids, weights = choice(case)
    assert ids is not None
    tape = tape_for(case)
    with poisoned_memory():
        found = dispatch(ids, weights, case.E, tape)
    flat = ids.numpy().reshape(-1)
    kind = np.where((flat >= 0) & (flat < case.E), flat, case.E)
    order = np.argsort(kind, kind="stable")
    counts = np.bincount(kind, minlength=case.E + 1)[: case.E]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    offsets, token = np.concatenate([[0], counts.cumsum()]), order // max(1, case.K)
    expected = counts, offsets, order, inverse, token
    for name, got, want in zip(found._fields, found, expected, strict=True):
        assert got.dtype == torch.int32, f"the type of {name}"
        assert got.tolist() == want.tolist(), name
    if tape is not None:
        check_tape(case, tape, ids, weights)


# --- combine


def check_combine(
    case: Case,
    combine: Callable[..., Tensor],
    grouped: bool,
    H: int,
    kind: torch.dtype,
    out: torch.dtype,
    writes_norms: bool = False,
) -> None:
    """A weighted sum of outputs of a `kind` against float64; `out`: the type of the result. Where
    the rows are `grouped`, those of slots without an expert hold NaN and count as zero; where they
    are in slot order, the tape of the case is written too. With `writes_norms`, so are the norms
    of the outputs."""
    ids, weights = choice(case)
    assert ids is not None
    assert weights is not None
    generator = torch.Generator().manual_seed(1)
    y_SH = torch.randn(case.T * case.K, H, generator=generator).to(kind)
    order = kernels.dispatch_torch(ids, None, case.E)
    slots = y_SH.double()
    if grouped:
        y_SH[int(order.offsets[-1]) :] = float("nan")
        inside = ((ids >= 0) & (ids < case.E)).reshape(-1, 1)
        slots = torch.where(inside, y_SH.double()[order.inverse.long()], 0.0)
    slots_TKH = slots.view(case.T, case.K, H)
    want_TH = (slots_TKH * weights.double().unsqueeze(-1)).sum(1)
    tape = None if grouped else tape_for(case)
    norms = torch.full_like(ids, POISON, dtype=torch.float32) if writes_norms else None
    places = order if grouped else None
    got = combine(y_SH, ids, weights, places, out, case.E, tape, norms)
    assert got.dtype == out, "the type of the sum"
    coarsest = max((kind, weights.dtype, out), key=lambda d: torch.finfo(d).eps)
    assert_close(got, want_TH, coarsest)
    if norms is not None:
        check_norms(norms, slots_TKH)
    if tape is not None:
        check_tape(case, tape, ids, weights)


def check_norms(norms_TK: Tensor, slots_TKH: Tensor) -> None:
    """The norms must be exact but for the roundings of their sums in float32."""
    want_TK = slots_TKH.norm(dim=2)
    error = (norms_TK.double() - want_TK).abs()
    assert (error <= 1e-5 * want_TK).all(), "the norms of the outputs"


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Maximum and root mean square error must be within a few roundings in `dtype`."""
    error, scale = got.double() - want, want.square().mean().sqrt()
    unit = torch.finfo(dtype).eps
    assert error.isfinite().all(), "a sum that is not finite"
    largest, rms = error.abs().max(), error.square().mean().sqrt()
    assert largest <= 16 * unit * scale, f"max {largest / scale:.2e}"
    assert rms <= 2 * unit * scale, f"rms {rms / scale:.2e}"


# --- all of it

TAPES = ("from the first row", "behind others", "beyond its part", "disabled")
DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "E": (4, 8, 60, 64, 128, 256, 512, *((16, 72, 160, 384) if WHOLE else ())),
    "K": (1, 2, 3, 4, 6, 8, 10),
    "T": (0, 1, 7, 17, 256, 371, 1023, *((2, 64, 200, 512, 2048) if WHOLE else ())),
    "skew": ("uniform", "zipf", "one-hot"),
    "launches": (1, 2, 3, None),
    "ids": (torch.int64, torch.int32),
    "weights": ("float32 as float16", "float16", "bfloat16", "none"),
    "tape": (*TAPES, "none"),
    "invalid_ids": (False, True),  # ids of no expert
}


def drawn_cases(n: int) -> Iterator[Case]:
    """Of all values of the dimensions. A router chooses at most its E experts, and one program
    takes at most 2048 slots."""
    rng = np.random.default_rng(0)
    while n:
        of = {name: values[rng.integers(len(values))] for name, values in DIMENSIONS.items()}
        if of["K"] <= of["E"] and not (of["launches"] == 1 and of["T"] * of["K"] > 2048):
            n -= 1
            yield Case(**of)


def small_cases() -> Iterator[Case]:
    """A few fast cases that together detect every mutation, the fastest first."""
    base = {"skew": "uniform", "ids": torch.int64, "invalid_ids": True}
    sizes = [((7, 8, 2), TAPES), ((130, 60, 4), TAPES[1::2]), ((100, 256, 8), TAPES[2::2])]
    shapes = [(*size, *of) for size, tapes in sizes for of in itertools.product(tapes, (1, 2, 3))]
    shapes += [(400, 64, 8, "behind others", launches) for launches in (2, 3)]
    for T, E, K, tape, launches in shapes:
        of = {"launches": launches, "tape": tape, "weights": "float32 as float16"}
        yield Case(E=E, K=K, T=T, **of, **base)


def check_kernel_and_twin(case: Case) -> None:
    """The kernels in Triton's interpreter and their torch twins, in all that a case is about."""
    on_triton = functools.partial(kernels.dispatch_triton, launches=case.launches, block=case.block)
    check_dispatch(case, on_triton)
    check_dispatch(case, kernels.dispatch_torch)
    if case.launches in (2, 3):  # of a dispatch alone
        return
    for record in (kernels.record_triton, kernels.record_torch, kernels.record_on_device):
        check_record(case, record)
        check_record(replace(case, tape="without a cursor", skew="zipf"), record)
    # of combine more tokens show nothing new, but for as many as the first program can record
    full = kernels.RECORD_BLOCK - 4 <= case.T * case.K <= kernels.RECORD_BLOCK
    if case.given is None or case.T == 0 or (case.T > 130 and not full):
        return
    check_weighted_sum(case)
    for grouped in (False,) if full else (True, False):
        # half of the cases measure their rows, too
        kind = grouped, 40, case.given, torch.float32
        check_combine(case, kernels.combine_triton, *kind, bool(case.T % 2))
        if case.T * case.K <= kernels.RECORD_BLOCK:
            check_combine(case, kernels.combine_torch, *kind, True)


def check_weighted_sum(case: Case) -> None:
    """Torch's sum is bit-identical to transformers' steps."""
    ids, weights = choice(case)
    assert weights is not None
    generator = torch.Generator().manual_seed(1)
    y_SH = torch.randn(case.T * case.K, 40, generator=generator).to(weights.dtype)
    grouped = kernels.dispatch_torch(ids, None, case.E)
    sorted_weights = weights.reshape(-1)[grouped.permutation.long()].unsqueeze(-1)
    want = (y_SH * sorted_weights)[grouped.inverse.long()].view(case.T, case.K, 40).sum(1)
    assert torch.equal(kernels.weighted_sum(y_SH, weights, grouped.inverse), want)
    slots = y_SH.double()[grouped.inverse.long()].view(case.T, case.K, 40)
    check_norms(kernels.norms_torch(y_SH, case.K, grouped.inverse), slots)

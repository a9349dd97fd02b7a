"""The cases that the kernels and their torch implementations are checked on, against NumPy. The
module under test, `kernels`, is an argument, so that the mutation tests can
pass a broken one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from moe_inspect.capture.engine import rows
from tests.support import kernel_reference as checks
from tests.support.kernel_reference import POISON, Case, choice
from tests.support.sweep import WHOLE

TAPES = ("in one page", "across pages", "across the ring's end", "beyond the limit", "disabled")
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


def is_possible(given: dict[str, Any]) -> bool:
    """A router chooses at most its E experts; one program takes at most 2048 slots."""
    return given.get("K", 1) <= given.get("E", 512) and not (
        given.get("launches") == 1 and given.get("T", 0) * given.get("K", 1) > 2048
    )


def pairwise() -> list[Case]:
    """Cases that contain every possible pair of values of every two dimensions. Greedy: each case
    is the one with the most new pairs among some random ones."""
    rng = np.random.default_rng(0)
    names = list(DIMENSIONS)
    missing = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(names, 2)
        for x in DIMENSIONS[a]
        for y in DIMENSIONS[b]
        if is_possible({a: x, b: y})
    }
    cases = []
    while missing:
        # sets are unordered: sort to get the same in every process
        wanted = dict(min(missing, key=lambda pair: sorted(map(str, pair))))
        best: dict[str, Any] = {}
        gain = -1
        for _ in range(60):
            drawn = {
                n: wanted.get(n, DIMENSIONS[n][rng.integers(len(DIMENSIONS[n]))]) for n in names
            }
            new = sum(frozenset(p) in missing for p in itertools.combinations(drawn.items(), 2))
            if is_possible(drawn) and new > gain:
                best, gain = drawn, new
        if not best:  # 60 draws did not fit the wanted pair: draw smaller ones
            best = {**{n: DIMENSIONS[n][0] for n in names}, **wanted}
            assert is_possible(best)
        missing -= {frozenset(p) for p in itertools.combinations(best.items(), 2)}
        cases.append(Case(**best))
    return cases


@contextmanager
def poisoned(kernels: ModuleType) -> Iterator[None]:
    """Results of a dispatch are filled before they are written: what is not written shows."""
    empty_dispatch = kernels.empty_dispatch
    kernels.empty_dispatch = lambda *a: kernels.Dispatch(
        *(t.fill_(POISON * 1000) for t in empty_dispatch(*a))
    )
    try:
        yield
    finally:
        kernels.empty_dispatch = empty_dispatch


def check_dispatch(kernels: ModuleType, case: Case, reference: bool) -> None:
    on_triton = functools.partial(kernels.dispatch_triton, launches=case.launches, block=case.block)
    with poisoned(kernels):
        checks.check_dispatch(kernels, case, kernels.dispatch_torch if reference else on_triton)


def check_record(kernels: ModuleType, case: Case, reference: bool) -> None:
    checks.check_record(kernels, case, kernels.record_torch if reference else kernels.record_triton)


def check_combine(kernels: ModuleType, case: Case, reference: bool) -> None:
    """The kernel against float64, both grouped and in slot order; torch bit-identical to
    transformers' steps. More tokens show nothing new, but for as many as the first can record."""
    ids, weights = choice(case)
    full = kernels.RECORD_BLOCK - 4 <= case.T * case.K <= kernels.RECORD_BLOCK
    if weights is None or case.T == 0 or (case.T > 130 and not full):
        return
    H = 40
    if reference:
        generator = torch.Generator().manual_seed(1)
        y_SH = torch.randn(case.T * case.K, H, generator=generator).to(weights.dtype)
        grouped = kernels.dispatch_torch(ids, None, case.E)
        sorted_weights = weights.reshape(-1)[grouped.permutation.long()].unsqueeze(-1)
        want = (y_SH * sorted_weights)[grouped.inverse.long()].view(case.T, case.K, H).sum(1)
        assert torch.equal(kernels.weighted_sum(y_SH, weights, grouped.inverse), want)
        slots = y_SH.double()[grouped.inverse.long()].view(case.T, case.K, H)
        checks.check_norms(kernels.norms_torch(y_SH, case.K, grouped.inverse), slots)
        return
    for in_order in (True,) if full else (False, True):
        # half of the cases measure their rows, too
        kind = not in_order, H, weights.dtype, torch.float32, bool(case.T % 2)
        checks.check_combine(kernels, case, kernels.combine_triton, *kind)


def check_rows(kernels: ModuleType, case: Case, reference: bool, module: Any = rows) -> None:
    """Its kernels are in a module of their own. The kind of tape is none of theirs."""
    if case.T:
        with patch.object(module.kernels, "runs_triton", lambda _: True):  # else none are kept
            by = "torch" if reference else "triton"
            run = getattr(module, f"keep_{by}"), getattr(module, f"take_{by}")
            checks.check_rows(module, case, *run)


CHECKS = {"dispatch": check_dispatch, "record": check_record, "combine": check_combine}
CHECKS |= {"rows": check_rows}


def small_cases() -> Iterator[Case]:
    """A few fast cases that together detect every mutation, the fastest first."""
    base = {"skew": "uniform", "ids": torch.int64, "invalid_ids": True}
    sizes = [((7, 8, 2), TAPES), ((130, 60, 4), TAPES[1::2]), ((100, 256, 8), TAPES[2::2])]
    shapes = [(*size, *of) for size, tapes in sizes for of in itertools.product(tapes, (1, 2, 3))]
    shapes += [(400, 64, 8, "across pages", launches) for launches in (2, 3)]
    for T, E, K, tape, launches in shapes:
        of = {"launches": launches, "tape": tape, "weights": "float32 as float16"}
        yield Case(E=E, K=K, T=T, **of, **base)

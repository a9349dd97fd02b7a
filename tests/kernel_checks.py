"""NumPy reference checks of the kernels, and the cases they are run on. The module under test,
`kernels`, is an argument, so that the mutation tests can pass a broken one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

POISON = 77
LANES = 3  # routers of the tape's ring; the second is tested

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "E": (4, 8, 16, 60, 64, 72, 128, 160, 256, 384, 512),
    "K": (1, 2, 3, 4, 6, 8, 10),
    "T": (0, 1, 2, 7, 17, 64, 200, 256, 371, 512, 1023, 2048, 4096),
    "skew": ("uniform", "zipf", "one-hot"),
    "launches": (1, 2, 3, None),
    "ids": (torch.int64, torch.int32),
    "weights": ("float32 as float16", "float16", "bfloat16", "none"),
    "tape": (
        "in one page",
        "across pages",
        "across the ring's end",
        "beyond the limit",
        "disabled",
        "none",
    ),
    "invalid_ids": (False, True),  # ids of no expert
}


@dataclass(frozen=True)
class Case:
    E: int
    K: int
    T: int
    skew: str
    launches: int | None
    ids: torch.dtype
    weights: str
    tape: str
    invalid_ids: bool
    block: int | None = None  # slots per program
    P: int = 256  # rows per page

    def __str__(self) -> str:
        parts = (f"E{self.E}", f"k{self.K}", f"T{self.T}", self.skew, self.launches, self.weights)
        return "-".join(map(str, (*parts, self.tape))).replace(" ", "_")


def is_possible(given: dict[str, Any]) -> bool:
    """A router chooses at most its E experts; one program takes at most 2048 slots
    (`ONE_LAUNCH`)."""
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
        wanted = dict(
            min(missing, key=lambda pair: sorted(map(str, pair)))
        )  # sets are unordered: sort to get the same in every process
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


def choice(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids, weights) [T, K] as a router of this kind makes them."""
    generator = torch.Generator().manual_seed(seed + case.T * case.E + case.K)
    scores = torch.rand(case.T, case.E, generator=generator)
    if case.skew == "zipf":
        scores -= 0.05 * torch.arange(case.E)
    elif case.skew == "one-hot":
        scores[:, : case.K] += 2
    ids = scores.topk(case.K, dim=1).indices.to(case.ids)
    if case.invalid_ids:
        at = torch.rand(case.T, case.K, generator=generator)
        ids[at < 0.1], ids[at > 0.95] = case.E, -1
    if case.weights == "none":
        return ids, None
    given = {
        "float32 as float16": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }[case.weights]
    return ids, torch.rand(case.T, case.K, generator=generator).to(given)


def tape_for(kernels: ModuleType, case: Case) -> Any:
    """A tape filled with POISON, one value longer than needed, to detect a write past the end."""
    if case.tape == "none":
        return None
    P = case.P
    pages = -(-case.T // P) + 2
    start = {
        "in one page": 5 * pages * P,
        "across the ring's end": (6 * pages - 1) * P + P - 3,
    }.get(case.tape, 5 * pages * P + P - 3)
    room = case.T // 2 if case.tape == "beyond the limit" else pages * P
    values = pages * P * LANES * case.K
    weight = torch.bfloat16 if case.weights == "bfloat16" else torch.float16
    cursor, dropped = torch.tensor([11, start, 13]), torch.tensor([0, 5, 0])
    return kernels.Tape(
        torch.full((values + 1,), POISON, dtype=torch.uint8 if case.E < 256 else torch.int16),
        None if case.weights == "none" else torch.full((values + 1,), float(POISON), dtype=weight),
        cursor,
        dropped,
        torch.tensor([start + room]),
        torch.tensor([int(case.tape != "disabled")], dtype=torch.int32),
        lane=1,
        K=case.K,
        experts=case.E,
        base=P * case.K,
        page_values=P * LANES * case.K,
        P=P,
        pages=pages,
    )


def check_tape(
    case: Case, tape: Any, ids_TK: torch.Tensor, weights_TK: torch.Tensor | None
) -> None:
    """The tape holds the decisions at their positions, and is unchanged everywhere else."""
    start = int(tape_for(_Plain, case).cursor[1])
    enabled = case.tape != "disabled"
    room = max(0, min(case.T, int(tape.limit) - start)) if enabled else 0
    position = start + np.arange(room)
    at = (
        position // tape.P % tape.pages * tape.page_values + tape.base + position % tape.P * tape.K
    )[:, None] + np.arange(tape.K)
    ids = np.full(len(tape.ids), POISON)
    given = ids_TK.numpy().astype(np.int64)
    mark = 255 if case.E < 256 else -1
    ids[at] = np.where((given >= 0) & (given < case.E), given, mark)[:room]
    assert (tape.ids.numpy() == ids).all()
    if tape.weights is not None and weights_TK is not None:
        weights = torch.full((len(tape.weights),), float(POISON), dtype=tape.weights.dtype)
        weights[torch.from_numpy(at)] = weights_TK[:room].to(tape.weights.dtype)
        assert torch.equal(tape.weights, weights)
    assert tape.cursor.tolist() == [11, start + (case.T if enabled else 0), 13]
    assert tape.dropped.tolist() == [0, 5 + (case.T - room if enabled else 0), 0]


class _Plain:
    """In place of the module where only the cursor of a new tape is needed."""

    @staticmethod
    def Tape(ids: Any, weights: Any, cursor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(cursor=cursor)


def check_grouping(case: Case, found: Any, ids_TK: torch.Tensor) -> None:
    """Counts, offsets, permutation, inverse and token against a stable sort by numpy."""
    flat = ids_TK.numpy().reshape(-1)
    kind = np.where((flat >= 0) & (flat < case.E), flat, case.E)
    order = np.argsort(kind, kind="stable")
    counts = np.bincount(kind, minlength=case.E + 1)[: case.E]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    expected = (
        counts,
        np.concatenate([[0], counts.cumsum()]),
        order,
        inverse,
        order // max(1, case.K),
    )
    for name, got, want in zip(found._fields, found, expected, strict=True):
        assert got.dtype == torch.int32
        assert got.tolist() == want.tolist(), name


def check_dispatch(kernels: ModuleType, case: Case, reference: bool) -> None:
    ids, weights = choice(case)
    tape = tape_for(kernels, case)
    empty_dispatch = kernels.empty_dispatch
    kernels.empty_dispatch = lambda *a: kernels.Dispatch(
        *(t.fill_(POISON * 1000) for t in empty_dispatch(*a))
    )  # makes what is not written visible
    try:
        if reference:
            found = kernels.dispatch_torch(ids, weights, case.E, tape)
        else:
            found = kernels.dispatch_triton(
                ids, weights, case.E, tape, launches=case.launches, block=case.block
            )
    finally:
        kernels.empty_dispatch = empty_dispatch
    check_grouping(case, found, ids)
    if tape is not None:
        check_tape(case, tape, ids, weights)


def check_record(kernels: ModuleType, case: Case, reference: bool) -> None:
    ids, weights = choice(case)
    tape = tape_for(kernels, case)
    if tape is not None:
        (kernels.record_torch if reference else kernels.record_triton)(tape, ids, weights)
        check_tape(case, tape, ids, weights)


def check_combine(kernels: ModuleType, case: Case, reference: bool) -> None:
    """Against float64; the torch implementation bit-identical to transformers' steps. Rows without
    an expert hold NaN."""
    ids, weights = choice(case)
    if weights is None or case.T == 0 or case.T * case.K > 1100:
        return
    H = 40
    generator = torch.Generator().manual_seed(1)
    y_SH = torch.randn(case.T * case.K, H, generator=generator).to(weights.dtype)
    grouped = kernels.dispatch_torch(ids, None, case.E)
    if reference:
        sorted_weights = weights.reshape(-1)[grouped.permutation.long()].unsqueeze(-1)
        reference = (y_SH * sorted_weights)[grouped.inverse.long()].view(case.T, case.K, H).sum(1)
        assert torch.equal(kernels.combine_torch(y_SH, weights, grouped.inverse), reference)
        return
    y_SH[int(grouped.offsets[-1]) :] = float("nan")
    got = kernels.combine_triton(y_SH, ids, weights, grouped, torch.float32, case.E)
    inside = ((ids >= 0) & (ids < case.E)).unsqueeze(-1)
    rows = y_SH.double()[grouped.inverse.long()].view(case.T, case.K, H)
    want = (torch.where(inside, rows, 0.0) * weights.double().unsqueeze(-1)).sum(1)
    assert_close(got, want, weights.dtype)
    tape = tape_for(kernels, case) if case.T * case.K <= kernels.RECORD_BLOCK else None
    slots = rows.reshape(-1, H).nan_to_num(0.0)
    got = kernels.combine_triton(
        slots.to(weights.dtype), ids, weights, None, torch.float32, case.E, tape
    )
    assert_close(
        got, (slots.view(case.T, case.K, H) * weights.double().unsqueeze(-1)).sum(1), weights.dtype
    )
    if tape is not None:
        check_tape(case, tape, ids, weights)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Asserts that the maximum and root mean square error, relative to the values' root mean
    square, are within a few roundings in `dtype`."""
    error, scale = got.double() - want, want.square().mean().sqrt()
    unit = torch.finfo(dtype).eps
    assert error.isfinite().all()
    assert error.abs().max() <= 16 * unit * scale, f"max {error.abs().max() / scale:.2e}"
    assert error.square().mean().sqrt() <= 2 * unit * scale, (
        f"rms {error.square().mean().sqrt() / scale:.2e}"
    )


CHECKS = {"dispatch": check_dispatch, "record": check_record, "combine": check_combine}


def small_cases() -> Iterator[Case]:
    """A few fast cases that together detect every mutation."""
    base = {
        "skew": "uniform",
        "ids": torch.int64,
        "weights": "float32 as float16",
        "invalid_ids": True,
    }
    for launches, (T, E, K) in itertools.product(
        (1, 2, 3), ((130, 60, 4), (100, 256, 8), (7, 8, 2))
    ):
        for tape in (
            "in one page",
            "across pages",
            "across the ring's end",
            "beyond the limit",
            "disabled",
        ):
            yield Case(E=E, K=K, T=T, launches=launches, tape=tape, **base)
    yield Case(E=64, K=8, T=400, launches=2, tape="across pages", **base)
    yield Case(E=64, K=8, T=400, launches=3, tape="across pages", **base)

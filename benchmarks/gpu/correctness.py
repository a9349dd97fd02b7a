"""Every kernel against a reference, before anything is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sanitizer import sanitize
from moe_inspect.capture.hook import kernels
from tests.support.kernel_reference import Case, assert_close, choice

SKEWS = ("uniform", "zipf", "one-hot")
POISON = 77


def a_tape(device: Any, E: int, K: int, T: int, kind: str, bf16: bool) -> tuple[Any, int]:
    """A poisoned tape, the second of three routers' of its buffer, and how many of T rows fit."""
    rows, on = (T // 16 + 3) * 16, {"device": device.type}
    start = {"from the first row": 0, "beyond its part": rows - T // 2}.get(kind, 13)
    values = rows * 3 * K + 1
    made = kernels.Tape(
        torch.full((values,), POISON, dtype=torch.uint8 if E < 256 else torch.int16, **on),
        torch.full((values,), POISON, dtype=torch.bfloat16 if bf16 else torch.float16, **on),
        torch.tensor([11, start, 13], **on),
        torch.tensor([int(kind != "disabled")], dtype=torch.int32, **on),
        lane=1,
        K=K,
        experts=E,
        base=rows * K,
        rows=rows,
    )
    return made, min(T, rows - start) * int(kind != "disabled")


def on_tape(tape: Any, room: int, ids_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
    """What ids, weights and cursor of this fresh tape must be afterwards, by plain indexing."""
    T, on, device = len(ids_TK), int(tape.enabled), ids_TK.device
    row = int(tape.cursor[1]) + torch.arange(room, device=device)
    at = (tape.base + row * tape.K)[:, None] + torch.arange(tape.K, device=device)
    ids, weights = tape.ids.clone(), tape.weights.clone()
    is_outside = (ids_TK < 0) | (ids_TK >= tape.experts)
    ids[at] = ids_TK.masked_fill(is_outside, tape.null_id)[:room].to(ids.dtype)
    weights[at] = weights_TK[:room].to(weights.dtype)
    return [ids, weights, tape.cursor + torch.tensor([0, T * on, 0], device=device)]


def grouping(ids_TK: Tensor, E: int) -> list[Tensor]:
    """Counts, offsets, permutation, inverse and token by numpy's stable sort."""
    flat = ids_TK.numpy().reshape(-1)
    kind = np.where((flat >= 0) & (flat < E), flat, E)
    order = np.argsort(kind, kind="stable")
    counts, inverse = np.bincount(kind, minlength=E + 1)[:E], np.empty_like(order)
    inverse[order] = np.arange(len(order))
    found = (
        counts,
        np.concatenate([[0], counts.cumsum()]),
        order,
        inverse,
        order // ids_TK.shape[1],
    )
    return [torch.from_numpy(a.astype(np.int32)) for a in found]


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """What a kernel does not write shows."""
    whole = kernels.empty_dispatch
    kernels.empty_dispatch = lambda *a: kernels.Dispatch(
        *(t.fill_(POISON * 1000) for t in whole(*a))
    )
    try:
        yield
    finally:
        kernels.empty_dispatch = whole


def variants(bench: Bench, S: int) -> list[tuple[int | None, int | None]]:
    """Numbers of launches, and slots per program, in which S slots can be dispatched; None: as
    `dispatch_triton` chooses."""
    one = [(1, None)] if S <= kernels.ONE_LAUNCH else []
    return [
        (None, None),
        *one,
        *((launches, block) for launches in (2, 3) for block in bench.sizes.blocks),
    ]


def is_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def check_repeated(
    bench: Bench,
    name: str,
    run: Callable[..., Any],
    fresh: Callable[[], tuple[Any, int]],
    wanted: list[Tensor],
) -> None:
    """What `run` returns and writes onto a fresh tape is right, to the bit, each time."""
    bench.figures["cases"] = bench.figures.get("cases", 0) + 1
    wrong = 0
    for _ in range(bench.sizes.repeats):
        tape, _ = fresh()
        returned = run(tape=tape) or ()
        wrong += not is_same([*returned, tape.ids, tape.weights, tape.cursor], wanted)
    bench.expect(wrong == 0, f"{name}: {wrong} of {bench.sizes.repeats} times")


def check_combine(
    bench: Bench,
    name: str,
    E: int,
    ids: Tensor,
    weights: Tensor,
    fresh: Callable[[], tuple[Any, int]],
) -> None:
    """Against float64, both of grouped places (those of no expert hold NaN) and of slots, which
    record in the same launch."""
    (T, K), H = ids.shape, 1000
    y_SH = torch.randn(T * K, H, device=ids.device).to(weights.dtype)
    grouped = kernels.Dispatch(*(t.to(ids.device) for t in grouping(ids.cpu(), E)))
    y_SH[int(grouped.offsets[-1]) :] = float("nan")
    rows = y_SH[grouped.inverse.long()].nan_to_num(0.0)
    want = (rows.double().view(T, K, H) * weights.double().unsqueeze(-1)).sum(1)
    found = [
        kernels.combine_triton(y_SH, ids, weights, grouped, torch.float32, E)
        for _ in range(bench.sizes.repeats)
    ]
    if T * K <= kernels.RECORD_BLOCK:
        tape, room = fresh()
        expected = on_tape(tape, room, ids, weights)
        found.append(kernels.combine_triton(rows, ids, weights, None, torch.float32, E, tape))
        bench.expect(
            is_same([tape.ids, tape.weights, tape.cursor], expected),
            f"combine's record {name}",
        )
    try:
        assert_close(found[0], want, weights.dtype)
    except AssertionError as error:
        bench.expect(False, f"combine {name}: {error}")
    bench.expect(
        all(torch.equal(found[0], other) for other in found),
        f"combine {name} differs from repeat to repeat, or ungrouped",
    )


def correctness(bench: Bench) -> None:
    """Every kernel against a reference, outputs poisoned, before anything is timed."""
    device, sizes = bench.device, bench.sizes
    kinds = ("from the first row", "behind others", "beyond its part", "disabled")
    with poisoned_outputs():
        for n, (T, (E, K), skew) in enumerate(
            (t, r, s) for t in sizes.T for r in sizes.routers for s in SKEWS
        ):
            if bench.over(f"correctness of T{T} E{E} k{K} {skew}"):
                continue
            bf16 = K == 8
            case = Case(
                E,
                K,
                T,
                skew,
                None,
                torch.int64,
                "bfloat16" if bf16 else "float32 as float16",
                "",
                invalid_ids=n % 2 == 1,
            )
            host_ids, host_weights = choice(case)
            ids, weights = host_ids.to(device.type), host_weights.to(device.type)
            wanted = [t.to(device.type) for t in grouping(host_ids, E)]
            fresh = functools.partial(a_tape, device, E, K, T, kinds[n % 4], bf16)
            taped = on_tape(*fresh(), ids, weights)
            name = f"T{T} E{E} k{K} {skew}, tape {kinds[n % 4]}"

            for launches, block in variants(bench, T * K):
                run = functools.partial(
                    kernels.dispatch_triton, ids, weights, E, launches=launches, block=block
                )
                check_repeated(
                    bench,
                    f"dispatch {name}, {launches} launches of {block}",
                    run,
                    fresh,
                    [*wanted, *taped],
                )
            bench.expect(
                is_same(kernels.dispatch_triton(ids, None, E), wanted),
                f"dispatch {name}, not recording",
            )
            record = functools.partial(kernels.record_triton, ids_TK=ids, weights_TK=weights)
            check_repeated(bench, f"record {name}", record, fresh, taped)
            check_combine(bench, name, E, ids, weights, fresh)
    print(
        f"{bench.figures['cases']} cases, {sizes.repeats} repeats each: {len(bench.failures)} wrong"
    )
    if not bench.sanitized:
        sanitize(bench)

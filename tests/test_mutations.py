"""Mutation tests of the kernels, the rows of engines and the ring: each of these mistakes makes at least one check fail.
Those of analysis, writer, reader and importers are in test_mutations_analysis."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from moe_inspect.capture.engine import rows
from moe_inspect.capture.hook import kernels, ring
from tests import test_ring
from tests.support.kernel_checks import (
    check_combine,
    check_dispatch,
    check_record,
    check_rows,
    small_cases,
)
from tests.support.mutation import changed_source, fails, load_file

if kernels.triton is None:
    pytest.skip("no triton on this platform", allow_module_level=True)

pytestmark = pytest.mark.slow

KERNELS = {
    "wrong permutation: later slots rank first": ("((1 << slot) - 1)", "(-(2 << slot))"),
    "wrong permutation: a slot ranks behind itself": ("((1 << slot) - 1)", "((2 << slot) - 1)"),
    "wrong permutation: blocks swapped": ("row[:, None] < block, count", "row[:, None] > block, count"),
    "wrong permutation: chunks ignore each other": ("base_E += tl.sum(count_RE", "base_E + tl.sum(count_RE"),
    "wrong permutation: rows ignore each other": ("tl.cumsum(count_RE, 0) - count_RE", "0 * count_RE"),
    "inverse not written": ("tl.store(inverse + i, place, mask=inside)", "pass"),
    "token of another slot": ("tl.store(token + place, i // K,", "tl.store(token + place, (i + 1) // K,"),
    "dropped last element": ("            inside = i < end\n", "            inside = i < end - 1\n"),
    "dropped last row of the record": ("_room(tape, at, T) * K", "(_room(tape, at, T) - 1) * K"),
    "shifted record": ("(at % tape.ring_rows).to(tl.int32) + i // K", "(at % tape.ring_rows).to(tl.int32) + i // K + 1"),
    "record of another slot": ("row % tape.P * K + i % K", "row % tape.P * K + (i + 1) % K"),
    "off-by-one page": ("row // tape.P * tape.page_values", "(row // tape.P + 1) * tape.page_values"),
    "the ring does not close": ("tl.where(row < tape.ring_rows, row, row - tape.ring_rows)", "row"),
    "beyond the limit by one": ("tl.load(tape.limit) - at, 0)", "tl.load(tape.limit) + 1 - at, 0)"),
    "disabled it records": (".to(tl.int32) * tl.load(tape.enabled)", ".to(tl.int32)"),
    "disabled it moves on": ("moved = T * tl.load(tape.enabled)", "moved = T"),
    "the cursor of another router": ("tl.store(tape.cursor + lane, at", "tl.store(tape.cursor + lane + 1, at"),
    "nothing dropped": ("tl.load(tape.dropped + lane) + moved - _room", "tl.load(tape.dropped + lane) + 0 * _room"),
    "ids of no expert counted": ("inside & (raw >= 0) & (raw < E)", "inside & (raw >= 0) & (raw < E + 1)"),
    "slots without an expert lie among the experts": ("unrouted_before_R[:, None])", "unrouted_before_R[:, None] - 1)"),
    "the scan is inclusive": ("tl.cumsum(count, 0) - count, mask", "tl.cumsum(count, 0), mask"),
    "offsets from one": ("tl.store(offsets, 0)\n        _place", "tl.store(offsets, 1)\n        _place"),
    "norms of another slot": ("tl.store(norms + t * K + k,", "tl.store(norms + t * K + K - 1 - k,"),
    "norms without their root": ("tl.sqrt_rn(tl.sum(row * row, 0))", "tl.sum(row * row, 0)"),
    "weights of slot 0": ("tl.load(weights + slot)", "tl.load(weights + slot // 2 * 2)"),
    "rows that were not written are summed": ("tl.where(place < end, H, 0)", "tl.where(place >= 0, H, 0)"),
    "torch reference: off-by-one page": ("tape.part(tape.ids, page % tape.pages)", "tape.part(tape.ids, (page + 1) % tape.pages)"),
    "torch reference: shifted record": ("(tape.ids, page % tape.pages)[row : row + n]", "(tape.ids, page % tape.pages)[row + 1 : row + n + 1]"),
    "torch reference: wrong weights": ("= weights_TK[done : done + n]", "= weights_TK[:n]"),
    "torch reference: beyond the limit": ("max(0, min(T, int(tape.limit) - first))", "T"),
    "torch reference: norms in groups": ("slice(None) if inverse_S is None else inverse_S.long()", "slice(None)"),
    "torch reference: unstable": ("torch.sort(flat, stable=True)", "torch.sort(flat.flip(0), stable=True)"),
}  # fmt: skip
ROWS = {
    "kept from another slot": ("tl.load(ids + i // K * IDS + i % K", "tl.load(ids + i // K * IDS + (i + 1) % K"),
    "kept as if no column were behind": ("weights + i // K * WEIGHTS", "weights + i // K * K"),
    "the last slot is not kept": ("inside = i < T * K", "inside = i < T * K - 1"),
    "padding is counted": ("mask=i < counted * K", "mask=i < rows * K"),
    "the last expert is not counted": ("routed = (expert >= 0) & (expert < E)", "routed = (expert >= 0) & (expert < E - 1)"),
    "another expert's count": ("1 + tl.arange(0, BINS)", "1 + (tl.arange(0, BINS) + 1) % E"),
    "counts are overwritten": ("tl.atomic_add(of_expert, count_E, mask=count_E > 0, sem=\"relaxed\")", "tl.store(of_expert, count_E, mask=count_E > 0)"),
    "all routers are the first": ("first = router * rows * K", "first = router * 0"),
    "taken from where it goes to": ("tl.load(picked + i // K, mask=inside, other=0)", "i // K"),
    "routers overlap in what is taken": ("to = router * m * K + i", "to = router * K + i"),
    "one token too many": ("inside = i < m row =", "inside = i < m + 1\n                row ="),
    "positions are tokens": ("tl.load(positions + row", "tl.load(tokens + row"),
    "torch: ids of no expert are counted": ("clamp(-1, self.E)", "clamp(0, self.E)"),
    "torch: padding is counted": ("self.ids.narrow(1, 0, n)", "self.ids"),
    "replicas are as wide as ids": ("i // K * PHYSICALS", "i // K * IDS"),
    "replicas are experts": ("tl.load(physicals + at", "tl.load(ids + at"),
    "torch: not what is picked": ("else t[:, at] for t in", "else t[:, :m] for t in"),
}  # fmt: skip
RING = {
    "a page is released a page too early": ("self.released = position // self.P\n", "self.released = position // self.P + 1\n"),
    "off-by-one page on the host": ("tape.part(tensor, page % self.pages)", "tape.part(tensor, (page + 1) % self.pages)"),
    "rows shifted on the host": ("[row : row + n].numpy()", "[row + 1 : row + n + 1].numpy()"),
    "the routers' parts overlap": ("P * sum(of[:r])", "P * sum(of[: r - 1])"),
    "one page less than it says": ("return (self.released + self.pages) * self.P", "return (self.released + self.pages + 1) * self.P"),
    "it fits all that there is": ("return (self.pages - 1) * self.P\n", "return self.pages * self.P\n"),
    "the limit stays": ("ring.limit.fill_((self.released + self.pages) * self.P)", "pass"),
}  # fmt: skip


def mutated(module: ModuleType, old: str, new: str, path: Path) -> ModuleType:
    """A copy of `module` with `new` for `old`, under another name (and other operators)."""
    file = path / "mutated.py"
    operators = f'"mutated_{abs(hash((old, new)))}::'
    file.write_text(changed_source(module, old, new).replace('"moe_inspect::', operators))
    return load_file("mutated", file)


def run_kernel_checks(module: ModuleType) -> None:
    for case in small_cases():
        checks = (check_dispatch, check_record, check_combine)
        for check in checks if case.launches == 1 else checks[:1]:
            for reference in (False, True):
                check(module, case, reference)


def run_row_checks(module: ModuleType) -> None:
    for case in small_cases():
        for skew in ("uniform", "zipf") if case.launches == 1 else ():
            for reference in (False, True):
                check_rows(kernels, replace(case, skew=skew), reference, module)


def run_ring_checks(module: ModuleType) -> None:
    """Passes of sizes that fill pages exactly, almost, and not at all; released immediately and late."""
    for behind in (0, 1, 3):
        test_ring.follow(module, [16, 1, 15, 40, 7, 33, 16, 40, 2, 40, 31] * 3, behind)
    test_ring.follow(module, [40, 23, 40, 40, 17, 40] * 4, 4, drop=True)
    test_ring.follow_the_largest(module)


def notices(check: Callable[[ModuleType], None], broken: ModuleType) -> bool:
    """Whether `check` fails, in a process of its own: a kernel's stray write may crash it."""

    def run() -> None:
        faulthandler.disable()
        check(broken)

    return fails(run)


def test_unmutated_all_is_well(tmp_path: Path) -> None:
    source = '"""The Triton kernels'
    assert not notices(run_kernel_checks, mutated(kernels, source, source, tmp_path))
    source = '"""The buffers that'
    assert not notices(run_row_checks, mutated(rows, source, source, tmp_path))
    assert not notices(run_ring_checks, ring)


@pytest.mark.parametrize("name", [*KERNELS, *ROWS, *RING])
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    for module, mistakes, check in (
        (kernels, KERNELS, run_kernel_checks),
        (rows, ROWS, run_row_checks),
        (ring, RING, run_ring_checks),
    ):
        if name in mistakes:
            assert notices(check, mutated(module, *mistakes[name], tmp_path))

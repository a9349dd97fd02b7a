"""`moe_inspect.lint`: the checks of an array, a trace or the files of an engine.

T tokens, L layers, K slots, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moe_inspect.comparison.mismatch import integers_of
from moe_inspect.errors import MoeInspectError, check_whole
from moe_inspect.linting import by_text, rows
from moe_inspect.linting.recorded import Recorded, found
from moe_inspect.model.config import MOST_EXPERTS
from moe_inspect.reporting.verdict.findings import Finding, most_important_first
from moe_inspect.text import plural

Check = Callable[[Recorded], Iterator[tuple[Finding, np.ndarray]]]
# each without what those before have found
ROWS: tuple[Check, ...] = (
    *(rows.filled, rows.out_of_range, rows.layers_filled, rows.twice, rows.repeated_rows),
    *(rows.repeated_block, rows.layer_copied, rows.sorted_ids, rows.loads, rows.groups),
    rows.weights,
)


def lint(ids: Any, token_ids: Any = None, *, experts: int, lengths: Any = None) -> list[Finding]:
    """What is wrong with routes, as far as they tell without a reference. For a training loop:

        for finding in moe_inspect.lint(routed_experts, token_ids, experts=64, lengths=lengths):
            raise RuntimeError(finding.text)

    ids: integers [T, L, K], the experts of each token, layer and slot (NumPy, or anything that
    NumPy reads; tensors of a GPU are copied), −1 where a slot routed nowhere; layers with experts
    only. token_ids: integers [T], −1 where unknown; without them a shift, and rows at the wrong
    text, cannot be told. experts: per layer. lengths: integers, the tokens of each sequence, one
    after the other; by default one sequence.

    Returns findings, the gravest first, as those of a report: `kind`, `severity`, `text`, and
    `values` with `p` (0 where `certain`), `known` (published bugs that look like it) and `option`
    (what mends it). None where nothing is wrong, or nothing can be told. MoeInspectError where
    shapes or types are wrong."""
    ids_TLK = integers_of(ids, "ids")
    check_whole("experts", experts, 1)
    if experts > MOST_EXPERTS:
        raise MoeInspectError(f"experts is {experts}: give at most {MOST_EXPERTS:,}")
    if ids_TLK.ndim != 3:
        raise MoeInspectError(
            f"ids have the shape {ids_TLK.shape}: expected [tokens, layers, slots]"
        )
    T = len(ids_TLK)
    known = None if token_ids is None else integers_of(token_ids, "token_ids").ravel()
    length_S = None if lengths is None else integers_of(lengths, "lengths").ravel()
    if length_S is not None and length_S.min(initial=0) < 0:
        raise MoeInspectError(f"lengths has {length_S.min()}: a length is 0 or more")
    said = _lengths(T, known, length_S)
    if said or known is None:  # rows and tokens do not belong together
        known = np.full(T, -1)
    if said or length_S is None:
        length_S = np.array([T])
    if not ids_TLK.size:
        return said
    begin_S = (np.cumsum(length_S) - length_S)[length_S > 0]
    recorded = Recorded(narrow(ids_TLK), int(experts), range(ids_TLK.shape[1]), known, begin_S)
    return most_important_first([*said, *findings(recorded)])


def narrow(ids_TLK: np.ndarray) -> np.ndarray:
    """[K, T, L], in as few bytes as hold all ids: every check is faster."""
    low, high = int(ids_TLK.min()), int(ids_TLK.max())
    if high > np.iinfo(np.int64).max:  # as no expert is
        ids_TLK, high = np.minimum(ids_TLK, np.iinfo(np.int64).max), np.iinfo(np.int64).max
    fits = (np.dtype(name) for name in ("i1", "i2", "i4", "i8"))
    dtype = next(d for d in fits if low >= np.iinfo(d).min and high <= np.iinfo(d).max)
    return np.ascontiguousarray(np.moveaxis(ids_TLK.astype(dtype), 2, 0))


def _lengths(T: int, known: np.ndarray | None, length_S: np.ndarray | None) -> list[Finding]:
    """Whether there are as many rows as token ids, and as the lengths say."""
    S = 1 if length_S is None else len(length_S)
    if known is not None and len(known) != T:
        return [wrong_lengths(T, len(known), "token ids", S)]
    if length_S is not None and length_S.sum() != T:
        return [wrong_lengths(T, int(length_S.sum()), "tokens by lengths", S)]
    return []


def wrong_lengths(rows_of: int, tokens: int, name: str, S: int) -> Finding:
    lack = tokens - rows_of
    each = ""
    if S and lack == S:
        each = ", one for each sequence"
    elif S > 1 and lack == S - 1:
        each = ", one for each boundary of two sequences"
    what = (
        f"{plural(rows_of, 'row')} of routes for {tokens:,} {name}: {abs(lack):,} too "
        f"{'few' if lack > 0 else 'many'}{each}."
    )
    return found("lengths", what, rows=rows_of, tokens=tokens)


def findings(r: Recorded, beside: by_text.Known | None = None) -> Iterator[Finding]:
    """What every check finds. beside: a right recording of the same layers."""
    chosen = False  # whether tokens are left out for their experts
    for check in ROWS:
        if chosen and check is rows.loads:
            continue
        left_T, left_L = np.zeros(r.T, bool), np.zeros(r.L, bool)
        for one, which in check(r):
            yield one
            chosen |= check in (rows.out_of_range, rows.twice)
            if len(which) and check in (rows.layers_filled, rows.layer_copied):
                left_L |= which
            elif len(which):
                left_T |= which
        if left_T.all() or left_L.all():
            return
        if beside is not None:
            known, usual_NL = beside
            beside = known.without_layers(left_L), usual_NL[:, ~left_L]
        r = r.kept(~left_T).without_layers(left_L)
    shifted = [*by_text.shifts(r)]
    yield from shifted
    if beside is not None and not shifted:
        yield from by_text.habits(r, *beside)

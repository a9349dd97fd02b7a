"""Is it the same routing under another numbering? Layers shifted or swapped, routes shifted by a
token, experts numbered otherwise: found on a sample of tokens.

T tokens of the sample, L routers of A, M routers of B, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.comparison.aligning.align import Alignment
from moe_inspect.comparison.aligning.rows import Columns, Rows, rows_of_shard
from moe_inspect.text import join_first, layer_label
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

SAMPLE_CELLS = 8_000_000  # of the sample: tokens · routers · experts
MOST_TOKENS = 4096
GOOD = 0.9  # overlap from which a router is not looked at further
MATCH = 0.6  # overlap beyond chance that the right numbering must reach …
GAIN = 0.3  # … and by how much it must be better than the one that was compared
SHIFTS = (-2, -1, 1, 2)
Read = Callable[[Callable[[Shard], Columns], int], Columns]


@dataclass(frozen=True)
class Misalignment:
    """kind: "layers_shifted", "layers_swapped", "routes_shifted", "experts_renumbered". text: what
    was found, with the evidence. option: what mends it, "" where no option does. values: the
    numbers."""

    kind: str
    text: str
    option: str
    values: dict[str, Any]


def misalignments(
    traces: tuple[Trace, Trace], alignment: Alignment, pairs: Sequence[tuple[int, int]]
) -> list[Misalignment]:
    """What is numbered otherwise in B; nothing where the routing is alike as it is compared."""
    stack = traces[0].routers[pairs[0][0]].stack
    pairs = [pair for pair in pairs if traces[0].routers[pair[0]].stack == stack]
    rows = sample_rows(traces, alignment, stack)
    if rows is None or rows.alike:
        return []
    chosen_a = {r: chosen(rows.of_a, traces[0], r) for r, _ in pairs}
    chosen_b = {m: chosen(rows.of_b, traces[1], m) for _, m in pairs}
    own = {pair: _agreement(chosen_a[pair[0]], chosen_b[pair[1]]) for pair in pairs}
    if all(value >= GOOD for value in own.values()):
        return []
    shift = _routes_shifted(rows, pairs, own, chosen_a, chosen_b)
    if shift is not None:
        return [shift]
    others = [m for m, router in enumerate(traces[1].routers) if router.stack == stack]
    chosen_b |= {m: chosen(rows.of_b, traces[1], m) for m in others if m not in chosen_b}
    found = _layers_moved(traces, pairs, own, chosen_a, chosen_b)
    if found is not None:
        return [found]
    renumbered = _experts_renumbered(traces, pairs, own, chosen_a, chosen_b)
    return [] if renumbered is None else [renumbered]


def sample_rows(traces: tuple[Trace, Trace], alignment: Alignment, stack: str) -> Rows | None:
    """Tokens of the shard of A with the most of those that are compared, in a row: shifted rows
    are looked for beside them."""
    s = alignment.segments
    if not len(s.length):
        return None
    shards, at = np.unique(s.shard_a, return_inverse=True)
    number = int(shards[np.bincount(at, s.length).argmax()])
    rows = rows_of_shard(traces, alignment, number, stack, Selection(()))
    cells = sum(r.experts for trace in traces for r in trace.routers)
    T = min(len(rows), MOST_TOKENS, max(SAMPLE_CELLS // cells, 256))
    if not T:
        return None
    at_T = np.arange(len(rows)) - (len(rows) - T) // 2
    return rows.take((at_T >= 0) & (at_T < T))


def chosen(read: Read, trace: Trace, router: int) -> np.ndarray:
    """bool [T, E]"""
    K, E = trace.routers[router].top_k, trace.routers[router].experts
    slots = read(lambda shard: shard.slots(router)[:K], router)
    chosen_TE = np.zeros((len(slots[0]), E + 1), bool)
    for slot in slots:
        chosen_TE[np.arange(len(slot)), slot] = True
    return chosen_TE[:, :E]


def _agreement(a_TE: np.ndarray, b_TE: np.ndarray) -> float:
    """Overlap of the sets beyond chance: 0 where they are independent, 1 where they are equal."""
    if a_TE.shape != b_TE.shape or not a_TE.any():
        return 0.0
    size = np.maximum(a_TE.sum(1), b_TE.sum(1)).sum()
    overlap = float((a_TE & b_TE).sum() / size)
    chance = float((a_TE.mean(0) * b_TE.mean(0)).sum() * len(a_TE) / size)
    return (overlap - chance) / (1 - chance) if chance < 1 else 0.0


def _better(value: float, own: float) -> bool:
    return value >= MATCH and value >= own + GAIN


def _routes_shifted(
    rows: Rows,
    pairs: Sequence[tuple[int, int]],
    own: dict[tuple[int, int], float],
    chosen_a: dict[int, np.ndarray],
    chosen_b: dict[int, np.ndarray],
) -> Misalignment | None:
    """B's routes one or two tokens further on, in the same document."""
    best = (0.0, 0)
    mean = float(np.mean(list(own.values())))
    for shift in SHIFTS:
        values = []
        for r, m in pairs:
            a_TE, b_TE = chosen_a[r], chosen_b[m]
            T = len(a_TE)
            t = np.arange(max(0, -shift), min(T, T - shift))
            t = t[rows.document_T[t] == rows.document_T[t + shift]]
            values.append(_agreement(a_TE[t], b_TE[t + shift]))
        best = max(best, (float(np.mean(values)), shift))
    value, shift = best
    if not _better(value, mean):
        return None
    tokens = "token" if abs(shift) == 1 else "tokens"
    return Misalignment(
        "routes_shifted",
        f"B's routes are shifted by {abs(shift)} {tokens}: those of its token n"
        f"{shift:+d} are A's of token n (agreement beyond chance {value:.1%}, as they stand "
        f"{mean:.1%}).",
        f"--shift-routes {shift}",
        {"shift": shift, "agreement": value, "agreement_as_compared": mean},
    )


def _layers_moved(
    traces: tuple[Trace, Trace],
    pairs: Sequence[tuple[int, int]],
    own: dict[tuple[int, int], float],
    chosen_a: dict[int, np.ndarray],
    chosen_b: dict[int, np.ndarray],
) -> Misalignment | None:
    """Routers of A whose decisions are those of another layer of B."""
    a, b = (trace.routers for trace in traces)
    moved = list[tuple[int, int, float, float]]()
    for r, m in pairs:
        if own[r, m] >= GOOD:
            continue
        value, other = max((_agreement(chosen_a[r], chosen_b[n]), -n) for n in chosen_b)
        if -other != m and _better(value, own[r, m]):
            moved.append((r, -other, value, own[r, m]))
    if not moved:
        return None
    steps = {a[r].layer - b[m].layer for r, m, _, _ in moved}
    value, before = (float(np.mean([row[i] for row in moved])) for i in (2, 3))
    evidence = f"(agreement beyond chance {value:.1%}, as compared {before:.1%})"
    values: dict[str, Any] = {
        "agreement": value,
        "agreement_as_compared": before,
        "layers_a": [a[r].layer for r, *_ in moved],
        "layers_b": [b[m].layer for _, m, *_ in moved],
    }
    if len(steps) == 1 and len(moved) >= max(1, len(pairs) - abs(next(iter(steps))) - 1):
        step = steps.pop()
        return Misalignment(
            "layers_shifted",
            f"Layers are numbered otherwise: B's layer n is A's n{step:+d} {evidence}, for "
            "instance since one counts dense layers or pipeline stages anew and the other does "
            "not.",
            f"--shift-layers {step}",
            values | {"shift": step},
        )
    names = [f"A's {layer_label(a, r)} is B's {layer_label(b, m)}" for r, m, *_ in moved]
    return Misalignment(
        "layers_swapped",
        f"Layers are swapped: {join_first(names, 4, ', ')} {evidence}.",
        "",
        values,
    )


def _experts_renumbered(
    traces: tuple[Trace, Trace],
    pairs: Sequence[tuple[int, int]],
    own: dict[tuple[int, int], float],
    chosen_a: dict[int, np.ndarray],
    chosen_b: dict[int, np.ndarray],
) -> Misalignment | None:
    """Experts matched by the tokens they share in one half of the sample, judged in the other."""
    from scipy.optimize import linear_sum_assignment

    moved = list[tuple[int, float, float]]()
    for r, m in pairs:
        a_TE, b_TE = chosen_a[r], chosen_b[m]
        if own[r, m] >= GOOD:
            continue
        shared_EE = a_TE[::2].astype(np.float32).T @ b_TE[::2].astype(np.float32)
        _, match_E = linear_sum_assignment(shared_EE, maximize=True)
        value = _agreement(a_TE[1::2], b_TE[1::2][:, match_E])
        if _better(value, own[r, m]):
            moved.append((r, value, own[r, m]))
    if not moved:
        return None
    value, before = (float(np.mean([row[i] for row in moved])) for i in (1, 2))
    layers = [layer_label(traces[0].routers, r) for r, *_ in moved]
    return Misalignment(
        "experts_renumbered",
        f"Experts are numbered otherwise in {'layer' if len(layers) == 1 else 'layers'} "
        f"{join_first(layers, 6, ', ')}: matched by the tokens they share they agree (beyond "
        f"chance {value:.1%}, as compared {before:.1%}), as physical ids do, or a permuted "
        "checkpoint.",
        "",
        {"routers": [r for r, *_ in moved], "agreement": value, "agreement_as_compared": before},
    )

"""An exhaustive search over placements of experts on GPUs: exact, for few experts and slots."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations_with_replacement

import numpy as np

# of each expert, the heaviest replica first:
# (load of one replica, replicas not yet placed, whether two of them may share a GPU)
Left = tuple[tuple[float, int, bool], ...]


def fits_apart(
    load_E: np.ndarray, slots: int, gpus: int, limit: float, replicas: int = 2**16
) -> bool:
    """Whether `slots` replicas fit on `gpus` GPUs, the same number on each, so that no GPU's load
    exceeds `limit` and no GPU holds two replicas of one expert (unless it has more than
    there are GPUs). Tries every number up to `replicas`, and every way. load_E: float [E]."""
    room = slots // gpus
    for of_each in _replicas(load_E.tolist(), slots, replicas, limit):
        pairs = zip(load_E.tolist(), of_each, strict=True)
        left = tuple(sorted(((load / n, n, n > gpus) for load, n in pairs), reverse=True))
        each_P = np.repeat([each for each, _, _ in left], [n for _, n, _ in left])
        # two slots per GPU: pairing the heaviest with the lightest is optimal
        if room == 2 and (each_P + each_P[::-1]).max() > limit:
            continue
        if _fill(left, room, limit):
            return True
    return False


def _replicas(loads: list[float], slots: int, most: int, limit: float) -> Iterator[tuple[int, ...]]:
    if not loads:
        yield from [()] if slots == 0 else []
        return
    for n in range(1, min(most, slots - len(loads) + 1) + 1):
        if loads[0] / n <= limit:  # otherwise no GPU can hold even one replica
            yield from ((n, *others) for others in _replicas(loads[1:], slots - n, most, limit))


def _fill(left: Left, room: int, limit: float) -> bool:
    """Fills one GPU after another: the heaviest remaining replica, and room − 1 others."""

    @cache
    def fill(left: Left) -> bool:
        if not left:
            return True
        for others in combinations_with_replacement(range(len(left)), room - 1):
            here = (0, *others)
            taken = [(here.count(i), *expert) for i, expert in enumerate(left)]
            fits = all(gone <= (n if shares else 1) for gone, _, n, shares in taken)
            if fits and sum(left[i][0] for i in here) <= limit:
                after = ((each, n - gone, shares) for gone, each, n, shares in taken if n > gone)
                if fill(tuple(after)):
                    return True
        return False

    return fill(left)

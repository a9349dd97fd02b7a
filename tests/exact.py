"""Whether any placement with the replicas of an expert apart is light enough: by trying all, so for
few experts and slots."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations_with_replacement

import numpy as np

Left = tuple[
    tuple[float, int, bool], ...
]  # (load of a replica, replicas yet to place, may share a GPU) of each expert, the heaviest first


def fits_apart(
    load_E: np.ndarray, slots: int, gpus: int, limit: float, replicas: int = 2**16
) -> bool:
    """Whether `slots` replicas can go to `gpus` GPUs, equally many to each, with no GPU loaded
    beyond `limit` and no two of an expert on one unless it has more than there are GPUs: every
    number of replicas up to `replicas` an expert, every way of putting them together."""
    room = slots // gpus
    for of_each in _replicas(load_E.tolist(), slots, replicas, limit):
        left = tuple(
            sorted(
                ((load / n, n, n > gpus) for load, n in zip(load_E.tolist(), of_each, strict=True)),
                reverse=True,
            )
        )
        each_P = np.repeat([each for each, _, _ in left], [n for _, n, _ in left])
        if (
            room == 2 and (each_P + each_P[::-1]).max() > limit
        ):  # pairs: the heaviest with the lightest is the best there is
            continue
        if _fill(left, room, limit):
            return True
    return False


def _replicas(loads: list[float], slots: int, most: int, limit: float) -> Iterator[tuple[int, ...]]:
    if not loads:
        yield from [()] if slots == 0 else []
        return
    for n in range(1, min(most, slots - len(loads) + 1) + 1):
        if loads[0] / n <= limit:  # or no GPU could hold one
            yield from ((n, *others) for others in _replicas(loads[1:], slots - n, most, limit))


def _fill(left: Left, room: int, limit: float) -> bool:
    """GPU by GPU, each with the heaviest replica left and room − 1 others."""

    @cache
    def fill(left: Left) -> bool:
        if not left:
            return True
        for others in combinations_with_replacement(range(len(left)), room - 1):
            here = (0, *others)
            taken = [here.count(i) for i in range(len(left))]
            fits = all(
                n <= (expert[1] if expert[2] else 1) for n, expert in zip(taken, left, strict=True)
            )
            if fits and sum(left[i][0] for i in here) <= limit:
                after = (
                    (each, n - gone, shares)
                    for gone, (each, n, shares) in zip(taken, left, strict=True)
                )
                if fill(tuple(expert for expert in after if expert[1])):
                    return True
        return False

    return fill(left)

"""Which experts the physical ones are replicas of, in a trace of an engine that balances the load
over replicas (EPLB): each file of decisions states it in its metadata, from its first forward pass
on, as JSON.

L routers, P physical experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from moe_inspect.errors import Damaged
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router, parsed

KEY = "replicas"
MOST_BATCH = 2**31 - 1


class PlacedExperts(NamedTuple):
    """From forward pass `batch` on, the physical experts 0, 1, … of a router are replicas of
    `experts`; −1 for none."""

    batch: int
    router: int
    experts: list[int]


def of_passes(maps: Iterable[tuple[int, np.ndarray]]) -> list[PlacedExperts]:
    """Of the maps [L, P] of consecutive forward passes."""
    found, last_LP = list[PlacedExperts](), None
    for batch, map_LP in maps:
        if map_LP is not last_LP:
            found += [PlacedExperts(batch, r, experts) for r, experts in enumerate(map_LP.tolist())]
        last_LP = map_LP
    return changes(found)


def changes(placed: Iterable[PlacedExperts]) -> list[PlacedExperts]:
    """Without what held before."""
    now, found = dict[int, list[int]](), list[PlacedExperts]()
    for one in placed:
        if now.get(one.router) != one.experts:
            now[one.router] = one.experts
            found.append(one)
    return found


def metadata(placed: Iterable[PlacedExperts], batches: int = 0) -> dict[str, str]:
    """What a file of decisions states. `batches`: added to the numbers of forward passes."""
    stated = [one._replace(batch=one.batch + batches)._asdict() for one in placed]
    return {KEY: json.dumps(stated, separators=(",", ":"))}


def read(columns: pa.Schema, file: str, routers: list[Router]) -> list[PlacedExperts]:
    """What a file states. Damaged where that is missing or impossible."""
    stated, now = (columns.metadata or {}).get(KEY.encode()), dict[int, int]()
    if stated is None:
        raise Damaged(file, f"its metadata have no {KEY}")
    try:
        found = [PlacedExperts(**entry) for entry in parsed(stated)]
        for n, one in enumerate(found):
            _check(n, one, routers)
            if one.batch <= now.get(one.router, -1):
                raise ValueError(f"entry {n} is of forward pass {one.batch}, after a later one")
            now[one.router] = one.batch
    except (TypeError, ValueError) as error:
        raise Damaged(file, f"{KEY} in its metadata: {first_line(error)}") from None
    return found


def _check(n: int, one: PlacedExperts, routers: list[Router]) -> None:
    for name, most in (("batch", MOST_BATCH), ("router", len(routers) - 1)):
        if type(value := getattr(one, name)) is not int or not 0 <= value <= most:
            raise ValueError(f"{name} of entry {n} is not one of 0 to {most}")
    experts, E = np.array(one.experts), routers[one.router].experts
    whole = experts.dtype.kind == "i" and experts.ndim == 1 and 0 < len(experts) < 2**16
    if not whole or experts.min() < -1 or experts.max() >= E:
        raise ValueError(f"experts of entry {n} are not a list of −1 to {E - 1}")


class Maps:
    """Those of a shard, to look physical experts up in."""

    def __init__(self, placed: Sequence[PlacedExperts], routers: int):
        # from which forward pass on each holds [M]; and they, behind one of before [1 + M, P + 1]
        self._of_routers = list[tuple[np.ndarray, np.ndarray]]()
        for r in range(routers):
            maps = [one for one in placed if one.router == r]
            P = max((len(one.experts) for one in maps), default=0)
            map_MP = np.full((1 + len(maps), P + 1), -1)
            for m, one in enumerate(maps, 1):
                map_MP[m, : len(one.experts)] = one.experts
            self._of_routers.append((np.array([one.batch for one in maps]), map_MP))

    def experts(self, router: int, batch_N: np.ndarray, physical_N: np.ndarray) -> np.ndarray:
        """[N]: the expert that each is a replica of in its forward pass, −1 for none."""
        batch_M, map_MP = self._of_routers[router]
        at_N = np.searchsorted(batch_M, batch_N, side="right")
        return map_MP[at_N, np.minimum(physical_N, map_MP.shape[1] - 1)]

"""What simulations read of a shard's tokens, once for all routers of a stack.

T tokens that the routers see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import numpy as np

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.shard import Shard, codes

Read = TypeVar("Read")
Seen = slice | np.ndarray  # the tokens of a shard that reach a router


def routed(
    shard: Shard, routers: Iterable[int], tokens_of: Callable[[int, Seen], Read]
) -> Iterator[tuple[int, Read, np.ndarray]]:
    """Of each router its number, what tokens_of(router, the tokens that reach it) returns, which
    is called once for all routers of a stack, and the experts of its decisions: int16 [K, T], slot
    by slot, −1 where one routed nowhere."""
    of_stack: dict[str, tuple[int, Read]] = {}
    for r in routers:
        stack = shard.trace.routers[r].stack
        if stack not in of_stack:
            mask = shard.seen(r)
            seen = slice(None) if mask is None else np.flatnonzero(mask)
            T = shard.files.tokens if isinstance(seen, slice) else len(seen)
            of_stack[stack] = T, tokens_of(r, seen)
        T, tokens = of_stack[stack]
        ids_TK = shard.ids(r)
        check_length(ids_TK, T, r)
        yield r, tokens, np.ascontiguousarray(ids_TK.T)


def check_length(values: np.ndarray, tokens: int, router: int) -> None:
    if len(values) != tokens:
        raise MoeInspectError(
            f"damaged trace: router {router} has {len(values)} decisions in a shard of {tokens} "
            "tokens that reach it"
        )


def taken(shard: Shard, selection: Selection) -> np.ndarray:
    """bool [T]: the tokens of a shard that the selection takes, whatever router sees them."""
    taken_T = np.ones(shard.files.tokens, bool)
    phases = {selection.phase} if selection.phase else None
    for name, wanted in (("domain", selection.domains), ("phase", phases)):
        if wanted:
            code_T, labels = codes(shard.tokens([name])[name])
            taken_T &= np.isin(code_T, [n for n, label in enumerate(labels) if label in wanted])
    return taken_T


def count_taken(shard: Shard, selection: Selection) -> int:
    return int(taken(shard, selection).sum())


def phases_of(trace: Trace) -> list[str]:
    """Those of its tokens, in the order of PHASES."""
    found = set[str]()
    for shard in trace.shards:
        code_T, names = codes(shard.tokens(["phase"])["phase"])
        found |= {names[n] for n in np.unique(code_T)}
    return [phase for phase in PHASES if phase in found]


@lru_cache
def _as_written(factor: float) -> Fraction:
    """The decimal that prints as `factor`: 1.1 is eleven tenths, not the float nearest it."""
    return Fraction(repr(float(factor)))


def expert_capacity(factor: float, tokens: int, k: int, E: int) -> int:
    """ceil(factor · tokens · k / E) assignments, exact for the factor as it is written."""
    exact = _as_written(factor)
    return -(-exact.numerator * tokens * k // (exact.denominator * E))

"""What simulations read of a shard's tokens, once for all routers of a stack.

T tokens that the routers see, G groups.
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
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard, codes

Tokens = TypeVar("Tokens")
Seen = slice | np.ndarray  # the tokens of a shard that reach a router


def routed(
    shard: Shard, routers: Iterable[int], tokens_of: Callable[[int, Seen], Tokens]
) -> Iterator[tuple[int, Tokens, np.ndarray]]:
    """Of each router its number, what tokens_of(router, the tokens that reach it) returns, which
    is called once for all routers of a stack, and the experts of its decisions: int16 [K, T], slot
    by slot, −1 where one routed nowhere."""
    of_stack: dict[str, tuple[int, Tokens]] = {}
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


def check_domains(trace: Trace, selection: Selection) -> None:
    """MoeInspectError where the trace lacks a domain that was asked for."""
    if selection.domains is not None:
        there = set(
            (trace.counts() if trace.counts_only else trace.documents())["domain"].astype(str)
        )
        if missing := selection.domains - there:
            raise MoeInspectError(
                f"no domain {', '.join(sorted(missing))} in {trace.path}: it has "
                f"{', '.join(sorted(there))}"
            )


def taken(shard: Shard, selection: Selection) -> np.ndarray:
    """bool [T]: the tokens of a shard that the selection takes, whatever router sees them."""
    asked = {"domain": selection.domains, "phase": {selection.phase} if selection.phase else None}
    wanted = {name: labels for name, labels in asked.items() if labels is not None}
    taken_T = np.ones(shard.files.tokens, bool)
    table = shard.tokens(list(wanted)) if wanted else None
    for name, labels in wanted.items():
        assert table is not None
        code_T, there = codes(table[name])
        taken_T &= np.isin(code_T, [code for code, label in enumerate(there) if label in labels])
    return taken_T


def count_taken(shard: Shard, selection: Selection) -> int:
    return int(taken(shard, selection).sum())


def cut(start_G: np.ndarray, size: int) -> np.ndarray:
    """Runs cut into pieces of at most `size` tokens. int64 [G + 1]"""
    T = int(start_G[-1])
    index_T = np.arange(T) - np.repeat(start_G[:-1], np.diff(start_G))
    return np.append(np.flatnonzero(index_T % size == 0), T)


def deciles(start_G: np.ndarray) -> np.ndarray:
    """The tenth of its group each token is in. uint8 [T]"""
    size_G = np.diff(start_G)
    index_T = np.arange(int(start_G[-1])) - np.repeat(start_G[:-1], size_G)
    return (10 * index_T // np.repeat(size_G, size_G)).astype(np.uint8)


def document_deciles(document_T: np.ndarray, sequence_T: np.ndarray) -> np.ndarray:
    """The tenth of its document (of what the shard holds of it) each token is in, wherever its
    tokens lie; a document that was cut is its sequences, one after the other. uint8 [T]"""
    order_T = np.argsort(document_T.astype(np.int64) << 32 | sequence_T, kind="stable")
    decile_T = np.empty(len(sequence_T), np.uint8)
    decile_T[order_T] = deciles(run_edges(document_T[order_T]))
    return decile_T


@lru_cache
def _as_written(factor: float) -> Fraction:
    """The decimal that prints as `factor`: 1.1 is eleven tenths, not the float nearest it."""
    return Fraction(repr(float(factor)))


def expert_capacity(factor: float, tokens: int, k: int, E: int) -> int:
    """ceil(factor · tokens · k / E) assignments, exact for the factor as it is written."""
    exact = _as_written(factor)
    return -(-exact.numerator * tokens * k // (exact.denominator * E))

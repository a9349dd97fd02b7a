"""Rules of decisions: one per router and token that reaches it; possible ids, weights and logits.

T tokens, K slots, E experts, N rows of a row group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa

from moe_inspect.trace import parts, schema
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.verify.verification import (
    Verification,
    Violation,
    expect_equal,
    ids_of,
    open_table,
    or_violation,
)


def check_routing(shard: Shard, phase_T: np.ndarray, found: Verification) -> None:
    slots = range(max(r.top_k for r in shard.trace.routers))
    values = shard.trace.slot_values
    columns = [f"{name}_{j}" for name in ("expert", *values) for j in slots]
    name = shard.files.paths["routing"]
    for r, start, table in _parts_of_routers(shard, "routing", columns, phase_T):
        router = shard.trace.routers[r]
        ids = _experts(name, start, table, slots, "expert", router, r)
        meant = list(ids)
        if schema.DROPPED in values:
            dropped = _experts(name, start, table, slots, schema.DROPPED, router, r)
            for j, dropped_N in enumerate(dropped):
                if (wrong_N := (dropped_N >= 0) & (ids[j] >= 0)).any():
                    n = int(wrong_N.argmax())
                    said = f"{schema.DROPPED}_{j} is {dropped_N[n]}, expert_{j} is {ids[j][n]}"
                    raise Violation(name, start + n, f"{said}: a slot is dropped or not")
                meant[j] = np.where(ids[j] >= 0, ids[j], dropped_N)
                found.dropped += int((dropped_N >= 0).sum())
        for (i, one_N), (j, other_N) in itertools.combinations(enumerate(meant), 2):
            if (twice_N := (one_N == other_N) & (other_N >= 0)).any():
                n = int(twice_N.argmax())
                said = f"expert {other_N[n]} is in slots {i} and {j} of one decision of router {r}"
                raise Violation(name, start + n, said)
        empty = sum(int((i < 0).sum()) for i in ids[: router.top_k])
        found.decisions += len(table)
        found.empty_slots += empty
        found.assignments += len(table) * router.top_k - empty
        for value in values:
            if value != schema.DROPPED:
                _check_values(name, start, table, ids, value)
        # as the manifest states: what does not state its order is put in order as it is read
        if shard.trace.has_weights and shard.trace.stated_routers[r].first_choice_known:
            _check_descending(name, start, table, ids[: router.top_k])


def _experts(
    name: str, start: int, table: pa.Table, slots: range, kind: str, router: schema.Router, r: int
) -> list[np.ndarray]:
    """The columns `kind` of experts, all of them the router's, −1 where null."""
    ids = [ids_of(table[f"{kind}_{j}"]) for j in slots]
    for j, ids_N in enumerate(ids):
        taken = j < router.top_k
        if (wrong_N := ids_N >= (router.experts if taken else 0)).any():
            n = int(wrong_N.argmax())
            has = f"has {router.experts} experts" if taken else f"takes {router.top_k}"
            raise Violation(name, start + n, f"{kind}_{j} is {ids_N[n]}, router {r} {has}")
    return ids


def _check_values(
    name: str, start: int, table: pa.Table, ids: list[np.ndarray], value: str
) -> None:
    """One of `schema.SLOT_VALUES` is there where an expert is, and nowhere else; finite, and norms
    and peaks not negative."""
    for j, ids_N in enumerate(ids):
        column = table[f"{value}_{j}"]
        there_N = column.is_valid().to_numpy() if column.null_count else np.ones(len(ids_N), bool)
        wrong_N = there_N != (ids_N >= 0)
        if wrong_N.any():
            n = int(wrong_N.argmax())
            raise Violation(
                name,
                start + n,
                f"{value}_{j} is {'there' if there_N[n] else 'null'}, expert_{j} is "
                f"{'null' if there_N[n] else 'there'}",
            )
        values_N = column.fill_null(0).to_numpy() if column.null_count else column.to_numpy()
        wrong_N = ~np.isfinite(values_N)
        if value != "weight":
            wrong_N |= values_N < 0
        if wrong_N.any():
            n = int(wrong_N.argmax())
            raise Violation(name, start + n, f"{value}_{j} is {values_N[n]}")


def _check_descending(name: str, start: int, table: pa.Table, ids: list[np.ndarray]) -> None:
    """Slots are in descending weight, those that routed nowhere last."""
    weights = [
        np.where(ids_N >= 0, table[f"weight_{j}"].fill_null(0).to_numpy(), -np.inf)
        for j, ids_N in enumerate(ids)
    ]
    for j, (before_N, after_N) in enumerate(itertools.pairwise(weights)):
        if (wrong_N := before_N < after_N).any():
            n = int(wrong_N.argmax())
            said = (
                f"weight_{j} is {before_N[n]:.6g}, weight_{j + 1} is {after_N[n]:.6g}: the "
                "manifest says that weights descend"
            )
            raise Violation(name, start + n, said)


def check_logits(shard: Shard, phase_T: np.ndarray) -> None:
    name = shard.files.paths["logits"]
    for r, start, table in _parts_of_routers(shard, "logits", ["logits"], phase_T):
        column = table["logits"].combine_chunks()
        width = getattr(column.type, "list_size", 0)
        E = shard.trace.routers[r].experts
        if width < E or column.null_count:
            raise Violation(name, start, f"logits are {width} wide, router {r} has {E} experts")
        values_NE = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)[:, :E]
        if (wrong_N := np.isnan(values_NE).any(1)).any():
            raise Violation(
                name, start + int(wrong_N.argmax()), f"a router logit of router {r} is NaN"
            )


def _parts_of_routers(
    shard: Shard, table: str, columns: list[str], phase_T: np.ndarray
) -> Iterator[tuple[int, int, pa.Table]]:
    """(router, first row, decisions) of each part of a row group that is of one router. Checks that
    each router has the tokens that reach it, once and in order."""
    name, routers = shard.files.paths[table], shard.trace.routers
    file = open_table(shard, table)
    sees_rP = [np.array([router.sees(phase) for phase in schema.PHASES]) for router in routers]
    done = [0] * len(routers)
    rows = 0
    for g in range(file.metadata.num_row_groups):
        group = or_violation(
            lambda g=g: parts.read(file, name, ["token", "layer", "router", *columns], [g])
        )
        router_N = group["router"].to_numpy()
        for start, end in pairwise(run_edges(router_N).tolist()):
            r, part = int(router_N[start]), group.slice(start, end - start)
            if r >= len(routers):
                raise Violation(
                    name, rows + start, f"router is {r}, the manifest lists {len(routers)}"
                )
            expect_equal(
                name,
                "layer",
                part["layer"].to_numpy(),
                np.full(len(part), routers[r].layer),
                rows + start,
            )
            token_N = _tokens_of(phase_T, sees_rP[r], shard.files.first_token)
            if done[r] + len(part) > len(token_N):
                row = rows + start + len(token_N) - done[r]
                raise Violation(
                    name,
                    row,
                    f"router {r} (layer {routers[r].layer}) has more decisions than the "
                    f"{len(token_N)} tokens that reach it",
                )
            expect_equal(
                name,
                "token",
                part["token"].to_numpy(),
                token_N[done[r] : done[r] + len(part)],
                rows + start,
            )
            done[r] += len(part)
            yield r, rows + start, part
        rows += len(group)
    for r, n in enumerate(done):
        if n != (tokens := int(sees_rP[r][phase_T].sum())):
            raise Violation(
                name,
                rows,
                f"router {r} (layer {routers[r].layer}) has {n} decisions for the "
                f"{tokens} tokens that reach it",
            )


def _tokens_of(phase_T: np.ndarray, sees_P: np.ndarray, first_token: int) -> np.ndarray:
    if sees_P.all():
        return np.arange(first_token, first_token + len(phase_T))
    return first_token + np.nonzero(sees_P[phase_T])[0]

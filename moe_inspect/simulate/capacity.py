"""`simulate capacity`: what a capacity factor would drop, of routing that dropped nothing.

An expert takes capacity = ceil(cf · G · k / E) assignments of a group of G tokens (GShard,
arXiv:2006.16668; Switch, arXiv:2101.03961); what comes later in its queue is dropped. The tokens'
later choices are those recorded: a real drop would change them.

T tokens, K slots, E experts, G groups, F capacity factors (ascending), D domains, P the two places
(document, group), N tenths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.capacity_text import PLACES, figure, verdict
from moe_inspect.simulate.result import Simulation, need_decisions
from moe_inspect.simulate.shards import (
    check_length,
    cut,
    deciles,
    document_deciles,
    is_small,
    runs,
    slots,
)
from moe_inspect.text import layer_label
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard, codes

if TYPE_CHECKING:
    import pandas as pd

Order = Literal["arrival", "token", "weight"]
ORDERS = {
    "arrival": "first choices of all tokens, then second choices (GShard)",
    "token": "token after token, each with all its choices (Switch)",
    "weight": "the highest gate weight first",
}
STEP = 100  # the factor that is needed is told in hundredths
MOST_FACTORS = 50
NOWHERE = 255  # level of a slot that routed nowhere


def simulate_capacity(
    trace: Trace | str | Path,
    *,
    capacity_factors: Sequence[float] = (1.0, 1.25, 2.0),
    group_tokens: int | Literal["batch", "sequence"] = "batch",
    order: Order | None = None,
    target_drop: float = 0.01,
    layers: str | int | Iterable[int] | None = None,
) -> Simulation:
    """What experts of limited capacity would drop. A group is a forward pass, at most
    `group_tokens` tokens of one, or the tokens of one sequence in one. `order`: who is served
    first, by default arrival, or token where the trace does not say which choice of a decision was
    the first. `target_drop`: the drop rate for which the least factor is sought."""
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    need_decisions(trace, "simulate capacity")
    chosen = select(trace, layers=layers).routers
    ranked = all(trace.routers[r].first_choice_known for r in chosen)
    order = order or ("arrival" if ranked else "token")
    factors = _checked(trace, capacity_factors, group_tokens, order, target_drop)
    if order == "arrival" and not ranked:
        raise MoeInspectError(
            f"order arrival serves first choices first, and {trace.path} does not say which "
            "those are: order token needs none"
        )
    small = is_small(trace, chosen)
    tallies = {r: Tally(trace.routers[r], factors) for r in chosen}
    domains: list[str] = []
    tokens, hit_F, lost_F = 0, np.zeros(len(factors), np.int64), np.zeros(len(factors), np.int64)
    for shard in trace.shards:
        queues = Queues(shard, group_tokens, domains)
        hit_T, lost_T = np.zeros(queues.tokens, np.uint8), np.zeros(queues.tokens, np.uint8)
        for r in chosen:
            seen, worst_T, best_T = queues.of_router(r, tallies[r], order, small)
            hit_T[seen] = np.maximum(hit_T[seen], worst_T)
            lost_T[seen] = np.maximum(lost_T[seen], best_T)
        tokens += queues.tokens
        hit_F += _at_least(hit_T, len(factors))
        lost_F += _at_least(lost_T, len(factors))
    if not tokens:
        raise MoeInspectError(f"{trace.path} holds no tokens yet: nothing is committed")
    tables = _tables(trace, tallies, domains, (tokens, hit_F, lost_F), target_drop)
    settings = {
        "capacity_factors": list(factors),
        "group_tokens": group_tokens,
        "order": order,
        "target_drop": target_drop,
    }
    label_of = {r: layer_label(trace.routers, r) for r in chosen}
    said = verdict(tables, settings, label_of)
    return Simulation(
        "capacity",
        tables,
        said,
        settings,
        lambda: figure(tables, settings, label_of),
        ("capacity", "capacity_needed"),
    )


def capacity(factor: float, tokens: int, k: int, E: int) -> int:
    """ceil(factor · tokens · k / E), exactly: 1.1 is eleven tenths, not the float next to it."""
    exact = Fraction(repr(float(factor)))
    return -(-exact.numerator * tokens * k // (exact.denominator * E))


def _checked(
    trace: Trace, factors: Sequence[float], group: int | str, order: str, target: float
) -> tuple[float, ...]:
    found = tuple(sorted({float(f) for f in factors}))
    if not found or len(found) > MOST_FACTORS or not all(0 < f < 1e6 for f in found):
        raise MoeInspectError(
            f"capacity factors {list(factors)}: give 1 to {MOST_FACTORS} of them, each above 0"
        )
    if group not in ("batch", "sequence") and not (isinstance(group, int) and group >= 1):
        raise MoeInspectError(
            f"group tokens {group!r}: a group is at least 1 token, a batch or a sequence"
        )
    if order not in ORDERS:
        raise MoeInspectError(f"no order {order!r}: there are {', '.join(ORDERS)}")
    if order == "weight" and not trace.has_weights:
        raise MoeInspectError(
            f"{trace.path} holds no gate weights, which order weight needs: trace without "
            "--no-weights"
        )
    if not 0 <= target < 1:
        raise MoeInspectError(f"target drop {target}: a share from 0 to below 1")
    return found


@dataclass
class Tally:
    """What the shards of one router add up to. `last_*[f]`: assignments that factor f drops and the
    next larger does not."""

    router: Router
    factors: tuple[float, ...]
    decisions: int = 0
    assignments: int = 0
    groups: int = 0
    places_F: np.ndarray = field(init=False)
    hit_F: np.ndarray = field(init=False)
    lost_F: np.ndarray = field(init=False)
    last_FD: np.ndarray = field(init=False)
    made_D: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    last_FPN: np.ndarray = field(init=False)
    made_PN: np.ndarray = field(default_factory=lambda: np.zeros((2, 10), np.int64))
    dropped_at: np.ndarray = field(init=False)  # by factors of 1/STEP, 2/STEP, …
    places_at: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        F, most = len(self.factors), -(-STEP * self.router.experts // self.router.top_k)
        self.places_F, self.hit_F, self.lost_F = (np.zeros(F, np.int64) for _ in range(3))
        self.last_FD, self.last_FPN = np.zeros((F, 0), np.int64), np.zeros((F, 2, 10), np.int64)
        self.dropped_at, self.places_at = np.zeros(most, np.int64), np.zeros(most, np.int64)

    def domains(self, D: int) -> None:
        """Makes room for domains that appear with a later shard."""
        more = D - len(self.made_D)
        self.made_D = np.pad(self.made_D, (0, more))
        self.last_FD = np.pad(self.last_FD, ((0, 0), (0, more)))

    def loads(self, size_G: np.ndarray, load_GE: np.ndarray) -> None:
        """What every hundredth of a factor would drop: Σ max(0, load − capacity), exact, in memory
        that no trace makes grow."""
        k, E = self.router.top_k, self.router.experts
        n = np.arange(1, len(self.dropped_at) + 1)
        for size in np.unique(size_G):
            at_G = size_G == size
            load_C = np.bincount(load_GE[at_G].ravel(), minlength=size + 1)
            above_C = np.cumsum(load_C[::-1])[::-1] - load_C  # experts with more than c
            excess_C = np.append(np.cumsum(above_C[::-1])[::-1], 0)
            capacity_n = -(-n * int(size) * k // (STEP * E))
            self.dropped_at += excess_C[np.minimum(capacity_n, size + 1)]
            self.places_at += capacity_n * E * int(at_G.sum())

    def needed(self, target: float) -> tuple[float, float, float]:
        """The least factor, in hundredths, that drops at most `target`; what it drops; the share of
        places it leaves empty."""
        at = int(np.argmax(self.dropped_at <= target * self.assignments))
        dropped = int(self.dropped_at[at])
        return (
            (at + 1) / STEP,
            dropped / self.assignments,
            1 - (self.assignments - dropped) / int(self.places_at[at]),
        )


@dataclass(frozen=True)
class Stack:
    """The tokens of a shard that reach the routers of a stack, their groups, domains and places;
    how many there are in each; and where a run of the same domain and places begins, and the
    end."""

    seen: Any
    start_G: np.ndarray
    domain_T: np.ndarray
    decile_PT: np.ndarray
    tokens_D: np.ndarray
    tokens_PN: np.ndarray
    start_R: np.ndarray


def _made(
    domain_T: np.ndarray, decile_PT: np.ndarray, made_T: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """made_T (None: 1 each) summed by domain, int64 [D], and by place and tenth, int64 [P, N]."""
    by_place = [np.bincount(decile_T, made_T, 10) for decile_T in decile_PT]
    return np.bincount(domain_T, made_T).astype(np.int64), np.stack(by_place).astype(np.int64)


class Queues:
    """One shard: which tokens form groups, where each stands, and the drops of one router after the
    other."""

    def __init__(self, shard: Shard, group: int | str, domains: list[str]) -> None:
        self.shard = shard
        table = shard.tokens(["document", "sequence", "batch", "domain"])
        self.tokens = len(table)
        code_T, labels = codes(table["domain"])
        used = [labels[c] for c in np.unique(code_T)]
        domains += [label for label in used if label not in domains]
        row_of = np.array(
            [domains.index(label) if label in domains else -1 for label in labels], np.int64
        )
        self.domains, self.domain_T = domains, row_of[code_T]
        self.document_T, self.sequence_T, self.batch_T = (
            table[name].to_numpy() for name in ("document", "sequence", "batch")
        )
        self.group = group
        self.stacks: dict[str, Stack] = {}

    def stack(self, router: int) -> Stack:
        name = self.shard.trace.routers[router].stack
        if name not in self.stacks:
            seen = self.shard.seen(router)
            seen = slice(None) if seen is None else np.flatnonzero(seen)
            batch_T, sequence_T = self.batch_T[seen], self.sequence_T[seen]
            start_G = runs(batch_T, sequence_T) if self.group == "sequence" else runs(batch_T)
            if isinstance(self.group, int):
                start_G = cut(start_G, min(self.group, len(batch_T) + 1))
            decile_PT = np.stack(
                [document_deciles(self.document_T[seen], sequence_T), deciles(start_G)]
            )
            domain_T = self.domain_T[seen]
            made = _made(domain_T, decile_PT, None)
            self.stacks[name] = Stack(
                seen, start_G, domain_T, decile_PT, *made, runs(domain_T, *decile_PT)
            )
        return self.stacks[name]

    def of_router(
        self, router: int, tally: Tally, order: str, small: bool
    ) -> tuple[Any, np.ndarray, np.ndarray]:
        """Adds the router's drops to its tally. Returns which tokens of the shard reach it, and for
        each under how many of the factors it loses an assignment, and all of them. uint8 [T]"""
        stack = self.stack(router)
        start_G, domain_T, decile_PT = stack.start_G, stack.domain_T, stack.decile_PT
        k, E, T = tally.router.top_k, tally.router.experts, len(domain_T)
        ids_KT = slots(self.shard, router)
        check_length(ids_KT.T, T, router)
        size_G = np.diff(start_G)
        size_S, of_G = np.unique(size_G, return_inverse=True)
        room_SF = np.array(
            [[capacity(f, int(s), k, E) for f in tally.factors] for s in size_S], np.int64
        ).reshape(-1, len(tally.factors))
        level_SC = levels(room_SF, int(size_S.max(initial=0)))
        visit_N = np.zeros(0, np.int64)
        if order == "weight":  # of equal weights the earlier
            weight_N = np.ascontiguousarray(self.shard.weights(router).T).ravel()
            visit_N = np.lexsort((-weight_N, np.tile(np.repeat(np.arange(len(size_G)), size_G), k)))
        tally.domains(len(self.domains))
        load_GE, level_KT = np.zeros((len(size_G), E), np.int32), np.empty((k, T), np.uint8)
        if small:
            sweep = queue_numpy
        else:
            from moe_inspect.simulate.kernels import queue as sweep
        sweep(ids_KT, start_G, of_G, level_SC, visit_N, order == "token", load_GE, level_KT)
        worst_T, best_T = drops(level_KT, stack, tally.last_FD, tally.last_FPN)
        made_D, made_PN = stack.tokens_D * k, stack.tokens_PN * k
        if T and ids_KT.min() < 0:
            made_D, made_PN = _made(domain_T, decile_PT, (ids_KT >= 0).sum(0))
        tally.decisions += T
        tally.assignments += int(made_D.sum())
        tally.groups += len(size_G)
        tally.places_F += np.bincount(of_G, minlength=len(size_S)) @ room_SF * E
        tally.hit_F += _at_least(worst_T, len(tally.factors))
        tally.lost_F += _at_least(best_T, len(tally.factors))
        tally.made_D[: len(made_D)] += made_D
        tally.made_PN += made_PN
        tally.loads(size_G, load_GE)
        return stack.seen, worst_T, best_T


def levels(room_SF: np.ndarray, most: int) -> np.ndarray:
    """How many of the factors have no room for the one who finds c before them in a queue: room_SF
    are capacities, ascending, by size of the group; c = 0 … `most`. uint8 [S, C]"""
    return np.stack(
        [np.searchsorted(room_F, np.arange(most + 1), side="right") for room_F in room_SF] or [[]]
    ).astype(np.uint8)


def queue_numpy(
    ids_KT: np.ndarray,
    start_G: np.ndarray,
    of_G: np.ndarray,
    level_SC: np.ndarray,
    visit_N: np.ndarray,
    by_token: bool,
    load_GE: np.ndarray,
    level_KT: np.ndarray,
) -> None:
    """Who stands where in which queue. ids_KT: experts, −1 for none. of_G: the row of level_SC for
    each group. visit_N: indices into the flat ids_KT in the order of service, or empty. Adds to
    load_GE; level_KT becomes how many factors drop each assignment, NOWHERE where there is none."""
    K, T = ids_KT.shape
    E = load_GE.shape[1]
    group_T = np.repeat(np.arange(len(start_G) - 1), np.diff(start_G))
    if not len(visit_N):
        flat = np.arange(K * T).reshape(K, T)
        visit_N = (
            flat.T.ravel()
            if by_token
            else flat.ravel()[np.argsort(np.tile(group_T, K), kind="stable")]
        )
    visit_N = visit_N[ids_KT.ravel()[visit_N] >= 0]
    group_N = group_T[visit_N % max(T, 1)]
    queue_N = group_N * E + ids_KT.ravel()[visit_N]
    order_N = np.argsort(queue_N, kind="stable")
    start = runs(queue_N[order_N])
    place_N = np.empty(len(queue_N), np.int64)
    place_N[order_N] = np.arange(len(queue_N)) - np.repeat(start[:-1], np.diff(start))
    load_GE += np.bincount(queue_N, minlength=load_GE.size).reshape(load_GE.shape).astype(np.int32)
    level_KT[:] = NOWHERE
    level_KT.reshape(-1)[visit_N] = level_SC[
        of_G[group_N], np.minimum(place_N, level_SC.shape[1] - 1)
    ]


def drops(
    level_KT: np.ndarray, stack: Stack, last_FD: np.ndarray, last_FPN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Adds to last_FD and last_FPN the assignments that each factor is the last to drop. Returns
    the most and the fewest factors that drop an assignment of the token; 0 and 0 for a token
    without any. uint8 [T]"""
    there_KT = (
        level_KT
        if level_KT.max(initial=0) < NOWHERE
        else np.where(level_KT == NOWHERE, np.uint8(0), level_KT)
    )
    worst_T, first_R = there_KT.max(0, initial=0), stack.start_R[:-1]
    for f in range(int(worst_T.max(initial=0))):
        last_T = (
            (level_KT == f + 1).view(np.uint8).sum(0, dtype=np.uint8)
        )  # a token has fewer slots than 256
        last_R = np.add.reduceat(last_T, first_R, dtype=np.int64)
        np.add.at(last_FD[f], stack.domain_T[first_R], last_R)
        for place, decile_T in enumerate(stack.decile_PT):
            np.add.at(last_FPN[f, place], decile_T[first_R], last_R)
    return worst_T, np.minimum(level_KT.min(0, initial=NOWHERE), worst_T)


def _at_least(level_T: np.ndarray, F: int) -> np.ndarray:
    """How many tokens each factor meets: those whose level is above its index. int64 [F]"""
    return np.array([np.count_nonzero(level_T > f) for f in range(F)])


def _tables(
    trace: Trace,
    tallies: dict[int, Tally],
    domains: list[str],
    across: tuple[int, np.ndarray, np.ndarray],
    target: float,
) -> dict[str, pd.DataFrame]:
    import pandas as pd

    rows: dict[str, list[dict[str, object]]] = {
        name: [] for name in ("capacity", "capacity_needed", "by_domain", "by_position")
    }
    for r, tally in tallies.items():
        dropped_FD, dropped_FPN = _dropped(tally.last_FD), _dropped(tally.last_FPN)
        key: dict[str, object] = {"layer": tally.router.layer, "router": r}
        for f, factor in enumerate(tally.factors):
            at = {**key, "capacity_factor": factor}
            dropped = int(dropped_FD[f].sum())
            rows["capacity"].append(
                {
                    **at,
                    "drop_rate": _share(dropped, tally.assignments),
                    "tokens_hit": _share(int(tally.hit_F[f]), tally.decisions),
                    "tokens_lost": _share(int(tally.lost_F[f]), tally.decisions),
                    "unused_capacity": 1
                    - _share(tally.assignments - dropped, int(tally.places_F[f])),
                    "groups": tally.groups,
                    "decisions": tally.decisions,
                    "assignments": tally.assignments,
                    "dropped": dropped,
                }
            )
            for d in np.argsort(domains):
                made, gone = (
                    int(tally.made_D[d]) if d < len(tally.made_D) else 0,
                    int(dropped_FD[f, d]) if d < len(tally.made_D) else 0,
                )
                if made:
                    by = {
                        "domain": domains[d],
                        "assignments": made,
                        "dropped": gone,
                        "drop_rate": _share(gone, made),
                    }
                    rows["by_domain"].append({**at, **by})
            for p, place in enumerate(PLACES):
                for tenth in range(10):
                    made, gone = int(tally.made_PN[p, tenth]), int(dropped_FPN[f, p, tenth])
                    by = {
                        "position_in": place,
                        "tenth": tenth + 1,
                        "assignments": made,
                        "dropped": gone,
                        "drop_rate": _share(gone, made),
                    }
                    rows["by_position"].append({**at, **by})
        if tally.assignments:
            needed = dict(
                zip(
                    ("capacity_factor", "drop_rate", "unused_capacity"),
                    tally.needed(target),
                    strict=True,
                )
            )
            rows["capacity_needed"].append({**key, "target_drop": target, **needed})
    factors = next(iter(tallies.values())).factors
    tokens, hit_F, lost_F = across
    everywhere = [
        {
            "capacity_factor": f,
            "tokens": tokens,
            "hit_anywhere": _share(int(h), tokens),
            "lost_anywhere": _share(int(n), tokens),
        }
        for f, h, n in zip(factors, hit_F, lost_F, strict=True)
    ]
    return {
        "capacity": pd.DataFrame(rows["capacity"]),
        "capacity_needed": pd.DataFrame(
            rows["capacity_needed"],
            columns=[
                "layer",
                "router",
                "target_drop",
                "capacity_factor",
                "drop_rate",
                "unused_capacity",
            ],
        ),
        "capacity_tokens": pd.DataFrame(everywhere),
        "capacity_by_domain": pd.DataFrame(rows["by_domain"]),
        "capacity_by_position": pd.DataFrame(rows["by_position"]),
    }


def _dropped(last_F: np.ndarray) -> np.ndarray:
    """What a larger factor drops every smaller one drops too."""
    return last_F[::-1].cumsum(0)[::-1]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")

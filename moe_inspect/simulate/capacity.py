"""Token choice under a capacity, for `simulate routing`: what a capacity factor would drop, of
routing that dropped nothing.

An expert takes capacity = ceil(cf · G · k / E) assignments of a group of G tokens (GShard,
arXiv:2006.16668; Switch, arXiv:2101.03961); what comes later in its queue is dropped. The tokens'
later choices are those recorded: a real drop would change them.

T tokens that reach a router, K slots, E experts, G groups, F capacity factors (ascending), S sizes
of groups, D domains of a shard, P POSITIONS (in the document, in the group), N tenths, R runs of
tokens of one domain and the same tenths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, reduce
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from moe_inspect.analysis.metrics.balance import ratio
from moe_inspect.analysis.tasks import summed
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import DASHES, SERIES, Axis, Line, Panel, look
from moe_inspect.simulate.kernels_numba import NOWHERE, queue
from moe_inspect.simulate.result import Labels, Settings, Tables
from moe_inspect.simulate.shards import Seen, expert_capacity, routed
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard, codes, run_edges

Order = Literal["arrival", "token", "weight"]
ORDERS: dict[Order, str] = {
    "arrival": "first choices of all tokens, then second choices (GShard)",
    "token": "token after token, each with all its choices (Switch)",
    "weight": "the highest gate weight first (batch prioritized routing, arXiv:2106.05974)",
}
GroupTokens = int | Literal["batch", "sequence"]
MOST_FACTORS = 50
STEP = 100  # the least factor is searched for in hundredths
POSITIONS = ("document", "group")  # what a token's tenth is a tenth of


def simulated_drops(
    trace: Trace,
    chosen: Sequence[int],
    capacity_factors: Sequence[float],
    group_tokens: GroupTokens,
    order: Order | None,
    target_drop: float,
) -> tuple[dict[str, pd.DataFrame], Settings]:
    """The tables capacity (a row per router and factor), capacity_needed (per router),
    capacity_tokens (per factor, all layers), capacity_by_domain and capacity_by_position, of the
    routers `chosen`; and what `drops_said` and `panels` need. The options are those of
    simulate_routing. MoeInspectError for settings out of range, and for traces without the weights
    or first choices that `order` needs."""
    ranked = all(trace.routers[r].first_choice_known for r in chosen)
    factors = tuple(sorted({float(f) for f in capacity_factors}))
    order = order or ("arrival" if ranked else "token")
    wrong = None
    if not factors or len(factors) > MOST_FACTORS or not all(0 < f < 1e6 for f in factors):
        wrong = f"capacity factors {list(factors)}: give 1 to {MOST_FACTORS} of them, each above 0"
    elif group_tokens not in ("batch", "sequence") and not (
        isinstance(group_tokens, int) and group_tokens >= 1
    ):
        wrong = f"group tokens {group_tokens!r}: give a number of tokens, batch or sequence"
    elif order not in ORDERS:
        wrong = f"no order {order!r}: there are {', '.join(ORDERS)}"
    elif order == "weight" and not trace.has_weights:
        wrong = (
            f"{trace.path} holds no gate weights, which order weight needs: trace without "
            "--no-weights"
        )
    elif order == "arrival" and not ranked:
        wrong = (
            f"order arrival needs first choices, which {trace.path} does not record: use order "
            "token"
        )
    elif not 0 <= target_drop < 1:
        wrong = f"target drop {target_drop}: give a share from 0 to below 1"
    if wrong:
        raise MoeInspectError(wrong)
    asked = chosen, factors, group_tokens, order
    parts = summed(trace, "simulating drops", _add, _drops_of_shard, *asked)
    settings: Settings = {
        "capacity_factors": factors,
        "group_tokens": group_tokens,
        "order": order,
        "target_drop": target_drop,
    }
    return _tables(trace, reduce(_add, parts), settings), settings


# --- counting: the queues before the experts of each router in each shard


@dataclass
class Drops:
    """What each capacity factor drops of one router's assignments; every field is a sum over
    shards. of_domain: by domain, its assignments and, of each factor, those that it drops and the
    next larger does not, [1 + F]; made_PN and last_FPN: the same by tenth. room_F: assignments that
    all experts and groups have room for; hit_F, lost_F: decisions that lose an assignment, and all
    of them. dropped_at, room_at: what factors of 1/STEP, 2/STEP, … drop and have room for. int64
    each."""

    decisions: int
    groups: int
    of_domain: dict[str, np.ndarray]
    made_PN: np.ndarray
    last_FPN: np.ndarray
    room_F: np.ndarray
    hit_F: np.ndarray
    lost_F: np.ndarray
    dropped_at: np.ndarray
    room_at: np.ndarray

    @property
    def assignments(self) -> int:
        return sum(int(made[0]) for made in self.of_domain.values())

    def add(self, other: Drops) -> None:
        for label, made in other.of_domain.items():
            self.of_domain[label] = self.of_domain.get(label, 0) + made
        for name in (f.name for f in fields(self) if f.name != "of_domain"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def needed(self, target: float) -> dict[str, float]:
        """The least factor, in hundredths, that drops at most `target`; what it drops; the share of
        capacity it leaves unused."""
        at = int(np.argmax(self.dropped_at <= target * self.assignments))
        dropped = int(self.dropped_at[at])
        return {
            "capacity_factor": (at + 1) / STEP,
            "simulated_drop_rate": dropped / self.assignments,
            "unused_capacity": 1 - (self.assignments - dropped) / int(self.room_at[at]),
        }


# the drops of every router, and how many tokens lose an assignment at any of them (hit_F) and all
# of their assignments at any (lost_F)
Counted = tuple[dict[int, Drops], np.ndarray, np.ndarray]


def _add(total: Counted, other: Counted) -> Counted:
    for r, drops in other[0].items():
        total[0][r].add(drops)
    return total[0], total[1] + other[1], total[2] + other[2]


def _drops_of_shard(
    shard: Shard,
    chosen: Sequence[int],
    factors: tuple[float, ...],
    group_tokens: GroupTokens,
    order: Order,
) -> Counted:
    table = shard.tokens(["document", "sequence", "batch", "domain"])
    hit_T, lost_T = np.zeros((2, len(table)), np.uint8)
    of = dict[int, Drops]()
    tokens = routed(shard, chosen, lambda _, seen: groups_of(table, seen, group_tokens))
    for r, groups, ids_KT in tokens:
        of[r], worst_T, best_T = drops_of(shard, r, groups, ids_KT, factors, order)
        hit_T[groups.seen] = np.maximum(hit_T[groups.seen], worst_T)
        lost_T[groups.seen] = np.maximum(lost_T[groups.seen], best_T)
    return of, at_least(hit_T, len(factors)), at_least(lost_T, len(factors))


@dataclass(frozen=True)
class Groups:
    """The tokens of a shard that reach the routers of one stack: which they are (`seen`), the first
    token of each group, and the end (start_G), the domain of each, an index into `domains`, and its
    tenth of its document and of its group (tenth_PT)."""

    seen: Seen
    start_G: np.ndarray
    domain_T: np.ndarray
    tenth_PT: np.ndarray
    domains: list[str]

    @cached_property
    def start_R(self) -> np.ndarray:
        return run_edges(self.domain_T, *self.tenth_PT)

    def summed(self, made_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """made_T summed by domain, int64 [D], and by tenth, int64 [P, N]."""
        by_tenth = [np.bincount(tenth_T, made_T, 10) for tenth_T in self.tenth_PT]
        made_D = np.bincount(self.domain_T, made_T, len(self.domains))
        return made_D.astype(np.int64), np.stack(by_tenth).astype(np.int64)


def groups_of(table: pa.Table, seen: Seen, group_tokens: GroupTokens) -> Groups:
    """The groups that the tokens of a shard (`table`) form before a router that `seen` reach."""
    document_T, sequence_T, batch_T = (
        table[name].to_numpy()[seen] for name in ("document", "sequence", "batch")
    )
    domain_T, domains = codes(table["domain"])
    start_G = run_edges(batch_T, sequence_T) if group_tokens == "sequence" else run_edges(batch_T)
    if isinstance(group_tokens, int):  # passes are cut into pieces
        index_T = np.arange(len(batch_T)) - np.repeat(start_G[:-1], np.diff(start_G))
        first_T = index_T % min(group_tokens, len(batch_T) + 1) == 0
        start_G = np.append(np.flatnonzero(first_T), len(batch_T))
    tenth_PT = np.stack([document_deciles(document_T, sequence_T), deciles(start_G)])
    return Groups(seen, start_G, domain_T[seen].astype(np.int64), tenth_PT, domains)


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


def drops_of(
    shard: Shard,
    router: int,
    groups: Groups,
    ids_KT: np.ndarray,
    factors: tuple[float, ...],
    order: Order,
) -> tuple[Drops, np.ndarray, np.ndarray]:
    """Queues the assignments of one router in one shard; also worst_T and best_T of `dropped`."""
    of = shard.trace.routers[router]
    (k, T), E, F = ids_KT.shape, of.experts, len(factors)
    size_G = np.diff(groups.start_G)
    size_S, of_G = np.unique(size_G, return_inverse=True)
    room_SF = np.array(
        [[expert_capacity(f, int(s), k, E) for f in factors] for s in size_S], np.int64
    ).reshape(-1, F)
    level_SC = levels(room_SF, int(size_S.max(initial=0)))
    visit_N = np.zeros(0, np.int64)
    if order == "weight":  # of equal weights the earlier
        weight_N = np.ascontiguousarray(shard.weights(router).T).ravel()
        visit_N = np.lexsort((-weight_N, np.tile(np.repeat(np.arange(len(size_G)), size_G), k)))
    load_GE, level_KT = np.zeros((len(size_G), E), np.int32), np.empty((k, T), np.uint8)
    queue(ids_KT, groups.start_G, of_G, level_SC, visit_N, order == "token", load_GE, level_KT)
    made_D, made_PN = groups.summed((ids_KT >= 0).sum(0))
    last_FD, last_FPN, worst_T, best_T = dropped(level_KT, groups, F)
    drops = Drops(
        T,
        len(size_G),
        dict(zip(groups.domains, np.vstack([made_D, last_FD]).T, strict=True)),
        made_PN,
        last_FPN,
        np.bincount(of_G, minlength=len(size_S)) @ room_SF * E,
        at_least(worst_T, F),
        at_least(best_T, F),
        *hundredths(of, size_G, load_GE),
    )
    return drops, worst_T, best_T


def hundredths(
    router: Router, size_G: np.ndarray, load_GE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """dropped_at and room_at of `Drops`, of groups of so many tokens and their loads: Σ max(0, load
    − capacity), exact, in memory that no trace makes grow."""
    k, E = router.top_k, router.experts
    n = np.arange(1, -(-STEP * E // k) + 1)
    dropped_at, room_at = np.zeros((2, len(n)), np.int64)
    for size in np.unique(size_G):
        at_G = size_G == size
        load_C = np.bincount(load_GE[at_G].ravel(), minlength=size + 1)
        above_C = np.cumsum(load_C[::-1])[::-1] - load_C  # experts with more than c
        excess_C = np.append(np.cumsum(above_C[::-1])[::-1], 0)
        capacity_n = -(-n * int(size) * k // (STEP * E))
        dropped_at += excess_C[np.minimum(capacity_n, size + 1)]
        room_at += capacity_n * E * int(at_G.sum())
    return dropped_at, room_at


def at_least(level_T: np.ndarray, F: int) -> np.ndarray:
    """How many tokens each factor meets: those whose level is above its index. int64 [F]"""
    return np.array([np.count_nonzero(level_T > f) for f in range(F)])


def levels(room_SF: np.ndarray, most: int) -> np.ndarray:
    """How many of the factors have no room for an assignment with c others before it in its queue,
    c = 0 … `most`. room_SF: capacities, ascending, by size of the group. uint8 [S, C]"""
    return np.stack(
        [np.searchsorted(room_F, np.arange(most + 1), side="right") for room_F in room_SF] or [[]]
    ).astype(np.uint8)


def dropped(
    level_KT: np.ndarray, groups: Groups, F: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """By domain (last_FD) and tenth (last_FPN) what each factor drops and the next larger does not;
    and worst_T, best_T: under how many of the F factors a token loses an assignment, and all of
    them, uint8; 0 and 0 for a token without any. level_KT: how many factors drop each assignment,
    uint8, NOWHERE where there is none."""
    last_FD = np.zeros((F, len(groups.domains)), np.int64)
    last_FPN = np.zeros((F, len(POSITIONS), 10), np.int64)
    there_KT = np.where(level_KT == NOWHERE, np.uint8(0), level_KT)
    worst_T, first_R = there_KT.max(0, initial=0), groups.start_R[:-1]
    for f in range(int(worst_T.max(initial=0))):
        # uint8 holds it: a token has fewer slots than 256
        last_T = (level_KT == f + 1).view(np.uint8).sum(0, dtype=np.uint8)
        last_R = np.add.reduceat(last_T, first_R, dtype=np.int64)
        np.add.at(last_FD[f], groups.domain_T[first_R], last_R)
        for p, tenth_T in enumerate(groups.tenth_PT):
            np.add.at(last_FPN[f, p], tenth_T[first_R], last_R)
    return last_FD, last_FPN, worst_T, np.minimum(level_KT.min(0, initial=NOWHERE), worst_T)


# --- what is said of it


def _tables(trace: Trace, counted: Counted, settings: Settings) -> dict[str, pd.DataFrame]:
    (of, hit_F, lost_F), factors = counted, settings["capacity_factors"]
    target_drop = settings["target_drop"]
    main, needed, by_domain, by_position = [], [], [], []
    for r, drops in of.items():
        router = {"layer": trace.routers[r].layer, "router": r}
        # what a larger factor drops every smaller one drops too
        dropped_FPN = drops.last_FPN[::-1].cumsum(0)[::-1]
        dropped_F = {label: there[:0:-1].cumsum()[::-1] for label, there in drops.of_domain.items()}
        made = drops.assignments
        for f, factor in enumerate(factors):
            at = {**router, "capacity_factor": factor}
            lost = int(sum(of_domain_F[f] for of_domain_F in dropped_F.values()))
            row = {
                "simulated_drop_rate": ratio(lost, made),
                "tokens_hit": ratio(drops.hit_F[f], drops.decisions),
                "tokens_lost": ratio(drops.lost_F[f], drops.decisions),
                "unused_capacity": 1 - ratio(made - lost, drops.room_F[f]),
                "groups": drops.groups,
                "decisions": drops.decisions,
                "assignments": made,
                "dropped": lost,
            }
            main.append(at | row)
            by_domain += [
                at | {"domain": label} | _rate(there[0], dropped_F[label][f])
                for label, there in sorted(drops.of_domain.items())
                if there[0]
            ]
            by_position += [
                at
                | {"position_in": POSITIONS[p], "tenth": n + 1}
                | _rate(of_tenth, dropped_FPN[f, p, n])
                for (p, n), of_tenth in np.ndenumerate(drops.made_PN)
            ]
        if made:
            needed.append({**router, "target_drop": target_drop, **drops.needed(target_drop)})
    columns = ["layer", "router", "target_drop", "capacity_factor"]
    columns += ["simulated_drop_rate", "unused_capacity"]
    anywhere = {
        "capacity_factor": factors,
        "tokens": trace.n_tokens,
        "hit_anywhere": hit_F / trace.n_tokens,
        "lost_anywhere": lost_F / trace.n_tokens,
    }
    return {
        "capacity": pd.DataFrame(main),
        "capacity_needed": pd.DataFrame(needed, columns=columns),
        "capacity_tokens": pd.DataFrame(anywhere),
        "capacity_by_domain": pd.DataFrame(by_domain),
        "capacity_by_position": pd.DataFrame(by_position),
    }


def _rate(made: int, dropped: int) -> dict[str, float]:
    rate = ratio(dropped, made)
    return {"assignments": int(made), "dropped": int(dropped), "simulated_drop_rate": rate}


def _group(group: int | str) -> str:
    return {"batch": "a forward pass", "sequence": "a sequence"}.get(str(group), f"{group} tokens")


def drops_said(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    factors = settings["capacity_factors"]
    factor = factors[len(factors) // 2]
    main, across, needed = tables["capacity"], tables["capacity_tokens"], tables["capacity_needed"]
    at = main[main["capacity_factor"] == factor].dropna(subset=["simulated_drop_rate"])
    if at.empty:
        return ["Simulated: no router made an assignment, so nothing could be dropped."]
    worst = at.loc[at["simulated_drop_rate"].idxmax()]
    label, most = label_of[worst["router"]], needed.loc[needed["capacity_factor"].idxmax()]
    everywhere = across[across["capacity_factor"] == factor].iloc[0]
    drops = bool(worst["dropped"])
    at_factor = f"at capacity factor {factor:g}, in groups of {_group(settings['group_tokens'])}"
    sentences = [
        f"Simulated: {at_factor}, layer {label} would drop most: "
        f"{worst['simulated_drop_rate']:.1%} of its assignments; {worst['tokens_hit']:.1%} of its "
        f"tokens would lose an expert and {worst['tokens_lost']:.1%} all of them.",
        f"Simulated, over all layers: {everywhere['hit_anywhere']:.1%} of tokens would lose an "
        "expert in at least one layer, and "
        f"{everywhere['lost_anywhere']:.1%} all experts of a layer.",
    ]
    if not drops:
        sentences = [f"Simulated: {at_factor}, no layer would drop an assignment."]
    if not settings["too_few"]:
        sentences.append(
            f"Simulated: dropping at most {100 * settings['target_drop']:.3g}% of every layer's "
            f"assignments takes a factor of {most['capacity_factor']:.2f} (layer "
            f"{label_of[most['router']]}), which leaves {most['unused_capacity']:.0%} of that "
            "layer's capacity unused."
        )
    ends = tables["capacity_by_position"].query(
        "capacity_factor == @factor and router == @worst.router"
    )
    for position in POSITIONS[:1] if settings["group_tokens"] == "sequence" else POSITIONS:
        rate = ends[ends["position_in"] == position].set_index("tenth")["simulated_drop_rate"]
        if drops and rate[[1, 10]].notna().all():  # of few tokens a tenth may have none
            sentences.append(
                f"Simulated, layer {label}, drop rate by position in the "
                f"{position}: first tenth {rate[1]:.1%}, last tenth {rate[10]:.1%}."
            )
    return sentences


def panels(tables: Tables, settings: Settings, label_of: Labels) -> tuple[Panel, Panel]:
    """What each layer drops; and where in its document and group the worst layer's drops fall."""
    factors, main = settings["capacity_factors"], tables["capacity"]
    routers = list(main["router"].unique())
    rate_of = main.pivot(index="capacity_factor", columns="router", values="simulated_drop_rate")
    rate_of = rate_of[routers]
    x = np.arange(len(routers), dtype=float)
    by_layer = tuple(
        Line(x, rate_of.loc[f].to_numpy(float), f"capacity factor {f:g}", *look(i), dots=True)
        for i, f in enumerate(factors)
    )
    factor = factors[len(factors) // 2]
    worst = rate_of.loc[factor].fillna(-1).idxmax()
    ends = tables["capacity_by_position"].query("capacity_factor == @factor and router == @worst")
    by_position = list[Line]()
    for position, colour, dash in zip(POSITIONS, SERIES, DASHES, strict=False):
        at = ends[ends["position_in"] == position]
        x, y = at["tenth"].to_numpy(float) - 1, at["simulated_drop_rate"].to_numpy(float)
        by_position.append(Line(x, y, f"tenth of the {position}", colour, dash, True))
    layers = Axis("layer", tuple(label_of[r] for r in routers))
    tenths = Axis("tenth (10 is the end)", tuple(str(i) for i in range(1, 11)))
    rate = Axis("share of assignments dropped", low=0)
    groups = f"By layer, in groups of {_group(settings['group_tokens'])}"
    where = f"Layer {label_of[worst]} at factor {factor:g}, by position"
    return Panel(by_layer, layers, rate, groups), Panel(tuple(by_position), tenths, rate, where)

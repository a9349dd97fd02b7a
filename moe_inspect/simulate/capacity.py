"""`simulate capacity`: what a capacity factor would drop, of routing that dropped nothing.

An expert takes capacity = ceil(cf · G · k / E) assignments of a group of G tokens (GShard,
arXiv:2006.16668; Switch, arXiv:2101.03961); what comes later in its queue is dropped. The tokens'
later choices are those recorded: a real drop would change them.

T tokens, E experts, G groups, F capacity factors (ascending), D domains, P POSITIONS (in the
document, in the group), N tenths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.counting.router_counts import narrowed
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.tasks import summed
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import DASHES, SERIES, Axis, Chart, Line, Panel, look
from moe_inspect.simulate.queues import (
    POSITIONS,
    Drops,
    Groups,
    GroupTokens,
    Order,
    drops_of,
    groups_of,
)
from moe_inspect.simulate.result import SIMULATED, Simulation, need_decisions, repeatable
from moe_inspect.simulate.shards import is_small
from moe_inspect.text import layer_label
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard, codes

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


ORDERS = {
    "arrival": "first choices of all tokens, then second choices (GShard)",
    "token": "token after token, each with all its choices (Switch)",
    "weight": "the highest gate weight first",
}
STEP = 100  # the least factor is searched for in hundredths
MOST_FACTORS = 50


@dataclass(frozen=True)
class Settings:
    """`factors`: ascending. `target_drop`: the drop rate for which the least factor is sought."""

    factors: tuple[float, ...]
    group_tokens: GroupTokens
    order: Order
    target_drop: float


@repeatable
def simulate_capacity(
    trace: Trace | str | Path,
    *,
    capacity_factors: Sequence[float] = (1.0, 1.25, 2.0),
    group_tokens: GroupTokens = "batch",
    order: Order | None = None,
    target_drop: float = 0.01,
    layers: str | int | Iterable[int | str] | None = None,
) -> Simulation:
    """What experts of limited capacity would drop.

    `capacity_factors`: up to 50, each above 0. `group_tokens`: the tokens that share the experts'
    capacity: "batch" (a forward pass), a number (at most so many of one pass) or "sequence" (the
    tokens of one sequence in one pass). `order`: which assignments are served first, one of ORDERS;
    default "arrival", or "token" where the trace does not say which choice of a decision was the
    first. `target_drop`: drop rate, 0 to 1, for which the least factor is sought. `layers`:
    "0-3,7", 3 or [0, 3]; default all.

    Tables: capacity (a row per router and factor), capacity_needed (per router), capacity_tokens
    (per factor, all layers), capacity_by_domain, capacity_by_position. MoeInspectError for settings
    out of range, and for traces without decisions or without the weights that `order` needs."""
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    need_decisions(trace, "simulate capacity")
    chosen = select(trace, layers=layers).routers
    ranked = all(trace.routers[r].first_choice_known for r in chosen)
    settings = Settings(
        tuple(sorted({float(f) for f in capacity_factors})),
        group_tokens,
        order or ("arrival" if ranked else "token"),
        target_drop,
    )
    _check(trace, settings, ranked)
    counted = _count(trace, chosen, settings)
    tables = _tables(counted, settings)
    shown = {
        "capacity_factors": list(settings.factors),
        "group_tokens": group_tokens,
        "order": settings.order,
        "target_drop": target_drop,
    }
    label_of = {r: layer_label(trace.routers, r) for r in chosen}
    return Simulation(
        "capacity",
        tables,
        verdict(tables, shown, label_of),
        shown,
        chart(tables, shown, label_of),
        ("capacity", "capacity_needed"),
    )


def _check(trace: Trace, settings: Settings, ranked: bool) -> None:
    factors, group, order = settings.factors, settings.group_tokens, settings.order
    if not factors or len(factors) > MOST_FACTORS or not all(0 < f < 1e6 for f in factors):
        raise MoeInspectError(
            f"capacity factors {list(factors)}: give 1 to {MOST_FACTORS} of them, each above 0"
        )
    if group not in ("batch", "sequence") and not (isinstance(group, int) and group >= 1):
        raise MoeInspectError(f"group tokens {group!r}: give a number of tokens, batch or sequence")
    if order not in ORDERS:
        raise MoeInspectError(f"no order {order!r}: there are {', '.join(ORDERS)}")
    if order == "weight" and not trace.has_weights:
        raise MoeInspectError(
            f"{trace.path} holds no gate weights, which order weight needs: trace without "
            "--no-weights"
        )
    if order == "arrival" and not ranked:
        raise MoeInspectError(
            f"order arrival needs first choices, which {trace.path} does not record: use order "
            "token"
        )
    if not 0 <= settings.target_drop < 1:
        raise MoeInspectError(f"target drop {settings.target_drop}: give a share from 0 to below 1")


SUMS = (
    "decisions",
    "groups",
    "made_PN",
    "last_FPN",
    "room_F",
    "hit_F",
    "lost_F",
    "dropped_at",
    "room_at",
)


@dataclass
class RouterDrops:
    """The drops of one router, summed over shards (fields as in `queues.Drops`). dropped_at,
    room_at: what factors of 1/STEP, 2/STEP, … drop and have room for."""

    router: Router
    factors: tuple[float, ...]
    decisions: int = 0
    groups: int = 0
    made_D: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    made_PN: np.ndarray = field(default_factory=lambda: np.zeros((2, 10), np.int64))
    room_F: np.ndarray = field(init=False)
    hit_F: np.ndarray = field(init=False)
    lost_F: np.ndarray = field(init=False)
    last_FD: np.ndarray = field(init=False)
    last_FPN: np.ndarray = field(init=False)
    dropped_at: np.ndarray = field(init=False)
    room_at: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        F, most = len(self.factors), -(-STEP * self.router.experts // self.router.top_k)
        self.room_F, self.hit_F, self.lost_F = (np.zeros(F, np.int64) for _ in range(3))
        self.last_FD, self.last_FPN = np.zeros((F, 0), np.int64), np.zeros((F, 2, 10), np.int64)
        self.dropped_at, self.room_at = np.zeros(most, np.int64), np.zeros(most, np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """As it is sent to be added to others: in narrow types, nothing can be added to it."""
        return {name: narrowed(value) for name, value in self.__dict__.items()}

    @property
    def assignments(self) -> int:
        return int(self.made_D.sum())

    def add(self, shard: Drops) -> None:
        """Those of the first shard; `merge` adds those of others."""
        F = len(self.factors)
        self.made_D, self.last_FD = shard.made_D, shard.last_FD
        self.decisions += len(shard.worst_T)
        self.groups += len(shard.size_G)
        self.made_PN += shard.made_PN
        self.last_FPN += shard.last_FPN
        self.room_F += shard.room_F
        self.hit_F += _at_least(shard.worst_T, F)
        self.lost_F += _at_least(shard.best_T, F)
        self._add_hundredths(shard.size_G, shard.load_GE)

    def merge(self, other: RouterDrops, row_D: np.ndarray, D: int) -> None:
        """`row_D`: which of our D domains each of the other's is."""
        more = D - len(self.made_D)
        self.made_D = np.pad(self.made_D, (0, more))
        self.last_FD = np.pad(self.last_FD, ((0, 0), (0, more)))
        self.made_D[row_D] += other.made_D
        self.last_FD[:, row_D] += other.last_FD
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _add_hundredths(self, size_G: np.ndarray, load_GE: np.ndarray) -> None:
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
            self.room_at += capacity_n * E * int(at_G.sum())

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


@dataclass
class Counted:
    """The drops of every router; the domains that made_D and last_FD count by; and the tokens of
    the trace, with those that lose an assignment in any layer (hit_F) and all of some layer's
    (lost_F)."""

    of: dict[int, RouterDrops]
    domains: list[str]
    tokens: int
    hit_F: np.ndarray
    lost_F: np.ndarray

    @classmethod
    def zero(cls, routers: list[Router], chosen: Sequence[int], settings: Settings) -> Counted:
        of = {r: RouterDrops(routers[r], settings.factors) for r in chosen}
        F = len(settings.factors)
        return cls(of, [], 0, np.zeros(F, np.int64), np.zeros(F, np.int64))

    def add(self, other: Counted) -> Counted:
        """Adds `other` in place."""
        self.domains += [label for label in other.domains if label not in self.domains]
        row_D = np.array([self.domains.index(label) for label in other.domains], np.int64)
        for r, drops in other.of.items():
            self.of[r].merge(drops, row_D, len(self.domains))
        self.tokens += other.tokens
        self.hit_F += other.hit_F
        self.lost_F += other.lost_F
        return self


def _count(trace: Trace, chosen: Sequence[int], settings: Settings) -> Counted:
    counted, small = Counted.zero(trace.routers, chosen, settings), is_small(trace, chosen)
    asked = chosen, settings, small
    for part in summed(trace, "simulating capacity", Counted.add, _count_shard, *asked):
        counted.add(part)
    if not counted.tokens:
        raise MoeInspectError(f"{trace.path} holds no tokens yet: nothing is committed")
    return counted


def _count_shard(shard: Shard, chosen: Sequence[int], settings: Settings, small: bool) -> Counted:
    routers, F = shard.trace.routers, len(settings.factors)
    counted = Counted.zero(routers, chosen, settings)
    table = shard.tokens(["document", "sequence", "batch", "domain"])
    domain_T, counted.domains = _domains(table)
    hit_T, lost_T = np.zeros(len(domain_T), np.uint8), np.zeros(len(domain_T), np.uint8)
    of_stack: dict[str, Groups] = {}
    for r in chosen:
        stack = routers[r].stack
        if stack not in of_stack:
            of_stack[stack] = groups_of(
                table, shard.seen(r), settings.group_tokens, domain_T, len(counted.domains)
            )
        groups = of_stack[stack]
        drops = drops_of(shard, r, groups, settings.factors, settings.order, small)
        counted.of[r].add(drops)
        hit_T[groups.seen] = np.maximum(hit_T[groups.seen], drops.worst_T)
        lost_T[groups.seen] = np.maximum(lost_T[groups.seen], drops.best_T)
    counted.tokens = len(domain_T)
    counted.hit_F, counted.lost_F = _at_least(hit_T, F), _at_least(lost_T, F)
    return counted


def _domains(table: pa.Table) -> tuple[np.ndarray, list[str]]:
    """The domain of each token, as an index into the domains that there are. int64 [T]"""
    code_T, labels = codes(table["domain"])
    used, domain_T = np.unique(code_T, return_inverse=True)
    return domain_T.astype(np.int64), [labels[code] for code in used]


def _at_least(level_T: np.ndarray, F: int) -> np.ndarray:
    """How many tokens each factor meets: those whose level is above its index. int64 [F]"""
    return np.array([np.count_nonzero(level_T > f) for f in range(F)])


def _tables(counted: Counted, settings: Settings) -> dict[str, pd.DataFrame]:
    import pandas as pd

    main, needed, by_domain, by_position = [], [], [], []
    for r, drops in counted.of.items():
        router: dict[str, Any] = {"layer": drops.router.layer, "router": r}
        # what a larger factor drops every smaller one drops too
        dropped_FD, dropped_FPN = (
            last[::-1].cumsum(0)[::-1] for last in (drops.last_FD, drops.last_FPN)
        )
        for f, factor in enumerate(drops.factors):
            at = {**router, "capacity_factor": factor}
            main.append({**at, **_row(drops, f, int(dropped_FD[f].sum()))})
            by_domain += [
                {**at, "domain": counted.domains[d], **_rate(drops.made_D[d], dropped_FD[f, d])}
                for d in np.argsort(counted.domains[: len(drops.made_D)])
                if drops.made_D[d]
            ]
            by_position += [
                {
                    **at,
                    "position_in": position,
                    "tenth": n + 1,
                    **_rate(drops.made_PN[p, n], dropped_FPN[f, p, n]),
                }
                for p, position in enumerate(POSITIONS)
                for n in range(10)
            ]
        if drops.assignments:
            target = settings.target_drop
            needed.append({**router, "target_drop": target, **drops.needed(target)})
    columns = [
        "layer",
        "router",
        "target_drop",
        "capacity_factor",
        "simulated_drop_rate",
        "unused_capacity",
    ]
    return {
        "capacity": pd.DataFrame(main),
        "capacity_needed": pd.DataFrame(needed, columns=columns),
        "capacity_tokens": pd.DataFrame(
            {
                "capacity_factor": settings.factors,
                "tokens": counted.tokens,
                "hit_anywhere": counted.hit_F / counted.tokens,
                "lost_anywhere": counted.lost_F / counted.tokens,
            }
        ),
        "capacity_by_domain": pd.DataFrame(by_domain),
        "capacity_by_position": pd.DataFrame(by_position),
    }


def _row(drops: RouterDrops, f: int, dropped: int) -> dict[str, float]:
    kept = drops.assignments - dropped
    return {
        "simulated_drop_rate": _share(dropped, drops.assignments),
        "tokens_hit": _share(int(drops.hit_F[f]), drops.decisions),
        "tokens_lost": _share(int(drops.lost_F[f]), drops.decisions),
        "unused_capacity": 1 - _share(kept, int(drops.room_F[f])),
        "groups": drops.groups,
        "decisions": drops.decisions,
        "assignments": drops.assignments,
        "dropped": dropped,
    }


def _rate(made: Any, dropped: Any) -> dict[str, float]:
    return {
        "assignments": int(made),
        "dropped": int(dropped),
        "simulated_drop_rate": _share(int(dropped), int(made)),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _middle(factors: Sequence[float]) -> float:
    return factors[len(factors) // 2]


def _group(group: int | str) -> str:
    return {"batch": "a forward pass", "sequence": "a sequence"}.get(str(group), f"{group} tokens")


def verdict(
    tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]
) -> list[str]:
    """Plain sentences, most important first."""
    factor = _middle(settings["capacity_factors"])
    main, across, needed = (
        tables[name] for name in ("capacity", "capacity_tokens", "capacity_needed")
    )
    at = main[main["capacity_factor"] == factor].dropna(subset=["simulated_drop_rate"])
    if at.empty:
        return ["Simulated: no router made an assignment, so nothing could be dropped."]
    worst = at.loc[at["simulated_drop_rate"].idxmax()]
    everywhere = across[across["capacity_factor"] == factor].iloc[0]
    sentences = [
        f"Simulated: at capacity factor {factor:g}, in groups of "
        f"{_group(settings['group_tokens'])}, layer {label_of[worst['router']]} would drop most: "
        f"{worst['simulated_drop_rate']:.1%} of its assignments; {worst['tokens_hit']:.1%} of its "
        f"tokens would lose an expert and {worst['tokens_lost']:.1%} all of them.",
        f"Simulated, over all layers: {everywhere['hit_anywhere']:.1%} of tokens would lose an "
        "expert in at least one layer, and "
        f"{everywhere['lost_anywhere']:.1%} all experts of a layer.",
    ]
    most = needed.loc[needed["capacity_factor"].idxmax()]
    sentences.append(
        f"Simulated: dropping at most {100 * settings['target_drop']:.3g}% of every layer's "
        f"assignments takes a factor of {most['capacity_factor']:.2f} (layer "
        f"{label_of[most['router']]}), which leaves {most['unused_capacity']:.0%} of that layer's "
        "capacity unused."
    )
    ends = tables["capacity_by_position"].query(
        "capacity_factor == @factor and router == @worst.router"
    )
    for position in POSITIONS[:1] if settings["group_tokens"] == "sequence" else POSITIONS:
        rate = ends[ends["position_in"] == position].set_index("tenth")["simulated_drop_rate"]
        sentences.append(
            f"Simulated, layer {label_of[worst['router']]}, drop rate by position in the "
            f"{position}: first tenth {rate[1]:.1%}, last tenth {rate[10]:.1%}."
        )
    return sentences


def chart(tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]) -> Chart:
    """What each layer drops; and where in its document and group the worst layer's drops fall."""
    factors, main = settings["capacity_factors"], tables["capacity"]
    routers = list(main["router"].unique())
    rate_of = main.pivot(index="capacity_factor", columns="router", values="simulated_drop_rate")[
        routers
    ]
    x = np.arange(len(routers), dtype=float)
    by_layer = [
        Line(x, rate_of.loc[f].to_numpy(float), f"capacity factor {f:g}", *look(i), dots=True)
        for i, f in enumerate(factors)
    ]
    factor = _middle(factors)
    worst = rate_of.loc[factor].fillna(-1).idxmax()
    ends = tables["capacity_by_position"]
    ends = ends[(ends["capacity_factor"] == factor) & (ends["router"] == worst)]
    by_position = list[Line]()
    for position, colour, dash in zip(POSITIONS, SERIES, DASHES, strict=False):
        at = ends[ends["position_in"] == position]
        x, y = at["tenth"].to_numpy(float) - 1, at["simulated_drop_rate"].to_numpy(float)
        by_position.append(Line(x, y, f"tenth of the {position}", colour, dash, True))
    layers = Axis("layer", tuple(label_of[r] for r in routers))
    tenths = Axis("tenth (10 is the end)", tuple(str(i) for i in range(1, 11)))
    rate = Axis("share of assignments dropped", low=0)
    where = f"Layer {label_of[worst]} at factor {factor:g}, by position"
    group = _group(settings["group_tokens"])
    return Chart(
        "Capacity of experts",
        f"Share of the assignments that are dropped, in groups of {group}",
        (
            Panel(tuple(by_layer), layers, rate, "By layer"),
            Panel(tuple(by_position), tenths, rate, where),
        ),
        text=SIMULATED + "An expert takes at most its even share of a group × the capacity factor.",
        columns=2,
        name="capacity",
    )

"""`simulate capacity`: what a capacity factor would drop, of routing that dropped nothing.

An expert takes capacity = ceil(cf · G · k / E) assignments of a group of G tokens (GShard,
arXiv:2006.16668; Switch, arXiv:2101.03961); what comes later in its queue is dropped. The tokens'
later choices are those recorded: a real drop would change them.

T tokens, E experts, G groups, F capacity factors (ascending), D domains, P POSITIONS (in the
document, in the group), N tenths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
    at_least,
    drops_of,
    groups_of,
)
from moe_inspect.simulate.result import SIMULATED, Simulation, need_decisions, repeatable
from moe_inspect.simulate.shards import Seen, routed
from moe_inspect.text import layer_label
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.shard import Shard, codes

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


ORDERS = {
    "arrival": "first choices of all tokens, then second choices (GShard)",
    "token": "token after token, each with all its choices (Switch)",
    "weight": "the highest gate weight first",
}
MOST_FACTORS = 50


@dataclass(frozen=True)
class Settings:
    """`capacity_factors`: ascending. `target_drop`: the drop rate for which the least factor is
    sought."""

    capacity_factors: tuple[float, ...]
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
    trace = open_trace(trace)
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
    shown = vars(settings)
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
    factors, group, order = settings.capacity_factors, settings.group_tokens, settings.order
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


@dataclass
class Counted:
    """The drops of every router; the domains that made_D and last_FD count by; and the tokens of
    the trace, with those that lose an assignment in any layer (hit_F) and all of some layer's
    (lost_F)."""

    of: dict[int, Drops]
    domains: list[str]
    tokens: int
    hit_F: np.ndarray
    lost_F: np.ndarray

    def add(self, other: Counted) -> Counted:
        """Adds `other` in place."""
        self.domains += [label for label in other.domains if label not in self.domains]
        row_D = np.array([self.domains.index(label) for label in other.domains], np.int64)
        for r, drops in other.of.items():
            self.of[r].add(drops, row_D, len(self.domains))
        self.tokens += other.tokens
        self.hit_F += other.hit_F
        self.lost_F += other.lost_F
        return self


def _count(trace: Trace, chosen: Sequence[int], settings: Settings) -> Counted:
    if not trace.n_tokens:
        raise MoeInspectError(f"{trace.path} holds no tokens yet: nothing is committed")
    parts = summed(trace, "simulating capacity", Counted.add, _count_shard, chosen, settings)
    return reduce(Counted.add, parts)


def _count_shard(shard: Shard, chosen: Sequence[int], settings: Settings) -> Counted:
    factors, order = settings.capacity_factors, settings.order
    table = shard.tokens(["document", "sequence", "batch", "domain"])
    domain_T, domains = _domains(table)
    hit_T, lost_T = np.zeros(len(domain_T), np.uint8), np.zeros(len(domain_T), np.uint8)

    def groups_before(_: int, seen: Seen) -> Groups:
        return groups_of(table, seen, settings.group_tokens, domain_T, len(domains))

    of = dict[int, Drops]()
    for r, groups, ids_KT in routed(shard, chosen, groups_before):
        of[r], worst_T, best_T = drops_of(shard, r, groups, ids_KT, factors, order)
        hit_T[groups.seen] = np.maximum(hit_T[groups.seen], worst_T)
        lost_T[groups.seen] = np.maximum(lost_T[groups.seen], best_T)
    F = len(factors)
    return Counted(of, domains, len(domain_T), at_least(hit_T, F), at_least(lost_T, F))


def _domains(table: pa.Table) -> tuple[np.ndarray, list[str]]:
    """The domain of each token, as an index into the domains that there are. int64 [T]"""
    code_T, labels = codes(table["domain"])
    used, domain_T = np.unique(code_T, return_inverse=True)
    return domain_T.astype(np.int64), [labels[code] for code in used]


def _tables(counted: Counted, settings: Settings) -> dict[str, pd.DataFrame]:
    import pandas as pd

    main, needed, by_domain, by_position = [], [], [], []
    for r, drops in counted.of.items():
        router: dict[str, Any] = {"layer": drops.router.layer, "router": r}
        # what a larger factor drops every smaller one drops too
        dropped_FD, dropped_FPN = (
            last[::-1].cumsum(0)[::-1] for last in (drops.last_FD, drops.last_FPN)
        )
        for f, factor in enumerate(settings.capacity_factors):
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
                "capacity_factor": settings.capacity_factors,
                "tokens": counted.tokens,
                "hit_anywhere": counted.hit_F / counted.tokens,
                "lost_anywhere": counted.lost_F / counted.tokens,
            }
        ),
        "capacity_by_domain": pd.DataFrame(by_domain),
        "capacity_by_position": pd.DataFrame(by_position),
    }


def _row(drops: Drops, f: int, dropped: int) -> dict[str, float]:
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

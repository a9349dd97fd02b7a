"""`simulate cache`: experts on a slow memory, `slots` of each layer in a fast one. How often is an
expert already there?

What is accessed, exactly: each router has its own slots, empty at first and kept from one text to
the next. Sequences run one after the other, in the order in which they began, each token by token
(batch size 1), also where the trace was prefilled at once; one that goes on in a later shard goes
on there. The
k experts of a decision are wanted together: hits are counted before any is loaded, all that miss
are loaded, and none of the k makes room for another, so slots >= k. The first touch of an expert is
a cold miss, under any policy.

T tokens, K slots of a decision, E experts, P phases, S numbers of slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.result import Simulation, need_decisions
from moe_inspect.simulate.shards import check_length, is_small
from moe_inspect.simulate.shards import slots as slots_of
from moe_inspect.text import layer_label
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.shard import Shard, codes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# a hot set is worth caching where it serves this many times the accesses that even load would
HOT = 1.2
NEVER = 2**62

POLICIES: dict[str, Callable[[int, Past], Any]] = {}


class Past:
    """What a policy may look at: `last[e]` and `count[e]` of the accesses so far; `next[e]`, the
    decision that wants e again."""

    def __init__(self) -> None:
        self.last: dict[int, int] = {}
        self.count: dict[int, int] = {}
        self.next: dict[int, int] = {}


def policy(function: Callable[[int, Past], Any]) -> Callable[[int, Past], Any]:
    """Registers who makes room: the expert with the least value."""
    POLICIES[function.__name__] = function
    return function


@policy
def lru(e: int, past: Past) -> Any:
    """The least recently used; of one decision the earlier choice."""
    return past.last[e]


@policy
def lfu(e: int, past: Past) -> Any:
    """The least used since the trace began; of equals the least recently used."""
    return past.count[e], past.last[e]


@policy
def belady(e: int, past: Past) -> Any:
    """The one wanted again last: no policy hits more often, and none that cannot see the future can
    be it."""
    return -past.next[e]


def replay(ids_KT: np.ndarray, slots: int, name: str) -> np.ndarray:
    """Hits of each decision. ids_KT: experts, −1 for none. int64 [T]"""
    stream = [[e for e in row if e >= 0] for row in ids_KT.T.tolist()]
    upcoming: dict[int, int] = {}
    next_of: list[list[int]] = []
    for t, wanted in reversed(list(enumerate(stream))):
        next_of.append([upcoming.get(e, NEVER) for e in wanted])
        upcoming.update(dict.fromkeys(wanted, t))
    next_of.reverse()
    least, past, held, hits_T, accesses = (
        POLICIES[name],
        Past(),
        set(),
        np.zeros(len(stream), np.int64),
        0,
    )
    for t, wanted in enumerate(stream):
        hits_T[t] = sum(e in held for e in wanted)
        for e, again in zip(wanted, next_of[t], strict=True):
            past.last[e], past.count[e], past.next[e] = accesses, past.count.get(e, 0) + 1, again
            accesses += 1
        for e in wanted:
            if e not in held:
                if len(held) == slots:
                    held.remove(min(held.difference(wanted), key=lambda x: least(x, past)))
                held.add(e)
    return hits_T


def simulate_cache(
    trace: Trace | str | Path,
    *,
    slots: Sequence[int] | None = None,
    policies: Sequence[str] = ("lru", "lfu", "belady"),
    expert_mb: float | None = None,
    gb_per_s: float | None = None,
    layers: str | int | Iterable[int] | None = None,
) -> Simulation:
    """How often an expert is in one of a layer's `slots` when it is wanted. `slots`: default k, 2k
    and 4k. With `expert_mb` (10^6 bytes an expert) and `gb_per_s` (10^9 bytes a second over the
    link): what the transfers alone allow."""
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    need_decisions(trace, "simulate cache")
    chosen = select(trace, layers=layers).routers
    sizes = _sizes(trace, chosen, slots)
    unknown = [name for name in policies if name not in POLICIES]
    if unknown or not policies:
        raise MoeInspectError(
            f"no policy {', '.join(unknown) or 'given'}: there are {', '.join(POLICIES)}"
        )
    if (expert_mb is None) != (gb_per_s is None):
        raise MoeInspectError(
            "tokens a second need both the size of an expert and the link: give --expert-mb and "
            "--gb-per-s"
        )
    if (
        expert_mb is not None
        and gb_per_s is not None
        and not (0 < expert_mb < inf and 0 < gb_per_s < inf)
    ):
        raise MoeInspectError(
            f"expert size {expert_mb} MB over {gb_per_s} GB/s: give finite numbers above 0"
        )
    names = list(dict.fromkeys(policies))
    small = is_small(trace, chosen, 4 * len(names) * len(sizes))
    caches = {
        r: (Plain if small else Compiled)(trace.routers[r].experts, sizes, names) for r in chosen
    }
    tokens = 0
    for shard in trace.shards:
        order_of: dict[str, tuple[np.ndarray | None, np.ndarray]] = {}
        tokens += shard.files.tokens
        for r in chosen:
            stack = trace.routers[r].stack
            if stack not in order_of:
                order_of[stack] = _stream(shard, r)
            order_T, phase_T = order_of[stack]
            ids_KT = slots_of(shard, r)
            check_length(ids_KT.T, len(phase_T), r)
            caches[r].feed(
                ids_KT if order_T is None else np.ascontiguousarray(ids_KT[:, order_T]), phase_T
            )
    if not tokens:
        raise MoeInspectError(f"{trace.path} holds no tokens yet: nothing is committed")
    tables = _tables(trace, caches, tokens, sizes, names, expert_mb, gb_per_s)
    settings: dict[str, object] = {
        "slots": sizes,
        "policies": names,
        "expert_mb": expert_mb,
        "gb_per_s": gb_per_s,
        "batch_size": 1,
    }
    label_of = {r: layer_label(trace.routers, r) for r in chosen}
    return Simulation(
        "cache",
        tables,
        _verdict(tables, settings),
        settings,
        lambda: _figure(tables, settings, label_of),
        ("cache", "cache_speed"),
    )


def _sizes(trace: Trace, chosen: Iterable[int], slots: Sequence[int] | None) -> list[int]:
    most = max(chosen, key=lambda r: trace.routers[r].top_k)
    k, E = trace.routers[most].top_k, max(trace.routers[r].experts for r in chosen)
    sizes = sorted(set(slots)) if slots else sorted({min(n * k, E) for n in (1, 2, 4)})
    if sizes[0] < k:
        raise MoeInspectError(
            f"{sizes[0]} slots hold less than one decision of layer "
            f"{layer_label(trace.routers, most)}: give at least {k}"
        )
    return sizes


def _stream(shard: Shard, router: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The order in which batch size 1 runs the tokens that reach the router (None: as they lie),
    and their phases in that order."""
    table = shard.tokens(["sequence", "phase"])
    seen = shard.seen(router)
    kept = slice(None) if seen is None else seen
    code_T, labels = codes(table["phase"])
    phase_T = np.array([PHASES.index(label) for label in labels], np.uint8)[code_T][kept]
    _, first, of_T = np.unique(
        table["sequence"].to_numpy()[kept], return_index=True, return_inverse=True
    )
    began_T = first[of_T]
    if (np.diff(began_T) >= 0).all():
        return None, phase_T
    order_T = np.argsort(began_T, kind="stable")
    return order_T, phase_T[order_T]


class Plain:
    """The caches of one router. Small traces: all decisions are kept, and replayed for each policy
    and number of slots."""

    def __init__(self, E: int, sizes: Sequence[int], names: Sequence[str]) -> None:
        self.sizes, self.names, self.load_E = sizes, names, np.zeros(E, np.int64)
        self.decisions_P, self.accesses_P, self.cold_P = (
            np.zeros(len(PHASES), np.int64) for _ in range(3)
        )
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def feed(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> None:
        self.decisions_P += np.bincount(phase_T, minlength=len(PHASES))
        self.run(ids_KT, phase_T)

    def run(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> None:
        there_KT = ids_KT >= 0
        self.accesses_P += np.bincount(phase_T, there_KT.sum(0), len(PHASES)).astype(np.int64)
        self.load_E += np.bincount(ids_KT[there_KT], minlength=len(self.load_E))
        self.parts.append((ids_KT, phase_T))

    def hits(self) -> dict[tuple[str, int], np.ndarray]:
        """Of each policy and number of slots, by phase. Also settles what else is counted by
        phase."""
        if not self.parts:
            return {
                (name, size): np.zeros(len(PHASES), np.int64)
                for name in self.names
                for size in self.sizes
            }
        ids_KT, phase_T = (
            np.concatenate([part[i] for part in self.parts], axis=-1) for i in (0, 1)
        )
        experts, first = np.unique(ids_KT.T.ravel(), return_index=True)
        self.cold_P = np.bincount(
            phase_T[first[experts >= 0] // len(ids_KT)], minlength=len(PHASES)
        )
        return {
            (name, size): np.bincount(phase_T, replay(ids_KT, size, name), len(PHASES)).astype(
                np.int64
            )
            for name in self.names
            for size in self.sizes
        }


class Compiled(Plain):
    """The same for traces of any length: what a cache holds is carried from shard to shard, in
    memory for E experts."""

    def __init__(self, E: int, sizes: Sequence[int], names: Sequence[str]) -> None:
        super().__init__(E, sizes, names)
        kind = np.int8 if E <= 256 else np.int16
        self.rank_E = (np.arange(E) + np.iinfo(kind).min).astype(kind)
        self.known, self.at_PE = np.zeros(1, np.int64), np.zeros((len(PHASES), E), np.int64)
        self.done = {
            (name, size): np.zeros(len(PHASES), np.int64)
            for name in names
            if name != "lru"
            for size in sizes
        }
        fresh: dict[str, Callable[[], tuple[np.ndarray, ...]]] = {
            "lfu": lambda: (
                np.zeros(E, np.bool_),
                np.zeros(E, np.int64),
                np.zeros(E + 1, np.int64),
            ),
            "belady": lambda: (np.zeros(E, np.int16), np.zeros(E, np.int64), np.zeros(1, np.int64)),
        }
        self.held = {(name, size): fresh[name]() for name, size in self.done}

    def lru(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> tuple[Any, ...]:
        """What `kernels_numba.lru` takes."""
        return tuple(ids_KT), phase_T, self.rank_E, self.known, self.load_E, self.at_PE, self.cold_P

    def run(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> None:
        from moe_inspect.simulate import kernels_numba

        kernels_numba.lru(
            *self.lru(ids_KT, phase_T)
        )  # also where not asked for: it counts accesses
        for (name, size), held in self.held.items():
            getattr(kernels_numba, name)(ids_KT, phase_T, size, *held, self.done[name, size])

    def hits(self) -> dict[tuple[str, int], np.ndarray]:
        self.accesses_P = self.at_PE.sum(1) + self.cold_P
        of_lru = {("lru", size): self.at_PE[:, :size].sum(1) for size in self.sizes}
        return {
            (name, size): (of_lru | self.done)[name, size]
            for name in self.names
            for size in self.sizes
        }


def _tables(
    trace: Trace,
    caches: dict[int, Plain],
    tokens: int,
    sizes: list[int],
    names: list[str],
    expert_mb: float | None,
    gb_per_s: float | None,
) -> dict[str, pd.DataFrame]:
    import pandas as pd

    rows, by_phase = [], []
    misses = {(name, size): 0 for name in names for size in sizes}
    for r, cache in caches.items():
        hits, E = cache.hits(), trace.routers[r].experts
        hottest_E = np.append(0, np.sort(cache.load_E)[::-1].cumsum())
        key = {"layer": trace.routers[r].layer, "router": r}
        for (name, size), hits_P in hits.items():
            made, cold, hit = (
                int(cache.accesses_P.sum()),
                int(cache.cold_P.sum()),
                int(hits_P.sum()),
            )
            misses[name, size] += made - hit
            at = {**key, "policy": name, "slots": size}
            rows.append(
                {
                    **at,
                    **_rates(made, cold, hit, int(cache.decisions_P.sum())),
                    "even_share": min(size / E, 1.0),
                    "hot_set_share": int(hottest_E[min(size, E)]) / made if made else float("nan"),
                }
            )
            for p in np.flatnonzero(cache.decisions_P):
                rates = _rates(
                    int(cache.accesses_P[p]),
                    int(cache.cold_P[p]),
                    int(hits_P[p]),
                    int(cache.decisions_P[p]),
                )
                by_phase.append({**key, "phase": PHASES[p], "policy": name, "slots": size, **rates})
    speed = []
    for (name, size), count in misses.items():
        at = {"policy": name, "slots": size, "transfers_per_token": count / tokens}
        if expert_mb and gb_per_s:
            mb = count / tokens * expert_mb
            held = sum(min(size, trace.routers[r].experts) for r in caches)
            at |= {
                "mb_per_token": mb,
                "tokens_per_s": 1000 * gb_per_s / mb if mb else float("inf"),
                "held_gb": held * expert_mb / 1000,
            }
        speed.append(at)
    return {
        "cache": pd.DataFrame(rows),
        "cache_speed": pd.DataFrame(speed),
        "cache_by_phase": pd.DataFrame(by_phase),
    }


def _rates(made: int, cold: int, hit: int, decisions: int) -> dict[str, float]:
    return {
        "hit_rate": hit / made if made else float("nan"),
        "hit_rate_warm": hit / (made - cold) if made > cold else float("nan"),
        "accesses": made,
        "hits": hit,
        "cold_misses": cold,
        "transfers_per_token": (made - hit) / decisions if decisions else float("nan"),
    }


def _verdict(tables: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    main, speed = tables["cache"].dropna(subset=["hit_rate"]), tables["cache_speed"]
    if main.empty:
        return ["Simulated: no router made an assignment, so nothing could be cached."]
    size = settings["slots"][len(settings["slots"]) // 2]
    at = main[main["slots"] == size]
    once = at.drop_duplicates("router")
    said = [_hot_set(once, size)]
    for name in settings["policies"]:
        rate = at[at["policy"] == name]["hit_rate"]
        bound = " (the bound: it sees the future)" if name == "belady" else ""
        said.append(
            f"Simulated, {size} slots a layer, {name}{bound}: hit rate "
            f"{_percents(rate.min(), rate.max())} by layer."
        )
    if "tokens_per_s" in speed:
        real = speed[(speed["slots"] == size) & (speed["policy"] != "belady")]
        best = (
            (real if len(real) else speed[speed["slots"] == size])
            .nlargest(1, "tokens_per_s")
            .iloc[0]
        )
        said.append(
            f"Simulated: {settings['expert_mb']:g} MB an expert over {settings['gb_per_s']:g} "
            f"GB/s allow at most {best['tokens_per_s']:,.1f} tokens/s "
            f"({best['policy']}{'' if len(real) else ', which no real cache reaches'}, "
            f"{best['slots']:.0f} slots a layer, {best['held_gb']:.2f} GB held), if transfers "
            "were all that took time."
        )
    cold = once["cold_misses"].sum() / once["accesses"].sum()
    said.append(
        f"Cold start: caches begin empty; first touches are {cold:.2%} of accesses and count as "
        "misses (hit_rate_warm leaves them out)."
    )
    return said


def _hot_set(once: Any, size: int) -> str:
    """Whether the busiest experts of each layer are wanted so often that holding them pays. once: a
    row a router."""
    if (HOT * once["even_share"] >= 1).all():
        return (
            f"A hot set worth caching? With {size} slots nearly all experts are in: ask with fewer."
        )
    hot = int((once["hot_set_share"] >= HOT * once["even_share"]).sum())
    return (
        f"A hot set worth caching? {'Yes' if hot == len(once) else 'In part' if hot else 'No'}: "
        f"in {hot} of {len(once)} layers the {size} busiest "
        f"experts get at least {HOT:g}x what even load would give them "
        f"({_percents(once['hot_set_share'].min(), once['hot_set_share'].max())} of "
        f"accesses; even: {_percents(once['even_share'].min(), once['even_share'].max())})."
    )


def _percents(low: float, high: float) -> str:
    return f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"


def _figure(tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]) -> Figure:
    """Left: hit rate by number of slots, over the layers. Right: by layer, at one number of
    slots."""
    from matplotlib.figure import Figure

    main = tables["cache"]
    colours = {"lru": "#2980b9", "lfu": "#27ae60", "belady": "#2c3e50"}
    size = settings["slots"][len(settings["slots"]) // 2]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in settings["policies"]:
        by_size = main[main["policy"] == name].groupby("slots")["hit_rate"]
        left.plot(by_size.mean(), "o-", ms=4, lw=1.2, color=colours[name], label=name)
        left.fill_between(
            by_size.mean().index,
            by_size.min(),
            by_size.max(),
            color=colours[name],
            alpha=0.12,
            lw=0,
        )
        at = main[(main["policy"] == name) & (main["slots"] == size)]
        right.plot(
            range(len(at)), at["hit_rate"], "o-", ms=4, lw=1.2, color=colours[name], label=name
        )
    left.plot(
        main.groupby("slots")["even_share"].mean(),
        ":",
        color="0.4",
        label="slots ÷ experts: what chance hits",
    )
    right.plot(
        range(len(at)),
        at["hot_set_share"],
        "_",
        ms=12,
        mew=1.5,
        color="#c0392b",
        label=f"share of the {size} busiest experts",
    )
    step = max(1, len(at) // 24)
    right.set_xticks(
        range(0, len(at), step), [label_of[r] for r in at["router"].iloc[::step]], fontsize=8
    )
    left.set(xlabel="slots a layer", ylabel="hit rate", xticks=settings["slots"], ylim=(0, 1.02))
    right.set(xlabel="layer", ylim=(0, 1.02))
    left.set_title(
        "Simulated hit rate: mean over layers, band from least to most", loc="left", fontsize=10
    )
    right.set_title(f"By layer, {size} slots", loc="left", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure

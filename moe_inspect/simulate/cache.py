"""`simulate cache`: experts in slow memory, `slots` of each layer in fast memory. How often is an
expert in fast memory when it is wanted?

Each router has its own slots, empty at first and kept from one text to the next. Sequences run one
after the other, in the order in which they began, token by token (batch size 1), also where the
trace was prefilled in larger batches; a sequence that goes on in a later shard goes on there. The k
experts of a decision are wanted together: hits are counted before any is loaded, all that miss are
loaded, and none of the k evicts another, so slots >= k. The first access to an expert is a cold
miss under any policy.

T tokens, K slots of a decision, E experts, P phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.gguf import expert_mb_of
from moe_inspect.reporting.charts.spec import DASHES, SERIES, Axis, Chart, Line, Mark, Panel, Points
from moe_inspect.simulate import kernels_numba, result
from moe_inspect.simulate.result import Labels, Settings, Tables
from moe_inspect.simulate.shards import Seen, routed
from moe_inspect.text import layer_label, plural
from moe_inspect.trace.reader import Trace, shards_of
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.shard import Shard, codes

POLICIES = {
    "lru": "evicts the least recently used; of one decision the earlier choice",
    "lfu": "evicts the least used since the trace began; of equals the least recently used",
    "belady": "evicts what is used again last: the upper bound of any policy, which only one that "
    "knows the future reaches",
}
# what a cache of E experts holds at first, the arguments of its kernel: as that describes them
FRESH: dict[str, Callable[[int], tuple[np.ndarray, ...]]] = {
    "lfu": lambda E: (np.zeros(E, int), np.full(E, -1), np.zeros(E, int), np.zeros(1, int)),
    "belady": lambda E: (*np.zeros((3, E), np.int32), np.zeros(1, int)),
}


class Cache:
    """The caches of one router: one for each policy (`names`) and number of slots (`sizes`). What a
    cache holds is carried from shard to shard, in memory for E experts."""

    def __init__(self, E: int, sizes: Sequence[int], names: Sequence[str]) -> None:
        P = len(PHASES)
        self.keys = [(name, size) for name in names for size in sizes]
        self.decisions_P, self.cold_P = np.zeros((2, P), np.int64)
        # of LRU, also where it is not asked for: it counts accesses
        self.load_E, self.at_PE = np.zeros(E, np.int64), np.zeros((P, E), np.int64)
        self.known, self.rank_E = np.zeros(1, np.int64), np.arange(E, dtype=np.int32)
        # of the others
        self.state = {(name, size): FRESH[name](E) for name, size in self.keys if name != "lru"}
        self.done = {key: np.zeros(P, np.int64) for key in self.state}

    def feed(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> None:
        """An expert that a decision names twice, as only damaged traces do, is requested once."""
        for k in range(1, len(ids_KT)):
            again_T = (ids_KT[:k] == ids_KT[k]).any(0) & (ids_KT[k] >= 0)
            if again_T.any():
                ids_KT = ids_KT.copy()
                ids_KT[k, again_T] = -1
        self.decisions_P += np.bincount(phase_T, minlength=len(PHASES))
        counts = self.load_E, self.at_PE, self.cold_P
        kernels_numba.lru(tuple(ids_KT), phase_T, self.rank_E, self.known, *counts)
        for (name, size), state in self.state.items():
            getattr(kernels_numba, name)(ids_KT, phase_T, size, *state, self.done[name, size])

    @property
    def accesses_P(self) -> np.ndarray:
        return self.at_PE.sum(1) + self.cold_P

    def hits(self) -> dict[tuple[str, int], np.ndarray]:
        """Hits of each (policy, number of slots) by phase, int64 [P]."""
        return {
            (name, size): self.at_PE[:, :size].sum(1) if name == "lru" else self.done[name, size]
            for name, size in self.keys
        }


@result.repeatable
def simulate_cache(
    trace: Trace | str | Path,
    *,
    slots: int | Sequence[int] | None = None,
    policies: Sequence[str] = ("lru", "lfu", "belady"),
    expert_mb: float | None = None,
    gb_per_s: float | None = None,
    gguf: str | Path | None = None,
    layers: str | int | Iterable[int | str] | None = None,
) -> result.Simulation:
    """How often an expert is in one of a layer's `slots` when it is wanted.

    `slots`: numbers of slots per layer, k or more; default k, 2k and 4k. `policies`: names of
    POLICIES. `expert_mb` (size of an expert, 10^6 bytes) with `gb_per_s` (bandwidth of the link,
    10^9 bytes per second): also the tokens per second that transfers allow. `gguf`: a GGUF of the
    model, which gives the size of each layer's experts as quantised. `layers`: what is selected.

    Tables: cache (a row per router, policy and number of slots), cache_speed (per policy and number
    of slots, all layers), cache_by_phase. MoeInspectError for settings out of range and for traces
    without decisions."""
    trace = result.with_decisions(trace, "simulate cache")
    selection = select(trace, layers=layers)
    chosen = selection.routers
    sizes, names = _sizes(trace, chosen, slots), list(dict.fromkeys(policies))
    if gguf is not None and expert_mb is not None:
        raise MoeInspectError("--expert-mb and --gguf exclude each other: give one")
    mb_of = None if expert_mb is None else dict.fromkeys(chosen, expert_mb)
    if gguf is not None:
        mb_of = expert_mb_of(Path(gguf), {r: trace.routers[r] for r in chosen})
    if (unknown := [name for name in names if name not in POLICIES]) or not names:
        raise MoeInspectError(
            f"no policy {', '.join(unknown) or 'given'}: there are {', '.join(POLICIES)}"
        )
    if (mb_of is None) != (gb_per_s is None):
        raise MoeInspectError(
            "tokens per second need both the size of an expert and the bandwidth of the link: give "
            "--expert-mb (or --gguf) and --gb-per-s"
        )
    for size in (mb_of or {}).values():
        if not (0 < size < inf and 0 < (gb_per_s or 0) < inf):
            raise MoeInspectError(
                f"expert size {size} MB over {gb_per_s} GB/s: give finite numbers above 0"
            )
    caches = _replay(trace, chosen, sizes, names)
    settings: Settings = {
        "slots": sizes,
        "policies": names,
        "expert_mb": mb_of and float(np.mean([*mb_of.values()])),
        "gb_per_s": gb_per_s,
        "batch_size": 1,
    }
    tables = _tables(trace, caches, mb_of, gb_per_s)
    shown = ("cache", "cache_speed")
    few = result.too_few(trace, selection)
    return result.simulation(trace, few, tables, settings, verdict, chart, shown)


def _replay(
    trace: Trace, routers: Sequence[int], sizes: Sequence[int], names: Sequence[str]
) -> dict[int, Cache]:
    caches = {r: Cache(trace.routers[r].experts, sizes, names) for r in routers}
    for shard in shards_of(trace, "simulating cache"):
        for r, (order_T, phase_T), ids_KT in routed(shard, routers, partial(_order, shard)):
            caches[r].feed(np.ascontiguousarray(ids_KT[:, order_T]), phase_T)
    return caches


def _sizes(trace: Trace, chosen: Iterable[int], slots: int | Sequence[int] | None) -> list[int]:
    most = max(chosen, key=lambda r: trace.routers[r].top_k)
    k, E = trace.routers[most].top_k, max(trace.routers[r].experts for r in chosen)
    given = [min(n * k, E) for n in (1, 2, 4)] if slots is None else slots
    sizes = sorted({given} if isinstance(given, int) else set(given))
    if not sizes:
        raise MoeInspectError("slots is empty: give the number of slots")
    if sizes[0] < k:
        raise MoeInspectError(
            f"{plural(sizes[0], 'slot')} {'holds' if sizes[0] == 1 else 'hold'} less than one "
            f"decision of layer {layer_label(trace.routers, most)}: give at least {k}"
        )
    return sizes


def _order(shard: Shard, router: int, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """The order in which batch size 1 runs these tokens, and their phases in that order."""
    table = shard.tokens(["sequence", "phase"])
    code_T, labels = codes(table["phase"])
    phase_T = np.array([PHASES.index(label) for label in labels], np.uint8)[code_T][seen]
    _, first, of_T = np.unique(
        table["sequence"].to_numpy()[seen], return_index=True, return_inverse=True
    )
    order_T = np.argsort(first[of_T], kind="stable")
    return order_T, phase_T[order_T]


def _tables(
    trace: Trace, caches: dict[int, Cache], mb_of: dict[int, float] | None, gb_per_s: float | None
) -> dict[str, pd.DataFrame]:
    rows, by_phase = [], []
    missed = dict[tuple[str, int], dict[int, int]]()
    for r, cache in caches.items():
        hottest_E = np.append(0, np.sort(cache.load_E)[::-1].cumsum())
        made, E = int(cache.accesses_P.sum()), trace.routers[r].experts
        key = {"layer": trace.routers[r].layer, "router": r}
        for (name, size), hits_P in cache.hits().items():
            missed.setdefault((name, size), {})[r] = made - int(hits_P.sum())
            at = {**key, "policy": name, "slots": size}
            shares = {
                "even_share": min(size / E, 1.0),
                "hot_set_share": int(hottest_E[min(size, E)]) / made if made else float("nan"),
            }
            rows.append(at | _rates(cache, hits_P, slice(None)) | shares)
            by_phase += [
                {**key, "phase": PHASES[p], **at, **_rates(cache, hits_P, p)}
                for p in np.flatnonzero(cache.decisions_P).tolist()
            ]
    speed = []
    for (name, size), misses in missed.items():
        per_token = sum(misses.values()) / trace.n_tokens
        row = {"policy": name, "slots": size, "transfers_per_token": per_token}
        if mb_of and gb_per_s:
            mb = sum(n * mb_of[r] for r, n in misses.items()) / trace.n_tokens
            held = sum(min(size, trace.routers[r].experts) * mb_of[r] for r in misses)
            row |= {
                "mb_per_token": mb,
                "tokens_per_s": 1000 * gb_per_s / mb if mb else inf,
                "held_gb": held / 1000,
            }
        speed.append(row)
    return {
        "cache": pd.DataFrame(rows),
        "cache_speed": pd.DataFrame(speed),
        "cache_by_phase": pd.DataFrame(by_phase),
    }


def _rates(cache: Cache, hits_P: np.ndarray, phases: int | slice) -> dict[str, float]:
    """What the hits of some phases come to. NaN where there is nothing to divide by."""
    made, cold, hit, decisions = (
        int(counts_P[phases].sum())
        for counts_P in (cache.accesses_P, cache.cold_P, hits_P, cache.decisions_P)
    )
    return {
        "hit_rate": hit / made if made else float("nan"),
        "hit_rate_warm": hit / (made - cold) if made > cold else float("nan"),
        "accesses": made,
        "hits": hit,
        "cold_misses": cold,
        "transfers_per_token": (made - hit) / decisions if decisions else float("nan"),
    }


# a hot set is worth caching where it serves this many times the accesses that even load would
HOT = 1.2


def verdict(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    main, speed = tables["cache"].dropna(subset=["hit_rate"]), tables["cache_speed"]
    if main.empty:
        return ["Simulated: no router made an assignment, so nothing could be cached."]
    size = settings["slots"][len(settings["slots"]) // 2]
    at = main[main["slots"] == size]
    once = at.drop_duplicates("router")
    sentences = [] if settings["too_few"] else [hot_set(once, size)]
    for name in settings["policies"]:
        rate = at[at["policy"] == name]["hit_rate"]
        bound = " (the upper bound: it knows the future)" if name == "belady" else ""
        sentences.append(
            f"Simulated, {plural(size, 'slot')} per layer, {name}{bound}: hit rate "
            f"{_percents(rate)} by layer."
        )
    if "tokens_per_s" in speed:
        speed = speed[speed["slots"] == size]
        real = speed[speed["policy"] != "belady"]
        best = (real if len(real) else speed).nlargest(1, "tokens_per_s").iloc[0]
        sentences.append(
            f"Simulated: {settings['expert_mb']:g} MB per expert over {settings['gb_per_s']:g} "
            f"GB/s allow at most {best['tokens_per_s']:,.1f} tokens/s "
            f"({best['policy']}{'' if len(real) else ', which no real cache reaches'}, "
            f"{best['slots']:.0f} slots per layer, {best['held_gb']:.2f} GB held), if only "
            "transfers took time."
        )
    cold = once["cold_misses"].sum() / once["accesses"].sum()
    sentences.append(
        f"Cold start: caches begin empty; first touches are {cold:.2%} of accesses and count as "
        "misses (hit_rate_warm leaves them out)."
    )
    return sentences


def hot_set(once: pd.DataFrame, size: int) -> str:
    """Whether the busiest experts are worth caching. once: one row per router."""
    if (HOT * once["even_share"] >= 1).all():
        return (
            f"A hot set worth caching? {size} slots hold nearly all experts: simulate fewer slots."
        )
    hot = int((once["hot_set_share"] >= HOT * once["even_share"]).sum())
    return (
        f"A hot set worth caching? {'Yes' if hot == len(once) else 'In part' if hot else 'No'}: "
        f"in {hot} of {len(once)} layers the {size} busiest experts get at least {HOT:g}x what "
        f"even load would give them ({_percents(once['hot_set_share'])} of accesses; even: "
        f"{_percents(once['even_share'])})."
    )


def _percents(shares: pd.Series) -> str:
    low, high = f"{shares.min():.0%}", f"{shares.max():.0%}"
    return low if low == high else f"{low} to {high}"


def chart(tables: Tables, settings: Settings, label_of: Labels) -> Chart:
    """Hit rate by number of slots, over the layers; and by layer, at one number of slots."""
    main, sizes, names = tables["cache"], list(settings["slots"]), settings["policies"]
    size, x_S = sizes[len(sizes) // 2], np.arange(len(sizes), dtype=float)
    at = main[main["slots"] == size].set_index("policy")
    routers = at.loc[[names[0]], "router"]
    x_L = np.arange(len(routers), dtype=float)
    by_size, by_layer = list[Mark](), list[Mark]()
    for i, name in enumerate(names):
        look = SERIES[i], DASHES[i % 3], True
        rate = main[main["policy"] == name].groupby("slots")["hit_rate"]
        mean, low, high = rate.agg(["mean", "min", "max"]).reindex(sizes).to_numpy().T
        # beside each other, or the intervals would hide each other
        beside_S = x_S + 0.08 * (i - (len(names) - 1) / 2)
        by_size.append(Line(beside_S, mean, name, *look, low, high))
        by_layer.append(Line(x_L, at.loc[[name], "hit_rate"].to_numpy(), name, *look))
    even = main.groupby("slots")["even_share"].mean().reindex(sizes).to_numpy()
    by_size.append(Line(x_S, even, "slots ÷ experts", "baseline", "dot"))
    hot, said = at.loc[[names[0]], "hot_set_share"], f"share of the {size} busiest experts"
    by_layer.append(Points(x_L, hot.to_numpy(), said, "c6", "tick"))
    slots, rate = Axis("slots per layer", tuple(map(str, sizes))), Axis("hit rate", low=0, high=1)
    layers = Axis("layer", tuple(label_of[r] for r in routers))
    return Chart(
        "Cache of experts",
        "Share of the accesses to experts that a cache serves, by policy",
        (
            Panel(tuple(by_size), slots, rate, "By number of slots"),
            Panel(tuple(by_layer), layers, rate, f"By layer, {size} slots"),
        ),
        text=result.SIMULATED
        + "By number of slots: the mean over layers, the bars from the lowest layer to the "
        "highest.",
        columns=2,
        name="cache",
    )

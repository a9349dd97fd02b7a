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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.tasks import by_router
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.gguf.experts import expert_mb_of
from moe_inspect.simulate.cache.policies import POLICIES, Cache, CompiledCache
from moe_inspect.simulate.cache.text import chart, verdict
from moe_inspect.simulate.result import Simulation, need_decisions, repeatable
from moe_inspect.simulate.shards import check_length, is_small
from moe_inspect.simulate.shards import slots as slots_of
from moe_inspect.text import layer_label, plural
from moe_inspect.trace.reader import Trace, open_trace, shards_of
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.shard import Shard, codes

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Settings:
    """`sizes`: numbers of slots, ascending. `expert_mb`, by router, and `gb_per_s`: both or
    neither."""

    sizes: list[int]
    policies: list[str]
    expert_mb: dict[int, float] | None
    gb_per_s: float | None


@repeatable
def simulate_cache(
    trace: Trace | str | Path,
    *,
    slots: Sequence[int] | None = None,
    policies: Sequence[str] = ("lru", "lfu", "belady"),
    expert_mb: float | None = None,
    gb_per_s: float | None = None,
    gguf: str | Path | None = None,
    layers: str | int | Iterable[int | str] | None = None,
) -> Simulation:
    """How often an expert is in one of a layer's `slots` when it is wanted.

    `slots`: numbers of slots per layer, k or more; default k, 2k and 4k. `policies`: names of
    POLICIES. `expert_mb` (size of an expert, 10^6 bytes) with `gb_per_s` (bandwidth of the link,
    10^9 bytes per second): also the tokens per second that transfers allow. `gguf`: a GGUF of the
    model, which gives the size of each layer's experts as quantised. `layers`: what is selected.

    Tables: cache (a row per router, policy and number of slots), cache_speed (per policy and number
    of slots, all layers), cache_by_phase. MoeInspectError for settings out of range and for traces
    without decisions."""
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    need_decisions(trace, "simulate cache")
    chosen = select(trace, layers=layers).routers
    settings = Settings(
        _sizes(trace, chosen, slots),
        list(dict.fromkeys(policies)),
        _expert_mb(trace, chosen, expert_mb, gguf),
        gb_per_s,
    )
    _check(settings)
    if not trace.n_tokens:
        raise MoeInspectError(f"{trace.path} holds no tokens yet: nothing is committed")
    times = 4 * len(settings.policies) * len(settings.sizes)
    kind = Cache if is_small(trace, chosen, times) else CompiledCache
    caches = by_router(trace, chosen, "simulating cache", _replay, settings, kind)
    tables = _tables(trace, caches, trace.n_tokens, settings)
    shown: dict[str, object] = {
        "slots": settings.sizes,
        "policies": settings.policies,
        "expert_mb": settings.expert_mb and float(np.mean([*settings.expert_mb.values()])),
        "gb_per_s": gb_per_s,
        "batch_size": 1,
    }
    label_of = {r: layer_label(trace.routers, r) for r in chosen}
    return Simulation(
        "cache",
        tables,
        verdict(tables, shown),
        shown,
        chart(tables, shown, label_of),
        ("cache", "cache_speed"),
    )


def _check(settings: Settings) -> None:
    unknown = [name for name in settings.policies if name not in POLICIES]
    if unknown or not settings.policies:
        raise MoeInspectError(
            f"no policy {', '.join(unknown) or 'given'}: there are {', '.join(POLICIES)}"
        )
    if settings.expert_mb is None and settings.gb_per_s is None:
        return
    if settings.expert_mb is None or settings.gb_per_s is None:
        raise MoeInspectError(
            "tokens per second need both the size of an expert and the bandwidth of the link: give "
            "--expert-mb (or --gguf) and --gb-per-s"
        )
    for size in settings.expert_mb.values():
        if not (0 < size < inf and 0 < settings.gb_per_s < inf):
            raise MoeInspectError(
                f"expert size {size} MB over {settings.gb_per_s} GB/s: give finite numbers above 0"
            )


def _expert_mb(
    trace: Trace, chosen: Sequence[int], expert_mb: float | None, gguf: str | Path | None
) -> dict[int, float] | None:
    if gguf is None:
        return None if expert_mb is None else dict.fromkeys(chosen, expert_mb)
    if expert_mb is not None:
        raise MoeInspectError("--expert-mb and --gguf exclude each other: give one")
    return expert_mb_of(Path(gguf), {r: trace.routers[r] for r in chosen})


def _replay(
    trace: Trace, routers: Sequence[int], settings: Settings, kind: type[Cache]
) -> dict[int, Cache]:
    """The caches of these routers after the whole trace."""
    caches = {r: kind(trace.routers[r].experts, settings.sizes, settings.policies) for r in routers}
    for shard in shards_of(trace, "simulating cache"):
        order_of: dict[str, tuple[np.ndarray | None, np.ndarray]] = {}
        for r in routers:
            stack = trace.routers[r].stack
            if stack not in order_of:
                order_of[stack] = _order(shard, r)
            order_T, phase_T = order_of[stack]
            ids_KT = slots_of(shard, r)
            check_length(ids_KT.T, len(phase_T), r)
            if order_T is not None:
                ids_KT = np.ascontiguousarray(ids_KT[:, order_T])
            caches[r].feed(ids_KT, phase_T)
    return caches


def _sizes(trace: Trace, chosen: Iterable[int], slots: Sequence[int] | None) -> list[int]:
    most = max(chosen, key=lambda r: trace.routers[r].top_k)
    k, E = trace.routers[most].top_k, max(trace.routers[r].experts for r in chosen)
    sizes = sorted(set(slots)) if slots else sorted({min(n * k, E) for n in (1, 2, 4)})
    if sizes[0] < k:
        raise MoeInspectError(
            f"{plural(sizes[0], 'slot')} {'holds' if sizes[0] == 1 else 'hold'} less than one "
            f"decision of layer {layer_label(trace.routers, most)}: give at least {k}"
        )
    return sizes


def _order(shard: Shard, router: int) -> tuple[np.ndarray | None, np.ndarray]:
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


def _tables(
    trace: Trace, caches: dict[int, Cache], tokens: int, settings: Settings
) -> dict[str, pd.DataFrame]:
    import pandas as pd

    rows, by_phase = [], []
    misses = {(name, size): 0 for name in settings.policies for size in settings.sizes}
    mb_of, moved_mb = settings.expert_mb or {}, dict.fromkeys(misses, 0.0)
    for r, cache in caches.items():
        hits, E = cache.hits(), trace.routers[r].experts
        hottest_E = np.append(0, np.sort(cache.load_E)[::-1].cumsum())
        key = {"layer": trace.routers[r].layer, "router": r}
        for (name, size), hits_P in hits.items():
            at = {**key, "policy": name, "slots": size}
            made = int(cache.accesses_P.sum())
            missed = made - int(hits_P.sum())
            misses[name, size] += missed
            moved_mb[name, size] += missed * mb_of.get(r, 0)
            row = _rates(cache, hits_P, slice(None)) | {
                "even_share": min(size / E, 1.0),
                "hot_set_share": int(hottest_E[min(size, E)]) / made if made else float("nan"),
            }
            rows.append({**at, **row})
            by_phase += [
                {**key, "phase": PHASES[p], **at, **_rates(cache, hits_P, p)}
                for p in np.flatnonzero(cache.decisions_P).tolist()
            ]
    held_mb = {
        size: sum(min(size, trace.routers[r].experts) * mb_of.get(r, 0) for r in caches)
        for size in settings.sizes
    }
    speed = []
    for (name, size), count in misses.items():
        row = {"policy": name, "slots": size, "transfers_per_token": count / tokens}
        if settings.gb_per_s:
            mb = moved_mb[name, size] / tokens
            row |= {
                "mb_per_token": mb,
                "tokens_per_s": 1000 * settings.gb_per_s / mb if mb else inf,
                "held_gb": held_mb[size] / 1000,
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

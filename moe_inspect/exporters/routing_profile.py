"""The routing of a trace as one JSON object, for simulators of serving (docs/import.md).

L routers, E experts, D domains, U units (clusters of documents), W windows, A exponents.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import lru_cache
from math import inf, nan, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics import windows as win
from moe_inspect.analysis.metrics.specialization import share_by_domain
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render.payload import without_numpy
from moe_inspect.reporting.tables.data import ReportData, records
from moe_inspect.reporting.tables.load import at_least_1, design_effect
from moe_inspect.text import plural
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace

Json = dict[str, Any]
BATCHES = tuple(2**n for n in range(9))
DISTINCT = ["batch", "steps", "distinct_experts", "distinct_experts_low", "distinct_experts_high"]
DISTINCT += ["independent", "from_marginals"]
# aiconfigurator's power law depends on the tokens of a batch: of one of decode, and one of prefill
LAW_TOKENS = (128, 8_192)
MEASURED = (1.01, 1.2)  # exponents for which aiconfigurator ships measured kernels
ALPHA_A = 2 - np.geomspace(0.01, 50, 1_000)


def routing_profile(trace: Trace, output: Path) -> None:
    """One JSON object; what the trace cannot tell is left out, with the reason in `not_known`."""
    if output.suffix != ".json":
        raise MoeInspectError(f"-o {output}: a routing profile is written as .json")
    # a second pass through JSON turns NaN and −∞ into null
    text = json.dumps(_profile(trace), default=without_numpy)
    made = json.loads(text, parse_constant=lambda _: None)
    with draft_of(output) as draft:
        draft.write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")


def _profile(trace: Trace) -> Json:
    data = ReportData(trace, select(trace))
    counts = data.counts_for("windows", "repetition")
    if not any(counts.load_E(r).any() for r in counts.indices):
        raise MoeInspectError(f"no router of {trace.path} made an assignment")
    why, none = dict[str, str](), "the trace holds counts, no decisions"
    phases, distinct, ranks = dict[str, Counts](), {}, {}
    if trace.counts_only:
        why |= dict.fromkeys(("phases", "locality", "distinct_experts", "ranks"), none)
    else:
        phases = _phases(trace, counts)
        distinct, ranks = _distinct(trace, why), _ranks(trace, why)
    if counts.documents_unknown or len(counts.units) < unc.FEWEST_DOCUMENTS:
        few = f"{plural(len(counts.units), 'document')}: an interval needs {unc.FEWEST_DOCUMENTS}"
        why["intervals"] = "counts are not by document" if counts.documents_unknown else few
    if counts.documents_unknown:
        why["balanced_by_chance"] = "counts are not by document: that of independent tokens"
    layers = list[Json]()
    for r, router in enumerate(trace.routers):
        load_E, of_D = counts.load_E(r), counts.assignments_DE(r)
        layer: Json = {name: getattr(router, name) for name in ("layer", "experts", "top_k")}
        layer |= {
            "router": r,
            "tokens": counts.tokens_of(r),
            "assignments": load_E,
            "share": share_by_domain(load_E[None])[0],
            "assignments_by_domain": dict(zip(counts.domains, of_D, strict=True)),
        }
        if len(phases) > 1:
            by_phase = {name: of.load_E(r) for name, of in phases.items() if router.sees(name)}
            layer["assignments_by_phase"] = by_phase
        if counts.of[r].shared_U is not None:
            layer["locality"] = _locality(counts, r)
        layer |= {"distinct_experts": distinct[r]} if r in distinct else {}
        layer |= {"ranks": ranks[r]} if r in ranks else {}
        if load_E.any():
            chance = _from_balanced(counts, r)
            layer["balanced_by_chance"] = chance
            if drift := _drift(counts, r):
                layer["drift"] = drift
            else:
                why["drift"] = "of routers whose tokens are all in one window"
            layer["power_law"] = _laws(load_E, router.top_k, chance)
        layers.append(layer)
    return {
        "format": "moe-inspect routing-profile",
        "version": 1,
        "model": (trace.manifest.get("model") or {}).get("id"),
        "trace": str(trace.path),
        "tokens": counts.tokens,
        "tokens_by_domain": dict(zip(counts.domains, counts.tokens_D, strict=True)),
        **({"tokens_by_phase": {p: of.tokens for p, of in phases.items()}} if phases else {}),
        "power_law": _of_all([layer["power_law"] for layer in layers if "power_law" in layer]),
        "layers": layers,
        "not_known": why,
    }


def _phases(trace: Trace, counts: Counts) -> dict[str, Counts]:
    """The counts of each phase of which there are tokens."""
    from moe_inspect.simulate.shards import phases_of

    there = phases_of(trace)
    if len(there) == 1:
        return {there[0]: counts}
    return {p: ReportData(trace, select(trace, phase=p)).counts for p in there}


def _locality(counts: Counts, r: int) -> dict[str, float]:
    """Of the experts of two consecutive tokens of a sequence, the share that both choose; and of
    two independent tokens of one domain."""
    found = counts.of[r]
    assert found.pairs_U is not None
    assert found.shared_U is not None
    assert found.chosen_U is not None
    both_U, of_U = found.shared_U, found.chosen_U / 2
    pairs_D = counts.by_domain(found.pairs_U)
    activation_DE = counts.assignments_DE(r) / np.maximum(counts.tokens_D_of(r), 1)[:, None]
    of = float(of_U.sum()) or np.nan
    low, high = unc.ratio_interval(both_U, of_U, counts.weights_RU)
    by_chance = pairs_D @ (activation_DE**2).sum(1) / of
    return {"shared": both_U.sum() / of, "low": low, "high": high, "by_chance": by_chance}


def _distinct(trace: Trace, why: dict[str, str]) -> dict[int, list[Json]]:
    """The rows of `simulate decode`, of batches of which there is a step."""
    from moe_inspect.simulate.decode import simulate_decode

    found = defaultdict[int, list[Json]](list)
    for row in records(simulate_decode(trace, batches=BATCHES).tables["decode"]):
        if row["steps"]:
            found[row["router"]].append({name: row[name] for name in DISTINCT})
        else:
            why["distinct_experts"] = "some batches: no position has as many sequences"
    return found


def _ranks(trace: Trace, why: dict[str, str]) -> dict[int, list[Json]]:
    """How many GPUs the experts of a token are on: G = 2, 4, … that hold as many each, in order."""
    from moe_inspect.simulate.placement.placement import simulate_placement
    from moe_inspect.simulate.price import reached_by_chance

    sizes = {router.experts for router in trace.routers}
    many = [2**n for n in range(1, min(sizes).bit_length()) if 2**n < min(sizes)]
    found = defaultdict[int, list[Json]](list)
    for gpus in (g for g in many if not any(E % g for E in sizes)):
        how: Json = {"gpus": gpus, "policies": ["contiguous"], "fit_share": 1.0}
        table: Any = simulate_placement(trace, **how).tables["placement"]
        for r, reached in table.set_index("router")["ranks_per_token"].items():
            E, k = trace.routers[r].experts, trace.routers[r].top_k
            random = gpus * reached_by_chance(E, k, gpus)
            found[r].append({"gpus": gpus, "ranks_per_token": reached, "uniform": random})
    if not found:
        why["ranks"] = "2, 4, 8, … GPUs cannot hold as many experts each, and several"
    return found


def _drift(counts: Counts, r: int) -> Json:
    """By window: ½Σ|p − q| between its load and the whole, and what chance gives as many tokens of
    documents like these. Nothing of a single window, which is the whole."""
    _, first_W, tokens_W, load_WE = map(np.array, zip(*counts.windows(r), strict=True))
    if len(tokens_W) < 2:
        return {}
    whole_E, k = counts.load_E(r), counts.routers[r].top_k
    distance_W = win.step_total_variation(np.stack(np.broadcast_arrays(whole_E, load_WE)))[0]
    # a window is a part of what it is compared with
    part_W = load_WE.sum(1) / whole_E.sum()
    sizes_2W = np.stack([np.full(len(tokens_W), inf), load_WE.sum(1) / k])
    effect = at_least_1(design_effect(counts, r))
    floor_W = win.step_floors(whole_E / whole_E.sum(), sizes_2W, k, effect)[0][0]
    return {
        "first_token": first_W,
        "tokens": tokens_W,
        "from_whole": distance_W,
        "by_chance": floor_W * np.sqrt(np.maximum(1 - part_W, 0)),
    }


def _from_balanced(counts: Counts, r: int) -> float:
    """The distance from an even load that as many tokens of documents like these exceed by chance
    in 5 % of cases: that of E independent normal numbers."""
    E, k, tokens = counts.routers[r].experts, counts.routers[r].top_k, counts.load_E(r).sum()
    effect = at_least_1(design_effect(counts, r))
    mean = win.step_floors(np.full(E, 1 / E), np.array([inf, tokens / k]), k, effect)[0][0]
    return float(mean * (1 + 1.645 * sqrt((pi / 2 - 1) / E)))


@lru_cache(maxsize=16)
def power_laws(E: int, k: int, tokens: int) -> np.ndarray:
    """The shares of experts, ascending, of a batch as aiconfigurator draws it, for every exponent
    and for those of MEASURED: loads proportional to samples x of a density ~ x^−alpha between two
    bounds, at most one per token; here the (i + ½) ÷ E quantiles of x. float64 [A + 2, E]"""
    low, high = (1.0, 0.8 * tokens) if tokens * k > E else (0.01, 2.0)
    power_A1 = 1 - np.append(ALPHA_A, MEASURED)[:, None]
    bottom_A1, top_A1 = low**power_A1, high**power_A1
    x_AE = (bottom_A1 + (top_A1 - bottom_A1) * (np.arange(E) + 0.5) / E) ** (1 / power_A1)
    share_AE = x_AE / x_AE.sum(1, keepdims=True)
    while (share_AE > (1 + 1e-9) / k).any():  # what is cut goes to the others
        share_AE = np.minimum(share_AE, 1 / k)
        rest_A1, room_AE = 1 - share_AE.sum(1, keepdims=True), share_AE < 1 / k
        share_AE += rest_A1 * room_AE / np.maximum(room_AE.sum(1, keepdims=True), 1)
    return share_AE


def _laws(load_E: np.ndarray, k: int, chance: float) -> list[Json]:
    """The exponent whose loads are nearest, by ½Σ|p − q| of sorted shares, and that distance
    (`error`); and the distances from the distributions that aiconfigurator has by name. No exponent
    where the load is as even as by chance."""
    share_E, found = np.sort(load_E / load_E.sum()), list[Json]()
    for tokens in LAW_TOKENS:
        apart_A = np.abs(power_laws(len(share_E), k, tokens) - share_E).sum(1) / 2
        best, named = int(apart_A[: len(ALPHA_A)].argmin()), apart_A[len(ALPHA_A) :]
        distances = {"balanced": np.abs(share_E - 1 / len(share_E)).sum() / 2}
        distances |= {f"power_law_{a}": d for a, d in zip(MEASURED, named, strict=True)}
        even = distances["balanced"] <= chance
        row: Json = {"batch_tokens": tokens, "alpha": nan if even else ALPHA_A[best]}
        row |= {"error": apart_A[best], "distances": distances}
        row["nearest"] = "balanced" if even else min(distances, key=lambda name: distances[name])
        found.append(row)
    return found


def _of_all(layers: list[list[Json]]) -> list[Json]:
    """Over routers: the median exponent (none is below any), the mean distances, and the
    distribution that is nearest by them."""
    found = list[Json]()
    for mine in zip(*layers, strict=True):
        names = mine[0]["distances"]
        alpha_L = np.nan_to_num([of["alpha"] for of in mine], nan=-inf)
        row: Json = {"batch_tokens": mine[0]["batch_tokens"], "alpha": np.median(alpha_L)}
        row["error"] = np.mean([of["error"] for of in mine])
        apart = {name: np.mean([of["distances"][name] for of in mine]) for name in names}
        even = np.isinf(row["alpha"])
        row["nearest"] = "balanced" if even else min(apart, key=lambda name: apart[name])
        row["distances"] = apart
        found.append(row)
    return found

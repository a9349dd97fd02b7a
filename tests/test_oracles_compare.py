"""Every column of every table of `compare`, computed once more from the rows of the two traces, in
plain NumPy by the formulas of docs/compare.md and docs/metrics.md.

T tokens compared, K slots, E experts, U units (documents of a domain), S steps, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special, stats

import moe_inspect
from tests.support.generated import ODD, Kind, logits_of, on_generated, written
from tests.test_oracles_report import (
    NAN,
    Router,
    World,
    entropy,
    kish,
    over,
    resampled,
    share,
    summed,
)

SEED, TOP = 20_240_815, 4
ROOT = Path(__file__).parent.parent


@dataclass
class Pair:
    """Traces of the same tokens in the same order, and their comparison."""

    roots: tuple[Path, Path]
    noise: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def made(self) -> Any:
        return moe_inspect.compare(*self.roots, noise=self.noise, **{"top": TOP, **self.options})

    @cached_property
    def worlds(self) -> list[World]:
        a, b = (World(root) for root in self.roots)
        names = ["document", "sequence", "position", "token_id", "domain", "phase"]
        assert a.tokens[names].equals(b.tokens[names])
        return [a, b]

    @cached_property
    def kept_T(self) -> np.ndarray:
        """The tokens that are compared."""
        tokens, phase = self.worlds[0].tokens, self.options.get("phase")
        last = tokens.groupby(["document", "sequence"])["position"].transform("max")
        kept = (tokens["position"] < last) | (not self.options.get("drop_last"))
        return (kept & ((tokens["phase"] == phase) | (phase is None))).to_numpy()

    @cached_property
    def tokens(self) -> pd.DataFrame:
        of = self.worlds[0].tokens
        size = of.groupby(["document", "sequence"])["position"].transform("size")
        of = of.assign(decile=10 * of["position"] // size)
        return of[self.kept_T].reset_index(drop=True)

    @cached_property
    def units(self) -> pd.core.groupby.DataFrameGroupBy[Any]:
        return self.tokens.groupby(["domain", self.tokens["document"] % 127])

    @cached_property
    def unit_T(self) -> np.ndarray:
        return self.units.ngroup().to_numpy()

    @cached_property
    def domain_U(self) -> np.ndarray:
        return self.units["domain"].first().to_numpy(str)

    @cached_property
    def strata(self) -> tuple[int, ...]:
        """As in the report: domains, unless one of them has fewer than five documents."""
        codes = np.unique(self.domain_U, return_inverse=True)[1]
        return tuple((codes * (np.bincount(codes).min() >= 5)).tolist())

    @cached_property
    def routers(self) -> list[tuple[Router, Router]]:
        def kept(r: Router) -> Router:
            arrays = {name: getattr(r, name)[self.kept_T] for name in ("ids", "weights", "norms")}
            return replace(r, **arrays)

        of_a, of_b = (world.routers for world in self.worlds)
        return [(kept(a), kept(b)) for a, b in zip(of_a, of_b, strict=True)]

    @cached_property
    def differs_LT(self) -> np.ndarray:
        return np.stack([(a.chosen != b.chosen).any(1) for a, b in self.routers])

    def has(self, table: str) -> bool:
        return all(table in world.stated["tables"] for world in self.worlds)

    def of_capture(self, name: str) -> bool:
        return all(bool(world.stated["capture"].get(name)) for world in self.worlds)

    def by_unit(self, values: np.ndarray) -> np.ndarray:
        return summed(self.unit_T, np.asarray(values, float))

    def ratio(self, name: str, hits_T: Any, of_T: Any) -> dict[str, float]:
        """Σ hits ÷ Σ of, and its interval over documents."""
        hits_U, of_U = self.by_unit(hits_T), self.by_unit(of_T)
        low, high = NAN, NAN
        if len(of_U) >= 5 and of_U.sum():
            values = over(resampled(self.strata) @ hits_U, resampled(self.strata) @ of_U)
            low, middle, high = np.nanquantile(values, [0.025, 0.5, 0.975])
            wider = stats.t.ppf(0.975, max(kish(of_U) - 1, 1)) / stats.norm.ppf(0.975)
            low, high = middle - wider * (middle - low), middle + wider * (high - middle)
            if (hits_U <= of_U).all():
                low, high = max(low, 0), min(high, 1)
        value = float(over(hits_U.sum(), of_U.sum()))
        return {name: value, f"{name}_low": low, f"{name}_high": high}


def sizes(a: Router, b: Router) -> tuple[np.ndarray, np.ndarray]:
    """Of each token: experts that both chose, and the size of the larger set."""
    return (a.chosen * b.chosen).sum(1), np.maximum(a.chosen.sum(1), b.chosen.sum(1))


Columns = dict[str, Any]


# --- tables of decisions: by pair of routers, or of all of them


def agreement(p: Pair, a: Router, b: Router) -> Columns:
    common, size = sizes(a, b)
    one, same, ordered = np.ones(len(a.ids)), a.ids == b.ids, a.ordered and b.ordered
    ratios = {
        "set_mismatch": (p.differs_LT[a.index], one),
        "overlap": (common, size),
        "first_choice": (same[:, 0], one * ordered),
        "order": (same.all(1), one * ordered),
        "weight_l1": (apart(a, b, "weights"), one * p.of_capture("weights")),
    }
    found: Columns = {"decisions": len(one), "overlap_by_chance": a.k / a.E}
    for name, (hits, of) in ratios.items():
        found |= p.ratio(name, hits, of)
    found["kl_nats"] = NAN
    if p.has("logits"):
        r, s = log_probabilities(p, a, b)
        found["kl_nats"] = (np.exp(r) * (r - s)).sum(1).mean()
    if p.noise:
        found["noise_set_mismatch"] = noise_of(p).differs_LT[a.index].mean()
    return found


def noise_of(p: Pair) -> Pair:
    assert p.noise
    return Pair((p.roots[0], p.noise), options=p.options)


def apart(a: Router, b: Router, name: str) -> np.ndarray:
    """Σ |value in A − value in B| of the experts that both chose. [T]"""
    of_a, of_b = (r.by_expert(getattr(r, name)) for r in (a, b))
    return (np.abs(of_a - of_b) * a.chosen * b.chosen).sum(1)


def log_probabilities(p: Pair, a: Router, b: Router) -> list[np.ndarray]:
    found = []
    for world, r in zip(p.worlds, (a, b), strict=True):
        logits = logits_of(world.root)[r.index][p.kept_T]
        scores = special.log_expit(logits) if a.scoring == "sigmoid" else logits
        found.append(special.log_softmax(scores, 1))
    return found


def parts(p: Pair, a: Router, b: Router, name: str, of: dict[Any, np.ndarray]) -> Columns:
    """A row per label that has a token. of: label → bool [T]."""
    common, size = sizes(a, b)
    rows = []
    for label, in_T in of.items():
        if in_T.any():
            row = {name: label, "decisions": in_T.sum()}
            row |= p.ratio("set_mismatch", in_T * p.differs_LT[a.index], in_T)
            rows.append(row | {"overlap": over((in_T * common).sum(), (in_T * size).sum())})
    return pd.DataFrame(rows).to_dict("series")


def domains(p: Pair, a: Router, b: Router) -> Columns:
    of = {d: (p.tokens["domain"] == d).to_numpy() for d in sorted({*p.domain_U})}
    return parts(p, a, b, "domain", of)


def phases(p: Pair, a: Router, b: Router) -> Columns:
    of = {x: (p.tokens["phase"] == x).to_numpy() for x in ("prefill", "decode")}
    return parts(p, a, b, "phase", of)


def positions(p: Pair, a: Router, b: Router) -> Columns:
    of = {n: (p.tokens["decile"] == n).to_numpy() for n in range(10)}
    return parts(p, a, b, "decile", of)


def margin(p: Pair, a: Router) -> tuple[np.ndarray, np.ndarray]:
    """k-th largest logit minus the next of all of A's tokens, NaN where an expert below was chosen;
    and the limits of its deciles, by every fourth shard (one in four of many)."""
    world = p.worlds[0]
    logits_TE, whole = logits_of(world.root)[a.index], world.routers[a.index]
    if a.k == a.E:
        return np.full(len(logits_TE), NAN), np.array([])
    best_TE = -np.sort(-logits_TE, 1)
    worst_T = np.where(whole.chosen > 0, logits_TE, np.inf).min(1)
    margin_T = best_TE[:, a.k - 1] - best_TE[:, a.k]
    margin_T[worst_T < best_TE[:, a.k]] = NAN
    shard_T = world.tokens["shard"].rank(method="dense").to_numpy(int) - 1
    of = margin_T[shard_T % max(4, math.ceil((1 + shard_T.max()) / 4)) == 0]
    if np.isfinite(of).mean() <= 0.9:
        return margin_T, np.array([])
    return margin_T, np.quantile(of[np.isfinite(of)], np.arange(1, 10) / 10).astype(np.float32)


def margins(p: Pair, a: Router, b: Router) -> Columns:
    margin_T, edges = margin(p, a)
    limits, margin_T = np.r_[-np.inf, edges, np.inf], margin_T[p.kept_T]
    if not len(edges):
        return {}
    within = {n: (margin_T > limits[n]) & (margin_T <= limits[n + 1]) for n in range(10)}
    found = parts(p, a, b, "decile", within)
    del found["overlap"]
    decile = np.array(found["decile"])
    return {**found, "margin_from": limits[decile], "margin_to": limits[decile + 1]}


def depth(p: Pair, a: Router, b: Router) -> Columns:
    here, before = p.differs_LT[a.index], p.differs_LT[: a.index].any(0)
    return {
        "set_mismatch": here.mean(),
        "differ_so_far": (here | before).mean(),
        "new": (here & ~before).mean(),
        "again_after_difference": over((here & before).sum(), before.sum()),
        "new_without_difference": over((here & ~before).sum(), (~before).sum()),
    }


def flips(p: Pair, a: Router, b: Router) -> Columns:
    lost_TE, gained_TE = a.chosen * (1 - b.chosen), b.chosen * (1 - a.chosen)
    flips_EE = lost_TE.T @ gained_TE
    e, o = np.nonzero(flips_EE)
    count, given_up, taken = flips_EE[e, o], flips_EE.sum(1)[e], flips_EE.sum(0)[o]
    expected = given_up * taken / max(flips_EE.sum(), 1)
    columns = {"expert": e, "other": o, "flips": count, "expected": expected}
    made = pd.DataFrame({**columns, "lift": over(count, expected)})
    made = made.sort_values(["flips", "expert", "other"], ascending=[False, True, True])
    return made.head(p.options.get("top", TOP) or len(made)).to_dict("series")


def distances(load_2E: np.ndarray) -> tuple[float, float]:
    """Total variation of two loads, and their Jensen–Shannon divergence in bits."""
    p, q = share(load_2E)
    jsd = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return np.abs(p - q).sum() / 2, jsd / math.log(2)


def load_shift(p: Pair, a: Router, b: Router) -> Columns:
    load_UE, U = p.by_unit(a.chosen), len(p.domain_U)
    rng = np.random.default_rng([SEED, U])
    sides = [rng.permutation(U) < U // 2 for _ in range(40 * (U >= 5))]
    pairs = [np.stack([load_UE[in_U].sum(0), load_UE[~in_U].sum(0)]) for in_U in sides]
    halves = [distances(pair) for pair in pairs if pair.any(1).all()] or [(NAN, NAN)]
    shift, jsd = distances(np.stack([a.load, b.load]))
    shift_halves, jsd_halves = np.mean(halves, 0)
    found = {"load_shift": shift, "load_shift_halves": shift_halves}
    return found | {"jsd_bits": jsd, "jsd_bits_halves": jsd_halves}


def worth(p: Pair, a: Router, b: Router) -> Columns:
    found: Columns = {"expert": np.arange(a.E)}
    of = [(r.chosen, r.by_expert(r.norms), r.by_expert(r.norms * r.weights)) for r in (a, b)]
    for side, (load, norm, gated) in zip("ab", of, strict=True):
        gated = gated + (0 if p.of_capture("weights") else NAN)
        found[f"assignments_{side}"] = load.sum(0)
        found[f"reap_{side}"] = over(gated.sum(0), load.sum(0))
        found[f"mean_norm_{side}"] = over(norm.sum(0), load.sum(0))
        found[f"share_{side}"] = share(gated.sum(0))
    both = a.chosen * b.chosen
    found["both"] = both.sum(0)
    changes_TE = np.abs(of[0][1] - of[1][1]) * both
    found["norm_difference"] = over(changes_TE.sum(0), (of[0][1] * both).sum(0))
    for name, column, which in (("reap_change", "reap", 2), ("norm_change", "mean_norm", 1)):
        change = over(found[f"{column}_b"], found[f"{column}_a"]) - 1
        ends, known = np.full((2, a.E), NAN), np.isfinite(change)
        if len(p.domain_U) >= 5 and known.any():
            weights = resampled(p.strata)
            means = [over(*(weights @ p.by_unit(x[n][:, known]) for n in (which, 0))) for x in of]
            ends[:, known] = np.nanquantile(over(means[1], means[0]) - 1, [0.025, 0.975], 0)
        found |= {name: change, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return found


def matched(p: Pair, a: Router, b: Router) -> Columns:
    """Of the shard of A with the most tokens, those in its middle: matched on every other document,
    judged on the others."""
    shard = p.tokens["shard"].value_counts(sort=False).sort_index().idxmax()
    [at] = np.nonzero((p.tokens["shard"] == shard).to_numpy())
    most = min(len(at), 4_096)
    at = at[(len(at) - most) // 2 :][:most]
    document = np.unique(p.tokens["document"].to_numpy()[at], return_inverse=True)[1]
    fit = (document if document.any() else np.arange(len(at))) % 2 == 0
    chosen_a, chosen_b = a.chosen[at], b.chosen[at]
    shuffled = np.random.default_rng([SEED, a.index]).permutation(chosen_b)

    def overlap(order: np.ndarray, side: np.ndarray) -> float:
        x, y = chosen_a[~fit], side[~fit][:, order]
        return float(over((x * y).sum(), np.maximum(x.sum(1), y.sum(1)).sum()))

    def match(side: np.ndarray) -> np.ndarray:
        return optimize.linear_sum_assignment(chosen_a[fit].T @ side[fit], maximize=True)[1]

    return {
        "tokens": (~fit).sum(),
        "overlap": overlap(np.arange(a.E), chosen_b),
        "overlap_matched": overlap(match(chosen_b), chosen_b),
        "overlap_matched_by_chance": overlap(match(shuffled), shuffled),
    }


def overall(p: Pair) -> Columns:
    found = {"tokens": len(p.tokens), "decisions": p.differs_LT.size}
    found["tokens_mismatch"] = p.differs_LT.any(0).mean()
    found["decisions_mismatch"] = p.differs_LT.mean()
    found |= {"router_shift": NAN, "router_shift_below_floor": NAN}
    if p.has("logits"):
        shifts = []
        for a, b in p.routers:
            log_a, log_b = log_probabilities(p, a, b)
            chosen = np.maximum(a.chosen.sum(1), 1)
            shifts.append((np.abs(log_b - log_a) * a.chosen).sum(1) / chosen)
        gamma_T = np.exp(-np.mean(shifts, 0))
        found["router_shift"] = gamma_T.mean()
        found["router_shift_below_floor"] = (gamma_T < 0.8).mean()
    if p.noise:
        found["noise_tokens_mismatch"] = noise_of(p).differs_LT.any(0).mean()
    return found


def tokens(p: Pair) -> Columns:
    of = np.bincount(p.differs_LT.sum(0))
    more = [of[n + 1 :].sum() / of.sum() for n in range(len(of))]
    routers = np.arange(len(of))
    return {"routers": routers, "tokens": of, "share": of / of.sum(), "share_more": more}


def documents(p: Pair) -> Columns:
    by = p.tokens.assign(mismatches=p.differs_LT.sum(0)).groupby("document")
    made = by.agg(
        domain=("domain", "first"), tokens=("token", "size"), mismatches=("mismatches", "sum")
    )
    made = made.reset_index().assign(decisions=lambda x: x["tokens"] * len(p.routers))
    made["set_mismatch"] = made["mismatches"] / made["decisions"]
    made = made[made["mismatches"] > 0]
    made = made.sort_values(["set_mismatch", "document"], ascending=[False, True])
    return made.head(p.options.get("top", TOP) or len(made)).to_dict("series")


def movers(p: Pair) -> Columns:
    names = sorted({*p.worlds[0].every["domain"]})
    groups = ["", *(names if len(names) > 1 else [])]
    rows = []
    for a, b in p.routers:
        load_UE, moved_UE = p.by_unit(a.chosen), p.by_unit(b.chosen - a.chosen)
        quantile = 1 - 0.05 / 2 / (len(groups) * a.E * len(p.routers))
        for name in groups:
            of = moved_UE[in_U := (p.domain_U == name) | (name == "")]
            if (n := len(of)) < 5:
                continue
            reach_E = math.sqrt(n) * of.std(0, ddof=1) * stats.t.ppf(quantile, n - 1)
            moved_E, load_E = of.sum(0), load_UE[in_U].sum(0)
            for e in np.flatnonzero((np.abs(moved_E) > reach_E) & (load_E > 0)):
                ends = (moved_E[e] + np.array([0, -1, 1]) * reach_E[e]) / load_E[e]
                loads = load_E[e], load_E[e] + moved_E[e]
                rows.append((a.layer, a.index, name, e, *loads, *ends))
    columns = ["layer", "router", "domain", "expert", "load_a", "load_b", "change", "low", "high"]
    made = pd.DataFrame(rows, columns=columns)
    made = made.sort_values("change", key=lambda x: -x.abs(), kind="stable")
    return made.head(p.options.get("top", TOP) or len(made)).to_dict("series")


OF_ROUTERS: dict[str, Callable[[Pair, Router, Router], Columns]] = {
    of.__name__: of
    for of in (agreement, domains, phases, positions, margins, depth, flips, load_shift)
} | {"worth": worth, "matched": matched}
OF_ALL: dict[str, Callable[[Pair], Columns]] = {
    of.__name__: of for of in (overall, tokens, documents, movers)
}


def same(
    found: pd.DataFrame, expected: pd.DataFrame, rough: dict[str, float] | None = None
) -> None:
    """The same columns and numbers. rough: of columns that chance draws, how far they may be."""
    assert {*found} == {*expected}, "a column that no formula here gives"
    assert len(found) == len(expected)
    for column in found:
        a, b = found[column], expected[column]
        if a.dtype == object or a.dtype.name in ("str", "string"):
            assert a.tolist() == b.tolist(), column
            continue
        a, b = a.to_numpy(float, na_value=NAN), b.to_numpy(float, na_value=NAN)
        far = (rough or {}).get(column, 1e-5)
        np.testing.assert_allclose(a, b, rtol=far, atol=5e-6, err_msg=column)


def expected_of(p: Pair, name: str) -> pd.DataFrame | None:
    if name in OF_ALL:
        columns = OF_ALL[name](p)
        return pd.DataFrame({n: np.atleast_1d(np.asarray(x)) for n, x in columns.items()})
    found = []
    for a, b in p.routers:
        if columns := OF_ROUTERS[name](p, a, b):
            columns = {"layer": a.layer, "router": a.index, **columns}
            rows = max((len(x) for x in columns.values() if np.ndim(x)), default=1)
            found.append(pd.DataFrame({n: np.broadcast_to(x, rows) for n, x in columns.items()}))
    return pd.concat(found, ignore_index=True) if found else None


def agrees(p: Pair, name: str) -> None:
    if name == "margins" and not p.has("logits"):
        with pytest.raises(moe_inspect.MoeInspectError, match=r"no logits .*: no margins table"):
            _ = p.made.tables[name]
        return
    if name == "worth" and not p.of_capture("norms"):
        assert "no norms of outputs" in p.made.why_not(name)
        assert p.made.tables[name].empty
        return
    expected = expected_of(p, name)
    if expected is None:  # of no router is the margin known
        assert name == "margins"
        assert p.made.margins is None
        return
    same(p.made.tables[name], expected)


@cache
def pair(kind: Kind, changed: float, **options: Any) -> Pair:
    other = replace(kind, changed=changed, shard_tokens=70)
    return Pair((written(kind), written(other)), options=options)


@on_generated()
def test_the_tables_of_decisions_are_what_their_formulas_give(kind: Kind) -> None:
    p = pair(kind, (0.3, 0.05, 1.0)[kind.seed % 3])
    names = [*OF_ROUTERS, *OF_ALL]
    assert {*p.made.tables} == {*names, "summary", "verdict"}
    for name in names:
        agrees(p, name)


@pytest.mark.parametrize(
    "options", [{"phase": "decode"}, {"drop_last": True}, {"phase": "prefill", "top": 0}]
)
def test_the_tables_of_selected_tokens_are_of_these(options: dict[str, Any]) -> None:
    kind = replace(ODD["many documents"], answers=0.4, empty=0.1)
    for name in {*OF_ROUTERS, *OF_ALL} - ({"matched"} if "phase" in options else {*()}):
        agrees(pair(kind, 0.2, **options), name)


def test_a_second_run_is_the_noise_of_two_tables() -> None:
    kind = ODD["dropped slots"]
    p = replace(pair(kind, 0.3), noise=written(replace(kind, changed=0.1)))
    for name in ("agreement", "overall"):
        agrees(p, name)


def test_the_tables_of_the_sample_traces_are_what_their_formulas_give() -> None:
    p = Pair((ROOT / "sample_traces" / "balanced", ROOT / "sample_traces" / "untrained"))
    for name in [*OF_ROUTERS, *OF_ALL]:
        agrees(p, name)

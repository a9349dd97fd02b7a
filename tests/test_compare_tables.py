"""The tables of a comparison against brute force, token by token, with sets and loops."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_inspect
from moe_inspect.comparison.counting import kernels
from moe_inspect.trace.reader import Trace
from tests.support.sweep import WHOLE
from tests.support.synthetic import write_trace

DOCUMENT = 7  # tokens of a document, which is a batch: positions count from its beginning
SHARD = 14
DOMAINS = ["law", "code", "law"]
PHASES = ["prefill", "decode"]


@st.composite
def pairs(draw: st.DrawFn) -> dict[str, Any]:
    """Random routes [T, L, K] of two traces that agree in part; some slots route nowhere. With or
    without weights and logits."""
    E, k = draw(st.sampled_from([(4, 1), (6, 2), (9, 3), (300, 2)]))
    T, L = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # rounded, so that some are equal
    logits = [rng.integers(-64, 64, (T, L, E)) / 16 for _ in range(2)]
    ids = [np.argsort(-of_side)[..., :k].astype(np.int64) for of_side in logits]
    same = rng.random((T, L)) < draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    ids[1][same] = ids[0][same]
    if draw(st.booleans()):
        for side in ids:
            side[rng.random(side.shape) < 0.1] = -1
    weights = [(1 + rng.integers(0, 64, (T, L, k))) / 64 for _ in ids]
    return {
        "E": E,
        "ids": ids,
        "weights": weights if draw(st.booleans()) else None,
        "logits": logits if draw(st.booleans()) else None,
    }


def written(root: Path, drawn: dict[str, Any]) -> list[Trace]:
    dtype, both = np.dtype(np.uint8 if drawn["E"] <= 256 else np.uint16), list[Trace]()
    kinds = {"weights": np.float32, "logits": np.float16}
    for i, name in enumerate("ab"):
        ids_TLK = drawn["ids"][i]
        T, L, _ = ids_TLK.shape
        stored = np.where(ids_TLK < 0, np.iinfo(dtype).max, ids_TLK).astype(dtype)
        alike: dict[str, Any] = {"document": np.arange(T) // DOCUMENT, "token_id": np.arange(T)}
        alike |= {"domain_of_document": DOMAINS, "phases": PHASES}
        alike |= {"batch_tokens": DOCUMENT, "shard_tokens": SHARD}
        for key, kind in kinds.items():
            if drawn[key] is not None:
                alike[key] = [drawn[key][i][:, r].astype(kind) for r in range(L)]
        ids = [stored[:, r] for r in range(L)]
        both.append(write_trace(root / name, ids, drawn["E"], **alike))
    return both


class Brute:
    """Every decision of both traces, as they are read, compared one by one."""

    def __init__(self, both: list[Trace], drawn: dict[str, Any]):
        self.T, self.L, self.K = drawn["ids"][0].shape
        self.tokens = range(self.T)
        self.E, self.logits, self.drawn = drawn["E"], drawn["logits"], drawn
        routings = [[x.routing(router=r) for r in range(self.L)] for x in both]
        self.slots, self.weights = (
            [np.stack([of.filter(like=f"{name}_") for of in side], 1) for side in routings]
            for name in ("expert", "weight")
        )
        self.slots = [side.astype(float) for side in self.slots]
        self.sets = [
            [[{int(e) for e in of if e == e} for of in token] for token in side]
            for side in self.slots
        ]
        a, b = self.sets
        self.differs = np.array([[a[t][r] != b[t][r] for r in range(self.L)] for t in self.tokens])

    def row(self, r: int, of: list[int]) -> dict[str, float]:
        """The agreement of one router's decisions on these tokens."""
        a, b = ([side[t][r] for t in of] for side in self.sets)
        size = sum(max(len(x), len(y)) for x, y in zip(a, b, strict=True))
        common = sum(len(x & y) for x, y in zip(a, b, strict=True))
        return {
            "decisions": len(of),
            "set_mismatch": float(self.differs[of, r].mean()),
            "overlap": common / size if size else math.nan,
        }

    def agreement(self, r: int) -> dict[str, float]:
        a, b = (side[:, r] for side in self.slots)
        equal = (a == b) | (np.isnan(a) & np.isnan(b))
        row = self.row(r, [*self.tokens])
        row |= {"first_choice": equal[:, 0].mean(), "order": equal.all(1).mean()}
        row["weight_l1"] = row["kl_nats"] = math.nan
        if self.drawn["weights"] is not None:
            total = 0.0
            for t in self.tokens:
                of_a, of_b = (
                    {int(e): w for e, w in zip(s[t, r], v[t, r], strict=True) if e == e}
                    for s, v in zip(self.slots, self.weights, strict=True)
                )
                total += sum(abs(of_a[e] - of_b[e]) for e in of_a.keys() & of_b.keys())
            row["weight_l1"] = total / self.T
        if self.logits is not None:
            p, q = (self.log_p(i)[:, r] for i in (0, 1))
            row["kl_nats"] = float((np.exp(p) * (p - q)).sum(1).mean())
        return row

    def log_p(self, side: int) -> np.ndarray:
        x = self.logits[side].astype(np.float16).astype(float)
        return x - np.log(np.exp(x).sum(2, keepdims=True))

    def gamma(self) -> list[float]:
        apart = np.abs(self.log_p(1) - self.log_p(0))
        found = []
        for t in self.tokens:
            chosen = [(r, sorted(self.sets[0][t][r])) for r in range(self.L)]
            means = [float(apart[t, r, of].mean()) if of else 0.0 for r, of in chosen]
            found.append(math.exp(-float(np.mean(means))))
        return found

    def margins(self, r: int) -> np.ndarray:
        """The margin of each decision of A, NaN without logits: gate weights do not tell it."""
        if self.logits is None:
            return np.full(self.T, np.nan)
        x = np.sort(self.logits[0][:, r].astype(np.float16).astype(np.float32), 1)[:, ::-1]
        return x[:, self.K - 1] - x[:, self.K]


def same(row: Any, expected: Any) -> None:
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5, abs=2e-6, nan_ok=True), name


@given(drawn=pairs())
@settings(
    max_examples=300 if WHOLE else 50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_every_table_is_what_brute_force_gives(drawn: Any, tmp_path_factory: Any) -> None:
    both = written(tmp_path_factory.mktemp("pair"), drawn)
    made, brute = moe_inspect.compare(*both, top=0), Brute(both, drawn)
    assert made.decisions == brute.T * brute.L
    T, L, E = brute.T, brute.L, brute.E
    tables: dict[str, list[dict[str, Any]]] = {
        name: made.tables[name].to_dict("records")  # type: ignore[misc]
        for name in made.tables
        if name not in ("margins", "matched", "movers", "verdict")
    }
    for r, row in enumerate(tables["agreement"]):
        same(row, brute.agreement(r) | {"router": r, "overlap_by_chance": brute.K / E})

    # by part of the trace
    document = [t // DOCUMENT for t in range(T)]
    size = [min(DOCUMENT, T - DOCUMENT * d) for d in document]
    parts = {
        "domains": ("domain", [DOMAINS[d % len(DOMAINS)] for d in document]),
        "phases": ("phase", [PHASES[d % 2] for d in document]),
        "positions": ("decile", [10 * (t % DOCUMENT) // size[t] for t in range(T)]),
    }
    for name, (column, part_of) in parts.items():
        assert len(tables[name]) == L * len({*part_of})
        for row in tables[name]:
            of = [t for t in range(T) if part_of[t] == row[column]]
            same(row, brute.row(row["router"], of))

    # the same of arrays
    by_arrays = moe_inspect.mismatch(*drawn["ids"])
    for name in ("set_mismatch", "overlap"):
        rows = [brute.row(r, [*brute.tokens])[name] for r in range(L)]
        assert by_arrays[f"{name}_by_layer"] == pytest.approx(rows, nan_ok=True)
    whole = {"set_mismatch": brute.differs.mean(), "tokens_mismatch": brute.differs.any(1).mean()}
    same(by_arrays, whole | {"order": (drawn["ids"][0] == drawn["ids"][1]).all(2).mean()})

    # tokens and documents
    at = brute.differs.sum(1)
    for row in tables["tokens"]:
        here, more = at == row["routers"], at > row["routers"]
        same(row, {"tokens": here.sum(), "share": here.mean(), "share_more": more.mean()})
    assert len(tables["tokens"]) == at.max() + 1
    shares = {"tokens": T, "tokens_mismatch": (at > 0).mean(), "decisions": T * L}
    same(tables["overall"][0], shares | {"decisions_mismatch": brute.differs.mean()})
    gamma = math.nan if brute.logits is None else np.mean(brute.gamma())
    same(tables["overall"][0], {"router_shift": gamma})
    mismatches = {row["document"]: row["mismatches"] for row in tables["documents"]}
    wrong = Counter({d: int(at[[x == d for x in document]].sum()) for d in {*document}})
    assert mismatches == {d: n for d, n in wrong.items() if n}
    for r, row in enumerate(tables["depth"]):
        before, here = brute.differs[:, :r].any(1), brute.differs[:, r]
        with np.errstate(all="ignore"):
            expected = {
                "differ_so_far": (before | here).mean(),
                "new": (here & ~before).mean(),
                "again_after_difference": np.divide((here & before).sum(), before.sum()),
                "new_without_difference": np.divide((here & ~before).sum(), (~before).sum()),
            }
        same(row, expected)

    # experts
    for r in range(L):
        flips = Counter[tuple[int, int]]()
        for t in range(T):
            a, b = (side[t][r] for side in brute.sets)
            flips.update((lost, gained) for lost in a - b for gained in b - a)
        rows = [row for row in tables["flips"] if row["router"] == r]
        assert {(row["expert"], row["other"]): row["flips"] for row in rows} == dict(flips)
        for row in rows:
            given_up = sum(n for (x, _), n in flips.items() if x == row["expert"])
            taken = sum(n for (_, x), n in flips.items() if x == row["other"])
            same(row, {"expected": given_up * taken / flips.total()})
        loads = [np.bincount([e for s in x for e in s[r]], minlength=E) for x in brute.sets]
        if all(load.sum() for load in loads):
            p, q = (load / load.sum() for load in loads)
            middle = (p + q) / 2
            jsd = sum((x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum() / 2 for x in (p, q))
            shift = np.abs(p - q).sum() / 2
            same(tables["load_shift"][r], {"load_shift": shift, "jsd_bits": jsd})

    check_margins(made, brute)


def check_margins(made: Any, brute: Brute) -> None:
    margin = {r: brute.margins(r) for r in range(brute.L)}
    # the limits are the deciles of every fourth shard; here the first alone
    edges = {r: m[:SHARD][np.isfinite(m[:SHARD])] for r, m in margin.items()}
    if made.margins is None:
        assert made.alike or not any(len(m) for m in edges.values())
        return
    rows = made.tables["margins"].to_dict("records")
    assert {row["router"] for row in rows} == {r for r, m in edges.items() if len(m)}
    seen = Counter[int]()
    for row in rows:
        r, limits = row["router"], np.quantile(edges[row["router"]], np.arange(1, 10) / 10)
        limits = np.r_[-np.inf, limits.astype(np.float32), np.inf]
        low, high = limits[row["decile"]], limits[row["decile"] + 1]
        assert (row["margin_from"], row["margin_to"]) == (low, high)
        of = np.flatnonzero(np.isfinite(margin[r]) & (margin[r] > low) & (margin[r] <= high))
        seen[r] += len(of)
        same(row, {"decisions": len(of), "set_mismatch": brute.differs[of, r].mean()})
    for r in seen:
        assert seen[r] == np.isfinite(margin[r]).sum()


@pytest.mark.parametrize(
    ("T", "E", "K"), [(0, 8, 2), (1, 8, 1), (371, 5, 5), (1023, 300, 8), (9_000, 128, 8)]
)
def test_the_loops_over_decisions(T: int, E: int, K: int) -> None:
    """Some decisions are the same, some slots route nowhere, a few name an expert twice."""
    rng, V = np.random.default_rng([T, E, K]), 3
    a_TK = np.argsort(rng.random((T, E)), axis=1)[:, :K]
    b_TK = np.where(rng.random((T, K)) < 0.3, rng.integers(0, E, (T, K)), a_TK)
    for ids_TK in (a_TK, b_TK):
        ids_TK[rng.random((T, K)) < 0.1] = E
    a_KT, b_KT = (ids_TK.T.astype(np.uint16) for ids_TK in (a_TK, b_TK))
    weights_a_KT, weights_b_KT = rng.random((2, K, T), np.float32)
    unit_T = np.sort(rng.integers(0, V, T))
    at, *asked = kernels.unequal((*a_KT,), (*b_KT,))
    lost_KN, gained_KN, missing_N = kernels.sets(*asked, E)
    moved_VE, flips_EE = np.zeros((V, E), np.int64), np.zeros((E, E), np.int64)
    kernels.add_moves(*asked, lost_KN, gained_KN, unit_T[at], moved_VE, flips_EE)
    l1_T = kernels.weight_difference(*asked, E, at, (*weights_a_KT,), (*weights_b_KT,))
    moved, flips = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for t in range(T):
        a, b = ([e for e in ids_TK[t].tolist() if e < E] for ids_TK in (a_TK, b_TK))
        lost, gained = [e for e in a if e not in b], [e for e in b if e not in a]
        moved.update((int(unit_T[t]), e) for e in gained)
        moved.subtract((int(unit_T[t]), e) for e in lost)
        flips.update((e, f) for e in lost for f in gained)
        if a_TK[t].tolist() == b_TK[t].tolist():
            pairs = [(j, j) for j in range(K)]
        else:
            pairs = [(i, j) for i in range(K) for j in range(K) if a_TK[t, i] == b_TK[t, j] < E]
        apart = sum(abs(float(weights_a_KT[i, t] - weights_b_KT[j, t])) for i, j in pairs)
        assert l1_T[t] == pytest.approx(apart, abs=1e-5)
        if t in at:
            common = min(len(a) - len(lost), len(b) - len(gained))
            assert missing_N[at.tolist().index(t)] == max(len(a), len(b)) - common
    assert {x: moved_VE[x] for x in moved} == moved
    assert moved_VE.sum() == sum(moved.values())
    assert {x: flips_EE[x] for x in flips} == flips
    assert flips_EE.sum() == flips.total()

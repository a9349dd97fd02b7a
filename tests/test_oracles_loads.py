"""Every column of every table of two traces that hold counts, computed once more from the counts by
the formulas of docs/compare.md; what each side's report says is judged in test_oracles_report.

S steps, W windows, L layers, E experts.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from scipy import special

import moe_inspect
from tests.test_compare_loads import TOKENS, history, loads
from tests.test_oracles_compare import same
from tests.test_oracles_report import floors_of, share

ALPHA, GENERATED = 0.01, (Phase.explicit, Phase.generate)


@dataclass(frozen=True)
class Case:
    """Two histories, of which the last layer of the second is moved in some steps."""

    steps: int = 45
    moved: tuple[int, int] = (0, 0)  # first and last
    every: int = 10  # steps that a trace commits together
    L: int = 2
    E: int = 8
    k: int = 2
    used: int = 8  # the experts beyond have no load
    shares: tuple[float, ...] = ()  # of tokens that choose each; then n of them move in step n

    def written(self, root: Path, seed: int) -> np.ndarray:
        if self.shares:
            load_E = np.rint(TOKENS * np.array(self.shares)).astype(int)
            made_SLE = np.tile(load_E, (self.steps, self.L, 1))
            made_SLE[:, -1, -2:] += seed * np.outer(np.arange(self.steps), [-1, 1])
        else:
            first, last = self.moved if seed else (0, 0)
            shape = self.L, min(self.E, self.used), self.k
            made_SLE = loads(seed, self.steps, range(first, last + 1), *shape)
            made_SLE = np.pad(made_SLE, ((0, 0), (0, 0), (0, self.E - made_SLE.shape[2])))
        history(root, made_SLE, self.every, k=self.k)
        return made_SLE


MOVED = Case(60, (11, 60))


def cases() -> st.SearchStrategy[Case]:
    shapes = st.sampled_from([(8, 2, 8), (2, 1, 2), (3, 1, 3), (64, 6, 64), (16, 1, 2)])
    moved = st.sampled_from([(0, 0), (1, 45), (11, 20), (11, 45)])
    return st.builds(
        lambda steps, moved, every, L, of: Case(steps, moved, every, L, *of),
        *(st.integers(12, 45), moved, st.sampled_from([3, 5, 10]), st.integers(1, 3), shapes),
    )


def times_floor(load_E: np.ndarray, of: Case) -> float:
    """How many times its floor a shift must be, at ALPHA over all routers."""
    chosen_E = np.clip(of.k * share(load_E), 0, 1)
    error_E = np.sqrt(chosen_E * (1 - chosen_E))
    half = max(1.0, error_E.sum() ** 2 / (error_E**2).sum() - 1) / 2
    highest = math.sqrt(special.gammainccinv(half, ALPHA / of.L))
    return max(2, highest * math.exp(special.gammaln(half) - special.gammaln(half + 0.5)))


def shifts(a_E: np.ndarray, b_E: np.ndarray, k: int) -> dict[str, float]:
    p, q = share(a_E), share(b_E)
    middle = (p + q) / 2
    jsd = sum((x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum() / 2 for x in (p, q))
    [(floor, jsd_floor)] = floors_of(share(a_E + b_E), np.array([a_E.sum(), b_E.sum()]) / k, k, 1)
    found = {"load_shift": np.abs(p - q).sum() / 2, "load_shift_floor": floor}
    return found | {"jsd_bits": jsd, "jsd_bits_floor": jsd_floor}


def windows(a_SLE: np.ndarray, b_SLE: np.ndarray, of: Case) -> pd.DataFrame:
    rows = []
    for r in range(of.L):
        limit = times_floor((a_SLE[:, r] + b_SLE[:, r]).sum(0), of)
        for first in range(0, of.steps, of.every):
            steps = slice(first, first + of.every)
            a_E, b_E = a_SLE[steps, r].sum(0), b_SLE[steps, r].sum(0)
            last = min(first + of.every, of.steps)
            ratio = np.stack([a_E / a_E.mean(), b_E / b_E.mean()])
            e = np.abs(ratio[1] - ratio[0]).argmax()
            row = {"layer": r, "router": r, "window": first // of.every}
            row |= {"first_step": first + 1, "last_step": last, "expert": e}
            row |= {f"tokens_{x}": (last - first) * TOKENS for x in "ab"}
            row |= {n: v for n, v in shifts(a_E, b_E, of.k).items() if n.startswith("load")}
            row["beyond_chance"] = row["load_shift"] > limit * row["load_shift_floor"]
            for i, x in enumerate("ab"):
                row |= {f"max_vio_{x}": ratio[i].max() - 1, f"load_ratio_{x}": ratio[i, e]}
            rows.append(row)
    return pd.DataFrame(rows)


def diverged(of_windows: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for r, of in of_windows.groupby("router"):
        beyond, most = of["beyond_chance"].tolist(), of.loc[of["load_shift"].idxmax()]
        starts = [n for n in range(len(beyond) - 2) if all(beyond[n : n + 3])]
        start = starts[0] if starts else len(beyond)
        row = {"layer": r, "router": r, "windows": len(of), "windows_beyond_chance": sum(beyond)}
        row["since_step"] = of["first_step"].iloc[start] if starts else None
        row |= {"windows_since": len(of) - start, "beyond_chance_since": sum(beyond[start:])}
        names = "first_step", "last_step", "load_shift", "load_shift_floor"
        rows.append(row | {f"most_{name}": most[name] for name in names})
    return pd.DataFrame(rows)


@example(Case(40))
@example(MOVED)
@example(Case(45, (21, 40)))
@example(Case(every=1, k=1, shares=(0.5, 0.5)))
@example(Case(every=1, shares=(0.99, 0.505, 0.505)))
@example(Case(60, E=16, k=1, used=2, every=3))
@settings(max_examples=6, derandomize=True, deadline=None, database=None, phases=GENERATED)
@given(cases())
def test_the_tables_of_two_histories_are_what_their_formulas_give(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tables_agree(Path(folder), case)


def tables_agree(root: Path, case: Case) -> None:
    roots = [root / x for x in "ab"]
    a_SLE, b_SLE = (case.written(root, seed) for seed, root in enumerate(roots))
    made = moe_inspect.compare(*roots)
    tables = {name: made.tables[name] for name in made.tables}
    assert {*tables} == {
        *("summary", "verdict"),
        *("balance", "load", "load_shift", "windows", "diverged"),
    }
    a, b = (moe_inspect.report(root).tables for root in roots)
    place = ["layer", "router", "expert"]
    expected = a["load"][place].copy()
    for name in ("assignments", "share", "load_ratio"):
        expected[f"{name}_a"], expected[f"{name}_b"] = a["load"][name], b["load"][name]
        if name != "assignments":
            expected[f"{name}_difference"] = b["load"][name] - a["load"][name]
    same(tables["load"], expected)
    expected = a["balance"][["layer", "router", "experts", "top_k"]].copy()
    names = {name.removesuffix("_difference") for name in tables["balance"] if "_diff" in name}
    assert names >= {"max_vio", "max_over_mean", "entropy", "gini", "dead_experts"}
    for name in (*names, "tokens", "expected_by_chance"):
        expected[f"{name}_a"], expected[f"{name}_b"] = a["balance"][name], b["balance"][name]
        if name in names:
            expected[f"{name}_difference"] = b["balance"][name] - a["balance"][name]
    same(tables["balance"], expected)
    rows = [shifts(a_SLE[:, r].sum(0), b_SLE[:, r].sum(0), case.k) for r in range(case.L)]
    same(tables["load_shift"], pd.DataFrame(rows).assign(layer=range(case.L), router=range(case.L)))
    same(tables["windows"], windows(a_SLE, b_SLE, case))
    same(tables["diverged"], diverged(windows(a_SLE, b_SLE, case)))
    if case == MOVED:
        assert tables["diverged"]["since_step"].tolist()[1] == 11
    said = tables["summary"].set_index("key")
    assert said.loc["tokens", ["a", "b"]].tolist() == [f"{case.steps * TOKENS}"] * 2
    assert said.loc["holds", ["a", "b"]].tolist() == ["counts"] * 2

"""Every column of every table of two traces that hold counts, computed once more from the counts by
the formulas of docs/compare.md; what each side's report says is judged in test_oracles_report.

W windows, L layers, E experts.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special

import moe_inspect
from tests.test_compare_loads import TOKENS, K, L, history, loads
from tests.test_oracles_compare import same
from tests.test_oracles_report import floors_of, share

EVERY, ALPHA = 10, 0.01
STEPS = {
    "chance": (40, ()),
    "from step 11 on": (60, range(11, 61)),
    "two windows": (45, range(21, 41)),
}


def times_floor(load_E: np.ndarray) -> float:
    """How many times its floor a shift must be, at ALPHA over all routers."""
    chosen_E = np.clip(K * share(load_E), 0, 1)
    error_E = np.sqrt(chosen_E * (1 - chosen_E))
    half = max(1.0, error_E.sum() ** 2 / (error_E**2).sum() - 1) / 2
    highest = math.sqrt(special.gammainccinv(half, ALPHA / L))
    return max(2, highest * math.exp(special.gammaln(half) - special.gammaln(half + 0.5)))


def shifts(a_E: np.ndarray, b_E: np.ndarray) -> dict[str, float]:
    p, q = share(a_E), share(b_E)
    middle = (p + q) / 2
    jsd = sum((x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum() / 2 for x in (p, q))
    [(floor, jsd_floor)] = floors_of(share(a_E + b_E), np.array([a_E.sum(), b_E.sum()]) / K, K, 1)
    found = {"load_shift": np.abs(p - q).sum() / 2, "load_shift_floor": floor}
    return found | {"jsd_bits": jsd, "jsd_bits_floor": jsd_floor}


def windows(a_SLE: np.ndarray, b_SLE: np.ndarray) -> pd.DataFrame:
    rows = []
    for r in range(L):
        limit = times_floor((a_SLE[:, r] + b_SLE[:, r]).sum(0))
        for first in range(0, len(a_SLE), EVERY):
            steps = slice(first, first + EVERY)
            a_E, b_E = a_SLE[steps, r].sum(0), b_SLE[steps, r].sum(0)
            last = min(first + EVERY, len(a_SLE))
            ratio = np.stack([a_E / a_E.mean(), b_E / b_E.mean()])
            e = np.abs(ratio[1] - ratio[0]).argmax()
            row = {"layer": r, "router": r, "window": first // EVERY}
            row |= {"first_step": first + 1, "last_step": last, "expert": e}
            row |= {f"tokens_{x}": (last - first) * TOKENS for x in "ab"}
            row |= {n: v for n, v in shifts(a_E, b_E).items() if n.startswith("load")}
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


@pytest.mark.parametrize("case", STEPS)
def test_the_tables_of_two_histories_are_what_their_formulas_give(
    case: str, tmp_path: Path
) -> None:
    steps, moved = STEPS[case]
    a_SLE, b_SLE = loads(0, steps), loads(1, steps, moved)
    roots = [tmp_path / x for x in "ab"]
    traces = [history(root, of, EVERY) for root, of in zip(roots, (a_SLE, b_SLE), strict=True)]
    made = moe_inspect.compare(*traces)
    tables = {name: made.tables[name] for name in made.tables}
    assert {*tables} == {
        *("refused", "summary", "verdict"),
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
    rows = [shifts(a_SLE[:, r].sum(0), b_SLE[:, r].sum(0)) for r in range(L)]
    same(tables["load_shift"], pd.DataFrame(rows).assign(layer=range(L), router=range(L)))
    same(tables["windows"], windows(a_SLE, b_SLE))
    same(tables["diverged"], diverged(windows(a_SLE, b_SLE)))
    assert tables["diverged"]["since_step"].notna().sum() == (case == "from step 11 on")
    assert {*tables["refused"]["table"]} >= {"agreement", "flips", "depth", "tokens"}
    said = tables["summary"].set_index("key")
    assert said.loc["tokens", ["a", "b"]].tolist() == [f"{steps * TOKENS}"] * 2
    assert said.loc["holds", ["a", "b"]].tolist() == ["counts"] * 2

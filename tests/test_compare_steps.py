"""Two histories of counts, compared by step: windows of the same steps, and since which step the
load differs by more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.comparison.loads import _windows
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.writer import CountedBatches, TraceWriter
from tests.conftest import Cli
from tests.synthetic import routers, uniform_ids, write_trace
from tests.test_compare_loads import EVEN, EVEN_B, STEEP, STEEP_B

E, K, L, TOKENS = 8, 2, 2, 200  # TOKENS of a step


def loads(seed: int, steps: int, moved: Sequence[int] = ()) -> np.ndarray:
    """int64 [steps, L, E]. In the steps of `moved` layer 1 sends a quarter of its tokens to expert
    5 that chance would send elsewhere."""
    rng, made = np.random.default_rng(seed), np.zeros((steps, L, E), np.int64)
    for step in range(steps):
        for layer in range(L):
            ids = uniform_ids(rng, TOKENS, E, K)
            if layer == 1 and step + 1 in moved:
                ids[np.flatnonzero((ids != 5).all(1))[::4], 0] = 5
            made[step, layer] = np.bincount(ids.ravel(), minlength=E)
    return made


def history(root: Path, load: np.ndarray, every: int, training: bool = True) -> Trace:
    """Committed after `every` steps, as a training run's; steps count from 1."""
    manifest = {"model": {"id": "made"}, "capture": {"weights": False}}
    if training:
        manifest["training"] = {"every": 1}
    options: dict[str, Any] = {"weights": False, "counts_only": True, "shard_tokens": 1}
    with TraceWriter(root, manifest, routers(L, E, K), **options) as writer:
        for first in range(0, len(load), every):
            part = load[first : first + every]
            last, counts = first + len(part), list(part.sum(0)[:, None])
            of = last, len(part) * TOKENS, [""], counts, None, None
            writer.write(CountedBatches(*of, first_batch=first + 1))
    return open_trace(root)


def found(made: Any, kind: str = "by_step") -> Any:
    return next(one for one in made.verdict() if one.kind == kind)


def test_windows_are_of_the_same_steps_and_their_numbers_numpys(tmp_path: Path) -> None:
    """A was committed every 10 steps, B every 15 and has fewer: common steps end at 30 and 60."""
    a, b = loads(0, 100), loads(1, 65)
    made: Any = moe_inspect.compare(history(tmp_path / "a", a, 10), history(tmp_path / "b", b, 15))
    table = made.tables["windows"]
    assert table["first_step"].tolist() == [1, 31] * L
    assert table["last_step"].tolist() == [30, 60] * L
    for row in table.itertuples(index=False):
        steps = slice(row.first_step - 1, row.last_step)
        p, q = (x[steps, row.layer].sum(0) for x in (a, b))
        assert (row.tokens_a, row.tokens_b) == (30 * TOKENS, 30 * TOKENS)
        share_p, share_q = p / p.sum(), q / q.sum()
        e, apart = row.expert, np.abs(share_p - share_q)
        assert e == apart.argmax()
        expected = [apart.sum() / 2, *(x.max() / x.mean() - 1 for x in (p, q))]
        found_here = [row.load_shift, row.max_vio_a, row.max_vio_b]
        assert found_here == pytest.approx(expected)
        ratios = row.load_ratio_a, row.load_ratio_b
        assert ratios == pytest.approx((E * share_p[e], E * share_q[e]))
        assert not row.beyond_chance
    # the same numbers as of the whole traces, where these hold no other steps
    c, d = history(tmp_path / "c", a[:30], 30), history(tmp_path / "d", b[:30], 15)
    whole: Any = moe_inspect.compare(c, d)
    for name in ("load_shift", "load_shift_floor"):
        of_windows = whole.tables["windows"][name].to_numpy()
        assert of_windows == pytest.approx(whole.tables["load_shift"][name].to_numpy())
        assert of_windows == pytest.approx(table[table["window"] == 0][name].to_numpy())
    said = found(made)
    assert said.severity == "good"
    assert said.values["left_out"] == ("61 to 100", "61 to 65")
    assert "Left out: steps 61 to 100 of A and 61 to 65 of B" in said.text


def test_the_step_from_which_two_runs_differ_is_found(tmp_path: Path) -> None:
    first = history(tmp_path / "a", loads(0, 100), 10)
    moved = [*range(21, 31), *range(51, 101)]  # a single window is not yet a run that differs
    made: Any = moe_inspect.compare(first, history(tmp_path / "b", loads(1, 100, moved), 10))
    windows, table = made.tables["windows"], made.tables["diverged"]
    beyond = windows[windows["beyond_chance"]]
    assert beyond["layer"].unique().tolist() == [1]
    assert beyond["first_step"].tolist() == [21, *range(51, 101, 10)]
    assert (beyond["expert"] == 5).all()
    assert table["windows_beyond_chance"].tolist() == [0, 6]
    assert table["since_step"].isna().tolist() == [True, False]
    assert table["since_step"][1] == 51
    assert table[["windows_since", "beyond_chance_since"]].to_numpy().tolist() == [[0, 0], [5, 5]]
    said = found(made)
    assert (said.severity, said.layer, said.values["since_step"]) == ("note", 1, 51)
    assert "differs by more than chance of independent tokens" in said.text
    assert "from step 51 on in layer 1 (5 of the 5 windows since); not in layer 0" in said.text
    # of two runs that differ from the start, and of two that do not
    moved = history(tmp_path / "c", loads(2, 100, range(1, 101)), 10)
    assert "from the first step on in layer 1" in found(moe_inspect.compare(first, moved)).text
    same = found(moe_inspect.compare(first, history(tmp_path / "d", loads(3, 100), 10)))
    assert same.severity == "good"
    said = "differs by more than chance of independent tokens, in 10 windows of steps 1 to 100"
    assert f"no load {said}" in same.text


def test_step_by_step_a_router_whose_load_no_text_explains_is_warned_of(tmp_path: Path) -> None:
    a, b = (np.stack([np.stack(of)] * 4) for of in ((EVEN, STEEP), (EVEN_B, STEEP_B)))
    made: Any = moe_inspect.compare(history(tmp_path / "a", a, 1), history(tmp_path / "b", b, 1))
    assert (found(made).severity, found(made).values["routers"]) == ("warning", 2)
    assert "in layers 0, 1 (4 of the 4 windows since). Most in steps 1 to 1" in found(made).text
    assert "6.00% of the load moves in layer 0" in found(made).text


def test_what_cannot_be_compared_by_step_says_why(tmp_path: Path) -> None:
    of = loads(0, 20)
    run = history(tmp_path / "run", of, 5)
    passes = history(tmp_path / "passes", of, 5, training=False)
    ids = np.random.default_rng(0).integers(0, E // 2, (L, 1_000, 1)) * 2 + np.arange(K)
    decisions = write_trace(tmp_path / "d", list(ids.astype(np.uint16)), E)
    for other, says in (
        (passes, "A counts steps of a training run, B forward passes"),
        (decisions, "B holds decisions, not counts by step"),
    ):
        made: Any = moe_inspect.compare(run, other)
        assert says in found(made).text
        assert len(made.tables["windows"]) == len(made.tables["diverged"]) == 0
    # a single window tells no more than the whole
    one: Any = moe_inspect.compare(run, history(tmp_path / "late", of, 20))
    assert "by_step" not in {x.kind for x in one.verdict()}
    assert len(one.tables["windows"]) == L
    # control: passes and passes
    assert "forward passes 1 to 20" in found(moe_inspect.compare(passes, passes)).text


def test_the_command_shows_it(tmp_path: Path, cli_here: Cli) -> None:
    a = history(tmp_path / "a", loads(0, 40), 5)
    b = history(tmp_path / "b", loads(1, 40, range(16, 41)), 10)
    names = str(a.path), str(b.path)
    text = cli_here("compare", *names, "--html", str(tmp_path / "p.html")).stdout
    assert "from step 11 on in layer 1" in text.replace("\n  ", " ")
    assert "windows_beyond_chance" in text
    assert "Since which step" in (tmp_path / "p.html").read_text()
    cli_here("compare", *names, "--fail-above", "windows_beyond_chance=0", check=3)
    cli_here("compare", names[0], names[0], "--fail-above", "windows_beyond_chance=0")


def test_windows_by_hand() -> None:
    """Any shards of any ranks: each step by itself, in a loop."""
    rng = np.random.default_rng(0)
    several = 0
    for _ in range(500):
        spans = []
        for _ in range(2):
            ranks, rows = int(rng.integers(1, 3)), []
            for rank in range(ranks):
                ends = np.sort(rng.choice(np.arange(1, 15), int(rng.integers(1, 8)), False))
                starts = np.r_[rng.integers(1, ends[0] + 1), ends[:-1] + 1]
                kept = rng.random(len(ends)) < 0.95
                kept[0] = True
                rows += [(s, e, rank) for s, e, k in zip(starts, ends, kept, strict=True) if k]
            spans.append(np.array(rows, np.int64))
        expected, start = [], 0
        for step in range(1, 17):
            if any(first < step <= last for of in spans for first, last, _ in of):
                continue
            if all(
                any(first <= s <= last and rank == r for first, last, r in of)
                for of in spans
                for rank in set(of[:, 2])
                for s in range(start, step)
            ):
                expected.append((start, step - 1))
            start = step
        first_W, last_W, windows = _windows(spans)
        assert expected == list(zip(first_W.tolist(), last_W.tolist(), strict=True))
        for of, window_N in zip(spans, windows, strict=True):
            for (first, last, _), w in zip(of, window_N, strict=True):
                inside = [i for i, (a, b) in enumerate(expected) if a <= first and last <= b]
                assert [w] == (inside or [-1])
        several += len(first_W) > 1
    assert several > 20

"""Two traces of which one holds counts only: the load of the experts is compared, with what chance
alone gives, and what needs decisions is refused by name; of two histories by step, in windows of
the same steps."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.comparison.compare import TABLES
from moe_inspect.comparison.load_shift import _windows
from moe_inspect.comparison.result import LOAD_TABLES
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace, open_trace
from moe_inspect.trace.writer import CountedBatches, ShardLimits, TraceWriter
from tests.conftest import Cli
from tests.support.synthetic import routers, uniform_ids, write_counts, write_trace
from tests.support.watched import waited

E, K, L, TOKENS = 8, 2, 2, 200  # layers of a history, and tokens of its steps


def loads_of(ids: list[np.ndarray], experts: int = E) -> list[np.ndarray]:
    return [np.bincount(ids_TK.ravel(), minlength=experts)[None] for ids_TK in ids]


def drawn(seed: int, T: int = 5_000, L: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [uniform_ids(rng, T, E, K) for _ in range(L)]


def moved(ids: list[np.ndarray]) -> list[np.ndarray]:
    """In layer 1 a quarter of the tokens that did not choose expert 5 choose it first."""
    of_layer = ids[1].copy()
    for row in of_layer[::4]:
        if 5 not in row:
            row[0] = 5
    return [ids[0], of_layer, *ids[2:]]


Counted = Callable[..., Trace]


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    """A trace of the counts of ids, by name."""
    return lambda name, ids, **more: write_counts(tmp_path / name, loads_of(ids, **more), K)


@pytest.fixture
def pair(counted: Counted) -> tuple[Trace, Trace]:
    return counted("a", drawn(0)), counted("b", moved(drawn(1, T=2_000)))


def kinds(made: Any) -> dict[str, Any]:
    return {found.kind: found for found in made.verdict()}


def test_a_shift_is_found_where_it_was_made_and_chance_is_none(
    counted: Counted, tmp_path: Path
) -> None:
    first, other = counted("a", drawn(0)), counted("b", moved(drawn(1)))
    found = kinds(moe_inspect.compare(first, other))["load_shift"]
    assert (found.severity, found.layer, found.values["expert"]) == ("note", 1, 5)
    assert found.values["routers"] == 1
    assert "differs by more than chance of independent tokens: up to" in found.text
    same = kinds(moe_inspect.compare(first, counted("c", drawn(2))))["load_shift"]
    assert (same.severity, same.values["routers"]) == ("good", 0)
    # where documents tell how alike their tokens are, and where no document is so much alike
    known = write_trace(tmp_path / "d", drawn(0), E, document=np.arange(5_000) // 100)
    collapsed = [drawn(0)[0], np.tile(np.uint16([5, 6]), (5_000, 1)), *drawn(0)[2:]]
    for pair in ((known, other), (first, counted("e", collapsed))):
        found = kinds(moe_inspect.compare(*pair))["load_shift"]
        assert (found.severity, found.layer) == ("warning", 1)


def test_decisions_are_counted_where_the_other_holds_counts(
    counted: Counted, tmp_path: Path
) -> None:
    decisions = write_trace(tmp_path / "decisions", drawn(3), E)
    counts = counted("counts", drawn(3))
    for holder, sides in (("B", (decisions, counts)), ("A", (counts, decisions))):
        made: Any = moe_inspect.compare(*sides)
        assert (made.tables["load_shift"]["load_shift"] == 0).all()
        load = made.tables["load"]
        expected = np.concatenate(loads_of(drawn(3))).ravel().tolist()
        assert [load[f"assignments_{side}"].tolist() for side in "ab"] == [expected] * 2
        assert kinds(made)["counts_only"].text.startswith(f"{holder} holds counts only: ")


def test_a_trace_that_is_still_written_is_compared_as_far_as_it_goes(
    counted: Counted, tmp_path: Path
) -> None:
    ids, root = drawn(0), tmp_path / "live"
    whole = counted("whole", ids)
    parts = [[ids_TK[:2_000] for ids_TK in ids], [ids_TK[2_000:] for ids_TK in ids]]
    with TraceWriter(root, {}, routers(3, E, K), weights=False, counts_only=True) as writer:
        with pytest.raises(MoeInspectError, match="holds no tokens"):
            moe_inspect.compare(root, whole).verdict()
        for n, part in enumerate(parts, 1):
            load, shards = loads_of(part), writer.next_shard
            writer.write(CountedBatches(n, len(part[0]), ["text"], load, None))
            waited(lambda before=shards: writer.next_shard > before or writer.failed)
            made: Any = moe_inspect.compare(root, whole)
            assert made.tables["balance"]["tokens_a"].tolist() == [(2_000, 5_000)[n - 1]] * 3
            assert "still being recorded" in kinds(made)["incomplete"].text
    assert "incomplete" not in kinds(moe_inspect.compare(root, whole))


def test_what_needs_decisions_is_refused_by_name(pair: tuple[Trace, Trace], cli_here: Cli) -> None:
    made: Any = moe_inspect.compare(*pair)
    for name in set(TABLES) - set(LOAD_TABLES):
        with pytest.raises(MoeInspectError, match="hold counts only, no decisions: there is no"):
            made.tables[name]
    a, b = (str(trace.path) for trace in pair)
    for arguments, says in (
        (["--table", "agreement"], "hold counts only, no decisions"),
        (["--table", "flips"], "there is no table 'flips', only verdict, summary, "),
        (["--fail-above", "load_shift=1,set_mismatch=0"], "there is no metric 'set_mismatch'"),
        (["--noise", a], "which noise needs"),
        (["--drop-last"], "which drop_last needs"),
        (["--phase", "decode"], "which have no phases"),
    ):
        result = cli_here("compare", a, b, *arguments, check=1)
        assert says in result.stderr
        assert "counts only" in result.stderr
        assert result.stderr.count("\n") == 1


def test_other_numbers_of_experts_are_shown_side_by_side(counted: Counted, cli_here: Cli) -> None:
    a, b = counted("a", drawn(0)), counted("b", drawn(0), experts=16)
    assert moe_inspect.compare(a, b).kind.of == "different models"
    with pytest.raises(MoeInspectError, match=r"8 experts per layer, B 16\), which layers needs"):
        moe_inspect.compare(a, b, layers=0)
    result = cli_here("compare", str(a.path), str(b.path))
    assert "Different models: A has 8 experts per layer, B 16" in result.stdout


def test_routers_of_one_trace_alone_are_named(counted: Counted) -> None:
    a, b = counted("a", drawn(0)), counted("b", drawn(0, L=2))
    made: Any = moe_inspect.compare(a, b)
    assert made.tables["load_shift"]["layer"].tolist() == [0, 1]
    assert kinds(made)["missing_layers"].text == "Only A has layer 2: not compared."
    many = counted("many", drawn(0, L=12))
    found = kinds(moe_inspect.compare(many, b, layers="0,2-5,7-11"))
    assert found["missing_layers"].text == "Only A has layers 2-5, 7-11 (9 layers): not compared."
    # B's layer n as A's n + 1
    shifted: Any = moe_inspect.compare(a, b, shift_layers=1).tables["load"]
    expected = np.concatenate(loads_of(drawn(0)[1:])).ravel()
    assert shifted["assignments_a"].tolist() == expected.tolist()
    assert shifted["assignments_b"].tolist() == made.tables["load"]["assignments_b"].tolist()


def test_few_experts_with_load_differ_more_by_chance(tmp_path: Path) -> None:
    """Two experts of eight have all load: their distance varies as one normal variable does."""
    rng = np.random.default_rng(0)
    alike, other = rng.binomial(1_000, 0.5, (6, 40)), rng.binomial(1_000, 0.8, 40)
    cases = [(1_000, alike[n], alike[n + 1], 0) for n in (0, 2, 4)]
    cases += [(1_000, alike[0], other, 40), (2, [2], [0], 0)]  # two tokens tell nothing
    for n, (tokens, *both, beyond) in enumerate(cases):
        sides = []
        for name, of in zip("ab", both, strict=True):
            load = [np.array([[x, tokens - x, *[0] * 6]]) for x in of]
            sides.append(write_counts(tmp_path / f"{n}{name}", load, 1))
        found = kinds(moe_inspect.compare(*sides))["load_shift"]
        assert (found.values["routers"], found.severity == "good") == (beyond, beyond == 0)


# --- by step


def loads(
    seed: int, steps: int, moved: Sequence[int] = (), L: int = L, E: int = E, k: int = K
) -> np.ndarray:
    """int64 [steps, L, E]. In the steps of `moved` the last layer sends a quarter of its tokens to
    one expert (5, or the last) that chance would send elsewhere."""
    rng, made, to = np.random.default_rng(seed), np.zeros((steps, L, E), np.int64), min(5, E - 1)
    for step in range(steps):
        for layer in range(L):
            ids = uniform_ids(rng, TOKENS, E, k)
            if layer == L - 1 and step + 1 in moved:
                ids[np.flatnonzero((ids != to).all(1))[::4], 0] = to
            made[step, layer] = np.bincount(ids.ravel(), minlength=E)
    return made


def history(root: Path, load: np.ndarray, every: int, training: bool = True, k: int = K) -> Trace:
    """Committed after `every` steps, as a training run's; steps count from 1."""
    manifest = {"model": {"id": "made"}, "capture": {"weights": False}}
    if training:
        manifest["training"] = {"every": 1}
    options: dict[str, Any] = {"weights": False, "counts_only": True, "limits": ShardLimits(1)}
    with TraceWriter(root, manifest, routers(*load.shape[1:], k), **options) as writer:
        for first in range(0, len(load), every):
            part = load[first : first + every]
            last, counts = first + len(part), list(part.sum(0)[:, None])
            of = last, len(part) * TOKENS, [""], counts, None
            writer.write(CountedBatches(*of, first_batch=first + 1))
    return open_trace(root)


def test_windows_are_of_the_same_steps(tmp_path: Path) -> None:
    """A was committed every 10 steps, B every 15 and has fewer: common steps end at 30 and 60."""
    a, b = loads(0, 100), loads(1, 65)
    made: Any = moe_inspect.compare(history(tmp_path / "a", a, 10), history(tmp_path / "b", b, 15))
    table = made.tables["windows"]
    assert table["first_step"].tolist() == [1, 31] * L
    assert table["last_step"].tolist() == [30, 60] * L
    said = kinds(made)["by_step"]
    assert said.severity == "good"
    assert said.values["left_out"] == ("61 to 100", "61 to 65")
    assert "Left out: steps 61 to 100 of A and 61 to 65 of B" in said.text


def test_the_step_from_which_two_runs_differ_is_found(tmp_path: Path) -> None:
    first = history(tmp_path / "a", loads(0, 100), 10)
    moved = [*range(21, 41), *range(51, 101)]  # two windows are not yet a run that differs
    made: Any = moe_inspect.compare(first, history(tmp_path / "b", loads(1, 100, moved), 10))
    said = kinds(made)["by_step"]
    assert (said.severity, said.layer, said.values["since_step"]) == ("note", 1, 51)
    assert "differs by more than chance of independent tokens" in said.text
    assert "from step 51 on in layer 1 (5 of the 5 windows since); not in layer 0" in said.text
    # of two runs that differ from the start, and of two that do not
    for name, load, severity, says in (
        ("c", loads(2, 100, range(1, 101)), "note", "from the first step on in layer 1"),
        (
            "d",
            loads(3, 100),
            "good",
            "no load differs by more than chance of independent tokens, in",
        ),
    ):
        said = kinds(moe_inspect.compare(first, history(tmp_path / name, load, 10)))["by_step"]
        assert (said.severity, says in said.text) == (severity, True)


def test_step_by_step_a_router_whose_load_no_text_explains_is_warned_of(tmp_path: Path) -> None:
    """6 % of an even load moves, which chance or another text explains, and less of a steep one,
    which they do not."""
    a = np.array([[[25_000] * 8, [97_000, 97_000, *[1_000] * 6]]] * 4)
    b = a + np.array([3_000 * np.repeat([-1, 1], 4), [-11_000, *[0] * 6, 11_000]])
    made: Any = moe_inspect.compare(history(tmp_path / "a", a, 1), history(tmp_path / "b", b, 1))
    said = kinds(made)["by_step"]
    assert (said.severity, said.values["routers"]) == ("warning", 2)
    assert "in layers 0, 1 (4 of the 4 windows since). Most in steps 1 to 1" in said.text
    assert "6.00% of the load moves in layer 0" in said.text


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
        assert says in kinds(made)["by_step"].text
        assert len(made.tables["windows"]) == len(made.tables["diverged"]) == 0
    # a single window tells no more than the whole
    one: Any = moe_inspect.compare(run, history(tmp_path / "late", of, 20))
    assert "by_step" not in kinds(one)
    assert len(one.tables["windows"]) == L
    # control: passes and passes
    assert "forward passes 1 to 20" in kinds(moe_inspect.compare(passes, passes))["by_step"].text


def test_the_command_writes_text_tables_a_page_and_gates(tmp_path: Path, cli_here: Cli) -> None:
    a = history(tmp_path / "a", loads(0, 40), 5)
    b = history(tmp_path / "b", loads(1, 40, range(16, 41)), 10)
    made: Any = moe_inspect.compare(a, b)
    text = cli_here("compare", "a", "b").stdout.replace("\n  ", " ")
    assert cli_here("compare", "a", "b", "--html", "p.html").stdout.count("\n") == 1
    for said in ("from step 11 on in layer 1", "load_shift", "max_vio_difference", "beyond_chance"):
        assert said in text
    page = (tmp_path / "p.html").read_text()
    for said in ("The load of two traces", "Load that moves", "How even the load is", "Experts"):
        assert said in page
    assert "Since which step" in page
    written = pd.read_csv(io.StringIO(cli_here("compare", "a", "b", "--format", "csv").stdout))
    pd.testing.assert_frame_equal(written, made.tables["load_shift"], check_exact=False)
    for name in LOAD_TABLES:
        cli_here("compare", "a", "b", "--table", name, "-o", f"{name}.parquet")
        assert len(pd.read_parquet(tmp_path / f"{name}.parquet")) == len(made.tables[name])
    for other, limits, check in (
        ("b", "load_shift=0.01", 3),
        ("b", "load_shift=0.9,dead_experts_b=0", 0),
        ("b", "windows_beyond_chance=0", 3),
        ("a", "windows_beyond_chance=0", 0),
    ):
        cli_here("compare", "a", other, "--fail-above", limits, check=check)


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

"""Two traces of which one holds counts only: the load of the experts is compared, with what chance
alone gives, and what needs decisions is refused by name."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.comparison.compare import LOAD_TABLES, TABLES, compare_checkpoints
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.writer import CountedBatches, TraceWriter
from tests.conftest import Cli
from tests.synthetic import routers, uniform_ids, write_counts, write_trace

E, K = 8, 2


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


def test_the_tables_hold_the_load_of_both_and_the_difference(pair: tuple[Trace, Trace]) -> None:
    made: Any = moe_inspect.compare(*pair)
    a, b = (np.concatenate(loads_of(ids)) for ids in (drawn(0), moved(drawn(1, T=2_000))))
    load, shift, balance = (made.tables[name] for name in ("load", "load_shift", "balance"))
    moved_LE = b / b.sum(1, keepdims=True) - a / a.sum(1, keepdims=True)
    assert np.allclose(load["share_difference"], moved_LE.ravel())
    assert np.allclose(load["load_ratio_difference"], E * moved_LE.ravel())
    assert np.allclose(shift["load_shift"], np.abs(moved_LE).sum(1) / 2)
    for side, load_LE, tokens in (("a", a, 5_000), ("b", b, 2_000)):
        assert load[f"assignments_{side}"].tolist() == load_LE.ravel().tolist()
        assert balance[f"tokens_{side}"].tolist() == pytest.approx([tokens] * 3, abs=E)
    for name in ("max_vio", "entropy", "dead_experts"):
        of_a, of_b = (np.asarray(getattr(bal, name)(load_LE), float) for load_LE in (a, b))
        assert np.allclose(balance[f"{name}_a"], of_a)
        assert np.allclose(balance[f"{name}_difference"].astype(float), of_b - of_a)


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


EVEN, STEEP = np.full(E, 25_000), np.array([97_000, 97_000, *[1_000] * 6])
# 6 % of the even load moves, which chance or another text explains, and less of the steep one,
# which they do not
EVEN_B, STEEP_B = (
    EVEN + 3_000 * np.repeat([-1, 1], E // 2),
    STEEP + 11_000 * (np.eye(E)[7] - np.eye(E)[0]).astype(int),
)


def test_the_floor_is_what_traces_that_route_alike_are_apart(counted: Counted) -> None:
    """Mean over many routers, for loads that are even and for one that is not."""
    L, popular = 300, np.r_[np.full(E // 2, 3.0), np.full(E // 2, 1.0)]
    for name, weight in (("even", np.ones(E)), ("uneven", popular)):
        rng, sides = np.random.default_rng(7), list[Trace]()
        for side, T in (("a", 3_000), ("b", 700)):
            # the K largest of weighted exponentials: K distinct experts
            times = [rng.exponential(size=(T, E)) / weight for _ in range(L)]
            sides.append(counted(f"{name}/{side}", [np.argsort(x, axis=1)[:, :K] for x in times]))
        table: Any = moe_inspect.compare(*sides).tables["load_shift"]
        for metric in ("load_shift", "jsd_bits"):
            found, floor = table[metric].mean(), table[f"{metric}_floor"].mean()
            assert found == pytest.approx(floor, rel=0.1), metric
            # control: with other numbers of tokens it would not be
            assert found != pytest.approx(floor * np.sqrt(2), rel=0.1)


def test_decisions_are_counted_where_the_other_holds_counts(
    counted: Counted, tmp_path: Path
) -> None:
    decisions = write_trace(tmp_path / "decisions", drawn(3), E)
    counts = counted("counts", drawn(3))
    for holder, sides in (("B", (decisions, counts)), ("A", (counts, decisions))):
        made: Any = moe_inspect.compare(*sides)
        assert (made.tables["load_shift"]["load_shift"] == 0).all()
        load = made.tables["load"]
        assert load["assignments_a"].equals(load["assignments_b"].rename("assignments_a"))
        assert load["assignments_a"].sum() == 3 * 5_000 * K
        assert kinds(made)["counts_only"].text.startswith(f"{holder} holds counts only: ")
    assert moe_inspect.compare(decisions, decisions).kind.of == "decisions"


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
            writer.write(CountedBatches(n, len(part[0]), ["text"], load, None, None))
            while writer.next_shard == shards and not writer.failed:
                time.sleep(0.005)
            made: Any = moe_inspect.compare(root, whole)
            assert made.tables["balance"]["tokens_a"].tolist() == [(2_000, 5_000)[n - 1]] * 3
            assert "still being recorded" in kinds(made)["incomplete"].text
    assert "incomplete" not in kinds(moe_inspect.compare(root, whole))


def test_what_needs_decisions_is_refused_by_name(pair: tuple[Trace, Trace], cli_here: Cli) -> None:
    made: Any = moe_inspect.compare(*pair)
    assert set(made.tables["refused"]["table"]) == set(TABLES) - set(LOAD_TABLES)
    assert made.tables["refused"]["why"].str.endswith("hold counts only, no decisions").all()
    a, b = (str(trace.path) for trace in pair)
    for arguments, says in (
        (["--table", "agreement"], "there is no table 'agreement', only verdict, refused, summary"),
        (["--fail-above", "load_shift=1,set_mismatch=0"], "there is no metric 'set_mismatch'"),
        (["--noise", a], "which noise needs"),
        (["--drop-last"], "which drop_last needs"),
        (["--phase", "decode"], "which have no phases"),
    ):
        result = cli_here("compare", a, b, *arguments, check=1)
        assert says in result.stderr
        assert "counts only" in result.stderr
        assert result.stderr.count("\n") == 1
    with pytest.raises(MoeInspectError, match="give two traces, whose load"):
        compare_checkpoints([*pair, pair[0]])


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
    # B's layer n as A's n + 1
    shifted: Any = moe_inspect.compare(a, b, shift_layers=1).tables["load"]
    expected = np.concatenate(loads_of(drawn(0)[1:])).ravel()
    assert shifted["assignments_a"].tolist() == expected.tolist()
    assert shifted["assignments_b"].tolist() == made.tables["load"]["assignments_b"].tolist()


def test_the_command_writes_text_tables_a_page_and_gates(
    pair: tuple[Trace, Trace], cli_here: Cli, tmp_path: Path
) -> None:
    a, b = (str(trace.path) for trace in pair)
    made: Any = moe_inspect.compare(*pair)
    text = cli_here("compare", a, b, "--html", str(tmp_path / "p.html")).stdout
    assert "1 of 3 routers differs" in text.replace("\n  ", " ")
    assert "load_shift" in text
    assert "max_vio_difference" in text
    page = (tmp_path / "p.html").read_text()
    for said in ("The load of two traces", "Load that moves", "How even the load is", "Experts"):
        assert said in page
    shift = made.tables["load_shift"]
    written = cli_here("compare", a, b, "--format", "csv").stdout
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(written)), shift, check_exact=False)
    lines = cli_here("compare", a, b, "--table", "load", "--format", "json").stdout.splitlines()
    expected = made.tables["load"]["assignments_b"].tolist()
    assert [json.loads(x)["assignments_b"] for x in lines] == expected
    for name in LOAD_TABLES:
        out = tmp_path / f"{name}.parquet"
        cli_here("compare", a, b, "--table", name, "-o", out)
        assert len(pd.read_parquet(out)) == len(made.tables[name])
    cli_here("compare", a, b, "--fail-above", "load_shift=0.01", check=3)
    cli_here("compare", a, b, "--fail-above", "load_shift=0.9,dead_experts_b=0")


def test_few_experts_with_load_differ_more_by_chance(tmp_path: Path) -> None:
    """Two experts of eight have all load: their distance varies as one normal variable does."""
    rng, routers = np.random.default_rng(0), 40

    def found(name: str, a: np.ndarray, b: np.ndarray) -> Any:
        sides = []
        for side, of in (("a", a), ("b", b)):
            load = [np.array([[x, tokens - x, *[0] * 6]]) for x, tokens in of.tolist()]
            sides.append(write_counts(tmp_path / f"{name}-{side}", load, 1))
        return kinds(moe_inspect.compare(*sides))["load_shift"]

    def drawn(tokens: int, share: float) -> np.ndarray:
        of_R = rng.binomial(tokens, share, routers)
        return np.column_stack([of_R, np.full(routers, tokens)])

    same = [found(f"same{n}", drawn(1_000, 0.5), drawn(1_000, 0.5)) for n in range(3)]
    assert [one.values["routers"] for one in same] == [0, 0, 0]
    assert found("other", drawn(1_000, 0.5), drawn(1_000, 0.8)).values["routers"] == routers
    few = found("few", np.array([[2, 2]]), np.array([[0, 2]]))
    assert few.severity == "good", "two tokens tell nothing"

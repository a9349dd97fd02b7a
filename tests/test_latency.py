"""The latency model: physics that must hold whatever the constants, and what is known of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import latency_fit
from benchmarks.latency_tables import DRAWS, balanced, load, power_law
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.latency import (
    SHIPPED,
    START,
    KernelTime,
    LatencyModel,
    Shape,
    features,
    fit,
    times,
)
from moe_inspect.simulate.measured_times import BYTES, KERNEL
from tests.test_real_data import REAL

SHAPE = Shape(hidden=7168, inter=2048, top_k=8, experts=256)
KERNELS = LatencyModel.from_file().kernels
TABLES = REAL / "moe_latency"


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> KernelTime:
    return request.param


def test_a_weight_takes_its_bits_and_its_share_of_a_scale() -> None:
    """Of each kind: the bits of a weight, of a scale, and the weights that share one."""
    kinds = {
        "bfloat16": (16, 0, 1),
        "fp8": (8, 0, 1),
        "fp8_block": (8, 32, 128 * 128),
        "int4_wo": (4, 16, 128),
        "nvfp4": (4, 8, 16),
        "w4a16_mxfp4": (4, 8, 32),
        "w4a8_mxfp4_mxfp8": (4, 8, 32),
    }
    expected = {name: (bits + scale / group) / 8 for name, (bits, scale, group) in kinds.items()}
    assert expected == pytest.approx(BYTES, rel=0.03)


def test_more_tokens_never_take_less_time(kernel: KernelTime) -> None:
    rng = np.random.default_rng(0)
    tokens_SE = np.cumsum(rng.poisson(rng.choice([0.1, 1, 30], (200, 8))), 0).astype(float)
    for handed_S in (None, np.arange(200.0)):
        ms_S = kernel.predict(tokens_SE, SHAPE, handed_S)
        assert (np.diff(ms_S) >= -1e-12).all()
        assert ms_S[-1] > ms_S[0] > 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=2, max_size=12),
    st.randoms(use_true_random=False),
    st.sampled_from(KERNELS),
)
def test_the_order_of_the_experts_of_a_rank_changes_nothing(
    tokens: list[int], random: Random, kernel: KernelTime
) -> None:
    shuffled = tokens[:]
    random.shuffle(shuffled)
    one, other = kernel.predict(np.array([tokens, shuffled]), SHAPE)
    assert one == pytest.approx(other, rel=1e-12)
    used = [n for n in tokens if n]  # an expert without a token is as good as absent
    alone = kernel.predict(np.array([used or [0]]), SHAPE)
    assert alone[0] == pytest.approx(one, rel=1e-12)


def test_a_known_time_by_hand() -> None:
    """Experts of 1 and 17 tokens: 18 rows, 48 in tiles of 16; 1.5 million weights of 2 bytes."""
    shape, constants = Shape(1000, 500, 2, 64), dict.fromkeys(START, 0.0)
    kernel = KernelTime("g", "e", "1", "k", "bfloat16", constants)

    def with_only(**some: float) -> float:
        return replace(kernel, constants=constants | some).predict(np.array([[1, 17]]), shape)[0]

    assert with_only(launch_ms=0.5) == 0.5
    of_sizes = {"hidden": 1.0, "inter": 0.5, "experts": 0.064}
    for name, ms in of_sizes.items():
        assert with_only(**{f"launch_ms_per_1k_{name}": 1.0}) == ms
    assert with_only(weights_ms_per_gb=1.0) == pytest.approx(2 * 1.5e6 * 2 / 1e9)
    assert with_only(tile1_ms_per_tflop=1.0) == pytest.approx(18 * 2 * 1.5e6 / 1e12)
    assert with_only(tile16_ms_per_tflop=1.0) == pytest.approx(48 * 2 * 1.5e6 / 1e12)
    assert with_only(handed_ms_per_gvalue_hidden=1.0) == pytest.approx(18 * 1000 / 1e9)
    assert with_only(ms_per_1k_used_experts=1.0) == 2e-3
    # 3 ms of weights and 4 ms of tiles: 7 one after the other, 5 with a power of 2
    both = {"weights_ms_per_gb": 3 / 6e-3, "tile1_ms_per_tflop": 4 / 54e-6}
    assert with_only(**both) == pytest.approx(7)
    assert with_only(**both, overlap=1.0) == pytest.approx(5)
    assert with_only(**both, overlap=60.0) == pytest.approx(4, rel=1e-2)


def test_fit_finds_the_constants_that_made_the_times() -> None:
    rng = np.random.default_rng(1)
    truth = np.array([START[name] * rng.uniform(0.5, 2) for name in START])
    row = np.concatenate(
        [
            features(rng.poisson(rng.uniform(0, 400, (60, 1)), (60, 16)), shape, "fp8")
            for shape in (SHAPE, Shape(2048, 768, 8, 128), Shape(4096, 1024, 4, 64))
        ]
    )
    pairs_P2 = np.array([[1, 0], [3, 2]])
    found = fit(row, times(row, truth), pairs_P2)
    ours = times(row, np.array(list(found.values())))
    assert np.abs(np.log(ours / times(row, truth))).max() < 0.03
    wrong = times(row, np.array(list(START.values())))  # control: unfitted constants are not it
    assert np.abs(np.log(wrong / times(row, truth))).max() > 0.1


def test_shipped_constants_are_a_file_like_any(tmp_path: Path) -> None:
    shipped = LatencyModel.from_file()
    assert "aiconfigurator" in shipped.source
    shipped.to_file(tmp_path / "own.json")
    assert (tmp_path / "own.json").read_text() == SHIPPED.read_text()
    fp8 = shipped.kernel(gpu="h200", engine="vllm", dtype="fp8_block")
    assert (fp8.errors["imbalance_error_median"] or 1) < 0.05
    assert fp8.doubt() == ""
    assert "times err by more than 22%" in replace(fp8, errors={"time_error_median": 0.2}).doubt()
    assert replace(fp8, errors={}).doubt() == "how far off they are is unknown"
    with pytest.raises(MoeInspectError) as refused:
        shipped.kernel(engine="vllm")
    assert str(refused.value) == (
        "several times match: give gpu, dtype too: b200 bfloat16; b200 fp8; "
        "b200 fp8_block; h200 bfloat16; h200 fp8; h200 fp8_block"
    )
    with pytest.raises(MoeInspectError, match=r"give kernel too: \w+; \w+_nongated$"):
        shipped.kernel(gpu="h200", engine="trtllm", dtype="fp8")


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held["kernels"][0]["constants"].pop("launch_ms"),
        lambda held: held["kernels"][0]["constants"].update(launch_ms=-1),
        lambda held: held["kernels"][0]["constants"].update(launch_ms=float("nan")),
        lambda held: held["kernels"][0].pop("gpu"),
        lambda held: held["transfers"][0].update(ms_per_gb="fast"),
        lambda held: held.pop("kernels"),
    ],
)
def test_a_broken_file_gets_one_line(tmp_path: Path, change: Callable[[Any], object]) -> None:
    held = json.loads(SHIPPED.read_text())
    change(held)
    (tmp_path / "own.json").write_text(json.dumps(held))
    with pytest.raises(MoeInspectError, match=r"own\.json"):
        LatencyModel.from_file(tmp_path / "own.json")
    with pytest.raises(MoeInspectError, match="none"):
        LatencyModel.from_file(tmp_path / "none")


def test_transfers_grow_with_copies() -> None:
    for way in LatencyModel.from_file().transfers:
        assert (np.diff(way.predict(np.arange(5), 7168)) > 0).all()
        assert way.predict(np.zeros(1), 7168)[0] == way.launch_ms


# --- the loads behind a table


@pytest.mark.parametrize("engine", ["vllm", "trtllm"])
@pytest.mark.parametrize(
    ("n", "experts", "k", "ep"), [(1, 256, 8, 32), (640, 8, 2, 4), (64, 64, 6, 8)]
)
def test_a_power_law_hands_out_every_choice(
    engine: str, n: int, experts: int, k: int, ep: int
) -> None:
    counts_DE = power_law(n, experts, k, ep, 1.2, 0, engine)
    assert (counts_DE.sum(1) == n * k).all()
    assert ((counts_DE >= 0) & (counts_DE <= n)).all()
    by_rank = counts_DE.reshape(DRAWS, ep, -1).sum(2)
    assert (by_rank[:, 0] == by_rank.max(1)).all()


def test_an_sglang_rank_computes_all_choices_of_the_tokens_that_reach_it() -> None:
    chosen = load("sglang", "triton", 64, 256, 8, 64, "balanced")
    ids = balanced(64, 256, 8)
    reached = (ids < 4).any(1).sum()
    assert chosen.tokens_D[0] == reached == 8
    assert chosen.tokens_DE.sum() == reached * 8  # seven of eight belong to other ranks
    assert load("vllm", "triton", 64, 256, 8, 64, "balanced").tokens_DE.sum() == (ids < 4).sum()


@pytest.fixture(scope="module")
def own() -> pd.DataFrame:
    """Times of loads that are more and less even, of three shapes."""
    truth, rng, rows = KERNELS[0], np.random.default_rng(0), []
    for hidden, inter in ((2048, 768), (4096, 1024), (7168, 2048)):
        shape = Shape(hidden, inter, 4, 16)
        for total in (16, 64, 256, 1024, 4096):
            for alpha in (1e3, 3.0, 1.0, 0.3):  # nearly even, and less and less so
                share = rng.dirichlet([alpha] * 8)
                tokens = np.floor(share * total + 0.5)
                tokens[0] += max(0, total - tokens.sum())
                tokens[tokens.argmax()] -= tokens.sum() - total
                ms = truth.predict(tokens[None], shape)[0]
                text = " ".join(str(int(x)) for x in tokens)
                rows.append(("x1", "mine", "1", "k", truth.dtype, hidden, inter, 4, 16, text, ms))
    names = [*KERNEL, "hidden", "inter", "top_k", "experts", "tokens_per_expert", "ms"]
    return pd.DataFrame(rows * 2, columns=names)


def test_times_of_ones_own_are_fitted(
    own: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own.to_csv(tmp_path / "own.csv", index=False)
    names = ["own.csv", "--json", "-o", "own.json", "-o", "errors.csv"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fit", *names])
    latency_fit.main()
    line = json.loads(capsys.readouterr().out)
    assert line["gpu"] == "x1"
    assert line["pairs"] > 50
    assert line["imbalance_error_median"] < 0.05
    found = LatencyModel.from_file("own.json").kernel(gpu="x1")
    tokens = np.array([[9, 9, 0, 50, 1, 1, 1, 3]])
    ours, theirs = (x.predict(tokens, Shape(4096, 1024, 4, 16)) for x in (found, KERNELS[0]))
    assert ours[0] == pytest.approx(theirs[0], rel=0.1)
    assert LatencyModel.from_file("own.csv").kernels == [found]
    errors = pd.read_csv("errors.csv").query("gpu == 'x1' and by == 'held-out shapes'")
    whole, *parts = (
        errors.query(f"ep {ep} 'all' and tokens {tokens} 'all'")
        for ep, tokens in (("==", "=="), ("!=", "=="), ("==", "!="))
    )
    assert whole["imbalance_error_p90"].tolist() == [line["imbalance_error_p90"]]
    for part in parts:
        assert part["pairs"].sum() == line["pairs"]


COUNTS = "tokens_per_expert"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kernel": range(120)}, "the table has 1 rows of 'x1/mine/1/0/nvfp4' with tokens: 100"),
        ({"dtype": "fp3"}, "dtype is 'fp3', not one of bfloat16, fp8, "),
        ({"gpu": None}, "gpu is empty"),
        *(({name: ""}, f"{name} is empty") for name in (COUNTS, "ms", "hidden", "handed", "tp")),
        *(({name: None}, f"{name} is empty") for name in (COUNTS, "ms", "inter", "handed", "tp")),
        *(
            ({name: bad}, f"{name} is '?{bad}'?, not ")
            for name in (COUNTS, "ms", "hidden", "inter", "top_k", "experts", "handed", "tp")
            for bad in ("fast", np.inf, -1, 2e9)
        ),
        ({"ms": 0}, "ms is '?0'?, not a number from 10"),
        ({"tp": 1.5}, "tp is '?1.5'?, not a whole number"),
        ({COUNTS: "1 2 x"}, "tokens_per_expert is '1 2 x', not the tokens of each expert"),
        ({COUNTS: "64 " * 99 + "x"}, "tokens_per_expert is '64 [64 ]*…, not the tokens"),
        ({COUNTS: "0 0"}, "the rank has no tokens: "),
        ({COUNTS: 0, "handed": 0}, "the rank has no tokens: "),
        ({COUNTS: "1 2 3"}, "experts, '?16'?, is no multiple of the number of counts"),
        ({"top_k": 17}, "top_k is '?17'?, above experts, '?16'?"),
    ],
)
@pytest.mark.parametrize("of", ["file", "frame"])
def test_no_times_are_refused(
    own: pd.DataFrame, tmp_path: Path, of: str, changed: dict[str, Any], said: str
) -> None:
    """In one line, which names the row, the second, unless it is the table that is wrong."""
    table, where = own.astype(object), ""
    for name, value in changed.items():
        if isinstance(value, range):
            table[name] = value
        else:
            default = {"handed": 99, "tp": 1}
            cells = list(table.get(name, [default.get(name)] * len(table)))
            table[name] = pd.Series([cells[0], value, *cells[2:]], dtype=object)
            where = "row 2: "
    given: Any = table
    if of == "file":
        given, where = tmp_path / "own.csv", where.replace("row 2", "line 4")
        said = said.replace("the table", ".*own.csv")
        header, *lines = table.to_csv(index=False).splitlines()
        given.write_text("\n".join([header, lines[0], "", *lines[1:], "", ""]))
    with pytest.raises(MoeInspectError, match=where + said) as error:
        LatencyModel.fit(given)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot read .*: No columns"),
        ("gpu,engine\n", "has no column version, kernel, dtype, hidden"),
        (",".join([*KERNEL, "hidden,inter,top_k,experts,tokens_per_expert,ms\n"]), "has no rows"),
        ("gpu\n1,2\n3,4\n", "line 2 has more cells than the header"),
        ("gpu\n1\n3,4\n", "cannot read .*: .*line 3"),
        ("gpu\n\xff\n", "cannot read .*"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(MoeInspectError, match=f"own.csv.*{said}|{said}") as error:
        LatencyModel.from_file(tmp_path / "own.csv")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("of", ["file", "frame"])
def test_ranks_of_one_expert_and_of_no_tokens_are_fitted(
    own: pd.DataFrame, tmp_path: Path, of: str
) -> None:
    """Every third rank is idle and was handed tokens all the same, every fifth has one expert."""
    truth, rows = KERNELS[0], list[dict[str, Any]]()
    for at, cells in enumerate(own.to_dict("records")):
        row = {str(name): cell for name, cell in cells.items()}
        shape = Shape(*(row[name] for name in ("hidden", "inter", "top_k", "experts")))
        text = "0 0 0 0" if at % 3 == 0 else row[COUNTS]
        counts = [64 + at] if at % 5 == 1 else [int(n) for n in text.split()]
        ms = truth.predict(np.array([counts]), shape, handed := 500 + 10 * at)[0]
        cell = counts[0] if len(counts) == 1 else text
        rows.append(row | {COUNTS: cell, "handed": handed, "ms": ms})
    table = pd.DataFrame(rows * 2)
    given: Any = tmp_path / "own.csv" if of == "file" else table
    table.to_csv(tmp_path / "own.csv", index=False)
    model = LatencyModel.fit(given)
    assert model.source == (str(given) if of == "file" else "a table of your own")
    (found,) = model.kernels
    assert found.measured["tokens"][0] > 0
    assert (found.errors["time_error_median"] or 1) < 0.05
    tokens_SE, shape = np.array([[0.0, 0], [100, 20]]), Shape(4096, 1024, 4, 16)
    ours_S, theirs_S = (each.predict(tokens_SE, shape, 900) for each in (found, truth))
    assert ours_S == pytest.approx(theirs_S, rel=0.1)
    one_expert = table.assign(tokens_per_expert=64)  # ints, all of them
    assert LatencyModel.fit(one_expert).kernels


@pytest.mark.parametrize(
    ("tokens", "shape", "handed", "said"),
    [
        ([[1, -1]], {}, None, "tokens_SE has a number that is below 0 or not finite"),
        ([[1, np.nan]], {}, None, "tokens_SE has a number that is below 0 or not finite"),
        ([[1, np.inf]], {}, None, "tokens_SE has a number that is below 0 or not finite"),
        ([[1], [1, 2]], {}, None, "tokens_SE is no array of numbers: "),
        ([[10**400]], {}, None, "tokens_SE is no array of numbers: "),
        ([["many"]], {}, None, "tokens_SE is no array of numbers: "),
        ([1, 2], {}, None, r"tokens_SE has 1 dimensions: give 2, \[steps, experts of the rank\]"),
        ([[1]], {"hidden": 0}, None, "a shape whose hidden is 0: give a number from 1"),
        ([[1]], {"inter": "x"}, None, "a shape whose inter is 'x'"),
        ([[1]], {"top_k": np.nan}, None, "a shape whose top_k is nan"),
        ([[1]], {"experts": 4}, None, "a shape whose top_k, 8, is above its experts, 4"),
        ([[1], [2]], {}, [1, 2, 3], r"handed_S has the shape \(3,\) and tokens_SE has 2 steps"),
        ([[1], [2]], {}, [[1], [2]], r"handed_S has the shape \(2, 1\)"),
        ([[1]], {}, [-1], "handed_S has a number that is below 0 or not finite"),
        ([[1]], {}, np.nan, "handed_S has a number that is below 0 or not finite"),
    ],
)
def test_what_is_no_load_of_a_rank_is_refused(
    tokens: Any, shape: dict[str, Any], handed: Any, said: str
) -> None:
    with pytest.raises(MoeInspectError, match=said) as error:
        KERNELS[0].predict(tokens, replace(SHAPE, **shape), handed)
    assert "\n" not in str(error.value)


def test_one_number_of_tokens_handed_is_of_all_steps() -> None:
    tokens_SE = np.array([[1, 2], [3, 4]])
    one_S, each_S = (KERNELS[0].predict(tokens_SE, SHAPE, of) for of in (9, np.full(2, 9.0)))
    assert one_S.tolist() == each_S.tolist()


@pytest.mark.skipif(not TABLES.is_dir(), reason="the measured tables are not here")
def test_held_out_shapes_of_a_measured_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (table,) = TABLES.glob("h200*vllm*moe_perf.parquet")
    rows = pd.read_parquet(table)
    rows[rows["moe_dtype"] == "fp8_block"].to_parquet(tmp_path / table.name)
    monkeypatch.setattr(sys, "argv", ["fit", str(tmp_path / table.name), "--json"])
    latency_fit.main()
    line = json.loads(capsys.readouterr().out)
    assert line["pairs"] == 10152
    assert line["imbalance_error_median"] < 0.05
    assert line["imbalance_error_p90"] < 0.15
    assert line["time_error_median"] < 0.10

"""Calibration texts: the tokens of each expert, how much text it takes, and which texts are enough,
against counts by other ways, held-out documents and brute force."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

import moe_inspect
from moe_inspect.analysis.metrics import coverage as cov
from moe_inspect.calibration import choose as cho
from moe_inspect.calibration.calibrate import amount, calibrate, chart
from moe_inspect.capture.options import TraceOptions
from moe_inspect.capture.run import trace_model
from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.run import import_trace
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT
from tests.support.damage import edit_manifest
from tests.support.synthetic import uniform_ids, write_counts, write_trace
from tests.test_one_line import run

REAL = ROOT.parent / "shared" / "real"
Demo = Callable[..., Trace]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return moe_inspect.trace_model("demo", tmp_path_factory.mktemp("demo") / "t")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The same, as counts by document."""
    out = tmp_path_factory.mktemp("counted") / "t"
    return moe_inspect.trace_model("demo", out, counts_only=True, by_document=True)


def loads(trace: Trace) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Of each router [documents, E], and the tokens and domains of documents, by pandas alone."""
    documents = trace.documents().sort_values("document")
    numbers = trace.tokens()[["token", "document"]]
    found = list[np.ndarray]()
    for r, router in enumerate(trace.routers):
        table = trace.routing(router=r).merge(numbers, on="token")
        load_SE = np.zeros((len(documents), router.experts), np.int64)
        for k in range(router.top_k):
            np.add.at(load_SE, (table["document"].to_numpy(), table[f"expert_{k}"].to_numpy()), 1)
        found.append(load_SE)
    codes = np.unique(documents["domain"].to_numpy(str), return_inverse=True)[1]
    return found, documents["tokens"].to_numpy(), codes


# --- tables


def test_tables_count_the_tokens_of_each_expert(demo: Trace):
    made = demo.calibrate(min_tokens=2_000)
    load_SE, tokens_S, domain_S = loads(demo)
    whole = np.concatenate([of.sum(0) for of in load_SE])
    table = made.tables["coverage"]
    assert table["tokens"].tolist() == whole.tolist()
    assert table["enough"].tolist() == (whole >= 2_000).tolist()
    assert (table["tokens_low"] < whole).all()
    assert (whole < table["tokens_high"]).all()
    by_layer = made.tables["coverage_by_layer"]
    for load, row in zip(load_SE, by_layer.to_dict("records"), strict=True):
        assert row["under_minimum"] == (load.sum(0) < 2_000).sum()
        assert row["coverage"] == (load.sum(0) >= 2_000).mean()
        assert row["fewest_tokens"] == load.sum(0).min()
    by_domain = made.tables["coverage_by_domain"]
    for d, row in enumerate(by_domain.iloc[:-1].to_dict("records")):
        alone = np.concatenate([of[domain_S == d].sum(0) for of in load_SE])
        assert row["tokens"] == tokens_S[domain_S == d].sum()
        assert (row["under_minimum"], row["without_tokens"]) == (
            (alone < 2_000).sum(),
            (alone == 0).sum(),
        )
    assert by_domain.iloc[-1]["under_minimum"] == (whole < 2_000).sum()
    few = (whole < 2_000).sum()
    assert f"{few} of 32 experts have under 2,000 tokens" in made.said[0]
    weights = demo.routing(router=2)
    of_5 = sum(
        weights[f"weight_{k}"].astype(float)[weights[f"expert_{k}"] == 5].sum() for k in range(2)
    )
    ours = table.query("router == 2 and expert == 5")["weighted_tokens"].iloc[0]
    assert ours == pytest.approx(of_5)


def test_counts_by_document_give_what_decisions_give(demo: Trace, counted: Trace):
    assert verify(counted).ok
    made = [one.calibrate(min_tokens=256, choose="all") for one in (demo, counted)]
    for name in made[0].tables:
        ours, theirs = (of.tables[name].drop(columns="norm_spread", errors="ignore") for of in made)
        np.testing.assert_allclose(
            ours.select_dtypes("number").to_numpy(float),
            theirs.select_dtypes("number").to_numpy(float),
            rtol=1e-4,  # weights are stored in 8 bits, and summed as they are
        )
    assert made[0].said == made[1].said


def test_documents_that_are_split_over_passes_are_counted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sums are taken after every pass, when most of the long documents have begun."""
    from moe_inspect.capture.hook import counts

    monkeypatch.setattr(counts, "MOST_BYTES", 1)
    monkeypatch.setattr(counts, "MOST_WAITING_SLOTS", 1)
    how: dict[str, Any] = {"max_length": 60, "batch_tokens": 128, "max_tokens": 1_500}
    told = moe_inspect.trace_model("demo", tmp_path / "d", **how)
    made = moe_inspect.trace_model(
        "demo", tmp_path / "c", counts_only=True, by_document=True, **how
    )
    assert verify(made).ok
    assert made.n_shards > 3
    passes = [(of.files.first_batch, of.files.last_batch) for of in made.shards]
    assert passes[0][0] == 0
    assert all(first == last + 1 for (_, last), (first, _) in pairwise(passes))
    table = made.counts().set_index(["router", "document", "expert"])["assignments"].sort_index()
    expected = np.stack(loads(told)[0])
    assert np.array_equal(table.to_numpy().reshape(expected.shape), expected)
    for wrong in ({"generate": 2}, {"resume": True}):
        with pytest.raises(MoeInspectError, match="one process feeds whole"):
            moe_inspect.trace_model(
                "demo", tmp_path / "n", counts_only=True, by_document=True, **wrong
            )
    with pytest.raises(MoeInspectError, match="counts_only=True with it"):
        moe_inspect.trace_model("demo", tmp_path / "n", by_document=True)


def test_a_document_that_is_not_whole_at_the_end_is_dropped_and_counted(tmp_path: Path):
    fed = list[int]()

    def stop(done: int, _: int | None) -> None:
        fed.append(done)
        if len(fed) == 2:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"max_length": 60, "batch_tokens": 128, "max_tokens": 1_500}
    options = TraceOptions(**how, counts_only=True, by_document=True)
    with pytest.raises(KeyboardInterrupt):
        trace_model("demo", tmp_path / "t", options, stop)
    trace = moe_inspect.open_trace(tmp_path / "t")
    counts = trace.manifest["counts"]
    assert counts["dropped"] > 0
    assert trace.n_tokens + counts["dropped"] // len(trace.routers) == fed[-1]


# --- how much text it takes


def test_amounts_of_tokens_are_short():
    shown = {0: "0", 9_254: "9,254", 123_456: "123 k", 999_900: "1 M", 2_100_000: "2.1 M"}
    assert {tokens: amount(tokens) for tokens in shown} == shown


def crossing(load_SP: np.ndarray, tokens_S: np.ndarray, minimum: int) -> np.ndarray:
    """After how many tokens of documents in this order each expert has the minimum, [P]."""
    load_SP = np.concatenate([0 * load_SP[:1], load_SP.cumsum(0)])
    at_S, found = np.append(0, tokens_S.cumsum()), list[float]()
    for load_S in load_SP.T:
        n = int(np.argmax(load_S >= minimum))
        if load_S[n] < minimum:
            found.append(np.inf)
            continue
        part = (minimum - load_S[n - 1]) / (load_S[n] - load_S[n - 1])
        found.append(at_S[n - 1] + part * (at_S[n] - at_S[n - 1]))
    return np.array(found)


def held(
    load_SE: list[np.ndarray], tokens_S: np.ndarray, domain_S: np.ndarray, minimum: int, draws: int
) -> dict[float, tuple[int, int, float]]:
    """From a random quarter of the documents: by share of the experts, how often it is not there
    yet, how often its interval holds once the rest has come, and the middle ÷ the truth."""
    rng, S = np.random.default_rng(1), len(tokens_S)
    asked, holds, ratios = ({share: list[Any]() for share in (0.95, 0.99, 1.0)} for _ in range(3))
    for _ in range(draws):
        order, quarter = rng.permutation(S), S // 4
        some = order[:quarter]
        known = cov.forecast([of[some] for of in load_SE], tokens_S[some], domain_S[some], minimum)
        assert known is not None
        took_P = crossing(np.concatenate(load_SE, 1)[order], tokens_S[order], minimum)
        for share in asked:
            nth = int(np.ceil(share * len(took_P) - 1e-9)) - 1
            truth = np.sort(took_P)[nth]
            if truth <= tokens_S[some].sum():
                continue
            low, middle, high = known.until(share)
            asked[share].append(1)
            # of what the whole does not reach it is known that it takes more
            holds[share].append(low <= truth and high >= min(truth, tokens_S.sum()))
            if np.isfinite(truth):
                ratios[share].append(middle / truth)
    return {
        share: (len(asked[share]), sum(holds[share]), float(np.median(ratios[share] or [1])))
        for share in asked
    }


@pytest.mark.parametrize("minimum", [512, 1_024])
def test_a_quarter_of_the_corpus_foretells_the_whole(demo: Trace, minimum: int):
    found = held(*loads(demo), minimum, 200)
    for share, (asked, holds, ratio) in found.items():
        assert asked == 200
        assert holds >= 180, (share, holds)
        assert 0.9 < ratio < 1.1


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_a_quarter_of_real_prompts_foretells_the_whole(tmp_path: Path):
    """Of which one has 41 % of the tokens, and ten fewer than 10 each. In every fourth layer."""
    trace = import_trace("moe-beyond", [REAL / "deepseek_v2_lite_tokens"], tmp_path / "t")
    load_SE, *of_documents = loads(trace)
    found = held(load_SE[::4], *of_documents, 64, 100)
    for share, (asked, holds, ratio) in found.items():
        assert asked > 50
        assert holds >= 0.9 * asked, (share, holds, asked)
        assert 0.7 < ratio < 1.3


def test_an_interval_that_ignores_documents_would_not_hold(demo: Trace):
    """A control: as if each token were a document of its own."""
    load_SE, tokens_S, _ = loads(demo)
    rng, S, missed = np.random.default_rng(1), len(tokens_S), 0
    for _ in range(50):
        order = rng.permutation(S)
        some = order[: S // 4]
        load_P = np.concatenate(load_SE, 1)[some].sum(0)
        needed_P = 1_024 * tokens_S[some].sum() / rng.poisson(load_P, (400, 32))
        low, high = np.quantile(needed_P.max(1), [0.025, 0.975])
        took_P = crossing(np.concatenate(load_SE, 1)[order], tokens_S[order], 1_024)
        missed += not low <= took_P.max() <= high
    assert missed > 15


def write(root: Path, ids: list[np.ndarray], each: int, E: int, **more: Any) -> Trace:
    document = np.arange(len(ids[0])) // each
    return write_trace(root, ids, E, document=document, domain_of_document=("a",), **more)


def test_what_no_text_reaches_is_a_bound_and_never_certain(tmp_path: Path):
    ids = [uniform_ids(np.random.default_rng(0), 1_200, 7, 2)]  # expert 7 of 8 is never chosen
    made = calibrate(write(tmp_path / "t", ids, 20, 8), min_tokens=64)
    row = made.tables["coverage"].set_index("expert").loc[7]
    assert (row["tokens"], row["tokens_needed"]) == (0, np.inf)
    assert np.isfinite(row["tokens_needed_low"])
    assert np.isnan(row["tokens_high"])
    needed = made.tables["tokens_needed"].set_index("share")
    assert np.isinf(needed.loc[1.0, ["tokens_needed", "tokens_needed_high"]].tolist()).all()
    said = " ".join(made.said)
    assert "1 of 8 experts has under 64 tokens, 1 none" in said
    assert "at least" in said
    assert "No amount of this text is known to reach 1 expert: none of 60 documents" in said
    assert "at most 4.9% of texts like these use" in said
    assert cov.most_unseen(60) == pytest.approx(0.0487, abs=1e-4)
    ids = [uniform_ids(np.random.default_rng(0), 8_000, 7, 2)]
    many = " ".join(calibrate(write(tmp_path / "many", ids, 1, 8), min_tokens=64).said)
    assert "none of 8,000 documents uses any of them, so that at most 0.037% of texts" in many
    # a control: of a text that reaches all, none of that is said
    ids = [uniform_ids(np.random.default_rng(0), 1_200, 8, 2)]
    other = calibrate(write(tmp_path / "u", ids, 20, 8), min_tokens=64)
    assert not any("No amount" in line or "at least" in line for line in other.said[1:])
    assert np.isfinite(other.tables["tokens_needed"].to_numpy(float)).all()


def test_of_few_documents_or_none_no_interval_is_given(tmp_path: Path):
    ids = [uniform_ids(np.random.default_rng(0), 400, 8, 2)]
    few = calibrate(write(tmp_path / "t", ids, 100, 8), min_tokens=200)
    assert few.forecast is None
    (line,) = (line for line in few.said if "How sure" in line)
    assert "4 documents are too few" in line
    one = calibrate(write(tmp_path / "one", ids, 400, 8), min_tokens=20, choose="all")
    said = " ".join(one.said)
    assert "1 document is too few" in said
    assert "1 document (400 tokens) of 1 gives every expert" in said
    needed = few.tables["tokens_needed"]
    assert needed[["tokens_needed_low", "tokens_needed_high"]].isna().all(axis=None)
    load_E = few.load_P
    assert needed["tokens_needed"].iloc[-1] == pytest.approx(400 * 200 / load_E.min())
    (tmp_path / "c.csv").write_text("layer,expert,count\n0,0,5\n0,1,7\n0,2,0\n")
    counts = import_trace("table", [tmp_path / "c.csv"], tmp_path / "n", experts=3, top_k=1)
    made = calibrate(counts, min_tokens=6)
    said = " ".join(made.said)
    assert "counts do not say of which document" in said
    assert "is unknown, as some have no token and counts do not say" in said
    assert said.count("; this text has 12.") == 1
    assert "No amount" not in said  # no documents, so no rule of three
    token = write(tmp_path / "token", [np.array([[0, 1]], np.uint16)], 1, 8)
    _, unknown, *_, chosen = calibrate(token, min_tokens=6, choose="all").said
    assert unknown.endswith(
        "is unknown, as some have no token and 1 document is too few; this text has 1."
    )
    assert chosen.startswith("No expert has 6 tokens in all of this text, so each document that")
    assert chosen.endswith("is chosen: 1 document (1 tokens) of 1.")
    with pytest.raises(MoeInspectError, match="do not say of which document: none can be chosen"):
        calibrate(counts, choose="all")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
@pytest.mark.parametrize("minimum", [64, 2_048])
def test_domains_of_glm_52_cover_what_they_do_by_brute_force(tmp_path: Path, minimum: int):
    trace = import_trace("glm-merged", [REAL / "glm52"], tmp_path / "t")
    made = calibrate(trace, min_tokens=minimum)
    table = made.tables["coverage_by_domain"].set_index("domain")
    total: dict[tuple[str, int], int] = {}
    for path in sorted((REAL / "glm52").glob("merged_*.json")):
        of = json.loads(path.read_text())["layers"]
        few = none = 0
        for layer, values in of.items():
            for expert, count in enumerate(values["cnt"]):
                few, none = few + (count < minimum), none + (count == 0)
                total[layer, expert] = total.get((layer, expert), 0) + count
        row = table.loc[path.stem.removeprefix("merged_")]
        assert (row["under_minimum"], row["without_tokens"]) == (few, none)
    assert len(total) == 75 * 256
    joint = table.loc["(all)"]
    assert joint["under_minimum"] == sum(count < minimum for count in total.values())
    assert joint["without_tokens"] == 0
    assert (table["without_tokens"].iloc[:-1] > 0).any()  # some domain leaves some without any
    assert (table["coverage"].iloc[:-1] < joint["coverage"]).all()


def test_what_is_nearly_all_is_not_called_all(tmp_path: Path):
    load_DE = np.full((2, 5_000), 9)
    load_DE[0, 0], load_DE[1, 1:] = 1, 0
    load_DE[1, 0] = 3
    made = calibrate(write_counts(tmp_path / "t", [load_DE], 1, ["a", "b"]), min_tokens=5)
    domains = next(line for line in made.said if "Alone" in line)
    assert domains.startswith("Alone, the 2 domains (3-44,992 tokens) cover 0.0%-99.9% of the")
    assert "together (44,995) 99.9%" in domains
    drawn = chart(made)
    assert drawn.caption.startswith("99.9% of the experts")
    assert "band" not in drawn.text  # there is none


# --- which texts


def pool_of(load_SP: np.ndarray, tokens_S: np.ndarray | None = None) -> cho.Pool:
    S = len(load_SP)
    tokens_S = load_SP.sum(1) if tokens_S is None else tokens_S
    domains = ["a", "b"]
    return cho.Pool(np.arange(S), tokens_S, np.arange(S) % 2, sparse.csr_matrix(load_SP), domains)


def fewest(load_SP: np.ndarray, need_P: np.ndarray) -> int:
    S = len(load_SP)
    for n in range(S + 1):
        for some in combinations(range(S), n):
            if (load_SP[list(some)].sum(0) >= need_P).all():
                return n
    raise AssertionError


def bound_of(pool: cho.Pool, wanted: cho.Wanted, picked: list[int]) -> float:
    share_D = np.ones(2) / 2
    need_P = np.minimum(pool.load_P, wanted.minimum)
    priced = cho.prices(pool, wanted, share_D, need_P, picked)
    assert priced is not None
    profit = priced.profit(pool, wanted, share_D, np.ones(len(pool.tokens_S)))
    return priced.bound(wanted, need_P, profit)


@pytest.mark.parametrize("program", [cho.PROGRAM, 3])
def test_the_fewest_documents_are_within_their_bounds(
    program: int, monkeypatch: pytest.MonkeyPatch
):
    """Also where the linear program is of three documents and three experts."""
    monkeypatch.setattr(cho, "PROGRAM", program)
    rng, exact = np.random.default_rng(0), 0
    for _ in range(150):
        S, P, m = rng.integers(3, 10), rng.integers(1, 8), int(rng.integers(1, 9))
        load_SP = rng.poisson(rng.uniform(0.3, 4), (S, P)) * rng.integers(0, 2, (S, P))
        pool, wanted = pool_of(load_SP), cho.Wanted(minimum=m)
        need_P = np.minimum(load_SP.sum(0), m)
        picked = cho.without_needless(pool, cho.Greedy(pool, wanted, np.ones(2) / 2).run(), m)
        best, low = fewest(load_SP, need_P), bound_of(pool, wanted, picked)
        assert (load_SP[picked].sum(0) >= need_P).all()
        most = np.minimum(load_SP, m).sum(1).max(initial=1)
        assert low <= best + 1e-6
        assert best <= len(picked) <= best * (1 + np.log(max(most, 1)))
        exact += len(picked) == best
    assert exact > 120


@pytest.mark.parametrize("program", [cho.PROGRAM, 3])
def test_the_best_of_so_many_tokens_is_within_its_bound(
    program: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cho, "PROGRAM", program)
    rng, shares = np.random.default_rng(1), list[float]()
    for _ in range(150):
        S, P, m = rng.integers(3, 10), rng.integers(1, 8), int(rng.integers(1, 9))
        load_SP = rng.poisson(rng.uniform(0.3, 4), (S, P))
        tokens_S = load_SP.sum(1) + rng.integers(1, 6, S)
        budget = int(rng.integers(tokens_S.min(), tokens_S.sum() + 1))
        pool, wanted = pool_of(load_SP, tokens_S), cho.Wanted(minimum=m, budget=budget)
        need_P = np.minimum(load_SP.sum(0), m)

        def met(some: Any, need_P: np.ndarray = need_P, load_SP: np.ndarray = load_SP) -> int:
            return int(np.minimum(load_SP[list(some)].sum(0), need_P).sum())

        picked = cho.Greedy(pool, wanted, np.ones(2) / 2).run()
        assert tokens_S[picked].sum() <= budget
        fit = [
            some
            for n in range(S + 1)
            for some in combinations(range(S), n)
            if tokens_S[list(some)].sum() <= budget
        ]
        best = max(map(met, fit))
        assert met(picked) <= best <= bound_of(pool, wanted, picked) + 1e-6
        shares.append(met(picked) / max(best, 1))
    assert np.mean(shares) > 0.9


def test_chosen_documents_beat_random_ones_of_the_same_tokens(demo: Trace):
    load_SP = np.concatenate(loads(demo)[0], axis=1)
    made = demo.calibrate(min_tokens=256, choose="all")
    table = made.tables["choice"].set_index("texts")
    numbers = made.tables["chosen"]["document"].tolist()
    assert (load_SP[numbers].sum(0) >= 256).all()
    assert table.loc["chosen", "coverage"] == 1 > table.loc["random", "coverage_high"]
    assert table.loc["bound", "documents"] <= len(numbers) == table.loc["chosen", "documents"]
    tokens = demo.documents().set_index("document")["tokens"]
    assert table.loc["random", "tokens"] == tokens[numbers].sum()
    rng, covered = np.random.default_rng(3), list[float]()
    for _ in range(200):  # by another way
        order = rng.permutation(60)
        n = int(np.argmin(abs(tokens[order].cumsum().to_numpy() - tokens[numbers].sum())))
        covered.append((load_SP[order[: n + 1]].sum(0) >= 256).mean())
    assert table.loc["random", "coverage"] == pytest.approx(np.mean(covered), abs=0.05)
    adds = np.zeros(32, int)
    for row in made.tables["chosen"].to_dict("records"):
        before = np.minimum(adds, 256).sum()
        adds += load_SP[row["document"]]
        assert row["adds"] == np.minimum(adds, 256).sum() - before
        assert row["under_minimum"] == (adds < 256).sum()


def test_of_a_budget_the_mixture_is_kept(demo: Trace):
    _, tokens_S, domain_S = loads(demo)
    share_D = np.bincount(domain_S, tokens_S) / tokens_S.sum()

    def shares(keep: float, choose: Any) -> tuple[int, np.ndarray]:
        made = demo.calibrate(min_tokens=600, choose=choose, keep_mixture=keep)
        numbers = made.tables["chosen"]["document"].tolist()
        of = np.bincount(domain_S[numbers], tokens_S[numbers], len(share_D))
        return int(of.sum()), of / of.sum() / share_D

    free, kept = shares(0, 3_000), shares(0.9, 3_000)
    assert 2_800 < kept[0] <= 3_000
    assert free[0] <= 3_000
    assert kept[1].min() > 0.85 > free[1].min()
    assert shares(0.9, "all")[1].min() >= 0.9 - 1e-9
    said = {
        keep: demo.calibrate(min_tokens=64, choose="all", keep_mixture=keep).said[-1]
        for keep in (0.0, 1.0)
    }
    assert said[1.0].startswith("60 documents")  # only all of them have exactly these shares
    assert said[1.0].endswith("Of those chosen, the mixture alone asks for 55 documents.")
    assert "mixture" not in said[0.0]


def test_a_pool_that_does_not_fit_is_chosen_from_in_two_passes(
    demo: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ids = [uniform_ids(np.random.default_rng(n), 6_000, 16, 2) for n in range(2)]
    trace = write(tmp_path / "t", ids, 30, 16, shard_tokens=900, batch_tokens=300)
    whole = calibrate(trace, min_tokens=40, choose="all")
    kept, parts = list[int](), cho._candidates

    def seen(pool: cho.Pool, wanted: cho.Wanted) -> cho.Pool:
        found = parts(pool, wanted)
        kept.append(len(found.tokens_S))
        return found

    monkeypatch.setattr(cho, "KEPT", 1_500)
    monkeypatch.setattr(cho, "_candidates", seen)
    made = calibrate(trace, min_tokens=40, choose="all")
    assert 0 < max(kept) < 200
    a, b = (of.tables["choice"].set_index("texts") for of in (whole, made))
    assert b.loc["chosen", "coverage"] == 1
    assert b.loc["chosen", "documents"] <= a.loc["chosen", "documents"] + 3
    assert b.loc["bound", "documents"] <= a.loc["chosen", "documents"]
    assert a.loc[["random", "whole"]].equals(b.loc[["random", "whole"]]) or (
        b.loc["chosen", "tokens"] != a.loc["chosen", "tokens"]
    )
    assert b.loc["whole", "tokens"] == 6_000


# --- texts and recipes


def test_texts_are_those_of_the_corpus(demo: Trace, counted: Trace, tmp_path: Path):
    from moe_inspect.demo import CORPUS_DIR

    every = {path.read_text() for path in CORPUS_DIR.rglob("*.txt")}
    for trace in (demo, counted):
        made = trace.calibrate(min_tokens=256, choose="all")
        made.write_texts(tmp_path / "c.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
        assert [row["document"] for row in rows] == made.tables["chosen"]["document"].tolist()
        assert [row["domain"] for row in rows] == made.tables["chosen"]["domain"].tolist()
        assert all(row["text"] in every for row in rows)
        for row in rows:  # the trace has the same, with spaces as its vocabulary writes them
            assert row["text"].split()[-1] in demo.text(row["document"])
    made.write_texts(tmp_path / "c.txt")
    assert (tmp_path / "c.txt").read_text() == "".join(f"{row['text']}\n\n" for row in rows)
    with pytest.raises(MoeInspectError, match="holds counts only, no tokens"):
        made.write_texts(tmp_path / "i.jsonl", tokens=True)
    of_decisions = demo.calibrate(min_tokens=256, choose="all")
    of_decisions.write_texts(tmp_path / "i.jsonl", tokens=True)
    tokens = demo.tokens()
    for line in (tmp_path / "i.jsonl").read_text().splitlines():
        row = json.loads(line)
        of = tokens[tokens["document"] == row["document"]].sort_values(["sequence", "position"])
        assert row["input_ids"] == of["token_id"].tolist()
    with pytest.raises(MoeInspectError, match=r"name it \.jsonl"):
        of_decisions.write_texts(tmp_path / "i.txt", tokens=True)
    with pytest.raises(MoeInspectError, match="no documents were chosen"):
        demo.calibrate().write_texts(tmp_path / "n.jsonl")


def test_a_corpus_that_has_changed_or_moved_is_noticed(tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(6):
        line = {"text": f"The number {n} is written here, and then some more of it. " * 3}
        (folder / f"{n}.jsonl").write_text(json.dumps(line) + "\n")
    trace = moe_inspect.trace_model("demo", tmp_path / "t", data=[str(folder)])
    made = trace.calibrate(min_tokens=8, choose="all")
    folder.rename(tmp_path / "moved")
    with pytest.raises(MoeInspectError, match="no text at"):
        made.write_texts(tmp_path / "c.jsonl")
    made.write_texts(tmp_path / "c.jsonl", data=[str(tmp_path / "moved")])
    assert "is written here" in (tmp_path / "c.jsonl").read_text()
    (tmp_path / "moved" / "3.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(MoeInspectError, match="have changed, or --data names others"):
        made.write_texts(tmp_path / "c.jsonl", data=[str(tmp_path / "moved")])


@pytest.mark.parametrize("tool", ["llm-compressor", "gptqmodel", "modelopt"])
def test_recipes_are_python_that_names_the_texts(tool: str, demo: Trace, tmp_path: Path):
    from moe_inspect.calibration.texts import recipe

    made = recipe(demo, tool, tmp_path / "c.jsonl")
    compile(made, tool, "exec")
    assert str(tmp_path / "c.jsonl") in made
    assert "max_length=505" in made or tool == "gptqmodel"
    with pytest.raises(MoeInspectError, match=r"reads lines of JSON: name it \.jsonl"):
        recipe(demo, tool, tmp_path / "c.txt")


def test_the_minimum_follows_the_width_of_the_experts(demo: Trace, tmp_path: Path):
    assert demo.calibrate().minimum == 4 * 128
    shutil.copytree(str(demo.path), tmp_path / "wide")
    config = demo.manifest["model"]["config"] | {"hidden_size": 512}
    edit_manifest(tmp_path / "wide", model=demo.manifest["model"] | {"config": config})
    assert calibrate(tmp_path / "wide").minimum == 4 * 512
    ids = [uniform_ids(np.random.default_rng(0), 40, 8, 2)]
    assert calibrate(write(tmp_path / "t", ids, 10, 8)).minimum == 512  # nothing says how wide


def test_the_command(demo: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def ran(*more: object) -> tuple[int, str, str]:
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")
        code, err = run("calibrate", *more, usual=[demo.path], stdout=out)
        out.seek(0)
        return code, out.read(), err

    assert ran()[0] == 0
    gate = ("--fail-below", "coverage=0.99")
    assert ran(*gate)[0] == 0
    code, _, err = ran("--min-tokens", 2_000, *gate)
    assert code == 3
    assert "failed: layer 0: coverage is 0.75, below 0.99" in err
    code, out, err = ran("--choose", "all", "-o", "c.jsonl", "--for", "llm-compressor")
    assert (code, out.startswith("# llm-compressor")) == (0, True)
    assert "wrote c.jsonl: 16 documents" in err
    assert "moe_calibrate_all_experts=False" in out
    code, out, _ = ran("--table", "chosen", "--choose", 800, "--format", "json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert 600 < sum(row["tokens"] for row in rows) <= 800
    for wrong in (
        ["--for", "modelopt"],
        ["--tokens"],
        ["--choose", "0"],
        ["--choose", "all", "-o", "c.txt", "--for", "llm-compressor"],
        ["--choose", "all", "-o", "c.csv"],
        ["--keep-mixture", "0.5"],
        ["--table", "chosen"],
    ):
        assert ran(*wrong)[0] in (1, 2), wrong
    assert "--table chosen is of --choose" in ran("--table", "chosen")[2]


def test_it_has_a_page(demo: Trace, tmp_path: Path):
    calibrate(demo).to_html(tmp_path / "c.html")
    assert "coverage_by_domain" in (tmp_path / "c.html").read_text()

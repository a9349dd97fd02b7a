"""Plans judged where they will be used: fitted on workloads (traces, domains, a phase) and judged
on others; what is said of how they age, beside chance."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.making import import_trace
from moe_inspect.public import Trace
from moe_inspect.simulate.placement.placement import simulate_placement
from moe_inspect.simulate.result import Simulation
from moe_inspect.trace.writer import CountedBatches, Document
from tests.conftest import Cli
from tests.support.sweep import sample
from tests.support.synthetic import routers, uniform_ids, write_counts, write_passes, write_trace
from tests.test_real_data import REAL

LOADS = REAL / "deepseek_loads"
GPUS: dict[str, Any] = {"gpus": 32, "physical_experts": 288}
EIGHT = {"gpus": 4, "physical_experts": 12}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """DeepSeek-V3's workloads, two of decode and four of prefill, a trace each."""
    if not LOADS.is_dir():
        pytest.skip(f"no {LOADS}")
    root = tmp_path_factory.mktemp("loads")
    return [
        import_trace("sglang-json", [path], root / path.stem, top_k=8, warn=lambda line: None)
        for path in sorted(LOADS.glob("*.json"))
    ]


def on(made: Simulation, policy: str) -> list[float]:
    """max/mean of a policy on each workload."""
    table = made.tables["judged"]
    return table.loc[table["policy"] == policy, "max_over_mean"].tolist()


@pytest.mark.parametrize("fit", sample(range(6), 3))
def test_a_plan_of_one_of_deepseeks_workloads_ages_on_the_others(six: list[Trace], fit: int):
    rest = [trace for trace in six if trace is not six[fit]]
    made = simulate_placement(six[fit], judge=rest, policies=["eplb-global"], **GPUS)
    own, *others = on(made, "eplb-global")
    assert own == pytest.approx(1.007, abs=0.001)
    worst = [1.512, 1.335, 1.410, 1.377, 1.331, 1.487]
    assert max(others) == pytest.approx(worst[fit], abs=0.001)
    assert f"(max/mean 1.01): it has {worst[fit]:.2f} on" in " ".join(made.verdict)


def test_one_plan_for_six_workloads_beside_eplb_on_their_mean(six: list[Trace]):
    made = simulate_placement(*six, policies=["eplb-global", "local-search"], **GPUS)
    of_mean, of_all = on(made, "eplb-global"), on(made, "local-search")
    assert np.mean(of_mean) == pytest.approx(1.161, abs=0.001)
    assert max(of_mean) == pytest.approx(1.285, abs=0.001)
    assert np.mean(of_all) <= 1.020  # the search over windows drawn of them: 1.049
    assert max(of_all) <= 1.030  # 1.092


def written(root: Path, share_DE: np.ndarray, documents: int, seed: int = 0, **how: Any) -> Trace:
    """Domains a, b, … of so many documents of 100 tokens, whose experts are drawn of these shares,
    varied by document; k = 1."""
    rng, parts = np.random.default_rng(seed), list[np.ndarray]()
    for share_E in share_DE:
        for _ in range(documents):
            own_E = rng.dirichlet(50 * share_E)
            parts.append(rng.choice(len(own_E), 100, p=own_E))
    ids = np.concatenate(parts).astype(np.uint16)[:, None]
    domains = [chr(97 + d) for d in range(len(share_DE)) for _ in range(documents)]
    document = np.arange(len(ids)) // 100
    return write_trace(
        root, [ids], share_DE.shape[1], document=document, domain_of_document=domains, **how
    )


UPHILL = np.arange(1, 9) / 36
SHIFTED = np.stack([UPHILL, np.array([9, 1, 1, 9, 1, 1, 1, 1]) / 24])


def test_ageing_beyond_chance_is_said(tmp_path: Path):
    trace = written(tmp_path / "t", SHIFTED, 40)
    made = simulate_placement(trace, fit_domains="a", policies=["eplb"], **EIGHT)
    table = made.tables["judged"]
    assert table["workload"].tolist() == ["a", "b"]
    assert table["part"].tolist() == ["fit", "judged"]
    assert table["tokens"].tolist() == [4000, 4000]
    assert table["p"].isna().tolist() == [True, False]
    assert table["p"][1] < 0.01
    assert table["max_over_mean"][1] > table["most_by_chance"][1]
    assert f"it has {table['max_over_mean'][1]:.2f} on b (by chance at most" in " ".join(
        made.verdict
    )
    assert "Unknown" not in " ".join(made.verdict)


def test_the_same_routing_is_not_said_to_age(tmp_path: Path):
    """Documents of both domains are drawn alike, 40 or 9 of them: at 1 %, few of 16 claims."""
    claims = 0
    for seed in range(16):
        trace = written(tmp_path / f"{seed}", np.stack([UPHILL] * 2), (40, 9)[seed % 2], seed)
        made = simulate_placement(trace, fit_domains="a", policies=["local-search"], **EIGHT)
        claims += "by chance at most" in " ".join(made.verdict)
        assert "may be chance" in " ".join(made.verdict) or claims
    assert claims <= 2


@pytest.mark.parametrize("documents", [7, 8])
def test_of_few_documents_chance_is_unknown(tmp_path: Path, documents: int):
    trace = written(tmp_path / "t", SHIFTED, documents)
    made = simulate_placement(trace, fit_domains="a", policies=["eplb"], **EIGHT)
    said, few = " ".join(made.verdict), documents < 8
    assert ("Unknown: how much of that is chance" in said) == few
    assert ("chance" in said.replace("how much of that is chance", "")) == (not few)
    assert made.tables["judged"]["p"].isna().all() == few


EVEN, PILED = np.full(8, 1 / 8), np.array([9, 9, 1, 1, 1, 1, 1, 1]) / 24
PLAIN = ["contiguous", "round-robin", "eplb"]


def test_policies_that_only_chance_sets_apart_are_not_said_to_differ(tmp_path: Path):
    """Of even load every policy is as fast, by however much they differ on these documents."""
    for seed in range(6):
        trace = written(tmp_path / f"{seed}", np.stack([EVEN] * 2), 12, seed)
        made = simulate_placement(trace, fit_domains="a", policies=PLAIN, gpus=4)
        assert made.settings["recommended"] == "contiguous"
        assert (made.tables["policies"]["slower_p"] >= 0.01).all()
        said = "than the fastest by 1% or beyond chance (p < 0.01): contiguous, round-robin, eplb."
        assert said in made.verdict[-2]
    assert made.tables["policies"]["max_over_mean"].nunique() > 1, "control"
    assert set(made.tables["plan"]["policy"]) == {"contiguous"}


@pytest.mark.parametrize("documents", [40, 7])
def test_a_policy_that_is_faster_beyond_chance_is_recommended_of_documents_enough(
    tmp_path: Path, documents: int
):
    """Contiguous puts the two busiest experts on one GPU. Of both the ageing is told."""
    trace, few = written(tmp_path / "t", np.stack([PILED] * 2), documents), documents < 8
    made = simulate_placement(trace, fit_domains="a", policies=PLAIN[:2], gpus=4)
    slower_p, advice = made.tables["policies"]["slower_p"], made.verdict[-2]
    assert slower_p.isna().all() if few else slower_p.tolist() == [0.002, 1.0]
    best = "Recommended: round-robin, the fastest on the judged part."
    assert advice == ("-o FILE saves round-robin." if few else best)
    assert made.verdict[0].startswith("Too little data to advise: with fewer than 8 doc") == few
    assert any(
        said.startswith("round-robin is fitted to no load; beside a") for said in made.verdict
    )


def test_counts_by_document_are_judged_beside_chance(tmp_path: Path):
    rng, domains = np.random.default_rng(0), ["a"] * 20 + ["b"] * 20
    load = np.concatenate([rng.multinomial(100, share_E, 20) for share_E in SHIFTED])
    documents = [Document(d, domain, "synthetic", 100) for d, domain in enumerate(domains)]
    counted = CountedBatches(0, 4000, domains, [load], None, {}, documents)
    how: dict[str, Any] = {"counts_only": True, "by_document": True}
    trace = write_passes(tmp_path / "t", routers(1, 8, 1), [counted], **how)
    made = simulate_placement(trace, fit_domains="a", policies=["eplb"], **EIGHT)
    assert made.tables["judged"]["p"][1] < 0.01
    assert "how much of that is chance" not in " ".join(made.verdict)


def test_prompts_and_answers_of_the_same_documents_are_told_apart_from_chance(tmp_path: Path):
    """Both phases have all documents, whose own experts are no ageing."""
    ids = np.repeat(np.random.default_rng(0).permutation(64) % 8, 100).astype(np.uint16)[:, None]
    document = np.arange(len(ids)) // 100
    how: dict[str, Any] = {
        "document": document,
        "batch_tokens": 50,
        "phases": ("prefill", "decode"),
    }
    trace = write_trace(tmp_path / "t", [ids], 8, **how)
    made = simulate_placement(trace, fit_phase="decode", policies=["eplb"], **EIGHT)
    table = made.tables["judged"]
    assert table["workload"].tolist() == ["decode", "prefill"]
    assert table["max_over_mean"].nunique() == 1
    assert table["p"][1] > 0.5
    ids[::100] = 0  # the first token of each prompt is one expert's
    ids[1::100] = 0
    trace = write_trace(tmp_path / "u", [ids], 8, **how)
    made = simulate_placement(trace, fit_phase="decode", policies=["eplb"], **EIGHT)
    assert made.tables["judged"]["p"][1] < 0.01, "control"


def test_of_counts_what_is_unknown_is_said_once_and_nothing_is_recommended(tmp_path: Path):
    a = write_counts(tmp_path / "a", [np.array([[40, 30, 20, 10]])], 2)
    b = write_counts(tmp_path / "b", [np.array([[10, 20, 30, 40]])], 2)
    alone = simulate_placement(a, gpus=2)
    (unknown,) = (said for said in alone.verdict if "nknown" in said)
    assert "the balance on text that plans are not fitted on (--judge TRACE)" in unknown
    assert "which GPUs a token reaches" in unknown
    assert "Recommended" not in " ".join(alone.verdict)
    assert "-o FILE saves local-search, the fastest on what it is fitted on." in alone.verdict
    judged = simulate_placement(a, judge=[b], gpus=2)
    (unknown,) = (said for said in judged.verdict if "nknown" in said)
    assert "--judge" not in unknown
    assert "how much of that is chance" in unknown
    assert "and of what sets policies apart" in unknown
    assert any(said.startswith("Recommended: ") for said in judged.verdict)
    assert "chance" not in judged.verdict[-2]


def test_a_plan_for_several_is_better_than_one_of_their_mean(tmp_path: Path):
    """Experts 0 and 2 are busy in one, 1 and 3 in the other; their mean is even."""
    a = write_counts(tmp_path / "a", [np.array([[40, 10, 40, 10]])], 1)
    b = write_counts(tmp_path / "b", [np.array([[10, 40, 10, 40]])], 1)
    for one, other in ((a, b), (b, a)):  # in any order
        made = simulate_placement(one, other, gpus=2, policies=["eplb", "local-search"])
        assert on(made, "eplb") == [1.6, 1.6]
        assert on(made, "local-search") == [1.0, 1.0]
        # each waits for its own busiest GPU
        assert made.tables["policies"]["max_over_mean"].tolist() == [1.6, 1.0]
        assert made.tables["policies"]["fit_max_over_mean"].tolist() == [1.6, 1.0]
    ids = [np.tile(np.array(pair, np.uint16)[:, None], (100, 1)) for pair in ([0, 2], [1, 3])]
    decided = [write_trace(tmp_path / name, [of], 4) for name, of in zip("cd", ids, strict=True)]
    made = simulate_placement(*decided, gpus=2, policies=["eplb", "local-search"])
    assert on(made, "local-search") == [1.0, 1.0]


def test_tokens_reach_gpus_in_the_traces_that_are_judged(tmp_path: Path):
    pairs = np.tile(np.array([[0, 1], [2, 3]], np.uint16), (100, 1))
    a = write_trace(tmp_path / "a", [pairs], 4)
    b = write_trace(tmp_path / "b", [pairs[:, ::-1] ^ 2], 4)
    apart = write_trace(tmp_path / "c", [np.tile(np.array([[0, 2]], np.uint16), (300, 1))], 4)
    how: dict[str, Any] = {"gpus": 2, "policies": ["contiguous"]}
    for traces, judge, ranks in (((a,), [b], 1.0), ((a,), [apart], 2.0), ((a, b), [], 1.0)):
        made = simulate_placement(*traces, judge=judge, **how)
        assert made.tables["placement"]["ranks_per_token"].tolist() == [ranks]
    mixed = simulate_placement(a, judge=[b, apart], **how).tables["placement"]
    assert mixed["ranks_per_token"].tolist() == [(200 * 1 + 300 * 2) / 500]
    counts = write_counts(tmp_path / "n", [np.array([[9, 9, 9, 9]])], 2)
    assert (
        simulate_placement(a, judge=[counts], **how)
        .tables["placement"]["ranks_per_token"]
        .isna()
        .all()
    )


def test_the_command_says_and_writes_the_same_as_the_api(cli_here: Cli, tmp_path: Path):
    a, b = (written(tmp_path / n, SHIFTED, 10, seed) for seed, n in enumerate("ab"))
    c = written(tmp_path / "c", SHIFTED[::-1], 10)
    args = [a.path, b.path, "--judge", c.path, "--fit-weights", "2,1", "--gpus", 4]
    done = cli_here("simulate", "placement", *args, "--table", "judged", "-o", "judged.csv")
    made = a.simulate.placement(b.path, judge=[c], fit_weights=[2, 1], gpus=4)
    told = pd.read_csv(tmp_path / "judged.csv")
    pd.testing.assert_frame_equal(told, made.tables["judged"], check_dtype=False)
    assert f"placement({str(b.path)!r}, judge=[{str(c.path)!r}], fit_weights=[2, 1]" in made.python
    here: dict[str, Any] = {}
    exec(made.python, here)
    assert here["made"].verdict == made.verdict
    done = cli_here("simulate", "placement", *args, "-o", "plan.json", "--html", "page.html")
    best = made.settings["recommended"]
    assert made.verdict[-2].startswith(f"Recommended: {best}, the ")
    assert done.stdout == f"{made.verdict[0]}\n"  # the page has the others
    page = (tmp_path / "page.html").read_text()
    assert all(html.escape(said) in page for said in made.verdict)
    assert f"{best}, 1 MoE layers of 8 slots on 4 GPUs, for sglang" in done.stderr


NOT_TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"judge": ["a"]}, "a is given twice"),
    ({"judge": ["other"]}, "have different routers: a plan is of one model"),
    ({"judge": ["b"], "fit_share": 0.5}, "--fit-share is for one trace"),
    ({"fit_domains": "a", "fit_phase": "decode"}, "give one of these"),
    ({"phase": "prefill", "fit_phase": "decode"}, "give one of these"),
    ({"fit_weights": [1.0]}, "fit_weights are for several"),
    ({"judge": ["b"], "fit_weights": [1.0, 2.0]}, "fit_weights 1.0, 2.0: give a number"),
    ({"judge": ["b"], "fit_weights": [-1.0]}, "fit_weights -1.0: give a number above 0"),
    ({"fit_domains": "z"}, "no domain z"),
    ({"fit_domains": "a", "domains": "b"}, "no token of a is selected"),
    ({"fit_phase": "decode"}, "decode"),
]


def test_what_does_not_go_together_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        written(Path(name), SHIFTED, 2)
    write_trace(Path("other"), [uniform_ids(np.random.default_rng(0), 50, 6, 1)], 6)
    for how, said in NOT_TOGETHER:
        with pytest.raises(MoeInspectError, match=said) as raised:
            simulate_placement("a", **how)
        assert "\n" not in str(raised.value)

"""Placements priced, and what imbalance costs under the one in use: the loads of steps by brute
force, what must not change a time, and what sentences claim of chance, of imbalance that is
planted, and of too little text."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace
from moe_inspect.reporting.verdict.findings import verdict_of
from moe_inspect.simulate.latency import START, KernelTime, LatencyModel, Shape, TransferTime
from moe_inspect.simulate.placement.pricing import Ageing, ageing
from moe_inspect.simulate.price import LOW_LATENCY, Prices
from moe_inspect.simulate.result import Simulation
from moe_inspect.simulate.sampling import StepLoads
from moe_inspect.simulate.step import imbalance_costs, turning_point
from moe_inspect.trace.shard import Shard
from tests.support.chance import REGIMES, Planted, Regime, drawn
from tests.support.damage import edit_manifest
from tests.support.synthetic import (
    a_pass,
    routers,
    uniform_ids,
    write_counts,
    write_passes,
    write_trace,
)
from tests.test_counts_by_document import counts as counts_by_document
from tests.test_workloads import EVEN, PILED, written

CONFIG = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 1024}
KERNEL: dict[str, Any] = {"hardware": "h200", "engine": "vllm", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def constants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel whose time is that of its rows, and a little for each expert in use."""
    of = dict.fromkeys(START, 0.0) | {
        "row_ms_per_gvalue_hidden": 10.0,
        "ms_per_1k_used_experts": 0.01,
    }
    errors: dict[str, float | None] = {"imbalance_error_median": 0.01, "imbalance_error_p90": 0.01}
    kernel = KernelTime("h200", "vllm", "0.22", "rows", "bfloat16", of, errors)
    path = tmp_path_factory.mktemp("latency") / "constants.json"
    LatencyModel([kernel], source="a test").to_file(path)
    return path


def whole(shard: Shard) -> np.ndarray:
    return np.ones(shard.files.tokens, bool)


def of_size(trace: Trace) -> Trace:
    """With experts whose size is known."""
    path = Path(str(trace.path))
    edit_manifest(path, model={"id": "synthetic", "config": CONFIG})
    return moe_inspect.open_trace(path)


def costs_of(trace: Trace, layers: str | None = None, **options: Any) -> Simulation:
    return imbalance_costs(trace, select(trace, layers), **options)


def simulated(trace: Trace, constants: Path, **options: Any) -> Simulation:
    return costs_of(of_size(trace), **KERNEL, latency=constants, **options)


def claims(made: Simulation) -> list[str]:
    return [said for said in made.verdict if re.search(r"imbalance (costs|saves) \S+ ms", said)]


def test_the_cost_is_the_load_ratio_where_time_is_the_rows(tmp_path: Path, constants: Path):
    """One expert of 8 has half of the load, so its GPU of 4 has (1/2 + 1/14) / (1/4) times the
    mean's."""
    loads = [np.array([[7, 1, 1, 1, 1, 1, 1, 1]]) * 10_000]
    made = simulated(
        write_counts(tmp_path / "t", loads, 2, ["text"]), constants, gpus=4, batch_tokens=[16_384]
    )
    row = made.tables["imbalance"].iloc[0]
    assert row["cost"] == pytest.approx(16 / 7 - 1, abs=0.02)
    assert np.isnan(row[["cost_low", "cost_high", "p"]].to_numpy(float)).all()
    assert not claims(made)
    assert "without documents imbalance cannot be told from chance" in made.verdict[0]


@pytest.mark.parametrize("regime", ["iid 8/2", "iid 64/8", "passes of 3"])
def test_of_chance_no_cost_is_claimed(tmp_path: Path, constants: Path, regime: str):
    for seed in range(3):
        trace = drawn(tmp_path / str(seed), REGIMES[regime], seed)
        made = simulated(trace, constants, gpus=4, batch_tokens=[16, 64, 256])
        assert not claims(made)


def test_a_planted_imbalance_is_priced(tmp_path: Path, constants: Path):
    trace = drawn(tmp_path / "t", Regime(documents=40), 0, Planted(4.0))
    made = simulated(trace, constants, gpus=4, batch_tokens=[256])
    assert "95% interval" in claims(made)[0]
    assert made.verdict[1].startswith("Layer 1 costs most")


def test_a_report_that_names_a_gpu_says_the_same(tmp_path: Path, constants: Path):
    trace = of_size(drawn(tmp_path / "t", Regime(documents=40), 0, Planted(4.0)))
    times = KERNEL | {"gpus": 4, "latency": constants}
    made, plain = (moe_inspect.report(trace, layers="1", times=t) for t in (times, None))
    costs = costs_of(trace, layers="1", **times)
    assert claims(costs)
    found, load = (
        next(one for one in of.verdict() if one.kind == "busiest_gpu") for of in (made, plain)
    )
    assert found.text == " ".join(costs.verdict)
    assert "the busiest GPU of a layer gets" in load.text
    for result, cost in ((made, found), (plain, load)):
        headline = verdict_of(result).headline
        assert headline.text == f"{result.verdict()[0].text} {cost.text}"
    assert "Simulated: imbalance" in made.page()
    assert "Simulated: imbalance" not in plain.page()
    with pytest.raises(MoeInspectError, match="give --hardware, one of b200, h100, h200"):
        moe_inspect.report(trace, times=times | {"hardware": None, "latency": None})
    only = costs_of(trace, layers="1", **times | {"hardware": None})  # there is one
    assert only.verdict == costs.verdict


def test_a_report_that_lacks_ranks_claims_no_cost(tmp_path: Path, constants: Path):
    half = np.array([[10_000, 30_000, 20_000, 20_000, 0, 0, 0, 0]])
    for name, loads in (("whole", [half + 10_000] * 4), ("lacking", [half] * 4)):
        trace = of_size(write_counts(tmp_path / name, loads, 2))
        found = moe_inspect.report(trace, times=KERNEL | {"gpus": 4, "latency": constants})
        [said] = [one.text for one in found.verdict() if one.kind == "busiest_gpu"]
        unknown = "What imbalance costs is unknown: ranks are missing."
        assert (said == unknown) == (name == "lacking")


def test_steps_of_counts_do_not_depend_on_what_else_is_asked(tmp_path: Path, constants: Path):
    loads = [np.array([[9_000, 1_000, 8_000, 2_000, 7_000, 3_000, 6_000, 4_000]])] * 4
    trace = write_counts(tmp_path / "t", loads, 2)
    alone, among = (
        simulated(trace, constants, gpus=4, batch_tokens=sizes).tables["imbalance_layers"]
        for sizes in ([512], [64, 512])
    )
    among = among[among["tokens"] == 512].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, among)


def test_saving_that_turns_to_cost_is_told_where_both_are_known():
    known = {"p": 1e-9, "cost_by_chance": 0.0}
    settings = {"error": 0.02, "too_few": False, "batch_tokens": [8, 64, 512]}

    def turns(costs: list[float], **changes: Any) -> tuple[int, int] | None:
        sizes = {"tokens": [8, 64, 512], "cost": costs}
        return turning_point(pd.DataFrame(sizes).assign(**known | changes), settings)

    assert turns([-0.3, -0.1, 0.5]) == (64, 512)
    assert turns([-0.3, -0.01, 0.5]) == (8, 512)  # 1 % is within the error
    assert turns([-0.3, 0.1, 0.5]) == (8, 64)
    assert turns([0.5, 0.1, -0.3]) is None
    assert turns([-0.3, -0.1, -0.2]) is None
    assert turns([-0.3, -0.1, 0.5], p=0.5) is None
    assert turns([-0.3, -0.1, 0.5], cost_by_chance=0.6) is None  # which costs more than that


@pytest.mark.parametrize("documents", [2, 6])
def test_too_little_text_claims_nothing(tmp_path: Path, constants: Path, documents: int):
    regime = Regime(documents=documents, domains=1, tokens=200 * documents)
    trace = drawn(tmp_path / "t", regime, 0, Planted(4.0))
    made = simulated(trace, constants, batch_tokens=[64, 4_096])
    assert made.verdict[0].startswith("Too little data to advise: with fewer than 8 documents")
    assert "too little text to tell" in made.verdict[1]
    assert not claims(made)
    assert "No step of 4,096 tokens: the trace has too few." in made.verdict
    with pytest.raises(MoeInspectError, match="has no step of 4,096 tokens"):
        simulated(trace, constants, batch_tokens=[4_096])


@pytest.mark.parametrize("leaning", [0, 100])
def test_counts_by_document_are_priced_once(tmp_path: Path, constants: Path, leaning: int):
    """The placement in use takes the same steps as its plan, of blocks of documents: what imbalance
    costs has an interval and a p-value, and is claimed unless all documents are alike."""
    even_UE = np.full((40, 8), 25) + leaning * np.eye(8, dtype=int)[0]
    rows = [
        {"layer": 0, "document": d, "domain": "text", "expert": e, "count": n}
        for (d, e), n in np.ndenumerate(even_UE)
    ]
    trace = counts_by_document(tmp_path / "t", pd.DataFrame(rows))
    made = placed(trace, constants, batch_tokens=[16, 64])
    step = made.tables["imbalance"].iloc[-1]
    assert made.settings["current"] == pytest.approx(step[["ms", "even_ms"]].to_dict())
    assert step["cost_low"] < step["cost"] < step["cost_high"]
    claimed = re.search(r": imbalance costs \S+ ms", made.verdict[0])
    assert bool(claimed) == (step["p"] < 0.01) == bool(leaning)


def test_a_block_of_documents_without_load_has_that_of_all(tmp_path: Path, constants: Path):
    """Of router 1 one document of two has counts: all steps of the router are of that one's."""
    load_UE = np.array([[90, 50, 30, 10, 8, 6, 4, 2]] * 2)
    of_router = [load_UE, load_UE * [[1], [0]]]
    rows = [
        {"layer": layer, "document": d, "domain": "text", "expert": e, "count": n}
        for layer, of_UE in enumerate(of_router)
        for (d, e), n in np.ndenumerate(of_UE)
        if n or layer == 0
    ]
    trace = counts_by_document(tmp_path / "t", pd.DataFrame(rows))
    made = placed(trace, constants, batch_tokens=[4_096])
    ms = made.tables["imbalance_layers"]["ms"]
    assert ms[1] == pytest.approx(ms[0], rel=0.02)


def test_chance_of_a_plan_is_that_of_its_slots(tmp_path: Path, constants: Path):
    """Experts with two replicas have twice the load, as the plan expects: chance is no busier."""
    loads = [np.array([[2, 2, 2, 2, 1, 1, 1, 1]]) * 10_000]
    path = tmp_path / "plan.json"
    path.write_text('{"physical_to_logical_map": [[0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 6, 7]]}')
    options: dict[str, Any] = {"gpus": 4, "batch_tokens": [4_096], "placement": path}
    made = simulated(write_counts(tmp_path / "t", loads, 2, ["text"]), constants, **options)
    row = made.tables["imbalance"].iloc[0]
    assert abs(row["cost"] - row["cost_by_chance"]) < 0.02
    even = [np.full((1, 8), 10_000)]  # which that plan does not expect
    made = simulated(write_counts(tmp_path / "u", even, 2, ["text"]), constants, **options)
    row = made.tables["imbalance"].iloc[0]
    assert row["cost"] == pytest.approx(1 / 4, abs=0.03)
    assert abs(row["cost_by_chance"]) < 0.05


def test_a_domain_need_not_have_every_phase(tmp_path: Path, constants: Path):
    ids = uniform_ids(np.random.default_rng(0), 800, 8, 2)
    document = np.repeat(np.arange(20), 40)
    trace = write_trace(
        tmp_path / "t",
        [ids],
        8,
        document=document,
        domain_of_document=["law", "code"],
        batch_tokens=40,
        phases=("prefill", "decode"),  # of law, and of code
    )
    table = simulated(trace, constants, batch_tokens=[16]).tables["imbalance"]
    assert [*zip(table["phase"], table["domain"], strict=True)] == [
        ("prefill", ""),
        ("prefill", "law"),
        ("decode", ""),
        ("decode", "code"),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_tokens": [0]}, "steps of 0 tokens: give numbers from 1 to"),
        ({"gpus": 3}, "cannot split 8 experts over 3 GPUs"),
        ({"hardware": "abacus"}, "no times of gpu abacus: there are h200"),
        ({"placement": "no plan"}, "is no plan for SGLang"),
        ({"placement": "too short"}, "layer 1 does not place its 8 experts"),
        ({"placement": "other layers"}, r"plan\.json places 0 MoE layers, the trace has 4"),
    ],
)
def test_wrong_settings_are_refused(
    tmp_path: Path, constants: Path, options: dict[str, Any], said: str
):
    if of := options.get("placement"):
        path = tmp_path / "plan.json"
        text = {"no plan": "[1, 2]", "too short": f'{{"physical_to_logical_map": [{[*range(8)]}]}}'}
        text["other layers"] = '{"layer_list": []}'
        path.write_text(text[of])
        options = {"placement": path}
    trace = of_size(drawn(tmp_path / "t", Regime(documents=4, tokens=100), 0))
    with pytest.raises(MoeInspectError, match=said):
        costs_of(trace, **{**KERNEL, "latency": constants, **options})


def test_a_layer_without_load_has_no_price(tmp_path: Path, constants: Path):
    loads = [np.full((1, 4), 500), np.zeros((1, 4), np.int64)]
    made = simulated(write_counts(tmp_path / "t", loads, 1), constants, gpus=2, batch_tokens=[16])
    alone = simulated(
        write_counts(tmp_path / "a", loads[:1], 1), constants, gpus=2, batch_tokens=[16]
    )
    assert made.tables["imbalance_layers"]["router"].tolist() == [0]
    pd.testing.assert_frame_equal(made.tables["imbalance"], alone.tables["imbalance"])


def test_sequences_of_two_ranks_that_share_a_number_are_told_apart(tmp_path: Path, constants: Path):
    """Each rank decodes eight sequences of four tokens, after prompts of its own length. The token
    at a place chooses that place's expert: so all tokens of a step choose the same one."""

    def costs(name: str, apart: int) -> pd.DataFrame:
        sequence, place = np.repeat(np.arange(8), 4), np.tile(np.arange(4), 8)
        for rank in range(2):
            where = {"document": sequence + 8 * rank, "sequence": sequence + apart * rank}
            ids = [place[:, None].astype(np.uint16)]
            one = a_pass(0, ids, **where, position=place + 2 * rank, phase="decode")
            trace = write_passes(tmp_path / name, routers(1, 4, 1), [one], rank=rank)
        return simulated(trace, constants, batch_tokens=[2], gpus=4).tables["imbalance"]

    of_ranks = costs("of ranks", 0)
    assert of_ranks["steps"].item() == 32
    assert of_ranks["cost_low"].item() == pytest.approx(of_ranks["cost_high"].item())
    pd.testing.assert_frame_equal(of_ranks, costs("apart", 8))


def test_times_of_unknown_error_claim_no_cost(tmp_path: Path, constants: Path):
    trace = of_size(drawn(tmp_path / "t", Regime(documents=40), 0, Planted(4.0)))
    assert claims(simulated(trace, constants, gpus=4))
    model = LatencyModel.from_file(constants)
    model.kernels[0].errors.clear()
    model.to_file(tmp_path / "unknown.json")
    made = simulated(trace, tmp_path / "unknown.json", gpus=4)
    assert not claims(made)
    said = " ".join(made.verdict)
    assert "costs most" not in said
    assert "as the error of these times is unknown, no cost is claimed" in said


def test_a_token_more_than_low_latency_kernels_take_costs_no_less(constants: Path):
    """They are used where they are faster than the others, which take any number of tokens."""
    kernel, shape = LatencyModel.from_file(constants).kernels[0], Shape(4096, 1024, 2, 8)
    most, loads = 4 * LOW_LATENCY, StepLoads(np.full((1, 8), 128.0), np.full((1, 4), 224.0))
    for slower in ("low_latency", "normal"):
        transfers = {
            f"deepep_{kind}_{way}": TransferTime(
                "h200", "deepep", "1", f"deepep_{kind}_{way}", "rank", 0, 1.0 + (kind == slower), 1
            )
            for kind in ("low_latency", "normal")
            for way in ("dispatch", "combine")
        }
        within, beyond = (
            Prices(kernel, transfers).step_times(loads, shape, N) for N in (most, most + 1)
        )
        assert (beyond.total - within.total).item() == (0.0 if slower == "low_latency" else 2.0)


def test_what_was_never_measured_is_told(tmp_path: Path):
    trace = of_size(drawn(tmp_path / "t", Regime(documents=40), 0))
    assert "extrapolated" not in " ".join(costs_of(trace, **KERNEL).verdict)
    config = {**CONFIG, "hidden_size": 64}
    edit_manifest(Path(str(trace.path)), model={"id": "synthetic", "config": config})
    narrow = moe_inspect.open_trace(str(trace.path))
    placed = narrow.simulate.placement(**KERNEL, gpus=4, batch_tokens=[64])
    for made in (costs_of(narrow, **KERNEL), placed):
        said = " ".join(made.verdict)
        assert "extrapolated beyond all that was measured: hidden 64 (measured: 2,048 to" in said


def test_experts_of_unknown_size_are_refused(tmp_path: Path, constants: Path):
    trace = drawn(tmp_path / "t", Regime(documents=4, tokens=100), 0)
    with pytest.raises(MoeInspectError, match="does not say how large an expert is"):
        costs_of(trace, **KERNEL, latency=constants)


def placed(trace: Trace, constants: Path, **options: Any) -> Simulation:
    """Contiguous and EPLB, priced. By default the second half of the documents is judged."""
    how: dict[str, Any] = {
        "gpus": 4,
        "policies": ["contiguous", "eplb"],
        "batch_tokens": [50],
        **options,
    }
    return of_size(trace).simulate.placement(**KERNEL, latency=constants, **how)


def said_of(made: Simulation, start: str) -> str:
    (said,) = (said for said in made.verdict if said.startswith(start))
    return said


def test_policies_are_compared_by_time(tmp_path: Path, constants: Path):
    trace = written(tmp_path / "t", np.stack([PILED] * 2), 60)
    made = placed(trace, constants)
    table = made.tables["policies"].set_index("policy")
    assert made.settings["recommended"] == "eplb"
    assert table["current_p"]["eplb"] < 0.01
    assert re.search(
        r"instead of .* in order \(−\d+%; of the step −[34]\d%, ", said_of(made, "EPLB")
    )
    assert said_of(made, "EPLB").endswith("model error 1%): worth it.")
    for slots in (8, 12):  # without replicas in order is what imbalance says, with or without
        priced = placed(trace, constants, fit_share=1.0, physical_experts=slots)
        step = simulated(trace, constants, gpus=4, batch_tokens=[50]).tables["imbalance"].iloc[0]
        assert priced.settings["current"] == {"ms": step["ms"], "even_ms": step["even_ms"]}
        pd.testing.assert_series_equal(priced.tables["imbalance"].iloc[0], step)
        ms = priced.tables["policies"].set_index("policy")["ms"]
        assert (ms["contiguous"] == step["ms"]) == (slots == 8)
        change = f"{ms['eplb'] / step['ms'] - 1:+.0%}".replace("-", "−")
        assert f"of the step {change}, " in said_of(priced, "EPLB")
    unpriced = trace.simulate.placement(gpus=4, policies=["contiguous", "eplb"])
    assert not any("EPLB" in said for said in unpriced.verdict)
    assert "ms" not in unpriced.tables["policies"], "without a GPU nothing changes"


def test_a_plan_in_use_is_a_policy_like_the_others(tmp_path: Path, constants: Path):
    """Written for each engine, and read from its file. Policies are compared by the largest step;
    what the plan in use costs is what the report says of it."""
    trace = written(tmp_path / "t", np.stack([PILED] * 2), 60)
    first = placed(trace, constants, physical_experts=12)
    for name, engine in (("a.json", None), ("b.yaml", None), ("c.json", "vllm-ascend")):
        path = tmp_path / name
        first.write_plan(path, engine)
        made = placed(trace, constants, placement=path, batch_tokens=[50, 10, 9_999])
        policies = made.tables["policies"].set_index("policy")
        assert [*policies.index] == ["current", "contiguous", "eplb"]
        best = first.settings["recommended"]
        same = first.tables["policies"].set_index("policy").loc[best, ["ms", "even_ms"]]
        assert policies.loc["current", ["ms", "even_ms"]].tolist() == same.tolist()
        assert policies["current_p"]["current"] == 1
        assert any(said.startswith("No step of 9,999 tokens in") for said in made.verdict)
        given = {"gpus": 4, "batch_tokens": [10, 50, 9_999], "placement": path}
        costs = simulated(trace, constants, **given)
        for table, mine in costs.tables.items():
            pd.testing.assert_frame_equal(made.tables[table], mine)
        assert made.verdict[: len(costs.verdict) - 1] == costs.verdict[:-1]
        assert said_of(made, "EPLB here").count(" in use (")
        assert said_of(made, "To rebalance from the placement in use to eplb")
    with pytest.raises(MoeInspectError, match="has 12 slots per layer: give --physical-experts 12"):
        placed(trace, constants, placement=path, physical_experts=16)
    ids = uniform_ids(np.random.default_rng(0), 300, 8, 2)
    more = write_trace(tmp_path / "more", [ids] * (len(trace.routers) + 1), 8)
    with pytest.raises(MoeInspectError, match=r"c\.json places 1 MoE layer, the trace has 2$"):
        more.simulate.placement(gpus=4, placement=path)
    unpriced = trace.simulate.placement(gpus=4, placement=path)
    assert unpriced.tables["policies"]["policy"].iloc[0] == "current"
    assert unpriced.verdict[0].startswith("On 4 GPUs with the current placement, the MoE layers")


@pytest.mark.parametrize("seed", range(3))
def test_of_even_load_eplb_is_not_worth_it(tmp_path: Path, constants: Path, seed: int):
    made = placed(written(tmp_path / "t", np.stack([EVEN] * 2), 60, seed), constants)
    assert said_of(made, "EPLB").endswith("not worth it.")
    assert made.settings["recommended"] == "contiguous"


def test_what_lies_within_the_error_of_the_times_is_not_worth_it(tmp_path: Path, constants: Path):
    model = LatencyModel.from_file(constants)
    trace = written(tmp_path / "t", np.stack([PILED] * 2), 60)
    for error, end in ((0.9, "within the error: not worth it."), (None, "worth is unknown.")):
        model.kernels[0].errors["imbalance_error_median"] = error
        model.to_file(tmp_path / "constants.json")
        made = placed(trace, tmp_path / "constants.json")
        assert said_of(made, "EPLB").endswith(end)
        assert made.settings["recommended"] == ("contiguous" if error else "eplb")


def test_of_few_documents_no_policy_is_worth_it(tmp_path: Path, constants: Path):
    made = placed(written(tmp_path / "t", np.stack([PILED] * 2), 3), constants, sweep=[8, 16])
    assert said_of(made, "EPLB").endswith("too little text to tell whether it is worth it.")
    assert said_of(made, "How many slots").endswith("too little text.")
    large: dict[str, Any] = {
        "batch_tokens": [2_000],
        "sweep": [8, 16],
    }  # 3 steps in the judged part
    made = placed(written(tmp_path / "v", np.stack([PILED] * 2), 60), constants, **large)
    assert said_of(made, "EPLB").endswith("too little text to tell whether it is worth it.")
    assert said_of(made, "How many slots").endswith("too little text.")
    with pytest.raises(MoeInspectError, match="the judged part has no step of 4,096 tokens"):
        placed(written(tmp_path / "u", np.stack([PILED] * 2), 3), constants, batch_tokens=[4_096])


def test_a_workload_too_small_for_a_step_is_named(tmp_path: Path, constants: Path):
    long = of_size(written(tmp_path / "long", np.stack([PILED]), 60))
    short = of_size(written(tmp_path / "short", np.stack([PILED]), 2))
    made = placed(long, constants, judge=[long.path, short.path][1:], batch_tokens=[150])
    assert made.tables["policies"]["ms"].notna().all()
    with pytest.raises(MoeInspectError, match="no step of 300 tokens"):
        placed(long, constants, judge=[short.path], batch_tokens=[300])
    other = of_size(written(tmp_path / "other", np.stack([PILED]), 60))
    made = placed(long, constants, judge=[short.path, other.path], batch_tokens=[300])
    assert "No step of 300 tokens in prefill of short, which is not in the times." in made.verdict


def test_counts_are_priced_by_their_load(tmp_path: Path, constants: Path):
    trace = write_counts(tmp_path / "t", [np.array([[9, 9, 1, 1, 1, 1, 1, 1]]) * 1000], 2, ["a"])
    made = placed(trace, constants, batch_tokens=[16_384])
    table = made.tables["policies"]
    np.testing.assert_allclose(table["ms"] / table["even_ms"], [18 / 6, 10 / 6], rtol=0.02)
    assert table["ms_p"].isna().all()
    assert said_of(made, "EPLB").endswith(": worth it on the text that it is fitted on.")


HOT = np.array([9, 1, 1, 1, 1, 1, 1, 1]) / 16  # more than the share of two GPUs of 4


def test_the_knee_is_where_more_slots_save_nothing(tmp_path: Path, constants: Path):
    trace = written(tmp_path / "t", np.stack([HOT] * 2), 80)
    made = placed(trace, constants, sweep=[16, 8, 12, 32], physical_experts=8)
    assert said_of(made, "12 slots per layer are the knee").count("instead of") == 1
    made = placed(trace, constants, sweep=[8])
    assert said_of(made, "8 slots per layer are the knee").endswith(
        "They are the most that were tried."
    )


def test_where_nothing_is_to_gain_the_fewest_slots_are_the_knee(tmp_path: Path, constants: Path):
    """Of steps that load experts alike, and where the times err by more than is saved."""
    ids = np.arange(8_000, dtype=np.uint16)[:, None] % 8
    alike = write_trace(tmp_path / "t", [ids], 8, document=np.arange(8_000) // 80)
    made = placed(alike, constants, sweep=[8, 12, 16], batch_tokens=[80])
    assert said_of(made, "8 slots per layer are the knee")
    model = LatencyModel.from_file(constants)
    model.kernels[0].errors["imbalance_error_median"] = 0.9
    model.to_file(tmp_path / "constants.json")
    hot = written(tmp_path / "u", np.stack([HOT] * 2), 80)
    made = placed(hot, tmp_path / "constants.json", sweep=[8, 12])
    assert "take no less time by 90% or" in said_of(made, "8 slots per layer are the knee")


def test_traffic_to_another_node_is_told(tmp_path: Path, constants: Path):
    """Tokens choose expert 0 and 7 of 8, or 2 and 3: of the first two GPUs and the last, on two
    nodes; experts stand in order."""
    ids = np.where(np.arange(8_000)[:, None] // 4 % 2 == 0, [0, 7], [2, 3]).astype(np.uint16)
    trace = write_trace(tmp_path / "t", [ids], 8, document=np.arange(8_000) // 80)
    made = placed(trace, constants, nodes=2, policies=["contiguous"], batch_tokens=[80])
    assert said_of(
        made, "Under contiguous 50% of the tokens that GPUs send go to another node (50%"
    )
    counts = write_counts(tmp_path / "c", [np.array([[9, 9, 1, 1, 1, 1, 1, 1]]) * 100], 2, ["a"])
    made = placed(counts, constants, nodes=2)
    assert "traffic" not in made.tables
    assert "inter_node" not in made.tables["policies"]


@pytest.fixture
def linked(tmp_path: Path, constants: Path) -> Path:
    """The same kernel, and a link that moves 10^9 bytes in 0.1 ms."""
    path, model = tmp_path / "linked.json", LatencyModel.from_file(constants)
    model.transfers.append(TransferTime("h200", "nccl", "2", "alltoall", "byte", 8, 0.0, 0.1))
    model.to_file(path)
    return path


def drifts(root: Path) -> Trace:
    """Sixteen windows of 20 documents, along which the load of each of 16 experts walks at
    random."""
    walk_WE = np.random.default_rng(0).normal(0, 0.6, (16, 16)).cumsum(0)
    return written(root, np.exp(walk_WE) / np.exp(walk_WE).sum(1, keepdims=True), 20)


def test_what_moves_is_paid_back_by_faster_steps(tmp_path: Path, linked: Path):
    trace = written(tmp_path / "t", np.stack([PILED] * 2), 60)
    made = placed(trace, linked)
    row = made.tables["rebalancing"].iloc[0]
    ms = made.tables["policies"].set_index("policy")["ms"]
    steps = math.ceil(row["move_ms"] / (ms["contiguous"] - ms["eplb"]))
    assert said_of(made, "To rebalance").endswith(f"paid back after {steps} steps.")


def test_what_is_not_known_to_be_worth_it_is_not_paid_back(tmp_path: Path, linked: Path):
    made = placed(written(tmp_path / "t", np.stack([EVEN] * 2), 60), linked)
    assert "paid back" not in said_of(made, "To rebalance")


def test_where_loads_drift_it_is_said_how_often_to_rebalance(tmp_path: Path, linked: Path):
    made = placed(drifts(tmp_path / "t"), linked)
    said, ageing = said_of(made, "From window to window"), made.settings["ageing"]
    assert isinstance(ageing, Ageing)
    again = made.tables["rebalancing"]["move_ms"].iloc[1:].mean()
    lost_per_step = ageing.lost / 40  # windows of 2,000 tokens
    every_T = np.arange(1, 5_000)  # of steps; a plan is half as old in the mean
    best = every_T[np.argmin(again / every_T + lost_per_step * every_T / 2)]
    found = re.search(r"pays every ([\d,]+) steps.*; never within ([\d,]+)\.", said)
    assert found
    every, within = (float(n.replace(",", "")) for n in found.groups())
    assert every == pytest.approx(best, rel=0.05)
    assert within == pytest.approx(max(again / ageing.most, 1), rel=0.05)
    assert within <= every


@pytest.mark.parametrize("regime", ["iid 8/2", "clustered 8/2"])
def test_of_chance_no_drift_is_claimed(tmp_path: Path, linked: Path, regime: str):
    for seed in range(3):
        of = replace(REGIMES[regime], L=1, documents=64)
        made = placed(drawn(tmp_path / str(seed), of, seed), linked)
        assert said_of(made, "Loads do not drift beyond chance")


def test_how_often_to_rebalance_is_unknown_of_too_little(tmp_path: Path, linked: Path):
    drifting = drifts(tmp_path / "t")
    long = write_trace(
        tmp_path / "long",
        [np.arange(4_000, dtype=np.uint16)[:, None] // 500],
        8,
        document=np.arange(4_000) % 8,
    )
    counts = write_counts(tmp_path / "c", [np.array([[9, 9, 1, 1, 1, 1, 1, 1]]) * 100], 2, ["a"])
    for trace, options, why in (
        (drifting, {"fit_domains": "a"}, "the loads have no order in time"),
        (counts, {}, "the loads have no order in time"),
        (long, {}, "documents last longer than a window"),
        (
            written(tmp_path / "few", np.stack([PILED] * 2), 3),
            {"batch_tokens": [10]},
            "too little text",
        ),
    ):
        made = placed(trace, linked, **options)
        assert said_of(made, "How often it pays").endswith(f"{why}."), why


def test_ageing_is_the_slope_over_age_apart_from_good_plans_and_busy_windows():
    rng, age = np.random.default_rng(0), np.abs(np.subtract.outer(np.arange(16), np.arange(16)))
    own = rng.normal(size=(16, 1)) + rng.normal(size=(1, 16))
    found = ageing(own + 0.5 * age, 2)
    assert (found.lost, found.most) == (pytest.approx(0.5), pytest.approx(7.5))
    assert found.p == 0.001
    assert ageing(own + rng.normal(size=(16, 16)), 2).p > 0.01
    assert ageing(own + 5.0 * (age <= 2), 2).lost == pytest.approx(0), "a document in common"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hardware": None, "latency": None}, "are of measured times: give --hardware"),
        ({"batch_tokens": [0]}, "steps of 0 tokens"),
        ({"sweep": [10]}, "cannot split 10 physical experts over 4 GPUs"),
        ({"sweep": [4]}, "4 physical experts for 8 experts"),
    ],
)
def test_wrong_prices_are_refused(tmp_path: Path, constants: Path, options: dict, said: str):
    trace = of_size(written(tmp_path / "t", np.stack([EVEN] * 2), 4))
    with pytest.raises(MoeInspectError, match=said):
        trace.simulate.placement(
            **{**KERNEL, "latency": constants, "gpus": 4, "batch_tokens": [50], **options}
        )

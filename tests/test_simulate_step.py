"""`simulate step`: the loads of steps by brute force, what must not change a time, and what its
sentences claim of chance, of imbalance that is planted, and of too little text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.latency import START, KernelTime, LatencyModel
from moe_inspect.simulate.result import Simulation
from moe_inspect.simulate.step.sampling import decisions_of, draw_steps, step_loads
from moe_inspect.trace.reader import Trace
from tests.support.chance import REGIMES, Planted, Regime, drawn
from tests.support.damage import edit_manifest
from tests.support.synthetic import write_counts, write_trace

CONFIG = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 1024}
KERNEL: dict[str, Any] = {"gpu": "h200", "engine": "vllm", "dtype": "bfloat16"}


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
    LatencyModel([kernel]).to_file(path)
    return path


def of_size(trace: Trace) -> Trace:
    """With experts whose size is known."""
    path = Path(str(trace.path))
    edit_manifest(path, model={"id": "synthetic", "config": CONFIG})
    return moe_inspect.open_trace(path)


def simulated(trace: Trace, constants: Path, **options: Any) -> Simulation:
    return of_size(trace).simulate.step(**KERNEL, latency=constants, **options)


def claims(made: Simulation) -> list[str]:
    return [said for said in made.verdict if re.search(r"imbalance (costs|saves) \S+ ms", said)]


def test_steps_take_each_token_once_and_whole(tmp_path: Path):
    trace = drawn(tmp_path / "t", Regime(documents=40, tokens=6_000), 0)
    for steps in draw_steps(trace, select(trace), [16, 100, 5_000], decoding=False)[0]:
        tokens_S = np.zeros(len(steps.block_S), int)
        for step_T in steps.of_shard.values():
            tokens_S += np.bincount(step_T[step_T >= 0], minlength=len(tokens_S))
        assert (tokens_S == steps.tokens).all()
        assert len(tokens_S) == {16: 32, 100: 32, 5_000: 1}[steps.tokens]
        documents = [set[int]() for _ in range(1 + steps.block_S.max())]
        for number, step_T in steps.of_shard.items():
            document_T = trace.shard(number).tokens(["document"])["document"].to_numpy()
            for s in np.unique(step_T[step_T >= 0]):
                documents[steps.block_S[s]] |= {*document_T[step_T == s].tolist()}
        assert sum(map(len, documents)) == len(set[int]().union(*documents))  # of one block each


def test_generated_tokens_run_side_by_side(tmp_path: Path):
    """A step of as many tokens as a block has sequences is one position of each."""
    documents, length = 8, 12
    ids = np.tile(np.arange(length, dtype=np.uint16) % 8, documents)[:, None]
    document = np.repeat(np.arange(documents), length)
    trace = write_trace(tmp_path / "t", [ids], 8, document=document, phases=("decode",))
    (steps,), total = draw_steps(trace, select(trace, phase="decode"), [4], decoding=True)
    assert total == documents * length
    for _, ids_KT, step_T in decisions_of(trace, [0], steps):
        for s in np.unique(step_T):
            assert len({*ids_KT[0, step_T == s].tolist()}) <= 4  # of one document, 4 positions
    one = [s for s in range(len(steps.block_S)) if steps.block_S[s] == 0]
    assert len(one) == 3  # 12 tokens of the one document of a block


def test_loads_of_steps_equal_a_count_by_hand():
    rng = np.random.default_rng(0)
    T, K, E, G, S = 300, 3, 6, 4, 5
    expert_P = np.array([0, 1, 2, 3, 4, 5, 0, 3])  # two replicas of 0 and 3
    ids_KT = rng.random((T, E)).argsort(1)[:, :K].T.astype(np.int16)
    ids_KT[:, ::7] = -1  # tokens that route nowhere
    step_T = rng.integers(S, size=T)
    slots_SP, reached_SG = np.zeros((S, 8), int), np.zeros((S, G), int)
    for t in range(T):
        gpus = set[int]()
        for e in ids_KT[:, t]:
            if e >= 0:
                replicas = np.flatnonzero(expert_P == e)
                slot = int(replicas[t % len(replicas)])
                slots_SP[step_T[t], slot] += 1
                gpus.add(slot // 2)
        reached_SG[step_T[t], [*gpus]] += 1
    loads = step_loads(ids_KT, step_T, S, expert_P, G)
    np.testing.assert_array_equal(loads.slots_SP, slots_SP)
    np.testing.assert_array_equal(loads.reached_SG, reached_SG)


def test_permuting_the_experts_of_a_gpu_changes_no_time(tmp_path: Path, constants: Path):
    trace = drawn(tmp_path / "t", Regime(documents=40, L=2), 0, Planted(3.0))
    plans, costs = [[*range(8)], [1, 0, 3, 2, 5, 4, 7, 6], [0, 2, 4, 6, 1, 3, 5, 7]], []
    for n, plan in enumerate(plans):
        path = tmp_path / f"{n}.json"
        path.write_text(f'{{"physical_to_logical_map": {[plan] * 2}}}')
        made = simulated(trace, constants, gpus=4, batch_tokens=[64], placement=path)
        costs.append(made.tables["step"][["ms", "even_ms", "waiting_ms"]].iloc[0])
    np.testing.assert_allclose(costs[0], costs[1])
    assert abs(costs[0]["ms"] / costs[2]["ms"] - 1) > 0.001  # other GPUs hold other experts


def test_the_cost_is_the_load_ratio_where_time_is_the_rows(tmp_path: Path, constants: Path):
    """One expert of 8 has half of the load, so its GPU of 4 has (1/2 + 1/14) / (1/4) times the
    mean's."""
    loads = [np.array([[7, 1, 1, 1, 1, 1, 1, 1]]) * 10_000]
    made = simulated(
        write_counts(tmp_path / "t", loads, 2, ["text"]), constants, gpus=4, batch_tokens=[16_384]
    )
    assert made.tables["step"]["cost"].item() == pytest.approx(16 / 7 - 1, abs=0.02)
    assert claims(made)
    assert any("have no intervals" in said for said in made.verdict)


def test_more_tokens_take_longer(tmp_path: Path, constants: Path):
    trace = drawn(tmp_path / "t", Regime(documents=40), 0)
    table = simulated(trace, constants, batch_tokens=[8, 64, 512, 2_048]).tables["step"]
    whole = table[table["domain"] == ""]
    for name in ("ms", "even_ms", "chance_ms"):
        assert whole[name].is_monotonic_increasing
    assert (whole["ms"] >= whole["waiting_ms"]).all()


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
    row = made.tables["step"].query("domain == ''").iloc[0]
    assert row["cost_low"] > row["cost_by_chance"] > -0.01
    assert made.tables["step_layers"].set_index("layer")["cost"].idxmax() == 1


def test_too_little_text_claims_nothing(tmp_path: Path, constants: Path):
    trace = drawn(tmp_path / "t", Regime(documents=2, domains=1, tokens=400), 0, Planted(4.0))
    made = simulated(trace, constants, gpus=4, batch_tokens=[64, 4_096])
    assert made.verdict[0].startswith("Too little data to advise: with fewer than 8 documents")
    assert "too few documents to tell" in made.verdict[1]
    assert not claims(made)
    assert "No step of 4,096 tokens: the trace has too few." in made.verdict
    with pytest.raises(MoeInspectError, match="has no step of 4,096 tokens"):
        simulated(trace, constants, gpus=4, batch_tokens=[4_096])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_tokens": [0]}, "steps of 0 tokens: give numbers from 1 to"),
        ({"gpus": 3}, "cannot split 8 experts over 3 GPUs"),
        ({"gpu": "abacus"}, "no times of gpu abacus: there are h200"),
        ({"placement": "no plan"}, "is no plan for SGLang"),
        ({"placement": "too short"}, "layer 1 does not place its 8 experts"),
    ],
)
def test_wrong_settings_are_refused(
    tmp_path: Path, constants: Path, options: dict[str, Any], said: str
):
    if of := options.get("placement"):
        path = tmp_path / "plan.json"
        text = {"no plan": "[1, 2]", "too short": f'{{"physical_to_logical_map": [{[*range(8)]}]}}'}
        path.write_text(text[of])
        options = {"placement": path}
    trace = of_size(drawn(tmp_path / "t", Regime(documents=4, tokens=100), 0))
    with pytest.raises(MoeInspectError, match=said):
        trace.simulate.step(**{**KERNEL, "latency": constants, **options})


def test_what_was_never_measured_is_told(tmp_path: Path):
    trace = of_size(drawn(tmp_path / "t", Regime(documents=40), 0))
    assert "Extrapolated" not in " ".join(trace.simulate.step(**KERNEL).verdict)
    config = {**CONFIG, "hidden_size": 64}
    edit_manifest(Path(str(trace.path)), model={"id": "synthetic", "config": config})
    said = " ".join(moe_inspect.open_trace(str(trace.path)).simulate.step(**KERNEL).verdict)
    assert "Extrapolated beyond all that was measured: hidden 64 (measured: 2,048 to" in said


def test_experts_of_unknown_size_are_refused(tmp_path: Path, constants: Path):
    trace = drawn(tmp_path / "t", Regime(documents=4, tokens=100), 0)
    with pytest.raises(MoeInspectError, match="does not say how large an expert is"):
        trace.simulate.step(**KERNEL, latency=constants)

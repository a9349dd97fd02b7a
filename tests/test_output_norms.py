"""The norm of what each expert returns (`--output-norms`): it is that of the expert's own output,
in prefill and in decoding, however the model is run; and where it cannot be seen, that is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from moe_inspect.trace.verify import verify
from tests.conftest import Cli
from tests.support import zoo
from tests.support.families import FAMILIES, NO_INTERFACE, build
from tests.test_verify import put, rewrite

ROUNDING = 2**-9  # of what is stored
STEPS = 3


def run(model: Any, steps: int = STEPS) -> None:
    """Prefill of two rows, then decode steps."""
    ids = torch.arange(22).reshape(2, 11) % 40 + 5
    output = model(input_ids=ids, use_cache=True)
    for step in range(steps):
        cache = output.past_key_values
        output = model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)


def recorded(model: Any, path: Path, **options: Any) -> moe_inspect.Trace:
    with moe_inspect.record(model, path, output_norms=True, **options):
        run(model)
    return moe_inspect.open_trace(path)


def norms_alone(model: Any, trace: moe_inspect.Trace) -> list[np.ndarray]:
    """The norms [T, K] of each router in the order of the trace's slots: each expert's output
    for each of its tokens alone, with the gate weight 1, by the family's own implementation."""
    sites, seen = find_routers(model), dict[int, list[torch.Tensor]]()

    def watch(r: int) -> Any:
        return lambda module, args: seen.setdefault(r, []).append(args[0])

    hooks = [s.module.register_forward_pre_hook(watch(r)) for r, s in enumerate(sites)]
    run(model)
    for hook in hooks:
        hook.remove()
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    found, shard = [], next(trace.shards)
    for r, site in enumerate(sites):
        hidden_TH = torch.cat([h.reshape(-1, h.shape[-1]) for h in seen[r]])
        ids_TK = torch.from_numpy(shard.ids(r).astype(np.int64))
        K, one_S1 = ids_TK.shape[1], torch.ones(ids_TK.numel(), 1, dtype=hidden_TH.dtype)
        y_SH = site.module(hidden_TH.repeat_interleave(K, 0), ids_TK.reshape(-1, 1), one_S1)
        found.append(y_SH.norm(dim=1).reshape(ids_TK.shape).numpy())
    model.set_experts_implementation(before)
    return found


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NO_INTERFACE))
@torch.no_grad()
def test_a_norm_is_that_of_the_experts_own_output(family: str, tmp_path: Path) -> None:
    model = build(family)
    trace = recorded(model, tmp_path / "t")
    assert trace.slot_values == ["weight", "norm"]
    shard = next(trace.shards)
    assert set(shard.tokens()["phase"].to_pylist()) == {"prefill", "decode"}
    for r, want_TK in enumerate(norms_alone(model, trace)):
        got_TK = np.stack(shard.slot_values(r, "norm")).T
        assert len(got_TK) == 2 * (11 + STEPS)
        assert np.abs(got_TK / want_TK - 1).max() <= ROUNDING
        # and so for no other slot
        assert np.abs(got_TK[:, ::-1] / want_TK - 1).max() > ROUNDING


@torch.no_grad()
def test_the_kernel_records_what_its_twin_does(
    few: Callable[[int], None], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Grouped in prefill, copied in decoding; to the digit."""
    model = build("olmoe")
    twin = recorded(model, tmp_path / "twin").routing()
    request.getfixturevalue("on_triton")
    few(2 * model.config.num_experts_per_tok)  # of a decode step
    assert recorded(model, tmp_path / "kernel").routing().equals(twin)


def test_with_a_gradient_and_a_backward_pass(tmp_path: Path) -> None:
    """Activation checkpointing runs the experts twice; each output is recorded once."""
    model, inputs = build("qwen3_moe"), zoo.token_batch([9, 5])
    plain = zoo.recorded(model, tmp_path / "a", inputs, inputs, output_norms=True)
    model.train()
    model.gradient_checkpointing_enable()
    with moe_inspect.record(model, tmp_path / "b", output_norms=True):
        for _ in range(2):
            model(**inputs).logits.sum().backward()
    found = moe_inspect.open_trace(tmp_path / "b")
    pd.testing.assert_frame_equal(plain.routing(), found.routing())


def test_compiled(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), zoo.token_batch([9, 5])
    calls = {"a": model, "b": torch.compile(model, backend="eager")}
    plain, found = (
        zoo.recorded(called, tmp_path / name, inputs, inputs, output_norms=True).routing()
        for name, called in calls.items()
    )
    pd.testing.assert_frame_equal(plain, found, rtol=2**-8)


@torch.no_grad()
def test_slots_keep_their_norms_where_they_are_put_in_order(tmp_path: Path) -> None:
    """phimoe's router does not sort by weight: each norm goes with its expert."""
    model = build("phimoe")
    full = recorded(model, tmp_path / "full").routing()
    bare = recorded(model, tmp_path / "bare", weights=False).routing()
    pd.testing.assert_frame_equal(full[bare.columns], bare)


def test_where_outputs_are_not_seen_that_is_said(tmp_path: Path) -> None:
    for family, options, said in (
        ("mixtral", {"capture": "tap"}, "a tap does not see what the experts return"),
        ("llama4", {}, "is not on transformers' experts interface: what its experts return"),
        ("mixtral", {"counts_only": True}, "counts_only keeps no output norms"),
    ):
        with pytest.raises(MoeInspectError, match=said) as error:
            moe_inspect.record(build(family), tmp_path / "t", output_norms=True, **options)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "t").exists()


def test_they_are_verified_and_resumed(cli_here: Cli, tmp_path: Path) -> None:
    traced = ("trace", "demo", "--max-tokens", 300, "-o", "t")
    cli_here(*traced, "--output-norms")
    assert "norms of outputs finite, not negative" in cli_here("check", "t").stdout
    again = cli_here(*traced, "--resume", check=1)
    assert "was made with output norms True, not None" in again.stderr


def test_norms_that_no_output_has_are_found(tmp_path: Path) -> None:
    moe_inspect.trace_model("demo", tmp_path / "t", max_tokens=300, output_norms=True)
    for wrong, said in ((-0.5, "is -0.5"), (float("inf"), "is inf"), (None, "is null, expert_1")):
        shutil.copytree(tmp_path / "t", tmp_path / "wrong", dirs_exist_ok=True)
        rewrite(tmp_path / "wrong", "routing", 0, put("norm_1", 17, wrong))
        found = verify(tmp_path / "wrong")
        assert not found.ok
        assert f"norm_1 {said}" in str(found.violation)


def test_the_worth_of_experts_is_that_of_their_assignments(tmp_path: Path) -> None:
    """Each score from its rows, one by one; an interval around it; NaN in a trace without norms."""
    trace = moe_inspect.trace_model("demo", tmp_path / "t", max_tokens=3000, output_norms=True)
    worth: Any = moe_inspect.report(trace).tables["worth"]
    table: Any = trace.routing()
    for _, row in worth.iterrows():
        rows = table[table["router"] == row["router"]]
        here = rows.filter(like="expert_").to_numpy() == row["expert"]
        gate, norm = (rows.filter(regex=f"^{n}_").to_numpy(float)[here] for n in ("weight", "norm"))
        assert row["assignments"] == len(norm)
        assert row["gate_sum"] == pytest.approx(gate.sum())
        assert row["reap"] == pytest.approx((gate * norm).mean(), rel=1e-5)
        assert row["mean_norm"] == pytest.approx(norm.mean())
        assert row["reap_low"] < row["reap"] < row["reap_high"]
    assert worth.groupby("router")["share"].sum().tolist() == pytest.approx([1] * 4)
    bare = moe_inspect.trace_model("demo", tmp_path / "bare", max_tokens=300)
    without: Any = moe_inspect.report(bare).tables["worth"]
    assert without[["reap", "reap_low", "mean_norm"]].isna().all(axis=None)
    assert without["assignments"].sum() == 300 * 4 * 2


def test_the_worth_of_experts_is_compared_over_the_tokens_of_both(tmp_path: Path) -> None:
    """Two dtypes, and of one trace a part of the text: each figure from the rows of both."""
    options: dict[str, Any] = {"output_norms": True, "batch_tokens": 512}
    a = moe_inspect.trace_model("demo", tmp_path / "a", max_tokens=3000, **options)
    other = {**options, "dtype": "float32", "random_init": 0}
    b = moe_inspect.trace_model("demo", tmp_path / "b", max_tokens=2000, **other)
    made: Any = moe_inspect.compare(a, b)
    table = made.tables["worth"]
    assert len(table) == 4 * 8
    tokens = [t.tokens()[["token", "document", "position"]] for t in (a, b)]
    both = tokens[0].merge(tokens[1], on=["document", "position"], suffixes=("_a", "_b"))
    assert len(both) < a.n_tokens, "control: not all are compared"
    sides = [("a", a.routing()), ("b", b.routing())]
    for _, row in table.iterrows():
        norms = []  # of each token: of this expert, else 0
        for name, side in sides:
            of = side[side["router"] == row["router"]].set_index("token").loc[both[f"token_{name}"]]
            ids, gate, norm = (
                of.filter(regex=f"^{v}_").to_numpy(float) for v in ("expert", "weight", "norm")
            )
            here, worth = ids == row["expert"], gate * norm
            assert row[f"assignments_{name}"] == here.sum()
            found = row[[f"{v}_{name}" for v in ("reap", "mean_norm", "share")]].tolist()
            wanted = worth[here].mean(), norm[here].mean(), worth[here].sum() / worth.sum()
            assert found == pytest.approx(wanted, rel=1e-5)
            norms.append(np.where(here, norm, 0).sum(1))
        change = row["mean_norm_b"] / row["mean_norm_a"] - 1
        assert row["norm_change"] == pytest.approx(change)
        assert row["norm_change_low"] < change < row["norm_change_high"]
        in_a, in_b = np.stack(norms)[:, np.all(norms, axis=0)]
        assert row["both"] == len(in_a)
        difference = np.abs(in_a - in_b).sum() / in_a.sum()
        assert row["norm_difference"] == pytest.approx(difference, rel=1e-4)
    same: Any = moe_inspect.compare(a, a)
    assert (same.tables["worth"][["reap_change", "norm_change", "norm_difference"]] == 0).all(None)
    bare = moe_inspect.trace_model("demo", tmp_path / "bare", max_tokens=300, batch_tokens=512)
    without: Any = moe_inspect.compare(a, bare)
    assert list(without.tables["worth"]) == list(table)
    assert len(without.tables["worth"]) == 0

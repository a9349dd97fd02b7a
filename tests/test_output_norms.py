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

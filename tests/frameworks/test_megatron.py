"""Megatron-Core's GPTModel on one process: its kinds of routers, drops, padding, recomputation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="make test-frameworks installs it")

import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_logging import (
    destroy_moe_metrics_tracker,
    get_moe_metrics_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter

import moe_inspect
from moe_inspect.model.custom import spec as frameworks
from moe_inspect.training import LossAudit, RoutingMonitor, audit_loss
from moe_inspect.training.formulas import Formula
from tests.frameworks import ranks
from tests.frameworks.conftest import Check, Row, free_port
from tests.frameworks.megatron_models import (
    EXPERTS,
    MOE_LAYERS,
    B,
    S,
    blocks,
    build,
    inputs,
    loss_of,
    pipeline_on_rank,
    sequence_parallel_on_rank,
    start,
    train_on_rank,
    watch,
    without_cuda,
)
from tests.frameworks.truth import (
    assert_chosen_by_logits,
    assert_listed,
    compare,
    counted,
    recorded,
    text,
    token_ids,
    uneven,
)

DECISIONS = len(MOE_LAYERS) * B * S
GROUPS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
}
DROPPED = {"moe_expert_capacity_factor": 0.5}
PADDED = {"moe_token_drop_policy": "position", "moe_pad_expert_input_to_capacity": True}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax after top-k": {},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "sigmoid, groups, selection bias": GROUPS,
    "sinkhorn": SINKHORN,
    "capacity 0.5, drops the least probable": DROPPED,
    "capacity 0.5, drops the last, padded to capacity": DROPPED | PADDED,
}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "recompute full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recompute moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@pytest.fixture(autouse=True)
def process_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_cuda(monkeypatch.setattr)
    start(port=free_port())
    yield
    dist.destroy_process_group()
    destroy_moe_metrics_tracker()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.mark.parametrize("router", ROUTERS)
def test_a_training_step(router: str, tmp_path: Path, check: Check) -> None:
    model, given = build(**ROUTERS[router]).train(), inputs()
    watched = watch(model)
    trace = recorded(model, watched, tmp_path / "t", lambda: model(*given).sum(), steps=1)
    found = compare(trace, watched.passes, given[0])
    check("megatron-core", f"GPTModel, {router}, training step", found, DECISIONS)
    scoring = router.split(",")[0].split(" ")[0].replace("capacity", "softmax")
    assert_listed(trace, MOE_LAYERS, 2, scoring)
    slots = trace.routing(layers=1).filter(regex="^expert_").isna().to_numpy()
    assert bool(slots.any()) == ("capacity" in router)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputation(recompute: str, tmp_path: Path, check: Check) -> None:
    model, given = build(**GROUPS, **RECOMPUTED[recompute]).train(), inputs()
    watched = watch(model)
    trace = recorded(model, watched, tmp_path / "t", lambda: model(*given).sum(), steps=2)
    found = compare(trace, watched.passes, given[0])
    check("megatron-core", f"GPTModel, 2 training steps, {recompute}", found, 2 * DECISIONS)
    for layer, block in blocks(model).items():  # it does not count in a first pass without gradient
        assert torch.equal(counted(trace, layer), block.router.local_tokens_per_expert.long())


def test_padding_is_left_out(tmp_path: Path, check: Check) -> None:
    model, (ids_BS, positions_BS, mask) = build().train(), inputs()
    padding_BS = torch.zeros(B, S, dtype=torch.bool)
    padding_BS[1, 10:] = True
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t", logits=True), watched.forward():
        model(ids_BS, positions_BS, mask, padding_mask=padding_BS)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert_chosen_by_logits(trace)
    found = compare(trace, watched.passes, ids_BS, real_BS=~padding_BS)
    check("megatron-core", "GPTModel, padding_mask, forward", found, len(MOE_LAYERS) * (B * S - 6))


def test_rows_taken_as_batch_first_are_found_out(tmp_path: Path) -> None:
    """Control: the comparison sees decisions that stand at other tokens."""
    model, given = build().eval(), inputs()
    watched, name = watch(model), "megatron.core.transformer.moe.router.TopKRouter"
    (spec,) = [spec for spec in frameworks.SPECS if spec.module == name]
    wrong = dataclasses.replace(spec, order="bs")
    trace = recorded(model, watched, tmp_path / "t", lambda: model(*given), routers=[wrong])
    found = compare(trace, watched.passes, given[0])
    assert found.total == DECISIONS
    assert found.equal < DECISIONS / 2


# Each rank has tokens of its own, and ids are global whatever experts it holds. With sequence
# parallelism the router of each rank sees its part of the positions. In a pipeline each rank
# records its layers, by their numbers in the whole model, and the second sees no token ids.
RANKS: dict[str, tuple[Any, tuple[str, ...], int]] = {
    "training step, 2 ranks, data parallel": (train_on_rank, ("data parallel",), ranks.WORLD),
    "training step, 2 ranks, expert parallel": (train_on_rank, ("expert parallel",), ranks.WORLD),
    "forward, 2 ranks, tensor, sequence and expert parallel": (sequence_parallel_on_rank, (), 1),
    "forward, 2 ranks, pipeline stages": (pipeline_on_rank, (), 1),
}


@pytest.mark.parametrize("run", RANKS)
def test_two_ranks(run: str, tmp_path: Path, check: Check) -> None:
    work, arguments, times = RANKS[run]
    found = ranks.run(work, tmp_path, *arguments)
    check("megatron-core", f"GPTModel, {run}", found, times * DECISIONS)


# --- the balancing loss, by audit_loss

COEFFICIENT = 0.01
SEQUENCE = {"moe_router_load_balancing_type": "seq_aux_loss"}
GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss"}
Z = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": COEFFICIENT}
UNPADDED, UNEVEN_PADDING = [24] * 6, [24, 17, 24, 20, 24, 24]
OF_SCORES = Formula("router", "sigmoid, scaled to sum to 1", "the k largest logits")
# the name in the tracker, the options, how many tokens of each row are real, and the formula
LOSSES: dict[str, tuple[str, dict[str, Any], list[int], Formula]] = {
    "aux_loss": ("load_balancing_loss", {}, UNEVEN_PADDING, Formula("router")),
    "seq_aux_loss": ("seq_load_balancing_loss", SEQUENCE, [20] * 6, Formula("sequence")),
    "global_aux_loss": ("global_load_balancing_loss", GLOBAL, UNEVEN_PADDING, Formula("router")),
    "z-loss": ("z_loss", Z, UNEVEN_PADDING, Formula("z")),
    "aux_loss, capacity 1": (
        "load_balancing_loss",
        {"moe_expert_capacity_factor": 1.0},
        UNPADDED,
        Formula("router", chosen="the k largest logits"),
    ),
    "aux_loss, sigmoid, groups, selection bias": (
        "load_balancing_loss",
        GROUPS,
        UNPADDED,
        OF_SCORES,
    ),
    "seq_aux_loss, sigmoid, groups, selection bias": (
        "seq_load_balancing_loss",
        GROUPS | SEQUENCE,
        UNPADDED,
        OF_SCORES._replace(by="sequence"),
    ),
}


def batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    B, S = len(lengths), 24
    ids_BS = token_ids(B=B, S=S)
    position_S = torch.arange(S)
    padding_BS = position_S >= torch.tensor(lengths)[:, None]
    mask_SS = torch.ones(S, S, dtype=torch.bool).triu(1)
    given = {"input_ids": ids_BS, "position_ids": position_S.expand(B, S).contiguous()}
    given["attention_mask"] = mask_SS.expand(B, 1, S, S)
    return given | ({"padding_mask": padding_BS} if bool(padding_BS.any()) else {})


def audited(loss: str, lengths: list[int] | None = None) -> LossAudit:
    name, options, usual, _ = LOSSES[loss]
    model = uneven(build(**options).train())
    given = batch(lengths or usual)

    def update() -> None:
        _update_router_expert_bias([model], model.config)

    return audit_loss(
        model,
        given,
        loss_of(model, name, COEFFICIENT),
        coefficient=COEFFICIENT,
        update=update if "moe_router_enable_expert_bias" in options else None,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_which_formula_a_loss_is(loss: str, audit_row: Row) -> None:
    audit, formula = audited(loss), LOSSES[loss][3]
    assert (audit.formula, audit.either) == (formula, [])
    assert audit.factor == pytest.approx(COEFFICIENT * len(MOE_LAYERS), rel=1e-5)
    said = "3 × the coefficient 0.01: summed over 3 routers, not averaged"
    assert said in text(audit, "loss_formula")
    other = text(audit, "loss_other_choice")
    assert bool(other) == (formula.chosen == "the k largest logits")
    is_published = bool(other) and loss.startswith("seq")
    assert ("as DeepSeek-V3's equation (18) does" in other) == is_published
    if "bias" in loss:
        assert "idle experts, by 0.001." in text(audit, "loss_bias_update")
        assert "steers the choice, and no gate weight" in text(audit, "loss_bias")
    audit_row("megatron-core", loss, audit, COEFFICIENT)


def test_a_router_without_a_loss(audit_row: Row) -> None:
    model = uneven(build(**SINKHORN).train())
    audit = audit_loss(model, batch(UNPADDED))
    assert "The model reports no balancing loss" in text(audit, "loss_none")
    audit_row("megatron-core", "sinkhorn", audit)
    model = uneven(build(**GROUPS | {"moe_aux_loss_coeff": 0.0}).train())
    update = lambda: _update_router_expert_bias([model], model.config)  # noqa: E731
    audit = audit_loss(model, batch(UNPADDED), update=update)
    audit_row("megatron-core", "selection bias alone", audit)


def test_the_gradient_is_that_of_training() -> None:
    """What a training step with the loss has beyond one without it."""
    found = list[torch.Tensor]()
    for coefficient in (COEFFICIENT, 0.0):
        model = uneven(build(moe_aux_loss_coeff=coefficient).train())
        weights = [block.router.weight for block in blocks(model).values()]
        given = batch(UNPADDED)
        loss = loss_of(model, "load_balancing_loss", COEFFICIENT)
        model(**given, labels=given["input_ids"].roll(-1, 1)).mean().backward()
        found += [torch.cat([w.grad.flatten() for w in weights])]  # pyright: ignore
        if coefficient:
            value = loss(model(**given))
            assert value is not None
            found += [torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])]
    with_loss, alone, without = found
    torch.testing.assert_close(with_loss - without, alone, rtol=1e-3, atol=1e-6)
    assert alone.norm() > 1e-3


def test_the_monitor_logs_what_the_routers_record() -> None:
    model = uneven(build(moe_z_loss_coeff=COEFFICIENT).train())
    loss_of(model, "load_balancing_loss", COEFFICIENT)
    with RoutingMonitor(model, log_steps=1, detail="layers") as monitor:
        model(**batch(UNEVEN_PADDING)).sum().backward()
        metrics = monitor.step()
    recorded = get_moe_metrics_tracker().metrics
    assert metrics is not None
    for name, key in {"load_balancing_loss": "aux_loss", "z_loss": "z_loss"}.items():
        found = [metrics[f"routing/{key}/layer_{layer}"] for layer in MOE_LAYERS]
        assert found == pytest.approx(recorded[name].values[1:].tolist(), rel=1e-5)


def test_a_sequence_with_more_padding_weighs_less(audit_row: Row) -> None:
    """Megatron divides by the square of the mean number of tokens, for each sequence alike."""
    audit = audited("seq_aux_loss", UNEVEN_PADDING)
    assert audit.formula is None
    model, given = uneven(build(**SEQUENCE).train()), batch(UNEVEN_PADDING)
    logits: dict[int, torch.Tensor] = {}
    for layer, block in blocks(model).items():
        block.router.register_forward_hook(
            lambda router, args, _, n=layer: logits.update({n: router.gating(args[0]).detach()})
        )
    loss = loss_of(model, "seq_load_balancing_loss", COEFFICIENT)
    value = loss(model(**given))
    assert value is not None
    real_SB = ~given["padding_mask"].T
    real_B = real_SB.sum(0)
    expected = torch.zeros(())
    for of in logits.values():
        p_SBE = of.softmax(-1) * real_SB[..., None]
        hot_SBE = torch.zeros_like(of).scatter(2, of.topk(2).indices, 1) * real_SB[..., None]
        f_BE, p_BE = hot_SBE.sum(0) / (2 * real_B[:, None]), p_SBE.sum(0) / real_B[:, None]
        of_each_B = EXPERTS * (f_BE * p_BE).sum(1)
        expected += (of_each_B * (real_B / real_B.float().mean()) ** 2).mean()
    torch.testing.assert_close(value, COEFFICIENT * expected)
    assert "in no fixed ratio to a published formula" in text(audit, "loss_unknown")
    audit_row("megatron-core", "seq_aux_loss, rows with more and with less padding", audit)


def test_an_expert_bias_and_padding_fail() -> None:
    """https://github.com/NVIDIA/Megatron-LM/issues/6111: where it is mended, this can go."""
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        audited("aux_loss, sigmoid, groups, selection bias", UNEVEN_PADDING)


def test_bugs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = moe_utils.MoEAuxLossAutoScaler
    scaler.set_loss_scale(torch.tensor(2.0))  # which schedules set for each microbatch
    doubled = audited("aux_loss")
    assert "has the value of the formula, and 2 times its gradient" in text(
        doubled, "loss_gradient"
    )
    scaler.set_loss_scale(torch.tensor(1.0))
    routing = TopKRouter.routing
    # as it was: https://github.com/NVIDIA/Megatron-LM/issues/1984
    monkeypatch.setattr(TopKRouter, "routing", lambda self, logits, **_: routing(self, logits))
    padded = audited("aux_loss")
    assert "Padding is counted" in text(padded, "loss_padding")
    assert not text(padded, "loss_gradient")

"""OLMo-core's MoETransformer: dropless, and the default that drops by capacity."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("olmo_core", reason="make test-frameworks installs it")

from olmo_core.nn.moe import moe
from olmo_core.nn.moe.loss import MoELoadBalancingLossGranularity
from olmo_core.nn.moe.router import MoERouterConfig, MoERouterGatingFunction
from olmo_core.nn.transformer.config import TransformerActivationCheckpointingMode

from moe_inspect.training import LossAudit, audit_loss
from moe_inspect.training.formulas import Formula
from tests.frameworks import ranks
from tests.frameworks.conftest import Check, Row
from tests.frameworks.olmo_core_models import (
    LAYERS,
    B,
    S,
    blocks,
    build,
    inputs,
    loss_of,
    on_a_cpu,
    routers,
    run_expert,
    train_on_rank,
    watch,
)
from tests.frameworks.truth import (
    assert_chosen_by_logits,
    assert_listed,
    chosen_in,
    compare,
    counted,
    recorded,
    text,
    token_ids,
    uneven,
)

DECISIONS = LAYERS * B * S
SIGMOID = MoERouterConfig(
    top_k=2,
    gating_function=MoERouterGatingFunction.sigmoid,
    normalize_expert_weights=1.0,
    bias_gamma=1e-3,
)
MODELS: dict[str, dict[str, Any]] = {
    "dropless, softmax": {"dropless": True},
    "dropless, sigmoid, selection bias": {"dropless": True, "router": SIGMOID},
    "capacity 8, softmax": {"dropless": False, "capacity_factor": 8.0},
}
CHECKPOINTED: dict[str, list[str]] = {
    "attention": ["blocks.*.attention"],
    "router": ["blocks.*.feed_forward_moe.router"],
}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu(monkeypatch.setattr)


@pytest.mark.parametrize("name", MODELS)
def test_training_steps(name: str, tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(**MODELS[name]).train(), inputs()
    watched, loss = watch(model), lambda: model(ids_BS, labels=ids_BS.roll(-1, 1)).loss
    trace = recorded(model, watched, tmp_path / "t", loss, steps=2)
    found = compare(trace, watched.passes, ids_BS)
    check("ai2-olmo-core", f"{name}, 2 training steps", found, 2 * DECISIONS)
    assert_listed(trace, list(range(LAYERS)), 2, name.split(", ")[1])
    for layer, router in routers(model).items():
        assert torch.equal(counted(trace, layer), router.batch_size_per_expert.long())


def test_a_forward_pass_and_its_weights(tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(dropless=True).eval(), inputs()
    watched = watch(model)
    trace = recorded(model, watched, tmp_path / "t", lambda: model(ids_BS), logits=True)
    assert_chosen_by_logits(trace)
    found = compare(trace, watched.passes, ids_BS, run=partial(run_expert, model))
    check("ai2-olmo-core", "dropless, forward", found, DECISIONS)


@pytest.mark.parametrize("part", CHECKPOINTED)
def test_checkpointing(part: str, tmp_path: Path, check: Check) -> None:
    """OLMo-core refuses to checkpoint a whole MoE block."""
    model, ids_BS = build(dropless=True).train(), inputs()
    mode = TransformerActivationCheckpointingMode.selected_modules
    model.apply_activation_checkpointing(mode, modules=CHECKPOINTED[part])
    watched, loss = watch(model), lambda: model(ids_BS, labels=ids_BS.roll(-1, 1)).loss
    found = compare(recorded(model, watched, tmp_path / "t", loss, 1), watched.passes, ids_BS)
    check("ai2-olmo-core", f"dropless, training step, {part} checkpointed", found, DECISIONS)


def test_documents_of_doc_lens(tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(dropless=True).eval(), inputs()
    doc_lens = {"doc_lens": torch.tensor([[6, 10]] * B), "max_doc_lens": [10] * B}
    watched = watch(model)
    trace = recorded(model, watched, tmp_path / "t", lambda: model(ids_BS, **doc_lens))
    positions_S = torch.cat([torch.arange(6), torch.arange(10)])
    found = compare(trace, watched.passes, ids_BS, positions_BS=positions_S.expand(B, S))
    check("ai2-olmo-core", "dropless, doc_lens, forward", found, DECISIONS)
    assert trace.tokens().document.nunique() == 2 * B


def test_what_capacity_drops_is_in_the_trace(tmp_path: Path) -> None:
    """The experts drop it, after the router has handed it over: a trace shows the router's
    choice."""
    model, ids_BS = build(dropless=False, capacity_factor=1.0).eval(), inputs()
    watched = watch(model)
    trace = recorded(model, watched, tmp_path / "t", lambda: model(ids_BS))
    kept = dropped = 0
    for layer, block in watched.passes[0].items():
        for chosen, routed in zip(block.chosen(), chosen_in(trace, layer).tolist(), strict=True):
            assert chosen.keys() <= set(routed)
            kept += len(chosen)
        capacity = blocks(model)[layer].experts.expert_capacity(B * S)
        dropped += int((counted(trace, layer) - capacity).clamp(min=0).sum())
    assert dropped > 0
    assert kept + dropped == DECISIONS * 2


@pytest.mark.parametrize("parallel", ["FSDP2", "DDP"])
def test_two_ranks(parallel: str, tmp_path: Path, check: Check) -> None:
    """Each rank has tokens of its own; ids are global whatever experts it holds."""
    found = ranks.run(train_on_rank, tmp_path, parallel)
    run = f"dropless, training step, 2 ranks, {parallel}"
    check("ai2-olmo-core", run, found, ranks.WORLD * DECISIONS)


# --- the balancing loss, by audit_loss

COEFFICIENT = {"load balancing loss": 0.01, "router Z loss": 0.001}
SHARE = "sigmoid, scaled to sum to 1"
# the options of a model, the metric that holds its loss, and the formula
LOSSES: dict[str, tuple[dict[str, Any], str, Formula]] = {
    "lb_loss": ({"dropless": True}, "load balancing loss", Formula("router", padding=True)),
    "lb_loss of each instance": (
        {"dropless": True},
        "load balancing loss",
        Formula("sequence", padding=True),
    ),
    "lb_loss, capacity 1": (
        {"dropless": False, "capacity_factor": 1.0},
        "load balancing loss",
        Formula("router", padding=True),
    ),
    "lb_loss, sigmoid, selection bias": (
        {"dropless": True, "router": SIGMOID},
        "load balancing loss",
        Formula("router", SHARE, padding=True),
    ),
    "z-loss": ({"dropless": True}, "router Z loss", Formula("z", padding=True)),
}
PAD = 1


def made(loss: str) -> Any:
    """With this loss alone, as a formula is told of one at a time."""
    options, metric, _ = LOSSES[loss]
    model = uneven(build(**options).train())
    for router in routers(model).values():
        if metric == "router Z loss":
            router.lb_loss_weight = None
        else:
            router.z_loss_weight = None
        if "instance" in loss:
            router.lb_loss_granularity = MoELoadBalancingLossGranularity.instance
    return model


def audited(loss: str, model: Any = None, **given: Any) -> LossAudit:
    options, metric, _ = LOSSES[loss]
    model = model or made(loss)
    ids_BS = token_ids(least=2, B=6, S=24)
    ids_BS[1, 17:] = ids_BS[3, 20:] = PAD

    def inputs(_: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """It is told of no padding, and the audit is."""
        ids_BS = kwargs["input_ids"]
        return {"input_ids": ids_BS, "attention_mask": ids_BS != PAD}

    return audit_loss(
        model,
        {"input_ids": ids_BS, **given},
        loss_of(model, metric),
        coefficient=COEFFICIENT[metric],
        update=model.post_batch if options.get("router") is SIGMOID else None,
        inputs=inputs,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_which_formula_a_loss_is(loss: str, audit_row: Row) -> None:
    """Each weight is divided by the number of layers: the sum of them is a mean."""
    audit, (_, metric, formula) = audited(loss), LOSSES[loss]
    assert (audit.formula, audit.either) == (formula, [])
    assert audit.factor == pytest.approx(COEFFICIENT[metric], rel=1e-4)
    said = f"1 × the coefficient {COEFFICIENT[metric]:g}: as published"
    assert said in text(audit, "loss_formula")
    assert {f.kind for f in audit.findings if f.severity == "warning"} == {"loss_padding"}
    if "bias" in loss:
        assert "idle experts, by 0.001." in text(audit, "loss_bias_update")
        assert "steers the choice, and no gate weight" in text(audit, "loss_bias")
    audit_row("ai2-olmo-core", loss, audit, COEFFICIENT[metric])


def divides_as_the_trainer(model: Any) -> None:
    """TransformerTrainModule gives the number of labels that are not ignored."""

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n = (kwargs["labels"] != -100).sum()
        return args, {**kwargs, "loss_reduction": "sum", "loss_div_factor": n}

    model.register_forward_pre_hook(before, with_kwargs=True)


def test_labels_that_are_ignored_scale_the_loss(audit_row: Row) -> None:
    """The sum over all tokens is divided by the tokens of the language loss."""
    model, labels_BS = made("lb_loss"), torch.zeros(6, 24, dtype=torch.long)
    divides_as_the_trainer(model)
    labels_BS[:, :18] = -100  # a prompt
    audit = audited("lb_loss", model, labels=labels_BS)
    assert audit.formula == Formula("router", padding=True)
    assert audit.factor == pytest.approx(0.01 * 24 / 6, rel=1e-4)
    assert "4 × the coefficient 0.01" in text(audit, "loss_formula")
    audit_row("ai2-olmo-core", "lb_loss as trained, 3/4 of the labels ignored", audit, 0.01)
    model = made("lb_loss")
    divides_as_the_trainer(model)
    labels_BS[3:, :18] = 0  # of half of the rows there is no prompt
    assert "in no fixed ratio" in text(audited("lb_loss", model, labels=labels_BS), "loss_unknown")


def test_bugs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attach = moe.attach_auxiliary_loss
    monkeypatch.setattr(moe, "attach_auxiliary_loss", lambda x, loss: attach(x, 2 * loss))
    assert "and 2 times its gradient" in text(audited("lb_loss"), "loss_gradient")
    monkeypatch.setattr(moe, "attach_auxiliary_loss", lambda x, loss: x)
    assert "It moves nothing" in text(audited("lb_loss"), "loss_no_gradient")
    model = made("lb_loss, sigmoid, selection bias")
    for router in routers(model).values():
        router.bias_gamma = -1e-3
    audit = audited("lb_loss, sigmoid, selection bias", model)
    assert "busy experts in layers 0-3: its sign is wrong" in text(audit, "loss_bias_update")

"""audit_loss: published bugs of balancing losses, planted in tiny models, are named; what is right
is not."""

from __future__ import annotations

import re
from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers.models.mixtral import modeling_mixtral

import moe_inspect
from moe_inspect.analysis.metrics import router as metrics
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import Router
from moe_inspect.training import LossAudit, audit_loss
from moe_inspect.training.formulas import Formula, Routed
from moe_inspect.training.metrics import balance_moved
from tests.conftest import ROOT, Put, write_between_marks
from tests.support import own, zoo
from tests.support.sweep import WHOLE, sample

FAMILIES_PAGE = ROOT / "benchmarks/results/families.md"

LENGTHS = [24, 17, 24, 20, 24, 24]
POOLED = modeling_mixtral.load_balancing_loss_func


def model(family: str = "mixtral", on: bool = True, **config: Any) -> Any:
    config = {"num_experts_per_tok": 2, "num_hidden_layers": 2, **config}
    built = zoo.build(family, **config).train()
    built.config.output_router_logits = on
    return built


def batch(family: str = "mixtral", lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    return zoo.inputs(family, lengths)


def by_router(logits: Any, E: int, k: int = 2, mask: Any = None) -> Tensor:
    """Switch's loss of each router, averaged: 1 where all is even."""
    return torch.stack([POOLED((of,), E, k, mask) for of in logits]).mean() / k


def kinds(audit: LossAudit, *severities: str) -> set[str]:
    return {f.kind for f in audit.findings if f.severity in (severities or ("critical", "warning"))}


def text(audit: LossAudit, kind: str) -> str:
    return " ".join(f.text for f in audit.findings if f.kind == kind)


@pytest.fixture
def planted(put: Put) -> Any:
    """The audit of a Mixtral whose loss is this function."""

    def run(function: Any, given: Any = None, **options: Any) -> LossAudit:
        put(modeling_mixtral, load_balancing_loss_func=function)
        return audit_loss(model(), given or batch(), **options)

    return run


def test_a_loss_of_each_router_is_right(planted: Any) -> None:
    audit = planted(by_router)
    assert audit.formula == Formula("router")
    assert audit.factor == pytest.approx(1, rel=1e-4)
    assert audit.either == []
    assert audit.added == pytest.approx(1, abs=0.01)
    assert kinds(audit) == {"loss_accumulated"}
    assert audit.ok
    assert "1 × Switch's loss (arXiv:2101.03961) of each router" in text(audit, "loss_formula")
    assert "(as published)" in text(audit, "loss_formula")
    assert min(audit.moves_R) > 0.2
    assert "in every router, by autograd and as measured" in text(audit, "loss_moves")


# --- published bugs


def zero(logits: Any, E: int, k: int = 2, mask: Any = None) -> Any:
    return 0.0 * by_router(logits, E, k, mask)


def never(logits: Any, E: int, k: int = 2, mask: Any = None) -> Any:
    """As where the logits are not gathered."""
    return torch.tensor(0)


def constant(logits: Any, E: int, k: int = 2, mask: Any = None) -> Tensor:
    """The mean is over experts, not over tokens, and each token's probabilities sum to 1."""
    p = torch.cat(logits).softmax(-1)
    hot = one_hot(p.topk(k, -1).indices, E).sum(1).float()
    return E * (p.mean(-1) * hot.mean(-1)).sum() * E / k / len(p)


def twice(logits: Any, E: int, k: int = 2, mask: Any = None) -> Tensor:
    return by_router([of.softmax(-1) for of in logits], E, k, mask)


def with_padding(logits: Any, E: int, k: int = 2, mask: Any = None) -> Tensor:
    return by_router(logits, E, k)


@pytest.mark.parametrize(
    ("function", "kind", "says"),
    [
        (zero, "loss_zero", "is 0 in every pass"),
        (never, "loss_zero", "is 0 in every pass"),
        (constant, "loss_constant", "is 1 in every pass, whatever the load"),
        (twice, "loss_softmax_twice", "A softmax is taken of what is a softmax already"),
        (POOLED, "loss_pooled", "pooled over 2 routers"),
        (with_padding, "loss_padding", "Padding is counted"),
    ],
)
def test_a_published_bug_is_named(planted: Any, function: Any, kind: str, says: str) -> None:
    audit = planted(function)
    assert kind in kinds(audit)
    assert says in text(audit, kind)
    named = {"loss_zero", "loss_constant", "loss_softmax_twice", "loss_pooled", "loss_padding"}
    assert kinds(audit) & named == {kind}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_finite_number_is_critical(planted: Any, value: float) -> None:
    audit = planted(lambda *a: by_router(*a) * value)
    assert not audit.ok
    assert [f.kind for f in audit.findings] == ["loss_not_finite"]
    assert f"is {value}:" in str(audit)


def test_a_loss_whose_gradient_or_other_passes_are_no_number_is_critical(planted: Any) -> None:
    def by_root(*args: Any) -> Tensor:
        value = by_router(*args)
        return value + 0 * (value - value).sqrt().nan_to_num()

    assert "is no finite number" in text(planted(by_root), "loss_not_finite")

    def of_few(logits: Any, *args: Any) -> Tensor:
        value = by_router(logits, *args)
        return value * float("nan") if len(logits[0]) == 72 else value

    assert 'is nan in the pass "first half"' in text(planted(of_few), "loss_not_finite")


def test_a_row_whose_second_half_is_padding_has_no_halves(planted: Any) -> None:
    ids = batch(lengths=[48])["input_ids"]
    mask = (torch.arange(48) < 20).long()[None]
    audit = planted(by_router, {"input_ids": ids, "attention_mask": mask})
    assert Formula("router") in [audit.formula, *audit.either]
    assert "not judged" in text(audit, "loss_direction")
    assert audit.ok


def test_a_negative_coefficient_is_critical(planted: Any) -> None:
    assert "loss_negative" not in kinds(planted(by_router))
    audit = planted(by_router, coefficient=-0.01)
    assert "coefficient of the balancing loss is -0.01: a negative" in text(audit, "loss_negative")
    assert not audit.ok
    built = model(router_aux_loss_coef=-0.02)
    assert "is -0.02: a negative" in text(audit_loss(built, batch()), "loss_negative")
    assert "loss_negative" not in kinds(planted(lambda *a: -by_router(*a), coefficient=-0.01))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_wherever_it_is_called(put: Put, mode: Any) -> None:
    put(modeling_mixtral, load_balancing_loss_func=by_router)
    built = model()
    with mode():
        audit = audit_loss(built, batch())
        assert not torch.is_grad_enabled()
    assert "in every router, by autograd and as measured" in text(audit, "loss_moves")
    assert audit.ok
    with torch.inference_mode():
        built = zoo.build("mixtral")
    with pytest.raises(MoeInspectError, match="inference_mode, and has no gradients"):
        audit_loss(built, batch())


def test_a_router_that_returns_probabilities_as_its_logits_is_named(put: Put) -> None:
    """As those of Mixtral once did (transformers #45120)."""
    forward = modeling_mixtral.MixtralTopKRouter.forward

    def probabilities(self: Any, hidden: Tensor) -> Any:
        logits, *rest = forward(self, hidden)
        return logits.float().softmax(-1), *rest

    put(modeling_mixtral, load_balancing_loss_func=by_router)
    put(modeling_mixtral.MixtralTopKRouter, forward=probabilities)
    assert "loss_softmax_twice" in kinds(audit_loss(model(), batch()))


def test_a_loss_that_is_added_twice_is_named() -> None:
    built = model()
    built.router_aux_loss_coef *= 2  # of which the config knows nothing
    audit = audit_loss(built, batch())
    assert audit.added == pytest.approx(2, rel=0.01)
    assert "2 times the balancing loss that the coefficient 0.001 says" in text(
        audit, "loss_doubled"
    )
    assert "loss_accumulated" in kinds(audit)


def test_a_loss_that_is_silently_off_is_named() -> None:
    audit = audit_loss(model(on=False), batch())
    assert "output_router_logits=False: training as it says adds none" in text(audit, "loss_off")
    assert not audit.ok
    assert audit_loss(model(on=False).eval(), batch()).ok  # nobody trains it
    assert "loss_off" not in kinds(audit_loss(model(), batch()))
    built = model()
    built.router_aux_loss_coef = 0  # the config states 0.001
    assert "is no part of the loss with labels" in text(audit_loss(built, batch()), "loss_off")
    built.config.router_aux_loss_coef = 0.0
    assert text(audit_loss(built, batch()), "loss_off") == (
        "The coefficient of the balancing loss is 0."
    )
    of_llama = audit_loss(zoo.build("llama4").train(), batch("llama4"))
    assert "0.001, and the model reports none" in text(of_llama, "loss_off")
    assert not of_llama.ok
    tokens = audit_loss(zoo.build("openai_privacy_filter"), batch("openai_privacy_filter"))
    assert "the model reports none" in text(tokens, "loss_off")  # (its labels are no token ids)
    assert kinds(audit_loss(zoo.build("deepseek_v3"), batch("deepseek_v3"))) == set()


def test_a_loss_that_no_switch_turns_off_is_not_said_to_train_nothing(put: Put) -> None:
    forward = modeling_mixtral.MixtralForCausalLM.forward

    def always(
        self: Any,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
        output_router_logits: Any = None,
        **more: Any,
    ) -> Any:
        given = {"attention_mask": attention_mask, "labels": labels, "output_router_logits": True}
        return forward(self, input_ids, **given, **more)

    put(modeling_mixtral.MixtralForCausalLM, forward=always)
    audit = audit_loss(model(), batch())
    assert "with output_router_logits=False too" in text(audit, "loss_added")
    assert "loss_off" not in kinds(audit)
    assert np.isnan(audit.added)


def test_a_forward_that_hands_on_its_arguments_is_judged() -> None:
    built = model()

    class Twice(type(built)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            if out.loss is not None and out.aux_loss is not None:
                out.loss = out.loss + self.router_aux_loss_coef * out.aux_loss
            return out

    built.__class__ = Twice
    audit = audit_loss(built, batch())
    assert audit.added == pytest.approx(2, rel=0.01)
    assert "loss_doubled" in kinds(audit)


def test_a_training_loss_that_cannot_be_judged_is_said_to_be_so(put: Put) -> None:
    forward = modeling_mixtral.MixtralForCausalLM.forward

    def hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    ids = batch()["input_ids"]
    for given, of, why in (
        (ids, forward, "the batch is no dict."),
        ((ids,), forward, "the batch is no dict."),
        (batch(), hidden, "its forward has no argument output_router_logits."),
    ):
        put(modeling_mixtral.MixtralForCausalLM, forward=of)
        audit = audit_loss(model(), given)
        assert why in text(audit, "loss_added")
        assert audit.formula is not None
        assert np.isnan(audit.added)
    put(modeling_mixtral.MixtralForCausalLM, forward=forward)
    assert "loss_added" not in {f.kind for f in audit_loss(model(), batch()).findings}


# --- the gradient


def test_a_model_that_fails_where_its_loss_is_on_is_named(put: Put) -> None:
    """As Granite's in transformers 5.17."""

    def fails(logits: Any, *args: Any) -> Tensor:
        return (0).to(logits[0].device)  # pyright: ignore

    put(modeling_mixtral, load_balancing_loss_func=fails)
    audit = audit_loss(model(), batch())
    assert "fails on this batch, without it does not" in text(audit, "loss_off")
    assert "AttributeError: 'int' object has no attribute 'to'" in text(audit, "loss_off")
    assert not audit.ok

    def always(self: Any, input_ids: Any, output_router_logits: Any = None, **_: Any) -> Any:
        raise AttributeError("whatever")

    put(modeling_mixtral.MixtralForCausalLM, forward=always)
    with pytest.raises(AttributeError, match="whatever"):
        audit_loss(model(), batch())


def test_every_pass_begins_with_the_same_buffers(put: Put) -> None:
    """As Megatron-Core's loss of a global batch counts in one."""
    built = model()
    built.register_buffer("passes", torch.zeros(()))

    def counted(*args: Any) -> Tensor:
        built.passes.add_(1)
        return by_router(*args) * built.passes

    put(modeling_mixtral, load_balancing_loss_func=counted)
    assert audit_loss(built, batch()).formula == Formula("router")
    assert built.passes == 0


def test_routers_that_begin_with_zeros_are_told_apart_with_others(put: Put) -> None:
    put(modeling_mixtral, load_balancing_loss_func=by_router)
    built = model()
    for layer in built.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    assert audit_loss(built, batch()).formula == Formula("router")


def test_what_has_no_gradient_or_another_one_is_named(planted: Any) -> None:
    def of(gradient: float) -> Any:
        def changed(*args: Any) -> Tensor:
            value = by_router(*args)
            return value * gradient + (value * (1 - gradient)).detach()

        return changed

    assert "It moves nothing" in text(planted(of(0)), "loss_no_gradient")
    assert "none: it is detached" in text(
        planted(lambda *a: by_router(*a).detach()), "loss_no_gradient"
    )
    half = planted(of(0.5))
    assert "0.5 times its gradient: a part" in text(half, "loss_gradient")
    assert "does not lower the loss" in text(half, "loss_step")
    assert "loss_direction" not in kinds(half)
    other_way = planted(of(-1))
    assert "to the busy experts" in text(other_way, "loss_direction")
    assert "layers 0-1" in text(other_way, "loss_direction")
    assert max(other_way.moves_R) < -0.2
    for wrong in (half, other_way):
        assert wrong.formula == Formula("router")
        assert not wrong.ok


class Attached(torch.autograd.Function):
    """As Megatron-Core and OLMo-core add a loss: to whatever gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], torch.ones(())


def test_a_loss_that_is_attached_to_a_gradient_is_told_from_the_formula() -> None:
    """That of the second router passes the first one, and so does the formula's."""
    built, given = probed(), batch()
    built.attached = lambda r: Formula("router").value([r]).float()
    built.loss = lambda shown: 2 * Formula("router").value(shown).detach()
    tokens = {"tokens": given["input_ids"], "padding_mask": given["attention_mask"] == 0}
    audit = audit_loss(built, tokens, lambda out: out["balance"] + 0 * out["x"].sum())
    assert audit.factor == pytest.approx(2)
    assert "loss_gradient" not in kinds(audit)
    built.attached = lambda r: 2 * Formula("router").value([r]).float()
    audit = audit_loss(built, tokens, lambda out: out["balance"] + 0 * out["x"].sum())
    assert "and 2 times its gradient" in text(audit, "loss_gradient")


def test_a_layer_without_a_loss_is_named(planted: Any) -> None:
    def without_last(logits: Any, *args: Any) -> Tensor:
        return by_router(logits[:-1], *args)

    audit = planted(without_last)
    assert audit.formula is None
    assert "in no fixed ratio to a published formula" in text(audit, "loss_unknown")
    assert "In layer 1 a step of the loss moves no probability" in text(audit, "loss_direction")


def test_a_pooled_loss_moves_a_layer_the_wrong_way() -> None:
    """Of two routers that are uneven in opposite ways it sees the sum: where it moves probability
    is seen by a step, without the audit."""
    built, given = model().eval(), batch()
    gates = [layer.mlp.gate for layer in built.model.layers]
    for gate, bias in zip(gates, (3.0, -0.3), strict=True):
        offset = torch.tensor([bias] * 4 + [-bias] * 4)  # of the logits
        shift = gate.weight.detach().pinverse() @ offset
        gate.register_forward_pre_hook(lambda m, a, shift=shift: (a[0] + shift,))
    audit = audit_loss(built, given)
    real = given["attention_mask"].reshape(-1) > 0
    out = built(**given)
    before = [of[real].softmax(-1) for of in out.router_logits]
    grads = torch.autograd.grad(out.aux_loss, [gate.weight for gate in gates])
    with torch.no_grad():
        for gate, grad in zip(gates, grads, strict=True):
            gate.weight -= 1e-3 * grad
        after = [of[real].softmax(-1) for of in built(**given).router_logits]
        loads = [one_hot(of.topk(2).indices, 8).sum((0, 1)) for of in before]
        moved = zip(loads, before, after, strict=True)
        worse = [float((load * (b - a).mean(0)).sum()) > 0 for load, a, b in moved]
    assert sorted(worse) == [False, True]
    layer = worse.index(True)
    assert [move < 0 for move in audit.moves_R] == worse
    said = f"In layer {layer} a step of the loss moves probability to the busy experts"
    assert said in text(audit, "loss_direction")


def test_halves_of_the_same_text_confirm_no_direction(planted: Any) -> None:
    row = batch(lengths=[24])["input_ids"]
    for rows in (row.repeat(6, 1), torch.cat([row.repeat(5, 1), batch()["input_ids"][-1:]])):
        audit = planted(lambda *a: -by_router(*a), {"input_ids": rows})
        assert "confirms nothing" in text(audit, "loss_direction")
        assert "loss_direction" not in kinds(audit)
        assert "loss_moves" not in {f.kind for f in audit.findings}
    tokens = {"tokens": row.repeat(4, 1), "padding_mask": torch.zeros(4, 24) > 0}
    built = probed()
    built.loss = Formula("router").value
    audit = audit_loss(built, tokens, lambda out: out["balance"])
    assert "confirms nothing" in text(audit, "loss_direction")
    assert "confirms nothing" not in text(planted(by_router), "loss_direction")


def test_weights_gradients_and_buffers_are_left_as_they_were() -> None:
    built = model("minimax_m2")
    before = {name: value.clone() for name, value in built.state_dict().items()}
    state = torch.get_rng_state()
    audit_loss(built, batch("minimax_m2"))
    assert all(torch.equal(before[name], value) for name, value in built.state_dict().items())
    assert all(p.grad is None for p in built.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not {*built._forward_hooks, *built._forward_pre_hooks}


# --- what the data cannot tell


def test_formulas_that_are_the_same_on_the_batch_are_all_said(planted: Any) -> None:
    given = {"input_ids": batch(lengths=[40])["input_ids"]}
    audit = planted(by_router, given)
    assert Formula("sequence") in audit.either
    assert "it may also be the loss of each sequence" in text(audit, "loss_formula")
    assert kinds(planted(POOLED, given)) >= {"loss_accumulated"}
    assert planted(by_router).either == []


def test_tokens_that_are_all_alike_tell_no_formula(planted: Any, put: Put) -> None:
    ids = torch.full((4, 8), 7)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    put(modeling_mixtral, load_balancing_loss_func=by_router)
    built = model()
    for layer in built.model.layers:
        layer.mlp.gate.weight.requires_grad_(False)
    audit = audit_loss(built, given)
    assert audit.formula is None
    assert "no formula can be told from another" in text(audit, "loss_unknown")
    assert "loss_constant" not in kinds(audit)
    assert "The routers' weights are frozen" in text(audit, "loss_frozen")
    # weights that may change make other load of the same tokens
    assert Formula("sequence") in planted(by_router, given).either


def test_sixteen_bits_tell_less_and_say_so(planted: Any) -> None:
    assert "and as measured" in text(planted(by_router), "loss_moves")
    audit = audit_loss(model().bfloat16(), batch())
    assert Formula("router") in [audit.formula, *audit.either]
    assert "and as measured" not in text(audit, "loss_moves")
    assert "loss_step" not in {f.kind for f in audit.findings}


# --- formulas


def routed(T: int = 60, E: int = 6, k: int = 2, rows: int = 3) -> Routed:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(3))
    ids, real = logits.topk(k, -1).indices, torch.arange(T) % 5 > 0
    row = torch.arange(T) // (T // rows)
    return Routed(logits, ids, torch.ones(T, k).cumsum(1).flip(1), real, row, "", "Router")


def test_the_formula_is_that_of_the_reports() -> None:
    r = routed()
    load_E = torch.bincount(r.ids_TK[r.real_T].reshape(-1), minlength=6).numpy()
    p_E = r.logits_TE[r.real_T].softmax(-1).sum(0).numpy()
    expected = metrics.aux_loss(load_E, p_E)
    assert float(Formula("router").value([r])) == pytest.approx(expected, rel=1e-6)
    assert float(Formula("router", padding=True).value([r])) != pytest.approx(expected, rel=1e-6)
    z = (r.logits_TE[r.real_T].logsumexp(-1) ** 2).sum()
    assert float(Formula("z").value([r])) == pytest.approx(
        metrics.z_loss(float(z), int(r.real_T.sum())), rel=1e-6
    )


@pytest.mark.parametrize("by", ["router", "sequence", "all routers", "devices"])
def test_even_routing_has_a_loss_of_1(by: str) -> None:
    ids = torch.arange(24).reshape(12, 2) % 6
    even = routed(12)._replace(ids_TK=ids, logits_TE=torch.zeros(12, 6), real_T=torch.ones(12) > 0)
    assert float(Formula(by, devices=3).value([even, even])) == pytest.approx(1)


# --- each formula in a model of one's own

SEQUENCE = Formula("sequence", "sigmoid, scaled to sum to 1")
LOSSES: list[tuple[Formula, float]] = [
    (Formula("router"), 1),
    (Formula("router"), 0.01),
    (Formula("router", chosen="first choices"), 1),
    (Formula("sequence", chosen="first choices"), 1),
    (SEQUENCE, 1),
    (Formula("z"), 1),
    (Formula("all routers", padding=True), 2),
    (Formula("router", "softmax over the k largest logits"), 1),
]


def probed() -> Any:
    """Two routers with a probe each, and `loss`, a function of what they showed."""

    def forward(self: Any, tokens: Tensor, padding_mask: Tensor) -> Any:
        x, shown = self.embed(tokens), []
        row = torch.arange(len(tokens))[:, None].expand_as(tokens).reshape(-1)
        for layer, gate in enumerate(self.gates):
            logits = gate(x)
            weights, ids = logits.softmax(-1).topk(2)
            if self.even:
                ids = torch.arange(ids.numel()).view_as(ids) % 8
            moe_inspect.probe(ids, weights, layer=layer, logits=logits)
            flat = [v.flatten(0, 1) for v in (logits, ids, weights)]
            shown.append(Routed(*flat, ~padding_mask.reshape(-1), row, "", "Router"))
            x = x * weights.sum(-1, keepdim=True)
            if self.attached is not None:
                x = Attached.apply(x, self.attached(shown[-1]))
        return {"balance": self.loss(shown), "x": x}

    torch.manual_seed(0)
    gates = torch.nn.ModuleList(torch.nn.Linear(16, 8, bias=False) for _ in range(2))
    embed = torch.nn.Embedding(300, 16)
    return own.module("Probed", forward, embed=embed, gates=gates, attached=None, even=False)


@pytest.mark.parametrize(("formula", "factor"), LOSSES)
def test_each_formula_is_told_from_all_others(formula: Formula, factor: float) -> None:
    built, given = probed(), batch()
    built.loss = lambda shown: factor * formula.value(shown)
    tokens = {"tokens": given["input_ids"], "padding_mask": given["attention_mask"] == 0}
    audit = audit_loss(built, tokens, lambda output: output["balance"], coefficient=0.01)
    assert audit.formula == formula
    assert audit.factor == pytest.approx(factor, rel=1e-3)
    assert audit.either == []
    assert f"{factor / 0.01:.4g} × the coefficient 0.01" in text(audit, "loss_formula")
    if formula.by == "z":  # which balances nothing
        assert not {f.kind for f in audit.findings} & {"loss_direction", "loss_moves"}


def test_a_loss_that_does_not_see_an_even_load_has_a_formula() -> None:
    """As where every expert is filled up to its capacity, and the loss counts what came before."""
    built, formula = probed(), Formula("router", chosen="the k largest logits")
    built.even, built.loss = True, formula.value
    given = batch(lengths=[24] * 6)
    tokens = {"tokens": given["input_ids"], "padding_mask": given["attention_mask"] == 0}
    audit = audit_loss(built, tokens, lambda output: output["balance"])
    assert (audit.formula, audit.either) == (formula, [])


def test_a_loss_that_is_not_there_or_no_batch_is_one_line() -> None:
    given = batch()
    tokens = {"tokens": given["input_ids"], "padding_mask": given["attention_mask"] == 0}
    built = probed()
    built.loss = lambda shown: None
    audit = audit_loss(built, tokens, lambda output: output["balance"])
    assert "finds no balancing loss" in text(audit, "loss_off")
    padding = given | {"attention_mask": torch.zeros_like(given["attention_mask"])}
    for wrong, says in (
        ({"input_ids": given["input_ids"][0]}, "needs a batch with a tensor"),
        (7, "needs a batch of tensors, not a int"),
        (padding, "needs a batch with tokens: this one is padding alone"),
    ):
        with pytest.raises(MoeInspectError, match=says):
            audit_loss(model(), wrong)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": 7}, r"loss=7 is no function"),
        ({"loss": lambda out: out["balance"]}, r"fails on the output of a pass \(KeyError"),
        ({"loss": lambda out: out.balance}, r"fails on the output of a pass \(AttributeError"),
        ({"loss": lambda out: out.logits}, r"has the shape \[6, 24, 300\]"),
        ({"loss": lambda out: "a"}, r"gives a str, not a number"),
        ({"coefficient": "high"}, r"coefficient='high' is no finite number"),
        ({"coefficient": float("nan")}, r"coefficient=nan is no finite number"),
    ],
)
def test_an_option_that_is_wrong_is_one_line(options: Any, says: str) -> None:
    with pytest.raises(MoeInspectError, match=says):
        audit_loss(model(), batch(), **options)


def test_a_router_spec_shows_a_loss() -> None:
    built = own.gpt(probes=False)
    spec = own.example().ROUTERS
    audit = audit_loss(built, own.tokens(), lambda output: output.mean(), routers=spec)
    assert audit.formula is None
    assert "loss_unknown" in {f.kind for f in audit.findings}


# --- the selection bias


def test_a_bias_in_the_weight_or_in_no_choice_is_named(put: Put) -> None:
    right = audit_loss(zoo.build("deepseek_v3", n_group=1, topk_group=1), batch("deepseek_v3"))
    assert "steers the choice, and no gate weight" in text(right, "loss_bias")
    built = zoo.build("minimax_m2")
    kind = type(built.model.layers[0].mlp.gate)
    forward = kind.forward

    def weighed(self: Any, hidden: Tensor, *args: Any, in_weight: bool) -> Any:
        bias = self.e_score_correction_bias if hasattr(self, "e_score_correction_bias") else args[0]
        logits, weights, ids = forward(self, hidden, *args)
        if in_weight:
            return logits, weights + bias[ids], ids
        ids = logits.topk(ids.shape[1], -1).indices
        return logits, logits.sigmoid().gather(1, ids), ids

    for in_weight, kind_of, says in (
        (True, "loss_bias_in_weight", "changes the gate weights in layers 0-3"),
        (False, "loss_bias_ignored", "is not chosen in layers 0-3"),
    ):
        put(kind, forward=partialmethod(weighed, in_weight=in_weight))
        audit = audit_loss(built, batch("minimax_m2"))
        assert says in text(audit, kind_of)
        assert "loss_bias" not in {f.kind for f in audit.findings}


@pytest.mark.parametrize(("rate", "kind"), [(1e-3, "good"), (-1e-3, "critical"), (0, "critical")])
def test_the_sign_and_the_size_of_an_update_are_said(rate: float, kind: str) -> None:
    built, loads, counted = zoo.build("deepseek_v3"), dict[Any, Tensor](), list[int]()
    gates = [m for m in built.modules() if hasattr(m, "e_score_correction_bias")]

    def count(gate: Any, _: Any, out: Any) -> None:
        load = torch.bincount(out[2].reshape(-1), minlength=8)
        loads[gate] = loads.get(gate, 0) + load

    for gate in gates:
        gate.register_forward_hook(count)

    def update() -> None:
        counted.append(sum(int(load.sum()) for load in loads.values()))
        for gate in gates:
            lack = loads[gate].float().mean() - loads[gate]
            gate.e_score_correction_bias.add_(rate * lack.sign())
        loads.clear()

    given = {"input_ids": batch("deepseek_v3", [24] * 4)["input_ids"]}
    with torch.no_grad():
        audit = audit_loss(built, given, update=update)
    assert [f.severity for f in audit.findings if f.kind == "loss_bias_update"] == [kind]
    # of one pass, whatever the passes before have counted
    assert counted[-1] == len(gates) * 24 * 4 * built.config.num_experts_per_tok
    assert ("idle experts, by 0.001." in text(audit, "loss_bias_update")) == (kind == "good")
    if rate > 0:
        audit = audit_loss(built, batch("deepseek_v3", [24, 2, 2, 2, 2, 2]), update=update)
        (found,) = [f for f in audit.findings if f.kind == "loss_bias_update"]
        assert found.severity == "warning"
        assert "it counts padding, or its sign is wrong" in found.text


# --- whether the load moves


def steps(change: float, S: int = 60, R: int = 4, seed: int = 0) -> np.ndarray:
    """How uneven the load of each step is; that of router 2 changes."""
    rng = np.random.default_rng(seed)
    found = 0.5 + 0.05 * rng.standard_normal((S, R))
    found[:, 2] += change * np.linspace(0, 1, S)
    return found


def test_a_load_that_moves_is_told_from_noise() -> None:
    routers = own_routers(4)
    said = [balance_moved(steps(0, seed=n), routers).severity for n in range(200)]
    assert said.count("note") >= 195  # one run in a hundred by chance
    for change, severity, how in ((-0.2, "good", "more"), (0.2, "warning", "less")):
        found = balance_moved(steps(change), routers)
        assert found.severity == severity
        assert found.text.endswith(f"has become {how} even in layer 2, beyond noise.")
    still = balance_moved(steps(0), routers)
    assert "neither more nor less even in any layer" in still.text
    assert "11 steps are too few to tell" in balance_moved(steps(-0.2, S=11), routers).text


def own_routers(n: int) -> Any:
    return [Router(layer, "", f"layers.{layer}", 8, 2) for layer in range(n)]


# --- the families of transformers


def built() -> list[str]:
    return [f for f in zoo.FAMILIES if f not in zoo.WHY_NOT]


def test_the_page_says_what_the_audit_finds() -> None:
    """benchmarks/results/families.md, written by `make test-families`."""
    page = FAMILIES_PAGE.read_text()
    if f"transformers {zoo.hf.__version__}, each as a tiny random model" in page:
        rows = [zoo.loss_row(family) for family in sample(built(), 20)]
        table = [line[2:-2].split(" | ") for line in page.splitlines() if " | " in line]
        findings = {(name, *cells[1:]) for cells in table for name in cells[0].split(", ")}
        stated = {row for row in rows if row[1] != zoo.NONE}
        assert stated <= findings, "it is stale: run make test-families"
        without = re.findall(r"(?:update it|The others): (.*?)\.", page)
        names = ", ".join(without).split(", ")
        assert {row[0] for row in rows if row[1] == zoo.NONE} <= {*names}
        assert not WHOLE or zoo.losses_section(rows) in page


@pytest.mark.parametrize("family", filter(zoo.states_loss, sample(built(), 9)))
def test_each_family_has_a_formula_in_every_release(family: str) -> None:
    """Or is known to have none."""
    _, audit = zoo.audited(family)
    kinds = {f.kind for f in audit.findings}
    if family in {"llama4", "openai_privacy_filter", "doge", *zoo.NO_FORMULA}:
        assert audit.formula is None
        assert zoo.NO_FORMULA.get(family, "") in text(audit, "loss_off")
    else:
        assert audit.formula is not None
        assert not kinds & {"loss_gradient", "loss_doubled"}
        # whose SparseMixer estimates the gradient of the weights
        assert ("loss_step" in kinds) == (family == "phimoe")


if __name__ == "__main__":
    write_between_marks(
        FAMILIES_PAGE,
        "balancing losses",
        zoo.losses_section([zoo.loss_row(family) for family in built()]),
    )

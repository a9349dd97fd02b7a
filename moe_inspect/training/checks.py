"""What `audit_loss` judges beside the formula: how much of the balancing loss the loss has, whether
the selection bias of routers steers the choice alone, and whether what updates it makes the load
more even."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_inspect.training.formulas import Routed, hot
from moe_inspect.training.passes import (
    HALVES,
    SWITCH_ON,
    Pass,
    Passes,
    accepts,
    default_loss,
    put_back,
    unchanged,
)

SAME = 0.05  # relative difference of two numbers that should be one
EPS = torch.finfo(torch.float32).eps
SHIFT, LIFT = 0.5, 100.0  # added to all biases of a router, which chooses as before; to one
Run = Callable[[], Pass]
Say = Callable[..., None]  # (kind, severity, text, values by name)


class LossShare(NamedTuple):
    """Balancing loss within the loss with labels, of one pass. `measured`: with the balancing loss
    turned on; `stated`: as its coefficient states; `by_default`: with what the config turns on;
    `rest`: the loss without it."""

    measured: float
    stated: float
    by_default: float
    rest: float


def judge_share(
    passes: Passes,
    forms: Mapping[str, Any],
    switch: Mapping[str, bool],
    coefficient: float | None,
    say: Say,
) -> tuple[float, float]:
    """Judge how much of the balancing loss the loss with labels has. Return the measured ÷ the
    stated share, of the batch as given and of its halves, accumulated; NaN if it is unknown."""
    unknown = math.nan, math.nan
    if coefficient == 0:
        say("off", "warning", "The coefficient of the balancing loss is 0.")
        return unknown
    if reason := _unjudged(forms["as given"], switch, coefficient):
        text = f"Whether the training loss has the balancing loss is not judged: {reason}."
        say("added", "note", text)
        return unknown
    assert coefficient is not None, "or the reason is that"
    measure = partial(_share, passes, switch, coefficient)
    share = measure(forms["as given"])
    if share is None:
        text = (
            f"The model reports its balancing loss with {SWITCH_ON}=False too: whether the loss "
            "with labels has it cannot be told."
        )
        say("added", "note", text)
        return unknown
    if 20 * EPS * abs(share.rest) > SAME * abs(share.stated):
        text = "The coefficient is too small to see whether the loss with labels has its part."
        say("added", "note", text)
        return unknown
    _judge_ratio(share, coefficient, passes.model, say)
    ratio = share.measured / share.stated
    if not accepts(passes.model, "**") or HALVES[0] not in forms:
        return ratio, math.nan
    return ratio, _judge_accumulation(measure, [forms[name] for name in HALVES], ratio, say)


def _unjudged(batch: object, switch: Mapping[str, bool], coefficient: float | None) -> str:
    """Why the share of the balancing loss cannot be judged; empty if it can."""
    if not switch:
        return f"its forward has no argument {SWITCH_ON}"
    if coefficient is None:
        return "no coefficient is known"
    if not isinstance(batch, Mapping):
        return "the batch is no dict"
    return "" if "labels" in batch else "it is given no labels"


def _share(
    passes: Passes,
    switch: Mapping[str, bool],
    coefficient: float,
    batch: Mapping[str, Any],
    **more: Any,
) -> LossShare | None:
    """The share of one pass; None if the model does not turn its balancing loss off."""
    on, off, default = (
        passes.run(batch, **more, **options).output for options in (switch, {SWITCH_ON: False}, {})
    )
    if (remaining := default_loss(off)) is not None and bool(torch.as_tensor(remaining).any()):
        return None
    z_losses = (getattr(on, f"{stack}_z_loss", None) for stack in ("encoder", "decoder"))
    z_loss = sum(float(loss.detach()) for loss in z_losses if loss is not None)
    z_loss *= getattr(passes.model.config, "router_z_loss_coef", 0)
    stated = coefficient * float(default_loss(on).detach()) + z_loss
    loss, rest, by_default = (float(output.loss.detach()) for output in (on, off, default))
    return LossShare(loss - rest, stated, by_default - rest, rest)


def _judge_ratio(share: LossShare, coefficient: float, model: Any, say: Say) -> None:
    ratio = share.measured / share.stated
    if abs(ratio) < SAME:
        text = (
            "The balancing loss is reported, and is no part of the loss with labels: it trains "
            "nothing."
        )
        say("off", "critical", text)
    elif abs(ratio - 1) > SAME:
        text = (
            f"The loss with labels has {ratio:.3g} times the balancing loss that the coefficient "
            f"{coefficient:g} says."
        )
        kind = "doubled" if abs(ratio - 2) < SAME else "scaled"
        say(kind, "critical", text, ratio=ratio)
    elif abs(share.by_default / share.stated) < SAME:
        text = (
            f"The config states a balancing loss with coefficient {coefficient:g} and "
            f"{SWITCH_ON}=False: training as it says adds none. Set {SWITCH_ON}=True."
        )
        say("off", "critical" if model.training else "warning", text)


def _judge_accumulation(
    measure: Callable[..., LossShare | None],
    halves: Sequence[Mapping[str, Any]],
    ratio: float,
    say: Say,
) -> float:
    """Return the measured ÷ the stated share of accumulated passes over two halves, whose language
    losses are divided by the tokens of both. `ratio`: of the batch in one pass."""
    labels = [half["labels"] for half in halves]
    items = torch.tensor(sum(int((labels_BS[:, 1:] != -100).sum()) for labels_BS in labels))
    shares = [measure(half, num_items_in_batch=items) for half in halves]
    known = [share for share in shares if share is not None]
    stated = sum(share.stated for share in known)
    accumulated = 2 * sum(share.measured for share in known) / stated
    if abs(accumulated - 2 * ratio) < 2 * SAME * abs(ratio):
        text = (
            "With gradient accumulation over N passes the balancing loss weighs N times as much "
            "(measured with 2): it is added in each pass, where the language loss is divided by "
            "the tokens of all (num_items_in_batch)."
        )
        say("accumulated", "warning", text, ratio=accumulated)
    return accumulated


# --- selection biases


def judge_biases(passes: Passes, before: Pass, run: Run, say: Say) -> None:
    """`run`: runs the pass `before` again."""
    if not (biases := passes.biases()):
        return
    idle = {r: int(_load(before.routed[r], len(biases[r].view(-1))).argmin()) for r in biases}

    def with_bias(which: Sequence[int], added: float, one: bool) -> list[Routed]:
        with unchanged(biases[r] for r in which):
            with torch.no_grad():
                for r in which:
                    bias_E = biases[r].view(-1)
                    bias_E[slice(idle[r], idle[r] + 1) if one else slice(None)] += added
            return run().routed

    def weighs(r: int, after: Routed) -> bool | None:
        """Whether the weights of decisions with the same choice changed; None: there are none."""
        alike_T = (after.ids_TK == before.routed[r].ids_TK).all(1)
        a, b = (of.weights_TK[alike_T].float() for of in (after, before.routed[r]))
        return bool(((a - b).abs() > 1e-2 * b.abs() + 1e-4).any()) if len(a) else None

    shifted = with_bias([*biases], SHIFT, one=False)
    found = {r: weighs(r, shifted[r]) for r in biases}
    if any(of is not False for of in found.values()):  # of which router? Each by itself
        found = {r: weighs(r, with_bias([r], SHIFT, one=False)[r]) for r in biases}
    lifted = with_bias([*biases], LIFT, one=True)
    share = {r: (lifted[r].ids_TK == idle[r]).any(1).float().mean() for r in biases}
    ignored = [r for r in biases if share[r] < 0.9]
    if weighed := [r for r, of in found.items() if of]:
        say(
            "bias_in_weight",
            "critical",
            f"The selection bias changes the gate weights in {passes.labels(weighed)}: it should "
            "steer the choice alone (arXiv:2408.15664).",
            routers=weighed,
        )
    if ignored:
        say(
            "bias_ignored",
            "critical",
            f"An expert with a large selection bias is not chosen in {passes.labels(ignored)}: the "
            "bias balances nothing.",
            routers=ignored,
        )
    if not ignored and all(of is False for of in found.values()):
        said = "The selection bias steers the choice, and no gate weight."
        say("bias", "good", said)


def judge_update(passes: Passes, update: Callable[[], object], run: Run, say: Say) -> None:
    """Of what `update` does after one pass: a bias should rise where an expert is idle."""
    biases = passes.biases()
    with unchanged(biases.values()) as kept:
        update()  # what the passes before have counted, also in what is no buffer
        put_back(kept)
        routed = run().routed
        update()
        steps = [(bias.detach() - before).view(-1).double() for bias, before in kept]
    wrong, padded, still, sizes = list[int](), list[int](), list[int](), list[float]()
    for r, step_E in zip(biases, steps, strict=True):
        every = torch.ones_like(routed[r].real_T)
        loads = (_load(of, len(step_E)) for of in (routed[r], routed[r]._replace(real_T=every)))
        raises_idle, with_padding = (float(step_E @ (load.mean() - load)) > 0 for load in loads)
        sizes += step_E[step_E != 0].abs().tolist()
        if not step_E.any():
            still.append(r)
        elif not raises_idle:
            (padded if with_padding else wrong).append(r)
    if still or not biases:
        where = f"in {passes.labels(still)}" if still else "as routers have none"
        said = f"The update changes no selection bias {where}."
        say("bias_update", "critical", said)
    if wrong:
        say(
            "bias_update",
            "critical",
            f"The update raises the selection bias of busy experts in {passes.labels(wrong)}: its "
            "sign is wrong.",
            routers=wrong,
        )
    if padded:
        say(
            "bias_update",
            "warning",
            f"In {passes.labels(padded)} the update raises the selection bias of experts that are "
            "busy without the padding: it counts padding, or its sign is wrong. A batch without "
            "padding tells which.",
            routers=padded,
        )
    if sizes and not (wrong or padded or still):
        low, high = min(sizes), max(sizes)
        size = f"{low:.3g}" + f" to {high:.3g}" * (high > 1.01 * low)
        said = f"The update raises the selection bias of idle experts, by {size}."
        say("bias_update", "good", said, low=low, high=high)


def _load(routed: Routed, E: int) -> Tensor:
    """Without padding."""
    return hot(routed.ids_TK, E)[routed.real_T].sum(0)

"""Whether the training loss has the balancing loss, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_inspect.training.passes import HALVES, SWITCH_ON, Passes, accepts, default_loss

SAME = 0.05  # relative difference of two numbers that should be one
EPS = torch.finfo(torch.float32).eps


def added(
    passes: Passes,
    forms: Mapping[str, Any],
    switch: Mapping[str, bool],
    coefficient: float | None,
    say: Callable[..., None],
) -> tuple[float, float]:
    """What the loss with labels has of it ÷ what the coefficient says; and of two accumulated
    halves, whose language losses are divided by the tokens of both."""
    model, nan, given = passes.model, math.nan, forms["as given"]
    if coefficient == 0:
        say("off", "warning", "The coefficient of the balancing loss is 0.")
        return nan, nan
    lacks = {
        f"its forward has no argument {SWITCH_ON}": not switch,
        "no coefficient is known": coefficient is None,
        "the batch is no dict": not isinstance(given, Mapping),
        "it is given no labels": not (isinstance(given, Mapping) and "labels" in given),
    }
    if why := next((said for said, lack in lacks.items() if lack), ""):
        said = f"Whether the training loss has the balancing loss is not judged: {why}."
        say("added", "note", said)
        return nan, nan
    times = coefficient or 0.0

    def part(form: str, **more: Any) -> tuple[float, float, float, float] | None:
        """Of the loss: where it is on, as the coefficient says, by default; and the rest. None
        where the model does not turn it off."""
        on, off, default = (
            passes.run(forms[form], **more, **options).output
            for options in (switch, {SWITCH_ON: False}, {})
        )
        if (left := default_loss(off)) is not None and bool(torch.as_tensor(left).any()):
            return None
        z_losses = (getattr(on, f"{s}_z_loss", None) for s in ("encoder", "decoder"))
        z = sum(float(of.detach()) for of in z_losses if of is not None)
        z *= getattr(model.config, "router_z_loss_coef", 0)
        said = times * float(default_loss(on).detach()) + z
        loss, rest, given = (float(of.loss.detach()) for of in (on, off, default))
        return loss - rest, said, given - rest, rest

    if (parts := part("as given")) is None:
        say(
            "added",
            "note",
            f"The model reports its balancing loss with {SWITCH_ON}=False too: whether the "
            "loss with labels has it cannot be told.",
        )
        return nan, nan
    has, said, default, rest = parts
    if 20 * EPS * abs(rest) > SAME * abs(said):
        what = "The coefficient is too small to see whether the loss with labels has its part."
        say("added", "note", what)
        return nan, nan
    ratio = has / said
    if abs(ratio) < SAME:
        say(
            "off",
            "critical",
            "The balancing loss is reported, and is no part of the loss with labels: it trains "
            "nothing.",
        )
    elif abs(ratio - 1) > SAME:
        say(
            "doubled" if abs(ratio - 2) < SAME else "scaled",
            "critical",
            f"The loss with labels has {ratio:.3g} times the balancing loss that the "
            f"coefficient {times:g} says.",
            ratio=ratio,
        )
    elif abs(default / said) < SAME:
        say(
            "off",
            "critical" if model.training else "warning",
            f"The config states a balancing loss with coefficient {times:g} and "
            f"{SWITCH_ON}=False: training as it says adds none. Set {SWITCH_ON}=True.",
        )
    if not accepts(model, "**") or HALVES[0] not in forms:
        return ratio, nan
    labels = [forms[name]["labels"] for name in HALVES]
    items = torch.tensor(sum(int((of[:, 1:] != -100).sum()) for of in labels))
    halves = (part(name, num_items_in_batch=items) for name in HALVES)
    both = [of for of in halves if of is not None]
    accumulated = 2 * sum(of[0] for of in both) / sum(of[1] for of in both)
    if abs(accumulated - 2 * ratio) < 2 * SAME * abs(ratio):
        say(
            "accumulated",
            "warning",
            "With gradient accumulation over N passes the balancing loss weighs N times as "
            "much (measured with 2): it is added in each pass, where the language loss is "
            "divided by the tokens of all (num_items_in_batch).",
            ratio=accumulated,
        )
    return ratio, accumulated

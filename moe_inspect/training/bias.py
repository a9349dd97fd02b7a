"""Whether the selection bias of routers steers the choice alone, and whether what updates it makes
the load more even: for `audit_loss`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.training.formulas import Routed
from moe_inspect.training.passes import Pass, Passes, put_back

SHIFT, LIFT = 0.5, 100.0  # added to all biases of a router, which chooses as before; to one
Run = Callable[[], Pass]


def bias_findings(passes: Passes, before: Pass, run: Run) -> Iterator[Finding]:
    """`run`: runs the pass `before` again."""
    if not (biases := passes.biases()):
        return
    idle = {r: int(_load(before.routed[r], len(biases[r].view(-1))).argmin()) for r in biases}

    def with_bias(which: Sequence[int], added: float, one: bool) -> list[Routed]:
        kept = [(biases[r], biases[r].detach().clone()) for r in which]
        try:
            with torch.no_grad():
                for r in which:
                    bias_E = biases[r].view(-1)
                    bias_E[slice(idle[r], idle[r] + 1) if one else slice(None)] += added
            return run().routed
        finally:
            put_back(kept)

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
        yield finding(
            "loss_bias_in_weight",
            "critical",
            f"The selection bias changes the gate weights in {passes.labels(weighed)}: it should "
            "steer the choice alone (arXiv:2408.15664).",
            routers=weighed,
        )
    if ignored:
        yield finding(
            "loss_bias_ignored",
            "critical",
            f"An expert with a large selection bias is not chosen in {passes.labels(ignored)}: the "
            "bias balances nothing.",
            routers=ignored,
        )
    if not ignored and all(of is False for of in found.values()):
        said = "The selection bias steers the choice, and no gate weight."
        yield finding("loss_bias", "good", said)


def update_findings(passes: Passes, update: Callable[[], object], run: Run) -> Iterator[Finding]:
    """Of what `update` does after one pass: a bias should rise where an expert is idle."""
    biases = passes.biases()
    kept = {r: bias.detach().clone() for r, bias in biases.items()}
    update()  # what the passes before have counted, also in what is no buffer
    put_back([(biases[r], kept[r]) for r in biases])
    routed = run().routed
    update()
    wrong, padded, still, sizes = list[int](), list[int](), list[int](), list[float]()
    for r, bias in biases.items():
        step_E = (bias.detach() - kept[r]).view(-1).double()
        every = torch.ones_like(routed[r].real_T)
        loads = (_load(of, len(step_E)) for of in (routed[r], routed[r]._replace(real_T=every)))
        raises_idle, with_padding = (float(step_E @ (load.mean() - load)) > 0 for load in loads)
        sizes += step_E[step_E != 0].abs().tolist()
        if not step_E.any():
            still.append(r)
        elif not raises_idle:
            (padded if with_padding else wrong).append(r)
    put_back([(biases[r], kept[r]) for r in biases])
    if still or not biases:
        where = f"in {passes.labels(still)}" if still else "as routers have none"
        said = f"The update changes no selection bias {where}."
        yield finding("loss_bias_update", "critical", said)
    if wrong:
        yield finding(
            "loss_bias_update",
            "critical",
            f"The update raises the selection bias of busy experts in {passes.labels(wrong)}: its "
            "sign is wrong.",
            routers=wrong,
        )
    if padded:
        yield finding(
            "loss_bias_update",
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
        yield finding("loss_bias_update", "good", said, low=low, high=high)


def _load(routed: Routed, E: int) -> Tensor:
    """Without padding."""
    ids = routed.ids_TK[routed.real_T]
    inside = ids[(ids >= 0) & (ids < E)].long()
    return torch.bincount(inside, minlength=E).double()

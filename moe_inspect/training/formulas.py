"""The published balancing losses as one formula with parts, computed from what routers showed in a
pass; and which of them a reported loss is.

T tokens, K slots, E experts, G groups of tokens that are balanced by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

SWITCH, GSHARD, ZLOSS = "arXiv:2101.03961", "arXiv:2006.16668", "arXiv:2202.08906"
V2, V3 = "arXiv:2405.04434", "arXiv:2412.19437"


class Routed(NamedTuple):
    """What one router showed in a pass. `kind`: the class of the router; `real_T`: no padding;
    `row_T`: the row of the batch. `logits_TE` may be differentiated."""

    logits_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    real_T: Tensor
    row_T: Tensor
    stack: str
    kind: str


def _scaled(score_TE: Tensor) -> Tensor:
    return score_TE / score_TE.sum(-1, keepdim=True)


def _of_chosen(routed: Routed, x_TE: Tensor) -> Tensor:
    top = x_TE.topk(routed.ids_TK.shape[1], -1)
    return torch.zeros_like(x_TE).scatter(1, top.indices, top.values.softmax(-1))


# P of a token: name → function of the router and its logits, in the order of preference
SCORES: dict[str, Callable[[Routed, Tensor], Tensor]] = {
    "softmax": lambda r, x: x.softmax(-1),
    "sigmoid, scaled to sum to 1": lambda r, x: _scaled(x.sigmoid()),
    "sqrtsoftplus, scaled to sum to 1": lambda r, x: _scaled(softplus(x).sqrt()),
    "sigmoid, not scaled": lambda r, x: x.sigmoid(),
    "softmax of a softmax": lambda r, x: x.softmax(-1).softmax(-1),
    "softmax over the k largest logits": _of_chosen,
}
TWICE, OF_CHOSEN = "softmax of a softmax", "softmax over the k largest logits"


def hot(ids_TK: Tensor, E: int) -> Tensor:
    """float64 [T, E], 1 where an expert was chosen. Ids of no expert are left out."""
    inside = (ids_TK >= 0) & (ids_TK < E)
    found_TE = torch.zeros(len(ids_TK), E + 1, dtype=torch.float64, device=ids_TK.device)
    return found_TE.scatter_(1, ids_TK.long().where(inside, E), 1)[:, :E]


def _first(r: Routed) -> Tensor:
    return r.ids_TK.gather(1, r.weights_TK.argmax(1, keepdim=True))


# f of a token: name → the experts that are counted
CHOSEN: dict[str, Callable[[Routed], Tensor]] = {
    "all choices": lambda r: r.ids_TK,
    "first choices": _first,
    "the k largest logits": lambda r: r.logits_TE.topk(r.ids_TK.shape[1], -1).indices,
    "the largest logit": lambda r: r.logits_TE.argmax(-1, keepdim=True),
}
BY_LOGITS = ("the k largest logits", "the largest logit")
# what is balanced by itself, and averaged
BY = ("router", "sequence", "all routers", "sequence, all routers", "devices", "z")
POOLED = ("all routers", "sequence, all routers")


class Formula(NamedTuple):
    """E · Σ f · P: f the share of the assignments, P the mean score; 1 where all is even. Of each
    of `by`, averaged; "z" is the mean squared log-sum-exp instead. `padding`: it is counted.
    `only`: of the routers of one class. `devices`: groups of experts that count as one."""

    by: str
    score: str = "softmax"
    chosen: str = "all choices"
    padding: bool = False
    only: str = ""
    devices: int = 0

    @property
    def name(self) -> str:
        if self.by == "z":
            return f"router z-loss ({ZLOSS})"
        if self.by == "devices":
            return f"DeepSeek-V2's device-level loss ({V2}), {self.devices} devices"
        if self.by in POOLED:
            return f"Switch's loss ({SWITCH}) pooled over all routers"
        if self.by == "sequence":
            first = self.chosen in ("first choices", "the largest logit")
            source = f"GShard's ({GSHARD})" if first else f"sequence-wise, DeepSeek-V3's ({V3})"
            return f"the loss of each sequence: {source}"
        return f"Switch's loss ({SWITCH}) of each router"

    @property
    def words(self) -> str:
        """Without what the formula does with padding: a batch may have none."""
        parts = [self.name]
        if self.by == "sequence, all routers":
            parts[0] += ", of each sequence"
        if self.by != "z":
            parts += [f"f of {self.chosen}", f"P the {self.score}"]
        parts += [f"of {self.only} alone"] * bool(self.only)
        return ", ".join(parts)

    def value(self, routed: Sequence[Routed]) -> Tensor:
        """float64, differentiable by the logits. The mean over the stacks of a model."""
        stacks: dict[str, list[Routed]] = {}
        for r in routed:
            if self.only in ("", r.kind):
                stacks.setdefault(r.stack, []).append(r)
        return torch.stack([self._of_stack(of) for of in stacks.values()]).mean()

    def _of_stack(self, routed: list[Routed]) -> Tensor:
        if self.by == "z":
            z = [r.logits_TE.double().logsumexp(-1)[self._counted(r)] ** 2 for r in routed]
            return torch.stack([of.mean() for of in z]).mean()
        sums = [self._sums(r) for r in routed]
        if self.by in POOLED:
            load, score, n = (torch.stack(part).sum(0) for part in zip(*sums, strict=True))
            sums = [(load, score, n)]
        values = list[Tensor]()
        for load_GE, score_GE, n_G in sums:
            there = n_G > 0
            f_GE = load_GE[there] / load_GE[there].sum(-1, keepdim=True).clamp(min=1e-20)
            P_GE = score_GE[there] / n_G[there, None]
            values.append((f_GE.shape[1] * f_GE * P_GE).sum(-1).mean())
        return torch.stack(values).mean()

    def _counted(self, r: Routed) -> Tensor:
        return torch.ones_like(r.real_T) if self.padding else r.real_T

    def _sums(self, r: Routed) -> tuple[Tensor, Tensor, Tensor]:
        x_TE, counted_T = r.logits_TE.double(), self._counted(r)
        hot_TE = hot(CHOSEN[self.chosen](r), x_TE.shape[1])
        by_row = self.by.startswith("sequence")
        group_T = r.row_T if by_row else torch.zeros_like(r.row_T)
        G = int(r.row_T.max()) + 1 if by_row else 1
        n_G = counted_T.new_zeros(G, dtype=torch.float64).index_add(0, group_T, counted_T.double())

        def summed(values_TE: Tensor) -> Tensor:
            kept = values_TE * counted_T[:, None]
            if self.by == "devices":
                kept = kept.unflatten(1, (self.devices, -1)).sum(-1)
            return kept.new_zeros(G, kept.shape[1]).index_add(0, group_T, kept)

        return summed(hot_TE), summed(SCORES[self.score](r, x_TE)), n_G


class Match(NamedTuple):
    """`factor`: reported ÷ formula, the same in every pass."""

    formula: Formula
    factor: float


def candidates(passes: Sequence[Sequence[Routed]], devices: int, chooses: bool) -> list[Formula]:
    """The simplest first. What is the same in all passes is there once: with k = 1 the first
    choice, without padding what is done with it, and the largest logits unless the router `chooses`
    others at times."""
    every = [r for routed in passes for r in routed]
    chosen, seen = list[str](), list[list[Tensor]]()
    for name, ids_of in CHOSEN.items():
        counted = [hot(ids_of(r), r.logits_TE.shape[1]) for r in every]
        is_new = not any(all(map(torch.equal, counted, other)) for other in seen)
        if is_new or (chooses and name == BY_LOGITS[0]):
            chosen.append(name)
            seen.append(counted)
    paddings = (False, True) if not all(bool(r.real_T.all()) for r in every) else (False,)
    kinds = sorted({r.kind for r in every})
    only = ["", *kinds] if len(kinds) > 1 else [""]
    same_size = len({r.logits_TE.shape[1] for r in every}) == 1
    by = [b for b in BY if (b not in POOLED or same_size) and (b != "devices" or devices > 1)]
    found = [
        Formula(b, s, c, p, o, devices if b == "devices" else 0)
        for o, b, s, c, p in product(only, by, SCORES, chosen, paddings)
        if b != "z" or (s, c) == ("softmax", "all choices")
    ]
    return sorted(found, key=lambda f: list(SCORES).index(f.score))


def identify(
    reported: Sequence[float],
    passes: Sequence[Sequence[Routed]],
    tolerance: float,
    devices: int,
    chooses: bool,
) -> tuple[list[Match], float]:
    """The formulas that stand in the same ratio to the loss in every pass, the simplest first: with
    several, these passes cannot tell them apart. And by how much the loss, or Switch's, differs
    between the passes: where it is hardly more than the tolerance, they tell nothing."""
    real, found = torch.tensor(reported, dtype=torch.float64), list[Match]()
    with torch.no_grad():
        for formula in candidates(passes, devices, chooses):
            ratio = real / torch.stack([formula.value(routed).cpu() for routed in passes])
            if bool((ratio / ratio.mean() - 1).abs().max() < tolerance):
                found.append(Match(formula, float(ratio.mean())))
        even = torch.stack([Formula("router").value(routed).cpu() for routed in passes])
    return found, max(float((of / of.mean() - 1).abs().max()) for of in (real, even))

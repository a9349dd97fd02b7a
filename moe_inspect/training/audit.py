"""audit_loss: which formula a model's balancing loss is, whether it is part of the training loss,
and whether a step of it balances.

T tokens, K slots, E experts, R routers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, selection_bias, text_config
from moe_inspect.reporting.verdict.findings import Finding, Severity, finding, most_important_first
from moe_inspect.text import first_line
from moe_inspect.training.checks import EPS, SAME, judge_biases, judge_share, judge_update
from moe_inspect.training.formulas import (
    BY_LOGITS,
    CHOSEN,
    OF_CHOSEN,
    POOLED,
    TWICE,
    Formula,
    Match,
    Routed,
    identify,
)
from moe_inspect.training.passes import (
    HALVES,
    SWITCH_ON,
    Batch,
    Pass,
    Passes,
    accepts,
    alike,
    coefficient_of,
    default_loss,
    forms_of,
    unchanged,
)

if TYPE_CHECKING:
    from moe_inspect.capture.options import InputsOf
    from moe_inspect.model.custom.spec import RouterSpec

LossOf = Callable[[Any], Any]  # the output of a pass → its balancing loss, None where it has none
Gradients = dict[int, Tensor]  # by the id of the weight

ALONG = 0.02  # cosine of two gradients below which neither goes along the other
OTHERS = 2  # passes with other routers


@dataclass(frozen=True)
class LossAudit:
    """`formula`, `factor`: the loss is factor × formula; None where it is none that is known.
    `either`: other formulas that have the same value in every pass. `added`: what the training loss
    has of it ÷ what its coefficient says; `accumulated`: the same of two accumulated passes; NaN
    where it cannot be told. `moves_R`: at each router the cosine of the loss's gradient and of that
    of the router's own Switch loss: 1 moves probability from busy experts to idle ones as directly
    as can be, below 0 it is the other way."""

    findings: list[Finding]
    formula: Formula | None = None
    factor: float = math.nan
    either: list[Formula] = field(default_factory=list[Formula])
    added: float = math.nan
    accumulated: float = math.nan
    moves_R: list[float] = field(default_factory=list[float])

    @property
    def ok(self) -> bool:
        """Whether nothing is critical."""
        return all(found.severity != "critical" for found in self.findings)

    def __str__(self) -> str:
        return "\n".join(f"{found.severity}: {found.text}" for found in self.findings)


def audit_loss(
    model: Any,
    batch: Batch,
    loss: LossOf | None = None,
    *,
    coefficient: float | None = None,
    update: Callable[[], object] | None = None,
    routers: Sequence[RouterSpec] | None = None,
    inputs: InputsOf | None = None,
) -> LossAudit:
    """Runs passes of one batch (as it is, with padding, packed, and its two halves) and compares
    the balancing loss that the model reports with the published formulas, computed from the
    routers' own logits and choices. Says whether the training loss has it, and whether a step of it
    moves probability from busy experts to idle ones. Weights, biases and buffers are put back;
    `.grad` is left alone.

    model        any model that `moe_inspect.record` takes, in the mode in which it is trained; in
                 float32, as 16 bits tell fewer formulas apart
    batch        what it is called with: a dict of arguments, a tuple, or the only argument. Some
                 hundred tokens of real text, in several rows that differ
    loss         the output of a pass → the loss; by default what a model of transformers reports
    coefficient  by which the training loss has it; by default as the config states it
    update       what updates the selection biases after a step, where routers have some. It runs
                 twice, and what else it changes is not put back
    routers, inputs
                 as of `moe_inspect.record`

    Raises MoeInspectError for a dense model, and for options that are no such thing."""
    _refuse(batch, loss, coefficient)
    grads = torch.is_grad_enabled()  # as `update` is called
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(grads),
        Passes(model, routers, inputs).attached() as passes,
    ):
        return _Audit(passes, batch, loss, coefficient).done(update)


def _refuse(batch: object, loss: object, coefficient: object) -> None:
    if not isinstance(batch, Mapping | Sequence | Tensor):
        raise MoeInspectError(f"audit_loss needs a batch of tensors, not a {type(batch).__name__}")
    if not (loss is None or callable(loss)):
        raise MoeInspectError(
            f"loss={loss!r} is no function: give one of the output of a pass, as in "
            'loss=lambda output: output["balance"]'
        )
    if coefficient is not None and not (isinstance(coefficient, Real) and isfinite(coefficient)):
        raise MoeInspectError(f"coefficient={coefficient!r} is no finite number")


class _Audit:
    """`is_own`: the caller says where the loss is."""

    def __init__(
        self, passes: Passes, batch: Batch, loss: LossOf | None, coefficient: float | None
    ):
        self.passes, self.model, self.is_own = passes, passes.model, loss is not None
        self.loss_of = loss or default_loss
        self.coefficient = coefficient_of(self.model) if coefficient is None else coefficient
        self.switch = {SWITCH_ON: True} if accepts(self.model, SWITCH_ON) else {}
        self.forms = forms_of(batch, passes)
        self.failed = ""  # why a pass that computes the loss did
        try:
            self.run()  # shows the routers of probes
        except (MoeInspectError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the code of a model raises
            if not self.switch:
                raise
            self.switch = {SWITCH_ON: False}
            self.run()
            self.failed = f"{type(error).__name__}: {first_line(error)}"
        self.R = len(passes.sites)
        flat = [p for r in range(self.R) for p in passes.weights(r)]
        self.weights = {id(p): p for p in flat}
        kinds = {p.dtype for p in self.model.parameters()}
        self.is_exact = kinds <= {torch.float32, torch.float64}
        self.tolerance = 5e-6 if self.is_exact else 1e-3
        self.found = list[Finding]()

    def say(self, kind: str, severity: Severity, text: str, **values: Any) -> None:
        self.found.append(finding(f"loss_{kind}", severity, text, None, **values))

    def loss(self, run: Pass) -> Tensor:
        found = self.found_in(run)
        if not isinstance(found, Tensor | Real):
            raise MoeInspectError(f"loss=… gives a {type(found).__name__}, not a number")
        value = torch.as_tensor(found)
        if value.numel() != 1:
            raise MoeInspectError(
                f"the balancing loss has the shape {[*value.shape]}: loss=… should give one number"
            )
        return value.reshape(())

    def found_in(self, run: Pass) -> Any:
        try:
            return self.loss_of(run.output)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise MoeInspectError(f"loss=… fails on the output of a pass ({why})") from error

    def run(self, form: str = "as given") -> Pass:
        return self.passes.run(self.forms[form], **self.switch)

    def done(self, update: Callable[[], object] | None) -> LossAudit:
        run = self.run()
        if not all(bool(r.real_T.any()) for r in run.routed):
            raise MoeInspectError("audit_loss needs a batch with tokens: this one is padding alone")
        judge_biases(self.passes, run, self.run, self.say)
        if update is not None:
            judge_update(self.passes, update, self.run, self.say)
        with torch.enable_grad():
            audited = self._audit(run)
        return LossAudit(most_important_first(self.found), **audited)

    def _audit(self, run: Pass) -> dict[str, Any]:
        if self.found_in(run) is None:
            self._none()
            return {}
        values, routed = dict[str, float](), dict[str, list[Routed]]()
        others = {f"other weights {seed}": seed for seed in range(OTHERS)}
        for form in (*self.forms, *others):
            of = self._with_other_weights(others[form]) if form in others else self.run(form)
            values[form] = float(self.loss(of).detach())
            routed[form] = [r._replace(logits_TE=r.logits_TE.detach()) for r in of.routed]
        if bad := [form for form, value in values.items() if not isfinite(value)]:
            where = "" if bad[0] == "as given" else f' in the pass "{bad[0]}"'
            said = f"The balancing loss is {values[bad[0]]}{where}: a step of it breaks the model."
            self.say("not_finite", "warning" if bad[0] in others else "critical", said)
            return {}
        matches = self._value(values, routed)
        self._sign(matches)
        found: dict[str, Any] = {"moves_R": self._gradient(matches)}
        if not self.is_own and any(values.values()):
            given = self.passes, self.forms, self.switch, self.coefficient
            found["added"], found["accumulated"] = judge_share(*given, self.say)
        if matches:
            found |= matches[0]._asdict()
            found["either"] = [match.formula for match in matches[1:]]
        return found

    def _with_other_weights(self, seed: int) -> Pass:
        """The batch as given, with routers that choose otherwise: even load becomes uneven."""
        with unchanged(self.weights.values()) as kept:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                for p, value in kept:
                    spread = float(value.float().std(correction=0)) or value.shape[-1] ** -0.5
                    p += torch.randn_like(p) * spread
            return self.run()

    def _none(self) -> None:
        if self.failed:
            said = f"With {SWITCH_ON}=True the model fails on this batch, without it does not"
            self.say("off", "critical", f"{said}: it trains no balancing loss ({self.failed}).")
        elif self.is_own:
            self.say("off", "critical", "loss=… finds no balancing loss in the output of a pass.")
        elif self.coefficient:
            self.say(
                "off",
                "critical" if self.model.training else "warning",
                f"The config states a balancing loss with coefficient {self.coefficient:g}, and "
                "the model reports none: training adds none.",
            )
        else:
            self.say("none", "note", "The model reports no balancing loss.")

    def _sign(self, matches: list[Match]) -> None:
        """A loss that is negative itself has a negative coefficient by right."""
        negated = not self.is_own and bool(matches) and matches[0].factor < 0
        if self.coefficient is not None and self.coefficient < 0 and not negated:
            self.say(
                "negative",
                "critical",
                f"The coefficient of the balancing loss is {self.coefficient:g}: a negative one "
                "makes training raise the loss, and with it the imbalance.",
                coefficient=self.coefficient,
            )

    # --- which formula its value is

    def _value(
        self, values: Mapping[str, float], routed: Mapping[str, list[Routed]]
    ) -> list[Match]:
        every = [r for of in routed.values() for r in of]
        value, largest = values["as given"], max(map(abs, values.values()))
        if largest == 0:
            self.say("zero", "critical", "The balancing loss is 0 in every pass.")
            return []
        if not all(len(r.logits_TE) for r in every):
            self.say("unknown", "note", "The routers show no logits: no formula can be computed.")
            return []
        devices = getattr(text_config(self.model), "n_group", None) or 0
        chooses = any(
            site.drops or selection_bias(site, self.model) is not None for site in self.passes.sites
        )
        seen = [*values.values()], [*routed.values()]
        matches, spread = identify(*seen, self.tolerance, devices, devices > 1 or chooses)
        if spread < 3 * self.tolerance:
            self.say(
                "unknown",
                "note",
                f"In these passes the loss and Switch's are the same within {spread:.1%}, and no "
                "formula can be told from another: give a batch with more rows, or with less even "
                "load" + ", or the model in float32" * (not self.is_exact) + ".",
            )
            return []
        if max(abs(v - value) for v in values.values()) <= 1e-6 * largest:
            self.say(
                "constant",
                "critical",
                f"The balancing loss is {value:.6g} in every pass, whatever the load; Switch's "
                f"loss of the same routing differs by {spread:.1%}.",
            )
        elif not matches:
            switch = float(Formula("router").value(routed["as given"]))
            self.say(
                "unknown",
                "warning",
                f"The balancing loss, {value:.6g}, stands in no fixed ratio to a published formula "
                f"(Switch's of each router is {switch:.6g}).",
                reported=value,
                switch=switch,
            )
        else:
            padded = not all(bool(r.real_T.all()) for r in every)
            self._formula(matches, routed["as given"], padded)
        return matches

    def _formula(self, matches: list[Match], routed: list[Routed], padded: bool) -> None:
        formula, factor = matches[0]
        K, stacks = routed[0].ids_TK.shape[1], len({r.stack for r in routed})
        why = {"as published": 1.0}
        if formula.by != "z" and K > 1:
            why["k, as f is per token, not per assignment"] = K
        if self.R > 1 and formula.by not in POOLED:
            summed = f"summed over {self.R} routers, not averaged"
            why |= {summed: self.R, f"k, as f is per token, and {summed}": K * self.R}
        two = ", of each of two stacks" * (stacks > 1)

        def whys_of(times: float) -> str:
            near = 2 * self.tolerance
            said = [w + two for w, n in why.items() if abs(times / n / stacks - 1) < near]
            return " or ".join(said)

        whys = [*filter(None, [whys_of(factor)])]
        if self.is_own and self.coefficient not in (None, 0, 1):
            times = factor / self.coefficient
            said = f"{times:.4g} × the coefficient {self.coefficient:g}"
            whys.append(": ".join(filter(None, [said, whys_of(times)])))

        def words_of(of: Formula) -> str:
            said = ", padding counted" if of.padding else ", padding left out"
            return of.words + said * padded

        other = "; or ".join(words_of(match.formula) for match in matches[1:4])
        self.say(
            "formula",
            "note",
            f"The balancing loss is {factor:.5g} × {words_of(formula)}"
            + f" ({' or '.join(whys)})" * bool(whys)
            + f". In these passes it may also be {other}" * bool(other)
            + "."
            + " No pass has padding: whether it counts is not known." * (not padded),
            factor=factor,
        )
        if other:
            return  # what the formulas do not share is not said
        if formula.by in POOLED and self.R > 1:
            self.say(
                "pooled",
                "warning",
                f"The loss is pooled over {self.R // stacks} routers: uneven load of one layer "
                "makes up for that of another, and a single layer may collapse. Switch's loss is "
                "of each router.",
            )
        if formula.padding:
            self.say("padding", "warning", "Padding is counted in the balancing loss.")
        if formula.score == TWICE:
            self.say(
                "softmax_twice",
                "critical",
                "A softmax is taken of what is a softmax already: its probabilities are nearly "
                "even, whatever the logits, and so is the loss.",
            )
        if formula.score == OF_CHOSEN:
            self.say(
                "of_chosen",
                "critical",
                "P is a softmax over the chosen experts alone: one that is not chosen has no "
                "probability to gain.",
            )
        if formula.chosen in BY_LOGITS:
            apart = torch.cat([_apart(r) for r in routed]).float().mean()
            is_published = formula.by == "sequence" and formula.chosen == BY_LOGITS[0]
            self.say(
                "other_choice",
                "note" if is_published else "warning",
                "f counts the experts with the largest logits"
                + ", as DeepSeek-V3's equation (18) does" * is_published
                + f". In {float(apart):.0%} of the decisions the router chose others, by a "
                "selection bias, groups or capacity: the loss balances a load that does not run.",
                share=float(apart),
            )

    # --- its gradient

    def _gradient(self, matches: list[Match]) -> list[float]:
        """`moves_R`"""
        run = self.run()  # (a graph ends where its weights change)
        loss = self.loss(run)
        unknown = [math.nan] * self.R
        if not self.weights:
            self.say("frozen", "note", "The routers' weights are frozen: no loss moves them.")
            return unknown
        gradient = self._by_weight(loss)
        if (norm := sum(float((g.double() ** 2).sum()) for g in gradient.values())) == 0:
            what = "0 at every router" if loss.requires_grad else "none: it is detached"
            said = f"The gradient of the balancing loss is {what}. It moves nothing."
            self.say("no_gradient", "critical", said)
            return unknown
        if not isfinite(norm):
            said = (
                "The gradient of the balancing loss is no finite number: a step breaks the model."
            )
            self.say("not_finite", "critical", said)
            return unknown
        if not all(r.logits_TE.requires_grad for r in run.routed):
            return unknown
        if matches:
            value = matches[0].formula.value(run.routed)
            # without the losses that a framework attaches to what its routers are given
            attached = self._by_weight(0 * value)
            expected = {key: g - attached[key] for key, g in self._by_weight(value).items()}
            self._same_gradient(gradient, expected, matches[0])
        moves = [self._moves(r, run.routed, gradient) for r in range(self.R)]
        agrees, after = self._step(gradient, norm, float(loss.detach()), run)
        if not (matches and matches[0].formula.by == "z"):  # which balances nothing
            self._direction(moves, agrees, after, matches)
        return moves

    def _by_weight(self, value: Tensor) -> Gradients:
        """Zeros where the value does not depend on a weight."""
        if not value.requires_grad:
            return {key: torch.zeros_like(p) for key, p in self.weights.items()}
        of = [*self.weights.values()]
        found = torch.autograd.grad(value, of, retain_graph=True, materialize_grads=True)
        return dict(zip(self.weights, found, strict=True))

    def _same_gradient(self, real: Gradients, expected: Gradients, match: Match) -> None:
        """Whether its gradient is that of the formula whose value it has."""
        a, b = (torch.cat([g.double().reshape(-1) for g in of.values()]) for of in (real, expected))
        b = b * match.factor
        ratio, apart = float(a @ b / (b @ b)), float((a - b).norm() / b.norm())
        if apart > SAME * (1 if self.is_exact else 4):
            elsewhere = ", and elsewhere" * (apart > 2 * abs(ratio - 1))
            self.say(
                "gradient",
                "critical",
                f"The loss has the value of the formula, and {ratio:.3g} times its gradient"
                f"{elsewhere}: a part of it is detached or scaled.",
                ratio=ratio,
            )

    def _moves(self, r: int, routed: Sequence[Routed], gradient: Gradients) -> float:
        weights = self.passes.weights(r)
        own = _own(self.passes.sites[r]).value([routed[r]])
        if not weights or not own.requires_grad:
            return math.nan
        found = torch.autograd.grad(own, weights, retain_graph=True, allow_unused=True)
        mine = [(g, gradient[id(p)]) for p, g in zip(weights, found, strict=True) if g is not None]
        b, a = (torch.cat([g.double().reshape(-1) for g in of]) for of in zip(*mine, strict=True))
        return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))

    def _step(
        self, gradient: Gradients, norm: float, loss: float, run: Pass
    ) -> tuple[bool | None, list[float]]:
        """A step along the gradient, so short that no choice changes: whether the loss falls as
        the gradient says, None where that cannot be seen; and how Σ f · P of each router changes,
        with the load before as f."""
        rate, agrees, moved = 0.01 * abs(loss) / norm, None, [math.nan] * self.R
        with unchanged(self.weights.values()) as kept:
            while self.is_exact and rate * norm > 200 * EPS * abs(loss):
                with torch.no_grad():
                    for (p, value), g in zip(kept, gradient.values(), strict=True):
                        p.copy_(value - rate * g)
                after = self.run()
                pairs = list(zip(run.routed, after.routed, strict=True))
                if all(_chose_alike(*pair) for pair in pairs):
                    fell = loss - float(self.loss(after).detach())
                    own = [_own(site) for site in self.passes.sites]
                    with torch.no_grad():
                        moved = [
                            float(of.value([b]) - of.value([a]))
                            for of, (a, b) in zip(own, pairs, strict=True)
                        ]
                    agrees = abs(fell / (rate * norm) - 1) < 2 * SAME
                    if agrees:
                        break
                rate /= 2  # a loss that curves is straight only in a shorter step
        return agrees, moved

    def _direction(
        self, moves: list[float], agrees: bool | None, after: list[float], matches: list[Match]
    ) -> None:
        if agrees is False:
            self.say(
                "step",
                "warning",
                "A short step along the gradient does not lower the loss as the gradient says: it "
                "is an estimate (as PhiMoE's SparseMixer makes on purpose), or wrong.",
            )
        halves = [self.forms[name] for name in HALVES if name in self.forms]
        if not halves or alike(*halves):
            self.say(
                "direction",
                "note",
                "One half of the batch has no text that the other has not, and confirms nothing: "
                "whether a step of the loss moves probability to idle experts is not judged. Give "
                "a batch of different rows.",
            )
            return
        measured = [moves]
        for name in HALVES:
            half = self.run(name)
            gradient = self._by_weight(self.loss(half))
            measured.append([self._moves(r, half.routed, gradient) for r in range(self.R)])
        only = matches[0].formula.only if matches else ""
        kinds = [type(site.logits_module or site.module).__name__ for site in self.passes.sites]
        judged = [r for r in range(self.R) if only in ("", kinds[r])]

        def in_all(test: Callable[[float], bool]) -> list[int]:
            return [r for r in judged if all(test(of[r]) for of in measured)]

        wrong = [r for r in in_all(lambda c: c < -ALONG) if not after[r] < 0]
        still = in_all(lambda c: abs(c) < ALONG / 10)
        right = [r for r in in_all(lambda c: c > ALONG) if not after[r] > 0]
        unsure = [r for r in judged if r not in {*wrong, *still, *right}]
        step, where = "a step of the loss moves", "in this batch and in each half of it"
        to_idle = "probability from busy experts to idle ones"
        halves_differ = f"the batch and its halves do not agree on where {step} probability"
        cases: tuple[tuple[list[int], Severity, str], ...] = (
            (wrong, "critical", f"{step} probability to the busy experts, {where}"),
            (still, "critical", f"{step} no {to_idle}, {where}"),
            (unsure, "note", halves_differ),
        )
        for which, severity, said in cases:
            if which:
                text = f"In {self.passes.labels(which)} {said}."
                self.say("direction", severity, text, routers=which)
        if right == judged:
            self.say(
                "moves",
                "good",
                f"A step of the loss moves {to_idle} in every {only or 'router'}, by autograd"
                + " and as measured" * bool(agrees)
                + ".",
            )


def _own(site: Site) -> Formula:
    """The Switch loss of a router by itself."""
    return Formula(
        "router", "sigmoid, scaled to sum to 1" if site.scoring == "sigmoid" else "softmax"
    )


_largest = CHOSEN[BY_LOGITS[0]]


def _chose_alike(a: Routed, b: Routed) -> bool:
    """What a loss may count is the same: the choices, and the largest logits."""
    return torch.equal(a.ids_TK, b.ids_TK) and torch.equal(_largest(a), _largest(b))


def _apart(routed: Routed) -> Tensor:
    """bool: the decisions whose experts are not those of the largest logits; without padding."""
    chosen = routed.ids_TK.sort(-1).values
    return (_largest(routed).sort(-1).values != chosen).any(-1)[routed.real_T]

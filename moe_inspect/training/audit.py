"""audit_loss: which formula a model's balancing loss is, whether it is in the training loss, and
whether a step of it balances.

T tokens, K slots, E experts, R routers, B batch rows, S positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_inspect.capture.hook.attach import Attachment
from moe_inspect.capture.hook.probes import Probes
from moe_inspect.capture.hook.stack import Sinks
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import no_routers, recordable
from moe_inspect.model.routers import Site, selection_bias, text_config
from moe_inspect.model.wrapped import unwrapped
from moe_inspect.reporting.verdict.findings import (
    Finding,
    Severity,
    finding,
    most_important_first,
)
from moe_inspect.text import layer_label, plural, ranges
from moe_inspect.training.formulas import (
    BY_LOGITS,
    OF_CHOSEN,
    POOLED,
    TWICE,
    Formula,
    Match,
    Routed,
    identify,
)
from moe_inspect.training.sums import RoutingSums

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_inspect.capture.options import InputsOf
    from moe_inspect.model.custom.spec import RouterSpec

Batch = Any  # what the model is called with: a mapping, a tuple, or one argument
LossOf = Callable[[Any], Any]  # the output of a pass → its balancing loss, None where it has none

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
SWITCH_ON = "output_router_logits"  # transformers compute the loss where this is on
ALONG = 0.02  # cosine of two gradients below which neither goes along the other
SAME = 0.05  # relative difference of two numbers that should be one


@dataclass(frozen=True)
class LossAudit:
    """`formula`, `factor`: reported = factor × formula, None where it is none of those known;
    `either`: other formulas that give the same in every pass. `added`: what the training loss has
    of it ÷ what its coefficient says, NaN where it cannot be told. `moves_R`: cosine, at each
    router, of the loss's gradient and that of the router's own Switch loss; 1 moves probability from
    busy experts to idle ones as directly as can be, below 0 the other way; NaN is unknown."""

    findings: list[Finding]
    formula: Formula | None = None
    factor: float = float("nan")
    either: list[Formula] = field(default_factory=list[Formula])
    added: float = float("nan")
    accumulated: float = float("nan")
    moves_R: list[float] = field(default_factory=list[float])

    @property
    def ok(self) -> bool:
        """Whether nothing is critical."""
        return all(found.severity != "critical" for found in self.findings)

    def __str__(self) -> str:
        return "\n".join(f"{f.severity}: {f.text}" for f in self.findings)


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
    the balancing loss that the model reports with the published formulas, computed from the routers'
    own logits and choices. Weights are changed for a step and put back; gradients in `.grad` are
    left alone.

    model        any model that `moe_inspect.record` takes, in the mode it trains in; in float32,
                 as 16 bits tell fewer formulas apart
    batch        what it is called with: a dict of arguments, a tuple, or the only argument. Rows
                 that are alike tell little: take some hundred tokens of real text, in several rows
    loss         the output of a pass → the loss; by default `aux_loss` of a transformers model
    coefficient  by which the training loss has it; by default as the config states it
    update       of a model whose routers have a selection bias: what updates it after a step. It is
                 put back
    routers, inputs
                 as of `moe_inspect.record`

    Raises MoeInspectError for a dense model."""
    with _Passes(model, routers, inputs).attached() as passes:
        return _Audit(passes, batch, loss, coefficient, update).audit()


class _Pass(NamedTuple):
    output: Any
    routed: list[Routed]  # of each router


class _Passes(RoutingSums):
    """Runs passes, and keeps what routers show of one in its graph."""

    def __init__(
        self, model: Any, routers: Sequence[RouterSpec] | None, inputs: InputsOf | None
    ) -> None:
        self.outer, inner = model, unwrapped(model, by_path=bool(routers))
        sites = recordable(inner, routers, None)
        super().__init__(inner, sites, inputs)
        self.attachment = Attachment(model, inner, sites, "tap", ("logits",), self)
        for r, sinks in enumerate(self.attachment.sinks):
            self.receive(r, sinks)
        add, scopes = None if sites else self._add_site, self.attachment.scopes
        self.attachment.probes = Probes(scopes, add, inner, None, need_logits=False)

    def _add_site(self, site: Site) -> Sinks:
        self.add_router(site)
        sinks = self.attachment.add(site)
        self.receive(len(self.sites) - 1, sinks)
        return sinks

    def receive(self, r: int, sinks: Sinks) -> None:
        sinks["logits"].keeps_graph = True
        super().receive(r, sinks)

    @contextmanager
    def attached(self) -> Iterator[_Passes]:
        with ExitStack() as undo:
            undo.callback(self.attachment.detach)
            self.attachment.attach()
            yield self

    def begin(self) -> None:
        super().begin()
        self._counting = True
        self._calls: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}

    def take(self, kind: str, r: int, values: Tensor, *more: Tensor) -> None:
        self._seen[kind][r] += len(values)
        self._calls.setdefault((kind, r), []).append((values, *more))

    def end(self) -> None:
        self._check()

    def run(self, batch: Batch, **more: Any) -> _Pass:
        """The same random numbers in every pass."""
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            if isinstance(batch, Mapping):
                output = self.outer(**{**batch, **more})
            else:
                output = self.outer(*(batch if isinstance(batch, tuple) else (batch,)), **more)
        if not self.sites:
            raise no_routers(self.model)
        return _Pass(output, [self._routed(r) for r in range(len(self.sites))])

    def _routed(self, r: int) -> Routed:
        site = self.sites[r]
        ids_TK, weights_TK = (torch.cat(of) for of in zip(*self._calls["", r], strict=True))
        shown = [of[0] for of in self._calls.get(("logits", r), [])]
        logits_TE = torch.cat(shown) if shown else ids_TK.new_zeros(0, site.experts).float()
        with torch.no_grad():  # probabilities, where a family calls them logits
            p = logits_TE.float()
            is_p = bool(len(p)) and bool((p >= 0).all() and ((p.sum(1) - 1).abs() < 1e-3).all())
        logits_TE = logits_TE.clamp(min=1e-30).log() if is_p else logits_TE
        B, S, order_T = self._fed[site.stack]
        token_T = torch.arange(B * S) if order_T is None else torch.from_numpy(order_T)
        real_T = self._real[site.stack]
        device = ids_TK.device
        real_T = torch.ones(len(token_T), dtype=torch.bool) if real_T is None else real_T
        kind = type(site.logits_module or site.module).__name__
        row_T = (token_T // S).to(device)
        return Routed(logits_TE, ids_TK, weights_TK, real_T.to(device), row_T, site.stack, kind)

    def parameters(self, r: int) -> list[Tensor]:
        """Those that make the logits of router r."""
        of = self.sites[r].logits_module or self.sites[r].module
        return [p for p in of.parameters() if p.requires_grad]

    def labels(self, which: Sequence[int]) -> str:
        names = [layer_label(self.sites, r) for r in which]
        one = all(name.isdigit() for name in names)
        said = ranges(map(int, names)) if one else ", ".join(names)
        return f"layer{'s' * (len(names) > 1)} {said}"


def default_loss(output: Any) -> Any:
    """What a model of transformers reports; of an encoder-decoder the sum of both stacks."""
    get = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
    parts = [get(name) for name in ("aux_loss", "encoder_aux_loss", "decoder_aux_loss")]
    parts = [part for part in parts if part is not None]
    return sum(parts[1:], parts[0]) if parts else None


def _accepts(module: Any, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _takes_any(module: Any) -> bool:
    kinds = (p.kind for p in inspect.signature(module.forward).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def has_loss(model: Any) -> bool:
    """Whether a transformers model can report a balancing loss: its forward can be asked for router
    logits, and its config gives a coefficient."""
    return _accepts(model, SWITCH_ON) and _coefficient(model) is not None


def _coefficient(model: Any) -> float | None:
    config = text_config(model)
    for owner in (config, getattr(config, "ffn_config", None)):
        for name in COEFFICIENTS:
            if isinstance(value := getattr(owner, name, None), int | float):
                return float(value)
    return None


class _Audit:
    def __init__(
        self,
        passes: _Passes,
        batch: Batch,
        loss: LossOf | None,
        coefficient: float | None,
        update: Callable[[], object] | None,
    ):
        self.passes, self.model, self.update = passes, passes.model, update
        self.loss_of, self.is_own = loss or default_loss, loss is not None
        self.coefficient = _coefficient(self.model) if coefficient is None else coefficient
        self.switch = {SWITCH_ON: True} if _accepts(self.model, SWITCH_ON) else {}
        self.batches = _variants(batch, self.model, passes)
        self.found = list[Finding]()
        first = next(self.model.parameters())
        self.is_exact = first.dtype in (torch.float32, torch.float64)
        self.tolerance = 3e-4 if self.is_exact else 2e-2

    def say(self, kind: str, severity: Severity, text: str, **values: Any) -> None:
        self.found.append(finding(f"loss_{kind}", severity, text, None, **values))

    def done(self, **more: Any) -> LossAudit:
        return LossAudit(most_important_first(self.found), **more)

    # --- the parts

    def audit(self) -> LossAudit:
        runs = {name: self.passes.run(b, **self.switch) for name, b in self.batches.items()}
        losses = {name: self.loss_of(run.output) for name, run in runs.items()}
        self._biases(runs["as given"])
        if any(loss is None for loss in losses.values()):
            self._none()
            return self.done()
        losses = {name: torch.as_tensor(loss, dtype=torch.float32) if not torch.is_tensor(loss)
                  else loss.sum() for name, loss in losses.items()}
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        self._shows_padding(runs)
        logits = all(len(r.logits_TE) for run in runs.values() for r in run.routed)
        matches, spread = list[Match](), 0.0
        if logits:
            routed = {name: run.routed for name, run in runs.items()}
            devices = getattr(text_config(self.model), "n_group", None) or 0
            matches, spread = identify(values, routed, self.tolerance, devices)
        is_zero = all(value == 0 for value in values.values())
        wide = max(map(abs, values.values()))
        constant = max(abs(v - values["as given"]) for v in values.values()) <= 1e-6 * wide
        if is_zero:
            self.say("zero", "critical", "The balancing loss is 0 on every pass.")
        elif constant and len(values) > 2 and spread > 1e-4:
            self.say(
                "constant",
                "critical",
                f"The balancing loss is {values['as given']:.6g} on every pass, whatever the load: "
                "it cannot tell even routing from collapsed. Switch's loss of the same routing "
                f"differs by up to {spread:.1%}.",
            )
        elif not logits:
            self.say("unknown", "note", "The routers show no logits: no formula can be computed.")
        elif spread < 3 * self.tolerance:
            matches = []
            self.say(
                "unknown",
                "note",
                f"On these passes every formula is the same within {spread:.1%}, and none can be "
                "told from another: give a batch of more or of less even tokens"
                + ("" if self.is_exact else ", and the model in float32")
                + ".",
            )
        else:
            self._formula(matches, runs["as given"], values["as given"])
        added, accumulated = self._added(values["as given"])
        moves = self._gradient(runs["as given"], losses["as given"], matches)
        formula, factor = (matches[0].formula, matches[0].factor) if matches else (None, float("nan"))
        either = [match.formula for match in matches[1:]]
        return self.done(
            formula=formula,
            factor=factor,
            either=either,
            added=added,
            accumulated=accumulated,
            moves_R=moves,
        )

    def _none(self) -> None:
        coefficient = self.coefficient
        if coefficient:
            self.say(
                "off",
                "critical",
                f"The config states a balancing loss with coefficient {coefficient:g}, and the "
                "model reports none"
                + (f", with {SWITCH_ON}=True too" if self.switch else "")
                + ": training adds none.",
                coefficient=coefficient,
            )
        elif self.is_own:
            self.say("off", "critical", "loss=… found no balancing loss in the output of a pass.")
        else:
            self.say("none", "note", "The model reports no balancing loss.")

    def _shows_padding(self, runs: Mapping[str, _Pass]) -> None:
        self.padded = any(not bool(r.real_T.all()) for run in runs.values() for r in run.routed)

    def _formula(self, matches: list[Match], run: _Pass, value: float) -> None:
        if not matches:
            switch = float(Formula("router").value(run.routed))
            self.say(
                "unknown",
                "warning",
                f"The balancing loss, {value:.6g}, stands in no fixed ratio to any published formula "
                f"(Switch's of each router is {switch:.6g}).",
                reported=value,
                switch=switch,
            )
            return
        (formula, factor), R = matches[0], len(run.routed)
        K, L = run.routed[0].ids_TK.shape[1], R
        is_why = {
            1: ["as published"],
            K: ["k, as f is per token, not per assignment"],
            L: [f"summed over {R} routers, not averaged"],
        }
        for n, why in ((K * L, "k × the number of routers"), (1 / K, "1 ÷ k")):
            is_why.setdefault(n, [why])
        stacks = len({r.stack for r in run.routed})
        whys = [
            f"{why[0]}{', of each of two stacks' * (stacks > 1)}"
            for n, why in is_why.items()
            if abs(factor / (n * stacks) - 1) < SAME / 10
        ]
        if self.is_own and self.coefficient:
            of = factor / self.coefficient
            whys += [f"{of:.4g} × the coefficient {self.coefficient:g}"]
        other = [m.formula.words for m in matches[1:]]
        self.say(
            "formula",
            "note",
            f"The balancing loss is {factor:.5g} × {formula.words}"
            + (f" ({' or '.join(whys)})" if whys else "")
            + "."
            + (f" On this batch it may also be {'; or '.join(other[:3])}." if other else "")
            + ("" if self.padded else " No pass had padding: whether it counts is not known."),
            factor=factor,
            value=value,
        )
        if other:
            return  # what several formulas do not share is not said of the loss
        if formula.by in POOLED and R > 1:
            self.say(
                "pooled",
                "warning",
                f"The loss is pooled over {R} routers: load that is uneven in one layer is made up "
                "for by another, and single layers may collapse. Switch's loss is of each router.",
            )
        if self.padded and formula.padding:
            self.say("padding", "warning", "Padding is counted in the loss.")
        if formula.score in (TWICE, OF_CHOSEN):
            self.say(
                "softmax_twice" if formula.score == TWICE else "of_chosen",
                "critical",
                "A softmax is taken of what is a softmax already: the probabilities are nearly even "
                "whatever the logits, and so is the loss."
                if formula.score == TWICE
                else "P is a softmax over the chosen logits alone: experts that are not chosen have "
                "no probability to gain.",
            )
        if formula.chosen in BY_LOGITS:
            share = _choices_apart(run.routed)
            self.say(
                "other_choice",
                "warning",
                f"f counts the experts with the largest logits, which are not those that the "
                f"router chose in {share:.0%} of the decisions (a selection bias, groups or "
                "capacity come after): the loss balances a load that does not run.",
                share=share,
            )

    # --- is it in the training loss?

    def _added(self, reported: float) -> tuple[float, float]:
        """What the loss with labels has of it ÷ what the coefficient says; and the same of two
        accumulated halves together, whose losses are normalised by the items of both."""
        nan, batch = float("nan"), self.batches["as given"]
        can = self.switch and isinstance(batch, Mapping) and _accepts(self.model, "labels")
        if self.is_own or not can or reported == 0 or "input_ids" not in batch:
            return nan, nan
        if not (coefficient := self.coefficient):
            self.say(
                "off",
                "warning",
                "The config gives the balancing loss no weight: training adds none of it."
                if coefficient == 0
                else "The config states no coefficient of the balancing loss.",
            )
            return nan, nan

        def part(batch: Any, **more: Any) -> tuple[float, float, float]:
            """Of the loss, added where it is on; as the coefficient says; and by default."""
            ids = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]
            given = {"labels": ids, **batch, **more}
            on, off, default = (
                self.passes.run(given, **switch).output
                for switch in ({SWITCH_ON: True}, {SWITCH_ON: False}, {})
            )
            said = coefficient * float(default_loss(on))
            said += self._z_loss(on)
            return float(on.loss - off.loss), said, float(default.loss - off.loss)

        added, said, default = part(batch)
        noise = 4 * torch.finfo(torch.float32).eps * 10
        if abs(said) < noise / SAME:
            return nan, nan
        ratio = added / said
        if abs(ratio) < SAME:
            self.say(
                "off",
                "critical",
                "The balancing loss is reported, and is no part of the loss with labels: it trains "
                "nothing.",
            )
        elif abs(ratio - 1) > SAME:
            self.say(
                "doubled" if abs(ratio - 2) < SAME else "scaled",
                "critical",
                f"The loss with labels has {ratio:.3g} times the balancing loss that the "
                f"coefficient {coefficient:g} says.",
                ratio=ratio,
            )
        elif abs(default / said) < SAME:
            self.say(
                "off",
                "critical" if self.model.training else "warning",
                f"The config states a balancing loss with coefficient {coefficient:g} and "
                f"{SWITCH_ON}=False: training as it says adds none. Set {SWITCH_ON}=True.",
                coefficient=coefficient,
            )
        halves = [self.batches[n] for n in ("first half", "second half") if n in self.batches]
        if len(halves) < 2 or not _takes_any(self.model):
            return ratio, nan
        items = sum(int((h.get("labels", h["input_ids"])[:, 1:] != -100).sum()) for h in halves)
        both = [part(half, num_items_in_batch=torch.tensor(items)) for half in halves]
        accumulated = sum(of[0] for of in both) / (sum(of[1] for of in both) / 2)
        if abs(ratio - 1) <= SAME and abs(accumulated - 2) < 2 * SAME:
            self.say(
                "accumulated",
                "warning",
                "With gradient accumulation the balancing loss is added once per pass, and the "
                "language loss is divided by the tokens of all passes (num_items_in_batch): over 2 "
                "passes it weighs twice as much, over N passes N times.",
                ratio=accumulated,
            )
        return ratio, accumulated

    def _z_loss(self, output: Any) -> float:
        weight = getattr(self.model.config, "router_z_loss_coef", None)
        parts = [getattr(output, f"{stack}_z_loss", None) for stack in ("encoder", "decoder")]
        if not weight or all(part is None for part in parts):
            return 0.0
        return float(weight * sum(float(part) for part in parts if part is not None))

    # --- the gradient

    def _gradient(self, run: _Pass, loss: Tensor, matches: list[Match]) -> list[float]:
        R = len(run.routed)
        unknown = [float("nan")] * R
        params = {id(p): p for r in range(R) for p in self.passes.parameters(r)}
        if not params:
            self.say("frozen", "note", "The weights of the routers are frozen: no loss moves them.")
            return unknown
        flat = list(params.values())
        if not loss.requires_grad:
            self.say("no_gradient", "critical", "The balancing loss has no gradient: it is detached.")
            return unknown
        gradient = dict(zip(params, _gradients(loss, flat), strict=True))
        norm = sum(float((g.double() ** 2).sum()) for g in gradient.values())
        if norm == 0:
            self.say(
                "no_gradient",
                "critical",
                "The gradient of the balancing loss is 0 at every router: it moves nothing.",
            )
            return unknown
        if not all(len(r.logits_TE) and r.logits_TE.requires_grad for r in run.routed):
            return unknown
        if matches:
            self._same_gradient(gradient, flat, run, matches[0])
        moves = [self._moves(r, run.routed[r], gradient) for r in range(R)]
        agrees, after = self._step(gradient, norm, float(loss.detach()), run)
        self._judge(moves, agrees, after, run)
        return moves

    def _same_gradient(
        self, gradient: Mapping[int, Tensor], flat: list[Tensor], run: _Pass, match: Match
    ) -> None:
        """Is the loss's gradient that of the formula whose value it has?"""
        expected = _gradients(match.formula.value(run.routed) * match.factor, flat)
        both, of = 0.0, 0.0
        apart = 0.0
        for mine, other in zip(gradient.values(), expected, strict=True):
            mine, other = mine.double(), other.double()
            both += float((mine * other).sum())
            of += float((other**2).sum())
            apart += float(((mine - other) ** 2).sum())
        if of > 0 and (apart / of) ** 0.5 > (SAME if self.is_exact else 5 * SAME):
            self.say(
                "gradient",
                "critical",
                f"The loss has the value of the formula and {both / of:.3g} times its gradient"
                + (", in another direction" if (apart / of) ** 0.5 > 2 * abs(both / of - 1) else "")
                + ": a part of it is detached or scaled.",
                ratio=both / of,
            )

    def _moves(self, r: int, routed: Routed, gradient: Mapping[int, Tensor]) -> float:
        params = self.passes.parameters(r)
        own = _gradients(Formula("router", _score_of(self.passes.sites[r])).value([routed]), params)
        mine = [gradient[id(p)].double() for p in params]
        dot, a, b = (
            sum(float((x.double() * y.double()).sum()) for x, y in zip(*pair, strict=True))
            for pair in ((mine, own), (mine, mine), (own, own))
        )
        return dot / (a * b) ** 0.5 if a > 0 and b > 0 else 0.0

    def _step(
        self, gradient: Mapping[int, Tensor], norm: float, loss: float, run: _Pass
    ) -> tuple[bool | None, list[float]]:
        """A step along the gradient, so short that no choice changes: whether the loss falls as the
        gradient says, None where that cannot be seen; and by how much Σ f · P of each router
        changes, f being the load before. Weights are put back."""
        params = {id(p): p for r in range(len(run.routed)) for p in self.passes.parameters(r)}
        kept = {key: p.detach().clone() for key, p in params.items()}
        rate, R = 0.01 * abs(loss) / norm, len(run.routed)
        try:
            for _ in range(14 if self.is_exact else 0):
                with torch.no_grad():
                    for key, p in params.items():
                        p.copy_(kept[key] - rate * gradient[key])
                    after = self.passes.run(self.batches["as given"], **self.switch)
                pairs = list(zip(run.routed, after.routed, strict=True))
                if all(torch.equal(a.ids_TK, b.ids_TK) for a, b in pairs):
                    fell = loss - float(self.loss_of(after.output))
                    if rate * norm < 1e3 * torch.finfo(torch.float32).eps * abs(loss):
                        break
                    own = [Formula("router", _score_of(s)) for s in self.passes.sites]
                    with torch.no_grad():
                        moved = [
                            float(own[r].value([b]) - own[r].value([a]))
                            for r, (a, b) in enumerate(pairs)
                        ]
                    return abs(fell / (rate * norm) - 1) < 2 * SAME, moved
                rate /= 2
        finally:
            with torch.no_grad():
                for key, p in params.items():
                    p.copy_(kept[key])
        return None, [float("nan")] * R

    def _judge(
        self, moves: list[float], agrees: bool | None, after: list[float], run: _Pass
    ) -> None:
        if agrees is False:
            self.say(
                "step",
                "critical",
                "A small step along the gradient does not lower the loss by what the gradient says.",
            )
        R = len(moves)
        halves = [h for h in (self._half(n) for n in ("first half", "second half")) if h]
        def sure(r: int, test: Callable[[float], bool]) -> bool:
            return test(moves[r]) and len(halves) == 2 and all(test(half[r]) for half in halves)

        wrong = [r for r in range(R) if sure(r, lambda c: c < -ALONG) and not after[r] < 0]
        still = [r for r in range(R) if sure(r, lambda c: abs(c) < ALONG)]
        right = [r for r in range(R) if sure(r, lambda c: c > ALONG) and not after[r] > 0]
        if wrong:
            self.say(
                "direction",
                "critical",
                f"In {self.passes.labels(wrong)} a step of the loss moves probability to the busy "
                "experts, on this batch and on each half of it.",
                routers=wrong,
            )
        if still:
            self.say(
                "direction",
                "critical",
                f"In {self.passes.labels(still)} a step of the loss moves no probability from the "
                "busy experts to the idle ones.",
                routers=still,
            )
        if len(right) == R:
            measured = " (measured by a step, too)" if agrees else ""
            self.say(
                "moves",
                "good",
                "A step of the loss moves probability from the busy experts to the idle ones in "
                f"every router{measured}.",
            )
        elif not wrong and not still:
            unsure = [r for r in range(R) if r not in right]
            self.say(
                "direction",
                "note",
                f"In {self.passes.labels(unsure)} this batch does not tell which way a step of the "
                "loss moves probability.",
            )

    def _half(self, name: str) -> list[float]:
        """`moves` of a half of the batch, by itself; nothing where there is no such half."""
        if name not in self.batches:
            return []
        run = self.passes.run(self.batches[name], **self.switch)
        flat = {id(p): p for r in range(len(run.routed)) for p in self.passes.parameters(r)}
        loss = self.loss_of(run.output)
        found = _gradients(loss.sum(), list(flat.values()))
        gradient = dict(zip(flat, found, strict=True))
        return [self._moves(r, routed, gradient) for r, routed in enumerate(run.routed)]

    # --- the selection bias

    def _biases(self, run: _Pass) -> None:
        biases = [selection_bias(site, self.model) for site in self.passes.sites]
        which = [r for r, bias in enumerate(biases) if bias is not None]
        if not which:
            return
        in_weight, not_in_choice = list[int](), list[int]()
        for r in which:
            bias, routed = biases[r], run.routed[r]
            assert bias is not None
            E, kept = bias.numel(), bias.detach().clone()
            idle = int(torch.bincount(routed.ids_TK.clamp(0, E - 1).reshape(-1), minlength=E).argmin())
            with torch.no_grad():
                try:
                    bias += 0.5  # the same for all: no other choice
                    same = self.passes.run(self.batches["as given"], **self.switch).routed[r]
                    bias.copy_(kept)
                    bias.view(-1)[idle] += 100
                    other = self.passes.run(self.batches["as given"], **self.switch).routed[r]
                finally:
                    bias.copy_(kept)
            alike = (same.ids_TK == routed.ids_TK).all(1)
            if bool(alike.any()):
                a, b = same.weights_TK[alike].float(), routed.weights_TK[alike].float()
                if bool(((a - b).abs() > self.tolerance * 10 * b.abs() + 1e-6).any()):
                    in_weight.append(r)
            if not bool((other.ids_TK == idle).any(1).float().mean() > 0.9):
                not_in_choice.append(r)
        if in_weight:
            self.say(
                "bias_in_weight",
                "critical",
                f"The selection bias changes the gate weights in {self.passes.labels(in_weight)}: "
                "it should steer the choice alone (arXiv:2408.15664).",
                routers=in_weight,
            )
        if not_in_choice:
            self.say(
                "bias_not_in_choice",
                "critical",
                f"A large selection bias does not make its expert chosen in "
                f"{self.passes.labels(not_in_choice)}: it balances nothing.",
                routers=not_in_choice,
            )
        if not in_weight and not not_in_choice:
            self.say("bias", "good", "The selection bias steers the choice, and no gate weight.")
        if self.update is not None:
            self._update([biases[r] for r in which], which, run)

    def _update(self, biases: Sequence[Tensor | None], which: list[int], run: _Pass) -> None:
        update = self.update
        assert update is not None
        kept = [bias.detach().clone() for bias in biases if bias is not None]
        wrong, sizes, still = list[int](), list[float](), list[int]()
        self.passes.run(self.batches["as given"], **self.switch)
        update()
        for r, bias, before in zip(which, biases, kept, strict=True):
            assert bias is not None
            with torch.no_grad():
                step_E = (bias - before).reshape(-1).double()
                bias.copy_(before)
            routed, E = run.routed[r], len(step_E)
            ids = routed.ids_TK[routed.real_T]
            load_E = torch.bincount(ids[(ids >= 0) & (ids < E)].long(), minlength=E).double()
            lack_E = load_E.mean() - load_E
            sizes += step_E[step_E != 0].abs().tolist()
            if not bool(step_E.any()):
                still.append(r)
            elif float((step_E * lack_E).sum()) <= 0:
                wrong.append(r)
        if still:
            what = f"The update leaves the selection bias as it is in {self.passes.labels(still)}."
            self.say("bias_update", "critical", what)
        if wrong:
            self.say(
                "bias_update",
                "critical",
                f"The update raises the selection bias of busy experts in "
                f"{self.passes.labels(wrong)}: the sign is wrong.",
            )
        if sizes and not wrong and not still:
            low, high = min(sizes), max(sizes)
            size = f"{low:.3g}" if high < low * (1 + SAME) else f"{low:.3g} to {high:.3g}"
            self.say(
                "bias_update",
                "good",
                f"The update raises the selection bias of idle experts, by {size}.",
            )


def _choices_apart(routed: Sequence[Routed]) -> float:
    """The share of decisions whose experts are not those of the largest logits."""
    apart, of = 0, 0
    for r in routed:
        top = r.logits_TE.topk(r.ids_TK.shape[1], -1).indices.sort(-1).values
        apart += int((top != r.ids_TK.sort(-1).values).any(-1)[r.real_T].sum())
        of += int(r.real_T.sum())
    return apart / max(of, 1)


def _score_of(site: Site) -> str:
    return "sigmoid, scaled to sum to 1" if site.scoring == "sigmoid" else "softmax"


def _gradients(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Zeros where the value does not depend on a parameter."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _variants(batch: Batch, model: Any, passes: _Passes) -> dict[str, Batch]:
    """The batch as it is; with padding at the end of every second row, where it has none; packed
    into one row; and its two halves, as two accumulation steps have them."""
    found: dict[str, Batch] = {"as given": batch}
    is_dict = isinstance(batch, Mapping)
    values = list(batch.values()) if is_dict else list(batch) if isinstance(batch, tuple) else [batch]
    tensors = [v for v in values if torch.is_tensor(v) and v.dim() > 1]
    B = len(tensors[0]) if tensors else 0
    if not B:
        raise MoeInspectError("audit_loss needs a batch with a tensor [rows, positions]")

    def part(value: Any, end: int) -> Any:
        if not torch.is_tensor(value) or not value.dim() or len(value) != B:
            return value
        if B > 1:
            return value[: (B + 1) // 2] if not end else value[(B + 1) // 2 :]
        half = value.shape[1] // 2 if value.dim() > 1 else len(value)
        return value[:, :half] if not end else value[:, half:]

    for end, name in enumerate(("first half", "second half")):
        if is_dict:
            found[name] = {key: part(value, end) for key, value in batch.items()}
        else:
            parts = tuple(part(value, end) for value in values)
            found[name] = parts if isinstance(batch, tuple) else parts[0]
    ids = batch.get("input_ids") if is_dict else None
    alone = any(site.adapter is not None and site.adapter.alone for site in passes.sites)
    if not torch.is_tensor(ids) or ids.dim() != 2 or alone or not _accepts(model, "attention_mask"):
        return found
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if bool((mask != 0).all()) and ids.shape[1] > 2:
        padded = mask.clone()
        padded[::2, -(ids.shape[1] // 3) :] = 0
        found["padded"] = {**batch, "attention_mask": padded}
    if B > 1 and set(batch) <= {"input_ids", "attention_mask", "labels"} and _packs(model):
        lengths = (mask != 0).sum(1).tolist()
        places = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
        found["packed"] = {"input_ids": ids[mask != 0][None], "position_ids": places[None]}
    return found


def _packs(model: Any) -> bool:
    """Whether it is a decoder of text, which takes several documents in a row by their positions."""
    return type(model).__name__.endswith("ForCausalLM") and _accepts(model, "position_ids")

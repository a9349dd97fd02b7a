"""The experts implementation `moe_inspect`: a dispatch kernel groups the slots by expert and
records the router's choice, then grouped matrix products run. So the record is what was executed.
Without a recorder it computes the same and records nothing. On a CPU, where no kernel of ours runs,
few slots go to the implementation that the model would use; for a tap on a CPU all of them do.

T tokens, K slots, S = T·K, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _batched_linear, _grouped_linear

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Dispatch, Tape
from moe_inspect.capture.hook.stack import Sink, Sinks, not_pickled
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, is_expert_parallel, wants_expert_parallel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "moe_inspect"
TAKEN = "_moe_inspect"  # the attribute of an experts module while a recorder has taken it over

# Up to here copying each slot's expert (transformers' `batched_mm`) is faster than grouping: 64
# slots are 16 tokens of Qwen1.5-MoE, where Hugging Face measured 52 ms against 64, and at 128
# tokens 316 against 76 (docs-benchmarks/experts-backends on the hub)
FEW_SLOTS = 64

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Implementation = Callable[..., Tensor]  # of the experts, as transformers' registry has them
# of transformers' interface: flags on it (has_gate, has_bias …) describe the family's experts
Experts: TypeAlias = Any


@dataclass(eq=False, slots=True)
class TakenOver:
    """How an experts module that a recorder has taken over runs.

    sink      receives its choice
    norms     receives the norms of its experts' outputs; None: they are not recorded
    stock     the implementation that it would run otherwise; None where that is never used
    computes  whether ours computes (dispatch), but for up to FEW_SLOTS slots where no kernel of
              ours runs
    before    the implementation that each config of the model named before
    """

    sink: Sink
    norms: Sink | None
    stock: Implementation | None
    computes: bool
    before: list[tuple[PreTrainedConfig, str | None]]

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        # what is copied is a module, and the copy is not taken over
        for config, name in self.before:
            deepcopy(config, memo)._experts_implementation_internal = name

    __reduce__ = not_pickled


# By the id of a config in which a tap has put our implementation: the one that it named before, and
# the tap. All modules with the config run ours, those too that the tap does not record.
_TAPPED: dict[int, tuple[Implementation, Takeover]] = {}


def experts_forward(
    self: Experts, hidden_TH: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """In place of transformers' `grouped_mm`, and of `batched_mm` for few tokens on a GPU."""
    taken: TakenOver | None = getattr(self, TAKEN, None)
    if taken is None:
        tapped = None if is_compiling() else _TAPPED.get(id(self.config))
        if tapped is not None:
            return tapped[0](self, hidden_TH, top_k_index, top_k_weights)
        return _computed(self, hidden_TH, top_k_index, top_k_weights, None)
    tape = taken.sink(top_k_index, top_k_weights)
    run = taken.stock
    if run is not None and taken.computes:
        is_small = top_k_index.numel() <= FEW_SLOTS and not kernels.runs_triton(hidden_TH)
        run = run if is_small and not is_compiling() else None
    if run is None:
        return _computed(self, hidden_TH, top_k_index, top_k_weights, tape)
    if tape is not None:
        kernels.record(tape, top_k_index, top_k_weights)
    return run(self, hidden_TH, top_k_index, top_k_weights)


def _computed(
    self: Experts, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, tape: Tape | None
) -> Tensor:
    # (a gradient would keep the copies)
    on_gpu = kernels.runs_triton(hidden_TH) and not torch.is_grad_enabled()
    copied = on_gpu and are_few(ids_TK.numel(), self.num_experts)
    return (_copied if copied else _grouped)(self, hidden_TH, ids_TK, weights_TK, tape)


def are_few(slots: int, experts: int) -> bool:
    """Whether copying the expert of each slot is faster: while slots need not share experts."""
    return slots <= min(FEW_SLOTS, experts)


def _grouped(
    self: Experts, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, tape: Tape | None
) -> Tensor:
    grouped = kernels.dispatch(ids_TK, weights_TK, self.num_experts, tape)
    ends_E, token_S = grouped.offsets[1:], grouped.token
    # the products leave the rows beyond the last expert uninitialised, forward and backward: where
    # these may be other ranks' slots they are masked (the fused sum does not read them)
    beyond_S1 = expert_S = None
    if _may_have_sentinels(self) and not _in_one_pass(hidden_TH):
        place_S = torch.arange(len(token_S), device=token_S.device)
        beyond_S1 = (place_S >= ends_E[-1]).unsqueeze(1)
    if self.has_bias:
        expert_S = ids_TK.reshape(-1)[grouped.permutation.long()].clamp(0, self.num_experts - 1)

    def masked(x_S: Tensor) -> Tensor:
        return x_S if beyond_S1 is None else x_S.masked_fill(beyond_S1, 0.0)

    def linear(x_S: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias_S = bias[expert_S] if bias is not None else None
        transposed = self.is_transposed
        return masked(_grouped_linear(x_S, weight, ends_E, bias=bias_S, is_transposed=transposed))

    # (the gradient of index_select is not deterministic on a GPU; that of indexing, as in
    # transformers, is)
    hidden_SH = (
        hidden_TH[token_S.long()] if hidden_TH.requires_grad else hidden_TH.index_select(0, token_S)
    )
    y_SH = _mlp(self, masked(hidden_SH), linear)
    return _combined(self, y_SH, ids_TK, weights_TK, grouped, None, hidden_TH)


def _copied(
    self: Experts, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, tape: Tape | None
) -> Tensor:
    """Copies the expert's weights per slot. The launch of the weighted sum records, too."""
    expert_S = ids_TK.reshape(-1)
    if _may_have_sentinels(self):
        expert_S = expert_S.clamp(0, self.num_experts - 1)
        weights_TK = weights_TK.masked_fill(ids_TK >= self.num_experts, 0.0)

    def linear(x_S: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias_S = bias[expert_S] if bias is not None else None
        return _batched_linear(x_S, weight[expert_S], bias_S, is_transposed=self.is_transposed)

    y_SH = _mlp(self, hidden_TH.repeat_interleave(ids_TK.shape[1], dim=0), linear)
    return _combined(self, y_SH, ids_TK, weights_TK, None, tape, hidden_TH)


def _combined(
    self: Experts,
    y_SH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    grouped: Dispatch | None,
    tape: Tape | None,
    hidden_TH: Tensor,
) -> Tensor:
    """The weighted sum of the experts' outputs. Records their norms and, on `tape`, the choice."""
    dtype = hidden_TH.dtype
    taken: TakenOver | None = getattr(self, TAKEN, None)
    sink = taken.norms if taken is not None else None
    measures, norms_TK = sink is not None and sink.scope.open, None
    if _in_one_pass(hidden_TH):
        if measures:
            norms_TK = ids_TK.new_empty(ids_TK.shape, dtype=torch.float32)
        sum_TH = kernels.combine(
            y_SH, ids_TK, weights_TK, grouped, dtype, self.num_experts, tape, norms_TK
        )
    else:
        if tape is not None:
            kernels.record(tape, ids_TK, weights_TK)
        inverse_S = grouped.inverse if grouped is not None else None
        if measures:
            norms_TK = kernels.norms_torch(y_SH, ids_TK.shape[1], inverse_S)
        sum_TH = kernels.weighted_sum(y_SH, weights_TK, inverse_S).to(dtype)
    if sink is not None and norms_TK is not None:
        sink.record(None, norms_TK)
    return sum_TH


def _mlp(self: Experts, x_SH: Tensor, linear: Linear) -> Tensor:
    bias = (lambda name: getattr(self, name + "_bias")) if self.has_bias else lambda name: None
    up = "gate_up_proj" if self.has_gate else "up_proj"
    h_SI = linear(x_SH, getattr(self, up), bias(up))
    h_SI = self._apply_gate(h_SI) if self.has_gate else self.act_fn(h_SI)
    y_SH = linear(h_SI, self.down_proj, bias("down_proj"))
    # a flag of newer releases
    return self.post_expert_norm(y_SH) if getattr(self, "has_post_expert_norm", False) else y_SH


def _may_have_sentinels(self: Experts) -> bool:
    """Whether there may be ids ≥ E, of other ranks' experts: some releases do not tell."""
    return getattr(self, "_is_expert_parallel", True)


def _in_one_pass(hidden_TH: Tensor) -> bool:
    """Whether the fused kernel sums: it has no gradient, and torch.compile fuses these steps."""
    return kernels.runs_triton(hidden_TH) and not (torch.is_grad_enabled() or is_compiling())


def on_interface(module: Experts) -> bool:
    """Whether an implementation is called with what the module is called with. (Ergo's own forward
    calls it with one row per slot.)"""
    stated = ("config", "is_transposed", "has_gate")
    replaced = hasattr(type(module).forward, "__wrapped__")
    return replaced and all(hasattr(module, name) for name in stated)


def stock_of(module: Experts) -> Implementation | None:
    """What an experts module would run without ours; None for its own loop (eager)."""
    stock = ALL_EXPERTS_FUNCTIONS.get(module.config._experts_implementation)
    return None if stock is experts_forward else stock


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


class Takeover:
    """Has experts modules of a model run our implementation, for a recorder. `sinks`: of each.
    `instead`: begins to record them in another way, where a tap has to let them go."""

    def __init__(self, model: Any, sinks: Mapping[Experts, Sinks], instead: Callable[[], None]):
        self.model, self.sinks, self.instead = model, sinks, instead
        self.taps = False
        self._undo = ExitStack()

    def dispatch(self) -> None:
        """Ours computes and records."""
        for module in self.sinks:
            if (tapped := _TAPPED.get(id(module.config))) is not None:
                tapped[1].let_go()
            if getattr(module, TAKEN, None) is not None:
                already = "this model is already being recorded with dispatch"
                raise MoeInspectError(f"{already}: use capture='tap' for the second recorder")
        self._take(computes=True)

    def tap(self) -> None:
        """Ours records, and the model's own computes: on a CPU, where that is of the registry. (It
        costs less than a forward of the instance.) `taps`: whether it does."""
        self.taps = bool(self.sinks) and all(
            all(parameter.is_cpu for parameter in module.parameters())
            and getattr(module, TAKEN, None) is None
            and stock_of(module) is not None
            for module in self.sinks
        )
        if self.taps:
            self._config = vars(next(iter(self.sinks)).config)
            self._take(computes=False)
            # (the model may refuse, or a part of it)
            if not all(map(_runs_ours, self.sinks)):
                self.release()

    def check(self) -> None:
        """Lets a tap's modules go where they have been given another implementation."""
        # (as `_runs_ours`, without looking up an attribute of the config)
        if self.taps and self._config.get("_experts_implementation_internal", NAME) != NAME:
            self.let_go()

    def release(self) -> None:
        """Puts things back, once. Another implementation that was set in the meantime stays."""
        self.taps = False
        self._undo.close()

    def let_go(self) -> None:
        """The tap goes on with hooks."""
        self.release()
        self.instead()

    def _take(self, computes: bool) -> None:
        register()
        before = self.model.get_experts_implementation()
        configs = {id(c): c for m in self.model.modules() if (c := vars(m).get("config"))}
        key = "_experts_implementation"
        names = [(c, getattr(c, key)) for c in configs.values() if hasattr(c, key)]

        def put_back() -> None:
            if any(map(_runs_ours, self.sinks)):
                self.model.set_experts_implementation(before)

        for module, sinks in self.sinks.items():
            stock = stock_of(module)
            norms = sinks.get("norms")
            # (grouping few slots without our kernels would only add steps)
            own = None if norms is not None and computes else stock
            setattr(module, TAKEN, TakenOver(sinks[""], norms, own, computes, names))
            self._undo.callback(delattr, module, TAKEN)
            if not computes and stock is not None and id(module.config) not in _TAPPED:
                _TAPPED[id(module.config)] = stock, self
                self._undo.callback(_TAPPED.pop, id(module.config))
        self._undo.callback(put_back)
        self.model.set_experts_implementation(NAME)


def _runs_ours(module: Experts) -> bool:
    return module.config._experts_implementation == NAME


# --- which models can run it

CAPTURES = ("auto", "dispatch", "tap")
NOT_ON_INTERFACE = "is not on transformers' experts interface"


def mode_of(model: Any, sites: Sequence[Site], capture: str, outputs: bool = False) -> str:
    """The mode of a `capture` option: "auto" is dispatch where the model would run the stock
    grouped_mm on a GPU, or where the experts' `outputs` are to be seen, else tap."""
    if capture not in CAPTURES:
        raise MoeInspectError(f"no capture {capture!r}: choose from {', '.join(CAPTURES)}")
    called = _called(sites)
    if wants_expert_parallel(model) and not all(hasattr(m, "_is_expert_parallel") for m in called):
        raise MoeInspectError(
            "this release of transformers gives experts local ids under expert parallelism: "
            "use 5.24, which gives global ones"
        )
    obstacle = _obstacle(model, sites)
    if outputs and capture == "tap":
        raise MoeInspectError(
            "a tap does not see what the experts return: record output norms with "
            "--capture dispatch"
        )
    if not obstacle and outputs and any(s.adapter is not None for s in sites):
        obstacle = NOT_ON_INTERFACE
    if (capture == "dispatch" or outputs) and obstacle:
        instead = (
            "what its experts return is not seen: trace without --output-norms"
            if outputs
            else "use --capture tap"
        )
        raise MoeInspectError(f"{type(model).__name__} {obstacle}: {instead}")
    if outputs:
        return "dispatch"
    if capture != "auto":
        return capture
    stock = not obstacle and set(model.get_experts_implementation().values()) == {"grouped_mm"}
    return "dispatch" if stock and next(model.parameters()).is_cuda else "tap"


def takes_implementation(model: Any, sites: Sequence[Site]) -> bool:
    """Whether the experts of these sites run what `set_experts_implementation` says."""
    return not _obstacle(model, sites)


def _called(sites: Sequence[Site]) -> list[Any]:
    """The experts modules that are called with a choice."""
    return [s.module for s in sites if s.adapter is None or s.adapter.method]


def _obstacle(model: Any, sites: Sequence[Site]) -> str:
    """Why the model's experts cannot be given an implementation of ours; "" if they can."""
    called = _called(sites)
    if any(type(m).__name__.startswith("FP8") for m in called):
        return "has FP8 experts"  # which have a registry of their own
    if any(is_expert_parallel(m) for m in called):
        return "runs expert-parallel"
    ours = called and all(map(on_interface, called))
    if not ours or not hasattr(model, "set_experts_implementation"):
        return NOT_ON_INTERFACE
    return ""

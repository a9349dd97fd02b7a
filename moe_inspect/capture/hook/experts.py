"""The experts implementation `moe_inspect`: a dispatch kernel groups the slots by expert and
records the router's choice, then grouped matrix products run. So the record is what was executed.
Without a recorder it computes the same and records nothing. On a CPU, where no kernel of ours runs,
few slots go to the implementation that the model would use.

T tokens, K slots, S = T·K, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _batched_linear, _grouped_linear

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Dispatch, Sizes, Tape
from moe_inspect.capture.hook.sink import Sink

NAME = "moe_inspect"
# set on an experts module while it is recorded: (ids, weights) → the tape to record them on, if
# any; the implementation that it would run otherwise, if it is one of the registry; and where the
# sizes of its experts' outputs go: a field of `Sizes` → its sink
SINK, STOCK, SIZES = "_moe_inspect_sink", "_moe_inspect_stock", "_moe_inspect_sizes"

# Up to here copying each slot's expert (transformers' `batched_mm`) is faster than grouping: 64
# slots are 16 tokens of Qwen1.5-MoE, where Hugging Face measured 52 ms against 64, and at 128
# tokens 316 against 76 (docs-benchmarks/experts-backends on the hub)
FEW_SLOTS = 64

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def experts_forward(
    self: Any, hidden_TH: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Replaces transformers' `grouped_mm` and, for few tokens on a GPU, the `batched_mm` that
    `generate` decodes with; the flags on `self` (has_gate, has_bias …) describe the family's
    experts."""
    sink = getattr(self, SINK, None)
    tape = sink(top_k_index, top_k_weights) if sink is not None else None
    on_gpu = kernels.runs_triton(hidden_TH)
    is_few = not on_gpu and top_k_index.numel() <= FEW_SLOTS
    if is_few and not _measured(self) and not torch.compiler.is_compiling():
        # grouping few slots without our kernels would only add steps
        stock = getattr(self, STOCK, None)
        if stock is not None:
            if tape is not None:
                kernels.record(tape, top_k_index, top_k_weights)
            return stock(self, hidden_TH, top_k_index, top_k_weights)
    copied = (
        on_gpu and not torch.is_grad_enabled() and are_few(top_k_index.numel(), self.num_experts)
    )
    return (_copied if copied else _grouped)(self, hidden_TH, top_k_index, top_k_weights, tape)


def are_few(slots: int, experts: int) -> bool:
    """Whether copying the expert of each slot is faster: only while slots need not share experts,
    and never with a gradient, which would keep the copies."""
    return slots <= min(FEW_SLOTS, experts)


def _grouped(
    self: Any, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, tape: Tape | None
) -> Tensor:
    grouped = kernels.dispatch(ids_TK, weights_TK, self.num_experts, tape)
    ends_E, token_S = grouped.offsets[1:], grouped.token
    one_pass = _in_one_pass(hidden_TH)
    # the products leave the rows beyond the last expert uninitialised, forward and backward: where
    # these may be other ranks' slots they are masked (the fused sum does not read them)
    masked = _may_have_sentinels(self) and not one_pass
    beyond_S1 = (
        (torch.arange(len(token_S), device=token_S.device) >= ends_E[-1]).unsqueeze(1)
        if masked
        else None
    )
    expert_S = (
        ids_TK.reshape(-1)[grouped.permutation.long()].clamp(0, self.num_experts - 1)
        if self.has_bias
        else None
    )

    def linear(x_S: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y_S = _grouped_linear(
            x_S,
            weight,
            ends_E,
            bias=bias[expert_S] if bias is not None else None,
            is_transposed=self.is_transposed,
        )
        return y_S if beyond_S1 is None else y_S.masked_fill(beyond_S1, 0.0)

    # (the gradient of index_select is not deterministic on a GPU; that of indexing, as in
    # transformers, is)
    hidden_SH = (
        hidden_TH[token_S.long()] if hidden_TH.requires_grad else hidden_TH.index_select(0, token_S)
    )
    y_SH = _mlp(
        self, hidden_SH if beyond_S1 is None else hidden_SH.masked_fill(beyond_S1, 0.0), linear
    )
    return _combined(self, y_SH, ids_TK, weights_TK, grouped, None, hidden_TH)


def _copied(
    self: Any, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, tape: Tape | None
) -> Tensor:
    """Copies the expert's weights per slot instead of grouping. Recording shares the kernel launch
    of the weighted sum."""
    expert_S = ids_TK.reshape(-1)
    if _may_have_sentinels(self):
        outside_TK = ids_TK >= self.num_experts
        expert_S, weights_TK = (
            expert_S.clamp(0, self.num_experts - 1),
            weights_TK.masked_fill(outside_TK, 0.0),
        )

    def linear(x_S: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _batched_linear(
            x_S,
            weight[expert_S],
            bias[expert_S] if bias is not None else None,
            is_transposed=self.is_transposed,
        )

    y_SH = _mlp(self, hidden_TH.repeat_interleave(ids_TK.shape[1], dim=0), linear)
    return _combined(self, y_SH, ids_TK, weights_TK, None, tape, hidden_TH)


def _combined(
    self: Any,
    y_SH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    grouped: Dispatch | None,
    tape: Tape | None,
    hidden_TH: Tensor,
) -> Tensor:
    """The weighted sum of the experts' outputs. Records their sizes, where that was asked for, and
    on `tape` the choice."""
    sinks, dtype, sizes = _measured(self), hidden_TH.dtype, None
    wanted = {kind: kind in sinks for kind in Sizes._fields}
    if _in_one_pass(hidden_TH):
        sizes = kernels.empty_sizes(ids_TK, **wanted) if sinks else None
        sum_TH = kernels.combine(
            y_SH, ids_TK, weights_TK, grouped, dtype, self.num_experts, tape, sizes
        )
    else:
        if tape is not None:
            kernels.record(tape, ids_TK, weights_TK)
        inverse_S = grouped.inverse if grouped is not None else None
        if sinks:
            sizes = kernels.sizes_torch(y_SH, ids_TK.shape[1], inverse_S, **wanted)
        sum_TH = kernels.combine_torch(y_SH, weights_TK, inverse_S).to(dtype)
    for kind, sink in sinks.items():
        size_TK = getattr(sizes, kind)
        if (size_tape := sink(None, size_TK)) is not None:
            kernels.record(size_tape, None, size_TK)
    return sum_TH


def _measured(self: Any) -> dict[str, Sink]:
    """Where the sizes of this module's outputs go now; empty where nobody wants them."""
    sinks: dict[str, Sink] = getattr(self, SIZES, {})
    return sinks if sinks and any(sink.scope.open for sink in sinks.values()) else {}


def _mlp(self: Any, x_SH: Tensor, linear: Linear) -> Tensor:
    bias = (lambda name: getattr(self, name + "_bias")) if self.has_bias else lambda name: None
    up = "gate_up_proj" if self.has_gate else "up_proj"
    h_SI = linear(x_SH, getattr(self, up), bias(up))
    h_SI = self._apply_gate(h_SI) if self.has_gate else self.act_fn(h_SI)
    y_SH = linear(h_SI, self.down_proj, bias("down_proj"))
    # a flag of newer releases
    return self.post_expert_norm(y_SH) if getattr(self, "has_post_expert_norm", False) else y_SH


def _may_have_sentinels(self: Any) -> bool:
    """Whether ids ≥ E, which mark other ranks' experts, can occur: under expert parallelism, or
    where the release of transformers does not tell."""
    return getattr(self, "_is_expert_parallel", True)


def _in_one_pass(hidden_TH: Tensor) -> bool:
    """Whether the fused kernel computes the weighted sum: it has no gradient, and torch.compile
    fuses these steps itself."""
    return kernels.runs_triton(hidden_TH) and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling()
    )


def stock_of(module: Any) -> Callable[..., Tensor] | None:
    """The implementation that an experts module would run without ours; None for its own loop
    (eager)."""
    stock = ALL_EXPERTS_FUNCTIONS.get(module.config._experts_implementation)
    return None if stock is experts_forward else stock


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)

"""How an adapter's router is given another choice: the call's arguments or its output, rewritten.

T tokens, K slots, E experts. Every function takes (module, args, kwargs, output) of a call, and ids
int [T, K] (-1: to no expert) and gate weights [T, K]; it returns (args, kwargs) of a call that is
read before it runs, else the output. Imports no torch until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_inspect.model.choices.read import GIVEN

if TYPE_CHECKING:
    from torch import Tensor


def llama4(
    router: Any, args: Any, kwargs: Any, output: Any, ids_TK: Tensor, weights_TK: Tensor
) -> Any:
    # the scores are what the experts are called with; of the logits all but the chosen are masked,
    # so that whoever chooses by them sees the same experts
    scores_TE, logits_TE = output
    there = ids_TK >= 0
    chosen_TE = _scattered(logits_TE, ids_TK, there.to(logits_TE.dtype)) > 0
    weights_TK = weights_TK.to(scores_TE.dtype) * there
    return (
        _scattered(scores_TE, ids_TK, weights_TK),
        logits_TE.masked_fill(~chosen_TE, float("-inf")),
    )


def jetmoe(
    router: Any, args: Any, kwargs: Any, output: Any, ids_TK: Tensor, weights_TK: Tensor
) -> Any:
    # what the experts are called with is sorted by expert; whoever reads the choice again takes it
    # from the logits, of which a softmax over the chosen gives the weights
    logits_TE = output[4]
    K = ids_TK.shape[1]
    expert_S, order_S = ids_TK.clamp(min=0).flatten().sort(dim=0, stable=True)
    gates_S = (weights_TK * (ids_TK >= 0)).flatten()[order_S].to(output[2].dtype)
    sizes = expert_S.bincount(minlength=logits_TE.shape[1]).tolist()
    shown_TE = logits_TE.new_full(logits_TE.shape, float("-inf"))
    shown_TE = shown_TE.scatter(1, ids_TK.clamp(min=0), weights_TK.to(logits_TE.dtype).log())
    return order_S, order_S.div(K, rounding_mode="trunc"), gates_S, sizes, shown_TE


def longcat(
    experts: Any, args: Any, kwargs: Any, output: Any, ids_TK: Tensor, weights_TK: Tensor
) -> Any:
    # to no expert is to an identity expert, beyond the routed ones
    nowhere = ids_TK < 0
    new = (
        ids_TK.masked_fill(nowhere, experts.num_routed_experts),
        weights_TK.masked_fill(nowhere, 0),
    )
    return _called_with(args, kwargs, *new)


def aria(
    experts: Any, args: Any, kwargs: Any, output: Any, ids_TK: Tensor, weights_TK: Tensor
) -> Any:
    # they choose by the logits that they are handed, and weigh by a softmax over the chosen: these
    # weights, divided by their sum
    values = [*args, *kwargs.values()]
    weights_TK = weights_TK * (ids_TK >= 0)
    shown_TE = values[1].new_full(values[1].shape, float("-inf"))
    logits_TK = weights_TK.to(shown_TE.dtype).log()
    values[1] = shown_TE.scatter(1, ids_TK.clamp(min=0), logits_TK)
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def nllb(
    experts: Any, args: Any, kwargs: Any, output: Any, ids_TK: Tensor, weights_TK: Tensor
) -> Any:
    # its experts take for ids what they are handed as a mask
    nowhere = ids_TK < 0
    return _called_with(
        args, kwargs, ids_TK.masked_fill(nowhere, 0), weights_TK.masked_fill(nowhere, 0)
    )


def doge(
    mixture: Any, args: Any, kwargs: Any, output: Any, ids_TK: Tensor, weights_TK: Tensor
) -> Any:
    # router and experts run in one function: its output is made again, as it makes it
    import torch

    hidden, logits = (*args, *kwargs.values())[0], output[1].view_as(output[1])
    setattr(logits, GIVEN, (ids_TK, weights_TK))
    T, act = len(ids_TK), mixture.act_fn
    weights_TK = (weights_TK * (ids_TK >= 0)).to(hidden.dtype)
    down_TKH, up_TKH = (
        embed(ids_TK.clamp(min=0)) for embed in (mixture.down_embed, mixture.up_embed)
    )
    values_TK = torch.matmul(down_TKH, hidden.reshape(T, -1, 1)).view(T, -1)
    experts = torch.matmul((act(values_TK) * weights_TK).view(T, 1, -1), up_TKH)
    shared = mixture.down_proj(act(mixture.gate_proj(hidden)) * mixture.up_proj(hidden))
    return shared + experts.view(hidden.shape), logits


def switch(
    experts: Any, args: Any, kwargs: Any, output: Any, ids_TK: Tensor, weights_TK: Tensor
) -> Any:
    from torch.nn.functional import one_hot

    E = (*args, *kwargs.values())[1].shape[-1]
    there = (ids_TK >= 0).unsqueeze(-1)
    return _called_with(args, kwargs, one_hot(ids_TK.clamp(min=0), E) * there, weights_TK)


def _called_with(args: Any, kwargs: Any, chosen: Tensor, weights: Tensor) -> Any:
    """The call with another second and third argument, of the same dtypes."""
    values = [*args, *kwargs.values()]
    values[1:3] = chosen.to(values[1].dtype), weights.to(values[2].dtype)
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _scattered(like_TE: Tensor, ids_TK: Tensor, values_TK: Tensor) -> Tensor:
    """Zeros but for the values at the ids; where a slot goes nowhere its value is 0."""
    return like_TE.new_zeros(like_TE.shape).scatter_add(1, ids_TK.clamp(min=0), values_TK)

"""Reads a router's choice from a call: from its arguments, or by a family's adapter also from its
output.

T tokens, K slots, E experts. A function takes (module, args, kwargs, output) of a call and returns
its choice, None where there is none. Imports no torch until it is used.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    Choice = tuple[Tensor, Tensor]  # expert ids int [T, K], gate weights float [T, K]
    Args: TypeAlias = tuple[Any, ...]  # of a module's call
    Kwargs: TypeAlias = dict[str, Any]

# of Doge's router logits: the choice that its mixture was given instead of its own
GIVEN = "moe_inspect_choice"


def choice_among(args: Args, kwargs: Kwargs) -> Choice | None:
    """The router's choice among the arguments of an experts call, by dtype and shape, never by
    position: the 2-D integer tensor and the floating-point tensor of its shape. None where there is
    none."""
    tensors = [a for a in (*args, *kwargs.values()) if hasattr(a, "dtype") and hasattr(a, "dim")]
    tensors = tensors[1:]  # the first holds the hidden states
    ids = [
        t
        for t in tensors
        if t.dim() == 2 and not t.dtype.is_floating_point and t.element_size() > 1
    ]
    weights = [t for t in tensors if ids and t.dtype.is_floating_point and t.shape == ids[0].shape]
    return (ids[0], weights[0]) if ids and weights else None


def called_with(experts: Module, args: Args, kwargs: Kwargs, output: Any) -> Choice | None:
    """The choice in the arguments of an experts module: for every family without an adapter."""
    return choice_among(args, kwargs)


# --- of adapters


def llama4(router: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # the score multiplies the expert's input; every expert is called, with zeros where it was not
    # chosen
    scores_TE, logits_TE = output
    ids_TK = logits_TE.topk(router.top_k, dim=1).indices  # the router's own call on its own logits
    return ids_TK, scores_TE.gather(1, ids_TK)


def jetmoe(router: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # two routers per block: of the MLP's experts and of the attention's; what they return is sorted
    # by expert, but for the logits
    values_TK, ids_TK = output[4].topk(router.top_k, dim=1)
    return ids_TK, values_TK.softmax(1).type_as(values_TK)


def doge(
    mixture: Any, args: Args, kwargs: Kwargs, output: Any, dropped_E: Tensor | None = None
) -> Choice:
    """With `dropped_E` (bool [E]): the choice among the other experts."""
    if (given := getattr(output[1], GIVEN, None)) is not None:
        return given
    # product keys: an expert is a pair of keys, and the k best pairs are among those of the best
    # keys of each set
    (x_TK, y_TK), (x_ids, y_ids) = output[1].topk(mixture.num_keys, dim=-1)
    scores = (x_TK[:, :, None] + y_TK[:, None]).flatten(1)
    pairs = (x_ids[:, :, None] * mixture.num_keys + y_ids[:, None]).flatten(1)
    if dropped_E is not None:
        scores = scores.masked_fill(dropped_E[pairs], float("-inf"))
    values_TK, at_TK = scores.topk(mixture.top_k, dim=-1)
    weights_TK = values_TK.softmax(-1)
    if mixture.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return pairs.gather(1, at_TK), weights_TK


def zaya(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice | None:
    # a token that skips the experts is handed to expert 0 with weight 0
    choice = choice_among(args, kwargs)
    if choice is None:
        return None
    ids_TK, weights_TK = choice
    return ids_TK.masked_fill(weights_TK == 0, -1), weights_TK


def aria(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # up to transformers 5.17 the experts are handed the logits, and choose by themselves
    logits_TE = [*args, *kwargs.values()][1]
    values_TK, ids_TK = logits_TE.topk(experts.config.moe_topk, dim=1)
    return ids_TK, values_TK.softmax(-1)


def mxfp4(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice | None:
    # what the kernels are handed: the assignments (slot k of token t is number t·K + k) in the
    # order of their experts, and how many each expert has. Within a token experts ascend.
    import torch

    _, routing, *rest = (*args, *kwargs.values())
    if hasattr(routing, "dtype"):  # the call of a rank's experts, under expert parallelism
        return choice_among(args, kwargs)
    place = rest[0].dst_indx.long()  # of each assignment in that order; -1: it goes nowhere
    ids = torch.searchsorted(routing.expt_hist.long().cumsum(0), place, right=True)
    weights = routing.gate_scal[place.clamp(min=0)]
    shape = (-1, routing.n_expts_act)
    return (
        ids.masked_fill(place < 0, -1).view(shape),
        weights.masked_fill(place < 0, 0).view(shape),
    )


def switch(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # one-hot [T, 1, E], all zeros where the token came after the expert's capacity
    _, chosen_T1E, weights_T1 = (*args, *kwargs.values())
    return chosen_T1E.argmax(2).masked_fill(chosen_T1E.sum(2) == 0, -1), weights_T1


def switch_dropped(router: Any, output: Any) -> Tensor:
    # of its choice the output has what capacity left, and all logits: by its own code, roundings
    # and ties included, they give the choice. (In transformers 5.17 the order is another one.)
    E = router.num_experts
    chosen = next(part for part in output if not part.dtype.is_floating_point)
    logits = next(part for part in output if part.dtype.is_floating_point and part.shape[-1] == E)
    scores = logits.softmax(-1, dtype=router.dtype).to(router.input_dtype)
    kept_T = chosen.reshape(-1, E).any(1)
    return scores.reshape(-1, E).argmax(1).masked_fill(kept_T, -1)[:, None]


def nllb(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice | None:
    # Handed a mask of each token's first choice and the gate weights of both, the experts' code
    # takes the mask for ids, a column each: what runs is expert 1 with the weight of the first
    # choice (where capacity left it one), and expert 0 with the weights of all others
    if not _takes_mask_for_ids(type(experts)):
        return None
    _, taken_for_ids, weights = (*args, *kwargs.values())
    weights_TE = weights.new_zeros((len(weights), experts.num_experts))
    weights_TK, ids_TK = weights_TE.scatter_add(1, taken_for_ids, weights).topk(2)
    return ids_TK.masked_fill(weights_TK == 0, -1), weights_TK


@cache
def _takes_mask_for_ids(experts_class: type) -> bool:
    return "one_hot(router_mask" in inspect.getsource(experts_class)

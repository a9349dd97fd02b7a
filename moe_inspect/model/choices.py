"""Reads a router's choice from a call, and gives a call another one: of any experts module, and by
a family's adapter.

T tokens, K slots, E experts. What reads takes (module, args, kwargs, output) of a call and returns
its choice, None where there is none. What replaces takes the call, and ids int [T, K] (-1: to no
expert) and gate weights [T, K]; it returns (args, kwargs) of a call that is read before it runs,
else the output. Imports no torch until it is used.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Called: TypeAlias = Any  # a module of other people's code, or what a call of it returned
Args: TypeAlias = tuple[Any, ...]  # of a module's call
Kwargs: TypeAlias = dict[str, Any]
Choice: TypeAlias = "tuple[Tensor, Tensor]"  # expert ids int [T, K], gate weights float [T, K]

# of Doge's router logits: the choice that its mixture was given instead of its own
GIVEN = "moe_inspect_choice"


class ModuleCall(NamedTuple):
    """Of a module; `output` is None where it is read before it runs."""

    module: Called
    args: Args
    kwargs: Kwargs
    output: Called

    @property
    def values(self) -> list[Called]:
        """The arguments, however they were passed."""
        return [*self.args, *self.kwargs.values()]

    def having(self, values: list[Called]) -> tuple[Args, Kwargs]:
        """The call with these arguments."""
        n = len(self.args)
        return tuple(values[:n]), dict(zip(self.kwargs, values[n:], strict=True))

    def choosing(self, chosen: Tensor, weights: Tensor) -> tuple[Args, Kwargs]:
        """The call with another second and third argument, of the same dtypes."""
        values = self.values
        values[1:3] = chosen.to(values[1].dtype), weights.to(values[2].dtype)
        return self.having(values)


def called_with(experts: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice | None:
    """The router's choice among the arguments of an experts call, for every family without an
    adapter: by dtype and shape, never by position, the 2-D integer tensor and the floating-point
    tensor of its shape. None where there is none."""
    # the first tensor holds the hidden states
    values = (*args, *kwargs.values())
    tensors = [a for a in values if hasattr(a, "dtype") and hasattr(a, "dim")][1:]
    whole = [t for t in tensors if not t.dtype.is_floating_point and t.element_size() > 1]
    ids = [t for t in whole if t.dim() == 2]
    weights = [t for t in tensors if ids and t.dtype.is_floating_point and t.shape == ids[0].shape]
    return (ids[0], weights[0]) if ids and weights else None


# --- of adapters


def llama4(router: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    # the score multiplies the expert's input; every expert is called, with zeros where it was not
    # chosen
    scores_TE, logits_TE = output
    ids_TK = logits_TE.topk(router.top_k, dim=1).indices  # the router's own call on its own logits
    return ids_TK, scores_TE.gather(1, ids_TK)


def jetmoe(router: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    # two routers per block: of the MLP's experts and of the attention's; what they return is sorted
    # by expert, but for the logits
    values_TK, ids_TK = output[4].topk(router.top_k, dim=1)
    return ids_TK, values_TK.softmax(1).type_as(values_TK)


def doge(
    mixture: Called, args: Args, kwargs: Kwargs, output: Called, dropped_E: Tensor | None = None
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


def weighted(experts: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice | None:
    # what skips the experts is handed to one of them with a weight of 0
    if (choice := called_with(experts, args, kwargs, output)) is None:
        return None
    ids_TK, weights_TK = choice
    return ids_TK.masked_fill(weights_TK == 0, -1), weights_TK


def aria(experts: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    # up to transformers 5.17 the experts are handed the logits, and choose by themselves
    logits_TE = [*args, *kwargs.values()][1]
    values_TK, ids_TK = logits_TE.topk(experts.config.moe_topk, dim=1)
    return ids_TK, values_TK.softmax(-1)


def mxfp4(experts: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice | None:
    # what the kernels are handed: the assignments (slot k of token t is number t·K + k) in the
    # order of their experts, and how many each expert has. Within a token experts ascend.
    import torch

    _, routing, *rest = (*args, *kwargs.values())
    if hasattr(routing, "dtype"):  # the call of a rank's experts, under expert parallelism
        return called_with(experts, args, kwargs, output)
    place = rest[0].dst_indx.long()  # of each assignment in that order; -1: it goes nowhere
    ids = torch.searchsorted(routing.expt_hist.long().cumsum(0), place, right=True)
    weights = routing.gate_scal[place.clamp(min=0)]
    shape = (-1, routing.n_expts_act)
    ids, weights = ids.masked_fill(place < 0, -1), weights.masked_fill(place < 0, 0)
    return ids.view(shape), weights.view(shape)


def switch(experts: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    # one-hot [T, 1, E], all zeros where the token came after the expert's capacity
    _, chosen_T1E, weights_T1 = (*args, *kwargs.values())
    return chosen_T1E.argmax(2).masked_fill(chosen_T1E.sum(2) == 0, -1), weights_T1


def switch_dropped(router: Called, output: Called) -> Tensor:
    # of its choice the output has what capacity left, and all logits: by its own code, roundings
    # and ties included, they give the choice. (In transformers 5.17 the order is another one,
    # without logits, and nothing is dropped.)
    E = router.num_experts
    chosen = next(part for part in output if not part.dtype.is_floating_point)
    logits = [part for part in output if part.dtype.is_floating_point and part.shape[-1] == E]
    kept_T = chosen.reshape(-1, E).any(1)
    if not logits:
        return kept_T.long().fill_(-1)[:, None]
    scores = logits[0].softmax(-1, dtype=router.dtype).to(router.input_dtype)
    return scores.reshape(-1, E).argmax(1).masked_fill(kept_T, -1)[:, None]


def nllb(experts: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice | None:
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


# --- the call of an adapter with another choice


def replace_llama4(call: ModuleCall, ids_TK: Tensor, weights_TK: Tensor) -> Called:
    # the scores are what the experts are called with; of the logits all but the chosen are masked,
    # so that whoever chooses by them sees the same experts
    scores_TE, logits_TE = call.output
    there = ids_TK >= 0
    chosen_TE = _scattered(logits_TE, ids_TK, there.to(logits_TE.dtype)) > 0
    weights_TK = weights_TK.to(scores_TE.dtype) * there
    shown_TE = logits_TE.masked_fill(~chosen_TE, float("-inf"))
    return _scattered(scores_TE, ids_TK, weights_TK), shown_TE


def replace_jetmoe(call: ModuleCall, ids_TK: Tensor, weights_TK: Tensor) -> Called:
    # what the experts are called with is sorted by expert; whoever reads the choice again takes it
    # from the logits, of which a softmax over the chosen gives the weights
    logits_TE, K = call.output[4], ids_TK.shape[1]
    expert_S, order_S = ids_TK.clamp(min=0).flatten().sort(dim=0, stable=True)
    gates_S = (weights_TK * (ids_TK >= 0)).flatten()[order_S].to(call.output[2].dtype)
    sizes = expert_S.bincount(minlength=logits_TE.shape[1]).tolist()
    shown_TE = logits_TE.new_full(logits_TE.shape, float("-inf"))
    shown_TE = shown_TE.scatter(1, ids_TK.clamp(min=0), weights_TK.to(logits_TE.dtype).log())
    return order_S, order_S.div(K, rounding_mode="trunc"), gates_S, sizes, shown_TE


def replace_aria(call: ModuleCall, ids_TK: Tensor, weights_TK: Tensor) -> Called:
    # they choose by the logits that they are handed, and weigh by a softmax over the chosen: these
    # weights, divided by their sum
    values = call.values
    weights_TK = weights_TK * (ids_TK >= 0)
    shown_TE = values[1].new_full(values[1].shape, float("-inf"))
    logits_TK = weights_TK.to(shown_TE.dtype).log()
    values[1] = shown_TE.scatter(1, ids_TK.clamp(min=0), logits_TK)
    return call.having(values)


def replace_nllb(call: ModuleCall, ids_TK: Tensor, weights_TK: Tensor) -> Called:
    # its experts take for ids what they are handed as a mask
    nowhere = ids_TK < 0
    return call.choosing(ids_TK.masked_fill(nowhere, 0), weights_TK.masked_fill(nowhere, 0))


def replace_doge(call: ModuleCall, ids_TK: Tensor, weights_TK: Tensor) -> Called:
    # router and experts run in one function: its output is made again, as it makes it
    import torch

    mixture, hidden = call.module, call.values[0]
    logits = call.output[1].view_as(call.output[1])
    setattr(logits, GIVEN, (ids_TK, weights_TK))
    T, act = len(ids_TK), mixture.act_fn
    weights_TK = (weights_TK * (ids_TK >= 0)).to(hidden.dtype)
    tables = mixture.down_embed, mixture.up_embed
    down_TKH, up_TKH = (table(ids_TK.clamp(min=0)) for table in tables)
    values_TK = torch.matmul(down_TKH, hidden.reshape(T, -1, 1)).view(T, -1)
    experts = torch.matmul((act(values_TK) * weights_TK).view(T, 1, -1), up_TKH)
    shared = mixture.down_proj(act(mixture.gate_proj(hidden)) * mixture.up_proj(hidden))
    return shared + experts.view(hidden.shape), logits


def replace_switch(call: ModuleCall, ids_TK: Tensor, weights_TK: Tensor) -> Called:
    from torch.nn.functional import one_hot

    E = call.values[1].shape[-1]
    there = (ids_TK >= 0).unsqueeze(-1)
    return call.choosing(one_hot(ids_TK.clamp(min=0), E) * there, weights_TK)


def _scattered(like_TE: Tensor, ids_TK: Tensor, values_TK: Tensor) -> Tensor:
    """Zeros but for the values at the ids; where a slot goes nowhere its value is 0."""
    return like_TE.new_zeros(like_TE.shape).scatter_add(1, ids_TK.clamp(min=0), values_TK)

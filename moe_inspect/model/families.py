"""What differs between families of Mixture-of-Experts models, as data.

`FAMILIES` has an entry for each family that needs one. Most need none: on transformers' experts
interface, or with the same call, a router's choice is an argument of its experts module, and the
config states sizes under names that are listed here. To support a family that differs, add an
entry (or a name to a list of names); nothing else is edited.

T tokens, K slots, E experts. Imports no torch: configs are read without it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from moe_inspect.model import replaced

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    Choice = tuple[Tensor, Tensor]  # expert ids int [T, K], gate weights float [T, K]
    Args: TypeAlias = tuple[Any, ...]  # of a module's call
    Kwargs: TypeAlias = dict[str, Any]


# --- names that configs (and modules) give to a size, in order of precedence

LAYERS = ("num_hidden_layers", "n_layers", "n_layer")
EXPERTS = (
    "n_routed_experts",
    "num_local_experts",
    "num_experts",
    "moe_num_experts",
    "num_routed_experts",
)
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)
SHARED_EXPERTS = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)
HIDDEN = ("hidden_size", "d_model")
EXPERT_WIDTH = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "d_ff",
    "intermediate_size",
)
SCORING = ("scoring_func", "score_func")
# parts of a config that describe the language model, from the outside in; the last is DBRX's
LANGUAGE_MODEL = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")

# --- keys that state which blocks have experts

Rule = Callable[[int], bool]


def _frequency(config: dict[str, Any], value: Any) -> Rule:
    """DeepSeek: every n-th block; MiMo, Megatron: a 0 or 1 for each."""
    if isinstance(value, list):
        return lambda i: bool(value[i])
    return lambda i: i % int(value) == 0


def _listed(value: Any) -> set[int]:
    """[3, 4] or "3,4"."""
    return {int(part) for part in (value.split(",") if isinstance(value, str) else value)}


def _mixed(config: dict[str, Any], value: Any) -> Rule:
    step = int(config.get("decoder_sparse_step") or 1)
    return lambda i: i not in _listed(value) and (i + 1) % step == 0


def _period(config: dict[str, Any], value: Any) -> Rule:
    return lambda i: i % int(value) == int(config.get("expert_layer_offset") or 0)


# key → which blocks have a router by it; a block must satisfy every key that the config states
ROUTING_BLOCKS: dict[str, Callable[[dict[str, Any], Any], Rule]] = {
    "mlp_layer_types": lambda c, v: lambda i: v[i] not in ("dense", "mlp"),
    "mlp_only_layers": _mixed,
    "decoder_sparse_step": lambda c, v: lambda i: (i + 1) % int(v) == 0,
    "first_k_dense_replace": lambda c, v: lambda i: i >= int(v),
    "moe_layer_freq": _frequency,
    "num_dense_layers": lambda c, v: lambda i: i >= int(v),
    "expert_layer_period": _period,
    "interleave_moe_layer_step": lambda c, v: (
        (lambda i: (i + 1) % int(v) == 0) if not c.get("moe_layers") else lambda i: True
    ),
    "moe_layers": lambda c, v: (lambda i: i in _listed(v)) if v else lambda i: True,
    "moe_layers_enum": lambda c, v: lambda i: i in _listed(v),
    "moe_layer_start_index": lambda c, v: lambda i: i >= int(v),
    "moe_layer_end_index": lambda c, v: lambda i: int(v) < 0 or i <= int(v),
    "moe_layer_interval": lambda c, v: lambda i: (i + 1) % int(v) == 0,
    "hybrid_override_pattern": lambda c, v: lambda i: v[i] == "E",
    "layers_block_type": lambda c, v: lambda i: v[i] == "moe" if "moe" in v else True,
}


# --- modules

# modules of a multimodal model that see no text tokens
TOWER = re.compile(r"(?:^|[._])(?:vision|visual|audio|image)(?:[._]|$)")
# modules that connect them to the language model
CONNECTOR = re.compile(
    r"(?:^|\.)(?:multi_modal_projector|resampler_model|view_separator|perception_emb_norm)(?:\.|$)"
)
LAYER = re.compile(r"(?:layers|blocks|h|block|layer)\.(\d+)\.")
ROUTER_CLASS = re.compile(r"(Router|Gate|Gating)$")
STACKS = {"encoder", "decoder"}


@dataclass(frozen=True)
class Adapter:
    """How to read a router's choice where it is no argument of an experts call.

    choice        (module, args, kwargs, output) of a call → its choice; None where there is none
    at_call       the module is the experts module, and is read before it runs: no output yet
    method        the method whose arguments hold the choice, where the module is not called
    logits_index  where in the output the router logits are, if the module is a router
    block_logits  where in the output of the experts' block they are, if no router is called
    experts       E, where the module does not state it
    top_k         k, where neither module nor config states it
    alone         the tokens of a batch change each other's routing: sequences are fed one by one
    applies       to which modules of the class
    parameters    names of the experts' parameters, where they have no module of their own
    note          a caveat, which goes into the trace's manifest
    replace       gives the call another choice (`model/replaced.py`), where that is not done by
                  replacing the tensors which `choice` returned
    fixed         why it cannot be given another choice, and what to do
    """

    choice: Callable[[Any, Args, Kwargs, Any], Choice | None]
    at_call: bool = False
    method: str = ""
    logits_index: int | None = None
    block_logits: int | None = None
    experts: Callable[[Any], int] | None = None
    top_k: int | None = None
    alone: bool = False
    applies: Callable[[Any], bool] = lambda module: True
    parameters: tuple[str, ...] = ()
    note: str = ""
    replace: Callable[..., Any] | None = None
    fixed: str = ""


@dataclass(frozen=True)
class Family:
    """What a family does differently.

    adapters    class of a module → how the router's choice is read there
    not_routed  classes named *Experts that are not called with a router's choice
    gated       an expert has a gate projection: three matrices, without it two
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    not_routed: tuple[str, ...] = ()
    gated: bool = True


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


# --- the adapters' functions


def _llama4(router: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # the score multiplies the expert's input; every expert is called, with zeros where it was not
    # chosen
    scores_TE, logits_TE = output
    ids_TK = logits_TE.topk(router.top_k, dim=1).indices  # the router's own call on its own logits
    return ids_TK, scores_TE.gather(1, ids_TK)


def _jetmoe(router: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # two routers per block: of the MLP's experts and of the attention's; what they return is sorted
    # by expert, but for the logits
    values_TK, ids_TK = output[4].topk(router.top_k, dim=1)
    return ids_TK, values_TK.softmax(1).type_as(values_TK)


def _doge(mixture: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # product keys: an expert is a pair of keys, and the k best pairs are among those of the best
    # keys of each set
    (x_TK, y_TK), (x_ids, y_ids) = output[1].topk(mixture.num_keys, dim=-1)
    scores = (x_TK[:, :, None] + y_TK[:, None]).flatten(1)
    pairs = (x_ids[:, :, None] * mixture.num_keys + y_ids[:, None]).flatten(1)
    values_TK, at_TK = scores.topk(mixture.top_k, dim=-1)
    weights_TK = values_TK.softmax(-1)
    if mixture.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return pairs.gather(1, at_TK), weights_TK


def _zaya(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice | None:
    # a token that skips the experts is handed to expert 0 with weight 0
    choice = choice_among(args, kwargs)
    if choice is None:
        return None
    ids_TK, weights_TK = choice
    return ids_TK.masked_fill(weights_TK == 0, -1), weights_TK


def _aria(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # up to transformers 5.17 the experts are handed the logits, and choose by themselves
    logits_TE = [*args, *kwargs.values()][1]
    values_TK, ids_TK = logits_TE.topk(experts.config.moe_topk, dim=1)
    return ids_TK, values_TK.softmax(-1)


def _mxfp4(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice | None:
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


def _switch(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice:
    # one-hot [T, 1, E], all zeros where the token came after the expert's capacity
    _, chosen_T1E, weights_T1 = (*args, *kwargs.values())
    return chosen_T1E.argmax(2).masked_fill(chosen_T1E.sum(2) == 0, -1), weights_T1


def _nllb(experts: Any, args: Args, kwargs: Kwargs, output: Any) -> Choice | None:
    # Handed a mask of each token's first choice and the gate weights of both, the experts' code
    # takes the mask for ids: what runs is expert 1 with the weight of the first choice (where
    # capacity left it one), and expert 0 with the weights of all others
    import torch

    if not _takes_mask_for_ids(type(experts)):
        return None
    _, mask_TE, weights_TE = (*args, *kwargs.values())
    first_T, others_T = (weights_TE * mask_TE).sum(1), (weights_TE * (1 - mask_TE)).sum(1)
    weights_TK = torch.stack([first_T, others_T], 1)
    ids_TK = torch.tensor([1, 0], device=weights_TK.device).expand(len(weights_TK), 2)
    return ids_TK.masked_fill(weights_TK == 0, -1), weights_TK


@cache
def _takes_mask_for_ids(experts_class: type) -> bool:
    return "one_hot(router_mask" in inspect.getsource(experts_class)


_NLLB_RUNS = (
    "this release of transformers runs experts 1 and 0 whatever NLLB's routers choose (its experts "
    "take the mask of the first choices for ids)"
)
_NLLB_NOTE = f"{_NLLB_RUNS}: the trace says what ran"

# --- the families, by transformers' model_type

FAMILIES: dict[str, Family] = {
    "aria_text": Family(
        {
            "AriaExperts": Adapter(
                _aria,
                at_call=True,
                experts=lambda m: m.config.moe_num_experts,
                applies=lambda m: not hasattr(m, "gate_up_proj"),
            )
        }
    ),
    "doge": Family(
        {
            "DogeCDMoE": Adapter(
                _doge,
                alone=True,
                parameters=("down_embed", "up_embed"),
                fixed="DogeCDMoE chooses experts and runs them in one function, which takes no "
                "other choice",
            )
        }
    ),
    "gpt_oss": Family(
        # in MXFP4; up to transformers 5.17 the module is called with what the method takes
        {
            "Mxfp4GptOssExperts": Adapter(
                _mxfp4,
                at_call=True,
                method="forward_routed",
                block_logits=1,
                fixed="its fused MXFP4 kernels take no other choice than their router's: load the "
                "model with Mxfp4Config(dequantize=True)",
            )
        }
    ),
    "inkling": Family(not_routed=("InklingSharedExperts",)),
    "jetmoe": Family(
        {"JetMoeTopKGating": Adapter(_jetmoe, logits_index=4, replace=replaced.jetmoe)},
        not_routed=("JetMoeParallelExperts",),
    ),
    "llama4": Family(
        {"Llama4Router": Adapter(_llama4, logits_index=1, replace=replaced.llama4)},
        not_routed=("Llama4TextExperts",),
    ),
    "longcat_flash": Family(
        # ids beyond the routed experts are identity experts': they compute nothing
        {
            "LongcatFlashExperts": Adapter(
                called_with,
                at_call=True,
                experts=lambda m: m.num_routed_experts,
                replace=replaced.longcat,
            )
        },
    ),
    "nemotron_h": Family(gated=False),
    "nllb-moe": Family(
        {
            "NllbMoeExperts": Adapter(
                _nllb,
                at_call=True,
                # its routers take the padding mask of some attentions the wrong way round, and
                # count capacity over a batch
                alone=True,
                top_k=2,
                note=_NLLB_NOTE,
                fixed="NLLB's experts take no other choice: " + _NLLB_RUNS,
            )
        },
        gated=False,
    ),
    "switch_transformers": Family(
        {
            "SwitchTransformersExperts": Adapter(
                _switch, at_call=True, top_k=1, replace=replaced.switch
            )
        },
        gated=False,
    ),
    "zaya": Family({"ZayaExperts": Adapter(_zaya, at_call=True)}),
}


ADAPTERS = {name: a for family in FAMILIES.values() for name, a in family.adapters.items()}
NOT_ROUTED = {name for family in FAMILIES.values() for name in family.not_routed}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a language model's config, by its model_type."""
    return FAMILIES.get(str(config.get("model_type")), Family())


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model, flat: the parts that describe it are merged into it, and
    the number of its blocks is at `LAYERS[0]`."""
    inner = config
    for key in LANGUAGE_MODEL:
        inner = {**inner, **inner[key]} if isinstance(inner.get(key), dict) else inner
    if isinstance(kinds := inner.get("layers_block_type"), list):  # Nemotron-H states no number
        inner = {**inner, LAYERS[0]: len(kinds)}
    if inner.get("num_layers") is not None:
        # LongCat: what it calls hidden layers are attentions, two per block
        inner = {**inner, LAYERS[0]: inner["num_layers"]}
    return inner

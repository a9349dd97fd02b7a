"""What differs between families of Mixture-of-Experts models, as data.

`ADAPTERS` has an entry for each family that needs one. Most need none: on transformers' experts
interface, or with the same call, a router's choice is an argument of its experts module, and the
config states sizes under names that are listed here. To support a family that differs, add an
entry (or a name to a list of names); nothing else is edited.

T tokens, K slots, E experts. Imports no torch: configs are read without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from moe_inspect.model import choices
from moe_inspect.model.choices import Args, Called, Choice, Kwargs, ModuleCall

if TYPE_CHECKING:
    from torch import Tensor


Config: TypeAlias = dict[str, Called]  # a config.json, or a part of one

# --- names that configs (and modules) give to a size, in order of precedence

LAYERS = ("num_hidden_layers", "n_layers", "n_layer")
EXPERTS = (
    *("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "num_routed_experts",
)
TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k"),
    *("top_k_experts", "experts_per_token"),
)
SHARED_EXPERTS = (
    *("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "num_shared_expert",
)
HIDDEN = ("hidden_size", "d_model")
EXPERT_WIDTH = (
    *("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "d_ff"),
    "intermediate_size",
)
SCORING = ("scoring_func", "score_func")
# parts of a config that describe the language model, from the outside in; the last is DBRX's
LANGUAGE_MODEL = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")

# --- keys that state which blocks have experts


def _listed(value: Called) -> set[int]:
    """[3, 4] or "3,4"."""
    return {int(part) for part in (value.split(",") if isinstance(value, str) else value)}


# key → whether block i has a router, by the config and the key's value; a block must satisfy every
# key that the config states
ROUTING_BLOCKS: dict[str, Callable[[Config, Called, int], bool]] = {
    "mlp_layer_types": lambda c, v, i: v[i] not in ("dense", "mlp"),
    "mlp_only_layers": lambda c, v, i: (
        i not in _listed(v) and (i + 1) % int(c.get("decoder_sparse_step") or 1) == 0
    ),
    "decoder_sparse_step": lambda c, v, i: (i + 1) % int(v) == 0,
    "first_k_dense_replace": lambda c, v, i: i >= int(v),
    # DeepSeek: every n-th block; MiMo, Megatron: a 0 or 1 for each
    "moe_layer_freq": lambda c, v, i: bool(v[i]) if isinstance(v, list) else i % int(v) == 0,
    "num_dense_layers": lambda c, v, i: i >= int(v),
    "expert_layer_period": lambda c, v, i: i % int(v) == int(c.get("expert_layer_offset") or 0),
    "interleave_moe_layer_step": lambda c, v, i: bool(c.get("moe_layers")) or (i + 1) % int(v) == 0,
    "moe_layers": lambda c, v, i: not v or i in _listed(v),
    "moe_layers_enum": lambda c, v, i: i in _listed(v),
    "moe_layer_start_index": lambda c, v, i: i >= int(v),
    "moe_layer_end_index": lambda c, v, i: int(v) < 0 or i <= int(v),
    "moe_layer_interval": lambda c, v, i: (i + 1) % int(v) == 0,
    "hybrid_override_pattern": lambda c, v, i: v[i] == "E",
    "layers_block_type": lambda c, v, i: v[i] == "moe" if "moe" in v else True,
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
    replace       gives the call another choice, where that is not done by replacing the tensors
                  which `choice` returned
    among         (module, args, kwargs, output, dropped_E) → the choice among the other experts,
                  where the router cannot be made to choose among them by masking its logits
    drops         whether what goes to no expert was dropped by the capacity of one, by the router
    dropped       (router, output) of a call of the router beside → the expert of each choice that
                  its capacity dropped, int [T, K], -1 elsewhere; None: its output does not tell
    by_logits     whether the greatest logits of its router decide which experts run
    fixed         why it cannot be given another choice, and what to do
    """

    choice: Callable[[Called, Args, Kwargs, Called], Choice | None]
    at_call: bool = False
    method: str = ""
    logits_index: int | None = None
    block_logits: int | None = None
    experts: Callable[[Called], int] | None = None
    top_k: int | None = None
    alone: bool = False
    applies: Callable[[Called], bool] = lambda module: True
    parameters: tuple[str, ...] = ()
    note: str = ""
    replace: Callable[[ModuleCall, Tensor, Tensor], Called] | None = None
    among: Callable[..., Choice] | None = None
    drops: Callable[[Called], bool] = lambda router: False
    dropped: Callable[[Called, Called], Tensor] | None = None
    by_logits: bool = True
    fixed: str = ""


# --- the families

# class of a module → how the router's choice is read there
ADAPTERS: dict[str, Adapter] = {
    "AriaExperts": Adapter(
        choices.aria,
        at_call=True,
        experts=lambda m: m.config.moe_num_experts,
        applies=lambda m: not hasattr(m, "gate_up_proj"),
        replace=choices.replace_aria,
    ),
    "DogeCDMoE": Adapter(
        choices.doge,
        alone=True,
        parameters=("down_embed", "up_embed"),
        replace=choices.replace_doge,
        among=choices.doge,
    ),
    "JetMoeTopKGating": Adapter(choices.jetmoe, logits_index=4, replace=choices.replace_jetmoe),
    "Llama4Router": Adapter(choices.llama4, logits_index=1, replace=choices.replace_llama4),
    # Its identity experts compute nothing. Up to transformers 5.24 they have the ids beyond those
    # of the routed experts; since 5.25 a routed expert is called for them with a weight of 0.
    "LongcatFlashExperts": Adapter(
        choices.weighted,
        at_call=True,
        experts=lambda m: len(m.down_proj),
        replace=choices.replace_nllb,
    ),
    # up to transformers 5.17 the module is called with what the method takes
    "Mxfp4GptOssExperts": Adapter(
        choices.mxfp4,
        at_call=True,
        method="forward_routed",
        block_logits=1,
        fixed="its fused MXFP4 kernels take no other choice than their router's: load the model "
        "with Mxfp4Config(dequantize=True)",
    ),
    "NllbMoeExperts": Adapter(
        choices.nllb,
        at_call=True,
        # its routers take the padding mask of some attentions the wrong way round, and count
        # capacity over a batch
        alone=True,
        top_k=2,
        note="this release of transformers runs experts 1 and 0 whatever NLLB's routers choose "
        "(its experts take the mask of the first choices for ids): the trace says what ran",
        replace=choices.replace_nllb,
        # by the policy "random" a second expert may be left out
        drops=lambda router: router.second_expert_policy != "random",
        by_logits=False,
    ),
    "SwitchTransformersExperts": Adapter(
        choices.switch,
        at_call=True,
        top_k=1,
        replace=choices.replace_switch,
        drops=lambda router: True,
        dropped=choices.switch_dropped,
    ),
    "ZayaExperts": Adapter(choices.weighted, at_call=True),
}
# class of what is called with a router's choice; llm-compressor's has a matrix per expert
CALLED_CLASS = re.compile(r"Experts(2D)?$")
# those of these names that are not
NOT_ROUTED = {"InklingSharedExperts", "JetMoeParallelExperts", "Llama4TextExperts"}
# class of a router → how many logits it has behind those of its routed experts (of identity
# experts, of shared ones, of skipping them)
BEYOND: dict[str, Callable[[Called], int]] = {
    "InklingTopkRouter": lambda m: m.n_shared_experts,
    "LongcatFlashTopkRouter": lambda m: m.n_routed_experts - m.num_experts,
    "ZayaRouter": lambda m: 1,
}
# model_type of those whose experts have no gate projection: two matrices, with it three
UNGATED = ("nemotron_h", "nllb-moe", "switch_transformers")


def stated_size(owners: Iterable[object], names: Iterable[str]) -> int | None:
    """The first of these sizes that a module or a config states."""
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def language_config(config: Config) -> Config:
    """The config of the language model, flat, with the number of its blocks at `LAYERS[0]`."""
    inner = config
    for key in LANGUAGE_MODEL:
        inner = {**inner, **inner[key]} if isinstance(inner.get(key), dict) else inner
    # Nemotron-H states no number; what LongCat calls hidden layers are attentions, two per block
    kinds, blocks = inner.get("layers_block_type"), inner.get("num_layers")
    blocks = len(kinds) if blocks is None and isinstance(kinds, list) else blocks
    return inner if blocks is None else {**inner, LAYERS[0]: blocks}

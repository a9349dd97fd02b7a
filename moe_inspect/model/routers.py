"""Finds every router of a model: the seam where its choice is handed over.

A family on transformers' experts interface, or with the same call, needs no entry here: its experts
module is called with the router's choice. `ADAPTERS` holds the few that have no such call, or mean
something else by it: a class → what its router chose. T tokens, K slots, E experts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moe_inspect.errors import MoeInspectError

Choice = tuple[torch.Tensor, torch.Tensor]  # expert ids int [T, K], gate weights float [T, K]


@dataclass(frozen=True)
class Adapter:
    """`choice`: what the router chose, of (module, arguments, output); with `at_call` the module is
    the experts', and there is no output yet. `logits_index`: where in the output the router logits
    are, if it is a router. `experts`: E, where the module does not say. `alone`: the tokens of a
    batch change each other's routing, so that sequences are fed one at a time. `applies`: to which
    modules of the class."""

    choice: Callable[[torch.nn.Module, list[Any], Any], Choice | None]
    at_call: bool = False
    logits_index: int | None = None
    experts: Callable[[Any], int] | None = None
    alone: bool = False
    applies: Callable[[Any], bool] = lambda module: True
    parameters: tuple[
        str, ...
    ] = ()  # of the module: the experts', where they are no module of their own
    top_k: int | None = None  # where neither the module nor the config says
    note: str = ""  # what a reader of the trace must know


@dataclass(frozen=True)
class Site:
    """Where one router's choice can be seen. `adapter` is None where the choice is an argument of
    `module`'s call, else it reads `module`'s output. `experts`: E. `logits_module`: the module
    whose output holds the router logits, if known, at `logits_index`, or (None) wherever E values a
    row stand."""

    module: torch.nn.Module
    path: str
    layer: int
    experts: int
    scoring: str
    shared_experts: int
    adapter: Adapter | None = None
    logits_module: torch.nn.Module | None = None
    logits_index: int | None = None
    stack: str = ""  # "encoder" or "decoder" of a model that has both

    @property
    def stack_path(self) -> str:
        """The module whose calls feed this router its tokens: the model itself ("") where that is
        not two stacks."""
        parts = self.path.split(".")
        return ".".join(parts[: parts.index(self.stack) + 1]) if self.stack else ""


def _llama4(router: Any, arguments: list[Any], output: Any) -> Choice:
    # the score multiplies the expert's input; every expert is called, with zeros where it was not
    # chosen
    scores_TE, logits_TE = output
    ids_TK = logits_TE.topk(router.top_k, dim=1).indices  # the router's own call on its own logits
    return ids_TK, scores_TE.gather(1, ids_TK)


def _jetmoe(router: Any, arguments: list[Any], output: Any) -> Choice:
    # two a block: of the MLP's experts, and of the attention's; what it returns is sorted by
    # expert, but for the logits
    values_TK, ids_TK = output[4].topk(router.top_k, dim=1)
    return ids_TK, values_TK.softmax(1).type_as(values_TK)


def _doge(mixture: Any, arguments: list[Any], output: Any) -> Choice:
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


def _zaya(experts: Any, arguments: list[Any], output: Any) -> Choice | None:
    # a token that skips the experts is handed to expert 0 with weight 0
    choice = choice_among(arguments)
    if choice is None:
        return None
    ids_TK, weights_TK = choice
    return ids_TK.masked_fill(weights_TK == 0, -1), weights_TK


def _aria(experts: Any, arguments: list[Any], output: Any) -> Choice:
    # up to transformers 5.17 it is handed the logits, and chooses by itself
    values_TK, ids_TK = arguments[1].topk(experts.config.moe_topk, dim=1)
    return ids_TK, values_TK.softmax(-1)


def _switch(experts: Any, arguments: list[Any], output: Any) -> Choice:
    # one-hot [T, 1, E], all zeros where the token came after the expert's capacity
    _, chosen_T1E, weights_T1 = arguments
    return chosen_T1E.argmax(2).masked_fill(chosen_T1E.sum(2) == 0, -1), weights_T1


def _nllb(experts: Any, arguments: list[Any], output: Any) -> Choice | None:
    # Handed a mask of each token's first choice and the gate weights of both, the experts' code
    # takes the mask for ids: what runs is expert 1 with the weight of the first choice (where
    # capacity left it one), and expert 0 with the weights of all others
    if not _takes_mask_for_ids(type(experts)):
        return None
    _, mask_TE, weights_TE = arguments
    first_T, others_T = (weights_TE * mask_TE).sum(1), (weights_TE * (1 - mask_TE)).sum(1)
    weights_TK = torch.stack([first_T, others_T], 1)
    ids_TK = torch.tensor([1, 0], device=weights_TK.device).expand(len(weights_TK), 2)
    return ids_TK.masked_fill(weights_TK == 0, -1), weights_TK


@cache
def _takes_mask_for_ids(kind: type) -> bool:
    return "one_hot(router_mask" in inspect.getsource(kind)


def called_with(experts: Any, arguments: list[Any], output: Any) -> Choice | None:
    """What an experts module is called with; what is recorded where nothing else is said here."""
    return choice_among(arguments)


ADAPTERS = {
    "Llama4Router": Adapter(_llama4, logits_index=1),
    "JetMoeTopKGating": Adapter(_jetmoe, logits_index=4),
    "DogeCDMoE": Adapter(_doge, alone=True, parameters=("down_embed", "up_embed")),
    "ZayaExperts": Adapter(_zaya, at_call=True),
    # ids beyond the routed experts are identity experts': they compute nothing
    "LongcatFlashExperts": Adapter(
        called_with, at_call=True, experts=lambda m: m.num_routed_experts
    ),
    "AriaExperts": Adapter(
        _aria,
        at_call=True,
        experts=lambda m: m.config.moe_num_experts,
        applies=lambda m: not hasattr(m, "gate_up_proj"),
    ),
    "SwitchTransformersExperts": Adapter(_switch, at_call=True, top_k=1),
    "NllbMoeExperts": Adapter(
        _nllb,
        at_call=True,
        # its routers take the padding mask of some attentions the wrong way round, and count
        # capacity over a batch
        alone=True,
        top_k=2,
        note="this release of transformers runs experts 1 and 0 whatever NLLB's routers choose "
        "(its experts take the mask of the "
        "first choices for ids): the trace says what ran",
    ),
}
TOWER = re.compile(
    r"(?:^|[._])(?:vision|visual|audio|image)(?:[._]|$)"
)  # of a multimodal model: sees no token
STACKS = {"encoder", "decoder"}
NOT_ROUTED = {
    "Llama4TextExperts",
    "JetMoeParallelExperts",
    "InklingSharedExperts",
}  # *Experts that no choice is handed to


def find_routers(model: Any) -> list[Site]:
    """The routers of `model` in execution order of their layers. MoeInspectError where it has
    none."""
    declared = _declared_logits(model)
    names = {
        part
        for path, _ in model.named_modules()
        if not TOWER.search(path)
        for part in path.split(".")
    }
    stacks = STACKS & names if names >= STACKS else set()
    sites = []
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind.startswith("Mxfp4"):  # neither the router nor the experts are called
            raise MoeInspectError(
                f"{path} routes within a fused kernel: load the model with "
                "Mxfp4Config(dequantize=True)"
            )
        adapter = ADAPTERS.get(kind)
        if adapter is not None and not adapter.applies(module):
            adapter = None
        if TOWER.search(path) or (
            adapter is None and (not kind.endswith("Experts") or kind in NOT_ROUTED)
        ):
            continue
        config = getattr(module, "config", None) or model.config.get_text_config()
        if adapter is None or adapter.at_call:
            router = _router_beside(model, path)
            index = declared.get(type(router))
        else:
            router, index = module, adapter.logits_index
        experts = (
            adapter.experts(module)
            if adapter is not None and adapter.experts is not None
            else experts_of(module)
        )
        facts = (
            experts,
            scoring_of(config, router or model.get_submodule(path.rpartition(".")[0])),
            shared_experts_of(config, model, path),
        )
        shown = router if adapter is None or adapter.at_call or index is not None else None
        stack = next((part for part in path.split(".") if part in stacks), "")
        sites.append(Site(module, path, layer_of(path), *facts, adapter, shown, index, stack))
    if not sites:
        raise MoeInspectError(
            f"{type(model).__name__} is a dense model: it has no router, so there is nothing to "
            "trace"
        )
    # the encoder runs before the decoder, and a block's attention before its MLP
    return sorted(sites, key=lambda s: (s.stack == "decoder", s.layer, "attention" not in s.path))


def layer_of(path: str) -> int:
    """The block index in a module path: "model.layers.3.mlp.experts" → 3."""
    found = re.search(r"(?:layers|blocks|h|block|layer)\.(\d+)\.", path + ".")
    if found is None:
        raise MoeInspectError(
            f"no layer number in the module path {path}: this model's layout is not known"
        )
    return int(found.group(1))


def experts_of(module: torch.nn.Module) -> int:
    """E of a module: never the largest id seen, or dead experts would vanish. Under expert
    parallelism the module holds some of them, and the config tells how many there are."""
    if is_expert_parallel(module):
        config = module.config
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
        raise MoeInspectError(
            f"{type(module).__name__} is expert-parallel, and its config does not say how many "
            "experts there are"
        )
    for name in ("total_experts", "num_experts", "n_routed_experts"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    stacked = next((p for p in module.parameters() if p.dim() == 3), None)
    if stacked is None:
        raise MoeInspectError(f"cannot tell how many experts {type(module).__name__} has")
    return int(stacked.shape[0])


TOP_K = (
    "top_k",
    "moe_top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)


def top_k_of(site: Site, model: Any) -> int:
    """The k that a router, its block or the config declares. What it hands over shows only when it
    runs."""
    if site.adapter is not None and site.adapter.top_k is not None:
        return site.adapter.top_k
    block = model.get_submodule(site.path.rpartition(".")[0])
    for owner in (
        site.logits_module,
        site.module,
        block,
        getattr(site.module, "config", None),
        model.config.get_text_config(),
    ):
        for name in TOP_K:
            if isinstance(value := getattr(owner, name, None), int) and not isinstance(value, bool):
                return value
    raise MoeInspectError(f"cannot tell how many experts a token {site.path} chooses")


def is_expert_parallel(module: torch.nn.Module) -> bool:
    """Whether this module's experts are some of those its router chooses from: at its call ids are
    global, within its forward local ones or another rank's."""
    return getattr(module, "_is_expert_parallel", False)


def wants_expert_parallel(model: Any) -> bool:
    """Whether the model was loaded with its experts shared out over ranks."""
    distributed = getattr(model.config, "distributed_config", None)
    return bool(
        getattr(distributed, "enable_expert_parallel", False)
        or (getattr(distributed, "ep_size", None) or 1) > 1
    )


def scoring_of(config: Any, router: torch.nn.Module) -> str:
    """How logits become scores: what the config states, else what the code of the router (or of its
    block) calls."""
    stated = getattr(config, "scoring_func", None)
    if isinstance(stated, str):
        return stated
    try:
        code = inspect.getsource(type(router))
    except (OSError, TypeError):
        return ""
    return next((name for name in ("sparsemixer", "sigmoid", "softmax") if name in code), "softmax")


def shared_experts_of(config: Any, model: Any, experts_path: str) -> int:
    """Experts that every token of this layer goes to: as many as the config says, or one where the
    block has a shared MLP."""
    block = experts_path.rpartition(".")[0]
    owners = (
        block,
        block.rpartition(".")[0],
    )  # of some families the shared one stands beside the block
    if not any(
        "shared" in name
        for owner in owners
        for name, _ in model.get_submodule(owner).named_children()
    ):
        return 0
    for name in ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"):
        if isinstance(value := getattr(config, name, None), int) and value > 0:
            return value
    return 1


def choice_among(arguments: list[Any]) -> Choice | None:
    """The router's choice among the arguments of an experts call, by dtype and shape, never by
    position: the 2-D integer tensor and the floating-point tensor of its shape. None where there is
    none."""
    tensors = [a for a in arguments if hasattr(a, "dtype") and hasattr(a, "dim")][
        1:
    ]  # the first holds the hidden states
    ids = [
        t
        for t in tensors
        if t.dim() == 2 and not t.dtype.is_floating_point and t.element_size() > 1
    ]
    weights = [t for t in tensors if ids and t.dtype.is_floating_point and t.shape == ids[0].shape]
    return (ids[0], weights[0]) if ids and weights else None


def logits_among(output: Any, site: Site) -> torch.Tensor | None:
    """The router logits [T, E] in the output of `site.logits_module`: at the declared index, else
    the one tensor of E floating-point values a row (the order of the others has changed between
    releases). None where that is not one."""
    parts = output if isinstance(output, tuple | list) else (output,)
    if site.logits_index is not None:
        parts = parts[site.logits_index : site.logits_index + 1]
    found = [
        t
        for t in parts
        if hasattr(t, "dtype") and t.dtype.is_floating_point and t.shape[-1] == site.experts
    ]
    return found[0].detach().reshape(-1, site.experts) if len(found) == 1 else None


def _declared_logits(model: Any) -> dict[type, int]:
    """Router class → index of the logits in its output, where the family declares it for
    `output_router_logits`."""
    declared: dict[type, int] = {}
    for module in model.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for entry in entries if isinstance(entries, list | tuple) else [entries]:
            if hasattr(entry, "target_class"):
                declared[entry.target_class] = entry.index
    return declared


def _router_beside(model: Any, experts_path: str) -> torch.nn.Module | None:
    """The router module among the siblings of these experts."""
    parent = model.get_submodule(experts_path.rpartition(".")[0])
    return next(
        (m for m in parent.children() if re.search(r"(Router|Gate|Gating)$", type(m).__name__)),
        None,
    )

"""Parameters, memory and FLOPs of a model, compared with dense models of the same size. The model
is built on torch's meta device, without data: no weights are read.

E experts, k chosen per token.
"""

from __future__ import annotations

import re
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.description import PARTS, Description, of_trace
from moe_inspect.model.families import CONNECTOR, TOWER
from moe_inspect.model.find import find_routers
from moe_inspect.model.load import (
    auto_class,
    load_config,
    of_the_text_model,
    stated_config,
)
from moe_inspect.model.routers import Site, top_k_of
from moe_inspect.text import first_line

# modules of a multimodal model that text tokens do not pass through
NOT_TEXT = re.compile(f"{TOWER.pattern}|{CONNECTOR.pattern}")
CONTEXT = 4096


def describe(
    model: str,
    *,
    context: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Description:
    """`model`: a hub id, a directory, a config.json, a trace (by its manifest), or "demo".
    `context`: context length in tokens; default: the model's, at most 4096."""
    if (of_routers := of_trace(model)) is not None:
        return of_routers
    import torch

    config = _config_of(model, revision, trust_remote_code)
    try:
        with torch.device("meta"):
            built: Any = auto_class(config, trust_remote_code).from_config(
                config, trust_remote_code=trust_remote_code
            )
    # transformers raises anything for a broken config, which is the user's
    except Exception as error:
        raise MoeInspectError(
            f"cannot build a language model of {model}: {first_line(error)}"
        ) from error
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or CONTEXT
    made = Description(
        type(built).__name__,
        getattr(text, "num_hidden_layers", 0),
        context or min(CONTEXT, longest),
    )
    try:
        sites = find_routers(built)
    except MoeInspectError:
        sites = []
    if sites:
        made.routers = [(s.layer, s.experts, top_k_of(s, built)) for s in sites]
        made.scoring, made.shared_experts = sites[0].scoring, sites[0].shared_experts
    _count_parameters(made, built, sites)
    made.score_width = sum(
        _score_width(m, text) for name, m in built.named_modules() if not NOT_TEXT.search(name)
    )
    return made


def _config_of(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    known = stated_config(model, revision)
    if known is None:
        return load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    kind = known.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise MoeInspectError(f"{model}: transformers does not know the model_type {kind!r}")
    try:
        return of_the_text_model(AutoConfig.for_model(kind, **known))
    # transformers raises anything for a broken config, which is the user's
    except Exception as error:
        raise MoeInspectError(f"{model} is not a model's config: {first_line(error)}") from error


def _count_parameters(made: Description, built: Any, sites: list[Site]) -> None:
    share_of = {
        prefix: top_k_of(site, built) / site.experts
        for site in sites
        for prefix in _expert_prefixes(built, site)
    }
    routers = {
        name + "."
        for name, m in built.named_modules()
        if any(m is s.logits_module for s in sites) and name + "." not in share_of
    }
    embedded, head = built.get_input_embeddings(), built.get_output_embeddings()
    tied = head is not None and head.weight is embedded.weight
    for name, parameter in built.named_parameters():
        share = next((s for prefix, s in share_of.items() if name.startswith(prefix)), None)
        part = (
            "routed experts"
            if share is not None
            else _part_of(name, parameter, embedded, head, routers)
        )
        n = parameter.numel()
        active = 0 if part == PARTS[-1] else n if share is None else round(n * share)
        made.total[part] += n
        made.active[part] += active
        # a lookup is no multiplication
        if parameter.dim() > 1 and part != PARTS[-1] and (part != "embeddings" or tied):
            made.products_total += n
            made.products_active += active


def _expert_prefixes(built: Any, site: Site) -> list[str]:
    """Name prefixes of the parameters of this router's experts."""
    if site.adapter is None:
        return [site.path + "."]
    if site.adapter.parameters:
        return [f"{site.path}.{name}." for name in site.adapter.parameters]
    parent = site.path.rpartition(".")[0]
    return [
        f"{parent}.{n}."
        for n, m in built.get_submodule(parent).named_children()
        if type(m).__name__.endswith("Experts")
    ]


def _part_of(name: str, parameter: Any, embedded: Any, head: Any, routers: set[str]) -> str:
    if NOT_TEXT.search(name):
        return PARTS[-1]
    if parameter is embedded.weight:
        return "embeddings"
    if head is not None and parameter is head.weight:
        return "output head"
    if any(name.startswith(prefix) for prefix in routers):
        return "router"
    rules = {
        "router": r"router",
        "shared experts": r"shared_expert|shared_mlp",
        "norms and others": r"norm",
        "attention": r"attn|attention|mixer|mamba|linear_attn|\.conv",
        "dense": r"mlp|feed_forward|ffn|\.block_sparse_moe\.",
    }
    return next(
        (part for part, pattern in rules.items() if re.search(pattern, name, re.IGNORECASE)),
        "norms and others",
    )


def _score_width(module: Any, text: Any) -> int:
    """heads × (query width + value width) of a softmax attention, 0 for any other module."""
    if not type(module).__name__.endswith("Attention") or not hasattr(module, "scaling"):
        return 0
    heads = (
        getattr(module, "num_heads", None)
        or getattr(module, "num_attention_heads", None)
        or text.num_attention_heads
    )
    query, value = getattr(module, "qk_head_dim", None), getattr(module, "v_head_dim", None)
    if query is None or value is None:
        width = (
            getattr(module, "head_dim", None)
            or getattr(module, "key_value_proj_dim", None)
            or getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads
        )
        query, value = query or width, value or width
    return heads * (query + value)

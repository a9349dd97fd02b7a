"""The model that a server runs: its routers by its config, and the server's own description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from moe_inspect.capture.server.client import MODELS, ask, list_models, root_of
from moe_inspect.capture.server.protocols import EngineProtocol
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from moe_inspect.model.routers import top_k_of
from moe_inspect.text import first_line, ranges
from moe_inspect.trace.schema import Router


def routers_of(config: Any, trust_remote_code: bool = False) -> tuple[str, list[Router]]:
    """The model's class, and its routers as a local trace lists them. No weight is read."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built: Any = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    # transformers raises anything for a broken config, which is the user's
    except Exception as error:
        raise MoeInspectError(
            f"cannot build a causal language model of the config: {first_line(error)}"
        ) from error
    sites = find_routers(built)
    layers, blocks = [s.layer for s in sites], config.get_text_config().num_hidden_layers
    if len(set(layers)) < len(layers) or max(layers) >= blocks:
        raise MoeInspectError(
            f"{type(built).__name__} has {len(sites)} routers in {blocks} layers: engines return "
            "one per layer"
        )
    routers = [
        Router(
            s.layer,
            s.path.split(".", 1)[-1],
            s.path,
            s.experts,
            top_k_of(s, built),
            s.scoring,
            s.shared_experts,
        )
        for s in sites
    ]
    return type(built).__name__, routers


def choose(routers: Sequence[Router], layers: Sequence[int] | None) -> list[int]:
    """Indices of the routers in `layers` (None: all)."""
    there = [r.layer for r in routers]
    if unknown := sorted(set(layers or ()) - set(there)):
        raise MoeInspectError(
            f"no router in layer {unknown[0]}: the MoE layers are {ranges(there)}"
        )
    return [n for n, layer in enumerate(there) if layers is None or layer in layers]


def common_top_k(routers: Sequence[Router]) -> int:
    """The K of an answer's arrays: engines allocate one number of experts per token."""
    if len(found := sorted({r.top_k for r in routers})) > 1:
        raise MoeInspectError(
            f"its routers choose {found} experts per token: engines return the same number for "
            "all layers"
        )
    return found[0]


async def ask_about(http: httpx.AsyncClient, engine: EngineProtocol, config: Any) -> dict[str, Any]:
    """What the server says of itself: model, path, version, max_model_len. MoeInspectError where
    its model is not the config's."""
    root, models = root_of(http), await list_models(http)
    listed = models.get("data") if models is not None else None
    listed = listed if isinstance(listed, list) else []
    # a card with a parent is an adapter
    cards = [c for c in listed if isinstance(c, dict) and not c.get("parent")]
    if not cards or not isinstance(cards[0].get("id"), str):
        raise MoeInspectError(
            f"{root}{MODELS} names no model: is it the engine that --engine names?"
        )
    info = await ask(http, engine.about) if engine.about != MODELS else {}
    version = (await ask(http, engine.version_at) or {}).get("version")
    length = cards[0].get("max_model_len")
    about = {
        "model": cards[0]["id"],
        "path": (info or {}).get("model_path") or cards[0].get("root"),
        "version": version if isinstance(version, str) else None,
        "protocol_read_from": engine.read_from,
        "max_model_len": length if isinstance(length, int) and length > 1 else None,
    }
    for key, own in (("model_type", config.model_type), ("architectures", config.architectures)):
        told = (info or {}).get(key)
        if told and own and told != own:
            raise MoeInspectError(
                f"the server's model is {told} ({key}), that of --model-config {own}: give the "
                f"config of {about['model']}"
            )
    return about

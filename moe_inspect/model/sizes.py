"""What a config says of sizes: bytes of a hidden state and of an expert, groups of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_inspect.model.families import EXPERT_WIDTH, HIDDEN, family_of, language_config
from moe_inspect.trace.reader import Trace

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
GROUPS = ("n_group", "num_expert_group")
GROUPS_CHOSEN = ("topk_group", "num_limited_groups")
# of DeepSeek-V2: without groups, and with groups compared by their best expert alone
UNGROUPED, BY_BEST = "greedy", "group_limited_greedy"


def text_config(trace: Trace) -> dict[str, Any]:
    """The config of the language model; empty where the manifest has none."""
    config = trace.manifest.get("model", {}).get("config")
    return language_config(config) if isinstance(config, dict) else {}


def hidden_bytes(trace: Trace) -> float | None:
    """Bytes of a token's hidden state in the dtype the model ran in; None where the manifest does
    not say."""
    width, size = _number(text_config(trace), *HIDDEN), _element_bytes(trace)
    return width * size if width and size else None


def expert_bytes(trace: Trace, router: int) -> float | None:
    """Bytes of one expert's weights: two matrices, three where it has a gate projection; None where
    the manifest does not say."""
    config = text_config(trace)
    stack = trace.routers[router].stack
    width = _number(config, *([f"{stack}_ffn_dim"] if stack else []), *EXPERT_WIDTH)
    hidden, size = _number(config, *HIDDEN), _element_bytes(trace)
    matrices = 3 if family_of(config).gated else 2
    return matrices * hidden * width * size if hidden and width and size else None


def weight_bytes(trace: Trace) -> int:
    """Bytes of a weight in the dtype the model ran in; 2 where the manifest does not say."""
    return _element_bytes(trace) or 2


def groups_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of a model's config.json: the number of groups (1: none), how many of them a token goes to,
    and by how many of their best experts they are compared."""
    of = language_config(dict(config))
    groups = _number(of, *GROUPS)
    if groups is None or of.get("topk_method") == UNGROUPED:
        return 1, 1, 0
    best = 1 if of.get("topk_method") == BY_BEST else 2
    return groups, _number(of, *GROUPS_CHOSEN) or groups, best if groups > 1 else 0


def _element_bytes(trace: Trace) -> int | None:
    config = text_config(trace)
    ran_in = trace.manifest.get("capture", {}).get("dtype")
    return BYTES.get(str(ran_in)) or BYTES.get(
        str(config.get("dtype") or config.get("torch_dtype"))
    )


def _number(config: dict[str, Any], *names: str) -> int | None:
    return next(
        (config[name] for name in names if type(config.get(name)) is int and config[name] > 0), None
    )

"""Reads a model's config.json in plain Python: which blocks have experts, how many, how many are
chosen per token, in which groups, and the bytes of an expert and of a hidden state.

The keys are those of transformers' configs and of the checkpoints that engines load
(`model/families.py`); a family that states nothing about dense blocks has experts in all of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.model import families
from moe_inspect.model.families import EXPERTS, HIDDEN, TOP_K, Config, language_config
from moe_inspect.text import first_line
from moe_inspect.trace import schema
from moe_inspect.trace.schema import Router

if TYPE_CHECKING:
    import pyarrow as pa

    from moe_inspect.trace.reader import Trace

# far above any real model; a hostile config could state more
MOST_LAYERS, MOST_EXPERTS = 4096, 65_535
MOST_WIDTH, MOST_BYTES = 2**24, 2**24
SIZES = (  # key of a config or of a part of it → the largest number it may state
    (re.compile(r"(layers|n_layer|depths?|num_blocks)$"), MOST_LAYERS),
    (re.compile(r"(experts|experts_per_tok|experts_per_token|expert_num)$"), MOST_EXPERTS),
    (re.compile(r"^vocab_size"), schema.MOST_TOKEN_IDS),
    (re.compile(r"(_size|_dim|_rank|_heads|n_head|d_model|d_ff|d_kv|n_embd|n_inner)$"), MOST_WIDTH),
)


@dataclass(frozen=True)
class ModelFacts:
    """`layers`: number of blocks, dense ones included. `experts`, `top_k`: block index → E and k,
    of the blocks with a router."""

    id: str
    layers: int
    experts: dict[int, int]
    top_k: dict[int, int]
    shared_experts: int
    config: Config
    tokenizer: Path | None = None

    def routers(self) -> list[Router]:
        scoring = str(_stated(self.config, families.SCORING) or "")
        return [
            Router(i, "experts", f"layers.{i}", E, self.top_k[i], scoring, self.shared_experts)
            for i, E in sorted(self.experts.items())
        ]

    def record(self) -> dict[str, object]:
        """The manifest's section `model`."""
        kind = (self.config.get("architectures") or [None])[0]
        return {"id": self.id, "revision": None, "class": kind, "config": self.config}

    def vocabulary(self) -> pa.Table | None:
        """The vocabulary of the tokenizer.json beside the config; None where there is none."""
        from moe_inspect.model.vocabulary import read_tokenizer

        if self.tokenizer is None:
            return None
        return read_tokenizer(self.tokenizer, int(self.config.get("vocab_size") or 0))


def read_facts(model: str | Path) -> ModelFacts:
    """`model`: a config.json (or a JSON file of the same keys), a directory that holds one, a
    trace, "demo", or a hub id (through huggingface_hub, where it is installed)."""
    path, tokenizer = _config_file(str(model))
    return facts_of(read_config(path), str(model), path, tokenizer)


def read_config(path: Path) -> Config:
    """The model's config in a config.json or a trace's manifest. MoeInspectError where it is not
    one, or states a size that no model has: building it would use up all memory."""
    is_trace = path.name == schema.MANIFEST
    try:
        config = json.loads(read_small(path) if is_trace else read_small(path, MOST_BYTES))
    except RecursionError:
        raise MoeInspectError(f"{path} is not a model's config: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise MoeInspectError(f"{path} is not a model's config: {first_line(error)}") from None
    if is_trace and isinstance(config, dict) and isinstance(config.get("model"), dict):
        config = config["model"].get("config")
    if not isinstance(config, dict):
        raise MoeInspectError(f"{path} is not a model's config: expected a JSON object")
    _refuse_impossible_sizes(config, path)
    return config


def _refuse_impossible_sizes(config: Config, where: object) -> None:
    parts = list[Any]([config])
    while parts:
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            most = next((most for pattern, most in SIZES if pattern.search(key)), math.inf)
            for stated in value if isinstance(value, list) else [value]:
                if isinstance(stated, int | float) and stated > most:
                    raise MoeInspectError(
                        f"{where}: {key} is {str(stated)[:20]}, and no model has more than {most:,}"
                    )
        top_k, experts = (
            max((v for k in keys if type(v := part.get(k)) is int), default=0)
            for keys in (TOP_K, EXPERTS)
        )
        if top_k > experts > 1:
            raise MoeInspectError(f"{where}: {top_k} experts per token, but only {experts} experts")


def facts_of(config: Config, name: str, where: object, tokenizer: Path | None = None) -> ModelFacts:
    """The facts in a config that has been read; MoeInspectError names `where` and the key that
    is missing or impossible."""
    inner = language_config(config)

    def number(key: str, value: object, most: int) -> int:
        if value is None:
            said = f"{where} lacks {key}: is it a Mixture-of-Experts model's config?"
            raise MoeInspectError(said)
        if type(value) is not int or not 1 <= value <= most:
            raise MoeInspectError(
                f"{where}: {key} is {value!r}, expected an integer from 1 to {most:,}"
            )
        return value

    def named(keys: tuple[str, ...]) -> tuple[str, Any]:
        return next(((k, inner[k]) for k in keys if inner.get(k) is not None), (keys[0], None))

    layers = number(*named(families.LAYERS), MOST_LAYERS)
    sparse = _sparse_layers(inner, layers, where)

    def by_layer(keys: tuple[str, ...]) -> dict[int, int]:
        """One number for all blocks, or (Hunyuan) a list with one per block."""
        key, value = named(keys)
        if isinstance(value, list) and len(value) == layers:
            return {i: number(keys[0], value[i], MOST_EXPERTS) for i in sparse}
        # ERNIE-VL: of text and of images
        if isinstance(value, list) and len({json.dumps(v) for v in value}) == 1:
            value = value[0]
        return dict.fromkeys(sparse, number(key, value, MOST_EXPERTS))

    experts, top_k = by_layer(EXPERTS), by_layer(TOP_K)
    for layer in sparse:
        if top_k[layer] > experts[layer]:
            raise MoeInspectError(
                f"{where}: {top_k[layer]} experts per token, but only {experts[layer]} experts in "
                f"layer {layer}"
            )
    shared = _stated(inner, families.SHARED_EXPERTS)
    shared = shared if isinstance(shared, int) else 0
    return ModelFacts(name, layers, experts, top_k, shared, config, tokenizer)


def _config_file(model: str) -> tuple[Path, Path | None]:
    """config.json, and the tokenizer.json beside it."""
    path = Path(__file__).parent.parent / "demo" / "model" if model == "demo" else Path(model)
    inside = [path / name for name in ("config.json", schema.MANIFEST)]
    if found := [file for file in (path, *inside) if file.is_file()]:
        beside = found[0].with_name("tokenizer.json")
        is_model = path.is_dir() or path.name == "config.json"
        return found[0], beside if is_model and beside.is_file() else None
    if path.is_dir():
        raise MoeInspectError(
            f"no config.json in {path}: give a model's directory or its config.json"
        )
    is_path = model.startswith((".", "/", "~")) or model.endswith(".json")
    if is_path or len(path.parts) not in (1, 2):
        raise MoeInspectError(
            f"no config at {model}: give a config.json, a model's directory or a hub id"
        )
    return _from_hub(model)


def _from_hub(model: str) -> tuple[Path, Path | None]:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise MoeInspectError(
            f"no config at {model}, and reading it from the hub needs huggingface_hub: pip "
            "install huggingface_hub"
        ) from None
    vocabulary = None
    try:
        config = Path(hf_hub_download(model, "config.json"))
        try:
            vocabulary = Path(hf_hub_download(model, "tokenizer.json"))
        # a model may have none: the trace is then without a vocabulary
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the hub could not be reached
                raise
    # offline, no such model, no access: the library has a class for each, the way out is the same
    except Exception as error:
        raise MoeInspectError(
            f"cannot read the config and the tokenizer of {model}: {first_line(error)}"
        ) from None
    return config, vocabulary


# --- which blocks route


def _sparse_layers(config: Config, layers: int, where: object) -> list[int]:
    """Block indices with a router. Each rule that the config states narrows them down."""
    sparse = set(range(layers))
    for key, rule in families.ROUTING_BLOCKS.items():
        if (value := config.get(key)) is None:
            continue
        try:
            sparse &= {i for i in range(layers) if rule(config, value, i)}
        except (TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError):
            said = f"{where}: {key} is {str(value)[:60]!r}, which does not say which layers have"
            raise MoeInspectError(f"{said} experts") from None
    if config.get("enable_moe_block") is False or not sparse:
        raise MoeInspectError(f"{where} describes a dense model: no layer has experts")
    return sorted(sparse)


def _stated(config: Config, keys: tuple[str, ...]) -> object:
    return next((config[key] for key in keys if config.get(key) is not None), None)


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
GROUPS = ("n_group", "num_expert_group")
GROUPS_CHOSEN = ("topk_group", "num_limited_groups")
# of DeepSeek-V2: without groups, and with groups compared by their best expert alone
UNGROUPED, BY_BEST = "greedy", "group_limited_greedy"


def text_config(trace: Trace) -> Config:
    """The config of the language model; empty where the manifest has none."""
    config = trace.manifest.get("model", {}).get("config")
    return language_config(config) if isinstance(config, dict) else {}


def hidden_bytes(trace: Trace) -> float | None:
    """Bytes of a token's hidden state in the dtype the model ran in; None where the manifest does
    not say."""
    width, size = _size(text_config(trace), *HIDDEN), _element_bytes(trace)
    return width * size if width and size else None


def expert_shape(trace: Trace, router: int) -> tuple[int, int, int] | None:
    """Of an expert: the model's hidden size, its own, and its matrices, three where it has a gate
    projection. None where the manifest does not say."""
    config, stack = text_config(trace), trace.routers[router].stack
    width = _size(config, *([f"{stack}_ffn_dim"] if stack else []), *families.EXPERT_WIDTH)
    hidden = _size(config, *HIDDEN)
    matrices = 2 if config.get("model_type") in families.UNGATED else 3
    return (hidden, width, matrices) if hidden and width else None


def expert_bytes(trace: Trace, router: int) -> float | None:
    """Bytes of one expert's weights; None where the manifest does not say."""
    shape, size = expert_shape(trace, router), _element_bytes(trace)
    return math.prod(shape) * size if shape and size else None


def weight_bytes(trace: Trace) -> int:
    """Bytes of a weight in the dtype the model ran in; 2 where the manifest does not say."""
    return _element_bytes(trace) or 2


def groups_of(config: Mapping[str, object]) -> tuple[int, int, int]:
    """Of a model's config.json: the number of groups (1: none), how many of them a token goes to,
    and by how many of their best experts they are compared."""
    of = language_config(dict(config))
    groups = _size(of, *GROUPS)
    if groups is None or of.get("topk_method") == UNGROUPED:
        return 1, 1, 0
    best = 1 if of.get("topk_method") == BY_BEST else 2
    return groups, _size(of, *GROUPS_CHOSEN) or groups, best if groups > 1 else 0


def _element_bytes(trace: Trace) -> int | None:
    config, ran_in = text_config(trace), trace.manifest.get("capture", {}).get("dtype")
    stated = config.get("dtype") or config.get("torch_dtype")
    return BYTES.get(str(ran_in)) or BYTES.get(str(stated))


def _size(config: Config, *names: str) -> int | None:
    sizes = (config.get(name) for name in names)
    return next((size for size in sizes if type(size) is int and size > 0), None)

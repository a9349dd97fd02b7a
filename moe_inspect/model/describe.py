"""Parameters, memory and FLOPs of a model, compared with dense models of the same size. The model
is built on the meta device: no weights are read.

E experts, k chosen per token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import read_config
from moe_inspect.model.families import CONNECTOR, TOWER
from moe_inspect.model.find import find_routers
from moe_inspect.model.load import auto_class, load_config, of_the_text_model
from moe_inspect.model.routers import Site, top_k_of
from moe_inspect.text import first_line, ranges
from moe_inspect.trace import schema

PARTS = (
    "embeddings",
    "attention",
    "dense",
    "router",
    "shared experts",
    "routed experts",
    "output head",
    "norms and others",
    "vision and audio",
)
# modules of a multimodal model that text tokens do not pass through
NOT_TEXT = re.compile(f"{TOWER.pattern}|{CONNECTOR.pattern}")
BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
# dense bf16 FLOP/s of one GPU, from NVIDIA's data sheets: A100 SXM, H100 SXM, H200 SXM, B200 SXM
PEAK_FLOPS = {"a100": 312e12, "h100": 989.4e12, "h200": 989.4e12, "b200": 2250e12}
CONTEXT = 4096


@dataclass
class Description:
    """Parameters by part, in total and active per token; FLOPs of a forward pass per token.
    `routers`: (layer, E, k)."""

    config: Any
    kind: str
    layers: int
    context: int
    routers: list[tuple[int, int, int]] = field(default_factory=list)
    scoring: str = ""
    shared_experts: int = 0
    total: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    active: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    products_total: int = 0  # matrix entries multiplied per token if all experts were active
    products_active: int = 0
    score_width: int = (
        0  # Σ over attention layers of heads × (query + value width): FLOPs per key are twice that
    )

    @property
    def parameters(self) -> int:
        return sum(self.total.values())

    @property
    def parameters_active(self) -> int:
        return sum(self.active.values())

    def flops_a_token(self, keys: float, dense: bool = False) -> float:
        """FLOPs of a forward pass per token that attends to `keys` keys: one multiplication and one
        addition per matrix entry and per key. `dense`: as if every expert were active."""
        return (
            2 * (self.products_total if dense else self.products_active)
            + 2 * self.score_width * keys
        )

    def training_flops(self, tokens: float) -> float:
        """FLOPs of forward and backward pass: three times the forward pass, at the mean length of a
        causal context (arXiv:2001.08361, attention scores included)."""
        return 3 * tokens * self.flops_a_token((self.context + 1) / 2)

    def facts(self) -> list[tuple[str, float | None, str]]:
        """(key, number or None, text)."""
        ratio = self.parameters / self.parameters_active
        prefill, decode = (
            self.flops_a_token((self.context + 1) / 2),
            self.flops_a_token(self.context),
        )
        facts: list[tuple[str, float | None, str]] = [
            ("class", None, self.kind),
            ("layers", self.layers, f"{self.layers}"),
            ("context", self.context, f"{self.context:,} tokens"),
        ]
        if self.routers:
            layers = sorted({layer for layer, _, _ in self.routers})
            facts += [
                ("moe_layers", len(layers), f"{len(layers)} ({ranges(layers)})"),
                ("routers", len(self.routers), f"{len(self.routers)}"),
                *_one_or_several("experts", {e for _, e, _ in self.routers}),
                *_one_or_several("top_k", {k for _, _, k in self.routers}),
                ("shared_experts", self.shared_experts, f"{self.shared_experts}"),
                ("scoring", None, self.scoring),
            ]
        else:
            facts.append(("routers", 0, "none: a dense model"))
        facts += [
            _count("parameters.total", self.parameters),
            _count("parameters.active", self.parameters_active),
        ]
        for part in PARTS:
            if self.total[part]:
                name = part.replace(" ", "_")
                facts.append(_count(f"parameters.{name}.total", self.total[part]))
                if self.active[part] != self.total[part]:
                    facts.append(_count(f"parameters.{name}.active", self.active[part]))
        facts += [
            (f"memory_bytes.{d}", b * self.parameters, _bytes(b * self.parameters))
            for d, b in BYTES.items()
        ]
        facts += [
            (
                "flops_a_token.prefill",
                prefill,
                f"{_si(prefill)}FLOP, mean over {self.context:,} positions",
            ),
            (
                "flops_a_token.decode",
                decode,
                f"{_si(decode)}FLOP at a context of {self.context:,} tokens",
            ),
        ]
        dense, small = (
            self.flops_a_token((self.context + 1) / 2, dense=True),
            2 * self.parameters_active,
        )
        return [
            *facts,
            _count("dense_of_same_active_size.parameters", self.parameters_active),
            (
                "dense_of_same_active_size.memory_bytes.bf16",
                small,
                f"{_bytes(small)}; this model needs {ratio:.2f}x",
            ),
            ("dense_of_same_active_size.flops_a_token.prefill", prefill, "the same"),
            _count("dense_of_same_total_size.parameters", self.parameters),
            ("dense_of_same_total_size.memory_bytes.bf16", 2 * self.parameters, "the same"),
            (
                "dense_of_same_total_size.flops_a_token.prefill",
                dense,
                f"{_si(dense)}FLOP, {dense / prefill:.2f}x this model's",
            ),
        ]

    def training(
        self, tokens: float, gpu: str, mfu: float | None, gpu_hours: float | None
    ) -> list[tuple[str, float | None, str]]:
        """FLOPs of training on `tokens`; the GPU-hours that an MFU (model FLOPs utilisation: the
        model's FLOPs as a share of the GPU's peak, arXiv:2204.02311) implies, or the MFU that
        `gpu_hours` imply."""
        flops, peak = self.training_flops(tokens), PEAK_FLOPS[gpu]
        facts: list[tuple[str, float | None, str]] = [
            ("training.flops", flops, f"{flops:.3g} FLOP for {tokens:,.0f} tokens")
        ]
        if gpu_hours is not None:
            share = flops / (gpu_hours * 3600 * peak)
            facts.append(
                (
                    "training.mfu",
                    share,
                    f"{share:.3f} of {_si(peak)}FLOP/s, from {gpu_hours:,.0f} {gpu.upper()}-hours",
                )
            )
        if mfu is not None:
            hours = flops / (mfu * peak) / 3600
            facts.append(
                (
                    "training.gpu_hours",
                    hours,
                    f"{hours:,.0f} {gpu.upper()}-hours at an MFU of {mfu}",
                )
            )
        return facts


def describe(
    model: str,
    *,
    context: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Description:
    """`model`: a hub id, a directory, a config.json, a trace (by its manifest), or "demo".
    `context`: context length in tokens; default: the model's, at most 4096."""
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
        config,
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


def describe_table(
    made: Description, training: list[tuple[str, float | None, str]] | None = None
) -> pd.DataFrame:
    """Columns key, value (float, NaN where the fact is no number) and text."""
    return pd.DataFrame([*made.facts(), *(training or [])], columns=["key", "value", "text"])


def _config_of(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(model)
    manifest = path / schema.MANIFEST
    if not (path.is_file() or manifest.is_file()):
        return load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    known = read_config(manifest if manifest.is_file() else path)
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


def _one_or_several(key: str, values: set[int]) -> list[tuple[str, float | None, str]]:
    return [
        (
            key,
            values.copy().pop() if len(values) == 1 else None,
            ", ".join(map(str, sorted(values))),
        )
    ]


def _count(key: str, n: int) -> tuple[str, float, str]:
    return key, n, f"{n:,}"


def _bytes(n: float) -> str:
    return f"{n / 2**30:,.1f} GiB" if n >= 2**28 else f"{n / 2**20:,.1f} MiB"


def _si(n: float) -> str:
    """1.2e13 → "12 T", for a unit to follow."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if n >= 10**power:
            return f"{n / 10**power:.3g} {letter}"
    return f"{n:.3g} "

"""Parameters, memory and FLOPs of a model, beside dense models of the same size. It is built on
torch's meta device, without weights; of a trace without its config torch is not imported.

E experts, k chosen per token.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from moe_inspect.errors import MoeInspectError
from moe_inspect.model import gguf, load
from moe_inspect.model.families import CONNECTOR, TOWER
from moe_inspect.text import plural, ranges
from moe_inspect.trace import schema

if TYPE_CHECKING:
    import pandas as pd
    from torch.nn import Module, Parameter
    from transformers import PreTrainedConfig, PreTrainedModel

    from moe_inspect.model.routers import Site

Fact = tuple[str, float | None, str]  # key, number or None, text
PARTS = (
    *("embeddings", "attention", "dense", "router", "shared experts", "routed experts"),
    *("output head", "norms and others", "vision and audio"),
)
# of a parameter by its name, where nothing else tells: the first that is found
PART_NAMES = {
    "router": r"router",
    "shared experts": r"shared_expert|shared_mlp",
    "norms and others": r"norm",
    "attention": r"attn|attention|mixer|mamba|linear_attn|\.conv",
    "dense": r"mlp|feed_forward|ffn|\.block_sparse_moe\.",
}
# modules of a multimodal model that text tokens do not pass through
NOT_TEXT = re.compile(f"{TOWER.pattern}|{CONNECTOR.pattern}")
CONTEXT = 4096
BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
# dense bf16 FLOP/s of one GPU, from NVIDIA's data sheets: A100 SXM, H100 SXM, H200 SXM, B200 SXM
PEAK_FLOPS = {"a100": 312e12, "h100": 989.4e12, "h200": 989.4e12, "b200": 2250e12}


@dataclass(repr=False)
class Description:
    """Parameters by part, in total and active per token; FLOPs of a forward pass per token.
    `routers`: (layer, E, k). A trace of a model that is not transformers' tells these alone."""

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
    # Σ over attention layers of heads × (query + value width): FLOPs per key are twice that
    score_width: int = 0

    @property
    def parameters(self) -> int:
        return sum(self.total.values())

    @property
    def parameters_active(self) -> int:
        return sum(self.active.values())

    def flops_a_token(self, keys: float | None = None, dense: bool = False) -> float:
        """FLOPs of a forward pass per token that attends to `keys` keys (None: the mean of a causal
        context): one multiplication and one addition per matrix entry and per key. `dense`: as if
        every expert were active."""
        keys = (self.context + 1) / 2 if keys is None else keys
        products = self.products_total if dense else self.products_active
        return 2 * products + 2 * self.score_width * keys

    def training_flops(self, tokens: float) -> float:
        """FLOPs of forward and backward pass: three times the forward pass, at the mean length of a
        causal context (arXiv:2001.08361, attention scores included)."""
        return 3 * tokens * self.flops_a_token()

    def __repr__(self) -> str:
        """What the command prints: at most 20 lines of 80 columns."""
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def _lines(self) -> Iterator[str]:
        yield self.kind + (f": {plural(self.layers, 'layer')}" if self.layers else "")
        if self.routers:
            shapes = sorted({(k, e) for _, e, k in self.routers})
            chosen = " or ".join(f"{k} of {e}" for k, e in shapes)
            layers = ranges(self._moe_layers()).replace(",", ", ")
            routers = f"{plural(len(self.routers), 'router')} in layers {layers}"
            shared = plural(self.shared_experts, "shared expert") if self.shared_experts else ""
            facts = (f"{routers}: {chosen} experts per token", shared, self.scoring)
            line = ", ".join(fact for fact in facts if fact)
            yield from textwrap.wrap(line, 80, subsequent_indent="  ")
        else:
            yield "no routers: a dense model"
        if not self.parameters:
            yield "parameters and FLOPs are not known: the trace has no config of the model"
            return
        whole, few = self.parameters, self.parameters_active
        yield ""
        yield f"{'parameters':<20}{'in total':>20}{'per token':>20}"
        rows = [("all", whole, few)]
        rows += [(part, self.total[part], self.active[part]) for part in PARTS if self.total[part]]
        yield from (f"  {name:<18}{total:>20,}{active:>20,}" for name, total, active in rows)
        yield ""
        yield f"memory  {', '.join(f'{_bytes(b * whole)} in {d}' for d, b in BYTES.items())}"
        prefill = self.flops_a_token()
        yield (
            f"FLOPs   {_si(prefill)}FLOP per token of a text of {self.context:,} tokens, "
            f"{_si(self.flops_a_token(self.context))}FLOP for the last"
        )
        if self.routers:
            less, more = f"1/{whole / few:.2f}", self.flops_a_token(dense=True) / prefill
            yield f"dense   of {few:,} parameters: the same FLOPs, {less} of the memory"
            yield f"        of {whole:,} parameters: {more:.2f}x the FLOPs, the same memory"

    def facts(self) -> Iterator[Fact]:
        """(key, number or None, text)."""
        yield "class", None, self.kind
        if self.parameters:
            yield "layers", self.layers, f"{self.layers}"
            yield "context", self.context, f"{self.context:,} tokens"
        if self.routers:
            layers = self._moe_layers()
            yield "moe_layers", len(layers), f"{len(layers)} ({ranges(layers)})"
            yield "routers", len(self.routers), f"{len(self.routers)}"
            for key, n in (("experts", 1), ("top_k", 2)):
                sizes = sorted({router[n] for router in self.routers})
                yield key, sizes[0] if len(sizes) == 1 else None, ", ".join(map(str, sizes))
            yield "shared_experts", self.shared_experts, f"{self.shared_experts}"
            yield "scoring", None, self.scoring
        else:
            yield "routers", 0, "none: a dense model"
        if not self.parameters:
            return
        whole, few = self.parameters, self.parameters_active
        yield "parameters.total", whole, f"{whole:,}"
        yield "parameters.active", few, f"{few:,}"
        for part in PARTS:
            total, active = self.total[part], self.active[part]
            name = f"parameters.{part.replace(' ', '_')}"
            if total:
                yield f"{name}.total", total, f"{total:,}"
            if active != total:
                yield f"{name}.active", active, f"{active:,}"
        for dtype, size in BYTES.items():
            yield f"memory_bytes.{dtype}", size * whole, _bytes(size * whole)
        prefill, decode = self.flops_a_token(), self.flops_a_token(self.context)
        text = f"{_si(prefill)}FLOP, mean over {self.context:,} positions"
        yield "flops_a_token.prefill", prefill, text
        text = f"{_si(decode)}FLOP at a context of {self.context:,} tokens"
        yield "flops_a_token.decode", decode, text
        if not self.routers:  # which is its own dense model
            return
        dense = self.flops_a_token(dense=True)
        of_memory = f"{_bytes(2 * few)}; this model needs {whole / few:.2f}x"
        of_flops = f"{_si(dense)}FLOP, {dense / prefill:.2f}x this model's"
        for size, n, memory, flops, text in (
            ("active", few, of_memory, prefill, "the same"),
            ("total", whole, "the same", dense, of_flops),
        ):
            like = f"dense_of_same_{size}_size"
            yield f"{like}.parameters", n, f"{n:,}"
            yield f"{like}.memory_bytes.bf16", 2 * n, memory
            yield f"{like}.flops_a_token.prefill", flops, text

    def _moe_layers(self) -> list[int]:
        return sorted({layer for layer, _, _ in self.routers})

    def training(
        self, tokens: float, hardware: str, mfu: float | None, gpu_hours: float | None
    ) -> list[Fact]:
        """FLOPs of training on `tokens`; the GPU-hours that an MFU (model FLOPs utilisation: the
        model's FLOPs as a share of the GPU's peak, arXiv:2204.02311) implies, or the MFU that
        `gpu_hours` imply. MoeInspectError where the parameters are not known."""
        if not self.parameters:
            raise MoeInspectError(
                f"the FLOPs of {self.kind} are not known: give its config.json instead of a trace"
            )
        flops, peak = self.training_flops(tokens), PEAK_FLOPS[hardware]
        text = f"{flops:.3g} FLOP for {tokens:,.0f} tokens"
        facts: list[Fact] = [("training.flops", flops, text)]
        if gpu_hours is not None:
            share = flops / (gpu_hours * 3600 * peak)
            text = (
                f"{share:.3f} of {_si(peak)}FLOP/s, from {gpu_hours:,.0f} {hardware.upper()}-hours"
            )
            facts.append(("training.mfu", share, text))
        if mfu is not None:
            hours = flops / (mfu * peak) / 3600
            text = f"{hours:,.0f} {hardware.upper()}-hours at an MFU of {mfu}"
            facts.append(("training.gpu_hours", hours, text))
        return facts


def describe_table(made: Description, training: list[Fact] | None = None) -> pd.DataFrame:
    """Columns key, value (float, NaN where the fact is no number) and text."""
    import pandas as pd

    return pd.DataFrame([*made.facts(), *(training or [])], columns=["key", "value", "text"])


def _bytes(n: float) -> str:
    return f"{n / 2**30:,.1f} GiB" if n >= 2**28 else f"{n / 2**20:,.1f} MiB"


def _si(n: float) -> str:
    """1.2e13 → "12 T", for a unit to follow."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if n >= 10**power:
            return f"{n / 10**power:.3g} {letter}"
    return f"{n:.3g} "


def describe(
    model: str,
    *,
    context: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Description:
    """`model`: a hub id, a directory, a config.json, a GGUF file, a trace (by its manifest), or
    "demo". `context`: context length in tokens; default: the model's, at most 4096."""
    if (of_routers := of_trace(model)) is not None:
        return of_routers
    import torch

    from moe_inspect.model.find import find_routers
    from moe_inspect.model.routers import top_k_of

    config = _config_of(model, revision, trust_remote_code)
    with load.blamed(f"cannot build a language model of {model}"), torch.device("meta"):
        built = load.auto_class(config, trust_remote_code).from_config(
            config, trust_remote_code=trust_remote_code
        )
    text = config.get_text_config()
    longest = min(CONTEXT, getattr(text, "max_position_embeddings", None) or CONTEXT)
    layers = getattr(text, "num_hidden_layers", 0)
    made = Description(type(built).__name__, layers, context or longest)
    try:
        sites = find_routers(built)
        made.scoring, made.shared_experts = sites[0].scoring, sites[0].shared_experts
    except MoeInspectError:
        sites = []
    made.routers = [(site.layer, site.experts, top_k_of(site, built)) for site in sites]
    _count_parameters(made, built, sites)
    read = [m for name, m in built.named_modules() if not NOT_TEXT.search(name)]
    made.score_width = sum(_score_width(m, text) for m in read)
    return made


def of_trace(model: str) -> Description | None:
    """What a trace without a config of the model tells. None for another trace, or no trace."""
    if not (Path(model) / schema.MANIFEST).is_file():
        return None
    from moe_inspect.trace.reader import open_trace

    trace = open_trace(model)
    of_model = trace.manifest.get("model", {})
    if (of_model.get("config") or {}).get("model_type"):
        return None
    first, kind = trace.routers[0], of_model.get("class") or of_model.get("id") or "model"
    routers = [(router.layer, router.experts, router.top_k) for router in trace.routers]
    return Description(kind, 0, 0, routers, first.scoring, first.shared_experts)


def _config_of(model: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    if model.endswith(".gguf"):
        with load.blamed(f"cannot read the config in {model}"):
            return gguf.config_of(Path(model))
    known = load.stated_config(model, revision)
    if known is None:
        return load.load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    kind = known.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise MoeInspectError(f"{model}: transformers does not know the model_type {kind!r}")
    with load.blamed(f"{model} is not a model's config"):
        return load.of_the_text_model(AutoConfig.for_model(kind, **known))


def _count_parameters(made: Description, built: PreTrainedModel, sites: list[Site]) -> None:
    share_of = {
        prefix: k / E
        for site, (_, E, k) in zip(sites, made.routers, strict=True)
        for prefix in _expert_prefixes(built, site)
    }
    makers = {id(site.logits_module) for site in sites}
    prefixes = (name + "." for name, m in built.named_modules() if id(m) in makers)
    routers = tuple(prefix for prefix in prefixes if prefix not in share_of)
    embedded, head = built.get_input_embeddings(), built.get_output_embeddings()
    tied = head is not None and head.weight is embedded.weight

    def part_of(name: str, parameter: Parameter) -> str:
        if NOT_TEXT.search(name):
            return PARTS[-1]
        if parameter is embedded.weight:
            return "embeddings"
        if head is not None and parameter is head.weight:
            return "output head"
        if name.startswith(routers):
            return "router"
        named = (p for p, names in PART_NAMES.items() if re.search(names, name, re.IGNORECASE))
        return next(named, "norms and others")

    for name, parameter in built.named_parameters():
        share = next((s for prefix, s in share_of.items() if name.startswith(prefix)), None)
        part = "routed experts" if share is not None else part_of(name, parameter)
        n = parameter.numel()
        active = 0 if part == PARTS[-1] else n if share is None else round(n * share)
        made.total[part] += n
        made.active[part] += active
        # a lookup is no multiplication
        if parameter.dim() > 1 and part != PARTS[-1] and (part != "embeddings" or tied):
            made.products_total += n
            made.products_active += active


def _expert_prefixes(built: Module, site: Site) -> list[str]:
    """Name prefixes of the parameters of this router's experts."""
    if site.adapter is None:
        return [site.path + "."]
    if site.adapter.parameters:
        return [f"{site.path}.{name}." for name in site.adapter.parameters]
    parent = site.path.rpartition(".")[0]
    beside = built.get_submodule(parent).named_children()
    return [f"{parent}.{n}." for n, m in beside if type(m).__name__.endswith("Experts")]


def _score_width(module: Module, text: PreTrainedConfig) -> int:
    """heads × (query width + value width) of a softmax attention, 0 for any other module."""
    if not type(module).__name__.endswith("Attention") or not hasattr(module, "scaling"):
        return 0

    def stated(owner: object, *names: str) -> int:
        return next((n for name in names if (n := getattr(owner, name, None))), 0)

    heads = stated(module, "num_heads", "num_attention_heads") or text.num_attention_heads
    query, value = stated(module, "qk_head_dim"), stated(module, "v_head_dim")
    if not query or not value:
        width = stated(module, "head_dim", "key_value_proj_dim") or stated(text, "head_dim")
        width = width or text.hidden_size // text.num_attention_heads
        query, value = query or width, value or width
    return heads * (query + value)

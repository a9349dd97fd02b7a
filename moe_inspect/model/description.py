"""Description: what `describe` returns, in numbers and as text.

E experts, k chosen per token.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import plural, ranges
from moe_inspect.trace import schema
from moe_inspect.trace.reader import open_trace

if TYPE_CHECKING:
    import pandas as pd

Fact = tuple[str, float | None, str]  # key, number or None, text
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

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """What the command prints: at most 20 lines of 80 columns."""
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def _lines(self) -> Iterator[str]:
        yield self.kind + (f": {plural(self.layers, 'layer')}" if self.layers else "")
        if self.routers:
            layers = sorted({layer for layer, _, _ in self.routers})
            shapes = sorted({(k, e) for _, e, k in self.routers})
            shared = (
                f", {plural(self.shared_experts, 'shared expert')}" if self.shared_experts else ""
            )
            yield from textwrap.wrap(
                f"{plural(len(self.routers), 'router')} in layers "
                f"{ranges(layers).replace(',', ', ')}: "
                f"{' or '.join(f'{k} of {e}' for k, e in shapes)} experts per token{shared}"
                + (f", {self.scoring}" if self.scoring else ""),
                80,
                subsequent_indent="  ",
            )
        else:
            yield "no routers: a dense model"
        if not self.parameters:
            yield "parameters and FLOPs are not known: the trace has no config of the model"
            return
        yield ""
        yield f"{'parameters':<20}{'in total':>20}{'per token':>20}"
        rows = [("all", self.parameters, self.parameters_active)]
        rows += [(part, self.total[part], self.active[part]) for part in PARTS if self.total[part]]
        yield from (f"  {name:<18}{total:>20,}{active:>20,}" for name, total, active in rows)
        yield ""
        memory = (f"{_bytes(b * self.parameters)} in {d}" for d, b in BYTES.items())
        yield f"memory  {', '.join(memory)}"
        prefill = self.flops_a_token((self.context + 1) / 2)
        yield (
            f"FLOPs   {_si(prefill)}FLOP per token of a text of {self.context:,} tokens, "
            f"{_si(self.flops_a_token(self.context))}FLOP for the last"
        )
        if self.routers:
            whole, few = self.parameters, self.parameters_active
            less = f"1/{whole / few:.2f} of the memory"
            more = self.flops_a_token((self.context + 1) / 2, dense=True) / prefill
            yield f"dense   of {few:,} parameters: the same FLOPs, {less}"
            yield f"        of {whole:,} parameters: {more:.2f}x the FLOPs, the same memory"

    def facts(self) -> list[Fact]:
        """(key, number or None, text)."""
        facts: list[Fact] = [
            ("class", None, self.kind),
        ]
        if self.parameters:
            facts += [
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
        if not self.parameters:
            return facts
        ratio = self.parameters / self.parameters_active
        prefill, decode = (
            self.flops_a_token((self.context + 1) / 2),
            self.flops_a_token(self.context),
        )
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
        if not self.routers:  # which is its own dense model
            return facts
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
    ) -> list[Fact]:
        """FLOPs of training on `tokens`; the GPU-hours that an MFU (model FLOPs utilisation: the
        model's FLOPs as a share of the GPU's peak, arXiv:2204.02311) implies, or the MFU that
        `gpu_hours` imply. MoeInspectError where the parameters are not known."""
        if not self.parameters:
            raise MoeInspectError(
                f"the FLOPs of {self.kind} are not known: give its config.json instead of a trace"
            )
        flops, peak = self.training_flops(tokens), PEAK_FLOPS[gpu]
        facts: list[Fact] = [
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


def of_trace(model: str) -> Description | None:
    """What a trace without a config of the model tells. None for another trace, or no trace."""
    if not (Path(model) / schema.MANIFEST).is_file():
        return None
    trace = open_trace(model)
    of_model: dict[str, Any] = trace.manifest.get("model", {})
    config: dict[str, Any] = of_model.get("config") or {}
    if config.get("model_type"):
        return None
    routers = trace.routers
    return Description(
        of_model.get("class") or of_model.get("id") or "model",
        0,
        0,
        [(router.layer, router.experts, router.top_k) for router in routers],
        routers[0].scoring,
        routers[0].shared_experts,
    )


def describe_table(made: Description, training: list[Fact] | None = None) -> pd.DataFrame:
    """Columns key, value (float, NaN where the fact is no number) and text."""
    import pandas as pd

    return pd.DataFrame([*made.facts(), *(training or [])], columns=["key", "value", "text"])


def _one_or_several(key: str, values: set[int]) -> list[Fact]:
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

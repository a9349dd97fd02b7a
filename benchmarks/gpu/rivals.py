"""Models of random weights, and the ways of running them that are compared."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import moe_inspect
from benchmarks.gpu.bench import Bench
from moe_inspect.capture.hook import experts
from moe_inspect.model.find import find_routers

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # layers of the real width, few of them
    "Mixtral": (
        "MixtralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2},
    ),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        }
        | {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 6,
        },
    ),
    "OLMoE": (
        "OlmoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        }
        | {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 6},
    ),
}

OFF, ON = "ours, not recording", "ours, recording"
TAP = "stock, recorded by tap"
LOGITS, HOOK = "stock + output_router_logits", "stock + hook, .cpu()"
CAPTURES = {ON: "dispatch", TAP: "tap"}
CAPTURABLE = ("grouped_mm", "batched_mm", OFF, ON)  # the others wait for the host


@dataclass(frozen=True)
class Workload:
    name: str
    B: int
    S: int
    stock: str  # what transformers runs: `generate` decodes with batched_mm

    @property
    def rivals(self) -> list[str]:
        decoding = ["batched_mm"] if self.stock == "batched_mm" else []
        return ["stock eager", "grouped_mm", *decoding, OFF, ON, LOGITS, HOOK]


def a_model(bench: Bench, family: str, width: dict[str, Any], **options: Any) -> Any:
    """A model of random weights, of the family's sizes except those that `width` gives."""
    name, given = FAMILIES[family]
    kind = getattr(transformers, name)
    known = {k: v for k, v in {**given, **width}.items() if k in given or k == "vocab_size"}
    config = kind(**known, pad_token_id=None, bos_token_id=0, eos_token_id=1, **options)
    torch.manual_seed(0)
    with torch.device(bench.device.type):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def to_host(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook that people write: it copies the router's choice to the host at once."""
    for value in [*args, *kwargs.values()][1:3]:
        value.cpu()


@contextmanager
def running(
    bench: Bench, model: Any, rival: str, work: Workload, captured: bool
) -> Iterator[Callable[[], Any]]:
    """One step of `model` under a rival, warmed up (and captured)."""
    host_ids = torch.randint(
        0, model.config.vocab_size, (work.B, work.S), generator=torch.Generator().manual_seed(0)
    )
    inputs = {"input_ids": host_ids.to(bench.device.type), "logits_to_keep": 1}
    if work.S == 1:
        inputs["past_key_values"] = transformers.StaticCache(
            config=model.config, max_cache_len=bench.sizes.cache
        )
    named = {
        "stock eager": "eager",
        "grouped_mm": "grouped_mm",
        "batched_mm": "batched_mm",
        OFF: experts.NAME,
    }
    model.set_experts_implementation(named.get(rival, work.stock))
    if rival == LOGITS:
        inputs["output_router_logits"] = True

    def call() -> None:
        model(**inputs)

    with ExitStack() as stack:
        if rival == HOOK:
            for site in find_routers(model):
                stack.callback(
                    site.module.register_forward_pre_hook(to_host, with_kwargs=True).remove
                )
        recorder = None
        if rival in CAPTURES:
            trace = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "trace"
            recorder = stack.enter_context(
                moe_inspect.record(
                    model, trace, capture=CAPTURES[rival], ring_tokens=host_ids.numel()
                )
            )
        for _ in range(bench.sizes.steps):
            call()
        step = bench.device.graph(call, recorder) if captured else call
        if captured and recorder is not None:
            replay, announce = (
                step,
                functools.partial(recorder.step, host_ids.numel(), input_ids=host_ids),
            )

            def step() -> None:
                announce()
                replay()

        step()
        yield step

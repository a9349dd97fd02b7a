"""Real serving engines, on a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import moe_inspect
from tests.real_engines.models import save

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Engine:
    """`command`: what starts it, before the directory of the model; `tied`: whether its Mixtral
    takes the embeddings as its output matrix where the config says so."""

    name: str
    command: tuple[str, ...]
    options: tuple[str, ...]
    environment: Mapping[str, str]
    tied: bool


ENGINES = {
    "vllm": Engine(
        "vLLM",
        (str(BIN / "vllm"), "serve"),
        ("--enforce-eager",),
        {
            "TRITON_INTERPRET": "1",  # its kernels, on a CPU
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_MLA_DISABLE": "1",  # it has no kernel on a CPU
        },
        tied=True,
    ),
    "sglang": Engine(
        "SGLang",
        (sys.executable, "-m", "sglang.launch_server", "--device", "cpu", "--model-path"),
        (
            "--disable-overlap-schedule",
            "--disable-radix-cache",
            *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
            *("--max-total-tokens", "20000"),
        ),
        {"SGLANG_USE_CPU_ENGINE": "1"},
        tied=False,
    ),
}
# SGLang's attention by the kernels that `sglang_cpu` has in torch: torch_native can neither verify
# drafts nor attend to a latent cache. --attention-backend takes intel_amx with all kernels only.
PARTS = ("prefill-attention", "decode-attention", "speculative-draft-attention")
WITH_KERNELS = tuple(word for part in PARTS for word in (f"--{part}-backend", "intel_amx"))
# for parametrize; the ids are what `make test-vllm` and `make test-sglang` select
INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            find_spec(name) is None, reason=f"make test-{name} installs {engine.name}"
        ),
    )
    for name, engine in ENGINES.items()
]


@dataclass(frozen=True)
class Served:
    engine: str
    name: str  # of the model
    model: Path
    url: str


@contextmanager
def serving(engine: str, name: str, place: Path) -> Iterator[Served]:
    """A server of the model, in float32, while the block runs. Its output is in `place`/log."""
    model = save(name, place / "model", ENGINES[engine].tied)
    with serving_at(engine, model, place) as url:
        yield Served(engine, name, model, url)


@contextmanager
def serving_at(engine: str, model: Path, place: Path, *options: str) -> Iterator[str]:
    """The URL of a server of a directory."""
    start = ENGINES[engine]
    command = [*start.command, str(model), *start.options, "--dtype", "float32", *options]
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in start.environment.items():
            patch.setenv(variable, value)
        # what it compiles with is looked for there
        patch.setenv("PATH", str(BIN), prepend=os.pathsep)
        with moe_inspect.serve_engine(command, log=place / "log") as served:
            yield served.url

"""Real serving engines, on a CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tests.real_engines.models import MODELS, OTHERWISE, save

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
# SGLang runs a DeepSeek-V2 with YaRN alone on a CPU (one by the factor 1 changes no angle), and
# reads keys that transformers does not write
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 1.0}
YARN |= {"original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 1.0}
OVERRIDE = {"rope_parameters": YARN, "moe_layer_freq": 1, "scoring_func": "softmax"}
LATENT = (*WITH_KERNELS, "--json-model-override-args", json.dumps(OVERRIDE))
# Engines and models for parametrize. `make test-vllm` and `make test-sglang` select by the ids.
SERVED = [
    pytest.param(
        (name, model),
        marks=pytest.mark.skipif(
            find_spec(name) is None, reason=f"make test-{name} installs {engine.name}"
        ),
        id=f"{name}-{model}",
    )
    for name, engine in ENGINES.items()
    for model in MODELS
    if (name, model) not in OTHERWISE
]


@dataclass(frozen=True)
class Served:
    engine: str
    name: str  # of the model
    model: Path
    url: str


@contextmanager
def serving(engine: str, name: str, place: Path) -> Iterator[Served]:
    """A server that returns the routed experts of the model, in float32, while the block runs."""
    start = ENGINES[engine]
    model = save(name, place / "model", start.tied)
    command = [*start.command, str(model), *start.options, "--dtype", "float32"]
    variables = {**start.environment, "VLLM_USE_V2_MODEL_RUNNER": "1"}  # V1 returns none
    with running([*command, "--enable-return-routed-experts"], place, variables) as url:
        yield Served(engine, name, model, url)


@contextmanager
def running(command: Sequence[str], place: Path, variables: Mapping[str, str]) -> Iterator[str]:
    """The URL of the server that the command starts, with these variables. Its output is in
    `place`/log. At the end of the block the server is stopped, and with SIGKILL what it leaves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # what it compiles with is looked for there
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    url, log = f"http://127.0.0.1:{port}", place / "log"
    with log.open("ab") as said:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, **variables},
            start_new_session=True,
        )
    try:
        while not answers(f"{url}/v1/models"):
            assert server.poll() is None, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False

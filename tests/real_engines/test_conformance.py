"""The conformance of real engines, on a CPU: the routes that they return of each tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_inspect.conformance.check import check
from moe_inspect.conformance.models import MODELS, save
from tests.real_engines.server import ENGINES, INSTALLED, WITH_KERNELS, serving_at

# small chunks, and a cache in which not all requests fit
OPTIONS = {
    "vllm": (
        *("--max-num-batched-tokens", "128", "--max-num-seqs", "8"),
        *("--num-gpu-blocks-override", "14"),
    ),
    "sglang": ("--chunked-prefill-size", "128", "--max-running-requests", "8"),
}
# vLLM's rotary kernel for a CPU is wrong for queries of three dimensions, [tokens, heads, size],
# which only this model gives it: with torch in its place every decision is right
NO_ROTARY_KERNEL = ("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}')
# SGLang runs a DeepSeek-V2 with YaRN alone on a CPU (one by the factor 1 changes no angle), and
# reads keys that transformers does not write
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 1.0}
YARN |= {"original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 1.0}
OVERRIDE = {"rope_parameters": YARN, "moe_layer_freq": 1, "scoring_func": "softmax"}
LATENT = (*WITH_KERNELS, "--json-model-override-args", json.dumps(OVERRIDE))
OF_MODEL = {("vllm", "deepseek-v2"): NO_ROTARY_KERNEL, ("sglang", "deepseek-v2"): LATENT}
# what an engine runs as another model, so that no decision is right but by chance
OTHERWISE = {("sglang", "qwen3-moe"): "to SGLang none is"}


@pytest.mark.parametrize("engine", INSTALLED)
@pytest.mark.parametrize("name", list(MODELS))
def test_routes(
    engine: str, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model = save(name, tmp_path / name)
    options = (*OPTIONS[engine], *OF_MODEL.get((engine, name), ()))
    with serving_at(engine, model, tmp_path, *options) as url:
        found = check(url, model)
    table, run, otherwise = found.table, MODELS[name][0], OTHERWISE.get((engine, name))
    if otherwise is None:
        assert found.ok, f"{table}\n{found.findings}"
        assert table.undecided.sum() <= table.decisions.sum() / 1000
    else:
        run = f"{run} ({otherwise})"
        assert {one.kind for one in found.findings} == {"wrong"}
        assert (table.wrong >= 0.95 * table.decisions).all()
    numbers = f"{table.equal.sum():,} of {table.decisions.sum():,}"
    row = f"| {ENGINES[engine].name} {version(engine)} | {name} | {run} |"
    record_property(f"conformance-{engine}", f"{row} {table.tokens.sum():,} | {numbers} |")

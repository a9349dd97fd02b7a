"""The conformance of real engines, on a CPU: the routes that they return of each tiny model."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_inspect.conformance.check import check
from moe_inspect.conformance.models import MODELS, save
from tests.real_engines.server import ENGINES, INSTALLED, serving_at

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
OF_MODEL = {("vllm", "deepseek-v2"): NO_ROTARY_KERNEL}


@pytest.mark.parametrize("engine", INSTALLED)
@pytest.mark.parametrize("name", list(MODELS))
def test_routes(
    engine: str, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model = save(name, tmp_path / name)
    options = (*OPTIONS[engine], *OF_MODEL.get((engine, name), ()))
    with serving_at(engine, model, tmp_path, *options) as url:
        found = check(url, model)
    table = found.table
    assert found.ok, f"{table}\n{found.findings}"
    assert table.undecided.sum() <= table.decisions.sum() / 1000
    numbers = f"{table.equal.sum():,} of {table.decisions.sum():,}"
    row = f"| {ENGINES[engine].name} {version(engine)} | {name} | {MODELS[name][0]} |"
    record_property(f"conformance-{engine}", f"{row} {table.tokens.sum():,} | {numbers} |")

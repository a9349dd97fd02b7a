"""The plugin inside a real vLLM, on a CPU, against the same requests in transformers: each decision of each
token that the engine computed, by request and position."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from tests.conftest import ROOT
from tests.real_engines.models import MODELS, save
from tests.real_engines.server import BIN, ENGINES

Property = Callable[[str, object], None]
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm installs vLLM")
# of two logits so close, sums in another order may exchange the experts
NEAR = 1e-5
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 1,
}


@dataclass(frozen=True)
class Asked:
    """A request, what it was answered, how many of its tokens a cache had, and the routed experts that
    the engine returned [tokens, blocks, K]."""

    request: str
    prompt: list[int]
    answer: list[int]
    cached: int | None
    routed: list[Any] | None = None

    @property
    def fed(self) -> list[int]:
        return self.prompt + self.answer[:-1]


def environment(runner: str, **variables: object) -> dict[str, str]:
    more = {f"MOE_INSPECT_{name.upper()}": str(value) for name, value in variables.items()}
    return {
        **os.environ,
        **ENGINES["vllm"].environment,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2")),
        "VLLM_MLA_DISABLE": "1",  # it has no kernel on a CPU
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def generated(
    place: Path,
    model: Path,
    runner: str,
    generate: int = 16,
    engine: Any = None,
    **variables: object,
) -> list[Asked]:
    """The answers of an engine in a process of its own; its traces are in `place`/runs."""
    asked = {"model": str(model), "answers": str(place / "answers"), "generate": generate}
    asked["engine"] = {"enforce_eager": True, **(engine or {})}
    done = subprocess.run(
        [sys.executable, "-m", "tests.real_engines.load", json.dumps(asked)],
        cwd=ROOT,
        env=environment(runner, trace=place / "runs", **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [Asked(**json.loads(line)) for line in (place / "answers").read_text().splitlines()]


def decisions(trace: moe_inspect.Trace) -> pd.DataFrame:
    """A row per decision: source, position, layer, phase, token_id, its experts in ascending order as
    `experts`, and `first`."""
    tokens = trace.tokens().merge(trace.documents()[["document", "source"]], on="document")
    routing = trace.routing()
    slots = [name for name in routing if name.startswith("expert_")]
    ids = routing[slots].to_numpy(np.int64)
    found = routing[["token", "layer"]].assign(
        experts=[*map(tuple, np.sort(ids, 1))], first=ids[:, 0]
    )
    return found.merge(tokens, on="token")


def request_of(source: str) -> str:
    """The request that a client knows, of vLLM's own name for it."""
    return re.sub(r"-[0-9a-f]{8}$", "", source)


def compared(traces: Sequence[Path], asked: Sequence[Asked], model: Path) -> tuple[int, int, int]:
    """Asserts that the traces are those of these requests; (tokens, equal decisions, decisions)."""
    import torch
    from transformers import AutoModelForCausalLM

    for path in traces:
        found = moe_inspect.verify(path)
        assert found.ok, found
    got = pd.concat([decisions(moe_inspect.open_trace(path)) for path in traces])
    got["request"] = got.source.map(request_of)
    assert set(got.request) <= {one.request for one in asked}, set(got.request)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    local_path = traces[0].parent.with_name("local")
    with torch.no_grad(), moe_inspect.record(network, local_path, logits=True, overwrite=True):
        for one in asked:
            network(input_ids=torch.tensor([one.fed]))
    trace = moe_inspect.open_trace(local_path)
    local = decisions(trace).assign(request=lambda t: [asked[d].request for d in t.document])
    local["logits"] = [*np.concatenate([logits_of(trace, r) for r in range(len(trace.routers))])]
    both = got.merge(
        local, on=["request", "position", "layer"], how="left", suffixes=("", "_local")
    )
    assert both.experts_local.notna().all(), "more was recorded than was fed"
    assert (both.token_id == both.token_id_local).all()
    same = both.experts == both.experts_local
    for row in both[~same].itertuples():
        apart = set(row.experts) ^ set(row.experts_local)
        values = np.array(row.logits, np.float64)[[*apart]]
        assert np.ptp(values) < NEAR, row
    # the comparison can fail: with another token's experts, it does
    assert (both.experts == both.experts_local.shift(1)).mean() < 0.9
    check_rows(got, asked)
    return len(got) // got.layer.nunique(), int(same.sum()), len(both)


def logits_of(trace: moe_inspect.Trace, r: int) -> np.ndarray:
    return np.concatenate([shard.logits(r) for shard in trace.shards])


def check_rows(got: pd.DataFrame, asked: Sequence[Asked]) -> None:
    """Every request has the rows that were fed and not cached, of the phases that they are."""
    once = got.drop_duplicates(["request", "position"])
    rows, first = once.groupby("request").size(), once.groupby("request").position.min()
    for one in asked:
        if one.cached is not None:
            assert rows.get(one.request, 0) == len(one.fed) - one.cached, one.request
            assert first[one.request] == one.cached
    prompt = once.request.map({one.request: len(one.prompt) for one in asked})
    assert ((once.phase == "decode") == (once.position >= prompt)).all()


def traces_in(place: Path) -> list[Path]:
    return sorted((place / "runs").iterdir())


def recorded(record: Property, name: str, run: str, numbers: tuple[int, int, int]) -> None:
    tokens, equal, total = numbers
    engine = f"vLLM {version('vllm')}"
    record("plugin", f"| {engine} | {name} | {run} | {tokens:,} | {equal:,} of {total:,} |")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "Qwen3-MoE"])
def test_every_decision(
    name: str, runner: str, mode: str, tmp_path: Path, record_property: Property
) -> None:
    """In chunks of 128 tokens, behind a prefix cache."""
    model = save(name, tmp_path / "model")
    engine = {"enforce_eager": mode == "eager"}
    if runner == "V2" and mode == "eager":
        engine["enable_return_routed_experts"] = True
    asked = generated(tmp_path, model, runner, engine=engine)
    assert any(one.cached for one in asked), "nothing was cached"
    (path,) = traces_in(tmp_path)
    assert moe_inspect.open_trace(path).status == "complete"
    recorded(record_property, name, f"runner {runner}, {mode}", compared([path], asked, model))
    if engine.get("enable_return_routed_experts"):
        as_returned(path, asked)


def as_returned(path: Path, asked: Sequence[Asked]) -> None:
    got = decisions(moe_inspect.open_trace(path))
    of_request = {one.request: one.routed for one in asked}
    for row in got.itertuples():
        routed = of_request[request_of(row.source)]
        assert routed is not None
        if row.position < len(routed):
            assert tuple(sorted(routed[row.position][row.layer])) == row.experts


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_what_is_computed_again_is_a_sequence_of_its_own(
    runner: str, tmp_path: Path, record_property: Property
) -> None:
    model = save("bundled Mixtral", tmp_path / "model")
    asked = generated(tmp_path, model, runner, 150, {"num_gpu_blocks_override": 14})
    (path,) = traces_in(tmp_path)
    tokens = moe_inspect.open_trace(path).tokens()
    assert tokens.duplicated(["document", "position"]).any(), "nothing was preempted"
    numbers = compared([path], asked, model)
    recorded(record_property, "bundled Mixtral", f"runner {runner}, preempted", numbers)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_rejected_drafts_are_absent(runner: str, tmp_path: Path, record_property: Property) -> None:
    model = save("bundled Mixtral", tmp_path / "model")
    asked = generated(tmp_path, model, runner, 60, {"speculative_config": NGRAM})
    (path,) = traces_in(tmp_path)
    numbers = compared([path], asked, model)
    recorded(record_property, "bundled Mixtral", f"runner {runner}, n-gram speculation", numbers)

"""A trace replayed by the routing simulator of a real vLLM, as the plugin records it there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.capture.engine.replay import Replay
from moe_inspect.trace.shard import Shard
from tests.real_engines.models import save
from tests.real_engines.test_inside_vllm import closed_in, generated

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm installs vLLM")


@pytest.fixture
def replayed(tmp_path: Path) -> Path:
    """A trace of another model of the same size."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save("OLMoE", tmp_path / "other")).eval()
    path = tmp_path / "replayed"
    with torch.no_grad(), moe_inspect.record(model, path):
        for n in range(12):
            generator = torch.Generator().manual_seed(n)
            model(input_ids=torch.randint(0, 3072, (1, 20 + 10 * n), generator=generator))
    return path


@pytest.mark.parametrize(("runner", "mode"), [("V1", "eager"), ("V1", "compiled"), ("V2", "eager")])
def test_an_engine_routes_each_request_as_a_text_of_the_trace(
    runner: str, mode: str, replayed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "moe_inspect")
    model = save("OLMoE", tmp_path / "model")
    engine = {"enforce_eager": mode == "eager", "load_format": "dummy"}
    generated(tmp_path, model, runner, engine=engine, replay=replayed)
    (path,) = closed_in(tmp_path)
    trace = moe_inspect.open_trace(path)
    L, (router, *_) = len(trace.routers), trace.routers
    replay = Replay(replayed, (L, router.experts, router.top_k), torch.device("cpu"))
    source = trace.documents().set_index("document").source
    for shard in trace.shards:
        tokens = shard.tokens().to_pandas()
        places = [replay.place(source[document]) for document in tokens.document]
        at = [
            first + (begins + position) % length
            for (first, length, begins), position in zip(places, tokens.position, strict=True)
        ]
        for r in range(L):
            expected = replay.ids[r][torch.tensor(at)].numpy()
            assert np.array_equal(np.sort(expected, 1), np.sort(Shard.ids(shard, r), 1))
    assert trace.n_tokens > 2_000

"""A trace as an engine replays it: each request as a sequence of it, from some token on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.capture.engine.replay import Replay
from moe_inspect.errors import MoeInspectError
from tests.conftest import ROOT
from tests.support.damage import edit_lines
from tests.support.engines import Vllm, VllmV2, recorded, span, written

TRACE = ROOT / "sample_traces" / "collapsed"
SHAPE = (4, 8, 2)
CPU = torch.device("cpu")


def statistics_of(ids_LTK: np.ndarray, follows_T: np.ndarray) -> np.ndarray:
    """Share of each expert, of each pair of experts, and of the experts that the token before chose
    too, of each layer."""
    chosen_LTE = np.zeros((*ids_LTK.shape[:2], 8))
    np.put_along_axis(chosen_LTE, ids_LTK, 1, 2)
    pairs = np.einsum("lte,ltf->lef", chosen_LTE, chosen_LTE) / len(follows_T)
    both = (chosen_LTE[:, 1:] * chosen_LTE[:, :-1]).sum(2)[:, follows_T[1:]]
    return np.concatenate([chosen_LTE.mean(1).ravel(), pairs.ravel(), both.mean(1)])


def test_load_co_activation_and_persistence_are_those_of_the_trace() -> None:
    replay = Replay(TRACE, SHAPE, CPU)
    requests = [f"request {n}" for n in range(2_000)]
    edges, positions = np.arange(2_001) * 50, torch.arange(50).repeat(2_000)
    at_T = replay.at(requests, edges, positions)
    replayed = statistics_of(replay.ids[:, at_T].long().numpy(), positions.numpy() > 0)
    tokens = recorded(TRACE).sort_values(["document", "position"], kind="stable")
    ids_LNK = np.stack([*tokens.experts]).astype(int).transpose(1, 0, 2)
    places = tokens.reset_index().groupby("document").indices
    rng, drawn = np.random.default_rng(0), []
    for _ in range(100):
        of = [places[d] for d in rng.integers(len(places), size=len(places))]
        follows = np.concatenate([np.arange(len(rows)) > 0 for rows in of])
        drawn.append(statistics_of(ids_LNK[:, np.concatenate(of)], follows))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    inside = (low <= replayed) & (replayed <= high)
    assert inside.mean() > 0.98, np.flatnonzero(~inside)
    # control: tokens that are drawn one by one keep the load, but do not persist
    mixed_T = at_T[torch.randperm(len(at_T))]
    alone = statistics_of(replay.ids[:, mixed_T].long().numpy(), positions.numpy() > 0)
    assert ((low <= alone) & (alone <= high))[:-4].mean() > 0.98
    assert not ((low <= alone) & (alone <= high))[-4:].any()


class Simulates:
    """Of vLLM: a router that chooses as a strategy says, which is named."""


def simulating(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The module of vLLM's routing simulator; the strategies that are registered."""
    name, known = "vllm.model_executor.layers.fused_moe.router", dict[str, Any]()
    patch.setitem(
        sys.modules,
        name,
        SimpleNamespace(
            routing_simulator_router=SimpleNamespace(
                RoutingStrategy=object,
                RoutingSimulatorRouter=Simulates,
                RoutingSimulator=SimpleNamespace(register_strategy=known.__setitem__),
            )
        ),
    )
    return known


@pytest.mark.parametrize("kind", [Vllm, VllmV2])
def test_a_request_is_routed_as_a_sequence_of_the_trace(
    kind: type[Vllm], start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From some token on, in whichever chunks it is computed, and through the sequence again when
    that ends. Requests begin at different places."""
    known = simulating(monkeypatch)
    engine = start(kind, REPLAY=TRACE, simulates=Simulates)
    engine.serve(14, seed=3)
    trace = written(engine)
    with pytest.raises(MoeInspectError, match="set MOE_INSPECT_REPLAY=DIR"):
        known["moe_inspect"].route_tokens()
    source = recorded(TRACE).sort_values(["document", "sequence", "position"])
    sequences = [np.stack([*of.experts]) for _, of in source.groupby(["document", "sequence"])]
    begins = set[tuple[int, int]]()
    for _, rows in recorded(Path(trace.path)).groupby("document"):
        ids, positions = np.stack([*rows.experts]), rows.position.to_numpy()
        found = {
            (n, first)
            for n, of in enumerate(sequences)
            for first in range(len(of))
            if (of[(first + positions[0]) % len(of)] == ids[0]).all()
            and (of[(first + positions) % len(of)] == ids).all()
        }
        assert found, rows.source.iloc[0]
        begins |= found if len(rows) > 5 else set()
    assert len(begins) > 4


def test_what_cannot_be_replayed_is_refused(
    tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe_inspect.open_trace(TRACE).export("counts", tmp_path / "counts.csv")
    moe_inspect.import_trace("counts", [tmp_path / "counts.csv"], tmp_path / "c", top_k=2)
    shutil.copytree(TRACE, tmp_path / "long")
    rows = {"documents": 60, "tokens": 2**18 + 1, "routing": 2**20 + 4, "logits": 2**20 + 4}
    lines = edit_lines(tmp_path / "long")
    more = [{"rows": rows[line["table"]], "last_token": 2**18} for line in lines]
    edit_lines(tmp_path / "long", [line | of for line, of in zip(lines, more, strict=True)])
    engine = start(Vllm, QUEUE_MB=0.001)
    engine.step(span("a", 0, 60))  # more than there is room for
    empty = written(engine).path
    for path, shape, said in (
        (TRACE, (5, 8, 2), "has 4 routers that choose 2 of 8 experts: the model has 5 that choose"),
        (TRACE, (4, 16, 2), "the model has 4 that choose 2 of 16"),
        (tmp_path / "long", SHAPE, r"262,145 tokens.*MOE_INSPECT_SAMPLE"),
        (empty, SHAPE, "holds no tokens to replay"),
        (tmp_path / "c", SHAPE, "counts only, no decisions to replay"),
    ):
        with pytest.raises(MoeInspectError, match=said):
            Replay(path, shape, CPU)
    simulating(monkeypatch)
    with pytest.raises(MoeInspectError, match="VLLM_MOE_ROUTING_SIMULATION_STRATEGY=moe_inspect"):
        start(Vllm, REPLAY=TRACE)

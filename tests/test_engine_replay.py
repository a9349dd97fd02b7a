"""A trace as an engine replays it: each request as a sequence of it, from some token on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.capture.engine import replay as module
from moe_inspect.capture.engine.replay import Replay
from moe_inspect.errors import MoeInspectError
from tests.conftest import ROOT

TRACE = ROOT / "sample_traces" / "collapsed"
SHAPE = (4, 8, 2)
CPU = torch.device("cpu")


def statistics_of(ids_LTK: np.ndarray, follows_T: np.ndarray) -> np.ndarray:
    """Share of each expert, of each pair of experts, and of the experts that the token before chose
    too, of each layer."""
    chosen_LTE = np.zeros((*ids_LTK.shape[:2], 8))
    np.put_along_axis(chosen_LTE, ids_LTK, 1, 2)
    load = chosen_LTE.mean(1)
    pairs = np.einsum("lte,ltf->lef", chosen_LTE, chosen_LTE) / len(follows_T)
    both = (chosen_LTE[:, 1:] * chosen_LTE[:, :-1]).sum(2)[:, follows_T[1:]]
    return np.concatenate([load.ravel(), pairs.ravel(), both.mean(1)])


def test_load_co_activation_and_persistence_are_those_of_the_trace() -> None:
    replay = Replay(TRACE, SHAPE, CPU)
    requests = [f"request {n}" for n in range(2_000)]
    edges, positions = np.arange(2_001) * 50, torch.arange(50).repeat(2_000)
    at_T = replay.at(requests, edges, positions)
    replayed = statistics_of(replay.ids[:, at_T].long().numpy(), positions.numpy() > 0)
    trace = moe_inspect.open_trace(TRACE)
    documents = trace.tokens().sort_values(["document", "position"], kind="stable")
    of_document = [rows.token.to_numpy() for _, rows in documents.groupby("document")]
    ids_LNK = np.stack([np.concatenate([s.ids(r) for s in trace.shards]) for r in range(4)])
    rng, drawn = np.random.default_rng(0), []
    for _ in range(100):
        tokens = [of_document[d] for d in rng.integers(len(of_document), size=len(of_document))]
        follows = np.concatenate([np.arange(len(of)) > 0 for of in tokens])
        drawn.append(statistics_of(ids_LNK[:, np.concatenate(tokens)], follows))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    inside = (low <= replayed) & (replayed <= high)
    assert inside.mean() > 0.98, np.flatnonzero(~inside)
    # tokens that are drawn one by one keep the load, but do not persist
    alone = statistics_of(
        replay.ids[:, at_T[torch.randperm(len(at_T))]].long().numpy(), positions > 0
    )
    assert ((low <= alone) & (alone <= high))[:-4].mean() > 0.98
    assert not ((low <= alone) & (alone <= high))[-4:].any()


def test_a_request_goes_on_where_it_was_and_begins_its_sequence_again() -> None:
    replay = Replay(TRACE, SHAPE, CPU)
    first, length, begins = replay.place("a")
    at = replay.at(["b", "a"], np.array([0, 1, 4]), torch.tensor([0, 0, 1, length]))
    assert at[1:].tolist() == [first + begins, first + (begins + 1) % length, first + begins]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((5, 8, 2), "has 4 routers that choose 2 of 8 experts: the model has 5 that choose 2 of 8"),
        ((4, 16, 2), "the model has 4 that choose 2 of 16"),
    ],
)
def test_a_trace_of_another_model_is_refused(shape: tuple[int, int, int], said: str) -> None:
    with pytest.raises(MoeInspectError, match=said):
        Replay(TRACE, shape, CPU)


def test_a_trace_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 1_000)
    with pytest.raises(MoeInspectError, match=r"9,254 tokens.*MOE_INSPECT_SAMPLE"):
        Replay(TRACE, SHAPE, CPU)


def test_counts_cannot_be_replayed(tmp_path: Path) -> None:
    moe_inspect.open_trace(TRACE).export("counts", tmp_path / "counts.csv")
    moe_inspect.import_trace("counts", [tmp_path / "counts.csv"], tmp_path / "t", top_k=2)
    with pytest.raises(MoeInspectError, match="counts only, no decisions to replay"):
        Replay(tmp_path / "t", SHAPE, CPU)

"""What the entries of training frameworks make of outputs and arguments; `make test-frameworks`
runs these. B batch rows, S positions, T rows a router sees, K slots, E experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe_inspect.capture.hook.arguments import by_name
from moe_inspect.model.custom import spec as frameworks
from moe_inspect.model.custom.spec import RouterSpec
from moe_inspect.model.find import sites_given

IDS = torch.tensor([[2, 0], [1, 3]])
WEIGHTS = torch.tensor([[0.25, 0.75], [0.5, 0.5]])


def megatron_router(**config: Any) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(**config))


def test_experts_that_megatron_fills_up_are_not_chosen() -> None:
    weights_TE = torch.tensor([[0.6, 0.4, 0.0], [0.0, 1.0, 0.0]])
    map_TE = torch.tensor([[True, True, False], [True, True, False]])  # expert 0 is filled up
    for pads, kept in ((True, [1]), (False, [0, 1])):
        router = megatron_router(moe_pad_expert_input_to_capacity=pads)
        found = frameworks.megatron(router, (), {}, (weights_TE, map_TE))
        assert found[0][0].nonzero().flatten().tolist() == [0, 1]
        assert found[0][1].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("rank", [0, 1])
def test_sequence_parallel_rows_of_megatron(rank: int) -> None:
    router = megatron_router(sequence_parallel=True)
    router.tp_group = SimpleNamespace(size=lambda: 2, rank=lambda: rank)
    B, S = 3, 4
    first = rank * 2
    expected = [b * S + s for s in (first, first + 1) for b in range(B)]  # position by position
    assert frameworks.megatron_rows(router, B, S).tolist() == expected
    assert frameworks.megatron_rows(megatron_router(sequence_parallel=False), B, S) is None


@pytest.mark.parametrize("by_keyword", [False, True])
def test_padding_of_nemo_goes_to_nobody(by_keyword: bool) -> None:
    real_T = torch.tensor([True, False])
    args, kwargs = ((None,), {"token_mask": real_T}) if by_keyword else ((None, real_T), {})
    found = frameworks.nemo(nn.Identity(), args, kwargs, (WEIGHTS, IDS, None))
    assert found[0].tolist() == [[2, 0], [-1, -1]]
    assert found[1] is WEIGHTS


def test_deepspeed_has_slots_first() -> None:
    ids_KT = torch.tensor([[2, 1], [0, -1]])
    output = (None, 4, 3, ids_KT, None, WEIGHTS.T, None)
    found = frameworks.deepspeed(nn.Identity(), (), {}, output)
    assert found[0].tolist() == [[2, 0], [1, -1]]
    assert torch.equal(found[1], WEIGHTS)


def test_deepspeed_before_release_0_19_has_a_map() -> None:
    weights_TEC = torch.zeros(2, 4, 3)
    weights_TEC[0, 2, 0], weights_TEC[0, 0, 1], weights_TEC[1, 1, 2] = 0.25, 0.75, 0.5
    output = (None, weights_TEC, weights_TEC > 0, None)
    map_TE, weights_TE = frameworks.deepspeed(nn.Identity(), (), {}, output)
    assert map_TE.tolist() == [[True, False, True, False], [False, True, False, False]]
    assert weights_TE.tolist() == [[0.75, 0, 0.25, 0], [0, 0.5, 0, 0]]


def test_a_router_that_gives_scores_alone_has_no_choice() -> None:
    assert frameworks.weights_first(nn.Identity(), (), {}, (WEIGHTS, None, None, None)) is None


@pytest.mark.parametrize("shared", [False, True])
def test_shared_experts_are_seen_beside_the_router(shared: bool) -> None:
    block = nn.Module()
    block.router, block.experts = nn.Linear(4, 3), nn.ModuleList([nn.Identity()] * 3)
    block.router = nn.ModuleDict({"_checkpoint_wrapped_module": block.router})
    if shared:
        block.shared_mlp = nn.Identity()
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    spec = RouterSpec(module="**.router", choice=frameworks.ids_first)
    (site,) = sites_given(model, [spec])
    assert (site.layer, site.experts, site.shared_experts) == (0, 3, int(shared))


FORWARD = ["input_ids", "position_ids", "attention_mask", "decoder_input", "labels"]


def test_a_later_stage_of_a_pipeline_has_no_token_ids() -> None:
    """Labels and positions are integers too, and hidden states are sequence first."""
    read, ids = by_name(FORWARD, sequence_first=True), torch.arange(6).reshape(2, 3)
    given = {"labels": ids, "position_ids": ids, "decoder_input": torch.zeros(3, 2, 8)}
    for name, tensor in given.items():
        found = read((None, None, None), {name: tensor})
        assert found["input_ids"] is None
        assert found["inputs_embeds"].shape[:2] == (2, 3)
    assert found["inputs_embeds"].shape == (2, 3, 8)

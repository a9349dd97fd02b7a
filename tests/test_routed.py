"""Payloads of engines' routed experts, and what a config.json says of a model's routers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import routed
from moe_inspect.model.config import facts_of, read_facts
from moe_inspect.trace.schema import Router
from tests.conftest import ROOT
from tests.support.foreign import npy
from tests.support.synthetic import uniform_ids

RAW = base64.b64decode(npy(np.zeros((2, 2, 2), np.uint8)))


def layered(T: int, blocks: int, E: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([uniform_ids(rng, T, E, k) for _ in range(blocks)], axis=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_vllm_payload_is_the_array_that_went_in(dtype: type, order: str):
    # a response of one token has no row
    for ids_TBK in (layered(9, 3, 8, 2), np.zeros((0, 1, 1))):
        array = np.asarray(ids_TBK, dtype, order)
        assert np.array_equal(routed.decode_vllm(npy(array), "here"), array)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ("é", "is not base64"),
        (npy(np.zeros((2, 2, 2), np.float32)), "not a .npy file of integers"),
        (npy(np.zeros((2, 2), np.uint8)), "has shape"),
        (npy(np.zeros((2, 2, 2), np.uint8))[:-4], "declares"),
        (base64.b64encode(RAW.replace(b"(2, 2, 2)", b"(9, 9, 9)")).decode(), "declares"),
    ],
)
def test_a_bad_payload_is_one_line(payload: object, said: str):
    with pytest.raises(MoeInspectError, match=said) as raised:
        routed.decode_vllm(payload, "f line 3: routed_experts")
    assert "\n" not in str(raised.value)
    assert "f line 3" in str(raised.value)


@pytest.mark.parametrize(
    ("E", "dtype"), [(8, np.uint8), (255, np.uint8), (256, np.uint16), (300, np.uint16)]
)
def test_minus_one_is_nowhere(E: int, dtype: type):
    shown, nowhere = np.array([[0, 1, -1], [E - 1, -1, -1]], np.int32), np.iinfo(dtype).max
    ids = routed.checked_ids(shown, Router(0, "", "", E, 3), "f")
    assert ids.dtype == dtype
    assert ids.tolist() == [[0, 1, nowhere], [E - 1, nowhere, nowhere]]
    assert routed.checked_ids(np.array([[2, 1, -1]]), Router(0, "", "", E, 2), "f").shape == (1, 2)


@pytest.mark.parametrize("k", [2, 6, 20])
def test_repeats_are_found_wherever_they_are(k: int):
    ids_TK = uniform_ids(np.random.default_rng(k), 50, 32, k).astype(np.int32)
    assert not routed.repeats(ids_TK).any()
    ids_TK[31, k - 1] = ids_TK[31, 0]
    assert np.nonzero(routed.repeats(ids_TK))[0].tolist() == [31]
    assert not routed.repeats(np.array([[-1] * k])).any()


def test_no_tokens_have_no_padding():
    assert routed.unrouted_ends(layered(30, 2, 64, 4)[:0].astype(np.int32)) == (0, 0)


# --- config.json


def blocks(number: int, **more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": number, "num_experts": 8, "num_experts_per_tok": 2} | more


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (blocks(6, first_k_dense_replace=1, moe_layer_freq=2), [2, 4]),
        (blocks(4, moe_layer_freq=[0, 1, 0, 1]), [1, 3]),
        (blocks(6, decoder_sparse_step=2, mlp_only_layers=[3]), [1, 5]),
        (blocks(4, expert_layer_period=2, expert_layer_offset=1), [1, 3]),
        (blocks(3, mlp_layer_types=["dense", "sparse", "sparse"]), [1, 2]),
        (
            {"num_hidden_layers": 4, "moe_num_experts": 8, "moe_k": 2}
            | {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
            [1, 2],
        ),
    ],
)
def test_a_config_says_which_blocks_route(config: dict, layers: list[int]):
    facts = facts_of(config, "m", "m/config.json")
    assert sorted(facts.experts) == layers
    assert set(facts.experts.values()) == {8}
    assert set(facts.top_k.values()) == {2}
    assert [r.layer for r in facts.routers()] == layers


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "lacks num_hidden_layers"),
        ({"num_hidden_layers": 2}, "lacks n_routed_experts"),
        ({"num_hidden_layers": 2, "num_experts": 8}, "lacks num_experts_per_tok"),
        (blocks(10**9), "num_hidden_layers is 1000000000"),
        (blocks(2, num_experts="8"), "num_experts is '8'"),
        (blocks(2, num_experts=2, num_experts_per_tok=3), "3 experts per token, but only 2 exp"),
        (blocks(2, moe_layer_freq=[1]), "moe_layer_freq is '.1.'"),
        (blocks(2, decoder_sparse_step=0.5), "decoder_sparse_step is"),
        (blocks(2, first_k_dense_replace=2), "dense model"),
    ],
)
def test_a_config_that_says_nothing_of_use_is_named(config: dict, said: str):
    with pytest.raises(MoeInspectError, match=said):
        facts_of(config, "m", "m/config.json")


def test_configs_are_read_from_where_they_are(tmp_path: Path):
    deepseek = read_facts(ROOT / "docs/configs/deepseek-v3.json")
    assert sorted(deepseek.experts) == list(range(3, 61))
    sizes = deepseek.layers, deepseek.experts[3], deepseek.top_k[3], deepseek.shared_experts
    assert sizes == (61, 256, 8, 1)
    for path in ("demo", ROOT / "sample_traces/balanced"):
        assert sorted(read_facts(path).experts) == [0, 1, 2, 3]
    (tmp_path / "config.json").write_text("[" * 100_000)
    for path, match in (
        ("nowhere.json", r"no config at nowhere\.json"),
        (ROOT / "docs/configs/llama-2-7b.json", r"dense|lacks"),
        (tmp_path, "not a model's config"),
    ):
        with pytest.raises(MoeInspectError, match=match):
            read_facts(path)


def test_the_vocabulary_is_the_tokenizers_own():
    import pandas as pd

    ours = read_facts("demo").vocabulary()
    assert ours is not None
    theirs = pd.read_parquet(ROOT / "sample_traces/balanced/vocabulary.parquet")
    pd.testing.assert_frame_equal(ours.to_pandas(), theirs)


def test_a_config_alone_says_what_the_built_model_has():
    """Of every family that the installed transformers ships."""
    torch = pytest.importorskip("torch")
    from moe_inspect.model.find import find_routers
    from moe_inspect.model.routers import top_k_of
    from tests.support import zoo

    compared = 0
    for family in set(zoo.FAMILIES) - set(zoo.WHY_NOT):
        with torch.device("meta"):
            model = zoo.model_class(family)._from_config(zoo.config(family))
        try:
            sites = find_routers(model)
        except MoeInspectError:  # routers of two stacks
            continue
        if any(getattr(s, "stack", "") for s in sites):
            continue
        facts = facts_of(json.loads(model.config.to_json_string(use_diff=False)), family, family)
        stated = {(layer, facts.experts[layer], facts.top_k[layer]) for layer in facts.experts}
        assert stated == {(s.layer, s.experts, top_k_of(s, model)) for s in sites}, family
        compared += 1
    assert compared >= 55

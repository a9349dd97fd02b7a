"""Routed experts of TensorRT-LLM's LLM API, saved as docs/import.md says.

T tokens, L layers with experts, K slots.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT
from tests.support import foreign
from tests.support.foreign import E
from tests.support.importing import decisions, taken

T = 6
IDS = foreign.drawn(T, 3)
ROUTED_TLK = np.stack(IDS, axis=1).astype(np.int16)
PROMPT, GENERATED = [7, 8, 9, 10], [20, 21, 22]  # T + 1: the last one is never fed


def saved(*outputs: np.ndarray) -> Path:
    """What the block of the page writes, where we are, for one request with these outputs."""
    page = (ROOT / "docs/import.md").read_text(encoding="utf-8")
    block = re.findall(r"^```py\n(.*?)^```", page, re.S | re.M)
    assert len(block) == 1
    tensors = [SimpleNamespace(numpy=lambda array=array: array) for array in outputs]
    made = [SimpleNamespace(token_ids=GENERATED, routed_experts=of) for of in tensors]
    result = SimpleNamespace(prompt_token_ids=PROMPT, outputs=made)

    def sampling(*, return_routed_experts: bool) -> bool:
        return return_routed_experts

    names = {
        "llm": SimpleNamespace(generate=lambda prompts, asked: [result] if asked else []),
        "prompts": [],
        "SamplingParams": sampling,
        **{"base64": base64, "io": io, "json": json, "np": np},
    }
    exec(block[0], names)
    return Path("results.jsonl").absolute()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(source: Path, config: bool = True) -> tuple[Trace, list[str]]:
    how = {"model": foreign.config_file(source.parent)} if config else {"experts": E}
    trace, said = taken(source.parent, "tensorrt-llm-routed", source, **how)
    checked = verify(source.parent / "t")
    assert checked.ok, checked.violation
    return trace, said


def test_each_output_of_a_request_is_a_document() -> None:
    other = np.stack(foreign.drawn(T, 4), axis=1).astype(np.int16)
    trace, said = read(saved(ROUTED_TLK, other))
    assert [r.layer for r in trace.routers] == foreign.ROUTED
    assert not any(r.first_choice_known for r in trace.routers)
    for n in range(2):
        assert np.array_equal(decisions(trace, n), np.concatenate([ROUTED_TLK[:, n], other[:, n]]))
    tokens = trace.tokens()
    assert tokens["token_id"].tolist() == [*PROMPT, *GENERATED[:2]] * 2
    assert tokens["phase"].tolist() == (["prefill"] * 4 + ["decode"] * 2) * 2
    assert tokens["document"].tolist() == [0] * T + [1] * T
    assert said == []


def test_forgotten_routes_are_left_out_and_split_the_sequence() -> None:
    routed_TLK = ROUTED_TLK.copy()
    routed_TLK[[0, 2]] = -1
    trace, said = read(saved(routed_TLK))
    tokens = trace.tokens()
    assert tokens["position"].tolist() == [1, 3, 4, 5]
    assert tokens["sequence"].tolist() == [0, 1, 1, 1]
    assert tokens["token_id"].tolist() == [8, 10, 20, 21]
    for n in range(2):
        assert np.array_equal(decisions(trace, n), IDS[n][[1, 3, 4, 5]])
    assert said == ["2 tokens are left out: the engine had forgotten their routes (−1)"]


def test_without_a_config_layers_are_numbered_from_0() -> None:
    trace, said = read(saved(ROUTED_TLK), config=False)
    assert [r.layer for r in trace.routers] == [0, 1]
    assert len(said) == 1
    assert "no rows for dense layers" in said[0]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (ROUTED_TLK[:, :1], "has 1 layers with experts, the model's config 2"),
        (np.repeat(ROUTED_TLK, 2, axis=1), "has 4 layers with experts, the model's config 2"),
        (ROUTED_TLK[:-1], "routed_experts has 5 tokens, not 6"),
        (np.concatenate([ROUTED_TLK, ROUTED_TLK[:1]]), "routed_experts has 7 tokens, not 6"),
    ],
)
def test_an_array_of_another_shape_is_refused(array: np.ndarray, said: str) -> None:
    with pytest.raises(MoeInspectError, match=said):
        read(saved(array))

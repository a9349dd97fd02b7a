"""Responses as engines and RL frameworks write them: T tokens, B blocks of the model, K slots."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT
from tests.support import foreign
from tests.support.foreign import E
from tests.support.importing import decisions, taken

T = 6
IDS = foreign.drawn(T, 3)
ROUTED_TBK = foreign.blocks(IDS).astype(np.uint8)  # block 0 is dense
ROUTED_TLK = np.stack(IDS, axis=1).astype(np.int16)
PROMPT, GENERATED = [7, 8, 9, 10], [20, 21, 22]  # T + 1: the last one is never fed
EXTENSION = {"routed_experts": base64.b64encode(ROUTED_TBK.astype("<i4").tobytes()).decode()}


def read(root: Path, line: dict[str, Any], format: str = "vllm-routed") -> tuple[Trace, list[str]]:
    foreign.lines(root / "r.jsonl", [line])
    model = foreign.config_file(root)
    return taken(root, format, root / "r.jsonl", model=model, overwrite=True)


def padded_line(array: np.ndarray) -> dict[str, Any]:
    experts = foreign.npy(array)
    return {"prompt_token_ids": PROMPT, "token_ids": GENERATED, "routed_experts": experts}


def check(trace: Trace, rows: slice = slice(None)) -> None:
    """The decisions of these rows of ROUTED_TBK, and the tokens they belong to."""
    for r, ids_TK in enumerate(IDS):
        assert np.array_equal(decisions(trace, r), ids_TK[rows])
    tokens = trace.tokens()
    assert tokens["token_id"].tolist() == [*PROMPT, *GENERATED][:T][rows]
    assert tokens["position"].tolist() == list(range(T))[rows]


# --- SGLang's routes


def test_the_chat_route_has_the_experts_of_the_first_choice_in_sglext(tmp_path: Path) -> None:
    choices = [{"index": n, "message": {"role": "assistant", "content": "x"}} for n in range(2)]
    extension = {"input_ids": PROMPT, "output_ids": [GENERATED, [50, 51]]} | EXTENSION
    line = {"object": "chat.completion", "choices": choices, "sglext": extension}
    trace, said = read(tmp_path, line, "sglang-routed")
    check(trace)
    assert trace.tokens()["phase"].tolist() == ["prefill"] * 4 + ["decode"] * 2
    assert said == [
        "1 choices are left out: SGLang returns the routed experts of the first choice only"
    ]


def test_the_completions_route_has_token_ids_in_the_choice(tmp_path: Path) -> None:
    choice = {"index": 0, "text": "x", "prompt_token_ids": PROMPT, "token_ids": GENERATED}
    trace, said = read(tmp_path, {"choices": [choice], "sglext": EXTENSION}, "sglang-routed")
    check(trace)
    assert said == []


def test_a_response_without_token_ids_names_the_request_parameter(tmp_path: Path) -> None:
    ids = {"output_ids": GENERATED, "meta_info": EXTENSION}
    for line, said in (
        (ids, "set return_prompt_token_ids in the request"),
        ({"choices": [{"text": "x"}], "sglext": EXTENSION}, "set return_token_ids in the request"),
        (
            {"choices": [{"prompt_token_ids": PROMPT}], "sglext": EXTENSION},
            "it lacks token_ids of the generated tokens: set return_token_ids",
        ),
    ):
        with pytest.raises(MoeInspectError, match=said):
            read(tmp_path, line, "sglang-routed")


@pytest.mark.parametrize(
    "field", ["start", "routed_experts_prompt_start", "routed_experts_start_len"]
)
def test_a_response_from_a_later_token_on_says_so_in_a_field(field: str, tmp_path: Path) -> None:
    line, why = padded_line(ROUTED_TBK[2:]), "_prompt_start .* write its value into the field start"
    with pytest.raises(MoeInspectError, match=why):
        read(tmp_path, line)
    check(read(tmp_path, {**line, field: 2})[0], slice(2, None))
    with pytest.raises(MoeInspectError, match=f": {field} is '-1'"):
        read(tmp_path, {**line, field: -1})


# --- padding


def padded(*rows: np.ndarray) -> np.ndarray:
    return np.concatenate([ROUTED_TBK.astype(np.int16), *rows])


def row(value: Any) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, np.int16), (1, *ROUTED_TBK.shape[1:]))


PADDING = [(0, [0]), (0, [-1]), (0, [[0, 1]]), (0, [0] * 9), (0, [0, -1]), (2, [0])]


@pytest.mark.parametrize(("before", "after"), PADDING)
def test_rows_of_padding_are_left_out(before: int, after: list[Any], tmp_path: Path) -> None:
    array = np.concatenate([row(0)] * before + [padded(*map(row, after))])
    trace, said = read(tmp_path, padded_line(array))
    check(trace)
    left_out = f"{before + len(after)} rows of 1 responses are left out"
    assert said == [f"{left_out}: padding, for tokens that no router saw"]


@pytest.mark.parametrize("before", [0, 2])
def test_padding_of_a_bare_array_is_left_out(before: int, tmp_path: Path) -> None:
    """In front it has token ids of its own."""
    array = np.concatenate([row(0)] * before + [padded(row(0))])
    np.save(tmp_path / "a.npy", array)
    np.save(tmp_path / "a.token_ids.npy", np.array([0] * before + [*PROMPT, *GENERATED]))
    model = foreign.config_file(tmp_path)
    trace, said = taken(tmp_path, "vllm-routed", tmp_path / "a.npy", model=model)
    check(trace)
    assert said[0].startswith(f"{before + 1} rows of 1 responses")


def test_tokens_whose_routes_were_not_kept_are_left_out(tmp_path: Path) -> None:
    array = ROUTED_TBK.copy()
    array[4:] = 0
    trace, said = read(tmp_path, padded_line(array))
    check(trace, slice(4))
    assert said[0].startswith("2 rows of 1 responses")


def test_rows_that_are_no_padding_are_refused(tmp_path: Path) -> None:
    """Zeros in front of tokens, and a row too many that a router wrote."""
    for at in (0, 3):
        array = ROUTED_TBK.copy()
        array[at] = 0
        why = r"token \d goes to one expert twice \(\[0, 0\]\); a dense layer or padding reads so"
        with pytest.raises(MoeInspectError, match=why):
            read(tmp_path, padded_line(array))
    with pytest.raises(MoeInspectError, match="routed_experts has 7 tokens, not 6"):
        read(tmp_path, padded_line(padded(ROUTED_TBK[:1])))


def test_with_one_expert_per_token_zeros_are_padding_only_where_the_number_of_rows_says_so(
    tmp_path: Path,
) -> None:
    sizes = {"num_hidden_layers": 2, "num_experts": E, "num_experts_per_tok": 1}
    (config := tmp_path / "one.json").write_text(json.dumps(sizes))
    array = np.array([[[3], [1]], [[2], [5]], [[0], [0]]], np.uint8)

    said: list[str] = []

    def load(source: Path) -> list[int]:
        how = {"model": config, "overwrite": True, "warn": said.append}
        return decisions(taken(tmp_path, "vllm-routed", source, **how)[0], 0).ravel().tolist()

    line = {"prompt_token_ids": [1, 2, 3], "routed_experts": foreign.npy(array)}
    foreign.lines(tmp_path / "r.jsonl", [{**line, "token_ids": []}])
    assert load(tmp_path / "r.jsonl") == [3, 2]
    assert said.pop(0).startswith("1 rows of 1 responses")
    foreign.lines(tmp_path / "r.jsonl", [{**line, "token_ids": [4]}])
    assert load(tmp_path / "r.jsonl") == [3, 2, 0]
    np.save(tmp_path / "a.npy", array)
    why = "the last row is zero in every layer: padding, or a token that went to expert 0"
    with pytest.raises(MoeInspectError, match=why):
        load(tmp_path / "a.npy")
    # one more than rows: the last row is a token's
    np.save(tmp_path / "a.token_ids.npy", np.arange(4))
    assert load(tmp_path / "a.npy") == [3, 2, 0]
    assert said == []


# --- TensorRT-LLM's LLM API


def of_tensorrt(root: Path, outputs: list[np.ndarray], **how: Any) -> tuple[Trace, list[str]]:
    """Of what the block of the page writes for one request with these outputs."""
    page = (ROOT / "docs/import.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.S | re.M)
    tensors = [SimpleNamespace(numpy=lambda array=array: array) for array in outputs]
    made = [SimpleNamespace(token_ids=GENERATED, routed_experts=of) for of in tensors]
    result = SimpleNamespace(prompt_token_ids=PROMPT, outputs=made)
    names = {
        "llm": SimpleNamespace(generate=lambda prompts, asked: [result] if asked else []),
        "prompts": [],
        "SamplingParams": lambda *, return_routed_experts: return_routed_experts,
        **{"base64": base64, "io": io, "json": json, "np": np},
    }
    with pytest.MonkeyPatch.context() as there:
        there.chdir(root)
        exec(block, names)
    how = how or {"model": foreign.config_file(root)}
    trace, said = taken(root, "tensorrt-llm-routed", root / "results.jsonl", **how)
    checked = verify(root / "t")
    assert checked.ok, checked.violation
    return trace, said


def test_each_output_of_a_request_is_a_document(tmp_path: Path) -> None:
    other = np.stack(foreign.drawn(T, 4), axis=1).astype(np.int16)
    trace, said = of_tensorrt(tmp_path, [ROUTED_TLK, other])
    assert [r.layer for r in trace.routers] == foreign.ROUTED
    assert not any(r.first_choice_known for r in trace.routers)
    for n in range(2):
        assert np.array_equal(decisions(trace, n), np.concatenate([ROUTED_TLK[:, n], other[:, n]]))
    tokens = trace.tokens()
    assert tokens["token_id"].tolist() == [*PROMPT, *GENERATED[:2]] * 2
    assert tokens["phase"].tolist() == (["prefill"] * 4 + ["decode"] * 2) * 2
    assert tokens["document"].tolist() == [0] * T + [1] * T
    assert said == []


def test_forgotten_routes_are_left_out_and_split_the_sequence(tmp_path: Path) -> None:
    routed_TLK = ROUTED_TLK.copy()
    routed_TLK[[0, 2]] = -1
    trace, said = of_tensorrt(tmp_path, [routed_TLK])
    tokens = trace.tokens()
    assert tokens["position"].tolist() == [1, 3, 4, 5]
    assert tokens["sequence"].tolist() == [0, 1, 1, 1]
    assert tokens["token_id"].tolist() == [8, 10, 20, 21]
    for n in range(2):
        assert np.array_equal(decisions(trace, n), IDS[n][[1, 3, 4, 5]])
    assert said == ["2 tokens are left out: the engine had forgotten their routes (−1)"]


def test_without_a_config_layers_are_numbered_from_0(tmp_path: Path) -> None:
    trace, (said,) = of_tensorrt(tmp_path, [ROUTED_TLK], experts=E)
    assert [r.layer for r in trace.routers] == [0, 1]
    assert "no rows for dense layers" in said


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (ROUTED_TLK[:, :1], "has 1 layers with experts, the model's config 2"),
        (np.repeat(ROUTED_TLK, 2, axis=1), "has 4 layers with experts, the model's config 2"),
        (ROUTED_TLK[:-1], "routed_experts has 5 tokens, not 6"),
        (np.concatenate([ROUTED_TLK, ROUTED_TLK[:1]]), "routed_experts has 7 tokens, not 6"),
    ],
)
def test_an_array_of_another_shape_is_refused(array: np.ndarray, said: str, tmp_path: Path) -> None:
    with pytest.raises(MoeInspectError, match=said):
        of_tensorrt(tmp_path, [array])

"""Responses as engines and RL frameworks write them: SGLang's OpenAI routes, request parameters,
rows of padding.

T tokens, B blocks of the model, K slots.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from tests.support import foreign
from tests.support.foreign import E
from tests.support.importing import decisions, taken

T = 6
IDS = foreign.drawn(T, 3)
ROUTED_TBK = foreign.blocks(IDS).astype(np.uint8)  # block 0 is dense
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
    line = {"choices": [choice], "sglext": EXTENSION}
    trace, said = read(tmp_path, line, "sglang-routed")
    check(trace)
    assert said == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            {"output_ids": GENERATED, "meta_info": EXTENSION},
            "set return_prompt_token_ids in the request",
        ),
        (
            {"choices": [{"text": "x"}], "sglext": EXTENSION},
            "set return_token_ids in the request",
        ),
        (
            {"choices": [{"prompt_token_ids": PROMPT}], "sglext": EXTENSION},
            "it lacks token_ids of the generated tokens: set return_token_ids",
        ),
    ],
)
def test_a_response_without_token_ids_names_the_request_parameter(
    line: dict, said: str, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    "rows", [[row(0)], [row(-1)], [row([0, 1])], [row(0)] * 9, [row(0), row(-1)]]
)
def test_rows_of_padding_are_left_out(rows: list[np.ndarray], tmp_path: Path) -> None:
    trace, said = read(tmp_path, padded_line(padded(*rows)))
    check(trace)
    left_out = f"{len(rows)} rows of 1 responses are left out"
    assert said == [f"{left_out}: padding, for tokens that no router saw"]


def test_padding_on_both_sides_is_left_out(tmp_path: Path) -> None:
    trace, said = read(tmp_path, padded_line(np.concatenate([row(0), row(0), padded(row(0))])))
    check(trace)
    assert said[0].startswith("3 rows of 1 responses")


def test_tokens_whose_routes_were_not_kept_are_left_out(tmp_path: Path) -> None:
    array = ROUTED_TBK.copy()
    array[4:] = 0
    trace, said = read(tmp_path, padded_line(array))
    check(trace, slice(4))
    assert said[0].startswith("2 rows of 1 responses")


@pytest.mark.parametrize("at", [0, 3])
def test_rows_of_zeros_in_front_of_tokens_are_refused(at: int, tmp_path: Path) -> None:
    array = ROUTED_TBK.copy()
    array[at] = 0
    why = r"token \d goes to one expert twice \(\[0, 0\]\); a dense layer or padding reads so"
    with pytest.raises(MoeInspectError, match=why):
        read(tmp_path, padded_line(array))


def test_a_row_too_many_that_a_router_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoeInspectError, match="routed_experts has 7 tokens, not 6"):
        read(tmp_path, padded_line(padded(ROUTED_TBK[:1])))


def test_padding_of_a_bare_array_is_left_out(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", padded(row(0)))
    np.save(tmp_path / "a.token_ids.npy", np.array([*PROMPT, *GENERATED]))
    model = foreign.config_file(tmp_path)
    trace, said = taken(tmp_path, "vllm-routed", tmp_path / "a.npy", model=model)
    check(trace)
    assert said[0].startswith("1 rows of 1 responses")


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

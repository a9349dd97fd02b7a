"""examples/record_responses.py, of a server whose decisions are known."""

from __future__ import annotations

import base64
import io
import json
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest

import moe_inspect
from moe_inspect.demo import MODEL_DIR
from moe_inspect.trace.verify import verify
from tests.conftest import Cli
from tests.test_cli_trace import save, write_jsonl
from tests.test_examples import EXAMPLES

LAYERS, EXPERTS, K, DENSE, VOCABULARY, END = 2, 8, 3, 0, 300, 1  # of the tiny DeepSeek-V3
EXAMPLE = str(EXAMPLES / "record_responses.py")
GREEDY = {"temperature", "repetition_penalty"}
FIELDS = {
    "/v1/completions": {"model", "prompt", "max_tokens", "return_token_ids", "cache_salt", *GREEDY},
    "/generate": {"input_ids", "sampling_params", "return_routed_experts", "extra_key"}
    | {"return_prompt_token_ids"},
}
Decide = Callable[[list[int]], np.ndarray]  # the tokens that were fed → experts [T, layers, k]


def decisions(token: np.ndarray, position: np.ndarray, layer: int) -> np.ndarray:
    """[T, K], distinct."""
    return ((token * 7 + position * 3 + layer * 5)[:, None] + np.arange(K)) % EXPERTS


def decided(fed: list[int]) -> np.ndarray:
    """The experts of the tiny model. Its dense layer reads as expert 0."""
    routed = np.zeros((len(fed), LAYERS, K), np.int64)
    for layer in range(DENSE + 1, LAYERS):
        routed[:, layer] = decisions(np.array(fed), np.arange(len(fed)), layer)
    return routed


def continued(prompt: list[int], most: int) -> list[int]:
    """What the server generates: some sequences end early, by END."""
    made: list[int] = []
    while len(made) < most and END not in made:
        ends = len(prompt) % 4 == 0 and len(made) == 2
        made.append(END if ends else 2 + (sum(prompt) + 31 * len(made)) % (VOCABULARY - 2))
    return made


def answered(path: str, asked: dict[str, Any], decide: Decide, length: int) -> dict[str, Any]:
    """As the engine of this path answers. ValueError for a request that it would refuse."""
    of_vllm = path == "/v1/completions"
    sampling = asked if of_vllm else asked["sampling_params"]
    prompt = asked["prompt" if of_vllm else "input_ids"]
    most = sampling["max_tokens" if of_vllm else "max_new_tokens"]
    if asked.keys() - FIELDS[path] or (
        not of_vllm and sampling.keys() - {*GREEDY, "max_new_tokens"}
    ):
        raise ValueError("unknown field")
    if not prompt or len(prompt) + most > length or (not of_vllm and len(prompt) > length - 7):
        raise ValueError("maximum context length exceeded")
    made = continued(prompt, most)
    routed = decide(prompt + made[:-1])
    finish = "stop" if made[-1] == END else "length"
    if of_vllm:
        np.save(sink := io.BytesIO(), routed.astype(np.uint8))
        choice = {"index": 0, "text": "", "finish_reason": finish, "prompt_token_ids": prompt}
        choice |= {"token_ids": made, "routed_experts": encoded(sink.getvalue())}
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}
    meta = {"finish_reason": {"type": finish}, "prompt_tokens": len(prompt)}
    meta["routed_experts"] = encoded(routed.astype("<i4").tobytes())
    return {"text": "", "output_ids": made, "prompt_token_ids": prompt, "meta_info": meta}


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@contextmanager
def serving(
    engine: str, length: int, decide: Decide = decided
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a server that stands in for the engine, and the requests that it has got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, answer: Any) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            card = {"id": "served", "owned_by": engine, "max_model_len": length}
            self.reply(*((200, {"data": [card]}) if self.path == "/v1/models" else (404, {})))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(asked)
            try:
                self.reply(200, answered(self.path, asked, decide, length))
            except ValueError as error:
                self.reply(400, {"error": {"message": str(error)}})

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save("deepseek_v3", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents=40, words=60))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("generate", [0, 5])
def test_every_row_is_what_the_server_decided(
    engine: str,
    generate: int,
    model: str,
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(engine, 47) as (url, requests):
        arguments = [url, model, corpus, str(tmp_path / "t"), str(generate)]
        monkeypatch.setattr(sys, "argv", ["record_responses.py", *arguments])
        runpy.run_path(EXAMPLE, run_name="__main__")
    trace = moe_inspect.open_trace(tmp_path / "t")
    tokens = trace.tokens()
    assert str(trace) in capsys.readouterr().out
    rows = trace.routing().merge(tokens, on="token")
    assert len(rows) == trace.n_tokens > 0
    assert set(rows["layer"]) == {DENSE + 1}
    fed = (rows[name].to_numpy(np.int64) for name in ("token_id", "position"))
    chosen = rows[[f"expert_{j}" for j in range(K)]].to_numpy()
    assert (chosen == decisions(*fed, DENSE + 1)).all()
    for _, text in tokens.groupby("sequence"):
        prompt, made = (text[text.phase == p].token_id.tolist() for p in ("prefill", "decode"))
        of_document = tokens[tokens.document == text.document.iloc[0]]
        last = text.sequence.iloc[0] == of_document.sequence.max()
        assert made == (continued(prompt, generate + 1)[:-1] if generate and last else [])
    salt = "cache_salt" if engine == "vllm" else "extra_key"
    assert len({asked[salt] for asked in requests}) == len(requests) == tokens.sequence.nunique()
    assert verify(trace.path).ok
    # the documents and the sequences of a local trace
    longest = 47 - max(generate + 3, 7)
    local = moe_inspect.trace_model(model, tmp_path / "local", data=[corpus], max_length=longest)
    name = ["document", "domain", "sequence", "position", "token_id"]
    prompts = tokens[tokens.phase == "prefill"][name].sort_values(name, ignore_index=True)
    assert prompts.equals(local.tokens()[name].sort_values(name, ignore_index=True))


def test_a_prompt_that_the_server_refuses_ends_the_example() -> None:
    names = runpy.run_path(EXAMPLE)
    with serving("vllm", 200) as (url, _):
        card = names["ask"](f"{url}/v1/models")["data"][0]
        with pytest.raises(HTTPError, match="400"):
            names["respond"](url, card, [5] * 201, 1)


def test_an_engines_routes_are_compared_with_a_local_trace(cli_here: Cli, tmp_path: Path) -> None:
    """The recipe of docs/engines.md: of a server that routes as the model does, and of one that
    exchanges two experts of one token."""
    corpus = write_jsonl(tmp_path / "texts.jsonl", documents=12, words=80)
    cli_here("trace", "demo", "-o", "local", "--data", corpus)
    local = moe_inspect.open_trace(tmp_path / "local")
    tokens, routing = local.tokens(), local.routing().sort_values(["token", "router"])
    slots = [name for name in routing if name.startswith("expert_")]
    L = len(local.routers)
    routed_TLK = routing[slots].to_numpy().reshape(-1, L, len(slots))
    rows = {tuple(text.token_id): text.token for _, text in tokens.groupby("sequence")}
    wrong = next(iter(rows))

    def as_the_model(fed: list[int]) -> np.ndarray:
        return routed_TLK[rows[tuple(fed)]]

    def otherwise(fed: list[int]) -> np.ndarray:
        routed = as_the_model(fed).copy()
        if tuple(fed) == wrong:
            free = set(range(8)) - {*routed[0, 1]}
            routed[0, 1, 0] = free.pop()
        return routed

    example = runpy.run_path(EXAMPLE)
    for decide, code in ((as_the_model, 0), (otherwise, 3)):
        with serving("vllm", 512, decide) as (url, _):
            out = str(tmp_path / f"served{code}")
            example["record"](url, str(MODEL_DIR), str(corpus), out)
        done = cli_here("compare", "local", out, "--fail-below", "overlap=1", check=code)
        assert ("failed: " in done.stderr) == (code == 3)

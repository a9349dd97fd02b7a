"""A server of `tests.support.engine` whose engine has the plugin inside."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.capture.engine import sidecar
from moe_inspect.capture.engine.described import ask, describe
from moe_inspect.capture.engine.settings import Settings
from moe_inspect.capture.engine.sidecar import Traces
from moe_inspect.capture.engine.step import Step
from tests.support.engine import DENSE, EXPERTS, VOCABULARY, K, Server, decisions

WEIGHTS = 0.5, 0.25, 0.125  # of every decision


def started(folder: Path, model: str) -> WithPlugin:
    """In a process of its own, which answers while another describes the model."""
    sidecar.COMMIT_S = 0.05
    settings = Settings.read()
    server = WithPlugin(folder, model, describe=ask, settings=settings)
    server.records = settings.start and settings.sample == 1
    server.state = None  # vLLM has the endpoint where VLLM_PLUGINS names the plugin
    return server


class WithPlugin(Server):
    """With the plugin inside, which records in `folder`, and the requests of others too; the server
    itself returns no routed experts unless `returns`. `state`: how the plugin says that it is, if
    it does; `sglang`: by the state of SGLang's server; without `text` its traces have no token ids;
    `lost`: at which of the requests a row is dropped; `records`: whether it records at all;
    `named`: what becomes of a request's name before the engine."""

    def __init__(
        self,
        folder: Path,
        model: str,
        sglang: bool = False,
        text: bool = True,
        lost: int | None = None,
        describe: Any = describe,
        settings: Settings | None = None,
    ):
        super().__init__()
        self.folder, self.sglang, self.lost = folder, sglang, lost
        self.returns, self.records = False, True
        self.named: Callable[[str], str] = lambda name: name
        self.state: dict[str, Any] | None = {"trace": str(folder), "host": socket.gethostname()}
        self.state |= {"on": True, "error": None, "sample": 1.0}
        about = {"engine": "vllm", "version": "0", "model": model, "tokenizer": model}
        about |= {"revision": None, "trust_remote_code": False, "vocabulary": VOCABULARY}
        about |= {"dtype": "float32", "device": "cpu", "rank": 0, "experts": EXPERTS, "top_k": K}
        about |= {"layers": [DENSE + 1], "paths": ["experts"], "physicals": False}
        folder.mkdir(parents=True, exist_ok=True)
        self.traces = Traces(about | vars(settings or Settings(folder, text=text)), describe)
        self.steps = 0

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, answer = super().answer(path, body)
        if status == 200:
            for found in (answer.get("meta_info", {}), *answer.get("choices", ())):
                _ = self.returns or found.pop("routed_experts", None)
            prompt = body["input_ids" if "input_ids" in body else "prompt"]
            made = answer["output_ids"] if "output_ids" in answer else answer["choices"][0]
            made = made if isinstance(made, list) else made["token_ids"]
            name = body.get("rid") or f"cmpl-{body.get('request_id', 'other')}-0-0badcafe"
            with self.lock:
                if not self.records:
                    return status, answer
                self.record(self.named(name), prompt, made)
                self.record(f"another-{self.steps}", prompt[::-1], made)
        return status, answer

    def record(self, name: str, prompt: list[int], made: list[int]) -> None:
        """In chunks; half of the prompt is computed twice, and the last token, which is not fed,
        once."""
        fed, P, half = prompt + made, len(prompt), len(prompt) // 2
        spans = [(0, half), (0, half), (half, P), *((n, n + 1) for n in range(P, len(fed)))]
        drop = self.lost == len(self.requests) - 1
        for first, end in spans:
            if first < end and not (drop and end == P):
                self.step(name, P, np.arange(first, end), np.array(fed[first:end]))
        self.traces.catch_up(wait=True)

    def step(self, name: str, P: int, position: np.ndarray, token: np.ndarray) -> None:
        self.steps, n = self.steps + 1, len(token)
        step = Step([name], [0, n], [P], [0], [2**31], None, None)
        arrays = {"tokens": token, "positions": position}
        arrays["ids"] = decisions(token, position, DENSE + 1)[None]
        arrays["weights"] = np.tile(np.array(WEIGHTS, np.float16), (1, n, 1))
        step.number, step.bytes = self.steps, n
        self.traces.write([step], arrays, 0)

    def about(self, path: str) -> dict[str, Any] | None:
        found = super().about(path)
        if self.state is None:
            return found
        if path == "/v1/moe_inspect" and not self.sglang:
            return {"engines": [self.state]}
        if path == "/server_info" and self.sglang:
            return {**(found or {}), "internal_states": [{"moe_inspect": self.state}]}
        return found

"""A server that speaks the protocols of engines as strictly as they do, and whose decisions are a
known function of token, position and layer.

As a program it stands in for an engine that is started: `python -m tests.support.engine serve MODEL
--port N …`, with what else it shall do in ENGINE_DOES, a JSON object.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.capture.engine.settings import tell_why
from moe_inspect.errors import MoeInspectError

LAYERS, EXPERTS, K, DENSE, VOCABULARY, END = 2, 8, 3, 0, 300, 1  # of the tiny DeepSeek-V3
KEY = "sesame"
MODEL_LENGTH = 200
SAMPLING = "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty"
OF_VLLM = (
    "model prompt max_tokens return_token_ids routed_experts_prompt_start cache_salt seed "
    "request_id"
)
OF_SGLANG = (
    "input_ids sampling_params return_routed_experts routed_experts_start_len "
    "return_prompt_token_ids extra_key rid"
)
FIELDS = {
    "/v1/completions": {*OF_VLLM.split(), *SAMPLING.split()},
    "/generate": {*OF_SGLANG.split()},
}


def decisions(token: np.ndarray, position: np.ndarray, layer: int) -> np.ndarray:
    """[T, K], distinct."""
    return ((token * 7 + position * 3 + layer * 5)[:, None] + np.arange(K)) % EXPERTS


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def continued(prompt: list[int], most: int) -> list[int]:
    """What the server generates: some sequences end early, by END."""
    made: list[int] = []
    while len(made) < most and END not in made:
        ends = len(prompt) % 4 == 0 and len(made) == 2
        made.append(END if ends else 2 + (sum(prompt) + 31 * len(made)) % (VOCABULARY - 2))
    return made


class Server:
    """`behave(n, path, body)` may return (status, headers, raw answer) in place of the true one to
    request n, or `edit` it."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.behave: Callable[
            [int, str, dict[str, Any]], tuple[int, dict[str, str], bytes] | None
        ] = lambda *_: None
        self.edit: Callable[[dict[str, Any]], None] = lambda answer: None
        self.routed: Callable[[np.ndarray], np.ndarray] = lambda routed: routed
        self.delay_s: Callable[[int], float] = lambda n: 0.0
        self.model_type, self.key = "deepseek_v3", None
        self.starting, self.gets = False, list[str]()
        self.length = MODEL_LENGTH
        self.forbidden = set[str]()  # paths

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if strange := set(body) - FIELDS[path]:
            return 400, {"error": {"message": f"unknown field {strange}"}}
        vllm = path == "/v1/completions"
        sampling = body if vllm else body["sampling_params"]
        if not vllm and set(sampling) - {"max_new_tokens", "sampling_seed", *SAMPLING.split()}:
            return 400, {"error": {"message": "unknown sampling parameter"}}
        prompt = body["prompt" if vllm else "input_ids"]
        most = sampling["max_tokens" if vllm else "max_new_tokens"]
        if vllm and (body["model"] != "served" or body["return_token_ids"] is not True):
            return 404, {"error": {"message": "no such model"}}
        if not (
            prompt
            and all(type(i) is int and 0 <= i < VOCABULARY for i in prompt)
            and len(prompt) + most <= self.length
            and (vllm or len(prompt) <= self.length - 7)
        ):
            return 400, {"error": {"message": "maximum context length exceeded"}}
        if not vllm:  # as SGLang does, which says nothing
            most = min(most, self.length - len(prompt) - 2)
        made = continued(prompt, most)
        fed = np.array(prompt + made[:-1])
        routed = np.zeros((len(fed), LAYERS, K), np.int64)
        for layer in range(DENSE + 1, LAYERS):
            routed[:, layer] = decisions(fed, np.arange(len(fed)), layer)
        routed = self.routed(routed)
        finish = "stop" if made[-1] == END else "length"
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(made)}
        if vllm:
            sink = io.BytesIO()
            np.save(sink, routed.astype(np.uint8))
            choice = {"index": 0, "text": "", "finish_reason": finish, "token_ids": made}
            choice |= {"prompt_token_ids": prompt, "routed_experts": encoded(sink.getvalue())}
            return 200, {"choices": [choice], "usage": usage}
        facts = {"finish_reason": {"type": finish}, **usage}
        if body.get("return_routed_experts"):
            asked = routed.astype("<i4")[body["routed_experts_start_len"] :]
            facts["routed_experts"] = encoded(asked.tobytes())
        return 200, {"text": "", "output_ids": made, "prompt_token_ids": prompt, "meta_info": facts}

    def about(self, path: str) -> dict[str, Any] | None:
        card = {"id": "served", "root": "/models/tiny", "max_model_len": self.length}
        return {
            "/v1/models": {"data": [card]},
            "/version": {"version": "0.33.0"},
            "/model_info": {"model_path": "/models/tiny", "model_type": self.model_type},
            "/server_info": {"version": "0.5.23", "api_key": KEY},
        }.get(path)


@contextmanager
def serving(server: Server, port: int = 0) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def allowed(self) -> bool:
            given = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            if self.path not in server.forbidden and server.key in (None, given):
                return True
            self.reply(401, b'{"error": "Unauthorized"}')
            return False

        def do_GET(self) -> None:
            server.gets.append(self.path)
            if server.starting:
                self.reply(503, b"starting")
            elif self.allowed():
                found = server.about(self.path)
                said = json.dumps(found or {"detail": "Not Found"})
                self.reply(200 if found else 404, said.encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            if self.path not in FIELDS:
                return self.reply(404, b"{}")
            with server.lock:
                n = len(server.requests)
                server.requests.append((self.path, body))
                server.now += 1
                server.most = max(server.most, server.now)
            time.sleep(server.delay_s(n))
            instead = server.behave(n, self.path, body)
            status, answer = server.answer(self.path, body)
            server.edit(answer)
            with server.lock:
                server.now -= 1
            status, headers, data = instead or (status, {}, json.dumps(answer).encode())
            self.reply(status, data, headers)
            self.close_connection |= instead is not None

    listening = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    listening.daemon_threads = True
    listening.handle_error = lambda *_: None  # who asked has gone: that is part of the tests
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()


def main() -> None:
    """Stands in for a program of an engine. ENGINE_DOES: `starts_s`, how long it takes to listen;
    `dies`, what it says before it ends with code 3; `pids`, a file for its process id and that of a
    process that it starts in a session of its own; both take no SIGTERM where `stubborn`; `after`:
    at which request it is killed; `plugin`: it has the plugin, which records or, where it is
    "silent" or "refused", has only made its directory, and says why it is refused."""
    does: dict[str, Any] = json.loads(os.environ.get("ENGINE_DOES", "{}"))
    print("called with", *sys.argv[1:], flush=True)
    if does.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "pids" in does:
        other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        Path(does["pids"]).write_text(f"{os.getpid()} {other.pid}")
    if "dies" in does:
        print(does["dies"], flush=True)
        sys.exit(3)
    time.sleep(does.get("starts_s", 0))
    server = Server()
    if does.get("plugin"):
        from tests.support import engine_plugin  # which takes seconds to import

        server = engine_plugin.started(Path(os.environ["MOE_INSPECT_TRACE"]), sys.argv[2])
        server.records &= does["plugin"] is True
        if does["plugin"] == "refused":
            tell_why(logging.getLogger("vllm"), MoeInspectError("no MoE layer"))
        server.returns = True
    server.key = does.get("key")
    if "--enable-return-routed-experts" not in sys.argv:
        server.edit = lambda answer: answer["choices"][0].pop("routed_experts")
    if "after" in does:
        server.delay_s = lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == does["after"] else 0
    with serving(server, int(sys.argv[sys.argv.index("--port") + 1])):
        signal.pause()


if __name__ == "__main__":
    main()

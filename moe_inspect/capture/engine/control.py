"""Reads or switches the recording of a running engine, through its server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from moe_inspect.capture.engine.settings import KEY, PATH, share
from moe_inspect.capture.server.client import ask_once, client
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line

TIMEOUT_S = 60.0  # workers answer between two steps


def tell(url: str, command: str, value: str = "", api_key: str | None = None) -> list[Any]:
    """How each engine behind the server is, one for each rank of data parallelism: plain JSON
    objects. MoeInspectError where there is no plugin, or one of them refuses."""

    async def once() -> list[Any]:
        async with client(url, api_key, TIMEOUT_S, 1) as http:
            if (engines := await tell_by(http, command, value)) is not None:
                return engines
            raise MoeInspectError(
                f"{http.base_url} has no {PATH}: start the engine with MOE_INSPECT_TRACE=DIR, and "
                "vLLM with VLLM_PLUGINS=moe_inspect too, in an environment that has moe-inspect"
            )

    return asyncio.run(once())


async def tell_by(http: httpx.AsyncClient, command: str, value: str = "") -> list[Any] | None:
    """As `tell`; None where there is no plugin."""
    body = {"command": command, "value": value} if command != "status" else None
    answer = await ask_once(http, PATH, body, TIMEOUT_S)
    engines = answer.get("engines") if answer is not None else None
    if answer is None and (engines := await _of_sglang(http, command, value)) is None:
        return None
    if not (isinstance(engines, list) and engines and all(isinstance(e, dict) for e in engines)):
        raise MoeInspectError(
            f"no engine behind {http.base_url} runs the plugin: was MOE_INSPECT_TRACE set?"
        )
    if refused := next((e["refused"] for e in engines if e.get("refused")), None):
        raise MoeInspectError(str(refused))
    # SGLang gives them in the order in which they have answered
    return sorted(engines, key=lambda engine: engine.get("rank", 0))


async def _of_sglang(http: httpx.AsyncClient, command: str, value: str) -> list[Any] | None:
    """By the internal state that SGLang's server shows and takes; None where none is ours."""
    if command != "status":
        try:  # it takes numbers
            number = share(value) if command == "sample" else float(value != "off")
        except ValueError as error:
            raise MoeInspectError(f"sample is {value!r}, not {error}") from None
        path, body = "/set_internal_state", {"server_args": {f"{KEY}.{command}": number}}
        try:
            answer = await http.post(path, json=body)  # a list
        except httpx.HTTPError as error:
            said = first_line(error) or type(error).__name__
            raise MoeInspectError(f"{http.base_url}{path}: {said}") from None
        if answer.status_code not in (200, 404):
            raise MoeInspectError(f"{http.base_url}{path} refused: HTTP {answer.status_code}")
    info = await ask_once(http, "/server_info", None, TIMEOUT_S)
    states = (info or {}).get("internal_states") or []
    return [state[KEY] for state in states if KEY in state] or None

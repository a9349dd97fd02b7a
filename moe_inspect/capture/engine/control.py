"""Reads or switches the recording of a running engine, through its server."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from moe_inspect.capture.engine.settings import KEY, PATH, share
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line

TIMEOUT_S = 60.0  # workers answer between two steps
CONNECT_S = 5.0
MOST_BYTES = 2**24  # of a response


def tell(url: str, command: str, value: str = "", api_key: str | None = None) -> list[Any]:
    """How each engine behind the server is, one for each rank of data parallelism: plain JSON
    objects. MoeInspectError where there is no plugin, or one of them refuses."""
    with _client(url, api_key) as http:
        body = {"command": command, "value": value} if command != "status" else None
        answer = _object(http, PATH, body)
        engines = _of_sglang(http, command, value) if answer is None else answer.get("engines")
        if answer is None and engines is None:
            raise MoeInspectError(
                f"{_root(http)} has no {PATH}: start the engine with MOE_INSPECT_TRACE=DIR, and "
                "vLLM with VLLM_PLUGINS=moe_inspect too, in an environment that has moe-inspect"
            )
        if not (
            isinstance(engines, list) and engines and all(isinstance(e, dict) for e in engines)
        ):
            raise MoeInspectError(
                f"no engine behind {_root(http)} runs the plugin: was MOE_INSPECT_TRACE set?"
            )
    if refused := next((e["refused"] for e in engines if e.get("refused")), None):
        raise MoeInspectError(str(refused))
    # SGLang gives them in the order in which they have answered
    return sorted(engines, key=lambda engine: engine.get("rank", 0))


def _of_sglang(http: httpx.Client, command: str, value: str) -> list[Any] | None:
    """By the internal state that SGLang's server shows and takes; None where none is ours."""
    if command != "status":
        try:  # it takes numbers
            number = share(value) if command == "sample" else float(value != "off")
        except ValueError as error:
            raise MoeInspectError(f"sample is {value!r}, not {error}") from None
        _ask(http, "/set_internal_state", {"server_args": {f"{KEY}.{command}": number}})
    info = _object(http, "/server_info")
    states = (info or {}).get("internal_states") or []
    return [state[KEY] for state in states if KEY in state] or None


def _client(url: str, api_key: str | None) -> httpx.Client:
    """A client of the server. The credentials in its URL appear in no message."""
    parts, shown = urlsplit(url), url.rpartition("@")[2]
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise MoeInspectError(f"{shown} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise MoeInspectError(f"{shown} is not the URL of a server: expected http://HOST:PORT")
    host = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/v1")  # part of the base URL of OpenAI's clients
    return httpx.Client(
        base_url=urlunsplit((parts.scheme, host + (f":{port}" if port else ""), path, "", "")),
        auth=httpx.BasicAuth(parts.username, parts.password or "") if parts.username else None,
        headers={
            # a few compressed bytes can expand without bound
            "Accept-Encoding": "identity",
            **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        },
        timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_S),
    )


def _root(http: httpx.Client) -> str:
    return str(http.base_url).rstrip("/")


def _object(http: httpx.Client, path: str, body: Any = None) -> dict[str, Any] | None:
    """The JSON object in the response; None if the server has no such path."""
    if (data := _ask(http, path, body)) is None:
        return None
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise MoeInspectError(f"{_root(http)}{path}: expected a JSON object, got {data[:60]!r}")
    return answer


def _ask(http: httpx.Client, path: str, body: Any = None) -> bytes | None:
    """The response to a POST of the body, or to a GET; None if the server has no such path."""
    data = bytearray()
    try:
        with http.stream("GET" if body is None else "POST", path, json=body) as response:
            for part in response.iter_raw():
                data += part
                if len(data) > MOST_BYTES:
                    raise MoeInspectError(
                        f"{_root(http)}{path} answered with more than {MOST_BYTES:,} bytes"
                    )
    except httpx.HTTPError as error:
        said = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        raise MoeInspectError(
            f"no server is ready at {_root(http)} ({said}): check the address, and that the server "
            "is up"
        ) from None
    match response.status_code:
        case 200:
            return bytes(data)
        case 404:
            return None
        case 401 | 403 as status:
            raise MoeInspectError(
                f"{_root(http)} rejected the API key (HTTP {status}): set --api-key or "
                "MOE_INSPECT_API_KEY"
            )
        case status:
            said = " ".join(data.decode(errors="replace").split())[:300] or "no reason given"
            raise MoeInspectError(
                f"{_root(http)}{path} refused the request (HTTP {status}): {said}"
            )

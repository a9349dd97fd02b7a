"""Asking a server over HTTP: patiently, and no more of it at once than it was said to bear."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import tenacity

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, print_stderr

ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = (
    1.0,
    60.0,
)  # between attempts, where the server does not say (Retry-After)
LONGEST_ASKED_WAIT_S = 300.0
CONNECT_S = 10.0
FIRST_CONTACT_S = 5.0
MODELS = "/v1/models"  # of every engine
MOST_BYTES, ERROR_BYTES = 2**24, 2**16


class _Again(Exception):
    """Another attempt may do: the server is busy, starting, or its connection broke."""

    def __init__(self, why: str, wait_s: float | None = None):
        super().__init__(why)
        self.wait_s = wait_s


def split_url(url: str) -> tuple[str, httpx.BasicAuth | None]:
    """The root of a server's API and the credentials in its URL, which are in neither messages nor
    manifests."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise MoeInspectError(f"{url.rpartition('@')[2]} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise MoeInspectError(
            f"{url.rpartition('@')[2]} is no URL of a server: write it like http://HOST:PORT"
        )
    place = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/v1")  # as OpenAI's clients are given it
    root = urlunsplit((parts.scheme, place + (f":{port}" if port else ""), path, "", ""))
    return root, httpx.BasicAuth(parts.username, parts.password or "") if parts.username else None


def client(url: str, api_key: str | None, timeout_s: float, concurrency: int) -> httpx.AsyncClient:
    """`timeout_s`: of a request in all, from connecting to the last byte of its answer."""
    root, auth = split_url(url)
    return httpx.AsyncClient(
        base_url=root,
        auth=auth,
        headers={
            "Accept-Encoding": "identity",
            **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        },
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s), pool=None),
        limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
    )


def refuse_unless_up(url: str, api_key: str | None) -> None:
    """MoeInspectError where no server answers there at once."""

    async def once() -> None:
        async with client(url, api_key, FIRST_CONTACT_S, 1) as http:
            await reach(http)

    asyncio.run(once())


async def reach(http: httpx.AsyncClient) -> dict[str, Any] | None:
    """What a server lists of models, as `ask` has it, but now or never: at first a wrong address is
    likelier than a busy server."""
    root = root_of(http)
    try:
        async with asyncio.timeout(FIRST_CONTACT_S):
            status, data = await _once(http, MODELS, None, MOST_BYTES)
    except (_Again, TimeoutError) as error:
        said = str(error) or f"no answer in {FIRST_CONTACT_S:g} s"
        raise MoeInspectError(
            f"no server is ready at {root}, {said}: check the address, and that the server is up"
        ) from None
    return _understood(root, MODELS, status, data)


def teller() -> Callable[[str, float], None]:
    """Says on stderr why a request waits, once for all that wait at the same time."""
    over = 0.0

    def tell(what: str, wait_s: float) -> None:
        nonlocal over
        if (now := time.monotonic()) >= over:
            over = now + wait_s
            print_stderr(what)

    return tell


async def ask(
    http: httpx.AsyncClient,
    path: str,
    body: dict[str, Any] | None = None,
    most_bytes: int = MOST_BYTES,
    tell: Callable[[str, float], None] | None = None,
) -> dict[str, Any] | None:
    """The JSON object that a POST of `body` (a GET without one) is answered with; None where there
    is no such path."""
    root, tell = root_of(http), tell or teller()

    def tell_why(state: tenacity.RetryCallState) -> None:
        error, wait_s = (
            state.outcome and state.outcome.exception(),
            state.next_action.sleep if state.next_action else 0.0,
        )
        tell(
            f"{root}: {error}; it is asked again in {wait_s:.0f} s ({state.attempt_number} of "
            f"{ATTEMPTS} attempts made)",
            wait_s,
        )

    attempts = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(_Again),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=_wait,
        before_sleep=tell_why,
        reraise=True,
    )
    try:
        status, data = await attempts(_once, http, path, body, most_bytes)
    except _Again as error:
        raise MoeInspectError(
            f"{root} was asked {ATTEMPTS} times, the last time with {error}: when it answers, go "
            "on with --resume"
        ) from None
    return _understood(root, path, status, data)


def root_of(http: httpx.AsyncClient) -> str:
    return str(http.base_url).rstrip("/")


def _understood(root: str, path: str, status: int, data: bytes) -> dict[str, Any] | None:
    if status == 404:
        return None
    if status in (401, 403):
        raise MoeInspectError(
            f"{root} wants another key (HTTP {status}): give it by --api-key or MOE_INSPECT_API_KEY"
        )
    if status != 200:
        raise MoeInspectError(f"{root}{path} refused the request (HTTP {status}): {_message(data)}")
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise MoeInspectError(
            f"{root}{path} answered with no JSON object but {data[:60]!r}: is it the engine that "
            "--engine names?"
        )
    return answer


async def _once(
    http: httpx.AsyncClient, path: str, body: dict[str, Any] | None, most_bytes: int
) -> tuple[int, bytes]:
    try:
        # httpx's own timeouts are of silence: a server that sends a byte now and then would never
        # meet them
        async with (
            asyncio.timeout(http.timeout.read),
            http.stream("GET" if body is None else "POST", path, json=body) as response,
        ):
            status, data = response.status_code, await _body(response, path, most_bytes)
            if status in (408, 429) or status >= 500:
                raise _Again(
                    f"HTTP {status}: {_message(data)}",
                    _asked_wait(response.headers.get("retry-after")),
                )
            return status, data
    except TimeoutError as error:
        raise _Again(f"no whole answer in {http.timeout.read:g} s") from error
    except httpx.TransportError as error:
        raise _Again(
            f"no answer ({type(error).__name__}{f': {error}' if str(error) else ''})"
        ) from error
    except httpx.HTTPError as error:
        raise MoeInspectError(f"{path} answered what cannot be read: {first_line(error)}") from None


async def _body(response: httpx.Response, path: str, most_bytes: int) -> bytes:
    """The body as it is sent, never decompressed: what a few bytes unfold to knows no bound. Of an
    error only the beginning."""
    encoding, fine = (
        response.headers.get("content-encoding", "identity"),
        response.status_code == 200,
    )
    if encoding.lower() not in ("identity", ""):
        if fine:
            raise MoeInspectError(
                f"{path} answered in content-encoding {encoding[:40]!r}, not as it is, which it "
                "was asked for"
            )
        return b""
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > (most_bytes if fine else ERROR_BYTES):
            break
    if fine and len(data) > most_bytes:
        raise MoeInspectError(
            f"{path} answered with more than {most_bytes:,} bytes, which no true answer has: not "
            "read on"
        )
    return bytes(data)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _Again) and error.wait_s is not None:
        return error.wait_s
    return tenacity.wait_exponential_jitter(FIRST_WAIT_S, LONGEST_WAIT_S, jitter=FIRST_WAIT_S)(
        state
    )


def _asked_wait(header: str | None) -> float | None:
    """Retry-After, in seconds or as a date; None where it says nothing."""
    if header is None:
        return None
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(wait_s, 0.0), LONGEST_ASKED_WAIT_S) if wait_s == wait_s else None


def _message(data: bytes) -> str:
    """What a server says of an error, on one line."""
    try:
        said = json.loads(data)
        said = said.get("error", said.get("detail", said)) if isinstance(said, dict) else said
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, RecursionError):
        text = data.decode(errors="replace")
    return " ".join(text.split())[:300] or "no reason given"

"""HTTP requests to a server, with retries, timeouts and limits on the size of a response."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx
import tenacity

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, print_stderr

Json = dict[str, Any]  # an object
T = TypeVar("T")
ATTEMPTS = 6
# between attempts, without a Retry-After header
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
LONGEST_ASKED_WAIT_S = 300.0
CONNECT_S = 10.0
IDLE_S = 2.0  # after which a connection is not used again: engines close it after five seconds
FIRST_CONTACT_S = 5.0
MODELS = "/v1/models"  # every engine has it
MOST_BYTES, ERROR_BYTES = 2**24, 2**16
# whether the server has ended for good, as far as who started it can say
server_ended: ContextVar[Callable[[], bool]] = ContextVar("server_ended", default=lambda: False)


class Retry(Exception):
    """The request can be retried: the server is busy, starting or ending, it aborted the request,
    or the connection broke."""

    def __init__(self, why: str, wait_s: float | None = None):
        super().__init__(why)
        self.wait_s = wait_s


class Refused(MoeInspectError):
    """The server, or what stands before it, does not take a request: for its key or its path."""


class NotReady(MoeInspectError):
    """No server answers: it is starting, or the address is wrong."""


def split_url(url: str) -> tuple[str, httpx.BasicAuth | None]:
    """(root of a server's API, credentials in its URL). The credentials appear in no message and no
    manifest."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise MoeInspectError(f"{url.rpartition('@')[2]} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise MoeInspectError(
            f"{url.rpartition('@')[2]} is not the URL of a server: expected http://HOST:PORT"
        )
    host = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/v1")  # part of the base URL of OpenAI's clients
    root = urlunsplit((parts.scheme, host + (f":{port}" if port else ""), path, "", ""))
    return root, httpx.BasicAuth(parts.username, parts.password or "") if parts.username else None


def client(url: str, api_key: str | None, timeout_s: float, concurrency: int) -> httpx.AsyncClient:
    """`timeout_s`: total time per request, from connecting to the last byte of the response."""
    root, auth = split_url(url)
    key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(
        base_url=root,
        auth=auth,
        headers={"Accept-Encoding": "identity", **key},
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s), pool=None),
        limits=httpx.Limits(
            max_connections=concurrency,
            max_keepalive_connections=concurrency,
            keepalive_expiry=IDLE_S,
        ),
    )


def check_server(url: str, api_key: str | None) -> None:
    """MoeInspectError unless a server answers within FIRST_CONTACT_S; NotReady where none does."""

    async def once() -> None:
        async with client(url, api_key, FIRST_CONTACT_S, 1) as http:
            await ask_once(http, MODELS)

    asyncio.run(once())


async def ask_once(
    http: httpx.AsyncClient,
    path: str,
    body: Json | None = None,
    timeout_s: float | None = None,
) -> Json | None:
    """As `ask`, without retries: on first contact a wrong address is more likely than a busy
    server. `timeout_s`: default FIRST_CONTACT_S."""
    timeout_s = timeout_s or FIRST_CONTACT_S
    try:
        async with asyncio.timeout(timeout_s):
            return await _once(http, path, body, MOST_BYTES)
    except (Retry, TimeoutError) as error:
        text = str(error) or f"no answer in {timeout_s:g} s"
        raise NotReady(
            f"no server is ready at {root_of(http)}, {text}: check the address, and that the "
            "server is up"
        ) from None


def wait_notifier() -> Callable[[str, float], None]:
    """A function that reports on stderr why a request waits, once for all requests that wait at the
    same time."""
    over = 0.0

    def notify(what: str, wait_s: float) -> None:
        nonlocal over
        if (now := time.monotonic()) >= over:
            over = now + wait_s
            print_stderr(what)

    return notify


async def ask(http: httpx.AsyncClient, path: str) -> Json | None:
    """The JSON object in the response to a GET; None where the path does not exist (404)."""
    return await ask_for(lambda answer: answer, http, path)


async def ask_for(
    read: Callable[[Json | None], T],
    http: httpx.AsyncClient,
    path: str,
    body: Callable[[], Json] | None = None,
    most_bytes: int = MOST_BYTES,
    notify: Callable[[str, float], None] | None = None,
) -> T:
    """What `read` makes of the response to a POST of `body`, which is called for each attempt
    (without it: a GET). `read` raises Retry to ask again."""
    root, notify = root_of(http), notify or wait_notifier()

    def tell_why(state: tenacity.RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        wait_s = state.next_action.sleep if state.next_action else 0.0
        failed = f"attempt {state.attempt_number} of {ATTEMPTS} failed"
        notify(f"{root}: {error}; retrying in {wait_s:.0f} s ({failed})", wait_s)

    async def once() -> T:
        return read(await _once(http, path, body() if body else None, most_bytes))

    attempts = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(Retry),
        stop=lambda state: state.attempt_number >= ATTEMPTS or server_ended.get()(),
        wait=_wait,
        before_sleep=tell_why,
        reraise=True,
    )
    try:
        return await attempts(once)
    except Retry as error:
        raise MoeInspectError(
            f"{root}: no answer after {ATTEMPTS} attempts, the last error: {error}: when the "
            "server is back, continue with --resume"
        ) from None


def root_of(http: httpx.AsyncClient) -> str:
    return str(http.base_url).rstrip("/")


async def _once(
    http: httpx.AsyncClient, path: str, body: Json | None, most_bytes: int
) -> Json | None:
    """The JSON object in one response; None where the path does not exist."""
    root, (status, data) = root_of(http), await _response(http, path, body, most_bytes)
    if status == 404:
        return None
    if status in (401, 403):
        raise Refused(
            f"{root} rejected the API key (HTTP {status}): set --api-key or MOE_INSPECT_API_KEY"
        )
    if status != 200:
        raise Refused(f"{root}{path} refused the request (HTTP {status}): {_message(data)}")
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise Refused(
            f"{root}{path}: expected a JSON object, got {data[:60]!r}: does --engine match the "
            "server?"
        )
    return answer


async def _response(
    http: httpx.AsyncClient, path: str, body: Json | None, most_bytes: int
) -> tuple[int, bytes]:
    try:
        # httpx's own timeouts are per read: a server that sends a byte now and then never exceeds
        # them
        async with (
            asyncio.timeout(http.timeout.read),
            http.stream("GET" if body is None else "POST", path, json=body) as response,
        ):
            status, data = response.status_code, await _body(response, path, most_bytes)
            if status in (408, 429) or status >= 500:
                wait_s = _asked_wait(response.headers.get("retry-after"))
                raise Retry(f"HTTP {status}: {_message(data)}", wait_s)
            return status, data
    except TimeoutError as error:
        raise Retry(f"incomplete response after {http.timeout.read:g} s") from error
    except httpx.TransportError as error:
        said = f"{type(error).__name__}{f': {error}' if str(error) else ''}"
        raise Retry(f"no answer ({said})") from error
    except httpx.HTTPError as error:
        raise MoeInspectError(f"cannot read the response of {path}: {first_line(error)}") from None


async def _body(response: httpx.Response, path: str, most_bytes: int) -> bytes:
    """The body, never decompressed: a few compressed bytes can expand without bound. Of an error
    only the beginning."""
    encoding = response.headers.get("content-encoding", "identity")
    fine, data = response.status_code == 200, bytearray()
    if encoding.lower() not in ("identity", ""):
        if not fine:
            return b""
        raise MoeInspectError(
            f"{path} answered with content-encoding {encoding[:40]!r}, although identity was "
            "requested"
        )
    async for part in response.aiter_raw():
        data += part
        if len(data) > (most_bytes if fine else ERROR_BYTES):
            break
    if fine and len(data) > most_bytes:
        raise MoeInspectError(
            f"{path} answered with more than {most_bytes:,} bytes, more than any valid response has"
        )
    return bytes(data)


def _wait(state: tenacity.RetryCallState) -> float:
    asked_s = getattr(state.outcome and state.outcome.exception(), "wait_s", None)
    wait = tenacity.wait_exponential_jitter(FIRST_WAIT_S, LONGEST_WAIT_S, jitter=FIRST_WAIT_S)
    return wait(state) if asked_s is None else asked_s


def _asked_wait(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (a number of seconds or a date); None where it is
    missing or unreadable."""
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
    """The error message in a response, on one line."""
    try:
        body = json.loads(data)
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        text = data.decode(errors="replace")
    text = text.replace("Value error, ", "")  # pydantic's
    return one_line(text) or "no reason given"


def one_line(text: str) -> str:
    """What a server says, short enough for a message."""
    return " ".join(text.split())[:300]

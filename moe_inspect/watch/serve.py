"""Serves what is watched: a page that keeps itself up to date, and metrics for Prometheus.

Nothing can be changed by a request, and none is answered whose Host header is not the server's: a
page of another site that resolves its name to this machine learns nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import socket
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, print_stderr
from moe_inspect.watch.follow import ENDED, RECORDING, WAITING
from moe_inspect.watch.page import page, snapshot
from moe_inspect.watch.run import Session, WatchOptions
from moe_inspect.watch.state import Watched, of_routers

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send


INSTALL = "pip install 'moe-inspect[watch]'"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
KEEP_ALIVE_S = 15.0  # proxies close a connection on which nothing comes
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def address(text: str) -> tuple[str, int]:
    """ "127.0.0.1:8000", "[::1]:8000", ":8000" or "8000" → host and port; the host is this machine
    alone where none is given."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise MoeInspectError(f"cannot read the address {text!r}: write it like 127.0.0.1:8000")
    return host.strip("[]") or "127.0.0.1", int(port)


def hosts_of(host: str, more: Sequence[str] = ()) -> frozenset[str]:
    """The names by which the server may be asked for: of this machine for a loopback address; else
    its own address and names, and `more`."""
    if is_loopback(host):
        return frozenset({*LOOPBACK, host.lower(), *more})
    own = {host, socket.gethostname(), socket.getfqdn()}
    with contextlib.suppress(OSError):
        own |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    return frozenset({*LOOPBACK, *(name.lower() for name in (*own, *more))})


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class _OnlyOwnHosts:
    """Answers requests to other hosts with 421, before anything reads them."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in self.hosts:
                said = "This server is not known by this name: see --allow-host.\n"
                await PlainTextResponse(said, 421)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Live:
    """The newest snapshot, for all who wait for it."""

    def __init__(self, session: Session):
        self.session = session
        self.text = snapshot(session)
        self.number = 0
        self.is_over = False
        self._news = asyncio.Condition()

    async def run(self) -> None:
        """Looks at the trace again and again, until its writer is done. What makes it unreadable
        may pass."""
        session, said = self.session, ""
        while True:
            try:
                changed = await asyncio.to_thread(session.update)
            except MoeInspectError as error:
                session.watched.trouble, changed = first_line(error), True
                if said != (said := session.watched.trouble):
                    print_stderr(f"error: {said}")
            # also what only the clock changes: the speed, and for how long nothing came
            if changed or session.watched.status not in ("waiting", "complete"):
                await self._tell()
            if session.is_over:
                return
            await asyncio.sleep(0 if session.watched.left_tokens else session.options.every_s)

    async def _tell(self) -> None:
        async with self._news:
            self.text = await asyncio.to_thread(snapshot, self.session)
            self.number += 1
            self._news.notify_all()

    async def end(self) -> None:
        """Ends the events of all who wait for them."""
        self.is_over = True
        async with self._news:
            self._news.notify_all()

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: what there is, then whatever is new."""
        seen = -1
        while not self.is_over:
            if self.number != seen:
                seen = self.number
                yield f"data: {self.text}\n\n"
            else:
                yield ": nothing new\n\n"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEEP_ALIVE_S), self._news:
                    while self.number == seen and not self.is_over:
                        await self._news.wait()


def application(session: Session, hosts: frozenset[str], per_expert: bool = False) -> Starlette:
    """GET / (the page), /events, /state (what the page shows, as JSON) and /metrics."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import HTMLResponse, Response, StreamingResponse
    from starlette.routing import Route

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(session.watched, per_expert))
    live = Live(session)
    text, policy = page()

    async def index(_: Request) -> Response:
        return HTMLResponse(text, headers={**HEADERS, "Content-Security-Policy": policy})

    async def events(_: Request) -> Response:
        headers = {**HEADERS, "X-Accel-Buffering": "no"}
        return StreamingResponse(live.events(), media_type="text/event-stream", headers=headers)

    async def state(_: Request) -> Response:
        return Response(live.text, media_type="application/json", headers=HEADERS)

    async def metrics(request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        found = await asyncio.to_thread(encode, registry)
        return Response(found, headers={**HEADERS, "Content-Type": kind})

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(live.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    pages = {"/": index, "/events": events, "/state": state, "/metrics": metrics}
    application = Starlette(
        routes=[Route(path, function, methods=["GET"]) for path, function in pages.items()],
        middleware=[Middleware(_OnlyOwnHosts, hosts=hosts)],
        lifespan=lifespan,
    )
    application.state.live = live
    return application


class _OutOfFiles(logging.Filter):
    """Says once that there is no file descriptor left, and drops the records that say so: asyncio
    tries to accept a connection up to 2,048 times a second."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if getattr(error, "errno", 0) not in (errno.EMFILE, errno.ENFILE):
            return True
        if not self.said:
            self.said = True
            print_stderr(
                "warning: too many open files: new connections wait until others are closed; "
                "ulimit -n allows more"
            )
        return False


def serve(
    path: str | Path,
    options: WatchOptions,
    where: str,
    *,
    per_expert: bool = False,
    allow_hosts: Sequence[str] = (),
) -> None:
    """Serves until it is interrupted, also when the trace is complete. MoeInspectError where the
    address is taken, or the extra is not installed."""
    host, port = address(where)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MoeInspectError(f"--serve needs {error.name}: {INSTALL}") from None
    app = application(Session(path, options), hosts_of(host, allow_hosts), per_expert)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen()  # who reads the address may ask at once
        except OSError as error:
            raise MoeInspectError(f"cannot serve at {where}: {first_line(error)}") from None
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}"
        print_stderr(f"watching {path} at {url}, metrics at {url}/metrics; Ctrl-C ends it")
        if not is_loopback(host):
            print_stderr("warning: anyone who can reach this address can read what is shown")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )

        log, out_of_files = logging.getLogger("uvicorn.error"), _OutOfFiles()
        log.addFilter(out_of_files)
        logging.getLogger("asyncio").addFilter(out_of_files)

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                log.setLevel(logging.CRITICAL)  # who still reads slowly is cut off: no error
                await app.state.live.end()
                await super().shutdown(sockets)

        Server(config).run(sockets=[listening])


OF_ROUTERS = {  # metric of the load → what Prometheus is told of it
    "max_vio": "(max - mean) / mean of the load in the last window; 0 is even",
    "dead_experts": "Experts without load in the last window",
    "starved_experts": "Experts with some load, but under a tenth of the mean, in the last window",
    "entropy": "Entropy of the load in the last window, as a ratio to ln E; 1 is even",
    "balancedness": "Mean / max load in the last window; 1 is even",
}
LABELS = ["layer", "router"]


class Collector:
    """Of a private registry of prometheus_client. `per_expert`: assignments of every expert too,
    which are as many series as there are experts."""

    def __init__(self, watched: Watched, per_expert: bool = False):
        self.watched, self.per_expert = watched, per_expert

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge

        watched = self.watched
        status = Gauge("moe_inspect_status", "1 for the status of the trace", labels=["status"])
        for name in (WAITING, RECORDING, *ENDED):
            status.add_metric([name], float(name == watched.status))
        yield status
        yield Counter("moe_inspect_tokens", "Tokens recorded", watched.tokens)
        yield Counter("moe_inspect_decisions", "Router decisions recorded", watched.decisions)
        yield Gauge(
            "moe_inspect_last_tokens_seconds", "Seconds since the last tokens", watched.changed_s
        )
        if watched.window is None:
            return
        yield Gauge("moe_inspect_window_tokens", "Tokens of the last window", watched.window.tokens)
        names = [[label, str(r)] for r, label in enumerate(watched.labels)]
        for metric, said in OF_ROUTERS.items():
            values_L = of_routers(metric, watched.window.load_LE, watched.routers)
            yield _filled(Gauge(f"moe_inspect_{metric}", said, labels=LABELS), names, values_L)
        chance_L = [watched.chance(r) for r in range(len(names))]
        said = "The highest max_vio of the last window that chance explains"
        yield _filled(Gauge("moe_inspect_max_vio_chance", said, labels=LABELS), names, chance_L)
        said = "1 for each rule that a router breaks now"
        alarms = Gauge("moe_inspect_alarm", said, labels=[*LABELS, "rule"])
        for alarm in watched.alarms:
            alarms.add_metric([*names[alarm.router], alarm.rule], 1.0)
        yield alarms
        if self.per_expert:
            said = "Assignments of each expert"
            experts = Counter("moe_inspect_expert_assignments", said, labels=[*LABELS, "expert"])
            for r, router in enumerate(watched.routers):
                for e, load in enumerate(watched.total_LE[r, : router.experts].tolist()):
                    experts.add_metric([*names[r], str(e)], load)
            yield experts


def _filled(family: Any, names: list[list[str]], values_L: Iterable[float] | np.ndarray) -> Any:
    for name, value in zip(names, values_L, strict=True):
        if not math.isnan(value):
            family.add_metric(name, float(value))
    return family

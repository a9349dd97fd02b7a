"""Serves what is watched: a page that keeps itself up to date, and metrics for Prometheus.

Nothing can be changed by a request, and none is answered whose Host header is not the server's: a
page of another site that resolves its name to this machine learns nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Template
from markupsafe import Markup

from moe_inspect.alarms.alarms import metric_R
from moe_inspect.analysis.metrics.balance import load_ratios
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.render.html import asset, palette_css, script_hash
from moe_inspect.reporting.render.payload import panel_json, without_numpy
from moe_inspect.text import first_line, print_stderr, readable
from moe_inspect.watch.follow import COMPLETE, RECORDING, WAITING, Piece
from moe_inspect.watch.metrics import Collector
from moe_inspect.watch.state import Watched, WatchOptions, WatchSession

if TYPE_CHECKING:
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
    names = {host, *LOOPBACK, *more}
    if not is_loopback(host):
        names |= {socket.gethostname(), socket.getfqdn()}
        with contextlib.suppress(OSError):
            names |= {str(i[4][0]) for i in socket.getaddrinfo(socket.gethostname(), None)}
    return frozenset(name.lower() for name in names)


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def _only_own_hosts(app: ASGIApp, hosts: frozenset[str]) -> ASGIApp:
    """Answers requests to other hosts with 421, before anything reads them."""
    from starlette.datastructures import Headers
    from starlette.responses import PlainTextResponse

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in hosts:
                said = "This server is not known by this name: see --allow-host.\n"
                await PlainTextResponse(said, 421)(scope, receive, send)
                return
        await app(scope, receive, send)

    return asked


# --- the page


SCRIPTS = ("chart.js", "page.js")


def snapshot(session: WatchSession) -> str:
    """What the page shows now, as JSON."""
    watched, window = session.watched, session.watched.window
    rates = watched.rates() if watched.status == RECORDING else None
    shown: dict[str, object] = {
        "path": readable(session.path),
        "status": watched.status,
        "writer": readable(session.follower.writer),
        "trouble": readable(watched.trouble),
        "tokens": watched.tokens,
        "decisions": watched.decisions,
        "left_tokens": watched.left_tokens,
        "rates": None if rates is None else [round(rate, 1) for rate in rates],
        "changed_s": round(watched.changed_s, 1),
        "window_tokens": window.tokens if window is not None else 0,
        "alarms": [readable(alarm.text) + " " + alarm.help for alarm in watched.alarms],
        "panels": None,
    }
    if window is not None:
        r, text = watched.worst_routers[0], session.text
        value = float(watched.history[-1][r])
        shown |= {
            "worst": {
                "layer": watched.labels[r],
                "max_over_mean": None if np.isnan(value) else round(1 + value, 2),
                "chance": round(1 + watched.chance(r), 2),
            },
            "dead": int(np.nansum(metric_R("dead_experts", window))),
            "experts": sum(router.experts for router in watched.routers),
            "panels": [panel_json(panel) for panel in panels(watched, window)],
            "text": text
            and {
                "layer": watched.labels[text.router],
                "expert": text.expert,
                "words": [list(word) for word in text.words],
            },
        }
    return json.dumps(shown, default=without_numpy, allow_nan=False)


def panels(watched: Watched, window: Piece) -> list[spec.Panel]:
    """The map of the last window, the balance of each layer in it and of all tokens, and how the
    balance has moved."""
    layers, ratio_LE = spec.Axis("layer", tuple(watched.labels)), load_ratios(window.load)
    scale = spec.load_scale(watched.routers, "load ÷ mean load")
    heatmap = spec.Heatmap(ratio_LE, scale, spec.cell_numbers(ratio_LE))
    ratio = spec.Axis("max ÷ mean load", low=1)
    n = len(watched.history)
    back = tuple(str(shard - n + 1) for shard in range(n))
    return [
        spec.Panel((heatmap,), spec.Axis("expert"), layers),
        spec.Panel(_balance(watched), layers, ratio),
        spec.Panel(_over_time(watched), spec.Axis("shards before the last", back), ratio),
    ]


def _balance(watched: Watched) -> tuple[spec.Mark, ...]:
    L = len(watched.routers)
    x, now = np.arange(L, dtype=float), 1 + watched.history[-1]
    chance = 1 + np.array([watched.chance(r) for r in range(L)])
    alarmed = np.isin(np.arange(L), [alarm.router for alarm in watched.alarms])
    in_all = 1 + metric_R("max_vio", watched.total) if watched.total else x * np.nan
    return (
        spec.chance_band(np.nan_to_num(chance, nan=1.0), "explained by chance"),
        spec.Rule(1),
        spec.Points(x, in_all, "all tokens", "c2", "tick"),
        spec.Points(x, np.where(alarmed, np.nan, now), "last window", "c1"),
        spec.Points(x, np.where(alarmed, now, np.nan), "last window, with an alarm", "bad"),
    )


def _over_time(watched: Watched) -> tuple[spec.Mark, ...]:
    history_HL = 1 + np.array(watched.history)
    known_H = ~np.isnan(history_HL).all(1)
    worst_H, middle_H = np.full((2, len(history_HL)), np.nan)
    worst_H[known_H] = np.nanmax(history_HL[known_H], axis=1)
    middle_H[known_H] = np.nanmedian(history_HL[known_H], axis=1)
    x = np.arange(len(history_HL), dtype=float)
    return (
        spec.Rule(1),
        spec.Line(x, worst_H, "least balanced layer", "c1"),
        spec.Line(x, middle_H, "median of the layers", "c2", "dash"),
    )


@cache
def page() -> tuple[str, str]:
    """The page, without what it shows, and its Content-Security-Policy."""
    script = "".join(asset(name) for name in SCRIPTS) + _own("live.js")
    policy = (
        f"default-src 'none'; script-src 'sha256-{script_hash(script)}'; connect-src 'self'; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    made = Template(_own("live.html"), autoescape=True).render(
        palette=Markup(palette_css()),
        style=Markup(asset("page.css") + _own("live.css")),
        script=Markup(script),
    )
    return made, policy


def _own(name: str) -> str:
    return (files("moe_inspect.watch") / "templates" / name).read_text(encoding="utf-8")


# --- the server


class Live:
    """The newest snapshot, for all who wait for it."""

    def __init__(self, session: WatchSession):
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
            if changed or session.watched.status not in (WAITING, COMPLETE):
                async with self._news:
                    self.text = await asyncio.to_thread(snapshot, session)
                    self.number += 1
                    self._news.notify_all()
            if session.is_over:
                return
            await asyncio.sleep(0 if session.watched.left_tokens else session.options.every_s)

    async def end(self) -> None:
        """Ends the events of all who wait for them."""
        self.is_over = True
        async with self._news:
            self._news.notify_all()

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: what there is, then whatever is new."""
        seen = -1
        while not self.is_over:
            is_new, seen = self.number != seen, self.number
            yield f"data: {self.text}\n\n" if is_new else ": nothing new\n\n"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEEP_ALIVE_S), self._news:
                    while self.number == seen and not self.is_over:
                        await self._news.wait()


def application(
    session: WatchSession, hosts: frozenset[str], per_expert: bool = False
) -> Starlette:
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
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(live.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    pages = {"/": index, "/events": events, "/state": state, "/metrics": metrics}
    application = Starlette(
        routes=[Route(path, function, methods=["GET"]) for path, function in pages.items()],
        middleware=[Middleware(_only_own_hosts, hosts=hosts)],
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
    app = application(WatchSession(path, options), hosts_of(host, allow_hosts), per_expert)
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
        quiet = {"log_level": "warning", "access_log": False, "server_header": False}
        config = uvicorn.Config(app, timeout_graceful_shutdown=1, **quiet)
        log, out_of_files = logging.getLogger("uvicorn.error"), _OutOfFiles()
        log.addFilter(out_of_files)
        logging.getLogger("asyncio").addFilter(out_of_files)

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                log.setLevel(logging.CRITICAL)  # who still reads slowly is cut off: no error
                await app.state.live.end()
                await super().shutdown(sockets)

        Server(config).run(sockets=[listening])

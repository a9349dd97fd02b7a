"""A trace on object storage that another replaces, through a proxy that fails: it refuses from a
request on, loses the answer of one, or the process is killed at one. What is left is the old trace
or the new one."""

from __future__ import annotations

import http.client
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.faults.bench import Bench
from benchmarks.faults.outputs import prepared
from benchmarks.faults.traces import rows_of
from benchmarks.object_storage import s3_server
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.merge import merge
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify

FAULTS = ("none", "refused from it on", "its answer lost", "killed")
STEP = 3  # every third request


class Shared:
    """What the proxy does, and how many requests that change something it has seen."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.at, self.how, self.pid, self.calls = (context.Value("i", 0) for _ in range(4))

    def begin(self, at: int, how: str) -> None:
        self.at.value, self.how.value, self.calls.value = at, FAULTS.index(how), 0


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    shared: Shared

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        shared, changes, number = self.shared, self.command in ("PUT", "POST", "DELETE"), 0
        if changes:
            with shared.calls.get_lock():
                shared.calls.value += 1
                number = shared.calls.value
        how, hit = FAULTS[shared.how.value], changes and number == shared.at.value
        if how == "refused from it on" and changes and number >= shared.at.value:
            self._answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if how == "killed" and hit:
            os.kill(shared.pid.value, signal.SIGKILL)
            self.close_connection = True
            return
        server = http.client.HTTPConnection(self.upstream, timeout=60)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        said = answer.read()
        if how == "its answer lost" and hit:
            self.close_connection = True
            return
        self._answer(answer.status, dict(answer.getheaders()), said)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def failing_server() -> Iterator[Shared]:
    """An S3 server behind the proxy; environment variables make s3fs use it."""
    shared = Shared()
    with s3_server():
        Proxy.upstream = urlsplit(os.environ["FSSPEC_S3_ENDPOINT_URL"]).netloc
        Proxy.shared = shared
        server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        pid = os.fork()
        if not pid:
            server.serve_forever()
        os.environ["FSSPEC_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
        try:
            yield shared
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def objects(bench: Bench) -> None:
    prepared(bench)
    rows = {}
    for name in ("T", "V"):
        bench.must(lambda name=name: put(bench, name, str(bench.root / f"whole-{name}")))
        rows[name] = rows_of(Trace(bench.root / f"whole-{name}"))
    with failing_server() as shared:
        url = "s3://traces/counted"

        def replace(url: str) -> int:
            shared.pid.value = os.getpid()
            put(bench, "T", url)
            return shared.calls.value

        shared.begin(0, "none")
        bench.must(lambda: put(bench, "V", url))
        shared.begin(0, "none")
        calls = bench.child(lambda: replace(url))["returned"]
        for how in FAULTS[1:]:
            for at in range(1, calls + 1, STEP):
                url = f"s3://traces/{FAULTS.index(how)}-{at}"
                shared.begin(0, "none")
                bench.must(lambda url=url: put(bench, "V", url))
                shared.begin(at, how)
                said = bench.child(lambda url=url: replace(url))
                shared.begin(0, "none")
                checked = bench.child(lambda url=url, said=said: check(bench, url, rows, said))
                failure = said.get("raised") or checked.get("raised") or checked.get("refused")
                what = f"replaced on object storage: {how}"
                bench.count(what, next(iter(said)), failure, f"request {at} of {calls}")


def put(bench: Bench, name: str, place: str) -> None:
    tempfile.tempdir = tempfile.mkdtemp(dir=bench.root)  # where what is kept stays
    merge([bench.root / name], place, overwrite=True)


def check(bench: Bench, url: str, rows: dict[str, Any], said: dict[str, Any]) -> None:
    found = verify(url)
    assert found.ok, found
    there = rows_of(Trace(url))
    which = next((name for name in rows if equal(there, rows[name])), None)
    assert which is not None, "neither the old one nor the new"
    if "returned" in said:
        assert which == "T", "it said that it was done"
    if "is whole at" in (refused := said.get("refused", "")):
        kept = refused.rpartition(" at ")[2].removesuffix(": move it")
        assert equal(rows_of(Trace(kept)), rows["T"]), f"{kept} is not whole"
    put(bench, "T", url)
    assert equal(rows_of(Trace(url)), rows["T"])
    whole = [p for p in Path(bench.root / "whole-T").rglob("*") if p.is_file()]
    assert len(Remote(url).sizes()) == len(whole), Remote(url).sizes()


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(a[name].equals(b[name]) for name in a)

"""watch --serve: what it answers, and to whom; the page in a browser while a trace is written."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.analysis.metrics import balance
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import open_trace
from moe_inspect.watch.serve import address, hosts_of, is_loopback
from tests.conftest import ROOT
from tests.support.watched import started, waited, written

L, E = 5, 8
for name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason="the extra watch")


class Server:
    """`moe-inspect watch TRACE --serve 0`, in a process of its own."""

    def __init__(self, trace: str | Path, *options: str):
        command = [sys.executable, "-m", "moe_inspect", "watch", str(trace), "--serve", "0"]
        command += ["--every", "100ms", "--window", "512", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = self.said()
        found = re.search(r"at (http://127\.0\.0\.1:(\d+)), metrics at", said)
        assert found, said
        self.url, self.port = found[1], int(found[2])

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Host": f"127.0.0.1:{self.port}", **headers}
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers

    def state(self) -> dict[str, Any]:
        return json.loads(self.get("/state")[1])

    def metrics(self) -> dict[str, float]:
        lines = [n for n in self.get("/metrics")[1].splitlines() if not n.startswith("#")]
        return {name: float(value) for name, _, value in (n.rpartition(" ") for n in lines)}

    def connected(self, path: str) -> socket.socket:
        """A client that has asked for a path."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        return client

    def said(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("watch_page") / "t", L, E, 10, shard_tokens=256)


@pytest.fixture(scope="module")
def server(trace: Path) -> Iterator[Server]:
    plan = trace.with_name("plan.json")
    plan.write_text(json.dumps({"physical_to_logical_map": [[*range(E)]] * L}))
    placed = "--plan", str(plan), "--gpus", "2"
    server = Server(trace, "--per-expert", "--allow-host", "moe.example", *placed)
    try:
        waited(lambda: server.state()["status"] == "complete")
        waited(lambda: server.state()["tokens"] == 2560)
        yield server
        with server.connected("/events") as page:
            assert page.recv(15) == b"HTTP/1.1 200 OK"
            assert server.stop() == 130
        assert server.said() == ""  # not of the page either
    finally:
        server.process.kill()


def test_metrics_are_those_of_the_trace(server: Server, trace: Path) -> None:
    found = server.metrics()
    last = open_trace(trace)
    assert found["moe_inspect_tokens_total"] == 2560
    assert found["moe_inspect_decisions_total"] == 2560 * L
    assert found['moe_inspect_status{status="complete"}'] == 1
    assert found["moe_inspect_window_tokens"] == 512
    for r in range(L):
        table = last.routing(router=r)[["expert_0", "expert_1"]].to_numpy()
        load_E = np.bincount(table[-512:].ravel(), minlength=E)[None]
        at = f'{{layer="{r}",router="{r}"}}'
        for name in ("max_vio", "dead_experts", "entropy", "balancedness", "starved_experts"):
            value = getattr(balance, name)(load_E)[0]
            assert found[f"moe_inspect_{name}{at}"] == pytest.approx(value), name
        for e, load in enumerate(np.bincount(table.ravel(), minlength=E)):
            name = f'moe_inspect_expert_assignments_total{{expert="{e}",layer="{r}",router="{r}"}}'
            assert found[name] == load
    (alarm,) = [name for name in found if name.startswith("moe_inspect_alarm{") and "dead" in name]
    assert 'layer="3"' in alarm
    # in the format that is asked for
    _, text, headers = server.get("/metrics", Accept="application/openmetrics-text")
    assert text.endswith("# EOF\n")
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert server.get("/metrics")[2]["content-type"].startswith("text/plain")


def queries_of_the_dashboard() -> list[str]:
    text = (ROOT / "docs/grafana-dashboard.json").read_text(encoding="utf-8")
    return [q["expr"] for panel in json.loads(text)["panels"] for q in panel["targets"]]


def test_the_dashboard_asks_for_metrics_that_there_are(server: Server) -> None:
    queries = queries_of_the_dashboard()
    asked = set(re.findall(r"moe_inspect_\w+", " ".join(queries)))
    served = {name.partition("{")[0] for name in server.metrics()}
    assert len(asked) >= 8
    assert asked <= served
    page = (ROOT / "docs/watch.md").read_text(encoding="utf-8")
    assert served == set(re.findall(r"`(moe_inspect_\w+)`", page))


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs a Prometheus server")
def test_prometheus_answers_what_the_dashboard_asks(server: Server, tmp_path: Path) -> None:
    """A real server, which scrapes ours."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    targets = {"targets": [f"127.0.0.1:{server.port}"]}
    scraped = {"job_name": "a", "scrape_interval": "500ms", "static_configs": [targets]}
    config = tmp_path / "prometheus.yml"
    config.write_text(json.dumps({"scrape_configs": [scraped]}))  # which is YAML too
    options = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    command = ["prometheus", *options, f"--web.listen-address={at}", "--log.level=error"]
    process = subprocess.Popen(command)

    def answer(query: str) -> list[Any]:
        url = f"http://{at}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url) as got:
            return json.load(got)["data"]["result"]

    def is_up() -> bool:
        with contextlib.suppress(OSError):
            return bool(answer("rate(moe_inspect_tokens_total[1m])"))
        return False

    try:
        waited(is_up)
        found = dict[str, list[Any]]()
        for query in queries_of_the_dashboard():
            asked = query.replace("$instance", ".*").replace("$layer", "2")
            found[query] = answer(asked)
            assert found[query], f"{query} finds nothing"
        (worst,) = (
            of for query, of in found.items() if query.startswith("topk(5, moe_inspect_max")
        )
        told = {name: value for name, value in server.metrics().items() if "max_vio{" in name}
        values = sorted(float(of["value"][1]) for of in worst)
        assert values == pytest.approx(sorted(told.values())[-5:])
        with pytest.raises(urllib.error.HTTPError):  # control
            answer("topk(5, moe_inspect_max_vio")
    finally:
        process.kill()
        process.wait()


OWN = ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:80", "moe.example:80")
FOREIGN = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::1")


@pytest.mark.parametrize("host", [*OWN, *FOREIGN])
@pytest.mark.parametrize("path", ["/", "/state", "/metrics", "/nothing"])
def test_only_its_own_hosts_are_answered(server: Server, host: str, path: str) -> None:
    status, text, _ = server.get(path, Host=host)
    assert status == (421 if host in FOREIGN else 404 if path == "/nothing" else 200)
    assert host in OWN or "tokens" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/events", "/state", "/metrics"])
def test_no_request_changes_anything(server: Server, method: str, path: str) -> None:
    assert server.get(path, method)[0] == 405


def test_the_page_runs_its_own_scripts_only_and_shows_events(server: Server) -> None:
    status, text, headers = server.get("/")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]
    assert "frame-ancestors 'none'" in policy
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert "access-control-allow-origin" not in headers
    with urllib.request.urlopen(f"{server.url}/events", timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        line = answer.readline().decode()
    assert json.loads(line.removeprefix("data: "))["tokens"] == 2560


def test_without_file_descriptors_it_says_so_once_and_goes_on(server: Server) -> None:
    pid, limits = server.process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (there + 20, limits[1]))
    try:
        with contextlib.ExitStack() as clients:
            for _ in range(40):
                clients.enter_context(server.connected("/events"))
            assert server.said().startswith("warning: too many open files: ")
        assert waited(lambda: server.get("/state")[0]) == 200
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_counts_show_no_text(trace: Path) -> None:
    quiet = Server(trace, "--counts")
    try:
        shown = waited(lambda: (s := quiet.state())["tokens"] == 2560 and s)
        assert shown["text"] is None
        assert " mat" not in json.dumps(shown)
    finally:
        quiet.stop()


ADDRESSES = {
    "8000": ("127.0.0.1", 8000),
    ":8000": ("127.0.0.1", 8000),
    "0.0.0.0:80": ("0.0.0.0", 80),
    "[::1]:80": ("::1", 80),
    "localhost:0": ("localhost", 0),
}


def test_addresses() -> None:
    assert {text: address(text) for text in ADDRESSES} == ADDRESSES
    for text in ("", "a", "127.0.0.1", "1:99999", "1:-1", "1:٣"):
        with pytest.raises(MoeInspectError, match="write it like 127"):
            address(text)


def test_who_is_answered_by_default() -> None:
    assert is_loopback("127.0.0.9")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("10.0.0.1")
    assert hosts_of("127.0.0.1") == {"localhost", "127.0.0.1", "::1"}
    assert {socket.gethostname().lower(), "10.0.0.1", "a"} <= hosts_of("10.0.0.1", ["A"])


def test_a_port_that_is_taken_is_one_line(trace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "moe_inspect", "watch", str(trace), "--serve", where]
        done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: cannot serve at {where}: Address already in use\n"


def test_the_page_follows_the_trace_until_its_writer_is_killed(
    tmp_path: Path, request: pytest.FixtureRequest, browser: Any
) -> None:
    root = tmp_path / "<b>t"
    server, complaints = Server(root), list[str]()
    request.addfinalizer(server.process.kill)
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    view.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    view.on("pageerror", lambda error: complaints.append(str(error)))

    def until(expression: str) -> None:  # (the policy forbids what wait_for_function does)
        waited(lambda: view.wait_for_timeout(50) or view.evaluate(expression))

    view.goto(server.url)
    until("document.getElementById('status').textContent === 'waiting'")
    process = started(root, 5, 8, 1000, 0.05)
    request.addfinalizer(process.kill)
    until("document.querySelectorAll('#alarm-list .critical').length > 0")
    assert view.inner_text("#status") == "recording"
    assert view.inner_text("#path").endswith("<b>t")
    assert "process" in view.inner_text("#said")
    assert "Layer 3, expert 2" in view.inner_text("#alarm-list")
    tokens = "Number(document.getElementById('tokens').textContent.replaceAll(',', ''))"
    before = view.evaluate(tokens)
    # a part of the page that a reader has chosen stays while it is brought up to date
    view.locator(".plot").first.focus()
    for key in (*["ArrowDown"] * 3, "ArrowRight"):
        view.keyboard.press(key)
    until(f"{tokens} > {before + 1000}")
    drawn = view.evaluate("document.querySelectorAll('.plot svg text.in').length")
    assert drawn > 20  # a number in each cell of 5 × 8
    assert view.inner_text("#text-title") == "Last text for expert 1 of layer 3"
    assert view.evaluate("document.querySelectorAll('#words mark').length") > 0
    assert "<b>" in view.inner_text("#words")
    assert view.evaluate("moe.plots[0].at") == [3, 1]
    process.kill()
    process.wait()
    until("document.getElementById('status').textContent === 'killed'")
    assert f"process {process.pid} is gone" in view.inner_text("#said")
    assert view.evaluate(tokens) == open_trace(root).n_tokens
    assert complaints == []
    assert server.stop() == 130
    until("document.getElementById('status').textContent === 'lost'")
    view.close()

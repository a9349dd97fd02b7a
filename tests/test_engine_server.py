"""A server's /metrics, as the plugin writes them, and the commands that reach its engines."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect import MoeInspectError
from moe_inspect.capture.engine import vllm
from moe_inspect.capture.engine.control import tell
from moe_inspect.capture.engine.vllm import shares_of
from moe_inspect.watch.metrics import EngineMetrics
from tests.conftest import ROOT, Cli
from tests.support.engines import Sglang, Vllm, metrics_in, span

L, E, K = 4, 8, 2


# --- /metrics


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    return tmp_path


def metrics(layers: int = L, experts: int = E, rank: int = 0, per_expert: bool = False) -> Any:
    shape = {"layers": [*range(layers)], "experts": experts, "top_k": K}
    return EngineMetrics({**shape, "rank": rank, "per_expert": per_expert})


def of(found: dict[tuple[str, ...], float], name: str) -> dict[str, float]:
    """First label → value, of a metric."""
    return {at[0]: v for (of, *at), v in found.items() if of == f"moe_inspect_{name}"}


def test_a_servers_metrics_are_those_of_the_load_and_bounded_by_the_layers(folder: Path) -> None:
    """Of the eight worst layers; dead experts that come to life are told no more."""
    layers, experts, told = 20, 16, {"steps": 9, "dropped": 7}
    draw = np.random.default_rng(0)
    load_LE = np.stack([draw.multinomial(2000, [1 / experts] * experts) for _ in range(layers)])
    load_LE[4], load_LE[7, :3] = [2000] + [0] * 15, [0, 0, load_LE[7, :3].sum()]
    load_LE[9, :2] = 1, load_LE[9, :2].sum() - 1  # starved
    written = metrics(layers, experts, rank=3, per_expert=True)
    written.add(load_LE.reshape(-1), tokens=1000, written_bytes=5, **told)
    found = metrics_in(folder)
    mean_L, share_LE = load_LE.mean(1), load_LE / load_LE.sum(1, keepdims=True)
    nats_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1))).sum(1)
    wanted = {
        "max_vio": load_LE.max(1) / mean_L - 1,
        "dead_experts": (load_LE == 0).sum(1),
        "starved_experts": ((load_LE > 0) & (load_LE < mean_L[:, None] / 10)).sum(1),
        "entropy": nats_L / np.log(experts),
        "balancedness": mean_L / load_LE.max(1),
    }
    for name, value_L in wanted.items():
        order = np.argsort(value_L if name in ("entropy", "balancedness") else -value_L)
        shown = np.flatnonzero(value_L) if name.endswith("experts") else order[:8]
        assert of(found, name) == pytest.approx({str(r): value_L[r] for r in shown}), name
    assert {*of(found, "max_vio_chance")} == {*of(found, "max_vio")}
    totals = of(found, "assignments_total")
    assert totals == {str(r): load_LE[r].sum() for r in range(layers)}
    for (name, *at), value in found.items():
        if name == "moe_inspect_expert_assignments_total":
            assert value == load_LE[int(at[1]), int(at[0])]
    counts = {"tokens": 1000, "dropped_decisions": 7, "written_bytes": 5}
    for name, value in (counts | {"decisions": 1000 * layers}).items():
        assert of(found, f"{name}_total") == {"3": value}
    written.add(np.full(layers * experts, 5000), tokens=40_000, **told)
    again = metrics_in(folder)
    assert not of(again, "dead_experts")
    assert again["moe_inspect_tokens_total", "3"] == 41_000


def test_the_dashboard_and_the_page_name_metrics_that_there_are(folder: Path) -> None:
    load_E = np.full(E, 10_000)
    load_E[0], load_E[1] = 0, 10  # dead, starved
    written = metrics(per_expert=True)
    of_ranks = shares_of(np.tile(np.arange(E), (L, 1)), E, 2)
    for step in range(1, 9):  # windows, until there is an alarm
        facts: dict[str, Any] = {"steps": step, "dropped": 0, "written_bytes": 1}
        facts["placed"] = of_ranks if step == 1 else None
        written.add(np.tile(load_E, L), tokens=int(load_E.sum()) // K, **facts)
    told = {name for name, *_ in metrics_in(folder)}
    dashboard = json.loads((ROOT / "docs/grafana-dashboard.json").read_text(encoding="utf-8"))
    queries = [query["expr"] for panel in dashboard["panels"] for query in panel["targets"]]
    asked = set(re.findall(r"moe_inspect_\w+", " ".join(queries)))
    assert len(asked) >= 8
    assert asked <= told
    page = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
    assert told == set(re.findall(r"`(moe_inspect_\w+)`", page))


def test_counts_that_are_seen_before_their_tokens_are_told(folder: Path) -> None:
    written = metrics()
    written.add(np.full(L * E, 5), tokens=0, steps=1, dropped=0)
    written.add(np.zeros(L * E, np.int64), tokens=20, steps=1, dropped=0)
    found = metrics_in(folder)
    in_all = sum(of(found, "assignments_total").values())
    assert in_all == found["moe_inspect_tokens_total", "0"] * L * K == 20 * L * K


@pytest.mark.parametrize("placement", ["linear", "round_robin", "replicas"])
def test_the_load_of_ranks_is_told_where_experts_are_parallel(
    placement: str, folder: Path, start: Callable[..., Any]
) -> None:
    """As vLLM places them once, or by its map of now: a replica takes its part of the load."""
    P, replicas = (10, 2) if placement == "replicas" else (E, 0)
    engine = start(Vllm, METRICS=1, TRACE=None, placement=placement, replicas=replicas)
    engine.serve(6)
    written = metrics()
    tokens = int(engine.load_LE.sum()) // (L * K)
    told: dict[str, Any] = {"tokens": tokens, "steps": 9, "dropped": 0}
    counts = engine.recorder.rows.load.so_far()[1].ravel()

    def load_of_ranks() -> np.ndarray:
        load_L2 = np.zeros((L, 2))
        for layer, load_E in enumerate(engine.load_LE):
            on_E = [*range(E)] if not replicas else engine.map_LP[layer].tolist()
            for place, expert in enumerate(on_E):
                rank = place % 2 if placement == "round_robin" else int(place >= P // 2)
                load_L2[layer, rank] += load_E[expert] / on_E.count(expert)
        return load_L2

    in_all = load_L2 = load_of_ranks()
    written.add(counts, placed=engine.recorder.placed(), **told)
    for gpus in range(2):
        found = metrics_in(folder)
        assert [*of(found, "gpu_assignments_total").values()] == pytest.approx(in_all.sum(0))
        if gpus == 0:
            ratio_L = load_L2.max(1) / load_L2.mean(1)
            told_L = of(found, "gpu_max_over_mean")
            assert told_L == pytest.approx({str(r): ratio for r, ratio in enumerate(ratio_L)})
            if replicas:
                engine.map_LP = engine.spread(replicas)  # experts are moved
            in_all = in_all + load_of_ranks()
            written.add(counts, placed=engine.recorder.placed(), **told)


# --- commands


@contextmanager
def served(routes: dict[str, Callable[[Any], Any]]) -> Iterator[str]:
    """The URL of a server. `routes`: path → its answer to the body that it is sent, as JSON; or a
    status, headers and bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"command": "status", "key": self.headers["authorization"]})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def answer(self, asked: Any) -> None:
            found = routes[self.path](asked) if self.path in routes else (404, {}, b"")
            if not isinstance(found, tuple):
                found = 200, {}, json.dumps(found).encode()
            status, headers, body = found
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def of_vllm(engines: list[Any], patch: pytest.MonkeyPatch, several: bool = True) -> dict[str, Any]:
    """The routes of its server, as the plugin adds them. `several`: engines behind one client."""
    patch.setitem(sys.modules, "fastapi", SimpleNamespace(Body=lambda *_: None))
    routes, client = dict[str, Any](), SimpleNamespace()

    async def all_of_them(*call: Any) -> list[list[Any]]:
        *named, _timeout, (what, value), _keywords = call
        assert named == ["collective_rpc", "moe_inspect"]
        return [[engine.wrapper.moe_inspect(what, value), None] for engine in engines]

    async def of_first(name: str, args: tuple[str, str]) -> list[Any]:
        return [getattr(engines[0].wrapper, name)(*args), None]

    if several:
        client.engine_core = SimpleNamespace(call_utility_all_async=all_of_them)
    client.collective_rpc = of_first
    app = SimpleNamespace(state=SimpleNamespace(engine_client=client))
    app.add_api_route = lambda _, answer, methods: routes.update({methods[0]: answer})
    vllm.Endpoint().attach_router(app)

    def answer(asked: dict[str, str]) -> dict[str, Any]:
        command, value = asked["command"], asked.get("value", "")
        given = routes["GET"]() if command == "status" else routes["POST"](command, value)
        return asyncio.run(given)

    return {"/v1/moe_inspect": answer} if routes else {}


def of_sglang(engine: Sglang, *others: dict[str, Any]) -> dict[str, Any]:
    """The routes of its server, which shows and takes the internal state of its schedulers."""

    def shown(_: Any) -> Any:
        found = SimpleNamespace(internal_state={})
        state = engine.call("get_internal_state", lambda *_: found, None, None).internal_state
        return {"internal_states": [state, *({"moe_inspect": other} for other in others)]}

    def taken(body: Any) -> list[bool]:
        request = SimpleNamespace(**body)
        answer = engine.call("set_internal_state", lambda *_: None, None, request)
        return [answer.updated]

    return {"/set_internal_state": taken, "/server_info": shown}


@pytest.mark.parametrize("server", ["vLLM", "vLLM, one engine", "SGLang"])
def test_every_engine_behind_a_server_is_switched(
    server: str, start: Callable[..., Any], cli_here: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown by rank, in whichever order they answer."""
    if server == "SGLang":
        engines = [start(Sglang, rank=1)]
        routes, ranks = of_sglang(engines[0], {"rank": 0, "on": False, "sample": 0.25}), [0, 1]
    else:
        engines = [start(Vllm, rank=rank) for rank in ((1, 0) if server == "vLLM" else (0,))]
        routes = of_vllm(engines, monkeypatch, several=len(engines) > 1)
        ranks = [*range(len(engines))]
    with served(routes) as url:
        assert [state["rank"] for state in tell(url, "status")] == ranks
        shown = cli_here("engine", f"{url}/v1", "off", "--format", "csv")
        assert pd.read_csv(StringIO(shown.stdout)).on.tolist() == [False] * len(ranks)
        for engine in engines:
            engine.step(span("a", 0, 10))
            assert engine.recorder.queue.decisions == 0
        tell(url, "on")
        assert [state["sample"] for state in tell(url, "sample", "0.25")] == [0.25] * len(ranks)
        for value in ("7", "nan", "a"):
            with pytest.raises(MoeInspectError, match=f"sample is '{value}', not a share from 0"):
                tell(url, "sample", value)
        with pytest.raises(MoeInspectError, match="MOE_INSPECT_METRICS=1 was not set"):
            tell(url, "metrics", "on")
        tell(url, "sample", "1")
        for engine in engines:
            engine.step(span("a", 10, 11))
            assert engine.recorder.queue.decisions == L
        with pytest.raises(MoeInspectError, match="VLLM_PLUGINS=moe_inspect"):
            tell(f"{url}/elsewhere", "status")
    for command, value in (("off", "1"), ("sample", ""), ("metrics", "maybe")):
        cli_here("engine", url, command, *[value] * bool(value), check=2)
    monkeypatch.delenv("MOE_INSPECT_TRACE")
    engine = start(type(engines[0]), TRACE=None, METRICS=1)
    assert "MOE_INSPECT_TRACE was not set" in engine.command("sample", "1")["refused"]
    assert engine.command("metrics", "off")["metrics"] is False
    if server != "SGLang":
        assert engine.command("nonsense")["refused"] == "no command 'nonsense'"


def test_a_server_says_which_variable_is_wrong(
    start: Callable[..., Any], cli_here: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's workers only say that they have no such method. An engine without the plugin, and one
    that is not asked for anything, have no such path."""
    wrong = "nothing is recorded: MOE_INSPECT_SAMPLE is '2', not a share from 0 to 1"
    monkeypatch.setenv("MOE_INSPECT_TRACE", "runs")
    with served(of_vllm([SimpleNamespace(wrapper=SimpleNamespace())], monkeypatch)) as url:
        said = cli_here("engine", url, check=1).stderr
        assert said.startswith("error: the engine does not run the plugin (")
        monkeypatch.setenv("MOE_INSPECT_SAMPLE", "2")
        vllm.register()
        assert cli_here("engine", url, check=1).stderr == f"error: {wrong}\n"
        vllm.Endpoint.refused = ""
    engine = start(Sglang, SAMPLE="2")
    assert engine.command("status") == {"refused": wrong}
    assert "load_model" not in engine.hooks
    for path, found, said in (
        ("/server_info", {"internal_states": [{"world_size": 1}]}, "has no /v1/moe_inspect"),
        ("/v1/moe_inspect", {"engines": []}, "no engine behind .* runs the plugin"),
    ):
        with (
            served({path: lambda _, found=found: found}) as url,
            pytest.raises(MoeInspectError, match=said),
        ):
            tell(url, "status")
    monkeypatch.delenv("MOE_INSPECT_TRACE")
    assert of_vllm([], monkeypatch) == {}


def test_the_state_of_sglang_is_its_own_but_for_our_keys(start: Callable[..., Any]) -> None:
    engine = start(Sglang)

    def asked(**server_args: float) -> Any:
        request = SimpleNamespace(server_args=server_args)
        return engine.call("set_internal_state", lambda *_: "its own", None, request)

    assert asked() == "its own"
    assert asked(pp_max_micro_batch_size=8) == "its own"
    assert asked(**{"moe_inspect.off": 1, "pp_max_micro_batch_size": 8}) == "its own"
    assert engine.recorder.on
    assert asked(**{"moe_inspect.off": 1}).updated
    assert not engine.recorder.on
    assert not asked(**{"moe_inspect.sample": 2}).updated
    assert "not a share" in engine.command("status")["refused"]
    assert "refused" not in engine.command("status"), "it is said once"


def test_what_a_server_refuses_is_one_line(cli_here: Cli) -> None:
    """The key is sent, and appears in no message. Nothing is decompressed, or read without end."""
    hostile = "\x1b[2J\x9b31m"
    answers = {
        "/closed": (401, {}, b"sesame"),
        "/busy": (503, {}, hostile.encode()),
        "/text": (200, {}, b"<html>"),
        "/endless": (200, {}, b" " * (2**24 + 1)),
        "/moved": (307, {"Location": "/text"}, b""),
        "/packed": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"{}")),
    }
    keys, said = list[str](), dict[str, str]()

    def answered(path: str) -> Callable[[Any], Any]:
        return lambda asked: (keys.append(asked["key"]), answers[path])[1]

    with served({f"{path}/v1/moe_inspect": answered(path) for path in answers}) as url:
        for path in answers:
            run = "engine", f"{url}{path}/v1", "--api-key", "sesame"
            said[path] = cli_here(*run, check=1).stderr
    assert {*keys} == {"Bearer sesame"}
    assert not any("sesame" in text or text.count("\n") > 1 for text in said.values())
    assert "rejected the API key (HTTP 401)" in said["/closed"]
    assert "MOE_INSPECT_API_KEY" in said["/closed"]
    assert r"refused the request (HTTP 503): \x1b[2J" in said["/busy"]
    assert "expected a JSON object, got b'<html>'" in said["/text"]
    assert "answered with more than 16,777,216 bytes" in said["/endless"]
    assert "(HTTP 307)" in said["/moved"]
    assert r"expected a JSON object, got b'\x1f\x8b" in said["/packed"]
    wrong = cli_here("engine", "http://me:sesame@localhost:no", check=1).stderr
    assert wrong.startswith("error: localhost:no is not a URL")
    assert "is not the URL of a server" in cli_here("engine", "localhost:8000", check=1).stderr
    assert "no server is ready at" in cli_here("engine", url, check=1).stderr

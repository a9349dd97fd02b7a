"""`trace URL --engine`, of servers that decide as is known, are slow, busy, broken, or lie."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import signal
import socket
import socketserver
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import moe_inspect
from moe_inspect.capture import inside
from moe_inspect.capture.corpus.plan import reserved_for_engines
from moe_inspect.capture.engine import sidecar
from moe_inspect.capture.server import client as engine_http
from moe_inspect.capture.server.protocols import ENGINES
from moe_inspect.capture.server.run import _without_secrets
from moe_inspect.cli.trace import EngineName
from moe_inspect.errors import MoeInspectError
from tests.conftest import Cli, Put
from tests.support.engine import (
    DENSE,
    EXPERTS,
    KEY,
    MODEL_LENGTH,
    VOCABULARY,
    K,
    Server,
    continued,
    decisions,
    serving,
)
from tests.support.engine_plugin import WEIGHTS, WithPlugin
from tests.test_cli_trace import save, write_jsonl

Traced = Callable[..., moe_inspect.Trace]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> str:
    return str(save("deepseek_v3", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: Any) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents=40, words=60))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine_http, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def traced(model: str, corpus: str, tmp_path: Path) -> Traced:
    """Traces a server, or one at a URL, into a folder of this name."""

    def trace(server: Server | str, out: str = "t", **options: Any) -> moe_inspect.Trace:
        if isinstance(server, Server):
            with serving(server) as url:
                return trace(url, out, **options)
        usual = {"data": [corpus], "max_length": 40, "batch_tokens": 300, "concurrency": 4}
        of_engine = {"engine": "vllm", "model_config": model}
        return moe_inspect.trace_engine(server, tmp_path / out, **of_engine | usual | options)

    return trace


def rows(trace: moe_inspect.Trace) -> Any:
    return trace.routing().merge(trace.tokens(), on="token")


def check_rows(trace: moe_inspect.Trace) -> None:
    found = rows(trace)
    assert len(found) == trace.n_tokens > 0
    assert set(found["layer"]) == {DENSE + 1}
    fed = (found[name].to_numpy(np.int64) for name in ("token_id", "position"))
    expected = decisions(*fed, DENSE + 1)
    assert (found[[f"expert_{j}" for j in range(K)]].to_numpy() == expected).all()


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("generate", [0, 5])
def test_every_row_is_what_the_server_decided(engine: str, generate: int, traced: Traced) -> None:
    server = Server()
    # answers come in another order than they were asked for
    server.delay_s = lambda n: 0.02 * (n % 3 == 0)
    with serving(server) as url:
        trace = traced(url, engine=engine, generate=generate)
    tokens = trace.tokens()
    for _, text in tokens.groupby("sequence"):
        assert text.position.tolist() == list(range(len(text)))
        prompt, made = (text[text.phase == p].token_id.tolist() for p in ("prefill", "decode"))
        of_document = tokens[tokens.document == text.document.iloc[0]]
        last = text.sequence.iloc[0] == of_document.sequence.max()
        assert made == (continued(prompt, generate + 1)[:-1] if generate and last else [])
    assert (tokens.phase == "decode").any() == (generate > 0)
    salt = "cache_salt" if engine == "vllm" else "extra_key"
    assert len({body[salt] for _, body in server.requests}) == len(server.requests)
    capture = trace.manifest["capture"]
    assert (capture["mode"], capture["engine"], capture["url"]) == ("engine", engine, url)
    assert capture["server"]["version"] == {"vllm": "0.33.0", "sglang": "0.5.23"}[engine]
    assert not capture["weights"]
    assert "weight_0" not in trace.routing()


# --- recorded by the plugin inside the engine


@pytest.fixture
def committed_at_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(sidecar, "COMMIT_S", 0.02)
    monkeypatch.setattr(inside, "LOOK_S", 0.02)


def check_weights(trace: moe_inspect.Trace) -> None:
    found = trace.routing()[[f"weight_{j}" for j in range(K)]].to_numpy()
    assert (found == np.array(WEIGHTS)).all()


@pytest.mark.usefixtures("committed_at_once")
@pytest.mark.parametrize(("engine", "text"), [("vllm", True), ("vllm", False), ("sglang", True)])
def test_what_the_plugin_records_of_these_requests_is_the_trace(
    engine: str, text: bool, model: str, traced: Traced, tmp_path: Path, capsys: Any
) -> None:
    """The tokens, documents and batches that a trace through the server has, and weights too.
    Others' requests, and what was computed again or ahead, are left out."""
    without = traced(Server(), "without", engine=engine, generate=5)
    server = WithPlugin(tmp_path / "runs", model, sglang=engine == "sglang", text=text)
    server.delay_s = lambda n: 0.02 * (n % 3 == 0)
    trace = traced(server, engine=engine, generate=5)
    assert "not used" not in capsys.readouterr().err
    check_rows(trace)
    check_weights(trace)
    assert trace.tokens().equals(without.tokens())
    assert trace.documents().equals(without.documents())
    assert moe_inspect.check(tmp_path / "t", quick=True).ok
    assert trace.manifest["capture"]["weight_dtype"] == "float16"
    assert not any("routed" in name for _, body in server.requests for name in body)
    names = {body["rid" if engine == "sglang" else "request_id"] for _, body in server.requests}
    assert len(names) == len(server.requests) == trace.tokens().sequence.nunique() + 1  # a probe
    (run,) = (tmp_path / "runs").iterdir()
    others = set(moe_inspect.open_trace(run).documents().source)
    assert sum(name.startswith("another-") for name in others) == len(server.requests)


@pytest.mark.usefixtures("committed_at_once")
def test_a_row_that_the_plugin_dropped_is_one_line_and_resumed(
    model: str, traced: Traced, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(inside, "LOST_S", 1.0)
    usual = {"concurrency": 1, "commit_every": 0.001, "max_tokens": 1000}
    server = WithPlugin(tmp_path / "runs", model, lost=16)
    with pytest.raises(MoeInspectError, match=r"runs lack rows of sequence \d+ .*--resume$"):
        traced(server, **usual)
    kept = moe_inspect.open_trace(tmp_path / "t").n_tokens
    says = r"no plugin is known of, but \S+ has gate weights, .* --overwrite$"
    with pytest.raises(MoeInspectError, match=says):
        traced(Server(), resume=True, **usual)
    server.state["sample"] = 0.5
    says = r"share of 0\.5 of the requests, but \S+ has gate weights"
    with pytest.raises(MoeInspectError, match=says):
        traced(server, resume=True, **usual)
    server.state["sample"] = 1.0
    server.lost = None
    trace = traced(server, resume=True, **usual)
    assert 0 < kept < trace.n_tokens
    check_rows(trace)
    check_weights(trace)
    traced(Server(), resume=True, **usual)  # complete: nothing is asked for


@pytest.mark.usefixtures("committed_at_once")
def test_a_trace_without_weights_is_resumed_without_whoever_has_them_now(
    model: str, traced: Traced, tmp_path: Path, capsys: Any
) -> None:
    usual = {"concurrency": 1, "commit_every": 0.001, "max_tokens": 1000}
    whole = traced(Server(), "whole", **usual)
    server = Server()
    server.behave = lambda n, *_: (400, {}, b"{}") if n >= 12 else None
    with pytest.raises(MoeInspectError, match="HTTP 400"):
        traced(server, **usual)
    kept = moe_inspect.open_trace(tmp_path / "t").n_tokens
    now = WithPlugin(tmp_path / "runs", model)
    now.returns = True
    for _ in ("resumed", "complete"):
        trace = traced(now, resume=True, **usual)
        assert 0 < kept < trace.n_tokens
        assert trace.tokens().equals(whole.tokens())
        check_rows(trace)
        assert not trace.has_weights
    assert not any("request_id" in body for _, body in now.requests)
    assert "not used" not in capsys.readouterr().err


def damage(server: WithPlugin) -> None:
    """A trace of a newer version, of which the plugin's are too, is beside it."""
    server.records = False
    (server.folder / "newer").mkdir()
    (server.folder / "newer/shards-0.jsonl").touch()
    (server.folder / "newer/trace.json").write_text('{"format": 99}')


def rename(server: WithPlugin) -> None:
    server.named = lambda name: "req-7"


def stop(server: WithPlugin) -> None:
    """At its first step."""
    server.records, state = False, server.state
    server.behave = lambda *_: state.update(on=False, error="no kernel")


def be_silent(server: WithPlugin) -> None:
    server.records = False


@pytest.mark.usefixtures("committed_at_once")
@pytest.mark.parametrize(
    ("how", "why"),
    [
        (be_silent, "they were dropped or not written: see the engine's log"),
        (rename, "they were dropped or not written: see the engine's log"),
        (damage, "newer/trace.json"),
        (stop, "it has stopped: no kernel"),
    ],
)
def test_a_plugin_that_does_not_record_the_first_request_is_not_waited_for(
    how: Callable[[WithPlugin], None],
    why: str,
    model: str,
    traced: Traced,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    """It has not begun to write, has ended, or the requests reach the engine by other names."""
    monkeypatch.setattr(inside, "PROBE_S", 0.5)
    server = WithPlugin(tmp_path / "runs", model)
    server.returns = True
    how(server)
    trace = traced(server, max_tokens=300)
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if "is not used" in line]
    assert len(said) == 1
    told = f"{tmp_path / 'runs'} has no rows of a first request after 0.5 s: "
    assert (told in said[0]) == (how is not stop)
    assert why in said[0]
    assert said[0].endswith("the trace has what the server returns, without gate weights")
    check_rows(trace)
    assert not trace.has_weights
    assert len(server.requests) == trace.tokens().sequence.nunique() + 1


@pytest.mark.usefixtures("committed_at_once")
def test_a_request_that_is_sent_again_has_another_name(
    model: str, traced: Traced, tmp_path: Path
) -> None:
    """SGLang refuses a name while it is still at the first attempt, whose rows are not taken."""
    server, names = WithPlugin(tmp_path / "runs", model, sglang=True), set[str]()

    def behave(n: int, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes] | None:
        if body["rid"] in names:
            return 400, {}, b'{"error": {"message": "Duplicate request ID detected"}}'
        names.add(body["rid"])
        return (500, {}, b"") if n % 5 == 2 else None

    server.behave = behave
    trace = traced(server, engine="sglang", generate=2, max_tokens=1000)
    assert len(names) == len(server.requests) > trace.tokens().sequence.nunique() + 1
    check_rows(trace)
    check_weights(trace)


def turning(server: WithPlugin, monkeypatch: Any, keep: int) -> None:
    """A trace for a few requests; the first answer comes when many others have come."""
    monkeypatch.setattr(sidecar, "LOOK_S", 0.0)
    server.traces.keep = keep

    def delay_s(n: int) -> float:
        if n == 1:  # behind the first request that shows whether there is a plugin
            server.traces.most_bytes = 20_000
        return 1.0 if n == 1 else 0.02

    server.delay_s = delay_s


@pytest.mark.usefixtures("committed_at_once")
def test_what_is_recorded_is_read_before_it_is_deleted(
    model: str, traced: Traced, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also while an answer is awaited; of an engine that was started for this, by who reads."""
    server = WithPlugin(tmp_path / "runs", model)
    turning(server, monkeypatch, keep=8)
    seen = list[inside.Inside]()
    begin = inside.Inside.__init__
    monkeypatch.setattr(
        inside.Inside, "__init__", lambda self, *of: (seen.append(self), begin(self, *of))[1]
    )
    trace = traced(server, generate=2, max_tokens=900)
    check_rows(trace)
    check_weights(trace)
    there = [path for path in server.traces.paths if path.exists()]
    assert len(server.traces.paths) > len(there)  # others were deleted
    assert not seen[0]._rows  # given
    assert len(seen[0]._traces) <= len(there) + 1
    with inside.recording_inside(tmp_path / "log") as variables:
        own = WithPlugin(Path(variables["MOE_INSPECT_TRACE"]), model)
        turning(own, monkeypatch, keep=0)
        check_weights(traced(own, "own", generate=2, max_tokens=900))
        assert len(own.traces.paths) > 5 * sum(path.exists() for path in own.traces.paths)


@pytest.mark.usefixtures("committed_at_once")
def test_a_trace_that_was_deleted_before_it_was_read_is_one_line(
    model: str, traced: Traced, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(inside, "LOOK_S", 1.0)
    monkeypatch.setattr(inside, "LOST_S", 1.5)
    server = WithPlugin(tmp_path / "runs", model)
    turning(server, monkeypatch, keep=1)
    says = r"-\d{4} was deleted before it was read: set MOE_INSPECT_KEEP higher; .*--resume$"
    with pytest.raises(MoeInspectError, match=says):
        traced(server, max_tokens=900)


@pytest.mark.parametrize(
    ("ended", "deleted", "why"),
    [
        (True, True, "no answer after 6 attempts.*when the server is back"),
        (True, False, "no answer after 6 attempts.*when the server is back"),
        (False, True, "lack rows of .*: the directory is gone"),
    ],
)
def test_a_server_that_ends_or_traces_that_are_deleted_are_one_line(
    ended: bool,
    deleted: bool,
    why: str,
    model: str,
    traced: Traced,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Also where all requests were answered, and rows of them were not written."""
    monkeypatch.setattr(inside, "LOST_S", 1.5)
    server = WithPlugin(tmp_path / "runs", model)
    record = server.record

    def recorded(*of: Any) -> None:
        if len(server.requests) < 3:
            record(*of)
        else:
            server.starting = ended
            if deleted:
                shutil.rmtree(tmp_path / "runs", ignore_errors=True)

    monkeypatch.setattr(server, "record", recorded)
    with pytest.raises(MoeInspectError, match=f"{why}.*continue with --resume$"):
        traced(server, max_tokens=900)


UNUSED = {
    "it is switched off": {"on": False},
    "it has stopped: the disk is full": {"on": False, "error": "the disk is full"},
    "it records a share of 0.5 of the requests": {"sample": 0.5},
    "MOE_INSPECT_TRACE is not set in the engine": {"trace": None},
    "it is an older one, which does not say where its traces are": {"host": ...},
    "runs of elsewhere, which is another host": {"host": "elsewhere"},
    "its engines record in more than one directory: ": {"second": "runs/2"},
    "runs/gone, which cannot be read here": {"trace": "runs/gone"},
    "no MoE layer": {"refused": "no MoE layer"},
}


@pytest.mark.parametrize("why", UNUSED)
def test_where_the_plugin_does_not_do_the_server_is_asked(
    why: str, model: str, traced: Traced, tmp_path: Path, capsys: Any
) -> None:
    server = Server()
    state = WithPlugin(tmp_path / "runs", model).state | UNUSED[why]
    known = server.about
    state = {name: value for name, value in state.items() if value is not ...}
    states = [state, state | {"trace": state.pop("second")}] if "second" in state else [state]
    server.about = lambda path: {"engines": states} if path == "/v1/moe_inspect" else known(path)
    trace = traced(server, max_tokens=300)
    (said,) = capsys.readouterr().err.splitlines()
    assert why in said
    assert said.endswith("the trace has what the server returns, without gate weights")
    check_rows(trace)
    assert not trace.has_weights


@pytest.mark.parametrize("how", ["forbidden", "another answer"])
def test_a_gateway_that_knows_no_plugin_is_no_news(how: str, traced: Traced, capsys: Any) -> None:
    server = Server()
    known = server.about
    if how == "forbidden":
        server.forbidden = {"/v1/moe_inspect"}
    else:
        welcome: Any = ["welcome"]
        server.about = lambda path: known(path) or welcome
    trace = traced(server, max_tokens=300)
    assert "/v1/moe_inspect" in server.gets
    assert capsys.readouterr().err == ""
    assert not trace.has_weights


def test_the_default_length_fits_every_engine() -> None:
    assert set(get_args(EngineName)) == set(ENGINES)
    for generate in range(9):
        needed = [engine.reserved(generate) for engine in ENGINES.values()]
        assert max(needed) == reserved_for_engines(generate)


LENGTHS = [("vllm", 256, 0, None), ("sglang", 256, 0, None), ("sglang", 120, 5, 112)]


@pytest.mark.parametrize("case", LENGTHS)
def test_the_tokens_are_those_of_a_local_trace(
    case: tuple[str, int, int, int | None], model: str, traced: Traced, tmp_path: Path, capsys: Any
) -> None:
    """Long documents are split alike, where the server takes fewer positions as is told."""
    (engine, length, generate, max_length), server = case, Server()
    server.length = length
    text = str(write_jsonl(tmp_path / "c.jsonl", documents=3, words=900))
    usual = {"data": [text], "batch_tokens": 300, "generate": generate}
    served = traced(server, engine=engine, max_length=None, **usual)
    assert ("--max-length 112" in capsys.readouterr().err) == (length == 120)
    local = moe_inspect.trace_model(model, tmp_path / "l", max_length=max_length, **usual)
    prompts = [
        tokens[tokens.phase == "prefill"].reset_index(drop=True)
        for tokens in (served.tokens(), local.tokens())
    ]
    if generate:  # what is generated is another text, and shares batches
        prompts = [of[["document", "sequence", "position", "token_id"]] for of in prompts]
    assert prompts[0].equals(prompts[1])
    longest = length - reserved_for_engines(generate)
    assert (prompts[0].groupby("sequence").size() == longest).sum() >= 3
    assert generate or served.documents().equals(local.documents())
    # engines hand back no weights
    known = [{**router, "slot_order": "unknown"} for router in local.manifest["routers"]]
    assert served.manifest["routers"] == known


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("generate", [0, 5])
def test_the_longest_prompt(engine: str, generate: int, traced: Traced, tmp_path: Path) -> None:
    """All documents fill it, and are continued by all tokens that are asked for."""
    longest = MODEL_LENGTH - ENGINES[engine].reserved(generate)
    text = write_jsonl(tmp_path / "c.jsonl", documents=1, words=900)
    of = {"engine": engine, "data": [str(text)], "max_tokens": longest, "generate": generate}
    with pytest.raises(MoeInspectError, match=f"beyond the {longest} positions of this model that"):
        traced(Server(), max_length=longest + 1, **of)
    traced(Server(), max_length=longest, **of)


def test_concurrency_is_bounded_and_changes_nothing(traced: Traced) -> None:
    found = {}
    for concurrency in (1, 8):
        server = Server()
        first = threading.Barrier(concurrency)  # they are answered when all of them are under way
        server.delay_s = lambda n, first=first: (
            first.wait(60) * 0.0 if n < first.parties else 0.002 * (n % 5)
        )
        found[concurrency] = rows(
            traced(server, f"{concurrency}", generate=2, concurrency=concurrency)
        )
        assert server.most == concurrency
    assert found[1].equals(found[8])


def test_a_busy_server_is_asked_again_as_it_says(traced: Traced, capsys: Any) -> None:
    server, asked_s = Server(), []
    busy = {
        0: (503, {}, b"starting"),
        1: (429, {"Retry-After": "0.5"}, b"{}"),
        2: (200, {"Content-Length": "100"}, b'{"cut'),
        5: (500, {}, b""),
    }
    server.behave = lambda n, *_: asked_s.append(time.monotonic()) or busy.get(n)
    aborts = says("choices.0.finish_reason", "abort")
    server.edit = lambda answer: aborts(answer) if len(server.requests) == 8 else None
    with serving(server) as url:
        # else any of the refusals may be told first
        trace = traced(url, concurrency=1)
    check_rows(trace)
    said = f"{url}: HTTP 503: starting; retrying in 0 s (attempt 1 of 6 failed)\n"
    assert said in capsys.readouterr().err
    assert asked_s[2] - asked_s[1] >= 0.5 > asked_s[3] - asked_s[2]
    assert len(server.requests) == trace.tokens().sequence.nunique() + len(busy) + 1


def test_a_server_that_stays_away_is_one_line_and_resumed(traced: Traced, tmp_path: Path) -> None:
    whole, server = Server(), Server()
    expected = rows(traced(whole, "whole", generate=3))
    server.behave = lambda n, *_: (
        (503, {}, b'{"error": {"message": "engine\\ndead"}}') if n >= 20 else None
    )
    with serving(server) as url:
        says = r"no answer after 6 attempts, the last error: HTTP 503: engine dead: .*--resume"
        with pytest.raises(MoeInspectError, match=says):
            traced(url, generate=3)
        cut = moe_inspect.open_trace(tmp_path / "t")
        assert cut.manifest["status"] == "interrupted"
        assert 0 < cut.n_tokens < len(expected)
        check_rows(cut)
        server.behave = lambda *_: None
        before = len(server.requests)
        with pytest.raises(MoeInspectError, match="made with generate 3, not 2"):
            traced(url, generate=2, resume=True)
        trace = traced(url, generate=3, resume=True)
        # what was committed is not asked for again
        assert len(server.requests) - before < len(whole.requests)
        assert rows(trace).equals(expected)
        assert trace.manifest["status"] == "complete"
        again = len(server.requests)
        traced(url, generate=3, resume=True)
        assert len(server.requests) == again


Lie = tuple[str, str, Callable[..., Any], str]  # engine, what of the server is otherwise, how, said


def says(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(answer: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            answer = answer[int(name)] if isinstance(answer, list) else answer[name]
        answer[last] = value

    return edit


def put(at: Any, expert: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(routed: np.ndarray) -> np.ndarray:
        changed = routed.copy()
        changed[at] = expert
        return changed

    return change


def answers(status: int, headers: dict[str, str], body: bytes) -> Callable[..., object]:
    return lambda *_: (status, headers, body)


IDS = "choices.0.token_ids"
OF_VLLM, OF_SGLANG = "choices.0.routed_experts", "meta_info.routed_experts"
NO_FLAG = "start the server with --enable-return-routed-experts"
BOMB, TOO_LONG = b" " * 2**22, b'{"error": {"message": "too long"}}'
LIES: dict[str, Lie] = {
    "the flag is not set (vllm)": ("vllm", "edit", says(OF_VLLM, None), NO_FLAG),
    "the flag is not set (sglang)": ("sglang", "edit", says(OF_SGLANG, None), NO_FLAG),
    "cut base64": ("vllm", "edit", says(OF_VLLM, "k05VTVB"), "base64"),
    "no array": ("vllm", "edit", says(OF_VLLM, "AAAA"), "not a .npy"),
    "cut array": ("sglang", "edit", says(OF_SGLANG, "AAAAAA=="), "no whole number of tokens"),
    "another prompt": ("vllm", "edit", says("choices.0.prompt_token_ids", [5]), "another prompt"),
    "a cut prompt": ("sglang", "edit", says("meta_info.prompt_tokens", 1), "ran another prompt"),
    "ids beyond the vocabulary": ("vllm", "edit", says(IDS, [VOCABULARY]), "list of ids below 300"),
    "no token ids": ("sglang", "edit", says("output_ids", None), "not a list of ids"),
    "aborted each time": (
        "sglang",
        "edit",
        says("meta_info.finish_reason", {"type": "abort", "message": "no\nroom"}),
        r"6 attempts.*: sequence \d+ \(.*\): the server aborted a request: no room: .*--resume$",
    ),
    "too many tokens": ("vllm", "edit", says(IDS, [3, 4]), "2 of 1 tokens were generated"),
    "a cached prefix left out": ("vllm", "routed", lambda a: a[1:], "0.33 return .* --no-enable"),
    "and by SGLang": ("sglang", "routed", lambda a: a[1:], "start the server with --disable-radix"),
    "too many rows": ("sglang", "routed", lambda a: np.concatenate([a, a[:1]]), "rows"),
    "a layer too few": ("vllm", "routed", lambda a: a[:, 1:], "1 layers, the model's config 2"),
    "another top-k": ("vllm", "routed", lambda a: a[:, :, :2], "2 experts per token"),
    "an expert beyond E": ("vllm", "routed", put((0, 1, 0), EXPERTS), "expert 8 of 8"),
    "an expert twice": ("sglang", "routed", lambda a: a[:, :, [1, 1, 2]], "one expert twice"),
    "a layer that was not recorded": ("vllm", "routed", put(slice(None), 0), "one expert twice"),
    "a dense layer that routes": ("vllm", "routed", put((0, 0, 0), 4), "no router in layer 0"),
    "no JSON": ("vllm", "behave", answers(200, {}, b"<html>"), "JSON object, got b'<html>'"),
    "endless": ("vllm", "behave", answers(200, {}, BOMB), "more than any valid response has"),
    "a redirect": ("vllm", "behave", answers(307, {"Location": "/elsewhere"}, b""), "HTTP 307"),
    "a refusal": ("sglang", "behave", answers(400, {}, TOO_LONG), "HTTP 400.: too long"),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_an_answer_that_cannot_be_true_is_refused(lie: str, traced: Traced, tmp_path: Path) -> None:
    engine, hook, what, said = LIES[lie]
    server = Server()
    setattr(server, hook, what)
    with pytest.raises(MoeInspectError, match=said) as error:
        traced(server, engine=engine)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "t").exists()


def test_a_server_of_another_model_is_refused(traced: Traced) -> None:
    server = Server()
    with pytest.raises(MoeInspectError, match="no router in layer 0: the MoE layers are 1"):
        traced(server, layers=[0])
    server.model_type = "mixtral"
    says = r"the server's model is mixtral .*the one given here deepseek_v3"
    with pytest.raises(MoeInspectError, match=says):
        traced(server, engine="sglang")
    assert not server.requests


def test_the_key_stays_secret(cli_here: Cli, model: str, corpus: str, tmp_path: Path) -> None:
    server = Server()
    server.key = KEY
    with serving(server) as url:
        usual = f"--engine sglang --model-config {model} --data {corpus} --max-tokens 200".split()
        refused = cli_here("trace", url, "-o", "t", *usual, check=1)
        assert "--api-key or MOE_INSPECT_API_KEY" in refused.stderr
        done = cli_here("trace", url + "/v1", "-o", "t", *usual, "--api-key", KEY)
    check_rows(moe_inspect.open_trace(tmp_path / "t"))
    assert KEY not in done.stderr
    written = [f.read_bytes() for f in (tmp_path / "t").rglob("*") if f.is_file()]
    assert not any(KEY.encode() in data for data in written)
    url = "http://user:secret@host:1/v1"
    command = f"x/moe-inspect trace {url} --api-key=a --api-key b --seed 3"
    hidden = "moe-inspect trace http://host:1 --api-key=… --api-key … --seed 3"
    assert _without_secrets(command.split(), url) == hidden.split()


def test_ctrl_c_closes_the_trace(traced: Traced, tmp_path: Path) -> None:
    def interrupted(done: int, total: int | None) -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced(Server(), progress=interrupted)
    cut = moe_inspect.open_trace(tmp_path / "t")
    assert cut.manifest["status"] == "interrupted"
    check_rows(cut)


@pytest.mark.usefixtures("committed_at_once")
@pytest.mark.parametrize(("inside", "late"), [(False, 3), (True, 3), (False, 24)])
def test_ctrl_c_keeps_what_was_answered(
    inside: bool, late: int, model: str, traced: Traced, tmp_path: Path
) -> None:
    """Of batches whose answers come in another order, from that of request `late` on; `--resume`
    makes them whole."""
    options: dict[str, Any] = {"batch_tokens": 400, "max_tokens": 1500, "generate": 3}

    def server(name: str) -> Server:
        return WithPlugin(tmp_path / name, model) if inside else Server()

    whole, stopped = traced(server("1"), "whole", **options), server("2")

    def delay_s(n: int) -> float:
        if n == 30:
            time.sleep(0.3)  # what was answered is committed
            os.kill(os.getpid(), signal.SIGINT)
        return 10.0 if n == late else 0.0

    stopped.delay_s = delay_s
    with pytest.raises(KeyboardInterrupt):
        traced(stopped, **options)
    assert moe_inspect.check(tmp_path / "t", quick=True).ok
    cut = moe_inspect.open_trace(tmp_path / "t")
    check_rows(cut)
    assert cut.manifest["status"] == "interrupted"
    assert 20 < cut.tokens().sequence.nunique() < whole.tokens().sequence.nunique()
    assert cut.tokens().batch.min() == 0
    resumed = traced(server("3"), resume=True, **options)
    assert resumed.manifest["status"] == "complete"
    assert resumed.tokens().equals(whole.tokens())
    assert resumed.routing().equals(whole.routing())


def test_usage(cli_here: Cli) -> None:
    url, engine = "http://localhost:1", ("--engine", "vllm", "--model-config", "demo")
    for arguments, said in (
        ((url,), "a URL is traced with --engine"),
        (("demo", *engine), "takes the URL of a server"),
        ((url, "--engine", "vllm"), "needs --model-config"),
        ((url, *engine, "--device", "cpu"), "--device does not apply with --engine"),
        (("demo", "--concurrency", "2"), "--concurrency needs --engine"),
    ):
        done = cli_here("trace", *arguments, "-o", "t", check=2)
        assert said in " ".join(done.stderr.replace("│", " ").split()), done.stderr


@pytest.mark.parametrize("there", ["nobody", "silent", "starting"])
def test_a_server_that_is_not_up_is_one_line_at_once(
    there: str, cli_here: Cli, tmp_path: Path, monkeypatch: Any
) -> None:
    """Asked once, and not waited for longer than FIRST_CONTACT_S."""
    server, why = Server(), "no answer"
    # of the first, connections are taken, and nothing is said
    with socket.create_server(("127.0.0.1", 0)) as listening, serving(server) as url:
        if there == "starting":
            server.starting, why = True, "HTTP 503: starting"
        else:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            monkeypatch.setattr(engine_http, "FIRST_CONTACT_S", 0.3)
        if there == "nobody":
            listening.close()
            why = "no answer (ConnectError: All connection attempts failed)"
        usual = ["-o", "t", "--engine", "vllm", "--model-config", "demo"]
        done = cli_here("trace", url, *usual, check=1)
        with pytest.raises(MoeInspectError, match="no server is ready at"):
            moe_inspect.trace_engine(url, tmp_path / "t", engine="vllm", model_config="demo")
    assert done.stderr.startswith(f"error: no server is ready at {url}, {why}")
    assert done.stderr.endswith(": check the address, and that the server is up\n")
    assert done.stderr.count("\n") == 1
    # by the command, and by the function
    assert server.gets == ["/v1/models"] * 2 * (there == "starting")


def test_requests_that_wait_together_say_so_once(capsys: Any) -> None:
    tell = engine_http.wait_notifier()
    for what, wait_s in (("a", 0.01), ("b", 0.01)):
        tell(what, wait_s)
    time.sleep(0.02)
    tell("c", 0.01)
    assert capsys.readouterr().err == "a\nc\n"


async def ask(url: str, timeout_s: float, **how: Any) -> Any:
    async with engine_http.client(url, None, timeout_s, 1) as http:
        assert http.headers["accept-encoding"] == "identity"
        return await engine_http.ask_for(lambda answer: answer, http, "/generate", dict, **how)


@pytest.mark.parametrize("drips", ["headers", "body"])
def test_the_timeout_is_of_the_whole_request(drips: str) -> None:
    """A byte now and then is no answer, though each wait for the next one is short."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000
    at_once = 0 if drips == "headers" else whole.index(b"\r\n\r\n") + 4
    asked = threading.Semaphore(0)

    class Drip(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(2**16)
            asked.release()
            with suppress(OSError):  # who asked has hung up
                self.request.sendall(whole[:at_once])
                for byte in whole[at_once:]:
                    self.request.sendall(bytes([byte]))
                    time.sleep(0.03)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began, url = time.monotonic(), f"http://127.0.0.1:{server.server_address[1]}"
        says = r"no answer after 6 attempts, the last error: incomplete response after 0\.15 s"
        with pytest.raises(MoeInspectError, match=says):
            asyncio.run(asyncio.wait_for(ask(url, 0.15), 10))
        assert 6 * 0.15 <= time.monotonic() - began < 5
        server.shutdown()
    assert all(asked.acquire(timeout=1) for _ in range(engine_http.ATTEMPTS))


def test_a_connection_that_the_server_may_close_is_not_used_again(put: Put) -> None:
    """As engines do after a while, also when a request is on its way."""
    put(engine_http, IDLE_S=0.1)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered = time.monotonic()
        while await reader.readuntil(b"\r\n\r\n") and time.monotonic() - answered < 0.5:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            answered = time.monotonic()
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with engine_http.client(f"http://127.0.0.1:{port}", None, 5, 1) as http:
            for _ in range(2):
                assert await engine_http.ask_once(http, "/x") == {}
                await asyncio.sleep(0.6)
        server.close()

    asyncio.run(ask())


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_is_never_decompressed(status: int) -> None:
    """Some hundred bytes of gzip within gzip are gigabytes."""
    bomb = gzip.compress(gzip.compress(b" " * 2**26))
    assert len(bomb) < 2**11
    server = Server()
    server.answer = lambda path, body: (200, {})
    server.behave = lambda n, path, body: (status, {"Content-Encoding": "gzip, gzip"}, bomb)

    said = {200: "answered with content-encoding 'gzip, gzip'", 500: "500: no reason given"}[status]
    tracemalloc.start()
    with serving(server) as url, pytest.raises(MoeInspectError, match=said):
        asyncio.run(ask(url, 5, most_bytes=2**30))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_what_a_server_says_steers_no_terminal(cli_here: Cli, model: str, corpus: str) -> None:
    server, hostile = Server(), "\x1b[2J\x1b]0;mine\x07\x9b31m\u202egnp"
    said = {0: (503, {}, hostile.encode()), 1: (400, {}, json.dumps({"error": hostile}).encode())}
    server.behave = lambda n, *_: said[n]
    with serving(server) as url:
        usual = f"--engine vllm --model-config {model} --data {corpus} --max-length 40".split()
        done = cli_here("trace", url, "-o", "t", *usual, "--concurrency", 1, check=1)
    waiting, error = done.stderr.splitlines()
    spelled = r"\x1b[2J\x1b]0;mine\x07\x9b31m\u202egnp"
    assert f"HTTP 503: {spelled}; retrying" in waiting
    assert error == f"error: {url}/v1/completions refused the request (HTTP 400): {spelled}"

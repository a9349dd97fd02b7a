"""Traces through a real engine, on a CPU, against local traces of the same models: the same tokens,
and the same experts of every decision."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from moe_inspect.capture.corpus.plan import reserved_for_engines
from moe_inspect.capture.server.protocols import ENGINES as PROTOCOLS
from tests.real_engines.models import MODELS, OTHERWISE, POSITIONS
from tests.real_engines.server import ENGINES, INSTALLED, Served, serving

GENERATE = 16
Property = Callable[[str, object], None]


@pytest.fixture(scope="module", params=INSTALLED)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(MODELS))
def served(
    engine: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One server at a time."""
    if reason := OTHERWISE.get((engine, request.param)):
        pytest.skip(reason)
    with serving(engine, request.param, tmp_path_factory.mktemp("served")) as found:
        yield found


def command(served: Served, out: Path, *options: object) -> list[str]:
    """A trace through the server, as a user asks for one."""
    engine = ("--engine", served.engine, "--model-config", served.model)
    start = (sys.executable, "-m", "moe_inspect", "trace", served.url)
    return list(map(str, (*start, *engine, "-o", out, *options)))


def run(served: Served, out: Path, *options: object, code: int = 0) -> str:
    """Its stderr."""
    done = subprocess.run(command(served, out, *options), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr


def traced_locally(served: Served, out: Path, corpus: Path, **options: int) -> moe_inspect.Trace:
    return moe_inspect.trace_model(
        str(served.model), out, data=[str(corpus)], dtype="float32", **options
    )


def experts(trace: moe_inspect.Trace) -> np.ndarray:
    """Of each decision, by router and token: its experts in ascending order (an engine's slots are
    in none), [decisions, k]."""
    routing = trace.routing().sort_values(["router", "token"])
    ids = routing[[name for name in routing if name.startswith("expert_")]].to_numpy()
    return np.sort(ids, axis=1)


def compared(
    record: Property, served: Served, what: str, trace: moe_inspect.Trace, local: moe_inspect.Trace
) -> None:
    """Asserts that both hold the same tokens and the same experts; adds a row to the table."""
    assert trace.tokens().equals(local.tokens())
    assert trace.documents().equals(local.documents())
    pair = experts(trace), experts(local)
    equal, total = int((pair[0] == pair[1]).all(1).sum()), len(pair[0])
    assert equal == total == trace.n_tokens * len(trace.manifest["routers"])
    # the comparison can fail: shifted by one token, it does
    assert (np.roll(pair[0], 1, axis=0) == pair[1]).all(1).mean() < 0.9
    engine = f"{ENGINES[served.engine].name} {version(served.engine)}"
    row = f"| {engine} | {served.name} | {what} | {trace.n_tokens:,} | {equal:,} of {total:,} |"
    record(served.engine, row)


def test_prompts_and_what_is_generated(
    served: Served, corpus: Path, tmp_path: Path, record_property: Property
) -> None:
    """Documents beyond the model's positions are among them, split as in a local trace."""
    assert "--max-length" not in run(
        served, tmp_path / "t", "--data", corpus, "--generate", GENERATE
    )
    local = traced_locally(served, tmp_path / "local", corpus, generate=GENERATE)
    trace = moe_inspect.open_trace(tmp_path / "t")
    tokens = trace.tokens()
    assert (tokens.phase == "decode").sum() > GENERATE
    longest = tokens[tokens.phase == "prefill"].position.max() + 1
    assert longest == POSITIONS - reserved_for_engines(GENERATE)
    compared(record_property, served, f"{GENERATE} tokens generated", trace, local)


def test_the_longest_prompt(
    served: Served, corpus: Path, tmp_path: Path, record_property: Property
) -> None:
    """All positions but those that the engine keeps free; one more is refused."""
    longest = POSITIONS - PROTOCOLS[served.engine].reserved(0)
    said = run(served, tmp_path / "no", "--max-length", longest + 1, code=1)
    assert f"--max-length {longest + 1} is beyond the {longest} positions" in said
    run(served, tmp_path / "t", "--data", corpus, "--max-length", longest)
    local = traced_locally(served, tmp_path / "local", corpus, max_length=longest)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.tokens().position.max() + 1 == longest
    compared(record_property, served, f"prompts of up to {longest} tokens", trace, local)


# batches and shards so small that a trace can be stopped between them
SMALL = ("--batch-tokens", 1000, "--commit-every", 0.2, "--concurrency", 2)


def test_interrupted_and_resumed(
    served: Served, corpus: Path, tmp_path: Path, record_property: Property
) -> None:
    options = ("--data", corpus, *SMALL)
    running = begun(served, tmp_path / "t", options)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 130, said
    cut = moe_inspect.open_trace(tmp_path / "t")
    assert cut.status == "interrupted"
    run(served, tmp_path / "t", *options, "--resume")
    local = traced_locally(served, tmp_path / "local", corpus, batch_tokens=1000)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert 0 < cut.n_tokens < trace.n_tokens
    compared(record_property, served, "interrupted and resumed", trace, local)


def begun(served: Served, out: Path, options: tuple[object, ...]) -> subprocess.Popen[str]:
    """A trace through the server, after its first shard."""
    running = subprocess.Popen(command(served, out, *options), stderr=subprocess.PIPE, text=True)
    shards = out / "shards-0.jsonl"
    while not (shards.exists() and shards.stat().st_size):
        assert running.poll() is None, "it ended before its first shard"
        time.sleep(0.01)
    return running

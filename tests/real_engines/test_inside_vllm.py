"""The plugin inside a real vLLM, on a CPU, against the same requests in transformers: each decision
of each token that the engine computed, by request and position."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT
from tests.real_engines.load import prompts
from tests.real_engines.models import DEEPSEEK, MODELS, save
from tests.real_engines.server import BIN, ENGINES, running
from tests.support.watched import waited

Property = Callable[[str, object], None]
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm installs vLLM")
# of two logits so close, sums in another order may exchange the experts
NEAR = 1e-5
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 1,
}


@dataclass(frozen=True)
class Asked:
    """A request, what it was answered, how many of its tokens a cache had, and the routed experts
    that the engine returned [tokens, blocks, K]. `left`: its client went away in its answer.
    `stopped`: by a token, behind which an engine that schedules ahead has computed one more."""

    request: str
    prompt: list[int]
    answer: list[int]
    cached: int | None
    routed: list[Any] | None = None
    left: bool = False
    stopped: bool = False

    @property
    def fed(self) -> list[int]:
        return self.prompt + (self.answer if self.stopped else self.answer[:-1])


def environment(runner: str, **variables: object) -> dict[str, str]:
    more = {f"MOE_INSPECT_{name.upper()}": str(value) for name, value in variables.items()}
    hidden = {"PYTHONPATH": str(ROOT / "tests/real_engines/without_triton")}
    return {
        **os.environ,
        **ENGINES["vllm"].environment,
        **(hidden if runner == "V1" else {}),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2")),
        "VLLM_MLA_DISABLE": "1",  # it has no kernel on a CPU
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def generated(
    place: Path,
    model: Path,
    runner: str,
    generate: int = 16,
    engine: Any = None,
    stop: bool = False,
    **variables: object,
) -> list[Asked]:
    """The answers of an engine in a process of its own; its traces are in `place`/runs."""
    asked = {"model": str(model), "answers": str(place / "answers"), "generate": generate}
    asked["stop"] = stop
    asked["engine"] = {"enforce_eager": True, **(engine or {})}
    done = subprocess.run(
        [sys.executable, "-m", "tests.real_engines.load", json.dumps(asked)],
        cwd=ROOT,
        env=environment(runner, trace=place / "runs", **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [Asked(**json.loads(line)) for line in (place / "answers").read_text().splitlines()]


def decisions(trace: moe_inspect.Trace) -> pd.DataFrame:
    """A row per decision: source, position, layer, phase, token_id, its experts in ascending order
    as `experts`, and `first`."""
    tokens = trace.tokens().merge(trace.documents()[["document", "source"]], on="document")
    routing = trace.routing()
    slots = [name for name in routing if name.startswith("expert_")]
    ids = routing[slots].to_numpy(np.int64)
    found = routing[["token", "layer"]].assign(
        experts=[*map(tuple, np.sort(ids, 1))], first=ids[:, 0]
    )
    return found.merge(tokens, on="token")


def request_of(source: str) -> str:
    """The request that a client knows, of vLLM's own name for it."""
    return re.sub(r"-[0-9a-f]{8}$", "", source)


def compared(traces: Sequence[Path], asked: Sequence[Asked], model: Path) -> tuple[int, int, int]:
    """Asserts that the traces are those of these requests; (tokens, equal decisions, decisions)."""
    import torch
    from transformers import AutoModelForCausalLM

    for path in traces:
        found = verify(path)
        assert found.ok, found
    got = pd.concat([decisions(moe_inspect.open_trace(path)) for path in traces])
    got["request"] = got.source.map(request_of)
    assert set(got.request) <= {one.request for one in asked}, set(got.request)
    left = got.request.map({one.request: len(one.fed) for one in asked if one.left})
    got = got[~(got.position >= left)]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    local_path = traces[0].parent.with_name("local")
    with torch.no_grad(), moe_inspect.record(network, local_path, logits=True, overwrite=True):
        for one in asked:
            network(input_ids=torch.tensor([one.fed]))
    trace = moe_inspect.open_trace(local_path)
    local = decisions(trace).assign(request=lambda t: [asked[d].request for d in t.document])
    local["logits"] = [*np.concatenate([logits_of(trace, r) for r in range(len(trace.routers))])]
    both = got.merge(
        local, on=["request", "position", "layer"], how="left", suffixes=("", "_local")
    )
    assert both.experts_local.notna().all(), "more was recorded than was fed"
    assert (both.token_id == both.token_id_local).all()
    same = both.experts == both.experts_local
    for row in both[~same].itertuples():
        apart = set(row.experts) ^ set(row.experts_local)
        values = np.array(row.logits, np.float64)[[*apart]]
        assert np.ptp(values) < NEAR, row
    # the comparison can fail: with another token's experts, it does
    assert (both.experts == both.experts_local.shift(1)).mean() < 0.9
    check_rows(got, asked)
    return len(got) // got.layer.nunique(), int(same.sum()), len(both)


def logits_of(trace: moe_inspect.Trace, r: int) -> np.ndarray:
    return np.concatenate([shard.logits(r) for shard in trace.shards])


def check_rows(got: pd.DataFrame, asked: Sequence[Asked]) -> None:
    """Every request has the rows that were fed and not cached, of the phases that they are."""
    once = got.drop_duplicates(["request", "position"])
    rows, first = once.groupby("request").size(), once.groupby("request").position.min()
    for one in asked:
        if one.cached is not None:
            made, fed = rows.get(one.request, 0), len(one.fed) - one.cached
            assert made in ({fed - 1, fed} if one.stopped else {fed}), one.request
            assert first[one.request] == one.cached
    prompt = once.request.map({one.request: len(one.prompt) for one in asked})
    assert ((once.phase == "decode") == (once.position >= prompt)).all()


def traces_in(place: Path, n: int = 1) -> list[Path]:
    """The traces, once there are so many: the first begins when its model is described."""
    runs = place / "runs"
    return waited(
        lambda: (
            len(found := sorted(runs.glob("*/trace.json"))) >= n and [file.parent for file in found]
        ),
        180,
    )


def closed_in(place: Path, n: int = 1) -> list[Path]:
    """When their engine has ended."""
    found = traces_in(place, n)
    for path in found:
        waited(lambda path=path: moe_inspect.open_trace(path).status != "recording", 180)
    return found


def recorded(
    record: Property, name: str, run: str, numbers: tuple[int, int, int], engine: str = "vllm"
) -> None:
    tokens, equal, total = numbers
    row = f"| {ENGINES[engine].name} {version(engine)} | {name} | {run} | {tokens:,} | "
    record("plugin" if engine == "vllm" else f"plugin-{engine}", f"{row}{equal:,} of {total:,} |")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("name", [*(n for n in MODELS if n != "Qwen3-MoE"), *DEEPSEEK])
def test_every_decision(
    name: str, runner: str, mode: str, tmp_path: Path, record_property: Property
) -> None:
    """In chunks of 128 tokens, behind a prefix cache."""
    model = save(name, tmp_path / "model")
    options: dict[str, Any] = {"enforce_eager": mode == "eager"}
    if name in DEEPSEEK:
        options["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    asked = generated(tmp_path, model, runner, engine=options)
    assert any(one.cached for one in asked), "nothing was cached"
    (path,) = closed_in(tmp_path)
    assert moe_inspect.open_trace(path).status == "complete"
    recorded(record_property, name, f"runner {runner}, {mode}", compared([path], asked, model))


@pytest.mark.parametrize("name", ["bundled Mixtral", "Qwen3-MoE, layers 0 and 2 dense", *DEEPSEEK])
def test_what_the_engine_returns(name: str, tmp_path: Path, record_property: Property) -> None:
    """By runner V2, for all tokens but those that vLLM returns nothing of."""
    model = save(name, tmp_path / "model")
    asked = generated(tmp_path, model, "V2", engine={"enable_return_routed_experts": True})
    (path,) = closed_in(tmp_path)
    got, equal = decisions(moe_inspect.open_trace(path)), 0
    got["request"] = got.source.map(request_of)
    check_rows(got, asked)
    returned = {one.request: one.routed for one in asked}
    for row in got.itertuples():
        routed = returned[row.request]
        assert routed is not None
        assert tuple(sorted(routed[row.position][row.layer])) == row.experts
        equal += 1
    numbers = equal // got.layer.nunique(), equal, len(got)
    recorded(record_property, name, "as vLLM itself returns them", numbers)


# model runner, tokens to generate, arguments of the engine, whether a token ends answers
PREEMPTS, SPECULATES = {"num_gpu_blocks_override": 14}, {"speculative_config": NGRAM}
RUNS: dict[str, tuple[str, int, dict[str, Any], bool]] = {
    "runner V1, preempted": ("V1", 150, PREEMPTS, False),
    "runner V2, preempted": ("V2", 150, PREEMPTS, False),
    "runner V1, answers that a token ends": ("V1", 16, {}, True),
    "runner V1, n-gram speculation": ("V1", 60, SPECULATES, False),
    "runner V2, n-gram speculation": ("V2", 60, SPECULATES, False),
}


@pytest.mark.parametrize("run", RUNS)
def test_every_decision_of_odd_runs(run: str, tmp_path: Path, record_property: Property) -> None:
    """What is computed again is a sequence of its own; rejected drafts are absent."""
    runner, generate, engine, stop = RUNS[run]
    model = save("bundled Mixtral", tmp_path / "model")
    asked = generated(tmp_path, model, runner, generate, engine, stop)
    ended = [len(one.answer) for one in asked if one.stopped]
    assert len(ended) == stop * len(asked) / 2
    assert max(ended, default=0) <= 5
    (path,) = closed_in(tmp_path)
    again = moe_inspect.open_trace(path).tokens().duplicated(["document", "position"])
    assert again.any() or engine is not PREEMPTS, "nothing was preempted"
    recorded(record_property, "bundled Mixtral", run, compared([path], asked, model))


EPLB = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "enable_eplb": True,
    "eplb_config": {
        "num_redundant_experts": 2,
        "window_size": 8,
        "step_interval": 16,
        "use_async": False,  # its thread needs a stream of a GPU
    },
}


def test_replicas_while_experts_are_rearranged(
    tmp_path: Path, record_property: Property, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two ranks. `compared` verifies that each physical expert is a replica of the one that was
    chosen, by the map of its step."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = save("bundled Mixtral", tmp_path / "model")
    asked = generated(tmp_path, model, "V2", engine=EPLB)
    (path,) = closed_in(tmp_path)
    trace, (L, E, P) = moe_inspect.open_trace(path), (4, 8, 10)
    maps = trace.replicas()
    assert len(maps) % P == 0
    first = maps[maps.batch == maps.batch.min()]
    assert first.expert.tolist() == [*range(E), 0, 1] * L  # as vLLM begins
    assert maps.batch.nunique() > 2, "experts were rearranged seldom"
    rows = trace.routing().merge(trace.tokens()[["token", "batch"]], on="token")
    of_first = rows[(rows.batch < maps.batch[maps.batch > maps.batch.min()].min())]
    assert set(of_first[of_first.expert_0 == 0].physical_0) == {0, 8}, "one replica is used"
    numbers = compared([path], asked, model)
    recorded(record_property, "bundled Mixtral", "runner V2, eager, EPLB on two ranks", numbers)


# --- a server


@contextmanager
def served(place: Path, *more_options: str, **variables: object) -> Iterator[tuple[str, Path]]:
    """The URL of a server with the plugin, and the directory of its model."""
    model = save("bundled Mixtral", place / "model")
    options = ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8"]
    options += ["--max-num-batched-tokens", "128", "--enable-prompt-tokens-details"]
    options += ["--gpu-memory-utilization", "0.2", *more_options]
    (place / "prometheus").mkdir()
    more = {"PROMETHEUS_MULTIPROC_DIR": str(place / "prometheus")}
    more |= {"VLLM_PLUGINS": "moe_inspect,cpu_collectives"}
    more = environment("V2", trace=place / "runs", **variables) | more
    with running([*ENGINES["vllm"].command, str(model), *options], place, more) as url:
        yield url, model


async def answers(url: str, named: dict[str, list[int]], n: int = 1) -> list[Asked]:
    """Requests by name, eight at once; each of its `n` answers is one."""
    at_once = asyncio.Semaphore(8)
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]

        async def ask(name: str, ids: list[int]) -> list[Asked]:
            body = {"model": model, "prompt": ids, "max_tokens": 16, "n": n}
            body |= {"temperature": int(n > 1), "ignore_eos": True, "return_token_ids": True}
            async with at_once:
                got = await http.post("/v1/completions", json=body, headers={"X-Request-Id": name})
            got.raise_for_status()
            found = got.json()
            cached = (found["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            return [
                Asked(
                    f"cmpl-{name}-0" if n == 1 else f"{i}_cmpl-{name}-0",
                    ids,
                    choice["token_ids"],
                    cached if n == 1 else None,
                )
                for i, choice in enumerate(found["choices"])
            ]

        found = await asyncio.gather(*(ask(*one) for one in named.items()))
    return [one for of_request in found for one in of_request]


def engine_states(url: str, *command: str) -> list[dict[str, Any]]:
    run = [sys.executable, "-m", "moe_inspect", "engine", url, *command, "--format", "json"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def engine_state(url: str, *command: str) -> dict[str, Any]:
    (state,) = engine_states(url, *command)
    return state


def counted(url: str, per: str = "") -> int:
    """The sum over layers, or `per` layer and "expert", that /metrics states."""
    name = f"moe_inspect_{per and f'{per}_'}assignments_total"
    found = re.findall(rf"^{name}{{.*}} (\S+)$", httpx.get(f"{url}/metrics").text, re.M)
    return int(sum(map(float, found)))


def test_a_server_is_switched_while_it_serves(tmp_path: Path, record_property: Property) -> None:
    """Off and on again; several answers to a request; one that its client leaves; /metrics; and
    SIGTERM."""
    named = {f"r{n}": ids for n, ids in enumerate(prompts())}
    with served(tmp_path, metrics=1, per_expert=1) as (url, model):
        asked = asyncio.run(answers(url, named))
        asked += asyncio.run(answers(url, {"several": named["r4"][::-1]}, n=2))
        before = engine_state(url, "off")
        assert (before["on"], before["error"], before["dropped"]) == (False, None, 0)
        asyncio.run(answers(url, {"unseen": named["r5"]}))
        assert engine_state(url, "on")["on"]
        asked += asyncio.run(answers(url, {"seen": named["r7"][::-1]}))
        left = named["r8"][::-1]
        leave(url, "left", left)
        asked.append(Asked("cmpl-left-0", left, [0], None, left=True))
        L, K = 4, 2

        def settled() -> bool:
            time.sleep(5)  # the process that writes needs the processor too
            return counted(url) == engine_state(url)["decisions"] * K

        waited(settled, 240)
        state = engine_state(url)
        assert counted(url) == counted(url, "expert") == state["decisions"] * K
        traces_in(tmp_path)
    (path,) = closed_in(tmp_path)
    trace = moe_inspect.open_trace(path)
    assert trace.n_tokens * L == state["decisions"]
    assert not any("unseen" in source for source in trace.documents().source)
    numbers = compared([path], asked, model)
    recorded(record_property, "bundled Mixtral", "a server, off and on", numbers)


def test_all_engines_behind_a_server(tmp_path: Path, record_property: Property) -> None:
    """Two of data parallelism, whose traces are merged."""
    named, K = {f"r{n}": ids for n, ids in enumerate(prompts())}, 2
    parallel = "--data-parallel-size", "2", "--api-server-count", "1"
    with served(tmp_path, *parallel, metrics=1) as (url, model):
        asked = asyncio.run(answers(url, named))
        states = engine_states(url, "off")
        assert [(state["rank"], state["on"]) for state in states] == [(0, False), (1, False)]
        asyncio.run(answers(url, {"unseen0": named["r4"], "unseen1": named["r5"]}))
        assert all(state["on"] for state in engine_states(url, "on"))
        asked += asyncio.run(answers(url, {"seen0": named["r7"], "seen1": named["r8"]}))

        def settled() -> bool:
            time.sleep(1)
            made = [state["decisions"] for state in engine_states(url)]
            return min(made) > 0 and counted(url) == sum(made) * K

        waited(settled, 240)
        traces_in(tmp_path, 2)
    traces = closed_in(tmp_path, 2)
    assert len(traces) == 2
    moe_inspect.merge(traces, tmp_path / "merged" / "all")
    numbers = compared([tmp_path / "merged" / "all"], asked, model)
    recorded(record_property, "bundled Mixtral", "two engines behind a server, merged", numbers)


def leave(url: str, name: str, ids: list[int]) -> None:
    """A request whose client goes away after the first token."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": ids, "max_tokens": 200, "stream": True, "ignore_eos": True}
    send = httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers={"X-Request-Id": name}, timeout=60
    )
    with send as response:
        next(response.iter_lines())


def test_what_is_killed_does_not_stop_the_server(tmp_path: Path) -> None:
    """The process that writes: the trace is valid, the engine serves on, and `on` begins another
    trace. Then a worker: that trace is valid too."""
    named = {f"r{n}": ids for n, ids in enumerate(prompts()[:6])}
    with served(tmp_path) as (url, _):
        asyncio.run(answers(url, named))
        (first,) = traces_in(tmp_path)
        waited(lambda: moe_inspect.open_trace(first).n_tokens)
        os.kill(moe_inspect.open_trace(first).manifest["capture"]["pid"], signal.SIGKILL)
        asyncio.run(answers(url, named))
        error = waited(lambda: engine_state(url)["error"])
        assert error.startswith("the process that writes has ended")
        asyncio.run(answers(url, named))
        assert engine_state(url, "on")["error"] is None
        asyncio.run(answers(url, {f"again-{name}": ids for name, ids in named.items()}))
        _, second = traces_in(tmp_path, 2)
        waited(lambda: moe_inspect.open_trace(second).n_tokens)
        (worker,) = [
            int(status.parent.name)
            for status in Path("/proc").glob("[0-9]*/cmdline")
            if status.read_bytes().startswith(b"VLLM::Worker") and is_ours(status.parent, tmp_path)
        ]
        os.kill(worker, signal.SIGKILL)
        waited(lambda: moe_inspect.open_trace(second).status != "recording")
    for path in (first, second):
        found = verify(path)
        assert found.ok
        assert found.status == "interrupted"
        assert found.tokens


def is_ours(process: Path, place: Path) -> bool:
    return f"MOE_INSPECT_TRACE={place}".encode() in (process / "environ").read_bytes()

"""The plugin inside a real SGLang, on a CPU, against the same requests in transformers: each
decision of each token that the engine computed, by request and position."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

import moe_inspect
from moe_inspect.capture.engine.control import tell
from tests.real_engines import test_inside_vllm as inside_vllm
from tests.real_engines.load import prompts
from tests.real_engines.models import MODELS, OTHERWISE, save
from tests.real_engines.server import ENGINES, LATENT, WITH_KERNELS, running
from tests.real_engines.test_inside_vllm import (
    Asked,
    Property,
    check_rows,
    closed_in,
    compared,
    decisions,
    traces_in,
)
from tests.support.watched import waited

pytestmark = pytest.mark.skipif(
    find_spec("sglang") is None, reason="make test-sglang installs SGLang"
)
COUNTED = re.compile(r"^moe_inspect_assignments_total{.*} (\S+)$", re.M)
OPTIONS = ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
OPTIONS += ["--max-total-tokens", "20000", "--chunked-prefill-size", "128", "--dtype", "float32"]
OPTIONS += ["--max-running-requests", "8", "--skip-server-warmup"]
ONE_BY_ONE = "--disable-overlap-schedule"
recorded = partial(inside_vllm.recorded, engine="sglang")


@contextmanager
def served(
    place: Path, name: str, *options: str, **variables: object
) -> Iterator[tuple[str, Path]]:
    """The URL of a server with the plugin, and the directory of its model."""
    model = save(name, place / "model", ENGINES["sglang"].tied)
    more = {f"MOE_INSPECT_{key.upper()}": str(value) for key, value in variables.items()}
    more |= {"MOE_INSPECT_TRACE": str(place / "runs"), **ENGINES["sglang"].environment}
    with running([*ENGINES["sglang"].command, str(model), *OPTIONS, *options], place, more) as url:
        yield url, model


async def answers(
    url: str, named: dict[str, list[int]], stop: Sequence[int] = (), n: int = 1
) -> list[Asked]:
    """Requests by name, eight at once; each ends with one of the tokens `stop`. Of n answers to a
    prompt each is a request whose name the engine makes up."""
    at_once = asyncio.Semaphore(8)
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:

        async def ask(name: str, prompt: list[int]) -> list[Asked]:
            sampling = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": not stop, "n": n}
            sampling |= {"stop_token_ids": [*stop]} if stop else {}
            body = {"input_ids": prompt, "rid": name, "sampling_params": sampling}
            async with at_once:
                made: Any = (await http.post("/generate", json=body)).json()
            return [
                Asked(
                    one["meta_info"]["id"],
                    prompt,
                    one["output_ids"],
                    one["meta_info"]["cached_tokens"],
                    stopped=bool(stop),
                )
                for one in (made if n > 1 else [made])
            ]

        of_requests = await asyncio.gather(*(ask(name, p) for name, p in named.items()))
        return [one for of_request in of_requests for one in of_request]


def counted(url: str) -> float:
    """Assignments by the engine's /metrics."""
    return sum(map(float, COUNTED.findall(httpx.get(f"{url}/metrics").text)))


def named(texts: Sequence[list[int]], prefix: str = "r") -> dict[str, list[int]]:
    return {f"{prefix}{n}": text for n, text in enumerate(texts)}


def test_replicas(tmp_path: Path, record_property: Property) -> None:
    """One rank, so a map that stays. `compared` verifies that each physical expert is a replica of
    the one that was chosen."""
    L, E = 3, 16
    maps = [[*range(E)[::-1], layer, 3] for layer in range(L)]
    where = "--init-expert-location", json.dumps({"physical_to_logical_map": maps})
    more = ONE_BY_ONE, "--ep-num-redundant-experts", "2", *where
    with served(tmp_path, "Qwen3-MoE", *more) as (url, model):
        asked = asyncio.run(answers(url, named(prompts())))
        traces_in(tmp_path)
    (path,) = closed_in(tmp_path)
    trace = moe_inspect.open_trace(path)
    assert trace.replicas().expert.tolist() == [expert for of in maps for expert in of]
    rows = trace.routing(layers=1)
    assert set(rows.physical_0[rows.expert_0 == 3]) == {E - 1 - 3, E + 1}
    recorded(record_property, "Qwen3-MoE", "replicas of experts", compared([path], asked, model))


NAMES = [n for n in MODELS if ("sglang", n) not in OTHERWISE]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((n, (ONE_BY_ONE,)) for n in NAMES),
        ("DeepSeek-V2", (ONE_BY_ONE, *LATENT)),
        ("bundled Mixtral", ()),
    ],
)
def test_every_decision(
    name: str, options: tuple[str, ...], tmp_path: Path, record_property: Property
) -> None:
    """In chunks of 128 tokens, behind a radix cache, switched off and on in between; answers that a
    token ends; and where a batch is scheduled while another is computed."""
    with served(tmp_path, name, "--enable-metrics", *options, metrics=1) as (url, model):
        asked = asyncio.run(answers(url, named(prompts())))
        (state,) = tell(url, "off")
        assert not state["on"]
        asyncio.run(answers(url, named(prompts()[:3], "off")))
        (state,) = tell(url, "on")
        assert state["on"]
        asked += asyncio.run(answers(url, named(prompts()[3:5], "on")))
        for n, one in enumerate(asked[:4]):  # they go on, up to a token that they come to
            text, end = [*one.prompt, one.answer[0]], one.answer[5]
            asked += asyncio.run(answers(url, {f"ends{n}": text}, [end]))
        assert all(len(one.answer) <= 5 for one in asked[-4:])
        made = tell(url, "status")[0]["decisions"]
        k = json.loads((model / "config.json").read_text())["num_experts_per_tok"]
        waited(lambda: counted(url) == made * k > 0)
        with pytest.raises(moe_inspect.MoeInspectError, match=r"sample is .2., not a share"):
            tell(url, "sample", "2")
        traces_in(tmp_path)
    assert any(one.cached for one in asked), "nothing was cached"
    (path,) = closed_in(tmp_path)
    assert moe_inspect.open_trace(path).n_decisions == made
    run = "off and on" if options else "off and on, overlap schedule"
    recorded(record_property, name, run, compared([path], asked, model))


def test_what_is_retracted_and_several_answers_to_a_prompt(
    tmp_path: Path, record_property: Property, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed again is a sequence of its own. Before it answers a prompt several times,
    SGLang computes it once, by a request that nobody asked for."""
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    with served(tmp_path, "bundled Mixtral", ONE_BY_ONE) as (url, model):
        asked = asyncio.run(answers(url, named(prompts())))
        (path,) = traces_in(tmp_path)
        several = prompts(30)[24:]
        for prompt in several:
            asked += asyncio.run(answers(url, {"several": prompt}, n=2))
    closed_in(tmp_path)
    trace, names = moe_inspect.open_trace(path), {one.request for one in asked}
    assert trace.tokens().duplicated(["document", "position"]).any(), "nothing was retracted"
    unasked = [name for name in trace.documents().source if name not in names]
    asked += [Asked(name, p, [], None) for name, p in zip(unasked, several, strict=True)]
    asked = [replace(one, cached=None) for one in asked]
    run = "retracted, two answers to a prompt"
    recorded(record_property, "bundled Mixtral", run, compared([path], asked, model))


def first_layers(model: Path, place: Path) -> Path:
    """The model without its last layer, which often says what the whole one does."""
    from transformers import AutoModelForCausalLM

    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"] - 1
    AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=layers).save_pretrained(place)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, place)
    return place


@pytest.mark.parametrize(
    ("name", "algorithm"), [*((name, "NGRAM") for name in NAMES), ("bundled Mixtral", "STANDALONE")]
)
def test_rejected_drafts_are_absent(
    name: str, algorithm: str, tmp_path: Path, record_property: Property
) -> None:
    """Drafts are a tree: what the engine has seen behind such tokens, or what a model says, whose
    own routers are not recorded. Each request twice."""
    options = ["--speculative-algorithm", algorithm, "--speculative-num-draft-tokens", "6"]
    run = "n-gram speculation"
    if algorithm == "STANDALONE":
        drafts = save(name, tmp_path / "same", ENGINES["sglang"].tied)
        drafts = first_layers(drafts, tmp_path / "drafts")
        options += ["--speculative-draft-model-path", str(drafts)]
        options += ["--speculative-num-steps", "3", "--speculative-eagle-topk", "2"]
        run = "speculation by a model"
    with served(tmp_path, name, ONE_BY_ONE, *options, *WITH_KERNELS) as (url, model):
        asked = asyncio.run(answers(url, named(prompts())))
        asked += asyncio.run(answers(url, named(prompts(), "again")))
        (state,) = tell(url, "status")
        traces_in(tmp_path)
    (path,) = closed_in(tmp_path)
    trace = moe_inspect.open_trace(path)
    assert trace.n_decisions < state["decisions"], "no draft was rejected"
    decoded = trace.tokens().query("phase == 'decode'")
    assert decoded.duplicated(["batch", "document"]).any(), "no draft was accepted"
    recorded(record_property, name, run, compared([path], asked, model))


def test_both_engines_behind_a_server(
    tmp_path: Path, record_property: Property, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of data parallelism, a core for each, whose traces are merged."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    with served(tmp_path, "bundled Mixtral", ONE_BY_ONE, "--dp-size", "2") as (url, model):
        asked = asyncio.run(answers(url, named(prompts())))
        assert [(s["rank"], s["on"]) for s in tell(url, "off")] == [(0, False), (1, False)]
        asyncio.run(answers(url, named(prompts()[:4], "off")))
        assert all(state["on"] for state in tell(url, "on"))
        traces_in(tmp_path, 2)
    moe_inspect.merge(closed_in(tmp_path, 2), tmp_path / "merged" / "all")
    numbers = compared([tmp_path / "merged" / "all"], asked, model)
    recorded(record_property, "bundled Mixtral", "two engines behind a server, merged", numbers)


def test_a_request_that_is_aborted_has_what_was_computed(tmp_path: Path) -> None:
    with served(tmp_path, "bundled Mixtral", ONE_BY_ONE) as (url, _):

        async def abort() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=600) as http:
                sampling = {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True}
                body = {"input_ids": prompts()[1], "rid": "long", "sampling_params": sampling}
                running = asyncio.create_task(http.post("/generate", json=body))
                await asyncio.sleep(1.0)
                await http.post("/abort_request", json={"rid": "long"})
                await running

        asyncio.run(abort())
        asked = asyncio.run(answers(url, named(prompts()[:2])))
        traces_in(tmp_path)
    (path,) = closed_in(tmp_path)
    got = decisions(moe_inspect.open_trace(path))
    got["request"] = got.source
    assert (got.request == "long").any()
    check_rows(got[got.request != "long"], asked)

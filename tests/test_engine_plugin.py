"""The plugin of serving engines, in stand-ins for engines (tests/support/engines): a trace holds
exactly what the schedule computed, decision by decision. `make test-vllm` and `make test-sglang`
run the plugin inside real engines; test_engine_writer has the process that writes."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moe_inspect import Trace, merge
from moe_inspect.capture.engine.rows import EngineRows
from moe_inspect.capture.engine.settings import Settings, variable
from moe_inspect.capture.hook import kernels
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT
from tests.support.damage import restate
from tests.support.engines import (
    Engine,
    Sglang,
    Vllm,
    VllmV2,
    check,
    fine,
    numbered,
    recorded,
    span,
    written,
)
from tests.support.sweep import WHOLE, sample

CPU = torch.device("cpu")
L, E, K, T = 4, 8, 2, 64  # of the bundled model; T: rows of the buffer


# --- settings


def test_variables_are_read_by_one_module() -> None:
    given = {"TRACE": "runs", "SAMPLE": "0.01", "METRICS": "1", "LOGITS": "on", "TEXT": "0"}
    given |= {"QUEUE_MB": "1.5", "MAX_GB": "2", "KEEP": "0", "START": "off", "REPLAY": "runs"}
    given |= {"PER_EXPERT": "1"}
    read = Settings.read({f"MOE_INSPECT_{name}": value for name, value in given.items()})
    runs = Path("runs").absolute()
    expected = Settings(runs, 0.01, True, True, True, False, 1.5, 2.0, 0, False, runs)
    assert read == expected
    assert {variable(f.name) for f in fields(Settings)} == {f"MOE_INSPECT_{name}" for name in given}
    assert Settings.read({}) == Settings() == Settings.read({"MOE_INSPECT_TRACE": " "})
    assert not Settings().is_active
    assert Settings(metrics=True).is_active
    for name, value, wanted in (
        ("SAMPLE", "2", "a share from 0 to 1"),
        ("SAMPLE", "nan", "a share from 0 to 1"),
        ("SAMPLE", "half", "a share from 0 to 1"),
        ("METRICS", "yes!", "1 or 0, on or off"),
        ("QUEUE_MB", "0", "megabytes, above 0"),
        ("MAX_GB", "-1", "gigabytes, above 0"),
        ("KEEP", "-1", "a whole number, 0 or more"),
        ("KEEP", "1000000000", "a whole number, 0 or more"),
    ):
        with pytest.raises(MoeInspectError) as error:
            Settings.read({f"MOE_INSPECT_{name}": value})
        assert str(error.value) == f"MOE_INSPECT_{name} is {value!r}, not {wanted}"


REGISTERS = """
import multiprocessing, numpy, sys
from moe_inspect.capture.engine import sglang, vllm
for register in (vllm.register, sglang.register):
    register()
    child = multiprocessing.get_context("fork").Process(target=register)
    child.start()
    child.join()
heavy = {"torch", "pyarrow", "pandas", "httpx", "vllm"}
print({m.split(".")[0] for m in sys.modules} & heavy)
"""


def test_an_engine_loads_nothing_unless_it_is_asked_to() -> None:
    """Nor does it need vLLM, which would be imported then. A variable that nothing reads is named
    with the nearest one, by one process; none that anything reads is."""
    source = "".join(path.read_text() for path in (ROOT / "moe_inspect").rglob("*.py"))
    read = {*map(str.upper, vars(Settings())), *re.findall(r"\bMOE_INSPECT_([A-Z_]+)", source)}
    unset = {k: v for k, v in os.environ.items() if not k.startswith("MOE_INSPECT")}

    def registers(**given: str) -> tuple[str, list[str]]:
        asked = unset | {f"MOE_INSPECT_{name}": value for name, value in given.items()}
        run = [sys.executable, "-c", REGISTERS]
        done = subprocess.run(run, env=asked, capture_output=True, text=True)
        assert done.returncode == 0, "the engine goes on"
        return done.stdout, done.stderr.splitlines()

    assert registers() == ("set()\n", [])
    known = dict.fromkeys(read - {"TRACE", "METRICS", "REPLAY"}, "1")
    said = [
        "moe-inspect: it reads no MOE_INSPECT_SAMPEL; the nearest is MOE_INSPECT_SAMPLE",
        "moe-inspect: it reads no MOE_INSPECT_TRACES; the nearest is MOE_INSPECT_TRACE",
    ]
    found = registers(**known, SAMPEL="runs", TRACES="runs")
    assert (found[0], sorted(found[1])) == ("set()\n", sorted(said * 2))
    _, lines = registers(TRACE="x")
    assert any("nothing is recorded: ModuleNotFoundError: No module" in line for line in lines)


# --- every decision

# of stand-ins, and variables of the environment
WAYS: dict[str, tuple[type[Engine], dict[str, Any]]] = {
    "vLLM, drafts": (Vllm, {"drafts": 3}),
    "vLLM, logits of half of the requests": (Vllm, {"SAMPLE": 0.5, "LOGITS": 1}),
    "vLLM, replicas and a shared expert": (Vllm, {"replicas": 3, "shared": True}),
    "vLLM, slots without an expert": (Vllm, {"unrouted": 0.1, "shape": (3, 12, 3)}),
    "vLLM, little memory": (Vllm, {"QUEUE_MB": 0.015}),
    "vLLM V2": (VllmV2, {"shape": (3, 256, 5), "unrouted": 0.1, "LOGITS": 1}),
    "vLLM V2, drafts and replicas": (
        VllmV2,
        {"drafts": 2, "replicas": 2, "TEXT": 0, "SAMPLE": 0.5},
    ),
    "SGLang": (Sglang, {"shared": True, "LOGITS": 1}),
    "SGLang, a tree of drafts": (Sglang, {"drafts": 4}),
    "SGLang, replicas": (Sglang, {"replicas": 2, "SAMPLE": 0.5}),
    "SGLang, replicas and a shared expert": (Sglang, {"replicas": 1, "shared": True, "drafts": 2}),
}
RUNS = [(way, code) for code in ("torch", "triton") for way in WAYS]


@pytest.mark.parametrize("seed", range(1, 7) if WHOLE else [1])
@pytest.mark.parametrize(("way", "code"), RUNS if WHOLE else [*RUNS[:11], *RUNS[12::3]])
def test_a_trace_holds_what_the_schedule_computed(
    way: str, code: str, seed: int, start: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    """While it is switched off and on, and the share of requests and the replicas change. And the
    counts are those of all requests' rows, while it counts. On Triton as on a GPU: the step after
    one writes into the same memory."""
    if code == "triton":
        request.getfixturevalue("on_triton")
    kind, how = WAYS[way]
    engine = start(kind, **{"METRICS": 1, "rank": seed, **how})
    link, recorder, tell = engine.recorder.link, engine.recorder, engine.command
    draw, dropped, step = np.random.default_rng(seed), set[int](), engine.step

    def rearrange() -> None:
        if engine.map_LP is not None:
            engine.map_LP = engine.spread(how["replicas"])

    def stepped(*given: Any, **named: Any) -> None:
        before, rows = recorder.queue.dropped, len(engine.rows)
        step(*given, **named)
        if recorder.queue.dropped > before:  # a step as a whole
            assert recorder.queue.dropped - before == (len(engine.rows) - rows) * engine.shape[0]
            dropped.add(engine.steps)
        assert tell("status")["queued_bytes"] <= float(how.get("QUEUE_MB", 256)) * 1e6
        if code == "triton" or draw.random() < 0.3:
            link.take()

    engine.step = stepped
    events: dict[int, Callable[[], object]] = {
        8: rearrange,
        12: lambda: tell("off"),
        15: lambda: tell("on"),
        19: lambda: tell("metrics", "off"),
        23: lambda: tell("metrics", "on"),
        26: rearrange,
    }
    if "SAMPLE" not in how:
        events |= {30: lambda: tell("sample", "0"), 35: lambda: tell("sample", "1")}
    engine.serve(20, seed=seed, events=events)
    link.take()
    state = tell("status")
    assert (state["error"], state["queued_bytes"], state["steps"]) == (None, 0, engine.steps)
    assert bool(dropped) == ("QUEUE_MB" in how and code == "torch")
    engine.rows = [row for row in engine.rows if row["batch"] not in dropped]
    trace, expected = written(engine), engine.expected()
    if "SAMPLE" in how:
        sources = {name for name in expected.source if zlib.crc32(name.encode()) < 2**31}
        assert 2 < len(sources) < expected.source.nunique() - 2
        expected = numbered(expected[expected.source.isin(sources)])
    found = recorded(Path(trace.path))
    assert ("logits" in found) == ("LOGITS" in how)
    check(found, expected, text="TEXT" not in how)
    _, counts = recorder.rows.load.so_far()
    assert (counts == engine.load_LE).all()
    check_facts(trace, engine, expected, how)


def check_facts(trace: Trace, engine: Engine, expected: pd.DataFrame, how: dict[str, Any]) -> None:
    """What a trace says of the run, of the model and of its requests, and how replicas change."""
    capture, counts = trace.manifest["capture"], trace.manifest["counts"]
    facts = ("mode", "engine", "rank", "dtype", "device", "weight_dtype")
    told = "engine", engine.package, engine.rank, "float32", "cpu", "float16"
    assert tuple(capture[name] for name in facts) == told
    assert capture["versions"][engine.package] == "0"
    assert counts["dropped"] == engine.recorder.queue.dropped
    assert counts["decisions"] == len(expected) * len(trace.routers) == trace.n_decisions
    assert {(r.experts, r.top_k) for r in trace.routers} == {engine.shape[1:]}
    known = "shape" not in how  # the model, by transformers
    assert trace.manifest["model"].get("class") == ("MixtralForCausalLM" if known else None)
    path = "model.layers.1.mlp.experts" if known else engine.path_of(1)
    assert trace.routers[1].path == path
    assert bool(len(trace.vocabulary_table)) == (known and "TEXT" not in how)
    assert (capture.get("text") is False) == ("TEXT" in how)
    prompts = trace.documents().sort_values("document").tokens.tolist()
    assert prompts == expected.groupby("document").prompt.first().tolist()
    if engine.maps:
        stated, before_LP = [], np.full_like(engine.maps[1], -1)
        for batch in expected.batch.unique():
            now_LP = engine.maps[batch]
            for r in np.flatnonzero((now_LP != before_LP).any(1)):
                stated += [[batch, r, physical, e] for physical, e in enumerate(now_LP[r])]
            before_LP = now_LP
        columns = ["batch", "router", "physical", "expert"]
        assert trace.replicas()[columns].to_numpy().tolist() == stated


def test_traces_of_ranks_are_merged(start: Callable[..., Any], tmp_path: Path) -> None:
    """With their replicas; not with a trace that has none. Of tensor parallelism all but the first
    rank record nothing: they see the same tokens."""
    expected, paths = [], []
    for rank in (0, 1):
        engine = start(VllmV2, rank=rank, replicas=2)
        engine.serve(6, seed=rank, name=f"rank{rank}-")
        trace = written(engine)
        expected.append(engine.expected())
        check_facts(trace, engine, expected[-1], {})
        paths.append(Path(trace.path))
    merge(paths, tmp_path / "all")
    merged = fine(tmp_path / "all")
    keys = ["source", "document", "position", "sequence"]
    found = recorded(tmp_path / "all").sort_values(keys, ignore_index=True)
    wanted = pd.concat(expected).sort_values(keys, ignore_index=True)
    check(found, wanted.assign(**found[["document", "sequence", "batch"]]))
    for j in range(K):  # the accessor's maps are those of each decision's step
        rows = merged.routing().merge(merged.tokens()[["token", "batch"]], on="token")
        rows = rows.sort_values("batch").assign(physical=lambda t, j=j: t[f"physical_{j}"])
        by = ["layer", "router", "physical"]
        of = pd.merge_asof(rows, merged.replicas(), on="batch", by=by)
        assert (of.expert == of[f"expert_{j}"]).all()
    plain = start(Vllm, rank=2)
    plain.serve(4)
    trace = written(plain)
    with pytest.raises(MoeInspectError, match="has no physical experts"):
        trace.replicas()
    with pytest.raises(MoeInspectError, match=r"has physical_j, .* does not"):
        merge([*paths, Path(trace.path)], tmp_path / "mixed")
    group = sys.modules["vllm.distributed.parallel_state"].get_tp_group()
    group.is_first_rank = False
    plain.start()
    plain.step(span("a", 0, 3))
    assert plain.command("status") is None


def test_a_trace_says_that_routes_were_replayed_and_that_names_are_the_engines(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    """In what `report` and `compare` find."""
    made = list[Trace]()
    for place, request in (("1", "a"), ("2", "a"), ("3", "b")):
        engine = start(Sglang, tmp_path / place, TEXT=0, REPLAY=tmp_path / "real")
        engine.step(span(request, 0, 10))
        made.append(written(engine))
    said = f"chose what those of {tmp_path / 'real'} chose, as the engine replayed it"
    assert any(said in str(finding) for finding in made[0].report().verdict())
    same, other = (
        [str(found) for found in made[0].compare(made[n]).verdict() if "no token ids" in str(found)]
        for n in (1, 2)
    )
    assert "other texts" not in same[0]
    assert 'the same source in both ("a" and "b")' in other[0]


def stating(path: Path, change: Callable[[list[dict[str, Any]]], object] | None) -> None:
    """Changes what the file of decisions states of replicas; None: it states nothing."""
    name = "routing/part-0-0.parquet"
    table = pq.read_table(path / name)
    stated = json.loads((table.schema.metadata or {})[b"replicas"])
    if change is not None:
        change(stated)
    metadata = None if change is None else {"replicas": json.dumps(stated)}
    pq.write_table(table.replace_schema_metadata(metadata), path / name)
    restate(path, name)


MISSTATED: dict[str, Callable[[list[dict[str, Any]]], object] | None] = {
    "its metadata have no replicas": None,
    "router of entry 0 is not one of 0 to 3": lambda of: of[0].update(router=4),
    "batch of entry 1 is not one of 0 to": lambda of: of[1].update(batch=-1),
    "experts of entry 2 are not a list of −1 to 7": lambda of: of[2]["experts"].append(8),
    "experts of entry 0 are not a list": lambda of: of[0].update(experts=[[0]]),
    "entry 8 is of forward pass 1, after a later one": lambda of: of[8].update(batch=1),
    "unexpected keyword argument 'more'": lambda of: of[0].update(more=1),
    "a replica of expert -1 in forward pass": lambda of: of[0].update(batch=2),
    "in forward pass 3, expert_": lambda of: of[5].update(batch=4),
}


def test_a_wrong_replica_is_found(start: Callable[..., Any], tmp_path: Path) -> None:
    engine = start(Vllm, replicas=2)
    for first in range(0, 50, 10):
        engine.step(span("a", first, first + 10))
        if first % 20:
            engine.map_LP = engine.spread(2)
    whole = Path(written(engine).path)
    for n, (said, change) in enumerate(MISSTATED.items()):
        path = tmp_path / f"{n}"
        shutil.copytree(whole, path)
        stating(path, change)
        assert said in str(verify(path).violation)
    name = "routing/part-0-0.parquet"
    table = pq.read_table(whole / name)
    at = table.schema.get_field_index("physical_1")
    column = table["physical_1"].to_pylist()
    column[33] = (column[33] + 1) % 10
    table = table.set_column(at, table.schema.field(at), pa.array(column, pa.uint16()))
    pq.write_table(table, whole / name)
    restate(whole, name)
    found = verify(whole)
    assert (found.ok, found.row) == (False, 33)
    assert f"physical_1 is {column[33]}, a replica of expert" in str(found.violation)


# --- the engine never waits, and no fault reaches it


def test_counts_are_exact_at_any_time(start: Callable[..., Any]) -> None:
    """Whichever thread counts."""
    engine = start(Vllm, METRICS=1, TRACE=None)
    found, ended = list[tuple[int, int]](), threading.Event()

    def ask() -> None:
        while not ended.wait(0.0005):
            tokens, counts = engine.recorder.rows.load.so_far()
            found.append((tokens, int(counts.sum())))

    asking, often = threading.Thread(target=ask), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    asking.start()
    for _ in range(300):
        engine.step(span("a", 0, 50))
    ended.set()
    asking.join()
    sys.setswitchinterval(often)
    assert all(counts == tokens * L * K for tokens, counts in found)
    tokens, counts = engine.recorder.rows.load.so_far()
    assert tokens == 300 * 50
    assert (counts == engine.load_LE).all()


def test_drafts_that_are_judged_when_the_writer_has_ended_are_dropped(
    start: Callable[..., Any],
) -> None:
    engine = start(Vllm, drafts=3)
    engine.sample = lambda: None
    engine.step(span("a", 0, 4, 3, 1))
    engine.recorder.link.error = "it was killed"
    engine.recorder.after_sampling(torch.tensor([1]))
    state = engine.command("status")
    assert (state["decisions"], state["dropped"], state["queued_bytes"]) == (0, 4 * L, 0)
    assert (state["on"], state["error"]) == (False, "it was killed")


def test_memory_is_bounded_by_what_is_live(start: Callable[..., Any]) -> None:
    """Whether what writes takes everything, or nothing."""
    for takes in (True, False):
        engine = start(Vllm, QUEUE_MB=0.02)
        engine.step(span("long", 0, 2))  # never ends
        for n in range(150):
            engine.step(span(f"r{n}", 0, 2), ended=[f"r{n - 1}"])
            if takes:
                engine.recorder.link.take()
        state, recorder = engine.command("status"), engine.recorder
        assert state["queued_bytes"] <= 20_000
        assert state["decisions"] + state["dropped"] == 151 * 2 * L
        assert (state["dropped"] == 0) == takes
        sample = recorder.sample
        assert max(map(len, (sample._recorded, sample._ended, sample._skipped))) < 20


def test_of_a_step_only_what_is_recorded_stays_in_memory(start: Callable[..., Any]) -> None:
    """On a CPU, where it is not copied at once."""
    engine = start(Vllm, SAMPLE=0.5, METRICS=1, LOGITS=1)
    sampled = {name: zlib.crc32(name.encode()) < 2**31 for name in map(str, range(40))}
    taken, left = (next(n for n in sampled if sampled[n] == of) for of in (True, False))
    engine.step(span(taken, 0, 1), span(left, 0, 60))
    engine.chosen, engine.rows = [], []
    gc.collect()
    assert not any(of() is not None for of in engine.logits_seen)
    (step,) = engine.recorder.queue.take()
    assert all(values.shape[1] == 1 for (values,) in step.taken.values.values())


def unseen(engine: Engine) -> None:
    """The router of layer 2 is not asked."""
    route = engine.route
    engine.route = lambda n, logits: engine.choose(n, logits) if n == 2 else route(n, logits)


def cut(engine: Engine) -> None:
    """The router of layer 1 returns neither padding nor the last row."""
    choose = engine.choose
    engine.choose = lambda n, logits: tuple(t[: -4 * (n == 1) or None] for t in choose(n, logits))


def lacks(engine: Engine, name: str) -> None:
    engine.describe_batch = lambda *_: None
    del vars(engine.runner)[name]


FAULTS: dict[str, tuple[type[Engine], Callable[[Any], object], str]] = {
    "a router that nobody knows": (
        Vllm,
        lambda it: it.recorder.keep(L, *torch.zeros(2, 1, K), torch.zeros(1, E)),
        "IndexError",
    ),
    "a router that returns too few rows": (
        Vllm,
        lambda it: cut(it),
        "a router did not choose 2 experts for each of 1 tokens",
    ),
    "a layer that does not choose": (Vllm, unseen, "router 2 chose no experts"),
    "another version": (Vllm, lambda it: lacks(it, "positions"), "positions"),
    "another version of V2": (VllmV2, lambda it: lacks(it, "execute_model_state"), "execute_model"),
    "a layer of SGLang that does not choose": (Sglang, unseen, "router 2 chose no experts"),
    "SGLang's request": (Sglang, lambda it: it.asked.update(a=(3, "many")), "TypeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_stops_the_recording_and_not_the_engine(
    fault: str, start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And what waited for its drafts to be judged is handed over. `on` begins again."""
    kind, breaks, said = FAULTS[fault]
    engine = start(kind, drafts=3)
    link, before, runner = engine.recorder.link, {*vars(engine)}, dict(vars(engine.runner))
    engine.step(span("a", 0, 10))
    engine.sample = lambda: None
    engine.step(span("a", 10, 14, 3, 1))
    breaks(engine)
    engine.step(span("a", 12, 13))
    state = engine.command("status")
    assert (state["on"], "refused" in state) == (False, False)
    assert said in state["error"]
    assert "recording has stopped" in caplog.text
    for name in {*vars(engine)} - before:
        delattr(engine, name)
    vars(engine.runner).update(runner)
    engine.asked.clear()
    engine.step(span("a", 13, 14))  # the engine goes on
    assert engine.command("on")["error"] is None
    engine.step(span("a", 14, 15))
    link.take()
    rows = [step.schedule.rows for steps, *_ in link.handed for step in steps]
    assert rows == [10, 4, 1]
    state = engine.command("status")
    assert (state["decisions"], state["queued_bytes"]) == (15 * L, 0)
    link.error = "it was killed"
    engine.recorder.start = None  # nothing can be started either
    assert "TypeError" in engine.command("on")["refused"]


# --- what is refused

OTHER = SimpleNamespace(num_logical_experts=3, experts_per_token=2)
SERVER = "runner.server_args"
REFUSED: list[tuple[type[Engine], str, object, str]] = [
    (Vllm, "network", torch.nn.Module(), "has no MoE layer"),
    (Vllm, "Runner.is_monolithic", True, "NoneType chooses the experts inside its kernel"),
    (Vllm, "layers[1].router", SimpleNamespace(), "SimpleNamespace chooses the experts inside"),
    (Vllm, "Router.zero_expert_type", "identity", "chose a zero expert"),
    (Vllm, "config.parallel_config.pipeline_parallel_size", 2, "pipeline parallelism: a router"),
    (Vllm, "config.parallel_config.use_ubatching", True, "dual batch overlap: a router"),
    (Vllm, "moe.is_sequence_parallel", True, "sequence parallelism: a router"),
    (Vllm, "moe.pcp_size", 2, "prefill context parallelism: a router"),
    (Vllm, "layers[3].do_naive_dispatch_combine", True, "before the router: a router"),
    (Vllm, "layers[1].layer_id", 2, "several routers"),
    (Vllm, "layers[1].moe_config", OTHER, "routers of several sizes"),
    (Vllm, "layers[1].router.top_k", 3, "do not choose the 2 experts that the config states"),
    (Vllm, "config.model_config", SimpleNamespace(), "AttributeError"),  # as of another version
    (Sglang, "runner.model", torch.nn.Module(), "has no MoE layer with SGLang's TopK"),
    (Sglang, f"{SERVER}.speculative_algorithm", "DFLASH", "speculation by DFLASH: a router"),
    (Sglang, f"{SERVER}.pp_size", 2, "pipeline parallelism: a router"),
    (Sglang, f"{SERVER}.enable_dp_attention", True, "attention by data parallelism: a"),
    (Sglang, f"{SERVER}.enable_two_batch_overlap", True, "two-batch overlap: a router"),
    (Sglang, "layers[1].layer_id", 2, "several routers"),
    (Sglang, "layers[1].topk_config.top_k", 3, "routers of several sizes"),
    (Sglang, "runner.model_config.hf_text_config", None, "state a number of experts"),
]


@pytest.mark.parametrize(("kind", "where", "value", "said"), REFUSED, ids=str)
def test_what_cannot_be_recorded_is_refused_and_the_engine_is_its_own(
    kind: type[Engine], where: str, value: object, said: str, start: Callable[..., Any]
) -> None:
    engine = start(kind, instead=(where, value))
    state = engine.command("status")
    assert state["refused"].startswith("nothing is recorded: ")
    assert said in state["refused"]
    engine.step(span("a", 0, 3))
    if kind is Vllm and hasattr(engine.layers[0].router, "_compute_routing"):
        assert engine.layers[0].router._compute_routing.__module__ == Vllm.__module__


def test_of_a_draft_model_nothing_is_recorded(start: Callable[..., Any]) -> None:
    engine = start(Sglang)
    engine.runner.is_draft_worker = True
    engine.step(span("a", 0, 3))
    assert engine.command("status")["decisions"] == 0


def test_a_step_beyond_the_buffer_stops_the_recording(
    start: Callable[..., Any], on_triton: None
) -> None:
    engine = start(Sglang, T=200)
    engine.T = 10**4
    engine.places = torch.full((2, 10**4), -1)
    engine.step(span("a", 0, 9000))
    assert (
        "a forward pass of 9,000 tokens: there is room for 8,192"
        in engine.command("status")["error"]
    )


# --- on a GPU, whose kernels are interpreted here


def test_a_graph_that_is_replayed_without_python(
    on_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured for two numbers of tokens; replayed, as a CUDA graph would, by the same launches:
    with others, padded, and for dummy batches."""
    rows, draw = EngineRows((L, T, K), E, CPU), np.random.default_rng(0)
    graphs = dict[int, tuple[Any, list[Callable[[], None]]]]()
    kernel, launches = kernels._record_kernel, list[Callable[[], None]]()

    class Noted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *given, **named: launches.append(lambda: kernel[grid](*given, **named))

    monkeypatch.setattr(kernels, "_record_kernel", Noted())
    monkeypatch.setattr(kernels, "RECORD_BLOCK", 32)
    for size in (40, 8):
        fed = torch.zeros(L, size, K, dtype=torch.int32), torch.zeros(L, size, K)
        launches.clear()
        for layer in range(L):
            rows.keep(layer, fed[0][layer], fed[1][layer], fed[1][layer])
        graphs[size] = fed, launches[:]
        assert len(launches) == L, "one launch per router"

    def replayed(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        (ids, weights), again = graphs[size]
        ids.copy_(torch.from_numpy(draw.integers(0, E, (L, size, K))))
        weights.copy_(torch.from_numpy(draw.random((L, size, K))))
        for launch in again:
            launch()
        return ids, weights.half()

    load_LE = np.zeros((L, E), np.int64)
    for n, picked in ((33, [3, 32]), (5, [4]), (8, None), (40, None), (1, [0])):
        replayed(40)  # a dummy batch
        ids, weights = replayed(40 if n > 8 else 8)
        tokens = torch.arange(40)
        at = np.arange(n) if picked is None else np.array(picked)
        values = rows.written(n)
        rows.load.add(values["ids"][0])
        places = tokens.int(), tokens + 7, None
        taken = rows.take(values, None if picked is None else at, *places)
        assert taken.has_arrived(wait=True)
        wanted = {"tokens": tokens[None, at], "positions": tokens[None, at] + 7}
        wanted |= {"ids": ids[:, at], "weights": weights[:, at]}
        for name, want in wanted.items():
            (found,) = taken.values[name]
            assert torch.equal(found, want.to(found.dtype)), name
        for layer in range(L):
            load_LE[layer] += np.bincount(ids[layer, :n].reshape(-1), minlength=E)
        assert (rows.load.so_far()[1] == load_LE).all()


def test_its_kernels_count_where_nothing_is_recorded(
    on_triton: None, start: Callable[..., Any]
) -> None:
    engine = start(Vllm, METRICS=1, TRACE=None, LOGITS=1)
    engine.serve(8)
    rows = engine.recorder.rows
    assert (rows.load.so_far()[1] == engine.load_LE).all()
    assert rows.nbytes == 1024 * L * K * 3, "no logits"


@pytest.mark.parametrize("logits", sample([False, True], 2))
def test_torch_compile_keeps_the_choices_in_its_graph(logits: bool) -> None:
    """fullgraph: a graph break would raise. dynamic: other sizes need no other graph."""
    rows = EngineRows((L, T, K), E, CPU, ["logits"] * logits, compiled=True)
    graphs = list[Any]()

    def noted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @torch.compile(backend=noted, fullgraph=True, dynamic=True)
    def routers(logits_LNE: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(logits_LNE.shape[1])
        for layer in range(L):
            weights, ids = logits_LNE[layer].softmax(1).topk(K)
            rows.keep(layer, ids, weights, logits_LNE[layer])
            total = total + weights.sum(1)
        return total

    for n in (7, 40, 9):
        logits_LNE = torch.randn(L, n, E, generator=torch.Generator().manual_seed(n))
        routers(logits_LNE)
        weights, ids = logits_LNE.softmax(2).topk(K)
        (found,), (found_weights,), *others = rows.written(n).values()
        assert torch.equal(found, ids.byte())
        assert torch.allclose(found_weights.float(), weights, atol=1e-3)
        for (found_logits,) in others:
            assert torch.equal(found_logits, logits_LNE.half())
        assert len(others) == logits
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "record_in_engine" in str(node.target)]
    assert len(calls) == L * (1 + logits)


def test_a_fault_of_ours_in_a_compiled_graph_stops_the_recording(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And not the forward pass, nor another engine of the process. The step is not recorded."""
    compiles = "config.compilation_config.mode", 3
    engine, other = start(VllmV2, instead=compiles), start(VllmV2, instead=compiles)
    recorder = engine.recorder

    def routes(logits_NE: torch.Tensor, columns: int) -> torch.Tensor:
        weights, ids = logits_NE.softmax(1).topk(columns)
        recorder.rows.keep(0, ids, weights, logits_NE)
        return weights.sum(1)

    router = torch.compile(routes, backend="aot_eager", fullgraph=True)
    router(torch.randn(5, E), K)
    engine.step(span("a", 0, 10))
    assert recorder.error is None
    for position in (10, 11, 12):
        assert router(torch.randn(5, E), 0).shape == (5,)  # too few columns
        other.step(span("b", position, position + 1))
        engine.step(span("a", position, position + 1))
    assert sum("stopped" in record.message for record in caplog.records) == 1
    state = recorder.command("status")
    assert (state["on"], state["error"][:12]) == (False, "RuntimeError")
    assert recorder.command("on")["error"] is None
    engine.step(span("a", 13, 14))
    for of, positions in ((engine, [*range(10), 13]), (other, [10, 11, 12])):
        of.recorder.link.take()
        found = np.concatenate([a["positions"][0] for _, a, _ in of.recorder.link.handed])
        assert found.tolist() == positions


def test_the_rows_of_a_step_are_copied_from_a_device_without_an_index() -> None:
    """SGLang states the device "cuda", and its tensors state "cuda:0"; so it is with "cpu:0"."""
    rows = EngineRows((L, T, K), E, torch.device("cpu:0"), compiled=True)
    ids, weights, places = torch.ones(3, K).int(), torch.rand(3, K), torch.arange(3)

    def keep(ids: torch.Tensor) -> None:
        for layer in range(L):
            rows.keep(layer, ids, weights, weights)

    keep(ids)
    taken = rows.take(rows.written(3), None, places, places, None)
    keep(ids + 1)
    assert (taken.values["ids"][0] == 1).all(), "not those of the next step"


def test_its_memory_is_that_of_the_most_tokens_of_a_step(on_triton: None) -> None:
    """3 × k bytes per token and layer, with logits 2 × experts more; from 256 experts on 4 × k."""
    for experts, extras, per_decision in (
        (E, [], 3 * K),
        (E, ["logits"], 3 * K + 2 * E),
        (256, [], 4 * K),
    ):
        rows = EngineRows((L, 4096, K), experts, CPU, extras)
        assert rows.nbytes == 4096 * L * per_decision

"""Rows recorded by CUDA graphs and by torch.compile, against those of an eager tap."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moe_inspect
from benchmarks.gpu.bench import Bench, median_us
from benchmarks.gpu.rivals import a_model
from benchmarks.gpu.sizes import SMALL, TOY
from moe_inspect.capture.hook import experts


@dataclass(frozen=True)
class Fed:
    """A model and the batches it is fed with, by way of the tensor that a graph reads."""

    bench: Bench
    model: Any
    batches: list[Tensor]
    input: Tensor

    @property
    def name(self) -> str:
        return "×".join(map(str, self.input.shape))

    @property
    def options(self) -> dict[str, Any]:
        return {"capture": "dispatch", "ring_tokens": self.bench.sizes.ring_tokens}

    def call(self, network: Any = None) -> None:
        run = self.model if network is None else network
        run(input_ids=self.input, use_cache=False)


@dataclass(frozen=True)
class Routing:
    """What a trace holds: token ids [T], experts and weights [routers·T, K]."""

    tokens: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


def routing_of(path: Path) -> Routing:
    trace = moe_inspect.open_trace(path)
    rows = trace.routing().sort_values(["router", "token"])
    chosen, weights = (rows.filter(like=f"{name}_").to_numpy() for name in ("expert", "weight"))
    return Routing(trace.tokens()["token_id"].to_numpy(), chosen, weights)


def in_common(a: np.ndarray, b: np.ndarray) -> float:
    """Share of assignments that two traces of the same tokens agree on."""
    return float((a[:, :, None] == b[:, None, :]).any(2).mean())


def graphs(bench: Bench) -> None:
    """A CUDA graph replayed by hand and torch.compile's own, with changing inputs: each row against
    an eager tap's."""
    # attention: stock masks otherwise while a graph is captured, and then rounds otherwise
    width = TOY if bench.device.dry else {**SMALL, "num_experts": 64}
    model = a_model(bench, "Qwen3-MoE", width, attn_implementation="eager")
    for shape in bench.sizes.batches:
        generator = torch.Generator().manual_seed(1)
        batches = [
            torch.randint(0, model.config.vocab_size, shape, generator=generator)
            for _ in range(5 if bench.device.dry else 24)
        ]
        check(Fed(bench, model, batches, torch.empty_like(batches[0], device=bench.device.type)))


def check(fed: Fed) -> None:
    bench = fed.bench
    fed.model.set_experts_implementation(experts.NAME)
    with tempfile.TemporaryDirectory() as scratch:
        tapped(fed, Path(scratch) / "tap")
        wanted = routing_of(Path(scratch) / "tap")
        by_router = wanted.experts.reshape(-1, len(wanted.tokens), wanted.experts.shape[1])
        others = np.roll(by_router, fed.batches[0].numel(), 1).reshape(wanted.experts.shape)
        bench.expect(
            in_common(wanted.experts, others) < 0.75,
            "batches that route alike: a row in the wrong place would not show",
        )
        for way, record in (("CUDA graph", replayed), ("torch.compile", compiled)):
            if bench.over(f"{way} {fed.name}"):
                continue
            record(fed, Path(scratch) / way)
            found = routing_of(Path(scratch) / way)
            check_rows(bench, f"{way} {fed.name}", found, wanted, exact=record is replayed)


def check_rows(bench: Bench, way: str, found: Routing, wanted: Routing, exact: bool) -> None:
    """`exact`: a captured kernel is the same kernel. Compiled code rounds otherwise, and near ties
    then fall otherwise."""
    rows = len(found.experts)
    complete = (
        np.array_equal(found.tokens, wanted.tokens) and found.experts.shape == wanted.experts.shape
    )
    bench.expect(
        complete,
        f"{way}: {rows:,} rows recorded, not the {len(wanted.experts):,} that an eager tap records",
    )
    same = in_common(found.experts, wanted.experts) if complete else 0.0
    bench.figures[f"{way} in common with an eager tap"] = same
    print(
        f"{way}: {rows:,} rows, {same:.4f} of the assignments an eager tap records of the same "
        "inputs"
    )
    equal = np.array_equal(found.experts, wanted.experts) and np.array_equal(
        found.weights, wanted.weights
    )
    bench.expect(
        same >= 0.9 and (equal or not exact),
        f"{way}: rows differ from an eager tap's ({same:.4f} in common)",
    )


def tapped(fed: Fed, path: Path) -> None:
    with moe_inspect.record(fed.model, path, capture="tap"):
        for batch in fed.batches:
            fed.input.copy_(batch)
            fed.call()


def replayed(fed: Fed, path: Path) -> None:
    with moe_inspect.record(fed.model, path, **fed.options) as recorder:
        for batch in fed.batches[:3]:
            fed.input.copy_(batch)
            fed.call()
        replay = fed.bench.device.graph(fed.call, recorder)
        for batch in fed.batches[3:]:
            recorder.step(batch.numel(), input_ids=batch)
            fed.input.copy_(batch)
            if batch is fed.batches[-1]:
                check_copies(fed.bench, f"CUDA graph {fed.name}", recorder, replay)
            else:
                replay()


def compiled(fed: Fed, path: Path) -> None:
    bench, network = fed.bench, fed.bench.device.compiled(fed.model)
    torch._dynamo.utils.counters.clear()
    with moe_inspect.record(network, path, **fed.options) as recorder:
        for batch in fed.batches:
            fed.input.copy_(batch)
            torch.compiler.cudagraph_mark_step_begin()
            run = functools.partial(fed.call, network)
            if batch is fed.batches[-1]:
                check_copies(bench, f"torch.compile {fed.name}", recorder, run)
            else:
                run()
    kinds = ("inductor", "graph_break", "stats")
    counters = {k: dict(v) for k, v in torch._dynamo.utils.counters.items() if k in kinds}
    bench.figures[f"dynamo {fed.name}"] = json.loads(json.dumps(counters, default=str))
    skips = counters.get("inductor", {}).get("cudagraph_skips", 0)
    bench.target(f"CUDA graphs that reduce-overhead skipped, {fed.name}", skips, most=0)
    breaks = sum(counters.get("graph_break", {}).values())
    bench.target(f"graph breaks under torch.compile, {fed.name}", breaks, most=0)


def check_copies(bench: Bench, way: str, recorder: Any, run: Callable[[], Any]) -> None:
    """No launch of a step may take half as long as a copy of the ring's ids, its smaller part,
    would."""
    ids = recorder.attachment.sinks[0][""].tapes[0].ids
    a = torch.empty(ids.nbytes, dtype=torch.uint8, device=bench.device.type)
    b = torch.empty_like(a)
    copy_us = median_us(bench, lambda: b.copy_(a))
    launches = bench.device.launches(run)
    name, longest_us = max(launches, key=lambda launch: launch[1])
    bench.figures[f"{way} launches"] = launches
    bench.target(
        f"{way}: longest launch ÷ a copy of the ring's ids ({len(a) / 2**20:.0f} MiB)",
        longest_us / copy_us,
        most=0.5,
    )
    print(
        f"{way}: {len(launches)} launches per step, the longest {longest_us:.0f} µs "
        f"({name[:60]}); a copy of the ring's ids {copy_us:.0f} µs"
    )

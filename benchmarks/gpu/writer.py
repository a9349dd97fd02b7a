"""A writer that cannot keep up."""

from __future__ import annotations

import tempfile
import time

import torch

import moe_inspect
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rivals import a_model
from benchmarks.gpu.sizes import SMALL, TOY
from moe_inspect.trace.writer import TraceWriter


def writer(bench: Bench) -> None:
    """A slowed writer: without `drop` nothing is lost; with it, device, manifest and report agree
    on what is."""
    B, S, sleep_s = bench.sizes.throttled
    model = a_model(
        bench,
        "OLMoE",
        TOY if bench.device.dry else {**SMALL, "num_experts": 16},
        attn_implementation="eager",
    )
    batches = [torch.randint(0, model.config.vocab_size, (B, S)) for _ in range(16)]
    stock = TraceWriter._take
    TraceWriter._take = lambda self, batch: (time.sleep(sleep_s), stock(self, batch))[1]
    try:
        for drop in (False, True):
            with tempfile.TemporaryDirectory() as scratch:
                began = time.perf_counter()
                with moe_inspect.record(
                    model, f"{scratch}/t", capture="dispatch", drop=drop, ring_tokens=B * S
                ):
                    for batch in batches:
                        model(input_ids=batch.to(bench.device.type), use_cache=False)
                took = time.perf_counter() - began
                trace = moe_inspect.open_trace(f"{scratch}/t")
                facts = dict(moe_inspect.report(trace).tables["summary"].to_numpy().tolist())
                L, fed = len(trace.routers), B * S * len(batches)
                row = {
                    "s": took,
                    "fed": fed * L,
                    "written": len(trace.routing()),
                }
                row |= {
                    "dropped_manifest": trace.manifest["counts"]["dropped"],
                    "dropped_report": int(facts["dropped"]),
                }
            bench.figures["drop" if drop else "block"] = row
            print(
                f"drop={drop}: "
                + ", ".join(
                    f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v:,}"
                    for k, v in row.items()
                )
            )
            dropped = row["fed"] - row["written"]
            agree = dropped == row["dropped_manifest"] == row["dropped_report"]
            bench.expect(agree, f"drop={drop}: manifest, report and trace disagree: {row}")
            bench.expect((dropped > 0) == drop, f"drop={drop}: {dropped:,} decisions dropped")
    finally:
        TraceWriter._take = stock

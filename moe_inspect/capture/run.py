"""Traces a model on a corpus, for `moe-inspect trace` and `moe_inspect.trace_model`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from moe_inspect.capture.corpus.plan import Plan, TokenSequence, longest_sequence
from moe_inspect.capture.corpus.sources import find_sources
from moe_inspect.capture.feed import (
    Batch,
    Decoding,
    decode,
    encode_decode,
    end_ids,
    feed_own,
    prefill,
)
from moe_inspect.capture.load import Unloaded, unloaded
from moe_inspect.capture.open_trace import Session
from moe_inspect.capture.options import RecordOptions, TraceOptions
from moe_inspect.capture.ranks import Ranks
from moe_inspect.capture.recorder import Recorder
from moe_inspect.capture.resume import (
    complete_now,
    corpus_record,
    may_resume,
    resume_from,
    sampling_record,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import commit_of, quantization_of
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.files.lock import Lock, hold, join
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.writer import Document, ResumePoint

Progress = Callable[[int, int | None], None]  # (tokens done, tokens in all or None)
Planned = Iterable[tuple[list[TokenSequence], list[Document]]]


@dataclass(frozen=True)
class TraceRun:
    """One process's part in a trace. `record`: the settings that a resumed run must share."""

    model: Unloaded
    output_dir: Path | Remote
    options: TraceOptions
    ranks: Ranks
    plan: Plan
    record: dict[str, Any]

    @property
    def passes_per_batch(self) -> int:
        """How many numbers of forward passes a batch reserves; it may use fewer."""
        return self.options.generate + (2 if self.plan.encoded else 1)


def trace_model(
    model: str, output_dir: Path | Remote, options: TraceOptions, progress: Progress | None = None
) -> Trace:
    """See `moe_inspect.trace_model`."""
    ranks = Ranks()
    resume = ranks.agree("resume", lambda: may_resume(output_dir, options))
    run = _prepared(model, output_dir, options, ranks)
    # the lock comes before reading what decides how to resume
    with _shared_lock(output_dir, ranks) if resume else nullcontext() as lock:
        start = resume_from(output_dir, run.record, ranks.rank) if resume else None
        complete = start is not None and read_manifest(output_dir)["status"] == "complete"
        ranks.gather("read", "")  # all ranks have read the manifest before rank 0 rewrites it
        if not complete:
            _record(run, start, lock, progress)
    return Trace(output_dir)


def _prepared(
    model: str, output_dir: Path | Remote, options: TraceOptions, ranks: Ranks
) -> TraceRun:
    sources = find_sources(options.data, leave_out=output_dir)
    found = unloaded(model, options)
    plan = Plan(
        sources,
        options,
        longest_sequence(options.max_length, found.config, options.generate),
        encoded=found.is_encoder_decoder,
    )
    record = {
        **plan.record(),
        **sampling_record(options),
        **found.record(),
        "layers": sorted(options.layers) if options.layers is not None else None,
        "weights": options.weights,
        "logits": options.logits,
        "counts_only": options.counts_only,
        "ranks": ranks.world,
    }
    # (a plan of before these options says nothing of them)
    later = ("output_norms", "output_peaks", "token_loss")
    record |= {name: True for name in later if getattr(options, name)}
    return TraceRun(found, output_dir, options, ranks, plan, record)


def _record(
    run: TraceRun, start: ResumePoint | None, lock: Lock | None, progress: Progress | None
) -> None:
    """Loads the model and feeds it this rank's batches that are not yet committed."""
    ranks, plan = run.ranks, run.plan
    planned = plan.batches(run.model.tokenizer)
    first = next(planned, None)
    if first is None:
        corpus = ", ".join(run.options.data) or "the bundled corpus"
        raise MoeInspectError(f"the corpus is empty: no text in {corpus}")
    # (loading changes the config)
    stored = run.model.stored_quantization
    network = _load(run)
    with torch.inference_mode():
        recorder = _recorder(run, network, stored, start, lock)
        with _ended_early(ranks, recorder), recorder:
            _feed_batches(run, network, recorder, chain([first], planned), start, progress)
            if recorder.writer is not None:
                recorder.writer.at_close["corpus"] = plan.stats.record()
    # this rank wrote nothing: no batch was left for it, or only the status was not committed
    if recorder.writer is None and ranks.rank == 0:
        ranks.publish("open")
    if recorder.writer is None and ranks.status("complete") == "complete" and ranks.rank == 0:
        complete_now(run.output_dir, plan)
    ranks.agree("over", lambda: True)  # rank 0 has written the manifest


def _load(run: TraceRun) -> Any:
    device = run.options.device
    if device == "auto" and run.ranks.world > 1 and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return run.model.load(device)


def _recorder(
    run: TraceRun,
    network: Any,
    stored: dict[str, Any],
    start: ResumePoint | None,
    lock: Lock | None,
) -> Recorder:
    options = run.options
    manifest = {
        "model": {
            "id": run.model.name,
            "revision": commit_of(run.model.name, options.revision)
            if run.model.own is None
            else None,
            "class": type(network).__name__,
            "trust_remote_code": options.trust_remote_code,
            "device_map": options.device_map,
            **_of_weights(run, network, stored),
        },
        "corpus": corpus_record(run.record, run.plan, run.model.tokenizer),
    }
    names = vars(options).keys() & {field.name for field in fields(RecordOptions)}
    return Recorder(
        network,
        run.output_dir,
        RecordOptions(**{name: vars(options)[name] for name in names}),
        tokenizer=run.model.tokenizer,
        session=Session(run.ranks, start, lock, manifest),
    )


def _of_weights(run: TraceRun, network: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """What the config of the model that runs does not say of its weights. `stored`: how they were
    quantised in the checkpoint."""
    facts: dict[str, Any] = {}
    if stored and run.options.random_init is None and not quantization_of(network.config):
        facts["dequantized_from"] = stored  # because asked for, or no kernels run it here
    if run.model.adapter is not None:
        facts["adapter"] = run.model.adapter.record()
    return facts


def _feed_batches(
    run: TraceRun,
    network: Any,
    recorder: Recorder,
    planned: Planned,
    start: ResumePoint | None,
    progress: Progress | None,
) -> None:
    options, plan = run.options, run.plan
    done = start.tokens if start is not None else 0
    ends = end_ids(network, run.model.tokenizer)
    own = (
        run.model.own
        if run.model.own is not None and not run.model.own.is_of_transformers
        else None
    )
    if own is not None or any(s.adapter is not None and s.adapter.alone for s in recorder.sites):
        planned = singly(planned)
    for n, (sequences, documents) in enumerate(planned):
        batch = Batch(n * run.passes_per_batch, sequences, documents)
        if not run.ranks.takes(n) or (start is not None and batch.number < start.next_batch):
            continue
        tokens = options.generate if sequences[0].continued else 0
        decoding = Decoding(tokens, options.temperature, options.seed + n, ends)
        if own is not None:
            done += feed_own(own, recorder, batch, decoding)
        elif plan.encoded:
            done += encode_decode(network, recorder, batch, run.model.tokenizer, decoding)
        elif sequences[0].continued:
            done += decode(network, recorder, batch, decoding)
        else:
            done += prefill(network, recorder, batch, run.model.tokenizer)
        if progress is not None:
            progress(done, plan.estimated_tokens())


def singly(planned: Planned) -> Iterator[tuple[list[TokenSequence], list[Document]]]:
    """One row per forward pass, for models where the rows of a batch affect each other's
    routing."""
    for sequences, documents in planned:
        new = {d.document: d for d in documents}
        for row in sequences:
            yield [row], [new.pop(row.document)] if row.document in new else []


@contextmanager
def _shared_lock(output_dir: Path | Remote, ranks: Ranks) -> Iterator[Lock]:
    """The lock of the trace to resume, shared by all ranks."""
    locks: list[Lock] = []

    def take() -> bool:
        locks.append(hold(output_dir, shared=ranks.world > 1))
        return True

    ranks.agree("lock", take)
    if ranks.rank:
        locks.append(join(output_dir, ranks.wait_for("lock-holder")))
    else:
        ranks.publish("lock-holder", locks[0].holder)
    with locks[0] as lock:
        yield lock


@contextmanager
def _ended_early(ranks: Ranks, recorder: Recorder) -> Iterator[None]:
    """Publishes the end of a rank that fails before it wrote anything: rank 0 waits for all."""
    try:
        yield
    except BaseException:
        if recorder.writer is None:
            ranks.publish(f"closed-{ranks.rank}", "interrupted")
        raise

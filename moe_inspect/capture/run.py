"""Traces a model on a corpus, for `moe-inspect trace` and `moe_inspect.trace_model`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_inspect.capture.corpus.documents import find_sources
from moe_inspect.capture.corpus.plan import CorpusPlan, TokenSequence, longest_sequence
from moe_inspect.capture.feed import Batch, decode, encode_decode, end_ids, feed_own, prefill
from moe_inspect.capture.load import Unloaded, unloaded
from moe_inspect.capture.open_trace import Planned, complete_now, may_resume, resume_from
from moe_inspect.capture.options import RecordOptions, TraceOptions
from moe_inspect.capture.ranks import Ranks
from moe_inspect.capture.recorder import Recorder
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import commit_of, quantization_of
from moe_inspect.trace.files.lock import Lock, hold, join
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.writer import Document, ResumePoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int | None], None]  # (tokens done, tokens in all or None)
Batches = Iterable[tuple[list[TokenSequence], list[Document]]]
# (a plan of before these options says nothing of them)
LATER = ("output_norms", "by_document")


def trace_model(
    model: str, output_dir: Path, options: TraceOptions, progress: Progress | None = None
) -> Trace:
    """See `moe_inspect.trace_model`."""
    ranks = Ranks()
    if options.by_document and (options.resume or options.generate or ranks.world > 1):
        why = (
            "--resume" if options.resume else "--generate" if options.generate else "several ranks"
        )
        raise MoeInspectError(
            f"counts by document are of documents that one process feeds whole, without {why}: "
            "record the corpus in parts, and merge them"
        )
    resume = ranks.agree("resume", lambda: may_resume(output_dir, options))
    sources = find_sources(options.data, leave_out=output_dir)
    found = unloaded(model, options)
    if options.by_document and found.is_encoder_decoder:
        raise MoeInspectError("counts by document are not known of a model with an encoder")
    length = longest_sequence(options.max_length, found.config, options.generate)
    plan = CorpusPlan(sources, options, length, encoded=found.is_encoder_decoder)
    record = {
        **plan.record(),
        **found.record(),
        "layers": sorted(options.layers) if options.layers is not None else None,
        "weights": options.weights,
        "logits": options.logits,
        "counts_only": options.counts_only,
        "ranks": ranks.world,
        **{name: True for name in LATER if getattr(options, name)},
    }
    run = TraceRun(found, output_dir, options, ranks, plan, record)
    # the lock comes before reading what decides how to resume
    with _shared_lock(output_dir, ranks) if resume else nullcontext() as lock:
        start = resume_from(output_dir, record, ranks.rank) if resume else None
        complete = start is not None and read_manifest(output_dir)["status"] == "complete"
        ranks.gather("read", "")  # all ranks have read the manifest before rank 0 rewrites it
        if not complete:
            run.run(start, lock, progress)
    return Trace(output_dir)


@dataclass(frozen=True)
class TraceRun:
    """One process's part in a trace. `record`: the settings that a resumed run must share."""

    model: Unloaded
    output_dir: Path
    options: TraceOptions
    ranks: Ranks
    plan: CorpusPlan
    record: dict[str, object]

    def run(self, start: ResumePoint | None, lock: Lock | None, progress: Progress | None) -> None:
        """Loads the model and feeds it this rank's batches that are not yet committed."""
        ranks, plan, options = self.ranks, self.plan, self.options
        batches = plan.batches(self.model.tokenizer)
        first = next(batches, None)
        if first is None:
            raise MoeInspectError(f"the corpus is empty: no text in {plan.named}")
        stored = self.model.stored_quantization  # (loading changes the config)
        device = options.device
        if device == "auto" and ranks.world > 1 and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        network = self.model.load(device)
        names = vars(options).keys() & {field.name for field in fields(RecordOptions)}
        with torch.inference_mode():
            recorder = Recorder(
                network,
                self.output_dir,
                RecordOptions(**{name: vars(options)[name] for name in names}),
                tokenizer=self.model.tokenizer,
                planned=Planned(ranks, start, lock, self._manifest(network, stored)),
            )
            try:
                with recorder:
                    self._feed(network, recorder, chain([first], batches), start, progress)
                    if recorder.writer is not None:
                        recorder.writer.at_close["corpus"] = plan.stats.record()
            except BaseException:
                if recorder.writer is None:  # rank 0 waits for all
                    ranks.publish(f"closed-{ranks.rank}", "interrupted")
                raise
        if recorder.writer is None:
            # this rank wrote nothing: no batch was left for it, or only the status was not
            # committed
            if ranks.rank == 0:
                ranks.publish("open")
            if ranks.status("complete") == "complete" and ranks.rank == 0:
                complete_now(self.output_dir, plan)
        ranks.agree("over", lambda: True)  # rank 0 has written the manifest

    def _manifest(self, network: PreTrainedModel, stored: dict[str, object]) -> dict[str, object]:
        """`stored`: how the weights were quantised in the checkpoint."""
        found, options = self.model, self.options
        model = {
            "id": found.name,
            "revision": commit_of(found.name, options.revision) if found.own is None else None,
            "class": type(network).__name__,
            "trust_remote_code": options.trust_remote_code,
            "device_map": options.device_map,
        }
        if stored and options.random_init is None and not quantization_of(network.config):
            model["dequantized_from"] = stored  # because asked for, or no kernels run it here
        return {"model": model, "corpus": self.plan.manifest(self.record, found.tokenizer)}

    def _feed(
        self,
        network: PreTrainedModel,
        recorder: Recorder,
        batches: Batches,
        start: ResumePoint | None,
        progress: Progress | None,
    ) -> None:
        options, plan, tokenizer = self.options, self.plan, self.model.tokenizer
        done = start.tokens if start is not None else 0
        ends = end_ids(network, tokenizer)
        own = self.model.own
        own = None if own is not None and own.is_of_transformers else own
        if own or any(s.adapter is not None and s.adapter.alone for s in recorder.sites):
            batches = singly(batches)
        # how many numbers of forward passes a batch reserves; it may use fewer
        passes = options.generate + (2 if plan.encoded else 1)
        for n, (sequences, documents) in enumerate(batches):
            if not self.ranks.takes(n) or (start is not None and n * passes < start.next_batch):
                continue
            tokens = options.generate if sequences[0].continued else 0
            sampling = options.temperature, options.seed + n, ends
            batch = Batch(n * passes, sequences, documents, tokens, *sampling)
            if own is not None:
                done += feed_own(own, recorder, batch)
            elif plan.encoded:
                done += encode_decode(network, recorder, batch, tokenizer)
            elif tokens:
                done += decode(network, recorder, batch)
            else:
                done += prefill(network, recorder, batch, tokenizer)
            if progress is not None:
                progress(done, plan.estimated_tokens())


def singly(planned: Batches) -> Iterator[tuple[list[TokenSequence], list[Document]]]:
    """One row per forward pass, for models where the rows of a batch affect each other's
    routing."""
    for sequences, documents in planned:
        new = {d.document: d for d in documents}
        for row in sequences:
            yield [row], [new.pop(row.document)] if row.document in new else []


def _shared_lock(output_dir: Path, ranks: Ranks) -> Lock:
    """The lock of the trace to resume, shared by all ranks."""
    locks: list[Lock] = []

    def take() -> bool:
        locks.append(hold(output_dir, shared=ranks.world > 1))
        return True

    ranks.agree("lock", take)
    if ranks.rank:
        return join(output_dir, ranks.wait_for("lock-holder"))
    ranks.publish("lock-holder", locks[0].holder)
    return locks[0]

"""Creates the trace that a recorder writes: locks the directory and builds the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from moe_inspect.capture.hook import discovery
from moe_inspect.capture.hook.selfcheck import Found
from moe_inspect.capture.manifest import ALTERED, capture_facts, drop_facts, selfcheck_facts
from moe_inspect.capture.options import RecordOptions
from moe_inspect.capture.ranks import Ranks
from moe_inspect.model.load import config_record
from moe_inspect.model.own import as_tokenizer
from moe_inspect.model.peft_adapter import adapter_in
from moe_inspect.model.routers import Site, selection_bias, text_config
from moe_inspect.model.vocabulary import vocabulary_table
from moe_inspect.text import print_stderr
from moe_inspect.trace import slot_order
from moe_inspect.trace.files.location import Remote, output_location
from moe_inspect.trace.files.lock import Lock, join
from moe_inspect.trace.output_dir import claim_directory
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import SHARD_TOKENS, ResumePoint, TraceWriter


@dataclass(frozen=True)
class Session:
    """Settings of a caller that plans the batches. `manifest`: sections to add; `lock`: of the
    trace to resume, held by the caller."""

    ranks: Ranks | None = None
    resume: ResumePoint | None = None
    lock: Lock | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    shard_tokens: int = SHARD_TOKENS


class TraceOpener:
    """`path`: None writes no trace. `tokenizer`: its vocabulary is stored in the trace."""

    def __init__(
        self,
        path: str | Path | Remote | None,
        model: Any,
        sites: Sequence[Site],
        mode: str,
        tokenizer: Any,
    ):
        self.path = output_location(path) if path is not None else None
        self.model, self.sites, self.mode = model, sites, mode
        self.tokenizer = as_tokenizer(tokenizer) if tokenizer is not None else None
        self.selfcheck: Found = {}  # of the kernels used so far
        self._own_lock: Lock | None = None

    def open(
        self,
        routers: Sequence[Router],
        weight_dtype: torch.dtype,
        options: RecordOptions,
        session: Session,
    ) -> TraceWriter | None:
        """The writer; None without a path. Each rank has its own; rank 0 clears the directory
        first."""
        if self.path is None:
            return None
        ranks = session.ranks
        # rank 0 publishes its lock's holder once the directory is cleared
        holder = ranks.wait_for("open") if ranks is not None and ranks.rank else None
        lock = session.lock or self._take(self.path, options, ranks, holder)
        writer = TraceWriter(
            self.path,
            self._manifest(weight_dtype if options.weights else None, session, options),
            [slot_order.stated(router, known=True) for router in routers],
            weights=options.weights,
            **dict.fromkeys(options.extras, True),
            dropped_experts=not options.counts_only
            and any(site.ids_below > site.experts for site in self.sites),
            token_loss=options.token_loss,
            counts_only=options.counts_only,
            vocabulary=self._vocabulary() if options.text else None,
            rank=ranks.rank if ranks is not None else 0,
            resume=session.resume,
            shard_tokens=session.shard_tokens,
            commit_every=options.commit_every,
            lock=lock,
        )
        if ranks is not None:
            ranks.publish("open", lock.holder)
            writer.others = ranks.status
        return writer

    def tell_unused(self) -> None:
        """No forward pass was seen: says so, as there is no trace to look at."""
        if self.path is not None:
            print_stderr(
                f"no forward pass of {type(self.model).__name__} was recorded, and {self.path} was "
                "not written: call the model itself, as model(…), not a method of it"
            )

    def release(self) -> None:
        """Releases the lock, if it was taken here."""
        if self._own_lock is not None:
            self._own_lock.release()

    def _take(
        self, path: Path | Remote, options: RecordOptions, ranks: Ranks | None, holder: str | None
    ) -> Lock:
        if holder is not None:
            self._own_lock = join(path, holder)
        else:
            shared = ranks is not None and ranks.world > 1
            self._own_lock = claim_directory(path, options.overwrite, shared=shared)
        return self._own_lock

    def _manifest(
        self, weight_dtype: torch.dtype | None, session: Session, options: RecordOptions
    ) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        own = {
            "id": getattr(config, "_name_or_path", ""),
            "revision": None,
            "class": type(self.model).__name__,
        }
        manifest = {"model": own, **session.manifest}
        manifest["model"]["config"] = config_record(config)
        if "adapter" not in manifest["model"] and (adapter := adapter_in(self.model)) is not None:
            manifest["model"]["adapter"] = adapter
        notes = {site.adapter.note for site in self.sites if site.adapter is not None} - {""}
        if options.discover:
            notes.add(discovery.NOTE)
        if self.model in ALTERED:
            notes.add(ALTERED[self.model])
        if any(site.told and selection_bias(site, self.model) is not None for site in self.sites):
            notes.add(
                "a selection bias is added to the scores that experts are chosen by, and not to "
                "their weights"
            )
        if notes:
            manifest["model"]["note"] = "; ".join(sorted(notes))
        manifest["capture"] = {
            **capture_facts(self.model, self.mode),
            **selfcheck_facts(self.selfcheck),
            **drop_facts(self.sites),
            "weight_dtype": str(weight_dtype).removeprefix("torch.") if weight_dtype else None,
            **({} if options.text else {"text": False}),
        }
        return manifest

    def _vocabulary(self) -> pa.Table | None:
        if self.tokenizer is None:
            return None
        text = text_config(self.model)
        return vocabulary_table(self.tokenizer, getattr(text, "vocab_size", 0) or 0)

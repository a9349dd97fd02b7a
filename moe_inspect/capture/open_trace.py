"""Creates the trace that a recorder writes, or resumes it: locks the directory and builds the
manifest, of whose facts about process and model others have need too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from moe_inspect.capture.corpus.plan import CorpusPlan
from moe_inspect.capture.corpus.tokenize import Tokenizer
from moe_inspect.capture.options import RecordOptions, TraceOptions
from moe_inspect.capture.ranks import Ranks
from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.model.load import config_record
from moe_inspect.model.routers import Site, selection_bias, text_config
from moe_inspect.model.vocabulary import vocabulary_table
from moe_inspect.text import print_stderr
from moe_inspect.trace import schema
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.files.lock import Lock, join, refuse_while_locked
from moe_inspect.trace.manifest import (
    read_manifest,
    refuse_while_written,
    this_process,
    write_manifest,
)
from moe_inspect.trace.output_dir import check_directory, claim_directory
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import (
    ResumePoint,
    ShardLimits,
    TraceWriter,
    committed_counts,
    resume_point,
)
from moe_inspect.trace.writer.batches import SHARD_TOKENS


@dataclass(frozen=True)
class Planned:
    """What a caller that plans the batches knows of the trace. `ranks`: that share it; `manifest`:
    sections to add; `lock`: of the trace to resume, held by the caller."""

    ranks: Ranks
    resume: ResumePoint | None = None
    lock: Lock | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    shard_tokens: int = SHARD_TOKENS


@dataclass
class TraceOpener:
    """`path`: None writes no trace. `tokenizer`: its vocabulary is stored in the trace."""

    path: Path | None
    model: torch.nn.Module
    sites: Sequence[Site]
    mode: str
    tokenizer: Tokenizer | None
    options: RecordOptions
    planned: Planned
    _own_lock: Lock | None = None

    def open(self, routers: Sequence[Router], weight_dtype: torch.dtype) -> TraceWriter | None:
        """The writer; None without a path. Each rank has its own; rank 0 clears the directory
        first, and then publishes its lock's holder."""
        if self.path is None:
            return None
        options, planned = self.options, self.planned
        ranks, lock = planned.ranks, planned.lock
        holder = ranks.wait_for("open") if ranks.rank else None
        if lock is None and holder is not None:
            lock = self._own_lock = join(self.path, holder)
        elif lock is None:
            shared = ranks.world > 1
            lock = self._own_lock = claim_directory(self.path, options.overwrite, shared)
        vocabulary = None
        if options.text and self.tokenizer is not None:
            size = getattr(text_config(self.model), "vocab_size", 0) or 0
            vocabulary = vocabulary_table(self.tokenizer, size)
        drops = any(site.ids_below > site.experts for site in self.sites)
        writer = TraceWriter(
            self.path,
            self._manifest(weight_dtype if options.weights else None),
            [router.with_slot_order(known=True) for router in routers],
            weights=options.weights,
            **dict.fromkeys(options.extras, True),
            dropped_experts=drops and not options.counts_only,
            counts_only=options.counts_only,
            by_document=options.by_document,
            vocabulary=vocabulary,
            resume=planned.resume or ResumePoint(ranks.rank),
            limits=ShardLimits(planned.shard_tokens, commit_every=options.commit_every),
            lock=lock,
        )
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

    def _manifest(self, weight_dtype: torch.dtype | None) -> dict[str, object]:
        config = getattr(self.model, "config", None)
        model = self.planned.manifest.get("model") or model_facts(self.model)
        model["config"] = config_record(config)
        if (adapter := _adapter_in(self.model)) is not None:
            model["adapter"] = adapter
        notes = {site.adapter.note for site in self.sites if site.adapter is not None}
        notes.add(ALTERED.get(self.model, ""))
        if any(site.told and selection_bias(site, self.model) is not None for site in self.sites):
            notes.add(
                "a selection bias is added to the scores that experts are chosen by, and not to "
                "their weights"
            )
        if any(notes):
            model["note"] = "; ".join(sorted(notes - {""}))
        capture = {
            **capture_facts(self.model, self.mode),
            **drop_facts(self.sites),
            "weight_dtype": str(weight_dtype).removeprefix("torch.") if weight_dtype else None,
            **({} if self.options.text else {"text": False}),
        }
        return {"model": model, **self.planned.manifest, "capture": capture}


# model → what an intervention changes in it, while it lasts
ALTERED: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def model_facts(model: torch.nn.Module) -> dict[str, object]:
    """The manifest's section `model`, of one in memory."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return {"id": name, "revision": None, "class": type(model).__name__}


def capture_facts(model: torch.nn.Module, mode: str) -> dict[str, object]:
    """The manifest's section `capture`: mode, device, dtype, versions and command."""
    parameters = [*model.parameters()]  # a model need not have any, nor buffers
    tensors = parameters or [*model.buffers()] or [torch.empty(0, device="cpu")]
    return {
        "mode": mode,
        "device": ", ".join(dict.fromkeys(device_name(t.device) for t in tensors)),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
        **process_facts(),
    }


def drop_facts(sites: Sequence[Site]) -> dict[str, object]:
    """Whether an empty slot is an assignment that a capacity has dropped, at every router."""
    return {"drops": True} if sites and all(site.drops for site in sites) else {}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def process_facts() -> Json:
    """Versions, command line, process id and host."""
    import transformers

    from moe_inspect.capture.hook.kernels import triton

    facts = this_process()
    facts["versions"] |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__ if triton is not None else None,
    }
    return facts


# --- resuming a trace: the plan in its manifest, and where it continues


def may_resume(output_dir: Path, options: TraceOptions) -> bool:
    """Whether to resume the trace in `output_dir`. If not, the directory must be free, or
    `overwrite` set. A trace without committed batches resumes at its beginning."""
    if options.resume and (output_dir / schema.MANIFEST).exists():
        refuse_while_locked(output_dir)
        return True
    check_directory(output_dir, options.overwrite)
    return False


def resume_from(output_dir: Path, record: dict[str, object], rank: int) -> ResumePoint:
    """Where the trace continues. MoeInspectError for another plan, while a writer is still running,
    and where what was committed is damaged or missing."""
    manifest = read_manifest(output_dir)
    refuse_while_written(output_dir, manifest)
    then = manifest.get("corpus", {}).get("plan")
    if then is None:
        raise MoeInspectError(
            f'{output_dir} was not written by "moe-inspect trace": it cannot be resumed'
        )
    for key in dict.fromkeys([*record, *then]):  # what is not stated is as it is by default
        before, now = then.get(key), record.get(key)
        if before != now:
            raise MoeInspectError(
                f"{output_dir} was made with {_difference(key, before, now)}: resume with the "
                "same, or --overwrite"
            )
    with writing(output_dir):
        return resume_point(output_dir, rank)


def complete_now(output_dir: Path, plan: CorpusPlan) -> None:
    """Sets the status to complete, where all else was committed."""
    manifest = read_manifest(output_dir)
    manifest["corpus"] |= plan.stats.record()
    counts = {**committed_counts(output_dir, manifest), "dropped": 0}
    with writing(output_dir):
        write_manifest(output_dir, {**manifest, "status": "complete", "counts": counts})


def _difference(key: str, then: Any, now: Any) -> str:
    if key != "sources":
        return f"{key.replace('_', ' ')} {then!r}, not {now!r}"
    changed = [b for a, b in zip(then or [], now, strict=False) if a != b] or (then or now)[-1:]
    return f"other data (see {changed[0]['path']})"


def _adapter_in(model: object) -> dict[str, object] | None:
    """For the manifest: the first adapter that PEFT has put into the model."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    config = next(iter(configs.values()))
    plain = json.dumps(
        config.to_dict(), default=lambda v: list(map(str, v)) if isinstance(v, set) else str(v)
    )
    return {
        "kind": str(getattr(config.peft_type, "value", config.peft_type)),
        "base": config.base_model_name_or_path or None,
        "base_revision": config.revision,
        "config": json.loads(plain),
    }

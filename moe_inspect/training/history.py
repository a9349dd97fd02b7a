"""The history of a training run: a counts trace whose batches are optimizer steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.nn import Module

from moe_inspect.capture.open_trace import capture_facts
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import config_record
from moe_inspect.text import print_stderr
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.manifest import read_manifest, refuse_while_written
from moe_inspect.trace.output_dir import claim_directory
from moe_inspect.trace.schema import MANIFEST, Router
from moe_inspect.trace.writer import (
    CountedBatches,
    ResumePoint,
    TraceWriter,
    drop_after,
    resume_point,
)

COMMIT_TIMEOUT_S = 60.0


class History:
    """Writes the trace at `path`, a shard per flush; one process of a run does. `resume_step`: the
    run goes on after this step: what an existing trace holds of later steps is dropped, as the run
    takes them again. `settings`: of the monitor, for the manifest."""

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int = 0,
        overwrite: bool = False,
        settings: Mapping[str, object],
    ):
        self.path, self.settings = path, dict(settings)
        self.writer: TraceWriter | None = None
        self._resume: ResumePoint | None = None
        self.last_step = 0
        if resume_step and (path / MANIFEST).exists():
            self._lock = hold(path)
            try:
                self._go_on(resume_step)
            except BaseException:
                self._lock.release()
                raise
        else:
            self._lock = claim_directory(path, overwrite)

    def _go_on(self, step: int) -> None:
        manifest = read_manifest(self.path)
        refuse_while_written(self.path, manifest)
        if "training" not in manifest:
            raise MoeInspectError(
                f"{self.path} is not the history of a training run: choose another directory"
            )
        self._known = manifest["routers"]
        self.last_step = drop_after(self.path, step) or 0
        self._resume = resume_point(self.path)
        if self.last_step < step:
            print_stderr(
                f"warning: {self.path} holds counts up to step {self.last_step}, but training "
                f"continues after step {step}: the steps in between are missing from the history"
            )
            self.last_step = step

    def write(
        self,
        model: Module,
        routers: Sequence[Router],
        load: Sequence[np.ndarray],
        tokens_R: np.ndarray,
        step: int,
        facts: Mapping[str, object],
    ) -> None:
        """Commits the load of the steps since the last call, up to `step`, and waits until it is on
        the disk. `facts`: for the manifest. MoeInspectError where that fails."""
        if step <= self.last_step:
            return
        if self.writer is None:
            self.writer = self._open(model, routers, facts)
        # an encoder-decoder's stacks see different tokens
        of_stack = {router.stack: int(n) for router, n in zip(routers, tokens_R, strict=True)}
        shards = self.writer.next_shard
        load_1E, tokens = [load_E[None] for load_E in load], sum(of_stack.values())
        decisions, first = int(tokens_R.sum()), self.last_step + 1
        counts = CountedBatches(step, tokens, [""], load_1E, None, None, [], decisions, first)
        self.writer.write(counts)
        self.last_step = step
        until = time.monotonic() + COMMIT_TIMEOUT_S
        while self.writer.next_shard == shards and not self.writer.failed:
            if time.monotonic() > until:
                raise MoeInspectError(f"{self.path} could not be written in {COMMIT_TIMEOUT_S} s")
            time.sleep(0.0005)

    def _open(
        self, model: Module, routers: Sequence[Router], facts: Mapping[str, object]
    ) -> TraceWriter:
        if self._resume is not None and len(self._known) != len(routers):
            raise MoeInspectError(
                f"{self.path} is the history of a model with {len(self._known)} routers, this one "
                f"has {len(routers)}: choose another directory"
            )
        config = getattr(model, "config", None)
        manifest = {
            "model": {
                "id": getattr(config, "_name_or_path", ""),
                "revision": None,
                "class": type(model).__name__,
                "config": config_record(config) if hasattr(config, "to_json_string") else {},
            },
            "capture": {**capture_facts(model, "tap"), **facts, "command": [*sys.argv]},
            "training": self.settings,
        }
        return TraceWriter(
            self.path,
            manifest,
            routers,
            weights=False,
            counts_only=True,
            resume=self._resume,
            lock=self._lock,
        )

    def close(self, status: str) -> None:
        try:
            if self.writer is not None:
                self.writer.close(status, quiet=status != "complete")
        finally:
            self._lock.release()

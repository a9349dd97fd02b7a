"""The history of a training run: a counts trace whose batches are optimizer steps."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from moe_inspect.capture.open_trace import capture_facts, drop_facts, model_facts
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import config_record
from moe_inspect.text import print_stderr
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.manifest import read_manifest, refuse_while_written
from moe_inspect.trace.output_dir import claim_directory
from moe_inspect.trace.schema import MANIFEST
from moe_inspect.trace.writer import (
    CountedBatches,
    ResumePoint,
    TraceWriter,
    drop_after,
    resume_point,
)
from moe_inspect.training.sums import RoutingSums, WindowSums

COMMIT_TIMEOUT_S = 60.0


class History:
    """Writes the trace at `path`, a shard per flush; one process of a run does. `resume_step`: the
    run goes on after this step: what an existing trace holds of later steps is dropped, as the run
    takes them again. `settings`: of the monitor, for the manifest."""

    def __init__(self, path: Path, resume_step: int, overwrite: bool, settings: dict[str, int]):
        self.path, self.settings = path, settings
        self.writer: TraceWriter | None = None
        self._resume: ResumePoint | None = None
        self.last_step = 0
        if not resume_step or not (path / MANIFEST).exists():
            self._lock = claim_directory(path, overwrite)
            return
        with ExitStack() as undo:
            self._lock = undo.enter_context(hold(path))
            self._go_on(resume_step)
            undo.pop_all()

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

    def write(self, sums: RoutingSums, taken: WindowSums, step: int) -> None:
        """Commits what was `taken` of the steps since the last call, up to `step`, and waits until
        it is on the disk. MoeInspectError where that fails."""
        if step <= self.last_step:
            return
        self.writer = self.writer or self._open(sums)
        # an encoder-decoder's stacks see different tokens
        of_router = zip(sums.routers, taken.tokens_R, strict=True)
        tokens = sum({router.stack: int(n) for router, n in of_router}.values())
        shards, load_1E = self.writer.next_shard, [load_E[None] for load_E in taken.load]
        decisions, first = int(taken.tokens_R.sum()), self.last_step + 1
        counts = CountedBatches(step, tokens, [""], load_1E, None, {}, [], decisions, first)
        self.writer.write(counts)
        self.last_step = step
        until = time.monotonic() + COMMIT_TIMEOUT_S
        while self.writer.next_shard == shards and not self.writer.failed:
            if time.monotonic() > until:
                raise MoeInspectError(f"{self.path} could not be written in {COMMIT_TIMEOUT_S} s")
            time.sleep(0.0005)

    def _open(self, sums: RoutingSums) -> TraceWriter:
        model, routers = sums.model, sums.routers
        if self._resume is not None and len(self._known) != len(routers):
            raise MoeInspectError(
                f"{self.path} is the history of a model with {len(self._known)} routers, this one "
                f"has {len(routers)}: choose another directory"
            )
        config = getattr(model, "config", None)
        stated = config_record(config) if hasattr(config, "to_json_string") else {}
        capture = {**capture_facts(model, "tap"), **drop_facts(sums.sites)}
        manifest = {
            "model": {**model_facts(model), "config": stated},
            "capture": {**capture, "command": [*sys.argv]},
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

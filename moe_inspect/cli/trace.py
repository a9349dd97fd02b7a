"""`moe-inspect trace`: record where a model sends every token of a corpus."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from moe_inspect.capture.options import Capture, FedFields, RecordedFields, Resume
from moe_inspect.cli.capture import (
    ModelArgument,
    ModelOptions,
    check_model_and_text,
    need_torch,
    quiet,
    ranges_of,
    stop_cleanly,
)
from moe_inspect.cli.options import REQUIRED, Options, Overwrite, option, seconds
from moe_inspect.cli.progress import shown
from moe_inspect.text import plural, print_stderr
from moe_inspect.trace.files.location import output_location

COMMIT_EVERY_S = 2.0  # unless --commit-every says otherwise
WAIT_S = 30.0  # for the view to show the end


@dataclass(frozen=True, kw_only=True)
class TracedText(Options, FedFields):
    """The text, how it goes on, and whether the trace says which token each is."""

    panel = "Text"


@dataclass(frozen=True, kw_only=True)
class RecordedOptions(Options, RecordedFields):
    """What is recorded."""

    panel = "Record"


@dataclass(frozen=True, kw_only=True)
class WriteOptions(Options):
    """Where a trace is written, and how."""

    panel = "Trace"

    output: str = option(
        "The directory of the trace.", "DIR", flags=("-o", "--output"), default=REQUIRED
    )
    resume: Resume = False
    overwrite: Overwrite = False
    commit_every: float | None = option(
        "Commit at this interval, e.g. 5s, so that moe-inspect watch shows it early (default: when "
        "a shard is full).",
        "TIME",
        parser=seconds,
    )
    watch: bool = option(
        "Show the trace while it is written, as moe-inspect watch does (commits every 2 s unless "
        "--commit-every is given).",
        default=False,
    )

    @property
    def place(self) -> Path:
        return output_location(self.output)

    def keywords(self) -> dict[str, Any]:
        often = self.watch and self.commit_every is None
        return {
            "resume": self.resume,
            "overwrite": self.overwrite,
            "commit_every": COMMIT_EVERY_S if often else self.commit_every,
        }


def trace(
    *,
    model: ModelArgument,
    text: TracedText,
    capture: Capture = "auto",
    load: ModelOptions,
    layers: list[str] | None = option(
        "Record only these layers, e.g. 0-3,7.", "LAYERS", panel="Record"
    ),
    recorded: RecordedOptions,
    write: WriteOptions,
) -> None:
    """Record which experts a model sends each token of a corpus to.

    Examples:
    moe-inspect trace demo -o runs/demo
    moe-inspect trace allenai/OLMoE-1B-7B-0924 -o runs/olmoe --data wiki.jsonl
    moe-inspect trace ./checkpoint -o runs/a --data corpus/ --generate 32 --logits"""
    from moe_inspect.making import trace_model
    from moe_inspect.trace.manifest import read_manifest
    from moe_inspect.trace.output_dir import stored_bytes
    from moe_inspect.trace.schema import MANIFEST

    if write.resume and write.overwrite:
        raise typer.BadParameter(
            "--resume keeps the existing trace, --overwrite replaces it: give only one"
        )
    keywords: dict[str, Any] = {
        **text.keywords(),
        **write.keywords(),
        **recorded.keywords(),
        "layers": ranges_of(layers),
        "capture": capture,
    }
    check_output(write)
    check_model_and_text(model, load.revision, text, write.place)
    began, place = time.monotonic(), write.place
    there = write.resume and (place / MANIFEST).exists()
    complete_before = there and read_manifest(place)["status"] == "complete"
    stop_cleanly()
    try:
        with WatchView(place) if write.watch and _is_first() else shown() as bar:
            need_torch()
            quiet()
            progress = bar.counted("tracing", "tokens") if bar else None
            keywords |= load.keywords()
            written = trace_model(model, write.output, progress=progress, **keywords)
    except KeyboardInterrupt:
        state = "nothing was traced yet"
        if (place / MANIFEST).exists():
            state = f'{write.output} is readable; continue it with "--resume"'
        print_stderr(f"interrupted: {state}")
        raise
    # of a torchrun: the first speaks for all
    if not _is_first():
        return
    size = stored_bytes(place)
    stacks = any(r.stack for r in written.routers)  # of which each sees only its own tokens
    print_stderr(
        f"{'complete already: ' if complete_before else ''}{plural(written.n_tokens, 'token')} "
        f"{'at' if stacks else '×'} {plural(len(written.routers), 'router')} = "
        f"{plural(written.n_decisions, 'decision')}{' counted' if recorded.counts_only else ''} in "
        f"{write.output} ({f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.0f} kB'}, "
        f"{time.monotonic() - began:.1f} s)"
    )


class WatchView:
    """`trace --watch`: the view of `moe-inspect watch`, by another process, which costs the model's
    process nothing but the commits. It takes the place of the progress bar. What is written to
    stderr while it has the terminal is kept, and written when it is gone."""

    def __init__(self, output: Path):
        self.output = output
        self._kept, self._stderr = None, -1

    def __enter__(self) -> None:
        command = [sys.executable, "-m", "moe_inspect.watch", str(self.output), str(os.getpid())]
        sys.stderr.flush()
        self._view = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
        if os.isatty(2):
            self._kept = tempfile.TemporaryFile()
            self._stderr = os.dup(2)
            os.dup2(self._kept.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        try:
            if not self._is_over():
                self._view.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._view.wait(WAIT_S)
        finally:
            if self._view.poll() is None:
                self._view.kill()
            if self._kept is not None:
                sys.stderr.flush()
                os.dup2(self._stderr, 2)
                os.close(self._stderr)
                self._kept.seek(0)
                with open(2, "wb", closefd=False) as stderr:
                    shutil.copyfileobj(self._kept, stderr)
                self._kept.close()

    def _is_over(self) -> bool:
        """Whether this process has closed the trace: then the view ends by itself."""
        from moe_inspect.errors import MoeInspectError
        from moe_inspect.trace.manifest import read_manifest

        try:
            manifest = read_manifest(self.output)
        except (MoeInspectError, OSError):
            return False
        return manifest["status"] != "recording" and manifest["capture"].get("pid") == os.getpid()


def _is_first() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ["RANK"] == "0"


def check_output(write: WriteOptions) -> None:
    """Refuse a directory that cannot be written before torch is imported, which takes seconds.
    `trace_model` checks again."""
    from moe_inspect.trace.files.lock import refuse_while_locked
    from moe_inspect.trace.output_dir import check_directory
    from moe_inspect.trace.schema import MANIFEST

    # another process of a torchrun may have begun there
    alone, place = int(os.environ.get("WORLD_SIZE", 1)) == 1, write.place
    if alone and write.resume and (place / MANIFEST).exists():
        refuse_while_locked(place)
    elif alone:
        check_directory(place, write.overwrite)

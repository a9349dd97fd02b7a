"""Resuming a trace: the plan in its manifest, and where it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_inspect.capture.corpus.plan import Plan
from moe_inspect.capture.options import CorpusOptions
from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.model.load import config_record
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.files.lock import refuse_while_locked
from moe_inspect.trace.manifest import read_manifest, refuse_while_written, write_manifest
from moe_inspect.trace.output_dir import check_directory
from moe_inspect.trace.writer import ResumePoint, committed_counts, resume_point


def may_resume(output_dir: Path | Remote, options: CorpusOptions) -> bool:
    """Whether to resume the trace in `output_dir`. If not, the directory must be free, or
    `overwrite` set. A trace without committed batches resumes at its beginning."""
    if options.resume and (output_dir / schema.MANIFEST).exists():
        refuse_while_locked(output_dir)
        return True
    check_directory(output_dir, options.overwrite)
    return False


def comparable(config: object) -> dict[str, object]:
    """A model's config without the version of transformers that wrote it."""
    return {k: v for k, v in config_record(config).items() if k != "transformers_version"}


def resume_from(output_dir: Path | Remote, record: dict[str, object], rank: int) -> ResumePoint:
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


def complete_now(output_dir: Path | Remote, plan: Plan) -> None:
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

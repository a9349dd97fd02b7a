"""What a manifest keeps of the plan of a trace, and going on with a trace by the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_inspect.capture.corpus import Frame, Plan, special_frame
from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.model.load import config_record
from moe_inspect.trace import schema
from moe_inspect.trace.manifest import read_manifest, refuse_while_written, write_manifest
from moe_inspect.trace.writer import ResumePoint, committed_counts, resume_point


def comparable(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config_record(config).items() if k != "transformers_version"}


def corpus_record(options: dict[str, Any], plan: Plan, tokenizer: Any) -> dict[str, Any]:
    frame = special_frame(tokenizer) if plan.special_tokens else Frame()
    names = tokenizer.convert_ids_to_tokens
    return {
        "plan": options,
        "plan_hash": schema.fingerprint(options),
        "special_tokens": {"before": names(list(frame.before)), "after": names(list(frame.after))},
        "truncation": "none: longer documents are split"
        if plan.max_tokens is None
        else f"the corpus is cut at {plan.max_tokens} tokens",
    }


def resumed(out: Path, options: dict[str, Any], rank: int) -> ResumePoint:
    """Where the trace at `out` goes on; refuses another plan, and a trace whose writer is still at
    work."""
    manifest = read_manifest(out)
    refuse_while_written(out, manifest)
    then = manifest.get("corpus", {}).get("plan")
    if then is None:
        raise MoeInspectError(f'{out} was not made by "moe-inspect trace": it cannot be resumed')
    for key, now in options.items():
        if then.get(key) != now:
            raise MoeInspectError(
                f"{out} was made with {_difference(key, then.get(key), now)}: resume with the "
                "same, or --overwrite"
            )
    with writing(out):
        return resume_point(out, rank)


def complete_now(out: Path, plan: Plan) -> None:
    manifest = read_manifest(out)
    manifest["corpus"] |= plan.stats.record()
    counts = {**committed_counts(out, manifest), "dropped": 0}
    with writing(out):
        write_manifest(out, {**manifest, "status": "complete", "counts": counts})


def _difference(key: str, then: Any, now: Any) -> str:
    if key != "sources":
        return f"{key.replace('_', ' ')} {then!r}, not {now!r}"
    changed = [b["path"] for a, b in zip(then or [], now, strict=False) if a != b] or [
        s["path"] for s in (then or now)[-1:]
    ]
    return f"other data (see {changed[0]})"

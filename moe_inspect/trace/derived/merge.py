"""Merges traces of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import schema
from moe_inspect.trace.derived.alike import check_alike, united_vocabulary
from moe_inspect.trace.derived.origin import begin, origin, random_weights, verified, written_here
from moe_inspect.trace.derived.shards import Target
from moe_inspect.trace.files.location import location, output_location
from moe_inspect.trace.manifest import write_manifest
from moe_inspect.trace.output_dir import check_directory
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import Verification
from moe_inspect.trace.writer.draft import whole_trace


def merge(traces: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> Trace:
    """Writes one trace at `out` that holds what all `traces` hold, and returns it.

    Every part is verified first. Documents are numbered from 0, tokens and forward passes follow
    those of the part before, rank by rank; `parts` in its trace.json says what came from where. It
    is "complete" where all parts are. In memory is a router of a shard, and a number per document.

    Args:
        traces: directories of at least two traces of the same model, with the same columns.
        out: the directory to write, or its URL (`s3://bucket/trace`).
        overwrite: replace a trace at `out`.

    Raises:
        MoeInspectError: a part is damaged or still written, or two are not alike. Nothing is left
            at `out`.
    """
    place, paths = output_location(out), [location(path) for path in traces]
    if len(paths) < 2:
        raise MoeInspectError("give two traces or more to merge")
    check_directory(place, overwrite, resumable=False)
    if place.resolve() in [path.resolve() for path in paths]:
        raise MoeInspectError(f"{out} is one of the traces to merge: choose another directory")
    opened = [Trace(path) for path in paths]
    check_alike(opened)
    _check_once(opened)
    vocabulary = united_vocabulary(opened)
    found = [verified(trace, path) for trace, path in zip(opened, paths, strict=True)]
    with whole_trace(place, overwrite, "nothing was merged") as (draft, _):
        manifest = _manifest(opened, found)
        begin(draft, manifest, vocabulary)
        target = Target(draft, None if vocabulary is None else len(vocabulary))
        for trace in opened:
            target.add(trace)
        _reconcile(target, found)
        write_manifest(draft, manifest)
    return Trace(place)


def _check_once(traces: list[Trace]) -> None:
    """MoeInspectError where two hold the same files, as far as they state their sha256."""
    seen: dict[tuple[str | None, ...], Trace] = {}
    for trace in traces:
        files = tuple(part.sha256 for shard in trace.shards for part in shard.files.stated.values())
        if not files or None in files:
            continue
        if files in seen:
            raise MoeInspectError(
                f"{trace.path} holds the same as {seen[files].path}: it would count twice"
            )
        seen[files] = trace


def _reconcile(target: Target, found: list[Verification]) -> None:
    """MoeInspectError where what was copied is not what was verified."""
    for name, copied in (
        ("tokens", sum(target.tokens.values())),
        ("assignments", target.assignments),
        ("documents", target.documents),
    ):
        if copied != (verified := sum(getattr(part, name) for part in found)):
            raise MoeInspectError(
                f"the traces have {verified:,} {name}, {copied:,} were merged: one was changed "
                "meanwhile"
            )


def _manifest(traces: list[Trace], found: list[Verification]) -> dict[str, Any]:
    """Of what all parts state alike; `parts` has what each states of its own."""
    first = traces[0]
    captures = [trace.manifest["capture"] for trace in traces]
    corpora = [trace.manifest.get("corpus") or {} for trace in traces]
    columns = {k: v for trace in traces for k, v in trace.manifest.get("columns", {}).items()}
    return {
        "format": schema.FORMAT,
        "status": "complete" if all(p.status == "complete" for p in found) else "interrupted",
        "model": {
            key: value
            for trace in reversed(traces)
            for key, value in (trace.manifest.get("model") or {}).items()
            if value is not None
        },
        "corpus": {
            **_shared([{k: v for k, v in c.items() if k != "plan_hash"} for c in corpora]),
            "documents": sum(part.documents for part in found),
            "notes": list(dict.fromkeys(note for c in corpora for note in c.get("notes") or [])),
            "plan": random_weights(corpora[0]),
        },
        "capture": written_here(_shared(captures)),
        "routers": [asdict(router) for router in first.routers],
        "tables": first.tables,
        "columns": columns,
        "counts": {
            "tokens": sum(trace.n_tokens for trace in traces),
            "decisions": sum(trace.n_decisions for trace in traces),
            "dropped": sum(
                (trace.manifest.get("counts") or {}).get("dropped", 0) for trace in traces
            ),
        },
        "parts": _parts(traces, found),
    }


def _shared(sections: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all have."""
    return {
        key: value
        for key, value in sections[0].items()
        if all(key in other and other[key] == value for other in sections[1:])
    }


def _parts(traces: list[Trace], found: list[Verification]) -> list[dict[str, Any]]:
    """What each part is: its documents are those from `first_document` on."""
    listed, documents = list[dict[str, Any]](), 0
    for trace, part in zip(traces, found, strict=True):
        capture = {
            k: v for k, v in trace.manifest["capture"].items() if k not in ("command", "host")
        }
        listed.append({**origin(trace, part), "first_document": documents, "capture": capture})
        documents += part.documents
    return listed

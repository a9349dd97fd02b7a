"""Merges traces of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import schema
from moe_inspect.trace.derived.alike import check_alike, united_vocabulary
from moe_inspect.trace.derived.origin import (
    COUNTED,
    begin,
    contents,
    origin,
    random_weights,
    same_place,
    verified,
    written_here,
)
from moe_inspect.trace.derived.shards import Target
from moe_inspect.trace.files.location import location, output_location
from moe_inspect.trace.manifest import holds_samples, write_manifest
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
        raise MoeInspectError("give two or more traces to merge")
    check_directory(place, overwrite, resumable=False)
    if any(same_place(place, path) for path in paths):
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


class _Held(NamedTuple):
    """What a trace says that it holds. whole: the contents of the traces all of which it holds, its
    own first. sampled: those of the trace that it is a sample of."""

    trace: Trace
    whole: set[str | None]
    sampled: str | None


def _held(trace: Trace) -> _Held:
    sample, parts = trace.manifest.get("sample"), trace.manifest.get("parts") or []
    merged = {_contents_in(part) for part in parts} if sample is None else set[str | None]()
    of = _contents_in(sample.get("of")) if isinstance(sample, dict) else None
    return _Held(trace, {contents(trace), *merged} - {None}, of)


def _check_once(traces: list[Trace]) -> None:
    """MoeInspectError where two hold the same documents, as far as they state what they hold and
    what they were merged or sampled of."""
    held = [_held(trace) for trace in traces]
    for a, b in combinations(held, 2):
        if _share(a, b):
            raise MoeInspectError(
                f"{b.trace.path} holds documents of {a.trace.path}: they would count twice"
            )


def _share(a: _Held, b: _Held) -> bool:
    if a.sampled is not None and a.sampled == b.sampled:
        both = (held.trace.documents()["document"].to_numpy() for held in (a, b))
        return bool(len(np.intersect1d(*both)))
    return not a.whole.isdisjoint({*b.whole, b.sampled}) or a.sampled in b.whole


def _contents_in(stated: object) -> str | None:
    found = cast("dict[str, Any]", stated).get("contents") if isinstance(stated, dict) else None
    return found if isinstance(found, str) else None


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
    no_more = ("plan_hash", *COUNTED)
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
            **_shared([{k: v for k, v in c.items() if k not in no_more} for c in corpora]),
            "documents": sum(part.documents for part in found),
            **{
                name: sum(c[name] for c in corpora)
                for name in COUNTED
                if all(isinstance(c.get(name), int) for c in corpora)
            },
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
        about = {"sampled": holds_samples(trace.manifest), "capture": capture}
        listed.append({**origin(trace, part), "first_document": documents, **about})
        documents += part.documents
    return listed

"""Merges traces of one model: with the same columns, of one vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import cut, plural
from moe_inspect.trace import schema
from moe_inspect.trace.derived import shards
from moe_inspect.trace.files.checksums import FREE_TEXT, Json
from moe_inspect.trace.files.location import output_location
from moe_inspect.trace.manifest import holds_samples, write_manifest
from moe_inspect.trace.output_dir import check_directory
from moe_inspect.trace.reader import Trace, place_of
from moe_inspect.trace.verify import Verification
from moe_inspect.trace.writer.whole import whole_trace

# entries of a config that say how the weights are run or who wrote the file, not what the model is
OF_A_RUN = {
    "_name_or_path",
    "dtype",
    "output_router_logits",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# facts of a model: where only one trace states one of the first, that is no difference
MAY_LACK = ("model.id", "model.revision", "model.class", "capture.dtype", "capture.weight_dtype")
ALWAYS = ("model.adapter", "model.dequantized_from", "model.note", "plan.random_init")


def check_alike(traces: Sequence[Trace]) -> None:
    """MoeInspectError where two traces are of different models, or hold different columns."""
    for a, b in pairwise(traces):
        _check_columns(a, b)
    for a, b in [(a, b) for i, b in enumerate(traces) for a in traces[:i]]:
        for name, of_a, of_b in _model_facts(a, b):
            if of_a != of_b:
                edit = "; if they are the same, edit trace.json" if name in FREE_TEXT else ""
                differs = f"{name} is {cut(str(of_a), 60)} and {cut(str(of_b), 60)}{edit}"
                raise MoeInspectError(f"{a.path} and {b.path} are of different models: {differs}")


def _check_columns(a: Trace, b: Trace) -> None:
    if a.counts_only != b.counts_only:
        counts, decisions = (a, b) if a.counts_only else (b, a)
        said = f"{counts.path} holds counts only, {decisions.path} decisions: they cannot be merged"
        raise MoeInspectError(said)
    for trace in (a, b):
        if trace.is_history:
            said = f"{trace.path} is the history of a training run: its windows cannot be merged"
            raise MoeInspectError(said)
    for one, other in ((a, b), (b, a)):
        if more := [name for name in _columns(one) if name not in _columns(other)]:
            said = f"{one.path} has {more[0]}, {other.path} does not: trace both the same way"
            raise MoeInspectError(said)


def _columns(trace: Trace) -> list[str]:
    """What a trace may hold or not: columns, and the table of logits."""
    there = {f"{value}_j": not trace.counts_only for value in trace.slot_values}
    there |= dict.fromkeys(trace.sums, trace.counts_only) | {"document": trace.by_document}
    there |= {"loss_nats": trace.has_loss, "logits": "logits" in trace.tables}
    return [name for name, holds in there.items() if holds]


def _model_facts(a: Trace, b: Trace) -> Iterator[tuple[str, object, object]]:
    """What has to be the same of both, where both state it or its absence says something."""
    sections = [
        {
            "model": trace.manifest.get("model") or {},
            "capture": trace.manifest["capture"],
            "plan": (trace.manifest.get("corpus") or {}).get("plan") or {},
        }
        for trace in (a, b)
    ]
    for name in (*MAY_LACK, *ALWAYS):
        section, key = name.split(".")
        of_a, of_b = (each[section].get(key) for each in sections)
        if name in ALWAYS or (of_a is not None and of_b is not None):
            yield name, of_a, of_b
    configs = [each["model"].get("config") or {} for each in sections]
    for key in sorted(configs[0].keys() & configs[1].keys() - OF_A_RUN):
        yield f"config.{key}", *(config[key] for config in configs)
    yield "the routers", plural(len(a.routers), "router"), plural(len(b.routers), "router")
    for r, (of_a, of_b) in enumerate(zip(a.routers, b.routers, strict=True)):
        for key, value in asdict(of_a).items():
            yield f"routers[{r}].{key}", value, getattr(of_b, key)


def united_vocabulary(traces: Sequence[Trace]) -> pa.Table | None:
    """token_id, token: the longest vocabulary, of which the others are the beginning; None where no
    trace has one. MoeInspectError where they are not."""
    longest = max(traces, key=lambda trace: len(trace.vocabulary_table))
    words = longest.vocabulary_table
    for trace in traces:
        found = trace.vocabulary_table["token"]
        expected = words["token"].slice(0, len(found))
        if not found.equals(expected):
            pairs = enumerate(zip(found.to_pylist(), expected.to_pylist(), strict=True))
            at, (here, there) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            raise MoeInspectError(
                f"{trace.path} and {longest.path} have different vocabularies: token {at} is "
                f"{cut(repr(here))} and {cut(repr(there))}"
            )
    return words if len(words) else None


def merge(
    traces: Sequence[Trace | str | Path], out: str | Path, *, overwrite: bool = False
) -> Trace:
    """Writes one trace at `out` that holds what all `traces` hold, and returns it.

    Every part is verified first. Documents are numbered from 0, tokens and forward passes follow
    those of the part before, rank by rank; `parts` in its trace.json says what came from where. It
    is "complete" where all parts are. Small shards become larger ones, also those of a single
    trace. In memory is a router of a shard, and a number per document.

    Args:
        traces: directories of traces of the same model, with the same columns.
        out: the directory to write, or its URL (`s3://bucket/trace`).
        overwrite: replace a trace at `out`.

    Raises:
        MoeInspectError: a part is damaged or still written, or two are not alike. Nothing is left
            at `out`.
    """
    place, paths = output_location(out), [place_of(trace) for trace in traces]
    if not paths:
        raise MoeInspectError("give traces to merge")
    check_directory(place, overwrite, resumable=False)
    if any(shards.same_place(place, path) for path in paths):
        raise MoeInspectError(f"{out} is one of the traces to merge: choose another directory")
    opened = [Trace(path) for path in paths]
    check_alike(opened)
    for a, b in combinations(opened, 2):
        if _share(a, b):
            raise MoeInspectError(f"{b.path} holds documents of {a.path}: they would count twice")
    vocabulary = united_vocabulary(opened)
    found = [shards.verified(trace, path) for trace, path in zip(opened, paths, strict=True)]
    with whole_trace(place, overwrite, "nothing was merged") as (draft, _):
        manifest = _manifest(opened, found)
        target = shards.Target(draft, manifest, vocabulary)
        for trace in opened:
            target.add(trace)
        for name, copied, checked in target.differences(found):
            raise MoeInspectError(
                f"the traces have {checked:,} {name}, {copied:,} were merged: one was changed "
                "meanwhile"
            )
        write_manifest(draft, manifest)
    return Trace(place)


def _share(a: Trace, b: Trace) -> bool:
    """Whether two hold the same documents, as far as they state what they hold and what they were
    merged or sampled of."""
    (whole_a, of_a), (whole_b, of_b) = _held(a), _held(b)
    if of_a is not None and of_a == of_b:
        both = (trace.documents()["document"].to_numpy() for trace in (a, b))
        return bool(len(np.intersect1d(*both)))
    return not whole_a.isdisjoint({*whole_b, of_b}) or of_a in whole_b


def _held(trace: Trace) -> tuple[set[str], str | None]:
    """The contents of all traces that it holds, its own first; of the one it is a sample of."""
    sample, parts = trace.manifest.get("sample"), trace.manifest.get("parts") or []
    merged = [_contents_in(part) for part in parts] if sample is None else []
    of = _contents_in(sample.get("of")) if isinstance(sample, dict) else None
    return {c for c in (shards.contents(trace), *merged) if c is not None}, of


def _contents_in(stated: object) -> str | None:
    found = stated.get("contents") if isinstance(stated, dict) else None
    return found if isinstance(found, str) else None


def _manifest(traces: list[Trace], found: list[Verification]) -> Json:
    """Of what all parts state alike; `parts` has what each states of its own."""
    first = traces[0]
    corpora = [trace.manifest.get("corpus") or {} for trace in traces]
    columns = {k: v for trace in traces for k, v in trace.manifest.get("columns", {}).items()}
    models = [trace.manifest.get("model") or {} for trace in reversed(traces)]
    counted = [n for n in shards.COUNTED if all(isinstance(c.get(n), int) for c in corpora)]
    parts, documents = list[Json](), 0  # of a part its documents are those from this number on
    for trace, part in zip(traces, found, strict=True):
        own = {k: v for k, v in trace.manifest["capture"].items() if k not in ("command", "host")}
        about = {"sampled": holds_samples(trace.manifest), "capture": own}
        parts.append({**shards.origin(trace, part), "first_document": documents, **about})
        documents += part.documents
    return {
        "format": schema.FORMAT,
        "status": "complete" if all(p.status == "complete" for p in found) else "interrupted",
        "model": {k: v for model in models for k, v in model.items() if v is not None},
        "corpus": {
            **_shared([shards.of_text(corpus) for corpus in corpora]),
            "documents": documents,
            **{name: sum(c[name] for c in corpora) for name in counted},
            "notes": list(dict.fromkeys(note for c in corpora for note in c.get("notes") or [])),
            "plan": shards.random_weights(corpora[0]),
        },
        "capture": shards.written_here(_shared([trace.manifest["capture"] for trace in traces])),
        "routers": [asdict(router) for router in first.routers],
        "tables": first.tables,
        "columns": columns,
        "counts": {
            "tokens": sum(trace.n_tokens for trace in traces),
            "decisions": sum(trace.n_decisions for trace in traces),
            "dropped": sum((t.manifest.get("counts") or {}).get("dropped", 0) for t in traces),
        },
        "parts": parts,
    }


def _shared(sections: list[Json]) -> Json:
    """The entries that all have."""
    first, *others = sections
    return {k: v for k, v in first.items() if all(k in of and of[k] == v for of in others)}

"""Converts files of another tool to a trace, for `moe-inspect import` and
`moe_inspect.import_trace`. The trace is written in a temporary directory beside the output and
renamed when it is complete."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError, own_options
from moe_inspect.importers.context import ImportContext, Imported, ImportSource, formats, sniff
from moe_inspect.importers.values import Fields
from moe_inspect.model.config import read_facts
from moe_inspect.text import first_line
from moe_inspect.trace.files.location import output_location
from moe_inspect.trace.manifest import this_process
from moe_inspect.trace.output_dir import check_directory, whole_trace
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.writer import CountedBatches, RoutedBatch, ShardLimits, TraceWriter
from moe_inspect.workers import Processes

WORTH_BYTES = 2**26  # of files, from which on more processes are started to parse them
Batch = RoutedBatch | CountedBatches


def import_trace(
    format: str,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    workers: int = 1,
    **options: Any,
) -> Trace:
    """Imports files of another tool as a trace at `out`, and returns the trace.

    Args:
        format: a name of `importers.MODULES`, or "auto": recognised by the first source.
        sources: files and folders. "DOMAIN=PATH" labels the tokens of one.
        out: the directory to write.
        model: a hub id, a directory, a config.json or "demo", for what the files leave out: number
            of experts, top-k, which layers are dense, the vocabulary.
        experts: experts per layer, where neither the files nor a config give it.
        top_k: experts per token, where neither the files nor a config give it.
        overwrite: replace a trace at `out`.
        progress: called with (bytes read, total bytes).
        warn: called with one line per warning; default `warnings.warn`.
        workers: how many processes parse lines of JSON, ahead of this one; the trace is the same.
            More than one need `if __name__ == "__main__":` in a script.
        options: of the format. megatron: `pipeline_stages`, the number of pipeline stages of a run
            whose files number layers from 0 in each; more than one needs `model`. table, counts:
            `map`, if columns or fields have other names: where the columns are,
            "layer=block,expert=id,count=hits"; in JSON the path to the counts,
            "count=layers.{layer}.{expert}.hits"; or the name of a .yaml file.

    Raises:
        MoeInspectError: the files cannot be imported as asked. Nothing is left at `out`.
    """
    warn = warn or (lambda line: warnings.warn(line, stacklevel=4))
    target = output_location(out)
    check_directory(target, overwrite, resumable=False)
    listed = [_source(text) for text in sources]
    with Processes(workers) if workers > 1 else nullcontext() as at:
        with _reading(listed):
            if format == "auto":
                format = sniff(listed)
                warn(f"recognised as {format}: {formats()[format].reads.replace('`', '')}")
            context = ImportContext(
                listed,
                read_facts(model) if model is not None else None,
                experts,
                top_k,
                _options_of(format, options),
                warn,
                _progress(listed, progress) if progress else lambda n: None,
                at,
            )
            imported = formats()[format].run(context)
            if imported.vocabulary is None and context.facts is not None:
                imported = replace(imported, vocabulary=context.facts.vocabulary())
            batches = _checked(context, imported)
            first = next(batches, None)
        if first is None:
            raise MoeInspectError(f"{listed[0].path} holds no decisions")
        imported = replace(imported, batches=chain([first], batches))
        _write(target, overwrite, _manifest(format, context, imported), imported)
    return Trace(target)


def _options_of(format: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that this format takes. MoeInspectError if there is no such format, or if an
    option is another format's."""
    if format not in formats():
        raise MoeInspectError(f"no format {format!r}: there are {', '.join(formats())}, auto")
    takers = {name: known.options for name, known in formats().items()}
    if unknown := options.keys() - set(chain.from_iterable(takers.values())):
        raise TypeError(f"import_trace has no option {min(unknown)}")
    return own_options(format, options, takers)


def _write(target: Path, overwrite: bool, manifest: Fields, imported: Imported) -> None:
    with (
        whole_trace(target, overwrite, "nothing was imported") as (draft, lock),
        TraceWriter(
            draft,
            manifest,
            imported.routers,
            weights=imported.weights,
            logits=imported.logits,
            **imported.extras,
            counts_only=imported.counts_only,
            vocabulary=imported.vocabulary,
            # no shards by age: the same files give the same trace
            limits=ShardLimits(seconds=float("inf")),
            lock=lock,
        ) as writer,
    ):
        for batch in imported.batches:
            writer.write(batch)


@contextmanager
def _reading(sources: list[ImportSource]) -> Iterator[None]:
    """Where an OSError comes from reading the sources, not from writing the trace."""
    try:
        yield
    except OSError as error:
        where = error.filename or sources[0].path
        raise MoeInspectError(f"cannot read {where}: {first_line(error)}") from None


def _source(text: str | Path) -> ImportSource:
    label, equals, path = str(text).partition("=")
    is_labelled = equals and label and "/" not in label and not Path(text).exists()
    return ImportSource(Path(path), label) if is_labelled else ImportSource(Path(text), None)


def default_workers(sources: Sequence[str | Path]) -> int:
    """One process per core, where there is so much to read that starting them pays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) if _bytes_of(map(_source, sources)) >= WORTH_BYTES else 1


def _bytes_of(sources: Iterable[ImportSource]) -> int:
    files = ([*s.path.rglob("*")] if s.path.is_dir() else [s.path] for s in sources)
    return sum(f.stat().st_size for f in chain.from_iterable(files) if f.is_file())


def _progress(
    sources: list[ImportSource], progress: Callable[[int, int], None]
) -> Callable[[int], None]:
    total, done = _bytes_of(sources), 0

    def read(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    return read


def _manifest(format: str, context: ImportContext, imported: Imported) -> Fields:
    unknown = {"id": "unknown", "revision": None, "class": None, "config": {}}
    capture = {"mode": "import", "format": format, "device": None, "dtype": None}
    sources = [{"path": str(s.path), "domain": s.domain} for s in context.sources]
    return {
        "model": context.facts.record() if context.facts else unknown,
        "capture": capture | this_process(),
        "corpus": {"sources": sources, "notes": imported.notes},
    }


def _checked(context: ImportContext, imported: Imported) -> Iterator[Batch]:
    """Yield the batches. MoeInspectError if a token id is not in the vocabulary."""
    vocabulary = imported.vocabulary
    with _reading(context.sources):
        for batch in imported.batches:
            if vocabulary is not None and isinstance(batch, RoutedBatch):
                largest = int(batch.token_id.max(initial=-1))
                if largest >= len(vocabulary):
                    raise MoeInspectError(
                        f"token id {largest} of a vocabulary of {len(vocabulary):,}: is it the "
                        "config of this model?"
                    )
            yield batch

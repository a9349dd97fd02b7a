"""Input and result of every importer: an ImportContext (files, facts of the model, callbacks) → an
Imported (routers, batches for the writer). The registry of formats, from which the command line,
the fuzzer and the documentation take their lists."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import why_unread
from moe_inspect.importers import MODULES, values
from moe_inspect.importers.tables.presets import PRESETS
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS, ModelFacts
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, RoutedBatch
from moe_inspect.workers import Processes

MOST_JSON_BYTES = 2**28  # of a file that is one JSON value


@dataclass(frozen=True)
class ImportSource:
    """A file or folder, and the label of its tokens (None: the importer chooses one)."""

    path: Path
    domain: str | None


@dataclass
class ImportContext:
    """Input of an importer.

    facts: facts of the model, if the user gave a config.
    experts, top_k: numbers from the user, if neither the files nor a config state them.
    options: values of the options that the format declares.
    warn: called with one line per warning.
    read: called with the number of bytes read since the last call.
    workers: processes that parse lines of JSON; None: this process.
    returned: called with each response of an engine, unchanged. It is then not imported."""

    sources: list[ImportSource]
    facts: ModelFacts | None = None
    experts: int | None = None
    top_k: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    warn: Callable[[str], None] = print
    read: Callable[[int], None] = lambda n: None
    workers: Processes | None = None
    returned: Callable[[Any], None] | None = None

    def files(self, pattern: str, what: str) -> list[tuple[Path, ImportSource]]:
        """(file, source) of each file in the sources' folders and subfolders whose name matches. A
        source that is a file is taken with any name. `what`: description of the files for the
        error message."""
        found: list[tuple[Path, ImportSource]] = []
        for source in self.sources:
            inside = [source.path] if source.path.is_file() else []
            if source.path.is_dir():
                inside = [p for p in _files(source.path) if re.fullmatch(pattern, p.name)]
                if not inside:
                    raise MoeInspectError(f"{source.path} holds no {what}")
            elif not inside:
                raise MoeInspectError(why_unread(source.path))
            found += [(p, source) for p in inside]
        return found

    def prepared(self, path: Path, prepare: values.Prepare) -> Iterator[Any]:
        """prepare(file and line number, JSON object) of each line that is not blank, in order. The
        workers call `prepare`, if there are any: it must be possible to pickle it."""
        return values.prepared_lines(path, prepare, self.workers, self.read)

    def json(self, path: Path) -> values.Json:
        if (size := path.stat().st_size) > MOST_JSON_BYTES:
            why = f"over {MOST_JSON_BYTES:,}: write one object per line"
            raise MoeInspectError(f"{path} is one JSON value of {size:,} bytes, {why}")
        self.read(size)
        return values.parsed(path.read_bytes(), str(path))

    def known_top_k(self, where: object) -> int:
        """Top-k from the user or the config, for a file that does not state it. MoeInspectError
        unless all routers have the same."""
        what = "many experts each token uses", "top-k"
        return self.top_k or _only(self.facts.top_k if self.facts else {}, where, *what)

    def known_experts(self, where: object) -> int:
        """Number of experts from the user or the config. MoeInspectError unless all routers have
        the same."""
        what = "many experts there are", "experts"
        return self.experts or _only(self.facts.experts if self.facts else {}, where, *what)

    def routers_of(
        self, layers: Iterable[int], experts: int, top_k: int, where: object
    ) -> list[Router]:
        """Routers of the layers, one per layer. MoeInspectError if the config disagrees."""
        layers = sorted(layers)
        if not layers:
            raise MoeInspectError(f"{where} holds no decisions")
        possible = layers[0] >= 0 and layers[-1] < 2**16 and len(layers) <= MOST_LAYERS
        if not possible or not 1 <= top_k <= experts <= MOST_EXPERTS:
            at = f" in layers {layers[0]}-{layers[-1]}" * (not possible)
            raise MoeInspectError(f"{where}: {top_k} of {experts} experts{at} is not possible")
        if self.facts is None:
            return [Router(layer, "experts", f"layers.{layer}", experts, top_k) for layer in layers]
        for layer in layers:
            if layer not in self.facts.experts:
                raise MoeInspectError(
                    f"{where}: layer {layer} has experts here and none in {self.facts.id}: is "
                    "the config the model's?"
                )
            stated = self.facts.experts[layer], self.facts.top_k[layer]
            if stated != (experts, top_k):
                raise MoeInspectError(
                    f"{where}: {top_k} of {experts} experts in layer {layer}, {stated[1]} of "
                    f"{stated[0]} in {self.facts.id}: is it the config of this model?"
                )
        return [r for r in self.facts.routers() if r.layer in set(layers)]


def _only(of_layer: dict[int, int], where: object, what: str, option: str) -> int:
    if len(values := set(of_layer.values())) != 1:
        raise MoeInspectError(
            f"{where} does not say how {what}: give --model, --config or --{option}"
        )
    return values.pop()


@dataclass(frozen=True)
class Imported:
    """Result of an importer. batches: in the order of the trace. notes: facts that the source
    leaves out, for the manifest. vocabulary: token_id and token, if the source states them. extras:
    further columns of the trace, as TraceWriter takes them."""

    routers: list[Router]
    batches: Iterator[RoutedBatch | CountedBatches]
    weights: bool = False
    logits: bool = False
    counts_only: bool = False
    notes: list[str] = field(default_factory=list)
    vocabulary: pa.Table | None = None
    extras: Mapping[str, Any] = field(default_factory=dict[str, bool])


Run = Callable[[ImportContext], Imported]
Sniffer = Callable[[str, bytes], bool]
HEAD_BYTES = 65_536
CODECS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Format:
    """A format that can be imported.

    name: name for the user.
    reads: files of the format, for help and documentation.
    gives: content of the resulting trace.
    run: reads the files of an ImportContext.
    sniff: whether a file belongs to the format, by its name and its first HEAD_BYTES bytes (of a
        Parquet file, whose columns are named at its end, followed by its last HEAD_BYTES).
    options: keywords of import_trace that only this format takes."""

    name: str
    reads: str
    gives: str
    run: Run
    sniff: Sniffer
    options: tuple[str, ...] = ()


_registered: dict[str, Format] = {}


def importer(
    name: str, gives: str, sniff: Sniffer, options: tuple[str, ...] = ()
) -> Callable[[Run], Run]:
    """Register a function as the importer of a format: see Format."""

    def register(run: Run) -> Run:
        _registered[name] = Format(name, MODULES[name][1], gives, run, sniff, options)
        return run

    return register


def formats() -> dict[str, Format]:
    """All formats of MODULES, in their order."""
    for module, _ in MODULES.values():
        importlib.import_module(f"moe_inspect.importers.{module}")
    return {name: _registered[name] for name in MODULES}


def sniff(sources: list[ImportSource]) -> str:
    """Recognise the format of the first source. MoeInspectError if no format or several match."""
    path, near, found = sources[0].path, dict[str, list[str]](), dict[str, Path]()
    for file in _files(path)[:1000] if path.is_dir() else [path]:
        if not file.is_file():
            raise MoeInspectError(why_unread(file))
        head = _head(file)
        for name, format in formats().items():
            if format.sniff(file.name, head):
                found.setdefault(name, file)
                break
        suffix = (file.with_suffix("") if file.suffix in CODECS else file).suffix
        near |= {
            name: [mark for mark in preset.marks if mark.encode() not in head]
            for name, preset in PRESETS.items()
            if suffix in [Path(one).suffix for one in preset.file.split("|")]
            and 0 < sum(mark.encode() in head for mark in preset.marks) < len(preset.marks)
        }
    if len(found) > 1:
        which = " and ".join(f"{name} ({file.name})" for name, file in found.items())
        raise MoeInspectError(f"{path} holds files of {which}: name the format in place of auto")
    if found:
        return next(iter(found))
    looks = "".join(f"; it looks like {n}, but lacks {', '.join(of)}" for n, of in near.items())
    raise MoeInspectError(
        f"cannot tell the format of {path}: give import one of {', '.join(MODULES)}{looks}"
    )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _head(file: Path) -> bytes:
    """First HEAD_BYTES of the uncompressed file; of a Parquet file also the last."""
    if file.suffix in CODECS:
        try:
            with pa.CompressedInputStream(pa.OSFile(os.fsencode(file)), CODECS[file.suffix]) as it:
                return it.read(HEAD_BYTES)
        except (OSError, pa.ArrowException):
            return b""
    with open(file, "rb") as opened:
        head = opened.read(HEAD_BYTES)
        if head[:4] == b"PAR1":  # its columns are named at its end
            opened.seek(max(file.stat().st_size - HEAD_BYTES, 0))
            head += opened.read(HEAD_BYTES)
    return head


def named(path: Path) -> str:
    """Domain of a file without a label: the file's name."""
    return path.name.split(".")[0] or path.name

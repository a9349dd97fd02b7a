"""Files → documents → sequences → token batches. Everything streams: memory does not grow with the
corpus, and the batch plan is a function of the files and the options alone, which is what makes a
trace resumable."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.capture.tokenize import token_ids
from moe_inspect.demo import CORPUS_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line
from moe_inspect.trace.writer import Document

READERS = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")
TEXTS_A_CALL = 64  # documents tokenized together
WINDOW_BATCHES = (
    16  # sequences of so many batches are sorted by length together: less padding, bounded memory
)
DOMAIN_FIELD = "domain"
SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer takes one
BUNDLED = "demo:"  # stands for the folder of the bundled corpus in the name of a source


@dataclass(frozen=True)
class Source:
    """One file of the corpus. `fixed`: the domain was given with DOMAIN=SRC, and a domain field
    does not override it."""

    path: str
    domain: str
    fixed: bool
    bytes: int | None
    sha256: str


@dataclass(frozen=True)
class Sequence_:
    """What the model sees as one row: `ids` int32 [tokens], positions 0…tokens−1."""

    document: int
    sequence: int
    domain: str
    source: str
    ids: np.ndarray
    document_tokens: int
    document_sequences: int
    continued: bool = False  # decoded tokens are to follow


@dataclass
class CorpusStats:
    """What happened to the documents, for the manifest; and how far reading has come, for the
    progress bar."""

    documents: int = 0
    split_documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    bytes_read: int = 0

    def record(self) -> dict[str, int]:
        return {k: getattr(self, k) for k in ("documents", "split_documents", "empty_documents")}


# --- sources


def find_sources(data: Sequence[str], leave_out: Path | None = None) -> list[Source]:
    """`--data` values → files, in a fixed order; none: the bundled corpus. Each value: a file, a
    folder (subfolders are domains), a glob or an fsspec URL, optionally behind `DOMAIN=`. What lies
    below `leave_out` (the trace) is no text."""
    found: list[Source] = []
    for value in data or [str(CORPUS_DIR)]:
        domain, location = _split_label(value)
        files = [
            f
            for f in _expand(location)
            if leave_out is None
            or not (_is_local(f[0]) and Path(f[1]).is_relative_to(leave_out.resolve()))
        ]
        if not files:
            reached = " (or it cannot be reached)" if "://" in location else ""
            raise MoeInspectError(
                f"no text at {location}{reached}: give a file, folder or glob of "
                f"{', '.join(READERS)}"
            )
        for filesystem, path, guess in files:
            found.append(
                Source(
                    _shown(filesystem, path),
                    domain or guess,
                    domain is not None,
                    *_identity(filesystem, path),
                )
            )
    return found


def _split_label(value: str) -> tuple[str | None, str]:
    label, equals, location = value.partition("=")
    if equals and location and re.fullmatch(r"[^/\\:*?\[\]]+", label) and not Path(value).exists():
        return label, location
    return None, value


def _expand(location: str) -> Iterator[tuple[Any, str, str]]:
    """(filesystem, path, domain by its place) of each file that `location` means."""
    import fsspec

    try:
        if "://" in location:
            filesystem, path = fsspec.core.url_to_fs(location)
        else:
            filesystem, path = (
                fsspec.filesystem("file"),
                os.path.abspath(os.path.expanduser(location)),
            )
        if any(c in path for c in "*?[") and not filesystem.exists(path):
            for match in sorted(filesystem.glob(path)):
                if filesystem.isfile(match) and _kind(match):
                    yield filesystem, match, _stem(match)
            return
        if filesystem.isdir(path):
            root = path.rstrip("/")
            for match in sorted(filesystem.find(root)):
                inside = match[len(root) + 1 :].split("/")
                if _kind(match) and not any(part.startswith(".") for part in inside):
                    yield (
                        filesystem,
                        match,
                        inside[0] if len(inside) > 1 else root.rsplit("/", 1)[-1],
                    )
            return
        if filesystem.exists(path):
            if not _kind(path):
                raise MoeInspectError(
                    f"cannot read {location}: its name must end in {', '.join(READERS)}"
                )
            yield filesystem, path, _stem(path)
    except (
        ImportError,
        ValueError,
    ) as error:  # a protocol fsspec does not know, or needs a package for
        raise MoeInspectError(f"cannot open {location}: {first_line(error)}") from None
    except OSError as error:
        raise MoeInspectError(f"cannot read {location}: {first_line(error)}") from None


def _kind(path: str) -> str | None:
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return next((k for k in READERS if name.endswith(k)), None)


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".")[0]


def _shown(filesystem: Any, path: str) -> str:
    """The name a source is recorded by: the bundled corpus reads the same wherever it is
    installed."""
    if not _is_local(filesystem):
        return filesystem.unstrip_protocol(path)
    return (
        BUNDLED + str(Path(path).relative_to(CORPUS_DIR))
        if Path(path).is_relative_to(CORPUS_DIR)
        else path
    )


def _located(name: str) -> str:
    return str(CORPUS_DIR / name.removeprefix(BUNDLED)) if name.startswith(BUNDLED) else name


def _is_local(filesystem: Any) -> bool:
    return "file" in (
        (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    )


def _identity(filesystem: Any, path: str) -> tuple[int | None, str]:
    """(size, hash of the content). A remote file is known by what its store says of it, without a
    download."""
    if not _is_local(filesystem):
        return filesystem.size(path), hashlib.sha256(
            str(filesystem.ukey(path)).encode()
        ).hexdigest()
    try:
        with open(path, "rb") as file:
            return Path(path).stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from None


# --- documents


def read_documents(
    source: Source, text_field: str, domain_field: str | None
) -> Iterator[tuple[str, str, int]]:
    """(domain, text, bytes of the file it took) of each document. A .txt is one document; the
    others hold one a row."""
    kind = _kind(source.path)
    if kind == ".txt":
        with _opened(source.path) as file:
            data = file.read()
        yield source.domain, _utf8(data, source.path), len(data)
        return
    wanted = domain_field or DOMAIN_FIELD
    rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[kind or ""]
    for number, (row, size) in enumerate(rows(source, (text_field, wanted)), 1):
        if text_field in row and row[text_field] is None:
            row[text_field] = ""  # counted as an empty document
        if not isinstance(row.get(text_field), str):
            raise MoeInspectError(_no_text(source.path, number, row, text_field))
        if (broken := SURROGATE.search(row[text_field])) is not None:
            raise MoeInspectError(
                f"{source.path} row {number}: character {broken.start()} is half of one (a lone "
                "surrogate)"
            )
        label = row.get(wanted)
        if label is None and domain_field is not None and not source.fixed:
            why = (
                f"field {wanted!r} is null"
                if wanted in row
                else f"no domain field {wanted!r}: its fields are {_fields(row)}"
            )
            raise MoeInspectError(f"{source.path} row {number}: {why}")
        yield source.domain if source.fixed or label is None else str(label), row[text_field], size


def _no_text(path: str, number: int, row: dict[str, Any], text_field: str) -> str:
    if text_field in row:
        return (
            f"{path} row {number}: field {text_field!r} holds {type(row[text_field]).__name__}, "
            "not text"
        )
    return (
        f"{path} row {number}: no text field {text_field!r}: choose one with --text-field from "
        f"{_fields(row)}"
    )


def _fields(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    import fsspec

    try:
        filesystem, place = (
            fsspec.core.url_to_fs(path)
            if "://" in path
            else (fsspec.filesystem("file"), _located(path))
        )
        with filesystem.open(place, "rb", compression="infer") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from None


def _utf8(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MoeInspectError(
            f"{path} is not UTF-8 (byte {error.start}): convert it first"
        ) from None


Row = tuple[dict[str, Any], int]  # the fields, and the bytes of the file the row took


def _json_rows(source: Source, _: tuple[str, ...]) -> Iterator[Row]:
    path = source.path
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(_utf8(line, path))
            except (ValueError, RecursionError) as error:
                raise MoeInspectError(
                    f"{path} line {number} is no JSON: {first_line(error)}"
                ) from None
            if not isinstance(row, dict):
                raise MoeInspectError(
                    f"{path} line {number} is no JSON object but {type(row).__name__}"
                )
            yield row, len(line)


def _csv_rows(source: Source, _: tuple[str, ...]) -> Iterator[Row]:
    path = source.path
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as file:
        try:
            for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline="")):
                yield row, sum(len(str(value).encode()) + 1 for value in row.values())
        except UnicodeDecodeError as error:
            raise MoeInspectError(
                f"{path} is not UTF-8: {error.reason}: convert it first"
            ) from None
        except csv.Error as error:
            raise MoeInspectError(f"{path} is no CSV: {first_line(error)}") from None


def _parquet_rows(source: Source, wanted: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = source.path
    with _opened(path) as file:
        try:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            columns = [c for c in wanted if c in names]
            if wanted[0] not in names:
                raise MoeInspectError(_no_text(path, 1, dict.fromkeys(names), wanted[0]))
            size = (source.bytes or 0) // max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield from ((row, size) for row in batch.to_pylist())
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise MoeInspectError(
                f"{path} is no Parquet file of text: {first_line(error)}"
            ) from None


def interleaved(
    sources: Sequence[Source], text_field: str, domain_field: str | None, stats: CorpusStats
) -> Iterator[tuple[str, str, str]]:
    """(domain, source, text), one document of each domain's files in turn, so that `--max-tokens`
    cuts all domains alike and a forward pass mixes them. Documents of white space alone are left
    out, and counted."""
    streams = {}
    for source in sources:
        streams.setdefault(source.domain, []).append(source)
    turns = [_documents_of(files, text_field, domain_field, stats) for files in streams.values()]
    while turns:
        for turn in list(turns):
            document = next(turn, None)
            if document is None:
                turns.remove(turn)
            elif document[2].strip():
                yield document
            else:
                stats.empty_documents += 1


def _documents_of(
    sources: Sequence[Source], text_field: str, domain_field: str | None, stats: CorpusStats
) -> Iterator[tuple[str, str, str]]:
    for source in sources:
        for domain, text, size in read_documents(source, text_field, domain_field):
            stats.bytes_read += size
            yield domain, source.path, text


# --- tokens


@dataclass(frozen=True)
class Frame:
    """What the tokenizer puts around a text: <s>, </s>, [CLS] …"""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def special_frame(tokenizer: Any) -> Frame:
    """The special tokens that this tokenizer adds, found by asking it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return Frame(tuple(framed[:start]), tuple(framed[start + len(plain) :]))
    raise MoeInspectError(
        "this tokenizer changes a text when it adds special tokens: use --no-special-tokens"
    )


def sequences(
    documents: Iterable[tuple[str, str, str]],
    tokenizer: Any,
    frame: Frame,
    max_length: int,
    max_tokens: int | None,
    stats: CorpusStats,
    generate: bool = False,
    whole: bool = False,
) -> Iterator[Sequence_]:
    """Documents → rows of at most `max_length` tokens, each within `frame`. A longer document is
    several rows; the last row is cut where `max_tokens` is reached. With `generate` a document's
    last row is to be continued: nothing ends it, unless it is fed `whole`, to an encoder."""
    room = max_length - len(frame.before) - len(frame.after)
    if room < 1:
        raise MoeInspectError(
            f"--max-length {max_length} leaves no room for text beside the tokenizer's special "
            "tokens"
        )
    left = max_tokens if max_tokens is not None else sys.maxsize
    document = sequence = 0
    waiting = iter(documents)
    while chunk := list(islice(waiting, TEXTS_A_CALL)):
        encoded = token_ids([text for _, _, text in chunk], tokenizer)
        for (domain, source, _), ids in zip(chunk, encoded, strict=True):
            pieces = [
                np.array([*frame.before, *ids[at : at + room], *frame.after], np.int32)
                for at in range(0, len(ids), room)
            ]
            if generate and not whole and pieces and frame.after:
                pieces[-1] = pieces[-1][: -len(frame.after)]
            pieces = list(_cut(pieces, left))
            total = sum(map(len, pieces))
            if not pieces:  # a text of no tokens
                stats.empty_documents += 1
                continue
            stats.documents += 1
            stats.split_documents += len(pieces) > 1
            stats.tokens += total
            for n, piece in enumerate(pieces):
                continued = generate and n == len(pieces) - 1
                yield Sequence_(
                    document, sequence, domain, source, piece, total, len(pieces), continued
                )
                sequence += 1
            document, left = document + 1, left - total
            if left == 0:
                return


def _cut(pieces: list[np.ndarray], left: int) -> Iterator[np.ndarray]:
    for piece in pieces:
        if left <= 0:
            return
        yield piece[:left]
        left -= len(piece)


def batches(
    rows: Iterable[Sequence_], batch_tokens: int, generate: int = 0
) -> Iterator[list[Sequence_]]:
    """Rows → forward passes of at most `batch_tokens` tokens, padding included (one longer row is a
    batch of its own). Within a window of a few batches rows of like length come together; rows that
    are to be continued by `generate` tokens only with those of the same length, so that no padding
    is decoded."""
    window: list[Sequence_] = []
    size = 0
    for row in rows:
        window.append(row)
        size += len(row.ids)
        if size >= WINDOW_BATCHES * batch_tokens:
            yield from _packed(window, batch_tokens, generate)
            window, size = [], 0
    yield from _packed(window, batch_tokens, generate)


def _packed(window: list[Sequence_], batch_tokens: int, generate: int) -> Iterator[list[Sequence_]]:
    batch: list[Sequence_] = []
    for row in sorted(
        window, key=lambda s: (s.continued, len(s.ids))
    ):  # stable: equal lengths keep their order
        too_long = (len(batch) + 1) * (len(row.ids) + generate * row.continued) > batch_tokens
        apart = batch and (
            row.continued != batch[0].continued
            or (row.continued and len(row.ids) != len(batch[0].ids))
        )
        if batch and (too_long or apart):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def with_documents(
    planned: Iterable[list[Sequence_]],
) -> Iterator[tuple[list[Sequence_], list[Document]]]:
    """Each batch with the documents that it is the first to feed a sequence of."""
    to_come: dict[int, int] = {}  # sequences yet to be fed of the documents under way
    for batch in planned:
        new = []
        for row in batch:
            if row.document not in to_come:
                new.append(Document(row.document, row.domain, row.source, row.document_tokens))
            to_come[row.document] = to_come.get(row.document, row.document_sequences) - 1
            if not to_come[row.document]:
                del to_come[row.document]
        yield batch, new


# --- the plan


@dataclass(frozen=True)
class Plan:
    """The batch plan: what determines it, and the batches."""

    sources: list[Source]
    text_field: str = "text"
    domain_field: str | None = None
    max_tokens: int | None = None
    max_length: int = 2048
    batch_tokens: int = 8192
    special_tokens: bool = True
    generate: int = 0
    encoded: bool = False  # fed to an encoder
    stats: CorpusStats = field(default_factory=CorpusStats)

    def options(self) -> dict[str, Any]:
        keys = (
            "text_field",
            "domain_field",
            "max_tokens",
            "max_length",
            "batch_tokens",
            "special_tokens",
            "generate",
        )
        return {**{k: getattr(self, k) for k in keys}, "sources": [asdict(s) for s in self.sources]}

    def estimated_tokens(self) -> int | None:
        """Tokens of the whole corpus, judged by what has been read of its bytes; None where they do
        not tell."""
        sizes = [s.bytes for s in self.sources if s.bytes and not s.path.endswith(COMPRESSED)]
        if len(sizes) < len(self.sources) or not self.stats.bytes_read:
            return self.max_tokens
        whole = round(self.stats.tokens * max(sum(sizes) / self.stats.bytes_read, 1))
        return whole if self.max_tokens is None else min(whole, self.max_tokens)

    def batches(self, tokenizer: Any) -> Iterator[tuple[list[Sequence_], list[Document]]]:
        documents = interleaved(self.sources, self.text_field, self.domain_field, self.stats)
        frame = special_frame(tokenizer) if self.special_tokens else Frame()
        rows = sequences(
            documents,
            tokenizer,
            frame,
            self.max_length,
            self.max_tokens,
            self.stats,
            self.generate > 0,
            self.encoded,
        )
        return with_documents(batches(rows, self.batch_tokens, self.generate))

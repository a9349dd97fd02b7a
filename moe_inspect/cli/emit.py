"""A DataFrame to stdout or a file, in one of four formats."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    import pandas as pd


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


ENDINGS = {".csv": Format.csv, ".json": Format.json, ".jsonl": Format.json, ".parquet": Format.parquet}
TEXT = ("", ".txt", ".md")


def format_of(output: Path | None) -> Format | None:
    """The format that a file's ending asks for: text for stdout and .txt; None where an ending says nothing."""
    ending = output.suffix.lower() if output else ""
    return Format.table if ending in TEXT else ENDINGS.get(ending)


def emit(frame: pd.DataFrame, form: Format, output: Path | None) -> None:
    """Writes a table to `output`, or to stdout."""
    if form is Format.table:
        from moe_inspect.report.terminal import print_table

        with text_to(output) as file:
            left_out = print_table(frame, file)
        if left_out:
            print(f"{left_out:,} more rows: --format csv, json or parquet has them all", file=sys.stderr)
        return
    if form is Format.parquet and output is None and sys.stdout.isatty():
        raise MoeInspectError("parquet is no text: give -o FILE, or send it into a pipe")
    write = {Format.csv: _csv, Format.json: _json, Format.parquet: _parquet}[form]
    if output is None:
        with quiet_pipe():
            write(frame, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    with _writable(output), open(output, "wb") as file:
        write(frame, file)


@contextlib.contextmanager
def text_to(output: Path | None) -> Iterator[TextIO]:
    """Where text goes: a file, or stdout."""
    if output is None:
        with quiet_pipe():
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="replace")  # a token in a script that the terminal's encoding lacks
            yield sys.stdout
            sys.stdout.flush()
        return
    with _writable(output), open(output, "w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """`| head` has seen enough: no traceback, and nothing is wrong."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered must not raise at exit
        raise SystemExit(0) from None


@contextlib.contextmanager
def _writable(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MoeInspectError(f"cannot write {output}: {error.strerror or error}") from None


def _csv(frame: pd.DataFrame, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    frame.to_csv(text, index=False, lineterminator="\n")
    text.detach()


def _json(frame: pd.DataFrame, file: BinaryIO) -> None:
    # not pandas' to_json: it rounds
    names = [str(name) for name in frame.columns]
    columns = [_plain(frame[name]) for name in frame.columns]
    for row in zip(*columns, strict=True):
        file.write((json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, allow_nan=False) + "\n").encode())


def _plain(column: Any) -> list[object]:
    """Python values, None where there is none."""
    missing = column.isna().to_numpy()
    return [None if gone else value for value, gone in zip(column.tolist(), missing, strict=True)]


def _parquet(frame: pd.DataFrame, file: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()  # a pipe cannot tell its position
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), buffer, compression="zstd")
    file.write(buffer.getvalue())

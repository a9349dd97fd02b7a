"""A table to stdout or a file, in one of four formats."""

# pyright: standard
# (strict elsewhere in this folder: pyarrow has no types)
from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import abandon, first_line, is_missing, plural, print_stderr, safe_cell


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


ENDINGS = {
    **dict.fromkeys(("", ".txt", ".md"), Format.table),
    ".csv": Format.csv,
    ".json": Format.json,
    ".jsonl": Format.json,
    ".parquet": Format.parquet,
}
ROWS = 10_000  # that are turned to text at once


def format_of(output: Path | None) -> Format | None:
    """The format of a file by its ending: text for stdout and .txt; None for an unknown ending."""
    return ENDINGS.get(output.suffix.lower() if output else "")


def emit(table: Any, form: Format, output: Path | None) -> None:
    """Writes a table to `output`, or to stdout. In csv, text that a spreadsheet would run as a
    formula gets an apostrophe in front. Raises MoeInspectError where it cannot be written."""
    if form is Format.table:
        from moe_inspect.reporting.render.console import print_table

        with text_to(output) as file:
            left_out = print_table(table, file)
        if left_out:
            print_stderr(f"{left_out:,} more rows: --format csv, json or parquet has them all")
        return
    if form is Format.parquet and output is None and sys.stdout.isatty():
        raise MoeInspectError("parquet is binary: give -o FILE, or redirect it into a pipe")
    write = {Format.csv: _csv, Format.json: _json, Format.parquet: _parquet}
    with text_to(output) as file:
        write[form](table, file.buffer)


@contextlib.contextmanager
def text_to(output: Path | None) -> Iterator[TextIO]:
    """A text stream to a file, or to stdout."""
    if output is None:
        with to_stdout():
            yield sys.stdout
        return
    from moe_inspect.trace.output_dir import output_file

    with output_file(output) as draft, open(draft, "w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def to_stdout() -> Iterator[None]:
    """Around code that writes to stdout. A reader that closes the pipe (`| head`) is no error; a
    full disk or a closed stdout is a MoeInspectError."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        abandon(sys.stdout)
        raise SystemExit(0) from None
    except OSError as error:
        if error.filename is not None:  # another file's
            raise
        abandon(sys.stdout)
        raise MoeInspectError(f"cannot write to stdout: {first_line(error)}") from error


def _csv(table: Any, file: BinaryIO) -> None:
    # the csv module does not quote a carriage return, and readers end the row there
    blocks = range(0, max([0, *(len(table[name]) for name in table)]), ROWS)
    others = [table[name] for name in table if table[name].dtype.kind not in "iufb"]
    texts = (column[first : first + ROWS].tolist() for column in others for first in blocks)
    returns = any(isinstance(text, str) and "\r" in text for part in texts for text in part)
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    rows = csv.writer(text, lineterminator="\n", quoting=quoting)
    try:
        rows.writerow(table)
        for first in blocks:
            columns = [_cells(table[name][first : first + ROWS]) for name in table]
            rows.writerows(zip(*columns, strict=True))
    finally:
        text.detach()


def _cells(column: Any) -> list[Any]:
    """The values of a column, "" where one is missing."""
    import numpy as np

    values = ["" if is_missing(value) else value for value in column.tolist()]
    if column.dtype == "float32":  # its digits, not those of the nearest float64
        return [value if value == "" else np.float32(value) for value in values]
    return [safe_cell(v) if isinstance(v, str) else v for v in values]


def _json(table: Any, file: BinaryIO) -> None:
    """A line per row. JSON has no infinities: they are null, which stderr says."""
    names = [str(name) for name in table]
    columns = [_plain(name, table[name].tolist()) for name in table]
    for row in zip(*columns, strict=True):
        cells = dict(zip(names, row, strict=True))
        file.write(f"{json.dumps(cells, ensure_ascii=False, allow_nan=False)}\n".encode())


def _plain(name: str, values: list[object]) -> list[object]:
    """The values, None where one is missing or infinite."""
    infinite = [isinstance(value, float) and math.isinf(value) for value in values]
    if endless := sum(infinite):
        print_stderr(
            f"{name}: {plural(endless, 'infinite value')} written as null, as JSON has "
            "none: --format csv or parquet keeps them"
        )
    known = zip(values, infinite, strict=True)
    return [None if gone or is_missing(value) else value for value, gone in known]


def _parquet(table: Any, file: BinaryIO) -> None:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moe_inspect.reporting.tables.registry import as_frame

    buffer = io.BytesIO()  # a pipe has no position
    frame = table if isinstance(table, pd.DataFrame) else as_frame(table)
    whole = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(whole, buffer, compression="zstd")
    file.write(buffer.getvalue())

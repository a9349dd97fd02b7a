"""A DataFrame to stdout or a file, in one of four formats."""

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
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import abandon, first_line, plural, print_stderr, safe_cell

if TYPE_CHECKING:
    import pandas as pd


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


ENDINGS = {
    ".csv": Format.csv,
    ".json": Format.json,
    ".jsonl": Format.json,
    ".parquet": Format.parquet,
}
TEXT = ("", ".txt", ".md")


def format_of(output: Path | None) -> Format | None:
    """The format of a file by its ending: text for stdout and .txt; None for an unknown ending."""
    ending = output.suffix.lower() if output else ""
    return Format.table if ending in TEXT else ENDINGS.get(ending)


def emit(frame: pd.DataFrame, form: Format, output: Path | None, safe_csv: bool = False) -> None:
    """Writes a table to `output`, or to stdout. `safe_csv`: text that a spreadsheet would run as a
    formula gets an apostrophe in front. Raises MoeInspectError where it cannot be written."""
    if form is Format.table:
        from moe_inspect.reporting.render.console import print_table

        with text_to(output) as file:
            left_out = print_table(frame, file)
        if left_out:
            print_stderr(f"{left_out:,} more rows: --format csv, json or parquet has them all")
        return
    if form is Format.parquet and output is None and sys.stdout.isatty():
        raise MoeInspectError("parquet is binary: give -o FILE, or redirect it into a pipe")
    write = {Format.csv: _csv, Format.json: _json, Format.parquet: _parquet}[form]
    if form is Format.csv and safe_csv:
        frame = _without_formulas(frame)
    if output is None:
        with to_stdout():
            write(frame, sys.stdout.buffer)
        return
    from moe_inspect.trace.output_dir import output_file

    with output_file(output) as draft, open(draft, "wb") as file:
        write(frame, file)


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


def _texts(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """The values of the columns that are not numeric."""
    return {
        name: frame[name].tolist() for name in frame.columns if frame[name].dtype.kind not in "iufb"
    }


def _without_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(
        **{
            name: [safe_cell(v) if isinstance(v, str) else v for v in values]
            for name, values in _texts(frame).items()
        }
    )


def _csv(frame: pd.DataFrame, file: BinaryIO) -> None:
    # pandas does not quote a carriage return, and readers end the row there
    returns = any(
        "\r" in value
        for values in _texts(frame).values()
        for value in values
        if isinstance(value, str)
    )
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    try:
        frame.to_csv(
            text,
            index=False,
            lineterminator="\n",
            quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL,
        )
    finally:
        text.detach()


def _json(frame: pd.DataFrame, file: BinaryIO) -> None:
    """A line per row. JSON has no infinities: they are null, which stderr says."""
    # not pandas' to_json: it rounds
    names = [str(name) for name in frame.columns]
    columns = [_plain(frame[name]) for name in frame.columns]
    for row in zip(*columns, strict=True):
        file.write(
            (
                json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, allow_nan=False)
                + "\n"
            ).encode()
        )


def _plain(column: Any) -> list[object]:
    """Python values, None where a value is missing or infinite."""
    missing, values = column.isna().to_numpy(), column.tolist()
    infinite = [isinstance(value, float) and math.isinf(value) for value in values]
    if endless := sum(infinite):
        print_stderr(
            f"{column.name}: {plural(endless, 'infinite value')} written as null, as JSON has "
            "none: --format csv or parquet keeps them"
        )
    gone = missing | infinite
    return [None if none else value for value, none in zip(values, gone, strict=True)]


def _parquet(frame: pd.DataFrame, file: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()  # a pipe has no position
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), buffer, compression="zstd")
    file.write(buffer.getvalue())

"""Tables in files, some rows at a time: CSV, TSV, Parquet, JSON and lines of JSON, each also
compressed by gzip or zstd. N rows, K experts of a decision."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import next_line
from moe_inspect.importers.context import CODECS, ImportContext, ImportSource
from moe_inspect.importers.tables.presets import OWN, Preset, mapped_rows, pattern
from moe_inspect.importers.values import Fields, Json
from moe_inspect.text import first_line, join_first, plural

pc: Any = pyarrow.compute  # its functions are made when it is imported: type checkers see few
ROWS = 2**16  # of a chunk
MOST_PREAMBLE = 2**20  # of a line of comments before a table
Column = Any  # pa.Array or pa.ChunkedArray, whose methods pyarrow's types do not know
Rows = list[Fields]
KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
BAD = (pa.ArrowException, UnicodeError, OverflowError, TypeError)  # of values no column holds


@dataclass(frozen=True)
class TableChunk:
    """Rows of a file. table: by our columns, of any type; names: the file's; said: what the file's
    name and head say; first: the number of the first row; lines: of each row, in lines of JSON."""

    path: Path
    source: ImportSource
    table: pa.Table
    preset: Preset
    names: list[str]
    said: dict[str, str]
    first: int
    lines: list[int]

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, name: str) -> bool:
        return name in self.table.column_names

    def error(self, row: int, name: str, why: str, slot: int = 0) -> MoeInspectError:
        """slot: which of the file's columns, where a list is in several."""
        places = {} if self.preset.map is OWN else self.preset.map
        called = name if name in self.said else places.get(name, name).removesuffix("?")
        with suppress(MoeInspectError):  # a map of JSON, whose rows have our names
            theirs = _located(self.names, self.preset, self.path)[0].get(name, [called])
            called = theirs[slot if len(theirs) > 1 else 0]
        called = name if called.isdigit() else called
        place = f"line {self.lines[row]}" if self.lines else f"row {self.first + row}"
        return MoeInspectError(f"{self.path} {place}: {called} {why}")

    def refuse(self, wrong: np.ndarray, name: str, why: Callable[[int], str]) -> None:
        """MoeInspectError at the first value that is wrong, bool [N] or [N, K]; `why` is given its
        place among all of them."""
        if wrong.any():
            n = int(wrong.argmax())
            row, slot = divmod(n, wrong.size // len(wrong))
            raise self.error(row, name, why(n), slot)

    def lacks(self, name: str) -> MoeInspectError:
        has = _listed(self.names, self.preset, self.path)
        return MoeInspectError(f"{self.path} has no column {name}: it has {has}")

    def numbers(
        self,
        name: str,
        low: float,
        high: float,
        empty: float | None = None,
        needed_N: np.ndarray | None = None,
        *,
        real: bool = False,
    ) -> np.ndarray:
        """int64 or float64 [N] from `low` to `high`. empty: what no value is, where that may be;
        needed_N: where it may not."""
        column = self._cast(name, self.table[name], pa.float64() if real else pa.int64())
        missing_N = pc.is_null(column, nan_is_null=True).to_numpy()
        needed = needed_N if needed_N is not None else empty is None
        self.refuse(missing_N & needed, name, lambda row: _missing(column[row], low))
        values_N = column.fill_null(empty or 0).to_numpy()
        return self._within(name, values_N, low, high, ~missing_N)

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """Distinct texts in the order of their first rows, and the index of each row's text. A
        missing text is "", which is an error for a document."""
        texts = self._cast(name, self.table[name], pa.string()).fill_null("")
        if name == "document" and (row := texts.index("").as_py()) >= 0:
            raise self.error(row, name, "is empty")
        encoded = texts.combine_chunks().dictionary_encode()
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def lists(
        self, name: str, low: float, high: float, K: int = 0, *, real: bool = False
    ) -> np.ndarray:
        """int64 or float64 [N, K] from `low` to `high`. A missing float is NaN. A number is a list
        of one."""
        column = texts = self.table[name].combine_chunks()
        # text: a list as JSON or Python writes it, or numbers separated by spaces
        if _is_text(column.type) and name not in ("expert", "weight"):
            for begin, end in ("[]", "()"):
                opened, closed = (pc.count_substring(column, of) for of in (begin, end))
                cut_N = pc.not_equal(opened, closed).fill_null(False).to_numpy(False)
                self.refuse(
                    cut_N, name, lambda n: f"is {texts[n].as_py()[:40]!r}, a list cut short"
                )
            edges = r"^[\s(\[]+|\s*,?[\s)\]]*[)\]]\s*$|\s+$"
            bare = pc.replace_substring_regex(column, edges, "")
            bare = pc.if_else(pc.equal(bare, ""), pa.scalar(None, bare.type), bare)
            bare = pc.replace_substring(bare, ", ", ",")
            if pc.any(pc.match_substring_regex(bare, r"\s")).as_py():
                column = pc.split_pattern_regex(bare, r"\s*,\s*|\s+")
            else:  # ten times as fast
                column = pc.split_pattern(bare, ",")
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            return self.numbers(name, low, high, np.nan if real else None, real=real)[:, None]
        length_N = pc.list_value_length(column).fill_null(0).to_numpy(False)
        K = K or int(length_N[0])
        first = f", not {K}, as the first row" * bool(K)
        wrong_N = (length_N != K) | (length_N == 0)
        self.refuse(wrong_N, name, lambda n: f"has {plural(int(length_N[n]), 'value')}{first}")
        flat = self._cast(name, column.flatten(), pa.float64() if real else pa.int64(), K)
        if not real:
            null_NK = flat.is_null().to_numpy(False).reshape(-1, K)
            self.refuse(null_NK, name, lambda n: _missing(flat[n], low))
        values_NK = flat.fill_null(np.nan if real else -1).to_numpy(False).reshape(-1, K)
        return self._within(name, values_NK, low, high, ~np.isnan(values_NK))

    def _within(
        self, name: str, values: np.ndarray, low: float, high: float, known: np.ndarray
    ) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            wrong = ~((values >= low) & (values <= high)) & known
        self.refuse(wrong, name, lambda n: f"is {values.flat[n]}, not of {low} to {high:,}")
        return values

    def _cast(self, name: str, column: Column, kind: pa.DataType, each: int = 1) -> Column:
        """each: values of a row."""
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        is_text = _is_text(column.type)
        if kind == pa.string() and not is_text and not pa.types.is_null(column.type):
            return column.cast(kind)
        if is_text and kind != pa.string():
            with suppress(pa.ArrowException):  # nothing to trim, as a rule
                return column.cast(kind)
            column = pc.utf8_trim_whitespace(column)
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
        for through in (kind, pa.float64()):
            try:
                return column.cast(through).cast(kind)
            except pa.ArrowException:
                continue
        for n, value in enumerate(column.to_pylist()):  # which is it?
            try:
                pa.scalar(value).cast(pa.float64()).cast(kind)
            except BAD:
                what = "number" if kind == pa.float64() else "whole number"
                why = f"is {str(value)[:40]!r}, not a {what}"
                raise self.error(n // each, name, why, n % each) from None
        raise self.error(0, name, f"is not of {kind}")


def _missing(value: pa.Scalar, low: float) -> str:
    hint = "; write -1 where there is none" * (low == -1)
    return f"is {'nan' if value.is_valid else 'empty'}{hint}"


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def chunks_of(context: ImportContext, preset: Preset) -> Iterator[TableChunk]:
    """The rows of all files, in order."""
    ends = [one.rpartition("/")[2] for one in preset.file.split("|")]
    names = "|".join(pattern(end, "[^/]", named=False).pattern for end in ends)
    for path, source in context.files(rf"(?:{names})(?:\.gz|\.zst)?", ", ".join(ends)):
        of_name = preset.said_by(path) or {}
        with uncompressed(path) as file:
            head, skipped = _head(file, preset)
            said, first = of_name | head, 0
            beside = preset.constants | {n: t for n, t in said.items() if n != "domain"}
            for table, names, lines in _tables(context, file, path, preset, skipped):
                for name in table.column_names:  # what may be missing, and has no value
                    optional = preset.map.get(name, "").endswith("?")
                    if optional and table[name].null_count == len(table):
                        table = table.drop_columns(name)
                if not table.column_names:
                    has = _listed(names, preset, path)
                    raise MoeInspectError(f"{path} holds no decisions or counts: it has {has}")
                for name in beside.keys() - {*table.column_names}:
                    value = pa.repeat(pa.scalar(beside[name], pa.string()), len(table))
                    table = table.append_column(name, value)
                if len(table):
                    yield TableChunk(path, source, table, preset, names, said, first, lines)
                first += len(table)
            if not first:
                raise MoeInspectError(f"{path} holds no decisions or counts: it has no rows")


@contextmanager
def uncompressed(path: Path) -> Iterator[Path]:
    """The file; where its name ends in .gz or .zst a copy that is there meanwhile."""
    if path.suffix not in CODECS:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="moe-inspect-") as folder:
        copy = Path(folder) / path.stem
        try:
            raw = pa.OSFile(os.fsencode(path))
            with pa.CompressedInputStream(raw, CODECS[path.suffix]) as it, open(copy, "wb") as out:
                shutil.copyfileobj(it, out)
            yield copy
        except (OSError, pa.ArrowException) as error:
            raise MoeInspectError(f"{path}: {first_line(error)}") from None
        except MoeInspectError as error:
            raise MoeInspectError(str(error).replace(str(copy), str(path))) from None


def _head(path: Path, preset: Preset) -> tuple[dict[str, str], int]:
    """What lines of comments before a table say, and how many there are."""
    said: dict[str, str] = {}
    skipped = 0
    if preset.head:
        with open(path, "rb") as file:
            while (line := file.readline(MOST_PREAMBLE)).startswith(b"#"):
                found = pattern(preset.head).fullmatch(line.decode("utf-8", "replace").strip())
                said |= found.groupdict() if found else {}
                skipped += 1
    return said, skipped


def _tables(
    context: ImportContext, file: Path, path: Path, preset: Preset, skipped: int
) -> Iterator[tuple[pa.Table, list[str], list[int]]]:
    """Tables with our columns, the names of the file's, and the line of each row, in lines of JSON.
    path: as the user gave it."""
    kind = file.suffix if file.suffix in KINDS else Path(preset.file.split("|")[0]).suffix
    try:
        if kind == ".parquet":
            with open(file, "rb") as opened, pq.ParquetFile(opened) as parquet:
                names = parquet.schema_arrow.names
                places, wanted = _located(names, preset, path)
                for batch in parquet.iter_batches(ROWS, columns=wanted, use_threads=False):
                    yield _renamed(pa.table(batch), places), names, []
        elif kind in (".json", ".jsonl"):
            own = preset.map is OWN
            found = _json(context, file, None if own else preset.map)
            every = ((line, row) for line, rows in found for row in rows)
            while part := list(islice(every, ROWS)):
                lines, rows = [line for line, _ in part if line], [row for _, row in part]
                names = [*dict.fromkeys(name for row in rows for name in row)]
                table = pa.table({name: _array([row.get(name) for row in rows]) for name in names})
                table = _renamed(table, _located(names, preset, path)[0]) if own else table
                yield table, names, lines
        else:
            for table, names in _csv(file, path, preset, "\t" if kind == ".tsv" else ",", skipped):
                yield table, names, []
    except BAD as error:
        where, what = str(file), first_line(error)
        found = re.match(r"CSV parse error: Row #(\d+): ", what)
        if found:  # the header is a row of these
            where, what = f"{file} row {int(found[1]) - skipped - 2}", what[found.end() :]
        raise MoeInspectError(f"{where}: {what}") from None
    if kind not in (".json", ".jsonl"):
        context.read(path.stat().st_size)


def _csv(
    file: Path, path: Path, preset: Preset, delimiter: str, skipped: int
) -> Iterator[tuple[pa.Table, list[str]]]:
    with open(file, "rb") as opened:
        first = [opened.readline(MOST_PREAMBLE) for _ in range(skipped + 1)][-1]
    header = first.decode("utf-8", "replace").strip('\ufeff\r\n" ')
    if delimiter not in header and not _located([header], preset, path)[1]:
        yield pa.table({}), [header]  # other characters are between the columns, perhaps
        return
    read = pyarrow.csv.ReadOptions(skip_rows=skipped, use_threads=False)  # errors name the row
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # not a file of Python's: Arrow's thread, which reads ahead, would call Python while it exits,
    # and abort the process
    with pa.OSFile(os.fsencode(file)) as opened:
        names = pyarrow.csv.open_csv(opened, read, parse).schema.names
    places, wanted = _located(names, preset, path)
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted
    )
    with (
        pa.OSFile(os.fsencode(file)) as opened,
        pyarrow.csv.open_csv(opened, read, parse, convert) as reader,
    ):
        for batch in reader:
            yield _renamed(pa.table(batch), places), names


def _located(
    names: list[str], preset: Preset, path: Path
) -> tuple[dict[str, list[str]], list[str]]:
    """Our column → the table's, several where it is a pattern of columns; and all of those."""
    found: dict[str, list[str]] = {}
    for name, place in preset.map.items():
        if name in preset.constants:
            continue
        for one in place.removesuffix("?").split("|"):
            if match := [one] * names.count(one) or fnmatch.filter(names, one):
                found[name] = match if one in names else sorted(match, key=_number)
                if len({*match}) != len(match):
                    raise MoeInspectError(f"{path} has several columns {one}")
                break
        else:
            if not place.endswith("?"):
                has = _listed(names, preset, path)
                raise MoeInspectError(f"{path} has no column {place}: it has {has}")
    return found, [*dict.fromkeys(chain.from_iterable(found.values()))]


def _listed(names: list[str], preset: Preset, path: Path) -> str:
    """The names of a file's columns, and what to write where they are nearly ours."""
    said = join_first(names) or "no columns"
    plain = path.with_suffix("") if path.suffix in CODECS else path
    wanted = {".csv": ",", ".tsv": "a tab"}.get(plain.suffix)
    if wanted and len(names) == 1 and (other := re.search(r"[;,\t|]", names[0])):
        between = "tabs" if other[0] == "\t" else other[0]
        return f"{names[0][:60]!r}, columns with {between} between them: write {wanted}"
    ours = {name.strip().lower(): name for name in names}
    if preset.map is not OWN or [*ours] == names:
        return said
    places = _located([*ours], preset, path)[0]
    map = ",".join(
        f"{name}={ours[theirs[0]].rstrip('0123456789') + '*' if theirs[1:] else ours[theirs[0]]}"
        for name, theirs in places.items()
    )
    return f"{said}; write --map {shlex.quote(map)}" if map else said


def _number(name: str) -> tuple[int, str]:
    digits = re.search(r"\d+$", name)
    return int(digits[0][:9]) if digits else -1, name


def _renamed(table: pa.Table, places: dict[str, list[str]]) -> pa.Table:
    columns = {name: table[theirs[0]] for name, theirs in places.items()}
    for name in ("experts", "weights"):
        if len(theirs := places.get(name, ())) > 1:
            columns[name] = _lists([table[one].combine_chunks() for one in theirs])
    renamed = pa.table(columns)
    renamed.validate(full=True)
    return renamed


def _lists(columns: list[Column]) -> pa.Array:
    """A list per row of the values of several columns."""
    K, N = len(columns), len(columns[0])
    kind = columns[0].type
    if pa.types.is_dictionary(kind) or any(column.type != kind for column in columns):
        columns = [column.cast(pa.string()) for column in columns]
    by_row = np.arange(K * N).reshape(K, N).T.reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.concat_arrays(columns).take(by_row), K)


def _json(
    context: ImportContext, path: Path, by_map: dict[str, str] | None
) -> Iterator[tuple[int, Rows]]:
    """The number and the rows of each line; or 0 and the rows of the whole."""
    if path.suffix == ".jsonl" or _has_lines(path):
        yield from context.prepared(path, partial(_of_line, by_map))
        return
    value = context.json(path)
    if by_map is not None:
        yield 0, mapped_rows(by_map, str(path), value)
    elif isinstance(value, list) and all(isinstance(row, dict) for row in value):
        yield 0, value
    elif isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        if len({*map(len, value.values())}) > 1:
            raise MoeInspectError(f"{path} has columns of different lengths")
        yield 0, [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    elif isinstance(value, dict):
        yield 0, [value]
    else:
        why = "is not a list of objects with layer, expert and count"
        raise MoeInspectError(f"{path} {why}: {json.dumps(value)[:40]}")


def _of_line(by_map: dict[str, str] | None, where: str, fields: Fields) -> tuple[int, Rows]:
    rows = [fields] if by_map is None else mapped_rows(by_map, where, fields)
    return int(where.rpartition(" ")[2]), rows


def _has_lines(path: Path) -> bool:
    """Whether a .json has an object on its first line, and more lines."""
    with open(path, "rb") as file:
        line = next_line(file)
        if line is None or not line.lstrip().startswith(b"{") or not file.read(1):
            return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _array(values: list[Json]) -> pa.Array:
    try:
        return pa.array(values)
    except BAD:  # of several types: looked at one by one
        text = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        return pa.array(text, pa.string())

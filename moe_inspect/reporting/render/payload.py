"""What the scripts of a page read: charts and tables as JSON, compressed.

R rows, C columns of a heatmap.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.reporting.charts.spec import Axis, Heatmap, Mark, Panel, Scale
from moe_inspect.text import number, readable

MOST_ROWS = 100  # of a table in the text of the page
SORTED_ROWS = 5_000  # of a table that can be sorted and downloaded
LAST_CODE = 65535  # the 16-bit code of a heatmap's cell without a value
Json = dict[str, object]  # that `packed` can write


def packed(value: object) -> str:
    """JSON in gzip in base64: a third of the size, and no character with a meaning in HTML."""
    separators = (",", ":")
    text = json.dumps(
        value, default=without_numpy, ensure_ascii=False, allow_nan=False, separators=separators
    )
    # mostly numbers: half the time of level 6 for 3 % more bytes; 31: in the format of gzip
    gzip = zlib.compressobj(5, zlib.DEFLATED, 31, strategy=zlib.Z_FILTERED)
    compressed = gzip.compress(text.encode(errors="backslashreplace")) + gzip.flush()
    return base64.b64encode(compressed).decode()


def without_numpy(value: Any) -> object:
    """NumPy arrays and scalars as lists and numbers of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} has no JSON")


def rows_of(frame: pd.DataFrame) -> Json:
    """A table as the template takes it: at most MOST_ROWS rows."""
    shown = frame.head(MOST_ROWS)
    numeric = [kind.kind in "iuf" for kind in frame.dtypes]
    return {
        "columns": list(zip(map(str, frame.columns), numeric, strict=True)),
        "rows": [
            list(zip(map(number, row), numeric, strict=True))
            for row in shown.itertuples(index=False, name=None)
        ],
        "more": len(frame) - len(shown),
    }


def table_json(frame: pd.DataFrame, most: int = SORTED_ROWS) -> Json:
    """A table as tables.js takes it: its first `most` rows by column, and how many there are.
    Numbers are exact; None where there is none; infinity is "inf"."""
    shown, kinds = frame.head(most), [kind.kind for kind in frame.dtypes]
    return {
        "columns": [str(name) for name in shown.columns],
        "numeric": [kind in "iuf" for kind in kinds],
        "real": [kind == "f" for kind in kinds],
        "values": [_values(shown.iloc[:, i]) for i in range(len(kinds))],
        "rows": len(frame),
    }


def _values(column: pd.Series) -> list[object]:
    # (the nullable types of pandas have kinds too, and give integers as floats)
    if not isinstance(column.dtype, np.dtype) or column.dtype.kind not in "iubf":
        return [_plain(value) for value in column]
    found: list[object] = column.tolist()
    for i in np.flatnonzero(~np.isfinite(column)).tolist():
        found[i] = _plain(found[i])
    return found


def _plain(value: Any) -> object:
    plain = value.item() if hasattr(value, "item") else value
    if plain is None or str(plain) == "<NA>" or plain != plain:
        return None
    if isinstance(plain, float) and not np.isfinite(plain):
        return str(plain)
    return plain if isinstance(plain, bool | int | float) else str(plain)


def panel_json(panel: Panel) -> Json:
    """A panel as chart.js takes it."""
    marks = [_mark(mark) for mark in panel.marks]
    return {"x": _axis(panel.x), "y": _axis(panel.y), "marks": marks}


def scale_json(scale: Scale) -> Json:
    """A scale as chart.js takes it."""
    return {**vars(scale), "stops": scale.stops(), "ticks": scale.ticks()}


def _axis(axis: Axis) -> Json:
    return {**vars(axis), "labels": [readable(label) for label in axis.labels]}


def _mark(mark: Mark) -> Json:
    drawn: Json = {"kind": type(mark).__name__.lower()}
    if not isinstance(mark, Heatmap):
        fields: dict[str, np.ndarray | str | float | None] = vars(mark)
        return drawn | {
            k: numbers(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()
        }
    R, C = mark.values.shape
    drawn |= {"rows": R, "columns": C, "scale": scale_json(mark.scale)}
    for key, texts_RC in (("cells", mark.cells), ("notes", mark.notes)):
        drawn[key] = None if texts_RC is None else texts_RC.ravel().tolist()
    return drawn | _coded(mark.values)


def _coded(values_RC: np.ndarray) -> Json:
    """Values as 16-bit codes on a linear scale from the smallest to the largest; the last code is
    no value. A third of the size of decimals, and precise enough for a picture."""
    known_RC = np.isfinite(values_RC)
    low, high = 0.0, 1.0
    if known_RC.any():
        low, high = float(values_RC[known_RC].min()), float(values_RC[known_RC].max())
    share_RC = (np.where(known_RC, values_RC, low) - low) / ((high - low) or 1.0)
    codes_RC = np.where(known_RC, np.rint(share_RC * (LAST_CODE - 1)), LAST_CODE)
    text = base64.b64encode(codes_RC.astype("<u2").tobytes()).decode()
    return {"low": low, "high": high, "values": text}


def numbers(values: np.ndarray) -> list[float | None]:
    """Values for JSON: five digits, None for NaN."""
    values = np.asarray(values, float)
    known = np.isfinite(values)
    size = np.where(known & (values != 0), np.abs(values), 1.0)
    unit = 10.0 ** (4 - np.floor(np.log10(size)))
    rounded = np.empty(values.shape, object)
    rounded[known] = (np.rint(values * unit) / unit)[known].tolist()
    return rounded.tolist()

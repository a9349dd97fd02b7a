"""Values of a source file, checked: JSON, integers in a range, arrays of them. `where` is the file
and the field, for the error."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line


def parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MoeInspectError(f"{where} is not JSON: {first_line(error)}") from None


def parsed_object(data: bytes, where: str) -> dict[str, Any]:
    value = parsed(data, where)
    if not isinstance(value, dict):
        raise MoeInspectError(f"{where} is {str(value)[:40]!r}, not an object")
    return value


def integer(value: Any, where: str, low: int = 0, high: int = 2**31 - 1) -> int:
    """`value`, if it is an integer of that range. `where`: file and field, for the error."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MoeInspectError(
            f"{where} is {str(value)[:60]!r}, not a number from {low:,} to {high:,}"
        )
    return value


def integers(
    values: Any,
    where: str,
    shape: tuple[int | None, ...] = (None,),
    low: int = 0,
    high: int = 2**31 - 1,
) -> np.ndarray:
    """int64 array of nested lists of integers of that range. None in `shape`: any length."""
    try:
        array = np.array(values) if isinstance(values, list) else None
    except (ValueError, OverflowError, RecursionError):  # ragged
        array = None
    if array is not None and not array.size and all(extent in (None, 0) for extent in shape[:1]):
        array = np.zeros([extent or 0 for extent in shape], np.int64)
    if array is None or array.dtype.kind not in "iu" or len(array.shape) != len(shape):
        raise MoeInspectError(
            f"{where} is not a {len(shape)}-dimensional list of integers: {str(values)[:40]!r}"
        )
    if any(wanted not in (None, found) for wanted, found in zip(shape, array.shape, strict=True)):
        raise MoeInspectError(
            f"{where} has shape {list(array.shape)}, not "
            f"{[w if w is not None else 'any' for w in shape]}"
        )
    check_range(array, where, low, high)
    return array.astype(np.int64, copy=False)


def check_range(array: np.ndarray, where: str, low: int, high: int) -> None:
    """MoeInspectError where an integer array holds a value below `low` or above `high`."""
    if array.size and not (low <= int(array.min()) and int(array.max()) <= high):
        wrong = array[(array < low) | (array > high)].reshape(-1)[0]
        raise MoeInspectError(f"{where} holds {int(wrong)}, not of {low:,} to {high:,}")

"""Of what `make test` runs a sample, and SWEEP=whole (`make test-all`) everything."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
WHOLE = os.environ.get("SWEEP") == "whole"


def sample(of: Iterable[T], every: int) -> list[T]:
    """Every n-th, and the last; all of them where the sweep is whole."""
    everything = list(of)
    return everything if WHOLE else [*everything[:-1:every], everything[-1]]

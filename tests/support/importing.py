"""An import, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.making import import_trace
from moe_inspect.public import Trace


def taken(root: Path, format: str, *sources: str | Path, **how: Any) -> tuple[Trace, list[str]]:
    """The trace at root / "t", and the warnings."""
    said: list[str] = []
    return import_trace(format, list(sources), root / "t", **{"warn": said.append, **how}), said


def refused(root: Path, why: str, format: str, *sources: str | Path, **how: Any) -> None:
    """The import ends in one line that `why`, a pattern, is found in, and leaves nothing."""
    with pytest.raises(MoeInspectError, match=why) as raised:
        taken(root, format, *sources, **how)
    assert "\n" not in str(raised.value)
    assert not (root / "t").exists()


def decisions(trace: Trace, router: int) -> np.ndarray:
    """The experts [T, K] of a router."""
    table = trace.routing(router=router)
    return table[[name for name in table if name.startswith("expert_")]].to_numpy()


def loads(trace: Trace, column: str = "assignments") -> np.ndarray:
    """Of a trace of counts, by router and expert."""
    table = trace.counts().groupby(["router", "expert"])[column].sum()
    return table.to_numpy().reshape(len(trace.routers), -1)

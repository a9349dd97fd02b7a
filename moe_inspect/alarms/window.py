"""What the routers of a model did over a few steps.

R routers, E experts, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_inspect.trace.schema import Router


@dataclass(frozen=True)
class Window:
    """Consecutive optimizer steps (or forward passes) `first` to `last`. `load`: assignments of
    each router's experts, int64 [E] each; `tokens_R`: tokens each router saw. `values`: what the
    load does not tell, by metric, float [R]; NaN where a router has no such value. `recent`: the
    loads of the last steps, int64 [S, E] of each router, where they are known."""

    first: int
    last: int
    load: Sequence[np.ndarray]
    tokens_R: np.ndarray
    values: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    recent: Sequence[np.ndarray] = ()


def drop_rate_R(
    load: Sequence[np.ndarray], tokens_R: np.ndarray, routers: Sequence[Router]
) -> np.ndarray:
    """Share of each router's slots that routed nowhere, float [R]; NaN without tokens."""
    slots_R = tokens_R * np.array([router.top_k for router in routers])
    load_R = np.array([load_E.sum() for load_E in load])
    return np.where(slots_R > 0, 1 - load_R / np.maximum(slots_R, 1), np.nan)

"""What the routers of a model did over a few steps.

R routers, E experts, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


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

"""A step of an engine, as its worker hands it to the process that writes: that imports no torch.

L routers, n tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Step:
    """A step as it is handed over. `ended`: requests that ended before it. `sampled`: how many
    tokens each request was given behind it, where some of its rows are drafts: one more than were
    accepted; None where that is unknown. Arrays of a GPU are on their way until `arrive`."""

    number: int
    requests: Sequence[str]
    edges: np.ndarray
    prompts: np.ndarray
    drafts: np.ndarray
    ends: np.ndarray
    ended: set[str]
    tokens: Any  # [n]
    positions: Any  # [n]
    ids: Any  # [L, n, K]
    weights: Any  # [L, n, K]
    logits: Any  # [L, n, E] or None
    bytes: int
    copied: Any = None  # an event
    sampled: Any = None  # [requests of the engine's step, until `arrive`: those recorded]
    wanted: Any = None  # which of them are recorded

    def arrive(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        for name in ("tokens", "positions", "ids", "weights", "logits", "sampled"):
            if hasattr(value := getattr(self, name), "cpu"):
                setattr(self, name, value.cpu().numpy())
        if self.wanted is not None:
            self.sampled, self.wanted = self.sampled[np.array(self.wanted)], None

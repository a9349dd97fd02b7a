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
    """A step as it is handed over. `ended`: requests that ended before it. `sampled`: where some of
    a request's rows are drafts, how many tokens it was given behind it, one more than were
    accepted; where they are a tree, which of its rows are the answer's, and −1; None where that is
    unknown. Arrays of a GPU are on their way until `arrive`."""

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
    # [requests of the engine's step, until `arrive`: those recorded], or [requests, rows]
    sampled: Any = None
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

    def accepted(self, request: int) -> np.ndarray:
        """Which of the request's rows are no rejected drafts."""
        rows = int(self.edges[request + 1] - self.edges[request])
        drafts = int(self.drafts[request])
        if not drafts or self.sampled is None:
            return np.arange(rows - drafts)
        sampled = self.sampled[request]
        if sampled.ndim:
            return sampled[sampled >= 0]
        return np.arange(min(rows - drafts + max(int(sampled) - 1, 0), rows))

"""Whether the batch rows of a key-value cache change places between forward passes, as those of
beam search do.

B batch rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Places:
    """Watches one cache at a time: its `reorder_cache`, which transformers calls."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._from_B: np.ndarray | None = None  # the place that each row had

    def watch(self, cache: Any) -> None:
        """From now on."""
        self._from_B = None
        if cache is self._cache:
            return
        self.release()
        if hasattr(cache, "reorder_cache"):
            self._cache, stock = cache, cache.reorder_cache

            def reordered(beam_idx: Any, *args: Any, **kwargs: Any) -> Any:
                from_B = beam_idx.cpu().numpy()
                self._from_B = from_B if self._from_B is None else self._from_B[from_B]
                return stock(beam_idx, *args, **kwargs)

            cache.reorder_cache = reordered

    def kept(self, B: int) -> np.ndarray:
        """bool [B]: the rows that are where they were."""
        if self._from_B is None:
            return np.ones(B, bool)
        return np.arange(B) == self._from_B if len(self._from_B) == B else np.zeros(B, bool)

    def release(self) -> None:
        if self._cache is not None:
            vars(self._cache).pop("reorder_cache", None)
        self._cache = self._from_B = None

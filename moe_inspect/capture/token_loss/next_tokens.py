"""Which token follows each row of a forward pass in its sequence: in the same pass, or first in the
next one; and whether the batch rows of a cache change places in between, as those of beam search
do.

B batch rows, S positions, T = B·S rows of a pass. −1 stands for none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows


def next_tokens(fed: Rows | CallInputs) -> np.ndarray:
    """int64 [T]: the token that follows in the same pass. A sequence ends where `RowReader` has
    another begin: with the batch row, with padding, where a position is not the one before + 1."""
    next_T = np.full(fed.T, -1, np.int64)
    if isinstance(fed, Rows):
        row = np.flatnonzero(fed.real)
        same = fed.sequence[1:] == fed.sequence[:-1]
        next_T[row[:-1][same]] = fed.token_id[1:][same]
        return next_T
    token_BS, real_BS = _on_host(fed)
    follows_BS = real_BS[:, 1:] & real_BS[:, :-1]
    if fed.position is not None:
        position_BS = np.broadcast_to(fed.position.numpy(), token_BS.shape)
        follows_BS = follows_BS & (position_BS[:, 1:] == position_BS[:, :-1] + 1)
    if (keys := fed.keys.of_tokens) is not None:
        before_BS, key_BS = keys.numpy()
        follows_BS = follows_BS & (before_BS[:, 1:] == key_BS[:, :-1])
    next_T.reshape(token_BS.shape)[:, :-1][follows_BS] = token_BS[:, 1:][follows_BS]
    return next_T


def first_tokens(before: Rows | CallInputs, fed: Rows | CallInputs, B: int) -> np.ndarray:
    """int64 [B]: the token of the pass `fed` that follows the last position of each batch row of
    the pass `before`."""
    next_B = np.full(B, -1, np.int64)
    if isinstance(before, Rows) and isinstance(fed, Rows):
        if not len(fed.token_id):
            return next_B
        last_B = before.real.reshape(B, -1)[:, -1]
        at_B = (np.cumsum(before.real).reshape(B, -1)[:, -1] - 1)[last_B]
        sequences, first = np.unique(fed.sequence, return_index=True)
        found = np.searchsorted(sequences, before.sequence[at_B]).clip(max=len(sequences) - 1)
        same = (sequences[found] == before.sequence[at_B]) & (
            fed.position[first[found]] == before.position[at_B] + 1
        )
        next_B[np.flatnonzero(last_B)[same]] = fed.token_id[first[found][same]]
    elif isinstance(before, CallInputs) and isinstance(fed, CallInputs):
        joins = fed.after.length - fed.S == before.after.length
        if fed.before is before.after and joins and fed.B == before.B == B and fed.S:
            token_BS, real_BS = _on_host(fed)
            _, before_BS = _on_host(before)
            follows_B = real_BS[:, 0] & before_BS[:, -1]
            next_B[follows_B] = token_BS[:, 0][follows_B]
    return next_B


def _on_host(call: CallInputs) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (−1 where unknown) and which of them are no padding, [B, S]. Waits until they have
    been copied, which is before the call's own forward pass begins."""
    if call.copied is not None:
        call.copied.synchronize()
    shape = call.B, call.S
    token_BS = call.token_BS.numpy() if call.token_BS is not None else np.full(shape, -1)
    mask = call.mask_BS
    real_BS = mask.numpy().astype(bool) if mask is not None else np.ones(shape, bool)
    return token_BS, real_BS


class Places:
    """Where the batch rows of a key-value cache went between passes: watches the `reorder_cache` of
    one cache at a time, which transformers calls."""

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

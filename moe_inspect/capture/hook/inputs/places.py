"""How far sequences have come.

N tokens of a forward pass, without padding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """How far a sequence has come. `domain`: as a code. `last`: its last position. `first`: the
    first position of the pass that fed it last, −1 where that pass fed the batch row several
    sequences."""

    document: int
    sequence: int
    domain: int
    first: int
    last: int


class Pages:
    """What the paged cache of transformers' `generate_batch` holds, which packs many requests into
    one row and does not say which they are. A request goes on from a token that was written to the
    cache; a request may be given the pages of another one, where these hold the same text. So the
    text up to each token identifies its sequence: of requests with the same text, any.

    `texts`: place in the cache → hash of the text up to the token there."""

    def __init__(self) -> None:
        self.texts: dict[int, int] = {}
        self.places: dict[int, tuple[Place, ...]] = {}

    def keys(self, slot_2N: np.ndarray, token_N: np.ndarray, starts_N: np.ndarray) -> np.ndarray:
        """int64 [2, N]: the hash of the text before and up to each token. `slot_2N`: the places
        of the token before and of this one."""
        found, texts = np.empty(slot_2N.shape, np.int64), self.texts
        text = -1
        for n, (back, slot, token, starts) in enumerate(
            zip(*slot_2N.tolist(), token_N.tolist(), starts_N.tolist(), strict=True)
        ):
            if starts:
                text = texts.get(back, -1)
            found[0, n] = text
            found[1, n] = text = texts[slot] = hash((text, token))
        return found

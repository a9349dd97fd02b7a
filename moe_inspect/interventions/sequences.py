"""The sequences of a trace, recognised by their tokens as a model is fed them.

N tokens, in the order of their sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_inspect.capture.hook.inputs.rows import Rows
from moe_inspect.errors import MoeInspectError

START = 8  # tokens by which sequences are looked up that are not fed whole


@dataclass
class Fed:
    """A sequence that is being fed: the trace's sequence, and the position of its first token."""

    sequence: int
    first: int


class Sequences:
    """Those of the trace `path` whose `tokens` (rows of its table) one stack sees.

    token_N   the tokens' numbers in the trace
    beyond    tokens fed behind the end of their sequence so far
    """

    def __init__(self, path: object, tokens: pd.DataFrame):
        self._path, self.beyond = path, 0
        token_N, sequence_N = (tokens[c].to_numpy() for c in ("token", "sequence"))
        order = np.lexsort((token_N, sequence_N))
        self.token_N = token_N[order]
        self._ids_N = tokens["token_id"].to_numpy()[order]
        self._position_N = tokens["position"].to_numpy()[order]
        self._has_text = bool((self._ids_N >= 0).any())
        starts = np.flatnonzero(np.diff(sequence_N[order], prepend=-1))
        self._number = sequence_N[order][starts].tolist()
        self._bounds = [*starts.tolist(), len(order)]
        self._used = [0] * len(starts)
        self._fed: dict[int, Fed] = {}
        self._whole: dict[bytes | int, list[int]] = defaultdict(list)
        self._start: dict[bytes, list[int]] = defaultdict(list)
        for s in range(len(starts)):
            ids = self._sequence(s)
            self._whole[self._key(ids)].append(s)
            self._start[ids[:START].tobytes()].append(s)

    @property
    def found(self) -> dict[int, int]:
        """Sequence that is being fed → its number in the trace."""
        return {number: self._number[fed.sequence] for number, fed in self._fed.items()}

    def at(self, rows: Rows, read: Mapping[int, int]) -> np.ndarray:
        """For each real row of a forward pass the place of its token, int64; -1 where it is beyond
        the end of its sequence. `read`: sequence that is being fed → the number in the trace of
        what the encoder read for it."""
        at = np.full(len(rows.token_id), -1, np.int64)
        for number in np.unique(rows.sequence).tolist():
            of = np.flatnonzero(rows.sequence == number)
            ids, position = rows.token_id[of], rows.position[of]
            known = self._fed.get(number)
            if known is None:
                first = int(position[0])
                known = self._fed[number] = Fed(self._match(ids, read.get(number)), first)
            here = position - known.first
            start, end = self._bounds[known.sequence], self._bounds[known.sequence + 1]
            inside = (here >= 0) & (here < end - start)
            of, ids, here = of[inside], ids[inside], here[inside] + start
            if self._has_text and (wrong := np.flatnonzero(self._ids_N[here] != ids)).size:
                n = wrong[0]
                raise MoeInspectError(
                    f"position {int(here[n]) - start} of sequence {known.sequence} is token "
                    f"{self._ids_N[here[n]]} in {self._path}, but the model is fed {ids[n]}: only "
                    "the text of the trace can be replayed"
                )
            at[of] = here
        self.beyond += int((at < 0).sum())
        return at

    def _sequence(self, s: int) -> np.ndarray:
        return self._ids_N[self._bounds[s] : self._bounds[s + 1]]

    def _key(self, ids: np.ndarray) -> bytes | int:
        return ids.astype(np.int32).tobytes() if self._has_text else len(ids)

    def _match(self, ids: np.ndarray, read: int | None) -> int:
        """The trace's sequence of these tokens, the first of a sequence that is being fed: the
        whole of it, or else a beginning, of one or of the other. Where several are alike, that of
        the number `read`."""
        found = self._whole.get(self._key(ids)) or [
            s for s in self._beginning_like(ids) if self._begins(self._sequence(s), ids)
        ]
        if not found:
            shown = ", ".join(map(str, ids[:6].tolist()))
            raise MoeInspectError(
                f"no sequence of {self._path} begins with the {len(ids)} tokens {shown}"
                f"{' …' if len(ids) > 6 else ''} that the model is fed: only the text of the trace "
                "can be replayed, with its special tokens and sequence length"
            )
        best = min(found, key=lambda s: (self._number[s] != read, self._used[s]))
        positions = self._position_N[self._bounds[best] : self._bounds[best + 1]]
        if (np.diff(positions) <= 0).any():
            raise MoeInspectError(
                f"sequence {self._number[best]} of {self._path} was continued in several ways "
                "(beams), which are not told apart: it cannot be replayed"
            )
        self._used[best] += 1
        return best

    def _beginning_like(self, ids: np.ndarray) -> Sequence[int]:
        if len(ids) >= START and self._has_text:
            of_start = self._start.get(ids[:START].astype(np.int32).tobytes(), [])
            return of_start or self._shorter()
        return range(len(self._used))

    def _shorter(self) -> list[int]:
        return [s for start, of in self._start.items() if len(start) < 4 * START for s in of]

    def _begins(self, one: np.ndarray, other: np.ndarray) -> bool:
        n = min(len(one), len(other))
        return not self._has_text or bool((one[:n] == other[:n]).all())

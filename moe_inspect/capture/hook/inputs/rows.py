"""What forward passes are fed, as it is read, and as rows.

B batch rows, S positions, T = B·S rows a router sees (padding included).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.writer import Document


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


@dataclass(frozen=True)
class Rows:
    """What one forward pass is fed. `real` bool [T] is False for padding, in the order in which the
    routers see the rows; the other arrays have one entry per real row, `domain` as codes into
    `PassInputs.domains`. `stack` says which stack of an encoder-decoder is fed. `phases`: indices
    into PHASES, where they are of several."""

    real: np.ndarray
    token_id: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    documents: list[Document] = field(default_factory=list)
    phase: str = "prefill"
    number: int | None = None  # of the forward pass, where it was planned
    group: int | None = None  # passes of one group are committed together or not at all
    stack: str = ""
    phases: np.ndarray | None = None

    def phase_codes(self) -> np.ndarray:
        """The phase of each token, as an index into PHASES."""
        if self.phases is not None:
            return self.phases
        return np.full(len(self.token_id), PHASES.index(self.phase), np.int32)

    @property
    def T(self) -> int:
        return len(self.real)

    # a plan says nothing of the shape
    B = 1
    S = T


class Places(NamedTuple):
    """The `Place` of each batch row: document, sequence and domain int [B, 3], all −1 where there
    is none; and the positions."""

    numbers_B3: np.ndarray
    first_B: np.ndarray
    last_B: np.ndarray

    def place(self, b: int) -> Place | None:
        document, sequence, domain = self.numbers_B3[b].tolist()
        if document < 0:
            return None
        return Place(document, sequence, domain, int(self.first_B[b]), int(self.last_B[b]))


@dataclass(slots=True, eq=False)
class CachedRows:
    """What a key-value cache holds: `length` positions per row and, once the rows have been read,
    the sequences they belong to. `fed`: how many of the positions the last pass has fed. `taken`:
    of those, how many were taken back before another pass began (rejected drafts). `starts`: where
    the tensors that the pass returned begin in memory. `is_continued`: a pass went on from here."""

    length: int
    state: Places | None = None
    fed: int = 0
    taken: int = 0
    starts: Collection[Any] = ()
    is_continued: bool = False


class Keys(NamedTuple):
    """What identifies the sequences of a pass, where that is not their batch row. `of_tokens` int
    [2, B, S]: the key of its sequence before and after each token; None: the batch row. `places`:
    key → how far each sequence with it has come. `pages`: where `of_tokens` are slots of a paged
    cache, what turns them into keys."""

    of_tokens: torch.Tensor | None = None
    places: dict[int, tuple[Place, ...]] | None = None
    pages: Pages | None = None


NO_KEYS = Keys()


@dataclass(slots=True, eq=False)
class CallInputs:
    """The inputs of a forward pass, copied to the host without waiting: the copies are complete
    once the pass has run."""

    B: int
    S: int
    T: int  # rows that a router sees
    token_BS: torch.Tensor | None
    mask_BS: torch.Tensor | None
    position: torch.Tensor | None  # [B, S] or [S]; None: they continue what came before
    labels: dict[str, Sequence[Any] | None]
    before: CachedRows | None  # what its cache held, or what the encoder read
    after: CachedRows
    stack: str = ""
    copied: Any = None  # the CUDA event after which the copies are complete
    order: np.ndarray | None = None  # the token b·S + s of each row; None: row b·S + s
    keys: Keys = NO_KEYS
    is_guess: bool = False  # `before` is that of the pass before: positions tell if it goes on
    is_branch: bool = False  # another pass went on from `before` already
    resumes: bool = False  # the model was told where in its own cache this pass begins
    asked: int = 0  # of how many tokens the logits were asked for: those but the first are drafts
    is_settled: bool = True  # False while tokens may be taken back from the cache
    following: CallInputs | None = None  # the next pass, where it may take tokens back

    @property
    def verifies(self) -> bool:
        """Whether all of its tokens but the first are drafts."""
        return self.asked == self.S > 1

    def wait(self) -> None:
        """Until the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()

    def real_BS(self) -> np.ndarray:
        """bool [B, S], False for padding."""
        mask = self.mask_BS
        return np.ones((self.B, self.S), bool) if mask is None else mask.numpy().astype(bool)

    def position_BS(self) -> np.ndarray:
        """int [B, S]."""
        end = self.after.length
        given = np.arange(end - self.S, end) if self.position is None else self.position.numpy()
        return np.broadcast_to(given, (self.B, self.S))

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of its tensors."""
        return (
            self.B,
            self.S,
            *(
                t.shape if t is not None else None
                for t in (self.token_BS, self.mask_BS, self.position)
            ),
        )


def steps_at(fed: Iterable[Rows | CallInputs]) -> list[CallInputs]:
    """The first of these passes, as long as each feeds one token to each of the same sequences."""
    found: list[CallInputs] = []
    for call in fed:
        if (
            not isinstance(call, CallInputs)
            or call.S != 1
            or call.stack == "encoder"
            or call.order is not None
            or call.keys.of_tokens is not None
            or call.is_guess
        ):
            break
        if not found:
            before = call.before
            state = before.state if before is not None and not before.taken else None
            if state is None or len(state.last_B) != call.B or call.after.length < 2:
                break
        elif call.before is not found[-1].after or call.shape != found[0].shape:
            break
        found.append(call)
    return found


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of consecutive passes of one stack."""
    names = ("real", "token_id", "document", "sequence", "position", "domain")
    phases = {rows.phase for rows in parts}
    is_one = len(phases) == 1 and "" not in phases
    return Rows(
        *(np.concatenate([getattr(rows, name) for rows in parts]) for name in names),
        documents=[document for rows in parts for document in rows.documents],
        phase=parts[0].phase if is_one else "",
        stack=parts[0].stack,
        phases=None if is_one else np.concatenate([rows.phase_codes() for rows in parts]),
    )

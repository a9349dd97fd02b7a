"""Inputs of forward passes as they are read, and as rows; and the numbering of the documents and
sequences that their tokens belong to.

B batch rows, S positions, T = B·S rows a router sees (padding included), N tokens of a pass
(without it), in segments: tokens of one batch row whose positions follow each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.writer import Document

TAKEN = -2  # no position follows it


class Place(NamedTuple):
    """How far a sequence has come. `domain`: as a code. `last`: its last position, TAKEN if another
    pass has continued it. `first`: the first position of the pass that fed it last, −1 where that
    pass fed the batch row several sequences."""

    document: int
    sequence: int
    domain: int
    first: int
    last: int


@dataclass(frozen=True)
class Rows:
    """Rows of one forward pass. `real` bool [T] is False for padding, in the order in which the
    routers see the rows; the other arrays have one entry per real row, `domain` as codes into
    `PassInputs.domains`. `stack`: the stack of an encoder-decoder that is fed. `phases`: indices
    into PHASES, if the rows have several."""

    real: np.ndarray
    token_id: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    documents: list[Document] = field(default_factory=list)
    phase: str = "prefill"
    number: int | None = None  # of the forward pass, if it was planned
    group: int | None = None  # passes of one group are committed together or not at all
    stack: str = ""
    phases: np.ndarray | None = None
    unlinked: int = 0  # sequences that begin here because what they continue is unknown

    def phase_codes(self) -> np.ndarray:
        """Return the phase of each token, as an index into PHASES."""
        if self.phases is not None:
            return self.phases
        return np.full(len(self.token_id), PHASES.index(self.phase), np.int32)

    @property
    def T(self) -> int:
        return len(self.real)

    # a plan does not state the shape
    B = 1
    S = T


Sequences: TypeAlias = "dict[int, Place | None]"  # key → how far the sequence with it has come


class Places(NamedTuple):
    """The `Place` of each batch row: document, sequence and domain int [B, 3], all −1 if there is
    none; and the positions."""

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
    """Contents of a key-value cache: `length` positions per row and, once the rows have been read,
    the sequences they belong to. `taken`: positions of the last pass that were taken back before
    another pass began (rejected drafts)."""

    length: int
    state: Places | None = None
    taken: int = 0


class Origin(NamedTuple):
    """What a call of a stack continues.

    before        of its cache, or what the encoder read; None for nothing, or for what was not
                  recorded
    past          how many positions its cache holds
    by_position   only its positions tell whether it continues `before`
    resumes       it reads a cache that holds something, or was told where in the model's own cache
                  it begins
    is_unlinked   it continues something that was not recorded"""

    before: CachedRows | None = None
    past: int = 0
    by_position: bool = False
    resumes: bool = False
    is_unlinked: bool = False


class Keys(NamedTuple):
    """Keys of the sequences of a pass, if they are not its batch rows. `of_tokens` int [2, B, S]:
    the key of its sequence before and after each token; None: the batch row is the key."""

    of_tokens: Tensor | None = None
    places: Sequences | None = None


NO_KEYS = Keys()
Labels: TypeAlias = dict[str, Sequence[Hashable] | None]


@dataclass(slots=True, eq=False)
class CallInputs:
    """Inputs of a forward pass, copied to the host without waiting: the copies are complete once
    the pass has run."""

    B: int
    S: int
    T: int  # rows that a router sees
    token_BS: Tensor | None
    mask_BS: Tensor | None
    position: Tensor | None  # [B, S] or [S]; None: they continue what came before
    labels: Labels
    origin: Origin
    after: CachedRows
    stack: str = ""
    copied: torch.cuda.Event | None = None  # the CUDA event after which the copies are complete
    order: np.ndarray | None = None  # the token b·S + s of each row; None: row b·S + s
    keys: Keys = NO_KEYS
    asked: int = 0  # of how many tokens the logits were asked for: those but the first are drafts
    is_settled: bool = True  # False while tokens may be taken back from the cache
    following: CallInputs | None = None  # the next pass, where it may take tokens back

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()

    def real_BS(self) -> np.ndarray:
        """Return bool [B, S], False for padding."""
        mask = self.mask_BS
        return np.ones((self.B, self.S), bool) if mask is None else mask.numpy().astype(bool)

    def position_BS(self) -> np.ndarray:
        """Return the positions, int [B, S]."""
        end = self.after.length
        given = np.arange(end - self.S, end) if self.position is None else self.position.numpy()
        return np.broadcast_to(given, (self.B, self.S))


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of consecutive passes of one stack as those of one."""
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


K = TypeVar("K")
V = TypeVar("V")
PREFILL, DECODE, ENCODE, DRAFT = map(PHASES.index, ("prefill", "decode", "encode", "draft"))


class SequenceNumbers:
    """Numbers documents and sequences as they come, and domain labels (`domains[code]`)."""

    def __init__(self) -> None:
        self.domains: list[str] = []
        self._document_numbers: dict[Hashable, int] = {}  # by the value the caller gave
        self._documents = self._sequences = 0
        self._undo = ExitStack()  # of what was numbered since `accept`

    def domain_code(self, label: str) -> int:
        """Return the code of a domain label, new or known."""
        if label not in self.domains:
            self.domains.append(label)
        return self.domains.index(label)

    def discard(self) -> None:
        """Undo the numbering since `accept`: its pass failed, and the next takes its numbers."""
        self._undo.close()

    def accept(self) -> None:
        """Keep the numbering so far: its passes were recorded."""
        self._undo.pop_all()

    def number(
        self, call: CallInputs, real_BS: np.ndarray, position_BS: np.ndarray
    ) -> tuple[np.ndarray, list[Document], int]:
        """Number the tokens of a pass, and note in `call.after` how far its sequences have come.
        Return the document, sequence, domain and phase (an index into PHASES) of each token, int
        [4, N], the new documents, and the number of sequences of which the beginning is unknown.
        A position that is not the one before + 1 begins a sequence, or continues one that its
        cache holds; one that is not above the one before begins a document too."""
        counted = {"_documents": self._documents, "_sequences": self._sequences}
        self._undo.callback(vars(self).update, counted)
        row_N, position_N, keys_2N, starts_N = _segments(call, real_BS, position_BS)
        by_key = call.keys.places
        state, is_unlinked = _state_before(call)
        may_be_unlinked = call.origin.resumes and (call.origin.by_position or by_key is not None)
        after = call.after.state = _state_after(state, row_N, position_N, starts_N)
        draft_N = _drafts(call, real_BS, row_N, position_N)
        starts_N[1:] |= draft_N[1:] & ~draft_N[:-1]
        is_resumed = _rolled_back_to(call.origin.before, call) is not None
        new: dict[int, Document] = {}
        numbers: list[tuple[int, int, int, int]] = []  # of each segment
        first_N = np.flatnonzero(starts_N)
        end_N = np.append(first_N, len(row_N))[1:] - 1
        if by_key:
            self._forget(by_key, keys_2N[1], keys_2N[0, first_N])
        continued_rows, unlinked = list[int](), 0
        row, previous = -1, None  # the segment before, if it is of the same row
        for b, p, last, is_draft, key, key_after in zip(
            row_N[first_N].tolist(),
            position_N[first_N].tolist(),
            position_N[end_N].tolist(),
            draft_N[first_N].tolist(),
            keys_2N[0, first_N].tolist(),  # before the segment's first token
            keys_2N[1, end_N].tolist(),  # after its last one
            strict=True,
        ):
            previous, is_lost = previous if b == row else None, False
            if by_key is not None:
                place, of_document, previous = self._set(by_key, key, None), True, None
            elif previous is None:
                place = state.place(b)
                is_taken = place is not None and place.last == TAKEN and p > 0
                of_document = not call.origin.by_position or is_draft or is_taken
            else:
                place, of_document = previous, is_draft or p > previous.last
            goes_on = (
                place is not None
                and place is not previous
                and not is_draft
                and (p == place.last + 1 or (is_resumed and place.first < p <= place.last))
            )
            if place is not None and goes_on:
                document, sequence, domain = place[:3]
                continued_rows.append(b)
            else:
                sequence, self._sequences = self._sequences, self._sequences + 1
                if place is not None and of_document:
                    document, domain = place.document, place.domain
                else:
                    document, domain = self._document(call, b, new)
                    begin = p if by_key is not None else position_BS[b, 0]
                    is_lost = is_unlinked or (may_be_unlinked and begin > 0)
                    is_lost &= previous is None
                    unlinked += int(is_lost)
            row, previous = b, Place(document, sequence, domain, -1, last)
            phase = DRAFT
            if not is_draft:
                after.numbers_B3[b] = previous[:3]
                if by_key is not None:
                    self._set(by_key, key_after, previous)
                is_on = (goes_on and p > 0) or (is_lost and call.origin.resumes)
                phase = _phase(call, is_on, last - p, bool(draft_N.any()))
            numbers.append((document, sequence, domain, phase))
        if call.stack == "encoder":
            after.last_B[:] = -1  # its decoder's positions begin at 0
        self._take(call.origin.before, continued_rows)
        of_segments_4G = np.array(numbers, np.int32).reshape(-1, 4).T
        numbers_4N = np.repeat(of_segments_4G, end_N + 1 - first_N, axis=1)
        tokens = np.bincount(numbers_4N[0, ~draft_N], minlength=self._documents)
        return numbers_4N, [replace(d, tokens=int(tokens[n])) for n, d in new.items()], unlinked

    def _document(self, call: CallInputs, b: int, new: dict[int, Document]) -> tuple[int, int]:
        """Return number and domain of the document that begins in batch row b: the document of its
        label, if that is known."""
        check_labels(call.labels, call.B)
        documents, domains = call.labels["documents"], call.labels["domains"]
        domain, name = str(domains[b]) if domains is not None else "", ""
        code, number = self.domain_code(domain), self._documents
        if documents is not None:
            if documents[b] in self._document_numbers:
                return self._document_numbers[documents[b]], code
            self._set(self._document_numbers, documents[b], number)
            name = str(documents[b])
        self._documents += 1
        new[number] = Document(number, domain, name, 0)
        return number, code

    def _take(self, before: CachedRows | None, rows: Sequence[int]) -> None:
        """Note which rows of a cache have been continued: each is continued once."""
        if before is not None and before.state is not None and rows:
            last_B = before.state.last_B
            self._undo.callback(last_B.__setitem__, rows, last_B[rows])
            last_B[rows] = TAKEN

    def _forget(self, places: Sequences, written_N: np.ndarray, read_G: np.ndarray) -> None:
        """Forget the sequences of slots that are written anew, except those that are read first."""
        for key in places.keys() & set(written_N.tolist()) - set(read_G.tolist()):
            self._set(places, key, None)

    def _set(self, values: dict[K, V], key: K, value: V) -> V | None:
        """Set the value of a key. Return the one before."""
        if (before := values.get(key)) is None:
            self._undo.callback(values.pop, key, None)
        else:
            self._undo.callback(values.__setitem__, key, before)
        values[key] = value
        return before


def _segments(
    call: CallInputs, real_BS: np.ndarray, position_BS: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the batch row and the position of each token; the keys of its sequence before and
    after it, int [2, N]; and whether it begins a segment."""
    position_N = position_BS[real_BS]
    row_N = np.repeat(np.arange(call.B), real_BS.sum(1))
    starts_N = np.ones(len(row_N), bool)
    starts_N[1:] = (row_N[1:] != row_N[:-1]) | (position_N[1:] != position_N[:-1] + 1)
    keys_2N = np.zeros((2, len(row_N)), np.int64)
    if call.keys.of_tokens is not None:
        keys_2N = call.keys.of_tokens.numpy()[:, real_BS]
        starts_N[1:] |= keys_2N[0, 1:] != keys_2N[1, :-1]
    return row_N, position_N, keys_2N, starts_N


def _phase(call: CallInputs, goes_on: bool, steps: int, has_drafts: bool) -> int:
    """Return the phase of a segment that has `steps` tokens after its first: decode if it continues
    a sequence by one token, or by several that the model was to verify."""
    if call.stack == "encoder":
        return ENCODE
    is_one = call.S == 1 or (call.keys.of_tokens is not None and not steps)
    is_on, verifies = goes_on or call.after.length > call.S, call.asked == call.S > 1
    return DECODE if is_on and (is_one or verifies or has_drafts) else PREFILL


def _state_before(call: CallInputs) -> tuple[Places, bool]:
    """Return how far the sequence of each batch row had come before the pass, and whether the pass
    continues sequences that are unknown."""
    before, is_unlinked = call.origin.before, call.origin.is_unlinked
    if before is not None and before.state is not None:
        if len(before.state.last_B) == call.B:
            return before.state._replace(last_B=before.state.last_B - before.taken), is_unlinked
        is_unlinked |= not call.origin.by_position  # rows of the cache were repeated or left out
    return Places(np.full((call.B, 3), -1), *np.full((2, call.B), -1)), is_unlinked


def _state_after(
    before: Places, row_N: np.ndarray, position_N: np.ndarray, starts_N: np.ndarray
) -> Places:
    """Return how far each batch row has come with the pass; its numbers are still those before."""
    B = len(before.last_B)
    last_B = np.where(before.numbers_B3[:, 0] >= 0, before.last_B, -1)
    last_B[row_N] = position_N  # of several for one row, the last one is kept
    first_N = np.flatnonzero(starts_N)
    first_B = np.full(B, -1)
    first_B[row_N[first_N]] = position_N[first_N]
    first_B[np.bincount(row_N[first_N], minlength=B) != 1] = -1
    return Places(before.numbers_B3.copy(), first_B, last_B)


def _drafts(
    call: CallInputs, real_BS: np.ndarray, row_N: np.ndarray, position_N: np.ndarray
) -> np.ndarray:
    """Return bool [N]: the tokens that were taken back from the cache before the next pass."""
    if call.after.taken > 0:
        return np.nonzero(real_BS)[1] >= call.S - call.after.taken
    if call.following is not None:
        first_B = _rolled_back_to(call.after, call.following)
        if first_B is not None:
            return position_N >= first_B[row_N]
    return np.zeros(len(row_N), bool)


def _rolled_back_to(before: CachedRows | None, call: CallInputs) -> np.ndarray | None:
    """Return the first position of each row, [B], if a model that keeps its cache to itself is told
    to continue within the tokens of the pass before, or after them. None otherwise."""
    state = before.state if before is not None else None
    if not (call.origin.by_position and call.origin.resumes and call.S) or state is None:
        return None
    if len(state.last_B) != call.B:
        return None
    call.wait()
    real_BS, rows = call.real_BS(), np.arange(call.B)
    at_B = real_BS.argmax(1)
    first_B = np.where(real_BS[rows, at_B], call.position_BS()[rows, at_B], -1)
    is_within_B = (state.first_B >= 0) & (state.first_B < first_B) & (first_B <= state.last_B + 1)
    return first_B if is_within_B.all() else None


def repeated(values: Sequence[Hashable] | None, B: int) -> Sequence[Hashable] | None:
    """Return labels of B rows, given those of B, or of B / n of which each has n rows."""
    if values is None or not len(values) or B % len(values):
        return values
    return [value for value in values for _ in range(B // len(values))]


def check_labels(labels: Labels, B: int) -> None:
    """Raise MoeInspectError unless there is a label for each of B rows."""
    for name, values in labels.items():
        if values is not None and len(values) != B:
            raise MoeInspectError(f"{name} has {len(values)} values, the forward pass has {B} rows")

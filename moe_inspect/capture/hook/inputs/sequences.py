"""Which document and sequence the tokens of forward passes belong to.

B batch rows, S positions, N tokens of a pass (without padding), in segments: tokens of one batch
row whose positions follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moe_inspect.capture.hook.inputs.rows import CachedRows, CallInputs, Place, Places
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.writer import Document

PREFILL, DECODE, ENCODE, DRAFT = map(PHASES.index, ("prefill", "decode", "encode", "draft"))


class SequenceNumbers:
    """Numbers documents and sequences as they come and keeps the domain labels
    (`domains[code]`)."""

    def __init__(self) -> None:
        self.domains: list[str] = []
        self._document_numbers: dict[Any, int] = {}  # by the value the caller gave
        self._documents = self._sequences = 0
        # the counters before the rows read last, and each key of a dict that was set since, with
        # its value before
        self._undo: tuple[int, int, list[tuple[dict[Any, Any], Any, Any]]] | None = None

    def domain_code(self, label: str) -> int:
        """The code of a domain label, new or known."""
        if label not in self.domains:
            self.domains.append(label)
        return self.domains.index(label)

    def discard(self) -> None:
        """Undoes what was numbered since `accept`, as its forward pass failed: the next one takes
        its numbers."""
        if self._undo is not None:
            self._documents, self._sequences, changes = self._undo
            for values, key, before in reversed(changes):
                if before is None:
                    del values[key]
                else:
                    values[key] = before
            self._undo = None

    def accept(self) -> None:
        """Keeps what was numbered since: it was recorded."""
        self._undo = None

    def number(
        self, call: CallInputs, real_BS: np.ndarray, position_BS: np.ndarray
    ) -> tuple[np.ndarray, list[Document]]:
        """Numbers the tokens of a pass, and notes in `call.after` how far its sequences have
        come. Returns the document, sequence, domain and phase (an index into PHASES) of each token,
        int [4, N], and the documents that are new. A position that is not the one before + 1 begins
        a sequence, or goes on with one that its cache holds; one that is not above the one before
        begins a document too."""
        if self._undo is None:
            self._undo = (self._documents, self._sequences, [])
        position_N = position_BS[real_BS]
        row_N = np.repeat(np.arange(call.B), real_BS.sum(1))
        of_tokens, by_key, pages = call.keys
        starts_N = np.ones(len(row_N), bool)
        starts_N[1:] = (row_N[1:] != row_N[:-1]) | (position_N[1:] != position_N[:-1] + 1)
        keys_2N = np.zeros((2, len(row_N)), np.int64)
        if of_tokens is not None:
            keys_2N = of_tokens.numpy()[:, real_BS]
            starts_N[1:] |= keys_2N[0, 1:] != keys_2N[1, :-1]
            if pages is not None and call.token_BS is not None:
                token_N = call.token_BS.numpy()[real_BS]
                keys_2N = pages.keys(keys_2N, token_N, starts_N)
        state = _state_before(call)
        after = call.after.state = _state_after(state, row_N, position_N, starts_N)
        draft_N = _drafts(call, real_BS, row_N, position_N)
        starts_N[1:] |= draft_N[1:] & ~draft_N[:-1]
        is_resumed = _rolled_back_to(call.before, call) is not None
        new: dict[int, Document] = {}
        found: list[tuple[int, int, int, int]] = []  # the four numbers of each segment
        first_N = np.flatnonzero(starts_N)
        end_N = np.append(first_N, len(row_N))[1:] - 1
        has_drafts = bool(draft_N.any())
        row, before = -1, None  # the segment before, where it is of the same row
        for b, p, last, is_draft, key, key_after in zip(
            row_N[first_N].tolist(),
            position_N[first_N].tolist(),
            position_N[end_N].tolist(),
            draft_N[first_N].tolist(),
            keys_2N[0, first_N].tolist(),  # before the segment's first token
            keys_2N[1, end_N].tolist(),  # after its last one
            strict=True,
        ):
            before = before if b == row else None
            if by_key is not None:
                origin, of_document = self._take(by_key, key), True
            elif before is None:
                origin = state.place(b)
                of_document = not call.is_guess or is_draft or (call.is_branch and p > 0)
            else:
                origin, of_document = before, is_draft or p > before.last
            goes_on = (
                origin is not None
                and origin is not before
                and not is_draft
                and not call.is_branch
                and (p == origin.last + 1 or (is_resumed and origin.first < p <= origin.last))
            )
            if origin is not None and goes_on:
                document, sequence, domain = origin[:3]
            else:
                sequence, self._sequences = self._sequences, self._sequences + 1
                document, domain = (
                    (origin.document, origin.domain)
                    if origin is not None and of_document
                    else self._document(call, b, new)
                )
            row, before = b, Place(document, sequence, domain, -1, last)
            phase = DRAFT
            if not is_draft:
                after.numbers_B3[b] = before[:3]
                if by_key is not None:
                    self._set(by_key, key_after, (*by_key.get(key_after, ()), before))
                phase = _phase(call, goes_on and p > 0, last - p, has_drafts)
            found.append((document, sequence, domain, phase))
        if call.stack == "encoder":
            after.last_B[:] = -1  # its decoder's positions begin at 0
        of_segments_4G = np.array(found, np.int32).reshape(-1, 4).T
        numbers_4N = np.repeat(of_segments_4G, end_N + 1 - first_N, axis=1)
        tokens = np.bincount(numbers_4N[0, ~draft_N], minlength=self._documents)
        return numbers_4N, [replace(d, tokens=int(tokens[n])) for n, d in new.items()]

    def _document(self, call: CallInputs, b: int, new: dict[int, Document]) -> tuple[int, int]:
        """The number and domain of the document that begins in batch row b: that of its label,
        where it has one that is known."""
        check_labels(call.labels, call.B)
        documents, domains = call.labels["documents"], call.labels["domains"]
        domain = str(domains[b]) if domains is not None else ""
        name = documents[b] if documents is not None else None
        code = self.domain_code(domain)
        if documents is not None and name in self._document_numbers:
            return self._document_numbers[name], code
        number, self._documents = self._documents, self._documents + 1
        if documents is not None:
            self._set(self._document_numbers, name, number)
        new[number] = Document(number, domain, str(name) if documents is not None else "", 0)
        return number, code

    def _take(self, places: dict[int, tuple[Place, ...]], key: int) -> Place | None:
        """The first of the places with this key, which goes on from there."""
        found = places.get(key)
        if not found:
            return None
        self._set(places, key, found[1:])
        return found[0]

    def _set(self, values: dict[Any, Any], key: Any, value: Any) -> None:
        if self._undo is not None:
            self._undo[2].append((values, key, values.get(key)))
        values[key] = value


def _phase(call: CallInputs, goes_on: bool, steps: int, has_drafts: bool) -> int:
    """The phase of a segment that has `steps` tokens after its first: decode if it continues a
    sequence by one token, or by several that the model was to verify."""
    if call.stack == "encoder":
        return ENCODE
    is_one = call.S == 1 or (call.keys.of_tokens is not None and not steps)
    is_on = goes_on or call.after.length > call.S
    return DECODE if is_on and (is_one or call.verifies or has_drafts) else PREFILL


def _state_before(call: CallInputs) -> Places:
    """How far the sequence of each batch row had come before the pass."""
    state = call.before.state if call.before is not None else None
    nowhere = Places(np.full((call.B, 3), -1), np.full(call.B, -1), np.full(call.B, -1))
    if call.before is None or state is None or not len(state.last_B):
        return nowhere
    # transformers repeats a row of an encoder's output for each of its beams
    repeats, rest = divmod(call.B, len(state.last_B))
    if rest or (repeats > 1 and call.stack != "decoder"):
        return nowhere
    numbers_B3, first_B, last_B = (values_B.repeat(repeats, axis=0) for values_B in state)
    last_B -= call.before.taken
    if repeats > 1:  # the beams after the first are sequences of their own
        last_B[np.arange(call.B) % repeats > 0] = -2
    return Places(numbers_B3, first_B, last_B)


def _state_after(
    before: Places, row_N: np.ndarray, position_N: np.ndarray, starts_N: np.ndarray
) -> Places:
    """How far each batch row has come with the pass; its numbers are those of before until they are
    known."""
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
    """bool [N]: the tokens that were taken back from the cache before the next pass."""
    if call.after.taken > 0:
        return np.nonzero(real_BS)[1] >= call.S - call.after.taken
    if call.following is not None:
        first_B = _rolled_back_to(call.after, call.following)
        if first_B is not None:
            return position_N >= first_B[row_N]
    return np.zeros(len(row_N), bool)


def _rolled_back_to(before: CachedRows | None, call: CallInputs) -> np.ndarray | None:
    """[B]: the first position of each row, where a model that keeps its cache to itself is told to
    go on before the end of what the pass before has fed: each row within that pass, or behind it.
    None elsewhere."""
    state = before.state if before is not None else None
    if not (call.is_guess and call.resumes) or state is None or len(state.last_B) != call.B:
        return None
    call.wait()
    real_BS, rows = call.real_BS(), np.arange(call.B)
    if not call.S:
        return None
    at_B = real_BS.argmax(1)
    first_B = np.where(real_BS[rows, at_B], call.position_BS()[rows, at_B], -1)
    is_within_B = (state.first_B >= 0) & (state.first_B < first_B) & (first_B <= state.last_B + 1)
    return first_B if is_within_B.all() else None


def check_labels(labels: dict[str, Sequence[Any] | None], B: int) -> None:
    for name, values in labels.items():
        if values is not None and len(values) != B:
            raise MoeInspectError(f"{name} has {len(values)} values, the forward pass has {B} rows")

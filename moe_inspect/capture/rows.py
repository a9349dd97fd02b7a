"""What a forward pass is fed: of each row the document, the sequence, the position and the domain.

B batch rows, S positions, T = B·S rows a router sees (padding included).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.writer import Document


@dataclass(frozen=True)
class Rows:
    """What one forward pass is fed: `real` bool [T] marks what is no padding, in the order the routers see it; the other
    arrays have one entry a real row, `domain` as codes into `domains`."""

    real: np.ndarray
    token_id: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    documents: list[Document] = field(default_factory=list)
    phase: str = "prefill"
    number: int | None = None  # of the forward pass, from who planned it
    group: int | None = None  # passes that are committed together, or not at all


State = tuple[np.ndarray, np.ndarray, np.ndarray]  # document, sequence and domain code of each batch row, [B] each


class RowReader:
    """Reads it off the model's own arguments, when nobody planned it. Numbers documents and sequences as they come; keeps
    the domain labels (`domains[code]`)."""

    def __init__(self, documents: Sequence[Any] | None = None, domains: Sequence[str] | None = None):
        self.domains: list[str] = []
        self._labels = {"documents": documents, "domains": domains}
        self._next_labels: dict[str, Sequence[Any] | None] = {}
        self._names: dict[Any, int] = {}
        self._documents = self._sequences = 0
        self._state_of: WeakKeyDictionary[Any, State] = WeakKeyDictionary()  # key-value cache → the rows it holds
        self._read_state: State | None = None  # of the forward pass under way
        self._undo: tuple[int, int, list[Any]] | None = None  # counters before the forward pass under way, names new in it

    def label(self, documents: Sequence[Any] | None, domains: Sequence[str] | None) -> None:
        """Document and domain of each batch row of the next forward pass."""
        self._next_labels = {"documents": documents, "domains": domains}

    def confirm(self, output: Any) -> None:
        """The forward pass that was read is over and recorded, and this is what it returned: the key-value cache in it holds
        the rows read. One that failed is forgotten at the next `read`."""
        self._undo = None
        cache = cache_among(output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ())
        if cache is not None and self._read_state is not None:
            self._state_of[cache] = self._read_state

    def domain_code(self, label: str) -> int:
        """The code of a domain label, new or known."""
        if label not in self.domains:
            self.domains.append(label)
        return self.domains.index(label)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """What these arguments of the model's call feed it."""
        names = ("input_ids", "attention_mask", "position_ids")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        fed = ids if ids is not None else embeds
        if fed is None:
            raise MoeInspectError("record saw a forward pass with neither input_ids nor inputs_embeds")
        if self._undo is not None:
            self._documents, self._sequences, names_to_forget = self._undo
            for name in names_to_forget:
                del self._names[name]
        self._undo = (self._documents, self._sequences, [])
        B, S = fed.shape[:2]
        cache = cache_among(given.values())
        past = int(cache.get_seq_length()) if cache is not None else 0
        real_BS = _real(given.get("attention_mask"), B, S)
        token_BS = ids.cpu().numpy() if ids is not None else np.full((B, S), -1)
        position_BS = np.broadcast_to(_positions(given.get("position_ids"), past, S), (B, S))
        labels = {
            name: given_now if (given_now := self._next_labels.get(name)) is not None else usual for name, usual in self._labels.items()
        }
        self._next_labels = {}
        for name, values in labels.items():
            if values is not None and len(values) != B:
                raise MoeInspectError(f"{name} has {len(values)} values, the forward pass has {B} rows")
        state = self._state_of.get(cache) if past else None
        if state is not None and len(state[0]) == B:
            document_BS, sequence_BS, domain_BS = (np.repeat(rows[:, None], S, 1) for rows in state)
            new: list[Document] = []
        else:
            document_BS, sequence_BS, domain_BS, new = self._number(real_BS, position_BS, **labels)
        self._read_state = (document_BS[:, -1], sequence_BS[:, -1], domain_BS[:, -1])
        real = real_BS.reshape(-1)
        flat = [a.reshape(-1)[real].astype(np.int32) for a in (token_BS, document_BS, sequence_BS, position_BS, domain_BS)]
        return Rows(real, *flat, documents=new, phase="decode" if past and S == 1 else "prefill")

    def _number(
        self, real_BS: np.ndarray, position_BS: np.ndarray, documents: Sequence[Any] | None, domains: Sequence[str] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Document]]:
        """Document, sequence and domain code of each position; a sequence begins with each row and, within a row, where
        the positions start again."""
        B, S = real_BS.shape
        starts_BS = np.zeros((B, S), bool)
        starts_BS[:, 1:] = (position_BS[:, 1:] <= position_BS[:, :-1]) & real_BS[:, 1:] & real_BS[:, :-1]
        starts_BS[:, 0] = True
        sequence_BS = self._sequences + np.cumsum(starts_BS.reshape(-1)).reshape(B, S) - 1
        self._sequences = int(sequence_BS.max()) + 1
        label_B = [str(d) for d in domains] if domains is not None else [""] * B
        domain_BS = np.repeat(np.array([self.domain_code(d) for d in label_B])[:, None], S, 1)
        document_BS = np.empty((B, S), np.int64)
        new: dict[int, Document] = {}
        for b, s in zip(*np.nonzero(starts_BS), strict=True):
            known = documents is not None and documents[b] in self._names
            number = self._names[documents[b]] if known and documents is not None else self._documents
            document_BS[b, s:] = number
            if not known:
                self._documents += 1
                if documents is not None:
                    self._names[documents[b]] = number
                    if self._undo is not None:
                        self._undo[2].append(documents[b])
                source = str(documents[b]) if documents is not None else ""
                new[number] = Document(number, label_B[b], source, 0)
        sizes = np.bincount(document_BS[real_BS], minlength=self._documents)
        return document_BS, sequence_BS, domain_BS, [Document(d.document, d.domain, d.source, int(sizes[n])) for n, d in new.items()]


def cache_among(values: Iterable[Any]) -> Any:
    """The key-value cache, whatever this release calls it."""
    return next((v for v in values if hasattr(v, "get_seq_length")), None)


def _real(mask: Any, B: int, S: int) -> np.ndarray:
    """bool [B, S]: what is no padding."""
    if mask is None or (B == 1 and getattr(mask, "ndim", None) != 2):  # a single row needs no padding
        return np.ones((B, S), bool)
    if getattr(mask, "ndim", None) != 2:
        kind = f"{mask.ndim}-D" if hasattr(mask, "ndim") else type(mask).__name__
        raise MoeInspectError(f"record cannot tell padding from a {kind} attention mask: give the model the [rows, positions] one")
    return mask[:, -S:].cpu().numpy().astype(bool)


def _positions(given: Any, past: int, S: int) -> np.ndarray:
    """[B, S] or [S]; of the several planes of multimodal positions the first is the text's."""
    if given is None:
        return np.arange(past, past + S)
    return (given[0] if given.dim() == 3 else given).cpu().numpy()

"""What a forward pass is fed: of each row the document, the sequence, the position and the domain.

B batch rows, S positions, T = B·S rows a router sees (padding included).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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


class RowReader:
    """Reads it off the model's own arguments, when nobody planned it. Numbers documents and sequences as they come; keeps
    the domain labels (`domains[code]`)."""

    def __init__(self, documents: Sequence[Any] | None = None, domains: Sequence[str] | None = None):
        self.domains: list[str] = []
        self._labels = (documents, domains)
        self._next_labels: tuple[Sequence[Any] | None, Sequence[str] | None] | None = None
        self._names: dict[Any, int] = {}
        self._documents = self._sequences = 0
        self._row_state: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # document, sequence, domain of each row

    def label(self, documents: Sequence[Any] | None, domains: Sequence[str] | None) -> None:
        """Document and domain of each batch row of the next forward pass."""
        self._next_labels = (documents, domains)

    def domain_code(self, label: str) -> int:
        """The code of a domain label, new or known."""
        if label not in self.domains:
            self.domains.append(label)
        return self.domains.index(label)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """What these arguments of the model's call feed it."""
        names = ("input_ids", "attention_mask", "position_ids")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
        fed = ids if ids is not None else embeds
        if fed is None:
            raise MoeInspectError("record saw a forward pass with neither input_ids nor inputs_embeds")
        B, S = fed.shape[:2]
        past = _past_length(given.values())
        real_BS = np.ones((B, S), bool) if mask is None or mask.dim() != 2 else mask[:, -S:].cpu().numpy().astype(bool)
        token_BS = ids.cpu().numpy() if ids is not None else np.full((B, S), -1)
        given_positions = given.get("position_ids")
        if given_positions is not None and given_positions.dim() == 2:
            position_BS = np.broadcast_to(given_positions.cpu().numpy(), (B, S))
        else:
            position_BS = np.broadcast_to(np.arange(past, past + S), (B, S))
        documents, domains = self._next_labels or self._labels
        self._next_labels = None
        for name, values in (("documents", documents), ("domains", domains)):
            if values is not None and len(values) != B:
                raise MoeInspectError(f"{name} has {len(values)} values, the forward pass has {B} rows")
        if past and self._row_state is not None and len(self._row_state[0]) == B:
            document_BS, sequence_BS, domain_BS = (np.repeat(state[:, None], S, 1) for state in self._row_state)
            new: list[Document] = []
        else:
            document_BS, sequence_BS, domain_BS, new = self._number(real_BS, position_BS, documents, domains)
        self._row_state = (document_BS[:, -1], sequence_BS[:, -1], domain_BS[:, -1])
        real = real_BS.reshape(-1)
        flat = [a.reshape(-1)[real].astype(np.int32) for a in (token_BS, document_BS, sequence_BS, position_BS, domain_BS)]
        return Rows(real, *flat, documents=new, phase="decode" if past else "prefill")

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
                source = str(documents[b]) if documents is not None else ""
                new[number] = Document(number, label_B[b], source, 0)
        sizes = np.bincount(document_BS[real_BS], minlength=self._documents)
        return document_BS, sequence_BS, domain_BS, [Document(d.document, d.domain, d.source, int(sizes[n])) for n, d in new.items()]


def _past_length(arguments: Iterable[Any]) -> int:
    """Positions in the key-value cache, whatever this release calls that argument."""
    return next((int(a.get_seq_length()) for a in arguments if hasattr(a, "get_seq_length")), 0)

"""Batches for the writer.

T tokens, K slots, L routers, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import RANK_STRIDE, Router
from moe_inspect.trace.writer import CountedBatches, Document, RoutedBatch

MOST_DOMAINS = 10_000
# of an expert, which gets at most one assignment per token; so many tokens a trace can number
MOST_COUNT = RANK_STRIDE
WINDOWS = 64  # at most, of the load over time in a trace of counts; each is a shard
NO_ID = -1  # the token id where the source does not give it


class Numbering:
    """Batches of decisions, one document after another. Documents, sequences, batches and domains
    get numbers in order of appearance."""

    def __init__(self) -> None:
        self.documents = self.sequences = self.batches = 0
        self.domains: tuple[str, ...] = ()
        self._code: dict[str, int] = {}
        self._named: dict[tuple[str, str], int] = {}
        self._at = self._domain = 0
        self._new: list[Document] = []

    def domain(self, label: str) -> int:
        if label not in self._code:
            if len(self._code) >= MOST_DOMAINS:
                why = f"{label[:40]!r} the last: does the field hold names of documents?"
                raise MoeInspectError(f"over {MOST_DOMAINS:,} domains, {why}")
            self._code[label] = len(self._code)
            self.domains = tuple(self._code)
        return self._code[label]

    def document(self, domain: str, source: str, tokens: int, name: str | None = None) -> None:
        """Begin a document, to which the next batches belong. It continues an earlier document of
        the same `name` and domain."""
        self._new, self._domain = [], self.domain(domain)
        if name is not None and (domain, name) in self._named:
            self._at = self._named[domain, name]
            return
        self._at, self.documents = self.documents, _below_int32(self.documents + 1)
        self._new = [Document(self._at, domain, source, tokens)]
        if name is not None:
            self._named[domain, name] = self._at

    def sequence(self, n: int = 1) -> int:
        """Assigns n consecutive numbers and returns the first."""
        first, self.sequences = self.sequences, _below_int32(self.sequences + n)
        return first

    def decisions(
        self,
        ids: list[np.ndarray],
        *,
        position: np.ndarray | None = None,
        sequence: np.ndarray | int | None = None,
        token_id: np.ndarray | None = None,
        batch: int | None = None,
        weights: list[np.ndarray] | None = None,
        logits: list[np.ndarray] | None = None,
        phase: str = "prefill",
    ) -> RoutedBatch:
        """Batch of the current document. position: integers [T], offsets in the document; None if
        the source does not state which tokens follow each other. sequence: integers [T], or one for
        all; None: each token is a sequence of its own. batch: its number, by default the next."""
        T = len(ids[0])
        if sequence is None:
            sequence = np.arange(T) + self.sequence(T)
        if batch is None:
            batch, self.batches = self.batches, _below_int32(self.batches + 1)
        new, self._new = self._new, []
        token_id_T = np.full(T, NO_ID) if token_id is None else token_id
        position_T = np.zeros(T, np.int32) if position is None else position
        return RoutedBatch(
            batch=batch,
            token_id=token_id_T.astype(np.int32, copy=False),
            document=np.full(T, self._at, np.int32),
            sequence=np.broadcast_to(np.asarray(sequence, np.int32), T),
            position=position_T.astype(np.int32, copy=False),
            domain=np.full(T, self._domain, np.int32),
            domains=self.domains,
            ids=ids,
            weights=weights,
            extras={} if logits is None else {"logits": logits},
            documents=new,
            phase=phase,
        )


def _below_int32(number: int) -> int:
    if number >= 2**31:
        raise MoeInspectError(
            "over 2,147,483,647 sequences, more than a trace can number: import the source in parts"
        )
    return number


def batch_of_counts(
    load_LDE: Sequence[np.ndarray],
    routers: Sequence[Router],
    domains: Sequence[str],
    batch: int,
    first_choice: list[np.ndarray] | None = None,
    sums: Mapping[str, list[np.ndarray]] | None = None,
    documents: Sequence[tuple[int, str]] = (),
) -> CountedBatches:
    """Batch of the counts [D, E] of each router. A row is a domain, or one of `documents` (their
    numbers and names), whose domain is in `domains`. Sources of counts do not state the number of
    tokens: it is the smallest that explains the load of every router, row by row."""
    tokens_D = np.zeros(len(domains), np.int64)
    for load_DE, router in zip(load_LDE, routers, strict=True):
        # no token chooses an expert twice
        tokens_D = np.maximum(tokens_D, load_DE.max(1, initial=0))
        tokens_D = np.maximum(tokens_D, -(-load_DE.sum(1) // router.top_k))
    if documents and (tokens := int(tokens_D.max(initial=0))) >= 2**31:
        name = documents[int(tokens_D.argmax())][1]
        raise MoeInspectError(f"document {name!r} has counts of {tokens:,} tokens: too many")
    return CountedBatches(
        batch,
        sum(tokens_D.tolist()),  # may be beyond int64: the writer refuses that
        list(domains),
        list(load_LDE),
        first_choice,
        sums or {},
        [
            Document(number, domain, name, tokens)
            for (number, name), domain, tokens in zip(
                documents, domains, tokens_D.tolist(), strict=False
            )
        ],
    )


def batches_of_windows(
    load_WDLE: np.ndarray,
    routers: Sequence[Router],
    domains: Sequence[str],
    numbers: Sequence[int] | None = None,
) -> Iterator[CountedBatches]:
    """Batches of the counts of each window that has any. numbers: of the windows, by default from
    0 on."""
    for w, load_DLE in enumerate(load_WDLE):
        if load_DLE.any():
            number = w if numbers is None else numbers[w]
            yield batch_of_counts([*load_DLE.swapaxes(0, 1)], routers, domains, number)


def windows_of(n: int, most: int = WINDOWS) -> np.ndarray:
    """int64 [n]: the window of each of n steps; at most `most` windows, of about equal size."""
    return np.arange(n) * min(n, most) // max(n, 1)


def window_of(steps: Iterable[int]) -> dict[int, int]:
    """The window of each step, which may be named several times."""
    every = sorted(set(steps))
    return dict(zip(every, windows_of(len(every)).tolist(), strict=True))

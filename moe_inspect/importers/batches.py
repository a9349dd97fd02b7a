"""Batches for the writer, made of what an importer has read.

T tokens, K slots, L routers, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    """Assigns numbers to documents, sequences, batches and domains in order of appearance."""

    def __init__(self) -> None:
        self.documents = self.sequences = self.batches = 0
        self.domains: tuple[str, ...] = ()
        self._code: dict[str, int] = {}
        self._named: dict[tuple[str, str], int] = {}

    def domain(self, label: str) -> int:
        if label not in self._code:
            if len(self._code) >= MOST_DOMAINS:
                raise MoeInspectError(
                    f"over {MOST_DOMAINS:,} domains, {label[:40]!r} the last: does the field "
                    "hold names of documents?"
                )
            self._code[label] = len(self._code)
            self.domains = (*self.domains, label)
        return self._code[label]

    def document(
        self, domain: str, source: str, tokens: int, name: str | None = None
    ) -> tuple[int, list[Document]]:
        """The document's number, and its row where it is new. Sequences with the same `name` belong
        to one document."""
        if name is not None and (domain, name) in self._named:
            return self._named[domain, name], []
        number, self.documents = self.documents, _below_int32(self.documents + 1)
        if name is not None:
            self._named[domain, name] = number
        return number, [Document(number, domain, source, tokens)]

    def sequence(self, n: int = 1) -> int:
        """Assigns n consecutive numbers and returns the first."""
        first, self.sequences = self.sequences, _below_int32(self.sequences + n)
        return first

    def batch(self) -> int:
        number, self.batches = self.batches, _below_int32(self.batches + 1)
        return number


def _below_int32(number: int) -> int:
    if number >= 2**31:
        raise MoeInspectError(
            "over 2,147,483,647 sequences, more than a trace can number: import the source in parts"
        )
    return number


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch, all of one document: where each is, and its vocabulary id where the
    source says. position: integers [T], offsets in the document. sequence: integers [T], or one
    for all."""

    document: int
    domain: int
    sequence: np.ndarray | int
    position: np.ndarray
    token_id: np.ndarray | None = None


def tokens_without_order(numbers: Numbering, T: int, document: int, domain: int) -> Tokens:
    """T tokens of a source that does not say which follow each other: each is a sequence of its
    own."""
    sequence_T = np.arange(T) + numbers.sequence(T)
    return Tokens(document, domain, sequence_T, np.zeros(T, np.int32))


def batch_of_decisions(
    numbers: Numbering,
    tokens: Tokens,
    ids: list[np.ndarray],
    *,
    weights: list[np.ndarray] | None = None,
    logits: list[np.ndarray] | None = None,
    documents: Sequence[Document] = (),
    phase: str = "prefill",
    batch: int | None = None,
) -> RoutedBatch:
    """A batch of one document. `documents`: the rows of those that begin here. `batch`: its number,
    by default the next."""
    T = len(tokens.position)
    token_id_T = np.full(T, NO_ID) if tokens.token_id is None else tokens.token_id
    return RoutedBatch(
        batch=numbers.batch() if batch is None else batch,
        token_id=token_id_T.astype(np.int32, copy=False),
        document=np.full(T, tokens.document, np.int32),
        sequence=np.broadcast_to(np.asarray(tokens.sequence, np.int32), T),
        position=tokens.position.astype(np.int32, copy=False),
        domain=np.full(T, tokens.domain, np.int32),
        domains=numbers.domains,
        ids=ids,
        weights=weights,
        extras={} if logits is None else {"logits": logits},
        documents=list(documents),
        phase=phase,
    )


def batch_of_counts(
    load_LDE: Sequence[np.ndarray],
    routers: Sequence[Router],
    domains: Sequence[str],
    batch: int,
    first_choice: list[np.ndarray] | None = None,
    weight_sum: list[np.ndarray] | None = None,
    energy: list[np.ndarray] | None = None,
) -> CountedBatches:
    """A batch of counts [D, E] of each router. Sources of counts do not give the number of tokens:
    it is the smallest that explains the load of every router, by domain."""
    tokens_D = np.zeros(len(domains), np.int64)
    for load_DE, router in zip(load_LDE, routers, strict=True):
        # no token chooses an expert twice
        tokens_D = np.maximum(tokens_D, load_DE.max(1, initial=0))
        tokens_D = np.maximum(tokens_D, -(-load_DE.sum(1) // router.top_k))
    return CountedBatches(
        batch,
        sum(tokens_D.tolist()),  # may be beyond int64: the writer refuses that
        list(domains),
        list(load_LDE),
        first_choice,
        weight_sum,
        energy=energy,
    )


def batches_of_windows(
    load_WLE: np.ndarray, routers: Sequence[Router], domain: str
) -> Iterator[CountedBatches]:
    """Batches of the counts of each window that has any."""
    for w, load_LE in enumerate(load_WLE):
        if load_LE.any():
            yield batch_of_counts([load_E[None] for load_E in load_LE], routers, [domain], w)


def windows_of(n: int, most: int = WINDOWS) -> np.ndarray:
    """int64 [n]: the window of each of n steps; at most `most` windows, of about equal size."""
    return np.arange(n) * min(n, most) // max(n, 1)


def one_ranks_experts(load_LE: np.ndarray) -> tuple[int, int] | None:
    """The first and last expert with load, if they span at most half of the experts: the source
    then probably holds the counts of one rank of an expert-parallel model. Else None."""
    E = load_LE.shape[1]
    there = np.nonzero(load_LE.any(0))[0]
    if not len(there) or E < 4 or there[-1] - there[0] + 1 > E // 2:
        return None
    return int(there[0]), int(there[-1])

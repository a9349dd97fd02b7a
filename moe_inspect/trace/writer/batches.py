"""The input of the writer: decisions of one forward pass, or counts over several.

T tokens of a batch, K slots, E experts, D domains. An expert id is uint8 or uint16; the dtype's
maximum marks a slot that routed nowhere, which on disk is null. In a trace of the experts that
dropped assignments were meant for, e + E is a slot that expert e dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import run_edges

OF_TOKENS = ("token_id", "document", "sequence", "position", "domain", "phases")


@dataclass(frozen=True)
class Document:
    """`tokens`: how many of its tokens are fed, special tokens included."""

    document: int
    domain: str
    source: str
    tokens: int


@dataclass(frozen=True)
class RoutedBatch:
    """One forward pass, or consecutive ones: `batch` is the number of the last one, and `batches`
    int32 [T] that of each token's where they are several. Arrays of length T are in execution
    order; `ids[r]`: uint8 or uint16 [T, K_r], `weights[r]`: float16 [T, K_r], the bits of
    bfloat16 as uint16, float32 that one of the two holds exactly, or None (a trace without weights
    is still ordered by them), `extras[name][r]`: of `schema.EXTRAS`, float16 [T, E_r] of logits,
    else like `weights[r]`. `domains[d]` is the label of domain code d. `replicas`: of a trace of
    physical experts, forward pass → the expert that each of a router is a replica of, [L, P], −1
    for none; the same array where nothing has changed. Of an encoder-decoder the first `encoded`
    tokens were fed to the encoder, the others to the decoder, and a router has rows only of those
    it sees. `phases`: indices into PHASES [T], where they are not all of one `phase`."""

    batch: int
    token_id: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    domains: Sequence[str]
    ids: list[np.ndarray]
    weights: list[np.ndarray] | None
    documents: list[Document] = field(default_factory=list)
    phase: str = "prefill"
    # passes of one group follow each other and are committed together, or not at all
    group: int | None = None
    encoded: int = 0
    batches: np.ndarray | None = None
    phases: np.ndarray | None = None
    extras: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    replicas: Mapping[int, np.ndarray] = field(default_factory=dict)

    @property
    def first_batch(self) -> int:
        return self.batch if self.batches is None else int(self.batches[0])

    @property
    def numbers(self) -> np.ndarray:
        """The number of each token's forward pass."""
        whole = np.full(len(self.token_id), self.batch, np.int32)
        return whole if self.batches is None else self.batches

    def passes(self) -> Iterator[RoutedBatch]:
        """A batch for each forward pass that has tokens."""
        if self.batches is None or not len(self.batches):
            yield self
            return
        # of the first pass of each document
        of_each = zip(self.document[::-1].tolist(), self.batches[::-1].tolist(), strict=True)
        number_of, last = dict(of_each), int(self.batches[-1])
        for start, end in pairwise(run_edges(self.batches).tolist()):
            number, rows = int(self.batches[start]), slice(start, end)
            yield replace(
                self,
                batch=self.batch if number == last else number,
                batches=None,
                documents=[d for d in self.documents if number_of.get(d.document, last) == number],
                **{n: of[rows] for n in OF_TOKENS if (of := getattr(self, n)) is not None},
                ids=[of_router[rows] for of_router in self.ids],
                weights=self.weights and [of_router[rows] for of_router in self.weights],
                extras={n: [a[rows] for a in of] for n, of in self.extras.items()},
                replicas={n: of for n, of in self.replicas.items() if n == number},
            )

    def seen(self, router: Router) -> slice:
        """Which of its tokens a router sees."""
        if not router.stack:
            return slice(None)
        return slice(self.encoded) if router.stack == "encoder" else slice(self.encoded, None)

    @property
    def nbytes(self) -> int:
        of_routers = self.ids, self.weights or (), *self.extras.values()
        return sum(a.nbytes for of in of_routers for a in of)


@dataclass(frozen=True)
class CountedBatches:
    """Load summed over the batches up to `batch`, from `first_batch` on where that is known:
    integers [D, E_r] a router (`sums`, of `schema.SUMS`: float64). `first_choice` is None where a
    source does not say: null in the table. `decisions`: of all routers, where they did not all see
    every token. In a trace of counts by document a row is one of `documents`, whose counts are all
    here, and `domains` the label of each."""

    batch: int
    tokens: int
    domains: Sequence[str]
    assignments: list[np.ndarray]
    first_choice: list[np.ndarray] | None
    sums: Mapping[str, list[np.ndarray]] = field(default_factory=dict[str, list[np.ndarray]])
    documents: list[Document] = field(default_factory=list)
    decisions: int | None = None
    first_batch: int | None = None


SHARD_TOKENS = 65_536
SHARD_BYTES = 60 * 2**20  # of decisions in memory, at most: shards of deep models hold fewer tokens
SHARD_SECONDS = 60.0  # age at which a shard is committed: decisions of a slow model are safe then
# factor on the limits while the next batch continues sequences of the shard
CONTINUED = 8


@dataclass(frozen=True)
class ShardLimits:
    """When pending batches become a shard: before a batch would make it larger than `tokens`, and
    before a batch that comes after `seconds`. `commit_every`: seconds after which they become one
    without waiting for a batch, so that the trace can be read while it is written; None: never."""

    tokens: int = SHARD_TOKENS
    seconds: float = SHARD_SECONDS
    commit_every: float | None = None


class PendingShard:
    """`batches` of decisions, all of which become one shard."""

    def __init__(self, limits: ShardLimits):
        self.limits = limits
        self._clear()

    def _clear(self) -> None:
        self.batches: list[RoutedBatch] = []
        self._tokens = self._bytes = 0
        self._since = time.monotonic()
        self._reached: dict[tuple[int, int], int] = {}  # (document, sequence) → its last position

    def add(self, batch: RoutedBatch) -> None:
        if not self.batches:
            self._since = time.monotonic()
        self.batches.append(batch)
        self._reached.update((key, last) for key, (_, last) in _reached(batch).items())
        self._tokens += len(batch.token_id)
        self._bytes += batch.nbytes

    def take(self, count: int | None = None) -> list[RoutedBatch]:
        """Remove and return the first `count` batches, by default all."""
        taken, left = self.batches[:count], self.batches[len(self.batches[:count]) :]
        self._clear()
        for batch in left:
            self.add(batch)
        return taken

    def of_closed_groups(self) -> int:
        """How many batches may be committed before the next one comes: of the last group more
        passes may be missing."""
        if not self.batches or (group := self.batches[-1].group) is None:
            return len(self.batches)
        return sum(b.group != group for b in self.batches)

    def ends_before(self, batch: RoutedBatch) -> bool:
        """Whether the shard is to be committed before `batch` joins it."""
        if not self.batches or not self.is_due(batch):
            return False
        if batch.group is not None and batch.group == self.batches[-1].group:
            return False
        # what is counted of consecutive tokens is counted shard by shard: a sequence stays in one,
        # as far as memory and --commit-every allow
        continued = any(
            self._reached.get(key) == first - 1 for key, (first, _) in _reached(batch).items()
        )
        return not continued or self.is_due(batch, CONTINUED)

    def is_due(self, batch: RoutedBatch, times: int = 1) -> bool:
        """Whether the shard would grow too large with `batch`, or has waited too long."""
        return (
            self._tokens + len(batch.token_id) > times * self.limits.tokens
            or self._bytes + batch.nbytes > times * SHARD_BYTES
            or time.monotonic() - self._since > times * self.limits.seconds
        )


def _reached(batch: RoutedBatch) -> dict[tuple[int, int], tuple[int, int]]:
    """(document, sequence) → its first and its last position; the decoder's, where a sequence has
    rows of both an encoder and a decoder."""
    encoded_T = np.arange(len(batch.document)) < batch.encoded
    edges = run_edges(batch.document, batch.sequence, encoded_T)
    first, last = edges[:-1], edges[1:] - 1
    keys = list(zip(batch.document[first].tolist(), batch.sequence[first].tolist(), strict=True))
    begins = list(zip(keys, batch.position[first].tolist(), strict=True))
    begin_of = dict(begins if batch.encoded else reversed(begins))
    end_of = dict(zip(keys, batch.position[last].tolist(), strict=True))
    return {key: (begin_of[key], end) for key, end in end_of.items()}

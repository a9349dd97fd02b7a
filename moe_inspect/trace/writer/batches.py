"""The input of the writer: decisions of one forward pass, or counts over several.

T tokens of a batch, K slots, E experts, D domains. An expert id is uint8 or uint16; the dtype's
maximum marks a slot that routed nowhere, which on disk is null. In a trace of the experts that
dropped assignments were meant for, e + E is a slot that expert e dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.schema import EXTRAS, Router

OF_TOKENS = ("token_id", "document", "sequence", "position", "domain")
OF_ROUTERS = ("ids", "weights", *EXTRAS)


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
    is still ordered by them), `logits[r]`: float16 [T, E_r], `norms[r]` and `peaks[r]` like
    `weights[r]`. `domains[d]` is the label of domain code d. `loss` and `entropy`: float32 [T], NaN
    where there is none. Of an encoder-decoder the first `encoded` tokens were fed to the encoder,
    the others to the decoder, and a router has rows only of those it sees. `phases`: indices into
    PHASES [T], where they are not all of one `phase`."""

    batch: int
    token_id: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    domains: Sequence[str]
    ids: list[np.ndarray]
    weights: list[np.ndarray] | None
    logits: list[np.ndarray] | None = None
    documents: list[Document] = field(default_factory=list)
    phase: str = "prefill"
    # passes of one group follow each other and are committed together, or not at all
    group: int | None = None
    encoded: int = 0
    batches: np.ndarray | None = None
    norms: list[np.ndarray] | None = None
    peaks: list[np.ndarray] | None = None
    loss: np.ndarray | None = None
    entropy: np.ndarray | None = None
    phases: np.ndarray | None = None

    @property
    def first_batch(self) -> int:
        return self.batch if self.batches is None else int(self.batches[0])

    def passes(self) -> Iterator[RoutedBatch]:
        """A batch for each forward pass that has tokens."""
        if self.batches is None or not len(self.batches):
            yield self
            return
        edges = [int(n) for n in run_edges(self.batches)]
        # of the first pass of each document
        number_of = dict(
            zip(reversed(self.document.tolist()), reversed(self.batches.tolist()), strict=True)
        )
        last = int(self.batches[-1])
        for start, end in pairwise(edges):
            number, rows = int(self.batches[start]), slice(start, end)
            yield replace(
                self,
                batch=self.batch if number == last else number,
                batches=None,
                documents=[d for d in self.documents if number_of.get(d.document, last) == number],
                **{
                    name: getattr(self, name)[rows]
                    for name in (*OF_TOKENS, "loss", "entropy", "phases")
                    if getattr(self, name) is not None
                },
                **{
                    name: [a[rows] for a in getattr(self, name)]
                    for name in OF_ROUTERS
                    if getattr(self, name) is not None
                },
            )

    def seen(self, router: Router) -> slice:
        """Which of its tokens a router sees."""
        if not router.stack:
            return slice(None)
        return slice(self.encoded) if router.stack == "encoder" else slice(self.encoded, None)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for name in OF_ROUTERS for a in getattr(self, name) or ())


@dataclass(frozen=True)
class CountedBatches:
    """Load summed over the batches up to `batch`, from `first_batch` on where that is known:
    integers [D, E_r] a router (`weight_sum`, `energy`: float64). `first_choice` is None where a
    source does not say: null in the table. `decisions`: of all routers, where they did not all see
    every token."""

    batch: int
    tokens: int
    domains: Sequence[str]
    assignments: list[np.ndarray]
    first_choice: list[np.ndarray] | None
    weight_sum: list[np.ndarray] | None
    documents: list[Document] = field(default_factory=list)
    decisions: int | None = None
    first_batch: int | None = None
    energy: list[np.ndarray] | None = None


def summed(parts: Sequence[CountedBatches]) -> CountedBatches:
    """The sum of counts of consecutive batches. Domains of a later one begin with those of an
    earlier one."""
    if len(parts) == 1:
        return parts[0]
    last, domains = parts[-1], len(parts[-1].domains)

    def added(name: str) -> list[np.ndarray] | None:
        arrays = [getattr(part, name) for part in parts]
        if any(of_routers is None for of_routers in arrays):
            return None
        return [_added(of_router, domains) for of_router in zip(*arrays, strict=True)]

    assignments, decisions = added("assignments"), [part.decisions for part in parts]
    assert assignments is not None
    return CountedBatches(
        last.batch,
        sum(part.tokens for part in parts),
        last.domains,
        assignments,
        added("first_choice"),
        added("weight_sum"),
        [document for part in parts for document in part.documents],
        None if None in decisions else sum(n for n in decisions if n is not None),
        parts[0].first_batch,
        added("energy"),
    )


def _added(parts: Sequence[np.ndarray], domains: int) -> np.ndarray:
    total_DE = np.zeros((domains, *parts[0].shape[1:]), parts[0].dtype)
    for part_DE in parts:
        total_DE[: len(part_DE)] += part_DE
    return total_DE

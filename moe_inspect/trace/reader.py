"""Trace: a trace directory, read lazily, a router or a shard at a time."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import chain
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from moe_inspect.errors import Damaged, MoeInspectError, reading
from moe_inspect.later import pd
from moe_inspect.progress import phase
from moe_inspect.text import plural
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote, location
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.replicas import changes
from moe_inspect.trace.schema import SORTED_BATCHES, Layers
from moe_inspect.trace.shard import JoinedShards, Shard
from moe_inspect.trace.shard_list import committed_shards

Scheduler = Any  # an address, or a client of dask.distributed, which need not be installed
FEWEST_PIECES, MOST_TOKENS = 8, 65_536  # of a trace whose small shards are read as one


class Trace(TraceHeader):
    """A trace as it is stored. Tables are pandas DataFrames. Read large ones by layer
    (`routing(layers=3)`) or by shard (`for shard in trace.shards`), which keeps memory independent
    of the trace's length. `scheduler`: of the dask.distributed cluster that passes over it run on,
    see `on`."""

    scheduler: Scheduler = None

    def __init__(self, path: str | Path | Remote):
        where = location(path)
        for looks_again in (True, False):  # a writer that resumes may take shards back in between
            with reading(where):
                super().__init__(where, read_manifest(where))
                self._files = committed_shards(where, self.manifest)
            # the manifest is written after the lines that it counts
            stated = (self.manifest.get("counts") or {}).get("tokens", 0)
            if self.n_tokens >= stated:
                break
            if not looks_again:
                said = f"counts.tokens is {stated}, the shards have {self.n_tokens}"
                raise Damaged(where / schema.MANIFEST, said, schema.MANIFEST)
        self._pieces = self._joined(min(MOST_TOKENS, self.n_tokens // FEWEST_PIECES))

    def __repr__(self) -> str:
        return (
            f"Trace({str(self.path)!r}: {plural(self.n_tokens, 'token')}, "
            f"{plural(len(self.routers), 'router')}, {self.status})"
        )

    @property
    def n_tokens(self) -> int:
        """Tokens in committed shards, whatever the manifest last said."""
        return sum(f.tokens for f in self._files)

    @property
    def n_decisions(self) -> int:
        """Decisions in committed shards, counted ones included: tokens × routers, unless it is an
        encoder-decoder's."""
        return sum(f.decisions for f in self._files)

    @property
    def fed_by_length(self) -> str:
        """How `trace` sorted the documents, as a sentence; "" where each quarter of the tokens is
        as the text came, or nothing was sorted."""
        batch_tokens = ((self.manifest.get("corpus") or {}).get("plan") or {}).get("batch_tokens")
        together = SORTED_BATCHES * batch_tokens if isinstance(batch_tokens, int) else 0
        if 4 * together < self.n_tokens:
            return ""
        of = f" of each {together:,} tokens" if together < self.n_tokens else ""
        return (
            f"Documents were fed by length, the shortest{of} first: part of this may be long text "
            "against short."
        )

    def on(self, scheduler: Scheduler) -> Self:
        """The same trace, passes over which run on a dask.distributed cluster whose workers see it
        at the same path. `scheduler`: its address, or a client of it; None for this process."""
        if scheduler is None and self.scheduler is None:
            return self
        other = copy(self)
        other.scheduler = scheduler
        return other

    def __getstate__(self) -> dict[str, object]:
        """As a worker of a cluster gets it, who is in a directory of its own."""
        return self.__dict__ | {"path": self.path.resolve(), "scheduler": None}

    @property
    def shards(self) -> Iterator[Shard]:
        """What the trace is read in: its shards in order, many small ones joined."""
        return map(self.shard, range(self.n_shards))

    @property
    def n_shards(self) -> int:
        return len(self._pieces)

    def shard(self, number: int) -> Shard:
        """A shard of its own to read from: what it opens is closed with it."""
        return self._read(self._pieces[number])

    def is_joined(self, number: int) -> bool:
        """Whether that shard is several small ones."""
        return len(self._pieces[number]) > 1

    def joined(self, most: int) -> Iterator[Shard]:
        """The shards in order, consecutive ones of a rank as one where together they have at most
        so many tokens; 0: as they were committed."""
        return map(self._read, self._joined(most))

    def _read(self, numbers: range) -> Shard:
        return JoinedShards.of([Shard(self, self._files[n]) for n in numbers])

    def _joined(self, most: int) -> list[range]:
        """Shards of counts stay: they may be windows of steps."""
        found, tokens = list[range](), 0
        for n, files in enumerate(self._files):
            tokens += files.tokens
            of_rank = n > 0 and self._files[n - 1].rank == files.rank
            if of_rank and tokens <= most and not self.counts_only:
                found[-1] = range(found[-1].start, n + 1)
            else:
                found.append(range(n, n + 1))
                tokens = files.tokens
        return found

    def routing(self, layers: Layers = None, router: int | None = None) -> pd.DataFrame:
        """The routing table, of all routers, of these layers ("0-3,7", 3 or [0, 7]) or of one
        router."""
        self._refuse_counts("decisions")
        chosen = self.router_index(layers, router)
        return self._by_router("routing", [[s.routing(r) for r in chosen] for s in self.shards])

    def replicas(self) -> pd.DataFrame:
        """Where an engine balanced the load over replicas of experts: from forward pass `batch` on,
        until the next `batch` of the same router, that is a replica of `expert` (−1: of none). A
        row per physical expert of each map."""
        if schema.PHYSICAL not in self.slot_values:
            raise MoeInspectError(f"{self.path} has no physical experts: no engine recorded any")
        placed = changes(one for shard in self.shards for one in shard.replicas())
        rows = [
            (one.batch, self.routers[one.router].layer, one.router, physical, expert)
            for one in placed
            for physical, expert in enumerate(one.experts)
        ]
        names = ("batch", "layer", "router", "physical", "expert")
        kinds = dict(zip(names, ("i4", "u2", "u2", "u2", "i4"), strict=True))
        return pd.DataFrame(rows, columns=[*kinds]).astype(kinds)

    def tokens(self) -> pd.DataFrame:
        self._refuse_counts("tokens")
        return self._frame("tokens", [s.tokens() for s in self.shards])

    def documents(self) -> pd.DataFrame:
        return self._frame("documents", [s.table("documents") for s in self.shards])

    def counts(self) -> pd.DataFrame:
        """The counts table of a trace made with --counts-only."""
        if not self.counts_only:
            raise MoeInspectError(
                f'{self.path} holds decisions, not counts: report(trace).tables["load"] counts them'
            )
        return self._frame("counts", [s.counts() for s in self.shards])

    def logits(self, layers: Layers = None, router: int | None = None) -> pd.DataFrame:
        if "logits" not in self.tables:
            raise MoeInspectError(f"{self.path} has no logits: trace with --logits")
        chosen = self.router_index(layers, router)
        rows = [[s.rows_of_router("logits", r) for r in chosen] for s in self.shards]
        return self._by_router("logits", rows)

    def vocabulary(self) -> pd.DataFrame:
        """token_id, token; empty where the trace was recorded without a tokenizer."""
        return self.vocabulary_table.to_pandas()

    def _refuse_counts(self, what: str) -> None:
        if self.counts_only:
            said = f"holds counts only, no {what}: {self.more_than_counts}"
            raise MoeInspectError(f"{self.path} {said}")

    def _by_router(self, name: str, of_shards: list[list[pa.Table]]) -> pd.DataFrame:
        """The rows of one router after those of another; each shard is opened once."""
        return self._frame(name, list(chain.from_iterable(zip(*of_shards, strict=True))))

    def _frame(self, name: str, parts: list[pa.Table]) -> pd.DataFrame:
        # some shards say that they hold no null
        joined = pa.concat_tables(
            parts or [self.columns_of(name).empty_table()], promote_options="permissive"
        )
        return joined.unify_dictionaries().to_pandas()


def open_trace(path: str | Path | Trace, *, scheduler: Scheduler = None) -> Trace:
    """See `moe_inspect.open_trace`."""
    trace = path if isinstance(path, Trace) else Trace(path)
    return trace if scheduler is None else trace.on(scheduler)


def address(trace: object) -> str:
    """Where a trace is, as it was given: a page that is shared must not say more. `trace`: a Trace,
    or its path."""
    return str(trace.path if isinstance(trace, Trace) else trace)


def place_of(trace: Trace | str | Path | Remote) -> Path | Remote:
    return trace.path if isinstance(trace, Trace) else location(trace)


def shards_of(trace: Trace, name: str, most: int | None = None) -> Iterator[Shard]:
    """The shards, read in a phase of this name, as progress is told. `most`: as `Trace.joined`
    takes it."""
    advance = phase(name, trace.n_tokens, "tokens")
    for shard in trace.shards if most is None else trace.joined(most):
        yield shard
        advance(shard.files.tokens)

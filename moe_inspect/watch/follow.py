"""Follows a trace that is being written, by the lines of its lists of shards, and counts the load
of what is new.

L routers, E experts, N assignments of a router.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_inspect.errors import Damaged, MoeInspectError, reading
from moe_inspect.text import first_line
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote, location
from moe_inspect.trace.files.lock import is_locked, is_running, left_of
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.manifest import read_manifest, stored_manifest, writer_of
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.shard_list import Known, ShardFiles, committed_shards
from moe_inspect.watch.alarms import Window

WAITING, RECORDING = "waiting", "recording"  # there is no trace yet; its writer is at work
COMPLETE, INTERRUPTED, KILLED = "complete", "interrupted", "killed"
ENDED = (COMPLETE, INTERRUPTED, KILLED)
AT_ONCE_S = 0.5  # of counting in a poll: what a trace holds already is counted in parts
SURE_POLLS = 2  # that find no writer: between two of them it may have closed the trace
TRIES = 5  # polls that fail: a file may be replaced while it is read, a network may be down


@dataclass(frozen=True, kw_only=True)
class Piece(Window):
    """The load of a piece of a trace: consecutive shards. It holds so many `tokens` and
    `decisions`."""

    tokens: int
    decisions: int


def _successors(traces: Iterable[Path]) -> set[Path]:
    """The traces that an engine goes on with: whoever follows the one before follows it."""
    found = set[Path]()
    for path in traces:
        with suppress(MoeInspectError, OSError):  # one that is just written, or deleted
            followed_by = TraceHeader(path, read_manifest(path)).followed_by
            if followed_by is not None:
                found.add(followed_by)
    return found


def joined(pieces: Sequence[Piece]) -> Piece:
    """The sum of consecutive pieces."""
    return Piece(
        pieces[0].first,
        pieces[-1].last,
        [np.sum(load, axis=0) for load in zip(*(piece.load for piece in pieces), strict=True)],
        np.sum([piece.tokens_R for piece in pieces], axis=0),
        tokens=sum(piece.tokens for piece in pieces),
        decisions=sum(piece.decisions for piece in pieces),
    )


def piece_of(shard: Shard) -> Piece:
    """What a shard holds. Damaged where it names an expert that its router does not have."""
    routers, files = shard.trace.routers, shard.files
    if shard.trace.counts_only:
        table = shard.counts()
        load_LE = np.zeros((len(routers), max(router.experts for router in routers)), np.int64)
        at = table["router"].to_numpy(), table["expert"].to_numpy()
        np.add.at(load_LE, at, table["assignments"].to_numpy())
        load = [load_E[: router.experts] for load_E, router in zip(load_LE, routers, strict=True)]
        # of two stacks counts do not say which tokens reach a router: as many as its load takes
        tokens = [
            -(-int(load_E.sum()) // router.top_k) if router.stack else files.tokens
            for load_E, router in zip(load, routers, strict=True)
        ]
    else:
        load, tokens = zip(*(_load(shard, r) for r in range(len(routers))), strict=True)
        if sum(tokens) != (rows := shard.file("routing").metadata.num_rows):
            name = files.paths["routing"]
            said = f"{sum(tokens):,} of its {rows:,} rows are of a router of the manifest"
            raise Damaged(name, said, name)
    first = files.last_batch if files.first_batch is None else files.first_batch
    tokens_R, T, decisions = np.array(tokens, np.int64), files.tokens, files.decisions
    return Piece(first, files.last_batch, load, tokens_R, tokens=T, decisions=decisions)


def _load(shard: Shard, r: int) -> tuple[np.ndarray, int]:
    """The load_E of a router and its decisions; a slot at a time, which stays in the caches."""
    router = shard.trace.routers[r]
    table = shard.rows_of_router("routing", r, [f"expert_{j}" for j in range(router.top_k)])
    load_E = np.zeros(router.experts, np.int64)
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        ids_N = (chunk.drop_null() if chunk.null_count else chunk).to_numpy()
        found_E = np.bincount(ids_N, minlength=router.experts)
        if len(found_E) > router.experts:
            name = shard.files.paths["routing"]
            said = f"it has an assignment to expert {len(found_E) - 1} of layer {router.layer},"
            raise Damaged(name, f"{said} which has {router.experts} experts", name)
        load_E += found_E
    return load_E, len(table)


@dataclass
class News:
    """What a poll found. `pieces`: counted since the last one, in order, and their `shards`.
    `again`: those of earlier polls are void, since the trace was begun again or taken back.
    `left_tokens`: committed, but not counted yet. `dropped`: decisions that were, in all, as far as
    the writer says. `trouble`: why it could not be read."""

    status: str
    pieces: list[Piece] = field(default_factory=list[Piece])
    shards: list[Shard] = field(default_factory=list[Shard])
    again: bool = False
    left_tokens: int = 0
    dropped: int = 0
    trouble: str = ""


class Follower:
    """`poll` counts what was committed since the last call. `path`: a directory, or a URL that
    fsspec reads; the trace need not exist yet, and is the next one once an engine goes on there. Of
    a directory of traces the newest is followed, also one that comes later. `of_process`: only the
    trace that this process writes there. MoeInspectError where it stays unreadable."""

    def __init__(
        self,
        path: str | Path | Remote,
        of_process: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._of_process = of_process
        self.path = location(path)
        self.header: TraceHeader | None = None
        self._clock = clock
        self._at = self.path  # an import is written beside it
        self._manifest = b""
        self._lines: Known = {}
        self._counted: dict[int, list[ShardFiles]] = {}  # by rank
        self._no_writer = self._failed = 0
        self._before: TraceHeader | None = None  # which the one that is followed now follows
        self._seen_recording = False
        self._dropped_before = 0  # of all before it
        self._folder, self._seen = self.path, set[Path]()  # traces in it
        self._is_another = False  # than the one before, which it does not follow

    def poll(self) -> News:
        news = News(WAITING)
        try:
            self._poll(news)
            self._failed = 0
        except FileNotFoundError:  # no manifest (yet)
            if self._before is not None:  # the next one of an engine begins with its next tokens
                goes_on = is_written_on(self._before, self._seen_recording)
                news.status = RECORDING if goes_on else self._before.status
            else:
                news.again, self.header, self._counted = self.header is not None, None, {}
        except (MoeInspectError, OSError) as error:
            self._failed += 1
            if self._failed >= TRIES:
                with reading(self.path):
                    raise
            news.status = RECORDING  # one that cannot be read has not ended well
            if self._failed > 1:  # its writer may have replaced what was just listed
                news.trouble = first_line(error)
        if not news.left_tokens and self._moves_on():
            return self.poll()
        self._dropped_before *= not news.again
        news.dropped = self._dropped_before + _dropped(self.header)
        return news

    def _moves_on(self) -> bool:
        """To the newest trace in a directory of traces, where new ones have come."""
        if isinstance(self._folder, Remote) or self._of_process is not None:
            return False
        # (a hidden one is a draft)
        there = {file.parent for file in self._folder.glob(f"[!.]*/{schema.MANIFEST}")}
        new = there - self._seen - {self.path}
        if new and self._seen:
            new -= _successors(there)
        self._seen |= there
        if new:
            self.path = max(new, key=_written_s)
            self._counted, self._before, self._is_another = {}, None, True
        return bool(new)

    @property
    def writer(self) -> str:
        """Which process writes the trace: "process 12", with its host where it is another."""
        capture = self.header.manifest["capture"] if self.header is not None else {}
        pid, host = capture.get("pid"), capture.get("host")
        if pid is None:
            return "its writer"
        return f"process {pid}" + (f" on {host}" if host != socket.gethostname() else "")

    def _poll(self, news: News) -> None:
        header, news.again = self._opened()
        # before the shards: of a trace that is complete by now all of them are listed
        news.status = self._status(header)
        self._seen_recording |= news.status == RECORDING
        listed_of: dict[int, list[ShardFiles]] = {rank: [] for rank in self._counted}
        for shard in committed_shards(self._at, header.manifest, self._lines):
            listed_of.setdefault(shard.rank, []).append(shard)
        # a trace that was begun again, or resumed before these shards, is counted anew
        news.again |= not all(
            _begins_with(listed_of[rank], counted) for rank, counted in self._counted.items()
        )
        if news.again:
            self._counted = {}
        until = self._clock() + AT_ONCE_S
        for rank, listed in listed_of.items():
            counted = self._counted.setdefault(rank, [])
            for files in listed[len(counted) :]:
                if self._clock() > until and news.pieces:
                    news.left_tokens += files.tokens
                    continue
                shard = Shard(header, files)
                piece = piece_of(shard)
                counted.append(files)
                if piece.tokens:
                    news.pieces.append(piece)
                    news.shards.append(shard)
        if header.followed_by is not None and not news.left_tokens:
            self.path = header.followed_by
            self._before, self._counted, news.status = header, {}, RECORDING

    def _opened(self) -> tuple[TraceHeader, bool]:
        """The manifest, and whether it is of another trace. FileNotFoundError: there is none."""
        at, before = self._where(), self.header
        if isinstance(at, Remote):
            at.filesystem.invalidate_cache()  # listings of directories
        data = stored_manifest(at)
        if before is not None and at == self._at and data == self._manifest:
            return before, False
        header = TraceHeader(at, read_manifest(at))
        if self._of_process not in (None, header.manifest["capture"].get("pid")):
            raise FileNotFoundError(f"{at} is of another process")
        again = before is not None and (self._is_another or before.routers != header.routers)
        self._is_another = False
        if at != self._at or again:
            self._dropped_before += _dropped(self._before)
            self._lines, self._before = {}, None
        self.header, self._at, self._manifest = header, at, data
        return header, again

    def _where(self) -> Path | Remote:
        """Where the trace is: an import writes it beside its directory, under a temporary name."""
        path = self.path
        if isinstance(path, Remote) or not path.parent.is_dir():
            return path
        drafts = [at for at in left_of(path) if (at / schema.MANIFEST).is_file()]
        at_work = [draft for draft in drafts if is_locked(draft)]
        there = [path] if (path / schema.MANIFEST).is_file() else []
        return next(iter([*at_work, *there, *drafts]), path)

    def _status(self, header: TraceHeader) -> str:
        if header.status != "recording":
            return header.status
        capture = header.manifest["capture"]
        at_work = (  # as far as this machine can tell
            isinstance(self._at, Remote)
            or capture.get("host") != socket.gethostname()
            or capture.get("pid") in (None, os.getpid())
            or is_locked(self._at)
            or writer_of(header.manifest) is not None
        )
        self._no_writer = 0 if at_work else self._no_writer + 1
        return KILLED if self._no_writer >= SURE_POLLS else RECORDING


def _written_s(trace: Path) -> float:
    """When its manifest was written last."""
    try:
        return (trace / schema.MANIFEST).stat().st_mtime
    except FileNotFoundError:  # it was deleted meanwhile
        return 0.0


def _dropped(header: TraceHeader | None) -> int:
    counts = None if header is None else header.manifest.get("counts")
    return (counts or {}).get("dropped") or 0


def is_written_on(header: TraceHeader, seen_recording: bool) -> bool:
    """Whether the process that wrote a trace which another follows is still at work, as far as this
    machine can tell. `seen_recording`: it was, when the trace was looked at before; a complete one
    of another host may be a copy."""
    capture = header.manifest["capture"]
    if capture.get("host") != socket.gethostname():
        return seen_recording
    return is_running(capture["pid"], capture.get("process_start"))


def _begins_with(listed: list[ShardFiles], others: list[ShardFiles]) -> bool:
    return len(listed) >= len(others) and all(
        a is b or (a.index == b.index and a.lines == b.lines)
        for a, b in zip(listed, others, strict=False)
    )

"""What the plugin inside an engine records of a run's own requests, in place of what the server
returns: gate weights too. The plugin's traces are read while they grow; other requests are left
out.

T tokens that were fed, N rows of a request, K slots.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np

from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.capture.engine.control import tell_by
from moe_inspect.capture.engine.settings import REFUSED, variable
from moe_inspect.capture.server.client import MODELS, Json, Refused, ask
from moe_inspect.capture.server.protocols import RoutedAnswer, Served
from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.routed import checked_ids
from moe_inspect.trace.output_dir import remove_trace
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import MANIFEST
from moe_inspect.trace.shard import Shard

LOOK_S = 0.25  # between two looks at the traces
LOST_S = 120.0  # without a new row of ours, when all are computed
PROBE_S = 60.0  # the same, of the first request: a process describes the model before
# of an engine that is started for one run, whatever the user's own variables say
ALL_OF_IT = {"sample": "1", "start": "on", "logits": "0", "text": "1", "queue_mb": "4096"}
ALL_OF_IT |= {"max_gb": "1", "keep": "0"}  # who reads deletes what was read


class Started(NamedTuple):
    """An engine that was started for this run. `folder`: of its plugin's traces, None where the
    user's own variables name one; `began_at`: where in its log it began."""

    folder: Path | None
    log: Path
    began_at: int

    def refused(self) -> str | None:
        """Why its plugin records nothing, by the log."""
        if not self.log.is_file():  # as /dev/null
            return None
        found = re.search(rf"moe-inspect: ({REFUSED}.*)", said_since(self.log, self.began_at))
        return None if found is None else found[1]


def said_since(log: Path, began_at: int) -> str:
    """What was written to a log since it had so many bytes, or all, where the older half was
    dropped."""
    with open(log, "rb") as file:
        file.seek(began_at if began_at <= file.seek(0, os.SEEK_END) else 0)
        return file.read().decode(errors="replace")


started_with: ContextVar[Started | None] = ContextVar("started_with", default=None)


@contextmanager
def recording_inside(log: Path) -> Iterator[dict[str, str]]:
    """Variables for an engine that is started for a run: its plugin, if it has it, records into a
    directory that is deleted at the end, beside the engine's log. None where the user's own
    variables name a directory."""
    began_at = log.stat().st_size if log.is_file() else 0
    where = log.parent if log.is_file() else None  # not beside /dev/null
    folder, variables = None, dict[str, str]()
    with ExitStack() as kept:
        if not os.environ.get(variable("trace")):
            # what writes may outlive the engine by a moment
            place = tempfile.TemporaryDirectory(
                prefix=f"{log.stem}-", dir=where, ignore_cleanup_errors=True
            )
            # which the plugin makes before it serves
            folder = Path(kept.enter_context(place)).absolute() / "traces"
            variables = {variable(n): v for n, v in {"trace": str(folder), **ALL_OF_IT}.items()}
        before = started_with.set(Started(folder, log, began_at))
        try:
            yield variables
        finally:
            started_with.reset(before)


async def traces_inside(http: httpx.AsyncClient) -> Path | None:
    """The directory of the traces of the plugin in a server's engines. None where there is no
    plugin, as far as can be known; MoeInspectError where what it records is of no use."""
    told, started = await told_inside(http), started_with.get()
    if started is not None and (refused := started.refused()) is not None:
        raise MoeInspectError(refused)
    folder = started.folder if started is not None else None
    return folder if folder is not None and folder.is_dir() else told


async def told_inside(http: httpx.AsyncClient) -> Path | None:
    """The same, by what the plugin says of itself."""
    try:
        states = await tell_by(http, "status")
    except Refused:  # by what stands before the engine: who has the plugin is not known
        return None
    return None if states is None else _folder_of(states)


def _folder_of(states: Sequence[Json]) -> Path:
    """MoeInspectError where the engines do not record all of every request in one directory that
    can be read here."""
    (first, *_) = states
    if not all("trace" in state and "host" in state for state in states):
        raise MoeInspectError("it is an older one, which does not say where its traces are")
    if (folder := first["trace"]) is None:
        raise MoeInspectError(f"{variable('trace')} is not set in the engine")
    if not all(state["on"] for state in states):
        error = next((state["error"] for state in states if state["error"]), None)
        raise MoeInspectError(f"it has stopped: {error}" if error else "it is switched off")
    if (share := min(state["sample"] for state in states)) < 1:
        raise MoeInspectError(f"it records a share of {share:g} of the requests")
    for state in states:
        if state["host"] != socket.gethostname():
            said = f"its traces are in {state['trace']} of {state['host']}, which is another host"
            raise MoeInspectError(said)
        if state["trace"] != folder:
            both = f"{folder} and {state['trace']}"
            raise MoeInspectError(f"its engines record in more than one directory: {both}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise MoeInspectError(f"its traces are in {folder}, which cannot be read here")
    return Path(folder)


@dataclass(frozen=True)
class Rows:
    """Rows of a request, in the order in which they were computed: `ids` and `weights` [N, K] of
    each router. `token`: −1 where the trace does not say it."""

    position: np.ndarray
    token: np.ndarray
    ids: list[np.ndarray]
    weights: list[np.ndarray]


@dataclass
class Followed:
    """A trace that is read while it grows. `stamp`: of its files, as last read; `tokens`: that were
    read; `names`: of the documents that are ours; `closed`: nothing follows."""

    stamp: object = None
    tokens: int = 0
    names: dict[int, tuple[int, int]] = field(default_factory=dict)
    closed: bool = False


class Inside:
    """`name`: what the names of this run's requests begin with, before their number, which grows,
    and that of the attempt. What the traces of `folder` hold already is not read. `error`: of the
    last trace that could not be read."""

    def __init__(self, folder: Path, served: Served, name: str, http: httpx.AsyncClient):
        self.folder, self.http = folder, http
        self.error: Exception | None = None
        self.routers = [served.routers[r] for r in served.chosen]
        self._named = re.compile(rf"{re.escape(name)}(\d+)-(\d+)")
        self._traces: dict[Path, Followed] = {}
        self._rows: dict[tuple[int, int], list[Rows]] = {}  # of each request that is not given
        self._given = -1  # the highest number of these
        self._deleted: Path | None = None  # a trace that was not read to its end
        self._began = False
        self.look()
        self._began = True

    async def routed(
        self, row: TokenSequence, asked: asyncio.Task[RoutedAnswer], is_probe: bool = False
    ) -> RoutedAnswer:
        """The answer of the task, with its decisions and weights, once these are committed; in the
        order of the numbers. MoeInspectError where the traces lack rows of it, and none of ours has
        come for long, or the server has ended."""
        while not asked.done():  # what the engine deletes is read before
            await asyncio.wait([asked], timeout=LOOK_S)
            self.look()
        answer, within_s = asked.result(), PROBE_S if is_probe else LOST_S
        until = time.monotonic() + within_s
        while (found := self.found(row, answer)) is None:
            if self.look():
                until = time.monotonic() + within_s
            elif time.monotonic() > until or not os.path.isdir(self.folder):
                await ask(self.http, MODELS)  # raises if the server has ended
                if not self.look():  # which may have waited
                    raise MoeInspectError(self._lacks(row, is_probe))
                until = time.monotonic() + within_s
            else:
                await asyncio.sleep(LOOK_S)
        key = self._key(answer.name)
        assert key is not None
        self._given = key[0]
        self._rows = {k: rows for k, rows in self._rows.items() if k[0] > self._given}
        return found

    def found(self, row: TokenSequence, answer: RoutedAnswer) -> RoutedAnswer | None:
        """The answer with its decisions and weights, if all were read and none was given."""
        if (key := self._key(answer.name)) is None:
            return None
        routes = self._routes(key, answer.fed(row.ids))
        return None if routes is None else replace(answer, ids=routes[0], weights=routes[1])

    def _lacks(self, row: TokenSequence, is_probe: bool) -> str:
        if is_gone := not os.path.isdir(self.folder):
            why = "the directory is gone"
        elif self._deleted is not None:
            keep = variable("keep")
            why = f"{self._deleted.name} was deleted before it was read: set {keep} higher"
        else:
            why = str(self.error or "they were dropped or not written: see the engine's log")
        if is_probe:
            after = "" if is_gone else f" after {PROBE_S:g} s"
            return f"{self.folder} has no rows of a first request{after}: {why}"
        return (
            f"the plugin's traces in {self.folder} lack rows of sequence {row.sequence} "
            f"({row.source}): {why}; continue with --resume"
        )

    def _key(self, name: str) -> tuple[int, int] | None:
        """Of a request of ours that is still to be given, its number and that of the attempt."""
        named = self._named.search(name)
        key = None if named is None else (int(named[1]), int(named[2]))
        return key if key is not None and key[0] > self._given else None

    def _routes(
        self, key: tuple[int, int], fed_T: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
        """Of each token that was fed the row that was computed last; None where one has no row
        (yet). An engine may have computed more: it schedules ahead."""
        parts = self._rows.get(key, [])
        row_T, n = np.full(len(fed_T), -1), 0
        for part in parts:
            fed_N = part.position < len(fed_T)
            at = part.position[fed_N]
            fed_N[fed_N] = (part.token[fed_N] == fed_T[at]) | (part.token[fed_N] < 0)
            row_T[part.position[fed_N]] = n + np.flatnonzero(fed_N)
            n += len(fed_N)
        if (row_T < 0).any():
            return None

        def joined(name: str) -> list[np.ndarray]:
            of_parts = (getattr(part, name) for part in parts)
            return [np.concatenate(of_router)[row_T] for of_router in zip(*of_parts, strict=True)]

        return joined("ids"), joined("weights")

    def look(self) -> bool:
        """Reads what is new. Whether any of it is ours."""
        new = False
        for path in self._listed():
            try:
                new |= self._follow(path)
            except (OSError, MoeInspectError) as error:
                if path.exists():  # it may be another's
                    self.error = error
        return new

    def _listed(self) -> list[Path]:
        """The traces there are. Forgets those that are gone."""
        listed = sorted(file.parent for file in self.folder.glob("*/shards-0.jsonl"))
        for path in self._traces.keys() - set(listed):
            known, stem = self._traces[path], path.name[:-4]
            later = any(path < other and other.name.startswith(stem) for other in listed)
            if known.stamp is not None or later:  # else it has not begun
                del self._traces[path]
                self._deleted = self._deleted if known.closed else path
        return listed

    def _follow(self, path: Path) -> bool:
        known = self._traces.setdefault(path, Followed())
        files = [(path / name).stat() for name in ("shards-0.jsonl", MANIFEST)]
        stamp = [(found.st_ino, found.st_size, found.st_mtime_ns) for found in files]
        if known.stamp == stamp:
            return False
        trace, new = Trace(path), False
        for shard in trace.joined(0) if self._began else ():
            if shard.files.last_token >= known.tokens:
                new |= self._read(path, shard, max(known.tokens - shard.files.first_token, 0))
                known.tokens = shard.files.last_token + 1
        known.stamp, known.tokens = stamp, trace.n_tokens
        known.closed = trace.status != "recording"
        if known.closed and self._began:
            if trace.followed_by is not None:
                self._traces.setdefault(trace.followed_by, Followed())
            started = started_with.get()
            if started is not None and self.folder == started.folder:
                with suppress(OSError, MoeInspectError):
                    remove_trace(path)
        return new

    def _read(self, path: Path, shard: Shard, skip: int) -> bool:
        """The rows of ours in a shard, behind so many that were read before."""
        names = self._traces[path].names
        documents = shard.table("documents", ["document", "source"]).to_pydict()
        for document, source in zip(documents["document"], documents["source"], strict=True):
            if (key := self._key(source)) is not None:
                names[document] = key
        columns = ("document", "position", "token_id")
        table = shard.tokens([*columns])
        document_N, position_N, token_N = (table[name].to_numpy() for name in columns)
        keys = {d: names[d] for d in np.unique(document_N[skip:]).tolist() if d in names}
        keys = {document: key for document, key in keys.items() if key[0] > self._given}
        if not keys:
            return False
        at_N = skip + np.flatnonzero(np.isin(document_N[skip:], [*keys]))
        at = [self._router(shard, path, r) for r in range(len(self.routers))]
        ids = [
            checked_ids(shard.ids(r)[at_N], router, str(path))
            for r, router in zip(at, self.routers, strict=True)
        ]
        weights = [shard.weights(r)[at_N].astype(np.float16) for r in at]
        for document, key in keys.items():
            n = np.flatnonzero(document_N[at_N] == document)
            of_routers = [of[n] for of in ids], [of[n] for of in weights]
            rows = Rows(position_N[at_N[n]], token_N[at_N[n]], *of_routers)
            self._rows.setdefault(key, []).append(rows)
        return True

    def _router(self, shard: Shard, path: Path, r: int) -> int:
        """Of a router of ours, its number in a trace."""
        own = self.routers[r]
        for n, router in enumerate(shard.trace.routers):
            if (router.layer, router.experts, router.top_k) == (own.layer, own.experts, own.top_k):
                return n
        raise MoeInspectError(
            f"{path} has no router of layer {own.layer} that chooses {own.top_k} of {own.experts} "
            "experts: is it this model's config?"
        )

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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np

from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.capture.engine.control import tell_by
from moe_inspect.capture.engine.settings import is_asked, variable
from moe_inspect.capture.server.client import Json, root_of
from moe_inspect.capture.server.protocols import RoutedAnswer, Served
from moe_inspect.errors import Damaged, MoeInspectError
from moe_inspect.importers.routed import checked_ids
from moe_inspect.text import print_stderr
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

LOOK_S = 0.25  # between two looks at the traces
# without a new row of ours, when all are computed: what describes a model takes long
LOST_S = 120.0
# of an engine that is started for one run, whose traces are only read once
BOUNDS = {variable("max_gb"): "1", variable("keep"): "1"}
# directory of the traces of the plugin in the engine that was started for this run
started_with: ContextVar[Path | None] = ContextVar("started_with", default=None)


@contextmanager
def recording_inside() -> Iterator[dict[str, str]]:
    """Variables for an engine that is started for a run: its plugin, if it has it, records into a
    directory that is deleted at the end. None where the user has set their own."""
    if is_asked():
        yield {}
        return
    # what writes may outlive the engine by a moment
    kept = tempfile.TemporaryDirectory(prefix="moe-inspect-engine-", ignore_cleanup_errors=True)
    with kept as place:
        folder = Path(place) / "traces"  # which the plugin makes before the engine serves
        before = started_with.set(folder)
        try:
            yield {variable("trace"): str(folder), **BOUNDS}
        finally:
            started_with.reset(before)


async def traces_inside(http: httpx.AsyncClient) -> Path | None:
    """The directory of the traces of the plugin in a server's engines. None where there is no
    plugin, or it does not do, which is said."""
    if (folder := started_with.get()) is not None:
        return folder if folder.is_dir() else None
    try:
        if (states := await tell_by(http, "status")) is None:
            return None
        folder = _folder_of(states)
    except MoeInspectError as error:
        said = f"{root_of(http)}: what its plugin records is not used: {error}"
        print_stderr(f"{said}: the trace has what the server returns, without gate weights")
        return None
    return folder


def _folder_of(states: Sequence[Json]) -> Path:
    """MoeInspectError where the engines do not record all of every request in one directory that
    can be read here."""
    (first, *_) = states
    folder, host = first.get("trace"), first.get("host")
    if folder is None:
        raise MoeInspectError(f"{variable('trace')} is not set in the engine")
    if not all(state["on"] for state in states):
        error = next((state["error"] for state in states if state["error"]), None)
        raise MoeInspectError(f"it has stopped: {error}" if error else "it is switched off")
    if (share := min(state["sample"] for state in states)) < 1:
        raise MoeInspectError(f"it records a share of {share:g} of the requests")
    if {(state["trace"], state["host"]) for state in states} != {(folder, socket.gethostname())}:
        raise MoeInspectError(f"its traces are in {folder} of {host}, which is another host")
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


class Inside:
    """`name`: what the names of this run's requests begin with, before the number of their
    sequence. What the traces of `folder` hold already is not read."""

    def __init__(self, folder: Path, served: Served, name: str):
        self.folder = folder
        self.routers = [served.routers[r] for r in served.chosen]
        self._named = re.compile(rf"{re.escape(name)}(\d+)")
        self._sequences: dict[tuple[Path, int], int] = {}  # of each document that is ours
        self._rows: dict[int, list[Rows]] = {}  # of each sequence
        self._stamps: dict[Path, object] = {}
        self._next: dict[Path, int] = {}  # the token to read next, of each trace
        for path, trace in self._grown():
            self._next[path] = trace.n_tokens

    async def routed(
        self, sequences: Sequence[TokenSequence], answers: Sequence[RoutedAnswer]
    ) -> list[RoutedAnswer]:
        """The answers with their decisions and weights, once these are committed."""
        found, until = list[RoutedAnswer](), time.monotonic() + LOST_S
        for sequence, answer in zip(sequences, answers, strict=True):
            number, fed = sequence.sequence, answer.fed(sequence.ids)
            while (routes := self._routes(number, fed)) is None:
                if self._look():
                    until = time.monotonic() + LOST_S
                elif time.monotonic() > until:
                    raise MoeInspectError(
                        f"the plugin's traces in {self.folder} lack rows of sequence {number} "
                        f"({sequence.source}), which were dropped or not written: see the engine's "
                        "log; continue with --resume"
                    )
                else:
                    await asyncio.sleep(LOOK_S)
            del self._rows[number]
            found.append(replace(answer, ids=routes[0], weights=routes[1]))
        return found

    def _routes(
        self, sequence: int, fed_T: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
        """Of each token that was fed the row that was computed last; None where one has no row
        (yet). An engine may have computed more: it schedules ahead."""
        parts = self._rows.get(sequence, [])
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

    def _look(self) -> bool:
        """Reads what is new. Whether any of it is ours."""
        new = False
        for path, trace in self._grown():
            start = self._next.get(path, 0)
            for shard in trace.joined(0):
                if shard.files.last_token >= start:
                    new |= self._read(path, shard, max(start - shard.files.first_token, 0))
            self._next[path] = trace.n_tokens
        return new

    def _grown(self) -> Iterator[tuple[Path, Trace]]:
        """The traces that have changed since the last look; not those of another format, of which
        an engine writes none, nor those that the engine has just deleted."""
        for listed in sorted(self.folder.glob("*/shards-0.jsonl")):
            path = listed.parent
            with suppress(OSError, Damaged, MoeInspectError):
                stamp = (found := listed.stat()).st_ino, found.st_size, found.st_mtime_ns
                if self._stamps.get(path) != stamp:
                    yield path, Trace(path)
                    self._stamps[path] = stamp

    def _read(self, path: Path, shard: Shard, skip: int) -> bool:
        """The rows of ours in a shard, behind so many that were read before."""
        documents = shard.table("documents", ["document", "source"]).to_pydict()
        for document, source in zip(documents["document"], documents["source"], strict=True):
            if (named := self._named.search(source)) is not None:
                self._sequences[path, document] = int(named[1])
        columns = ("document", "position", "token_id")
        table = shard.tokens([*columns])
        document_N, position_N, token_N = (table[name].to_numpy()[skip:] for name in columns)
        ours = [d for d in np.unique(document_N).tolist() if (path, d) in self._sequences]
        if not ours:
            return False
        at = [self._router(shard, path, r) for r in range(len(self.routers))]
        ids = [
            checked_ids(shard.ids(r)[skip:], router, str(path))
            for r, router in zip(at, self.routers, strict=True)
        ]
        weights = [shard.weights(r)[skip:].astype(np.float16) for r in at]
        for document in ours:
            n = np.flatnonzero(document_N == document)
            of_routers = [of[n] for of in ids], [of[n] for of in weights]
            rows = Rows(position_N[n], token_N[n], *of_routers)
            self._rows.setdefault(self._sequences[path, document], []).append(rows)
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

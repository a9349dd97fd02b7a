"""Writes the responses of a server as the trace that a local run would write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.capture.server.protocols import Answer
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.files.lock import Lock
from moe_inspect.trace.output_dir import claim_directory
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import Document, ResumePoint, RoutedBatch, TraceWriter


class Output:
    """The trace: created with its first batch, and closed whether the run succeeds or fails.
    `vocabulary`: None records no token ids either."""

    def __init__(
        self,
        path: Path | Remote,
        manifest: dict[str, Any],
        routers: list[Router],
        vocabulary: Any,
        start: ResumePoint | None,
        overwrite: bool,
        lock: Lock | None,
        commit_every: float | None = None,
    ):
        self.path, self.manifest = path, manifest
        self.routers, self.vocabulary = routers, vocabulary
        self.start, self.overwrite, self.lock = start, overwrite, lock
        self.commit_every = commit_every
        self._own_lock: Lock | None = None
        self.writer: TraceWriter | None = None
        self.domains: list[str] = []
        self.at_close: dict[str, int] = {}

    def domain_code(self, label: str) -> int:
        if label not in self.domains:
            self.domains.append(label)
        return self.domains.index(label)

    def write(self, batch: RoutedBatch) -> None:
        if self.writer is None:
            if self.lock is None:
                self._own_lock = claim_directory(self.path, self.overwrite)
            self.writer = TraceWriter(
                self.path,
                self.manifest,
                self.routers,
                weights=False,
                vocabulary=self.vocabulary,
                resume=self.start,
                commit_every=self.commit_every,
                lock=self.lock or self._own_lock,
            )
        if self.vocabulary is None:
            batch = replace(batch, token_id=np.full_like(batch.token_id, -1))
        self.writer.write(batch)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.writer is not None:
                self.writer.at_close["corpus"] = self.at_close
                self.writer.close(
                    "complete" if kind is None else "interrupted", quiet=kind is not None
                )
        finally:
            if self._own_lock is not None:
                self._own_lock.release()


def routed_batches(
    number: int,
    sequences: list[TokenSequence],
    documents: list[Document],
    answers: list[Answer],
    domain_code: Callable[[str], int],
    domains: list[str],
) -> Iterable[RoutedBatch]:
    """A planned batch as forward passes: the prompts in one pass, then one pass per decoded
    token."""
    prompts = [len(row.ids) for row in sequences]
    # what was fed
    whole = [
        np.concatenate([row.ids, a.token_ids[:-1]])
        for row, a in zip(sequences, answers, strict=True)
    ]
    codes = [domain_code(row.domain) for row in sequences]
    for step in range(max(map(len, (a.token_ids for a in answers)))):
        spans = [(0, p) if step == 0 else (p + step - 1, p + step) for p in prompts]
        rows = [(n, a, b) for n, (a, b) in enumerate(spans) if b <= len(whole[n])]
        lengths = [b - a for _, a, b in rows]
        yield RoutedBatch(
            batch=number + step,
            token_id=np.concatenate([whole[n][a:b] for n, a, b in rows]),
            document=np.repeat(
                np.array([sequences[n].document for n, *_ in rows], np.int32), lengths
            ),
            sequence=np.repeat(
                np.array([sequences[n].sequence for n, *_ in rows], np.int32), lengths
            ),
            position=np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in rows]),
            domain=np.repeat(np.array([codes[n] for n, *_ in rows], np.int32), lengths),
            domains=domains,
            ids=[
                np.concatenate([answers[n].ids[r][a:b] for n, a, b in rows])
                for r in range(len(answers[0].ids))
            ],
            weights=None,
            documents=documents if step == 0 else [],
            phase="decode" if step else "prefill",
            group=number if sequences[0].continued else None,
        )

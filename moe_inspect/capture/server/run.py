"""Traces a model in a serving engine, for `moe-inspect trace URL --engine …` and
`moe_inspect.trace_engine`: its responses become the trace that a local run would write."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import numpy as np

from moe_inspect.capture.corpus.documents import find_sources
from moe_inspect.capture.corpus.plan import CorpusPlan, TokenSequence, longest_sequence
from moe_inspect.capture.inside import Inside, started_with, told_inside, traces_inside
from moe_inspect.capture.open_trace import (
    complete_now,
    may_resume,
    process_facts,
    refuse_other_plan,
    resume_from,
)
from moe_inspect.capture.options import EngineOptions
from moe_inspect.capture.server import protocols
from moe_inspect.capture.server.client import (
    Json,
    Retry,
    ask_for,
    client,
    root_of,
    split_url,
    wait_notifier,
)
from moe_inspect.capture.server.protocols import Request, RoutedAnswer, Served
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import commit_of, comparable, config_record, load_config, load_tokenizer
from moe_inspect.model.vocabulary import tokenizer_fingerprint, vocabulary_table
from moe_inspect.text import print_stderr
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.files.lock import Lock, hold
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.output_dir import claim_directory
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.writer import Document, ResumePoint, RoutedBatch, TraceWriter

# --api-key of ours and of an engine that was started, --hf-token and others of the latter
SECRET = re.compile(r"--.*(key|token)")
PROBE_TOKENS = 4  # of the request that shows whether the plugin records
AHEAD_INSIDE = 8  # × as many sequences may wait for the plugin's traces as are in flight
Progress = Callable[[int, int | None], None]  # (tokens done, tokens in all or None)
# a batch whose answers are awaited: the number of its first pass, what it holds, and of its first
# sequences the answers with their decisions
Ahead = tuple[
    int,
    list[TokenSequence],
    list[Document],
    list[asyncio.Task[RoutedAnswer]],
    list[RoutedAnswer],
]


class EngineRun:
    """Asks an engine, "vllm" or "sglang", for the sequences of a plan, and writes the trace, which
    is created with its first batch, and closed whether the run succeeds or fails. `model_config`:
    directory or hub id of the model's config and tokenizer. What is wrong without the server is
    refused before `run`. `lock`: of the trace to resume."""

    def __init__(
        self,
        url: str,
        output_dir: Path | Remote,
        engine: str,
        model_config: str,
        options: EngineOptions,
    ):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise MoeInspectError(
                "tracing an engine takes one process: start it without torchrun; raise "
                "--concurrency"
            )
        self.url, self.output_dir, self.engine, self.options = url, output_dir, engine, options
        self.resumes = may_resume(output_dir, options)
        self.plan = CorpusPlan(find_sources(options.data, leave_out=output_dir), options)
        self.protocol, self.model_config = protocols.ENGINES[engine], model_config
        of_hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        self.config = load_config(model_config, **of_hub)
        self.tokenizer = load_tokenizer(model_config, **of_hub)
        if self.resumes:
            known = self._record(replace(self.plan, max_length=options.max_length or 0))
            unknown = ["model", "weights", *["max_length"] * (options.max_length is None)]
            refuse_other_plan(output_dir, known, unknown)
        self.lock: Lock | None = None
        self._own_lock: Lock | None = None
        self._writer: TraceWriter | None = None
        self._is_whole = True  # what is written
        self._codes: dict[str, int] = {}  # of the domains
        self._name = f"moe-inspect-{uuid.uuid4().hex}-"  # of a request, before its number
        self._inside: Inside | None = None
        self._notify = wait_notifier()

    def run(self, progress: Progress | None = None) -> Trace:
        # the lock comes before reading what decides how to resume
        with hold(self.output_dir) if self.resumes else nullcontext() as self.lock:
            asyncio.run(self._run(progress))
        return Trace(self.output_dir)

    def _record(self, plan: CorpusPlan) -> Json:
        """The settings that a resumed run must share, as far as they are known without the
        server."""
        layers = self.options.layers
        return {
            **plan.record(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "engine": self.engine,
            "revision": self.options.revision,
            "config": schema.fingerprint(comparable(self.config)),
            "layers": sorted(layers) if layers is not None else None,
        }

    async def _run(self, progress: Progress | None) -> None:
        options, config = self.options, self.config
        kind, routers = protocols.routers_of(config, options.trust_remote_code)
        limits = options.timeout_s, options.concurrency
        async with client(self.url, options.api_key, *limits) as http:
            about = await protocols.ask_about(http, self.protocol, config)
            longest = self._longest_sequence(about["max_model_len"])
            plan = replace(self.plan, max_length=longest)
            record = {**self._record(plan), "model": about["model"]}
            start, weights = None, None
            if self.lock is not None:
                earlier = read_manifest(self.output_dir)
                weights = bool((earlier.get("corpus", {}).get("plan") or {}).get("weights"))
                start = resume_from(self.output_dir, record | with_weights(weights), 0)
                if earlier["status"] == "complete":
                    return
            served = protocols.served_model(about["model"], config, routers, options.layers)
            batches = plan.batches(self.tokenizer)
            if weights is not False and (first := next(batches, None)) is not None:
                self._inside = await self._find_inside(http, served, first[0][0], weights is True)
                batches = itertools.chain([first], batches)
            is_inside = self._inside is not None
            served, record = replace(served, inside=is_inside), record | with_weights(is_inside)
            manifest = {
                "model": {
                    "id": self.model_config,
                    "revision": commit_of(self.model_config, options.revision),
                    "class": kind,
                    "config": config_record(config),
                },
                "corpus": plan.manifest(record, self.tokenizer),
                "capture": {
                    "mode": "engine",
                    "engine": self.engine,
                    "url": split_url(self.url)[0],
                    "server": about,
                    "concurrency": options.concurrency,
                    **({"inside": True, "weight_dtype": "float16"} if is_inside else {}),
                    **({} if options.text else {"text": False}),
                    **process_facts(),
                    "command": _without_secrets(sys.argv, self.url),
                },
            }
            status = "interrupted"
            try:
                await self._send(http, served, plan, batches, manifest, start, progress)
                status = "complete"
            finally:
                with self._own_lock or nullcontext():
                    if self._writer is not None:
                        done = status == "complete"
                        self._writer.at_close["corpus"] = plan.stats.record() if done else {}
                        self._writer.close(status, quiet=not done)
            if self._writer is None and start is not None:  # only the status was not committed
                complete_now(self.output_dir, plan)
            elif self._writer is None:
                raise MoeInspectError(f"the corpus is empty: no text in {plan.named}")

    def _longest_sequence(self, served: int | None) -> int:
        """Tokens of the longest sequence; says so where a local trace would take longer ones."""
        asked, generate, config = self.options.max_length, self.options.generate, self.config
        reserved = self.protocol.reserved(generate)
        length = longest_sequence(asked, config, generate, reserved, served)
        if asked is None and length < longest_sequence(None, config, generate):
            print_stderr(
                f"the server takes {served:,} positions, fewer than the model: documents are split "
                f"at {length:,} tokens, as in a local trace with --max-length {length}"
            )
        return length

    async def _find_inside(
        self, http: httpx.AsyncClient, served: Served, first: TokenSequence, needed: bool
    ) -> Inside | None:
        """What the plugin inside the engine records, where it does: the beginning of the first
        sequence is asked for, and has to be there. Else a line says why, unless nobody knows of a
        plugin in an engine that runs anyway; where weights are `needed` it is an error."""
        why, asked = f"{root_of(http)}: no plugin is known of", None
        is_told = started_with.get() is not None
        try:
            if (traces := await traces_inside(http)) is not None:
                inside = Inside(traces, served, self._name, http)
                row = replace(first, ids=first.ids[:PROBE_TOKENS], continued=False)
                probe = self._answer(http, replace(served, inside=True), 0, row)
                asked = asyncio.create_task(probe)
                try:
                    await inside.routed(row, asked, is_probe=True)
                except MoeInspectError:
                    await told_inside(http)  # which may know why
                    raise
                return inside
        except MoeInspectError as error:
            if asked is not None:
                asked.result()  # the server's own fault
            why = f"{root_of(http)}: what its plugin records is not used: {error}"
            is_told = True
        if needed:
            raise MoeInspectError(
                f"{why}, but {self.output_dir} has gate weights, which only the plugin inside an "
                "engine records: start the engine with it as before, or --overwrite"
            )
        if is_told:
            print_stderr(f"{why}: the trace has what the server returns, without gate weights")
        return None

    async def _answer(
        self, http: httpx.AsyncClient, served: Served, number: int, row: TokenSequence
    ) -> RoutedAnswer:
        """The answer to request `number` of this run. Each attempt has a name of its own: an engine
        may still be at the one before."""
        options, protocol = self.options, self.protocol
        tokens = options.generate + 1 if row.continued else 1
        seed, attempts = (options.seed + row.sequence) % 2**31, itertools.count()
        request = Request(row.ids, tokens, options.temperature, seed, "")

        def body() -> Json:
            nonlocal request
            request = replace(request, salt=f"{self._name}{number}-{next(attempts)}")
            return protocol.body(request, served)

        def read(response: Json | None) -> RoutedAnswer:
            name = f"sequence {row.sequence} ({row.source})"
            try:
                return protocols.read_answer(protocol, response, request, served)
            except Retry as error:
                raise Retry(f"{name}: {error}") from None
            except MoeInspectError as error:
                raise MoeInspectError(f"{http.base_url}, {name}: {error}") from None

        limit = protocols.most_bytes(request, served)
        return await ask_for(read, http, protocol.path, body, limit, self._notify)

    async def _send(
        self,
        http: httpx.AsyncClient,
        served: Served,
        plan: CorpusPlan,
        batches: Iterator[tuple[list[TokenSequence], list[Document]]],
        manifest: Json,
        start: ResumePoint | None,
        progress: Progress | None,
    ) -> None:
        """Sends the planned sequences, a few batches ahead of the one written next: a slow
        response delays its batch, not the server, and memory does not grow with the corpus."""
        options, passes = self.options, self.options.generate + 1
        in_flight = asyncio.Semaphore(options.concurrency)
        ahead: deque[Ahead] = deque()
        most_ahead = options.concurrency * (AHEAD_INSIDE if served.inside else 1)
        numbers, done = itertools.count(1), start.tokens if start is not None else 0
        opened = partial(self._open, manifest, served, start)

        async def answer(number: int, row: TokenSequence) -> RoutedAnswer:
            async with in_flight:
                return await self._answer(http, served, number, row)

        async def write_next() -> None:
            nonlocal done
            number, batch, documents, tasks, answers = ahead[0]
            for row, task in zip(batch, tasks, strict=True):
                routed = task if self._inside is None else self._inside.routed(row, task)
                answers.append(await routed)
            self._is_whole = False
            ahead.popleft()
            for routed in self._passes(number, batch, documents, answers):
                self._writer = self._writer or opened()
                self._writer.write(routed)
                done += len(routed.token_id)
            self._is_whole = True
            if progress is not None:
                progress(done, plan.estimated_tokens())

        try:
            for n, (batch, documents) in enumerate(batches):
                if start is not None and n * passes < start.next_batch:
                    continue
                tasks = [asyncio.create_task(answer(next(numbers), row)) for row in batch]
                ahead.append((n * passes, batch, documents, tasks, []))
                while sum(len(a[3]) for a in list(ahead)[1:]) >= most_ahead:
                    await write_next()
            while ahead:
                await write_next()
        except (asyncio.CancelledError, KeyboardInterrupt):
            self._keep_answered(ahead, opened)
            raise
        finally:
            left = [task for _, _, _, tasks, _ in ahead for task in tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _keep_answered(self, ahead: Iterable[Ahead], opened: Callable[[], TraceWriter]) -> None:
        """What was answered of batches that are not whole; nothing in the middle of writing one."""
        if not self._is_whole:
            return
        if self._inside is not None:
            self._inside.look()
        found, declared = list[RoutedBatch](), list[Document]()
        for number, batch, documents, tasks, given in ahead:
            answers = [*given, *map(self._answer_of, batch[len(given) :], tasks[len(given) :])]
            there = [(r, a) for r, a in zip(batch, answers, strict=True) if a is not None]
            declared += documents
            if there:
                rows, of_rows = map(list, zip(*there, strict=True))
                new = [d for d in declared if any(d.document == row.document for row in rows)]
                declared = [d for d in declared if d not in new]
                passes = self._passes(number, rows, new, of_rows)
                found += [replace(routed, group=None) for routed in passes]
        if found:
            self._writer = self._writer or opened()
        if self._writer is not None:
            self._writer.unfinished = found

    def _answer_of(
        self, row: TokenSequence, task: asyncio.Task[RoutedAnswer]
    ) -> RoutedAnswer | None:
        """With its decisions, if all that is there."""
        if not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result() if self._inside is None else self._inside.found(row, task.result())

    def _open(self, manifest: Json, served: Served, start: ResumePoint | None) -> TraceWriter:
        if self.lock is None:
            self._own_lock = claim_directory(self.output_dir, self.options.overwrite)
        size = self.config.get_text_config().vocab_size
        return TraceWriter(
            self.output_dir,
            manifest,
            [served.routers[r] for r in served.chosen],
            weights=served.inside,
            vocabulary=vocabulary_table(self.tokenizer, size) if self.options.text else None,
            resume=start,
            commit_every=self.options.commit_every,
            lock=self.lock or self._own_lock,
        )

    def _passes(
        self,
        number: int,
        sequences: list[TokenSequence],
        documents: list[Document],
        answers: list[RoutedAnswer],
    ) -> Iterator[RoutedBatch]:
        """A planned batch as forward passes, the first of this number: the prompts in one pass,
        then one pass per decoded token."""
        codes, rows = self._codes, list(zip(sequences, answers, strict=True))
        fed = [answer.fed(row.ids) for row, answer in rows]
        facts = [
            (s.document, s.sequence, codes.setdefault(s.domain, len(codes))) for s in sequences
        ]
        of_rows = np.array(facts, np.int32)
        for step in range(max(len(a.token_ids) for a in answers)):
            ends = [(n, len(row.ids) + step) for n, row in enumerate(sequences)]
            # (row, first position, end) of those that this pass feeds
            spans = [(n, end - 1 if step else 0, end) for n, end in ends if end <= len(fed[n])]
            sizes = [end - begin for _, begin, end in spans]
            document, sequence, domain = np.repeat(of_rows[[n for n, *_ in spans]], sizes, axis=0).T
            token_id = np.concatenate([fed[n][begin:end] for n, begin, end in spans])
            positions = [np.arange(begin, end, dtype=np.int32) for _, begin, end in spans]
            yield RoutedBatch(
                batch=number + step,
                token_id=token_id if self.options.text else np.full_like(token_id, -1),
                document=document,
                sequence=sequence,
                position=np.concatenate(positions),
                domain=domain,
                domains=list(self._codes),
                ids=of_spans([a.ids for a in answers], spans),
                weights=of_spans([a.weights for a in answers], spans) or None,
                documents=documents if step == 0 else [],
                phase="decode" if step else "prefill",
                group=number if sequences[0].continued else None,
            )


def with_weights(weights: bool) -> Json:
    """What a resumed run must share of that; traces without have none of it."""
    return {"weights": True} if weights else {}


def of_spans(
    values: Sequence[list[np.ndarray]], spans: Sequence[tuple[int, int, int]]
) -> list[np.ndarray]:
    """Of each router the values of these spans. `values`: of each row, and each of its routers."""
    return [
        np.concatenate([values[n][r][begin:end] for n, begin, end in spans])
        for r in range(len(values[0]))
    ]


def _without_secrets(arguments: Sequence[str], url: str) -> list[str]:
    """The command for the manifest, without keys, of which an option may take several, and the
    credentials in the URL."""
    shown, hide = [Path(arguments[0]).name], False
    for argument in arguments[1:]:
        name, equals, _ = argument.partition("=")
        secret = SECRET.fullmatch(name) is not None
        hide = secret if argument.startswith("-") else hide
        if argument == url:
            shown.append(split_url(url)[0])
        elif secret:
            shown.append(f"{name}=…" if equals else name)
        else:
            shown.append("…" if hide else argument)
    return shown

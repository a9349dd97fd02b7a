"""Traces a model in a serving engine, for `moe-inspect trace URL --engine …` and
`moe_inspect.trace_engine`: its responses become the trace that a local run would write."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from moe_inspect.capture.corpus.documents import find_sources
from moe_inspect.capture.corpus.plan import Plan, TokenSequence, longest_sequence
from moe_inspect.capture.open_trace import process_facts
from moe_inspect.capture.options import EngineOptions
from moe_inspect.capture.resume import comparable, complete_now, may_resume, resume_from
from moe_inspect.capture.server.client import ask, client, split_url, wait_notifier
from moe_inspect.capture.server.protocols import (
    ENGINES,
    EngineProtocol,
    Request,
    RoutedAnswer,
    Served,
    ask_about,
    most_bytes,
    read_answer,
    routers_of,
    served_model,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import commit_of, config_record, load_config, load_tokenizer
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
Progress = Callable[[int, int | None], None]  # (tokens done, tokens in all or None)


@dataclass(frozen=True)
class EngineRun:
    """`engine`: "vllm" or "sglang"; `model_config`: directory or hub id of the model's config and
    tokenizer. `lock`: of the trace to resume."""

    url: str
    output_dir: Path | Remote
    engine: str
    model_config: str
    options: EngineOptions
    config: Any
    tokenizer: Any
    lock: Lock | None

    @property
    def protocol(self) -> EngineProtocol:
        return ENGINES[self.engine]


def trace_engine(
    url: str,
    output_dir: Path | Remote,
    engine: str,
    model_config: str,
    options: EngineOptions,
    progress: Progress | None = None,
) -> Trace:
    """See `moe_inspect.trace_engine`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MoeInspectError(
            "tracing an engine takes one process: start it without torchrun; raise --concurrency"
        )
    resume = may_resume(output_dir, options)
    sources = find_sources(options.data, leave_out=output_dir)
    of_hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(model_config, **of_hub)
    tokenizer = load_tokenizer(model_config, **of_hub)
    # the lock comes before reading what decides how to resume
    with hold(output_dir) if resume else nullcontext() as lock:
        run = EngineRun(url, output_dir, engine, model_config, options, config, tokenizer, lock)
        asyncio.run(_record(run, Plan(sources, options), progress))
    return Trace(output_dir)


async def _record(run: EngineRun, plan: Plan, progress: Progress | None) -> None:
    options, config = run.options, run.config
    kind, routers = routers_of(config, options.trust_remote_code)
    async with client(run.url, options.api_key, options.timeout_s, options.concurrency) as http:
        about = await ask_about(http, run.protocol, config)
        plan = replace(plan, max_length=_longest_sequence(run, about["max_model_len"]))
        record = {  # the settings that a resumed run must share
            **plan.record(),
            "tokenizer": tokenizer_fingerprint(run.tokenizer),
            "engine": run.engine,
            "model": about["model"],
            "revision": options.revision,
            "config": schema.fingerprint(comparable(config)),
            "layers": sorted(options.layers) if options.layers is not None else None,
        }
        start = resume_from(run.output_dir, record, 0) if run.lock is not None else None
        if start is not None and read_manifest(run.output_dir)["status"] == "complete":
            return
        served = served_model(about["model"], config, routers, options.layers)
        manifest = {
            "model": {
                "id": run.model_config,
                "revision": commit_of(run.model_config, options.revision),
                "class": kind,
                "config": config_record(config),
            },
            "corpus": plan.manifest(record, run.tokenizer),
            "capture": {
                "mode": "engine",
                "engine": run.engine,
                "url": split_url(run.url)[0],
                "server": about,
                "concurrency": options.concurrency,
                **({} if options.text else {"text": False}),
                **process_facts(_without_secrets(sys.argv, run.url)),
            },
        }
        with Output(run, manifest, [routers[r] for r in served.chosen], start) as output:
            await _send(http, run, served, plan, output, progress)
            output.at_close = plan.stats.record()
        if output.writer is None and start is not None:  # only the status was not committed
            complete_now(run.output_dir, plan)
        elif output.writer is None:
            raise MoeInspectError(f"the corpus is empty: no text in {plan.named}")


def _longest_sequence(run: EngineRun, served: int | None) -> int:
    """Tokens of the longest sequence; says so where a local trace would take longer ones."""
    asked, generate, config = run.options.max_length, run.options.generate, run.config
    reserved = run.protocol.reserved(generate)
    length = longest_sequence(asked, config, generate, reserved, served)
    if asked is None and length < longest_sequence(None, config, generate):
        print_stderr(
            f"the server takes {served:,} positions, fewer than the model: documents are split at "
            f"{length:,} tokens, as in a local trace with --max-length {length}"
        )
    return length


async def _send(
    http: httpx.AsyncClient,
    run: EngineRun,
    served: Served,
    plan: Plan,
    output: Output,
    progress: Progress | None,
) -> None:
    """Sends the sequences of the plan, a few batches ahead of the one written next: a slow response
    delays its batch, not the server, and memory does not grow with the corpus."""
    options, protocol, passes = run.options, run.protocol, run.options.generate + 1
    in_flight, salt = asyncio.Semaphore(options.concurrency), uuid.uuid4().hex
    ahead: deque[tuple[int, list[TokenSequence], list[Document], list[asyncio.Task[RoutedAnswer]]]]
    ahead = deque()
    start, notify = output.start, wait_notifier()
    done = start.tokens if start is not None else 0

    async def answer(row: TokenSequence) -> RoutedAnswer:
        request = Request(
            row.ids,
            passes if row.continued else 1,
            options.temperature,
            (options.seed + row.sequence) % 2**31,
            f"moe-inspect-{salt}-{row.sequence}",
        )
        body, limit = protocol.body(request, served), most_bytes(request, served)
        async with in_flight:
            response = await ask(http, protocol.path, body, limit, notify)
        try:
            if response is None:
                raise MoeInspectError(
                    f"the server has no {protocol.path}: does --engine match the server?"
                )
            return read_answer(protocol, response, request, served)
        except MoeInspectError as error:
            name = f"sequence {row.sequence} ({row.source})"
            raise MoeInspectError(f"{http.base_url}, {name}: {error}") from None

    async def write_next() -> None:
        nonlocal done
        number, batch, documents, tasks = ahead[0]
        answers = [await task for task in tasks]
        ahead.popleft()
        for routed in output.passes(number, batch, documents, answers):
            output.write(routed)
            done += len(routed.token_id)
        if progress is not None:
            progress(done, plan.estimated_tokens())

    try:
        for n, (batch, documents) in enumerate(plan.batches(run.tokenizer)):
            if start is not None and n * passes < start.next_batch:
                continue
            tasks = [asyncio.create_task(answer(row)) for row in batch]
            ahead.append((n * passes, batch, documents, tasks))
            while sum(len(tasks) for *_, tasks in ahead) - len(ahead[0][3]) >= options.concurrency:
                await write_next()
        while ahead:
            await write_next()
    finally:
        left = [task for *_, tasks in ahead for task in tasks]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class Output:
    """The trace: created with its first batch, and closed whether the run succeeds or fails.
    `start`: where it continues. `at_close`: what its manifest says of the corpus in the end."""

    def __init__(
        self,
        run: EngineRun,
        manifest: dict[str, Any],
        routers: list[schema.Router],
        start: ResumePoint | None,
    ):
        self.run, self.manifest, self.routers, self.start = run, manifest, routers, start
        self.writer: TraceWriter | None = None
        self.at_close: dict[str, int] = {}
        self._own_lock: Lock | None = None
        self._codes: dict[str, int] = {}  # of the domains

    def write(self, batch: RoutedBatch) -> None:
        run, options = self.run, self.run.options
        if self.writer is None:
            if run.lock is None:
                self._own_lock = claim_directory(run.output_dir, options.overwrite)
            size = run.config.get_text_config().vocab_size
            self.writer = TraceWriter(
                run.output_dir,
                self.manifest,
                self.routers,
                weights=False,
                vocabulary=vocabulary_table(run.tokenizer, size) if options.text else None,
                resume=self.start,
                commit_every=options.commit_every,
                lock=run.lock or self._own_lock,
            )
        if not options.text:
            batch = replace(batch, token_id=np.full_like(batch.token_id, -1))
        self.writer.write(batch)

    def passes(
        self,
        number: int,
        sequences: list[TokenSequence],
        documents: list[Document],
        answers: list[RoutedAnswer],
    ) -> Iterator[RoutedBatch]:
        """A planned batch as forward passes, the first of this number: the prompts in one pass,
        then one pass per decoded token."""
        fed = [
            np.concatenate([row.ids, a.token_ids[:-1]])
            for row, a in zip(sequences, answers, strict=True)
        ]
        of_rows = np.array(
            [
                (row.document, row.sequence, self._codes.setdefault(row.domain, len(self._codes)))
                for row in sequences
            ],
            np.int32,
        )
        for step in range(max(len(a.token_ids) for a in answers)):
            # (row, first position, end) of those that this pass feeds
            spans = [
                (n, len(row.ids) + step - 1 if step else 0, len(row.ids) + step)
                for n, row in enumerate(sequences)
                if len(row.ids) + step <= len(fed[n])
            ]
            document, sequence, domain = np.repeat(
                of_rows[[n for n, *_ in spans]], [end - begin for _, begin, end in spans], axis=0
            ).T
            yield RoutedBatch(
                batch=number + step,
                token_id=np.concatenate([fed[n][begin:end] for n, begin, end in spans]),
                document=document,
                sequence=sequence,
                position=np.concatenate(
                    [np.arange(begin, end, dtype=np.int32) for _, begin, end in spans]
                ),
                domain=domain,
                domains=list(self._codes),
                ids=[
                    np.concatenate([answers[n].ids[r][begin:end] for n, begin, end in spans])
                    for r in range(len(self.routers))
                ],
                weights=None,
                documents=documents if step == 0 else [],
                phase="decode" if step else "prefill",
                group=number if sequences[0].continued else None,
            )

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

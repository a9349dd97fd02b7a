"""Traces a model in a serving engine, for `moe-inspect trace URL --engine …` and
`moe_inspect.trace_engine`."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from moe_inspect.capture.corpus.plan import Plan, TokenSequence, longest_sequence
from moe_inspect.capture.corpus.sources import Source, find_sources
from moe_inspect.capture.manifest import process_facts
from moe_inspect.capture.options import EngineOptions
from moe_inspect.capture.resume import (
    comparable,
    complete_now,
    corpus_record,
    may_resume,
    resume_from,
    sampling_record,
)
from moe_inspect.capture.server.client import ask, client, split_url, wait_notifier
from moe_inspect.capture.server.model import ask_about, choose, common_top_k, routers_of
from moe_inspect.capture.server.output import Output, routed_batches
from moe_inspect.capture.server.protocols import (
    ENGINES,
    Answer,
    EngineProtocol,
    Request,
    Served,
    most_bytes,
    read_answer,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import commit_of, config_record, load_config, load_tokenizer
from moe_inspect.model.vocabulary import tokenizer_fingerprint, vocabulary_table
from moe_inspect.text import print_stderr
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.files.lock import Lock, hold
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.writer import Document

# --api-key of ours and of an engine that was started, --hf-token and others of the latter
SECRET = re.compile(r"--.*(key|token)")
Progress = Callable[[int, int | None], None]  # (tokens done, tokens in all or None)


@dataclass(frozen=True)
class EngineRun:
    """`engine`: "vllm" or "sglang"; `model_config`: directory or hub id of the model's config and
    tokenizer."""

    url: str
    output_dir: Path | Remote
    engine: str
    model_config: str
    options: EngineOptions
    sources: list[Source]
    config: Any
    tokenizer: Any

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
    run = EngineRun(url, output_dir, engine, model_config, options, sources, config, tokenizer)
    # the lock comes before reading what decides how to resume
    with hold(output_dir) if resume else nullcontext() as lock:
        asyncio.run(_record(run, resume, lock, progress))
    return Trace(output_dir)


async def _record(
    run: EngineRun, resume: bool, lock: Lock | None, progress: Progress | None
) -> None:
    options, config = run.options, run.config
    kind, routers = routers_of(config, options.trust_remote_code)
    async with client(run.url, options.api_key, options.timeout_s, options.concurrency) as http:
        about = await ask_about(http, run.protocol, config)
        length = _longest_sequence(run, about["max_model_len"])
        plan = Plan(run.sources, options, length)
        record = _plan_record(run, plan, about["model"])
        start = resume_from(run.output_dir, record, 0) if resume else None
        if start is not None and read_manifest(run.output_dir)["status"] == "complete":
            return
        text, chosen = config.get_text_config(), choose(routers, options.layers)
        served = Served(
            about["model"],
            text.num_hidden_layers,
            common_top_k(routers),
            text.vocab_size,
            routers,
            chosen,
        )
        output = Output(
            run.output_dir,
            _manifest(run, plan, record, kind, about),
            [routers[r] for r in chosen],
            vocabulary_table(run.tokenizer, text.vocab_size) if options.text else None,
            start,
            options.overwrite,
            lock,
            options.commit_every,
        )
        with output:
            await _send(http, run, served, plan, output, progress)
            output.at_close = plan.stats.record()
        if output.writer is None and start is not None:  # only the status was not committed
            complete_now(run.output_dir, plan)
        elif output.writer is None:
            corpus = ", ".join(options.data) or "the bundled corpus"
            raise MoeInspectError(f"the corpus is empty: no text in {corpus}")


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


def _plan_record(run: EngineRun, plan: Plan, served_model: str) -> dict[str, Any]:
    """The settings that a resumed run must share."""
    options = run.options
    return {
        **plan.record(),
        **sampling_record(options),
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
        "engine": run.engine,
        "model": served_model,
        "revision": options.revision,
        "config": schema.fingerprint(comparable(run.config)),
        "layers": sorted(options.layers) if options.layers is not None else None,
    }


def _manifest(
    run: EngineRun, plan: Plan, record: dict[str, Any], kind: str, about: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model": {
            "id": run.model_config,
            "revision": commit_of(run.model_config, run.options.revision),
            "class": kind,
            "config": config_record(run.config),
        },
        "corpus": corpus_record(record, plan, run.tokenizer),
        "capture": {
            "mode": "engine",
            "engine": run.engine,
            "url": split_url(run.url)[0],
            "server": about,
            "concurrency": run.options.concurrency,
            **({} if run.options.text else {"text": False}),
            **process_facts(_without_secrets(sys.argv, run.url)),
        },
    }


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
    ahead: deque[tuple[int, list[TokenSequence], list[Document], list[asyncio.Task[Answer]]]]
    ahead = deque()
    done, notify = output.start.tokens if output.start is not None else 0, wait_notifier()

    async def answer(row: TokenSequence) -> Answer:
        name = f"sequence {row.sequence} ({row.source})"
        request = Request(
            name,
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
            raise MoeInspectError(f"{http.base_url}, {name}: {error}") from None

    async def write_next() -> None:
        nonlocal done
        number, batch, documents, tasks = ahead[0]
        answers = [await task for task in tasks]
        ahead.popleft()
        for routed in routed_batches(
            number * passes, batch, documents, answers, output.domain_code, output.domains
        ):
            output.write(routed)
            done += len(routed.token_id)
        if progress is not None:
            progress(done, plan.estimated_tokens())

    try:
        for number, (batch, documents) in enumerate(plan.batches(run.tokenizer)):
            if output.start is not None and number * passes < output.start.next_batch:
                continue
            tasks = [asyncio.create_task(answer(row)) for row in batch]
            ahead.append((number, batch, documents, tasks))
            while sum(len(tasks) for *_, tasks in ahead) - len(ahead[0][3]) >= options.concurrency:
                await write_next()
        while ahead:
            await write_next()
    finally:
        left = [task for *_, tasks in ahead for task in tasks]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


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

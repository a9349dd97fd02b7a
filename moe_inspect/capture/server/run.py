"""Trace a model that runs in a serving engine: what `moe-inspect trace URL --engine …` calls."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from moe_inspect.capture.corpus import Plan, Sequence_, find_sources
from moe_inspect.capture.manifest import process_facts
from moe_inspect.capture.resume import comparable, complete_now, corpus_record, resumed
from moe_inspect.capture.run import fitting
from moe_inspect.capture.server.client import MODELS, ask, client, reach, root_of, split_url, teller
from moe_inspect.capture.server.protocols import (
    ENGINES,
    Answer,
    Asked,
    Engine,
    Served,
    most_bytes,
    read_answer,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import commit_of, config_record, load_config, load_tokenizer
from moe_inspect.model.routers import find_routers, top_k_of
from moe_inspect.model.vocabulary import tokenizer_fingerprint, vocabulary_table
from moe_inspect.text import first_line, ranges
from moe_inspect.trace import schema
from moe_inspect.trace.files.lock import Lock, hold, refuse_while_locked
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.output_dir import check_directory, claim_directory
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import Document, ResumePoint, RoutedBatch, TraceWriter

SECRET_OPTIONS = ("--api-key",)


def trace_engine(
    url: str,
    out: str | Path,
    *,
    engine: str,
    model_config: str,
    data: Sequence[str] = (),
    text_field: str = "text",
    domain_field: str | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    special_tokens: bool = True,
    generate: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    concurrency: int = 8,
    timeout_s: float = 600.0,
    api_key: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Trace:
    """Sends the corpus `data` to a server and writes the routed experts that it answers with as a
    trace at `out`: the one that `trace_model` would write of the same model, without gate weights,
    which engines do not hand back.

    url           of the server, http://HOST:PORT; engine: "vllm" or "sglang"
    model_config  a hub id or a directory: its tokenizer, and which of its layers route where
    concurrency   sequences that are under way at once
    timeout_s     of a request in all, from connecting to the last byte; after it the request is
    sent again api_key       sent as a bearer token, written nowhere
    generate      N tokens a document are fed after it: N + 1 are asked for, of which the last is
    not fed

    The others are those of `trace_model`. Raises MoeInspectError for what the caller can mend.
    """
    out = Path(out)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MoeInspectError(
            "an engine is driven by one process: start it without torchrun, with more --concurrency"
        )
    spoken, goes_on = ENGINES[engine], resume and (out / schema.MANIFEST).exists()
    if goes_on:
        refuse_while_locked(out)
    else:
        check_directory(out, overwrite)
    sources = find_sources(data, leave_out=out)
    config = load_config(model_config, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model_config, revision=revision, trust_remote_code=trust_remote_code)
    kind, routers = routers_of(config, trust_remote_code)
    http = client(url, api_key, timeout_s, concurrency)

    async def drive() -> None:
        async with http:
            about = await ask_about(http, spoken, config)
            length = fitting(max_length, config, generate + 1, about["max_model_len"])
            plan = Plan(
                sources,
                text_field,
                domain_field,
                max_tokens,
                length,
                batch_tokens,
                special_tokens,
                generate,
            )
            options = {
                **plan.options(),
                **({"temperature": temperature, "seed": seed} if generate else {}),
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "engine": engine,
                "model": about["model"],
                "revision": revision,
                "config": schema.fingerprint(comparable(config)),
                "layers": sorted(layers) if layers is not None else None,
            }
            start = resumed(out, options, 0) if goes_on else None
            if start is not None and read_manifest(out)["status"] == "complete":
                return
            text = config.get_text_config()
            chosen = _chosen(routers, layers)
            served = Served(
                about["model"],
                text.num_hidden_layers,
                _one_top_k(routers),
                text.vocab_size,
                routers,
                chosen,
            )
            manifest = {
                "model": {
                    "id": model_config,
                    "revision": commit_of(model_config, revision),
                    "class": kind,
                },
                "corpus": corpus_record(options, plan, tokenizer),
                "capture": {
                    "mode": "engine",
                    "engine": engine,
                    "url": split_url(url)[0],
                    "server": about,
                    "concurrency": concurrency,
                    **process_facts(_without_secrets(sys.argv, url)),
                },
            }
            manifest["model"]["config"] = config_record(config)
            vocabulary = vocabulary_table(tokenizer, text.vocab_size)
            output = _Output(
                out, manifest, [routers[r] for r in chosen], vocabulary, start, overwrite, lock
            )
            with output:
                await _feed(
                    http,
                    spoken,
                    served,
                    plan,
                    tokenizer,
                    output,
                    concurrency,
                    temperature,
                    seed,
                    progress,
                )
                output.at_close = plan.stats.record()
            if output.writer is None and start is not None:  # all was committed but the status
                complete_now(out, plan)
            elif output.writer is None:
                raise MoeInspectError(
                    f"the corpus is empty: no text in {', '.join(data) or 'the bundled corpus'}"
                )

    with (
        hold(out) if goes_on else nullcontext() as lock
    ):  # before anything is read that decides how it goes on
        asyncio.run(drive())
    return Trace(out)


def routers_of(config: Any, trust_remote_code: bool = False) -> tuple[str, list[Router]]:
    """The model's class, and its routers as a local trace lists them. No weight is read."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built: Any = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (
        Exception
    ) as error:  # whatever an odd config makes transformers raise, the file is the user's
        raise MoeInspectError(
            f"cannot build a causal language model of the config: {first_line(error)}"
        ) from error
    sites = find_routers(built)
    layers, blocks = [s.layer for s in sites], config.get_text_config().num_hidden_layers
    if len(set(layers)) < len(layers) or max(layers) >= blocks:
        raise MoeInspectError(
            f"{type(built).__name__} has {len(sites)} routers in {blocks} layers: engines hand "
            "back one a layer"
        )
    routers = [
        Router(
            s.layer,
            s.path.split(".", 1)[-1],
            s.path,
            s.experts,
            top_k_of(s, built),
            s.scoring,
            s.shared_experts,
        )
        for s in sites
    ]
    return type(built).__name__, routers


async def ask_about(http: httpx.AsyncClient, engine: Engine, config: Any) -> dict[str, Any]:
    """What the server says of itself: model, path, version, max_model_len. MoeInspectError where
    its model is not the config's."""
    root, models = root_of(http), await reach(http)
    cards = models.get("data") if models is not None else None
    cards = (
        [c for c in cards if isinstance(c, dict) and not c.get("parent")]
        if isinstance(cards, list)
        else []
    )  # no adapters
    if not cards or not isinstance(cards[0].get("id"), str):
        raise MoeInspectError(
            f"{root}{MODELS} names no model: is it the engine that --engine names?"
        )
    info = await ask(http, engine.about) if engine.about != MODELS else {}
    version = (await ask(http, engine.version_at) or {}).get("version")
    length = cards[0].get("max_model_len")
    about = {
        "model": cards[0]["id"],
        "path": (info or {}).get("model_path") or cards[0].get("root"),
        "version": version if isinstance(version, str) else None,
        "protocol_read_from": engine.read_from,
        "max_model_len": length if isinstance(length, int) and length > 1 else None,
    }
    for key, own in (("model_type", config.model_type), ("architectures", config.architectures)):
        told = (info or {}).get(key)
        if told and own and told != own:
            raise MoeInspectError(
                f"the server's model is {told} ({key}), that of --model-config {own}: give the "
                f"config of {about['model']}"
            )
    return about


async def _feed(
    http: httpx.AsyncClient,
    engine: Engine,
    served: Served,
    plan: Plan,
    tokenizer: Any,
    output: _Output,
    concurrency: int,
    temperature: float,
    seed: int,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    """Sends the sequences of the plan, a few batches ahead of the one that is written next: a slow
    answer holds up its batch, not the server, and what is kept in memory does not grow with the
    corpus."""
    gate, run, passes = asyncio.Semaphore(concurrency), uuid.uuid4().hex, plan.generate + 1
    ahead: deque[tuple[int, list[Sequence_], list[Document], list[asyncio.Task[Answer]]]] = deque()
    done, tell = output.start.tokens if output.start is not None else 0, teller()

    async def answer(row: Sequence_) -> Answer:
        name = f"sequence {row.sequence} ({row.source})"
        asked = Asked(
            name,
            row.ids,
            passes if row.continued else 1,
            temperature,
            (seed + row.sequence) % 2**31,
            f"moe-inspect-{run}-{row.sequence}",
        )
        async with gate:
            said = await ask(
                http, engine.path, engine.body(asked, served), most_bytes(asked, served), tell
            )
        try:
            if said is None:
                raise MoeInspectError(
                    f"there is no {engine.path}: is it the engine that --engine names?"
                )
            return read_answer(engine, said, asked, served)
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
        for number, (batch, documents) in enumerate(plan.batches(tokenizer)):
            if output.start is not None and number * passes < output.start.next_batch:
                continue
            ahead.append(
                (number, batch, documents, [asyncio.create_task(answer(row)) for row in batch])
            )
            while sum(len(tasks) for *_, tasks in ahead) - len(ahead[0][3]) >= concurrency:
                await write_next()
        while ahead:
            await write_next()
    finally:
        left = [task for *_, tasks in ahead for task in tasks]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def routed_batches(
    number: int,
    batch: list[Sequence_],
    documents: list[Document],
    answers: list[Answer],
    domain_code: Callable[[str], int],
    domains: list[str],
) -> Iterable[RoutedBatch]:
    """A planned batch as a local trace has it: the prompts in one forward pass, then a pass a
    decoded token."""
    prompts = [len(row.ids) for row in batch]
    whole = [
        np.concatenate([row.ids, a.token_ids[:-1]]) for row, a in zip(batch, answers, strict=True)
    ]  # what was fed
    codes = [domain_code(row.domain) for row in batch]
    for step in range(max(map(len, (a.token_ids for a in answers)))):
        spans = [(0, p) if step == 0 else (p + step - 1, p + step) for p in prompts]
        rows = [(n, a, b) for n, (a, b) in enumerate(spans) if b <= len(whole[n])]
        lengths = [b - a for _, a, b in rows]
        yield RoutedBatch(
            batch=number + step,
            token_id=np.concatenate([whole[n][a:b] for n, a, b in rows]),
            document=np.repeat(np.array([batch[n].document for n, *_ in rows], np.int32), lengths),
            sequence=np.repeat(np.array([batch[n].sequence for n, *_ in rows], np.int32), lengths),
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
            group=number if batch[0].continued else None,
        )


class _Output:
    """The trace that is begun with its first batch, not before, and closed however it ends."""

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        routers: list[Router],
        vocabulary: Any,
        start: ResumePoint | None,
        overwrite: bool,
        lock: Lock | None,
    ):
        self.path, self.manifest, self.routers, self.vocabulary = (
            path,
            manifest,
            routers,
            vocabulary,
        )
        self.start, self.overwrite, self.lock = start, overwrite, lock
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
            held, words = self.lock or self._own_lock, self.vocabulary
            self.writer = TraceWriter(
                self.path,
                self.manifest,
                self.routers,
                weights=False,
                vocabulary=words,
                resume=self.start,
                lock=held,
            )
        self.writer.write(batch)

    def __enter__(self) -> _Output:
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


def _chosen(routers: Sequence[Router], layers: Sequence[int] | None) -> list[int]:
    there = [r.layer for r in routers]
    if unknown := sorted(set(layers or ()) - set(there)):
        raise MoeInspectError(
            f"no router in layer {unknown[0]}: the MoE layers are {ranges(there)}"
        )
    return [n for n, layer in enumerate(there) if layers is None or layer in layers]


def _one_top_k(routers: Sequence[Router]) -> int:
    """The K of an answer's arrays: engines make room for one number of experts a token."""
    if len(found := sorted({r.top_k for r in routers})) > 1:
        raise MoeInspectError(
            f"its routers choose {found} experts a token: engines hand back the same number for "
            "all layers"
        )
    return found[0]


def _without_secrets(arguments: Sequence[str], url: str) -> list[str]:
    """The command as the manifest shows it: no key, no credentials in the URL."""
    shown, hide = [Path(arguments[0]).name], False
    for argument in arguments[1:]:
        name, equals, _ = argument.partition("=")
        shown.append(
            "…"
            if hide
            else f"{name}=…"
            if equals and name in SECRET_OPTIONS
            else split_url(url)[0]
            if argument == url
            else argument
        )
        hide = argument in SECRET_OPTIONS
    return shown

"""Trace a model over a corpus: what `moe-inspect trace` calls."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_inspect.capture.corpus import Plan, Sequence_, find_sources
from moe_inspect.capture.hook.call_inputs import Rows, cache_among
from moe_inspect.capture.hook.recorder import Recorder
from moe_inspect.capture.ranks import Ranks
from moe_inspect.capture.resume import comparable, complete_now, corpus_record, resumed
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import (
    commit_of,
    load_config,
    load_model,
    load_tokenizer,
    weights_fingerprint,
)
from moe_inspect.model.vocabulary import tokenizer_fingerprint
from moe_inspect.trace import schema
from moe_inspect.trace.files.lock import Lock, hold, join, refuse_while_locked
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.output_dir import check_directory
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.writer import Document

MAX_LENGTH = 2048


def trace_model(
    model: str,
    out: str | Path,
    *,
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
    capture: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_init: int | None = None,
    layers: Sequence[int] | None = None,
    weights: bool = True,
    logits: bool = False,
    counts_only: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Trace:
    """Feeds the corpus `data` (default: the bundled one) to the model and records every routing
    decision at `out`.

    model        a hub id, a directory, or "demo"
    data         files, folders, globs, fsspec URLs, each optionally behind DOMAIN=
    max_length   longer documents are split; default: what the model takes, at most 2048
    generate     goes on with each document by so many tokens, one at a time: the likeliest, or with
    `temperature` drawn by `seed` random_init  draws the weights with this seed instead of reading
    them
    resume       goes on with an interrupted trace of the same corpus, model and options
    progress     called with (tokens done, tokens in all or None) after every forward pass

    Raises MoeInspectError for what the caller can mend.
    """
    out, ranks = Path(out), Ranks()

    def goes_on() -> bool:
        there = (
            resume and (out / schema.MANIFEST).exists()
        )  # else nothing was committed: the trace starts at its beginning
        if there:
            refuse_while_locked(out)
        else:
            check_directory(out, overwrite)
        return there

    resume = ranks.agree("resume", goes_on)
    sources = find_sources(data, leave_out=out)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    plan = Plan(
        sources,
        text_field,
        domain_field,
        max_tokens,
        fitting(max_length, config, generate),
        batch_tokens,
        special_tokens,
        generate,
        encoded=bool(getattr(config, "is_encoder_decoder", False)),
    )
    options = {
        **plan.options(),
        **({"temperature": temperature, "seed": seed} if generate else {}),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "model": model,
        "revision": revision,
        "config": schema.fingerprint(comparable(config)),
        "weights_hash": None if random_init is not None else weights_fingerprint(model, revision),
        "random_init": random_init,
        "dtype": dtype,
        "layers": sorted(layers) if layers is not None else None,
        "weights": weights,
        "logits": logits,
        "counts_only": counts_only,
        "ranks": ranks.world,
    }
    with (
        _locked(out, ranks) if resume else nullcontext() as lock
    ):  # before anything is read that decides how it goes on
        start = resumed(out, options, ranks.rank) if resume else None
        complete = start is not None and read_manifest(out)["status"] == "complete"
        ranks.gather("read", "")  # before rank 0 writes there again
        if complete:
            return Trace(out)
        batches = plan.batches(tokenizer)
        first = next(batches, None)
        if first is None:
            raise MoeInspectError(
                f"the corpus is empty: no text in {', '.join(data) or 'the bundled corpus'}"
            )
        network = load_model(
            model,
            config,
            revision=revision,
            dtype=dtype,
            device=f"cuda:{os.environ['LOCAL_RANK']}"
            if device == "auto" and ranks.world > 1 and torch.cuda.is_available()
            else device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            random_init=random_init,
        )
        from moe_inspect.capture.seq2seq import translate

        with torch.inference_mode():
            recorder = Recorder(
                network,
                out,
                tokenizer=tokenizer,
                capture=capture,
                layers=layers,
                weights=weights,
                logits=logits,
                counts_only=counts_only,
                ranks=ranks,
                resume=start,
                lock=lock,
                overwrite=overwrite,
                manifest={
                    "model": {
                        "id": model,
                        "revision": commit_of(model, revision),
                        "class": type(network).__name__,
                        "trust_remote_code": trust_remote_code,
                        "device_map": device_map,
                    },
                    "corpus": corpus_record(options, plan, tokenizer),
                },
            )
            with _told(ranks, recorder), recorder:
                done = start.tokens if start else 0
                passes = generate + (
                    2 if plan.encoded else 1
                )  # of a batch: numbers are left free where fewer are needed
                planned = chain([first], batches)
                if any(site.adapter is not None and site.adapter.alone for site in recorder.sites):
                    planned = singly(planned)
                for number, (batch, documents) in enumerate(planned):
                    if not ranks.takes(number) or (
                        start is not None and number * passes < start.next_batch
                    ):
                        continue
                    if plan.encoded:
                        tokens = generate if batch[0].continued else 0
                        decoding = Decoding(
                            tokens, temperature, seed + number, end_ids(network, tokenizer)
                        )
                        done += translate(
                            network,
                            recorder,
                            batch,
                            documents,
                            tokenizer,
                            number * passes,
                            decoding,
                        )
                    elif batch[0].continued:
                        decoding = Decoding(
                            generate, temperature, seed + number, end_ids(network, tokenizer)
                        )
                        done += decode(
                            network, recorder, batch, documents, number * passes, decoding
                        )
                    else:
                        done += feed(
                            network, recorder, batch, documents, tokenizer, number * passes
                        )
                    if progress is not None:
                        progress(done, plan.estimated_tokens())
                if recorder.writer is not None:
                    recorder.writer.at_close["corpus"] = plan.stats.record()
        # this rank had nothing to write: no batch was left for it, or all was committed but the
        # status
        if recorder.writer is None and ranks.rank == 0:
            ranks.say("open")
        if recorder.writer is None and ranks.status("complete") == "complete" and ranks.rank == 0:
            complete_now(out, plan)
        ranks.agree("over", lambda: True)  # the manifest says so now
        return Trace(out)


@contextmanager
def _locked(out: Path, ranks: Ranks) -> Iterator[Lock]:
    """The lock of the trace that goes on, which all ranks hold."""
    held: list[Lock] = []

    def take() -> bool:
        held.append(hold(out, shared=ranks.world > 1))
        return True

    ranks.agree("lock", take)
    if ranks.rank:
        held.append(join(out, ranks.hear("job")))
    else:
        ranks.say("job", held[0].job)
    with held[0] as lock:
        yield lock


@contextmanager
def _told(ranks: Ranks, recorder: Recorder) -> Iterator[None]:
    """A rank that ends before it had anything to write says so: the first waits for all."""
    try:
        yield
    except BaseException:
        if recorder.writer is None:
            ranks.say(f"closed-{ranks.rank}", "interrupted")
        raise


def singly(
    planned: Iterable[tuple[list[Sequence_], list[Document]]],
) -> Iterator[tuple[list[Sequence_], list[Document]]]:
    """One row a forward pass: for a model where the rows of a batch change each other's routing."""
    for batch, documents in planned:
        new = {d.document: d for d in documents}
        for row in batch:
            yield [row], [new.pop(row.document)] if row.document in new else []


def feed(
    network: Any,
    recorder: Recorder,
    batch: list[Sequence_],
    documents: list[Document],
    tokenizer: Any,
    number: int | None = None,
) -> int:
    """One forward pass over right-padded rows; returns the tokens fed, padding not counted."""
    lengths = [len(s.ids) for s in batch]
    ids_BS, mask_BS = padded(batch, tokenizer, network)
    recorder.expect(
        Rows(
            real=mask_BS.reshape(-1),
            token_id=ids_BS[mask_BS].astype(np.int32),
            document=_repeated([s.document for s in batch], lengths),
            sequence=_repeated([s.sequence for s in batch], lengths),
            position=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            domain=_repeated([recorder.reader.domain_code(s.domain) for s in batch], lengths),
            documents=documents,
            number=number,
        )
    )
    mask = torch.from_numpy(mask_BS.astype(np.int64)).to(next(network.parameters()).device)
    forward(network, torch.from_numpy(ids_BS), attention_mask=mask, **quick_call(network))
    return sum(lengths)


def padded(batch: list[Sequence_], tokenizer: Any, network: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, mask bool) [B, S] of right-padded rows. A padding token that was added to the
    tokenizer alone has no embedding: 0 stands for it."""
    lengths = np.array([len(s.ids) for s in batch])
    mask_BS = np.arange(lengths.max()) < lengths[:, None]
    known = embeddings(network)
    pad = tokenizer.pad_token_id
    ids_BS = np.full(
        mask_BS.shape, 0 if pad is None or (known is not None and pad >= known) else pad, np.int64
    )
    ids_BS[mask_BS] = np.concatenate([s.ids for s in batch])
    return ids_BS, mask_BS


def embeddings(network: Any) -> int | None:
    """How many token ids the model knows, where it says so."""
    try:
        return getattr(network.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # code of a model's own may not say
        return None


def forward(network: Any, ids_BS: torch.Tensor, name: str = "input_ids", **options: Any) -> Any:
    """The model's output of these tokens; MoeInspectError where they are too many for the
    device."""
    if (known := embeddings(network)) is not None and (most := int(ids_BS.max())) >= known:
        raise MoeInspectError(
            f"token id {most} of the tokenizer, and the model has {known:,} embeddings: the "
            "tokenizer is another model's"
        )
    device = next(network.parameters()).device
    try:
        return network(**{name: ids_BS.to(device)}, **options)
    except torch.OutOfMemoryError as error:
        tokens = ids_BS.numel()
        raise MoeInspectError(
            f"{device} is out of memory in a forward pass of {tokens:,} tokens: lower "
            "--batch-tokens"
        ) from error


@dataclass(frozen=True)
class Decoding:
    tokens: int  # that are fed after the prompt, at most
    temperature: float  # 0: the likeliest token
    seed: int
    ends: frozenset[int]  # token ids after which nothing is fed


def end_ids(network: Any, tokenizer: Any) -> frozenset[int]:
    stated = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    stated = stated if stated is not None else tokenizer.eos_token_id
    return frozenset([stated] if isinstance(stated, int) else stated or [])


def decode(
    network: Any,
    recorder: Recorder,
    batch: list[Sequence_],
    documents: list[Document],
    number: int,
    decoding: Decoding,
) -> int:
    """Rows of one length, then a token of each at a time, with a key-value cache and no padding; a
    row that has met an end token is fed nothing that is recorded. Returns the tokens fed."""
    generator = torch.Generator().manual_seed(decoding.seed)
    fed_BS = torch.from_numpy(np.stack([s.ids for s in batch]).astype(np.int64))
    of_row: dict[str, list[int]] = {
        "document": [s.document for s in batch],
        "sequence": [s.sequence for s in batch],
        "domain": [recorder.reader.domain_code(s.domain) for s in batch],
    }
    running = np.ones(len(batch), bool)
    usual, cache = {"use_cache": True, **last_logits(network)}, {}
    fed = position = 0
    for step in range(decoding.tokens + 1):
        S = fed_BS.shape[1]
        real = np.repeat(running, S)
        recorder.expect(
            Rows(
                real=real,
                token_id=fed_BS.numpy().reshape(-1)[real].astype(np.int32),
                document=_repeated(of_row["document"], [S] * len(batch))[real],
                sequence=_repeated(of_row["sequence"], [S] * len(batch))[real],
                domain=_repeated(of_row["domain"], [S] * len(batch))[real],
                position=np.tile(np.arange(position, position + S, dtype=np.int32), len(batch))[
                    real
                ],
                documents=documents if step == 0 else [],
                phase="decode" if step else "prefill",
                number=number + step,
                group=number,
            )
        )
        output = forward(network, fed_BS, **usual, **cache)
        fed, position = fed + int(real.sum()), position + S
        cache = cache_of(network, output)
        next_B = chosen(output.logits[:, -1].float().cpu(), decoding.temperature, generator)
        running &= ~np.isin(next_B.numpy(), list(decoding.ends))
        if not running.any():
            break
        fed_BS = next_B[:, None]
    recorder.end_group()
    return fed


def chosen(logits_BV: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """The next token of each row, [B]."""
    if not temperature:
        return logits_BV.argmax(1)
    return torch.multinomial(torch.softmax(logits_BV / temperature, 1), 1, generator=generator)[
        :, 0
    ]


def cache_of(network: Any, output: Any) -> dict[str, Any]:
    """The key-value cache in a model's output, as the argument the next call takes it by."""
    held = cache_among(output.values())
    if held is None:
        raise MoeInspectError(
            f"{type(network).__name__} keeps no key-value cache: trace without --generate"
        )
    takes = inspect.signature(network.forward).parameters
    return {
        "cache" if "cache" in takes else "past_key_values": held
    }  # transformers 5.24 calls it so


def last_logits(network: Any) -> dict[str, int]:
    """Only the logits of the last position, where the model can do so."""
    return (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(network.forward).parameters
        else {}
    )


def quick_call(network: Any) -> dict[str, Any]:
    """No key-value cache, and no [T, vocabulary] logits, which nobody reads, where the model can do
    without."""
    return {"use_cache": False, **last_logits(network)}


def _repeated(values: list[int], lengths: list[int]) -> np.ndarray:
    return np.repeat(np.array(values, np.int32), lengths)


def fitting(max_length: int | None, config: Any, generate: int, served: int | None = None) -> int:
    """The longest sequence: the model's own limit holds (and that of a server), unless it states
    none, and leaves room for what is to be decoded."""
    stated = [
        n for n in (getattr(config.get_text_config(), "max_position_embeddings", None), served) if n
    ]
    limit = min(stated or [MAX_LENGTH + generate]) - generate
    if limit < 1:
        raise MoeInspectError(
            f"generating {generate} tokens leaves no room for a prompt in the positions of this "
            "model"
        )
    if max_length is not None and max_length > limit:
        after = f" that {generate} generated tokens leave" if generate else ""
        raise MoeInspectError(
            f"--max-length {max_length} is beyond the {limit} positions of this model{after}"
        )
    return max_length or min(limit, MAX_LENGTH)

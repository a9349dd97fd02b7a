"""Responses of vLLM and SGLang with the experts that each token was routed to: JSONL, a line a response; of vLLM's also bare `.npy`.

T tokens, B blocks of the model, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.importers.job import Imported, Job, Numbering, Source, integer, integers, routed
from moe_inspect.trace.importers.registry import importer, named
from moe_inspect.trace.importers.routed import (
    NPY_MAGIC,
    array_of_npy,
    decode_sglang,
    decode_vllm,
    dense_blocks,
    identical_run,
    select_routers,
)
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

WARM_UP = 1000  # identical rows in a row are no text
NPY_BASE64 = b"k05VTVBZ"
Response = tuple[str, dict[str, Any], np.ndarray, Path, Source]


@importer(
    "vllm-routed",
    reads="JSONL of responses with `routed_experts` (base64 of a `.npy`), or `.npy` [tokens, layers, k]",
    gives="decisions without weights, prefill and decode; a response is a document unless `document` says otherwise",
    sniff=lambda name, head: head.startswith(NPY_MAGIC) or (b'"routed_experts"' in head and NPY_BASE64 in head),
)
def vllm_routed(job: Job) -> Imported:
    return _responses(job, lambda fields, where: decode_vllm(fields.get("routed_experts"), where))


@importer(
    "sglang-routed",
    reads="JSONL of responses with `routed_experts` (base64 of raw int32); needs the model's config",
    gives="as vllm-routed",
    sniff=lambda name, head: b'"routed_experts"' in head,
)
def sglang_routed(job: Job) -> Imported:
    if job.facts is None:
        raise MoeInspectError("SGLang's routed experts do not say how many layers there are: give --model or --config")
    blocks, top_k = job.facts.layers, job.known_top_k(job.facts.id)
    return _responses(job, lambda fields, where: decode_sglang(fields.get("routed_experts"), blocks, top_k, where))


def _responses(job: Job, decode: Callable[[dict[str, Any], str], np.ndarray]) -> Imported:
    files = job.files(r".*\.(jsonl|npy)", ".jsonl of responses")
    arrived = _arriving(job, [f for f in files if not f[0].name.endswith(".token_ids.npy")], decode)
    first = next((r for r in arrived if len(r[2])), None)
    if first is None:
        raise MoeInspectError(f"{job.sources[0].path} holds no routed token")
    routers = job.facts.routers() if job.facts else _stated_routers(job, first)

    def batches() -> Iterator[RoutedBatch]:
        numbers, identical = Numbering(), 0
        assert first is not None
        for response in _chained(first, arrived):
            run = identical_run(response[2])
            identical += run if run >= WARM_UP else 0
            yield from _sequence(numbers, response, routers, job.facts.layers if job.facts else None)
        if identical:
            job.warn(f"{identical:,} consecutive tokens were routed alike in every layer, {WARM_UP:,} or more at a time: warm-up rows?")

    return Imported(
        routers, batches(), notes=["a batch is the prompt of a response, or what was generated: the source does not say the passes"]
    )


def _chained(first: Response, rest: Iterator[Response]) -> Iterator[Response]:
    yield first
    yield from rest


def _stated_routers(job: Job, first: Response) -> list[Router]:
    """Without a config: every block, if none reads as a dense one does."""
    where, routed_TBK = first[0], first[2]
    experts = job.known_experts(where)
    if dense := dense_blocks(routed_TBK):
        raise MoeInspectError(
            f"{where}: all {len(routed_TBK)} tokens go to one expert in layer {dense[0]}, as a dense layer reads: give --model or --config"
        )
    return job.routers_of(range(routed_TBK.shape[1]), experts, routed_TBK.shape[2], where)


def _arriving(job: Job, files: list[tuple[Path, Source]], decode: Callable[[dict[str, Any], str], np.ndarray]) -> Iterator[Response]:
    for path, source in files:
        if path.suffix == ".npy":
            yield _bare(job, path, source)
            continue
        for where, written in job.json_lines(path):
            for fields in _choices(written, where):
                yield where, fields, decode(fields, f"{where}: routed_experts"), path, source


def _choices(written: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The fields of a flat line, or of each choice of an OpenAI-style response; SGLang's are in `meta_info`."""
    choices = written.get("choices", [written])
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise MoeInspectError(f"{where}: choices is no list of objects")
    for choice in choices:
        meta = choice.get("meta_info")
        fields = {**written, **(meta if isinstance(meta, dict) else {}), **choice}
        fields.setdefault("token_ids", fields.get("output_ids", []))
        yield fields


def _bare(job: Job, path: Path, source: Source) -> Response:
    """An array alone is a prompt; its token ids may be beside it, in `NAME.token_ids.npy`."""
    size = path.stat().st_size
    job.read(size)
    array = array_of_npy(path.read_bytes(), str(path))
    fields: dict[str, Any] = {"token_ids": []}
    beside = path.with_suffix(".token_ids.npy")
    if beside.is_file():
        ids_T = array_of_npy_1d(beside)
        if len(ids_T) not in (len(array), len(array) + 1):
            raise MoeInspectError(f"{beside} has {len(ids_T)} token ids, {path} {len(array)} tokens")
        fields["prompt_token_ids"] = [*ids_T[: len(array)].tolist(), 0]  # the last is never fed
    return str(path), fields, array, path, source


def array_of_npy_1d(path: Path) -> np.ndarray:
    from moe_inspect.trace.importers.routed import npy_bytes, npy_header

    data = path.read_bytes()
    dtype, _, shape, start = npy_header(data[:4096], str(path))
    if len(shape) != 1 or npy_bytes(dtype, shape) != len(data) - start:
        raise MoeInspectError(f"{path} is no list of token ids: it declares {shape} of {dtype} and holds {len(data) - start:,} bytes")
    return np.frombuffer(data, dtype, offset=start)


def _sequence(numbers: Numbering, response: Response, routers: list[Router], blocks: int | None) -> Iterator[RoutedBatch]:
    """The batches of one response: what of the prompt was fed, then what was generated."""
    where, fields, routed_TBK, path, source = response
    start = integer(fields.get("start", fields.get("routed_experts_start_len", 0)) or 0, f"{where}: start")
    T = len(routed_TBK)
    if fields.get("prompt_token_ids") is None:
        if path.suffix != ".npy":
            raise MoeInspectError(f"{where} has no prompt_token_ids: ask the server for token ids")
        token_id, prompt = None, T
    else:
        prompt_ids = integers(fields["prompt_token_ids"], f"{where}: prompt_token_ids")
        generated = integers(fields["token_ids"], f"{where}: token_ids")
        prompt, fed = len(prompt_ids), np.concatenate([prompt_ids, generated])[:-1]
        if len(fed) - start != T:
            after = f" from token {start}" if start else ""
            raise MoeInspectError(
                f"{where}: routed_experts has {T} tokens{after}, not {len(fed) - start}: one fewer than the {prompt} of the prompt "
                f"and the {len(generated)} generated, the last of which is never fed"
            )
        token_id = fed[start:]
    ids = select_routers(routed_TBK, routers, blocks, f"{where}: routed_experts")
    domain = fields.get("domain")
    domain = source.domain or (domain if isinstance(domain, str) and domain else named(path))
    name = fields.get("document")
    document, documents = numbers.document(domain, where, min(prompt, start + T) - min(start, prompt), None if name is None else str(name))
    code, sequence = numbers.domain(domain), numbers.sequence()
    cut = min(max(prompt - start, 0), T)
    for phase, part in (("prefill", slice(0, cut)), ("decode", slice(cut, T))):
        if part.start < part.stop:
            yield routed(
                numbers,
                [i[part] for i in ids],
                document=document,
                documents=documents,
                domain=code,
                sequence=sequence,
                position=np.arange(start + part.start, start + part.stop, dtype=np.int32),
                token_id=None if token_id is None else token_id[part],
                phase=phase,
            )
            documents = []

"""Saved responses of vLLM and SGLang that include the experts of each token: JSONL with one
response per line; for vLLM also bare `.npy` files. TensorRT-LLM's are read by the same code.

T tokens, B blocks of the model, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import routed
from moe_inspect.importers.batches import Numbering, Tokens, batch_of_decisions
from moe_inspect.importers.context import ImportContext, Imported, ImportSource, importer, named
from moe_inspect.importers.values import integer, integers
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

Decode = Callable[..., np.ndarray]
WARM_UP = 1000  # consecutive identical rows, more than any real text has
NPY_BASE64 = b"k05VTVBZ"
# our field; vLLM's and SGLang's request parameters
STARTS = ("start", "routed_experts_prompt_start", "routed_experts_start_len")


@dataclass(frozen=True)
class Response:
    """`fed`: ids of the tokens that went through the model, those of `routed_TBK` from `start` on;
    None where the source has no ids. The first `prompt` of them are the prompt's. `named`: its
    fields `domain` and `document`. `left_out`: rows of padding."""

    where: str
    named: dict[str, Any]
    routed_TBK: np.ndarray
    left_out: int
    path: Path
    source: ImportSource
    start: int
    prompt: int | None
    fed: np.ndarray | None


@importer(
    "vllm-routed",
    gives=(
        "decisions without weights, prefill and decode; a response is a document unless "
        "`document` says otherwise"
    ),
    sniff=lambda name, head: (
        head.startswith(routed.NPY_MAGIC) or (b'"routed_experts"' in head and NPY_BASE64 in head)
    ),
)
def vllm_routed(context: ImportContext) -> Imported:
    return read_responses(context, routed.decode_vllm)


@importer(
    "sglang-routed",
    gives="as vllm-routed",
    sniff=lambda name, head: b'"routed_experts"' in head,
)
def sglang_routed(context: ImportContext) -> Imported:
    if context.facts is None:
        raise MoeInspectError(
            "SGLang's routed experts do not say how many layers there are: give --model or --config"
        )
    blocks, top_k = context.facts.layers, context.known_top_k(context.facts.id)
    return read_responses(context, partial(routed.decode_sglang, blocks=blocks, top_k=top_k))


def read_responses(context: ImportContext, decode: Decode) -> Imported:
    """decode: from what a response has as `routed_experts`, and `where`, with which an error
    begins, its experts [T, B, K]; it can be pickled."""
    files = context.files(r".*\.(jsonl|npy)", ".jsonl of responses")
    arrived = _arriving(
        context, [f for f in files if not f[0].name.endswith(".token_ids.npy")], decode
    )
    first = next((r for r in arrived if len(r.routed_TBK)), None)
    if first is None:
        raise MoeInspectError(f"{context.sources[0].path} holds no routed token")
    routers = context.facts.routers() if context.facts else _stated_routers(context, first)
    responses = chain([first], arrived)

    def batches() -> Iterator[RoutedBatch]:
        numbers, identical, forgotten = Numbering(), 0, 0
        blocks = context.facts.layers if context.facts else None
        for response in responses:
            run = routed.identical_run(response.routed_TBK)
            identical += run if run >= WARM_UP else 0
            runs = routed.recorded_runs(response.routed_TBK)
            forgotten += len(response.routed_TBK) - sum(r.stop - r.start for r in runs)
            yield from _sequences(numbers, response, runs, routers, blocks)
        if forgotten:
            context.warn(
                f"{forgotten:,} tokens are left out: the engine had forgotten their routes (−1)"
            )
        if identical:
            context.warn(
                f"{identical:,} consecutive tokens were routed alike in every layer, {WARM_UP:,} "
                "or more at a time: warm-up rows?"
            )

    passes = "a batch is the prompt of a response, or what was generated: the source does not say "
    return Imported(routers, batches(), notes=[passes + "the passes"])


def _stated_routers(context: ImportContext, first: Response) -> list[Router]:
    """The routers where there is no config: one per block. MoeInspectError if a block looks
    dense."""
    where, routed_TBK = first.where, first.routed_TBK
    experts = context.known_experts(where)
    if dense := routed.dense_blocks(routed_TBK):
        raise MoeInspectError(
            f"{where}: all {len(routed_TBK)} tokens go to one expert in layer {dense[0]}, as a "
            "dense layer reads: give --model or --config"
        )
    return context.routers_of(range(routed_TBK.shape[1]), experts, routed_TBK.shape[2], where)


def _arriving(
    context: ImportContext, files: list[tuple[Path, ImportSource]], decode: Decode
) -> Iterator[Response]:
    """Responses without padding. Warns at the end of how much was left out."""
    padded, rows, without = 0, 0, 0
    for path, source in files:
        if path.suffix == ".npy":
            lines = iter([[_of_npy(context, path, source)]])
        else:
            lines = context.prepared(path, partial(_of_line, decode, path, source))
        for response in chain.from_iterable(lines):
            if response is None:
                without += 1
                continue
            padded += response.left_out > 0
            rows += response.left_out
            yield response
    if padded:
        context.warn(
            f"{rows:,} rows of {padded:,} responses are left out: padding, for tokens that no "
            "router saw"
        )
    if without:
        context.warn(
            f"{without:,} choices are left out: SGLang returns the routed experts of the first "
            "choice only"
        )


def _of_line(
    decode: Decode, path: Path, source: ImportSource, where: str, written: dict[str, Any]
) -> list[Response | None]:
    """The responses of a line; None for a choice whose routed experts were not returned."""
    listed = list[Response | None]()
    for fields in _choices(written, where):
        if fields is None:
            listed.append(None)
            continue
        array = decode(fields.get("routed_experts"), where=f"{where}: routed_experts")
        listed.append(_response(where, fields, array, path, source))
    return listed


def _choices(written: dict[str, Any], where: str) -> Iterator[dict[str, Any] | None]:
    """The fields of a flat line, of each choice of an OpenAI-style response, or of each output of
    a result of an LLM API. SGLang's are in `meta_info`, or in `sglext`, which has the token ids of
    all choices and the experts of the first: None stands for each of the others."""
    title = "outputs" if "outputs" in written else "choices"
    choices = written.get(title, [written])
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise MoeInspectError(f"{where}: {title} is not a list of objects")
    found = written.get("sglext")
    extension: dict[str, Any] = found if isinstance(found, dict) else {}
    for n, choice in enumerate(choices):
        meta = choice.get("meta_info")
        fields = {**written, **(meta if isinstance(meta, dict) else {}), **choice}
        if (
            n
            and fields.get("routed_experts") is None
            and extension.get("routed_experts") is not None
        ):
            yield None
            continue
        generated = extension.get("output_ids")
        beside = {
            "routed_experts": extension.get("routed_experts"),
            "prompt_token_ids": extension.get("input_ids"),
            "token_ids": generated[n]
            if isinstance(generated, list) and n < len(generated)
            else fields.get("output_ids"),
        }
        yield fields | {name: value for name, value in beside.items() if fields.get(name) is None}


def _of_npy(context: ImportContext, path: Path, source: ImportSource) -> Response:
    """An array, which is a prompt. Its token ids may be beside it, in `NAME.token_ids.npy`, with or
    without that of the last token, which is never fed."""
    context.read(path.stat().st_size)
    routed_TBK = routed.array_of_npy_file(path)
    beside, rows, ids_T = path.with_suffix(".token_ids.npy"), len(routed_TBK), None
    if beside.is_file():
        ids_T = routed.ids_of_npy_file(beside)
        if len(ids_T) not in (rows, rows + 1):
            raise MoeInspectError(f"{beside} has {len(ids_T)} token ids, {path} {rows} tokens")
    expected = rows if ids_T is not None and len(ids_T) > rows else None
    begin, end = _padding(routed_TBK, expected, str(path))
    part = slice(begin, rows - end)
    fed = None if ids_T is None else ids_T[part]
    kept = routed_TBK[part]
    return Response(str(path), {}, kept, begin + end, path, source, 0, len(kept), fed)


def _response(
    where: str, fields: dict[str, Any], routed_TBK: np.ndarray, path: Path, source: ImportSource
) -> Response:
    rows = len(routed_TBK)
    name = next((name for name in STARTS if fields.get(name) is not None), STARTS[0])
    start = integer(fields.get(name) or 0, f"{where}: {name}")
    prompt_ids, generated = _token_ids(fields, where)
    fed = np.concatenate([prompt_ids, generated])[:-1]
    expected = len(fed) - start
    begin, end = _padding(routed_TBK, expected, where)
    kept = routed_TBK[begin : rows - end]
    # a padded one may lack routes, and never has too many
    if len(kept) != expected and not (end and rows >= expected > len(kept)):
        after = f" from token {start}" if start else ""
        raise MoeInspectError(
            f"{where}: routed_experts has {rows} tokens{after}, not {expected}: one fewer than "
            f"the {len(prompt_ids)} of the prompt "
            f"and the {len(generated)} generated, the last of which is never "
            f"fed{_mismatch(fields, rows, expected)}"
        )
    said = {name: fields.get(name) for name in ("domain", "document")}
    out = rows - len(kept)
    return Response(where, said, kept, out, path, source, start, len(prompt_ids), fed)


def _padding(routed_TBK: np.ndarray, expected: int | None, where: str) -> tuple[int, int]:
    """How many rows at the beginning and at the end are no tokens'. RL frameworks pad to tokens, or
    to a batch's longest response, where the engine returns tokens − 1 rows: with zeros, −1, or the
    experts 0 to k−1. `expected`: how many rows there should be."""
    rows, K = len(routed_TBK), routed_TBK.shape[2]
    begin, end = routed.unrouted_ends(routed_TBK)
    if K == 1 and end and not routed_TBK[-1].any():
        if expected is None:
            raise MoeInspectError(
                f"{where}: the last row is zero in every layer: padding, or a token that went to "
                "expert 0? Remove the row, or write the "
                "response as JSONL with prompt_token_ids and token_ids"
            )
        begin, end = 0, min(end, max(rows - expected, 0))
    elif not end and expected == rows - 1:
        end = int((routed_TBK[-1] == np.arange(K)).all())
    if K == 1 or (expected is not None and rows - begin - end != expected):
        begin = 0  # rows that were not recorded, not padding on the left
    return begin, end


def _token_ids(fields: dict[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    if fields.get("prompt_token_ids") is None:
        option = (
            "return_prompt_token_ids"
            if "meta_info" in fields and "choices" not in fields
            else "return_token_ids"
        )
        raise MoeInspectError(f"{where} has no prompt_token_ids: set {option} in the request")
    generated = fields.get("token_ids")
    prompt = integers(fields["prompt_token_ids"], f"{where}: prompt_token_ids")
    return prompt, integers([] if generated is None else generated, f"{where}: token_ids")


def _mismatch(fields: dict[str, Any], rows: int, expected: int) -> str:
    if fields.get("token_ids") is None:
        return "; it lacks token_ids of the generated tokens: set return_token_ids in the request"
    if rows < expected:
        return (
            f"; if the request had {STARTS[1]} (vLLM) or {STARTS[2]} (SGLang), write its value "
            "into the field start"
        )
    return ""


def _sequences(
    numbers: Numbering,
    response: Response,
    runs: list[slice],
    routers: list[Router],
    blocks: int | None,
) -> Iterator[RoutedBatch]:
    """The batches of one response: what of the prompt was fed, then what was generated. Each run of
    tokens whose routes are known is a sequence."""
    where, start = response.where, response.start
    T = len(response.routed_TBK)
    cut = T if response.prompt is None else min(max(response.prompt - start, 0), T)
    token_id = None if response.fed is None else response.fed[start : start + T]
    ids = routed.select_routers(response.routed_TBK, routers, blocks, f"{where}: routed_experts")
    domain, name = response.named.get("domain"), response.named.get("document")
    domain = domain if isinstance(domain, str) and domain else named(response.path)
    domain = response.source.domain or domain
    document, documents = numbers.document(
        domain,
        where,
        sum(max(min(run.stop, cut) - run.start, 0) for run in runs),
        None if name is None else str(name),
    )
    code = numbers.domain(domain)
    for run in runs:
        sequence, before = numbers.sequence(), min(max(cut, run.start), run.stop)
        for phase, first, last in (("prefill", run.start, before), ("decode", before, run.stop)):
            if first == last:
                continue
            yield batch_of_decisions(
                numbers,
                Tokens(
                    document,
                    code,
                    sequence,
                    np.arange(start + first, start + last, dtype=np.int32),
                    None if token_id is None else token_id[first:last],
                ),
                [i[first:last] for i in ids],
                documents=documents,
                phase=phase,
            )
            documents = []

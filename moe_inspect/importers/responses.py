"""Saved responses of vLLM and SGLang that include the experts of each token: JSONL with one
response per line; for vLLM also bare `.npy` files. TensorRT-LLM's are read by the same code.

T tokens, B blocks of the model, K slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import routed
from moe_inspect.importers.batches import Numbering
from moe_inspect.importers.context import ImportContext, Imported, ImportSource, importer, named
from moe_inspect.importers.values import Fields, integer, integers
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

Decode = Callable[..., np.ndarray]
NPY_BASE64 = b"k05VTVBZ"
# our field; vLLM's and SGLang's request parameters
STARTS = ("start", "routed_experts_prompt_start", "routed_experts_start_len")


@dataclass(frozen=True)
class Response:
    """`fed`: ids of the tokens that went through the model, those of `routed_TBK` from `start` on;
    None where the source has no ids. The first `prompt` of them are the prompt's. `left_out`: rows
    of padding. `domain`, `document`: as its fields or its file say."""

    where: str
    domain: str
    document: str | None
    routed_TBK: np.ndarray
    left_out: int
    start: int
    prompt: int
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
    "sglang-routed", gives="as vllm-routed", sniff=lambda name, head: b'"routed_experts"' in head
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
    left_out = Counter[str]()
    arrived = _arriving(context, decode, left_out)
    if context.returned is not None:
        for response in arrived:
            context.returned(response)
        return Imported([], iter(()))
    first = next((r for r in arrived if len(r.routed_TBK)), None)
    if first is None:
        raise MoeInspectError(f"{context.sources[0].path} holds no routed token")
    routers = context.facts.routers() if context.facts else _stated_routers(context, first)

    def batches() -> Iterator[RoutedBatch]:
        numbers, blocks = Numbering(), context.facts.layers if context.facts else None
        for response in chain([first], arrived):
            yield from _sequences(numbers, response, left_out, routers, blocks)
        if n := left_out["forgotten"]:
            context.warn(f"{n:,} tokens are left out: the engine had forgotten their routes (−1)")

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


def _arriving(context: ImportContext, decode: Decode, left_out: Counter[str]) -> Iterator[Response]:
    """Responses without padding, unless they are looked at as they came. Warns at the end of how
    much was left out."""
    as_is = context.returned is not None
    for path, source in context.files(r".*\.(jsonl|npy)", ".jsonl of responses"):
        if path.suffix == ".npy":
            beside = path.name.endswith(".token_ids.npy")
            lines = iter([] if beside else [[_of_npy(context, path, source)]])
        else:
            lines = context.prepared(path, partial(_of_line, decode, path, source, as_is))
        for response in chain.from_iterable(lines):
            if response is None:
                left_out["choices"] += 1
                continue
            left_out["padded"] += response.left_out > 0
            left_out["rows"] += response.left_out
            yield response
    if left_out["padded"]:
        context.warn(
            f"{left_out['rows']:,} rows of {left_out['padded']:,} responses are left out: padding, "
            "for tokens that no router saw"
        )
    if left_out["choices"]:
        context.warn(
            f"{left_out['choices']:,} choices are left out: SGLang returns the routed experts of "
            "the first choice only"
        )


def _of_line(
    decode: Decode, path: Path, source: ImportSource, as_is: bool, where: str, written: Fields
) -> list[Response | None]:
    """The responses of a line: those of a flat one, of each choice of an OpenAI-style response, or
    of each output of a result of an LLM API. SGLang's fields are in `meta_info`, or in `sglext`,
    which has the token ids of all choices and the experts of the first: None stands for each of the
    others."""
    title = "outputs" if "outputs" in written else "choices"
    choices = written.get(title, [written])
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise MoeInspectError(f"{where}: {title} is not a list of objects")
    extension = found if isinstance(found := written.get("sglext"), dict) else {}
    shared, generated = extension.get("routed_experts"), extension.get("output_ids")
    ids_of = generated if isinstance(generated, list) else []  # by choice
    listed: list[Response | None] = []
    for n, choice in enumerate(choices):
        meta = choice.get("meta_info")
        fields = {**written, **(meta if isinstance(meta, dict) else {}), **choice}
        if n and fields.get("routed_experts") is None and shared is not None:
            listed.append(None)
            continue
        beside = {
            "routed_experts": shared,
            "prompt_token_ids": extension.get("input_ids"),
            "token_ids": ids_of[n] if n < len(ids_of) else fields.get("output_ids"),
        }
        fields |= {name: value for name, value in beside.items() if fields.get(name) is None}
        routed_TBK = decode(fields.get("routed_experts"), where=f"{where}: routed_experts")
        listed.append(_response(where, fields, routed_TBK, path, source, as_is))
    return listed


def _of_npy(context: ImportContext, path: Path, source: ImportSource) -> Response:
    """An array, which is a prompt. Its token ids may be beside it, in `NAME.token_ids.npy`, with or
    without that of the last token, which is never fed."""
    context.read(path.stat().st_size)
    routed_TBK = routed.decisions_of_npy(path, str(path))
    beside, rows, ids_T = path.with_suffix(".token_ids.npy"), len(routed_TBK), None
    if beside.is_file():
        ids_T = routed.ids_of_npy_file(beside)
        if len(ids_T) not in (rows, rows + 1) and context.returned is None:
            raise MoeInspectError(f"{beside} has {len(ids_T)} token ids, {path} {rows} tokens")
    if context.returned is not None:
        if ids_T is not None and len(ids_T) == rows + 1:  # the last one is of no fed token
            ids_T = ids_T[:-1]
        return Response(str(path), "", None, routed_TBK, 0, 0, rows, ids_T)
    expected = rows if ids_T is not None and len(ids_T) > rows else None
    begin, end = _padding(routed_TBK, expected, str(path))
    part = slice(begin, rows - end)
    kept, fed = routed_TBK[part], None if ids_T is None else ids_T[part]
    domain = source.domain or named(path)
    return Response(str(path), domain, None, kept, begin + end, 0, len(kept), fed)


def _response(
    where: str,
    fields: Fields,
    routed_TBK: np.ndarray,
    path: Path,
    source: ImportSource,
    as_is: bool,
) -> Response:
    rows = len(routed_TBK)
    name = next((name for name in STARTS if fields.get(name) is not None), STARTS[0])
    start = integer(fields.get(name) or 0, f"{where}: {name}")
    if as_is and fields.get("prompt_token_ids") is None:
        return Response(where, "", None, routed_TBK, 0, start, rows, None)
    if fields.get("prompt_token_ids") is None:
        native = "meta_info" in fields and "choices" not in fields
        option = "return_prompt_token_ids" if native else "return_token_ids"
        raise MoeInspectError(f"{where} has no prompt_token_ids: set {option} in the request")
    prompt = integers(fields["prompt_token_ids"], f"{where}: prompt_token_ids")
    unstated = fields.get("token_ids") is None
    generated = integers([] if unstated else fields["token_ids"], f"{where}: token_ids")
    fed = np.concatenate([prompt, generated])[:-1]
    if as_is:
        return Response(where, "", None, routed_TBK, 0, start, len(prompt), fed)
    expected = len(fed) - start
    begin, end = _padding(routed_TBK, expected, where)
    kept = routed_TBK[begin : rows - end]
    # a padded one may lack routes, and never has too many
    if len(kept) != expected and not (end and rows >= expected > len(kept)):
        hint = ""
        if unstated:
            hint = (
                "; it lacks token_ids of the generated tokens: set return_token_ids in the request"
            )
        elif rows < expected:
            hint = (
                f"; if the request had {STARTS[1]} (vLLM) or {STARTS[2]} (SGLang), write its value "
                "into the field start"
            )
        after = f" from token {start}" if start else ""
        raise MoeInspectError(
            f"{where}: routed_experts has {rows} tokens{after}, not {expected}: one fewer than "
            f"the {len(prompt)} of the prompt "
            f"and the {len(generated)} generated, the last of which is never fed{hint}"
        )
    said, document = fields.get("domain"), fields.get("document")
    domain = source.domain or (said if isinstance(said, str) and said else named(path))
    document = None if document is None else str(document)
    return Response(where, domain, document, kept, rows - len(kept), start, len(prompt), fed)


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


def _sequences(
    numbers: Numbering,
    response: Response,
    left_out: Counter[str],
    routers: list[Router],
    blocks: int | None,
) -> Iterator[RoutedBatch]:
    """The batches of one response: what of the prompt was fed, then what was generated. Each run of
    tokens whose routes are known is a sequence."""
    where, start, T = response.where, response.start, len(response.routed_TBK)
    runs = routed.recorded_runs(response.routed_TBK)
    left_out["forgotten"] += T - sum(run.stop - run.start for run in runs)
    cut = min(max(response.prompt - start, 0), T)
    ids = routed.select_routers(response.routed_TBK, routers, blocks, f"{where}: routed_experts")
    tokens = sum(max(min(run.stop, cut) - run.start, 0) for run in runs)
    numbers.document(response.domain, where, tokens, response.document)
    for run in runs:
        sequence, before = numbers.sequence(), min(max(cut, run.start), run.stop)
        for phase, first, last in (("prefill", run.start, before), ("decode", before, run.stop)):
            if first < last:
                fed = response.fed
                yield numbers.decisions(
                    [i[first:last] for i in ids],
                    position=np.arange(start + first, start + last, dtype=np.int32),
                    sequence=sequence,
                    token_id=None if fed is None else fed[start + first : start + last],
                    phase=phase,
                )

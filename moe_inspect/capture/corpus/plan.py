"""Documents → sequences → batches, streamed: memory does not grow with the corpus. The batches
depend only on files and options, which makes a trace resumable."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice

import numpy as np

from moe_inspect.capture.corpus.documents import COMPRESSED, CorpusStats, Source, interleaved
from moe_inspect.capture.corpus.tokenize import Tokenizer, token_ids
from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.own import positions_of
from moe_inspect.trace import schema
from moe_inspect.trace.writer import Document

# settings that determine the batches
RECORDED = ("text_field", "domain_field", "max_tokens", "max_length", "batch_tokens")
RECORDED += ("special_tokens", "generate")
MAX_LENGTH = 2048
TEXTS_PER_CALL = 64  # documents tokenized together


@dataclass(frozen=True)
class CorpusPlan:
    """The batches, and what determines them. `max_length`: tokens of the longest sequence;
    `encoded`: the text is the input of an encoder."""

    sources: list[Source]
    options: TraceOptions = field(default_factory=TraceOptions)
    max_length: int = MAX_LENGTH
    encoded: bool = False
    stats: CorpusStats = field(default_factory=CorpusStats)

    def record(self) -> dict[str, object]:
        """What determines the batches, and the tokens that are decoded."""
        asked = vars(self.options)
        sampling = ("temperature", "seed") if self.options.generate else ()
        return {
            **{name: asked[name] for name in RECORDED},
            "max_length": self.max_length,
            "sources": [asdict(s) for s in self.sources],
            **({} if self.options.text else {"text": False}),
            **{name: asked[name] for name in sampling},
        }

    def manifest(self, record: dict[str, object], tokenizer: Tokenizer) -> dict[str, object]:
        """The manifest's section `corpus`. `record`: the settings that a resumed run must share."""
        most, frame = self.options.max_tokens, asdict(self.frame(tokenizer))
        cut = f"the corpus is cut at {most} tokens"
        names = tokenizer.convert_ids_to_tokens
        return {
            "plan": record,
            "plan_hash": schema.fingerprint(record),
            "special_tokens": {where: names(list(ids)) for where, ids in frame.items()},
            "truncation": "none: longer documents are split" if most is None else cut,
        }

    def frame(self, tokenizer: Tokenizer) -> Frame:
        return special_frame(tokenizer) if self.options.special_tokens else Frame()

    @property
    def named(self) -> str:
        """The corpus, for messages."""
        return ", ".join(self.options.data) or "the bundled corpus"

    def estimated_tokens(self) -> int | None:
        """Tokens of the whole corpus, extrapolated from the bytes read so far; None where file
        sizes are unknown."""
        max_tokens = self.options.max_tokens
        sizes = [s.bytes for s in self.sources if s.bytes and not s.path.endswith(COMPRESSED)]
        if len(sizes) < len(self.sources) or not self.stats.bytes_read:
            return max_tokens
        whole = round(self.stats.tokens * max(sum(sizes) / self.stats.bytes_read, 1))
        return whole if max_tokens is None else min(whole, max_tokens)

    def batches(self, tokenizer: Tokenizer) -> Iterator[tuple[list[TokenSequence], list[Document]]]:
        """Each batch, with the documents whose first sequence it contains."""
        asked, frame = self.options, self.frame(tokenizer)
        texts = interleaved(self.sources, asked.text_field, asked.domain_field, self.stats)
        limits = self.max_length, asked.max_tokens
        decodes = asked.generate > 0
        rows = sequences(texts, tokenizer, frame, *limits, self.stats, decodes, self.encoded)
        return with_documents(batches(rows, asked.batch_tokens, asked.generate))


def longest_sequence(max_length: int | None, config: object, generate: int) -> int:
    """Tokens of the longest sequence: `max_length` or the default, within the positions of the
    model. The default leaves as many positions free as SGLang keeps behind a prompt: an engine
    takes the sequences of a trace as prompts."""
    text_of = getattr(config, "get_text_config", lambda: config)
    positions = positions_of(text_of())
    if positions is None:
        limit = default = MAX_LENGTH
    else:
        limit = positions - generate
        default = max(min(positions - max(generate + 3, 7), MAX_LENGTH), 1)
    if limit < 1:
        raise MoeInspectError(
            f"generating {generate} tokens leaves no room for a prompt in the positions of this "
            "model"
        )
    if max_length is not None and max_length > limit:
        left = f" that {generate} generated tokens leave" if generate else ""
        raise MoeInspectError(
            f"--max-length {max_length} is beyond the {limit} positions of this model{left}"
        )
    return max_length or default


# --- sequences


@dataclass(frozen=True)
class TokenSequence:
    """One row of a model's input: `ids` int32 [tokens], at positions 0…tokens−1."""

    document: int
    sequence: int
    domain: str
    source: str
    ids: np.ndarray
    document_tokens: int
    document_sequences: int
    continued: bool = False  # followed by decoded tokens


@dataclass(frozen=True)
class Frame:
    """The special tokens before and after a text: <s>, </s>, [CLS] …"""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def special_frame(tokenizer: Tokenizer) -> Frame:
    """The special tokens that this tokenizer adds, found by tokenizing with and without them."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return Frame(tuple(framed[:start]), tuple(framed[start + len(plain) :]))
    raise MoeInspectError(
        "this tokenizer changes a text when it adds special tokens: use --no-special-tokens"
    )


def sequences(
    documents: Iterable[tuple[str, str, str]],
    tokenizer: Tokenizer,
    frame: Frame,
    max_length: int,
    max_tokens: int | None,
    stats: CorpusStats,
    generate: bool = False,
    whole: bool = False,
) -> Iterator[TokenSequence]:
    """Documents → rows of at most `max_length` tokens, each within `frame`. A longer document is
    split into several rows; the last row is cut where `max_tokens` is reached. With `generate` the
    last row of a document is continued, so its end tokens are left out (kept if `whole`: an
    encoder's input)."""
    room = max_length - len(frame.before) - len(frame.after)
    if room < 1:
        raise MoeInspectError(
            f"--max-length {max_length} leaves no room for text next to the tokenizer's special "
            "tokens"
        )
    left = max_tokens if max_tokens is not None else sys.maxsize
    document = sequence = 0
    waiting = iter(documents)
    while chunk := list(islice(waiting, TEXTS_PER_CALL)):
        encoded = token_ids([text for _, _, text in chunk], tokenizer)
        for (domain, source, _), ids in zip(chunk, encoded, strict=True):
            pieces = [
                np.array([*frame.before, *ids[at : at + room], *frame.after], np.int32)
                for at in range(0, len(ids), room)
            ]
            if generate and not whole and pieces and frame.after:
                pieces[-1] = pieces[-1][: -len(frame.after)]
            starts = accumulate(map(len, pieces), initial=0)
            pieces = [p[: left - at] for p, at in zip(pieces, starts, strict=False) if at < left]
            total = sum(map(len, pieces))
            if not pieces:  # a text of no tokens
                stats.empty_documents += 1
                continue
            stats.documents += 1
            stats.split_documents += len(pieces) > 1
            stats.tokens += total
            for n, piece in enumerate(pieces):
                continued = generate and n == len(pieces) - 1
                yield TokenSequence(
                    document, sequence, domain, source, piece, total, len(pieces), continued
                )
                sequence += 1
            document, left = document + 1, left - total
            if left == 0:
                return


def batches(
    rows: Iterable[TokenSequence], batch_tokens: int, generate: int = 0
) -> Iterator[list[TokenSequence]]:
    """Rows → forward passes of at most `batch_tokens` tokens, padding included (one longer row is a
    batch by itself). Within a window of SORTED_BATCHES batches, rows are sorted by length; a row
    that is continued by `generate` tokens shares a batch only with rows of the same length, so that
    decoding needs no padding."""
    window: list[TokenSequence] = []
    size = 0
    for row in rows:
        window.append(row)
        size += len(row.ids)
        if size >= schema.SORTED_BATCHES * batch_tokens:
            yield from _packed(window, batch_tokens, generate)
            window, size = [], 0
    yield from _packed(window, batch_tokens, generate)


def _packed(
    window: list[TokenSequence], batch_tokens: int, generate: int
) -> Iterator[list[TokenSequence]]:
    batch: list[TokenSequence] = []
    shared = 0
    # stable: equal lengths keep their order
    for row in sorted(window, key=lambda s: (s.continued, len(s.ids))):
        too_long = (len(batch) + 1) * (len(row.ids) + generate * row.continued) > batch_tokens
        # the length that all rows of a batch have, 0 where it may differ
        before, shared = shared, len(row.ids) * row.continued
        if batch and (too_long or shared != before):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def with_documents(
    planned: Iterable[list[TokenSequence]],
) -> Iterator[tuple[list[TokenSequence], list[Document]]]:
    """Each batch with the documents whose first sequence it contains."""
    remaining: dict[int, int] = {}  # document → sequences not yet fed, of started documents
    for batch in planned:
        new = []
        for row in batch:
            if row.document not in remaining:
                new.append(Document(row.document, row.domain, row.source, row.document_tokens))
            remaining[row.document] = remaining.get(row.document, row.document_sequences) - 1
            if not remaining[row.document]:
                del remaining[row.document]
        yield batch, new

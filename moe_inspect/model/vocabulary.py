"""What `vocabulary.parquet` holds, of a tokenizer or of its tokenizer.json alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.model.choices import Called
from moe_inspect.trace import schema


def read_tokenizer(path: Path, size: int = 0) -> pa.Table:
    """Columns token_id and token, with at least `size` rows; token is null where the tokenizer has
    no such id. Byte-level pieces are decoded to text."""
    try:
        written = json.loads(read_small(path, 2**28))
        vocab = written["model"]["vocab"]
        named = isinstance(vocab, dict)
        pieces = {i: p for p, i in vocab.items()} if named else dict(enumerate(p for p, _ in vocab))
        added = {entry["id"]: entry["content"] for entry in written.get("added_tokens") or []}
        highest = max([-1, *pieces, *added])
        size = max(highest + 1, size)
        fine = all(isinstance(i, int) and i >= 0 for i in [*pieces, *added])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MoeInspectError(
            f"{path} is not a tokenizer.json: {error or type(error).__name__}"
        ) from None
    if not fine or size > schema.MOST_TOKEN_IDS:
        most = f"a vocabulary of at most {schema.MOST_TOKEN_IDS:,}"
        raise MoeInspectError(f"{path}: token ids up to {highest} for {most}")
    if _is_byte_level(written):
        pieces = {i: readable(piece) for i, piece in pieces.items()}
    pieces |= added
    return _table([pieces.get(i) for i in range(size)])


def _table(tokens: Sequence[str | None]) -> pa.Table:
    columns = {"token_id": np.arange(len(tokens), dtype=np.int32), "token": tokens}
    return pa.table(columns, schema=schema.VOCABULARY_SCHEMA)


# GPT-2's table: printable bytes stand for themselves, the others are shifted to U+0100 and up in
# their order
_PRINTABLE = [b for first, last in ("!~", "¡¬", "®ÿ") for b in range(ord(first), ord(last) + 1)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}


def readable(piece: str) -> str:
    """ "ĠÐ¿ÑĢÐ¸" → "▁при"."""
    if any(c not in _BYTE_OF for c in piece):
        return piece  # an added token, which is text already
    text = bytes(_BYTE_OF[c] for c in piece).decode("utf-8", errors="surrogateescape")
    return "".join(
        f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text
    ).replace(" ", "▁")


def tokenizer_fingerprint(tokenizer: Called) -> str:
    """A hash that changes whenever the tokenizer could give other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return schema.fingerprint(
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    )


def vocabulary_table(tokenizer: Called, size: int) -> pa.Table:
    """token_id int32, token string, at least `size` rows. Byte-level pieces are decoded to
    text, with ▁ for a space as in SentencePiece, and bytes that are not valid UTF-8 as <0x..>; null
    where the tokenizer has no such id."""
    size = max(size, len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and _is_byte_level(json.loads(backend.to_str())):
        special = set(tokenizer.all_special_tokens)
        pieces = [p if p is None or p in special else readable(p) for p in pieces]
    return _table([*pieces, *[None] * (size - len(pieces))])


def _is_byte_level(tokenizer: Called) -> bool:
    """Of a tokenizer.json."""
    return '"ByteLevel"' in json.dumps(tokenizer.get("decoder") or {})

"""Text → token ids, in bounded memory: a tokenizer needs about 200 bytes per character.

A long text is tokenized in pieces that overlap. Two pieces are joined in their overlap where both
split the text into words (the tokenizer's pre-tokens) and agree on the tokens to either side, so
that the ids are those of the whole text: how a text is split into words depends on the characters
nearby, and no token crosses words. A tokenizer without words (SentencePiece's BPE) is joined where
the tokens agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np

PIECE = 2**18  # characters that are tokenized at once
OVERLAP = 2**12  # characters that two pieces share
AGREED = 16  # tokens to either side of a join


class Tokenizer(Protocol):
    """What is used of a tokenizer, of transformers or the like."""

    def __call__(self, text: Any, *, add_special_tokens: bool, verbose: bool = True) -> Any: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> str | list[str]: ...


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one piece. `start`, `end`: character offsets in the whole text; `word`: index
    of the pre-token."""

    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray
    word: np.ndarray


def token_ids(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The token ids of each text, int32, without special tokens."""
    is_fast = getattr(tokenizer, "is_fast", False)
    short = [n for n, text in enumerate(texts) if len(text) <= PIECE or not is_fast]
    found: dict[int, np.ndarray] = {}
    for call in _calls(short, texts):
        encoded = tokenizer([texts[n] for n in call], add_special_tokens=False, verbose=False)
        of_texts = zip(call, encoded["input_ids"], strict=True)
        found |= {n: np.array(ids, np.int32) for n, ids in of_texts}
    return [
        found[n] if n in found else np.concatenate(list(_in_pieces(text, tokenizer)))
        for n, text in enumerate(texts)
    ]


def _calls(numbers: Sequence[int], texts: Sequence[str]) -> Iterator[list[int]]:
    """Groups of texts to tokenize in one call: together at most PIECE characters, or one text."""
    call: list[int] = []
    size = 0
    for n in numbers:
        if call and (size + len(texts[n]) > PIECE):
            yield call
            call, size = [], 0
        call.append(n)
        size += len(texts[n])
    if call:
        yield call


def _in_pieces(text: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    left, first, end = _tokens(text, 0, PIECE, tokenizer), 0, PIECE
    while end < len(text):
        new_end = min(end + PIECE, len(text))
        kinds = (True, False) if left.word.size and left.word[0] != left.word[-1] else (False,)
        for words, overlap in product(kinds, (OVERLAP, PIECE // 2)):
            right = _tokens(text, _boundary(left, end - overlap, words), new_end, tokenizer)
            if (join := _joined(left, right, first, words)) is not None:
                break
        else:
            # half a piece without a split that both find (one word, a repetition): the next piece
            # begins where this one ends
            join = len(left.ids), 0
            right = _tokens(text, end, new_end, tokenizer)
        yield left.ids[first : join[0]]
        left, first, end = right, join[1], new_end
    yield left.ids[first:]


def _tokens(text: str, begin: int, end: int, tokenizer: Tokenizer) -> _Tokens:
    encoding = tokenizer([text[begin:end]], add_special_tokens=False, verbose=False).encodings[0]
    span = np.array(encoding.offsets, np.int64).reshape(-1, 2) + begin
    word = np.array([-1 if w is None else w for w in encoding.word_ids], np.int64)
    return _Tokens(np.array(encoding.ids, np.int32), span[:, 0], span[:, 1], word)


def _splits(tokens: _Tokens, words: bool) -> np.ndarray:
    """Indices of the tokens that begin a word, or (not `words`) that share no character with the
    token before."""
    apart = tokens.start[1:] >= tokens.end[:-1]
    return 1 + np.flatnonzero(apart & (tokens.word[1:] != tokens.word[:-1]) if words else apart)


def _boundary(left: _Tokens, character: int, words: bool) -> int:
    """The last split at or (not by more than half a piece) before `character`, so that
    repetitive text is tokenized in step."""
    starts = left.start[_splits(left, words)]
    before = starts[(starts <= character) & (starts >= character - PIECE // 2)]
    return int(before[-1]) if len(before) else character


def _joined(left: _Tokens, right: _Tokens, first: int, words: bool) -> tuple[int, int] | None:
    """(i, j): the tokens of `left` before i and those of `right` from j on are the tokens of both
    pieces' text. None where the pieces do not agree around any split that they share, or the one
    before `first` is all they share."""
    at_left, at_right = _splits(left, words), _splits(right, words)
    _, i, j = np.intersect1d(left.start[at_left], right.start[at_right], return_indices=True)
    i, j = at_left[i], at_right[j]
    near = (i - AGREED >= first) & (i + AGREED <= len(left.ids))
    near &= (j >= AGREED) & (j + AGREED <= len(right.ids))
    for i_, j_ in zip(i[near][::-1], j[near][::-1], strict=True):
        here, there = slice(i_ - AGREED, i_ + AGREED), slice(j_ - AGREED, j_ + AGREED)
        same = (left.ids[here] == right.ids[there]) & (left.start[here] == right.start[there])
        if same.all():
            return int(i_), int(j_)
    return None

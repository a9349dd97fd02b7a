"""The same text, cut into tokens by two tokenizers: the spans of bytes between the cuts that both
make, without white space, and how much of a router's first choice their text explains.

T tokens of a document, S spans, V texts or token ids, E experts, G groups of documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moe_inspect.analysis.counting.select import Selection, selected_tokens
from moe_inspect.analysis.metrics.specialization import token_mi_bits
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, SEED
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.texts import bytes_of

FEWEST = 8  # occurrences of a text that is judged
MOST_TEXTS = 1_024  # the most frequent
SHUFFLES = 10
GROUPS = 10
STUDENT = 2.262  # two-sided 95 % at GROUPS − 1 degrees of freedom


@dataclass(frozen=True)
class ExplainedByText:
    mi_bits: float  # I(text; first choice)
    null_bits: float  # the same for shuffled spans
    entropy_bits: float  # of the first choice, the most that can be explained
    share: float  # `adjusted` of these
    share_without_G: np.ndarray  # without each group of documents, NaN with too few documents
    counts_VE: np.ndarray  # int64, first choices by text


def judged_texts(text_S: np.ndarray) -> np.ndarray:
    """int64 [V]: the texts that occur often enough, the most frequent first."""
    count = np.bincount(text_S) if len(text_S) else np.zeros(0, np.int64)
    order = np.argsort(-count, kind="stable")[:MOST_TEXTS]
    return order[count[order] >= FEWEST]


def explained_by_text(
    text_S: np.ndarray, expert_S: np.ndarray, document_S: np.ndarray, V: int, E: int
) -> ExplainedByText:
    """text_S: int64, in 0…V − 1. expert_S: the first choice of each span, E where it has none."""
    known_S = expert_S < E
    text_S, expert_S, document_S = (x[known_S] for x in (text_S, expert_S, document_S))

    def counts(expert_S: np.ndarray, which: slice | np.ndarray = slice(None)) -> np.ndarray:
        code_S = (text_S * E + expert_S)[which]
        return np.bincount(code_S, minlength=V * E).reshape(V, E)

    counts_VE = counts(expert_S)
    rng = np.random.default_rng([SEED, V, E])
    shuffled = [token_mi_bits(counts(rng.permutation(expert_S))) for _ in range(SHUFFLES)]
    null = float(np.mean(shuffled))
    share_without_G = np.full(GROUPS, np.nan)
    documents = np.unique(document_S)
    if len(documents) >= max(FEWEST_DOCUMENTS, GROUPS):
        group_S = np.searchsorted(documents, document_S) % GROUPS
        for g in range(GROUPS):
            without_VE = counts_VE - counts(expert_S, group_S == g)
            share_without_G[g] = adjusted(*_information(without_VE), null)
    mi, entropy = _information(counts_VE)
    share = adjusted(mi, entropy, null)
    return ExplainedByText(mi, null, entropy, share, share_without_G, counts_VE)


def _information(counts_VE: np.ndarray) -> tuple[float, float]:
    """I(text; first choice) and the entropy of the first choice, in bits."""
    return token_mi_bits(counts_VE), token_mi_bits(np.diag(counts_VE.sum(0)))


def adjusted(bits: float, most: float, by_chance: float) -> float:
    """Information as a share of the most there is, both beyond chance: 0 is chance, 1 all. NaN
    where chance leaves nothing to tell."""
    return (bits - by_chance) / (most - by_chance) if most > by_chance else float("nan")


def jackknife_interval(value: float, left_out_G: np.ndarray) -> tuple[float, float]:
    """95 % interval of a value from the same without each group of documents."""
    error = np.sqrt((GROUPS - 1) / GROUPS * ((left_out_G - left_out_G.mean()) ** 2).sum())
    return float(value - STUDENT * error), float(value + STUDENT * error)


MOST_TOKENS = 200_000  # of A: documents spread over the trace, up to so many
LEAST_COMMON = 0.5  # of the bytes of the documents in both
KEY_BYTES = 32  # by which a document is found in the other trace
KEY_TOKENS = 48
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Side:
    """One trace's tokens of the documents that are judged, in the order of the text. Arrays [T]."""

    trace: Trace
    document: np.ndarray  # its index in the sample
    shard: np.ndarray
    row: np.ndarray
    token_id: np.ndarray

    def first_choices(self, at: np.ndarray) -> dict[int, np.ndarray]:
        """Router of a decoder → int32 [S], these tokens' first choices, E where there is none."""
        listed = self.trace.routers
        known = [r for r, x in enumerate(listed) if x.first_choice_known and x.stack != "encoder"]
        found = {r: np.empty(len(at), np.int32) for r in known}
        shard_S, row_S = self.shard[at], self.row[at]
        for number in np.unique(shard_S).tolist():
            shard, of_shard = self.trace.shard(number), np.flatnonzero(shard_S == number)
            for r in known:
                rows, seen = row_S[of_shard], shard.seen(r)
                rows = rows if seen is None else (np.cumsum(seen) - 1)[rows]
                found[r][of_shard] = shard.slots(r)[0][rows]
        return found


@dataclass(frozen=True)
class Spans:
    a: Side
    b: Side
    at_a: np.ndarray  # int64 [S]: the last token, the first at which the model has seen all of it
    at_b: np.ndarray
    text: np.ndarray  # int64 [S]: an index into `texts`
    texts: list[str]
    document: np.ndarray  # int64 [S]
    common: float  # share of the bytes that both traces have, of the documents of the sample
    documents: int  # of the sample
    of: int  # documents of A


class TokenBytes:
    """The selected tokens of a trace that a decoder reads, and what each token id writes, without
    white space; nothing for special tokens. MoeInspectError where the trace has no vocabulary."""

    def __init__(self, trace: Trace, selection: Selection):
        self.trace, self.selection, table = trace, selection, trace.vocabulary_table
        if not len(table):
            raise MoeInspectError(f"{trace.path} was recorded without a vocabulary")
        frame = (trace.manifest.get("corpus") or {}).get("special_tokens") or {}
        special = {name for part in ("before", "after") for name in frame.get(part) or []}
        words = [b"" if text in special else _bytes(text) for text in table["token"].to_pylist()]
        config = (trace.manifest.get("model") or {}).get("config") or {}
        for name in SPECIAL_IDS:
            of = config.get(name)
            for i in of if isinstance(of, list) else [of]:
                if isinstance(i, int) and 0 <= i < len(words):
                    words[i] = b""
        self.words, self.size_V = words, np.array([len(word) for word in words], np.int64)

    def text(self, token_id: np.ndarray) -> bytes:
        return b"".join([self.words[i] for i in token_id.tolist()])

    def shards(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each shard its number, document, sequence, position and id [4, T], and the rows."""
        names = ["document", "sequence", "position", "token_id"]
        for number, shard in enumerate(self.trace.shards):
            rows = selected_tokens(shard, self.selection, "decoder").number_T
            table = shard.tokens(names)
            part = np.stack([table[name].to_numpy()[rows].astype(np.int64) for name in names])
            if part[3].min(initial=0) < 0 or part[3].max(initial=0) >= len(self.words):
                path = self.trace.path
                raise MoeInspectError(f"{path} has token ids that its vocabulary does not have")
            yield number, part, rows

    def starts(self) -> dict[tuple[bytes, int], tuple[int, int]]:
        """How each document begins (and which of those it is) → its tokens, and its number."""
        early, sizes = [np.zeros((4, 0), np.int64)], Counter[int]()
        for _, part, _ in self.shards():
            early.append(part[:, part[2] < KEY_TOKENS])
            sizes.update(dict(np.stack(np.unique(part[0], return_counts=True), 1).tolist()))
        first = np.concatenate(early, axis=1)
        first = first[:, np.lexsort(first[2::-1])]
        found, seen = dict[tuple[bytes, int], tuple[int, int]](), Counter[bytes]()
        for begin, end in pairwise(run_edges(first[0]).tolist()):
            document = int(first[0, begin])
            key = self.text(first[3, begin : min(end, begin + KEY_TOKENS)])[:KEY_BYTES]
            seen[key] += 1
            found[key, seen[key]] = sizes[document], document
        return found

    def side(self, documents: list[int]) -> Side:
        """The tokens of these documents, the first of each where a sequence was fed twice."""
        index_of = {document: i for i, document in enumerate(documents)}
        parts = [np.zeros((6, 0), np.int64)]
        for number, part, rows in self.shards():
            kept = np.isin(part[0], documents)
            at = np.array([index_of[d] for d in part[0, kept].tolist()], np.int64)
            shard = np.full(len(at), number)
            parts.append(np.stack([at, *part[1:3, kept], shard, rows[kept], part[3, kept]]))
        whole = np.concatenate(parts, axis=1)
        whole = whole[:, np.lexsort(whole[4::-1])]
        whole = whole[:, run_edges(*whole[:3])[:-1]]
        return Side(self.trace, whole[0], *whole[3:])


def _bytes(text: str | None) -> bytes:
    """ "▁caf<0xC3><0xA9>" → b"caf\\xc3\\xa9" """
    return b"".join(bytes_of("".join((text or "").split())).split())


def common_spans(trace_a: Trace, trace_b: Trace, selection: Selection) -> Spans:
    """The spans of a sample of the documents that are in both, found by how they begin.
    MoeInspectError where a vocabulary is missing, or the texts are others."""
    bytes_a, bytes_b = TokenBytes(trace_a, selection), TokenBytes(trace_b, selection)
    starts_a, starts_b = bytes_a.starts(), bytes_b.starts()
    both = [key for key in starts_a if key in starts_b]
    step = max(1, -(-sum(starts_a[key][0] for key in both) // MOST_TOKENS))
    sample = both[::step]
    a = bytes_a.side([starts_a[key][1] for key in sample])
    b = bytes_b.side([starts_b[key][1] for key in sample])
    parts, names, common, total = [np.zeros((4, 0), np.int64)], dict[bytes, int](), 0, 0
    edges_a, edges_b = (np.searchsorted(x.document, np.arange(len(sample) + 1)) for x in (a, b))
    for d in range(len(sample)):
        ids_a, ids_b = (
            x.token_id[edges[d] : edges[d + 1]] for x, edges in ((a, edges_a), (b, edges_b))
        )
        text_a, text_b = bytes_a.text(ids_a), bytes_b.text(ids_b)
        size = min(len(text_a), len(text_b))
        differs = np.frombuffer(text_a, np.uint8, size) != np.frombuffer(text_b, np.uint8, size)
        same = int(differs.argmax()) if differs.any() else size
        common, total = common + same, total + size
        end_a, end_b = np.cumsum(bytes_a.size_V[ids_a]), np.cumsum(bytes_b.size_V[ids_b])
        cuts = np.intersect1d(end_a, end_b)
        cuts = cuts[(cuts > 0) & (cuts <= same)]
        # the first token that ends there; others that do write nothing
        at_a = edges_a[d] + np.searchsorted(end_a, cuts)
        at_b = edges_b[d] + np.searchsorted(end_b, cuts)
        spans = [text_a[i:j] for i, j in pairwise([0, *cuts.tolist()])]
        text = np.array([names.setdefault(span, len(names)) for span in spans], np.int64)
        parts.append(np.stack([at_a, at_b, text, np.full(len(cuts), d)]))
    share = common / total if total else 0.0
    if share < LEAST_COMMON:
        raise MoeInspectError(
            f"A and B have {share:.0%} of the bytes of {len(sample):,} common documents in common: "
            "trace the same text with both"
        )
    at_a, at_b, text, document = np.concatenate(parts, axis=1)
    texts = [name.decode("utf-8", "backslashreplace") for name in names]
    return Spans(
        *(a, b, at_a, at_b, text, texts, document),
        common=share,
        documents=len(sample),
        of=len(starts_a),
    )

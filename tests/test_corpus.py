"""Files become documents, sequences and batches; nothing is lost, and bad input is one clear
line."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect.capture.corpus import tokenize
from moe_inspect.capture.corpus.documents import CorpusStats, find_sources, interleaved
from moe_inspect.capture.corpus.plan import (
    CorpusPlan,
    Frame,
    TokenSequence,
    batches,
    longest_sequence,
    sequences,
    special_frame,
    with_documents,
)
from moe_inspect.errors import MoeInspectError
from tests.conftest import ROOT, Put


class Characters:
    """A tokenizer: a character is a token; with special tokens, 0 in front and 1 behind."""

    def __init__(self, before: list[int], after: list[int]):
        self.before, self.after = before, after

    def __call__(self, text: Any, add_special_tokens: bool, **_: Any) -> dict[str, Any]:
        def encode(one: str) -> list[int]:
            ids = [ord(c) + 2 for c in one]
            return [*self.before, *ids, *self.after] if add_special_tokens else ids

        return {"input_ids": encode(text) if isinstance(text, str) else [*map(encode, text)]}


def documents(
    data: list[Any], text_field: str = "text", domain_field: str | None = None
) -> list[tuple[str, str]]:
    sources = find_sources([*map(str, data)])
    found = interleaved(sources, text_field, domain_field, CorpusStats())
    return [(domain, text) for domain, _, text in found]


@pytest.mark.parametrize(("generate", "room"), [(0, 93), (4, 93), (10, 87)])
def test_sequences_leave_the_positions_that_sglang_keeps(generate: int, room: int) -> None:
    """Seven behind a prompt: of the tokens to generate and three more, where these are more."""
    config = SimpleNamespace(max_position_embeddings=100)
    assert longest_sequence(None, config, generate) == room


def test_every_format(tmp_path: Path) -> None:
    rows = pd.DataFrame({"text": ["eins\nzwei", "drei"], "domain": ["x", "y"]})
    lines = rows.to_json(orient="records", lines=True) + "\n"
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"):
        assert documents([tmp_path / name]) == [("x", "eins\nzwei"), ("y", "drei")]
        with pytest.raises(MoeInspectError, match="from text, domain"):
            documents([tmp_path / name], "body")
    assert documents([tmp_path / "a.txt"]) == [("a", "alpha")]


def test_labels_and_folders(tmp_path: Path) -> None:
    places = ["de/1.txt", "de/deep/2.txt", "en/3.txt", "4.txt", ".hidden/5.txt", "en/readme.md"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(place)
    folders = {("de", "de/1.txt"), ("de", "de/deep/2.txt"), ("en", "en/3.txt")}
    assert set(documents([tmp_path])) == folders | {(tmp_path.name, "4.txt")}
    of_mine = documents([f"mine={tmp_path / 'de'}"])
    assert of_mine == [("mine", "de/1.txt"), ("mine", "de/deep/2.txt")]
    assert documents([tmp_path / "e*" / "*.txt"]) == [("3", "en/3.txt")]
    (tmp_path / "both.jsonl").write_text('{"body": "t", "kind": "k"}\n')
    assert documents([tmp_path / "both.jsonl"], "body") == [("both", "t")]
    assert documents([tmp_path / "both.jsonl"], "body", "kind") == [("k", "t")]
    assert documents([f"label={tmp_path / 'both.jsonl'}"], "body", "kind") == [("label", "t")]


def test_a_null_domain_and_odd_names(tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text('{"text": "x", "domain": null}\n')
    assert documents([tmp_path / "n.jsonl"]) == [("n", "x")]
    with pytest.raises(MoeInspectError, match="row 1: field 'domain' is null"):
        documents([tmp_path / "n.jsonl"], "text", "domain")
    for name in ("a[1].txt", "x::y.txt"):
        (tmp_path / name).write_text("odd")
        assert [text for _, text in documents([tmp_path / name])] == ["odd"]


def test_the_trace_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "run/routing").mkdir(parents=True)
    (tmp_path / "run/routing/part-0-0.parquet").write_text("not text")
    assert len(find_sources([str(tmp_path)])) == 2
    found = find_sources([str(tmp_path)], leave_out=tmp_path / "run")
    assert [Path(s.path).name for s in found] == ["a.txt"]


def test_domains_take_turns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "a{n}"}}\n' for n in range(4)))
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "b{n}"}}\n' for n in range(2)))
    found = [text for _, text in documents([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])]
    assert found == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_an_fsspec_url() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/x/1.txt", b"one")
    memory.pipe("/corpus/y/2.txt", b"two")
    assert documents(["memory://corpus"]) == [("x", "one"), ("y", "two")]
    assert find_sources(["memory://corpus"])[0].path == "memory:///corpus/x/1.txt"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"b": 1, "c": 2}\n', "no text field 'text': choose one with .* from b, c"),
        ("a.jsonl", b'{"text": 7}\n', "holds int, not text"),
        ("a.jsonl", b'{"text": "fine"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "expected a JSON object, got list"),
        ("a.csv", b"title,body\n1,2\n", "from title, body"),
        ("a.parquet", b"PAR1....", "is not a readable Parquet file"),
        ("a.txt", b"caf\xe9", "is not UTF-8 \\(byte 3\\)"),
        ("a.csv", b"text\ncaf\xe9\n", "is not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 999, mtime=0)[:30], "cannot read"),
        ("a.jsonl.xz", b"not xz", "cannot read"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "character 0 is a lone surrogate"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoeInspectError, match=says) as caught:
        documents([tmp_path / name])
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_places_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("x")
    for place in ("none.txt", "empty", "*.txt", "a.md"):
        says = "must end in" if place == "a.md" else "no text at"
        with pytest.raises(MoeInspectError, match=says):
            find_sources([str(tmp_path / place)])
    with pytest.raises(MoeInspectError, match="cannot open nosuch://x"):
        find_sources(["nosuch://x"])


def test_white_space_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " \\n"}\n{"text": "x"}\n{"text": null}\n')
    plan = CorpusPlan(find_sources([str(tmp_path / "a.jsonl")]))
    assert sum(len(batch) for batch, _ in plan.batches(Characters([], []))) == 1
    stats = plan.stats
    assert (stats.documents, stats.empty_documents) == (1, 2)


def test_the_frame_is_found_by_asking() -> None:
    assert special_frame(Characters([0], [1])) == Frame((0,), (1,))
    assert special_frame(Characters([], [])) == Frame()


texts = st.lists(st.text("abc", min_size=1, max_size=60), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    texts, st.integers(3, 20), st.none() | st.integers(1, 200), st.booleans(), st.integers(1, 60)
)
def test_every_token_is_fed_once(
    texts: list[str], max_length: int, max_tokens: int | None, framed: bool, batch_tokens: int
) -> None:
    frame = Frame((0,), (1,)) if framed else Frame()
    tokenizer = Characters([0], [1])
    stats = CorpusStats()

    def made(max_tokens: int | None) -> list[TokenSequence]:
        of = (("d", "s", text) for text in texts)
        return list(sequences(of, tokenizer, frame, max_length, max_tokens, stats))

    rows = made(max_tokens)
    assert all(0 < len(r.ids) <= max_length for r in rows)
    if max_tokens is None:
        for number, text in enumerate(texts):
            own = [r for r in rows if r.document == number]
            assert [chr(i - 2) for r in own for i in r.ids if i > 1] == list(text)
            assert {r.document_tokens for r in own} == {sum(len(r.ids) for r in own)}
            assert {r.document_sequences for r in own} == {len(own)}
    else:
        cut, whole = (sum(len(r.ids) for r in of) for of in (rows, made(None)))
        assert cut == min(max_tokens, whole)
    packed = list(batches(rows, batch_tokens))
    assert sorted(r.sequence for b in packed for r in b) == [r.sequence for r in rows]
    fed: set[int] = set()
    # a document's row comes with the first of its sequences to be fed
    for batch, new in with_documents(packed):
        assert {d.document for d in new} == {r.document for r in batch} - fed
        fed |= {r.document for r in batch}
    assert all(len(b) == 1 or len(b) * max(len(r.ids) for r in b) <= batch_tokens for b in packed)


def test_packing_wastes_little() -> None:
    rng = np.random.default_rng(0)
    rows = [
        TokenSequence(n, n, "d", "s", np.zeros(rng.integers(1, 512), np.int32), 1, 1)
        for n in range(2000)
    ]

    def filled(planned: list[list[TokenSequence]]) -> float:
        padded = sum(len(batch) * max(len(r.ids) for r in batch) for batch in planned)
        return sum(len(r.ids) for r in rows) / padded

    assert filled(list(batches(rows, 4096))) > 0.9
    assert filled([rows[at : at + 8] for at in range(0, len(rows), 8)]) < 0.7  # in order


def test_no_room_beside_the_special_tokens() -> None:
    frame, text = Frame((0,), (1,)), [("d", "s", "x")]
    with pytest.raises(MoeInspectError, match="--max-length 2"):
        list(sequences(text, Characters([0], [1]), frame, 2, None, CorpusStats()))


def test_the_plan_sees_changed_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = CorpusPlan(find_sources([str(tmp_path / "a.txt")])).record()
    assert before == CorpusPlan(find_sources([str(tmp_path / "a.txt")])).record()
    (tmp_path / "a.txt").write_text("two")
    assert before != CorpusPlan(find_sources([str(tmp_path / "a.txt")])).record()


# --- long texts, tokenized in pieces


def fast(model: Any, trainer: Any, pre_tokenizer: Any = None, normalizer: Any = None) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text()[:9000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@cache
def tokenizer_of(kind: str) -> Any:
    """By bytes, by pieces of words, by likelihood, and (as SentencePiece's BPE) without words."""
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    options = {"vocab_size": 400, "show_progress": False}
    unknown = {**options, "special_tokens": ["<unk>"]}
    normal = tokenizers.normalizers
    pieces = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    if kind == "bytes":
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre.ByteLevel.alphabet())
        return fast(models.BPE(), trainer, pre.ByteLevel())
    if kind == "wordpiece":
        model, trainer = models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**unknown)
        normalizer = normal.BertNormalizer()
        return fast(model, trainer, pre.BertPreTokenizer(), normalizer)
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(**unknown, unk_token="<unk>")
        return fast(models.Unigram(), trainer, pre.Metaspace())
    trainer = trainers.BpeTrainer(**unknown, max_token_length=12)
    return fast(models.BPE(unk_token="<unk>"), trainer, None, pieces)


def long_text(characters: int) -> str:
    """Prose, code, several scripts, runs of one character, words of thousands, combining marks."""
    rng = np.random.default_rng(0)
    prose = (ROOT / "README.md").read_text() + (ROOT / "tests" / "test_corpus.py").read_text()
    parts: list[str] = []
    while sum(map(len, parts)) < characters:
        at, n = int(rng.integers(len(prose))), int(rng.integers(1, 900))
        kinds = [
            prose[at : at + 3 * n],
            " " * n,
            "ab" * n,
            "-=" * n,
            "日本語のテキスト😀e\u0301\n" * (n // 20),
            "\r\n" * (n // 4),
            "Zürich1234 " * (n // 9),
        ]
        parts.append(kinds[int(rng.choice(len(kinds), p=[0.7, *[0.05] * 6]))])
    return "".join(parts)[:characters]


@pytest.mark.parametrize("kind", ["bytes", "wordpiece", "unigram", "no words"])
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(kind: str, put: Put) -> None:
    tokenizer, text = tokenizer_of(kind), long_text(30_000)
    whole = np.array(tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0])
    put(tokenize, PIECE=4000, OVERLAP=300)
    assert tokenize.token_ids(["short", text], tokenizer)[1].tolist() == whole.tolist()
    pieces = [text[at : at + 4000] for at in range(0, len(text), 4000)]
    cut = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
    # control: cut anywhere, the tokens are others
    assert [i for ids in cut for i in ids] != whole.tolist()


def test_a_repetition_without_end_is_cut(put: Put) -> None:
    """No split to join pieces at: nothing is lost, and a token at each cut may be another."""
    put(tokenize, PIECE=1000)
    tokenizer = tokenizer_of("bytes")
    ids = tokenize.token_ids(["a" * 3_000 + " b"], tokenizer)[0]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", "") == "a" * 3_000 + "b"


def test_memory_does_not_grow_with_a_document(put: Put) -> None:
    """A tokenizer's memory goes by what it is given at once: never more than two pieces, of one
    text or of many."""
    put(tokenize, PIECE=1000, OVERLAP=200)
    inner, given = tokenizer_of("bytes"), []

    class Watched:
        is_fast = True

        def __call__(self, texts: list[str], **options: Any) -> Any:
            given.append(sum(map(len, texts)))
            return inner(texts, **options)

    texts = [long_text(9_000), *["a few words"] * 300]
    found, whole = tokenize.token_ids(texts, Watched()), inner(texts)["input_ids"]
    assert [*map(len, found)] == [*map(len, whole)]
    assert sum(given) > 9_000 + 300 * len("a few words")  # control: all of it was given
    assert max(given) <= 2000

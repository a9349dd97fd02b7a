"""Two different models on the same text: what can be compared is found as it was planted, and the
rest is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import moe_inspect
from moe_inspect.comparison.compare import compare_checkpoints
from moe_inspect.comparison.spans import (
    adjusted,
    explained_by_text,
    jackknife_interval,
    judged_texts,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace, open_trace
from tests.conftest import Cli
from tests.support.damage import edit_manifest
from tests.support.synthetic import uniform_ids, write_trace

DOCUMENTS, WORDS_EACH, WORDS = 40, 60, 24
TEXTS = [f"w{i:02}é" for i in range(WORDS)]
WORD = np.random.default_rng(0).integers(0, WORDS, (DOCUMENTS, WORDS_EACH))
LABELS = ["law", "code"]


def trace_of(
    root: Path,
    vocabulary: Sequence[str | None],
    ids: Sequence[Sequence[int]],
    choose: Any,
    *shape: int,
    L: int = 2,
    **settings: Any,
) -> Trace:
    """The ids of each document; `choose(token_id [T], E, k, layer)` → experts [T, k]. shape: E,
    k."""
    document = np.repeat(np.arange(len(ids)), [len(of) for of in ids])
    token_id = np.array([i for of in ids for i in of])
    write_trace(
        root,
        [choose(token_id, *shape, r) for r in range(L)],
        shape[0],
        document=document,
        domain_of_document=LABELS,
        token_id=token_id,
        batch_tokens=len(ids[0]),
        **settings,
    )
    tokens = pa.array(vocabulary, pa.string())
    table = pa.table({"token_id": pa.array(range(len(tokens)), pa.int32()), "token": tokens})
    pq.write_table(table, root / "vocabulary.parquet")
    edit_manifest(root, vocabulary=None)
    return open_trace(root)


def by_word(token_id: np.ndarray, E: int, k: int, layer: int) -> np.ndarray:
    """Layer 0: the word alone decides. Layer 1: chance."""
    if layer == 0:
        return ((token_id[:, None] + np.arange(k)) % E).astype(np.uint16)
    return uniform_ids(np.random.default_rng([1, E]), len(token_id), E, k)


def by_chance(token_id: np.ndarray, E: int, k: int, layer: int) -> np.ndarray:
    return uniform_ids(np.random.default_rng([2, E, layer]), len(token_id), E, k)


def whole_words(
    root: Path, choose: Any = by_word, documents: int = DOCUMENTS, **more: Any
) -> Trace:
    """A token per word, with ▁ before it as SentencePiece has it, and <s> in front."""
    vocabulary = [*(f"▁{text}" for text in TEXTS), "<s>"]
    ids = [[WORDS, *row] for row in WORD[:documents].tolist()]
    manifest = {"corpus": {"special_tokens": {"before": ["<s>"], "after": []}}}
    return trace_of(root, vocabulary, ids, choose, 8, 2, manifest=manifest, **more)


def pieces(root: Path, choose: Any, documents: int = DOCUMENTS, **more: Any) -> Trace:
    """Two tokens per word, the first of which begins a character that the second ends, and a token
    for the space. Token WORDS + i ends word i."""
    starts = [f"{text[:-1]}<0xC3>" for text in TEXTS]
    vocabulary = [*starts, *(["<0xA9>"] * WORDS), "▁"]
    words = WORD[:documents].tolist()
    ids = [[x for w in row for x in (w, WORDS + w, 2 * WORDS)] for row in words]
    return trace_of(root, vocabulary, ids, choose, 16, 4, **more)


def kinds(made: Any) -> dict[str, Any]:
    return {finding.kind: finding for finding in made.verdict()}


def beside(a: Trace, b: Trace, **options: Any) -> Any:
    return moe_inspect.compare(a, b, side_by_side=True, **options)


def test_spans_are_the_words_of_both_however_they_are_cut(tmp_path: Path) -> None:
    spans = beside(whole_words(tmp_path / "a"), pieces(tmp_path / "b", by_chance)).spans
    assert spans.common == 1
    assert len(spans.at_a) == DOCUMENTS * WORDS_EACH
    assert [spans.texts[i] for i in spans.text[:WORDS_EACH]] == [TEXTS[w] for w in WORD[0]]
    assert spans.a.token_id[spans.at_a].tolist() == WORD.ravel().tolist()
    assert spans.b.token_id[spans.at_b].tolist() == (WORD.ravel() + WORDS).tolist()


def test_what_the_text_tells_is_found_in_both_and_chance_is_not(tmp_path: Path) -> None:
    a = whole_words(tmp_path / "a")
    for name, choose in (("word", by_word), ("chance", by_chance)):
        made = beside(a, pieces(tmp_path / name, choose))
        table = made.tables["spans"].set_index(["trace", "layer"])
        assert table.loc[("a", 0), "text_mi_bits"] == pytest.approx(3, abs=0.01)
        planted = [("a", 0), *([("b", 0)] if choose is by_word else [])]
        for at, row in table[table.index.get_level_values("layer") < 2].iterrows():
            explained, low = row[["explained_by_text", "explained_by_text_low"]]
            if at in planted:
                assert (explained, low) == pytest.approx((1, 1))
            else:
                assert (abs(explained) < 0.01, low <= 0.005) == (True, True)
        said = kinds(made)["vocabulary"].text
        assert ("A's experts follow the text more than B's" in said) == (choose is by_chance)


def test_the_texts_of_an_expert_are_those_that_were_sent_to_it(tmp_path: Path) -> None:
    a, b = whole_words(tmp_path / "a"), pieces(tmp_path / "b", by_word)
    table = beside(a, b, top=0).tables["vocabulary"]
    for side, E, of_word in (("a", 8, 0), ("b", 16, WORDS)):
        rows = table[(table["trace"] == side) & (table["layer"] == 0)]
        assert (rows["fraction"] == 1).all()
        found = dict(zip(rows["text"], rows["expert"], strict=True))
        assert found == {text: (of_word + i) % E for i, text in enumerate(TEXTS)}
        counts = dict(zip(rows["text"], rows["count"], strict=True))
        assert counts == {text: WORD.ravel().tolist().count(i) for i, text in enumerate(TEXTS)}


def test_told_is_the_formula_and_shuffled_text_tells_nothing() -> None:
    rng = np.random.default_rng(3)
    text, document = rng.integers(0, 5, 4_000), np.arange(4_000) // 100
    expert = np.where(rng.random(4_000) < 0.5, text % 4, rng.integers(0, 4, 4_000))
    explained = explained_by_text(text, expert, document, 5, 4)
    p = np.array([[np.mean((text == v) & (expert == e)) for e in range(4)] for v in range(5)])
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    assert explained.mi_bits == pytest.approx((p * np.log2(p / independent)).sum())
    entropy = -(p.sum(0) * np.log2(p.sum(0))).sum()
    assert explained.entropy_bits == pytest.approx(entropy)
    null = explained.null_bits
    assert explained.share == pytest.approx((explained.mi_bits - null) / (entropy - null))
    kept = document % 10 != 3
    without = explained_by_text(text[kept], expert[kept], document[kept], 5, 4)
    expected = adjusted(without.mi_bits, without.entropy_bits, null)
    assert explained.share_without_G[3] == pytest.approx(expected)
    assert explained_by_text(text, text % 4, document, 5, 4).share == pytest.approx(1)
    assert abs(explained_by_text(text, rng.permutation(expert), document, 5, 4).share) < 0.005
    few = explained_by_text(text[:500], expert[:500], document[:500], 5, 4)
    assert np.isnan(few.share_without_G).all()
    unknown = np.where(np.arange(4_000) < 1_000, 4, expert)  # routed nowhere
    assert explained_by_text(text, unknown, document, 5, 4).counts_VE.sum() == 3_000
    assert judged_texts(np.repeat([7, 2, 5], [9, 7, 12])).tolist() == [5, 7]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Two models of one law, in documents that have favourite experts of their own: the difference
    is 0. Wrong intervals, of half the width, miss it."""
    S, V, E, documents, runs = 4_000, 50, 8, 60, 100
    document = np.repeat(np.arange(documents), -(-S // documents))[:S]

    def model(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        favourite, u = rng.integers(0, E, documents), rng.random(S)
        chance = rng.integers(0, E, S)
        return np.where(u < 0.4, text * 3 % E, np.where(u < 0.6, favourite[document], chance))

    held = narrow = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        text = rng.integers(0, V, S)
        a, b = (explained_by_text(text, model(text, rng), document, V, E) for _ in range(2))
        difference = a.share - b.share
        low, high = jackknife_interval(difference, a.share_without_G - b.share_without_G)
        held += low <= 0 <= high
        narrow += abs(difference) <= (high - low) / 4
    assert held >= 0.9 * runs
    assert narrow < 0.85 * runs


def test_documents_numbered_otherwise_and_text_cut_short_are_found(tmp_path: Path) -> None:
    a = whole_words(tmp_path / "a")
    order = np.random.default_rng(5).permutation(DOCUMENTS)
    starts = [*(f"▁{text}" for text in TEXTS), "▁other"]
    ids = [[*row[: WORDS_EACH // 2], *([WORDS] * 3)] for row in WORD[order].tolist()]
    made = beside(a, trace_of(tmp_path / "b", starts, ids, by_word, 8, 2))
    spans = made.spans
    assert spans.documents == DOCUMENTS
    assert len(spans.at_a) == DOCUMENTS * WORDS_EACH // 2
    assert (spans.a.token_id[spans.at_a] == spans.b.token_id[spans.at_b]).all()
    assert kinds(made)["text"].severity == "warning"


def test_balance_stands_beside_its_own_chance_and_its_most(tmp_path: Path) -> None:
    a, b = whole_words(tmp_path / "a"), pieces(tmp_path / "b", by_chance, L=3)
    table = beside(a, b).tables["balance"]
    assert table.columns[:4].tolist() == ["layer", "router", "trace", "depth"]
    assert (table["max_over_mean_most"] == 4).all()
    for side, trace, depth in (("a", a, [0, 1]), ("b", b, [0, 0.5, 1])):
        rows, alone = table[table["trace"] == side], moe_inspect.report(trace).tables["balance"]
        assert rows["depth"].tolist() == depth
        for column in ("max_over_mean", "expected_by_chance", "gini", "dead_experts"):
            assert rows[column].tolist() == alone[column].tolist()


def test_domains_are_told_as_a_share_of_what_is_possible(tmp_path: Path) -> None:
    """Two domains on disjoint experts: all that there is to tell, whatever E and k."""

    def choose(token_id: np.ndarray, E: int, k: int, layer: int) -> np.ndarray:
        document = np.arange(len(token_id)) // (len(token_id) // DOCUMENTS)
        rng = np.random.default_rng(E)
        ids = uniform_ids(rng, len(token_id), E // 2, k)
        return (ids + (document % 2)[:, None] * (E // 2)).astype(np.uint16)

    a, b = whole_words(tmp_path / "a", choose), pieces(tmp_path / "b", choose)
    table = beside(a, b).tables["specialization"]
    np.testing.assert_allclose(table["domain_mi_bits"], 1)
    assert (table["explained_by_domain"] > 0.9).all()


def test_the_command_says_what_applies_and_refuses_the_rest(cli_here: Cli, tmp_path: Path) -> None:
    whole_words(tmp_path / "a")
    pieces(tmp_path / "b", by_chance)
    shown = cli_here("compare", "a", "b", "--html", "p.html", "--plots", "plots")
    said = " ".join(shown.stdout.split())
    assert "Different models: A has 8 experts per layer, B 16; A has 2 experts per token" in said
    assert "Tables left out: agreement, " in said
    assert "the tokenizers have 25 tokens in A, 49 in B" in said
    assert "explained_by_text" in said
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    for heading in ("Two models, side by side", "Do experts follow the text?", "Tables left out"):
        assert heading in page
    drawn = {path.name for path in (tmp_path / "plots").glob("*.svg")}
    assert drawn == {"load_by_depth.svg", "domains_by_depth.svg", "texts_by_depth.svg"}
    for asked, says in (
        (["--table", "agreement"], "there is no table 'agreement'"),
        (["--fail-above", "set_mismatch=0"], "there is no metric 'set_mismatch'"),
        (["--layers", "0"], "which layers needs: leave it out"),
    ):
        done = cli_here("compare", "a", "b", *asked, check=1)
        assert "A has 8 experts per layer, B 16" in done.stderr
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not done.stdout
    done = cli_here("compare", "a", "b", "--shift-layers", "1", check=1)
    assert "of different models" in done.stderr
    done = cli_here("compare", "a", "a", "--table", "balance", check=1)
    assert "no table 'balance'" in done.stderr


def test_what_cannot_be_had_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    a = whole_words(tmp_path / "a")
    bare = write_trace(tmp_path / "b", [np.zeros((50, 1), np.uint8)], 4)
    made = beside(a, bare)
    why = dict(made.tables["refused"].to_numpy().tolist())
    assert why.keys() >= {"agreement", "flips", "tokens", "matched"}
    assert why["spans"] == why["vocabulary"] == f"{bare.path} was recorded without a vocabulary"
    assert why["specialization"] == "the domains are not the same: code, law in A, text in B"
    assert {f.kind for f in made.verdict()} == {"different_models", "text", "balance", "refused"}
    with pytest.raises(MoeInspectError, match="without a vocabulary"):
        made.tables["spans"]
    words = [f"▁x{i}" for i in range(WORDS)]
    other = trace_of(tmp_path / "c", words, WORD.tolist(), by_word, 16, 2)
    unknown = pieces(tmp_path / "d", by_chance, slot_order="unknown")
    assert "of the bytes" in beside(a, other).why_not("spans")
    assert "does not record first choices" in beside(a, unknown).why_not("spans")


def test_what_makes_models_different_is_named(tmp_path: Path) -> None:
    def shaped(name: str, E: int, k: int, blocks: int | None = None) -> Trace:
        config = {"model": {"config": {"num_hidden_layers": blocks}}} if blocks else {}
        rng = np.random.default_rng(0)
        ids = [uniform_ids(rng, 200, E, k) for _ in range(2)]
        return write_trace(tmp_path / name, ids, E, manifest=config)

    a = shaped("a", 8, 2, 4)
    for name, sizes, says in (
        ("b", (16, 2, 4), "A has 8 experts per layer, B 16"),
        ("c", (8, 3, 4), "A has 2 experts per token, B 3"),
        ("d", (8, 2, 6), "A has 4 layers, B 6"),
    ):
        b = shaped(name, *sizes)
        assert beside(a, b).reasons == [says]
        with pytest.raises(MoeInspectError, match=r"side by side, .* which noise needs"):
            beside(a, b, noise=a)
        assert moe_inspect.compare(a, b).reasons == [says]
        with pytest.raises(MoeInspectError, match=says) as error:
            compare_checkpoints([a, b])
        assert ("Physical ids" in str(error.value)) == (name == "b")
    assert moe_inspect.compare(a, shaped("e", 8, 2, 6), layers="0-1").mismatched == 0
    assert moe_inspect.compare(a, shaped("f", 8, 2)).mismatched == 0

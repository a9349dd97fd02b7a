"""Two traces of the same tokens: what is the same is said to be, and what is numbered otherwise is
found. Two models: their reports' summaries side by side. The tables: test_oracles_compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.comparison import kernels
from moe_inspect.comparison.diagnosis import percent
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace
from tests.conftest import Cli
from tests.support.foreign import npy
from tests.support.synthetic import uniform_ids, write_trace

T, L, E, K = 3_000, 5, 16, 4
DOCUMENT = np.arange(T) // 50
IDS = np.arange(T) * 7 % 5_003
ALIKE = {
    "document": DOCUMENT,
    "token_id": IDS,
    "domain_of_document": ["a", "b"],
    "batch_tokens": 50,  # a batch per document: positions count from its beginning
    "shard_tokens": 1_000,
}


def routes(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [uniform_ids(rng, T, E, K) for _ in range(L)]


def flipped(ids: Sequence[np.ndarray], share: float, seed: int = 1) -> list[np.ndarray]:
    """Some decisions with another last expert."""
    rng, out = np.random.default_rng(seed), [x.copy() for x in ids]
    for of_router in out:
        for t in np.flatnonzero(rng.random(len(of_router)) < share):
            of_router[t, -1] = rng.choice(np.setdiff1d(np.arange(E), of_router[t]))
    return out


Write = Callable[..., Trace]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A trace of ids, by name."""

    def written(name: str, ids: Sequence[np.ndarray], experts: int = E, **more: Any) -> Trace:
        return write_trace(tmp_path / name, ids, experts, **ALIKE | more)

    return written


def gates(seed: int, ordered: bool = True) -> list[np.ndarray]:
    """Gate weights, the largest first."""
    drawn = np.random.default_rng(seed).random((L, T, K)).astype(np.float32)
    return list(np.sort(drawn)[:, :, ::-1] if ordered else drawn)


def test_threads_and_the_order_of_batches_change_nothing(write: Write) -> None:
    first, other = write("a", routes()), flipped(routes(), 0.01)
    made = moe_inspect.compare(first, write("b", other, batch_order=[*range(T // 50)][::-1]))
    straight = moe_inspect.compare(first, write("c", other))
    assert made.mismatched == straight.mismatched > 0
    for name in ("agreement", "documents", "flips", "tokens", "depth"):
        assert made.tables[name].equals(straight.tables[name]), name


# --- the same


def test_a_trace_and_itself_are_the_same(write: Write) -> None:
    weights = gates(3, ordered=False)
    first, whole = write("a", routes()), write("b", routes(), weights=weights)
    again = write("c", routes(), shard_tokens=999, weights=weights)
    heavier = write("d", routes(), weights=[w * np.float32(1.5) for w in weights])
    for a, b, says in (
        (first, first, "The same to the bit: all 15,000 decisions"),
        (whole, again, "The same to the bit: all 15,000 decisions"),
        (first, whole, "The same experts in all 15,000 decisions"),
        (whole, heavier, "have different weights"),
    ):
        made = moe_inspect.compare(a, b)
        assert made.alike == (a is b)
        assert says in made.verdict()[0].text
        assert {finding.severity for finding in made.verdict()} <= {"good", "note"}
        assert made.tokens_mismatch == 0
        assert all(made.tables[name].empty for name in ("flips", "movers", "documents"))


def decided(bias_E: np.ndarray | float = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random logits, and the experts of the largest with the bias added."""
    rng = np.random.default_rng(4)
    logits = [rng.normal(size=(T, E)).astype(np.float16).astype(np.float32) for _ in range(L)]
    return logits, [
        np.argsort(-(x + bias_E), 1, kind="stable")[:, :K].astype(np.uint16) for x in logits
    ]


def swapped(
    logits: list[np.ndarray],
    ids: list[np.ndarray],
    places: slice,
    n: int = L,
    documents: Sequence[int] = range(T),
) -> list[np.ndarray]:
    """The next best instead of the last expert, at these places of the order of margins, in n
    routers, in these documents."""
    other = [x.copy() for x in ids]
    for x, of_TK in [*zip(logits, other, strict=True)][:n]:
        ranked = np.argsort(-x, 1, kind="stable")
        margin_T = np.take_along_axis(x, ranked, 1)[:, K - 1] - np.sort(x, 1)[:, -K - 1]
        at = np.argsort(margin_T, kind="stable")[places]
        at = at[np.isin(DOCUMENT[at], documents)]
        of_TK[at, -1] = ranked[at, K]
    return other


@pytest.mark.parametrize(
    ("places", "n", "kind", "severity", "says"),
    [
        (slice(20), L, "rounding", "good", "100% of these are among the 10% of decisions with"),
        (slice(-20, None), L, "different", "warning", "only 0% were close decisions"),
        # a few of many, in as many documents: neither is shown
        (slice(1), 1, "undecided", "note", "100% of these were close decisions"),
        (slice(-1, None), 1, "undecided", "note", "in 1 document: too few to tell whether"),
        (slice(-2, None), 1, "undecided", "note", "in 2 documents: too few to tell whether"),
    ],
)
def test_flips_at_the_margin_are_rounding_and_others_are_not(
    write: Write, places: slice, n: int, kind: str, severity: str, says: str
) -> None:
    logits, ids = decided()
    other = swapped(logits, ids, places, n)
    made = moe_inspect.compare(write("a", ids, logits=logits), write("b", other, logits=logits))
    assert made.mismatched == n * len(range(T)[places])
    found = made.verdict()[0]
    assert (found.kind, found.severity) == (kind, severity)
    assert says in found.text
    if n == L:
        margins = made.tables["margins"].groupby("decile")["set_mismatch"].mean()
        assert margins.idxmax() == (0 if kind == "rounding" else 9)


def test_shares_are_said_as_exactly_as_they_are_known() -> None:
    said = {0.0: "0.00%", 1 / 15_000: "0.007%", 1e-4: "0.01%", 0.25: "25.00%"}
    assert {share: percent(share) for share in said} == said


def test_flips_of_one_document_among_others_are_few(write: Write) -> None:
    """Most flips are of one document: as many documents with one flip each would tell."""
    logits, ids = decided()
    a, of_one = write("a", ids, logits=logits), swapped(logits, ids, slice(T // 11), documents=[0])
    for name, before, kind in (("one", of_one, "undecided"), ("each", ids, "rounding")):
        other = swapped(logits, before, slice(T // 60), 1, range(1, 11))
        found = moe_inspect.compare(a, write(name, other, logits=logits)).verdict()[0]
        assert (found.kind, found.values["flips_in_lowest_tenth"]) == (kind, 1), name
        assert ("mostly in 2 documents: too few" in found.text) == (name == "one")


@pytest.mark.parametrize("places", [slice(20), slice(-20, None)])
def test_without_logits_the_margin_is_unknown(write: Write, places: slice) -> None:
    """The gate weights of the chosen say nothing of how close the next expert was: the same
    sentence, whichever decisions flipped."""
    logits, ids = decided()
    top = [
        np.exp(np.take_along_axis(x, e.astype(int), 1)) for x, e in zip(logits, ids, strict=True)
    ]
    weights = [x / x.sum(1, keepdims=True) for x in top]
    sides = {"a": ids, "b": swapped(logits, ids, places)}
    made = moe_inspect.compare(*(write(name, of, weights=weights) for name, of in sides.items()))
    found = made.verdict()[0]
    assert (found.kind, found.severity) == ("undecided", "note")
    assert "Record with --logits" in found.text


def test_where_a_bias_chooses_too_logits_tell_no_margin(write: Write) -> None:
    logits, ids = decided(np.linspace(-2, 2, E))
    a, b = write("a", ids, logits=logits), write("b", flipped(ids, 0.01), logits=logits)
    made = moe_inspect.compare(a, b)
    assert made.margins is None
    assert "do not choose by their logits alone" in made.verdict()[0].text


# --- what is numbered otherwise


def test_documents_numbered_otherwise_are_found_by_content(write: Write) -> None:
    first, other = write("a", routes()), flipped(routes(), 0.01)
    order = np.random.default_rng(6).permutation(T // 50)
    rows = np.concatenate([np.arange(50 * d, 50 * d + 50) for d in order])
    made = moe_inspect.compare(first, write("b", [x[rows] for x in other], token_id=IDS[rows]))
    straight = moe_inspect.compare(first, write("c", other))
    assert (made.alignment.by, straight.alignment.by) == ("content", "document")
    assert made.mismatched == straight.mismatched > 0


def test_a_document_that_is_longer_in_one_trace_is_found_by_its_beginning(write: Write) -> None:
    """The numbers are others, and 20 tokens of the first document are missing."""
    left = np.r_[np.arange(50, T), np.arange(30)]
    rows = [x[left] for x in flipped(routes(), 0.01)]
    b = write(
        "b", rows, token_id=IDS[left], document=np.r_[np.arange(T - 50) // 50, [T // 50 - 1] * 30]
    )
    made = moe_inspect.compare(write("a", routes()), b)
    assert made.alignment.by == "content"
    assert made.counts.tokens == T - 20


def test_what_comes_after_other_token_ids_is_not_compared(write: Write) -> None:
    token_id = IDS + np.isin(np.arange(T), range(1_030, 1_050))
    made = moe_inspect.compare(write("a", routes()), write("b", routes(), token_id=token_id))
    assert made.alignment.diverged == 1
    assert made.counts.tokens == T - 20
    (found,) = [f for f in made.verdict() if f.kind == "missing_tokens"]
    said = "1 sequence continues with different token ids and is not compared from there on"
    assert said in found.text


# --- what cannot be compared


def test_what_cannot_be_aligned_is_refused_in_a_line(write: Write) -> None:
    a, shifted = write("a", routes()), write("s", routes(), token_id=np.roll(IDS, 1))
    assert moe_inspect.compare(a, shifted, shift_positions=1).alignment.matched > 0.9 * T
    text = write("t", routes(), token_id=IDS[::-1] + 1000)
    far = write("f", routes(), layers=range(50, 50 + L))
    for b, says in (
        (shifted, r"add --shift-positions 1$"),
        (text, "trace the same text with both"),
        (far, "no common layer"),
    ):
        with pytest.raises(MoeInspectError, match=says):
            moe_inspect.compare(a, b)
    words = [write(f"w{n}", routes(), token_id=IDS + n, words=n) for n in (600, 700)]
    assert "the tokenizers have 600 tokens in A, 700" in moe_inspect.compare(*words).why


def test_routes_that_an_engine_returns_are_compared(write: Write, tmp_path: Path) -> None:
    """Equal sets, and their order is told as unknown."""
    a, routed_TLK = write("a", routes(), weights=gates(9)), np.stack(routes(), 1)
    responses = [
        {
            "prompt_token_ids": IDS[at].tolist(),
            "token_ids": [],
            "routed_experts": npy(routed_TLK[at][:-1]),
        }
        for at in (slice(first, first + 50) for first in range(0, T, 50))
    ]
    (tmp_path / "r.jsonl").write_text("".join(f"{json.dumps(of)}\n" for of in responses))
    b = moe_inspect.import_trace("vllm-routed", [tmp_path / "r.jsonl"], tmp_path / "b", experts=E)
    made = moe_inspect.compare(a, b)
    table = made.tables["agreement"]
    assert made.counts.tokens == T - T // 50  # the last token of a sequence has no row
    assert (table["set_mismatch"] == 0).all()
    assert table[["first_choice", "order", "weight_l1"]].isna().all(axis=None)
    assert "at least one trace does not record the order of slots" in made.verdict()[0].text


# --- the command


def test_the_command_and_its_gates(cli_here: Cli, write: Write, tmp_path: Path) -> None:
    write("a", routes())
    write("b", flipped(routes(), 0.01))
    assert "chose different experts" in cli_here("compare", "a", "b").stdout
    limits = "set_mismatch=0.5,tokens_mismatch=0.01"
    done = cli_here("compare", "a", "b", "--fail-above", limits, check=3)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("failed: all routers: tokens_mismatch is")
    cli_here("compare", "a", "b", "--fail-above", "set_mismatch=0.5", "--fail-below", "overlap=0.9")
    cli_here("compare", "a", "a", "--fail-above", "set_mismatch=0,tokens_mismatch=0")
    cli_here("compare", "a", "b", "-o", "agreement.jsonl")
    rows = [json.loads(x) for x in (tmp_path / "agreement.jsonl").read_text().splitlines()]
    assert [row["layer"] for row in rows] == [*range(L)]
    cli_here("compare", "a", "b", "--table", "verdict", "-o", "verdict.json")
    first = json.loads((tmp_path / "verdict.json").read_text().splitlines()[0])
    assert first["values"]["decisions"] == T * L
    cli_here("compare", "a", "b", "--table", "tokens", "-o", "t.csv")
    assert (tmp_path / "t.csv").read_text().startswith("routers,tokens,share,share_more\n0,")
    for asked, check, says in (
        (["b", "--fail-above", "gini=1"], 2, "no metric 'gini': there are set_mismatch"),
        (["b", "--table", "load"], 1, "no table 'load'"),
        (["c"], 1, "no trace at c"),
    ):
        assert says in cli_here("compare", "a", *asked, check=check).stderr


def test_pictures_are_of_what_differs(cli_here: Cli, write: Write, tmp_path: Path) -> None:
    logits, ids = decided()
    write("b", flipped(ids, 0.01))
    same = write("w", ids, logits=logits)
    cli_here("compare", "w", "b", "--plots", "plots", "-o", "x.txt")
    names = ("set_mismatch", "margin_map", "position_map", "growth", "load_shift")
    expected = {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == expected
    charts, left_out = moe_inspect.compare(same, same).charts()
    assert ([chart.name for chart in charts], left_out) == (["set_mismatch"], [])


# --- different models


def shaped(root: Path, E: int, k: int, blocks: int | None = None, **more: Any) -> Trace:
    config = {"model": {"config": {"num_hidden_layers": blocks}}} if blocks else {}
    ids = [uniform_ids(np.random.default_rng(0), 200, E, k) for _ in range(2)]
    return write_trace(root, ids, E, manifest=config, **more)


def test_of_two_models_the_summaries_of_both_reports_are_a_table(
    cli_here: Cli, tmp_path: Path
) -> None:
    by_domain = {"domain_of_document": ["law", "code"], "document": np.arange(200)}
    a, b = shaped(tmp_path / "a", 8, 2, **by_domain), shaped(tmp_path / "b", 16, 4)
    made: Any = moe_inspect.compare(a, b)
    table = made.tables["summary"].set_index("key")
    for side, trace in (("a", a), ("b", b)):
        alone: Any = moe_inspect.report(trace).tables["summary"].set_index("key")["value"]
        kept = [key for key in alone.index if not key.startswith(("threshold_", "note"))]
        assert table.loc[kept, side].tolist() == alone[kept].tolist()
        assert "note" in alone
    assert not table.index.str.startswith(("threshold_", "note")).any()
    assert table.loc["tokens_in_law"].tolist() == ["100", ""]
    assert table.loc["tokens_in_text"].tolist() == ["", "200"]
    assert set(made.tables) == {"summary", "verdict"}
    assert made.tables["verdict"]["kind"].tolist() == ["different_models"]
    cli_here("compare", "a", "b", "--html", "p.html", "--plots", "plots")
    shown = cli_here("compare", "a", "b")
    said = " ".join(shown.stdout.split())
    assert "A has 8 experts per layer, B 16; A has 2 experts per token" in said
    assert "no comparison of tokens" in said
    assert "assignments 800 1600" in said
    assert "Two models, side by side" in (tmp_path / "p.html").read_text(encoding="utf-8")
    assert not (tmp_path / "plots").exists()
    assert "assignments,800,1600\n" in cli_here("compare", "a", "b", "--format", "csv").stdout
    for asked, says in (
        (["--table", "agreement"], "there is no table 'agreement'"),
        (["--fail-above", "set_mismatch=0"], "there is no metric 'set_mismatch'"),
        (["--layers", "0"], "which layers needs: leave it out"),
        (["--shift-layers", "1"], "of different models"),
    ):
        done = cli_here("compare", "a", "b", *asked, check=1)
        assert "A has 8 experts per layer, B 16" in done.stderr or "--shift-layers" in asked
        assert says in done.stderr
        assert (done.stderr.count("\n"), done.stdout) == (1, "")
    done = cli_here("compare", "a", "a", "--table", "balance", check=1)
    assert "no table 'balance'" in done.stderr


def test_what_makes_models_different_is_named(tmp_path: Path) -> None:
    a = shaped(tmp_path / "a", 8, 2, 4)
    for name, sizes, says in (
        ("b", (16, 2, 4), "A has 8 experts per layer, B 16"),
        ("c", (8, 3, 4), "A has 2 experts per token, B 3"),
        ("d", (8, 2, 6), "A has 4 layers, B 6"),
    ):
        b = shaped(tmp_path / name, *sizes)
        assert [*moe_inspect.compare(a, b).reasons] == [says]
        with pytest.raises(MoeInspectError, match=says) as error:
            moe_inspect.compare(a, b, noise=a)
        assert ("Physical ids" in str(error.value)) == (name == "b")
    assert moe_inspect.compare(a, shaped(tmp_path / "e", 8, 2, 6), layers="0-1").mismatched == 0
    assert moe_inspect.compare(a, shaped(tmp_path / "f", 8, 2)).mismatched == 0


# --- arrays


@pytest.mark.parametrize(("T", "L", "E", "K"), [(1, 1, 4, 1), (40, 3, 9, 3), (371, 2, 300, 2)])
def test_mismatch_of_arrays(T: int, L: int, E: int, K: int) -> None:
    rng = np.random.default_rng([T, E])
    a, b = (np.argsort(rng.random((T, L, E)))[..., :K].astype(np.int64) for _ in "ab")
    same = rng.random((T, L)) < 0.5
    b[same] = a[same]
    for side in (a, b):
        side[rng.random(side.shape) < 0.1] = -1
    a_TLE, b_TLE = ((of[..., None] == np.arange(E)).any(2) for of in (a, b))
    differs_TL = (a_TLE != b_TLE).any(2)
    size_TL, common_TL = np.maximum(a_TLE.sum(2), b_TLE.sum(2)), (a_TLE & b_TLE).sum(2)
    found, even = moe_inspect.mismatch(a, b), np.arange(T) % 2 == 0
    assert found["set_mismatch"] == pytest.approx(differs_TL.mean())
    assert found["set_mismatch_by_layer"] == pytest.approx(differs_TL.mean(0))
    assert found["tokens_mismatch"] == pytest.approx(differs_TL.any(1).mean())
    assert found["order"] == pytest.approx((a == b).all(2).mean())
    assert found["overlap"] == pytest.approx(common_TL.sum() / size_TL.sum())
    assert found["overlap_by_layer"] == pytest.approx(common_TL.sum(0) / size_TL.sum(0))
    masked = moe_inspect.mismatch(a, b, mask=even)
    assert masked["set_mismatch"] == pytest.approx(differs_TL[even].mean())
    assert np.isnan(moe_inspect.mismatch(a[:0], b[:0])["set_mismatch"])
    for other, mask, says in (
        (np.stack([*b, b[0]]), None, rf"shapes \({T}, {L}, {K}\) and \({T + 1}, {L}, {K}\)"),
        (b, [True] * (T + 1), "mask has the shape"),
        (b.astype(float), None, "float64: expected integers"),
    ):
        with pytest.raises(MoeInspectError, match=says):
            moe_inspect.mismatch(a, other, mask=mask)


@pytest.mark.parametrize(
    ("T", "E", "K"), [(0, 8, 2), (1, 8, 1), (371, 5, 5), (1023, 300, 8), (9_000, 128, 8)]
)
def test_the_loops_over_decisions_that_name_an_expert_twice(T: int, E: int, K: int) -> None:
    """Against sets, a decision at a time. Some are the same, some slots route nowhere."""
    rng, V = np.random.default_rng([T, E, K]), 3
    a_TK = np.argsort(rng.random((T, E)), axis=1)[:, :K]
    b_TK = np.where(rng.random((T, K)) < 0.3, rng.integers(0, E, (T, K)), a_TK)
    for ids_TK in (a_TK, b_TK):
        ids_TK[rng.random((T, K)) < 0.1] = E
    a_KT, b_KT = (ids_TK.T.astype(np.uint16) for ids_TK in (a_TK, b_TK))
    weights_a_KT, weights_b_KT = rng.random((2, K, T), np.float32)
    unit_T = np.sort(rng.integers(0, V, T))
    at, *asked = kernels.unequal((*a_KT,), (*b_KT,))
    lost_KN, gained_KN, missing_N = kernels.sets(*asked, E)
    moved_VE, flips_EE = np.zeros((V, E), np.int64), np.zeros((E, E), np.int64)
    kernels.add_moves(*asked, lost_KN, gained_KN, unit_T[at], moved_VE, flips_EE)
    l1_T = kernels.weight_difference(*asked, E, at, (*weights_a_KT,), (*weights_b_KT,))
    moved, flips, missing = np.zeros_like(moved_VE), np.zeros_like(flips_EE), dict[int, int]()
    for t in range(T):
        a, b = ([e for e in ids_TK[t].tolist() if e < E] for ids_TK in (a_TK, b_TK))
        lost, gained = [e for e in a if e not in b], [e for e in b if e not in a]
        np.add.at(moved[unit_T[t]], np.array(gained, int), 1)
        np.add.at(moved[unit_T[t]], np.array(lost, int), -1)
        for e in lost:
            np.add.at(flips[e], np.array(gained, int), 1)
        missing[t] = max(len(a), len(b)) - min(len(a) - len(lost), len(b) - len(gained))
        pairs = [(i, j) for i in range(K) for j in range(K) if a_TK[t, i] == b_TK[t, j] < E]
        if a_TK[t].tolist() == b_TK[t].tolist():
            pairs = [(j, j) for j in range(K)]
        apart = sum(abs(float(weights_a_KT[i, t] - weights_b_KT[j, t])) for i, j in pairs)
        assert l1_T[t] == pytest.approx(apart, abs=1e-5)
    assert missing_N.tolist() == [missing[t] for t in at.tolist()]
    assert (moved_VE == moved).all()
    assert (flips_EE == flips).all()

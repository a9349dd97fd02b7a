"""Two traces of the same tokens: brute force agrees, what is the same is said to be, and what is
numbered otherwise is found, named and mended; nothing of the kind is invented."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.comparison.decisions.verdict import percent
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
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


def test_mismatch_takes_a_mask_and_refuses_other_shapes() -> None:
    a = np.zeros((4, 2, 1), np.int32)
    b = a.copy()
    b[0] = 1
    assert moe_inspect.mismatch(a, b)["set_mismatch"] == 0.25
    assert moe_inspect.mismatch(a, b, mask=[False, True, True, True])["set_mismatch"] == 0
    assert np.isnan(moe_inspect.mismatch(a[:0], b[:0])["set_mismatch"])
    for other, mask, says in (
        (b[1:], None, r"shapes \(4, 2, 1\) and \(3, 2, 1\)"),
        (b, [True], "mask has the shape"),
        (b.astype(float), None, "float64: expected integers"),
    ):
        with pytest.raises(MoeInspectError, match=says):
            moe_inspect.mismatch(a, other, mask=mask)


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
        (slice(-20, None), L, "not_rounding", "warning", "only 0% were close decisions"),
        # a few of many, in as many documents: neither is shown
        (slice(1), 1, "rounding_unknown", "note", "100% of these were close decisions"),
        (slice(-1, None), 1, "rounding_unknown", "note", "in 1 document: too few to tell whether"),
        (slice(-2, None), 1, "rounding_unknown", "note", "in 2 documents: too few to tell whether"),
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
    for name, before, kind in (("one", of_one, "rounding_unknown"), ("each", ids, "rounding")):
        other = swapped(logits, before, slice(T // 60), 1, range(1, 11))
        found = moe_inspect.compare(a, write(name, other, logits=logits)).verdict()[0]
        assert (found.kind, found.values["flips_in_lowest_tenth"]) == (kind, 1), name
        assert ("mostly in 2 documents: too few" in found.text) == (name == "one")


@pytest.mark.parametrize("shape", [(8, 2), (64, 2)])
@pytest.mark.parametrize("close", [True, False])
def test_without_logits_the_margin_is_unknown(
    write: Write, shape: tuple[int, int], close: bool
) -> None:
    """The gate weights of the chosen say nothing of how close the next expert was: the same
    sentence, whichever decisions flipped."""
    (experts, k), rng = shape, np.random.default_rng(4)
    logits = rng.normal(size=(T, experts))
    ranked = np.argsort(-logits, 1)
    gap = np.sort(logits, 1)[:, -k] - np.sort(logits, 1)[:, -k - 1]
    at = np.argsort(gap if close else -gap)[:20]
    other = ranked[:, :k].copy()
    other[at, -1] = ranked[at, k]
    top = np.exp(np.take_along_axis(logits, ranked[:, :k], 1))
    weights = [(top / top.sum(1, keepdims=True)).astype(np.float32)]
    sides = (("a", ranked[:, :k]), ("b", other))
    made = moe_inspect.compare(
        *(write(name, [ids.astype(np.uint16)], experts, weights=weights) for name, ids in sides)
    )
    found = made.verdict()[0]
    assert (found.kind, found.severity) == ("rounding_unknown", "note")
    assert found.text.endswith("Record with --logits to tell whether rounding explains them.")
    with pytest.raises(MoeInspectError, match=r"no logits \(trace --logits\): no margins table"):
        _ = made.tables["margins"]


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


def test_noise_is_what_two_runs_differ_by(write: Write) -> None:
    a, b = write("a", routes()), write("b", flipped(routes(), 0.01))
    again = write("n", flipped(routes(), 0.01, seed=2))
    made = moe_inspect.compare(a, b, noise=again)
    of_two_runs = moe_inspect.compare(a, again).tables["agreement"]["set_mismatch"]
    assert made.tables["agreement"]["noise_set_mismatch"].tolist() == of_two_runs.tolist()
    assert made.tables["overall"]["noise_tokens_mismatch"][0] == pytest.approx(0.05, abs=0.02)


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


def test_pictures_and_the_page(cli_here: Cli, write: Write, tmp_path: Path) -> None:
    logits, ids = decided()
    write("b", flipped(ids, 0.01))
    write("w", ids, logits=logits)
    cli_here("compare", "w", "b", "--html", "p.html", "--plots", "plots", "-o", "x.txt")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    for heading in (
        "Same routing?",
        "Decisions with different experts",
        "Where the router was undecided",
        "Does a difference grow?",
        "Documents that differ most",
    ):
        assert heading in page
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    names = ("set_mismatch", "margin_map", "position_map", "growth", "load_shift")
    assert drawn == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    charts, left_out = moe_inspect.compare(tmp_path / "w", tmp_path / "w").charts()
    assert [chart.name for chart in charts] == ["set_mismatch"]
    assert left_out == []


def test_experts_of_two_seeds_are_matched_by_their_tokens(write: Write) -> None:
    """Experts renumbered, and half of the decisions by chance."""
    order = np.random.default_rng(7).permutation(E).astype(np.uint16)
    mixed = []
    for i, (x, y) in enumerate(zip(routes(), routes(1), strict=True)):
        by_chance = np.random.default_rng(i).random(T) < 0.5
        mixed.append(np.where(by_chance[:, None], y, order[x]))
    table = moe_inspect.compare(write("a", routes()), write("b", mixed)).tables["matched"]
    np.testing.assert_allclose(table["overlap"], K / E, atol=0.1)
    np.testing.assert_allclose(table["overlap_matched"], 0.5 + 0.5 * K / E, atol=0.05)
    np.testing.assert_allclose(table["overlap_matched_by_chance"], K / E, atol=0.05)
    assert (table["layer"] == range(L)).all()

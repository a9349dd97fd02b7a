"""Two traces of the same tokens: brute force agrees, what is the same is said to be, and what is
numbered otherwise is found, named and mended; nothing of the kind is invented."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.comparison.compare import compare_checkpoints
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.synthetic import uniform_ids, write_trace

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
    rng, out = np.random.default_rng(seed), []
    for of_router in ids:
        of_router = of_router.copy()
        t = np.flatnonzero(rng.random(len(of_router)) < share)
        for i in t:
            others = np.setdiff1d(np.arange(E), of_router[i])
            of_router[i, -1] = rng.choice(others)
        out.append(of_router)
    return out


def pair(
    root: Path,
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    b_settings: dict[str, Any] | None = None,
) -> tuple[Trace, Trace]:
    first = write_trace(root / "a", a, E, **ALIKE)
    return first, write_trace(root / "b", b, E, **ALIKE | (b_settings or {}))


def test_mismatch_takes_a_mask_and_refuses_other_shapes() -> None:
    a = np.zeros((4, 2, 1), np.int32)
    b = a.copy()
    b[0] = 1
    assert moe_inspect.mismatch(a, b)["set_mismatch"] == 0.25
    assert moe_inspect.mismatch(a, b, mask=[False, True, True, True])["set_mismatch"] == 0
    assert np.isnan(moe_inspect.mismatch(a[:0], b[:0])["set_mismatch"])
    with pytest.raises(MoeInspectError, match=r"shapes \(4, 2, 1\) and \(3, 2, 1\)"):
        moe_inspect.mismatch(a, b[1:])
    with pytest.raises(MoeInspectError, match="mask has the shape"):
        moe_inspect.mismatch(a, b, mask=[True])
    with pytest.raises(MoeInspectError, match="float64: expected integers"):
        moe_inspect.mismatch(a, b.astype(float))


def test_threads_and_the_order_of_batches_change_nothing(tmp_path: Path) -> None:
    ids = routes()
    other = flipped(ids, 0.01)
    order = [*range(T // 50)][::-1]
    first, second = pair(tmp_path, ids, other, {"batch_order": order})
    made = moe_inspect.compare(first, second)
    straight = moe_inspect.compare(first, write_trace(tmp_path / "c", other, E, **ALIKE))
    assert made.mismatched == straight.mismatched > 0
    for name in ("agreement", "documents", "flips", "tokens", "depth"):
        assert made.tables[name].equals(straight.tables[name]), name


# --- the same


def test_a_trace_and_itself_are_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weights = [rng.random((T, K)).astype(np.float32) for _ in range(L)]
    first, second = pair(tmp_path, routes(), routes(), {"weights": weights})
    whole = write_trace(tmp_path / "c", routes(), E, **ALIKE, weights=weights)
    again = write_trace(
        tmp_path / "d", routes(), E, **ALIKE | {"shard_tokens": 999}, weights=weights
    )
    for made, says in (
        (moe_inspect.compare(first, first), "The same to the bit: all 15,000 decisions"),
        (moe_inspect.compare(whole, again), "The same to the bit: all 15,000 decisions"),
        (moe_inspect.compare(first, second), "The same experts in all 15,000 decisions"),
    ):
        verdict = made.verdict()
        assert verdict[0].text.startswith(says)
        assert {finding.severity for finding in verdict} <= {"good", "note"}
        table = made.tables["agreement"]
        assert (table["set_mismatch"] == 0).all()
        assert (table["overlap"] == 1).all()
        assert made.tokens_mismatch == 0
        assert (made.tables["load_shift"][["load_shift", "jsd_bits"]] == 0).all(axis=None)
        for name in ("flips", "movers", "documents"):
            assert made.tables[name].empty
    assert moe_inspect.compare(first, first).alike
    assert not moe_inspect.compare(whole, again).alike


def test_one_flip_in_many_is_found(tmp_path: Path) -> None:
    ids = routes()
    other = [x.copy() for x in ids]
    other[3][1234] = np.setdiff1d(np.arange(E), ids[3][1234])[:K]
    made = moe_inspect.compare(*pair(tmp_path, ids, other))
    assert made.mismatched == 1
    assert made.tables["agreement"]["set_mismatch"][3] == 1 / T
    assert made.tables["documents"]["document"].tolist() == [1234 // 50]
    assert "1 of 15,000 decisions (0.007%; 0.03% of tokens in any layer)" in made.verdict()[0].text


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
    tmp_path: Path, places: slice, n: int, kind: str, severity: str, says: str
) -> None:
    logits, ids = decided()
    other = swapped(logits, ids, places, n)
    made = moe_inspect.compare(
        write_trace(tmp_path / "a", ids, E, **ALIKE, logits=logits),
        write_trace(tmp_path / "b", other, E, **ALIKE, logits=logits),
    )
    assert made.mismatched == n * len(range(T)[places])
    found = made.verdict()[0]
    assert (found.kind, found.severity) == (kind, severity)
    assert says in found.text
    if n == L:
        margins = made.tables["margins"].groupby("decile")["set_mismatch"].mean()
        assert margins.idxmax() == (0 if kind == "rounding" else 9)


def test_flips_of_one_document_among_others_are_few(tmp_path: Path) -> None:
    """Most flips are of one document: as many documents with one flip each would tell."""
    logits, ids = decided()
    a = write_trace(tmp_path / "a", ids, E, **ALIKE, logits=logits)
    of_one = swapped(logits, ids, slice(T // 11), documents=[0])
    for name, other, kind in (
        ("one", swapped(logits, of_one, slice(T // 60), 1, range(1, 11)), "rounding_unknown"),
        ("each", swapped(logits, ids, slice(T // 60), 1, range(1, 11)), "rounding"),
    ):
        b = write_trace(tmp_path / name, other, E, **ALIKE, logits=logits)
        found = moe_inspect.compare(a, b).verdict()[0]
        assert (found.kind, found.values["flips_in_lowest_tenth"]) == (kind, 1), name
        assert ("mostly in 2 documents: too few" in found.text) == (name == "one")


@pytest.mark.parametrize("shape", [(8, 2), (64, 2)])
@pytest.mark.parametrize("close", [True, False])
def test_without_logits_the_margin_is_unknown(
    tmp_path: Path, shape: tuple[int, int], close: bool
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
    a, b = (
        write_trace(tmp_path / name, [ids.astype(np.uint16)], experts, **ALIKE, weights=weights)
        for name, ids in (("a", ranked[:, :k]), ("b", other))
    )
    found = moe_inspect.compare(a, b).verdict()[0]
    assert (found.kind, found.severity) == ("rounding_unknown", "note")
    assert found.text.endswith("Record with --logits to tell whether rounding explains them.")
    with pytest.raises(
        MoeInspectError, match=r"has no logits \(trace --logits\): no margins table"
    ):
        _ = moe_inspect.compare(a, b).tables["margins"]


def test_where_a_bias_chooses_too_logits_tell_no_margin(tmp_path: Path) -> None:
    logits, ids = decided(np.linspace(-2, 2, E))
    made = moe_inspect.compare(
        write_trace(tmp_path / "a", ids, E, **ALIKE, logits=logits),
        write_trace(tmp_path / "b", flipped(ids, 0.01), E, **ALIKE, logits=logits),
    )
    assert made.margins is None
    assert "do not choose by their logits alone" in made.verdict()[0].text


def test_weights_that_differ_are_told(tmp_path: Path) -> None:
    rng, ids = np.random.default_rng(5), routes()
    weights = [np.sort(rng.random((T, K)))[:, ::-1].astype(np.float32) for _ in range(L)]
    a = write_trace(tmp_path / "a", ids, E, **ALIKE, weights=weights)
    b = write_trace(tmp_path / "b", ids, E, **ALIKE, weights=[w * np.float32(1.5) for w in weights])
    made = moe_inspect.compare(a, b)
    assert "have different weights" in made.verdict()[0].text
    np.testing.assert_allclose(
        made.tables["agreement"]["weight_l1"], [0.5 * w.sum(1).mean() for w in weights], rtol=1e-3
    )


# --- what is numbered otherwise


def test_documents_numbered_otherwise_are_found_by_content(tmp_path: Path) -> None:
    ids = routes()
    other = flipped(ids, 0.01)
    order = np.random.default_rng(6).permutation(T // 50)
    rows = np.concatenate([np.arange(50 * d, 50 * d + 50) for d in order])
    first, second = pair(tmp_path, ids, [x[rows] for x in other], {"token_id": IDS[rows]})
    made = moe_inspect.compare(first, second)
    assert made.alignment.by == "content"
    straight = moe_inspect.compare(first, write_trace(tmp_path / "c", other, E, **ALIKE))
    assert straight.alignment.by == "document"
    assert made.mismatched == straight.mismatched > 0


def test_what_comes_after_other_token_ids_is_not_compared(tmp_path: Path) -> None:
    ids, token_id = routes(), IDS.copy()
    token_id[1_030:1_050] += 1
    first, second = pair(tmp_path, ids, flipped(ids, 0.0), {"token_id": token_id})
    made = moe_inspect.compare(first, second)
    assert made.alignment.diverged == 1
    assert made.counts.tokens == T - 20
    (finding,) = [f for f in made.verdict() if f.kind == "missing_tokens"]
    assert (
        "1 sequence continues with different token ids and is not compared from there on"
        in finding.text
    )


# --- what cannot be compared


def test_what_cannot_be_aligned_is_refused_in_a_line(tmp_path: Path) -> None:
    a = write_trace(tmp_path / "a", routes(), E, **ALIKE)
    shifted = write_trace(tmp_path / "s", routes(), E, **ALIKE | {"token_id": np.roll(IDS, 1)})
    with pytest.raises(MoeInspectError, match=r"add --shift-positions 1$"):
        moe_inspect.compare(a, shifted)
    assert moe_inspect.compare(a, shifted, shift_positions=1).alignment.matched > 0.9 * T
    text = write_trace(tmp_path / "t", routes(), E, **ALIKE | {"token_id": IDS[::-1] + 1000})
    with pytest.raises(MoeInspectError, match="trace the same text with both"):
        moe_inspect.compare(a, text)
    words = [
        write_trace(tmp_path / f"w{n}", routes(), E, **ALIKE | {"token_id": IDS + n, "words": n})
        for n in (600, 700)
    ]
    assert "the tokenizers have 600 tokens in A, 700" in moe_inspect.compare(*words).why
    wider = write_trace(tmp_path / "e", routes(), E + 2, **ALIKE)
    with pytest.raises(MoeInspectError, match=r"A has 16 experts per layer, B 18; .* Physical ids"):
        compare_checkpoints([a, wider])
    far = write_trace(tmp_path / "f", routes(), E, **ALIKE, layers=range(50, 50 + L))
    with pytest.raises(MoeInspectError, match="no common layer"):
        moe_inspect.compare(a, far)


def test_ids_of_an_engine_are_compared_as_sets(tmp_path: Path) -> None:
    """An engine's routes come without weights, in any order."""
    rng = np.random.default_rng(9)
    weights = [np.sort(rng.random((T, K)))[:, ::-1].astype(np.float32) for _ in range(L)]
    a = write_trace(tmp_path / "a", routes(), E, **ALIKE, weights=weights)
    b = write_trace(
        tmp_path / "b", [np.sort(x, 1) for x in routes()], E, **ALIKE, slot_order="unknown"
    )
    made = moe_inspect.compare(a, b)
    table = made.tables["agreement"]
    assert (table["set_mismatch"] == 0).all()
    assert table[["first_choice", "order", "weight_l1"]].isna().all(axis=None)
    assert "at least one trace does not record the order of slots" in made.verdict()[0].text


def test_exported_routes_come_back_as_the_same(tmp_path: Path) -> None:
    """What an engine would return of a trace: equal sets, and their order is told as unknown."""
    a = write_trace(tmp_path / "a", routes(), E, **ALIKE)
    a.export("routed-experts", tmp_path / "r.jsonl")
    lines = [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(lines) == T // 50
    assert [i for line in lines for i in line["prompt_token_ids"]] == IDS.tolist()
    b = moe_inspect.import_trace("vllm-routed", [tmp_path / "r.jsonl"], tmp_path / "b", experts=E)
    made = moe_inspect.compare(a, b)
    assert made.counts.tokens == T - T // 50  # the last token of a sequence has no row
    assert made.mismatched == 0
    assert "at least one trace does not record the order of slots" in made.verdict()[0].text
    dense = write_trace(tmp_path / "d", routes(), E, **ALIKE, layers=range(1, L + 1))
    dense.export("routed-experts", tmp_path / "d.jsonl")
    first = json.loads((tmp_path / "d.jsonl").read_text().splitlines()[0])
    found = np.load(io.BytesIO(base64.b64decode(first["routed_experts"])))
    assert not found[:, 0].any()
    assert (found[:, 1:] == np.stack(routes(), 1)[:49]).all()


def test_noise_is_what_two_runs_differ_by(tmp_path: Path) -> None:
    ids = routes()
    a, b = pair(tmp_path, ids, flipped(ids, 0.01))
    again = write_trace(tmp_path / "n", flipped(ids, 0.01, seed=2), E, **ALIKE)
    made = moe_inspect.compare(a, b, noise=again)
    of_two_runs = moe_inspect.compare(a, again).tables["agreement"]["set_mismatch"]
    assert made.tables["agreement"]["noise_set_mismatch"].tolist() == of_two_runs.tolist()
    assert made.tables["overall"]["noise_tokens_mismatch"][0] == pytest.approx(0.05, abs=0.02)


# --- the command


def test_the_command_and_its_gates(cli_here: Cli, tmp_path: Path) -> None:
    ids = routes()
    pair(tmp_path, ids, flipped(ids, 0.01))
    shown = cli_here("compare", "a", "b")
    assert "chose different experts" in shown.stdout
    done = cli_here(
        "compare", "a", "b", "--fail-above", "set_mismatch=0.5,tokens_mismatch=0.01", check=3
    )
    assert (
        done.stderr.strip().splitlines()[-1].startswith("failed: all routers: tokens_mismatch is")
    )
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
    wrong = cli_here("compare", "a", "b", "--fail-above", "gini=1", check=2)
    assert "no metric 'gini': there are set_mismatch" in wrong.stderr
    assert "no table 'load'" in cli_here("compare", "a", "b", "--table", "load", check=1).stderr
    assert "no trace at c" in cli_here("compare", "a", "c", check=1).stderr


def test_pictures_and_the_page(cli_here: Cli, tmp_path: Path) -> None:
    logits, ids = decided()
    pair(tmp_path, ids, flipped(ids, 0.01))
    write_trace(tmp_path / "w", ids, E, **ALIKE, logits=logits)
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
    made = moe_inspect.compare(tmp_path / "a", tmp_path / "a")
    charts, left_out = made.charts()
    assert [chart.name for chart in charts] == ["set_mismatch"]
    assert left_out == []


def test_experts_of_two_seeds_are_matched_by_their_tokens(tmp_path: Path) -> None:
    """Experts renumbered, and half of the decisions by chance."""
    order = np.random.default_rng(7).permutation(E).astype(np.uint16)
    mixed = []
    for i, x in enumerate(routes()):
        by_chance = np.random.default_rng(i).random(T) < 0.5
        mixed.append(np.where(by_chance[:, None], routes(1)[i], order[x]))
    made = moe_inspect.compare(*pair(tmp_path, routes(), mixed))
    table = made.tables["matched"]
    np.testing.assert_allclose(table["overlap"], K / E, atol=0.1)
    np.testing.assert_allclose(table["overlap_matched"], 0.5 + 0.5 * K / E, atol=0.05)
    np.testing.assert_allclose(table["overlap_matched_by_chance"], K / E, atol=0.05)
    assert (table["layer"] == range(L)).all()


# --- checkpoints


def test_checkpoints_are_compared_with_the_last(cli_here: Cli, tmp_path: Path) -> None:
    last = routes()
    for name, share in (("c0", 0.8), ("c1", 0.3), ("c2", 0.05)):
        write_trace(tmp_path / name, flipped(last, share), E, **ALIKE)
    write_trace(tmp_path / "c3", last, E, **ALIKE)
    names = [f"c{i}" for i in range(4)]
    made = compare_checkpoints([tmp_path / name for name in names])
    mean = made.tables["saturation"].groupby("checkpoint")["overlap"].mean()
    np.testing.assert_allclose(mean, [1 - share / K for share in (0.8, 0.3, 0.05)], atol=0.01)
    (settled,) = [f for f in made.verdict() if f.kind == "saturation"]
    assert settled.values["settled"] == 1
    assert made.tables["change"]["checkpoint"].tolist() == [i for i in range(4) for _ in range(L)]
    shown = cli_here("compare", *names, "--html", "p.html", "--plots", "plots")
    assert "From checkpoint 1 on (c1)" in shown.stdout.replace("\n  ", " ")
    assert "When does the routing settle?" in (tmp_path / "p.html").read_text(encoding="utf-8")
    assert (tmp_path / "plots/saturation.png").exists()
    done = cli_here("compare", *names, "--fail-below", "overlap=0.9", check=3)
    assert done.stderr.count("failed: layer") == L
    wrong = cli_here("compare", *names, "--shift-layers", "1", check=2)
    assert "is for two traces, and there are 4" in wrong.stderr
    with pytest.raises(MoeInspectError, match="two or more checkpoints"):
        compare_checkpoints([tmp_path / "c0"])

"""What routes tell without a reference: published bugs that are planted into recordings, each of
which must be found, and nothing in those that are right."""

from __future__ import annotations

import csv
import gzip
import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import moe_inspect
from docs.generate import fill
from moe_inspect.checking import check as checking
from moe_inspect.checking.kinds import KINDS
from tests.conftest import ROOT, Cli, Put
from tests.support.foreign import npy
from tests.support.misrecorded import BUGS, Recording, foreign, linted, longest, read, routed_text
from tests.support.sweep import sample
from tests.support.synthetic import uniform_ids, write_counts, write_trace

REAL = ROOT.parent / "shared" / "real" / "deepseek_v2_lite_tokens"
SHAPES = {"8 of 2": (12, 8, 2), "64 of 6": (8, 64, 6), "128 of 8": (6, 128, 8)}
T = 1_200


@cache
def recording(name: str) -> Recording:
    if name == "deepseek":
        return deepseek()
    if name in SHAPES:
        return routed_text(len(name), T, *SHAPES[name])
    return read(moe_inspect.open_trace(ROOT / "sample_traces" / name)).take(slice(0, T))


def kinds_of(*given: Any, **facts: Any) -> list[str]:
    return [one.kind for one in moe_inspect.check(*given, **facts).findings]


def deepseek() -> Recording:
    """The 40 prompts of DeepSeek-V2-Lite that MoE-Beyond published: 26 layers of 6 of 64."""
    if not REAL.is_dir():
        pytest.skip(f"no {REAL}")
    words, parts = dict[str, int](), list[tuple[np.ndarray, np.ndarray]]()
    for path in sorted(REAL.glob("*.csv.gz")):
        with gzip.open(path, "rt") as file:
            rows = list(csv.DictReader(file))
        tokens = [row["Token"] for row in rows if row["Layer ID"] == "1"]
        experts = [json.loads(row["Activated Expert IDs"]) for row in rows]
        ids = np.array(experts).reshape(-1, len(tokens), 6)
        parts.append((ids, np.array([words.setdefault(word, len(words)) for word in tokens])))
    size = [len(ids) for _, ids in parts]
    document = np.repeat(np.arange(len(parts)), size)
    position = np.arange(len(document)) - np.searchsorted(document, document)
    ids_LTK = np.concatenate([ids for ids, _ in parts], axis=1)
    token_id = np.concatenate([ids for _, ids in parts])
    return Recording(64, document, position, token_id, ids_LTK, None, range(1, 27), [*words])


RECORDINGS = ["balanced", "untrained", "collapsed", *SHAPES, "deepseek"]


def counted(ids: np.ndarray, E: int, layer: int, tokens: int) -> dict[str, dict[str, Any]]:
    """By kind, what a finding must count in these ids [L, T, K]: certain ones by a rule of each
    decision. layer: the one that is planted. tokens: those of the text."""
    (L, T, K), bad = ids.shape, ids[(ids < 0) | (ids >= E)]
    whole = {"zero_filled": ids == 0, "not_recorded": ids < 0}
    whole["constant_filled"] = ids == np.arange(K)
    found = {kind: {"tokens": of.all((0, 2)).sum()} for kind, of in whole.items()}
    kinds = ("layers_filled", "layer_copied", "layer_shifted")
    found |= {kind: {"layers": [layer]} for kind in kinds}
    if not found["constant_filled"]["tokens"]:
        found["constant_filled"] = {"layers": [layer]}
    found["lengths"] = {"rows": T, "tokens": tokens}
    of_bad = {"assignments": len(bad), "lowest": ids.min(), "highest": ids.max()}
    found |= {"physical_ids": of_bad, "out_of_range": of_bad}
    ordered = np.sort(ids, 2)
    found["twice"] = {"decisions": (ordered[..., 1:] == ordered[..., :-1]).any(2).sum()}
    found["missing_ranks"] = {"ranks_seen": 1, "ranks": 2}
    load_LE = np.stack([np.bincount(of[of >= 0], minlength=E)[:E] for of in ids.reshape(L, -1)])
    mean_L1 = load_LE.mean(1, keepdims=True)
    squares_L = ((load_LE - mean_L1) ** 2 / mean_L1).sum(1)
    spread_L = squares_L * (E - 1) / (E - K)  # variance of E - 1 of k distinct choices
    found["even_load"] = {"p": (L * stats.chi2(E - 1).cdf(spread_L)).min()}
    return found


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_published_bug_is_found_and_nothing_beside_it(name: str) -> None:
    """And its numbers are those of the rows."""
    a, wrong = recording(name), dict[str, Any]()
    assert linted(a) == []
    if name == "deepseek":  # benchmarks.check takes all of it
        a = a.take(a.document >= 36)
    for n, (bug, of) in enumerate(BUGS.items()):
        b = of.b(a, np.random.default_rng([n, len(name)]))
        found, told = linted(b), of.told(a)
        if {one.kind for one in found} != (of.kinds if told else set()):
            wrong[bug] = [one.kind for one in found]
        elif told and of.said not in found[0].text:
            wrong[bug] = found[0].text
        rules = counted(b.ids_LTK, b.E, len(a.layers) // 2, a.T)
        for one in found:
            expected = rules.get(one.kind, {})
            for key, value in expected.items():
                if one.values[key] != (pytest.approx(value) if key == "p" else value):
                    wrong[bug] = f"{key} is {one.values[key]}, not {value}"
            assert one.values["p"] < 1 / 120_000
            assert (one.values["p"] == 0) == one.values["certain"]
    assert not wrong, "\n".join(f"{bug}: {said}" for bug, said in wrong.items())


def test_the_table_of_findings_is_a_row_per_finding() -> None:
    """And where each is stated as in the whole recording, though others were left out before."""
    a = recording("8 of 2")
    ids = np.swapaxes(a.ids_LTK, 0, 1).copy()
    ids[100:120], ids[300:302, 3, 1] = 0, ids[300:302, 3, 0]
    made = moe_inspect.check(ids, experts=8, lengths=[110, a.T - 110])
    table = made.table(values=True)
    assert [*table] == ["severity", "kind", "where", "p", "text", "values"]
    assert table["kind"].tolist() == ["zero_filled", "twice"]
    assert "20 of 1,200 tokens, from token 100 of sequence 0 on" in table["where"][0]
    assert "tokens, from token 190 of sequence 1 on, in layer 3" in table["where"][1]
    for name in ("severity", "text", "values"):
        assert table[name].tolist() == [getattr(one, name) for one in made.findings]
    assert table["p"].tolist() == [0, 0]
    assert made.tables["findings"].equals(table.drop(columns="values"))


def test_shifts_are_told_from_200_tokens_on() -> None:
    """At least 95 of 100, by how far."""
    told, tried = 0, 0
    for name in RECORDINGS:
        a = recording(name)
        for begin in sample(range(0, min(a.T, T) - 199, 200), 2):
            part = a.take(slice(begin, begin + 200))
            for shift in (1, -1, 2):
                found = linted(replace(part, ids_LTK=np.roll(part.ids_LTK, shift, 1)))
                kinds = [(one.kind, one.values.get("shift")) for one in found]
                told, tried = told + (kinds == [("routes_shifted", shift)]), tried + 1
    assert told >= 0.95 * tried


def test_nothing_is_said_of_routes_that_the_text_does_not_tell() -> None:
    """Routes of the document alone, and at random, at every shift of them."""
    rng = np.random.default_rng(0)
    for n in range(40):
        a = routed_text(n, 500, 3, 8, 2)
        stays_T = a.document if n % 2 else np.arange(a.T) // 7
        ids_LTK = np.stack([uniform_ids(rng, a.T, 8, 2)[stays_T] for _ in range(3)]).astype(int)
        free_LTK = np.stack([uniform_ids(rng, a.T, 8, 2) for _ in range(3)]).astype(int)
        some_T = rng.random(a.T)[:, None] < 0.5
        assert linted(replace(a, ids_LTK=np.where(some_T, ids_LTK, free_LTK))) == []
        text = replace(a, token_id=np.arange(a.T))  # no token twice
        assert linted(replace(text, ids_LTK=np.roll(a.ids_LTK, 1, 1))) == []
    # no token next to another, of sequences of one, or between those that are left out
    a = recording("64 of 6")
    ids = np.roll(np.swapaxes(a.ids_LTK, 0, 1), 2, 0)
    assert kinds_of(ids, token_ids=a.token_id, experts=64, lengths=[1] * a.T) == []
    ids[::2] = 0
    assert kinds_of(ids, token_ids=a.token_id, experts=64) == ["zero_filled"]


def test_a_prompt_that_is_answered_twice_is_no_mistake() -> None:
    a = recording("balanced")
    of = longest(a)
    b = a.take(np.r_[: a.T, of.start : of.stop])
    b.document[a.T :] = b.document.max() + 1
    assert linted(b) == []


def test_a_text_that_repeats_itself_is_no_mistake() -> None:
    """As an answer that loops: a phrase of a right recording, 400 tokens of it, whose routes are
    nearly the same each time."""
    a, rng = recording("balanced"), np.random.default_rng(0)
    for size in rng.integers(8, 40, 60).tolist():
        begin = int(rng.integers(a.T - size))
        at = begin + np.arange(400) % size
        ids_LTK = a.ids_LTK[:, at]
        other_T = rng.random(400) < 0.05
        ids_LTK[:, other_T] = a.ids_LTK[:, rng.integers(a.T, size=other_T.sum())]
        ids = np.swapaxes(ids_LTK, 0, 1)
        assert moe_inspect.check(ids, token_ids=a.token_id[at], experts=a.E).findings == []


@pytest.mark.parametrize(("same", "own"), [(1, 2), (2, 4), (4, 2), (4, 4)])
def test_short_prompts_that_begin_alike_are_no_mistake(same: int, own: int) -> None:
    """As those that begin with the token of the beginning, or with a template: 300 prompts whose
    first tokens are the same, by a router that sees the tokens before too."""
    rng = np.random.default_rng(same * 100 + own)
    T, V, E = same + own, 40, 32
    token_ST = rng.integers(0, V, (300, T))
    token_ST[:, :same] = V + np.arange(same)
    text_STD = rng.normal(size=(V + same, 16))[token_ST]
    before_STD = np.cumsum(text_STD, 1) - text_STD
    before_STD /= np.sqrt(np.maximum(np.arange(T), 1))[:, None]
    logits_STLE = np.einsum("std,lde->stle", text_STD + before_STD, rng.normal(size=(8, 16, E)))
    ids = np.argsort(-logits_STLE, 3)[..., :4].reshape(-1, 8, 4)
    assert kinds_of(ids, token_ids=token_ST.ravel(), experts=E, lengths=[T] * 300) == []


def test_a_token_that_is_lost_within_a_sequence_shifts_what_follows() -> None:
    a = recording("64 of 6")
    one = Recording(
        a.E, a.document * 0, np.arange(a.T), a.token_id, a.ids_LTK.copy(), None, a.layers, a.words
    )
    assert linted(one) == []
    one.ids_LTK[:, 700:-1] = a.ids_LTK[:, 701:]
    (found,) = linted(one)
    assert (found.kind, found.values["shift"]) == ("routes_shifted", -1)
    assert "in tokens 800-1199 of sequence 0" in found.text
    of_one = replace(a, ids_LTK=a.ids_LTK.copy())
    of = longest(a)  # of one sequence alone
    assert of.stop - of.start > 150
    of_one.ids_LTK[:, of] = np.roll(a.ids_LTK[:, of], 1, 1)
    assert {found.kind for found in linted(of_one)} == {"routes_shifted"}


def test_layers_beside_a_right_trace_of_the_model(tmp_path: Path) -> None:
    """On another text: the same router on other tokens."""
    whole = routed_text(5, 3_000, 8, 64, 6)
    half = whole.document < whole.document[1_500]
    right = whole.take(~half)
    right = replace(right, document=right.document - right.document[0])
    known, a = right.written(tmp_path / "right"), whole.take(half)

    def said(name: str, ids_LTK: np.ndarray) -> list[tuple[str, Any]]:
        made = replace(a, ids_LTK=ids_LTK).written(tmp_path / name)
        return [(one.kind, one.values["layers"]) for one in made.check(against=known).findings]

    ids = a.ids_LTK
    assert said("the same", ids) == []
    assert said("swapped", ids[[0, 1, 5, 3, 4, 2, 6, 7]]) == [("layers_moved", [2, 5])]
    other = foreign(a, np.random.default_rng(0))
    assert said("drafted", np.stack([*ids[:6], other, ids[7]])) == [
        ("routes_of_another_router", [6])
    ]
    few = whole.take(slice(0, 12)).written(tmp_path / "few")
    assert few.check(against=known).findings == []

    def told(of: moe_inspect.Trace, by: moe_inspect.Trace) -> str:
        return of.check(against=by).read[-1].partition("routers ")[2]

    enough = "of them known well enough to tell them from others)."
    assert told(a.written(tmp_path / "a"), known) == f"(8 {enough}"
    assert told(few, known) == f"(0 {enough}"
    by_chance = np.random.default_rng(0).random((*ids.shape[:2], 64)).argsort(-1)[..., :6]
    random = replace(a, ids_LTK=by_chance.astype(ids.dtype)).written(tmp_path / "random")
    assert told(random, random) == f"(0 {enough}"
    with pytest.raises(moe_inspect.MoeInspectError, match="has other routers than"):
        few.check(against=recording("8 of 2").written(tmp_path / "others"))


def test_what_the_config_says_of_groups_and_weights(tmp_path: Path) -> None:
    rng, T = np.random.default_rng(0), 400
    # two of four groups of four
    groups = np.argsort(rng.random((T, 4)), 1)[:, :2]
    of = groups[:, [0, 0, 1]] * 4 + np.array([0, 1, 2])
    weights = np.sort(rng.dirichlet([1, 1, 1], T), 1)[:, ::-1].astype(np.float32)
    config: dict[str, Any] = {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2}
    config |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5}

    def kinds(name: str, ids: np.ndarray, weights: np.ndarray, **more: Any) -> list[str]:
        facts: dict[str, Any] = {"manifest": {"model": {"id": "made", "config": config | more}}}
        both = [np.roll(ids, n, 0).astype(np.uint16) for n in (0, 1)]
        made = write_trace(tmp_path / name, both, 16, weights=[weights] * 2, **facts)
        return kinds_of(made)

    assert kinds("right", of, weights) == kinds("scaled", of, weights * 2.5) == []
    assert kinds("grouped", of, weights, topk_group=1) == ["groups"]
    assert kinds("permuted", rng.permutation(16)[of], weights) == ["groups"]
    assert kinds("ungrouped", rng.permutation(16)[of], weights, n_group=1) == []
    dropped = np.where(rng.random(of.shape) < [0, 0.2, 0.2], 2**16 - 1, of)
    assert "groups" not in kinds("slots without an expert", dropped, weights)
    assert kinds("sums", of, weights * 0.8) == ["weight_sums"]
    assert kinds("not said", of, weights * 0.8, norm_topk_prob=False) == []
    # a few are left to rounding
    odd = of.copy()
    odd[:2] = [0, 5, 10]
    assert kinds("few", odd, weights) == []


def test_a_few_collapsed_layers_are_no_mistake() -> None:
    """Nor are layers that choose alike for a while."""
    a = recording("8 of 2")
    stays_T = np.cumsum(np.random.default_rng(0).random(a.T) < 0.02)
    one = replace(a, layers=[0, 1], ids_LTK=a.ids_LTK[:2] * 0 + [[[3, 1]], [[0, 2]]])
    assert linted(one) == []
    assert linted(replace(a, ids_LTK=a.ids_LTK[:, stays_T])) == []
    for seed in range(20):
        rng, at, rows = np.random.default_rng(seed), 0, list[np.ndarray]()
        while at < a.T:  # seldom, but for long
            rows.append(np.repeat(rng.integers(0, 8, (4, 1)), rng.geometric(0.1), 1))
            rows.append(rng.integers(0, 8, (4, 40)))
            at += rows[-2].shape[1] + 40
        ids_LT = np.concatenate(rows, axis=1)[:, : a.T]
        assert linted(replace(a, layers=range(4), ids_LTK=ids_LT[..., None])) == []


def test_experts_0_to_k_minus_1_are_no_mistake_where_a_token_may_have_them() -> None:
    """In four layers of 2 of 8 one of 1,200 tokens has, by chance, more often than 1 in 100,000;
    the last one does not. In two layers that has too."""
    a = recording("balanced")
    for layers, at, said in (
        (4, longest(a).start + 30, []),
        (4, a.T - 1, ["constant_filled"]),
        (2, a.T - 1, []),
        (2, np.flatnonzero(a.last_T), []),
    ):
        ids = a.ids_LTK[:layers].copy()
        ids[:, at] = [0, 1]
        found = linted(replace(a, layers=range(layers), ids_LTK=ids))
        assert [one.kind for one in found] == said


def test_a_layer_that_was_never_written_is_told_beside_a_right_trace(tmp_path: Path) -> None:
    """Of few experts it may have collapsed on the first ones: alone that is not told."""
    a = recording("balanced")
    known, ids = a.written(tmp_path / "right"), a.ids_LTK.copy()
    ids[2] = [0, 1]
    b = replace(a, ids_LTK=ids).written(tmp_path / "unwritten")
    assert b.check().findings == []
    (found,) = b.check(against=known).findings
    assert (found.kind, found.values["layers"]) == ("routes_of_another_router", [2])


def test_routers_without_a_choice_are_no_mistake() -> None:
    for k in (1, 2):
        ids = np.tile(np.arange(k), (400, 4, 1))
        assert moe_inspect.check(ids, experts=k).findings == []
        assert moe_inspect.check(ids, experts=8).findings != []


def test_empty_slots_are_no_mistake_where_tokens_are_dropped() -> None:
    a = recording("8 of 2")
    ids = a.ids_LTK.copy()
    ids[:, np.random.default_rng(0).random(a.T) < 0.1, 1] = -1
    ids[:, 100:200] = -1
    assert linted(replace(a, ids_LTK=ids)) == []


def test_ids_as_a_training_loop_has_them() -> None:
    import torch

    a = recording("64 of 6")
    ids = torch.from_numpy(np.swapaxes(a.ids_LTK, 0, 1).copy())
    tokens = torch.from_numpy(a.token_id)
    assert moe_inspect.check(ids, token_ids=tokens, experts=64).findings == []
    assert moe_inspect.check(ids[:0], experts=64).findings == []
    ids[7] = 0
    (one,) = moe_inspect.check(ids.to(torch.uint8), experts=64).findings
    assert one.values["certain"]
    assert one.values["option"] == "compare --drop-zero-filled"
    assert one.values["known"] == list(KINDS["zero_filled"].bugs)
    for wrong, said in (
        (ids[:, 0], "ids have the shape"),
        (ids.float(), "ids are float32"),
        (ids.bfloat16(), "ids are torch.bfloat16"),
        ([[[1, 2]], [[1]]], "ids are no array"),
    ):
        with pytest.raises(moe_inspect.MoeInspectError, match=said):
            moe_inspect.check(wrong, experts=64)
    for experts in (0, 10**12):
        with pytest.raises(moe_inspect.MoeInspectError, match=f"experts is {experts}: give"):
            moe_inspect.check(ids, experts=experts)
    huge = ids.numpy().astype(np.uint64)
    huge[9, 0, 0] = 2**64 - 1
    found = moe_inspect.check(huge, experts=64).findings
    assert {one.kind for one in found} == {"zero_filled", "out_of_range"}
    (one, *_) = moe_inspect.check(ids, experts=4).findings  # more slots than experts
    assert one.values["certain"]
    with pytest.raises(moe_inspect.MoeInspectError, match="a length is 0 or more"):
        moe_inspect.check(ids, experts=64, lengths=[-1, 1_201])


def test_the_command(cli_here: Cli, tmp_path: Path) -> None:
    right = ROOT / "sample_traces" / "balanced"
    lines = cli_here("check", right).stdout.splitlines()
    assert lines[0].startswith("• Nothing wrong in the files: 9,254 tokens, 37,016 decisions, ")
    assert lines[1].startswith("• Checked in the files: sha256 and rows of every file are those")
    assert lines[2:] == ["• Nothing wrong in the routes of 9,254 tokens, 4 routers."]
    a = recording("balanced")
    replace(a, ids_LTK=np.roll(a.ids_LTK, 1, 1), weights_LTK=None).written(tmp_path / "shifted")
    assert cli_here("check", "shifted", "--quick").stdout.endswith("routes were not checked.\n")
    done = cli_here("check", "shifted", check=3)
    assert "• Critical: Tokens with the same id choose most alike 1 row later" in done.stdout
    assert "Known: vLLM #37094" in done.stdout
    assert done.stdout.endswith("• 1 finding in the routes of 1,200 tokens, 4 routers.\n")
    assert done.stderr == "failed: routes_shifted\n"
    row = json.loads(cli_here("check", "shifted", "--format", "json", check=3).stdout)
    assert (row["kind"], row["where"], row["values"]["shift"]) == ("routes_shifted", "", 1)
    assert row["p"] == row["values"]["p"] > 0
    # a note is no failure
    b = recording("64 of 6")
    ids, unknown_T = [*np.sort(b.ids_LTK, 2).astype(np.uint8)], np.full(b.T, -1)
    write_trace(tmp_path / "sorted", ids, 64, token_id=unknown_T, batch_tokens=b.T)
    assert "The 6 ids ascend" in cli_here("check", "sorted").stdout


def test_what_was_not_looked_at_is_said(cli_here: Cli, tmp_path: Path, put: Put) -> None:
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 1_000, 8, 2) for _ in range(4)]
    facts: dict[str, Any] = {"phases": ("decode", "draft"), "document": np.repeat([0, 1], 500)}
    drafts = write_trace(tmp_path / "drafts", ids, 8, **facts)
    said = "the routes of 500 tokens (without 500 rejected drafts), 4 routers.\n"
    assert cli_here("check", "drafts").stdout.endswith(f"• Nothing wrong in {said}")
    assert drafts.check().findings == []
    put(checking, MOST_CELLS=100 * 8)
    said = "• Nothing wrong in the routes of the first 100 of 1,000 tokens, 4 routers.\n"
    assert cli_here("check", "drafts").stdout.endswith(said)
    assert "no trace at none" in cli_here("check", "none", check=1).stderr
    (tmp_path / "without/routing").mkdir(parents=True)
    (tmp_path / "without/routing/part-0-0.parquet").touch()
    assert "no trace at without" in cli_here("check", "without", check=1).stderr
    write_counts(tmp_path / "counts", [np.full((1, 8), 250)], 2, ["a"])
    assert cli_here("check", "counts").stdout.endswith("as the trace holds counts only.\n")
    done = cli_here("check", "drafts", "--against", "counts", check=1)
    assert done.stderr == "error: counts holds counts only, no decisions to check against\n"
    (tmp_path / "loads.csv").write_text("layer,expert,count\n0,0,5\n0,1,7\n")
    for given, said in (
        (dict[str, Any](source="without"), "no trace at without"),
        (dict[str, Any](source=drafts, experts=8), "is a trace, which says what its model is"),
        (dict[str, Any](source=drafts, token_ids=[1]), "are those of an array"),
        (dict[str, Any](source=drafts, against=drafts, quick=True), "quick checks the files only"),
        (dict[str, Any](source="loads.csv", top_k=1), r"holds no responses \(counts\)"),
        (dict[str, Any](source="loads.csv", quick=True), "is no trace"),
        (dict[str, Any](source=ids, quick=True), "an array has neither files"),
        (dict[str, Any](source=ids), "give experts"),
    ):
        with pytest.raises(moe_inspect.MoeInspectError, match=said):
            moe_inspect.check(**given)


def test_responses_are_checked_as_they_came(tmp_path: Path) -> None:
    """What `import` leaves out, or refuses."""
    a = recording("64 of 6")
    begins = [*np.flatnonzero(a.position == 0), a.T]

    def write(change: Callable[[np.ndarray], np.ndarray]) -> None:
        rows = list[str]()
        for begin, end in pairwise(begins):
            ids = np.swapaxes(a.ids_LTK[:, begin:end], 0, 1).astype(np.uint16)
            prompt, made = a.token_id[begin : begin + 4], a.token_id[begin + 4 : end]
            row = {"prompt_token_ids": prompt.tolist(), "token_ids": [*made.tolist(), 0]}
            rows.append(json.dumps(row | {"routed_experts": npy(change(ids))}))
        (tmp_path / "r.jsonl").write_text("\n".join(rows))

    def kinds() -> list[str]:
        return moe_inspect.check(tmp_path / "r.jsonl", experts=64).wrong

    write(lambda ids: ids)
    assert kinds() == []
    np.save(tmp_path / "a.npy", np.swapaxes(a.ids_LTK[:, : begins[1]], 0, 1).astype(np.uint16))
    for last, said in (([], []), ([0], []), ([0, 0], ["lengths"])):  # one is not fed
        np.save(tmp_path / "a.token_ids.npy", np.array([*a.token_id[: begins[1]], *last]))
        assert moe_inspect.check(tmp_path / "a.npy", experts=64).wrong == said
    write(lambda ids: np.concatenate([ids, ids[:1] * 0]))  # padded to the tokens
    assert kinds() == ["zero_filled"]
    write(lambda ids: ids[1:])
    assert kinds() == ["lengths", "routes_shifted"]
    write(lambda ids: np.where(np.arange(len(ids))[:, None, None] < 4, 0, ids))
    assert kinds() == ["zero_filled"]
    write(lambda ids: np.where(ids == 3, 65_535, ids))
    assert kinds() == ["out_of_range"]


def test_of_many_responses_no_more_are_held_than_are_looked_at(tmp_path: Path, put: Put) -> None:
    each, n, rng = 2_000, 60, np.random.default_rng(0)
    for i in range(n):
        routed = np.stack([uniform_ids(rng, each, 64, 8) for _ in range(8)], 1)
        np.save(tmp_path / f"{i:02}.npy", routed.astype(np.uint8))
    put(checking, MOST_CELLS=2 * each * 64)
    moe_inspect.check(tmp_path / "00.npy", experts=64)  # what is imported is held too
    tracemalloc.start()
    made = moe_inspect.check(tmp_path, experts=64)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = f"Nothing wrong in the routes of the first {2 * each:,} of {n * each:,} tokens"
    assert made.read[0].startswith(said)
    assert held < n * each * 64 / 3


def test_the_page_has_every_kind() -> None:
    page = fill((ROOT / "docs/compare.md").read_text())
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert [kind for kind, *_ in listed] == [*KINDS]
    for kind, sign, _, _, bugs in listed:
        assert sign == KINDS[kind].sign, kind
        assert bugs == ", ".join(KINDS[kind].bugs), kind

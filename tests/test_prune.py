"""Pruning: which experts go, what the model loses without them, and what is said against it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from moe_inspect import MoeInspectError
from moe_inspect.analysis.scores import lowest
from moe_inspect.capture.options import TraceOptions
from moe_inspect.demo import CORPUS_DIR
from moe_inspect.interventions.ablation import HeldOut, ablate_held_out, open_held_out
from moe_inspect.interventions.pruning import run
from moe_inspect.interventions.pruning.measure import measure, of_overlap
from moe_inspect.interventions.pruning.run import Choice, Pruning, prune_held_out
from moe_inspect.model.find import find_routers
from moe_inspect.model.routers import top_k_of
from moe_inspect.trace.reader import Trace
from tests.support import zoo
from tests.support.damage import edit_manifest


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return open_held_out("demo", TraceOptions(batch_tokens=2048))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The bundled model on the bundled texts of three domains."""
    data = [f"{d}={CORPUS_DIR / d}" for d in ("english", "metamath", "python")]
    options = {"data": data, "output_norms": True, "output_peaks": True}
    return moe_inspect.trace_model("demo", tmp_path_factory.mktemp("three") / "t", **options)


@pytest.fixture
def few(held_out: HeldOut) -> HeldOut:
    """Six documents."""
    return replace(held_out, batches=[held_out.batches[0][:6]])


def of_domains(whole: HeldOut, *domains: str) -> HeldOut:
    rows = [[row for row in batch if row.domain in domains] for batch in whole.batches]
    return replace(whole, batches=[batch for batch in rows if batch])


def said(pruning: Pruning, kind: str) -> str:
    found = pruning.findings
    return "\n".join(found.text[found.kind == kind])


def test_what_was_not_calibrated_on_may_be_judged_no_better_than_at_random(
    held_out: HeldOut, three: Trace
) -> None:
    others = of_domains(held_out, "c", "german", "russian")
    done = prune_held_out(others, three, Choice(by="reap", keep=0.75))
    losses = done.losses.set_index(["plan", "domain"]).loss
    assert losses["reap", "(all)"] > losses["random", "(all)"] + 0.2
    assert "random is better than reap: a loss of 5.4" in said(done, "random")
    assert "in c, german, russian" in said(done, "random")
    assert "lacks c, german, russian" in said(done, "coverage")
    assert not said(done, "overlap")
    assert {n: len(of) for n, of in done.dropped.items()} == dict.fromkeys(range(4), 2)
    calibrated = of_domains(held_out, "english", "metamath", "python")
    same = prune_held_out(calibrated, three, Choice(by="reap", keep=0.75, draws=2))
    assert not said(same, "random")
    assert not said(same, "coverage")
    assert "30 of 30 held-out documents are in the calibration trace" in said(same, "overlap")


def test_scores_are_those_of_the_report_and_the_least_go(few: HeldOut, three: Trace) -> None:
    table = moe_inspect.report(three).tables["worth"]
    columns = {"reap": "reap", "ean": "ean_sum", "mean-norm": "mean_norm", "gate": "gate_sum"}
    for by, column in {**columns, "frequency": "assignments"}.items():
        done = prune_held_out(few, three, Choice(by=by, keep=0.75, draws=1))
        assert np.allclose(done.scores.score, table[column]), by
        for layer, gone in done.dropped.items():
            of = table[table.layer == layer].set_index("expert")[column]
            assert set(gone) == set(of.nsmallest(2).index)


def test_a_loss_is_that_of_the_model_without_the_experts(few: HeldOut) -> None:
    plans = {"one": [[[], [3], [], []]], "two": [[[], [], [2], []], [[], [], [5], []]]}
    table = measure(few, plans).table()
    alone = ablate_held_out(few, [(1, 3), (2, 2), (2, 5)]).experts
    of_all = table[table.domain == "(all)"].set_index("plan")
    assert of_all.loss["whole"] == pytest.approx(alone.loss[0], abs=1e-9)
    assert of_all.loss["one"] == pytest.approx(alone.loss_without[0], abs=1e-9)
    assert of_all.loss["two"] == pytest.approx(alone.loss_without[1:].mean(), abs=1e-9)
    assert of_all.greatest_loss["two"] == pytest.approx(alone.loss_without[1:].max(), abs=1e-9)
    assert of_all.difference_low["one"] == pytest.approx(alone.difference_low[0])
    by_domain = table[(table.domain != "(all)") & (table.plan == "one")]
    whole = (by_domain.loss * by_domain.tokens).sum() / by_domain.tokens.sum()
    assert whole == pytest.approx(of_all.loss["one"])


def test_text_that_was_calibrated_on_is_found_however_it_is_cut(
    held_out: HeldOut, tmp_path: Path
) -> None:
    rows = [row for batch in held_out.batches for row in batch]
    cut = moe_inspect.trace_model("demo", tmp_path / "t", max_length=100, max_tokens=250)
    fed, documents = cut.tokens().document.nunique(), len({row.document for row in rows})
    [(_, text)] = of_overlap(cut, held_out)
    assert text.startswith(f"{fed} of {documents} held-out documents are in the")
    others = [replace(row, ids=row.ids[::-1].copy()) for row in rows]
    assert not list(of_overlap(cut, replace(held_out, batches=[others]))), "control: other text"
    counted = moe_inspect.trace_model("demo", tmp_path / "c", max_tokens=150, counts_only=True)
    [(_, text)] = of_overlap(counted, held_out)
    assert "does not hold its text" in text


def test_as_many_go_of_each_group() -> None:
    scores = np.array([5.0, 4, 3, 2, 1, 1, 1, 9])
    assert lowest([scores], 0.5) == [[3, 4, 5, 6]]
    assert lowest([scores], 0.5, groups=2) == [[2, 3, 5, 6]]
    assert lowest([scores], 0.7) == [[5, 6]], "at least this share stays"


def test_experts_that_were_hardly_seen_and_super_experts_are_named(
    few: HeldOut, tmp_path: Path
) -> None:
    short = moe_inspect.trace_model("demo", tmp_path / "t", max_tokens=60, output_norms=True)
    done = prune_held_out(few, short, Choice(by="frequency", keep=0.75, draws=1))
    assert "8 dropped experts had fewer than 32 assignments" in said(done, "few tokens")
    assert "record it with --output-peaks" in said(done, "super experts")


def test_by_weights_alone(few: HeldOut, three: Trace) -> None:
    done = prune_held_out(few, three, Choice(by="aimer", keep=0.75, draws=1))
    table = moe_inspect.describe_weights("demo")["experts"]
    assert np.allclose(1 - done.scores.score, table.aimer)
    assert done.dropped[0] == sorted(table[table.layer == 0].aimer.nlargest(2).index)


def test_what_is_worth_most_alone_stays(few: HeldOut, tmp_path: Path) -> None:
    short = moe_inspect.trace_model("demo", tmp_path / "t", max_tokens=300)
    choice = Choice(by="ablation", keep=0.75, draws=1, resume=tmp_path / "kept")
    passes: list[int] = []
    done = prune_held_out(few, short, choice, lambda n, total: passes.append(total))
    alone = moe_inspect.ablate("demo", max_tokens=300).experts
    assert np.allclose(done.scores.score, alone.difference, atol=0.02)
    again = list[int]()
    same = prune_held_out(few, short, choice, lambda n, total: again.append(total))
    assert same.scores.equals(done.scores)
    assert max(passes) > 32 > max(again), "what was kept is not measured again"
    with pytest.raises(MoeInspectError, match="draws is 0"):
        prune_held_out(few, short, replace(choice, draws=0))
    with pytest.raises(MoeInspectError, match="which reap needs: record it with"):
        prune_held_out(few, short, Choice(by="reap", keep=0.75))


def test_what_cannot_be_pruned_is_said(held_out: HeldOut, three: Trace, tmp_path: Path) -> None:
    def refused(family: str, keep: float, why: str, **overrides: object) -> None:
        model = zoo.build(family, **overrides)
        sites = find_routers(model)
        top_k = max(top_k_of(site, model) for site in sites)
        with pytest.raises(MoeInspectError, match=why):
            run.check(model, sites, keep, top_k)

    refused("mixtral", 0.25, "leaves 2 of 8 experts, but every token goes to 3")
    refused("mixtral", 0.99, "drops none of 8 experts")
    refused("mixtral", 1.5, "--keep is 1.5")
    refused("deepseek_v3", 0.75, "drops none of 2 experts in each of 4 groups")
    refused("deepseek_v3", 0.5, "leaves 1 expert in each of 4 groups")
    refused("jetmoe", 0.75, "a layer has two routers")
    refused("deepseek_v4", 0.75, "layer 0 goes by a table of token ids")
    refused("doge", 0.75, "experts of layer 0 share their keys")
    refused("ernie4_5_vl_moe", 0.5, "vision_moe.*one number for both")
    wide = zoo.build("deepseek_v3", n_routed_experts=16)
    run.check(wide, find_routers(wide), 0.75, 3)

    def of_another(match: str, trace: Trace, held_out: HeldOut = held_out) -> None:
        with pytest.raises(MoeInspectError, match=match):
            run.check_trace(trace, held_out)

    def traced(name: str, **options: object) -> Trace:
        return moe_inspect.trace_model("demo", tmp_path / name, max_tokens=50, **options)

    changed = replace(held_out, record={**held_out.record, "weights_hash": "another"})
    of_another("recorded with different weights", three, changed)
    of_another("of a different model than demo, of random weights", traced("u", random_init=0))
    half = traced("h", dtype="float32")
    assert run.check_trace(half, held_out) == [0, 1, 2, 3], "the same model, run otherwise"
    part = traced("p", layers=[0, 1])
    of_another("has no routers in layer 2", part)
    model = part.manifest["model"]
    model["config"]["hidden_size"] = 64
    edit_manifest(tmp_path / "p", model=model)
    said = r"its config has a different hidden_size \(64, not 128\)"
    of_another(said, moe_inspect.open_trace(tmp_path / "p"))

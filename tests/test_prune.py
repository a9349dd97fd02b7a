"""Ablation: the loss without an expert, against that of each text alone under an intervention.
Pruning: which experts go, what the model loses without them, and what is said against it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect import MoeInspectError, ablate
from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.capture.options import TraceOptions
from moe_inspect.demo import CORPUS_DIR, MODEL_DIR
from moe_inspect.interventions import ablation
from moe_inspect.interventions.ablation import Below, HeldOut, ablate_held_out, open_held_out
from moe_inspect.interventions.pruning import run
from moe_inspect.interventions.pruning.measure import measure, of_overlap
from moe_inspect.interventions.pruning.run import Pruning, PruningChoice, prune_held_out
from moe_inspect.model.find import find_routers
from moe_inspect.model.own import load_object
from moe_inspect.model.routers import top_k_of
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.support import own, zoo
from tests.support.damage import edit_manifest
from tests.test_cli_trace import save_tokenizer

ROUTERS = """
import moe_inspect

def choice(router, args, kwargs, logits):
    weights, ids = logits.softmax(-1).topk(2)
    return ids, weights / weights.sum(-1, keepdim=True)

ROUTERS = moe_inspect.RouterSpec(module="blocks.*.experts.router", choice=choice, experts=8)
"""
# in float32, where a text's loss does not depend on the texts beside it
SMALL = TraceOptions(max_tokens=1500, batch_tokens=512, dtype="float32")


@pytest.fixture(scope="module")
def opened() -> HeldOut:
    return open_held_out("demo", SMALL)


def test_losses_are_those_of_each_text_alone_without_the_expert(opened: HeldOut) -> None:
    done = ablate("demo", SMALL, layers=[2], experts=[3, 5])
    network, rows = opened.network, [row for batch in opened.batches for row in batch]
    labels = [torch.tensor(row.ids.astype(int))[None] for row in rows]
    predicted = [len(row.ids) - 1 for row in rows]

    @torch.no_grad()
    def loss() -> np.ndarray:
        return np.array([float(network(input_ids=x, labels=x).loss) for x in labels])

    whole = np.average(loss(), weights=predicted)
    with moe_inspect.intervene(network, drop={2: 5}):
        by_document = loss()
    row: Any = done.experts.set_index("expert").loc[5]
    assert row.loss == pytest.approx(whole, abs=1e-5)
    assert row.loss_without == pytest.approx(np.average(by_document, weights=predicted), abs=1e-5)
    assert row.difference == pytest.approx(row.loss_without - row.loss)
    assert row.difference_low < row.difference < row.difference_high
    assert row.tokens == sum(predicted)
    domains = done.domains[done.domains.expert == 5]
    assert (domains.tokens * domains.difference).sum() / row.tokens == pytest.approx(row.difference)
    assert set(domains.domain) == {r.domain for r in rows}


def test_skipping_what_is_below_changes_nothing_and_computes_less(opened: HeldOut) -> None:
    site, ran = opened.sites[2], []
    below = Below(opened.network, [site])
    hooks = [
        m.register_forward_hook(lambda *a, n=n: ran.append(n))
        for n, m in enumerate(b.mlp for b in opened.network.model.layers)
    ]
    with below.remembered():
        whole = opened.losses(0)
    with below.skipped(site):
        again = opened.losses(0)
    assert ran == [0, 1, 2, 3, 2, 3]
    assert np.array_equal(whole, again)
    for hook in hooks:
        hook.remove()
    assert not any("forward" in vars(block) for block in opened.network.model.layers)


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, cli_here: Cli) -> None:
    arguments: list[object] = ["demo", "--layers", "1,2", "--experts", "0-2", "--max-tokens", 1500]
    arguments += ["--batch-tokens", 512, "--dtype", "float32", "--resume", tmp_path / "kept"]
    at_once = ablate("demo", SMALL, layers=[1, 2], experts=[0, 1, 2])
    few = cli_here("ablate", *arguments, "--most-passes", 3, check=1)
    assert "--most-passes 3 is not enough for one batch, which takes 7" in few.stderr
    first = cli_here("ablate", *arguments, "--most-passes", 8)
    assert "measured on 1 of 4 batches" in first.stderr
    losses = tmp_path / "kept" / "losses.jsonl"
    losses.write_bytes(losses.read_bytes()[:-20])  # killed while it wrote the last line
    done = cli_here("ablate", *arguments, "-o", "out.json")
    assert f"{at_once.passes - 5} forward passes" in done.stderr
    table = pd.read_json(tmp_path / "out.json", lines=True)
    expected = at_once.experts
    assert list(table) == list(expected)
    columns = ["expert", "loss", "loss_without", "difference_low"]
    assert np.allclose(table[columns], expected[columns])
    again = cli_here("ablate", *arguments, "--format", "csv")
    assert " 0 forward passes" in again.stderr
    assert "chose among the rest" in again.stdout
    other = cli_here("ablate", *arguments, "--max-tokens", 300, check=1)
    assert "losses of a different max_tokens (1500, now 300)" in other.stderr


def test_what_cannot_be_ablated_is_said(tmp_path: Path) -> None:
    for match, given in (("no expert 9", {"experts": [9]}), ("in layer 7", {"layers": [7]})):
        with pytest.raises(MoeInspectError, match=match):
            ablate("demo", SMALL, **given)
    save_tokenizer(tmp_path)
    zoo.config("switch_transformers").save_pretrained(tmp_path)
    with pytest.raises(MoeInspectError, match="has an encoder and a decoder, and no loss"):
        ablate(str(tmp_path), replace(SMALL, random_init=0))
    # (what tells labels from tokens is the width of the logits)
    row = TokenSequence(0, 0, "a", "s", np.arange(9, dtype=np.int32), 9, 1)
    with pytest.raises(MoeInspectError, match="does not predict the next token"):
        ablation._loss(torch.zeros(9, 8), row, "Labels")


def of_loader(root: Path, tokens: int) -> tuple[list[object], HeldOut]:
    """A model of one's own: the arguments of commands about it, and what they measure."""
    torch.save(own.gpt().state_dict(), root / "model.pt")
    (root / "routers.py").write_text(ROUTERS)
    loader, routers = f"{own.EXAMPLE}:load", f"{root}/routers.py:ROUTERS"
    arguments = [root / "model.pt", "--loader", loader, "--routers", routers]
    options = TraceOptions(loader=load_object(loader), routers=[load_object(routers)])
    options = replace(options, max_tokens=tokens, batch_tokens=2048)
    opened = open_held_out(str(root / "model.pt"), options)
    return [*arguments, "--max-tokens", tokens], opened


def test_a_model_of_ones_own(tmp_path: Path, cli_here: Cli) -> None:
    """Of a loader, fed a text at a time; against the loss with one expert's logit masked."""
    arguments, opened = of_loader(tmp_path, 600)
    arguments += ["--layers", 2, "--experts", 5, "--format", "json"]
    row = json.loads(cli_here("ablate", *arguments).stdout)
    assert row["how"] == "chose among the rest"
    model = own.gpt().eval()
    rows = [torch.from_numpy(row.ids.astype(int)) for batch in opened.batches for row in batch]

    def loss() -> float:
        logits = torch.cat([model(ids[None])[0, :-1] for ids in rows])
        return float(torch.nn.functional.cross_entropy(logits, torch.cat([x[1:] for x in rows])))

    with torch.no_grad():
        whole = loss()
        hook = model.blocks[2].experts.router.register_forward_hook(
            lambda m, a, logits: logits.index_fill(-1, torch.tensor(5), float("-inf"))
        )
        without = loss()
        hook.remove()
    assert (row["loss"], row["loss_without"]) == pytest.approx((whole, without), abs=1e-6)
    assert whole != without
    nothing = cli_here("ablate", check=2)
    assert "give a MODEL, or --loader" in " ".join(nothing.stderr.split())


def test_a_model_of_ones_own_is_pruned_without_a_checkpoint(tmp_path: Path, cli_here: Cli) -> None:
    model, of = of_loader(tmp_path, 300)
    cli_here("trace", *model, "-o", "t")
    given = ["--trace", "t", "--by", "frequency", "--draws", 1]
    options = ["--keep", 0.85, "--dry-run", "--format", "json"]
    lines = cli_here("prune", *model, *given, *options).stdout.splitlines()
    whole, plan = [json.loads(line) for line in lines if '"(all)"' in line][:2]
    load = moe_inspect.report(tmp_path / "t").tables["load"]
    experts = load.loc[load.groupby("layer").assignments.idxmin()]
    drop = dict(zip(experts.layer, experts.expert, strict=True))
    with moe_inspect.intervene(of.network, drop=drop, routers=of.routers):
        nats = sum(of.losses(b).sum() for b in range(len(of.batches)))
    assert plan["loss"] == pytest.approx(nats / plan["tokens"])
    assert plan["loss"] != whole["loss"]
    refused = cli_here("prune", *model, *given, "-o", "pruned", check=1)
    assert "leave out --loader, or only measure (--dry-run)" in refused.stderr


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


def test_what_was_not_calibrated_on_may_lose_to_random(held_out: HeldOut, three: Trace) -> None:
    others = of_domains(held_out, "c", "german", "russian")
    done = prune_held_out(others, three, PruningChoice(by="reap", keep=0.75))
    losses = done.losses.set_index(["plan", "domain"]).loss
    assert losses["reap", "(all)"] > losses["random", "(all)"] + 0.2
    assert "random is better than reap: a loss of 5.4" in said(done, "random")
    assert "in c, german, russian" in said(done, "random")
    assert "lacks c, german, russian" in said(done, "coverage")
    assert not said(done, "overlap")
    assert {n: len(of) for n, of in done.dropped.items()} == dict.fromkeys(range(4), 2)
    calibrated = of_domains(held_out, "english", "metamath", "python")
    same = prune_held_out(calibrated, three, PruningChoice(by="reap", keep=0.75, draws=2))
    assert not said(same, "random")
    assert not said(same, "coverage")
    assert "30 of 30 held-out documents are in the calibration trace" in said(same, "overlap")


def test_scores_are_those_of_the_report_and_the_least_go(few: HeldOut, three: Trace) -> None:
    table = moe_inspect.report(three, weights=MODEL_DIR).tables["worth"]
    table["aimer"] = 1 - table["aimer"]
    columns = {"reap": "reap", "ean": "ean_sum", "mean-norm": "mean_norm", "gate": "gate_sum"}
    for by, column in {**columns, "frequency": "assignments", "aimer": "aimer"}.items():
        done = prune_held_out(few, three, PruningChoice(by=by, keep=0.75, draws=1))
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


def test_text_calibrated_on_is_found_however_it_is_cut(held_out: HeldOut, tmp_path: Path) -> None:
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


def test_rare_and_super_experts_are_named(few: HeldOut, tmp_path: Path) -> None:
    short = moe_inspect.trace_model("demo", tmp_path / "t", max_tokens=60, output_norms=True)
    done = prune_held_out(few, short, PruningChoice(by="frequency", keep=0.75, draws=1))
    assert "8 dropped experts had fewer than 32 assignments" in said(done, "few tokens")
    assert "record it with --output-peaks" in said(done, "super experts")


def test_what_is_worth_most_alone_stays(few: HeldOut, tmp_path: Path) -> None:
    short = moe_inspect.trace_model("demo", tmp_path / "t", max_tokens=300)
    choice = PruningChoice(by="ablation", keep=0.75, draws=1, resume=tmp_path / "kept")
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
        prune_held_out(few, short, PruningChoice(by="reap", keep=0.75))


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

"""Counts that say which document they are of give what decisions of the same documents give:
intervals, nulls, drift; and the tokens that a text gives each expert."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect.capture.options import TraceOptions
from moe_inspect.capture.run import trace_model
from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.tables import counts as tables_of_counts
from moe_inspect.making import import_trace
from moe_inspect.public import Trace, report
from moe_inspect.trace.verify import verify
from tests.conftest import Cli
from tests.support.damage import edit_manifest
from tests.support.families import build
from tests.support.generated import decisions as rows_of
from tests.support.synthetic import uniform_ids, write_counts, write_trace
from tests.support.zoo import token_batch

E, K, EACH, S = 8, 2, 25, 40  # tokens of a document; documents
DOMAINS = ("code", "prose")


def drawn(seed: int, L: int = 2) -> list[np.ndarray]:
    """Documents lean to an expert of their own, and the second half of them to expert 0."""
    rng, made = np.random.default_rng(seed), list[np.ndarray]()
    for _ in range(L):
        ids = uniform_ids(rng, S * EACH, E, K)
        for t in range(0, len(ids), 3):
            liked = 0 if t > len(ids) / 2 else t // EACH % E
            ids[t] = [liked, (liked + 1) % E]
        made.append(ids)
    return made


def decisions(root: Path, ids: list[np.ndarray], **more: Any) -> Trace:
    usual: dict[str, Any] = {"document": np.repeat(np.arange(S), EACH)}
    usual |= {"domain_of_document": DOMAINS, "batch_tokens": 10 * EACH, "shard_tokens": 10 * EACH}
    return write_trace(root, ids, E, **usual | more)


def rows(ids: list[np.ndarray]) -> pd.DataFrame:
    """A row per layer, document and expert that it used."""
    parts = [
        pd.DataFrame({"layer": n, "document": np.arange(S * EACH) // EACH, "expert": of[:, slot]})
        for n, of in enumerate(ids)
        for slot in range(K)
    ]
    table = pd.concat(parts).value_counts().rename("count").reset_index()
    return table.assign(domain=np.array(DOMAINS)[table["document"] % 2])


def counts(root: Path, table: pd.DataFrame | list[np.ndarray], **more: Any) -> Trace:
    table = table if isinstance(table, pd.DataFrame) else rows(table)
    root.mkdir(parents=True)
    table.to_csv(root / "c.csv", index=False)
    more = {"experts": E, "top_k": K, "warn": print} | more
    return import_trace("table", [root / "c.csv"], root / "t", **more)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Trace]:
    """Decisions, and the counts of their documents, in several shards."""
    root, patch = tmp_path_factory.mktemp("pair"), pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(tables_of_counts, "BATCH_CELLS", 7 * 2 * E)
        return decisions(root / "d", drawn(0)), counts(root / "c", drawn(0))


SAME = {
    "load": ["assignments", "load_ratio"],
    "balance": ["tokens", "max_over_mean_low", "max_over_mean_high"],
    "domains": ["tokens", "assignments", "lift", "expected_by_chance", "overload_p"],
    "specialization": ["domain_mi_bits", "domain_mi_null_bits", "domain_mi_p"],
    "windows": ["first_token", "tokens", "max_over_mean", "total_variation_floor"],
    "drift": ["windows", "total_variation", "trend_expert", "trend_first", "trend_p"],
    "coverage": ["tokens", "tokens_low", "tokens_high"],
}


@pytest.mark.parametrize("name", SAME)
def test_tables_are_those_of_decisions(name: str, pair: tuple[Trace, Trace]):
    made = [report(trace, window=2 * EACH).tables[name] for trace in pair]
    of_decisions, of_counts = (table[["layer", *SAME[name]]].astype(float) for table in made)
    assert not of_decisions.isna().all().any()
    pd.testing.assert_frame_equal(of_counts, of_decisions)
    if name not in ("load", "windows"):  # a control
        by_domain = report(by_domains(pair[0].path.parent), window=2 * EACH).tables[name]
        assert by_domain[SAME[name]].astype(float).isna().any().any()


def by_domains(root: Path) -> Trace:
    if not (root / "domains").exists():
        counts(root / "domains", rows(drawn(0)).drop(columns="document"))
    return Trace(root / "domains" / "t")


def test_they_reconcile_and_are_selected_by_domain(pair: tuple[Trace, Trace]):
    of_decisions, trace = pair
    assert trace.by_document
    assert trace.n_shards == 6
    found = verify(trace)
    assert found.ok, found
    assert any("the same for each document" in rule for rule in found.checked)
    assert not any("each document" in rule for rule in verify(of_decisions).checked)
    table, documents = trace.counts(), trace.documents().set_index("document")
    of_document = table.groupby(["document", "router"])["assignments"].sum().unstack()
    assert (of_document == K * EACH).all(axis=None)
    assert (documents["tokens"] == EACH).all()
    assert documents["source"].tolist() == [str(d) for d in range(S)]
    chosen = [report(one, domains="code").tables["load"]["assignments"] for one in pair]
    assert chosen[0].equals(chosen[1])
    assert chosen[0].sum() < table["assignments"].sum()
    both = report(trace), report(by_domains(of_decisions.path.parent))
    said, by_domain = (" ".join(str(made).split()) for made in both)  # whatever the line ends
    assert "interval" in said
    assert "independent tokens" not in said
    assert "independent tokens" in by_domain
    for name in ("vocabulary", "repetition"):
        with pytest.raises(MoeInspectError, match="holds counts only"):
            _ = report(trace).tables[name]


def test_a_document_is_of_a_file_and_in_the_order_of_its_number(tmp_path: Path):
    table = rows(drawn(0)).sample(frac=1, random_state=0)
    trace = counts(tmp_path / "a", table)
    assert trace.documents()["source"].tolist() == [str(d) for d in range(S)]
    table = table.assign(document="q" + table["document"].astype(str))
    for name in ("x", "y"):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    files = [tmp_path / f"{name}.csv" for name in ("x", "y")]
    twice = import_trace("table", files, tmp_path / "t", experts=E, top_k=K)
    assert len(twice.documents()) == 2 * S
    assert twice.n_tokens == 2 * trace.n_tokens
    assert twice.documents()["source"][0] == table["document"].iloc[0]
    (tmp_path / "z.csv").write_text("layer,expert,count\n0,0,2\n")
    with pytest.raises(MoeInspectError, match=r"x\.csv has documents, not all of the"):
        import_trace("table", [*files, tmp_path / "z.csv"], tmp_path / "n", experts=E, top_k=K)
    (tmp_path / "z.csv").write_text(f"layer,expert,document,count\n0,0,a,{2**32}\n")
    with pytest.raises(MoeInspectError, match=r"document 'a' has counts of 4,294,967,296 tokens"):
        import_trace("table", [tmp_path / "z.csv"], tmp_path / "n", experts=E, top_k=K)


def test_traces_of_them_are_merged_with_their_documents(pair: tuple[Trace, Trace], tmp_path: Path):
    other = counts(tmp_path / "b", drawn(1))
    whole = moe_inspect.merge([pair[1], other], tmp_path / "m")
    assert verify(whole).ok
    table, parts = whole.counts(), [pair[1].counts(), other.counts()]
    parts[1]["document"] += S
    assert sorted(map(tuple, table.astype(str).to_numpy())) == sorted(
        map(tuple, pd.concat(parts).astype(str).to_numpy())
    )
    with pytest.raises(MoeInspectError, match=r"has document, .* does not"):
        moe_inspect.merge([other, by_domains(pair[0].path.parent)], tmp_path / "n")


def test_excerpts_begin_with_the_highest(tmp_path: Path):
    a, b = (counts(tmp_path / str(seed), drawn(seed, 6)) for seed in range(2))
    compared: Any = moe_inspect.compare(a, b)
    for made, name, column in (
        (compared, "load_shift", "load_shift"),
        (compared, "balance", "max_vio_b"),
        (report(a), "balance", "max_vio"),
    ):
        table: Any = made.tables[name]
        shown = made.excerpts[name].rows(table, 3)[column].tolist()
        assert shown == sorted(table[column], reverse=True)[:3] != table[column].tolist()[:3]


def test_scores_of_others_make_keep_lists(tmp_path: Path):
    """Sums over assignments, or a score per assignment, which are told apart by their names."""
    table, rng = rows(drawn(0)), np.random.default_rng(1)
    table["gate_sum"] = table["count"] * rng.random(len(table))
    table["saliency"] = rng.normal(size=len(table))  # it may be negative
    trace = counts(tmp_path / "a", table)
    summed = table.assign(saliency_sum=table["saliency"] * table["count"]).drop(columns="saliency")
    same = counts(tmp_path / "b", summed)
    pd.testing.assert_frame_equal(same.counts(), trace.counts())
    assert verify(trace).ok
    made: Any = report(trace)
    worth = made.tables["worth"].set_index(["layer", "expert"])
    of_expert = summed.groupby(["layer", "expert"])[["count", "gate_sum", "saliency_sum"]].sum()
    mean = of_expert["saliency_sum"] / of_expert["count"]
    assert np.allclose(worth["gate_sum"], of_expert["gate_sum"])
    assert worth["reap"].isna().all()
    for by, score in (("saliency", mean), ("gate", of_expert["gate_sum"])):
        trace.export("pruning", tmp_path / f"{by}.json", by=by, keep=0.5)
        plan = json.loads((tmp_path / f"{by}.json").read_text())
        for layer in range(2):
            least = sorted(score[layer].nsmallest(E // 2).index)
            assert plan["dropped"][str(layer)] == least
            assert plan["kept"][str(layer)] == sorted({*range(E)} - {*least})
        assert plan["scored_by"] == ("table" if by == "saliency" else "moe-inspect")
    with pytest.raises(MoeInspectError, match="or score by saliency, gate or frequency"):
        trace.export("pruning", tmp_path / "n.json")
    without = counts(tmp_path / "c", drawn(0))
    with pytest.raises(MoeInspectError, match="states no saliency: import counts that state it"):
        without.export("pruning", tmp_path / "n.json", by="saliency")
    # and back from the counts that we write, by domain
    trace.export("counts", tmp_path / "c.csv")
    back = import_trace("counts", [tmp_path / "c.csv"], tmp_path / "back")
    of_domain = trace.counts().groupby(["layer", "domain", "expert"])["saliency_sum"].sum()
    found = back.counts().groupby(["layer", "expert"])["saliency_sum"].sum()
    assert np.allclose(found, of_domain.groupby(["layer", "expert"]).sum())


# --- tokens of each expert, and counts of a model's own documents


def test_the_minimum_is_four_tokens_per_input_of_an_expert(tmp_path: Path) -> None:
    load_E = np.array([[6, 8, 4, 0]])
    trace = write_counts(tmp_path / "t", [load_E], 2)
    assert report(trace).tables["coverage"]["minimum"].tolist() == [512] * 4, "not known"
    config = {"hidden_size": 2, "intermediate_size": 3}
    edit_manifest(trace.path, model={**trace.manifest["model"], "config": config})
    table = report(trace.path).tables["coverage"]
    assert table["minimum"].tolist() == [8] * 4
    assert table["enough"].tolist() == [False, True, False, False]
    assert table["main_domain"].isna().tolist() == [False, False, False, True]


def test_a_gate_on_the_fewest_tokens_of_any_expert(tmp_path: Path, cli_here: Cli) -> None:
    loads = np.array([[5, 5, 2, 2]]), np.array([[3, 3, 4, 4]])
    write_counts(tmp_path / "t", [load.reshape(1, 4) for load in loads], 2)
    cli_here("report", "t", "--fail-below", "min_tokens=2")
    failed = cli_here("report", "t", "--fail-below", "min_tokens=3", check=3)
    assert "failed: layer 0: min_tokens is 2, below 3" in failed.stderr
    assert "layer 1" not in failed.stderr
    both = cli_here("report", "t", "--fail-below", "min_tokens=4", check=3)
    assert both.stderr.count("failed: ") == 2
    cli_here("report", "t", "--layers", 1, "--fail-below", "min_tokens=3")


def test_documents_that_are_split_over_passes_are_counted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sums are taken after every pass, when most of the long documents have begun."""
    from moe_inspect.capture import counted, hand_over

    monkeypatch.setattr(counted, "MOST_BYTES", 1)
    monkeypatch.setattr(hand_over, "HELD_PASSES", 1)
    how: dict[str, Any] = {"max_length": 60, "batch_tokens": 128, "max_tokens": 1_500}
    told = moe_inspect.trace_model("demo", tmp_path / "d", **how)
    made = moe_inspect.trace_model(
        "demo", tmp_path / "c", counts_only=True, by_document=True, **how
    )
    assert verify(made).ok
    assert made.n_shards > 3
    passes = [(of.files.first_batch, of.files.last_batch) for of in made.shards]
    assert passes[0][0] == 0
    assert all(first == last + 1 for (_, last), (first, _) in pairwise(passes))
    keys = ["router", "document", "expert"]
    found = made.counts().query("assignments > 0").set_index(keys)["assignments"].sort_index()
    assert found.to_dict() == rows_of(told.path).groupby(keys).size().to_dict()
    for wrong in ({"generate": 2}, {"resume": True}):
        with pytest.raises(MoeInspectError, match="one process feeds whole"):
            moe_inspect.trace_model(
                "demo", tmp_path / "n", counts_only=True, by_document=True, **wrong
            )
    with pytest.raises(MoeInspectError, match="counts_only=True with it"):
        moe_inspect.trace_model("demo", tmp_path / "n", by_document=True)


def test_passes_with_and_without_inference_mode_are_summed(tmp_path: Path):
    """More documents come while it is on, and go on when it is not."""
    model = build("olmoe")
    recording = moe_inspect.record(model, tmp_path / "t", counts_only=True, by_document=True)
    with recording as recorder:
        for n, mode in enumerate((torch.no_grad, torch.inference_mode, torch.no_grad)):
            with mode():
                model(**token_batch([4] * (n + 1)))
                assert recorder.totals().tokens == (4, 12, 24)[n]
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 24


def test_a_document_that_is_not_whole_at_the_end_is_dropped_and_counted(tmp_path: Path):
    fed = list[int]()

    def stop(done: int, _: int | None) -> None:
        fed.append(done)
        if len(fed) == 2:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"max_length": 60, "batch_tokens": 128, "max_tokens": 1_500}
    options = TraceOptions(**how, counts_only=True, by_document=True)
    with pytest.raises(KeyboardInterrupt):
        trace_model("demo", tmp_path / "t", options, stop)
    trace = moe_inspect.open_trace(tmp_path / "t")
    counts = trace.manifest["counts"]
    assert counts["dropped"] > 0
    assert trace.n_tokens + counts["dropped"] // len(trace.routers) == fed[-1]

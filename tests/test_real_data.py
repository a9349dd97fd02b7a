"""Real routing of real models against what their authors published. Skipped where the data is not
beside the project."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.exporters.run import export_trace
from moe_inspect.importers.run import import_trace
from moe_inspect.reporting.report import report
from moe_inspect.trace.reader import Trace
from tests.planted import sentences
from tests.synthetic import write_counts, write_trace

REAL = Path(__file__).parent.parent.parent / "shared" / "real"
ESFT, FIDDLER = REAL / "esft_law", REAL / "fiddler_mixtral"
SGLANG, TENSORRT = REAL / "sglang", REAL / "tensorrt_llm"
needs_esft = pytest.mark.skipif(not ESFT.is_dir(), reason=f"no {ESFT}")
needs_sglang = pytest.mark.skipif(not SGLANG.is_dir(), reason=f"no {SGLANG}")
needs_tensorrt = pytest.mark.skipif(not TENSORRT.is_dir(), reason=f"no {TENSORRT}")
needs_fiddler = pytest.mark.skipif(not FIDDLER.is_dir(), reason=f"no {FIDDLER}")


def parsed(layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [T, 6], weights [T, 6], document [T]; a line is a sequence: ids, a gap, weights."""
    ids, weights, document = [], [], []
    for number, line in enumerate((ESFT / f"expert_weights_{layer}.txt").read_text().splitlines()):
        left, right = line.split("\t\t")
        ids.append(np.array(left.split("\t"), np.uint16).reshape(-1, 6))
        weights.append(np.array(right.split("\t"), np.float32).reshape(-1, 6))
        document += [number] * len(ids[-1])
    return np.concatenate(ids), np.concatenate(weights), np.array(document)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    layers = [parsed(layer) for layer in range(1, 27)]
    document = layers[0][2]
    shortest = min(len(ids) for ids, _, _ in layers)
    assert shortest == len(document)
    root = tmp_path_factory.mktemp("esft") / "t"
    return write_trace(
        root,
        [i for i, _, _ in layers],
        64,
        document=document,
        weights=[w for _, w, _ in layers],
        layers=range(1, 27),
    )


@needs_esft
def test_deepseek_v2_lite_has_the_scores_its_authors_published(deepseek: Trace):
    published = json.loads((ESFT / "summary.json").read_text())
    esft = report(deepseek).tables["esft"].set_index(["layer", "expert"])
    share, gate = esft["token_score"], esft["gate_score"]
    pairs = [(layer, expert) for layer in range(1, 27) for expert in range(64)]
    token_scores = np.array([published["token_scores"][str(layer)][str(e)] for layer, e in pairs])
    gate_scores = np.array([published["gate_scores"][str(layer)][str(e)] for layer, e in pairs])
    # published to 4 digits
    assert np.abs(share.loc[pairs].to_numpy() - token_scores).max() <= 5.1e-5
    # and the weights are stored to fp16
    assert np.abs(gate.loc[pairs].to_numpy() - gate_scores).max() <= 1e-4
    # positive control: one layer against another is far off
    assert np.abs(share.loc[pairs[:64]].to_numpy() - token_scores[64:128]).max() > 5e-3


@needs_esft
def test_deepseek_v2_lite_is_unbalanced_on_law_and_the_verdict_says_so(deepseek: Trace):
    made = report(deepseek)
    balance = made.tables["balance"]
    assert balance["max_over_mean"].mean() == pytest.approx(3.5, abs=0.1)
    assert balance["dead_experts"].sum() == 0
    assert (balance["max_over_mean_low"] > balance["expected_by_chance"]).all()
    worst = balance.loc[balance["max_vio"].idxmax()]
    assert sentences(made)[0].startswith(
        f"Layer {worst['layer']:.0f} is the worst balanced: expert {worst['busiest_expert']:.0f}"
    )
    assert "26 of 26 routers are uneven" in sentences(made)[0]


@needs_fiddler
@pytest.mark.parametrize("model", ["mixtral_8x7b_original", "mixtral_8x7b_instruct"])
def test_mixtral_on_mmlu(model: str, tmp_path: Path):
    files = sorted((FIDDLER / model).glob("*.json"))
    counts_DLE = np.array([json.loads(f.read_text())["expert_popularity"] for f in files])
    assert counts_DLE.shape == (7, 32, 8)
    subjects = [f.stem.removeprefix("expert_popularity_") for f in files]
    made = report(write_counts(tmp_path / "t", list(counts_DLE.transpose(1, 0, 2)), 2, subjects))
    by_subject = np.array([bal.max_over_mean(counts_LE) for counts_LE in counts_DLE])
    assert 1.2 < by_subject.mean(1).min() < by_subject.mean(1).max() < 1.5
    information = made.tables["specialization"]["domain_mi_bits"]
    assert information.mean() == pytest.approx(0.013, abs=0.002)
    if model.endswith("original"):
        assert by_subject.max() == pytest.approx(1.99, abs=0.01)
        assert np.unravel_index(by_subject.argmax(), by_subject.shape)[1] == 16
        assert (1 / np.array([bal.min_over_max(c) for c in counts_DLE])).max() == pytest.approx(
            46.5, abs=0.1
        )
        least = (
            "Expert 3 of layer 11 is the least used: 0.22x the mean load. That layer's busiest "
            "expert gets 5.6 times as much"
        )
        assert f'{least} (46.5 times on "international_law").' in sentences(made)


def load_by_layer(trace: Trace) -> dict[int, list[int]]:
    load = report(trace).tables["load"].set_index(["layer", "expert"])["assignments"]
    return {r.layer: [int(load[r.layer, e]) for e in range(r.experts)] for r in trace.routers}


@needs_sglang
def test_every_token_of_sglangs_recorder_is_read(tmp_path: Path):
    trace = import_trace(
        "sglang", [SGLANG / "per_token"], tmp_path / "t", model=SGLANG / "cfg.json"
    )
    truth = json.loads((SGLANG / "per_token.truth.json").read_text())
    assert load_by_layer(trace) == {layer: load for layer, load in enumerate(truth) if any(load)}


@needs_sglang
def test_a_ring_of_sglangs_recorder_that_has_wrapped_is_told(tmp_path: Path):
    """Three of six passes are in the file: less than the truth everywhere, and more nowhere."""
    said: list[str] = []
    trace = import_trace(
        "sglang",
        [SGLANG / "stat_ring3"],
        tmp_path / "t",
        model=SGLANG / "cfg.json",
        warn=said.append,
    )
    truth = json.loads((SGLANG / "stat_ring3.truth.json").read_text())
    assert len(said) == 1
    assert "all 3 rows of logical_count are filled" in said[0]
    for layer, load in load_by_layer(trace).items():
        assert 0 < sum(load) < sum(truth[layer])
        assert (np.array(load) <= truth[layer]).all()
    assert len(list(trace.shards)) == 1


@needs_tensorrt
def test_tensorrt_llms_counts_are_those_of_all_ranks(tmp_path: Path):
    trace = import_trace("tensorrt-llm", [TENSORRT / "stat"], tmp_path / "t")
    truth = json.loads((TENSORRT / "stat.truth.json").read_text())
    assert load_by_layer(trace) == {int(layer): load for layer, load in truth.items()}


@needs_esft
def test_the_experts_to_train_are_those_that_esfts_authors_published(tmp_path: Path):
    trace = import_trace("esft", [ESFT], tmp_path / "t")
    export_trace(trace, "esft", tmp_path / "e")
    ours = json.loads((tmp_path / "e/esft_law/expert_cfg.json").read_text())
    published = json.loads((ESFT / "expert_config_law.json").read_text())
    assert ours.keys() == published.keys()
    assert {layer: sorted(experts) for layer, experts in ours["experts"].items()} == {
        layer: sorted(experts) for layer, experts in published["experts"].items()
    }


def real(folder: str, format: str, root: Path, **how: Any) -> Trace:
    if not (REAL / folder).exists():
        pytest.skip(f"no {REAL / folder}")
    return import_trace(format, [REAL / folder], root, warn=lambda line: None, **how)


def test_deepseek_v3_has_58_layers_with_experts(tmp_path: Path):
    trace = real("deepseek_loads", "sglang-json", tmp_path / "t", top_k=8)
    assert [(r.layer, r.experts) for r in trace.routers] == [(n, 256) for n in range(3, 61)]
    files = sorted((REAL / "deepseek_loads").iterdir())
    load_DLE = np.array([json.loads(f.read_text())["logical_count"] for f in files])
    counts = trace.counts().sort_values(["domain", "layer", "expert"])
    assert np.array_equal(counts["assignments"], load_DLE[:, 3:].ravel())


def test_glm_52_has_the_counts_and_gate_sums_of_its_files(tmp_path: Path):
    trace = real("glm52", "glm-merged", tmp_path / "t")
    counts = trace.counts().sort_values(["domain", "layer", "expert"])
    files = sorted((REAL / "glm52").glob("merged_*"))
    layers = [json.loads(f.read_text())["layers"].values() for f in files]
    for name, ours in (("cnt", "assignments"), ("gate", "weight_sum")):
        theirs = np.array([[layer[name] for layer in of] for of in layers])
        assert np.array_equal(counts[ours].to_numpy(), theirs.ravel())


def test_olmoe_and_mixtral_by_domain_are_as_published(tmp_path: Path):
    """arXiv:2409.02060, figures 19 ff."""
    for name, domain, expected in (
        ("olmoe-counts", "arxiv", 7.2),
        ("olmoe-counts", "c4", 2.7),
        ("mixtral-counts", "github", 1.29),
    ):
        trace = real("olmoe_paper", name, tmp_path / name, overwrite=True)
        counts = trace.counts()
        of_layer = counts[counts["domain"] == domain].groupby("layer")["assignments"]
        assert (of_layer.max() / of_layer.mean()).mean() == pytest.approx(expected, abs=0.05)
        assert (of_layer.sum() == 208_896 * trace.routers[0].top_k).all()


def test_olmoe_quantised_has_as_many_tokens_as_its_examples(tmp_path: Path):
    folder, name = REAL / "olmoe_quantised", "null1024_olmoe_nf4_resident"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    with gzip.open(folder / f"{name}.jsonl.gz") as file:
        (tmp_path / "x.jsonl").write_bytes(b"".join(islice(file, 60)))
    lines = (folder / f"{name}.rows.jsonl").read_text().splitlines()[:60]
    tokens = sum(json.loads(line)["n_tokens"] for line in lines)
    trace = import_trace("auto", [tmp_path / "x.jsonl"], tmp_path / "t", warn=lambda line: None)
    assert trace.n_tokens == tokens
    assert (trace.counts().groupby("layer")["assignments"].sum() == tokens * 8).all()


def test_deepseek_v2_lite_by_token_shares_experts_as_published(tmp_path: Path):
    """L tokens in a row use so many × k experts; the text of tokens is there."""
    trace = real("deepseek_v2_lite_tokens", "moe-beyond", tmp_path / "t")
    shapes = [(r.layer, r.experts, r.top_k) for r in trace.routers]
    assert shapes == [(layer, 64, 6) for layer in range(1, 27)]
    assert trace.vocabulary()["token"].tolist()[:3] == [
        "<｜begin▁of▁sentence｜>",
        "something",
        "▁to",
    ]
    ids_LTK = np.array([trace.routing(layer=n).filter(like="expert_") for n in range(1, 27)])
    document_T = trace.tokens()["document"].to_numpy()
    for length, expected in ((2, 1.73), (4, 2.91), (8, 4.65), (16, 6.74)):
        starts = np.arange(0, len(document_T) - length + 1)
        starts = starts[document_T[starts] == document_T[starts + length - 1]][::7]
        used = [len(np.unique(ids_TK[t : t + length])) for ids_TK in ids_LTK for t in starts]
        assert np.mean(used) / 6 == pytest.approx(expected, rel=0.015)

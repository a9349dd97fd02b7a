"""Real routing of real models against what their authors published, where it is there."""

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
from tests.support.planted import sentences

REAL = Path(__file__).parent.parent.parent / "shared" / "real"
ESFT, FIDDLER = REAL / "esft_law", REAL / "fiddler_mixtral"
needs_fiddler = pytest.mark.skipif(not FIDDLER.is_dir(), reason=f"no {FIDDLER}")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def real(folder: str, format: str, root: Path, **how: Any) -> Trace:
    if not (REAL / folder).exists():
        pytest.skip(f"no {REAL / folder}")
    return import_trace(format, [REAL / folder], root, **{"warn": lambda line: None} | how)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return real("esft_law", "esft", tmp_path_factory.mktemp("esft") / "t")


def test_deepseek_v2_lite_has_the_scores_its_authors_published(deepseek: Trace, tmp_path: Path):
    shapes = [(r.layer, r.experts, r.top_k) for r in deepseek.routers]
    assert shapes == [(layer, 64, 6) for layer in range(1, 27)]
    assert len(deepseek.documents()) == (ESFT / "expert_weights_1.txt").read_text().count("\n")
    assert set(deepseek.documents()["domain"]) == {"esft_law"}
    published = read(ESFT / "summary.json")
    esft = report(deepseek).tables["esft"].set_index(["layer", "expert"])
    pairs = [(layer, expert) for layer in range(1, 27) for expert in range(64)]
    # published to 4 digits; and the weights are stored to fp16
    for name, near in (("token_score", 5.1e-5), ("gate_score", 1e-4)):
        theirs = np.array([published[f"{name}s"][str(layer)][str(e)] for layer, e in pairs])
        ours = esft[name].loc[pairs].to_numpy()
        assert np.abs(ours - theirs).max() <= near
        # positive control: one layer against another is far off
        assert np.abs(ours[:64] - theirs[64:128]).max() > 5e-3
    # and the experts to train are theirs
    export_trace(deepseek, "esft", tmp_path / "e")
    chosen, published = (
        read(path)
        for path in (tmp_path / "e/esft_law/expert_cfg.json", ESFT / "expert_config_law.json")
    )
    assert chosen.keys() == published.keys()
    a, b = ({n: sorted(of) for n, of in x["experts"].items()} for x in (chosen, published))
    assert a == b


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


@pytest.mark.parametrize("model", ["mixtral_8x7b_original", "mixtral_8x7b_instruct"])
def test_mixtral_on_mmlu(model: str, tmp_path: Path):
    trace = real(f"fiddler_mixtral/{model}", "fiddler", tmp_path / "t")
    files = sorted((FIDDLER / model).glob("*.json"))
    counts_DLE = np.array([read(f)["expert_popularity"] for f in files])
    assert counts_DLE.shape == (7, 32, 8)
    assert trace.n_tokens == counts_DLE[:, 0].sum() // 2
    counts = trace.counts().sort_values(["domain", "layer", "expert"])
    assert np.array_equal(counts["assignments"], counts_DLE.ravel())
    subjects = [f.stem.removeprefix("expert_popularity_") for f in files]
    assert list(dict.fromkeys(counts["domain"])) == subjects
    made = report(trace)
    by_subject = np.array([bal.max_over_mean(counts_LE) for counts_LE in counts_DLE])
    assert 1.2 < by_subject.mean(1).min() < by_subject.mean(1).max() < 1.5
    information = made.tables["specialization"]["domain_mi_bits"]
    assert information.mean() == pytest.approx(0.013, abs=0.002)
    if model.endswith("original"):
        assert by_subject.max() == pytest.approx(1.99, abs=0.01)
        assert np.unravel_index(by_subject.argmax(), by_subject.shape)[1] == 16
        least = np.min([bal.min_over_max(c) for c in counts_DLE])
        assert 1 / least == pytest.approx(46.5, abs=0.1)
        said = sentences(made)
        assert (
            "Expert 3 of layer 11 is the least used: 0.22x the mean load. That layer's busiest "
            'expert gets 5.6 times as much (46.5 times on "international_law").'
        ) in said
        # the 1,919 tokens of that subject may be few documents
        assert '_biology" leaves expert 3 of layer 11 nearly unused: 0.04x the mean' in " ".join(
            said
        )


def load_by_layer(trace: Trace) -> dict[int, list[int]]:
    load = report(trace).tables["load"].set_index(["layer", "expert"])["assignments"]
    return {r.layer: [int(load[r.layer, e]) for e in range(r.experts)] for r in trace.routers}


def test_the_recorders_of_engines_are_read_whole(tmp_path: Path):
    """SGLang's of every token; TensorRT-LLM's counts of all ranks."""
    trace = real("sglang/per_token", "sglang", tmp_path / "t", model=REAL / "sglang/cfg.json")
    truth = read(REAL / "sglang/per_token.truth.json")
    assert load_by_layer(trace) == {layer: load for layer, load in enumerate(truth) if any(load)}
    trace = real("tensorrt_llm/stat", "tensorrt-llm", tmp_path / "tensorrt")
    truth = read(REAL / "tensorrt_llm/stat.truth.json")
    assert load_by_layer(trace) == {int(layer): load for layer, load in truth.items()}


def test_a_ring_of_sglangs_recorder_that_has_wrapped_is_told(tmp_path: Path):
    """Three of six passes are in the file: less than the truth everywhere, and more nowhere."""
    said, how = list[str](), {"model": REAL / "sglang/cfg.json"}
    trace = real("sglang/stat_ring3", "sglang", tmp_path / "t", warn=said.append, **how)
    truth, (line,) = read(REAL / "sglang/stat_ring3.truth.json"), said
    assert "all 3 rows of logical_count are filled" in line
    for layer, load in load_by_layer(trace).items():
        assert 0 < sum(load) < sum(truth[layer])
        assert (np.array(load) <= truth[layer]).all()
    assert len(list(trace.shards)) == 1


def test_deepseek_v3_has_58_layers_with_experts(tmp_path: Path):
    trace = real("deepseek_loads", "sglang-json", tmp_path / "t", top_k=8)
    assert [(r.layer, r.experts) for r in trace.routers] == [(n, 256) for n in range(3, 61)]
    files = sorted((REAL / "deepseek_loads").iterdir())
    load_DLE = np.array([read(f)["logical_count"] for f in files])
    counts = trace.counts().sort_values(["domain", "layer", "expert"])
    assert np.array_equal(counts["assignments"], load_DLE[:, 3:].ravel())


def test_glm_52_has_the_counts_and_gate_sums_of_its_files(tmp_path: Path):
    trace = real("glm52", "glm-merged", tmp_path / "t")
    counts = trace.counts().sort_values(["domain", "layer", "expert"])
    files = sorted((REAL / "glm52").glob("merged_*"))
    layers = [read(f)["layers"].values() for f in files]
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
    first = ["<｜begin▁of▁sentence｜>", "something", "▁to"]
    assert trace.vocabulary()["token"].tolist()[:3] == first
    ids_LTK = np.array([trace.routing(layer=n).filter(like="expert_") for n in range(1, 27)])
    document_T = trace.tokens()["document"].to_numpy()
    for length, expected in ((2, 1.73), (4, 2.91), (8, 4.65), (16, 6.74)):
        starts = np.arange(0, len(document_T) - length + 1)
        starts = starts[document_T[starts] == document_T[starts + length - 1]][::7]
        used = [len(np.unique(ids_TK[t : t + length])) for ids_TK in ids_LTK for t in starts]
        assert np.mean(used) / 6 == pytest.approx(expected, rel=0.015)

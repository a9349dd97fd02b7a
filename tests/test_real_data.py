"""Real routing of real models against what their authors published, where it is there; and
benchmarks/results/published.md, which `python -m benchmarks.published` writes of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import published
from benchmarks.published import FIGURES, Figure, documented, imported, page, row
from moe_inspect.making import import_trace
from moe_inspect.public import Trace, open_trace, report
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT
from tests.support.sweep import sample

REAL = ROOT.parent / "shared" / "real"
ESFT, FIDDLER = REAL / "esft_law", REAL / "fiddler_mixtral"
needs_fiddler = pytest.mark.skipif(not FIDDLER.is_dir(), reason=f"no {FIDDLER}")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


Real = Callable[[str], Trace]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the folders of benchmarks/public_data.md are, and what its commands import."""
    path = tmp_path_factory.mktemp("real")
    for folder in REAL.glob("*"):
        (path / folder.name).symlink_to(folder)
    return path


@pytest.fixture(scope="module")
def real(place: Path) -> Real:
    """From the name of a trace to what the command of benchmarks/public_data.md imports."""

    def trace(name: str) -> Trace:
        if not (place / folder_of(name)).is_dir():
            pytest.skip(f"no {REAL / folder_of(name)}")
        with chdir(place):
            return open_trace(imported(name).absolute())

    return trace


def folder_of(name: str) -> str:
    return shlex.split(documented()[name])[2].partition("/")[0].removesuffix(".parquet")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_every_folder_is_imported_by_a_command_of_the_docs():
    folders = {path.name for path in REAL.iterdir() if path.is_dir()}
    assert folders - {folder_of(name) for name in documented()} <= {"moe_latency"}


@pytest.mark.parametrize("name", sample(documented(), 3))
def test_what_a_command_of_the_docs_imports_is_whole(name: str, real: Real):
    assert verify(real(name)).ok


def test_commands_for_data_behind_a_hub_read_files_of_the_forms_described(tmp_path: Path):
    rng = np.random.default_rng(0)
    ids_LTK = rng.random((2, 9, 64)).argsort(-1)[..., :6]
    scores = pa.array([[0.5, 0.2, 0.1, 0.08, 0.05, 0.01]] * 9, pa.list_(pa.float16()))
    (tmp_path / "iter_5473").mkdir()
    for layer, ids_TK in enumerate(ids_LTK, 2):
        indices = pa.array(ids_TK.tolist(), pa.list_(pa.int16()))
        table = pa.table({"scores": scores, "indices": indices})
        pq.write_table(table, tmp_path / f"iter_5473/layer_{layer:02}.parquet")
    # a step is the prompt or a token of the answer; dense layers are null
    steps = [slice(6), slice(6, 7), slice(7, 8), slice(8, 9)]
    a, b = ids_LTK.tolist()
    written = json.dumps([{"0": None, "3": a[step], "4": b[step]} for step in steps])
    (tmp_path / "mmlu/anatomy").mkdir(parents=True)
    (tmp_path / "mmlu/anatomy/17.json").write_text(written)
    with chdir(tmp_path):
        for name, layers in (("flame", [2, 3]), ("mmlu", [3, 4])):
            trace = open_trace(imported(name).absolute())
            assert [r.layer for r in trace.routers] == layers
            for layer, ids_TK in zip(layers, ids_LTK, strict=True):
                chosen = trace.routing(layers=layer).filter(like="expert_")
                assert np.array_equal(chosen, ids_TK)
    assert trace.documents()["domain"].tolist() == ["anatomy"]


def test_deepseek_v2_lite_has_the_choices_its_authors_published(real: Real):
    deepseek = real("esft_law")
    shapes = [(r.layer, r.experts, r.top_k) for r in deepseek.routers]
    assert shapes == [(layer, 64, 6) for layer in range(1, 27)]
    assert len(deepseek.documents()) == (ESFT / "expert_weights_1.txt").read_text().count("\n")
    assert set(deepseek.documents()["domain"]) == {"esft_law"}
    by_token = deepseek.routing(layers=3).set_index("token")
    first, *_ = (ESFT / "expert_weights_3.txt").read_text().splitlines()
    ids, weights = (np.array(part.split(), float).reshape(-1, 6) for part in first.split("\t\t"))
    order = np.argsort(-weights, axis=1, kind="stable")  # a trace has the largest weight first
    ids, weights = (np.take_along_axis(of, order, 1) for of in (ids, weights))
    of_first = by_token.iloc[: len(ids)]
    assert np.array_equal(of_first.filter(like="expert_"), ids)
    assert np.array_equal(of_first.filter(like="weight_"), weights.astype(np.float16))


def popularity(of: Any) -> dict[str, Any]:
    return {"assignments": of["expert_popularity"]}


def logical(of: Any) -> dict[str, Any]:
    return {"assignments": of["logical_count"][3:]}  # three layers are dense


def merged(of: Any) -> dict[str, Any]:
    names = {"cnt": "assignments", "gate": "weight_sum", "sal": "saliency_sum"}
    layers = of["layers"].values()
    return {ours: [layer[name] for layer in layers] for name, ours in names.items()}


# trace → the authors' files, the columns [L, E] in one, layers
COUNTED: dict[str, tuple[str, Callable[[Any], dict[str, Any]], range]] = {
    "mixtral_mmlu": ("fiddler_mixtral/mixtral_8x7b_original/*.json", popularity, range(32)),
    "mixtral_instruct_mmlu": ("fiddler_mixtral/mixtral_8x7b_instruct/*", popularity, range(32)),
    "deepseek_loads": ("deepseek_loads/*", logical, range(3, 61)),
    "glm52": ("glm52/merged_*", merged, range(3, 78)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_the_authors_files(name: str, real: Real):
    """A file a domain."""
    trace, (pattern, columns, layers) = real(name), COUNTED[name]
    assert [r.layer for r in trace.routers] == list(layers)
    counts = trace.counts().sort_values(["domain", "layer", "expert"])
    files = sorted(REAL.glob(pattern))
    assert counts["domain"].nunique() == len(files) > 1
    each = [columns(read(file)) for file in files]
    for column in each[0]:
        assert np.array_equal(counts[column], np.array([of[column] for of in each]).ravel())
    load_DE = counts.groupby(["domain", "layer"])["assignments"].sum().unstack()
    assert trace.n_tokens == load_DE.max(axis=1).sum() // trace.routers[0].top_k


def test_olmoe_and_mixtral_have_the_tokens_and_layers_of_their_authors_script(real: Real):
    for name, experts, top_k in (("olmoe", 64, 8), ("mixtral", 8, 2)):
        trace = real(name)
        shapes = [(r.layer, r.experts, r.top_k) for r in trace.routers]
        assert shapes == [(layer, experts, top_k) for layer in (0, 7, 15)]
        counts = trace.counts()
        sums = counts[counts["domain"] != "tulu"].groupby(["domain", "layer"])["assignments"].sum()
        assert (sums == 208_896 * top_k).all()


def load_by_layer(trace: Trace) -> dict[int, list[int]]:
    load = report(trace).tables["load"].set_index(["layer", "expert"])["assignments"]
    return {r.layer: [int(load[r.layer, e]) for e in range(r.experts)] for r in trace.routers}


def test_the_recorders_of_engines_are_read_whole(real: Real):
    """SGLang's of every token; TensorRT-LLM's counts of all ranks; Megatron's of a rank."""
    trace = real("sglang")
    truth = read(REAL / "sglang/per_token.truth.json")
    assert load_by_layer(trace) == {layer: load for layer, load in enumerate(truth) if any(load)}
    for name, truth in (
        ("tensorrt_llm", read(REAL / "tensorrt_llm/stat.truth.json")),
        ("megatron", read(REAL / "megatron/all_moe.truth.json")["load"]),
    ):
        loads = {int(layer): load for layer, load in truth.items()}
        assert load_by_layer(real(name)) == loads


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_a_ring_of_sglangs_recorder_that_has_wrapped_is_told(tmp_path: Path):
    """Three of six passes are in the file: less than the truth everywhere, and more nowhere."""
    said, folder = list[str](), REAL / "sglang"
    how: Any = {"model": folder / "cfg.json", "warn": said.append}
    trace = import_trace("sglang", [folder / "stat_ring3"], tmp_path / "t", **how)
    truth, (line,) = read(REAL / "sglang/stat_ring3.truth.json"), said
    assert "all 3 rows of logical_count are filled" in line
    for layer, load in load_by_layer(trace).items():
        assert 0 < sum(load) < sum(truth[layer])
        assert (np.array(load) <= truth[layer]).all()
    assert len(list(trace.shards)) == 1


def test_olmoe_quantised_has_the_tokens_of_each_example(real: Real):
    trace = real("olmoe_bf16")
    assert (trace.counts().groupby("layer")["assignments"].sum() == 88_098 * 8).all()
    stated = REAL / "olmoe_quantised/null1024_olmoe_bf16_resident.rows.jsonl"
    tokens = [json.loads(line)["n_tokens"] for line in stated.read_text().splitlines()]
    assert trace.documents()["tokens"].tolist() == tokens
    assert trace.n_tokens == sum(tokens) == 88_098


def test_deepseek_v2_lite_by_token_has_the_text_of_its_tokens(real: Real):
    trace = real("deepseek_v2_lite")
    first = ["<｜begin▁of▁sentence｜>", "something", "▁to"]
    assert trace.vocabulary()["token"].tolist()[:3] == first


# --- benchmarks/results/published.md


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_the_page_is_what_the_data_give(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what a machine's arithmetic changes: the model's own runs."""
    monkeypatch.chdir(place)
    imported("olmoe_bf16").with_name("null1024_olmoe_bf16").symlink_to("olmoe_bf16")
    published.table.cache_clear()
    written = page([figure for figure in FIGURES if figure.data], REAL)
    lines = (ROOT / "benchmarks/results/published.md").read_text().splitlines()
    recorded = [line for line in lines if "`trace demo " in line]
    assert len(recorded) == 1
    assert [*written.splitlines(), *recorded] == lines


def test_figures_without_data_are_skipped_with_a_line(tmp_path: Path) -> None:
    figures = [figure for figure in FIGURES if figure.data]
    lines = page(figures, tmp_path).splitlines()[-len(figures) :]
    for figure, line in zip(figures, lines, strict=True):
        assert line.rstrip() == f"Skipped, as there is no {figure.data}: {figure.what}."


def test_a_figure_that_differs_says_why() -> None:
    def ours(how: str) -> list[float]:
        return [0.0123, 1.256]

    same = Figure("x", "us", "0.012, 1.26", "report a; report b --domains {domain}", ours)
    end = "| the same | `report a`<br>`report b --domains NAME` |"
    assert row(same) == f"| x | us | 0.012, 1.26 | 0.012, 1.26 {end}"
    with pytest.raises(SystemExit, match=r"^y: 0.012, 1.26, not 0.013, 1.26: say why$"):
        row(Figure("y", "us", "0.013, 1.26", "", ours))
    assert "| rounding | `ours` of" in row(
        Figure("y", "us", "0.013, 1.26", "", ours, why="rounding")
    )

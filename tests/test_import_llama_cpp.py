"""llama.cpp's importance matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moe_inspect.exporters.run import export_trace
from moe_inspect.making import import_trace
from moe_inspect.model.gguf import read_gguf
from moe_inspect.trace.verify import verify
from tests.support.foreign import write_imatrix
from tests.support.importing import loads, taken
from tests.test_damage import put, replace_part
from tests.test_real_data import REAL

TRUE_IMATRIX = REAL / "llama_cpp"
needs_imatrix = pytest.mark.skipif(not TRUE_IMATRIX.is_dir(), reason="no imatrix here")


# --- imatrix


@needs_imatrix
def test_an_imatrix_gives_its_exact_counts(tmp_path: Path):
    source = TRUE_IMATRIX / "imatrix.gguf"
    trace, said = taken(tmp_path, "auto", source)
    assert np.array_equal(loads(trace), np.load(TRUE_IMATRIX / "truth.npy"))
    assert [(r.layer, r.experts, r.top_k) for r in trace.routers] == [
        (layer, 16, 4) for layer in (1, 2, 3)
    ]
    assert trace.n_tokens == 5 * 512  # chunks × their size
    assert said == ["recognised as imatrix: llama.cpp's importance matrix, imatrix.gguf"]
    assert trace.manifest["corpus"]["notes"] == ["computed on calib.txt"]


def test_the_energy_of_down_projections_is_kept_and_comes_back_from_an_export(tmp_path: Path):
    load, energy = np.array([3, 0, 4, 1]), np.array([2.5, 0.0, 1.25, 8.0])
    write_imatrix(tmp_path / "a.gguf", {0: load, 2: load[::-1]}, 8, {0: energy, 2: energy * 2})
    trace = import_trace("imatrix", [tmp_path / "a.gguf"], tmp_path / "t")
    assert verify(tmp_path / "t").ok
    assert loads(trace, "energy").tolist() == [energy.tolist(), (energy * 2).tolist()]
    export_trace(trace, "counts", tmp_path / "c.csv")
    again = import_trace("counts", [tmp_path / "c.csv"], tmp_path / "again")
    assert loads(again, "energy").tolist() == loads(trace, "energy").tolist()
    assert loads(again).tolist() == loads(trace).tolist()
    for value in (-1.0, np.nan):
        replace_part(tmp_path / "t", "counts", put("energy", pa.array([value, *[0.0] * 7])))
        found = verify(tmp_path / "t")
        assert (found.row, found.violation) == (0, f"energy is {value}")


def test_matrices_of_several_texts_are_domains(tmp_path: Path):
    for name, load in (("a", [3, 1]), ("b", [0, 4])):
        write_imatrix(tmp_path / f"{name}.gguf", {0: np.array(load)}, 4)
    sources = [f"{name}={tmp_path / f'{name}.gguf'}" for name in "ab"]
    table = import_trace("imatrix", sources, tmp_path / "t").counts()
    assert table["domain"].tolist() == ["a", "a", "b", "b"]
    assert table["assignments"].tolist() == [3, 1, 0, 4]


def test_snapshots_of_a_run_are_not_counted_twice(tmp_path: Path):
    for name, n in {"a.gguf.at_9": 1, "a.gguf.at_10": 2, "b.gguf": 4, "b.gguf.at_10": 2}.items():
        write_imatrix(tmp_path / name, {0: np.array([3, 1]) * n}, 4 * n)
    trace, said = taken(tmp_path, "imatrix", tmp_path)
    assert loads(trace).sum() == 4 * (2 + 4)
    assert said == ["2 snapshots left out: a later file of the same run holds more"]
    early = import_trace("imatrix", [tmp_path / "b.gguf.at_10"], tmp_path / "early")
    assert loads(early).tolist() == [[6, 2]]


def test_sums_other_than_tokens_times_k_are_told(tmp_path: Path):
    load = {layer: np.array([3, 1, 4, 0]) for layer in range(3)}
    write_imatrix(tmp_path / "a.gguf", load | {3: np.array([1, 1, 0, 1])}, 4)
    trace, (said,) = taken(tmp_path, "imatrix", tmp_path / "a.gguf")
    assert {r.top_k for r in trace.routers} == {2}
    assert "1 layer (3) with other than 4 tokens (chunks × size) × k assignments" in said


def test_counts_beyond_float32_are_told(tmp_path: Path):
    for largest, told in ((2**24, []), (2**24 + 2, [True])):
        write_imatrix(tmp_path / "a.gguf", {0: np.array([largest, 0])}, largest)
        _, said = taken(tmp_path / f"{largest}", "imatrix", tmp_path / "a.gguf")
        assert ["not exact" in line for line in said] == told


# --- GGUF


def test_the_reader_agrees_with_the_gguf_package(tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    write_imatrix(tmp_path / "a.gguf", {0: np.array([3, 1, 4, 0])}, 4)
    ours, theirs = read_gguf(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    assert ours.fields == {
        key: field.contents() for key, field in theirs.fields.items() if key[:5] != "GGUF."
    }
    assert len(ours.tensors) == len(theirs.tensors) == 8
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].start == tensor.data_offset
        assert np.array_equal(ours.floats(tensor.name), tensor.data)

"""Hostile files: whatever is in them, an import ends in a trace that verifies or in one line."""

from __future__ import annotations

import gc
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_inspect.importers import MODULES
from tests.support import foreign, fuzz
from tests.support.importing import refused
from tests.support.sweep import WHOLE, sample

quick = settings(
    max_examples=25 if WHOLE else 10, deadline=None, suppress_health_check=list(HealthCheck)
)
VALUES = (st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats())
JSON = st.recursive(
    st.one_of(*VALUES, st.text(max_size=5)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
Seeds = dict[str, tuple[list[Path], bytes, Path | None]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    root = tmp_path_factory.mktemp("hostile")
    model = foreign.config_file(root)
    seeds = {name: fuzz.seed(name, root / name) for name in fuzz.targets()}
    return {name: (*files, model if config else None) for name, (*files, config) in seeds.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "place"


def fresh(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    (place / "in").mkdir(parents=True)
    return place


@pytest.mark.parametrize("name", fuzz.targets())
@quick
@given(data=st.data())
def test_any_bytes_are_a_trace_or_one_line(
    name: str, data: st.DataObject, made: Seeds, place: Path
):
    names, whole, model = made[name]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "end"]))
        if how == "set":
            changed[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del changed[at : at + data.draw(st.integers(1, 40))]
        elif how == "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del changed[max(at, 1) :]
        if not changed:
            return
    fuzz.check(name, names, bytes(changed), fresh(place), model)


LINES = ["vllm-routed", "sglang-routed", "megatron", "megatron-pipeline", "megatron-counts"]


@pytest.mark.parametrize("name", LINES)
@quick
@given(data=st.data())
def test_any_value_in_a_field_is_a_trace_or_one_line(
    name: str, data: st.DataObject, made: Seeds, place: Path
):
    names, whole, model = made[name]
    parts = whole.split(fuzz.BETWEEN)
    at = next(i for i, n in enumerate(names) if n.suffix == ".jsonl")
    rows = [json.loads(line) for line in parts[at].splitlines()]
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(JSON)
    parts[at] = "".join(json.dumps(r) + "\n" for r in rows).encode()
    fuzz.check(name, names, fuzz.BETWEEN.join(parts), fresh(place), model)


@pytest.mark.parametrize("name", ["sglang-per_token", "sglang-per_pass", "sglang-stat"])
@quick
@given(data=st.data())
def test_any_value_in_a_pt_is_a_trace_or_one_line(
    name: str, data: st.DataObject, made: Seeds, place: Path
):
    import torch

    names, whole, model = made[name]
    content = torch.load(io.BytesIO(whole.split(fuzz.BETWEEN)[0]), weights_only=True)
    within = data.draw(st.sampled_from([content, *content.get("records", [])]))
    shape = data.draw(st.lists(st.integers(0, 11), max_size=4))
    types = [torch.int32, torch.uint8, torch.float32, torch.bool, torch.bfloat16, torch.complex64]
    tensor = st.sampled_from(types).map(lambda dtype: torch.ones(shape).to(dtype))
    strided = st.just(torch.zeros(1, dtype=torch.int32).expand(3, 10**6, 8))
    within[data.draw(st.sampled_from(sorted(within)))] = data.draw(JSON | tensor | strided)
    file = io.BytesIO()
    torch.save(content, file)
    fuzz.check(name, names[:1], file.getvalue(), fresh(place), model)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nonexistent/never").touch, ())


def test_nothing_is_unpickled_and_no_archive_unpacked(tmp_path: Path):
    import torch

    torch.save({"logical_count": Bomb()}, tmp_path / "a.pt")
    why = r"a\.pt cannot be read safely as a \.pt file"
    refused(tmp_path, why, "sglang", tmp_path / "a.pt", top_k=2)
    torch.save({"logical_count": torch.zeros(1, 2, 8, dtype=torch.int32)}, tmp_path / "b.pt")
    with (
        zipfile.ZipFile(tmp_path / "b.pt") as stored,
        zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as squeezed,
    ):
        for entry in stored.infolist():
            squeezed.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED)
    refused(tmp_path, why.replace("a", "c", 1), "sglang", tmp_path / "c.pt", top_k=2)
    np.save(tmp_path / "d.npy", np.array([[[None]]]), allow_pickle=True)
    why = r"d\.npy is not a \.npy file of integers"
    refused(tmp_path, why, "vllm-routed", tmp_path / "d.npy", experts=8)


@pytest.mark.parametrize("format", sample(MODULES, 3))
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 50, b"{}", b"[]", b"null\n", b'{"records": []}', b"[" * 100_000, b"9" * 5000],
)
def test_what_is_nothing_of_the_kind(format: str, content: bytes, tmp_path: Path):
    if content.startswith(b"[["):
        gc.collect()  # or it is done at the end of the recursion, where no finaliser has room
    for suffix in (".jsonl", ".json", ".csv", ".parquet", ".npy", ".pt", ".safetensors", ".txt"):
        (tmp_path / f"x{suffix}").write_bytes(content)
        refused(tmp_path, ".", format, tmp_path / f"x{suffix}", model="demo")
    refused(tmp_path, "no file or folder", format, tmp_path / "nowhere", model="demo")


@pytest.mark.parametrize("crash", sorted(fuzz.CRASHES.glob("*-*")), ids=lambda p: p.name[:40])
def test_what_once_broke_an_importer_does_so_no_more(crash: Path, made: Seeds, tmp_path: Path):
    name = max((n for n in fuzz.targets() if crash.name.startswith(n)), key=len)
    names, _, model = made[name]
    fuzz.check(name, names, crash.read_bytes(), fresh(tmp_path / "place"), model)


def test_every_format_is_fuzzed(tmp_path: Path) -> None:
    assert set(fuzz.targets().values()) - {""} == set(MODULES)
    names, data, _ = fuzz.seed("a format without a maker", tmp_path / "seed")
    assert (names, data) == ([Path("input")], b"")

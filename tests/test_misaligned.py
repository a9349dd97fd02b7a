"""The same routing recorded wrongly: each fault is named, with the option that mends it, and
nothing is named where there is no fault. benchmarks/diagnoses.py tries many more recordings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from tests.support.misrecorded import FAULTS, MISALIGNED, Recording, rounded, routed_text, said_of

T, L, E, K = 1_500, 6, 16, 4
ROUNDING = 0.005


@pytest.fixture(scope="module")
def a() -> Recording:
    return routed_text(0, T, L, E, K)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_mended_and_nothing_else_is_named(
    name: str, a: Recording, tmp_path: Path
) -> None:
    fault, single = FAULTS[name], FAULTS[name].exactly is not None
    b = fault.b(a if single else rounded(a, ROUNDING), np.random.default_rng(0))
    first, second = a.written(tmp_path / "a"), b.written(tmp_path / "b")
    kinds, mismatched = said_of(first, second)
    assert fault.kinds <= kinds
    assert not kinds & MISALIGNED - fault.kinds - {"misaligned"}
    if single:
        assert mismatched == fault.exactly
    if fault.mend:
        after, left = said_of(first, second, **fault.mend)
        assert not after & MISALIGNED
        assert left is not None
        assert left < 2 * ROUNDING * T * L


def test_nothing_is_named_where_nothing_is_wrong(a: Recording, tmp_path: Path) -> None:
    other = routed_text(9, T, L, E, K)
    first = a.written(tmp_path / "a")
    for n, b in enumerate(
        (a, rounded(a, ROUNDING), rounded(a, 0.4), replace(a, ids_LTK=other.ids_LTK))
    ):
        kinds, mismatched = said_of(first, b.written(tmp_path / f"b{n}", shard_tokens=900))
        assert not kinds & MISALIGNED
        assert (mismatched == 0) == (n == 0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("routes shifted by one", "Add --shift-routes 1"),
        ("last token never fed", "Add --drop-last"),
        ("padding is expert 0", "Add --drop-zero-filled"),
        ("a dense layer is counted", "Add --shift-layers -1"),
        ("the second pipeline stage counts from 0", "Add --shift-layers 3"),
        ("both pipeline stages count from 0", "A's 3 is B's 0/3, A's 4 is B's 1/4, A's 5 is B's"),
        ("two layers swapped", "Layers are swapped: A's 0 is B's 5, A's 5 is B's 0"),
        ("MTP routes fed to a decoder router", "Add --layers 1-5"),
        ("experts of one layer permuted", "Experts are numbered differently in layer 1: "),
    ],
)
def test_the_sentence_has_the_evidence_and_the_option(
    name: str, says: str, a: Recording, tmp_path: Path
) -> None:
    b = FAULTS[name].b(rounded(a, ROUNDING), np.random.default_rng(0))
    made = moe_inspect.compare(a.written(tmp_path / "a"), b.written(tmp_path / "b"))
    found = [f for f in made.verdict() if f.kind in FAULTS[name].kinds and f.severity == "critical"]
    assert says in found[0].text
    assert "%" in found[0].text or found[0].kind == "zero_filled"


def test_replicas_are_named_before_the_models_are_called_different(
    a: Recording, tmp_path: Path
) -> None:
    b = FAULTS["physical ids of replicas"].b(a, np.random.default_rng(0))
    first, second = a.written(tmp_path / "a"), b.written(tmp_path / "b")
    for pair, name in (((first, second), "B"), ((second, first), "A")):
        text = moe_inspect.compare(*pair, side_by_side=True).verdict()[0].text
        assert text.startswith(f"The 18 ids of {name} are physical ids of 16 experts")
    other = replace(routed_text(9, T, L, 18, K), token_id=a.token_id, document=a.document)
    other = replace(other, position=a.position)
    made = moe_inspect.compare(first, other.written(tmp_path / "c"), side_by_side=True)
    assert made.verdict()[0].kind == "different_models"

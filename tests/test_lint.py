"""What routes tell without a reference: published bugs that are planted into recordings, each of
which must be found, and nothing in those that are right."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.linting.kinds import KINDS
from tests.conftest import ROOT, Cli
from tests.support.misrecorded import BUGS, Recording, foreign, linted, longest, read, routed_text
from tests.support.sweep import sample
from tests.support.synthetic import uniform_ids, write_trace

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


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_published_bug_is_found_and_nothing_beside_it(name: str) -> None:
    a, wrong = recording(name), dict[str, Any]()
    assert linted(a) == []
    for n, (bug, of) in enumerate(BUGS.items()):
        found = linted(of.b(a, np.random.default_rng([n, len(name)])))
        told = of.told(a)
        if {one.kind for one in found} != (of.kinds if told else set()):
            wrong[bug] = [one.kind for one in found]
        elif told and of.said not in found[0].text:
            wrong[bug] = found[0].text
    assert not wrong, "\n".join(f"{bug}: {said}" for bug, said in wrong.items())

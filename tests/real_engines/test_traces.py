"""The responses of a real engine, on a CPU, that examples/record_responses.py saves and imports,
against local traces of the same models: the same tokens, and the same experts of every decision."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from tests.conftest import ROOT
from tests.real_engines.models import POSITIONS
from tests.real_engines.server import ENGINES, SERVED, Served, serving

PLACE = ["document", "sequence", "position"]  # of a token


@pytest.fixture(scope="module", params=SERVED)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One server at a time."""
    engine, model = request.param
    with serving(engine, model, tmp_path_factory.mktemp("served")) as found:
        yield found


def tokens_of(trace: moe_inspect.Trace) -> pd.DataFrame:
    names = [*PLACE, "domain", "phase", "token_id"]
    tokens = trace.tokens()[names].astype({"domain": str, "phase": str})
    return tokens.sort_values(PLACE, ignore_index=True)


def experts_of(trace: moe_inspect.Trace) -> np.ndarray:
    """Of each decision, by token and layer: its experts in ascending order (an engine's slots are
    in none), [decisions, k]."""
    routing = trace.routing().merge(trace.tokens()[["token", *PLACE]], on="token")
    routing = routing.sort_values([*PLACE, "layer"])
    return np.sort(routing[[name for name in routing if name.startswith("expert_")]].to_numpy(), 1)


@pytest.mark.parametrize("generate", [0, 16])
def test_responses(
    generate: int,
    served: Served,
    corpus: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Documents beyond the model's positions are among them, split as in a local trace."""
    model = str(served.model)
    record = runpy.run_path(str(ROOT / "examples/record_responses.py"))["record"]
    trace = record(served.url, model, str(corpus), str(tmp_path / "t"), generate)
    local = moe_inspect.trace_model(
        model, tmp_path / "local", data=[str(corpus)], dtype="float32", generate=generate
    )
    tokens = tokens_of(trace)
    assert tokens.equals(tokens_of(local))
    assert (tokens.phase == "decode").sum() >= generate
    longest = tokens[tokens.phase == "prefill"].position.max() + 1
    assert longest == POSITIONS - max(generate + 3, 7)
    pair = experts_of(trace), experts_of(local)
    equal, total = int((pair[0] == pair[1]).all(1).sum()), len(pair[0])
    assert equal == total == trace.n_tokens * len(trace.routers)
    # the comparison can fail: shifted by one token, it does
    shifted = np.roll(pair[0], len(trace.routers), axis=0)
    assert (shifted == pair[1]).all(1).mean() < 0.9
    compared = moe_inspect.compare(local, trace)
    assert (compared.tables["agreement"].overlap == 1).all()
    run = f"{generate} tokens generated" if generate else "prompts"
    row = f"| {ENGINES[served.engine].name} {version(served.engine)} | {served.name} | {run} |"
    record_property(served.engine, f"{row} {trace.n_tokens:,} | {equal:,} of {total:,} |")

"""What is written once is what is used everywhere: the registered metrics, the thresholds and the
name of a router."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import update_wrapper
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import registry
from moe_inspect.comparison.compare import compare
from moe_inspect.public import report
from moe_inspect.reporting.charts.spec import draw_charts
from moe_inspect.reporting.render.matplotlib import draw
from moe_inspect.reporting.render.page import map_data
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.data import Thresholds
from moe_inspect.reporting.verdict.gate import check_gates, gate
from moe_inspect.simulate.cache import simulate_cache
from moe_inspect.simulate.placement.placement import simulate_placement
from moe_inspect.simulate.routing import simulate_routing
from moe_inspect.text import layer_label
from moe_inspect.trace.schema import Router
from tests.conftest import ROOT
from tests.support.planted import text_of
from tests.support.synthetic import encoder_decoder, uniform_ids, write_counts, write_trace


@pytest.fixture(scope="module")
def computed() -> tuple[dict[str, pd.DataFrame], dict[str, set[float]]]:
    """All tables of a report with logits and windows, and of a comparison, and what each registered
    metric returned meanwhile."""
    returned: dict[str, set[float]] = {name: set() for name in registry.metrics()}
    with pytest.MonkeyPatch.context() as patch:
        for name, m in registry.metrics().items():

            def told(*given: Any, of: Any = m.function, name: str = name, **settings: Any) -> Any:
                value = of(*given, **settings)
                returned[name].update(np.asarray(value, float).ravel().round(12).tolist())
                return value

            patch.setattr(importlib.import_module(m.function.__module__), name, told)
            update_wrapper(told, m.function)
            patch.setitem(registry.METRICS, name, replace(m, function=told))
        made = report(ROOT / "sample_traces" / "collapsed", top=0, window=3_000)
        made.prepare(made.tables)
        tables = dict(made.tables)
        pair = compare(*(ROOT / "sample_traces" / name for name in ("balanced", "collapsed")))
        tables |= {name: pair.tables[name] for name in ("agreement", "overall", "load_shift")}
    return tables, returned


@pytest.mark.parametrize("name", registry.metrics())
def test_the_number_in_the_table_is_the_one_that_the_registered_metric_computes(
    computed: tuple[dict[str, pd.DataFrame], dict[str, set[float]]], name: str
):
    tables, returned = computed
    m = registry.metrics()[name]
    values: Any = tables[m.table][m.column].astype(float).dropna()
    assert len(values)
    assert set(values.round(12)) <= returned[name]


def test_a_threshold_is_one_number_everywhere():
    defaults = Thresholds()
    assert (defaults.uneven, defaults.starved) == (bal.UNEVEN, bal.STARVED)


@pytest.mark.parametrize(("starved", "expected"), [(0.19, 0), (0.21, 1), (0.45, 2)])
def test_the_threshold_starved_is_that_of_the_table_the_gate_and_the_verdict(
    tmp_path: Path, starved: float, expected: int
):
    # load ratios 0.2 and 0.4
    load = 100 * np.array([[200, 400, 1_300, 1_100, 1_200, 1_200, 1_300, 1_300]])
    made = report(write_counts(tmp_path / "t", [load], 1), thresholds={"starved": starved})
    assert made.tables["balance"]["starved_experts"].tolist() == [expected]
    assert bool(check_gates(made, [gate("starved_experts=0", above=True)]).failed) == bool(expected)
    said = [f.text for f in made.verdict() if f.kind == "starved_experts"]
    experts, get = ("expert", "gets") if expected == 1 else ("experts", "get")
    under = f"{expected} {experts} in 1 router {get} under {starved:.0%} of the mean load."
    assert said == ([under] if expected else [])
    assert dict(made.facts())["threshold_starved"] == f"load_ratio < {starved:g}"


def test_a_simulation_of_routing_takes_a_threshold():
    trace = ROOT / "sample_traces/collapsed"
    said = simulate_routing(trace, layers=0, algorithms=["top-k"]).verdict
    assert any("(no expert gets 1.2x the mean load)" in sentence for sentence in said)
    said = simulate_routing(trace, layers=0, uneven=1.5).verdict
    assert any("balance every layer (no expert gets 2.5x the mean load)" in s for s in said)


@pytest.mark.parametrize(("uneven", "balances"), [(0.11, False), (0.12, True)])
def test_just_under_the_threshold_of_a_simulation_is_balanced(uneven: float, balances: bool):
    trace = ROOT / "sample_traces/untrained"
    said = simulate_routing(trace, layers=0, algorithms=["top-k"], uneven=uneven)
    advice: Any = said.tables["routing_algorithms"].set_index("algorithm")
    assert 0.11 < advice["max_vio_worst"]["top-k 2"] < 0.12  # the other two do not compute as much
    told = "\n".join(said.verdict)
    assert ("that balance every layer (no expert gets" in told) == balances
    assert ("no causal algorithm with the same compute balances" in told) != balances


def test_a_router_has_one_name(tmp_path: Path):
    def labels(*places: tuple[int, str]) -> list[str]:
        listed = [Router(layer, "", "", 8, 2, stack=stack) for layer, stack in places]
        return [layer_label(listed, r) for r in range(len(listed))]

    both = labels((0, "encoder"), (0, "decoder"), (1, "decoder"), (1, "decoder"))
    assert both == ["0 (encoder)", "0 (decoder)", "1/2 (decoder)", "1/3 (decoder)"]
    assert labels((0, ""), (3, ""), (3, "")) == ["0", "3/1", "3/2"]


def written(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def texts(made: Report) -> str:
    """Every text there is on a report: terminal, page, pictures, gates."""
    pictures = [text for chart in draw_charts(made)[0] for text in written(draw(chart))]
    data, _ = map_data(made)
    page = [f"layer {layer['label']}" for layer in data["layers"]]
    gates = check_gates(made, [gate("max_vio=-1", above=True)]).failed
    return "\n".join([text_of(made), *pictures, *page, *gates])


def test_two_stacks_are_named_alike_everywhere(tmp_path: Path):
    said = texts(report(encoder_decoder(tmp_path / "t")))
    for name in ("layer 0 (encoder)", "layer 0 (decoder): max_vio is", "Layer 0 (encoder)"):
        assert name in said
    for other in ("enc 0", "dec 0", "(router", "0/0", "0/1"):
        assert other not in said


def test_two_routers_of_a_layer_are_named_alike_everywhere(tmp_path: Path):
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 2_000, 8, 2) for _ in range(3)]
    ids[1][:, 0], ids[1][:, 1] = 3, 4 + ids[1][:, 1] % 4
    trace = write_trace(tmp_path / "t", ids, 8, layers=[0, 5, 5], document=np.arange(2_000) // 40)
    said = texts(report(trace))
    worst = "Layer 5/1 is the worst balanced"
    for name in ("layer 5/1: max_vio is", "layer 5/2", worst, "layer 0"):
        assert name in said
    assert "(router" not in said
    capacity, cache = simulate_routing(trace), simulate_cache(trace)
    assert "layer 5/1 would drop most" in capacity.verdict[0]
    assert any("(layer 5/1), which leaves" in s for s in capacity.verdict)
    assert any("layer 5/1, drop rate by position" in s for s in capacity.verdict)
    for simulated in (capacity, cache, simulate_placement(trace, gpus=2)):
        assert {"0", "5/1", "5/2"} <= set(written(simulated.plot()))


def test_a_simulation_of_routing_names_routers_too(tmp_path: Path):
    trace = encoder_decoder(tmp_path / "t")
    said = simulate_routing(trace, algorithms=["as recorded"]).verdict
    assert any(
        one.startswith("As recorded, layer 0 (encoder) is the least balanced") for one in said
    )

"""Charts of simulations are those of reports: the page and the pictures draw the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import Line, Points
from moe_inspect.simulate.cache import simulate_cache
from moe_inspect.simulate.capacity import simulate_capacity
from moe_inspect.simulate.placement.placement import simulate_placement
from moe_inspect.simulate.result import Simulation
from moe_inspect.trace.reader import Trace
from tests.support.synthetic import uniform_ids, write_trace
from tests.test_charts import overlapping

POLICIES = ("contiguous", "greedy", "eplb")


def skewed(root: Path, layers: int) -> Trace:
    """Expert 0 of each layer is chosen by half of the tokens."""
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 800, 8, 2) for _ in range(layers)]
    for of in ids:
        of[::2] = [0, 1]
    return write_trace(root, ids, 8, document=np.arange(800) // 40, batch_tokens=100)


def test_policies_that_lie_on_each_other_are_one_line_with_all_their_names(tmp_path: Path):
    simulated = simulate_placement(skewed(tmp_path / "t", 2), gpus=2, policies=POLICIES, window=100)
    assert simulated.chart is not None
    by_layer, by_window = simulated.chart.panels
    dots = [mark for mark in by_layer.marks if isinstance(mark, Points)]
    assert [mark.name for mark in dots] == list(POLICIES)
    assert len({float(mark.x[0]) for mark in dots}) == 3  # beside each other
    windows = simulated.tables["windows"].groupby(["policy", "window"])["max_over_mean"].mean()
    tie = np.allclose(windows["greedy"], windows["eplb"], rtol=1e-3)
    names = [mark.name for mark in by_window.marks if isinstance(mark, Line)]
    assert names == (["contiguous", "greedy = eplb"] if tie else list(POLICIES))
    assert tie


def test_many_layers_make_a_heatmap_and_every_chart_can_be_read(tmp_path: Path):
    trace = skewed(tmp_path / "t", 14)
    placed = simulate_placement(trace, gpus=2, policies=POLICIES, window=100)
    assert placed.chart is not None
    heatmap = placed.chart.panels[0].heatmap
    assert heatmap is not None
    assert heatmap.values.shape == (3, 14)
    for simulated in (placed, simulate_cache(trace), simulate_capacity(trace)):
        assert overlapping(simulated.plot()) == []
        made = simulated.page()
        assert "data-panel" in made
        assert "<img" not in made  # charts follow the theme, pictures do not
        again: dict[str, Any] = {}
        exec(simulated.python, again)
        for name, table in simulated.tables.items():
            assert table.equals(again["made"].tables[name])


def test_nothing_to_draw_is_said():
    with pytest.raises(MoeInspectError, match="has nothing to draw"):
        Simulation("x", {}, []).plot()


def test_the_python_of_a_simulation_names_the_trace_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    skewed(Path("t"), 2)
    by_place, by_name = simulate_cache("t", slots=[2]), simulate_cache(trace="t", slots=[2])
    expected = "import moe_inspect\n\nmade = moe_inspect.open_trace('t').simulate.cache(slots=[2])"
    assert by_place.python == by_name.python == expected
    assert str(tmp_path) not in by_place.page()

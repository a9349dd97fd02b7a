"""Numbers of simulations and comparisons that are sums over a trace's rows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from moe_inspect.simulate.decode import simulate_decode
from moe_inspect.simulate.routing import simulate_routing
from tests.support.generated import Kind, written
from tests.support.synthetic import write_counts
from tests.test_oracles_report import World, design_effect, floors_of, share

KIND = Kind(lengths=(19, 31, 9, 44, 27, 61, 12, 35, 22), empty=0.1, answers=0.3)


@cache
def world() -> World:
    return World(written(KIND))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_decode_step_is_of_one_position(phase: str) -> None:
    """Of the tokens generated, the n-th of each sequence; of prompts, the n-th of the sequence."""
    w, sizes = world(), (1, 2, 4)
    asked = None if phase == "decode" else phase  # of a trace with generated tokens it is theirs
    table = simulate_decode(w.root, batches=sizes, phase=asked).tables["decode"]
    used = w.tokens[w.tokens["phase"] == phase]
    nth = used.groupby("sequence").cumcount()
    of_position = [rows.index.to_numpy() for _, rows in used.groupby(nth)]
    for row in table.itertuples():
        chosen = w.routers[row.router].chosen
        starts = [range(0, len(of) - row.batch + 1, row.batch) for of in of_position]
        steps = [
            chosen[of[start : start + row.batch]].any(0).sum()
            for of, begins in zip(of_position, starts, strict=True)
            for start in begins  # none is begun in vain
        ]
        activation = chosen[used.index].mean(0)
        assert row.steps == len(steps)
        assert row.distinct_experts == pytest.approx(np.mean(steps))
        assert row.from_marginals == pytest.approx((1 - (1 - activation) ** row.batch).sum())
        each = activation.sum() * row.batch / np.mean(steps)
        assert row.tokens_per_expert == pytest.approx(each)


def test_a_generated_token_is_a_group_of_its_own_where_sequences_are_groups() -> None:
    w, factor = world(), 1.25
    made = simulate_routing(w.root, capacity_factors=[factor], group_tokens="sequence")
    by = w.tokens.groupby(["sequence", "batch"])
    group_T, tokens_G = by.ngroup().to_numpy(), by.size().to_numpy()
    for r in w.routers:
        load_GE = np.stack([r.chosen[group_T == g].sum(0) for g in range(len(tokens_G))])
        room_G = np.ceil(factor * tokens_G * r.k / r.E)
        dropped, total = np.maximum(load_GE - room_G[:, None], 0).sum(), load_GE.sum()
        assert not (load_GE > room_G[:, None])[tokens_G == 1].any()
        unused = 1 - (total - dropped) / (room_G.sum() * r.E)
        columns = ["groups", "dropped", "simulated_drop_rate", "unused_capacity"]
        expected = [len(tokens_G), dropped, dropped / total, unused]
        found = made.tables["capacity"].loc[r.index, columns]
        assert found.tolist() == pytest.approx(expected)


def test_the_floors_of_two_loads_pool_them(tmp_path: Path) -> None:
    w, loads = world(), [2 * np.roll(np.arange(40, 48), layer)[None] for layer in range(5)]
    counted = write_counts(tmp_path / "c", loads, 2, ["domain 0"])
    table = moe_inspect.compare(w.root, counted).tables["load_shift"]
    for r in w.routers:
        load_2E, effect = np.stack([r.load, loads[r.layer][0]]), max(1, design_effect(w, r))
        [floor] = floors_of(share(load_2E.sum(0)), load_2E.sum(1) / r.k, r.k, effect)
        found = table.loc[r.index, ["load_shift_floor", "jsd_bits_floor"]]
        assert found.tolist() == pytest.approx(floor)
        shift = np.abs(np.diff(share(load_2E), axis=0)).sum() / 2
        assert table["load_shift"][r.index] == pytest.approx(shift)

"""What the simulations say of their tables, just under and just over each threshold: on tables by
hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.simulate import cache as cache_text
from moe_inspect.simulate import capacity as capacity_text
from moe_inspect.simulate import decode as decode_text
from moe_inspect.simulate import routing as routing_text
from moe_inspect.simulate.capacity import simulate_capacity
from tests.conftest import ROOT

LABELS = {0: "0", 1: "1/1", 2: "1/2"}


def routed(
    *advice: tuple[str, float, float, float],
    recorded: float = 1.0,
    bias: float | None = None,
    held_out: bool = True,
) -> str:
    """advice: (algorithm, experts per token, worst max_vio, least mass kept) of others."""
    rows: list[dict[str, Any]] = [{"router": 1, "algorithm": "as recorded", "max_vio": recorded}]
    rows.append({"router": 0, "algorithm": "as recorded", "max_vio": 0.5})
    if bias is not None:
        of = {"max_vio_batch": 0.3, "mass_retained": 0.8, "agreement": 0.7}
        rows.append({"router": 1, "algorithm": "loss-free bias", "max_vio": bias, **of})
    names = ["algorithm", "experts_per_token", "max_vio_worst", "mass_retained_least"]
    told = pd.DataFrame(advice or [("top-k 2", 2, 1.0, 1.0)], columns=names)
    told["leaks_future"] = np.where(told["algorithm"] == "expert choice", "yes", "no")
    settings = {"uneven": 0.2, "experts_per_token": 2.0, "bias_held_out": held_out}
    tables = {"routing": pd.DataFrame(rows), "routing_algorithms": told}
    return " ".join(routing_text.verdict(tables, settings | {"scoring": ["softmax"]}, LABELS))


ROUTING = {
    "as recorded": (routed(), "As recorded, layer 1/1 is the least balanced: its busiest expert gets 2.00x the mean load over all tokens."),
    "a bias helps": (routed(bias=0.999), "a loss-free bias would bring layer 1/1 to 2.00x the mean load (1.30x per batch), keeping 80%"),
    "a bias does not": (routed(bias=1.0), "a loss-free bias would not even out layer 1/1: 2.00x the mean load"),
    "judged held out": (routed(bias=0.5), "on the half of the documents held out from fitting the bias."),
    "balanced": (routed(("hashed", 2, 0.1999, 0.5)), "that balance every layer (no expert gets 1.2x the mean load), hashed keeps the most probability mass: at least 50%"),
    "not balanced": (routed(("hashed", 2, 0.2, 0.5)), "no causal algorithm with the same compute balances every layer"),
    "computes as much": (routed(("x", 2.0099, 0.1, 0.5)), "x keeps the most"),
    "computes more": (routed(("x", 2.0101, 0.1, 0.9)), "no causal algorithm with the same compute"),
    "computes less": (routed(("x", 1.9899, 0.1, 0.9)), "no causal algorithm with the same compute"),
    "the most kept": (routed(("x", 2, 0.1, 0.51), ("y", 2, 0.15, 0.52)), "y keeps the most"),
    "not random": (routed(("random", 2, 0.0, 0.9)), "no causal algorithm with the same compute"),
    "not the future": (routed(("expert choice", 2, 0.0, 0.9)), "no causal algorithm with the same compute"),
    "leaks": (routed(("expert choice", 2, 0.0, 0.9)), "Not causal: expert choice ("),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUTING)
def test_routing(case: str):
    sentences, says = ROUTING[case]
    assert says in sentences


COMPUTES = [(1.005, ""), (1.0051, "; computes 1.01x as many experts per token")]


@pytest.mark.parametrize(("times", "says"), [*COMPUTES, (0.5, "; computes 0.5x as many")])
def test_compute(times: float, says: str):
    assert routing_text.added_compute(times).startswith(says)
    assert bool(routing_text.added_compute(times)) == bool(says)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ([0.3, 0.3], "Yes: in 2 of 2 layers the 2 busiest experts get at least 1.2x"),
        ([0.3, 0.2999], "In part: in 1 of 2 layers"),
        ([0.2999, 0.1], "No: in 0 of 2 layers"),
    ],
)
def test_a_hot_set(shares: list[float], says: str):
    once = pd.DataFrame({"hot_set_share": shares, "even_share": 0.25})
    assert says in cache_text.hot_set(once, 2)


@pytest.mark.parametrize(("even", "asks"), [(0.834, True), (0.832, False)])
def test_a_hot_set_of_nearly_all(even: float, asks: bool):
    sentences = cache_text.hot_set(pd.DataFrame({"hot_set_share": [1.0], "even_share": [even]}), 2)
    assert ("hold nearly all experts: simulate fewer slots" in sentences) == asks


def test_capacity_names_the_worst_router():
    made = simulate_capacity(ROOT / "sample_traces/collapsed", capacity_factors=[1.0])
    main, needed = (
        made.tables[name].set_index("router") for name in ("capacity", "capacity_needed")
    )
    r, most = main["simulated_drop_rate"].idxmax(), needed["capacity_factor"].idxmax()
    worst, across = main.loc[r], made.tables["capacity_tokens"].iloc[0]
    ends = made.tables["capacity_by_position"].set_index(["router", "position_in", "tenth"])
    expected = [
        f"layer {r} would drop most: {worst['simulated_drop_rate']:.1%} of its assignments; "
        f"{worst['tokens_hit']:.1%} of its tokens would lose an expert and "
        f"{worst['tokens_lost']:.1%} all",
        f"{across['hit_anywhere']:.1%} of tokens would lose an expert in at least one layer, and "
        f"{across['lost_anywhere']:.1%} all experts of a layer",
        "at most 1% of every layer's assignments takes a factor of "
        f"{needed['capacity_factor'][most]:.2f} (layer {most}), which leaves "
        f"{needed['unused_capacity'][most]:.0%}",
        *(
            f"layer {r}, drop rate by position in the {p}: first tenth {rate[r, p, 1]:.1%}, "
            f"last tenth {rate[r, p, 10]:.1%}."
            for rate in [ends["simulated_drop_rate"]]
            for p in ("document", "group")
        ),
    ]
    for sentence, said in zip(made.verdict, expected, strict=True):
        assert said in sentence
    nothing = {**made.tables, "capacity": main.reset_index().assign(simulated_drop_rate=np.nan)}
    assert capacity_text.verdict(nothing, dict(made.settings), {}) == [
        "Simulated: no router made an assignment, so nothing could be dropped."
    ]


def test_decode_says_what_it_has_steps_of():
    rows = [(1, 9, 2.0, 2.0, 0.25), (8, 9, 7.0, 7.5, 0.875), (32, 0, None, 8.0, None)]
    names = ["batch", "steps", "distinct_experts", "independent", "share_of_experts"]
    table = pd.DataFrame(rows, columns=names).assign(bytes_per_token=None)
    needed = pd.DataFrame({"reads_all_from": [24.0, 20.0], "compute_bound_from": np.nan})
    settings = {"decoded": True, "weight_bits": 16, "flops_per_byte": 300}
    sentences = decode_text.verdict({"decode": table, "batch_needed": needed}, settings, {})
    chance = "(25% of them; expected by chance: 2.0)."
    assert sentences[0] == f"1 sequence reads 2.0 experts per layer and step {chance}"
    assert sentences[2] == "No step of 32 sequences: the trace has too few at any position."
    saturated = "From 24 sequences on, a step reads 95% of the experts in use in every layer"
    assert sentences[3].startswith(saturated)
    assert len(sentences) == 5
    tables = {"decode": table, "batch_needed": needed.assign(compute_bound_from=[100.0, 300.0])}
    bound = decode_text.verdict(tables, settings, {})
    assert bound[4].startswith("Beyond about 200 sequences a larger batch stops helping")

"""Tables of the router's confidence and losses, of ESFT scores, and of the load over time.

W windows, E experts, D domains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import esft as scores
from moe_inspect.analysis.metrics import router as rt
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics import windows as win
from moe_inspect.reporting.tables.load import of_router, stacked, table

if TYPE_CHECKING:
    from moe_inspect.analysis.counting.counts import Counts
    from moe_inspect.reporting.report import Report

CAPACITY_FACTOR = 1.25  # of drop_rate
ROUTER = (
    "weight_mass",
    "weight_entropy_nats",
    "weight_margin",
    "logit_decisions",
    "aux_loss",
    "z_loss",
    "gate_entropy_nats",
    "top_k_mass",
    "top1_margin",
    "boundary_margin",
    "tie_rate",
)
DRIFT = (
    "windows",
    "total_variation",
    "total_variation_floor",
    "window_jsd_bits",
    "window_jsd_floor_bits",
    "first_to_last",
    "first_to_last_floor",
    "gpus",
    "balancedness_fresh",
    "balancedness_stale",
)


@table("weights", "logits", by_router=ROUTER)
def router(report: Report) -> pd.DataFrame:
    """A row a router: how sure it is, from the k gate weights and, where they are recorded, from
    all logits (NaN otherwise); the balancing losses that the logits give."""
    counts, rows = report.counts_for("weights", "logits"), []
    for r in report.selection.routers:
        of = counts.of[r]
        n, weighed = of.logit_decisions, of.weight_decisions
        row: dict[str, float] = {
            "layer": counts.routers[r].layer,
            "router": r,
            "logit_decisions": n,
        }
        if of.probability_sum_E is not None and n:
            row["aux_loss"] = rt.aux_loss(counts.load_E(r), of.probability_sum_E)
        row |= {
            "weight_mass": rt.weight_mass(of.weight_mass_sum, weighed),
            "weight_entropy_nats": rt.weight_entropy_nats(of.weight_entropy_sum, weighed),
            "weight_margin": rt.weight_margin(of.weight_margin_sum, weighed)
            if counts.routers[r].top_k > 1
            else np.nan,
            "z_loss": rt.z_loss(of.z_sum, n),
            "gate_entropy_nats": rt.gate_entropy_nats(of.entropy_sum, n),
            "top_k_mass": rt.top_k_mass(of.topk_mass_sum, n),
            "top1_margin": rt.top1_margin(of.top1_margin_sum, n),
            "boundary_margin": rt.boundary_margin(of.boundary_margin_sum, n),
            "tie_rate": rt.tie_rate(of.ties, n),
        }
        rows.append(row)
    frame = pd.DataFrame(rows, columns=["layer", "router", *ROUTER])
    return frame.astype({name: float for name in ROUTER if name != "logit_decisions"})


@table("esft")
def esft(report: Report) -> pd.DataFrame:
    """A row an expert in a domain: how much of the domain it takes, by tokens and by gate weight,
    with all tokens weighing alike and with all samples (sequences) doing so: the scores by which
    expert-specialised fine-tuning picks experts."""
    counts, parts = report.counts_for("esft"), []
    D = len(counts.domains)
    for r in report.selection.routers:
        of, assignments_DE = counts.of[r], counts.assignments_DE(r)
        nothing_DE = np.full(assignments_DE.shape, np.nan)
        samples_D = of.samples_D if of.samples_D is not None else np.zeros(D)
        weight_sum_DE = nothing_DE if of.weight_sum_DE is None else of.weight_sum_DE
        token_DE = nothing_DE if of.esft_token_DE is None else of.esft_token_DE
        gate_DE = (
            nothing_DE if of.esft_gate_DE is None or of.weight_sum_DE is None else of.esft_gate_DE
        )
        columns = {
            "domain": np.repeat(np.array(counts.domains, object), assignments_DE.shape[1]),
            "expert": np.tile(np.arange(assignments_DE.shape[1]), D),
            "token_score": scores.token_score(assignments_DE).reshape(-1),
            "gate_score": scores.gate_score(weight_sum_DE, counts.tokens_D_of(r)).reshape(-1),
            "token_score_by_sample": scores.token_score_by_sample(token_DE, samples_D).reshape(-1),
            "gate_score_by_sample": scores.gate_score_by_sample(gate_DE, samples_D).reshape(-1),
            "samples": np.repeat(samples_D.astype(np.int64), assignments_DE.shape[1]),
        }
        parts.append(of_router(report, r, columns))
    return stacked(parts)


@table("windows")
def windows(report: Report) -> pd.DataFrame:
    """A row a window of tokens, in the order of execution: its balance beside what chance gives so
    few tokens, how far its load is from the window before and how far chance would take it, and
    what a capacity of 1.25 times the mean would drop."""
    counts, parts = report.decisions("windows"), []
    for r in report.selection.routers:
        index_W, first_W, tokens_W, load_WE = _windows(counts, r)
        E, k = counts.routers[r].experts, counts.routers[r].top_k
        floors = _floors(counts, r, load_WE)
        there_W = load_WE.sum(1) > 0
        columns = {
            "window": index_W,
            "first_token": first_W,
            "tokens": tokens_W,
            "max_over_mean": bal.max_over_mean(load_WE),
            "busiest_expert": pd.array(np.where(there_W, bal.busiest_expert(load_WE), -1), "Int64"),
            "noise_floor": unc.noise_floors(
                load_WE.sum(1) / k, E, k
            ),  # null slots make no load, by chance or otherwise
            "total_variation": np.r_[np.nan, win.step_total_variation(load_WE)][: len(tokens_W)],
            "total_variation_floor": np.r_[np.nan, floors[0]][: len(tokens_W)],
            "jsd_bits": np.r_[np.nan, win.step_jsd_bits(load_WE)][: len(tokens_W)],
            "jsd_floor_bits": np.r_[np.nan, floors[1]][: len(tokens_W)],
            "drop_rate": win.drop_rate(load_WE, CAPACITY_FACTOR),
        }
        frame = of_router(report, r, columns)
        frame.loc[frame["busiest_expert"] < 0, "busiest_expert"] = pd.NA
        parts.append(frame)
    return stacked(parts)


@table("windows", by_router=DRIFT)
def drift(report: Report) -> pd.DataFrame:
    """A row a router: how far its load moves from a window to the next, beside what chance moves
    it, and what it costs those who place experts on GPUs by the window before. A last window under
    half the size is left out."""
    counts, rows = report.decisions("drift"), []
    for r in report.selection.routers:
        _, _, tokens_W, load_WE = _windows(counts, r)
        whole_W = 2 * tokens_W >= tokens_W.max(initial=0)
        load_WE = load_WE[whole_W]
        floors = _floors(counts, r, load_WE)
        ends = _floors(counts, r, load_WE[[0, -1]]) if len(load_WE) > 1 else floors
        gpus = min(
            win.RANKS, max(1, counts.routers[r].experts // 2)
        )  # with one expert to a GPU there is nothing to place
        rows.append(
            {
                "layer": counts.routers[r].layer,
                "router": r,
                "windows": len(load_WE),
                "total_variation": win.total_variation(load_WE),
                "total_variation_floor": _mean(floors[0]),
                "window_jsd_bits": win.window_jsd_bits(load_WE),
                "window_jsd_floor_bits": _mean(floors[1]),
                "first_to_last": win.first_to_last(load_WE),
                "first_to_last_floor": _mean(ends[0]),
                "gpus": gpus,
                "balancedness_fresh": win.balancedness_fresh(load_WE, gpus),
                "balancedness_stale": win.balancedness_stale(load_WE, gpus),
            }
        )
    return pd.DataFrame(rows, columns=["layer", "router", *DRIFT])


def _windows(counts: Counts, router: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """index, first token, tokens, load_WE of the windows in which the router saw any token."""
    listed = list(counts.windows(router))
    index_W, first_W, tokens_W = (np.array([w[i] for w in listed], np.int64) for i in range(3))
    return (
        index_W,
        first_W,
        tokens_W,
        np.array([w[3] for w in listed], np.int64).reshape(-1, counts.routers[router].experts),
    )


def _floors(counts: Counts, router: int, load_WE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    load_E, k = counts.load_E(router), counts.routers[router].top_k
    effect = unc.design_effect(
        counts.of[router].assignments_UE, counts.tokens_U_of(router), counts.domain_of_unit_U
    )
    share_E = load_E / max(load_E.sum(), 1)
    return win.step_floors(
        share_E, load_WE.sum(1) / k, k, max(1.0, effect) if effect == effect else 1.0
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")

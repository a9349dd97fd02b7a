"""Does the load change over time? Pure functions on the loads of windows of consecutive tokens.

W windows in the order of execution, E experts, k choices per token. Chance moves the load too:
every distance between windows has a floor, the distance expected of two windows of these sizes that
draw from the same distribution.
"""

from __future__ import annotations

import math

import numpy as np

from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.metrics.registry import metric
from moe_inspect.analysis.metrics.specialization import mutual_information_bits
from moe_inspect.analysis.metrics.uncertainty import effective_documents, residuals, student_p

FEWEST_WINDOWS = 8  # two in each quarter


def trend_p(load_WE: np.ndarray, assignments_UE: np.ndarray, strata_U: np.ndarray) -> np.ndarray:
    """Two-sided p-value of a trend in the share of each expert along the windows, by Student's t:
    Σ over windows of t·(load − total × share), t from −½ for the first token to ½ for the last one.
    Its variance under chance is that of the documents (units U) about the mean of their domain
    (strata). Not corrected for the number of experts. NaN with few windows. float64 [E]"""
    D = int(strata_U.max(initial=-1)) + 1
    if len(load_WE) < FEWEST_WINDOWS or len(strata_U) <= D:
        return np.full(assignments_UE.shape[1:], np.nan)
    total_W = load_WE.sum(1)
    at_W, share_E = _along(total_W), load_WE.sum(0) / total_W.sum()
    trend_E = at_W @ (load_WE - total_W[:, None] * share_E)
    of_one_E = (residuals(assignments_UE, strata_U) ** 2).sum(0) / assignments_UE.sum()
    error_E = np.sqrt(of_one_E * (at_W**2 @ total_W))
    degrees = max(effective_documents(assignments_UE.sum(1)) - D, 1)
    return 2 * student_p(np.abs(trend_E / nan_for_zero(error_E)), degrees)


def quarter_ratio(load_WE: np.ndarray) -> np.ndarray:
    """Load of each expert ÷ mean load, in the first quarter of the windows and in the last one.
    float64 [2, E]"""
    at_W = _along(load_WE.sum(1))
    ends_2E = np.stack([load_WE[at_W < -0.25].sum(0), load_WE[at_W > 0.25].sum(0)])
    return ends_2E / nan_for_zero(ends_2E.mean(1, keepdims=True))


def _along(total_W: np.ndarray) -> np.ndarray:
    """Where the middle of each window lies, from −½ to ½, by assignments."""
    end_W = np.cumsum(total_W)
    return (end_W - total_W / 2) / max(end_W[-1], 1) - 0.5


@metric("drift", ideal=0.0, range="0 to 1")
def total_variation(load_WE: np.ndarray) -> float:
    """½Σ|p − q| between the load shares of a window and the next, averaged over windows: the share
    of assignments that move. NaN with fewer than two windows."""
    return _mean(step_total_variation(load_WE))


@metric("drift", ideal=0.0, range="0 to 1", unit="bits")
def window_jsd_bits(load_WE: np.ndarray) -> float:
    """Jensen–Shannon divergence between the load shares of a window and the next, averaged over
    windows. NaN with fewer than two windows."""
    return _mean(step_jsd_bits(load_WE))


@metric("drift", ideal=0.0, range="0 to 1")
def first_to_last(load_WE: np.ndarray) -> float:
    """Total variation between the first window and the last: how far the load moves in total. NaN
    with fewer than two windows."""
    return _mean(step_total_variation(load_WE[[0, -1]])) if len(load_WE) > 1 else float("nan")


def step_total_variation(load_WE: np.ndarray) -> np.ndarray:
    """½Σ|p − q| of each window and the one before. [W − 1]; of load [W, …, E] [W − 1, …]"""
    share_WE = load_WE / nan_for_zero(load_WE.sum(-1))[..., None]
    return np.abs(np.diff(share_WE, axis=0)).sum(-1) / 2


def step_jsd_bits(load_WE: np.ndarray) -> np.ndarray:
    """Jensen–Shannon divergence of each window and the one before. [W − 1]"""
    share_WE = load_WE / nan_for_zero(load_WE.sum(1))[:, None]
    return mutual_information_bits(np.stack([share_WE[:-1], share_WE[1:]], axis=1))


def step_floors(
    share_E: np.ndarray, tokens_W: np.ndarray, k: int, effect: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Total variation and JSD expected of each window and the one before when both draw from
    share_E: the share of an expert in T tokens has variance a(1 − a)/(k²T), a = k·share, times the
    design effect of documents (`effect`). A second-order Gaussian approximation, for windows in
    which every expert has some load. [W − 1] each; of share_E […, E] and tokens_W [W, …]
    [W − 1, …]."""
    chosen_E = np.clip(k * share_E, 0, 1)
    inverse_W = effect * (1 / nan_for_zero(tokens_W[1:]) + 1 / nan_for_zero(tokens_W[:-1]))
    variance_WE = (chosen_E * (1 - chosen_E) / k**2) * inverse_W[..., None]
    total_variation_W = np.sqrt(2 / math.pi * variance_WE).sum(-1) / 2
    # JSD ≈ Σ (p − q)² / (8 p ln 2)
    there, nothing_WE = np.broadcast_to(share_E > 0, variance_WE.shape), np.zeros_like(variance_WE)
    relative_WE = np.divide(variance_WE, share_E, out=nothing_WE, where=there)
    return np.minimum(total_variation_W, 1), np.minimum(relative_WE.sum(-1) / (8 * math.log(2)), 1)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if len(values) and not np.isnan(values).all() else float("nan")

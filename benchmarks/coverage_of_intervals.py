"""How often do 95 % intervals hold the truth? Documents are drawn again and again from a known
distribution, and each statistic is asked for its interval; and how often none is given.

L routers, U documents, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.metrics import uncertainty as unc


@dataclass(frozen=True)
class Documents:
    """`taste`: standard deviation of a document's shares ÷ even share. `times`: the load of expert
    5 ÷ that of others. `spread`: of the logarithm of the documents' lengths."""

    U: int = 30
    E: int = 8
    K: int = 2
    tokens: int = 200
    taste: float = 0.3
    times: float = 1.0
    spread: float = 0.2

    @property
    def share_E(self) -> np.ndarray:
        weight_E = np.where(np.arange(self.E) == 5, self.times, 1.0)
        return weight_E / weight_E.sum()

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Assignments by document and expert. int64 [U, E]"""
        length_U = np.exp(rng.normal(0, self.spread, self.U))
        tokens_U = np.maximum(3, length_U / length_U.mean() * self.tokens).astype(int)
        share_UE = np.broadcast_to(self.share_E, (self.U, self.E))
        if self.taste:
            concentration = self.E / self.taste**2
            share_UE = np.stack([rng.dirichlet(concentration * of_E) for of_E in share_UE])
        return rng.multinomial(self.K * tokens_U, share_UE)


REGIMES = {
    "even, iid": Documents(taste=0),
    "even, iid, 64/8": Documents(E=64, K=8, taste=0),
    "even": Documents(),
    "even, 64/8": Documents(E=64, K=8),
    "x1.2": Documents(times=1.2),
    "x2": Documents(times=2),
    "x2, 64/8": Documents(E=64, K=8, times=2),
    "x2, heavy-tailed lengths": Documents(times=2, spread=1.5),
    "x2, 5 documents": Documents(U=5, times=2),
    "even, 6 documents, 64/8": Documents(U=6, E=64, K=8),
    "x2, 8 documents": Documents(U=8, times=2),
}

# the value of a sample, and its interval
Estimate = Callable[[Documents, np.random.Generator], tuple[float, float, float]]


def busiest(of: Documents, rng: np.random.Generator) -> tuple[float, float, float]:
    load_UE = of.drawn(rng)
    load_E = load_UE.sum(0)
    interval = unc.max_vio_interval(load_UE, np.zeros(of.U, np.int64))
    return float(load_E.max() / load_E.mean() - 1), *interval


def ratio(of: Documents, rng: np.random.Generator) -> tuple[float, float, float]:
    """The share of expert 5: as repetition and what an expert is worth, a ratio of
    sums over documents."""
    load_UE = of.drawn(rng)
    hits_U, of_U = load_UE[:, 5], load_UE.sum(1)
    weights_RU = unc.resample_weights(np.zeros(of.U, np.int64))
    return float(hits_U.sum() / of_U.sum()), *unc.ratio_interval(hits_U, of_U, weights_RU)


STATISTICS: dict[str, Estimate] = {"busiest": busiest, "ratio": ratio}


def coverage(statistic: str, regime: str, draws: int) -> tuple[float, float]:
    """The share of the intervals that hold the truth, of those that are given, and the share of the
    draws that have none."""
    of = REGIMES[regime]
    found = np.array([STATISTICS[statistic](of, np.random.default_rng([n])) for n in range(draws)])
    _, low_N, high_N = found.T
    truths = {"busiest": float(of.share_E.max() * of.E - 1), "ratio": float(of.share_E[5])}
    truth = truths[statistic]
    given_N = ~np.isnan(low_N)
    held = (low_N <= truth + 1e-9) & (truth - 1e-9 <= high_N)
    return float(held[given_N].mean()) if given_N.any() else np.nan, float(1 - given_N.mean())


def cases() -> list[tuple[str, str]]:
    """(statistic, regime)"""
    return [(statistic, name) for statistic in STATISTICS for name in REGIMES]

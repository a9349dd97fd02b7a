"""How much text it takes until every expert has had a minimum of tokens, from the documents seen.

P pairs of a router and an expert, U units (clusters of documents), R draws. A rate is the tokens
of an expert per token of text. Documents are a sample: the rates of rare experts are drawn towards
those of their router (empirical Bayes: a rate ÷ the mean of its router is Gamma distributed), with
an error that documents give, whose size is itself drawn, as few documents hardly tell it. Draws of
experts go together as the documents do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.metrics import uncertainty as unc

DRAWS = 200
EXACT = 24.0  # shape of a Gamma from which Wilson and Hilferty's quantile is used
LIKE_ALL = 8  # experts whose rates count as those of all routers, beside a router's own
LEAST_SPREAD = 0.01  # variance of the rates of a router's experts ÷ their mean, at least


@dataclass(frozen=True)
class Forecast:
    """needed_RP: tokens of this mixture until the expert has the minimum, in each draw: those of
    the trace and what has to follow; where it has the minimum already, those it took. seen_P:
    whether it has any token."""

    needed_RP: np.ndarray
    seen_P: np.ndarray

    @staticmethod
    def ends(values_R: np.ndarray) -> np.ndarray:
        """The 2.5th, 50th and 97.5th percentile."""
        return np.quantile(values_R, [0.025, 0.5, 0.975], axis=0, method="inverted_cdf")

    def of_pairs(self) -> np.ndarray:
        """float64 [3, P]: (low, middle, high) of the tokens needed. That an expert without a token
        is ever reached is not known: only the lower end is finite."""
        needed_3P = self.ends(self.needed_RP)
        needed_3P[1:, ~self.seen_P] = np.inf
        return needed_3P

    def until(self, share: float) -> tuple[float, float, float]:
        """(low, middle, high) of the tokens until so many of the experts have the minimum. Middle
        and high are infinite where that takes an expert which has no token yet."""
        P = len(self.seen_P)
        nth = int(np.ceil(share * P - 1e-9)) - 1
        low = self.ends(np.partition(self.needed_RP, nth, axis=1)[:, nth])[0]
        if nth >= self.seen_P.sum():
            return float(low), np.inf, np.inf
        of_seen_R = np.partition(self.needed_RP[:, self.seen_P], nth, axis=1)[:, nth]
        _, middle, high = self.ends(of_seen_R)
        return float(low), float(middle), float(high)

    def covered(self, tokens_N: np.ndarray) -> np.ndarray:
        """float64 [3, N]: the share of the experts that have the minimum after so many tokens, its
        interval and its middle; of experts without a token, only the upper end counts any."""
        P, found = len(self.seen_P), list[np.ndarray]()
        for of in (self.needed_RP[:, self.seen_P], self.needed_RP):
            sorted_RX = np.sort(of, axis=1)
            counts = [np.searchsorted(row, tokens_N, side="right") for row in sorted_RX]
            found.append(self.ends(np.array(counts) / P))
        return np.stack([found[0][0], found[0][1], found[1][2]])


def forecast(
    assignments: Sequence[np.ndarray],
    tokens_U: np.ndarray,
    strata_U: np.ndarray,
    minimum: int,
) -> Forecast | None:
    """assignments: int64 [U, E] of each router. strata_U: the domain of each unit; the mixture of
    domains is that of the units where each domain has FEWEST_DOCUMENTS of them. None with fewer
    than that in all, or a router without load."""
    load_P = np.concatenate([of_UE.sum(0) for of_UE in assignments]).astype(float)
    if len(tokens_U) < unc.FEWEST_DOCUMENTS or not all(of_UE.any() for of_UE in assignments):
        return None
    strata_U, tokens = unc.large_strata(strata_U), float(tokens_U.sum())
    mean_P = np.concatenate([np.full(of_UE.shape[1], of_UE.sum(0).mean()) for of_UE in assignments])
    residual_UP = np.concatenate([unc.residuals(of_UE, strata_U) for of_UE in assignments], axis=1)
    at_U = tokens_U > 0
    per_token_P = (residual_UP[at_U] ** 2 / tokens_U[at_U, None]).sum(0)
    rate_P = load_P / tokens
    beyond_P = per_token_P - rate_P * (1 - rate_P) * at_U.sum()
    scale_P = rate_P**2 * tokens
    # relative variance of a document's rate: each expert's own, drawn towards that of all
    common, pull = max(beyond_P.sum() / scale_P.sum(), 0.0), scale_P.mean()
    relative_P = np.maximum((beyond_P + common * pull) / (scale_P + pull), 0)
    documents = unc.effective_documents(tokens_U.astype(float))
    length = float((tokens_U.astype(float) ** 2).sum() / tokens)  # of the document of a token
    rng = np.random.default_rng([unc.SEED, len(tokens_U), len(load_P)])
    error_RP, luck_RP = (_together(residual_UP, rng) for _ in range(2))
    freedom = max(min(documents - len(np.unique(strata_U)), _directions(residual_UP)), 1.0)
    widened_R = freedom / rng.chisquare(freedom, DRAWS)
    needed_RP = np.empty((DRAWS, len(load_P)))
    router_P = np.repeat(np.arange(len(assignments)), [of_UE.shape[1] for of_UE in assignments])
    size_L = np.bincount(router_P)
    # variance of the rates of a router's experts ÷ their mean, drawn towards that of all routers
    apart_P = (load_P / mean_P - 1) ** 2
    apart_L = (np.bincount(router_P, apart_P) + LIKE_ALL * apart_P.mean()) / (size_L + LIKE_ALL)
    known_L = rng.chisquare(size_L + LIKE_ALL - 1, (DRAWS, len(size_L))) / (size_L + LIKE_ALL - 1)
    spread_P = np.ones(len(load_P))
    effect_P, more_P = np.ones(len(load_P)), np.maximum(minimum - load_P, 0)
    enough_P = load_P >= minimum
    for r in range(DRAWS):
        for _ in range(3):  # the error depends on the rate, and how far the rate is drawn on both
            shape_P = 1 / spread_P + load_P / effect_P
            scaled_P = shape_P / (1 / spread_P + mean_P / effect_P)
            true_P = scaled_P * mean_P / tokens
            effect_P = (np.maximum(1 - true_P, 0.1) + relative_P * true_P * length) * widened_R[r]
            noise_L = np.bincount(router_P, effect_P * scaled_P / mean_P) / size_L
            spread_P = np.maximum(apart_L / known_L[r] - noise_L, LEAST_SPREAD)[router_P]
        shape_P, per_P = 1 / spread_P + load_P / effect_P, 1 / spread_P + mean_P / effect_P
        drawn_P = gamma_quantile(shape_P, error_RP[r]) / per_P * mean_P / tokens
        missing_P = np.where(enough_P, float(minimum), more_P)
        waited_P = effect_P * gamma_quantile(missing_P / effect_P, luck_RP[r])
        # a token of text is at most one of an expert
        takes_P = np.maximum(waited_P / np.maximum(drawn_P, 1e-300), missing_P)
        needed_RP[r] = np.where(enough_P, np.minimum(takes_P, tokens), tokens + takes_P)
    return Forecast(needed_RP, load_P > 0)


def _directions(residual_UP: np.ndarray) -> float:
    """In how many directions documents differ, about: of six topics five, however many documents
    there are of each. (Σλ)² ÷ Σλ² of the eigenvalues of their covariance."""
    common_UU = residual_UP @ residual_UP.T
    return float(np.trace(common_UU) ** 2 / max((common_UU**2).sum(), 1e-300))


def _together(residual_UP: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Standard normal errors that go together as the documents' do, float64 [R, P]."""
    size_P = np.sqrt((residual_UP**2).sum(0))
    known_P = size_P > 0
    error_RP = rng.standard_normal((DRAWS, len(residual_UP))) @ (
        residual_UP / np.where(known_P, size_P, 1)
    )
    error_RP[:, ~known_P] = rng.standard_normal((DRAWS, int((~known_P).sum())))
    return error_RP


def gamma_quantile(shape: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The value of a Gamma distribution of scale 1 that is as far out as the standard normal
    `error` is."""
    shape = np.maximum(shape, 1e-9)
    cube = np.maximum(1 - 1 / (9 * shape) + error / (3 * np.sqrt(shape)), 0)
    value, small = shape * cube**3, shape < EXACT
    chance = np.clip(unc.special("ndtr")(error[small]), 1e-9, 1 - 1e-9)
    value[small] = unc.special("gammaincinv")(shape[small], chance)
    return value


def most_unseen(documents: int) -> float:
    """The largest share of documents that may use an expert which none of so many used, at 95 %:
    about 3 ÷ documents (the rule of three)."""
    return 1 - 0.05 ** (1 / documents)

"""Chance: noise floors, intervals over documents, evidence against chance.

T tokens, E experts, k choices per token, U units (clusters of documents), R repetitions. Tokens of
one document are not independent, so nothing here resamples tokens: intervals and nulls are over
documents. All seeds are fixed: the same trace gives the same report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from moe_inspect.analysis.metrics.balance import nan_for_zero

SEED = 20_240_815
RESAMPLES = 2_000
FEWEST_DOCUMENTS = 5  # that an interval over documents needs
FEW_TOKENS = 64  # up to which the noise of every number of tokens is simulated
RIVALS = 3.0  # errors below the busiest expert within which another may be the busiest
# probability that the lower end is too high, with several: the upper never is too low
BELOW = 0.035
SHARE, ANYWHERE = (0.0, 1.0), (-np.inf, np.inf)  # bounds of what an interval is of
GAUSSIAN_FROM = 500  # mean load from which the load is treated as Gaussian


def noise_floor(T: float, E: int, k: int, filled: float = 1.0) -> float:
    """The max_vio expected when each of T tokens picks k of E experts uniformly at random. NaN
    without tokens, 0 when k = E. `filled`: as `noise_of` takes it."""
    times, k = _as_picked(E, k, filled)
    return noise(max(round(T * times), 1) if T > 0 else 0, E, k)[0]


def _as_picked(E: int, k: int, filled: float) -> tuple[float, int]:
    """(times, k'): T tokens of which this share of slots is filled have the noise of `times` × T
    tokens that pick k' experts and leave none empty. Its variance goes with (1 − k/E) ÷ load, and
    with empty slots with (1 − (1 + (k − 1) · filled)/E) ÷ load."""
    if filled >= 1 or E == 1:
        return 1.0, k
    fewer = min(max(1, round(k * filled)), E - 1)
    return k / fewer * (E - fewer) / (E - 1 - (k - 1) * filled), fewer


@lru_cache(maxsize=4096)
def noise(T: int, E: int, k: int) -> tuple[float, float]:
    """Mean and standard deviation of the max_vio of T tokens that each pick k of E experts
    uniformly at random. NaN without tokens, 0 when k = E.

    Simulated exactly (`random_loads`). For a large mean load the loads are treated as Gaussian,
    with the covariance of distinct picks: variance kT/E·(1−k/E), correlation −1/(E−1)."""
    if T <= 0:
        return float("nan"), float("nan")
    if k >= E:
        return 0.0, 0.0
    mean_load = k * T / E
    if mean_load >= GAUSSIAN_FROM:
        mean, sd = _maximum(E)
        scale = float(np.sqrt((1 - k / E) / mean_load * E / (E - 1)))
        return mean * scale, sd * scale
    R = int(np.clip(300_000 // (E * (k + 1)), 200, 4_000))
    busiest_R = random_loads(T, E, k, R).max(1)
    return float(busiest_R.mean() / mean_load - 1), float(busiest_R.std() / mean_load)


def random_loads(T: int, E: int, k: int, R: int) -> np.ndarray:
    """The loads of T tokens that choose k of E experts at random, R times, at a cost that does not
    depend on T: for one expert after another, of the tokens that still have j picks among the e
    experts left, Binomial(·, j/e) pick this one. int64 [R, E]"""
    rng, load_RE = np.random.default_rng([SEED, T % 2**32, E, k]), np.zeros((R, E), np.int64)
    left_JR = np.zeros((k + 1, R), np.int64)
    left_JR[k] = T  # tokens by the number of picks they have left
    picks_J1 = np.arange(k + 1)[:, None]
    for e in range(E):
        took_JR = rng.binomial(left_JR, np.minimum(picks_J1 / (E - e), 1))
        load_RE[:, e] = took_JR.sum(0)
        left_JR -= took_JR
        left_JR[:-1] += took_JR[1:]
    return load_RE


@lru_cache(maxsize=64)
def _maximum(E: int) -> tuple[float, float]:
    """Mean and standard deviation of the largest of E standard normals."""
    draws = np.random.default_rng([SEED, E]).standard_normal((max(4_000, 400_000 // E), E))
    return float(draws.max(1).mean()), float(draws.max(1).std())


def noise_of(sizes: np.ndarray, E: int, k: int, filled: float = 1.0) -> np.ndarray:
    """`noise` for many numbers of tokens: of each up to FEW_TOKENS, beyond that at powers of 2 with
    interpolation between them; NaN for 0. `filled`: the share of slots that are not empty; a size
    is then assignments ÷ k. [N] → [2, N]"""
    times, k = _as_picked(E, k, filled)
    sizes = np.asarray(sizes, float) * times
    sizes = np.where(sizes > 0, np.maximum(sizes, 1), np.nan)
    if np.isnan(sizes).all() or k >= E:
        return np.stack([0 * sizes, 0 * sizes])
    few, more = sizes[sizes <= FEW_TOKENS], np.log2(sizes[sizes > FEW_TOKENS])
    around = [np.floor(few), np.ceil(few), 2 ** np.floor(more), 2 ** np.ceil(more)]
    grid: np.ndarray = np.unique(np.concatenate(around))
    found = np.array([noise(int(T), E, k) for T in grid])
    at, known = np.log(sizes), np.log(grid)
    means = np.exp(np.interp(at, known, np.log(found[:, 0])))
    return np.stack([means, np.interp(at, known, found[:, 1])])


def resample_weights(strata_U: np.ndarray, R: int = RESAMPLES) -> np.ndarray | None:
    """The weight of each unit in each of R resamples of the documents, within strata (domains),
    read-only. float64 [R, U]; None with fewer than FEWEST_DOCUMENTS units.

    n−1 of n units are drawn and scaled up, which keeps the variance unbiased at small n (Rao and Wu
    1988). If a domain has too few documents to resample alone, all are resampled together."""
    if len(strata_U) < FEWEST_DOCUMENTS:
        return None
    return _resampled(large_strata(strata_U).astype(np.int64).tobytes(), R)


def large_strata(strata_U: np.ndarray) -> np.ndarray:
    """The strata, or one of all units where a stratum has fewer than FEWEST_DOCUMENTS of them."""
    return strata_U if np.bincount(strata_U).min() >= FEWEST_DOCUMENTS else 0 * strata_U


@lru_cache(maxsize=2)  # most tables take those of all units, one those of each domain
def _resampled(strata: bytes, R: int) -> np.ndarray:
    strata_U = np.frombuffer(strata, np.int64)
    rng = np.random.default_rng([SEED, len(strata_U)])
    weights_RU = np.zeros((R, len(strata_U)))
    for stratum in np.unique(strata_U):
        members = np.flatnonzero(strata_U == stratum)
        n = len(members)
        weights_RU[:, members] = rng.multinomial(n - 1, np.full(n, 1 / n), size=R) * (n / (n - 1))
    weights_RU.flags.writeable = False
    return weights_RU


def residuals(assignments_UE: np.ndarray, strata_U: np.ndarray) -> np.ndarray:
    """What each document (unit) has of each expert beyond the share of its domain (stratum), scaled
    up as a document is part of the share that it is compared with. float64 [U, E]"""
    residual_UE = np.empty(assignments_UE.shape)
    for stratum in np.unique(strata_U):
        of = np.flatnonzero(strata_U == stratum)
        n_U1 = assignments_UE[of].sum(1, keepdims=True)
        total = max(n_U1.sum(), 1)
        beyond_UE = assignments_UE[of] - n_U1 * (assignments_UE[of].sum(0) / total)
        residual_UE[of] = beyond_UE / np.maximum(np.sqrt(1 - n_U1 / total), 1e-6)
    return residual_UE


def effective_documents(n_U: np.ndarray) -> float:
    """How many documents of one length tell as much as these: (Σn)² ÷ Σn² (Kish), of their
    assignments n; 0 without any."""
    return float(n_U.sum() ** 2.0 / max((n_U**2.0).sum(), 1))


def max_vio_interval(assignments_UE: np.ndarray, strata_U: np.ndarray) -> tuple[float, float]:
    """95 % interval of the max_vio of the texts that these documents are a sample of, whichever
    expert is their busiest. NaN with fewer than FEWEST_DOCUMENTS units, or no load.

    Logarithms of the load ratios, with the error that documents give, by Student's t with the
    effective number of documents. The upper end is that of the sample's busiest expert. The lower
    end is the highest of all that may be the busiest (those within RIVALS errors of it), each as
    much lower as their number demands (Šidák): the largest of a sample is larger than by itself."""
    (U, E), load_E = assignments_UE.shape, assignments_UE.sum(0)
    if U < FEWEST_DOCUMENTS or not load_E.any():
        return float("nan"), float("nan")
    strata_U, mean = large_strata(strata_U), load_E.sum() / E
    ratio_E = load_E / mean
    error_E = np.sqrt((residuals(assignments_UE, strata_U) ** 2).sum(0)) / mean
    documents = effective_documents(assignments_UE.sum(1)) - len(np.unique(strata_U))
    busiest = ratio_E.argmax()
    reach_E = RIVALS * np.hypot(error_E, error_E[busiest])
    rival_E = ratio_E >= ratio_E[busiest] - reach_E
    rivals = int(rival_E.sum())
    below = 0.025 if rivals == 1 else 1 - (1 - BELOW) ** (1 / rivals)
    t_low, t_high = special("stdtrit")(max(documents, 1), [1 - below, 0.975])
    relative_E = error_E / nan_for_zero(ratio_E)
    low = float(np.nanmax((ratio_E * np.exp(-t_low * relative_E))[rival_E]))  # NaN: without load
    return max(low, 1) - 1, float(ratio_E[busiest] * np.exp(t_high * relative_E[busiest])) - 1


def ratio_interval(
    hits_U: np.ndarray, of_U: np.ndarray, weights_RU: np.ndarray | None
) -> tuple[float, float]:
    """95 % interval of Σ hits ÷ Σ of. NaN without `weights_RU`, and where Σ of is 0."""
    if weights_RU is None or not of_U.sum():
        return float("nan"), float("nan")
    values_R = weights_RU @ hits_U / nan_for_zero(weights_RU @ of_U)
    is_share = ((hits_U >= 0) & (hits_U <= of_U)).all()
    low, high = interval(values_R, effective_documents(of_U), SHARE if is_share else ANYWHERE)
    return float(low), float(high)


def interval(
    values_R: np.ndarray, documents: float = np.inf, within: tuple[float, float] = ANYWHERE
) -> np.ndarray:
    """The middle 95 % of the values of R resamples, or of R rows of them; NaN where all are NaN. Of
    few documents, whose variance is known by themselves alone, it is as much wider as Student's t
    demands, within these bounds. float64 [2, …]"""
    if np.isnan(values_R).all():
        return np.full((2, *values_R.shape[1:]), np.nan)
    quantile = np.nanquantile if np.isnan(values_R).any() else np.quantile
    low, middle, high = quantile(values_R, [0.025, 0.5, 0.975], axis=0)
    wider = student(documents) / student(np.inf)
    return np.clip([middle - wider * (middle - low), middle + wider * (high - middle)], *within)


def special(name: str) -> Callable[..., np.ndarray]:
    """A function of scipy.special, which is slow to import."""
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    return getattr(special, name)


def student_p(t: np.ndarray, freedom: float) -> np.ndarray:
    """The probability that Student's t with so many degrees of freedom exceeds these."""
    return special("stdtr")(freedom, -t)


def student(documents: float) -> float:
    """The 97.5th percentile of Student's t of so many documents."""
    return float(special("stdtrit")(max(documents - 1, 1), 0.975))


def log10_tail(count: np.ndarray, expected: np.ndarray, most: np.ndarray) -> np.ndarray:
    """log₁₀ of the probability of a count at least as far from the expected one, of `most` trials:
    twice the binomial tail on its side, at most 1. The incomplete beta function extends the tail to
    real counts, such as counts ÷ design effect. Where the tail is too small for a float, its
    leading term times a geometric series is used: an upper bound that is close so far out. Arrays
    of one shape, 0 ≤ count ≤ most, 0 < expected ≤ most."""
    count, expected, most = (np.asarray(x, float) for x in (count, expected, most))
    more = count > expected
    p = np.clip(expected / most, 1e-15, 1 - 1e-12)
    # P(X ≥ n) = I_p(n, most − n + 1); P(X ≤ n) is the same formula for the failures
    hits, x = np.where(more, count, most - count), np.where(more, p, 1 - p)
    a, b = np.maximum(hits, 1e-9), np.maximum(most - hits, 0) + 1
    tail = special("betainc")(a, b, x)
    with np.errstate(divide="ignore"):
        leading = a * np.log(x) + b * np.log1p(-x) - np.log(a) - special("betaln")(a, b)
        leading -= np.log(np.maximum(1 - (a + b) * x / (a + 1), 1e-12))
        log_tail = np.where(tail > 1e-250, np.log(tail), leading)
    return np.minimum((log_tail + np.log(2)) / np.log(10), 0)


def signed_deviance(count: np.ndarray, expected: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Binomial deviance of counts of `most` trials: twice the log-likelihood of the count's own
    rate minus that of the expected one; negative where the count is below the expected one."""
    count, expected, most = (np.asarray(x, float) for x in (count, expected, most))
    missed, expected_missed = most - count, np.maximum(most - expected, 1e-12 * most)
    with np.errstate(divide="ignore", invalid="ignore"):
        hit = np.where(count > 0, count * np.log(count / expected), 0)
        miss = np.where(missed > 0, missed * np.log(missed / expected_missed), 0)
    return 2 * np.sign(count - expected) * np.maximum(hit + miss, 0)


def design_effect(assignments_UE: np.ndarray, tokens_U: np.ndarray, strata_U: np.ndarray) -> float:
    """How many times larger the variance of the load is because tokens come in documents: variance
    between documents ÷ variance of as many independent tokens, summed over experts. About 1 where
    documents do not matter; √ of it multiplies the noise floor. NaN with fewer than
    FEWEST_DOCUMENTS units."""
    if len(tokens_U) < FEWEST_DOCUMENTS or not assignments_UE.any():
        return float("nan")
    strata_U, T = large_strata(strata_U), tokens_U.sum()
    activation_E = assignments_UE.sum(0) / T
    residual_UE, between = assignments_UE - tokens_U[:, None] * activation_E, 0.0
    for stratum in np.unique(strata_U):
        of_stratum_UE = residual_UE[strata_U == stratum]
        n = len(of_stratum_UE)
        between += float(((of_stratum_UE - of_stratum_UE.mean(0)) ** 2).sum()) * n / (n - 1)
    independent = float((activation_E * (1 - activation_E)).sum()) * T
    return between / independent if independent > 0 else float("nan")

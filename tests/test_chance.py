"""Sentences against chance: the nulls over documents hold their level, reports on routing by chance
alone claim nothing, and noise floors are what chance gives."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.calibration_of_findings import claims
from benchmarks.coverage_of_intervals import coverage
from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.reporting.report import report
from tests.support.chance import REGIMES, drawn
from tests.support.synthetic import uniform_ids

TRIES, L, E, K, U, D = 150, 3, 8, 2, 24, 3
CLAIMS = ("busiest", "least used", "domain information", "overload")


def loads(rng: np.random.Generator, taste: float, tokens_U: np.ndarray) -> np.ndarray:
    """Counts of L routers by document and expert, [L, U, E]: documents with tastes of their own."""
    share_LUE = rng.dirichlet(np.full(E, 1 / taste**2), (L, len(tokens_U)))
    return np.stack([rng.multinomial(K * tokens_U, of_UE) for of_UE in share_LUE])


@pytest.fixture(scope="module")
def p_values() -> dict[str, np.ndarray]:
    """The smallest p-value of all routers, over many draws of documents by chance alone, the
    documents of the first domain 20 times as short."""
    rng, found = np.random.default_rng(0), []
    domain_U = np.arange(U) % D
    tokens_U = np.where(domain_U == 0, 20, 400)
    for _ in range(TRIES):
        of_LUE = loads(rng, 0.3, tokens_U)
        sums = [np.stack([c[domain_U == d].sum(0) for d in range(D)]) for c in of_LUE]
        above, below = zip(*(chance.evenness_nulls(c, domain_U) for c in of_LUE), strict=True)
        lacking = [1 - c.sum(0).min() / c.sum(0).mean() for c in of_LUE]
        bits = [sp.domain_mi_bits(of) for of in sums]
        overload = min(chance.overload_p(c, domain_U).min() for c in of_LUE) * L * D * E
        of_nulls = [
            (excess(of_LUE), above),
            (lacking, below),
            (bits, [sp.domain_mi_null(c, domain_U) for c in of_LUE]),
        ]
        found.append((*(chance.joint_p(*of).min() for of in of_nulls), overload))
    return dict(zip(CLAIMS, np.array(found).T, strict=True))


def excess(of_LUE: Iterable[np.ndarray]) -> list[float]:
    return [c.sum(0).max() / c.sum(0).mean() - 1 for c in of_LUE]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_p_value_is_as_rare_as_it_says(p_values: dict[str, np.ndarray], name: str):
    """Of 150 draws, 1 % are 1.5: 6 or more have a probability of 0.004; 10 % are 15, of 26 or more
    0.004."""
    assert (p_values[name] < 0.01).sum() < 6
    assert (p_values[name] < 0.1).sum() < 26


def test_many_units_are_judged_as_few():
    """More units than signs are drawn for are added up: the null stays as wide."""
    rng = np.random.default_rng(2)
    of_UE = rng.multinomial(20, np.full(E, 1 / E), 3 * chance.MOST_UNITS)
    wide, narrow = (
        chance.evenness_nulls(of, np.zeros(len(of), np.int64))[0].mean()
        for of in (of_UE, of_UE.reshape(3, -1, E).sum(0))
    )
    assert wide == pytest.approx(narrow, rel=0.02)


def test_the_token_id_is_judged_within_documents():
    """One shuffle, with the variance of independent tokens, as of long traces. Documents with a
    taste and words of their own: shuffled across documents their ids would seem to decide."""
    small = {"within": 0, "across": 0}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        document_T = np.repeat(np.arange(60), rng.integers(50, 150, 60))
        T = len(document_T)
        word_T = rng.integers(0, 4, T) + 4 * document_T
        expert_T = (rng.normal(0, 1, (60, E))[document_T] + rng.gumbel(size=(T, E))).argmax(1)

        def share(word_T: np.ndarray, expert_T: np.ndarray = expert_T) -> float:
            first_VE = np.bincount(word_T * E + expert_T, minlength=4 * 60 * E).reshape(-1, E)
            return sp.vocabulary_specialization(first_VE)

        orders = {"within": chance.shuffled_within(document_T, rng), "across": rng.permutation(T)}
        for name, order_T in orders.items():
            p = chance.shuffled_p(share(word_T), [share(word_T[order_T])], T)
            small[name] += p < 0.1
    assert small["within"] <= 8  # of 40, 10 % are 4, of 9 or more 0.02
    assert small["across"] == 40  # positive control


@pytest.mark.parametrize("statistic", ["busiest", "ratio"])
def test_intervals_hold_the_truth(statistic: str):
    """95 of 100 in the long run: 86 or fewer have a probability of 0.0003."""
    for regime in ("even, iid", "x2", "x2, heavy-tailed lengths", "x2, 5 documents"):
        held, none = coverage(statistic, regime, 100)
        assert (held >= 0.87, none) == (True, 0), (regime, held)


CHEAP = [
    *("lengths by domain", "500 tokens", "passes of 3", "clustered 8/2", "clustered 64/8"),
    *("6 documents", "two domains of five", "ids by document", "counts, clustered 64/8"),
]


def test_reports_on_chance_hardly_ever_claim_anything(tmp_path: Path):
    """Of 18 reports, 5 % are 0.9; 4 or more have a probability of 0.01."""
    claimed = {
        (name, seed): claims(
            report(drawn(tmp_path / f"{name}{seed}", REGIMES[name], seed)).verdict()
        )
        for name in CHEAP
        for seed in range(2)
    }
    assert sum(map(bool, claimed.values())) < 4, claimed


def test_a_large_table_has_fewer_draws_of_the_same_signs() -> None:
    few, fewer, all_ = (chance.signs_of(40, cells) for cells in (2**14, 2**16, 2**10))
    assert (len(few), len(fewer), len(all_)) == (199, 101, chance.SIGNS)
    assert (few == all_[: len(few)]).all()
    assert 1 / (1 + len(fewer)) < chance.ALPHA  # so many can tell
    nulls = [signs.sum(1) for signs in (few, all_)]  # of routers with other numbers of experts
    p = chance.joint_p([50.0, 0.0], nulls)
    assert p[0] < chance.ALPHA < 0.5 < p[1]


# --- noise floors

FLOORS = {  # of 256, 1,024, 4,096 and 16,384 tokens
    (8, 2): (1.15, 1.08, 1.04, 1.02),
    (64, 8): (1.41, 1.20, 1.10, 1.05),
    (256, 8): (2.13, 1.52, 1.26, 1.13),
}


@pytest.mark.parametrize(("E", "k"), FLOORS)
def test_noise_floor_is_the_published_one(E: int, k: int):
    floors = [1 + unc.noise_floor(256 * 4**n, E, k) for n in range(4)]
    assert floors == pytest.approx(FLOORS[E, k], abs=0.02 + 0.01 * (E == 256))


def test_noise_floors_known_without_drawing():
    assert [unc.noise_floor(100, 8, 8), unc.noise_floor(1, 8, 2)] == [0, 3]
    assert np.isnan(unc.noise_floor(0, 8, 2))
    T = 64 * unc.GAUSSIAN_FROM // 8  # from here on Gaussian
    assert unc.noise_floor(T - 1, 64, 8) == pytest.approx(unc.noise_floor(T, 64, 8), rel=0.05)


@pytest.mark.parametrize(
    ("T", "E", "k", "filled"),
    [(400, 4, 4, 0.5), (900, 8, 8, 0.97), (300, 32, 32, 0.1), (90, 8, 5, 0.6)],
)
def test_empty_slots_make_noise_also_where_every_expert_may_be_chosen(
    T: int, E: int, k: int, filled: float
):
    rng, drawn = np.random.default_rng(1), list[float]()
    for _ in range(1_500):
        load_E = np.bincount(uniform_ids(rng, T, E, k)[rng.random((T, k)) < filled], minlength=E)
        drawn.append(load_E.max() / load_E.mean() - 1)
    floors = unc.noise_floor(T * filled, E, k, filled), unc.noise_of([T * filled], E, k, filled)[0]
    assert floors == pytest.approx((np.mean(drawn),) * 2, rel=0.06)
    assert unc.noise_floor(T, E, k) == pytest.approx(0 if k == E else floors[0], rel=0.6), "control"


def test_the_gaussian_floor_by_hand():
    """Of two experts, one of them chosen by each token: E|2X/T − 1| is √(2/(πT))."""
    assert unc.noise_floor(2_000, 2, 1) == pytest.approx(np.sqrt(2 / (np.pi * 2_000)), rel=0.01)


def test_floors_between_simulated_sizes():
    sizes = np.array([1, 100, 300, 1_500])
    between = unc.noise_of(sizes, 64, 8)[0]
    assert between == pytest.approx([unc.noise_floor(int(T), 64, 8) for T in sizes], rel=0.05)

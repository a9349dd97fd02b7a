"""The formulas of docs/metrics.md and docs/simulate.md, written out once more in plain NumPy, give
the columns of the tables: on a trace with empty slots, documents of unequal length, one of which is
two sequences, and generated tokens.

T tokens, K slots, E experts, U documents, D domains, W windows, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.simulate.decode import simulate_decode
from moe_inspect.simulate.routing import simulate_routing
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter
from tests.support.synthetic import routers, write_counts

E, K, L, S, WINDOW = 6, 3, 2, 13, 40


@dataclass(frozen=True)
class Made:
    """What was written, in execution order. ids_TK: −1 where a slot is empty, as they then weigh
    0."""

    trace: Trace
    counted: Trace
    ids: list[np.ndarray]
    weights: list[np.ndarray]
    token_id: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    batch: np.ndarray
    generated: np.ndarray

    @cached_property
    def report(self) -> Any:
        return moe_inspect.report(self.trace, window=WINDOW, top=0)

    @cached_property
    def chosen(self) -> list[np.ndarray]:
        """float [T, E]: 1 where the token chose the expert."""
        return [(ids_TK[:, :, None] == np.arange(E)).sum(1).astype(float) for ids_TK in self.ids]

    def by(self, key_T: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.stack([values[key_T == key].sum(0) for key in np.unique(key_T)])

    @cached_property
    def window(self) -> np.ndarray:
        return np.arange(len(self.domain)) // WINDOW

    def windows(self, r: int) -> np.ndarray:
        return self.by(self.window, self.chosen[r])

    def whole_windows(self, r: int) -> np.ndarray:
        tokens_W = np.bincount(self.window)
        return self.windows(r)[2 * tokens_W >= tokens_W.max()]

    @cached_property
    def neighbours(self) -> np.ndarray:
        """Tokens in the order of their sequences, and whether each follows the one before."""
        by_T = np.lexsort((self.position, self.sequence))
        return np.stack([by_T, np.r_[False, np.diff(self.sequence[by_T]) == 0]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    rng = np.random.default_rng(5)
    prompt_S, answer_S = rng.integers(9, 32, S), rng.integers(0, 9, S)
    rows = []  # sequence, position, batch, generated
    for s in range(S):  # three prompts a pass
        rows += [(s, p, s // 3, 0) for p in range(prompt_S[s])]
    for step in range(answer_S.max()):
        going = np.flatnonzero(answer_S > step)
        rows += [(s, prompt_S[s] + step, (S + 2) // 3 + step, 1) for s in going]
    sequence, position, batch, generated = np.array(rows).T
    document, T = np.maximum(sequence - 1, 0), len(rows)
    ids, weights = [], []
    for _ in range(L):
        taste_UE = rng.gumbel(size=(S, E)) * 0.7
        order_TE = np.argsort(taste_UE[document] + rng.gumbel(size=(T, E)), axis=1)[:, ::-1]
        taken_T = np.where(rng.random(T) < 0.2, rng.integers(0, K, T), K)
        ids.append(np.where(np.arange(K) < taken_T[:, None], order_TE[:, :K], -1))
        weight_TK = np.sort(rng.integers(1, 64, (T, K)) / 64, axis=1)[:, ::-1]
        weights.append(np.where(ids[-1] >= 0, weight_TK, 0))
    token_id = rng.integers(0, 20, T)
    root = tmp_path_factory.mktemp("formulas")
    manifest = {"model": {"id": "synthetic"}, "capture": {"weights": True, "mode": "tap"}}
    with TraceWriter(root / "a", manifest, routers(L, E, K), weights=True) as writer:
        columns, names = (token_id, document, sequence, position, document % 2), ("even", "odd")
        for b in range(batch.max() + 1):
            at = batch == b
            decoded = generated[at].any()
            new = [] if decoded else [int(d) for d in np.unique(document[at]) if d or b == 0]
            writer.write(
                RoutedBatch(
                    b,
                    *(column[at].astype(np.int32) for column in columns),
                    names,
                    [np.where(x < 0, 255, x)[at].astype(np.uint8) for x in ids],
                    [x[at].astype(np.float32) for x in weights],
                    documents=[Document(d, names[d % 2], "", 9) for d in new],
                    phase="decode" if decoded else "prefill",
                )
            )
    loads = [rng.integers(40, 90, (2, E)) * K for _ in range(L)]
    counted = write_counts(root / "b", loads, K, names)
    trace = open_trace(root / "a")
    return Made(trace, counted, ids, weights, *columns, batch, generated.astype(bool))


# --- formulas


def share(load: np.ndarray) -> np.ndarray:
    return load / load.sum(-1, keepdims=True)


def design_effect(m: Made, r: int) -> float:
    load_UE, tokens_U = m.by(m.document, m.chosen[r]), np.bincount(m.document)
    activation_E = load_UE.sum(0) / tokens_U.sum()
    beyond_UE = load_UE - tokens_U[:, None] * activation_E
    between = sum(len(of) * of.var(0, ddof=1).sum() for of in (beyond_UE[::2], beyond_UE[1::2]))
    return between / (tokens_U.sum() * (activation_E * (1 - activation_E)).sum())


def floors(share_E: np.ndarray, tokens_W: np.ndarray, effect: float) -> list[tuple[float, float]]:
    """Total variation and JSD of each window and the one before."""
    chosen_E, found = np.minimum(K * share_E, 1), []
    for before, after in pairwise(tokens_W):
        spread_E = max(effect, 1) * chosen_E * (1 - chosen_E) / K**2 * (1 / before + 1 / after)
        tv = np.sqrt(2 * spread_E / math.pi).sum() / 2
        found.append((min(tv, 1), min((spread_E / share_E).sum() / (8 * math.log(2)), 1)))
    return found


def drift_floors(m: Made, r: int, load_WE: np.ndarray) -> np.ndarray:
    of_all = floors(share(m.chosen[r].sum(0)), load_WE.sum(1) / K, design_effect(m, r))
    return np.array(of_all).reshape(-1, 2)


def whole_floors(m: Made, r: int) -> np.ndarray:
    return drift_floors(m, r, m.whole_windows(r)).mean(0)


def total_variation(load_WE: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(share(load_WE), axis=0)).sum(1) / 2


def chance(m: Made, r: int, tokens: float) -> float:
    """max_vio of tokens that choose at random, and leave slots empty as often as these; so many are
    the assignments ÷ K."""
    return chance_of(round(tokens), float((m.ids[r] >= 0).mean()))


@cache
def chance_of(tokens: int, filled: float) -> float:
    rng, shape = np.random.default_rng(tokens), (1_000, round(tokens / filled), E)
    order = np.where(
        rng.random(shape)[:, :, :K] < filled, rng.random(shape).argsort(2)[:, :, :K], -1
    )
    load = np.stack([(order == e).sum((1, 2)) for e in range(E)])
    return float((load.max(0) / load.mean(0)).mean() - 1)


def batches(m: Made, r: int) -> tuple[float, float]:
    """Mean max_vio of the passes of at least half the tokens of the largest, and its floor."""
    tokens_B, load_BE = np.bincount(m.batch), m.by(m.batch, m.chosen[r])
    whole = 2 * tokens_B >= tokens_B.max()
    filled = (m.ids[r] >= 0).mean()
    vio = (load_BE.max(1) / load_BE.mean(1) - 1)[whole].mean()
    return vio, float(np.mean([chance(m, r, n * filled) for n in tokens_B[whole]]))


def by_domain(m: Made, values_TE: np.ndarray) -> np.ndarray:
    """Mean over a domain's tokens. [D, E]"""
    return m.by(m.domain, values_TE) / np.bincount(m.domain)[:, None]


def repeated(m: Made, r: int) -> np.ndarray:
    """Share of a domain's pairs of consecutive tokens that choose alike. [D]"""
    by_T, follows_T = m.neighbours
    alike = np.zeros((2, 2))
    for before, after, follows in zip(by_T, by_T[1:], follows_T[1:], strict=False):
        a, b = ([x for x in m.ids[r][t] if x >= 0] for t in (before, after))
        same = bool(a and b and a[0] == b[0])
        alike[m.domain[after]] += (same and follows, follows)
    return alike[:, 0] / alike[:, 1]


def frequent(m: Made, r: int) -> float:
    """Σ over token ids that occur 8 times or more of the favourite's count ÷ that of all counts."""
    best = of = 0.0
    for token_id in np.flatnonzero(np.bincount(m.token_id) >= 8):
        at = m.token_id == token_id
        firsts = m.ids[r][at, 0]
        count_E = np.bincount(firsts[firsts >= 0], minlength=E)
        best, of = best + count_E.max(), of + count_E.sum()
    return best / of


def domain_mi_bits(m: Made, r: int) -> float:
    share_DE = share(m.by(m.domain, m.chosen[r]))
    return float((share_DE * np.log2(share_DE / share_DE.mean(0))).sum(1).mean())


def confidence(m: Made, r: int) -> np.ndarray:
    """Mass, entropy in nats and margin of the weights of tokens that have any."""
    weight_NK = m.weights[r][m.weights[r].sum(1) > 0]
    p = share(weight_NK)
    nats = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    return np.array([weight_NK.sum(1).mean(), nats.mean(), (p[:, 0] - p[:, 1]).mean()])


def first(values: np.ndarray) -> np.ndarray:
    """The first window has none before it."""
    return np.r_[np.nan, values]


# by column; the rows of a router after those of the one before
EXACT: dict[str, Callable[[Made, int], Any]] = {
    "balance.assignments": lambda m, r: m.chosen[r].sum(),
    "balance.tokens": lambda m, r: len(m.domain),
    "balance.max_vio_batch": lambda m, r: batches(m, r)[0],
    "balance.design_effect": design_effect,
    "load.share": lambda m, r: share(m.chosen[r].sum(0)),
    "domains.activation": lambda m, r: by_domain(m, m.chosen[r]),
    "domains.lift": lambda m, r: 2 * share(by_domain(m, m.chosen[r]).T).T,  # of two domains
    "specialization.domain_mi_bits": domain_mi_bits,
    "specialization.vocabulary_specialization": frequent,
    "repetition.first_choice": lambda m, r: repeated(m, r),
    "router.weight_mass": lambda m, r: confidence(m, r)[0],
    "router.weight_entropy_nats": lambda m, r: confidence(m, r)[1],
    "router.weight_margin": lambda m, r: confidence(m, r)[2],
    "windows.total_variation": lambda m, r: first(total_variation(m.windows(r))),
    "windows.total_variation_floor": lambda m, r: first(drift_floors(m, r, m.windows(r))[:, 0]),
    "windows.jsd_floor_bits": lambda m, r: first(drift_floors(m, r, m.windows(r))[:, 1]),
    "drift.total_variation": lambda m, r: total_variation(m.whole_windows(r)).mean(),
    "drift.total_variation_floor": lambda m, r: whole_floors(m, r)[0],
    "drift.first_to_last_floor": lambda m, r: drift_floors(m, r, m.whole_windows(r)[[0, -1]])[0, 0],
}


@pytest.mark.parametrize("column", EXACT)
def test_a_column_is_what_its_formula_gives(column: str, made: Made) -> None:
    table, name = column.split(".")
    found = made.report.tables.complete(table)[name].to_numpy(float)
    expected = np.concatenate([np.ravel(EXACT[column](made, r)) for r in range(L)])
    assert found == pytest.approx(expected.astype(float), nan_ok=True, rel=1e-5)
    assert np.isfinite(found).any()


@pytest.mark.parametrize("table", ["coactivation", "transitions"])
def test_pairs_leave_out_empty_slots(table: str, made: Made) -> None:
    rows = made.report.tables[table]
    for r, of in rows.groupby("router"):
        here, there = made.chosen[r], made.chosen[r if table == "coactivation" else 1]
        count_EE = here.T @ there
        pairs = of["expert"], of["other" if table == "coactivation" else "next_expert"]
        assert of["together"].to_numpy() == pytest.approx(count_EE[pairs])
        assert of["probability"].to_numpy() == pytest.approx(
            (count_EE / here.sum(0)[:, None])[pairs]
        )
        if table == "transitions":
            expected_EE = np.outer(count_EE.sum(1), count_EE.sum(0)) / count_EE.sum()
            assert of["expected"].to_numpy() == pytest.approx(expected_EE[pairs])
            lift_EE = share(count_EE) / share(count_EE.sum(0))
            assert of["lift"].to_numpy() == pytest.approx(lift_EE[pairs])
        else:  # the sums of expected pairs are those of the pairs counted
            chance_E = of.groupby("expert")["chance"].sum().to_numpy()
            np.fill_diagonal(count_EE, 0)
            assert chance_E * here.sum(0) == pytest.approx(count_EE.sum(1))


def test_what_chance_gives_the_busiest_expert_leaves_out_empty_slots(made: Made) -> None:
    names = ("balance", "windows", "domains")
    balance, windows, domains = map(made.report.tables.complete, names)
    for r in range(L):
        expected, by_pass = balance.loc[r, ["expected_by_chance", "noise_floor_batch"]]
        widened = max(1, math.sqrt(design_effect(made, r)))
        floor = chance(made, r, made.chosen[r].sum() / K)
        assert expected - 1 == pytest.approx(floor * widened, rel=0.04)
        assert by_pass == pytest.approx(batches(made, r)[1], rel=0.04)
        of_windows = [chance(made, r, x.sum() / K) * widened for x in made.windows(r)]
        found = windows.query("router == @r")["expected_by_chance"].to_numpy()
        assert found - 1 == pytest.approx(of_windows, rel=0.06)
        of_domains = [
            chance(made, r, x / K) * widened for x in made.by(made.domain, made.chosen[r]).sum(1)
        ]
        found = domains.query("router == @r and expert == 0")["expected_by_chance"].to_numpy()
        assert found - 1 == pytest.approx(of_domains, rel=0.06)


def test_the_floors_of_two_loads_pool_them(made: Made) -> None:
    table: Any = moe_inspect.compare(made.trace, made.counted).tables["load_shift"]
    for r in range(L):
        counted = moe_inspect.report(made.counted).tables["load"].query("router == @r")
        load_2E = np.stack([made.chosen[r].sum(0), counted["assignments"]])
        [floor] = floors(share(load_2E.sum(0)), load_2E.sum(1) / K, design_effect(made, r))
        assert table.loc[r, ["load_shift_floor", "jsd_bits_floor"]].tolist() == pytest.approx(floor)
        assert table["load_shift"][r] == pytest.approx(total_variation(load_2E)[0])


def test_floors_are_at_most_one(made: Made) -> None:
    many = moe_inspect.report(made.trace, window=1).tables["windows"]
    assert many["jsd_floor_bits"].max() == 1
    assert many["total_variation_floor"].max() <= 1


# --- simulations


@pytest.mark.parametrize("phase", [None, "prefill"])
def test_a_decode_step_is_of_one_position(made: Made, phase: str | None) -> None:
    """Of the tokens generated, the n-th of each sequence; of prompts, the n-th of the sequence."""
    used = made.generated if phase is None else ~made.generated
    sizes = (1, 2, 5)
    table = simulate_decode(made.trace, batches=sizes, phase=phase).tables["decode"]
    nth = np.array([(used & (made.sequence == s))[:t].sum() for t, s in enumerate(made.sequence)])
    of_position = [np.flatnonzero(used & (nth == n)) for n in range(nth[used].max() + 1)]
    for row in table.itertuples():
        steps = [
            made.chosen[row.router][tokens[at : at + row.batch]].any(0).sum()
            for tokens in of_position
            for at in range(0, len(tokens) - row.batch + 1, row.batch)  # none is begun in vain
        ]
        activation_E = made.chosen[row.router][used].mean(0)
        assert row.steps == len(steps)
        assert row.distinct_experts == pytest.approx(np.mean(steps))
        assert row.from_marginals == pytest.approx((1 - (1 - activation_E) ** row.batch).sum())
        each = activation_E.sum() * row.batch / np.mean(steps)
        assert row.tokens_per_expert == pytest.approx(each)


def test_a_generated_token_is_a_group_of_its_own_where_sequences_are_groups(made: Made) -> None:
    factor, group_T = 1.25, made.sequence * 1_000 + made.batch
    simulated = simulate_routing(made.trace, capacity_factors=[factor], group_tokens="sequence")
    table, tokens_G = simulated.tables["capacity"], np.unique(group_T, return_counts=True)[1]
    for r in range(L):
        load_GE = made.by(group_T, made.chosen[r])
        room_G = np.ceil(factor * tokens_G * K / E)
        dropped = np.maximum(load_GE - room_G[:, None], 0).sum()
        assert len(tokens_G) == S + made.generated.sum()
        assert not (load_GE > room_G[:, None])[tokens_G == 1].any()
        made_r = made.chosen[r].sum()
        unused = 1 - (made_r - dropped) / (room_G.sum() * E)
        columns = ["groups", "dropped", "simulated_drop_rate", "unused_capacity"]
        expected = [len(tokens_G), dropped, dropped / made_r, unused]
        assert table.loc[r, columns].tolist() == pytest.approx(expected)


def test_the_trace_holds_what_the_formulas_are_about(made: Made) -> None:
    assert all((ids_TK < 0).all(1).any() for ids_TK in made.ids)  # tokens that routed nowhere
    assert len(set(np.bincount(made.document))) > 3
    assert len(made.whole_windows(0)) < len(made.windows(0))
    assert all(design_effect(made, r) > 1.2 for r in range(L))

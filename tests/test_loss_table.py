"""The table `loss`: against pandas; an expert that is planted to serve hard tokens is found, and no
other, whether documents are hard or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.analysis.counting.samples import SampledLosses
from moe_inspect.analysis.losses import CellLosses, ExpertLosses, add_p, by_expert
from moe_inspect.trace.schema import LOSS
from moe_inspect.trace.writer import Document
from tests.support.synthetic import a_pass, routers, write_passes


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> moe_inspect.Trace:
    out = tmp_path_factory.mktemp("loss") / "t"
    return moe_inspect.trace_model("demo", out, max_tokens=3000, generate=6, token_loss=True)


def test_it_is_what_pandas_computes(traced: moe_inspect.Trace) -> None:
    table: Any = moe_inspect.report(traced).tables["loss"]
    tokens: Any = traced.tokens().dropna(subset=["loss_nats"]).astype({"loss_nats": float})
    cell = tokens.groupby(["domain", "phase", "token_id"], observed=True)["loss_nats"]
    others = cell.transform("size") - 1
    of_others = (cell.transform("sum") - tokens["loss_nats"]) / others
    tokens["residual"] = (tokens["loss_nats"] - of_others).where(others > 0, 0)
    tokens["others"] = others > 0
    slots = traced.routing().filter(regex="^(token|router|expert_.*)$")
    long = slots.melt(["token", "router"], value_name="expert").merge(tokens, on="token")
    for (domain, phase), of in table.groupby(["domain", "phase"], dropna=False):
        some = long if pd.isna(domain) else long[long["domain"] == domain]
        some = some if pd.isna(phase) else some[some["phase"] == phase]
        groups = some.groupby(["router", "expert"])
        want = pd.DataFrame(
            {
                "assignments": groups.size(),
                "mean_loss_nats": groups["loss_nats"].mean(),
                "mean_entropy_nats": groups["entropy_nats"].mean(),
                "compared": groups["others"].sum(),
                "difference_nats": groups["residual"].sum() / groups["others"].sum(),
            }
        )
        got = of[of["assignments"] > 0].set_index(["router", "expert"])
        assert len(got) == len(want) > 20
        np.testing.assert_allclose(got[want.columns], want.loc[got.index], rtol=1e-5, atol=1e-9)
    whole = table[table["domain"].isna() & table["phase"].isna()]
    assert len(whole) == 4 * 8
    assert whole.groupby("router")["assignments"].sum().eq(2 * len(tokens)).all()
    assert set(table["phase"].dropna()) == {"prefill", "decode"}
    assert table["domain"].nunique() == 6


def losses_of(rng: np.random.Generator, planted: float, S: int = 4000, E: int = 8) -> SampledLosses:
    """Token ids of their own difficulty, in 40 documents of two domains. The experts of a token
    depend on its id, and on nothing else but for expert 3, which takes the harder of them."""
    token_id_S, document_S = rng.integers(0, 60, S), rng.integers(0, 40, S)
    loss_S = token_id_S / 10 + rng.normal(size=S)
    slot_S = ((token_id_S + rng.integers(0, 3, S)) % E).astype(np.uint16)
    # two tokens of an id exchange their expert where the harder is not with expert 3
    takes_S = rng.random(S) < planted
    slot_S[takes_S & (loss_S > token_id_S / 10 + 1)] = 3
    slot_S[rng.random(S) < 0.01] = E
    of_S = loss_S, loss_S, token_id_S, document_S, document_S % 2, np.zeros(S, np.int64)
    return SampledLosses((0,), *of_S, ["a", "b"], [""], {0: (slot_S,)})


def found_in(of: SampledLosses) -> ExpertLosses:
    found = by_expert(CellLosses.of(of), of.slots[0], 8)
    add_p([found])
    return found


def test_a_token_is_compared_with_the_others_not_with_itself() -> None:
    """In pairs of tokens, of which expert 3 has the harder by 0.87 nats."""
    S = 400
    harder_S = np.arange(S) % 2
    of = losses_of(np.random.default_rng(0), 0, S)
    explained = CellLosses(0.87 * harder_S, 0 * of.loss_S, np.arange(S) // 2, of.document_S)
    found = by_expert(explained, (3 * harder_S,), 8)
    assert found.difference_nats[[3, 0]] == pytest.approx([0.87, -0.87])


def smallest_p(rng: np.random.Generator, planted: float, difficulty: float) -> np.ndarray:
    """difference_p of an expert. Documents have a difficulty and a favourite expert."""
    of = losses_of(rng, planted)
    of.loss_S[:] += difficulty * rng.normal(size=40)[of.document_S]
    favours_S = rng.random(len(of.loss_S)) < 0.3
    of.slots[0][0][favours_S] = rng.integers(0, 8, 40)[of.document_S[favours_S]]
    return found_in(of).difference_p


@pytest.mark.parametrize("difficulty", [0, 1])
def test_a_p_value_is_of_documents_and_of_all_experts(difficulty: float) -> None:
    """Of 60 draws by chance, 10 % are 6, of 12 or more 0.02."""
    smallest = [smallest_p(np.random.default_rng(n), 0, difficulty).min() for n in range(60)]
    assert np.sum(np.array(smallest) < 0.1) < 12
    assert np.sum(np.array(smallest) < 0.01) < 4
    assert smallest_p(np.random.default_rng(0), 0.6, difficulty / 4)[3] < 0.01


def test_what_is_planted_is_found_and_nothing_else() -> None:
    found, beyond = found_in(losses_of(np.random.default_rng(2), 0.3)), 0
    assert found.difference_nats[3] > 2 * found.difference_null_p99[3]
    assert found.difference_low[3] > 0.1
    for seed in range(50):
        found = found_in(losses_of(np.random.default_rng(seed), 0))
        beyond += int((np.abs(found.difference_nats) > found.difference_null_p99).sum())
    assert beyond <= 12  # of 400 four are expected
    # token ids alone make the experts differ: that is explained
    assert np.ptp(found.mean_loss_nats) > 0.05


def test_the_interval_is_over_documents() -> None:
    """Of 40 documents with an ease of their own at expert 3, drawn again and again. That a document
    is hard as a whole is the same for all experts, and does not widen it."""
    rng, found, hard = np.random.default_rng(3), [], []
    for _ in range(200):
        of = losses_of(rng, 0)
        at_3_S = of.slots[0][0] == 3
        of.loss_S[:] += at_3_S * rng.normal(size=40)[of.document_S]
        found.append(found_in(of))
        of = losses_of(rng, 0)
        of.loss_S[:] += rng.normal(size=40)[of.document_S]
        hard.append(found_in(of))
    difference_N3, low, high = (
        np.array([getattr(one, f"difference_{name}") for one in found])[:, 3]
        for name in ("nats", "low", "high")
    )
    assert 0.9 < ((low <= 0) & (high >= 0)).mean() < 0.99
    assert np.std(difference_N3) > 2 * np.std([one.difference_nats[3] for one in hard])
    width = np.mean([one.difference_high[3] - one.difference_low[3] for one in hard])
    assert width < np.mean(high - low) / 2
    for documents, known in ((4, False), (7, True)):
        found = found_in(replace(of, document_S=of.document_S % documents))
        assert np.isfinite(found.difference_low).all() == known
        assert np.isnan(found.difference_p).all()  # too few to tell


def written(path: Path, planted: float, documents: int = 40) -> moe_inspect.Trace:
    """A trace of `losses_of`."""
    of = losses_of(np.random.default_rng(5), planted)
    of.document_S[:] %= documents
    order = np.argsort(of.document_S, kind="stable")
    document = of.document_S[order].astype(np.int32)
    position = np.arange(len(document)) - np.searchsorted(document, document)
    slot_S, loss = of.slots[0][0][order], of.loss_S[order].astype(np.float32) + 3
    lengths = enumerate(np.bincount(document, minlength=documents).tolist())
    one = a_pass(
        0,
        [np.where(slot_S < 8, slot_S, 255).astype(np.uint8)[:, None]],
        token_id=of.token_id_S[order].astype(np.int32),
        document=document,
        position=position.astype(np.int32),
        domain=document % 2,
        domains=["a", "b"],
        documents=[Document(d, "ab"[d % 2], f"{d}", length) for d, length in lengths],
        token_values=dict.fromkeys(LOSS, loss),
    )
    return write_passes(path, routers(1, 8, 1), [one], token_loss=True)


def test_the_verdict_speaks_of_it_only_beyond_chance(tmp_path: Path) -> None:
    def said(trace: moe_inspect.Trace) -> list[str]:
        return [f.text for f in moe_inspect.report(trace).verdict() if f.kind == "hard_tokens"]

    (text,) = said(written(tmp_path / "planted", 0.3))
    assert text.startswith("Expert 3 of ")
    assert "nats harder to continue" in text
    assert said(written(tmp_path / "none", 0)) == []

"""The table `loss`: against pandas, and its null against shuffles; an expert that is planted to
serve hard tokens is found, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.analysis.counting.samples import TokenLosses
from moe_inspect.analysis.losses import Explained, by_expert
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter

VALUES = ["mean_loss_nats", "mean_entropy_nats", "difference_nats"]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> moe_inspect.Trace:
    out = tmp_path_factory.mktemp("loss") / "t"
    return moe_inspect.trace_model("demo", out, max_tokens=3000, generate=6, token_loss=True)


def test_it_is_what_pandas_computes(traced: moe_inspect.Trace) -> None:
    table: Any = moe_inspect.report(traced).tables["loss"]
    tokens: Any = traced.tokens().dropna(subset=["loss_nats"]).astype({"loss_nats": float})
    cell = tokens.groupby(["domain", "phase", "token_id"], observed=True)["loss_nats"]
    tokens["residual"] = tokens["loss_nats"] - cell.transform("mean")
    tokens["others"] = cell.transform("size") > 1
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


def losses_of(rng: np.random.Generator, planted: float, S: int = 4000, E: int = 8) -> TokenLosses:
    """Token ids of their own difficulty, in 40 documents of two domains. The experts of a token
    depend on its id, and on nothing else but for expert 3, which takes the harder of them."""
    token_id_S, document_S = rng.integers(0, 60, S), rng.integers(0, 40, S)
    loss_S = token_id_S / 10 + rng.normal(size=S)
    slot_S = ((token_id_S + rng.integers(0, 3, S)) % E).astype(np.uint16)
    # two tokens of an id exchange their expert where the harder is not with expert 3
    takes_S = rng.random(S) < planted
    slot_S[takes_S & (loss_S > token_id_S / 10 + 1)] = 3
    slot_S[rng.random(S) < 0.01] = E
    zero_S = np.zeros(S, np.int64)
    return TokenLosses(
        (0,),
        loss_S,
        loss_S,
        token_id_S,
        document_S,
        document_S % 2,
        zero_S,
        ["a", "b"],
        [""],
        {0: (slot_S,)},
    )


def test_the_null_is_that_of_shuffles() -> None:
    """Of losses within their cells, 400 times: the 99th percentile of |difference|."""
    rng = np.random.default_rng(1)
    of = losses_of(rng, 0.3)
    explained = Explained.of(of)
    stated = by_expert(explained, of.slots[0], 8).difference_null_p99
    order = np.argsort(explained.cell_S, kind="stable")
    found = []
    for _ in range(400):
        drawn = np.lexsort((rng.random(len(order)), explained.cell_S))
        loss_S = np.empty_like(of.loss_S)
        loss_S[order] = of.loss_S[drawn]
        shuffled = Explained(loss_S, loss_S, explained.cell_S, explained.unit_S)
        found.append(by_expert(shuffled, of.slots[0], 8).difference_nats)
    p99_E = 2.575829 * np.std(found, axis=0)
    np.testing.assert_allclose(stated, p99_E, rtol=0.12)
    assert np.abs(np.mean(found, axis=0)).max() < p99_E.max() / 10


def test_what_is_planted_is_found_and_nothing_else() -> None:
    of = losses_of(np.random.default_rng(2), 0.3)
    found = by_expert(Explained.of(of), of.slots[0], 8)
    assert found.difference_nats[3] > 3 * found.difference_null_p99[3]
    assert found.difference_low[3] > 0.1
    beyond = 0
    for seed in range(50):
        of = losses_of(np.random.default_rng(seed), 0)
        found = by_expert(Explained.of(of), of.slots[0], 8)
        beyond += int((np.abs(found.difference_nats) > found.difference_null_p99).sum())
    assert beyond <= 12  # of 400 four are expected
    # token ids alone make the experts differ: that is explained
    assert np.ptp(found.mean_loss_nats) > 0.05


def test_the_interval_is_over_documents() -> None:
    """Of 40 documents with a difficulty of their own, resampled."""
    rng = np.random.default_rng(3)
    of = losses_of(rng, 0)
    of.loss_S[:] += rng.normal(size=40)[of.document_S]
    explained = Explained.of(of)
    found = by_expert(explained, of.slots[0], 8)
    draws = []
    slot_S, residual_S = of.slots[0][0], explained.residual_S
    for _ in range(600):
        weight_S = np.bincount(rng.integers(0, 40, 40), minlength=40)[of.document_S]
        in_S = slot_S < 8
        sums = np.bincount(slot_S[in_S], (weight_S * residual_S)[in_S])
        draws.append(sums / np.bincount(slot_S[in_S], weight_S[in_S]))
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    width = found.difference_high - found.difference_low
    np.testing.assert_allclose(width, high - low, rtol=0.2)
    assert (width > found.difference_null_p99).all()
    few = TokenLosses(**{**vars(of), "document_S": of.document_S % 4})
    assert np.isnan(by_expert(Explained.of(few), few.slots[0], 8).difference_low).all()


def written(path: Path, planted: float) -> moe_inspect.Trace:
    """A trace of `losses_of`."""
    of = losses_of(np.random.default_rng(5), planted)
    S = len(of.loss_S)
    order = np.argsort(of.document_S, kind="stable")
    document = of.document_S[order].astype(np.int32)
    position = np.arange(S) - np.searchsorted(document, document)
    slot_S = of.slots[0][0][order]
    ids = np.where(slot_S < 8, slot_S, 255).astype(np.uint8)[:, None]
    loss = of.loss_S[order].astype(np.float32) + 3
    with TraceWriter(
        path, {"model": {"id": "x"}}, [Router(0, "e", "e", 8, 1)], weights=False, token_loss=True
    ) as writer:
        documents = [
            Document(d, "ab"[d % 2], f"{d}", int((document == d).sum())) for d in range(40)
        ]
        writer.write(
            RoutedBatch(
                0,
                of.token_id_S[order].astype(np.int32),
                document,
                document,
                position.astype(np.int32),
                document % 2,
                ["a", "b"],
                [ids],
                None,
                documents=documents,
                loss=loss,
                entropy=loss,
            )
        )
    return moe_inspect.open_trace(path)


def test_the_verdict_speaks_of_it_only_beyond_chance(tmp_path: Path) -> None:
    def said(trace: moe_inspect.Trace) -> list[str]:
        return [f.text for f in moe_inspect.report(trace).verdict() if f.kind == "hard_tokens"]

    (text,) = said(written(tmp_path / "planted", 0.3))
    assert text.startswith("Expert 3 of ")
    assert "nats harder to continue" in text
    assert said(written(tmp_path / "none", 0)) == []


def test_without_losses_it_is_empty(tmp_path: Path) -> None:
    trace = moe_inspect.trace_model("demo", tmp_path / "t", max_tokens=200)
    table = moe_inspect.report(trace).tables["loss"]
    assert table.empty
    assert set(VALUES) <= set(table.columns)

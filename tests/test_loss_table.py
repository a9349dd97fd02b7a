"""The table `loss` of a report: against pandas; an expert that is planted to serve hard tokens is
found, and no other, whether documents are hard or not. And that of two traces of the same tokens,
also where their texts part."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import moe_inspect
from moe_inspect.analysis.counting.samples import SampledLosses
from moe_inspect.analysis.losses import CellLosses, ExpertLosses, add_p, by_expert
from moe_inspect.trace.schema import LOSS
from moe_inspect.trace.writer import Document
from tests.conftest import Cli
from tests.support.damage import edit_lines, without_checksums
from tests.support.synthetic import a_pass, routers, write_passes
from tests.support.zoo import build

Traces = tuple[moe_inspect.Trace, ...]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Two dtypes; the second of less text, so that it goes on with tokens of its own. The third is
    without losses."""
    out = tmp_path_factory.mktemp("losses")
    options: dict[str, Any] = {"token_loss": True, "batch_tokens": 256, "generate": 4}
    a = moe_inspect.trace_model("demo", out / "a", max_tokens=3000, **options)
    b = moe_inspect.trace_model("demo", out / "b", max_tokens=2000, dtype="float32", **options)
    return a, b, moe_inspect.trace_model("demo", out / "bare", max_tokens=300)


def test_it_is_what_pandas_computes(traced: Traces) -> None:
    trace = traced[0]
    table: Any = moe_inspect.report(trace).tables["loss"]
    tokens: Any = trace.tokens().dropna(subset=["loss_nats"]).astype({"loss_nats": float})
    cell = tokens.groupby(["domain", "phase", "token_id"], observed=True)["loss_nats"]
    others = cell.transform("size") - 1
    of_others = (cell.transform("sum") - tokens["loss_nats"]) / others
    tokens["residual"] = (tokens["loss_nats"] - of_others).where(others > 0, 0)
    tokens["others"] = others > 0
    slots = trace.routing().filter(regex="^(token|router|expert_.*)$")
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
    explained = CellLosses.of(of)
    (found,) = by_expert(explained, of.slots[0], 8, [explained.group()])
    add_p([found])
    return found


def test_a_token_is_compared_with_the_others_not_with_itself() -> None:
    """In pairs of tokens, of which expert 3 has the harder by 0.87 nats."""
    S = 400
    harder_S = np.arange(S) % 2
    of = losses_of(np.random.default_rng(0), 0, S)
    explained = CellLosses(0.87 * harder_S, 0 * of.loss_S, np.arange(S) // 2, of.document_S)
    (found,) = by_expert(explained, (3 * harder_S,), 8, [explained.group()])
    assert found.difference_nats[[3, 0]] == pytest.approx([0.87, -0.87])


def test_tokens_without_others_are_compared_with_none() -> None:
    """Those of a whole domain, or of all that a router chose for."""
    of = losses_of(np.random.default_rng(0), 0, 400)
    of.token_id_S[:20], of.domain_S[:20] = np.arange(20) + 100, 2
    explained, nowhere = CellLosses.of(of), (np.full(400, 8, np.uint16),)
    for slots, in_S in ((of.slots[0], of.domain_S == 2), (nowhere, None)):
        (found,) = by_expert(explained, slots, 8, [explained.group(in_S)])
        add_p([found])
        assert not found.compared.any()
        assert np.isnan([found.difference_nats, found.difference_low, found.difference_p]).all()


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


# --- of two traces


def joined(a: moe_inspect.Trace, b: moe_inspect.Trace) -> Any:
    """The tokens of both up to the first that differs: `goes_on` where both have the same next one,
    `routes` where they chose the same experts at every router."""
    keys = ["document", "position"]
    columns = [*keys, "token", "token_id", "domain", "loss_nats", "entropy_nats"]
    both: Any = a.tokens()[columns].merge(b.tokens()[columns], on=keys, suffixes=("_a", "_b"))
    assert not both.duplicated(keys).any()
    both = both.sort_values(keys)
    same = both["token_id_a"] == both["token_id_b"]
    both = both[same.groupby(both["document"]).cummin()]
    after = both.groupby("document")["position"].shift(-1)
    both["goes_on"] = after == both["position"] + 1
    sets = []
    for trace in (a, b):
        ids = np.sort(trace.routing()[["expert_0", "expert_1"]].to_numpy(int), axis=1)
        index = pd.MultiIndex.from_frame(trace.routing()[["router", "token"]])
        sets.append(pd.DataFrame(ids, index=index))
    same_T = np.ones(len(both), bool)
    for router in range(4):
        of = [x.loc[router].loc[both[f"token_{s}"]] for x, s in zip(sets, "ab", strict=True)]
        same_T &= (of[0].to_numpy() == of[1].to_numpy()).all(1)
    return both.assign(routes=np.where(same_T, "same", "different"))


def test_of_two_traces_it_is_what_pandas_computes(traced: Traces) -> None:
    a, b, _ = traced
    table: Any = moe_inspect.compare(a, b).tables["loss"]
    both = joined(a, b)
    known = both.dropna(subset=["loss_nats_a", "loss_nats_b"])
    used = known[known["goes_on"]]
    assert len(known) > len(used), "control: some texts part, whose last losses are not compared"
    assert set(table["domain"]) == {"", *used["domain_a"]}
    found = 0
    for _, row in table.iterrows():
        of = used[used["domain_a"] == row["domain"]] if row["domain"] else used
        of = of[of["routes"] == row["routes"]] if row["routes"] else of
        assert row["tokens"] == len(of) > 0
        for name, prefix in (("loss", ""), ("entropy", "entropy_")):
            a, b = (of[f"{name}_nats_{side}"].astype(float) for side in "ab")
            assert row[f"mean_{name}_nats_a"] == pytest.approx(a.mean())
            assert row[f"mean_{name}_nats_b"] == pytest.approx(b.mean())
            assert row[f"{prefix}difference_nats"] == pytest.approx((b - a).mean(), abs=1e-9)
            if name == "loss":
                assert row["absolute_difference_nats"] == pytest.approx((b - a).abs().mean())
        if not np.isnan(row["difference_nats_low"]):
            found += 1
            assert row["difference_nats_low"] < row["difference_nats"] < row["difference_nats_high"]
    assert found >= 2
    whole = table[table["domain"] == ""].set_index("routes")["tokens"]
    assert whole[""] == whole["same"] + whole["different"]
    # an interval is as wide as the spread of documents' sums makes it
    row = table.iloc[0]
    apart = (used["loss_nats_b"] - used["loss_nats_a"]).astype(float) - row["difference_nats"]
    documents = apart.groupby(used["document"]).sum()
    error = np.sqrt((documents**2).sum()) / len(used)
    width = row["difference_nats_high"] - row["difference_nats_low"]
    assert width == pytest.approx(2 * 1.96 * error, rel=0.3)


def test_the_same_trace_has_the_same_losses(traced: Traces) -> None:
    a = traced[0]
    made = moe_inspect.compare(a, a, domains="c")
    assert "loss" not in {found.kind for found in made.verdict()}
    table: Any = made.tables["loss"]
    tokens = a.tokens()
    expected = tokens.loc[tokens["domain"] == "c", "loss_nats"].count()
    assert table["tokens"].tolist()[:2] == [expected] * 2
    assert set(table["routes"]) == {"", "same"}
    assert (table[["difference_nats", "absolute_difference_nats"]] == 0).all(axis=None)


def worse(a: moe_inspect.Trace, path: Path, nats: float, documents: int = 99) -> Any:
    """A compared with itself, but that the losses of these documents are greater by so much."""
    without_checksums(Path(a.path), path)
    for part in (path / "tokens").iterdir():
        table = pq.read_table(part)
        more = np.where(table["document"].to_numpy() < documents, nats, 0).astype(np.float32)
        column = pc.add(table["loss_nats"], pa.array(more))
        table = table.set_column(table.column_names.index("loss_nats"), "loss_nats", column)
        pq.write_table(table, part)
    hashes = {x["path"]: hashlib.sha256((path / x["path"]).read_bytes()) for x in edit_lines(path)}
    edit_lines(path, [x | {"sha256": hashes[x["path"]].hexdigest()} for x in edit_lines(path)])
    return moe_inspect.compare(a, path)


def test_a_gate_and_the_page_have_the_difference(traced: Traces, cli_here: Cli) -> None:
    a, b, bare = traced
    made: Any = moe_inspect.compare(a, b)
    change = made.tables["loss"]["absolute_difference_nats"].iloc[0]
    assert made.tables["overall"]["loss_absolute_difference_nats"].iloc[0] == change > 0
    page = made.page()
    assert "loss, B minus A" in page
    assert "The loss of the same tokens" in page
    metric = "loss_absolute_difference_nats"
    for limit, code in ((change * 1.01, 0), (change * 0.99, 3)):
        done = cli_here("compare", a.path, b.path, "--fail-above", f"{metric}={limit}", check=code)
        assert (f"failed: all routers: {metric} is" in done.stderr) == (code == 3)
    gate = ["--fail-above", "loss_difference_nats=1"]
    refused = cli_here("compare", a.path, bare.path, *gate, check=1)
    assert "there is no metric 'loss_difference_nats': B (" in refused.stderr


@torch.no_grad()
def test_of_an_encoder_decoder_the_decoders_tokens(tmp_path: Path) -> None:
    """The other trace is of a head of its own: the routes are the same, the losses are not."""
    model = build("switch_transformers")
    read, said = torch.arange(7)[None] + 20, torch.arange(6)[None] * 3 + 40
    for name in "ab":
        with moe_inspect.record(model, tmp_path / name, token_loss=True):
            model(input_ids=read, decoder_input_ids=said)
        model.lm_head.weight.data *= 1.5
    a, b = (moe_inspect.open_trace(tmp_path / name) for name in "ab")
    row: Any = moe_inspect.compare(a, b).tables["loss"].iloc[0]
    assert row["tokens"] == 6 - 1
    for side, trace in zip("ab", (a, b), strict=True):
        expected = trace.tokens()["loss_nats"].mean()
        assert row[f"mean_loss_nats_{side}"] == pytest.approx(expected)
    assert abs(row["difference_nats"]) > 1e-4
    assert np.isnan(row["difference_nats_low"]), "one document has no interval"


def test_without_losses_it_is_empty_and_said_to_be(traced: Traces, cli: Cli) -> None:
    a, _, bare = traced
    without: Any = moe_inspect.compare(a, bare).tables["loss"]
    assert without.empty
    assert without.dtypes.equals(moe_inspect.compare(a, a).tables["loss"].dtypes)
    for name, there in (("loss", "trace --token-loss"), ("worth", "trace --output-norms")):
        refused = cli("compare", a.path, bare.path, "--table", name, check=None)
        assert refused.returncode == 1
        (line,) = refused.stderr.strip().splitlines()
        assert f"no table '{name}'" in line
        assert there in line
    shifted: Any = moe_inspect.compare(a, a, shift_routes=1)
    assert shifted.tables["loss"].empty
    assert "--shift-routes" in shifted.why_not("loss")
    shown = cli("compare", a.path, a.path, "--table", "loss", "--format", "csv").stdout
    assert shown.startswith("domain,routes,tokens,mean_loss_nats_a,")

"""The tables committee, signature and paths: against pandas, on samples, and on traces that hardly
hold anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.analysis.counting import samples
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics import committee as com
from moe_inspect.analysis.metrics import paths as pth
from moe_inspect.analysis.metrics.signature import accuracies, distances, nearest, wilson
from moe_inspect.analysis.metrics.uncertainty import resample_weights
from moe_inspect.reporting.report import report
from moe_inspect.reporting.verdict import specialization
from moe_inspect.trace.reader import Trace, open_trace
from tests.support.synthetic import uniform_ids, write_trace

SAMPLES = Path("sample_traces")
E, K = 8, 2
DOCUMENTS, LENGTH = 24, 50
DOMAINS = ("law", "code", "news")


@pytest.fixture(scope="module")
def untrained() -> Any:
    return report(SAMPLES / "untrained").tables


def frame_of(trace: Trace) -> pd.DataFrame:
    """A row per decision, with its domain and document."""
    return trace.routing().merge(trace.tokens()[["token", "document", "domain"]], on="token")


def entropy_bits(sizes: pd.Series) -> float:
    share = sizes / sizes.sum()
    return float(-(share * np.log2(share)).sum())


def led(root: Path, L: int = 3, **options: Any) -> Trace:
    """Expert 0 takes part in every decision; the other is one of two of its domain."""
    rng = np.random.default_rng(5)
    document = np.repeat(np.arange(DOCUMENTS), LENGTH)
    own = 1 + 2 * (document % 3) + rng.integers(0, 2, len(document))
    ids = [np.stack([0 * own, own], 1).astype(np.uint16) for _ in range(L)]
    return write_trace(root, ids, E, document=document, domain_of_document=DOMAINS, **options)


# --- committee


def test_an_expert_that_leads_everywhere_is_the_committee(tmp_path: Path):
    found: Any = report(led(tmp_path / "t")).tables["committee"]
    assert found["experts"].tolist() == ["0"] * 3
    assert found["committee_experts"].tolist() == [1] * 3
    assert found["committee_mass"].tolist() == [0.5] * 3  # one of two assignments
    assert found["committee_mass_low"].tolist() == pytest.approx([0.5] * 3)
    assert found["committee_mass_even"].tolist() == [1 / 8] * 3
    assert found["committee_by_chance"].tolist() == pytest.approx([8 / 4**3] * 3)
    assert found["committee_weight"].isna().all()
    # with the documents shuffled expert 0 still leads, and at times another of the same loads
    assert ((found["committee_null"] >= 1) & (found["committee_null"] < 2)).all()


def test_the_committee_is_what_pandas_finds():
    rows: Any = frame_of(open_trace(SAMPLES / "collapsed"))
    for k in (2, 7):  # with 7 of 8 there are some
        for r in range(4):
            mine = rows[rows["router"] == r]
            long = mine.melt(["token", "domain"], [f"expert_{j}" for j in range(2)])
            load: Any = long.groupby(["domain", "value"], observed=True).size().unstack()
            tops = [set(load.loc[d].nlargest(k).index) for d in load.index]
            members = sorted(set.intersection(*tops))
            share = load[members].sum(axis=1) / load.sum(axis=1)
            assignments_DE = load.to_numpy()
            assert np.flatnonzero(com.committee(assignments_DE, k)).tolist() == members
            assert com.committee_mass(assignments_DE, k) == pytest.approx(share.mean())
            assert members or k == 2
    # no expert leads in all six domains of the bundled model
    none = report(SAMPLES / "balanced").tables["committee"]
    assert none["committee_experts"].tolist() == [0] * 4
    assert none["committee_mass_low"].isna().all()


def test_experts_that_share_the_last_place_are_left_out():
    load_DE = np.array([[9, 5, 5, 0], [9, 7, 3, 1], [0, 0, 0, 0]])
    assert com.committee(load_DE, 2).tolist() == [True, False, False, False]
    assert com.committee(load_DE, 3).tolist() == [True, True, True, False]
    assert com.committee(load_DE, 4).tolist() == [True, True, True, False]  # 3 is dead in one
    assert not com.committee(load_DE[:1], 2).any()
    assert np.isnan(com.committee_experts(load_DE[:1], 2))


def test_where_no_domain_routes_in_its_own_way_the_committee_is_as_large_as_its_null():
    rng = np.random.default_rng(7)
    p_E = np.array([0.3, 0.25, 0.2, 0.1, 0.05, 0.04, 0.03, 0.03])
    domain_U = np.repeat(np.arange(3), 20)
    loads = [rng.multinomial(100, p_E, len(domain_U)) for _ in range(90)]
    of_D = [np.stack([of[domain_U == d].sum(0) for d in range(3)]) for of in loads[:30]]
    size = np.mean([com.committee_experts(load_DE, 3) for load_DE in of_D])
    null = np.mean([com.committee_null(load_UE, domain_U, 3) for load_UE in loads[:30]])
    assert size == pytest.approx(null, abs=0.2)
    # the interval holds the mass of these experts: 0.75
    weights_RU, leaders_E = resample_weights(domain_U), p_E >= 0.2
    weights_D = com.weights_by_domain(weights_RU, domain_U)
    ends = [com.mass_interval(leaders_E, of, domain_U, weights_D) for of in loads[30:]]
    assert sum(low <= 0.75 <= high for low, high in ends) >= 51


# --- signature


def test_the_nearest_document_is_what_pandas_finds(untrained: Any):
    rows: Any = frame_of(open_trace(SAMPLES / "untrained"))
    long = rows.melt(["router", "document"], ["expert_0", "expert_1"])
    load: Any = long.groupby(["document", "router", "value"]).size().unstack([1, 2], fill_value=0)
    domain = rows.groupby("document")["domain"].first()
    assert untrained["signature"][["layer", "router"]].iloc[0].isna().all()
    assert untrained["signature"]["router"].tolist()[1:] == [0, 1, 2, 3]
    for r, stated in enumerate(untrained["signature"]["signature_accuracy"][1:]):
        share = load[r].div(load[r].sum(axis=1), axis=0)
        right = 0
        for document in share.index:
            apart = ((share - share.loc[document]) ** 2).sum(axis=1).drop(document)
            right += domain[apart.idxmin()] == domain[document]
        assert stated == pytest.approx(right / 60)


def test_samples_are_the_same_in_any_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of documents and of tokens, both small."""
    monkeypatch.setattr(samples, "DOCUMENTS", 10)
    monkeypatch.setattr(samples, "TOKENS", 200)
    drawn = []
    for shard_tokens, shards in ((5_000, 1), (500, 3), (100, 12)):
        trace = led(tmp_path / str(shard_tokens), shard_tokens=shard_tokens, batch_tokens=100)
        assert trace.n_shards == shards
        documents = samples.document_loads(trace, select(trace))
        (tokens,) = samples.sampled_routes(trace, select(trace))
        drawn.append([vars(documents), vars(tokens)])
        np.testing.assert_equal(drawn[-1], drawn[0])
    assert len(documents.document_S) == 10
    assert (documents.load_SE[0].sum(1) == K * LENGTH).all()
    named = [documents.domains[d] for d in documents.domain_S]
    assert named == [DOMAINS[d % 3] for d in documents.document_S]
    assert 150 < len(tokens.document_S) < 250
    (of_law,) = samples.sampled_routes(trace, select(trace, domains="law"))
    assert set(of_law.document_S % 3) == {0}
    assert 160 < len(of_law.document_S) < 240


def test_the_interval_of_a_share_is_never_empty():
    for share, n, ends in ((1, 60, (0.9398, 1)), (0, 60, (0, 0.0602)), (0.5, 10, (0.2366, 0.7634))):
        assert wilson(share, n) == pytest.approx(ends, abs=1e-4)


def test_the_interval_of_the_accuracy_holds_what_other_documents_give():
    """Two documents that are nearest to each other are right or wrong together: taken as
    independent, they held it 87 times of 100."""
    found, domain_S = [], np.arange(60) % 3
    world = np.random.default_rng(99)
    p_DE = world.dirichlet(np.ones(16)) * (1 + 0.1 * world.standard_normal((3, 16)))
    for n in range(150):
        rng = np.random.default_rng(n)
        p_SE = np.stack([rng.dirichlet(200 * p_DE[d] / p_DE[d].sum()) for d in domain_S])
        load_SE = np.stack([rng.multinomial(300, p_E) for p_E in p_SE])
        found.append(accuracies([load_SE], domain_S)[0])
    mean = np.mean([made.value for made in found])
    held = sum(made.low <= mean <= made.high for made in found)
    assert 0.91 * 150 <= held <= 0.98 * 150


def test_long_documents_of_a_domain_are_no_signature():
    """Short documents are nearest to long ones, whose shares vary less: where no domain routes in
    its own way, most are of the domain that has the long ones."""
    rng, domain_S = np.random.default_rng(0), np.arange(60) % 2
    share_DE = rng.dirichlet(np.full(8, 20), 2)
    for short, of_D, beyond in ((40, (0, 0), False), (2_000, (0, 1), True)):
        tokens_S = np.where(domain_S == 0, short, 2_000)
        load_SE = rng.multinomial(2 * tokens_S, share_DE[np.take(of_D, domain_S)])
        made, _ = accuracies([load_SE], domain_S)
        assert made.value > 0.75
        assert (made.low > made.null_p99) == beyond
        # with the domains shuffled among all documents, both would be
        among_all = np.array([rng.permutation(domain_S) for _ in range(200)])
        nearest_S = nearest(distances(load_SE))
        null_R = (among_all[:, nearest_S] == among_all).mean(1)
        assert made.low > np.quantile(null_R, 0.99)


# --- paths


def test_paths_are_what_pandas_finds(untrained: Any):
    rows: Any = frame_of(open_trace(SAMPLES / "untrained"))
    rows["set"] = [frozenset(pair) for pair in rows[["expert_0", "expert_1"]].to_numpy()]
    document = rows.groupby("token")["document"].first()
    for column, name in (("expert_0", "path"), ("set", "set_path")):
        wide = rows.pivot(index="token", columns="router", values=column)
        for r, stated in untrained["paths"].iterrows():
            sizes = wide[list(range(r + 1))].apply(tuple, axis=1).value_counts()
            assert stated[f"{name}s"] == len(sizes)
            assert stated[f"{name}_entropy_bits"] == pytest.approx(entropy_bits(sizes))
            alone = sum(entropy_bits(wide[s].value_counts()) for s in range(r + 1))
            assert stated[f"{name}_entropy_independent_bits"] == pytest.approx(alone)
            of_document = (wide[s].groupby(document) for s in range(r + 1))
            order = [of.sample(frac=1, random_state=s) for s, of in enumerate(of_document)]
            shuffled = entropy_bits(pd.Series(list(zip(*order, strict=True))).value_counts())
            assert stated[f"{name}_entropy_shuffled_bits"] == pytest.approx(shuffled, abs=0.06)


@pytest.mark.parametrize(
    ("documents", "L", "taste", "connected", "says"),
    [(10, 6, 1.5, 0.0, False), (40, 3, 0.0, 0.08, False), (40, 3, 0.0, 0.5, True)],
)
def test_layers_are_connected_only_where_it_matters(
    tmp_path: Path, documents: int, L: int, taste: float, connected: float, says: bool
):
    """Neither the tastes of documents, independent at each layer, nor hardly any connection."""
    rng, document = np.random.default_rng(0), np.repeat(np.arange(documents), 16_000 // documents)
    logits_LUE = rng.normal(0, taste, (L, documents, 4))
    choice_LT = np.argmax(logits_LUE[:, document] + rng.gumbel(size=(L, 16_000, 4)), 2)
    choice_LT = np.where(rng.random((L, 16_000)) < connected, choice_LT[0], choice_LT)
    ids = list(choice_LT[:, :, None].astype(np.uint16))
    found = report(write_trace(tmp_path / "t", ids, 4, document=document)).verdict()
    assert ("paths" in {one.kind for one in found}) == says


def test_the_jackknife_leaves_out_one_group_of_documents_at_a_time():
    from scipy import stats

    rng = np.random.default_rng(3)
    path_S, document_S = rng.integers(0, 30, 600) ** 2, rng.integers(0, 45, 600)
    group_S = pth.groups_of(document_S, document_S % 2)
    assert set(np.bincount(group_S, minlength=20) > 0) == {True}
    assert all(len(set(group_S[document_S == d])) == 1 for d in range(45))
    _, of_S, tokens_P = np.unique(path_S, return_inverse=True, return_counts=True)
    paths_G = [pd.Series(path_S[group_S != g]).value_counts() for g in range(20)]
    left = np.array([*map(entropy_bits, paths_G)])
    error = np.sqrt(19 / 20 * ((left - left.mean()) ** 2).sum())
    found = pth.jackknife(tokens_P, of_S, group_S, np.bincount(group_S))
    whole = entropy_bits(pd.Series(path_S).value_counts())
    assert found == pytest.approx((error * stats.t.ppf(0.975, 19), 19 * (whole - left.mean())))


def test_paths_are_counted_where_none_parts_and_where_all_are_alone():
    rng, S = np.random.default_rng(2), 300
    choice_LS = [rng.integers(0, E, S), np.full(S, 5), *rng.integers(0, 50, (2, S)), np.arange(S)]
    choice_LS = [*(c.astype(np.uint16) for c in choice_LS), rng.integers(0, E, S)]
    choice_LS[2][:40], choice_LS[3][:40] = choice_LS[0][:40], 0
    found = pth.entropies(choice_LS, np.zeros(S), np.arange(S) % 7)
    for r, made in enumerate(found):
        sizes = pd.DataFrame(choice_LS[: r + 1]).T.value_counts()
        assert made.paths == len(sizes)
        assert made.value == pytest.approx(entropy_bits(sizes))
    paths = [made.paths for made in found if made]
    assert paths[0] == paths[1] < paths[2] < paths[4] == paths[5] == S


def test_the_interval_of_the_entropy_is_over_documents():
    """Documents that each repeat a few paths: far fewer cases than tokens."""
    rng, inside = np.random.default_rng(11), 0
    p_P = rng.dirichlet(np.ones(12))
    truth = -(p_P * np.log2(p_P)).sum()
    document_S = np.repeat(np.arange(300), 10)
    for _ in range(60):
        path_S = np.repeat(rng.choice(12, 300, p=p_P), 10)
        (made,) = pth.entropies([path_S], document_S, pth.groups_of(document_S, 0 * document_S))
        inside += made.low <= truth <= made.high
        assert made.high - made.low > 2 * 1.96 * 0.9 / np.sqrt(3000)  # as if tokens were cases
    assert inside >= 50


# --- on the page


def test_the_page_shows_what_the_trace_has(tmp_path: Path):
    page = report(led(tmp_path / "t", slot_order="unknown")).page(text=False)
    one = report(open_trace(tmp_path / "t"), domains="law").page(text=False)
    of_domains = ("Experts that lead in every domain", "Does routing identify the domain?")
    for title in (*of_domains, "Paths through the layers"):
        assert title in page
        assert (title in one) == (title not in of_domains)


# --- traces that hardly hold anything


def test_one_domain_and_unknown_first_choices(tmp_path: Path):
    trace = led(tmp_path / "t", slot_order="unknown")
    every: Any = report(trace).tables["paths"]
    assert every[["paths", "path_entropy_bits"]].isna().all(axis=None)
    assert every["set_paths"].tolist() == [6] * 3
    made = report(trace, domains="law").tables
    assert made["committee"]["committee_experts"].isna().all()
    assert made["committee"]["experts"].tolist() == [""] * 3
    assert made["signature"]["signature_accuracy"].isna().all()
    assert made["paths"]["set_path_entropy_bits"].notna().all()


def test_one_document_and_one_layer(tmp_path: Path):
    rng = np.random.default_rng(1)
    trace = write_trace(tmp_path / "t", [uniform_ids(rng, 300, E, K)], E)
    made: Any = report(trace).tables
    assert made["committee"]["committee_mass"].isna().all()
    assert made["signature"]["documents"].tolist() == [1, 1]
    assert made["signature"]["signature_accuracy"].isna().all()
    (path,) = made["paths"].to_dict("records")
    assert path["path_entropy_bits"] == path["path_entropy_shuffled_bits"] == pytest.approx(3, 0.01)
    assert np.isnan(path["path_entropy_low"])
    assert str(pth.path_entropy_bits(np.array([7]))) == "0.0"  # of one path


def test_slots_that_routed_nowhere_are_a_choice_of_their_own(tmp_path: Path):
    ids = np.array([[0, 1], [0, 65535], [65535, 65535], [1, 0]], np.uint16).repeat(50, axis=0)
    trace = write_trace(tmp_path / "t", [ids], E, document=np.arange(200) % 10)
    (found,) = report(trace).tables["paths"].to_dict("records")
    assert found["paths"] == 3
    assert found["set_paths"] == 3  # {0, 1}, {0}, none
    assert found["set_path_entropy_bits"] == pytest.approx(1.5)


def test_the_verdict_of_the_sample_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of a model that was never trained; passes of their own are made over small traces
    alone."""

    def notes(name: str) -> dict[str, Any]:
        found = {one.kind: one for one in report(SAMPLES / name).verdict()}
        return {kind: found[kind] for kind in ("committee", "signature", "paths") if kind in found}

    found = notes("balanced")
    assert found.keys() == {"signature", "paths"}
    assert "take 843 distinct routes (entropy 8.02 bits" in found["paths"].text
    assert {one.group for one in found.values()} == {"Specialization"}
    assert not notes("untrained")
    monkeypatch.setattr(specialization, "MOST_DECISIONS", 9254 * 4 - 1)
    assert not notes("balanced")

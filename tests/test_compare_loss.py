"""The losses of two traces of the same tokens: against pandas, also where their texts part."""

from __future__ import annotations

import hashlib
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
from tests.conftest import Cli
from tests.support.damage import edit_lines, without_checksums
from tests.support.zoo import build


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[moe_inspect.Trace, ...]:
    """Two dtypes; the second of less text, so that it goes on with tokens of its own."""
    out = tmp_path_factory.mktemp("compare_loss")
    options: dict[str, Any] = {"token_loss": True, "batch_tokens": 256, "generate": 4}
    a = moe_inspect.trace_model("demo", out / "a", max_tokens=3000, **options)
    b = moe_inspect.trace_model("demo", out / "b", max_tokens=2000, dtype="float32", **options)
    return a, b


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


def test_it_is_what_pandas_computes(traced: tuple[moe_inspect.Trace, ...]) -> None:
    table: Any = moe_inspect.compare(*traced).tables["loss"]
    both = joined(*traced)
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


def test_the_interval_is_that_of_documents(traced: tuple[moe_inspect.Trace, ...]) -> None:
    """As wide as the spread of documents' sums makes it."""
    row: Any = moe_inspect.compare(*traced).tables["loss"].iloc[0]
    both = joined(*traced)
    used = both[both["goes_on"]].dropna(subset=["loss_nats_a", "loss_nats_b"])
    apart = (used["loss_nats_b"] - used["loss_nats_a"]).astype(float) - row["difference_nats"]
    documents = apart.groupby(used["document"]).sum()
    error = np.sqrt((documents**2).sum()) / len(used)
    width = row["difference_nats_high"] - row["difference_nats_low"]
    assert width == pytest.approx(2 * 1.96 * error, rel=0.3)


def test_the_same_trace_has_the_same_losses(traced: tuple[moe_inspect.Trace, ...]) -> None:
    a = traced[0]
    table: Any = moe_inspect.compare(a, a, domains="c").tables["loss"]
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


def test_the_verdict_says_which_predicts_better(
    traced: tuple[moe_inspect.Trace, ...], tmp_path: Path
) -> None:
    def said(made: Any) -> Any:
        (found,) = [one for one in made.verdict() if one.kind == "loss"]
        return found

    a, b = traced
    for nats, severity, text in (
        (0.25, "warning", "B predicts worse than A: it has a loss of "),
        (-0.25, "good", "B predicts better than A: it has a loss of "),
    ):
        found = said(worse(a, tmp_path / severity, nats))
        assert (found.severity, found.text[: len(text)]) == (severity, text)
        assert found.values["difference_nats"] == pytest.approx(nats, abs=1e-6)
        assert f"({nats:+.4f}, 95 % {nats:+.4f} to {nats:+.4f} over documents)" in found.text
    few = said(worse(a, tmp_path / "few", 0.25, documents=1))
    assert few.text.startswith("These documents do not show which predicts better: B has ")
    assert few.severity == "note", "nobody showed that it is the same"
    assert few.values["difference_nats_low"] == 0 < few.values["difference_nats_high"]
    one = moe_inspect.trace_model("demo", tmp_path / "one", max_tokens=200, token_loss=True)
    found = said(worse(one, tmp_path / "worse", 0.25))
    assert found.severity == "note"
    assert "too few documents to tell whether that is chance" in found.text
    parted = " ".join(f.text for f in moe_inspect.compare(a, b).verdict())
    assert "continue with different token ids" in parted
    same = moe_inspect.compare(a, a).verdict()
    assert "loss" not in {f.kind for f in same}, "the same files"


def test_a_gate_and_the_page_have_the_difference(
    traced: tuple[moe_inspect.Trace, ...], tmp_path: Path, cli_here: Cli
) -> None:
    a, b = traced
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
    bare = moe_inspect.trace_model("demo", tmp_path / "bare", max_tokens=300)
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


def test_without_losses_it_is_empty_and_said_to_be(
    traced: tuple[moe_inspect.Trace, ...], tmp_path: Path, cli: Cli
) -> None:
    a, _ = traced
    bare = moe_inspect.trace_model("demo", tmp_path / "bare", max_tokens=300)
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

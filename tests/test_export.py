"""What is exported is what was there: read back, or read as the tool reads it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.analysis.scores import losses_without
from moe_inspect.errors import MoeInspectError
from moe_inspect.exporters import MODULES
from moe_inspect.exporters.run import export_trace, exporters
from moe_inspect.importers.run import import_trace
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.support.damage import edit_manifest
from tests.support.synthetic import assigned, uniform_ids, write_counts, write_trace

T, E, K = 240, 8, 2


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    rng = np.random.default_rng(1)
    ids = [uniform_ids(rng, T, E, K) for _ in range(2)]
    return write_trace(
        tmp_path_factory.mktemp("export") / "t",
        ids,
        E,
        document=np.repeat(np.arange(24), 10),
        domain_of_document=("a", "b/c"),
        weights=[(rng.integers(1, 200, (T, K)) / 256).astype(np.float32) for _ in range(2)],
        batch_tokens=10,
        shard_tokens=100,
        layers=[1, 3],
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_counts_come_back_as_they_were(ending: str, trace: Trace, tmp_path: Path):
    export_trace(trace, "counts", tmp_path / f"c.{ending}")
    back = import_trace("counts", [tmp_path / f"c.{ending}"], tmp_path / "t").counts()
    keys = ["layer", "domain", "expert"]
    by = assigned(trace).groupby(keys, observed=True)
    expected = by.agg(n=("slot", "size"), first=("slot", lambda s: (s == 0).sum()))
    found = back.assign(domain=back["domain"].astype(str)).set_index(keys).loc[expected.index]
    assert found["assignments"].tolist() == expected["n"].tolist()
    assert found["first_choice"].tolist() == expected["first"].tolist()
    assert found["weight_sum"].tolist() == pytest.approx(by["weight"].sum().tolist(), rel=1e-6)
    assert back["assignments"].sum() == T * 2 * K


def test_esft_comes_back_as_it_was(trace: Trace, tmp_path: Path):
    export_trace(trace, "esft", tmp_path / "e")
    files = {"expert_cfg.json", "summary.json"}
    files |= {f"rank_0/expert_weights_{layer}.txt" for layer in (1, 3)}
    root = tmp_path / "e"
    written = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert written == {f"{domain}/{file}" for domain in ("a", "b_c") for file in files}
    back = import_trace("esft", [tmp_path / "e"], tmp_path / "t", experts=E, top_k=K)
    assert back.documents()["domain"].unique().tolist() == ["a", "b_c"]
    columns = ["expert_0", "expert_1", "weight_0", "weight_1"]
    order = ["domain", "document", "position"]
    for layer in (1, 3):
        ours = trace.routing(layer=layer).merge(trace.tokens(), on="token").sort_values(order)
        found = back.routing(layer=layer)[columns]
        assert np.array_equal(found.to_numpy(), ours[columns].to_numpy())
    scores = read(tmp_path / "e/a/summary.json")
    mine = assigned(trace).query("domain == 'a' and layer == 3")
    gate = mine.loc[mine["expert"] == 5, "weight"].sum() / mine["token"].nunique()
    assert scores["token_scores"]["3"]["5"] == pytest.approx((mine["expert"] == 5).mean())
    assert scores["gate_scores"]["3"]["5"] == pytest.approx(gate)
    with pytest.raises(MoeInspectError, match="there is something at"):
        export_trace(trace, "esft", tmp_path / "e")


@pytest.mark.parametrize("score", ["token", "gate"])
@pytest.mark.parametrize("top_p", [0.2, 0.5, 1.0])
def test_esft_trains_the_fewest_experts(score: str, top_p: float, trace: Trace, tmp_path: Path):
    """Whose scores sum to `top_p` of all."""
    export_trace(trace, "esft", tmp_path / "e", top_p=top_p, score=score)
    config = read(tmp_path / "e/a/expert_cfg.json")
    assert (config["shared_experts"], config["non_expert_modules"]) == (False, False)
    for layer in (1, 3):
        rows = assigned(trace).query("domain == 'a' and layer == @layer")
        mine = rows.groupby("expert")["weight"]
        share = (mine.size() if score == "token" else mine.sum()).sort_values(ascending=False)
        share /= share.sum()
        chosen = config["experts"][str(layer)]
        assert share[chosen].sum() >= top_p - 1e-6
        assert share[chosen[:-1]].sum() < top_p
        assert share[chosen].tolist() == pytest.approx(share.tolist()[: len(chosen)])


@pytest.mark.parametrize(
    ("format", "options", "said"),
    [
        ("esft", {"top_p": 0}, "--top-p is 0: give a share above 0, at most 1"),
        ("esft", {"top_p": float("nan")}, "--top-p is nan"),
        ("esft", {"by": "x"}, "no score 'x': there are reap, gate"),
        ("pruning", {"by": "x"}, "no score 'x': there are reap, gate"),
        ("pruning", {"by": "aimer"}, "add --weights MODEL"),
        ("esft", {"by": "ablation"}, "add --losses FILE"),
        ("esft", {"losses": "l.csv"}, "--losses is for ablation, not for frequency"),
        ("counts", {"by": "gate"}, "--by is an option of the format esft, pruning, not of counts"),
        ("pruning", {"by": "gate", "keep": 0.1}, "of 8 experts, but every token goes to 2"),
        ("pruning", {"top_p": 0.5}, "--top-p is an option of the format esft, not of pruning"),
        ("counts", {"top_p": 0.5}, "--top-p is an option of the format esft, not of counts"),
        ("counts", {"gpu_layers": 1}, "--gpu-layers is an option of the format llama-cpp, not of"),
        ("llama-cpp", {"gpu_layers": 4}, "--gpu-layers 4: 2 layers have experts"),
        ("llama-cpp", {}, "needs --gpu-layers"),
        ("sglang", {"safe_csv": True}, "--safe-csv is an option of the format counts, not of"),
    ],
)
def test_options_are_checked(format: str, options: dict, said: str, trace: Trace, tmp_path: Path):
    with pytest.raises(MoeInspectError, match=said):
        export_trace(trace, format, tmp_path / "o", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("score", ["gate", "frequency"])
def test_the_experts_with_the_least_scores_go(score: str, trace: Trace, tmp_path: Path):
    export_trace(trace, "pruning", tmp_path / "p.json", by=score, keep=0.6)
    plan = read(tmp_path / "p.json")
    assert (plan["format"], plan["by"], plan["keep"]) == (1, score, 0.6)
    assert plan["experts"] == {"1": E, "3": E}
    for layer in (1, 3):
        mine = assigned(trace).query("layer == @layer").groupby("expert")["weight"]
        worth = mine.sum() if score == "gate" else mine.size()
        assert plan["scores"][str(layer)] == pytest.approx(worth.tolist())
        gone = plan["dropped"][str(layer)]
        assert len(gone) == 3
        assert worth[gone].max() <= worth.drop(gone).min()


def test_as_many_experts_go_of_each_group(trace: Trace, tmp_path: Path):
    path = tmp_path / "t"
    shutil.copytree(trace.path, path)
    by_best = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    edit_manifest(path, model={**trace.manifest["model"], "config": by_best})
    export_trace(path, "pruning", tmp_path / "p.json", by="gate", keep=0.5)
    plan = read(tmp_path / "p.json")
    assert [e // 2 for e in plan["dropped"]["1"]] == [0, 1, 2, 3]
    # too few in each for a router that compares groups by their best two, or goes to one of them
    for config in (by_best | {"topk_method": "noaux_tc"}, by_best | {"topk_group": 1}):
        edit_manifest(path, model={**trace.manifest["model"], "config": config})
        with pytest.raises(MoeInspectError, match="leaves 1 expert in each of 4 groups"):
            export_trace(path, "pruning", tmp_path / "q.json", by="gate", keep=0.5)
    assert not (tmp_path / "q.json").exists()


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    out = tmp_path_factory.mktemp("norms") / "t"
    return moe_inspect.trace_model("demo", out, max_tokens=300, output_norms=True)


@pytest.mark.parametrize("score", ["reap", "ean", "mean-norm"])
def test_esft_trains_by_the_sizes_of_outputs_too(score: str, norms: Trace, tmp_path: Path):
    export_trace(norms, "esft", tmp_path / "e", top_p=0.5, by=score)
    export_trace(norms, "pruning", tmp_path / "p.json", by=score)
    column = {"reap": "reap", "ean": "ean_sum", "mean-norm": "mean_norm"}[score]
    whole, of_layer = (
        moe_inspect.report(norms, domains=domains).tables["worth"].query("layer == 2")
        for domains in (None, "c")
    )
    expected = whole[column].fillna(0).tolist()
    assert read(tmp_path / "p.json")["scores"]["2"] == pytest.approx(expected)
    worth_E = of_layer.set_index("expert")[column].fillna(0)
    summary = read(tmp_path / "e/c/summary.json")[f"{score}_scores"]["2"]
    assert list(summary.values()) == pytest.approx(worth_E.tolist())
    chosen = read(tmp_path / "e/c/expert_cfg.json")["experts"]["2"]
    share = worth_E / worth_E.sum()
    assert share[chosen[:-1]].sum() < 0.5 <= share[chosen].sum() + 1e-6
    assert share[chosen].is_monotonic_decreasing


def test_by_the_weights_of_the_experts(norms: Trace, tmp_path: Path):
    given = {"by": "aimer", "weights": "demo"}
    export_trace(norms, "esft", tmp_path / "e", top_p=0.5, **given)
    export_trace(norms, "pruning", tmp_path / "p.json", **given)
    plan = read(tmp_path / "p.json")
    table = moe_inspect.describe_weights("demo")["experts"].set_index("layer").loc[2]
    worth = 1 - table["aimer"].to_numpy()
    assert plan["scores"]["2"] == pytest.approx(worth.tolist())
    assert plan["dropped"]["2"] == sorted(np.argsort(worth)[:2].tolist())
    for folder in (tmp_path / "e").iterdir():
        chosen = read(folder / "expert_cfg.json")["experts"]["2"]
        assert chosen == np.argsort(-worth)[: len(chosen)].tolist()
        assert worth[chosen[:-1]].sum() < worth.sum() / 2 <= worth[chosen].sum()


def write_rows(rows: pd.DataFrame, path: Path) -> Path:
    write = {
        ".csv": lambda: rows.to_csv(path, index=False),
        ".json": lambda: rows.to_json(path, orient="records", lines=True),
        ".parquet": lambda: rows.to_parquet(path),
    }
    write[path.suffix]()
    return path


def every(**levels: Any) -> pd.DataFrame:
    return pd.MultiIndex.from_product(levels.values(), names=levels.keys()).to_frame(index=False)


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_by_the_losses_of_an_ablation(ending: str, trace: Trace, tmp_path: Path):
    """Its rows are in any order; experts without which the loss is less are not trained."""
    rows = every(layer=[1, 3], expert=range(E), domain=["a", "b/c"])
    rows["router"], rows["tokens"] = rows["layer"] // 2, np.where(rows["domain"] == "a", 100, 300)
    rows["difference"] = np.random.default_rng(0).normal(0.1, 0.2, len(rows)).round(6)
    rows = rows.sample(frac=1, random_state=1)
    given = {"by": "ablation", "losses": write_rows(rows, tmp_path / f"losses.{ending}")}
    export_trace(trace, "pruning", tmp_path / "p.json", **given)
    export_trace(trace, "esft", tmp_path / "e", top_p=0.6, **given)
    plan, config = read(tmp_path / "p.json"), read(tmp_path / "e/a/expert_cfg.json")
    for layer, part in rows.groupby("layer"):
        of_layer = part.pivot(index="expert", columns="domain", values="difference")
        whole = of_layer["a"] * 0.25 + of_layer["b/c"] * 0.75
        assert plan["scores"][str(layer)] == pytest.approx(whole.tolist())
        assert plan["dropped"][str(layer)] == sorted(whole.nsmallest(2).index)
        gain, chosen = of_layer["a"].clip(lower=0), config["experts"][str(layer)]
        assert gain[chosen].min() > 0
        assert gain[chosen[:-1]].sum() < 0.6 * gain.sum() <= gain[chosen].sum()
    assert (rows["difference"] < 0).any(), "control"
    keys = ["layer", "router", "expert"]
    whole = rows.drop(columns="domain").groupby(keys, as_index=False).sum()
    for wrong, said in (
        (rows[rows["domain"] == "a"], "no losses of the domain 'b/c', only of a"),
        (whole, "only of all text"),
        (rows[rows["expert"] != 5], "losses without 7 of 8 experts in layer 1"),
        (rows[rows["layer"] == 3], "losses without 0 of 8 experts in layer 1"),
        (rows.drop(columns="tokens"), "no column 'tokens': it is not a table of moe-inspect abl"),
        ("none.csv", "cannot read"),
        ("losses.txt", "are read from .csv"),
    ):
        path = tmp_path / (wrong if isinstance(wrong, str) else "wrong.csv")
        if not isinstance(wrong, str):
            write_rows(wrong, path)
        with pytest.raises(MoeInspectError, match=said):
            export_trace(trace, "esft", tmp_path / "f", by="ablation", losses=path)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_domain_may_have_any_name(ending: str, trace: Trace, tmp_path: Path):
    rows = every(layer=[1, 3], expert=range(E), domain=["007", "NA"])
    rows = rows.assign(tokens=9, difference=0.5, difference_low=np.nan, router=rows["layer"] // 2)
    for kept in (rows, rows[rows["domain"] == "007"]):
        path = write_rows(kept, tmp_path / f"losses.{ending}")
        assert list(losses_without(path, trace.routers)[1]) == kept["domain"].unique().tolist()


def test_sglang_gets_a_pt_as_its_recorder_writes_it(trace: Trace, tmp_path: Path):
    import torch

    export_trace(trace, "sglang", tmp_path / "s.pt")
    export_trace(trace, "sglang", tmp_path / "s.json")
    held = torch.load(tmp_path / "s.pt", weights_only=True)
    assert list(held) == ["logical_count"]
    assert held["logical_count"].dtype == torch.int64
    load = read(tmp_path / "s.json")["logical_count"]
    assert held["logical_count"].tolist() == [load]
    expected = assigned(trace).groupby(["layer", "expert"]).size()
    counted = {(layer, e): n for layer, of in enumerate(load) for e, n in enumerate(of) if n}
    assert counted == expected.to_dict()
    assert (len(load), {*map(len, load)}) == (4, {E})
    said: list[str] = []
    back = import_trace("sglang", [tmp_path / "s.pt"], tmp_path / "t", top_k=K, warn=said.append)
    assert [r.layer for r in back.routers] == [1, 3]
    assert back.n_tokens == T
    assert len(said) == 1  # of the dense layers: no config was given
    with pytest.raises(MoeInspectError, match=r"s\.npz: for SGLang the load is written as \.pt or"):
        export_trace(trace, "sglang", tmp_path / "s.npz")


@pytest.mark.parametrize(
    ("config", "stated"),
    [
        ({"num_layers": 28, "num_hidden_layers": 56}, 28),  # LongCat, two attentions per block
        ({"text_config": {"num_hidden_layers": 5}, "num_hidden_layers": 9}, 5),
        ({"layers_block_type": ["mamba", "moe", "attention"] * 2}, 6),
        ({"num_hidden_layers": 2}, 2),  # fewer than were recorded
        ({}, None),
    ],
)
def test_blocks_are_counted_in_one_way(
    config: dict[str, Any], stated: int | None, trace: Trace, tmp_path: Path
):
    shutil.copytree(trace.path, tmp_path / "t")
    edit_manifest(tmp_path / "t", model={"config": config})
    made = moe_inspect.open_trace(tmp_path / "t")
    assert made.stated_blocks == stated
    blocks = max(stated or 0, 4)
    export_trace(made, "sglang", tmp_path / "s.json")
    assert len(read(tmp_path / "s.json")["logical_count"]) == blocks
    placed = made.simulate.placement(gpus=2, policies=["contiguous"])
    assert placed.settings["layers"] == made.blocks == blocks


def test_long_parquet_is_a_row_an_assignment(trace: Trace, tmp_path: Path):
    export_trace(trace, "long-parquet", tmp_path / "l.parquet")
    found = duckdb.sql(f"select * from '{tmp_path}/l.parquet' order by router, token, slot").df()
    columns = ["token", "layer", "router", "slot", "expert", "weight", "token_id", "document"]
    columns += ["sequence", "position", "batch"]
    of_slots = assigned(trace)[columns].to_numpy(float)
    assert np.array_equal(found[columns].to_numpy(float), of_slots)


@pytest.mark.parametrize("format", MODULES)
def test_counts_alone_give_what_they_can(format: str, tmp_path: Path):
    trace = write_counts(tmp_path / "t", [np.arange(8)[None] + 10] * 2, 2)
    if format in ("esft", "long-parquet", "routed-experts"):
        with pytest.raises(MoeInspectError, match="holds counts only, no decisions"):
            export_trace(trace, format, tmp_path / "o")
        return
    if format == "pruning":
        with pytest.raises(MoeInspectError, match="has no output norms"):
            export_trace(trace, format, tmp_path / "o.json")
        export_trace(trace, format, tmp_path / "o.json", by="frequency")
        plan = read(tmp_path / "o.json")
        assert plan["dropped"] == {"0": [0, 1], "1": [0, 1]}
        return
    options = {"gpu_layers": 1} if format == "llama-cpp" else {}
    assert export_trace(trace, format, tmp_path / "o.json", **options).stat().st_size
    assert not list(tmp_path.glob(".*"))


def test_the_command(cli_here: Cli, trace: Trace, tmp_path: Path):
    def said(format: str, output: Any, *more: Any, check: int = 0) -> str:
        return cli_here(
            "export", trace.path, "--format", format, "-o", output, *more, check=check
        ).stderr

    assert "wrote c.csv" in said("counts", "c.csv")
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 2 * 2 * E
    said("esft", "e", "--top-p", 0.9, "--score", "gate")
    assert len(read(tmp_path / "e/a/expert_cfg.json")["experts"]["1"]) > 3
    assert "counts are written as" in said("counts", "c.txt", check=1)
    assert "within the trace" in said("counts", trace.path / "c.csv", check=1)
    said("nonsense", "c", check=2)


def test_the_help_lists_every_format(cli_here: Cli) -> None:
    said = " ".join(cli_here("export", "--help").stdout.split())
    assert set(exporters()) == set(MODULES)
    for name, exporter in exporters().items():
        assert f"{name} {exporter.writes}" in said
    assert exporters()["esft"].options == ["top_p", "by", "weights", "losses"]
    assert exporters()["sglang"].options == []


def test_llama_cpp_keeps_layers_whose_load_is_spread_on_the_gpu(cli_here: Cli, tmp_path: Path):
    """Of three layers the first has one busy expert, the second two, the third four."""
    loads = [[8, 0, 0, 0], [4, 4, 0, 0], [2, 2, 2, 2]]
    write_counts(tmp_path / "t", [np.array([load]) for load in loads], 1)
    for layers, on_cpu in ((0, "(0|1|2)"), (1, "(0|1)"), (2, "(0)")):
        cli_here("export", "t", "--format", "llama-cpp", "--gpu-layers", layers, "-o", "ot")
        line = (tmp_path / "ot").read_text()
        assert line == rf"-ot blk\.{on_cpu}\.ffn_(gate_up|gate|up|down)_exps=CPU" + "\n"
    pattern = re.compile(line.split()[1].removesuffix("=CPU"))
    assert pattern.search("blk.0.ffn_gate_exps.weight")
    assert not pattern.search("blk.10.ffn_gate_exps.weight")
    assert not pattern.search("blk.0.ffn_gate_shexp.weight")
    export_trace(tmp_path / "t", "llama-cpp", tmp_path / "ot", gpu_layers=3)
    assert (tmp_path / "ot").read_text() == "\n"

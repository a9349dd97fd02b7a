"""`simulate placement` and `simulate decode` as a user meets them, and on traces of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from moe_inspect.simulate.decode import simulate_decode
from moe_inspect.simulate.placement.placement import simulate_placement
from tests.conftest import ROOT, Cli
from tests.support.sweep import sample
from tests.support.synthetic import encoder_decoder, uniform_ids, write_counts, write_trace

TRACE = ROOT / "sample_traces/collapsed"
H200 = "--hardware h200 --engine vllm --dtype fp8"


COLUMNS = {
    "placement placement": "layer,router,policy,max_over_mean,balancedness,ranks_per",
    "placement policies": "policy,max_over_mean,worst_max_over_mean,fit_max",
    "placement windows": "window,first_token,tokens,part,layer,router,policy,max_over_mean",
    "placement plan": "layer,router,policy,slot,gpu,node,expert,replicas",
    "decode decode": "layer,router,batch,steps,distinct_experts,distinct_experts_low,distinct_",
    "decode batch_needed": "layer,router,reached_experts,reads_all_from,compute_bound_from",
    "decode speculation --draft 1,2": "batch,draft,acceptance,steps,distinct_experts,independent",
    f"placement imbalance {H200}": "phase,domain,tokens,steps,ms,even_ms",
    f"placement imbalance_layers {H200}": "phase,domain,tokens,layer,router",
    f"placement steps {H200}": "policy,tokens,ms,even_ms,cost,tokens_per_s,ms_p,current_p",
    "routing capacity_by_position": "layer,router,capacity_factor,position_in,tenth,assignments",
    "cache cache_by_phase": "layer,router,phase,policy,slots,hit_rate,hit_rate_warm,accesses",
    "routing routing": "layer,router,algorithm,experts_per_token,max_vio,max_vio_batch,mass,",
}


@pytest.mark.parametrize("names", sample(COLUMNS, 5))
def test_every_table_in_every_format(names: str, cli_here: Cli, tmp_path: Path) -> None:
    command, table, *options = names.split()
    shown = "simulate", command, TRACE, "--table", table, *options
    text = cli_here(*shown, "--format", "csv").stdout
    assert text.startswith(COLUMNS[names])
    rows = text.count("\n") - 1
    lines = cli_here(*shown, "--format", "json").stdout.splitlines()
    assert len(lines) == rows > 0
    assert json.loads(lines[0]).keys() == set(text.splitlines()[0].split(","))
    cli_here(*shown, "-o", "t.parquet")
    assert len(pd.read_parquet(tmp_path / "t.parquet")) == rows


SAID = {
    "decode --batch 1,8 --expert-mb 10": "1 sequence reads 2.0 experts per layer and step",
    "decode --batch 1,8 --draft 1,4": "1 sequence with drafts of 4 tokens: a",
    "routing --capacity-factor 1,1.5 --group-tokens sequence": "1.5, in groups of a sequence",
    "cache --slots 2,4 --policy lru,belady --expert-mb 90 --gb-per-s 25": "tokens/s",
    f"placement {H200}": "what imbalance costs is within the error of the",
    "routing --layers 3 --top-k 1,2": "As recorded, layer 3 is the least balanced: its busiest",
}


@pytest.mark.parametrize("line", sample(SAID, 3))
def test_a_verdict_a_picture_and_a_page(line: str, cli_here: Cli, tmp_path: Path) -> None:
    command, *options = line.split()
    shown = "simulate", command, TRACE, *options
    text = cli_here(*shown).stdout
    assert SAID[line] in text
    headline = cli_here(*shown, "--plots", ".", "--html", "page.html").stdout
    assert text.startswith(f"• {headline}")
    assert (tmp_path / f"{command}.png").stat().st_size > 10_000
    assert f"<title>moe-inspect simulate {command}" in (tmp_path / "page.html").read_text()


def test_placement_writes_plan_picture_and_page(cli_here: Cli, tmp_path: Path) -> None:
    placed = ["simulate", "placement", TRACE, "--gpus", 4, "--physical-experts", 12]
    placed += ["--policy", "contiguous,eplb,local-search"]
    done = cli_here(*placed, "-o", "plan.json", "--plots", ".", "--html", "page.html")
    assert "On 4 GPUs with the contiguous placement" in done.stdout
    assert "local-search, 4 MoE layers of 12 slots on 4 GPUs" in done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())["physical_to_logical_map"]
    assert [sorted(set(row)) for row in plan] == [list(range(8))] * 4
    assert (tmp_path / "placement.png").stat().st_size > 10_000
    page = (tmp_path / "page.html").read_text()
    assert "<title>moe-inspect simulate placement" in page
    assert "counts only" not in page  # a setting that does not apply
    cli_here(*placed, "-o", "plan.yaml")
    of_layers = yaml.safe_load((tmp_path / "plan.yaml").read_text())["initial_global_assignments"]
    assert of_layers == dict(enumerate(plan))
    done = cli_here(*placed, "--dispatch", "lp", "--plan-for", "vllm-ascend", "-o", "map.json")
    assert "for vllm-ascend" in done.stderr
    assert "linear program" in done.stdout
    first = json.loads((tmp_path / "map.json").read_text())["layer_list"][0]["device_list"]
    assert [e for device in first for e in device["device_expert"]] == plan[0]
    assert {len(device["device_expert"]) for device in first} == {3}


def test_bad_usage_exits_2_what_can_be_mended_1(cli_here: Cli, tmp_path: Path) -> None:
    counts = write_counts(tmp_path / "counts", [np.full((1, 8), 200)], 2).path
    no_order = "holds counts only, no order of tokens, which simulate"
    for code, trace, line, said in (
        (2, TRACE, "placement --table nothing", "no table 'nothing'"),
        (2, TRACE, "placement -o plan.png", "no format has this ending"),
        (2, TRACE, "placement --dispatch odd", "'odd' is not"),
        (2, TRACE, "placement --plan-for sglang", "give the file with -o"),
        (2, TRACE, "decode --batch 1,x", "'--batch': Input should be a valid integer"),
        (2, TRACE, "routing --group-tokens x", "is not a whole number, batch or sequence"),
        (2, TRACE, "decode --phase later", "'later' is not"),
        (1, TRACE, "placement --gpus 3", "8 experts over 3 GPUs: use a divisor, or a plan of --p"),
        (1, TRACE, f"placement --physical-experts {4 * 10**10}", "experts: use at most 1,048,576"),
        (1, TRACE, "placement --fit-share 0", "give a share of the trace above 0 and at most 1"),
        (1, TRACE, "placement --fit-share 0.99999", "lower --fit-share"),
        (1, counts, "decode", f"{no_order} decode needs"),
        (1, counts, "cache", f"{no_order} cache needs"),
        (1, counts, "routing", f"{no_order} routing needs"),
        (1, TRACE, "decode --expert-mb 0", "expert size 0.0 MB"),
        (1, TRACE, "decode --draft 0,2", "drafts of 0, 2 tokens: give numbers from 1 to 1,024"),
        (1, TRACE, "cache --expert-mb inf --gb-per-s 25", "expert size inf MB"),
        (1, TRACE, "routing --top-p 0.5,0", "top-p 0: give a number above 0 and at most 1"),
        (1, TRACE, "decode --batch 0", "batch size 0: give numbers from 1 to 16,777,216"),
    ):
        command, *options = line.split()
        error = cli_here("simulate", command, trace, *options, check=code).stderr
        assert said in " ".join(error.replace("│", " ").split())
        assert code == 2 or error.count("\n") == 1


def test_an_encoder_decoders_routers_see_their_own_tokens(tmp_path: Path) -> None:
    """The encoder sends its 6 tokens to expert 0, the decoder its 4 in turn to 0 and 1."""
    simulate = encoder_decoder(tmp_path / "t").simulate
    rows = simulate.placement(gpus=2, policies=["contiguous"], fit_share=1.0).tables["placement"]
    columns = ["max_over_mean", "ranks_per_token", "mean_load"]
    assert rows[columns].values.tolist() == [[2.0, 1.0, 3.0], [1.0, 1.0, 2.0]]
    rows = simulate.decode(batches=[1]).tables["decode"]
    assert rows[["steps", "from_marginals"]].values.tolist() == [[6, 1.0], [4, 1.0]]
    rows = simulate.cache(slots=[1], policies=["lru"]).tables["cache_by_phase"]
    found = rows[["router", "phase", "accesses", "hits"]].values.tolist()
    assert found == [[0, "encode", 6, 5], [1, "prefill", 4, 0]]
    tables = simulate.routing(
        algorithms=["as recorded", "top-k"], top_k=[1], capacity_factors=[1.0]
    ).tables
    assert tables["capacity"][["decisions", "dropped"]].values.tolist() == [[6, 3], [4, 0]]
    assert tables["capacity_tokens"][["tokens", "hit_anywhere"]].values.tolist() == [[10, 0.3]]
    found = tables["routing"][["tokens", "agreement", "max_vio"]].values.tolist()
    assert found == [[6, 1.0, 1.0]] * 2 + [[4, 1.0, 0.0]] * 2


def test_two_routers_a_layer_and_no_plan_file_holds_both(cli_here: Cli, tmp_path: Path) -> None:
    ids = [np.tile(np.array([[e]], np.uint16), (64, 1)) for e in (0, 1)]
    trace = write_trace(tmp_path / "t", ids, 2, layers=[3, 3])
    table = simulate_placement(trace, gpus=2, policies=["contiguous"]).tables["plan"]
    assert table.groupby("router")["expert"].apply(list).to_dict() == {0: [0, 1], 1: [0, 1]}
    assert simulate_decode(trace, batches=[1]).tables["decode"]["router"].tolist() == [0, 1]
    done = cli_here("simulate", "placement", trace.path, "--gpus", 2, "-o", "p.json", check=1)
    assert "one router per layer" in done.stderr


def test_256_experts_and_one_gpu(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [uniform_ids(np.random.default_rng(0), 600, 256, 8)], 256)
    one = simulate_placement(trace, gpus=1).tables["placement"]
    assert (one["max_over_mean"] == 1).all()
    assert (one["ranks_per_token"] == 1).all()
    many = simulate_placement(trace, gpus=8, nodes=2, physical_experts=288).tables["placement"]
    assert many["nodes_per_token"].between(1, 2).all()
    assert simulate_decode(trace, batches=[1]).tables["decode"]["distinct_experts"].item() == 8


ADVICE = {
    "routing": "takes a factor of",
    "decode": "reads hardly more experts",
    "cache": "worth caching?",
    "placement": "Recommended: ",
}


@pytest.mark.parametrize("name", ADVICE)
def test_of_too_little_data_nothing_is_advised(name: str, tmp_path: Path) -> None:
    ids = uniform_ids(np.random.default_rng(0), 2_000, 8, 2)
    for tokens, documents, why in (
        (2_000, 8, ""),
        (2_000, 7, "with fewer than 8 documents this may be the text, not the model."),
        (40, 8, "40 tokens are few for 8 experts: by chance alone the busiest gets"),
    ):
        document = np.arange(tokens) * documents // tokens
        of = write_trace(tmp_path / f"{tokens}-{documents}", [ids[:tokens]], 8, document=document)
        made = getattr(of.simulate, name)()
        assert any(ADVICE[name] in said for said in made.verdict) == (not why)
        assert made.verdict[0].startswith(f"Too little data to advise: {why}") == bool(why)
        assert len(next(iter(made.tables.values())))

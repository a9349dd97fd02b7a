"""What is exported is what was there: read back, or read as the tool reads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.exporters import MODULES
from moe_inspect.exporters.run import export_trace, exporters, options_of
from moe_inspect.making import import_trace
from moe_inspect.public import Trace
from tests.conftest import ROOT, Cli
from tests.support.damage import edit_manifest
from tests.support.synthetic import (
    assigned,
    encoder_decoder,
    thirty_documents,
    uniform_ids,
    write_counts,
    write_trace,
)

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


@pytest.mark.parametrize(
    ("format", "options", "said"),
    [
        ("pruning", {"by": "x"}, "no score 'x': there are reap, gate"),
        ("vllm", {}, "no format 'vllm': there are sglang, llama-cpp, pruning"),
        ("counts", {"by": "gate"}, "--by is an option of the format pruning, not of counts"),
        ("pruning", {"by": "gate", "keep": 0.1}, "of 8 experts, but every token goes to 2"),
        ("counts", {"gpu_layers": 1}, "--gpu-layers is an option of the format llama-cpp, not of"),
        ("llama-cpp", {"gpu_layers": 4}, "--gpu-layers 4: 2 layers have experts"),
        ("llama-cpp", {}, "needs --gpu-layers"),
        ("routing-profile", {}, r"-o .*o: a routing profile is written as \.json"),
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
def test_the_sizes_of_outputs_are_scores_too(score: str, norms: Trace, tmp_path: Path):
    export_trace(norms, "pruning", tmp_path / "p.json", by=score)
    worth = moe_inspect.report(norms).tables["worth"].query("layer == 2").fillna(0)
    worth["ean"] = worth["mean_norm"] * worth["assignments"]
    expected = worth[score.replace("-", "_")].tolist()
    assert read(tmp_path / "p.json")["scores"]["2"] == pytest.approx(expected)


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


@pytest.mark.parametrize(
    ("format", "options", "said"),
    [
        ("sglang", {}, "needs one router per layer, all with the same number of experts"),
        ("llama-cpp", {"gpu_layers": 1}, "llama.cpp has no encoder-decoders with experts"),
    ],
)
def test_a_model_that_a_tool_does_not_run_is_refused(
    format: str, options: dict[str, Any], said: str, tmp_path: Path
):
    """Of an encoder-decoder, layer 0 has two routers."""
    trace = encoder_decoder(tmp_path / "t")
    with pytest.raises(MoeInspectError, match=said):
        export_trace(trace, format, tmp_path / "o.json", **options)
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("format", MODULES)
def test_counts_alone_give_what_they_can(format: str, tmp_path: Path):
    trace = write_counts(tmp_path / "t", [np.arange(8)[None] + 10] * 2, 2)
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
    if format == "routing-profile":
        profile = read(tmp_path / "o.json")
        unknown = {"phases", "locality", "distinct_experts", "ranks", "intervals"}
        unknown |= {"drift"}
        assert set(profile["not_known"]) == {*unknown, "balanced_by_chance"}
        assert [of["assignments"] for of in profile["layers"]] == [[*range(10, 18)]] * 2
        known = {key for of in profile["layers"] for key in of}
        assert known == set(PROFILE["layers"][0]) - unknown - {"assignments_by_phase"}


REAL, EXPERTS, BY_NAME = (int, float, type(None)), [int], {str: [int]}
LAW = {"batch_tokens": int, "alpha": REAL, "error": float, "nearest": str}
LAW |= {"distances": {str: float}}
STEP = dict.fromkeys(("distinct_experts", "independent", "from_marginals"), float)
STEP |= dict.fromkeys(("distinct_experts_low", "distinct_experts_high"), REAL)
LAYER = dict.fromkeys(("layer", "router", "experts", "top_k", "tokens"), int)
LAYER |= {"assignments": EXPERTS, "share": [float], "assignments_by_domain": BY_NAME}
LAYER |= {"assignments_by_phase": BY_NAME, "balanced_by_chance": float, "power_law": [LAW]}
LAYER |= {"locality": dict.fromkeys(("shared", "low", "high", "by_chance"), float)}
LAYER |= {"distinct_experts": [STEP | {"batch": int, "steps": int}]}
LAYER |= {"ranks": [{"gpus": int, "ranks_per_token": float, "uniform": float}]}
LAYER |= {"drift": {"first_token": [int], "tokens": [int], "from_whole": [float]}}
LAYER["drift"] |= {"by_chance": [float]}
PROFILE: dict[str, Any] = dict.fromkeys(("format", "model", "trace"), str)
PROFILE |= dict.fromkeys(("version", "tokens"), int) | {"layers": [LAYER], "power_law": [LAW]}
PROFILE |= {"tokens_by_domain": {str: int}, "tokens_by_phase": {str: int}}
PROFILE |= {"not_known": {str: str}}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of this kind: a type, a list of a kind, an object with these keys, or
    with any ({str: kind})."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(one, kind[0]) for one in value)
    if isinstance(kind, dict) and str in kind:
        return all(fits(one, kind[str]) for one in value.values())
    if isinstance(kind, dict):
        return set(value) == set(kind) and all(fits(value[name], kind[name]) for name in kind)
    return isinstance(value, kind)


def names_of(kind: Any) -> set[str]:
    if isinstance(kind, list):
        return names_of(kind[0])
    if not isinstance(kind, dict) or str in kind:
        return set()
    return set(kind).union(*map(names_of, kind.values()))


def load_of(chosen: list[set[int]], tokens: Iterable[int]) -> list[int]:
    return [sum(e in chosen[t] for t in tokens) for e in range(E)]


def test_a_routing_profile_is_what_can_be_counted_by_hand(tmp_path: Path) -> None:
    trace = thirty_documents(tmp_path / "t", phases=("prefill", "decode"))
    export_trace(trace, "routing-profile", tmp_path / "p.json")
    profile = read(tmp_path / "p.json")
    assert fits(profile, PROFILE)
    assert not fits(profile | {"tokens": "300"}, PROFILE), "control"
    documented = (ROOT / "docs/import.md").read_text()
    assert {name for name in names_of(PROFILE) if f"`{name}`" not in documented} == set()
    assert profile["not_known"].keys() == {"distinct_experts"}
    assert profile["tokens_by_phase"] == {"prefill": 150, "decode": 150}
    tokens, ways = trace.tokens(), {"domain": ("a", "b"), "phase": ("prefill", "decode")}
    for layer in profile["layers"]:
        rows = trace.routing(layers=layer["layer"])[["expert_0", "expert_1"]].to_numpy(float)
        chosen = [{int(e) for e in row if e == e} for row in rows]
        counted = partial(load_of, chosen)
        whole = counted(range(300))
        assert layer["assignments"] == whole
        assert layer["share"] == pytest.approx(np.array(whole) / sum(whole))
        for by, labels in ways.items():
            groups = {name: np.flatnonzero(tokens[by] == name) for name in labels}
            assert layer[f"assignments_by_{by}"] == {n: counted(of) for n, of in groups.items()}
        pairs = [(t - 1, t) for t in range(300) if t % 10]
        shared = sum(len(chosen[a] & chosen[b]) for a, b in pairs)
        most = sum(len(chosen[a]) + len(chosen[b]) for a, b in pairs) / 2
        locality = layer["locality"]
        assert locality["shared"] == pytest.approx(shared / most)
        assert locality["low"] < locality["shared"] < locality["high"]
        apart = [np.array(counted(np.flatnonzero(tokens["domain"] == n))) / 150 for n in "ab"]
        assert locality["by_chance"] == pytest.approx(sum(135 * (a**2).sum() for a in apart) / most)
        decoded = np.flatnonzero(tokens["phase"] == "decode").reshape(15, 10)
        assert [row["batch"] for row in layer["distinct_experts"]] == [1, 2, 4, 8]
        for row in layer["distinct_experts"]:
            B = row["batch"]
            starts = [(p, n) for p in range(10) for n in range(0, 15 - B + 1, B)]
            read_of = [
                len(set().union(*(chosen[t] for t in decoded[n : n + B, p]))) for p, n in starts
            ]
            assert (row["steps"], row["distinct_experts"]) == (
                len(read_of),
                pytest.approx(np.mean(read_of)),
            )
        for row in layer["ranks"]:
            size = E // row["gpus"]
            on = np.mean([len({e // size for e in of}) for of in chosen])
            assert row["ranks_per_token"] == pytest.approx(on, abs=1e-6)
            sets = [len({a // size, b // size}) for a in range(E) for b in range(a)]
            assert row["uniform"] == pytest.approx(np.mean(sets))
        assert [row["gpus"] for row in layer["ranks"]] == [2, 4]
        drift = layer["drift"]
        assert (sum(drift["tokens"]), drift["first_token"][:2]) == (300, [0, 5])
        for first, size, apart in zip(
            drift["first_token"], drift["tokens"], drift["from_whole"], strict=True
        ):
            of = np.array(counted(range(first, first + size)))
            away = np.abs(of / of.sum() - np.array(whole) / sum(whole)).sum() / 2
            assert apart == pytest.approx(away)
        # the text does not drift
        assert np.mean(drift["from_whole"]) == pytest.approx(np.mean(drift["by_chance"]), rel=0.15)


def law_loads(rng: np.random.Generator, alpha: float, E: int, k: int, tokens: int) -> np.ndarray:
    """The tokens of each expert of a batch, as aiconfigurator draws them for its power laws."""
    low, high = 1.0, 0.8 * tokens
    ends = low ** (1 - alpha), high ** (1 - alpha)
    x_E = ((ends[1] - ends[0]) * rng.random(E) + ends[0]) ** (1 / (1 - alpha))
    return np.minimum(np.round(x_E / x_E.sum() * tokens * k), tokens).astype(np.int64)


@pytest.mark.parametrize(("which", "tokens"), [(0, 128), (1, 8192)])
@pytest.mark.parametrize("alpha", [0.6, 1.01, 1.2])
def test_the_exponent_is_that_of_aiconfigurator(
    alpha: float, which: int, tokens: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    loads = [law_loads(rng, alpha, 128, 8, tokens)[None] for _ in range(30)]
    export_trace(write_counts(tmp_path / "t", loads, 8), "routing-profile", tmp_path / "p.json")
    found = read(tmp_path / "p.json")["power_law"][which]
    assert (found["batch_tokens"], found["alpha"]) == (tokens, pytest.approx(alpha, abs=0.07))
    if alpha > 1:
        assert found["nearest"] == f"power_law_{alpha}"
    assert found["error"] < 0.07 < found["distances"]["balanced"]


@pytest.mark.parametrize("tokens", [20, 5000])
def test_a_random_router_has_no_exponent(tokens: int, tmp_path: Path) -> None:
    """However few tokens make its load uneven; what is uneven beyond chance has one."""
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, tokens, 64, 4) for _ in range(100)]
    score_TE = np.linspace(0, 6, 64) + rng.gumbel(size=(tokens, 64))
    ids.append(np.argsort(-score_TE, 1)[:, :4])
    loads = [np.bincount(of.ravel(), minlength=64)[None] for of in ids]
    export_trace(write_counts(tmp_path / "t", loads, 4), "routing-profile", tmp_path / "p.json")
    profile = read(tmp_path / "p.json")
    found = [of["power_law"][0]["alpha"] for of in profile["layers"]]
    assert 90 <= found[:-1].count(None) <= 99
    assert found[-1] is not None
    assert [(of["alpha"], of["nearest"]) for of in profile["power_law"]] == [(None, "balanced")] * 2


def test_a_profile_of_one_document_has_no_intervals(tmp_path: Path) -> None:
    ids = uniform_ids(np.random.default_rng(0), 90, 6, 2)
    ids[50:] = np.iinfo(np.uint16).max
    trace = write_trace(tmp_path / "t", [ids, ids * 0 + ids.max()], 6)
    export_trace(trace, "routing-profile", tmp_path / "p.json")
    profile = read(tmp_path / "p.json")
    assert profile["not_known"]["intervals"] == "1 document: an interval needs 5"
    some, none = profile["layers"]
    assert (some["locality"]["low"], none["locality"]["shared"]) == (None, None)
    assert none["share"] == [None] * 6
    assert {"drift", "power_law"} & set(none) == set()
    assert [row["gpus"] for row in some["ranks"]] == [2]
    export_trace(write_trace(tmp_path / "odd", [ids], 7), "routing-profile", tmp_path / "q.json")
    of_seven = read(tmp_path / "q.json")
    assert of_seven["not_known"]["ranks"].startswith("2, 4, 8, … GPUs cannot hold as many experts")
    assert "ranks" not in of_seven["layers"][0]
    trace = write_trace(tmp_path / "none", [ids[50:]], 6)
    with pytest.raises(MoeInspectError, match=r"no router of .* made an assignment"):
        export_trace(trace, "routing-profile", tmp_path / "p.json")


def test_the_command(cli_here: Cli, trace: Trace, tmp_path: Path):
    def said(format: str, output: Any, *more: Any, check: int = 0) -> str:
        return cli_here(
            "export", trace.path, "--format", format, "-o", output, *more, check=check
        ).stderr

    assert "wrote c.csv" in said("counts", "c.csv")
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 2 * 2 * E
    said("pruning", "p.json", "--by", "gate", "--keep", 0.5)
    assert read(tmp_path / "p.json")["by"] == "gate"
    assert "counts are written as" in said("counts", "c.txt", check=1)
    assert "within the trace" in said("counts", trace.path / "c.csv", check=1)
    said("nonsense", "c", check=2)


def test_the_help_lists_every_format(cli_here: Cli) -> None:
    said = " ".join(cli_here("export", "--help").stdout.split())
    assert set(exporters()) == set(MODULES)
    for name, (_, writes) in MODULES.items():
        assert f"{name} {writes}" in said
    assert options_of(exporters()["pruning"]) == ["keep", "by"]
    assert options_of(exporters()["sglang"]) == []


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

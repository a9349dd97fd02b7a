"""`moe-inspect doctor`: the page and its JSON, without torch, with a model, and what is not in
them."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral

from moe_inspect.doctor import costs
from moe_inspect.doctor.page import page, version_of
from moe_inspect.errors import MoeInspectError
from tests.conftest import ROOT, Cli, Put, phases_begun
from tests.support.families import NO_INTERFACE, build


@pytest.fixture
def quick(put: Put) -> None:
    put(costs, ROUNDS=1, BLOCK_SECONDS=0.0)


def test_page_and_json_name_versions_and_nothing_private(cli_here: Cli, tmp_path: Path) -> None:
    (tmp_path / "secret-project").mkdir()
    asked = ("doctor", "--no-measure", "--directory", "secret-project")
    text, shown = cli_here(*asked).stdout, cli_here(*asked, "--json").stdout
    for name in ("moe-inspect", "torch", "transformers", "pyarrow"):
        assert f"  {name:<28}{version_of(name)}\n" in text
    assert "tap                         yes" in text
    if not torch.cuda.is_available():
        assert "Triton kernels              no: " in text
    assert "free" in text
    assert "not measured" not in text
    assert max(map(len, text.splitlines())) <= 100
    facts = json.loads(shown)
    assert torch.__version__.startswith(facts["versions"]["torch"])  # some builds add +cu130
    assert facts["devices"][0]["device"] == "cpu"
    assert all(row["possible"] or row["note"] for row in facts["captures"])
    assert {"costs", "model"}.isdisjoint(facts)
    assert page(facts) + "\n" == text
    names = {getpass.getuser(), socket.gethostname(), "secret-project", str(tmp_path), str(ROOT)}
    values = {value for key, value in os.environ.items() if "PATH" in key or key.endswith("TOKEN")}
    assert "platform" in shown
    assert [name for name in names | values if len(name) > 3 and name in shown] == []


def test_without_torch_it_says_what_is_possible_all_the_same(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "hide").mkdir()
    missing = 'raise ModuleNotFoundError("No module named torch", name="torch")'
    (tmp_path / "hide/torch.py").write_text(missing)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'hide'}:{ROOT}"}
    text = cli("doctor", env=environment).stdout
    assert "no: torch is not installed: pip install 'moe-inspect[trace]'" in text
    assert "reports and simulations     yes" in text
    assert "MB/s" in text or "GB/s" in text
    done = cli("doctor", "demo", check=1, env=environment)
    assert done.stderr == "error: this needs torch: pip install 'moe-inspect[trace]'\n"


def test_what_cannot_be_found_or_written_is_one_line(cli_here: Cli, tmp_path: Path) -> None:
    for arguments, says in (
        (("--directory", "none"), "error: cannot write none: No such file or directory\n"),
        (("./none",), "error: no model at ./none: .*\n"),
    ):
        done = cli_here("doctor", "--no-measure", *arguments, check=1)
        assert re.fullmatch(says, done.stderr)
        assert not done.stdout


def test_with_a_model_prefill_and_decode_are_measured(cli_here: Cli, quick: None) -> None:
    with phases_begun() as begun:
        facts = json.loads(cli_here("doctor", "demo", "--json").stdout)
    measuring = ["measuring the disk", "checking kernels", "measuring costs"]
    of_model = ["loading the model", "measuring the model", "auditing the balancing loss"]
    assert begun == ["loading torch", *measuring, *of_model]
    shown = facts["model"]
    assert (shown["id"], shown["routers"], shown["experts"], shown["top_k"]) == ("demo", 4, 8, 2)
    assert [row["phase"].split(",")[0] for row in shown["speed"]] == ["prefill", *["decode"] * 2]
    for row in shown["speed"]:
        assert list(row["traced_over_untraced"]) == ["tap", "dispatch", "counts only"]
        for name, ratio in row["traced_over_untraced"].items():
            of, traced = row["seconds"]["untraced"], row["seconds"][name]
            assert ratio == {k: pytest.approx(of[k] / traced[k]) for k in ("wall", "cpu")}
            assert of["cpu"] > 0
    assert set(facts["costs"]["record_on_cpu_us"]) == {"tap", "dispatch", "counts only"}
    known = {
        "tap": (12.0, 20.4, 31.0),
        "dispatch": (0.0, 5.0, 9.0),
        "counts only": (-9.0, 1.0, 4.0),
    }
    said = page({**facts, "costs": {**facts["costs"], "record_on_cpu_us": known}})
    assert "router call, tap            20 µs of CPU time (quartiles 12 to 31 µs)\n" in said
    assert said.count("too little to be measured here (quartiles ") == 2
    text = page(facts)
    assert "tap 0." in text or "tap 1." in text
    assert "launch of a kernel          not measured: no GPU" in text or torch.cuda.is_available()
    assert {"loss_formula", "loss_pooled"} <= {of["kind"] for of in shown["balancing_loss"]}
    assert "\n  warning                     The loss is pooled over 4 routers: " in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_balancing_loss_that_balances_nothing_exits_with_3(
    cli_here: Cli, quick: None, put: Put
) -> None:
    put(modeling_mixtral, load_balancing_loss_func=lambda logits, *_: 0 * logits[0].sum())
    shown = cli_here("doctor", "demo", check=3).stdout
    assert "  critical                    The balancing loss is 0 in every pass.\n" in shown


def test_the_time_of_a_recorder_is_in_the_traced_time(quick: None) -> None:
    """A positive control: a model that is slow, on purpose, while it has a recorder's hooks."""
    network = build("qwen3_moe")

    def slow(*_: object) -> None:
        until = time.process_time() + 0.2
        while len({*network._forward_pre_hooks, *network._forward_hooks}) > 1:
            if time.process_time() > until:
                break

    network.register_forward_pre_hook(slow)
    found = costs.timed(network, costs.prefill_phase(network, torch.arange(8).view(2, 4)), ["tap"])
    assert found["tap"].cpu > 0.2
    assert found["tap"].cpu > found["untraced"].cpu + 0.1


def test_what_a_model_cannot_record_has_its_reason() -> None:
    network = build(next(iter(NO_INTERFACE)))  # transformers' experts interface
    rows = {r["capture"]: r for r in costs.captures_of(network, costs.find_routers(network))}
    assert rows["tap"]["possible"]
    assert not rows["dispatch"]["possible"]
    assert "use --capture tap" in rows["dispatch"]["note"]
    network.get_submodule("model").layers = torch.nn.ModuleList()
    with pytest.raises(MoeInspectError, match="no routers"):
        costs.find_routers(network)


def test_a_model_without_a_cache_has_no_decode() -> None:
    network = build("qwen3_moe")
    phase = costs.decode_phase(network, torch.arange(4).view(1, 4))
    forward = network.forward
    network.forward = lambda **given: forward(**{**given, "use_cache": False})
    assert "cache" in costs.speed_of(network, phase, ["tap"])["not_measured"]

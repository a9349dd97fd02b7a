"""`moe-inspect doctor`: the page and its JSON, without torch, and what is not in them."""

from __future__ import annotations

import getpass
import json
import os
import socket
from pathlib import Path

import pytest
import torch

from moe_inspect import doctor
from moe_inspect.capture.hook import first_launch, kernels
from moe_inspect.doctor import page, version_of
from tests.conftest import ROOT, Cli, Put, phases_begun


def test_page_and_json_name_versions_and_nothing_private(cli_here: Cli, tmp_path: Path) -> None:
    (tmp_path / "secret-project").mkdir()
    asked = ("doctor", "--directory", "secret-project")
    text = cli_here(*asked).stdout
    with phases_begun() as begun:
        shown = cli_here(*asked, "--json").stdout
    assert begun == ["loading torch", "measuring the disk", "checking kernels"]
    for name in ("moe-inspect", "torch", "transformers", "pyarrow"):
        assert f"  {name:<28}{version_of(name)}\n" in text
    assert "tap                         yes" in text
    if not torch.cuda.is_available():
        assert "Triton kernels              no: " in text
        assert "no GPU                      torch runs instead" in text
    assert "free, writes " in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 40
    facts = json.loads(shown)
    assert torch.__version__.startswith(facts["versions"]["torch"])  # some builds add +cu130
    assert facts["devices"][0]["device"] == "cpu"
    assert all(row["possible"] or row["note"] for row in facts["captures"])
    assert page(facts).splitlines()[:12] == text.splitlines()[:12]
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


def test_a_directory_that_cannot_be_written_is_one_line(cli_here: Cli) -> None:
    done = cli_here("doctor", "--directory", "none", check=1)
    assert done.stderr == "error: cannot write none: No such file or directory\n"
    assert not done.stdout


@pytest.fixture
def interpreted(put: Put) -> None:
    """The CPU is a GPU where no kernel has run."""
    if kernels.triton is None:
        pytest.skip("no triton on this platform")
    put(kernels, runs_triton=lambda tensor: True)
    put(first_launch, FOUND={})
    put(doctor, gpus=lambda: [torch.device("cpu")], TOKENS=(1024, 8))


@pytest.mark.usefixtures("interpreted")
def test_right_kernels_take_a_line(cli_here: Cli) -> None:
    done = cli_here("doctor")
    assert "\nTriton kernels\n  cpu                         7 of 7 kernels right\n" in done.stdout
    assert done.stderr == ""


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_kernel_is_named_and_exits_with_1(cli_here: Cli, put: Put) -> None:
    put(kernels, dispatch_triton=lambda *of, **_: kernels.dispatch_torch(*of[:3]))
    done = cli_here("doctor", check=1)
    assert "  cpu                         5 of 7 kernels right\n" in done.stdout
    for name in ("dispatch", "dispatch in two launches"):
        wrong = f"WRONG: {name} gives a wrong result; torch runs instead\n"
        assert f"{'':30}{wrong}" in done.stdout
    on = "dispatch in two launches on cpu, dispatch on cpu"
    assert f"error: kernels that are wrong: {on}; torch does their work" in done.stderr
    rows = json.loads(cli_here("doctor", "--json", check=1).stdout)["kernels"]
    assert [row["kernel"] for row in rows if row["wrong"]] == on.replace(" on cpu", "").split(", ")


@pytest.mark.usefixtures("interpreted")
def test_a_gpu_that_computes_no_more_is_named(cli_here: Cli, put: Put) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    put(kernels, record=fail)
    done = cli_here("doctor", check=1)
    assert "WRONG: the others cannot be run: an illegal memory access" in done.stdout

"""CONTRIBUTING.md's walks, each carried out on a copy of the package."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from moe_inspect.errors import MoeInspectError
from tests.conftest import ROOT, in_one_process
from tests.support.synthetic import write_counts

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
SAMPLE = ROOT / "sample_traces/collapsed"


class Copy:
    """A copy of the package, which its commands import instead of this one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(Path(moe_inspect.__file__).parent, root / "moe_inspect")

    def follow(self, title: str) -> list[str]:
        """Writes the files and inserts the lines of a section. Returns the files."""
        section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
        assert section, title
        blocks = re.findall(
            r"(?:New file|In) `([^`]+)`(?:, after `([^`]+)`)?:\n\n```python\n(.*?)^```",
            section[1],
            re.S | re.M,
        )
        assert blocks, title
        for name, anchor, text in blocks:
            path = self.root / name
            if name.startswith("tests/") and not path.exists():
                shutil.copytree(ROOT / "tests", self.root / "tests")
            if anchor:
                before = path.read_text()
                assert before.count(f"{anchor}\n") == 1, f"{name}: {anchor}"
                space = "" if text[0] == " " else "\n\n"  # functions stand apart
                path.write_text(before.replace(f"{anchor}\n", f"{anchor}\n{space}{text}"))
            else:
                assert not path.exists(), name
                path.write_text(text)
        return [name for name, _, _ in blocks]

    def python(self, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def cli(self, *commands: str, fails: int = 0) -> list[str]:
        """What commands print, all in one process. The last of them may fail: its error."""
        done = in_one_process(self.root, *map(shlex.split, commands), PYTHONPATH=str(self.root))
        codes = [0] * (len(done) - 1) + [fails]
        assert [one.returncode for one in done] == codes, "\n".join(one.stderr for one in done)
        return [one.stderr if one.returncode else one.stdout for one in done]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_the_blocks_are_formatted_and_linted(copy: Copy) -> None:
    """As what a contributor would commit."""
    shutil.copy(ROOT / "pyproject.toml", copy.root)
    files = {f for title in re.findall(r"^## (Add .*)$", PAGE, re.M) for f in copy.follow(title)}
    for command in (["check"], ["format", "--check"]):
        copy.python("-m", "ruff", *command, "--no-cache", *sorted(files))


def test_a_metric(copy: Copy) -> None:
    copy.follow("Add a metric")
    listed, balance, load, gate = copy.cli(
        "report --list-metrics --format csv",
        f"report {SAMPLE} --table balance --format json",
        f"report {SAMPLE} --table load --format json",
        f"report {SAMPLE} --fail-above spread=0.01",
        fails=3,
    )
    assert "spread" in listed
    experts = [json.loads(line) for line in load.splitlines()]
    for row in map(json.loads, balance.splitlines()):
        least = min(of["load_ratio"] for of in experts if of["router"] == row["router"])
        assert row["spread"] == pytest.approx(row["max_over_mean"] - least)
    assert "spread" in gate


def test_a_chart(copy: Copy) -> None:
    copy.follow("Add a chart")
    write_counts(copy.root / "t", [np.full((1, 8), 200)], 2)  # few charts are drawn of it
    copy.cli("report t --plots plots --html page.html")
    assert {p.name for p in (copy.root / "plots").iterdir()} >= {"entropy.png", "entropy.svg"}
    assert "Entropy of the load" in (copy.root / "page.html").read_text(encoding="utf-8")


def test_a_finding(copy: Copy) -> None:
    copy.follow("Add a finding")
    write_counts(copy.root / "t", [np.array([[9_000, 1_000, 1_000, 1_000]])] * 5, 1)
    [verdict] = copy.cli("report t --table verdict --format json")
    [row] = [row for row in map(json.loads, verdict.splitlines()) if "same_" in row["kind"]]
    assert row["values"] == {"expert": 0, "routers": 5, "by_chance": 4**-4}
    assert row["text"].startswith("Expert 0 is the busiest at all 5 routers; by chance 0.39% of")
    cases = "same_busiest_expert or every_kind_of_sentence"
    assert "2 passed" in copy.python("-m", "pytest", "-q", "tests/test_kinds.py", "-k", cases)


def test_a_placement_policy(copy: Copy) -> None:
    copy.follow("Add a placement policy")
    placed = f"simulate placement {SAMPLE} --gpus 4 --policy snake,contiguous --table"
    policies, plan = copy.cli(f"{placed} policies --format json", f"{placed} plan --format json")
    snake, contiguous = map(json.loads, policies.splitlines())
    assert snake["policy"] == "snake"
    assert snake["fit_max_over_mean"] < contiguous["fit_max_over_mean"]
    assert {row["policy"] for row in map(json.loads, plan.splitlines())} == {"snake"}


def test_an_importer(copy: Copy) -> None:
    copy.follow("Add an importer")
    (copy.root / "code.tally.json").write_text(json.dumps({"1": [3, 1, 2, 0], "3": [1, 1, 2, 2]}))
    shown, *_, load = copy.cli(
        "import --help",
        "import auto code.tally.json -o t --top-k 2",
        "check t",
        "report t --table load --format json",
    )
    assert "tally" in shown
    rows = [json.loads(line) for line in load.splitlines()]
    assert [r["assignments"] for r in rows if r["layer"] == 1] == [3, 1, 2, 0]
    assert [r["assignments"] for r in rows if r["layer"] == 3] == [1, 1, 2, 2]


def test_a_command(copy: Copy) -> None:
    copy.follow("Add a command")
    shown, rows = copy.cli("--help", f"busiest {SAMPLE} --format json")
    assert "List the busiest expert of each layer." in shown
    assert [json.loads(row)["layer"] for row in rows.splitlines()] == [0, 1, 2, 3]


TOY = """
import moe_inspect
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

H, E, K, CHOSEN = 16, 4, 2, []


class ToyGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.top_k, self.score = E, K, nn.Linear(H, E)

    def forward(self, hidden):
        return self.score(hidden).softmax(-1)


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.linears = ToyGate(), nn.ModuleList(nn.Linear(H, H) for _ in range(E))

    def forward(self, hidden):
        weights, ids = self.gate(hidden.flatten(0, 1)).topk(K)
        CHOSEN.append(ids)
        every = torch.stack([linear(hidden.flatten(0, 1)) for linear in self.linears], 1)
        chosen = every.gather(1, ids[..., None].expand(-1, -1, H))
        return hidden + (weights[..., None] * chosen).sum(1).view_as(hidden)


class ToyMoe(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens, self.head = nn.Embedding(50, H), nn.Linear(H, 50)
        self.layers = nn.ModuleList(ToyBlock() for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **options):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.head(hidden))


sizes = {"num_hidden_layers": 2, "hidden_size": H, "vocab_size": 50}
config = PretrainedConfig(**sizes, num_experts=E, num_experts_per_tok=K)
model = ToyMoe(config).eval()
with torch.no_grad(), moe_inspect.record(model, "t"):
    model(input_ids=torch.arange(10)[None])
trace = moe_inspect.open_trace("t")
for layer, ids in enumerate(CHOSEN):
    recorded = trace.routing(layers=layer)[["expert_0", "expert_1"]].to_numpy().tolist()
    assert recorded == ids.tolist(), (layer, recorded, ids)
print(len(CHOSEN), "layers recorded")
"""


def test_a_model_family(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy.root / "toy.py").write_text(TOY)
    monkeypatch.chdir(copy.root)
    with pytest.raises(MoeInspectError, match="no known router"):  # as it is, it is refused
        runpy.run_path("toy.py")
    copy.follow("Add a model family")
    assert copy.python("toy.py") == "2 layers recorded\n"

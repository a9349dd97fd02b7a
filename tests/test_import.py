"""Each foreign format, made from known decisions, comes back as those."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import MODULES
from moe_inspect.reporting.report import report
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify
from tests.conftest import Cli
from tests.support import foreign
from tests.support.foreign import FORMAT_OF, MAKERS, ROUTED, config_file
from tests.support.importing import decisions, loads, refused, taken


def imported(
    name: str, root: Path, format: str | None = None
) -> tuple[Trace, foreign.Made, list[str]]:
    (root / "in").mkdir()
    made = MAKERS[name](root / "in")
    model = config_file(root) if made.config else None
    trace, said = taken(root, format or FORMAT_OF[name], made.source, model=model)
    return trace, made, said


def test_every_format_has_a_file_made_for_it():
    assert set(FORMAT_OF.values()) == set(MODULES)


@pytest.mark.parametrize("name", MAKERS)
def test_what_was_written_comes_back(name: str, tmp_path: Path):
    trace, made, (recognised, *said) = imported(name, tmp_path, "auto")
    assert recognised.startswith(f"recognised as {FORMAT_OF[name]}: ")
    assert said == []
    assert trace.status == "complete"
    assert (found := verify(trace.path)).ok, found
    assert tuple(r.layer for r in trace.routers) == made.layers
    assert {(r.experts, r.top_k) for r in trace.routers} == {(made.experts, made.top_k)}
    assert trace.manifest["capture"]["mode"] == "import"
    assert trace.manifest["capture"]["format"] == FORMAT_OF[name]
    if made.ids is not None:
        for r, ids_TK in enumerate(made.ids):
            assert np.array_equal(decisions(trace, r), ids_TK)
            assert trace.has_weights == (made.weights is not None)
            if made.weights is not None:
                table = trace.routing(router=r)[["weight_0", "weight_1"]]
                assert np.array_equal(table.to_numpy(), made.weights)
        assert trace.n_tokens == len(made.ids[0])
    else:
        assert loads(trace).tolist() == np.array(made.load).tolist()
        assert trace.counts()["first_choice"].isna().all()
    assert not list(tmp_path.glob(".t*"))
    balance, load = report(trace).tables["balance"], made.load or foreign.loads(made.ids or [])
    assert balance["assignments"].tolist() == [int(load_E.sum()) for load_E in load]
    ratios = [load_E.max() / load_E.mean() for load_E in load]
    assert balance["max_over_mean"].tolist() == pytest.approx(ratios)
    assert report(trace).verdict()


TOKENS: dict[str, dict[str, list[Any]]] = {
    "vllm-routed": {
        "phase": ["prefill"] * 4 + ["decode"] * 2 + ["prefill"] * 5 + ["decode"] * 5,
        "position": [*range(6), 0, *range(9)],
        "token_id": [0, 1, 2, 3, 50, 51, 0, 0, 1, 2, 3, 50, 51, 52, 53, 54],
        "document": [0] * 6 + [1] + [2] * 9,
        "domain": ["a"] * 6 + ["b"] + ["a"] * 9,
    },
    # positions start where its start says
    "sglang-routed": {"position": [*range(3, 10)], "phase": ["prefill"] * 2 + ["decode"] * 5},
    "sglang-per_token": {
        "sequence": [0] * 4 + [1] * 3 + [2, 3, 4],
        "position": [0, 1, 2, 3, 5, 6, 7, 4, 8, 30],
        "batch": [0] * 7 + [1] * 3,
        "phase": ["prefill"] * 7 + ["decode"] * 3,
    },
    # a prompt's tag is its domain
    "moe-policylang": {
        "domain": ["code"] * 5 + ["chat"] * 4,
        "position": [*range(5), *range(4)],
        "token_id": [*range(9)],
        "phase": ["prefill"] * 3 + ["decode"] * 2 + ["prefill"] * 3 + ["decode"],
    },
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_have_their_place(name: str, tmp_path: Path):
    tokens = imported(name, tmp_path)[0].tokens()
    assert {column: tokens[column].tolist() for column in TOKENS[name]} == TOKENS[name]


def test_prompts_of_one_token_in_an_sglang_pass(tmp_path: Path):
    """Of a mixed pass a single token is a prompt where it is the first of its sequence."""
    ids = foreign.drawn(9)
    records = [
        foreign.sglang_pass(0, [i[:4] for i in ids], 1, [*range(4)], [0, 4, 5, 7], [1, 2, 1]),
        foreign.sglang_pass(1, [i[4:] for i in ids], 3, [*range(5)], [0, 0, 1, 2, 9], [1, 3, 1]),
    ]
    foreign.write_recorder(tmp_path / "r.pt", records)
    trace, _ = taken(tmp_path, "sglang", tmp_path / "r.pt", model=config_file(tmp_path))
    tokens = trace.tokens()
    assert tokens["phase"].tolist() == ["prefill"] * 8 + ["decode"]
    assert tokens["document"].tolist() == [0, 1, 1, 2, 3, 4, 4, 4, 5]
    assert tokens["position"].tolist() == [0, 4, 5, 7, 0, 0, 1, 2, 9]
    assert np.array_equal(decisions(trace, 1), ids[1])


RINGS = [([0, 1, 2, None, None], 3), ([0, None, 2, None], 3), ([0, 1, 2], 1), ([3, None, 2], 1)]


@pytest.mark.parametrize(("rows", "windows"), [*RINGS, ([0], 1)])
def test_a_full_ring_of_an_sglang_recorder_is_not_read_as_time(
    rows: list[int | None], windows: int, tmp_path: Path
):
    """Row by row the seed of its pass, None where there was none."""
    import torch

    count = np.zeros((len(rows), foreign.LAYERS, foreign.E), np.int32)
    for s, seed in ((s, seed) for s, seed in enumerate(rows) if seed is not None):
        for layer, ids_TK in zip(ROUTED, foreign.drawn(20, seed), strict=True):
            count[s, layer] = np.bincount(ids_TK.reshape(-1), minlength=foreign.E)
    torch.save({"rank": 0, "logical_count": torch.tensor(count)}, tmp_path / "r.pt")
    trace, said = taken(tmp_path, "sglang", tmp_path / "r.pt", model=config_file(tmp_path))
    assert len(list(trace.shards)) == windows - rows[:windows].count(None)
    assert np.array_equal(loads(trace), count.sum(0)[ROUTED])
    full = len(rows) > 1 and rows[-1] is not None
    assert len(said) == full
    assert ("logical_count is full" in str(trace.manifest["corpus"]["notes"])) == full
    if full:
        assert f"all {len(rows)} rows of logical_count are filled" in said[0]
        assert "the order of the rows is not read as time" in said[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"name": "an expert picks a layer", "count": 3}'),
        ("a.jsonl", '{"text": "the \\"layer\\": 1, \\"expert\\": 2, \\"count\\": 3"}\n'),
        ("a.json", '[{"layer": 1, "expert": 2, "weight": 3}]'),
        ("a.json", '["layer", "expert", "count"]'),
        ("a.csv", "text\nlayer expert count\n"),
        ("a.txt", "layer,expert,count\n0,0,1\n"),
        ("a.parquet", ""),
    ],
)
def test_what_only_speaks_of_experts_and_layers_is_not_taken_for_counts(
    name: str, text: str, tmp_path: Path
):
    (tmp_path / name).write_text(text)
    if name == "a.parquet":
        pd.DataFrame({"text": ["layer", "expert", "count"]}).to_parquet(tmp_path / name)
    refused(tmp_path, "cannot tell the format of", "auto", tmp_path / name, top_k=1)


@pytest.mark.parametrize(
    "form", ["list", "lines", "columns", "long columns", "parquet", "long parquet", "csv"]
)
def test_auto_knows_counts_in_every_form(form: str, tmp_path: Path):
    n = 70_000 if form.startswith("long") else 4
    table = pd.DataFrame({"layer": 0, "expert": np.arange(n) % 4, "count": 1})
    kind = form.split()[-1] if form.split()[-1] in ("parquet", "csv") else "json"
    path = tmp_path / f"c.{kind}"
    columns = table[:4].to_dict("list")
    text = {
        "csv": "\ufeff" + table.rename(columns={"count": "assignments"}).to_csv(index=False),
        "list": table[:4].to_json(orient="records"),
        "lines": table[:4].to_json(orient="records", lines=True),
        "columns": json.dumps(columns),
        "long columns": json.dumps(columns | {"domain": ["a" * n] * 4}),
    }
    if kind == "parquet":
        table.assign(note=[f"note {i}" for i in range(n)]).to_parquet(path, compression="none")
    else:
        path.write_text(text[form])
    _, said = taken(tmp_path, "auto", path, top_k=1)
    assert said[0].startswith("recognised as counts")


def test_decisions_are_no_table_of_counts(tmp_path: Path):
    why = r"holds decisions, not counts: report\(trace\)\.tables\[.load.\] counts them"
    with pytest.raises(MoeInspectError, match=why):
        imported("vllm-routed", tmp_path)[0].counts()


def test_logits_of_a_sidecar(tmp_path: Path):
    trace, made, _ = imported("megatron", tmp_path)
    found = np.stack(trace.logits(layers=2)["logits"].to_list())[:5]
    drawn = foreign.router_logits(2, (made.ids or [])[1][:5])
    assert np.abs(found - drawn).max() < 0.02  # bfloat16 cut off
    assert np.abs(found[::-1] - drawn).max() > 0.5


def test_dense_layers_are_refused_without_a_config(tmp_path: Path):
    made = MAKERS["vllm-routed"](tmp_path)
    refused(tmp_path, "does not say how many experts there are", "vllm-routed", made.source)
    why = "all 6 tokens go to one expert in layer 0, as a dense layer reads: give --model"
    refused(tmp_path, why, "vllm-routed", made.source, experts=8)


def test_nothing_is_left_of_what_ends_halfway_and_an_old_trace_stays(tmp_path: Path):
    trace, made, _ = imported("vllm-routed", tmp_path)
    before = sorted(p.name for p in (tmp_path / "t").rglob("*"))
    with pytest.raises(MoeInspectError, match="--overwrite"):
        taken(tmp_path, "vllm-routed", made.source, experts=8)
    made.source.write_text(made.source.read_text() + "{}\n")
    with pytest.raises(MoeInspectError, match=r"v\.jsonl line 4: routed_experts is NoneType"):
        again(made, tmp_path)
    assert sorted(p.name for p in (tmp_path / "t").rglob("*")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "model.json", "t"]
    made.source.write_text(made.source.read_text()[:-3])
    assert again(made, tmp_path).n_tokens == trace.n_tokens == 16


def again(made: foreign.Made, root: Path) -> Trace:
    how = {"model": root / "model.json", "overwrite": True}
    return taken(root, "vllm-routed", made.source, **how)[0]


def test_drafts_of_killed_imports_are_cleared_and_no_others(tmp_path: Path):
    trace, made, _ = imported("vllm-routed", tmp_path)
    names = ("t.7-0a0b", "t.8-0b0e", "t.9-c0de", "t.10-beef", "u.7-0a0b", "t.x")
    drafts = {name: tmp_path / f".{name}.tmp" for name in names}
    for draft in drafts.values():
        shutil.copytree(trace.path, draft)
    (drafts["t.9-c0de"] / "notes.txt").touch()
    shutil.rmtree(drafts["t.8-0b0e"] / "routing")
    for table in ("tokens", "documents"):
        shutil.rmtree(drafts["t.8-0b0e"] / table)
    for name in ("trace.json", "shards-0.jsonl"):  # killed before there was one
        (drafts["t.8-0b0e"] / name).unlink()
    with hold(drafts["t.10-beef"]):  # another import, at work
        again(made, tmp_path)
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("."))
    assert left == [".t.10-beef.tmp", ".t.9-c0de.tmp", ".t.x.tmp", ".u.7-0a0b.tmp"]
    assert (drafts["t.10-beef"] / "trace.json").exists()
    assert not list(trace.path.glob(".*"))


def test_a_link_to_a_directory_is_followed(tmp_path: Path):
    (tmp_path / "large" / "t").mkdir(parents=True)
    (tmp_path / "t").symlink_to(tmp_path / "large" / "t")
    trace, made, _ = imported("vllm-routed", tmp_path)
    again(made, tmp_path)
    assert (tmp_path / "t").is_symlink()
    assert Trace(tmp_path / "large" / "t").n_tokens == trace.n_tokens
    assert [p.name for p in (tmp_path / "large").iterdir()] == ["t"]


def test_warm_up_rows_and_one_ranks_experts_are_told(tmp_path: Path):
    ids_TBK = np.tile(np.array([1, 2]), (1500, 2, 1)).astype(np.uint8)
    row = {"prompt_token_ids": [0] * 1501, "token_ids": [], "routed_experts": foreign.npy(ids_TBK)}
    foreign.lines(tmp_path / "w.jsonl", [row])
    config = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "c.json").write_text(json.dumps(config))
    _, said = taken(tmp_path, "vllm-routed", tmp_path / "w.jsonl", model=tmp_path / "c.json")
    assert any("1,500 consecutive tokens were routed alike" in line for line in said)
    assert any("only experts 1-2 of 8" in line for line in said)


def test_the_command(cli_here: Cli, tmp_path: Path):
    made = MAKERS["counts"](tmp_path)
    done = cli_here("import", "auto", made.source, "-o", "t", "--top-k", 2)
    assert "recognised as counts" in done.stderr
    assert "imported 30 tokens, 2 routers" in done.stderr
    assert done.stdout == ""
    again = cli_here("import", "counts", made.source, "-o", "t", check=1)
    assert "error: there is a trace at t" in again.stderr
    cli_here("import", "nonsense", made.source, "-o", "t", check=2)
    table = cli_here("report", "t", "--table", "load", "--format", "csv").stdout
    assert len(table.splitlines()) == 17
    said = "".join(cli_here("import", "--help").stdout.split())  # a line may break at a hyphen
    assert all(name in said for name in (*MODULES, "auto"))


def test_a_model_without_a_tokenizer_is_not_one_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not there is done without; what could not be asked for is told."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from moe_inspect.model.config import read_facts

    answers, config = dict[str, Exception](), config_file(tmp_path)

    def download(model: str, name: str) -> str:
        if name in answers:
            raise answers[name]
        return str(config if name == "config.json" else tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_facts("who/what").tokenizer == tmp_path / "tokenizer.json"
    answers["tokenizer.json"] = EntryNotFoundError("no such file")
    assert read_facts("who/what").tokenizer is None
    why = "cannot read the config and the tokenizer of who/what: "
    for error in (LocalEntryNotFoundError("offline"), OSError("the disk is full")):
        answers["tokenizer.json"] = error
        with pytest.raises(MoeInspectError, match=f"{why}{error}"):
            read_facts("who/what")

"""Each foreign format, made from known decisions, comes back as those; read by one process or by
several."""

from __future__ import annotations

import json
import operator
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.checking.check import check
from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import MODULES, values
from moe_inspect.importers.context import ImportContext
from moe_inspect.importers.run import WORTH_BYTES, default_workers
from moe_inspect.public import Trace, report
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.verify import verify
from moe_inspect.workers import Processes
from tests.conftest import Cli
from tests.support import foreign
from tests.support.damage import files_in
from tests.support.foreign import FORMAT_OF, MAKERS, ROUTED, config_file
from tests.support.importing import decisions, loads, refused, taken
from tests.support.sweep import sample


def imported(
    name: str, root: Path, format: str | None = None
) -> tuple[Trace, foreign.Made, list[str]]:
    (root / "in").mkdir()
    made = MAKERS[name](root / "in")
    model = config_file(root) if made.config else None
    trace, said = taken(root, format or FORMAT_OF[name], made.source, model=model)
    return trace, made, said


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
        "sequence": [0] * 4 + [1] * 3 + [2, 3, 4] + [5, 6, 6, 7] + [8, 9, 9, 9, 10],
        "position": [0, 1, 2, 3, 5, 6, 7, 4, 8, 30, 0, 4, 5, 7, 0, 0, 1, 2, 9],
        "batch": [0] * 7 + [1] * 3 + [2] * 4 + [3] * 5,
        "phase": ["prefill"] * 7 + ["decode"] * 3 + ["prefill"] * 8 + ["decode"],
    },
    # a prompt's tag is its domain
    "moe-policylang": {
        "domain": ["code"] * 5 + ["chat"] * 4,
        "position": [*range(5), *range(4)],
        "token_id": [*range(9)],
        "phase": ["prefill"] * 3 + ["decode"] * 2 + ["prefill"] * 3 + ["decode"],
    },
}


def test_every_format_has_a_file_made_for_it():
    assert set(FORMAT_OF.values()) == set(MODULES)


@pytest.mark.parametrize("name", MAKERS)
def test_what_was_written_comes_back(name: str, tmp_path: Path):
    trace, made, (recognised, *said) = imported(name, tmp_path, "auto")
    assert recognised.startswith(f"recognised as {FORMAT_OF[name]}: ")
    assert (said, trace.status) == ([], "complete")
    assert (found := verify(trace.path)).ok, found
    assert tuple(r.layer for r in trace.routers) == made.layers
    assert {(r.experts, r.top_k) for r in trace.routers} == {(made.experts, made.top_k)}
    capture = trace.manifest["capture"]
    assert (capture["mode"], capture["format"]) == ("import", FORMAT_OF[name])
    for r, ids_TK in enumerate(made.ids or []):
        assert np.array_equal(decisions(trace, r), ids_TK)
        assert trace.has_weights == (made.weights is not None)
        if made.weights is not None:
            table = trace.routing(router=r)[["weight_0", "weight_1"]]
            assert np.array_equal(table.to_numpy(), made.weights)
    if made.ids is None:
        assert np.array_equal(loads(trace), made.load)
        assert trace.counts()["first_choice"].isna().all()
    load = foreign.loads(made.ids) if made.ids is not None else made.load or []
    assert [load_E.sum() for load_E in load] == [trace.n_tokens * made.top_k] * len(load)
    tokens = trace.tokens() if made.ids is not None else {}
    expected = TOKENS.get(name, {})
    assert {column: tokens[column].tolist() for column in expected} == expected
    assert not list(tmp_path.glob(".t*"))


@pytest.mark.parametrize("name", sample(MAKERS, every=13))
def test_what_was_imported_is_reported(name: str, tmp_path: Path):
    trace, made, _ = imported(name, tmp_path)
    found = report(trace)
    load = made.load or foreign.loads(made.ids or [])
    assert found.tables["balance"]["assignments"].tolist() == [load_E.sum() for load_E in load]
    assert found.verdict()


RINGS = [([0, 1, 2, None, None], 3), ([0, None, 2, None], 3), ([0, 1, 2], 1), ([3, None, 2], 1)]


@pytest.mark.parametrize(("rows", "windows"), [*RINGS, ([0], 1)])
def test_a_full_ring_of_an_sglang_recorder_is_not_read_as_time(
    rows: list[int | None], windows: int, tmp_path: Path
):
    """Row by row the seed of its pass, None where there was none."""
    import torch

    count = np.zeros((len(rows), foreign.LAYERS, foreign.E), np.int32)
    for s, seed in enumerate(rows):
        if seed is not None:
            count[s, ROUTED] = foreign.loads(foreign.drawn(20, seed))
    rate = {"average_utilization_rate_over_window": 0.75}
    torch.save({"rank": 0, "logical_count": torch.tensor(count)} | rate, tmp_path / "r.pt")
    trace, said = taken(tmp_path, "sglang", tmp_path / "r.pt", model=config_file(tmp_path))
    assert len(list(trace.shards)) == windows - rows[:windows].count(None)
    assert np.array_equal(loads(trace), count.sum(0)[ROUTED])
    full = len(rows) > 1 and rows[-1] is not None
    assert [f"all {len(rows)} rows" in line and "not read as time" in line for line in said] == (
        [True] * full
    )
    assert "average_utilization_rate_over_window 0.75" in trace.manifest["corpus"]["notes"]
    assert ("logical_count is full" in str(trace.manifest["corpus"]["notes"])) == full


@pytest.mark.parametrize("form", ["csv", "list", "lines", "columns", "long", "parquet"])
def test_auto_knows_counts_in_every_form(form: str, tmp_path: Path):
    rows = 70_000 if form == "parquet" else 4
    table = pd.DataFrame({"layer": 0, "expert": np.arange(rows) % 4, "count": 1})
    path = tmp_path / f"c.{form if form in ('csv', 'parquet') else 'json'}"
    if form == "parquet":  # whose columns are named at its end
        table.assign(note=[f"note {i}" for i in range(rows)]).to_parquet(path, compression="none")
    else:
        columns = table.to_dict("list")
        forms = {
            "csv": "\ufeff" + table.rename(columns={"count": "assignments"}).to_csv(index=False),
            "list": table.to_json(orient="records"),
            "lines": table.to_json(orient="records", lines=True),
            "columns": json.dumps(columns),
            "long": json.dumps(columns | {"domain": ["a" * 70_000] * 4}),
        }
        path.write_text(forms[form])
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


def again(made: foreign.Made, root: Path) -> Trace:
    how = {"model": root / "model.json", "overwrite": True}
    return taken(root, "vllm-routed", made.source, **how)[0]


def test_nothing_is_left_of_what_ends_halfway_and_an_old_trace_stays(tmp_path: Path):
    trace, made, _ = imported("vllm-routed", tmp_path)
    before = files_in(tmp_path / "t")
    with pytest.raises(MoeInspectError, match="--overwrite"):
        taken(tmp_path, "vllm-routed", made.source, experts=8)
    made.source.write_text(made.source.read_text() + "{}\n")
    with pytest.raises(MoeInspectError, match=r"v\.jsonl line 4: routed_experts is NoneType"):
        again(made, tmp_path)
    assert files_in(tmp_path / "t") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "model.json", "t"]
    made.source.write_text(made.source.read_text()[:-3])
    assert again(made, tmp_path).n_tokens == trace.n_tokens == 16


def test_drafts_of_killed_imports_are_cleared_and_no_others(tmp_path: Path):
    trace, made, _ = imported("vllm-routed", tmp_path)
    names = ("t.7-0a0b", "t.8-0b0e", "t.9-c0de", "t.10-beef", "u.7-0a0b", "t.x")
    drafts = {name: tmp_path / f".{name}.tmp" for name in names}
    for draft in drafts.values():
        shutil.copytree(trace.path, draft)
    (drafts["t.9-c0de"] / "notes.txt").touch()
    for table in ("routing", "tokens", "documents"):
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


def test_an_option_of_no_format_is_a_mistake_of_the_caller(tmp_path: Path):
    with pytest.raises(TypeError, match="import_trace has no option maps"):
        taken(tmp_path, "counts", tmp_path, maps="layer=block")
    refused(tmp_path, "no format 'cuonts': there are .*counts.*, auto", "cuonts", tmp_path)


def test_check_finds_warm_up_rows_of_imported_responses(tmp_path: Path):
    drawn = np.random.default_rng(0).random((1500, 3, 8)).argsort(axis=2)
    ids_TBK = drawn[..., :2].astype(np.uint8)
    ids_TBK[:1000] = ids_TBK[0]
    row = {
        "prompt_token_ids": [*range(1501)],
        "token_ids": [],
        "routed_experts": foreign.npy(ids_TBK),
    }
    foreign.lines(tmp_path / "w.jsonl", [row])
    how = {"model": config_file(tmp_path)}
    trace, _ = taken(tmp_path, "vllm-routed", tmp_path / "w.jsonl", **how)
    (finding,) = check(trace).findings
    assert finding.kind == "repeated_rows"
    assert finding.values["longest"] == 1000


def test_check_finds_one_ranks_experts_in_imported_counts(tmp_path: Path):
    rows = [f"{layer},{e},{20 + e}" for layer in range(6) for e in range(4)]
    (tmp_path / "c.csv").write_text("\n".join(["layer,expert,count", *rows]))
    trace, _ = taken(tmp_path, "counts", tmp_path / "c.csv", experts=8, top_k=2)
    (finding,) = check(trace).findings
    assert finding.kind == "missing_ranks"
    assert "No layer uses other experts than 0-3 of 8: 1 of 2 ranks." in finding.text


def test_the_command(cli_here: Cli, tmp_path: Path):
    made = MAKERS["counts"](tmp_path)
    done = cli_here("import", "auto", made.source, "-o", "t", "--top-k", 2)
    assert "recognised as counts" in done.stderr
    assert "imported 30 tokens, 2 routers" in done.stderr
    assert done.stdout == ""
    call = ("import", "counts", made.source, "--top-k", 2, "-o")
    assert "error: there is a trace at t" in cli_here(*call, "t", check=1).stderr
    cli_here("import", "nonsense", made.source, "-o", "t", check=2)
    table = cli_here("report", "t", "--table", "load", "--format", "csv").stdout
    assert len(table.splitlines()) == 17
    said = "".join(cli_here("import", "--help").stdout.split())  # a line may break at a hyphen
    assert all(name in said for name in (*MODULES, "auto"))
    cli_here(*call, "alone", "--workers", 1)
    assert data_of(tmp_path / "alone") == data_of(tmp_path / "t")
    assert "workers" in cli_here(*call, "u", "--workers", 0, check=2).stderr


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


# --- by several processes


@pytest.fixture
def chunks_of_150_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "CHUNK_BYTES", 150)


def data_of(root: Path) -> dict[str, bytes]:
    """All but the manifest, which names its process and time."""
    return {name: data for name, data in files_in(root).items() if name != "trace.json"}


ROUTES = ["vllm-routed", "sglang-routed", "tensorrt-llm-routed"]
BY_LINES = [*ROUTES, "megatron-pipeline", "experts4bit", "megatron"]


@pytest.mark.parametrize("name", sample(BY_LINES, every=3))
def test_several_processes_write_the_same_trace_to_the_byte(
    name: str, tmp_path: Path, chunks_of_150_bytes: None
) -> None:
    (tmp_path / "in").mkdir()
    made = MAKERS[name](tmp_path / "in")
    size = sum(p.stat().st_size for p in (tmp_path / "in").rglob("*.jsonl"))
    found = list[Any]()
    for workers in (1, 2):
        read = list[int]()
        how = {"workers": workers, "progress": lambda done, total, read=read: read.append(done)}
        how["model"] = config_file(tmp_path) if made.config else None
        trace, said = taken(tmp_path / f"{workers}", FORMAT_OF[name], made.source, **how)
        assert read[-1] == size  # every byte once
        kept = {n: trace.manifest[n] for n in ("status", "routers", "counts", "corpus", "columns")}
        found.append((data_of(trace.path), kept, said))
    assert found[0] == found[1]
    assert "shards-0.jsonl" in found[0][0]


PAIR = '"topk": 2, "top_indices": [[1, 2]]'


@pytest.mark.parametrize(
    "where",
    [
        {3: "no json"},
        {4: '{"step": 1}', 2: '{"step": "x"}'},
        # what is wrong with a pass, before a line behind it that is wrong
        {2: f'{{"step": 0, "rank": 1, "layer": 2, "num_tokens": 99, {PAIR}}}', 4: "no json"},
    ],
)
def test_the_first_error_is_the_same(
    where: dict[int, str], tmp_path: Path, chunks_of_150_bytes: None
) -> None:
    made, model = MAKERS["megatron"](tmp_path), config_file(tmp_path)
    path = made.source / "router_trace_rank1.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(where.get(n, row) for n, row in enumerate(rows, 1)))
    said = set[str]()
    for workers in (1, 2):
        with pytest.raises(MoeInspectError) as error:
            taken(tmp_path, "megatron", made.source, model=model, workers=workers)
        said.add(str(error.value))
        assert not (tmp_path / "t").exists()
    assert len(said) == 1, said
    assert f"router_trace_rank1.jsonl line {min(where)}" in said.pop()


def test_a_file_that_is_cut_meanwhile_is_one_line(tmp_path: Path) -> None:
    (path := tmp_path / "rows.jsonl").write_text('{"a": 1}\n' * 3)

    class Late(Processes):
        def each(self, function: Any, shared: Any, tasks: Any) -> Iterator[Any]:
            of_whole = [*tasks]
            os.truncate(path, 12)
            return (function(*shared, *task) for task in of_whole)

    with pytest.raises(MoeInspectError, match=r"ends at byte 12 .* it was changed meanwhile"):
        list(ImportContext([], workers=Late(2)).prepared(path, values.as_it_is))


def test_a_process_that_is_killed_is_one_line() -> None:
    with Processes(1) as at, pytest.raises(MoeInspectError, match=r"was killed.*fewer --workers"):
        list(at.each(os._exit, (), [(1,)]))


def outcome(rows: Iterator[Any]) -> list[Any]:
    found = list[Any]()
    try:
        found.extend(rows)
    except MoeInspectError as error:
        found.append(str(error))
    return found


def alone_by_line(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A reference: each line parsed by itself."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path} line {number}"
        if line.strip():
            yield where, values.parsed_object(line, where)


LINES = ['{"a": 1}, {"b": 2}', '{"a": 1} {"b": 2}', '{"a": [{}\n{}]}', '{"a": 1', "null", "[{}]"]
LINES += ["", '\ufeff{"a": 1}', '{"a": NaN, "a": 2}']
FILES = [f'{{"a": 1}}\n{line}\n{{"a": 2}}\n' for line in LINES]
FILES += [
    '{"a": 1}\n\n{"a": 2}\n{"a": "' + "x" * 50 + '"}\n  \n{"a": 3}' + end
    for end in ("", "\n", "\n\n", "\n \n\n")
]


@pytest.mark.parametrize("size", [1, 7, 20, 10_000])
def test_lines_are_read_as_each_alone_and_numbered_as_in_the_file(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "CHUNK_BYTES", size)
    for text in FILES:
        (path := tmp_path / "rows.jsonl").write_text(text)
        found = outcome(ImportContext([]).prepared(path, values.as_it_is))
        assert found == outcome(alone_by_line(path))
        assert len(found) > 1
        assert sum(chunk.size for chunk in values.chunks_of(path)) == path.stat().st_size


def test_no_more_is_read_ahead_than_keeps_all_at_work() -> None:
    asked = list[int]()

    def tasks() -> Iterator[tuple[int]]:
        for n in range(20):
            asked.append(n)
            yield (n,)

    with Processes(1) as at:
        found = at.each(operator.add, (5,), tasks())
        assert next(found) == 5
        assert len(asked) == 2
        assert list(found) == [*range(6, 25)]


def test_processes_are_started_where_there_is_much_to_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(WORTH_BYTES // 2)
    assert default_workers([tmp_path]) == 1
    assert default_workers([f"a={tmp_path}", tmp_path / "x"]) == len(os.sched_getaffinity(0))

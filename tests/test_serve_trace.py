"""`moe-inspect serve-trace`: tests/support/engine.py, as vllm, is started and stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_inspect
from moe_inspect.capture import inside
from moe_inspect.capture.engine.settings import Settings, variable
from moe_inspect.capture.inside import recording_inside
from moe_inspect.capture.server import client, keeper, serve
from moe_inspect.capture.server.serve import read_command
from moe_inspect.errors import MoeInspectError
from tests.conftest import ROOT, Cli
from tests.support.engine import KEY
from tests.test_cli_trace import save
from tests.test_engines import check_rows, check_weights

Does = Callable[..., None]
CORPUS = ("--max-tokens", 1000, "--max-length", 60, "--batch-tokens", 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save("deepseek_v3", tmp_path_factory.mktemp("model")))


@pytest.fixture
def does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Does:
    """Puts `vllm` on the path, and says what else it does."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.support.engine "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.3)
    monkeypatch.setattr(serve, "ASK_EVERY_S", 0.05)
    monkeypatch.setattr(serve, "GRACE_S", 0.3)

    def tell(**what: Any) -> None:
        monkeypatch.setenv("ENGINE_DOES", json.dumps({"pids": str(tmp_path / "pids"), **what}))

    tell()
    return tell


def lives(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and nobody has asked yet


def nobody_is_left(place: Path, within_s: float = 0.0) -> bool:
    """Of the engine and the process that it started."""
    end, pids = time.monotonic() + within_s, (place / "pids").read_text().split()
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return len(pids) == 2 and not any(map(lives, pids))


def when_there(file: Path, then: Callable[[], object]) -> threading.Thread:
    def wait() -> None:
        while not (file.exists() and file.read_text()):
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_the_engine_is_started_traced_and_stopped(
    model: str, does: Does, cli_here: Cli, tmp_path: Path
) -> None:
    does(key=KEY, starts_s=0.2)
    command = ["vllm", "serve", model, "--api-key", KEY, f"{KEY}2", "--max-model-len", 200]
    done = cli_here("serve-trace", "-o", "runs/t", "--generate", 3, *CORPUS, "--", *command)
    trace = moe_inspect.open_trace(tmp_path / "runs/t")
    check_rows(trace)
    assert trace.manifest["status"] == "complete"
    assert trace.manifest["model"]["id"] == model
    said = done.stderr.splitlines()
    port = said[0].removeprefix("starting vllm on port ").partition(";")[0]
    assert said[0].endswith("; its log is runs/t.engine.log")
    assert said[1].startswith("vllm answers after ")
    assert said[2].endswith(
        ": no plugin is known of: the trace has what the server returns, without gate weights"
    )
    assert said[3].startswith("1,0")
    assert said[4:] == ["stopping vllm"]
    log = (tmp_path / "runs/t.engine.log").read_text()
    added = f"--enable-return-routed-experts --host 127.0.0.1 --port {port}"
    assert log == f"called with {' '.join(map(str, command[1:]))} {added}\n"
    assert nobody_is_left(tmp_path)
    assert KEY not in (tmp_path / "runs/t/trace.json").read_text() + done.stderr
    shown = " ".join(trace.manifest["capture"]["command"])
    assert shown.endswith(" --api-key … … --max-model-len 200")


def test_an_engine_with_the_plugin_records_for_itself(
    model: str, does: Does, cli_here: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of every request, into a directory beside the log that is gone afterwards, unless the
    user has set another."""
    does(plugin=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    own = {"sample": "0.1", "start": "off", "logits": "1", "text": "0", "queue_mb": "1"}
    for name, value in {**own, "max_gb": "0.001", "keep": "1"}.items():
        monkeypatch.setenv(variable(name), value)
    there = set[Path]()
    when_there(tmp_path / "t/trace.json", lambda: there.update(tmp_path.glob("t.engine-*/traces")))
    cli_here("serve-trace", "-o", "t", *CORPUS, "--", "vllm", "serve", model)
    assert len(there) == 1
    assert not [*tmp_path.glob("t.engine-*")]
    trace = moe_inspect.open_trace(tmp_path / "t")
    check_rows(trace)
    check_weights(trace)
    assert not any((tmp_path / "tmp").iterdir())
    assert nobody_is_left(tmp_path)
    with recording_inside(Path("/dev/null")) as variables:
        folder = Path(variables["MOE_INSPECT_TRACE"])
        assert folder.parent.parent == tmp_path / "tmp"
        asked = Settings.read({**os.environ, **variables})
    assert asked == Settings(folder, queue_mb=4096, max_gb=1, keep=0)
    monkeypatch.setenv("MOE_INSPECT_TRACE", str(tmp_path / "own"))
    with recording_inside(tmp_path / "log") as variables:
        assert variables == {}


@pytest.mark.parametrize(
    ("plugin", "why"),
    [
        ("silent", "/traces has no rows of a first request after 0.5 s: "),
        ("refused", "is not used: nothing is recorded: no MoE layer: "),  # which is not waited for
    ],
)
def test_an_engine_whose_plugin_does_not_record_is_asked(
    plugin: str,
    why: str,
    model: str,
    does: Does,
    cli_here: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inside, "PROBE_S", 0.5)
    does(plugin=plugin)
    done = cli_here("serve-trace", "-o", "t", *CORPUS, "--", "vllm", "serve", model)
    assert "what its plugin records is not used: " in done.stderr
    assert why in done.stderr
    trace = moe_inspect.open_trace(tmp_path / "t")
    check_rows(trace)
    assert not trace.has_weights


def test_what_was_recorded_before_the_engine_died_is_kept_and_resumed(
    model: str, does: Does, cli_here: Cli, tmp_path: Path
) -> None:
    does(after=12)
    arguments = ("serve-trace", "-o", "t", *CORPUS, "--commit-every", "1ms", "--concurrency", 1)
    command = ("--", "vllm", "serve", model)
    done = cli_here(*arguments, *command, check=1)
    ended = "error: vllm ended with SIGKILL: the end of t.engine.log is above\n"
    assert done.stderr.endswith(ended)
    assert done.stderr.count("retrying") < client.ATTEMPTS - 1  # it is known to be gone
    kept = moe_inspect.open_trace(tmp_path / "t").n_tokens
    assert nobody_is_left(tmp_path)
    does()
    other = cli_here(*arguments, "--max-tokens", 999, "--resume", *command, check=1)
    assert other.stderr == (
        "error: t was made with max tokens 1000, not 999: resume with the same, or --overwrite\n"
    )
    cli_here(*arguments, "--resume", *command)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert 0 < kept < trace.n_tokens
    check_rows(trace)
    assert (tmp_path / "t.engine.log").read_text().count("called with") == 2


def test_an_engine_that_does_not_start_says_why(
    model: str, does: Does, cli_here: Cli, tmp_path: Path
) -> None:
    does(dies="ValueError: \x1b[31mno GPU\x1b[0m\x07\nsorry")
    done = cli_here("serve-trace", "-o", "t", "--", "vllm", "serve", model, check=1)
    assert done.stderr.splitlines()[2:] == [
        "ValueError: no GPU\\x07",
        "sorry",
        "error: vllm ended with exit code 3: the end of t.engine.log is above",
    ]
    assert nobody_is_left(tmp_path)
    assert not (tmp_path / "t").exists()
    does(starts_s=100)
    soon = ("--start-timeout", "200ms")
    late = cli_here("serve-trace", "-o", "t", *soon, "--", "vllm", "serve", model, check=1)
    assert late.stderr.endswith("error: vllm does not answer after 0 s\n")
    assert nobody_is_left(tmp_path)


def test_a_signal_stops_a_stubborn_engine(
    model: str, does: Does, cli_here: Cli, tmp_path: Path
) -> None:
    does(starts_s=100, stubborn=True)
    when_there(tmp_path / "pids", lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = cli_here("serve-trace", "-o", "t", "--", "vllm", "serve", model, check=130)
    assert done.stderr.endswith("interrupted: nothing was traced yet\n")
    assert nobody_is_left(tmp_path)


def test_the_engine_ends_with_who_started_it_even_by_kill_9(does: Does, tmp_path: Path) -> None:
    does(starts_s=100, stubborn=True)
    program = (
        "from moe_inspect.capture.server import serve\n"
        "serve.GRACE_S = 0.2\n"
        "with serve.serve_engine(['vllm', 'serve', 'm']): pass"
    )
    started = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    when_there(tmp_path / "pids", started.kill).join(30)
    assert started.wait(30) == -signal.SIGKILL
    assert nobody_is_left(tmp_path, within_s=30)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("killed", ["first", "second", "both"])
def test_the_engine_ends_with_its_keeper_even_by_kill_9(
    killed: str, does: Does, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    does(starts_s=100, stubborn=True)

    def kill() -> None:
        second = parent(int((tmp_path / "pids").read_text().split()[0]))
        keepers = {"second": second, "first": parent(second)}
        for name, pid in keepers.items():
            if killed in (name, "both"):
                os.kill(pid, signal.SIGKILL)

    when_there(tmp_path / "pids", kill)
    # not that the engine was killed
    says = r"^a process that keeps vllm was killed, and vllm is stopped: the end of \S+ is above"
    with (
        pytest.raises(MoeInspectError, match=says),
        serve.serve_engine(["vllm", "serve", "m"], log=tmp_path / "log"),
    ):
        pass
    assert "called with serve m" in capsys.readouterr().err
    if killed == "both":  # the kernel kills the engine alone
        os.kill(int((tmp_path / "pids").read_text().split()[1]), signal.SIGKILL)
    assert nobody_is_left(tmp_path, within_s=10)


def test_the_log_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, lines = tmp_path / "log", [f"line {n}\n" for n in range(1000)]
    with open(log, "a+b", buffering=0) as said, open(log, "ab", buffering=0) as engine:
        for line in lines:
            engine.write(line.encode())
            keeper.bound_log(said.fileno(), 1000)
            assert log.stat().st_size <= 1000
    found = log.read_text().splitlines(keepends=True)
    assert found[0] == keeper.DROPPED.decode()
    assert found[1:] == lines[-len(found) + 1 :]
    assert len(found) > 40
    serve._show_end(log, began_at=5000)  # where it had more
    assert capsys.readouterr().err.endswith("line 998\nline 999\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("", 2, "give the command that starts the engine after --, like -- vllm serve MODEL"),
        ("--", 2, "give the command that starts the engine after --"),
        ("-- nosuch serve m", 1, "no program nosuch: activate the environment"),
        ("-- true serve m", 1, "cannot tell the engine of true serve m: give --engine"),
        ("-- vllm serve --tp 2", 2, "names no model: give --model-config MODEL"),
        ("-- vllm serve ./nowhere", 1, "./nowhere"),
        ("-- vllm serve demo --port=x", 1, "--port x of the engine is no port"),
        ("--resume --overwrite -- vllm serve demo", 2, "--overwrite replaces it: give only one"),
        ("--data nowhere -- vllm serve demo", 1, "no text at nowhere"),
        ("--device cpu -- vllm serve demo", 2, "No such option: --device"),
        ("-- wrapped -o x -- vllm serve", 1, "no program wrapped: activate"),
        ("-- wrapped -- vllm serve", 1, "no program wrapped: activate"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(
    arguments: str, code: int, says: str, does: Does, cli_here: Cli, tmp_path: Path
) -> None:
    done = cli_here("serve-trace", "-o", "t", *arguments.split(), check=code)
    assert says in done.stderr
    assert code == 2 or done.stderr.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"bin"}


def test_options_behind_the_command_are_not_said_to_be_missing(cli_here: Cli) -> None:
    done = cli_here("serve-trace", "demo", "-o", "t", "--", "vllm", "serve", "demo", check=2)
    assert "'demo' stands before the options" in done.stderr
    assert "Missing option" not in done.stderr


def test_a_port_in_use_is_refused(does: Does) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MoeInspectError, match=rf"port {port} of 127.0.0.1 is in use: "):
            read_command(["vllm", "serve", "m", "--port", str(port)])
    assert read_command(["vllm", "serve", "m", "--port", str(port)]).port == port
    with pytest.raises(MoeInspectError, match=r"of 192\.0\.2\.1 cannot be used, "):
        read_command(["vllm", "serve", "m", "--host", "192.0.2.1"])


def test_what_a_command_says(does: Does, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    plain = read_command(["vllm", "serve", "a/b"])
    assert (plain.engine, plain.model, plain.revision) == ("vllm", "a/b", None)
    assert (plain.trust_remote_code, plain.api_key) == (False, None)
    assert plain.environment == {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    assert plain.url == f"http://127.0.0.1:{plain.port}"
    # sh stands for a Python: words decide
    module = "sh -m sglang.launch_server --model-path=./vllm --host 0.0.0.0 --revision r1"
    told = "--enable_return_routed_experts --trust_remote_code --api-key=k"
    full = read_command(f"{module} {told}".split())
    assert (full.engine, full.model, full.revision) == ("sglang", "./vllm", "r1")
    assert (full.trust_remote_code, full.api_key, full.environment) == (True, "k", {})
    assert full.arguments == [*f"{module} {told}".split(), "--port", str(full.port)]
    assert full.url == f"http://127.0.0.1:{full.port}"
    assert "=k" not in repr(full)
    monkeypatch.setenv("VLLM_API_KEY", "from the environment")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    vllm = read_command(["sh", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"])
    assert (vllm.api_key, vllm.model, vllm.environment) == ("from the environment", "m", {})
    assert read_command(["sh", "--model", "m"], "sglang").engine == "sglang"
    assert read_command(["vllm", "serve", "m", "--host", "::1"]).url.startswith("http://[::1]:")

"""Files that never end, or are larger than memory, are refused in one line, at once."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_inspect import files, import_trace
from moe_inspect.capture.corpus import documents
from moe_inspect.errors import MoeInspectError
from moe_inspect.importers import values as lines
from tests.conftest import ROOT, Cli
from tests.support.sweep import sample

BALANCED = ROOT / "sample_traces" / "balanced"
ROOM_BYTES = 2 * 2**30  # that a command may take beyond what this process has
SPARSE_BYTES = 64 * 10**9

# name of the file → the commands that read it
READ: dict[str, list[str]] = {
    "rules": ["watch t --rules {}"],
    "config.json": ["import counts loads.csv -o new --config {}", "describe {}"],
    "experts.gguf": ["simulate cache t --slots 2 --gguf {}"],
    "routes.npy": ["import vllm-routed {} -o new --experts 8"],
    "counts.json": ["import auto {} -o new", "import counts {} -o new"],
    "responses.jsonl": ["import auto {} -o new", "import vllm-routed {} -o new"],
    "t/trace.json": ["report t", "watch t --every 10ms", "check t"],
    "t/shards-0.jsonl": ["report t", "watch t --every 10ms", "check t"],
    "t/vocabulary.parquet": ["report t --table vocabulary --format csv"],
    "corpus.jsonl": ["trace demo -o new --data {}"],
    "corpus.txt": ["trace demo -o new --data {}"],
}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What takes much room of its own: a torch with CUDA, transformers, the classes of the demo."""
    import moe_inspect.capture.run  # noqa: F401
    from moe_inspect.model.load import auto_class, load_config, load_tokenizer

    auto_class(load_config("demo"))
    load_tokenizer("demo")


LIMITS = {"MOST_LINE_BYTES": files, "PIECE_BYTES": files, "CHUNK_BYTES": lines}
LIMITS |= {"MOST_ROW_BYTES": documents}
Limit = Callable[..., None]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Sets limits to so many bytes, by their names."""

    def put(**sizes: int) -> None:
        for name, size in sizes.items():
            monkeypatch.setattr(LIMITS[name], name, size)

    return put


@pytest.fixture(autouse=True)
def bounded(limit: Limit) -> Iterator[None]:
    limit(MOST_LINE_BYTES=2**26)

    def late(*_: object) -> None:
        raise TimeoutError

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + ROOM_BYTES, before[1]))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


# (a corpus may be long: it is read text by text)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "pipe") for name in READ]
    + [(name, "device") for name in sample(READ, 2)]
    + [(name, "64 GB") for name in sample(READ, 2) if not name.startswith("corpus")],
)
def test_a_file_without_end_is_one_line(
    name: str, kind: str, tmp_path: Path, cli_here: Cli
) -> None:
    shutil.copytree(BALANCED, tmp_path / "t")
    (tmp_path / "loads.csv").write_text("layer,expert,count\n0,0,5\n")
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, SPARSE_BYTES)
    for command in READ[name]:
        parts = (path if part == "{}" else part for part in command.split())
        done = cli_here(*parts, check=None)
        said = done.stderr.strip().splitlines()[-1]
        if said == "failed: broken_file":  # found by check
            assert done.stdout.startswith(f"• Critical: {path.name}"), command
            continue
        assert done.returncode in (1, 2), (command, done.stderr)
        assert re.match(rf"[Ee]rror: .*({re.escape(path.name)}|no trace at t:)", said), command


@pytest.mark.parametrize(
    "command", ["import auto {} -o x", "import counts {} -o x --top-k 2", "report {}"]
)
def test_a_pipe_as_the_input_is_named(command: str, tmp_path: Path, cli_here: Cli) -> None:
    os.mkfifo(tmp_path / "ff")
    done = cli_here(*command.format("ff").split(), check=1)
    assert "error: ff is not a regular file or a directory" in done.stderr


def test_an_array_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        shape = (SPARSE_BYTES // 8, 2, 4)
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        file.truncate(file.tell() + SPARSE_BYTES)
    with pytest.raises(MoeInspectError, match=r"a\.npy has 8,000,000,000 tokens"):
        import_trace("vllm-routed", [path], tmp_path / "t", experts=8)
    beside = tmp_path / "b.token_ids.npy"
    np.save(tmp_path / "b.npy", np.arange(8, dtype=np.uint8).reshape(1, 2, 4))
    shutil.move(path, beside)
    with pytest.raises(MoeInspectError, match=r"b\.token_ids\.npy is not a list of token ids"):
        import_trace("vllm-routed", [tmp_path / "b.npy"], tmp_path / "t", experts=8)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_line_without_end_is_found_before_it_is_read(
    workers: int, tmp_path: Path, limit: Limit
) -> None:
    path = tmp_path / "rank0.jsonl"
    path.write_text("\n" + '{"a": "' + "x" * 3_000)
    limit(PIECE_BYTES=100, CHUNK_BYTES=200, MOST_LINE_BYTES=2_000)
    with pytest.raises(MoeInspectError, match=r"rank0\.jsonl line 2 is over 1,073,741,824 bytes"):
        import_trace("megatron", [path], tmp_path / "t", top_k=1, workers=workers)


def test_long_lines_are_whole(tmp_path: Path, limit: Limit) -> None:
    limit(PIECE_BYTES=10)
    for text in (b"", b"a\n", b"0123456789", b"0123456789\n", b"012345678\nab", b"x" * 35 + b"\ny"):
        (tmp_path / "a").write_bytes(text)
        with open(tmp_path / "a", "rb") as file:
            found = [*iter(lambda file=file: files.next_line(file), b"")]
        assert found == text.splitlines(keepends=True)


def test_a_text_without_end_is_refused(tmp_path: Path, cli_here: Cli, limit: Limit) -> None:
    limit(MOST_ROW_BYTES=1_000)
    (tmp_path / "c.jsonl").write_text('{"text": "short"}\n{"text": "' + "x" * 2_000)
    done = cli_here("trace", "demo", "-o", "new", "--data", tmp_path / "c.jsonl", check=1)
    assert "c.jsonl line 2 has over 1,000 bytes" in done.stderr

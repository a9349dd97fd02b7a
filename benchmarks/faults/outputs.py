"""What is left of every file that a command writes: the old one or the new one, and no draft.

`without_drafts` writes in place, as a control: the same checks must then find failures."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer

from benchmarks.faults.bench import Bench
from benchmarks.faults.traces import TOKENS, VOCABULARY, Rows, batches, manifest, rows_of
from moe_inspect.__main__ import main
from moe_inspect.cli import app
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace
from moe_inspect.trace.files import atomic
from moe_inspect.trace.files.lock import LOCK
from moe_inspect.trace.schema import Router
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import TraceWriter

FAULTS = ("kill", "EIO", "ENOSPC")
ROUTERS = [Router(layer, "gate", f"layers.{layer}", 8, 2, "softmax") for layer in range(2)]
CONFIG = {
    "hidden_size": 8,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "model_type": "mixtral",
    "hidden_act": "silu",
}
# T and U are traces, LOADS.csv and CONFIG what they say; `out` is what is written
LINES = """\
report T -o out.txt
report T --table load -o out.csv
report T --table load -o out.json
report T --table load -o out.parquet
report T --html out.html
check T -o out.csv
check T --html out.html
compare T T -o out.txt
compare T T --table flips -o out.parquet
compare T T --html out.html
simulate placement T --gpus 2 --policy contiguous -o out.json
simulate placement T --gpus 2 --policy contiguous -o out.yaml
simulate placement T --gpus 2 --policy contiguous -o out.csv
simulate placement T --gpus 2 --policy contiguous --html out.html
simulate decode T -o out.csv
simulate decode T --html out.html
simulate decode T --plots out
simulate placement T --hardware h200 --engine vllm --dtype fp8 --table steps -o out.csv
simulate placement T --hardware h200 --engine vllm --dtype fp8 --html out.html
simulate placement T --hardware h200 --engine vllm --dtype fp8 --plots out
simulate cache T -o out.csv
simulate cache T --html out.html
simulate routing T -o out.txt
simulate routing T -o out.parquet
simulate routing T --html out.html
text T --layers 0 --experts 1 -o out.txt
text T --layers 0 --experts 1 -o out.csv
text T --layers 0 --experts 1 --html out.html
describe CONFIG -o out.csv
describe CONFIG --html out.html
export T --format counts -o out.csv
export T --format counts -o out.json
export T --format counts -o out.parquet
export T --format sglang -o out.json
export T --format llama-cpp --gpu-layers 1 -o out.txt
export T --format pruning --by frequency -o out.json
merge T U -o out --overwrite
import counts LOADS.csv -o out --top-k 1 --overwrite""".splitlines()
# commands that load a model first, and what they write is written by one of the functions above
ELSEWHERE = {
    "trace": "a recording, which goes on: the part tracing",
    "ablate": "a table, as report's",
    "engine": "a table, as report's",
}
WRITES = ("output", "html", "plots")
STEP = {"import": 4, "merge": 7}  # of many alike


def every_output(group: typer.Typer = app, *before: str) -> Iterator[tuple[str, str]]:
    """Command and option of everything that the command line can write."""
    from typer.main import get_command

    for name, command in getattr(get_command(group), "commands", {}).items():
        for inner_name, inner in getattr(command, "commands", {}).items():
            yield from ((f"{name} {inner_name}", p.name) for p in inner.params if p.name in WRITES)
        yield from ((name, p.name) for p in command.params if p.name in WRITES)


def not_tried() -> list[tuple[str, str]]:
    """What LINES leave out."""
    option = {"output": " -o ", "html": " --html ", "plots": " --plots "}
    return [
        (command, name)
        for command, name in every_output()
        if command not in ELSEWHERE
        and (name != "plots" or command == "simulate decode")  # one function writes them all
        and not any(line.startswith(command) and option[name] in line for line in LINES)
    ]


@contextlib.contextmanager
def without_drafts() -> Iterator[None]:
    """Files are written in place."""
    before, atomic._file_at = atomic._file_at, lambda path: None
    try:
        yield
    finally:
        atomic._file_at = before


def make(root: Path) -> None:
    """The traces and files that the commands read, and those that they replace."""
    for seed, name in enumerate(("T", "U", "V")):
        given = manifest(seed)
        given["model"] = {"id": "made", "config": CONFIG}
        rng = np.random.default_rng(seed)
        with TraceWriter(root / name, given, ROUTERS, logits=True, vocabulary=VOCABULARY) as writer:
            for batch in batches(seed, ROUTERS):
                logits = [rng.normal(size=(TOKENS, 8)).astype(np.float16) for _ in ROUTERS]
                writer.write(replace(batch, extras={"logits": logits}))
    (root / "LOADS.csv").write_text("layer,expert,count\n0,0,5\n0,1,7\n")
    (root / "CONFIG").mkdir()
    (root / "CONFIG" / "config.json").write_text(
        '{"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 8}'
    )


def run(line: str, root: Path, place: Path) -> None:
    """A command, in this process. MoeInspectError with its line where it ends with 1; anything else
    but success is an AssertionError."""
    known = {name: str(root / name) for name in ("T", "U", "V", "LOADS.csv", "CONFIG")}
    sys.argv = ["moe-inspect", *(known.get(word, word) for word in line.split())]
    os.chdir(place)
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    said = err.getvalue()
    errors = [one for one in said.splitlines() if one.startswith("error: ")]
    if code == 1 and len(errors) == 1 and said.endswith(f"{errors[0]}\n"):
        raise MoeInspectError(errors[0].removeprefix("error: "))
    assert code == 0, (code, said)


# --- what is there


def is_of_a_trace(line: str) -> bool:
    return line.startswith(("merge", "import"))


def held(path: Path, line: str) -> Any:
    """What an output holds: the rows of a trace, or bytes by the name of each file."""
    if is_of_a_trace(line):
        found = verify(path)
        assert found.ok, found
        trace = Trace(path)
        return {"counts": trace.counts().to_csv()} if trace.counts_only else rows_of(trace)
    files = path.rglob("*") if path.is_dir() else [path]
    return {
        str(p.relative_to(path.parent)): content(p)
        for p in files
        if p.is_file() and p.name[0] != "."
    }


def content(path: Path) -> bytes:
    """Of a whole picture only that: its bytes differ from run to run."""
    data = path.read_bytes()
    whole = data.endswith(b"</svg>\n") or data[-8:-4] == b"IEND"
    return b"a picture" if whole and path.suffix in (".svg", ".png") else data


def same(a: Any, b: Rows | dict[str, bytes]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].equals(b[name]) if hasattr(a[name], "equals") else a[name] == b[name] for name in a
    )


def hidden(place: Path) -> list[Path]:
    return [p for p in place.rglob(".*") if p.name.endswith((".tmp", ".old", ".lock"))]


class Output:
    """A command that writes. `old`: what is there before it. `new`: what it writes."""

    def __init__(self, bench: Bench, line: str):
        self.bench, self.line = bench, line
        self.name = next(word for word in line.split() if word.startswith("out"))
        place = bench.place()
        self.work(place)
        self.new = held(place / self.name, line)
        place = bench.place()
        self.before(place)
        self.old = held(place / self.name, line)

    def work(self, place: Path) -> None:
        try:
            run(self.line, self.bench.root, place)
        except MoeInspectError as error:
            file = os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(file, str(error).encode())
            os.close(file)
            raise

    def before(self, place: Path) -> None:
        out = place / self.name
        if is_of_a_trace(self.line):
            shutil.copytree(self.bench.root / "V", out)
        elif "." in self.name:
            out.write_bytes(b"the old one")
        else:
            out.mkdir()
            for name in self.new:
                (place / name).write_bytes(b"the old one")

    def after(self, place: Path, how: str) -> None:
        out, said = place / self.name, ""
        if (place / "said").exists():
            said = (place / "said").read_text()
            (place / "said").unlink()
        kept = re.search(r"is whole at (\S+): move it", said)
        if is_of_a_trace(self.line):
            found = held(out, self.line)
            assert same(found, self.old) or same(found, self.new), "neither the old one nor the new"
        else:
            found = held(out, self.line)
            for name, data in found.items():
                either = (self.old.get(name), self.new.get(name))
                assert data in either, f"{name}: neither the old one nor the new"
            gone = self.old.keys() - found.keys()
            assert not gone or same(found, self.new), f"{gone} are gone"
        if kept:
            aside = place / "kept" / self.name  # files are known by the name of their folder too
            aside.parent.mkdir()
            (place / kept[1]).rename(aside)
            assert same(held(aside, self.line), self.new), f"{kept[1]} is not whole"
            shutil.rmtree(aside.parent)
        if how != "kill":
            # where the fault is in the deletion of the old trace or of a lock, they stay
            left = [p for p in hidden(place) if said or not (".old" in str(p) or p.name == LOCK)]
            assert not left, f"left behind: {left}"
        run(self.line, self.bench.root, place)
        found = held(out, self.line)
        assert same(found, self.new), "the next one writes something else"
        assert not hidden(place), f"left behind by the next one: {hidden(place)}"


def prepared(bench: Bench) -> None:
    if not (bench.root / "T").exists():
        assert not not_tried(), f"nothing tries {not_tried()}"
        make(bench.root)


def outputs(bench: Bench, lines: list[str] | None = None, faults: tuple[str, ...] = FAULTS) -> None:
    """Every output of every command, with a fault at each call in turn."""
    prepared(bench)
    for line in lines or LINES:
        made = Output(bench, line)
        step = next((n for word, n in STEP.items() if word in line), 1)
        for how in faults:
            after = partial(made.after, how=how)
            bench.at_every_call(line, how, made.before, made.work, after, step, strict=True)


def outputs_at_once(bench: Bench, tries: int = 2) -> None:
    """Two processes that write one output: each is done or refused in a line, and it is whole."""
    prepared(bench)
    for line in LINES:
        if "--plots" in line:
            continue
        made = Output(bench, line)
        for n in range(tries):
            place = bench.place()
            bench.must(lambda place=place, made=made: made.before(place))
            said = bench.children([lambda place=place, made=made: made.work(place)] * 2)
            wrong = [one["raised"] for one in said if "raised" in one]
            wrong += [] if any("returned" in one for one in said) else ["both were refused"]
            if not is_of_a_trace(line):
                wrong += [one["refused"] for one in said if "refused" in one]
            checked = bench.child(lambda place=place, made=made: is_new(made, place))
            failure = "; ".join(wrong) or checked.get("raised") or checked.get("refused")
            bench.count(
                f"two at once: {line}",
                " + ".join(sorted(next(iter(one)) for one in said)),
                failure,
                f"try {n}",
            )


def is_new(made: Output, place: Path) -> None:
    assert same(held(place / made.name, made.line), made.new), "it is not what one writes"


def control(bench: Bench) -> dict[str, Any]:
    """The part `outputs` with drafts switched off, for files: it must find failures of each."""
    lines = [line for line in LINES if "." in line.split()[-1] and not is_of_a_trace(line)]
    with without_drafts():
        outputs(bench, lines, ("ENOSPC",))
    failed = {failure["what"].removesuffix(": ENOSPC") for failure in bench.failures}
    return {
        "tries": sum(bench.tries.values()),
        "failures": len(bench.failures),
        "without a failure": sorted(set(lines) - failed),
    }

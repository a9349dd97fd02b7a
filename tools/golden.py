"""Every table of every command as csv, of the sample traces, the bundled model and five families:
run it before and after a change of the code that must change no number.

    python -m tools.golden FOLDER             # writes FOLDER/traces and FOLDER/csv
    python -m tools.golden FOLDER --again     # writes the csv anew, of the traces that are there
    diff -r BEFORE/csv AFTER/csv
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from moe_inspect.__main__ import main as moe_inspect

ROOT = Path(__file__).parent.parent
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")
DEMO = "trace demo -o traces/demo --max-tokens 3000 --generate 8 --logits --output-norms"
OF_A_TRACE = (
    "report",
    "simulate placement",
    "simulate cache",
    "simulate decode",
    "simulate routing",
)
OF_TWO = (
    ("collapsed", "balanced"),
    ("balanced", "untrained"),
    ("demo", "again"),
    ("mixtral", "qwen3_moe"),
)
OF_THE_MODEL = {"ablate demo --max-tokens 1500 --layers 0 --experts 0-2": ("experts", "domains")}


def run(line: str) -> tuple[str, str]:
    """What a command prints on stdout and on stderr."""
    sys.argv = ["moe-inspect", *line.split()]
    written, err = io.BytesIO(), io.StringIO()
    with (
        io.TextIOWrapper(written, "utf-8", write_through=True) as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        with contextlib.suppress(SystemExit):
            moe_inspect()
        return written.getvalue().decode(), err.getvalue()


def record_all() -> None:
    """The traces, in the folder `traces`."""
    import torch

    from moe_inspect import record
    from tests.support.zoo import build
    from tests.test_zoo import batch

    for sample in ("balanced", "collapsed", "untrained"):
        shutil.copytree(ROOT / "sample_traces" / sample, f"traces/{sample}", dirs_exist_ok=True)
    run(DEMO)
    run(f"{DEMO.replace('traces/demo', 'traces/again')} --dtype bfloat16")
    for family in FAMILIES:
        model = build(family)
        with record(model, f"traces/{family}", logits=True), torch.no_grad():
            for _ in range(4):
                model(**batch(family))


def write_tables() -> None:
    """A csv of each table, or what is said where there is none, in the folder `csv`."""
    commands = {
        f"{command} traces/{trace}": tables_of(f"{command} traces/{trace}")
        for trace in sorted(path.name for path in Path("traces").iterdir())
        for command in OF_A_TRACE
    }
    for a, b in OF_TWO:
        line = f"compare traces/{a} traces/{b}"
        commands[line] = tables_of(line)
    commands |= OF_THE_MODEL
    for line, tables in commands.items():
        place = Path("csv") / re.sub(r"[ /]+", "_", line.replace("traces/", ""))
        place.mkdir(parents=True)
        for table in tables:
            out, err = run(f"{line} --table {table} --format csv")
            (place / f"{table}.csv").write_text(out or err)
        print(f"{line}: {len(tables)} tables", flush=True)


def tables_of(line: str) -> list[str]:
    """The tables of a command, as it lists them to who asks for another."""
    _, said = run(f"{line} --table ?")
    found = re.search(r"no table '\?': there are (.*)", said)
    assert found, said
    return found[1].split(", ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(asked.folder)
    if not asked.again:
        record_all()
    shutil.rmtree("csv", ignore_errors=True)
    write_tables()


if __name__ == "__main__":
    main()

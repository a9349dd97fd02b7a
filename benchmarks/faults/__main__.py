"""What is left when things go wrong: the process is killed at every write, fsync, rename, unlink
and the like, the disk is full or fails at each of them, two processes start at once, bits flip.
After each fault everything that was committed must be there and right: of a
trace, --resume and --overwrite must end in the one that an undisturbed run writes; of any other
output the old file or the new one is there, whole, and no draft. A flipped bit must change no
number without a word.

    python -m benchmarks.faults [PART ...]
    python -m benchmarks.faults outputs:export

takes minutes; prints tries and failures, and writes benchmarks/results/faults.json, which keeps
what it says of other parts. The part `control` switches drafts off, and has to find failures."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults import outputs, traces
from benchmarks.faults.bench import Bench

RESULT = Path(__file__).parent.parent / "results" / "faults.json"
PARTS = {
    "writing": traces.writing,
    "at-once": traces.writing_at_once,
    "importing": traces.importing,
    "flipping": traces.flipping,
    "tracing": traces.tracing,
    "outputs": outputs.outputs,
    "outputs-at-once": outputs.outputs_at_once,
}


def main() -> None:
    parts, failed = sys.argv[1:] or [*PARTS, "control"], False
    memory = Path("/dev/shm")  # a sync costs nothing there, and what a kill leaves is the same
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for part in parts:
            (place := Path(scratch) / part).mkdir()
            bench, began = Bench(place), time.monotonic()
            if part == "control":
                with contextlib.redirect_stderr(io.StringIO()):  # every failure is said there
                    found = outputs.control(bench)
                keep({}, found)
                print(f"with drafts switched off: {found}")
                failed |= bool(found["without a failure"])
                continue
            name, _, only = part.partition(":")
            try:
                if only:
                    outputs.outputs(bench, [one for one in outputs.LINES if one.startswith(only)])
                else:
                    PARTS[name](bench)
            finally:  # what was tried until Ctrl-C
                keep(said(bench))
            print(
                f"{part:64} {sum(bench.tries.values()):5} tries {len(bench.failures):5} failures"
                f"   {time.monotonic() - began:.0f} s",
                flush=True,
            )
            failed |= bool(bench.failures)
    sys.exit(failed)


def said(bench: Bench) -> dict[str, Any]:
    """Of each thing that was tried, how often, with how many failures, and how it ended."""
    failures = Counter(f["what"] for f in bench.failures)
    rows = {
        what: {
            "tries": n,
            "failures": failures[what],
            "ended": dict(bench.outcomes[what].most_common()),
        }
        for what, n in bench.tries.items()
    }
    for what, row in rows.items():
        print(f"{what:64} {row['tries']:5} tries {row['failures']:5} failures   {row['ended']}")
    return rows


def keep(rows: dict[str, Any], control: dict[str, Any] | None = None) -> None:
    """In the result, with what it says of other parts."""
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows = {**before.get("of", {}), **rows}
    sums = {name: sum(row[name] for row in rows.values()) for name in ("tries", "failures")}
    off = control or before.get("with drafts switched off", {})
    held = {**sums, "of": rows, "with drafts switched off": off}
    RESULT.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()

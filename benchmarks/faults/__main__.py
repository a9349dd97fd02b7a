"""What is left when things go wrong: the process is killed at every write, fsync, rename, unlink
and the like, the disk is full or fails at each of them, two processes start at once, bits flip,
object storage refuses. After each fault everything that was committed must be there and right: of a
trace, --resume and --overwrite must end in the one that an undisturbed run writes; of any other
output the old file or the new one is there, whole, and no draft. A flipped bit must change no
number without a word.

    python -m benchmarks.faults [PART ...]

takes minutes; prints tries and failures, and writes benchmarks/results/faults.json, which keeps
what it says of other parts. The part `control` switches drafts off, and has to find failures. The
part `objects` needs `pip install s3fs 'moto[server]'`."""

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
from benchmarks.faults.objects import objects

RESULT = Path(__file__).parent.parent / "results" / "faults.json"
PARTS = {
    "writing": traces.writing,
    "at-once": traces.writing_at_once,
    "importing": traces.importing,
    "flipping": traces.flipping,
    "tracing": traces.tracing,
    "outputs": outputs.outputs,
    "outputs-at-once": outputs.outputs_at_once,
    "objects": objects,
}


def main() -> None:
    parts = sys.argv[1:] or [*PARTS, "control"]
    memory = Path("/dev/shm")  # a sync costs nothing there, and what a kill leaves is the same
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        bench, began = Bench(Path(scratch)), time.monotonic()
        for part in [part for part in parts if part != "control"]:
            PARTS[part](bench)
            print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        found: dict[str, Any] = {}
        if "control" in parts:
            (Path(scratch) / "control").mkdir()
            with contextlib.redirect_stderr(io.StringIO()):  # every failure is said there
                found = outputs.control(Bench(Path(scratch) / "control"))
    failed = Counter(f["what"] for f in bench.failures)
    rows = {
        what: {
            "tries": n,
            "failures": failed[what],
            "ended": dict(bench.outcomes[what].most_common()),
        }
        for what, n in bench.tries.items()
    }
    for what, row in rows.items():
        print(f"{what:64} {row['tries']:5} tries {row['failures']:5} failures   {row['ended']}")
    total = sum(bench.tries.values())
    print(
        f"{'in all':64} {total:5} tries {len(bench.failures):5} failures   "
        f"{time.monotonic() - began:.0f} s"
    )
    missed = [line for line, n in found.get("of", {}).items() if not n]
    if found:
        print(f"with drafts switched off: {found['tries']} tries, {found['failures']} failures")
        print("".join(f"missed: {line}\n" for line in missed), end="")
    before = json.loads(RESULT.read_text()) if sys.argv[1:] and RESULT.exists() else {}
    rows = {**before.get("of", {}), **rows}
    sums = {name: sum(row[name] for row in rows.values()) for name in ("tries", "failures")}
    off = found or before.get("with drafts switched off", {})
    said = {**sums, "of": rows, "with drafts switched off": off}
    RESULT.write_text(json.dumps(said, indent=1) + "\n")
    sys.exit(bool(bench.failures or missed))


if __name__ == "__main__":
    main()

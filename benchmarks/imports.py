"""What importing costs: assignments a CPU-second and peak memory, at two sizes. Called from
benchmarks/run.py, or by itself."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measuring import ROOT, in_a_process, peak_memory_mib

FORMAT = "vllm-routed"
L, E, K = 48, 128, 8  # Qwen3-30B-A3B
SEQUENCE = 512


def make(root: Path, assignments: float) -> None:
    rng = np.random.default_rng(0)
    sequences = max(1, round(assignments / (L * K * SEQUENCE)))
    drawn_TLK = (
        rng.random((SEQUENCE, L, E), np.float32).argpartition(K, 2)[:, :, :K].astype(np.uint8)
    )
    array = io.BytesIO()
    np.save(array, drawn_TLK)
    ids = rng.integers(0, 150_000, SEQUENCE + 1).tolist()
    line = {
        "prompt_token_ids": ids[:400],
        "token_ids": ids[400:],
        "routed_experts": base64.b64encode(array.getvalue()).decode(),
    }
    text = json.dumps(line) + "\n"
    with open(root / "responses.jsonl", "w") as file:
        for _ in range(sequences):
            file.write(text)


def run(assignments: float) -> dict[str, float]:
    """In a process of its own: its peak memory and CPU time are the import's."""
    import pandas  # noqa: F401  (pyarrow looks for it at its first write: no part of importing)

    from moe_inspect.making import import_trace

    with tempfile.TemporaryDirectory() as scratch:
        (source := Path(scratch) / "in").mkdir()
        program = (
            "from pathlib import Path; from benchmarks.imports import make; "
            f"make(Path({str(source)!r}), {assignments})"
        )
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
        config = Path(scratch) / "config.json"
        config.write_text(
            json.dumps({"num_hidden_layers": L, "num_experts": E, "num_experts_per_tok": K})
        )
        cpu, wall = time.process_time(), time.perf_counter()
        trace = import_trace(FORMAT, [source], Path(scratch) / "t", model=config)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        imported = trace.n_tokens * L * K
    return {
        "assignments": imported,
        "million_assignments_per_cpu_s": imported / cpu / 1e6,
        "wall_s": wall,
        "peak_memory_mib": peak_memory_mib(),
    }


def measure() -> dict[str, dict[str, float]]:
    return {
        f"{FORMAT} {size:.0e}": in_a_process("run", size, module="benchmarks.imports")
        for size in (3e6, 3e7)
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))

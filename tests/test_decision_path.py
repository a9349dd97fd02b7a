"""The files that a decision passes, from the model to Parquet and from Parquet to a printed table,
are the lists in docs/how-it-works.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import moe_inspect
from tests.conftest import ROOT, Cli

PACKAGE = Path(moe_inspect.__file__).parent
E, K, LAYERS, TOKENS = 7, 3, 3, 211  # sizes that nothing else has
LEVELS = 6  # containers and objects in each other that are opened
COMPUTED = ("max_over_mean", "cv", "gini", "entropy")  # columns of the table `balance`


class Watch:
    """Notes the files of the package with a function that has one of `arrays`, or a text with one
    of `texts`, among its arguments, variables or results."""

    def __init__(self, arrays: Sequence[np.ndarray], texts: Sequence[str] = ()) -> None:
        self.arrays = [array_N.astype(float).ravel() for array_N in arrays]
        self.sizes = {len(array_N) for array_N in self.arrays}
        self.texts, self.files = texts, set[str]()

    def holds(self, value: Any, levels: int = LEVELS) -> bool:
        match value:
            case torch.Tensor():
                return value.numel() in self.sizes and self.equals(value.detach().numpy())
            case np.ndarray():
                return value.dtype.kind in "iuf" and self.equals(value)
            case pa.Array() | pa.ChunkedArray():
                is_number = pa.types.is_integer(value.type) or pa.types.is_floating(value.type)
                return is_number and len(value) in self.sizes and self.equals(value.to_numpy(False))
            case str():
                return any(text in value for text in self.texts)
            case pd.DataFrame():
                return any(self.holds(value[name].to_numpy()) for name in value)
            case pa.Table() | pa.RecordBatch():
                return any(map(self.holds, value.columns))
            case Mapping() | list() | tuple() if type(value) in (dict, list, tuple):
                parts = value.values() if isinstance(value, dict) else value
            case _ if type(value).__module__.startswith("moe_inspect"):
                parts = getattr(value, "__dict__", {}).values()
            case _:
                return False
        return levels > 0 and any(self.holds(part, levels - 1) for part in [*parts])

    def equals(self, values: np.ndarray) -> bool:
        if values.size not in self.sizes:
            return False
        values_N = values.astype(float).ravel()
        return any(np.array_equal(values_N, array_N) for array_N in self.arrays)

    def __call__(self, frame: FrameType, event: str, result: object) -> None:
        """Look at a call or a return; a profiler of Python's."""
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        is_function = code.co_flags & CO_OPTIMIZED  # no body of a module or class
        if event not in ("call", "return") or not is_function or not path.is_relative_to(PACKAGE):
            return
        if (name := str(path.relative_to(PACKAGE))) in self.files:
            return
        sys.setprofile(None)
        values = [*frame.f_locals.values(), *([result] if event == "return" else [])]
        if any(map(self.holds, values)):
            self.files.add(name)
        sys.setprofile(self)

    @contextmanager
    def running(self) -> Iterator[None]:
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            threading.setprofile(None)
            sys.setprofile(None)


def listed(title: str) -> list[str]:
    """The files in a list of the page."""
    page = (ROOT / "docs/how-it-works.md").read_text()
    section = re.search(rf"^{title}\n\n(.*?)\n(?=\n|\Z)", page, re.S | re.M)
    assert section, title
    return re.findall(r"^\d+\. `(\S+\.py)`: ", section[1], re.M)


def record(folder: Path) -> None:
    """One pass of a small model on a CPU."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": TOKENS + 1}
    heads: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": LAYERS,
    }
    config = MixtralConfig(**sizes, **heads, num_local_experts=E, num_experts_per_tok=K)
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad(), moe_inspect.record(model, folder):
        model(input_ids=torch.arange(1, TOKENS + 1)[None])


def decisions(folder: Path) -> list[np.ndarray]:
    """The experts of every layer, as one array in either order and slot by slot."""
    columns = [f"expert_{slot}" for slot in range(K)]
    trace = moe_inspect.open_trace(folder)
    ids = [trace.routing(layers=layer)[columns].to_numpy() for layer in range(LAYERS)]
    return [array for ids_TK in ids for array in (ids_TK, ids_TK.T, *ids_TK.T)]


def files_of_a_recording(folder: Path) -> list[str]:
    record(folder / "t")
    watch = Watch(decisions(folder / "t"))
    with watch.running():
        record(folder / "again")
    return sorted(watch.files)


def test_from_the_model_to_parquet(tmp_path: Path) -> None:
    """In a process of its own: after tests of kernels, a recording may run some of them."""
    command = [sys.executable, "-m", "tests.test_decision_path", str(tmp_path)]
    printed = subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    files = listed("From the model to Parquet:")
    assert sorted(files) == json.loads(printed)
    assert len(files) <= 12


def test_from_parquet_to_a_printed_table(cli_here: Cli, tmp_path: Path) -> None:
    record(tmp_path / "t")
    tables = moe_inspect.report(tmp_path / "t").tables
    load_LE = tables["load"]["assignments"].to_numpy().reshape(LAYERS, E)
    balance = tables["balance"]
    computed = [balance[name].to_numpy() for name in COMPUTED]
    command = "report", tmp_path / "t", "--table", "balance"
    printed = f"{balance['max_over_mean'][0]:.4g}"
    assert printed in cli_here(*command).stdout
    watch = Watch([*decisions(tmp_path / "t"), load_LE, *load_LE, *computed], [printed])
    with watch.running():
        cli_here(*command)
    files = listed("From Parquet to a printed table:")
    assert sorted(files) == sorted(watch.files)
    assert len(files) <= 20


if __name__ == "__main__":
    print(json.dumps(files_of_a_recording(Path(sys.argv[1]))))

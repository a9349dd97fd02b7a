"""The public API: what `import moe_inspect` offers is there, is typed, and costs nothing before it
is used."""

from __future__ import annotations

import inspect
import json
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pandas as pd
import pytest

import moe_inspect
from moe_inspect.capture import options as module
from moe_inspect.reporting.report import TABLES
from moe_inspect.trace.reader import open_trace as open_stored
from tests.conftest import ROOT

# expression → the type that a type checker must see
TYPES = {
    "moe_inspect.report(trace)": "Report",
    'moe_inspect.report(trace).tables["balance"]': "DataFrame",
    "moe_inspect.report(trace).verdict()": "list[",
    "moe_inspect.open_trace(path)": "Trace",
    "moe_inspect.record(model, path)": "Recorder",
    "moe_inspect.record(model, counts_only=True).balance()": "DataFrame",
    "moe_inspect.record": "**options: **RecordKeywords",
    "moe_inspect.describe(path)": "Description",
    "moe_inspect.check(path)": "Checked",
    "moe_inspect.trace_model(path, path, batch_tokens=500)": "Trace",
    "trace.simulate.cache(slots=[2])": "Simulation",
    "trace.report()": "Report",
    'trace.balance(layers="1")': "DataFrame",
    "trace.compare(path)": "Comparison",
    "trace.check(quick=True)": "Checked",
}
# what a type checker must refuse: it would be accepted where the types were Any
WRONG = (
    "moe_inspect.reprot(trace)",
    "moe_inspect.trace_model(path, path, batch_token=500)",
    "moe_inspect.record(model, path, evry=2)",
    "trace.balance(layer=1)",
)


def test_every_name_is_there_documented_and_in_help() -> None:
    text = pydoc.render_doc(moe_inspect, renderer=pydoc.plaintext)
    assert sorted(moe_inspect.__all__) == moe_inspect.__all__
    assert set(moe_inspect.__all__) <= set(dir(moe_inspect))
    for name in moe_inspect.__all__:
        value = getattr(moe_inspect, name)
        assert inspect.isfunction(value) or inspect.isclass(value), name
        assert inspect.getdoc(value), f"{name} has no docstring"
        assert f"{name}(" in text or f"class {name}" in text, name
    with pytest.raises(AttributeError, match="reprot"):
        _ = moe_inspect.reprot  # pyright: ignore


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    heavy = {"torch", "transformers", "triton", "pandas", "pyarrow"}
    program = "import sys, moe_inspect, moe_inspect.demo; dir(moe_inspect); moe_inspect.record; "
    command = [sys.executable, "-c", f"{program}print({heavy} & {{*sys.modules}})"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    of_traces = "from moe_inspect.importers import run; from moe_inspect.exporters import run; "
    of_traces += "from moe_inspect.trace import verify; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", of_traces], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_type_checkers_see_real_types(tmp_path: Path) -> None:
    assert (Path(moe_inspect.__file__).parent / "py.typed").exists()
    header = "import moe_inspect\nfrom typing import Any\n"
    header += "def f(model: Any, path: str, trace: moe_inspect.Trace) -> None:\n"
    lines = [f"    reveal_type({expression})" for expression in TYPES]
    lines += [f"    {expression}" for expression in WRONG]
    (tmp_path / "use.py").write_text(header + "\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    command += [str(tmp_path / "use.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = json.loads(done.stdout)["generalDiagnostics"]
    first = header.count("\n")
    by_line = {d["range"]["start"]["line"] - first: d for d in said}
    for n, (expression, kind) in enumerate(TYPES.items()):
        assert by_line[n]["severity"] == "information", by_line[n]["message"]
        assert kind in by_line[n]["message"].partition(" is ")[2], expression
    for n in range(len(TYPES), len(TYPES) + len(WRONG)):
        assert by_line[n]["severity"] == "error"


def test_each_table_of_a_report_is_a_method_of_the_trace() -> None:
    stored = open_stored(ROOT / "sample_traces" / "balanced")
    trace = moe_inspect.open_trace(stored)
    for name in TABLES:
        if name == "vocabulary":  # that of the tokenizer, which the trace holds
            continue
        assert not hasattr(stored, name), f"the table {name} hides what the trace has"
        expected = trace.report(layers="1").tables[name]
        pd.testing.assert_frame_equal(getattr(trace, name)(layers="1"), expected)


@pytest.mark.parametrize("kind", ["Trace", "Record"])
def test_each_setting_of_a_trace_is_a_typed_keyword(kind: str) -> None:
    options, keywords = (getattr(module, f"{kind}{end}") for end in ("Options", "Keywords"))
    assert get_type_hints(options) == get_type_hints(keywords)


def test_settings_of_a_trace_are_checked_by_name() -> None:
    with pytest.raises(TypeError, match="batch_token'"):
        moe_inspect.trace_model("demo", "t", batch_token=5)  # pyright: ignore

"""The examples run as they stand."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moe_inspect
from tests.conftest import ROOT
from tests.support import own

EXAMPLES = ROOT / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_training_loop_logs_every_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "train_loop.py")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 * 4
    assert lines[-1].startswith("step 6 layer 3: max_vio ")


def test_a_model_of_ones_own_is_traced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Trained for a few steps, and traced again as its text says."""
    run(monkeypatch, "your_own_moe.py", tmp_path, 3)
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("after 3 steps")
    assert [line.split()[0] for line in out[2:6]] == ["0", "1", "2", "3"]
    assert [line.split() for line in out[7:]] == [[str(n), "128", "0.0"] for n in range(4)]
    traced = moe_inspect.open_trace(tmp_path / "trace")
    loader = own.example().load
    checkpoint = str(tmp_path / "model.pt")
    again = moe_inspect.trace_model(checkpoint, tmp_path / "again", loader=loader, max_tokens=500)
    key = ["sequence", "position", "token_id", "expert_0", "expert_1"]
    both = [t.tokens().merge(t.routing(layers=2), on="token")[key] for t in (traced, again)]
    assert len(both[1].merge(both[0])) == 500  # the same routing
    longer = moe_inspect.trace_model(
        checkpoint, tmp_path / "longer", loader=loader, max_tokens=500, generate=4
    )
    assert moe_inspect.check(longer.path, quick=True).ok
    assert longer.n_tokens == 500 + 4 * len(longer.documents())
    decoded = longer.tokens().query("phase == 'decode'")
    assert (decoded.groupby("document").size() == 4).all()


def test_a_trace_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "analyse.py")
    out = capsys.readouterr().out
    assert out.startswith("layer 3 is the least balanced: max_vio 1.87\n")
    assert "english" in out


@pytest.mark.parametrize(("trace", "code"), [("balanced", 0), ("collapsed", 3)])
def test_a_gate_fails_the_collapsed_model(
    trace: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "gate.py", ROOT / "sample_traces" / trace)
    assert ended.value.code == code
    assert ("layer 3: max_vio 1.87 > 0.5" in capsys.readouterr().out) == (code == 3)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit it without outputs"
            *lines, last = "".join(cell["source"]).splitlines()
            exec("\n".join(lines), names)
            try:
                shown = eval(last, names)  # what a notebook displays
            except SyntaxError:
                exec(last, names)
            else:
                assert shown is None or "<" in shown._repr_html_() or len(shown)
    assert set(names["simulation"].tables) >= {"policies"}


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.*"):
        assert path.name == "README.md" or f"[{path.name}]({path.name})" in listed


# --- those that log the routers of training frameworks in their own logs

STEPS = 4


def check(path: Path, tokens: int, logged: dict[int, set[str]]) -> None:
    trace = moe_inspect.open_trace(path)
    assert trace.n_tokens == tokens
    assert [s.files.last_batch for s in trace.shards][-1] == STEPS
    assert sorted(logged) == [2, 4]
    assert all("routing/max_vio/worst" in names for names in logged.values())


def test_torchtitan_logs_the_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchtitan")
    pytest.importorskip("tensorboard")
    models = pytest.importorskip("tests.frameworks.torchtitan_models")
    from torchtitan.components import metrics

    memory = SimpleNamespace(
        device_name="cpu",
        reset_peak_stats=lambda: None,
        get_peak_stats=lambda: metrics.DeviceMemStats(*[0] * 6),
    )
    monkeypatch.setattr(metrics, "build_device_memory_monitor", lambda: memory)  # needs a GPU
    monkeypatch.setattr(metrics.utils, "get_peak_flops", lambda name: 1e12)
    made = runpy.run_path(str(EXAMPLES / "torchtitan_metrics.py"))["RoutingMetricsProcessor"]
    processor = made(
        made.Config(log_freq=2, history=str(tmp_path / "h")),
        parallel_dims=SimpleNamespace(non_data_parallel_size=1),
        dump_folder=str(tmp_path),
    )
    model, logged, tokens = models.build("qwen3").train(), {}, 0
    processor.model_parts, processor.num_flops_per_token = [model], 1
    processor.logger = SimpleNamespace(
        log=lambda found, step: logged.update({step: set(found)}), close=lambda: None
    )
    for step in range(1, STEPS + 1):  # as Trainer.train_step does
        should_log = processor.should_log(step) and step > 1
        ids, positions = models.inputs(step)
        model(ids, positions).float().mean().backward()
        processor.data_loading_times.append(0.1)
        tokens += ids.numel()
        if should_log:
            processor.log(step, 1.0, 1.0, 0.1, extra_metrics={"n_tokens_seen": tokens})
    processor.close()
    assert all("n_tokens_seen" in names for names in logged.values())
    check(tmp_path / "h", tokens, logged)


def test_olmo_core_logs_the_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("olmo_core")
    models = pytest.importorskip("tests.frameworks.olmo_core_models")
    models.on_a_cpu(monkeypatch.setattr)
    made = runpy.run_path(str(EXAMPLES / "olmo_core_callback.py"))["OLMoRoutingCallback"]
    callback = made(history=str(tmp_path / "h"), interval=2)
    model, logged, tokens = models.build(True).train(), {}, 0
    trainer = SimpleNamespace(
        train_module=SimpleNamespace(model=model),
        global_step=0,
        record_metric=lambda name, value: logged.setdefault(trainer.global_step, set()).add(name),
    )
    callback.trainer = trainer
    callback.pre_train()
    for trainer.global_step in range(1, STEPS + 1):
        ids = models.inputs(trainer.global_step)
        out = model(ids)
        getattr(out, "logits", out).float().mean().backward()
        tokens += ids.numel()
        callback.post_train_batch()
    callback.post_checkpoint_saved(tmp_path)
    callback.post_train()
    callback.close()
    check(tmp_path / "h", tokens, logged)

"""The examples that log the routers of torchtitan and OLMo-core in their own logs. They skip where
these are not installed."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moe_inspect
from tests.conftest import ROOT

STEPS = 4


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / name))


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
    made = example("torchtitan_metrics.py")["RoutingMetricsProcessor"]
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
    made = example("olmo_core_callback.py")["OLMoRoutingCallback"]
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

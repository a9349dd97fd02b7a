"""RoutingMonitor: the counts of a training loop are those of its batches, each token once."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_inspect
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import load_scale
from moe_inspect.training import RoutingMonitor
from moe_inspect.training.sums import DeviceSums, WindowSums
from tests.support import own, zoo
from tests.support.families import FAMILIES, build
from tests.support.trained import EXPERTS, LAYERS, counted, reset
from tests.support.zoo import token_batch


def batch(n: int) -> dict[str, torch.Tensor]:
    return token_batch([9, 5, 12, 1], seed=n)


def loop(
    model: Any, monitor: RoutingMonitor, steps: int, accumulate: int = 1, first: int = 0
) -> list[dict[str, float]]:
    """Trains; returns what was logged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logs = []
    for step in range(first, first + steps):
        for micro in range(accumulate):
            inputs = batch(step * accumulate + micro)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logs.append(monitor.step())
    return [metrics for metrics in logs if metrics]


def history(path: Path) -> np.ndarray:
    """int64 [layers, experts]"""
    load = moe_inspect.report(path).tables["load"]
    return load["assignments"].to_numpy().reshape(-1, load["expert"].max() + 1)


@pytest.mark.parametrize(
    ("accumulate", "how"),
    [(1, ""), (3, ""), (1, "checkpointed"), (3, "checkpointed"), (1, "compiled")],
)
def test_counts_are_those_of_the_batches(accumulate: int, how: str, tmp_path: Path) -> None:
    model = counted().train()
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    given = torch.compile(model, backend="eager") if how == "compiled" else model
    with RoutingMonitor(given, tmp_path / "h", log_steps=2) as monitor:
        logs = loop(model, monitor, 5, accumulate)
    assert model.steps_passes == 5 * accumulate
    assert (history(tmp_path / "h") == model.load).all()
    assert len(logs) == 2
    trace = moe_inspect.open_trace(tmp_path / "h")
    assert trace.n_tokens == 5 * accumulate * (9 + 5 + 12 + 1)  # without padding
    spans = [(s.files.first_batch, s.files.last_batch) for s in trace.shards]
    assert spans == [(1, 2), (3, 4), (5, 5)]
    assert moe_inspect.check(tmp_path / "h", quick=True).ok
    model.load[0, 0] += 1  # control
    assert not (history(tmp_path / "h") == model.load).all()


def test_the_range_of_a_selection_bias_is_logged() -> None:
    model = build("deepseek_v3").train()
    (*_, gate) = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    gate.e_score_correction_bias[0], gate.e_score_correction_bias[1:] = 3.0, 0.5
    with RoutingMonitor(model, log_steps=1) as monitor:
        model(**batch(0))
        assert monitor.step()["routing/bias_range/worst"] == pytest.approx(2.5)


def test_gradients_and_outputs_are_untouched() -> None:
    def gradients(watched: bool) -> dict[str, torch.Tensor]:
        model, inputs = counted().train(), batch(0)
        with RoutingMonitor(model) if watched else nullcontext():
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with_it, without = gradients(True), gradients(False)
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert len(without) > 10


class Operations(TorchDispatchMode):
    """How often each operation runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.times = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.times[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


# operations whose result the host has to wait for
WAITING = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "equal", "masked_select"}


def test_nothing_waits_for_the_device_between_logs() -> None:
    def times(is_watched: bool) -> Counter[str]:
        model = counted().train()
        monitor = RoutingMonitor(model, log_steps=100)
        with monitor if is_watched else nullcontext(), Operations() as seen:
            for n in range(3):
                model(**batch(n))
                if is_watched:
                    monitor.step()
        return seen.times

    of_monitor = times(True) - times(False)
    assert of_monitor["scatter_add_"]  # it counted
    assert not of_monitor.keys() & WAITING
    with Operations() as seen:  # control
        torch.ones(2).sum().item()
    assert seen.times.keys() & WAITING == {"_local_scalar_dense"}


def test_the_sums_of_a_large_model_are_small() -> None:
    sums = DeviceSums(torch.device("cpu"), [256] * 61)
    tensors = [value for value in vars(sums).values() if isinstance(value, torch.Tensor)]
    assert 1e6 < sum(tensor.numel() * tensor.element_size() for tensor in tensors) < 4e6


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    model = counted()
    for options, message in (
        ({"every": 0}, "every is 0"),
        ({"detail": "all"}, "no detail 'all'"),
        ({"rules": ["max_vio"]}, "has no limit"),
        ({"rules": ["gpu_max_over_mean > 2"]}, "needs a plan"),
        ({"on_alarm": "shout"}, "no action 'shout'"),
    ):
        with pytest.raises(MoeInspectError, match=message):
            RoutingMonitor(model, **options)  # pyright: ignore[reportArgumentType]
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "file").touch()
    with pytest.raises(MoeInspectError, match="there is something at"):
        RoutingMonitor(model, tmp_path / "h").__enter__()
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad():
        model(**batch(0))
    with pytest.raises(MoeInspectError, match="not the history of a training run"):
        RoutingMonitor(model, tmp_path / "t", resume_step=3).__enter__()
    model = own.gpt(probes=False)
    says = r"add one line to its forward: moe_inspect\.probe\(.*, or give routers=\["
    with pytest.raises(MoeInspectError, match=says), RoutingMonitor(model):
        model(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("family", [*FAMILIES, "switch_transformers"])
def test_every_family_is_counted_as_a_recorder_counts_it(family: str) -> None:
    model = (build if family in FAMILIES else zoo.build)(family).train()
    with (
        moe_inspect.record(model, counts_only=True, capture="tap") as recorder,
        RoutingMonitor(model, log_steps=1, rules=()) as monitor,
    ):
        for n in range(2):
            model(**zoo.inputs(family, [9, 5, 12, 1], seed=n))
        monitor.step()
        totals = recorder.totals()
    assert monitor.window is not None
    assert len(totals.load) == len(monitor.window.load) > 0
    for mine, theirs in zip(monitor.window.load, totals.load, strict=True):
        assert mine.sum() > 0
        assert (mine == theirs).all()
    assert (monitor.window.tokens_R == totals.tokens_R).all()


@pytest.mark.parametrize("probes", [False, True])
def test_a_model_of_ones_own_is_counted(probes: bool, tmp_path: Path) -> None:
    """By RouterSpecs, and by probes in its forward."""
    model, routers = own.gpt(probes).train(), None if probes else own.example().ROUTERS
    monitor = RoutingMonitor(model, tmp_path / "h", routers=routers, log_steps=2)
    with own.watched(model) as given, monitor:
        for _ in range(4):
            model(own.tokens()).sum().backward()
            monitor.step()
    experts = [[e for rows in passes for row in rows for e in row] for passes in given.values()]
    assert (history(tmp_path / "h") == [np.bincount(ids, minlength=8) for ids in experts]).all()
    assert moe_inspect.open_trace(tmp_path / "h").n_tokens == 4 * own.tokens().numel()


def test_losses_of_probes_are_those_of_the_logits_that_they_show() -> None:
    def forward(self: Any, tokens: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer, gate in enumerate(self.gates):
            self.logits = gate(x)
            weights, ids = self.logits.softmax(-1).topk(2)
            shown = {"logits": self.logits} if layer else {"experts": EXPERTS}
            moe_inspect.probe(ids, weights, layer=layer, **shown)
            x = x * weights.sum(-1, keepdim=True)
        return x.sum()

    torch.manual_seed(0)
    embed = torch.nn.Embedding(300, 16)
    gates = torch.nn.ModuleList(torch.nn.Linear(16, EXPERTS, bias=False) for _ in range(LAYERS))
    model, inputs = own.module("Probed", forward, embed=embed, gates=gates).train(), batch(0)
    with RoutingMonitor(model, log_steps=1, detail="layers") as monitor:
        for _ in range(2):  # the first pass shows what there is
            model(inputs["input_ids"], padding_mask=inputs["attention_mask"] == 0).backward()
            metrics = monitor.step()
    assert metrics["routing/tokens"] == 27
    logits = model.logits.detach()[inputs["attention_mask"] != 0]
    z = float((logits.logsumexp(-1) ** 2).mean())
    assert metrics["routing/z_loss/layer_1"] == pytest.approx(z, rel=1e-5)
    assert "routing/z_loss/layer_0" not in metrics
    assert metrics["routing/aux_loss/layer_1"] > 0


def test_a_report_has_the_windows_of_a_history(tmp_path: Path) -> None:
    model, loads = counted().train(), []
    with RoutingMonitor(model, tmp_path / "h", log_steps=2) as monitor:
        for step in range(0, 6, 2):
            reset(model)
            loop(model, monitor, 2, first=step)
            loads.append(model.load)
    made = moe_inspect.report(tmp_path / "h")
    windows = made.tables["windows"]
    assert windows["tokens"].tolist() == [2 * 27] * 3 * LAYERS
    expected = [bal.max_over_mean(load_LE)[1] for load_LE in loads]
    assert windows[windows["router"] == 1]["max_over_mean"].tolist() == pytest.approx(expected)
    wide = moe_inspect.report(tmp_path / "h", window=4 * 27).tables["windows"]
    assert sorted(set(wide["tokens"])) == [2 * 27, 4 * 27]
    made.prepare(["windows"])
    assert "Judged on 162 tokens" in " ".join(f.text for f in made.verdict())


def test_a_resumed_run_replaces_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, expected = tmp_path / "h", np.zeros((LAYERS, EXPERTS), np.int64)
    model = counted().train()
    with RoutingMonitor(model, path, log_steps=2) as monitor:
        loop(model, monitor, 4)
        expected += model.load
        loop(model, monitor, 3, first=4)
    reset(model)
    with RoutingMonitor(model, path, log_steps=2, resume_step=4) as monitor:
        loop(model, monitor, 4, first=4)
        assert monitor.steps == 8
    expected += model.load
    assert (history(path) == expected).all()
    assert moe_inspect.check(path, quick=True).ok
    spans = [(s.files.first_batch, s.files.last_batch) for s in moe_inspect.open_trace(path).shards]
    assert spans == [(1, 2), (3, 4), (5, 6), (7, 8)]
    with RoutingMonitor(model, path, log_steps=2, resume_step=7) as monitor:
        loop(model, monitor, 1, first=7)
    assert "counts up to step 6" in capsys.readouterr().err
    assert [s.files.last_batch for s in moe_inspect.open_trace(path).shards] == [2, 4, 6, 8]
    of_one = RoutingMonitor(model, path, log_steps=2, resume_step=8, layers=[0])
    other = f"is the history of a model with {LAYERS} routers, this one has 1:"
    with pytest.raises(MoeInspectError, match=other), of_one:
        loop(model, of_one, 2, first=8)
    assert [s.files.last_batch for s in moe_inspect.open_trace(path).shards] == [2, 4, 6, 8]
    RoutingMonitor(model, path, resume_step=8).__enter__().__exit__(None)  # it is not locked


def test_the_picture_shows_every_expert_of_every_layer() -> None:
    model = counted().train()
    with RoutingMonitor(model, log_steps=2) as monitor:
        assert monitor.log() == {}
        with pytest.raises(MoeInspectError, match="no window yet: the first picture follows"):
            monitor.picture()
        loop(model, monitor, 2)
        drawn = [axes for axes in monitor.picture().axes if axes.get_label() != "scale"]
    (image,) = [axes.images[0].get_array() for axes in drawn]
    assert image.shape == (LAYERS, EXPERTS)
    ratio_LE = np.maximum(model.load / model.load.mean(1, keepdims=True), 0.25)
    scale = load_scale(monitor.routers, "load ÷ mean load")  # the colours of a report
    assert np.allclose(image, scale.place(ratio_LE))


def test_losses_of_windows_are_weighted_by_their_passes() -> None:
    """One of a pass and one of three: as if they had been read at once."""
    load, recent = [np.array([3, 1])], [np.array([[3, 1]])]
    of_1, of_3 = (
        WindowSums(load, recent, np.array([4]), passes, np.full((2, 1), loss))
        for passes, loss in ((1, 8.0), (3, 4.0))
    )
    both = of_1.plus(of_3)
    assert (both.passes, both.losses_2R.tolist()) == (4, [[5.0]] * 2)
    assert both.load[0].tolist() == [6, 2]

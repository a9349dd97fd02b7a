"""What a training run logs of its routers: metrics under a bounded number of keys, and the load of
every expert of every layer in one picture.

R routers, E experts.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.metrics.balance import load_ratios
from moe_inspect.reporting.verdict.findings import Finding, Severity, finding
from moe_inspect.text import join_first, layer_label, plural
from moe_inspect.trace.schema import Router
from moe_inspect.watch.alarms import Window, metric_R
from moe_inspect.watch.rules import BATCH, DRIFT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DETAILS = ("summary", "layers")
OF_LOAD = ("max_vio", "dead_experts", "starved_experts", "entropy")
WORST_IS_LOW = ("entropy",)


def window_metrics(window: Window, before: Window | None) -> dict[str, np.ndarray]:
    """Metric → its value at each router, float [R]: max_vio of the window, max_vio_batch (mean over
    its steps), dead and starved experts, entropy of the load ÷ ln E, drift (total variation from
    the window before), and what the model shows of aux_loss, z_loss and bias_range."""
    names = (*OF_LOAD, BATCH, DRIFT) if window.recent else (*OF_LOAD, DRIFT)
    return {name: metric_R(name, window, before) for name in names} | dict(window.values)


def logged(
    values: Mapping[str, np.ndarray], routers: Sequence[Router], detail: str, prefix: str
) -> dict[str, float]:
    """The keys of a log: of each metric the worst and the median over layers and, with detail
    "layers", every layer; the layer of the worst max_vio. Metrics of no router are left out."""
    found = dict[str, float]()
    for name, value_R in values.items():
        if np.isnan(value_R).all():
            continue
        worst = np.nanmin if name in WORST_IS_LOW else np.nanmax
        found[f"{prefix}{name}/worst"] = float(worst(value_R))
        found[f"{prefix}{name}/median"] = float(np.nanmedian(value_R))
        if detail == "layers":
            for r, value in enumerate(value_R):
                if not math.isnan(value):
                    found[f"{prefix}{name}/layer_{layer_label(routers, r)}"] = float(value)
        if name == "max_vio":
            found[f"{prefix}worst_layer"] = float(routers[int(np.nanargmax(value_R))].layer)
    return found


FEWEST_STEPS = 12  # of which a third is compared with a third
MOVED_P = 0.01  # of any router, by chance


def unevenness(window: Window) -> np.ndarray:
    """Of the window's last steps and each router, E · Σ share² − 1: 0 where the load is even."""
    shares = [load_SE / np.maximum(load_SE.sum(1, keepdims=True), 1) for load_SE in window.recent]
    return np.stack([of_SE.shape[1] * (of_SE**2).sum(1) - 1 for of_SE in shares], axis=1)


def balance_moved(uneven_SR: np.ndarray, routers: Sequence[Router]) -> Finding:
    """Whether the load has become more or less even beside the noise of single steps: the last
    third of them against the first, by Welch's t-test of each router, at 1 % for all together."""
    from scipy.stats import ttest_ind

    S, R = uneven_SR.shape
    if S < FEWEST_STEPS:
        text = f"{plural(S, 'step')} {'is' if S == 1 else 'are'} too few to tell whether the load "
        return finding("loss_moved", "note", text + "becomes more even.")
    first_NR, last_NR = uneven_SR[: S // 3], uneven_SR[-(S // 3) :]
    change_R = last_NR.mean(0) - first_NR.mean(0)
    with warnings.catch_warnings(action="ignore"):  # of steps that do not vary
        welch: Any = ttest_ind(first_NR, last_NR, equal_var=False)
    moved_R = welch.pvalue < MOVED_P / R
    better, worse = (np.flatnonzero(moved_R & (sign * change_R < 0)) for sign in (1, -1))

    def said(which: np.ndarray, how: str) -> str:
        return f"{how} in layer{'s' * (len(which) > 1)} " + join_first(
            layer_label(routers, r) for r in which
        )

    parts = [said(better, "more even")] * bool(len(better))
    parts += [said(worse, "less even")] * bool(len(worse))
    now = f"From the first to the last third of {S} steps the load has become "
    if parts:
        severity: Severity = "warning" if len(worse) else "good"
        return finding("loss_moved", severity, f"{now}{' and '.join(parts)}, beyond noise.")
    text = f"{now}neither more nor less even in any layer, beside the noise of single steps: "
    return finding("loss_moved", "note", text + "what balances it is not seen to move it.")


NAME = "routing/load"


def load_picture(window: Window, routers: Sequence[Router]) -> Figure:
    """A heatmap, a row per router and a column per expert: load ÷ mean load in the window."""
    from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Panel, load_scale
    from moe_inspect.reporting.render.matplotlib import draw

    scale = load_scale(routers, "load ÷ mean load")
    layers = tuple(layer_label(routers, r) for r in range(len(routers)))
    panel = Panel(
        (Heatmap(load_ratios(window.load), scale),), Axis("expert"), Axis("layer", layers)
    )
    steps = f"Steps {window.first:,} to {window.last:,}"
    return draw(Chart("Load of every expert", steps, (panel,)))


def show_picture(figure: Figure, step: int, reporters: set[str], tensorboard: Any = None) -> None:
    """Hands the picture to those of the reporters that are at work in this process: W&B, MLflow,
    and `tensorboard`, a SummaryWriter."""
    wandb, mlflow = sys.modules.get("wandb"), sys.modules.get("mlflow")
    if "wandb" in reporters and wandb is not None and wandb.run is not None:
        # with the numbers of this step, which the Trainer logs by its own key of the step
        wandb.log({NAME: wandb.Image(_pixels(figure))}, commit=False)
    if "mlflow" in reporters and mlflow is not None and mlflow.active_run() is not None:
        mlflow.log_figure(figure, f"{NAME}-{step:08d}.png")
    if tensorboard is not None:
        tensorboard.add_image(NAME, _pixels(figure), step, dataformats="HWC")


def _pixels(figure: Figure) -> np.ndarray:
    """uint8 [height, width, 3]"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]

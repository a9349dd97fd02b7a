"""The load of every expert of every layer in one picture, for the loggers of a training run.

R routers, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.alarms.window import Window
from moe_inspect.analysis.metrics.balance import load_ratio
from moe_inspect.text import layer_label
from moe_inspect.trace.schema import Router

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "routing/load"


def load_picture(window: Window, routers: Sequence[Router]) -> Figure:
    """A heatmap as in a report, a row per router and a column per expert: load ÷ mean load in the
    window."""
    from moe_inspect.reporting.charts.parts import load_scale
    from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Panel
    from moe_inspect.reporting.render.matplotlib import draw, letters

    E = max(router.experts for router in routers)
    ratio_RE = np.full((len(routers), E), np.nan)
    for r, load_E in enumerate(window.load):
        ratio_RE[r, : len(load_E)] = load_ratio(np.asarray(load_E)[None])[0]
    scale = load_scale(routers, "load ÷ mean load")
    layers = tuple(layer_label(routers, r) for r in range(len(routers)))
    panel = Panel((Heatmap(ratio_RE, scale),), Axis("expert"), Axis("layer", layers))
    with letters():
        steps = f"Steps {window.first:,} to {window.last:,}"
        return draw(Chart("Load of every expert", steps, (panel,)))


def show_picture(
    figure: Figure, step: int, reporters: Iterable[str], tensorboard: Any = None
) -> list[str]:
    """Hands the picture to those of the reporters that are at work in this process: W&B, MLflow,
    and `tensorboard`, a SummaryWriter. Returns which got it."""
    import sys

    shown = list[str]()
    wanted, wandb, mlflow = set(reporters), sys.modules.get("wandb"), sys.modules.get("mlflow")
    if "wandb" in wanted and wandb is not None and wandb.run is not None:
        # with the numbers of this step, which the Trainer logs by its own key of the step
        wandb.log({NAME: wandb.Image(_pixels(figure))}, commit=False)
        shown.append("wandb")
    if "mlflow" in wanted and mlflow is not None and mlflow.active_run() is not None:
        mlflow.log_figure(figure, f"{NAME}-{step:08d}.png")
        shown.append("mlflow")
    if tensorboard is not None:
        tensorboard.add_image(NAME, _pixels(figure), step, dataformats="HWC")
        shown.append("tensorboard")
    return shown


def _pixels(figure: Figure) -> np.ndarray:
    """uint8 [height, width, 3]"""
    from matplotlib import image

    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return (image.imread(file)[..., :3] * 255).round().astype(np.uint8)

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
HIGHEST = 3.0  # load ÷ mean load at the end of the colour scale


def load_picture(window: Window, routers: Sequence[Router]) -> Figure:
    """A heatmap, a row per router and a column per expert: load ÷ mean load in the window."""
    from matplotlib.figure import Figure

    E = max(router.experts for router in routers)
    ratio_RE = np.full((len(routers), E), np.nan)
    for r, load_E in enumerate(window.load):
        ratio_RE[r, : len(load_E)] = load_ratio(np.asarray(load_E)[None])[0]
    figure = Figure(figsize=(min(16, 4 + E / 16), min(12, 1.8 + len(routers) / 5)), dpi=100)
    axes = figure.add_subplot()
    image = axes.imshow(
        ratio_RE, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=HIGHEST
    )
    ticks = range(0, len(routers), max(1, len(routers) // 16))
    axes.set_yticks(list(ticks), [layer_label(routers, r) for r in ticks])
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"Load ÷ mean load, steps {window.first} to {window.last}", fontsize=10)
    figure.colorbar(image, ax=axes, extend="max")
    figure.tight_layout()
    return figure


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

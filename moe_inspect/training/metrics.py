"""What a training run logs of its routers, with a bounded number of keys.

R routers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moe_inspect.alarms.alarms import drift_R, max_vio_of_steps
from moe_inspect.alarms.window import Window
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.text import layer_label
from moe_inspect.trace.schema import Router

DETAILS = ("summary", "layers")
WORST_IS_LOW = ("entropy",)


def window_metrics(window: Window, before: Window | None) -> dict[str, np.ndarray]:
    """Metric → its value at each router, float [R]: max_vio of the window, max_vio_batch (mean over
    its steps), dead and starved experts, entropy of the load ÷ ln E, drift (total variation from
    the window before), and what the model shows of aux_loss, z_loss and bias_range."""
    functions = {
        "max_vio": bal.max_vio,
        "dead_experts": bal.dead_experts,
        "starved_experts": bal.starved_experts,
        "entropy": bal.entropy,
    }
    found = {
        name: np.array([float(function(load_E[None])[0]) for load_E in window.load])
        for name, function in functions.items()
    }
    if window.recent:
        found["max_vio_batch"] = max_vio_of_steps(window.recent)
    return {**found, "drift": drift_R(before, window), **window.values}


def logged(
    values: Mapping[str, np.ndarray], routers: Sequence[Router], detail: str, prefix: str
) -> dict[str, float]:
    """The keys of a log: of each metric the worst and the median over layers and, with detail
    "layers", every layer; the layer of the worst max_vio. Metrics that no router has are left
    out."""
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
    if "max_vio" in values and not np.isnan(values["max_vio"]).all():
        worst_router = int(np.nanargmax(values["max_vio"]))
        found[f"{prefix}worst_layer"] = float(routers[worst_router].layer)
    return found

"""Watches the routers of a model while it is trained: counts, metrics in the logs, history, alarms.

Import from here: `RoutingMonitor` for a loop of one's own, `RoutingCallback` for the Trainer of
transformers and TRL, `LightningRoutingCallback` for Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_inspect.alarms.alarms import Alarm
    from moe_inspect.alarms.rules import DEFAULT_RULES
    from moe_inspect.training.actions import Webhook
    from moe_inspect.training.callback import RoutingCallback
    from moe_inspect.training.lightning import LightningRoutingCallback
    from moe_inspect.training.monitor import RoutingMonitor

_HOMES = {
    "DEFAULT_RULES": "moe_inspect.alarms.rules",
    "Alarm": "moe_inspect.alarms.alarms",
    "LightningRoutingCallback": "moe_inspect.training.lightning",
    "RoutingCallback": "moe_inspect.training.callback",
    "RoutingMonitor": "moe_inspect.training.monitor",
    "Webhook": "moe_inspect.training.actions",
}
__all__ = [
    "DEFAULT_RULES",
    "Alarm",
    "LightningRoutingCallback",
    "RoutingCallback",
    "RoutingMonitor",
    "Webhook",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'moe_inspect.training' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)

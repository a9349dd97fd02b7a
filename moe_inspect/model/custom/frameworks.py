"""The routers of training frameworks, each as a `RouterSpec`. No framework is imported."""

from __future__ import annotations

from moe_inspect.model.custom.spec import RouterSpec

SPECS: list[RouterSpec] = []

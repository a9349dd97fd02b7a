"""Gathers what `moe-inspect doctor` shows, as plain JSON values."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from moe_inspect.doctor import machine
from moe_inspect.doctor.devices import captures, devices, missing_for_capture
from moe_inspect.errors import INSTALL_TRACE, MoeInspectError
from moe_inspect.progress import phase


def examine(
    model: str | None = None, directory: Path = Path("."), measure: bool = True, **options: Any
) -> dict[str, Any]:
    """Facts about this machine and, with `model`, about recording that model on it.

    directory  where traces are to be written
    measure    whether to check the kernels and to measure speeds too, which takes seconds
    options    of the model: device, dtype, revision, trust_remote_code, random_init
    """
    able = missing_for_capture() is None
    if model is not None and not able:
        raise MoeInspectError(f"this needs {missing_for_capture()}: {INSTALL_TRACE}")
    if measure:
        phase("measuring the disk")
    facts = {
        "date": date.today().isoformat(),
        "versions": machine.versions(),
        "system": machine.system(),
        "directory": machine.disk(directory, measure),
        "devices": devices() if able else [],
        "captures": captures(),
    }
    if able:
        facts |= _of_recording(measure)
    if model is not None:
        from moe_inspect.doctor.model import examined

        facts["model"] = examined(model, measure=measure, **options)
    return facts


def _of_recording(measure: bool) -> dict[str, Any]:
    """What needs torch."""
    if not measure:
        return {}
    from moe_inspect.doctor import costs, kernels

    phase("checking kernels")
    checked = kernels.selfchecks()
    phase("measuring costs")
    return {"selfcheck": checked, "costs": costs.measured()}

"""The manifest's facts about the process that records a trace."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from moe_inspect.capture.hook.selfcheck import Found, device_name, summary
from moe_inspect.model.routers import Site
from moe_inspect.trace.files.lock import process_start

# model → what an intervention changes in it, while it lasts
ALTERED: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def capture_facts(model: Any, mode: str) -> dict[str, Any]:
    """The manifest's section `capture`: mode, device, dtype, versions and command."""
    parameters = [*model.parameters()]  # a model need not have any, nor buffers
    tensors = parameters or [*model.buffers()] or [torch.empty(0, device="cpu")]
    return {
        "mode": mode,
        "device": ", ".join(dict.fromkeys(device_name(t.device) for t in tensors)),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
        **process_facts([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def drop_facts(sites: Sequence[Site]) -> dict[str, Any]:
    """Whether an empty slot is an assignment that a capacity has dropped, at every router."""
    return {"drops": True} if sites and all(site.drops for site in sites) else {}


def selfcheck_facts(found: Found) -> dict[str, Any]:
    """What the self-check has found of the kernels that a recording used, if any."""
    return {"selfcheck": summary(found)} if found else {}


def process_facts(command: list[str]) -> dict[str, Any]:
    """Versions, command line, process id and host."""
    import transformers

    from moe_inspect.capture.hook.kernels import triton

    return {
        "versions": {
            "moe-inspect": _own_version(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": triton.__version__ if triton is not None else None,
        },
        "command": command,
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "host": socket.gethostname(),
    }


def _own_version() -> str:
    from importlib.metadata import version

    return version("moe-inspect")

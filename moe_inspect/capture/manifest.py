"""What a manifest says of how a trace came to be, and whether one can be written at a place."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import schema
from moe_inspect.trace.reader import read_manifest, refuse_while_written
from moe_inspect.trace.writer import refuse_unless_trace


def capture_facts(model: Any, mode: str) -> dict[str, Any]:
    """Who recorded what with which versions: what the manifest says of the capture."""
    import transformers

    from moe_inspect.capture.kernels import triton

    parameter = next(model.parameters())
    return {
        "mode": mode,
        "device": ", ".join(dict.fromkeys(_device_name(p.device) for p in model.parameters())),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": {
            "moe-inspect": _own_version(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": triton.__version__ if triton is not None else None,
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "pid": os.getpid(),
        "process_start": schema.process_start(os.getpid()),
        "host": socket.gethostname(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _own_version() -> str:
    from importlib.metadata import version

    return version("moe-inspect")


def check_directory(path: Path, overwrite: bool) -> None:
    """Sees to it that a new trace can be written at `path`, or refuses: an existing trace is replaced only with `overwrite` (when the first
    forward pass is over, not before), anything else never."""
    try:
        if path.exists() and not path.is_dir():
            raise MoeInspectError(f"{path} is a file: give a directory for the trace")
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                kind = "a trace" if (path / schema.MANIFEST).exists() else "something"
                raise MoeInspectError(
                    f"there is {kind} at {path}: choose another place, or replace a trace with --overwrite (overwrite=True), "
                    "or go on with it by --resume"
                )
            refuse_unless_trace(path)
            if (manifest := _readable_manifest(path)) is not None:
                refuse_while_written(path, manifest)
        new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{schema.MANIFEST}.tmp"
        probe.touch()
        probe.unlink()
        if new:  # nothing is left behind where no trace comes of it
            path.rmdir()
    except OSError as error:
        raise MoeInspectError(f"cannot write {path}: {error.strerror}") from None


def _readable_manifest(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path)
    except MoeInspectError:  # damaged, or of another format: it can be replaced, and nobody is writing it
        return None

"""Which checks a device has passed, kept between runs in a small file of the user's cache
directory. Passed ones only: what failed is checked again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

from moe_inspect.trace.files.atomic import draft_of

MOST = 16  # devices × versions that are remembered


def cache_file() -> Path | None:
    """$XDG_CACHE_HOME/moe-inspect/selfcheck.json; None for a user without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return home / "moe-inspect" / "selfcheck.json"


def passed(environment: str) -> set[str]:
    """The variants that have passed in an environment, as `environment_of` names it. A file that is
    missing or damaged holds none."""
    found = _read().get(environment, [])
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def remember(environment: str, variants: set[str]) -> None:
    """Adds variants to the file. Where it cannot be written they are checked again next time."""
    file = cache_file()
    if file is None:
        return
    known = _read()
    names = sorted(passed(environment) | variants)
    known = {**{k: v for k, v in known.items() if k != environment}, environment: names}
    text = json.dumps(dict(list(known.items())[-MOST:]))
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(file) as draft:
            draft.write_text(text)


def _read() -> dict[str, object]:
    file = cache_file()
    try:
        found = json.loads(file.read_text()) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def environment_of(kernels: ModuleType, device: torch.device) -> str:
    """What a result depends on: the device, its driver, torch, Triton, and our kernels."""
    name = device.type
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        name = f"{of.name} {getattr(of, 'gcnArchName', '') or f'sm_{of.major}{of.minor}'}"
    parts = {
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": kernels.triton.__version__ if kernels.triton is not None else None,
        "moe-inspect": f"{version('moe-inspect')} {_digest(kernels.__file__ or '')}",
    }
    return ", ".join([name, *(f"{key} {value}" for key, value in parts.items())])


@cache
def driver_version() -> str | None:
    """The version of the GPU's kernel driver: NVIDIA's, else AMD's."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d{3,}\.\d[\d.]*", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[0]
    with contextlib.suppress(OSError):
        return Path("/sys/module/amdgpu/version").read_text().strip()
    return None


@cache
def _digest(file: str) -> str:
    """Of the kernels' source: two checkouts may have the same version."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]

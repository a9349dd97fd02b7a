"""Which serving engines are installed, and whether the plugin fits them: read in their source code,
as an engine is slow to import."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# of vLLM, what the seam wraps: file → what it must hold
EXPERTS = "model_executor/layers/fused_moe"
SEAM = {
    "v1/worker/worker_base.py": ("class WorkerWrapperBase", "def execute_model("),
    f"{EXPERTS}/runner/moe_runner.py": ("class MoERunner(", "def is_monolithic("),
    f"{EXPERTS}/router/base_router.py": ("class BaseRouter(", "def _compute_routing("),
}
HIDING = re.compile(r"^class (\w+)\([^)]*FusedMoEExpertsMonolithic\)", re.M)


class Installed(NamedTuple):
    """`fits`: whether the plugin can record inside the engine; `note`: why not, or of what not."""

    engine: str
    fits: bool
    note: str


def installed_engines() -> Iterator[Installed]:
    """vLLM, installed or not, and SGLang where it is."""
    root = _folder("vllm")
    if root is None:
        yield Installed("vLLM", False, "vllm is not installed")
    else:
        yield from _vllm(root)
    if _folder("sglang") is not None:
        name = f"SGLang {_version('sglang')}"
        yield Installed(name, False, "the plugin does not record inside SGLang")


def _vllm(root: Path) -> Iterator[Installed]:
    """And of each of its kernels that hides routing, that nothing is recorded of layers it runs."""
    name = f"vLLM {_version('vllm')}"
    for file, needed in SEAM.items():
        text = _text(root / file)
        if lacking := [each for each in needed if each not in text]:
            yield Installed(name, False, f"it has no {lacking[0].strip('(')}")
            return
    yield Installed(name, True, "MOE_INSPECT_TRACE=DIR vllm serve …")
    for file in sorted((root / EXPERTS / "experts").glob("*.py")):
        for kernel in HIDING.findall(_text(file)):
            yield Installed(name, False, f"with {kernel}, which hides its choice")


def _folder(package: str) -> Path | None:
    """Of an installed package, which is not imported."""
    spec = find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

"""Which serving engines are installed, and whether the plugin fits them: read in their source code,
as an engine is slow to import."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# of each engine, what the seam wraps: file → what it must hold
EXPERTS = "model_executor/layers/fused_moe"
STATE = "srt/managers/scheduler_components/internal_state.py"
SEAMS = {
    "vllm": {
        "v1/worker/worker_base.py": ("class WorkerWrapperBase", "def execute_model("),
        f"{EXPERTS}/runner/moe_runner.py": ("class MoERunner(", "def is_monolithic("),
        f"{EXPERTS}/router/base_router.py": ("class BaseRouter(", "def _compute_routing("),
    },
    "sglang": {
        "srt/plugins/hook_registry.py": ("class HookRegistry", "AROUND ="),
        "srt/model_executor/model_runner.py": ("def load_model(", "def forward("),
        "srt/layers/moe/topk.py": ("class TopK(", "def _post_process_topk_ids("),
        "srt/speculative/eagle_utils.py": ("def eagle_sample(",),
        "srt/managers/scheduler.py": ("def run_batch(", "def process_batch_result("),
        STATE: ("class SchedulerInternalStateController", "def set_internal_state("),
    },
}
HIDING = re.compile(r"^class (\w+)\([^)]*FusedMoEExpertsMonolithic\)", re.M)


class Installed(NamedTuple):
    """`fits`: whether the plugin can record inside the engine; `note`: why not, or which kernel is
    not recorded."""

    engine: str
    fits: bool
    note: str


def installed_engines() -> Iterator[Installed]:
    """vLLM, installed or not, and SGLang where it is. And of each kernel of vLLM that hides
    routing, that nothing is recorded of layers it runs."""
    for package, name, start in (
        ("vllm", "vLLM", "MOE_INSPECT_TRACE=DIR vllm serve …"),
        ("sglang", "SGLang", "MOE_INSPECT_TRACE=DIR python -m sglang.launch_server …"),
    ):
        root = _folder(package)
        if root is None:
            if package == "vllm":
                yield Installed(name, False, "vllm is not installed")
            continue
        name = f"{name} {version_of(package) or 'of unknown version'}"
        lacking = list(_lacking(root, SEAMS[package]))
        yield Installed(name, not lacking, f"it has no {lacking[0]}" if lacking else start)
        if not lacking:
            for file in sorted((root / EXPERTS / "experts").glob("*.py")):
                for kernel in HIDING.findall(text_of(file)):
                    yield Installed(name, False, f"with {kernel}, which hides its choice")


def _lacking(root: Path, seam: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for file, needed in seam.items():
        text = text_of(root / file)
        yield from (each.strip("(= ") for each in needed if each not in text)


def _folder(package: str) -> Path | None:
    """Of an installed package, which is not imported."""
    spec = find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def text_of(file: Path) -> str:
    """What the file holds, if it is there."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

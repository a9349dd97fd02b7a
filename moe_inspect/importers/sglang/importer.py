"""SGLang's expert distribution recorder: its modes stat, stat_approx, per_pass and per_token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.context import ImportContext, Imported
from moe_inspect.importers.registry import importer
from moe_inspect.importers.sglang.archive import load
from moe_inspect.importers.sglang.counts import per_pass, stat
from moe_inspect.importers.sglang.tokens import per_token


@importer(
    "sglang",
    gives="counts over time (stat, per_pass), decisions without weights (per_token)",
    sniff=lambda name, head: name.endswith(".pt"),
)
def sglang(context: ImportContext) -> Imported:
    files = [(path, source, load(path)) for path, source in context.files(r".*\.pt", ".pt")]
    modes = {_mode(path, content) for path, _, content in files}
    if len(modes) > 1:
        raise MoeInspectError(
            f"{context.sources[0].path} holds files of the modes {' and '.join(sorted(modes))}: "
            "import them separately"
        )
    return {"stat": stat, "per_pass": per_pass, "per_token": per_token}[modes.pop()](context, files)


def _mode(path: Path, content: dict[str, Any]) -> str:
    if "logical_count" in content:
        return "stat"
    records = content.get("records")
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise MoeInspectError(
            f"{path} has neither logical_count nor records: is it of the expert distribution "
            "recorder?"
        )
    if not records:
        raise MoeInspectError(f"{path}: records is empty")
    return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"

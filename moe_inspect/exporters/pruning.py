"""Scores of all experts, and those that go by them: for programs that prune, quantise or merge
experts by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_inspect.analysis.scores import lowest, refuse_too_few, scores_of
from moe_inspect.model.config import groups_of, text_config
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace


def pruning(
    trace: Trace,
    output: Path,
    keep: float = 0.75,
    by: str = "reap",
    weights: str | Path | None = None,
    losses: str | Path | None = None,
) -> None:
    """One JSON object, described in docs/prune.md. As many go in each layer, and in each group
    where routers choose groups first."""
    scores = scores_of(trace, by, weights=weights, losses=losses)
    groups, _, _ = of_groups = groups_of(text_config(trace))
    several = len({router.layer for router in trace.routers}) < len(trace.routers)
    made: dict[str, Any] = {
        "format": 1,
        "model": (trace.manifest.get("model") or {}).get("id"),
        "trace": str(trace.path),
        "by": by,
        "keep": keep,
        "experts": {},
        "dropped": {},
        "scores": {},
    }
    for r, router in enumerate(trace.routers):
        refuse_too_few(router.experts, router.top_k, keep, of_groups)
        name = router.path if several else str(router.layer)
        of = scores.whole_LE[r]
        made["experts"][name] = router.experts
        made["dropped"][name] = lowest([of], keep, groups)[0]
        made["scores"][name] = of.tolist()
    with draft_of(output) as draft:
        draft.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

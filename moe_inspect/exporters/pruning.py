"""Scores of all experts, and those that go by them: for programs that prune, quantise or merge
experts by themselves."""

from __future__ import annotations

import json
from pathlib import Path

from moe_inspect.analysis.scores import lowest, refuse_too_few, scores_of
from moe_inspect.model.config import groups_of, text_config
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace


def pruning(trace: Trace, output: Path, keep: float = 0.75, by: str = "reap") -> None:
    """Write one JSON object, which docs/interventions.md describes. The same number of experts goes
    in each layer, and in each group if routers choose groups first."""
    scores = scores_of(trace, by)
    groups, _, _ = of_groups = groups_of(text_config(trace))
    several = len({router.layer for router in trace.routers}) < len(trace.routers)
    names = [router.path if several else str(router.layer) for router in trace.routers]
    for router in trace.routers:
        refuse_too_few(router.experts, router.top_k, keep, of_groups)
    gone = [lowest(of_E, keep, groups) for of_E in scores]
    capture = trace.manifest["capture"]
    made = {
        "format": 1,
        "model": (trace.manifest.get("model") or {}).get("id"),
        "trace": str(trace.path),
        "by": by,
        "scored_by": capture.get("format") if by == "saliency" else "moe-inspect",
        "keep": keep,
        "experts": {n: router.experts for n, router in zip(names, trace.routers, strict=True)},
        "dropped": dict(zip(names, gone, strict=True)),
        "kept": {
            n: sorted({*range(router.experts)} - {*of})
            for n, router, of in zip(names, trace.routers, gone, strict=True)
        },
        "scores": {n: of_E.tolist() for n, of_E in zip(names, scores, strict=True)},
    }
    with draft_of(output) as draft:
        draft.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

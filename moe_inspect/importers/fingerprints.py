"""GPT-OSS fingerprints: JSON by category of a benchmark, how often each expert was chosen while the
model thought and while it answered.

{"sample_count", "num_think_tokens", "think_expert_analytics": {"layer_N": {"<e>":
{"count_frequency", "prob_density"}}}, and the same of "answer"}. Frequencies are means over
samples, of choices per token; experts that were never chosen are left out. Form:
github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting. E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import MOST_DOMAINS, batch_of_counts
from moe_inspect.importers.context import ImportContext, Imported
from moe_inspect.importers.registry import importer
from moe_inspect.importers.values import integer
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS
from moe_inspect.trace.writer import CountedBatches

TOP_K = 4  # of GPT-OSS, whose pruned models keep it as far as they have experts
MOST_TOKENS = 2**40
PARTS = ("think", "answer")
NOTE = "counts are mean frequencies over samples, times their tokens: rounded, not exact"

Load = dict[int, dict[int, int]]  # layer → expert → count


@importer(
    "gpt-oss-fingerprints",
    gives="counts, rounded; category and think or answer are the domain",
    sniff=lambda name, head: b'"think_expert_analytics"' in head and b'"sample_count"' in head,
)
def fingerprints(context: ImportContext) -> Imported:
    found: dict[str, list[Load]] = {}
    for path, source in context.files(r"(True|False)_(True|False)\.json", "True_True.json"):
        written: Any = context.json(path)
        label = source.domain or path.resolve().parent.name
        if not isinstance(written, dict) or not any(_key(part) in written for part in PARTS):
            raise MoeInspectError(f"{path} has no {_key(PARTS[0])}")
        for part in PARTS:
            if written.get(_key(part)):
                found.setdefault(f"{label}/{part}", []).append(_load(path, part, written))
    where, domains = context.sources[0].path, sorted(found)
    loads = [load for of_domain in found.values() for load in of_domain]
    if not loads:
        raise MoeInspectError(f"{where} holds no counts")
    if len(domains) > MOST_DOMAINS:
        raise MoeInspectError(f"{where} has over {MOST_DOMAINS:,} domains")
    layers = sorted({layer for load in loads for layer in load})
    experts = _experts(context, loads)
    top_k = context.known_top_k(where) if context.facts or context.top_k else min(TOP_K, experts)
    routers = context.routers_of(layers, experts, top_k, where)

    def batches() -> Iterator[CountedBatches]:
        load_LDE = np.zeros((len(layers), len(domains), experts), np.int64)
        for d, domain in enumerate(domains):
            for load in found[domain]:
                for layer, count_of in load.items():
                    load_LDE[layers.index(layer), d, [*count_of]] += [*count_of.values()]
        yield batch_of_counts(list(load_LDE), routers, domains, 0)

    return Imported(routers, batches(), counts_only=True, notes=[NOTE])


def _key(part: str) -> str:
    return f"{part}_expert_analytics"


def _load(path: Path, part: str, written: dict[str, Any]) -> Load:
    samples = integer(written.get("sample_count"), f"{path}: sample_count", 1)
    mean = _number(written.get(f"num_{part}_tokens"), f"{path}: num_{part}_tokens", 2**31)
    if mean * samples > MOST_TOKENS:
        raise MoeInspectError(f"{path}: {samples:,} samples of {mean:,} tokens")
    load: Load = {}
    for name, of_layer in _items(written[_key(part)], f"{path}: {_key(part)}"):
        where = f"{path}: {_key(part)}.{name[:40]}"
        match = re.fullmatch(r"layer_(\d{1,4})", name)
        if match is None or int(match[1]) >= MOST_LAYERS:
            raise MoeInspectError(f"{where} is no layer")
        count_of = load.setdefault(int(match[1]), {})
        for expert, stated in _items(of_layer, where):
            if not re.fullmatch(r"\d{1,5}", expert) or int(expert) >= MOST_EXPERTS:
                raise MoeInspectError(f"{where}.{expert[:40]} is no expert")
            here = f"{where}.{expert}.count_frequency"
            frequency = stated.get("count_frequency") if isinstance(stated, dict) else None
            count_of[int(expert)] = round(_number(frequency, here, 1) * mean * samples)
    return load


def _items(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        raise MoeInspectError(f"{where} is {str(value)[:40]!r}, not an object with entries")
    return [*value.items()]


def _number(value: Any, where: str, most: float) -> float:
    """`value`, if it is a number from 0 to `most`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise MoeInspectError(f"{where} is {str(value)[:40]!r}, not of 0 to {most:,}")
    return value


def _experts(context: ImportContext, loads: list[Load]) -> int:
    """E as stated; else by the experts that are listed, if some layer lists all from 0 on."""
    if not context.facts and not context.experts:
        listed = max((set(of) for load in loads for of in load.values()), key=max)
        if any(set(of) == set(range(max(listed) + 1)) for load in loads for of in load.values()):
            return max(listed) + 1
    where = context.sources[0].path
    experts = context.known_experts(f"{where}: no layer lists every expert, and it")
    if (largest := max(e for load in loads for of in load.values() for e in of)) >= experts:
        raise MoeInspectError(f"{where} has expert {largest} of {experts}")
    return experts

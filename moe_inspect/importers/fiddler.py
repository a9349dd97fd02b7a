"""Fiddler's popularity of Mixtral's experts: a JSON file per subject, {"total_input_tokens",
"expert_popularity": [[count × 8] × 32]}. The file counts words; the number of tokens is a row's
sum ÷ 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import MOST_COUNT, batch_of_counts
from moe_inspect.importers.context import ImportContext, Imported
from moe_inspect.importers.registry import importer, named
from moe_inspect.importers.values import integers
from moe_inspect.trace.writer import CountedBatches

TOP_K = 2  # of Mixtral; the file does not give it
PREFIX = "expert_popularity_"


@importer(
    "fiddler",
    gives="counts; the subject is the domain",
    sniff=lambda name, head: b'"expert_popularity"' in head,
)
def fiddler(context: ImportContext) -> Imported:
    domains: list[str] = []
    loads: list[np.ndarray] = []
    shape: tuple[int | None, int | None] = (None, None)
    for path, source in context.files(PREFIX + r".*\.json", "expert_popularity_<subject>.json"):
        written: Any = context.json(path)
        if not isinstance(written, dict) or "expert_popularity" not in written:
            raise MoeInspectError(f"{path} has no expert_popularity")
        load_LE = integers(
            written["expert_popularity"], f"{path}: expert_popularity", shape, 0, MOST_COUNT
        )
        shape = load_LE.shape[0], load_LE.shape[1]
        domain = source.domain or named(path).removeprefix(PREFIX)
        if domain in domains:
            loads[domains.index(domain)] = loads[domains.index(domain)] + load_LE
        else:
            domains.append(domain)
            loads.append(load_LE)
    load_DLE = np.stack(loads)
    where = context.sources[0].path
    routers = context.routers_of(
        range(load_DLE.shape[1]),
        load_DLE.shape[2],
        context.known_top_k(where) if context.facts or context.top_k else TOP_K,
        where,
    )

    def batches() -> Iterator[CountedBatches]:
        yield batch_of_counts(
            [load_DLE[:, layer] for layer in range(len(routers))], routers, domains, 0
        )

    return Imported(routers, batches(), counts_only=True)

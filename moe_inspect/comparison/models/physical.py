"""Is one trace in physical ids, a number for each replica of an expert? Then each of its experts
goes with one of the other's.

T tokens of a sample, E experts of the one, P physical ids of the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_inspect.comparison.aligning.align import align
from moe_inspect.comparison.aligning.misaligned import (
    agreement,
    beyond_chance,
    chosen,
    half_of,
    sample_rows,
)
from moe_inspect.comparison.aligning.pairing import same_places
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace

REPLICAS = 0.9  # overlap beyond chance, once ids are mapped, from which they are physical
MOST_ROUTERS = 8


def replicas(a: Trace, b: Trace) -> dict[str, Any] | None:
    """Which trace has physical ids, "A" or "B", of how many, and how well the two agree once they
    are mapped: on the tokens of the sample that were not used to find the map. None where nothing
    of the kind is so."""
    pairs = same_places(a, b, range(len(a.routers)))
    sizes = [(a.routers[r], b.routers[m]) for r, m in pairs]
    if not pairs or any(x.top_k != y.top_k or x.experts == y.experts for x, y in sizes):
        return None
    try:
        alignment = align(a, b)
    except MoeInspectError:
        return None
    stack = sizes[0][0].stack
    rows = sample_rows((a, b), alignment, stack)
    if rows is None:
        return None
    pairs = [(r, m) for r, m in pairs if a.routers[r].stack == stack]
    fit_T, mapped = half_of(len(rows)), list[tuple[np.ndarray, np.ndarray]]()
    for r, m in pairs[:: -(-len(pairs) // MOST_ROUTERS)]:
        logical_TE, physical_TP = chosen(rows.of_a, a, r), chosen(rows.of_b, b, m)
        if a.routers[r].experts > b.routers[m].experts:
            logical_TE, physical_TP = physical_TP, logical_TE
        mapped.append((logical_TE[~fit_T], _mapped(logical_TE, physical_TP, fit_T)))
    value = float(np.mean([agreement(*both) for both in mapped]))
    if value < REPLICAS or not beyond_chance(value, mapped, rows.document_T[~fit_T]):
        return None
    in_b = sizes[0][1].experts > sizes[0][0].experts
    counts = [router.experts for router in sizes[0]]
    return {
        "trace": "B" if in_b else "A",
        "physical": max(counts),
        "logical": min(counts),
        "agreement": value,
    }


def _mapped(logical_TE: np.ndarray, physical_TP: np.ndarray, fit_T: np.ndarray) -> np.ndarray:
    """The experts that physical ids stand for, by the map of some tokens, of the others."""
    a, b = (x[fit_T].astype(np.float32) for x in (logical_TE, physical_TP))
    shared_EP = a.T @ b
    # of experts that go with it equally often the rarer is meant
    load_E = a.sum(0)
    expert_P = (shared_EP - (load_E / (load_E.sum() + 1))[:, None]).argmax(0)
    mapped_TE = np.zeros_like(logical_TE[~fit_T])
    t, p = np.nonzero(physical_TP[~fit_T])
    mapped_TE[t, expert_P[p]] = True
    return mapped_TE

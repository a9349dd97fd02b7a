"""The routing mismatch of two arrays, for a training loop: a comparison without a trace.

T tokens, L layers, K slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_inspect.comparison.kernels import nowhere_in_both, sets, unequal
from moe_inspect.errors import MoeInspectError


def mismatch(ids_a: Any, ids_b: Any, *, mask: Any = None) -> dict[str, Any]:
    """How far two records of the same tokens' routes agree.

    ids_a, ids_b: integers [T, L, K], the experts of each token, layer and slot (NumPy, or anything
    that NumPy reads; tensors of a GPU are copied); negative where a slot routed nowhere. mask:
    bool [T], the tokens to compare; by default all.

    Returns floats to log: `set_mismatch` (share of decisions with another set of experts),
    `overlap` (share of the experts that both chose), `tokens_mismatch` (share of tokens that
    differ in any layer), `order` (share of decisions with the same experts slot by slot); and by
    layer, as arrays [L], `set_mismatch_by_layer` and `overlap_by_layer`. NaN without tokens.
    MoeInspectError where the shapes differ."""
    a, b = (integers_of(ids, "ids").astype(np.int64) for ids in (ids_a, ids_b))
    if a.shape != b.shape or a.ndim != 3:
        raise MoeInspectError(
            f"ids have the shapes {a.shape} and {b.shape}: expected two of [tokens, layers, slots]"
        )
    if mask is not None:
        kept = np.asarray(_host(mask)).astype(bool)
        if kept.shape != (len(a),):
            raise MoeInspectError(f"mask has the shape {kept.shape}, for {len(a)} tokens")
        a, b = a[kept], b[kept]
    T, L, K = a.shape
    E = int(max(a.max(initial=0), b.max(initial=0))) + 1
    a, b = np.where(a < 0, E, a), np.where(b < 0, E, b)
    other_TL = np.zeros((T, L), bool)
    missing_L, size_L, moved_L = np.zeros((3, L), np.int64)
    for layer in range(L):
        slots_a, slots_b = (tuple(side[:, layer].T) for side in (a, b))
        at, a_KN, b_KN = unequal(slots_a, slots_b)
        missing_N = sets(a_KN, b_KN, E)[2]
        other_TL[at, layer] = missing_N > 0
        missing_L[layer] = missing_N.sum()
        moved_L[layer] = len(at)
        size_L[layer] = T * K - int(nowhere_in_both(slots_a, slots_b, E).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "set_mismatch": float(np.divide(other_TL.sum(), other_TL.size)),
            "overlap": float(1 - np.divide(missing_L.sum(), size_L.sum())),
            "tokens_mismatch": float(np.divide(other_TL.any(1).sum(), T)),
            "order": float(1 - np.divide(moved_L.sum(), other_TL.size)),
            "set_mismatch_by_layer": np.divide(other_TL.sum(0), T),
            "overlap_by_layer": 1 - missing_L / size_L,
        }


def _host(values: Any) -> Any:
    """A tensor of a GPU as one that NumPy can read."""
    values = values.detach() if hasattr(values, "detach") else values
    return values.cpu() if hasattr(values, "cpu") else values


def integers_of(values: Any, name: str) -> np.ndarray:
    """Integers as NumPy has them, of anything that it reads."""
    try:
        array = np.asarray(_host(values))
    except (TypeError, ValueError):  # rows of different lengths, or bfloat16
        kind = getattr(values, "dtype", "no array, as rows of one length are")
        raise MoeInspectError(f"{name} are {kind}: expected integers") from None
    if array.dtype.kind not in "iu":
        raise MoeInspectError(f"{name} are {array.dtype}: expected integers")
    return array

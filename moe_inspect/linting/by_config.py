"""What the model's config says of routes: groups, and gate weights.

T tokens, L layers, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_inspect.linting.recorded import Recorded, found
from moe_inspect.model.config import groups_of
from moe_inspect.model.families import language_config
from moe_inspect.reporting.verdict.findings import Finding

SHARE = 0.01  # of a layer's decisions: fewer are left to rounding, and to ties
APART = 1e-2  # of a weight, or of a sum, which half precision does not make


def groups(r: Recorded) -> Iterator[Finding]:
    """Decisions with experts of more groups than a token goes to."""
    parts, most, _ = groups_of(r.config)
    if parts < 2 or most >= min(parts, r.K) or r.experts % parts:
        return
    group_KTL = np.sort(np.where(r.slots_KTL < 0, r.slots_KTL[:1], r.slots_KTL), axis=0)
    group_KTL //= r.experts // parts
    number_TL = 1 + (group_KTL[1:] != group_KTL[:-1]).sum(0)
    wrong_L = (number_TL > most).mean(0)
    if (at := np.flatnonzero(wrong_L > SHARE)).size:
        what = (
            f"In {r.named(at)} up to {wrong_L.max():.0%} of the decisions have experts of more "
            f"than {most} of {parts} groups, in one of {number_TL.max()}."
        )
        yield found("groups", what, share=float(wrong_L.max()), groups=parts, allowed=most)


def weights(r: Recorded) -> Iterator[Finding]:
    w = r.weights_KTL
    if w is None or not r.T:
        return
    w = np.where(r.slots_KTL < 0, 0, w)
    top_TL = np.abs(w).max(0)
    if r.by_weight and r.K > 1:
        wrong_TL = w[0] < w.max(0) - APART * top_TL
        if (wrong_L := wrong_TL.mean(0)).max() > SHARE:
            at = np.flatnonzero(wrong_L > SHARE)
            what = (
                f"In {r.named(at)} slot 0, which is said to be the first choice, has not the "
                f"largest weight in {wrong_L.max():.0%} of the decisions."
            )
            yield found("first_choice", what, share=float(wrong_L.max()))
    config = language_config(dict(r.config))
    stated, scale = config.get("norm_topk_prob"), config.get("routed_scaling_factor")
    # where it says no, the k best may still be all that the softmax is of
    if stated is not True or r.K < 2:
        return
    full_TL = (r.slots_KTL >= 0).all(0)
    sum_TL = w.sum(0)
    sums = {1.0, float(scale)} if isinstance(scale, int | float) else {1.0}
    is_one_TL = np.logical_or.reduce([np.abs(sum_TL - s) <= APART * s for s in sums])
    share_L = (is_one_TL & full_TL).sum(0) / np.maximum(full_TL.sum(0), 1)
    mean = float(sum_TL[full_TL].mean()) if full_TL.any() else 1.0
    if (at := np.flatnonzero((share_L < 1 - SHARE) & full_TL.any(0))).size:
        what = (
            f"The config says that weights are normalised (norm_topk_prob), and in {r.named(at)} "
            f"they sum to {mean:.3g} on average, to {' or '.join(f'{s:g}' for s in sorted(sums))} "
            f"in {share_L[at].min():.0%} of the decisions."
        )
        yield found("weight_sums", what, sum=mean)

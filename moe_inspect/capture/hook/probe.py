"""`moe_inspect.probe`: a line in a model's own forward that shows a router's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    # (layer, ids, weights, E or None, logits or None, dropped or None)
    Seen = Callable[[int, Tensor, Tensor, int | None, Tensor | None, Tensor | None], None]

_recorders: list[Seen] = []  # of the recorders that are open


def probe(
    ids: Tensor,
    weights: Tensor,
    *,
    layer: int,
    experts: int | None = None,
    logits: Tensor | None = None,
    dropped: Tensor | None = None,
) -> None:
    """Shows the choice of one router to an open recorder. Does nothing while there is none, and
    breaks no graph of torch.compile.

        weights, ids = scores.topk(2)
        moe_inspect.probe(ids, weights, layer=self.layer, experts=8)

    ids      expert ids, int [..., K], rows batch-first; -1 in a slot that went to no expert
    weights  gate weights, float, of the same shape
    layer    block index
    experts  E, the number of experts; may be left out where there are `logits`
    logits   router logits, float [..., E], recorded with `logits=True`
    dropped  bool, of the shape of ids: chosen, but dropped by the capacity of the expert. The slot
             is empty then, as one of -1 is, and the trace says that its empty slots are drops, and
             of which expert. To be shown from the first pass on

    Raises MoeInspectError for shapes or dtypes that are not a choice, and for a layer that the
    first forward pass did not show."""
    for seen in _recorders:
        seen(layer, ids, weights, experts, logits, dropped)


def listen(seen: Seen) -> Callable[[], None]:
    """Passes the probes to `seen` until the function returned is called."""
    _recorders.append(seen)
    return lambda: _recorders.remove(seen)

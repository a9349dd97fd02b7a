"""What helps against a fault of a router's balance, and where that is written."""

from __future__ import annotations

from collections.abc import Mapping

_BALANCE = (
    "Balance each layer by itself (a loss pooled over layers lets one collapse) with a higher "
    "coefficient (arXiv:2101.03961), or by a bias on the selection, without a loss "
    "(arXiv:2408.15664)."
)
_DEAD = (
    f"{_BALANCE} An expert without tokens gets no gradient and stays dead: add noise to the router "
    "(arXiv:1701.06538), or raise the capacity factor where tokens are dropped (arXiv:2101.03961)."
)
_DRIFT = (
    "A lower learning rate of the router, or warm-up, keeps the choice stable (arXiv:2202.08906); "
    "the router's z-loss keeps its logits small (arXiv:2202.08906)."
)
_LOGITS = "Raise the coefficient of the router's z-loss, or lower its learning rate \
(arXiv:2202.08906)."
ADVICE: Mapping[str, str] = {
    "dead_experts": _DEAD,
    "starved_experts": _DEAD,
    "min_over_max": _DEAD,
    "drift": _DRIFT,
    "z_loss": _LOGITS,
    "drop_rate": (
        "Raise the capacity factor (arXiv:2101.03961), or balance the layer, whose dropped tokens "
        "skip the experts that they chose; dropless experts drop none (arXiv:2211.15841)."
    ),
    "bias_range": (
        "Lower the update rate of the selection bias, and check that it is updated once per step "
        "from the load of all ranks (arXiv:2408.15664)."
    ),
}


def advice(metric: str) -> str:
    """One or two sentences on what helps, with a source."""
    return ADVICE.get(metric, _BALANCE)

"""How many slots a layer has, on how many GPUs: of what is asked for, and of what divides."""

from __future__ import annotations

from collections.abc import Iterable

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import text_config
from moe_inspect.simulate.placement.policies import Layout
from moe_inspect.trace.reader import Trace

MOST_SLOTS = 2**20  # of a layer
MOST_GPUS = 8  # where no number is asked for


def layouts_of(
    trace: Trace,
    selection: Selection,
    gpus: int | None,
    nodes: int,
    physical: int | None,
    groups: int | None,
) -> dict[int, Layout]:
    """The layout of each router. `physical`: experts of a layer, replicas included; None: as many
    as there are. MoeInspectError where the numbers do not divide."""
    experts = {trace.routers[r].experts for r in selection.routers}
    if physical is not None and physical < (E := max(experts)):
        raise MoeInspectError(
            f"{physical} physical experts for {E} experts: each needs a slot, use at least {E}"
        )
    if physical is not None and physical > MOST_SLOTS:
        raise MoeInspectError(f"{physical:,} physical experts: use at most {MOST_SLOTS:,}")
    slots = experts if physical is None else {physical}
    if gpus is None:  # with one slot per GPU there is nothing to choose
        most = max(1, min(MOST_GPUS, min(slots) // 2))
        fit = (g for g in range(most, 0, -1) if not (any(n % g for n in slots) or g % nodes))
        if (gpus := next(fit, None)) is None:
            raise MoeInspectError(
                f"no number of GPUs up to {most} divides {_listed(slots)} slots and is a multiple "
                f"of {nodes} nodes: give --gpus"
            )
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise MoeInspectError(
            f"{gpus} GPUs on {nodes} nodes: the number of GPUs must be a multiple of the "
            "number of nodes"
        )
    if uneven := sorted(n for n in slots if n % gpus):
        kind = "experts" if physical is None else "physical experts"
        raise MoeInspectError(
            f"cannot split {uneven[0]} {kind} over {gpus} GPUs: use a divisor, or a plan of "
            f"--physical-experts {-(-max(slots) // gpus) * gpus}"
        )
    if groups is None:
        known = text_config(trace).get("n_group")
        groups = known if isinstance(known, int) and known > 0 else 1
        groups = 1 if any(E % groups for E in experts) else groups
    if groups < 1 or any(E % groups for E in experts):
        raise MoeInspectError(
            f"cannot split {_listed(experts)} experts into {groups} equal groups: use a divisor"
        )
    return {
        r: Layout(physical or trace.routers[r].experts, gpus, nodes, groups)
        for r in selection.routers
    }


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))

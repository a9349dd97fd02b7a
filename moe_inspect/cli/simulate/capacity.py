"""`moe-inspect simulate capacity`: what a capacity factor would drop."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moe_inspect.cli.options import Layers, with_options
from moe_inspect.cli.progress import shown
from moe_inspect.cli.simulate.show import (
    ShowOptions,
    TraceArgument,
    numbers,
    opened,
    show,
)


class Order(StrEnum):
    arrival = "arrival"
    token = "token"
    weight = "weight"


@with_options(ShowOptions)
def capacity(
    trace: TraceArgument,
    capacity_factor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FACTOR",
            help="Capacity = ceil(factor · G · k / E) per expert and group of G tokens.",
        ),
    ] = None,
    group_tokens: Annotated[
        str,
        typer.Option(
            metavar="N|batch|sequence",
            help="A group is a forward pass, at most N tokens of one, or a sequence.",
        ),
    ] = "batch",
    order: Annotated[
        Order | None,
        typer.Option(
            help="Order of service: all first choices first (arrival, GShard), token by token "
            "(token, Switch), highest gate weight first (weight). "
            "Default: arrival, or token where the trace does not say which choice was the first.",
            show_default=False,
        ),
    ] = None,
    target_drop: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Report the smallest factor that drops at most this share."
        ),
    ] = 0.01,
    layers: Layers = None,
    *,
    options: ShowOptions,
) -> None:
    """Simulate the drops that a capacity factor would cause.

    Reports drops by layer, domain and position, and the smallest factor that meets a target drop
    rate. The effect of dropped tokens on later layers is not simulated."""
    if group_tokens not in ("batch", "sequence") and not group_tokens.isdecimal():
        raise typer.BadParameter(
            f"--group-tokens: {group_tokens!r} is not a whole number, batch or sequence"
        )
    from moe_inspect.simulate.capacity.capacity import simulate_capacity

    with shown(("simulating capacity", 1)):
        simulation = simulate_capacity(
            opened(trace, options),
            capacity_factors=numbers(
                capacity_factor or ["1.0", "1.25", "2.0"], "--capacity-factor", float, 0
            ),
            group_tokens=int(group_tokens) if group_tokens.isdecimal() else group_tokens,  # type: ignore[arg-type]
            order=order.value if order else None,
            target_drop=target_drop,
            layers=layers,
        )
    show(simulation, options)

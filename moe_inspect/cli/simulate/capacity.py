"""`moe-inspect simulate capacity`: what a capacity factor would drop."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moe_inspect.cli.emit import SafeCsv
from moe_inspect.cli.simulate.show import (
    FormatOption,
    HtmlOption,
    LayersOption,
    OutputOption,
    PlotsOption,
    TableOption,
    TraceArgument,
    numbers,
    show,
)


class Order(StrEnum):
    arrival = "arrival"
    token = "token"
    weight = "weight"


def capacity(
    trace: TraceArgument,
    capacity_factor: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Capacity = ceil(factor · G · k / E) of a group of G tokens. Repeated or "
                "comma-separated."
            )
        ),
    ] = None,
    group_tokens: Annotated[
        str,
        typer.Option(
            metavar="N|batch|sequence",
            help="What is a group: a forward pass, at most N tokens of one, or a sequence.",
        ),
    ] = "batch",
    order: Annotated[
        Order | None,
        typer.Option(
            help="Who is served first: all first choices (arrival, GShard), token by token "
            "(Switch), the highest gate weight. "
            "Default: arrival, or token where the trace does not say which choice was the first.",
            show_default=False,
        ),
    ] = None,
    target_drop: Annotated[
        float,
        typer.Option(min=0, max=1, help="Find the least factor that drops at most this share."),
    ] = 0.01,
    layers: LayersOption = None,
    table: TableOption = None,
    format: FormatOption = None,
    output: OutputOption = None,
    safe_csv: SafeCsv = False,
    plots: PlotsOption = None,
    html: HtmlOption = None,
) -> None:
    """Say what experts of limited capacity would drop, and where.

    By layer, domain and place, and the factor that would do. Simulated: which tokens a model drops
    changes what it computes next, and that is not replayed."""
    if group_tokens not in ("batch", "sequence") and not group_tokens.isdecimal():
        raise typer.BadParameter(
            f"--group-tokens: {group_tokens!r} is no whole number, batch or sequence"
        )
    from moe_inspect.simulate.capacity.capacity import simulate_capacity

    simulation = simulate_capacity(
        trace,
        capacity_factors=numbers(
            capacity_factor or ["1.0,1.25,2.0"], "--capacity-factor", float, 0
        ),
        group_tokens=int(group_tokens) if group_tokens.isdecimal() else group_tokens,  # type: ignore[arg-type]
        order=order.value if order else None,
        target_drop=target_drop,
        layers=layers,
    )
    show(
        simulation,
        table=table,
        format=format,
        output=output,
        safe_csv=safe_csv,
        plots=plots,
        html=html,
    )

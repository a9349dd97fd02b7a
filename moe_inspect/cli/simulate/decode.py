"""`moe-inspect simulate decode`: how many experts a decode step reads."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_inspect.cli.emit import SafeCsv
from moe_inspect.cli.simulate.show import (
    DomainOption,
    FormatOption,
    HtmlOption,
    LayersOption,
    OutputOption,
    PhaseOption,
    PlotsOption,
    TableOption,
    TraceArgument,
    numbers,
    show,
    split,
)


def decode(
    trace: TraceArgument,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            help="Sequences decoded together; repeated or comma-separated.",
            show_default="1,8,32,128",
        ),
    ] = None,
    expert_mb: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Size of one expert, MB. Default: from the model's config.",
            show_default=False,
        ),
    ] = None,
    flops_per_byte: Annotated[
        float, typer.Option(min=0, help="Of the GPU: where computing, not reading, is the limit.")
    ] = 295.0,
    layers: LayersOption = None,
    domain: DomainOption = None,
    phase: PhaseOption = None,
    table: TableOption = None,
    format: FormatOption = None,
    output: OutputOption = None,
    safe_csv: SafeCsv = False,
    plots: PlotsOption = None,
    html: HtmlOption = None,
) -> None:
    """Say how many experts a decode step reads.

    By how many sequences are decoded together. Documents stand in for requests: the tokens at one
    position of B of them are a step."""
    from moe_inspect.simulate.decode.decode import simulate_decode

    simulation = simulate_decode(
        trace,
        batches=numbers(batch or ["1,8,32,128"], "--batch", int),
        expert_mb=expert_mb,
        flops_per_byte=flops_per_byte,
        layers=layers,
        domains=split(domain),
        phase=phase and phase.value,
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

"""`moe-inspect simulate decode`: how many experts a decode step reads."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_inspect.cli.options import Domains, Layers, OfPhase, with_options
from moe_inspect.cli.progress import shown
from moe_inspect.cli.simulate.show import (
    ShowOptions,
    TraceArgument,
    numbers,
    opened,
    show,
)


@with_options(ShowOptions)
def decode(
    trace: TraceArgument,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKENS",
            help="Sequences decoded together (batch size).",
            show_default="1,8,32,128",
        ),
    ] = None,
    expert_mb: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Size of one expert, in 10^6 bytes. Default: from the model's config.",
            show_default=False,
        ),
    ] = None,
    flops_per_byte: Annotated[
        float,
        typer.Option(
            min=0, help="Arithmetic intensity at which the GPU is compute-bound (FLOPs per byte)."
        ),
    ] = 295.0,
    layers: Layers = None,
    domain: Domains = None,
    phase: OfPhase = None,
    *,
    options: ShowOptions,
) -> None:
    """Count the distinct experts that a decode step reads.

    Reports them by batch size. Documents stand in for requests: a step is the tokens at one
    position of B documents. On a cluster (--scheduler), each worker simulates whole layers: more
    workers than layers do not help."""
    from moe_inspect.simulate.decode.decode import simulate_decode

    with shown(("simulating decode", 1)):
        simulation = simulate_decode(
            opened(trace, options),
            batches=numbers(batch or ["1", "8", "32", "128"], "--batch", int),
            expert_mb=expert_mb,
            flops_per_byte=flops_per_byte,
            layers=layers,
            domains=domain or (),
            phase=phase and phase.value,
        )
    show(simulation, options)

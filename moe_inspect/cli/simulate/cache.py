"""`moe-inspect simulate cache`: hit rates of a cache of offloaded experts."""

from __future__ import annotations

from pathlib import Path
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


@with_options(ShowOptions)
def cache(
    trace: TraceArgument,
    slots: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SLOTS",
            help="Experts per layer that fit in fast memory. Default: k, 2k, 4k.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POLICY",
            help="Eviction policy: lru, lfu or belady (the upper bound). Default: all.",
        ),
    ] = None,
    expert_mb: Annotated[
        float | None, typer.Option(help="Size of one expert, in 10^6 bytes.", show_default=False)
    ] = None,
    gb_per_s: Annotated[
        float | None,
        typer.Option(help="Bandwidth of the link, in 10^9 bytes per second.", show_default=False),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take the size of each layer's experts, as quantised, from a GGUF of the model.",
            show_default=False,
        ),
    ] = None,
    layers: Layers = None,
    *,
    options: ShowOptions,
) -> None:
    """Simulate a cache of offloaded experts.

    Reports the hit rate at batch size 1, and the cost of loading missing experts. Each layer has
    its own cache, empty at first; the experts of a decision are requested together; sequences run
    one after the other. On a cluster (--scheduler), each worker simulates whole layers: more
    workers than layers do not help."""
    from moe_inspect.simulate.cache.cache import POLICIES, simulate_cache

    with shown(("simulating cache", 1)):
        simulation = simulate_cache(
            opened(trace, options),
            slots=numbers(slots, "--slots", int) if slots else None,
            policies=policy or tuple(POLICIES),
            expert_mb=expert_mb,
            gb_per_s=gb_per_s,
            gguf=gguf,
            layers=layers,
        )
    show(simulation, options)

"""`moe-inspect simulate routing`: other routing algorithms on the same logits."""

from __future__ import annotations

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
def routing(
    trace: TraceArgument,
    algorithm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help='Simulate only these algorithms, e.g. "top-k,loss-free bias".',
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K",
            help="Experts per token, for top-k. Default 1, k and 2k.",
            show_default=False,
        ),
    ] = None,
    top_p: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P", help="Cumulative probability, for top-p. Default 0.7.", show_default=False
        ),
    ] = None,
    capacity_factor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FACTOR",
            help="Capacity factor, for next best, which re-routes overflow. Default 1.0 and 1.25.",
            show_default=False,
        ),
    ] = None,
    uneven: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="max_vio from which a router counts as unbalanced. Default as in report.",
            show_default=False,
        ),
    ] = None,
    layers: Layers = None,
    *,
    options: ShowOptions,
) -> None:
    """Simulate other routing algorithms on the recorded logits.

    Needs a trace with --logits. Reports balance, probability mass kept, agreement with the model's
    own choices, whether a token's routing depends on later tokens, and when to use each."""
    from moe_inspect.simulate.routing.routing import simulate_routing

    with shown(("simulating routing", 1)):
        simulation = simulate_routing(
            opened(trace, options),
            algorithms=algorithm,
            top_k=numbers(top_k, "--top-k", int) if top_k else None,
            top_p=numbers(top_p or ["0.7"], "--top-p", float, 0),
            capacity_factor=numbers(
                capacity_factor or ["1.0", "1.25"], "--capacity-factor", float, 0
            ),
            layers=layers,
            **({} if uneven is None else {"uneven": uneven}),
        )
    show(simulation, options)

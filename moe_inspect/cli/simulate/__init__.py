"""`moe-inspect simulate …`: one file a command."""

from __future__ import annotations

import typer

from moe_inspect.cli.simulate import cache, capacity, decode, placement, routing

app = typer.Typer(
    help="Replay a trace under other assumptions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _simulate() -> None:
    pass


app.command("capacity")(capacity.capacity)
app.command("placement")(placement.placement)
app.command("decode")(decode.decode)
app.command("cache")(cache.cache)
app.command("routing")(routing.routing)

"""`moe-inspect simulate …`: one file a command."""

from __future__ import annotations

import typer

from moe_inspect.cli.help.command import GroupedCommand, GroupOfCommands
from moe_inspect.cli.simulate import cache, capacity, decode, placement, routing

app = typer.Typer(
    help="Replay a trace under other assumptions.",
    no_args_is_help=True,
    cls=GroupOfCommands,
    rich_markup_mode=None,
)


@app.callback()
def _simulate() -> None:
    pass


app.command("capacity", cls=GroupedCommand)(capacity.capacity)
app.command("placement", cls=GroupedCommand)(placement.placement)
app.command("decode", cls=GroupedCommand)(decode.decode)
app.command("cache", cls=GroupedCommand)(cache.cache)
app.command("routing", cls=GroupedCommand)(routing.routing)

"""The command line: a file per command. Commands import what is heavy when they run, so that --help
is quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from moe_inspect.cli import (
    compare,
    describe,
    doctor,
    experts,
    export,
    files,
    import_,
    report,
    serve_trace,
    simulate,
    text,
    trace,
    watch,
)
from moe_inspect.cli.help.command import GroupedCommand, GroupOfCommands
from moe_inspect.cli.options import expanded

# of typer's own copy of click, which does not export the name
UsageError: Any = typer.BadParameter.mro()[2]


def _group(name: str, help: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        cls=GroupOfCommands,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def _add(
    group: typer.Typer,
    name: str,
    command: Callable[..., None],
    cls: type[GroupedCommand] = GroupedCommand,
    **settings: Any,
) -> None:
    group.command(name, cls=cls, context_settings=settings)(expanded(command))


app = _group(
    "moe-inspect",
    "Where do the tokens go? Record and analyse the routing of Mixture-of-Experts models.",
)
_add(app, "trace", trace.trace)
_add(app, "serve-trace", serve_trace.serve_trace, allow_interspersed_args=False)
_add(app, "report", report.report, report.ReportCommand)
_add(app, "atlas", report.atlas)
_add(app, "text", text.text)
_add(app, "sql", text.sql)
_add(app, "compare", compare.compare, compare.CompareCommand)
_add(app, "ablate", experts.ablate)
_add(app, "prune", experts.prune)
_add(app, "describe", describe.describe)
_add(app, "import", import_.import_, import_.ImportCommand)
_add(app, "verify", files.verify)
_add(app, "merge", files.merge)
_add(app, "sample", files.sample)
_add(app, "export", export.export, export.ExportCommand)
_add(app, "watch", watch.watch)
_add(app, "doctor", doctor.doctor)
simulations = _group("simulate", "Replay a trace under other assumptions.")
_add(simulations, "capacity", simulate.capacity)
_add(simulations, "placement", simulate.placement)
_add(simulations, "decode", simulate.decode)
_add(simulations, "cache", simulate.cache)
_add(simulations, "routing", simulate.routing)
app.add_typer(simulations, name="simulate")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"moe-inspect {version('moe-inspect')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass

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
from moe_inspect.cli.help import GroupedCommand, GroupOfCommands, page
from moe_inspect.cli.options import expanded

# of typer's own copy of click, which does not export the name
UsageError: Any = typer.BadParameter.mro()[2]


# help is as wide as the terminal
SETTINGS: dict[str, Any] = {"max_content_width": 1_000}


def _group(name: str, text: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        no_args_is_help=True,
        cls=GroupOfCommands,
        context_settings=SETTINGS,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        **page(text),
    )


def _add(
    group: typer.Typer,
    name: str,
    command: Callable[..., None],
    panel: str | None = None,
    cls: type[GroupedCommand] = GroupedCommand,
    **settings: Any,
) -> None:
    group.command(
        name,
        cls=cls,
        context_settings={**SETTINGS, **settings},
        rich_help_panel=panel,
        **page(command.__doc__ or ""),
    )(expanded(command))


app = _group(
    "moe-inspect",
    """Where do the tokens go? Record and analyse the routing of Mixture-of-Experts models.

    Examples:
    moe-inspect trace demo -o runs/demo
    moe-inspect report runs/demo
    moe-inspect report runs/demo --html report.html""",
)
_add(app, "trace", trace.trace, "Record")
_add(app, "serve-trace", serve_trace.serve_trace, "Record", allow_interspersed_args=False)
_add(app, "import", import_.import_, "Record", import_.ImportCommand)
_add(app, "watch", watch.watch, "Record")
_add(app, "doctor", doctor.doctor, "Record")
_add(app, "report", report.report, "Look")
_add(app, "atlas", report.atlas, "Look")
_add(app, "text", text.text, "Look")
_add(app, "sql", text.sql, "Look")
_add(app, "compare", compare.compare, "Look")
_add(app, "describe", describe.describe, "Look")
_add(app, "ablate", experts.ablate, "Try")
_add(app, "prune", experts.prune, "Try")
simulations = _group("simulate", "Replay a trace under other assumptions.")
_add(simulations, "capacity", simulate.capacity)
_add(simulations, "placement", simulate.placement)
_add(simulations, "decode", simulate.decode)
_add(simulations, "cache", simulate.cache)
_add(simulations, "routing", simulate.routing)
app.add_typer(simulations, name="simulate", rich_help_panel="Try")
_add(app, "verify", files.verify, "Files")
_add(app, "merge", files.merge, "Files")
_add(app, "sample", files.sample, "Files")
_add(app, "export", export.export, "Files", export.ExportCommand)


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

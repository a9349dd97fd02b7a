"""The command line: a file per command. Commands import what is heavy when they run, so that --help
is quick."""

from __future__ import annotations

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
    simulate,
    sql,
    text,
    trace,
    watch,
)
from moe_inspect.cli.help.command import GroupedCommand, GroupOfCommands

# of typer's own copy of click, which does not export the name
UsageError: Any = typer.BadParameter.mro()[2]

app = typer.Typer(
    name="moe-inspect",
    help="Where do the tokens go? Record and analyse the routing of Mixture-of-Experts models.",
    no_args_is_help=True,
    cls=GroupOfCommands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("trace", cls=GroupedCommand)(trace.trace)
app.command("serve-trace", cls=GroupedCommand, context_settings={"allow_interspersed_args": False})(
    trace.serve_trace
)
app.command("report", cls=report.ReportCommand)(report.report)
app.command("atlas", cls=GroupedCommand)(report.atlas)
app.command("text", cls=GroupedCommand)(text.text)
app.command("sql", cls=GroupedCommand)(sql.sql)
app.command("compare", cls=compare.CompareCommand)(compare.compare)
app.command("ablate", cls=GroupedCommand)(experts.ablate)
app.command("prune", cls=GroupedCommand)(experts.prune)
app.command("describe", cls=GroupedCommand)(describe.describe)
app.command("import", cls=import_.ImportCommand)(import_.import_)
app.command("verify", cls=GroupedCommand)(files.verify)
app.command("merge", cls=GroupedCommand)(files.merge)
app.command("sample", cls=GroupedCommand)(files.sample)
app.command("export", cls=export.ExportCommand)(export.export)
app.command("watch", cls=GroupedCommand)(watch.watch)
app.command("doctor", cls=GroupedCommand)(doctor.doctor)
app.add_typer(simulate.app, name="simulate")


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

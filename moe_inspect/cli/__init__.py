"""The command line: a file per command. A command is imported when it runs or when its help is
requested, and imports heavy modules only when it runs.

May import: all rooms. No room imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Annotated, Any

import typer

from moe_inspect.cli.help import GroupedCommand, GroupOfCommands, page

# of typer's own copy of click, which does not export the name
UsageError: Any = typer.BadParameter.mro()[2]
# help is as wide as the terminal
SETTINGS: dict[str, Any] = {"max_content_width": 1_000}
# title in --help → name of a command → "module function" of this folder, or a group of commands
Listed = Mapping[str, Mapping[str, Any]]
SIMULATIONS: Listed = {
    "Commands": {name: f"simulate {name}" for name in ("placement", "routing", "decode", "cache")}
}
COMMANDS: Listed = {
    "Record": {
        "trace": "trace trace",
        "engine": "engine engine",
        "import": "convert import_",
        "watch": "files watch",
        "doctor": "describe doctor",
    },
    "Look": {
        "report": "report report",
        "text": "text text",
        "compare": "compare compare",
        "describe": "describe describe",
    },
    "Try": {"ablate": "ablate ablate", "simulate": SIMULATIONS},
    "Files": {"check": "check check", "merge": "files merge", "export": "convert export"},
}


class Commands(Mapping[str, Any]):
    """Commands by name, each made when it is asked for."""

    def __init__(self, listed: Listed):
        self.makers: dict[str, Callable[[], Any]] = {
            name: cache(partial(_made, name, place, panel))
            for panel, places in listed.items()
            for name, place in places.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def _made(name: str, place: str | Listed, panel: str) -> Any:
    """A command or a group, as typer makes it of a program that has no other."""
    if not isinstance(place, str):
        alone = _group(name, "Replay a trace under other assumptions.", place)
        alone.callback()(lambda: None)
        made: Any = typer.main.get_command(alone)
    else:
        from moe_inspect.cli.options import expanded

        module_name, function_name = place.split()
        module = import_module(f"moe_inspect.cli.{module_name}")
        function: Callable[..., None] = getattr(module, function_name)
        alone = typer.Typer(
            add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
        )
        alone.command(
            name, cls=GroupedCommand, context_settings=SETTINGS, **page(function.__doc__ or "")
        )(expanded(function))
        made = typer.main.get_command(alone)
        made.formats = getattr(module, "FORMATS", {}).get(name, {})
    made.rich_help_panel = panel
    return made


def _group(name: str, text: str, listed: Listed) -> typer.Typer:
    class Group(GroupOfCommands):
        def __init__(self, **settings: Any):
            super().__init__(**settings)
            self.commands: Any = Commands(listed)

    return typer.Typer(
        name=name,
        no_args_is_help=True,
        cls=Group,
        context_settings=SETTINGS,
        add_completion=listed is COMMANDS,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        **page(text),
    )


app = _group(
    "moe-inspect",
    """Where do the tokens go? Record and analyse the routing of Mixture-of-Experts models.

    Examples:
    moe-inspect trace demo -o runs/demo
    moe-inspect report runs/demo
    moe-inspect report runs/demo --html report.html""",
    COMMANDS,
)


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

"""`moe-inspect compare`: do two traces have the same routing?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from moe_inspect.cli.help import TABLES, traces
from moe_inspect.cli.options import (
    GateOptions,
    Options,
    Scheduler,
    SelectionOptions,
    exit_if_failed,
    limit,
)
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions, output_option, table_option
from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    from moe_inspect.comparison.checkpoints import Checkpoints
    from moe_inspect.comparison.compare import Comparison, LoadComparison
    from moe_inspect.comparison.models.compare import ModelComparison
    from moe_inspect.reporting.tables.registry import Table
    from moe_inspect.trace.reader import Trace

    Made = Comparison | LoadComparison | ModelComparison | Checkpoints


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ShowOptions):
    table: Annotated[
        str | None,
        table_option(
            f"One table instead of the text: {TABLES['compare']}; of more than two traces "
            f"{TABLES['checkpoints']}; of traces of counts {TABLES['counts']}; of two different "
            f"models {TABLES['models']}."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SelectionOfA(SelectionOptions):
    layers: Annotated[
        list[str] | None, Option(metavar="LAYERS", help="Only these layers of A, e.g. 0-3,7.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class PairOptions(Options):
    """How the decisions of two traces belong together."""

    panel = "Alignment"

    noise: Annotated[
        str | None,
        Option(
            metavar="TRACE",
            autocompletion=traces,
            help="A second run of A: differences between these two runs are noise.",
        ),
    ] = None
    shift_layers: Annotated[
        int, Option(metavar="N", help="Compare layer n of B with layer n + N of A.")
    ] = 0
    shift_positions: Annotated[
        int, Option(metavar="N", help="Tokens at position n of A are at position n + N of B.")
    ] = 0
    shift_routes: Annotated[
        int, Option(metavar="N", help="The routes of B's token n + N are those of A's token n.")
    ] = 0
    drop_last: Annotated[
        bool,
        Option(help="Leave out the last token of each sequence, which generation never feeds."),
    ] = False
    drop_zero_filled: Annotated[
        bool, Option(help="Leave out tokens that one trace sends to expert 0 in every slot.")
    ] = False

    @property
    def given(self) -> list[str]:
        """Names of those that are not left as they are."""
        return [name for name, value in self.keywords().items() if value]


@dataclass(frozen=True, kw_only=True)
class PairGates(GateOptions):
    fail_above: Annotated[
        list[str] | None,
        limit(
            "Exit with 3 if the metric of any router, or of all tokens, is above: "
            "set_mismatch=0.01, tokens_mismatch=0.05, loss_difference_nats=0.01."
        ),
    ] = None
    fail_below: Annotated[
        list[str] | None, limit("Exit with 3 if the metric is below: overlap=0.99.")
    ] = None


def compare(
    *,
    a: Annotated[
        str, Argument(metavar="A", help="A trace, or its URL (s3://…).", autocompletion=traces)
    ],
    b: Annotated[
        str, Argument(metavar="B", help="Another trace of the same tokens.", autocompletion=traces)
    ],
    others: Annotated[
        list[str] | None,
        Argument(
            metavar="C",
            autocompletion=traces,
            help="Further checkpoints, in training order; each is compared with the last.",
        ),
    ] = None,
    selection: SelectionOfA,
    pair: PairOptions,
    show: CompareOptions,
    scheduler: Scheduler = None,
    top: Annotated[
        int,
        output_option(
            min=0,
            help="Rows per router in flips, rows in documents and movers, texts per expert in "
            "vocabulary; 0 is all.",
        ),
    ] = 20,
    limits: PairGates,
) -> None:
    """Compare the routing of two traces, token by token.

    Shows where they choose different experts, and whether rounding, another model or a misalignment
    explains it. More than two traces are checkpoints in training order; each is compared with the
    last. Traces of counts are compared by the load of their experts, different models side by side.
    Needs neither torch nor the model.

    Examples:
    moe-inspect compare runs/bf16 runs/fp8
    moe-inspect compare runs/bf16 runs/fp8 --table flips --format csv
    moe-inspect compare runs/step-1000 runs/step-2000 runs/step-3000
    moe-inspect compare runs/train runs/serve --fail-above set_mismatch=0.01"""
    if others and pair.given:
        raise typer.BadParameter(
            f"--{pair.given[0].replace('_', '-')} is for two traces, and there are "
            f"{2 + len(others)}"
        )
    from moe_inspect.reporting.tables.registry import check_table
    from moe_inspect.reporting.verdict.gate import breaches
    from moe_inspect.trace.reader import open_trace

    opened = [open_trace(path, scheduler=scheduler) for path in (a, b, *(others or []))]
    noise = pair.noise and open_trace(pair.noise, scheduler=scheduler)
    of_pair = {**pair.keywords(), "noise": noise, "top": top}
    with shown():
        made, tables, main = _made(opened, selection, of_pair)
        _refuse(made, show.table, selection, limits)
        table, form = show.chosen(tables, main)
        check_table(table or main, tables)
        gates = limits.gates(tables)
        made.verdict()  # which counts
        show.save(made)
    failed = breaches(made, gates, tables)
    show.write(made, table, form)
    exit_if_failed([f"failed: {line}" for line in failed])


def _made(
    traces: Sequence[Trace], selection: SelectionOptions, of_pair: dict[str, Any]
) -> tuple[Made, Mapping[str, Table], str]:
    """What the traces can be compared as, its tables, and the one that a format alone asks for.
    of_pair: keywords of a comparison of two traces."""
    from moe_inspect.comparison.aligning.models import DifferentModelsError
    from moe_inspect.comparison.checkpoints import CHECKPOINT_TABLES, compare_checkpoints
    from moe_inspect.comparison.compare import TABLES, LoadComparison
    from moe_inspect.comparison.compare import compare as make
    from moe_inspect.comparison.loads.data import LOAD_TABLES
    from moe_inspect.comparison.models.compare import compare_models
    from moe_inspect.comparison.models.data import MODEL_TABLES

    settings = selection.keywords()
    if len(traces) > 2:
        return compare_checkpoints(traces, **settings), CHECKPOINT_TABLES, "saturation"
    try:
        made = make(*traces, **settings, **of_pair)
    except DifferentModelsError as error:
        top = of_pair.pop("top")
        if any(of_pair.values()):
            raise  # which say how decisions belong together
        del settings["layers"]
        models = compare_models(*traces, **settings, top=top, reasons=error.reasons)
        return models, MODEL_TABLES, "verdict"
    if isinstance(made, LoadComparison):
        return made, LOAD_TABLES, "load_shift"
    return made, TABLES, "agreement"


def _refuse(
    made: Made, table: str | None, selection: SelectionOptions, limits: GateOptions
) -> None:
    """Says why there is not what was asked for, where another comparison would have it."""
    from moe_inspect.comparison.compare import Comparison, LoadComparison
    from moe_inspect.comparison.models.compare import ModelComparison
    from moe_inspect.comparison.models.data import MODEL_TABLES

    if isinstance(made, Comparison):
        for name in (table, *limits.metrics):
            if name and (why := made.why_not(name)):
                raise MoeInspectError(why)
    elif isinstance(made, LoadComparison):
        if table:
            made.refuse("table", table)
        for name in limits.metrics:
            made.refuse("metric", name)
    elif isinstance(made, ModelComparison):
        given = {
            f"table {table!r}": table and table not in MODEL_TABLES,
            "--layers": selection.layers,
            "--fail-above": limits.fail_above,
            "--fail-below": limits.fail_below,
        }
        if refused := next((name for name, asked in given.items() if asked), None):
            raise MoeInspectError(
                f"{made.a.path} (A) and {made.b.path} (B) are of different models "
                f"({'; '.join(made.reasons)}), for which there is no {refused}: there are the "
                f"tables {', '.join(MODEL_TABLES)}"
            )

"""The command: its options are checked, the traces compared, then what was asked for is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from moe_inspect.cli.compare.options import CompareOptions, TraceA, TraceB, Traces
from moe_inspect.cli.compare.write import requested, write, write_files
from moe_inspect.cli.help.complete import FOLDERS, tables_in
from moe_inspect.cli.options import TableCommand, with_options
from moe_inspect.cli.progress import phases, shown
from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    from moe_inspect.comparison.aligning.models import DifferentModelsError
    from moe_inspect.comparison.loads.compare import LoadComparison
    from moe_inspect.trace.reader import Trace

OF_PAIRS = (
    "noise",
    "shift_layers",
    "shift_positions",
    "shift_routes",
    "drop_last",
    "drop_zero_filled",
)


@with_options(CompareOptions)
def compare(a: TraceA, b: TraceB, options: CompareOptions, others: Traces = None) -> None:
    """Compare the routing of two traces, token by token.

    Shows where they choose different experts, and whether rounding, another model or a misalignment
    explains it. More than two traces are checkpoints in training order; each is compared with the
    last. Traces of counts are compared by the load of their experts, different models side by side.
    Needs neither torch nor the model."""
    if others:
        _checkpoints([a, b, *others], options)
        return
    from moe_inspect.comparison.aligning.models import DifferentModelsError

    try:
        _pair(a, b, options)
    except DifferentModelsError as error:
        if any(getattr(options, name) for name in OF_PAIRS):
            raise  # which say how decisions belong together
        _models(a, b, options, error)


def _pair(a: str, b: str, options: CompareOptions) -> None:
    from moe_inspect.comparison.compare import TABLES, LoadComparison
    from moe_inspect.comparison.compare import compare as make

    made = make(
        _opened(a, options),
        _opened(b, options),
        noise=options.noise and _opened(options.noise, options),
        **_selection(options),
        top=options.top,
        shift_layers=options.shift_layers,
        shift_positions=options.shift_positions,
        shift_routes=options.shift_routes,
        drop_last=options.drop_last,
        drop_zero_filled=options.drop_zero_filled,
    )
    if isinstance(made, LoadComparison):
        _loads(made, options)
        return
    request = requested(options, TABLES, "agreement")  # after it is known which tables there are
    for name in (options.table, *(gate.metric for gate in request.gates)):
        if name and (why := made.why_not(name)):
            raise MoeInspectError(why)
    with shown(*phases.comparing(made.a), *_written(made.a, options)):
        made.verdict()  # which counts
        write_files(made, options)
    write(made, request, TABLES)


def _loads(made: LoadComparison, options: CompareOptions) -> None:
    """The load of two traces, of which one holds counts only."""
    from moe_inspect.comparison.loads.data import LOAD_TABLES

    if options.table:
        made.refuse("table", options.table)
    for text in [*(options.fail_above or []), *(options.fail_below or [])]:
        made.refuse("metric", text.partition("=")[0].strip())
    request = requested(options, LOAD_TABLES, "load_shift")
    with shown(*phases.counting(made.a), *phases.counting(made.b), *_written(made.a, options)):
        made.verdict()
        write_files(made, options)
    write(made, request, LOAD_TABLES)


def _models(a: str, b: str, options: CompareOptions, error: DifferentModelsError) -> None:
    """Two different models, side by side: what was asked for must be there for these."""
    from moe_inspect.comparison.models.compare import compare_models
    from moe_inspect.comparison.models.data import MODEL_TABLES

    given = {
        f"the table {options.table!r}": options.table and options.table not in MODEL_TABLES,
        "--layers": options.layers,
        "--fail-above": options.fail_above,
        "--fail-below": options.fail_below,
    }
    if refused := next((name for name, asked in given.items() if asked), None):
        raise MoeInspectError(
            f"{a} (A) and {b} (B) are of different models ({'; '.join(error.reasons)}), for which "
            f"there is no {refused.removeprefix('the ')}: there are the tables "
            f"{', '.join(MODEL_TABLES)}"
        )
    request = requested(options, MODEL_TABLES, "verdict")
    selection = {name: value for name, value in _selection(options).items() if name != "layers"}
    opened = [_opened(a, options), _opened(b, options)]
    counted = [cost for trace in opened for cost in phases.counting(trace)]
    with shown(*counted, *_written(opened[0], options)):
        made = compare_models(*opened, **selection, top=options.top, reasons=error.reasons)
        made.verdict()
        write_files(made, options)
    write(made, request, MODEL_TABLES)


def _checkpoints(traces: list[str], options: CompareOptions) -> None:
    from moe_inspect.comparison.checkpoints import CHECKPOINT_TABLES, compare_checkpoints

    given = [name for name in OF_PAIRS if getattr(options, name)]
    if given:
        raise typer.BadParameter(
            f"--{given[0].replace('_', '-')} is for two traces, and there are {len(traces)}"
        )
    request = requested(options, CHECKPOINT_TABLES, "saturation")
    opened = [_opened(path, options) for path in traces]
    costs = [cost for trace in opened[1:] for cost in phases.comparing(trace)]
    costs += [cost for trace in opened for cost in phases.counting(trace)]
    with shown(*costs, *_written(opened[0], options)):
        made = compare_checkpoints(opened, **_selection(options))
        made.verdict()
        write_files(made, options)
    write(made, request, CHECKPOINT_TABLES)


def _opened(path: str, options: CompareOptions) -> Trace:
    from moe_inspect.trace.reader import open_trace

    return open_trace(path, scheduler=options.scheduler)


def _written(trace: Trace, options: CompareOptions) -> phases.Costs:
    """The phases in which pictures and the page are made."""
    pictures = phases.pictures(5) if options.plots else []
    return [*pictures, *(phases.page(trace) if options.html else [])]


def _selection(options: CompareOptions) -> dict[str, Any]:
    return {
        "layers": options.layers,
        "domains": options.domain,
        "phase": options.phase and options.phase.value,
    }


class CompareCommand(TableCommand):
    def tables_help(self) -> str:
        def those(of: str, *folders: str) -> str:
            return ", ".join(sorted(tables_in(*folders, of=of)))

        return (
            f"One table instead of the text: {those('TABLES', *FOLDERS['compare'])}; of more than "
            f"two traces {those('CHECKPOINT_TABLES', 'comparison')}; of traces of counts "
            f"{those('LOAD_TABLES', 'comparison/loads')}; of two different models "
            f"{those('MODEL_TABLES', 'comparison/models')}."
        )

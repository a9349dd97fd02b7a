"""What experts are worth: `moe-inspect ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moe_inspect.cli.capture import HeldOutText, ModelArgument, ModelOptions, prepare, ranges_of
from moe_inspect.cli.options import Layers, in_panel, selection_option
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import TableOptions, output_option
from moe_inspect.text import plural, print_stderr

AblateTable = Literal["experts", "domains"]
run_option = in_panel("Run")


def ablate(
    *,
    model: ModelArgument,
    layers: Layers = None,
    experts: list[str] | None = selection_option(
        "Only these experts of each layer, e.g. 0-3,7.", "EXPERTS"
    ),
    most_passes: int | None = run_option(
        "Run at most this many forward passes, so that every expert is judged on less "
        "text. With --resume, a later run continues.",
        "N",
        min=2,
    ),
    resume: Path | None = run_option(
        "Store every loss in this directory, and continue from the losses already there.", "DIR"
    ),
    table: AblateTable = output_option(
        "experts: a row per expert. domains: one per expert and domain.", default="experts"
    ),
    write: TableOptions,
    text: HeldOutText,
    load: ModelOptions,
) -> None:
    """Measure the loss on held-out text without each expert.

    Drops each expert in turn; its router chooses among the rest. Differences are in nats per token,
    with 95 % intervals over documents. Layers below the dropped expert are computed only once.

    Examples:
    moe-inspect ablate demo --layers 1
    moe-inspect ablate ./model --data held_out.jsonl --resume kept -o worth.csv
    moe-inspect ablate ./model --data held_out/ --table domains --most-passes 900"""
    write.form()  # a usage error comes before anything is computed
    prepare()
    from moe_inspect.api import ablate as run

    with shown() as bar:
        try:
            done = run(
                model,
                experts=ranges_of(experts, "experts"),
                most_passes=most_passes,
                resume=resume,
                progress=bar.counted("ablating", "passes") if bar else None,
                layers=ranges_of(layers),
                **text.keywords(),
                **load.keywords(),
            )
        except KeyboardInterrupt:
            kept = f"continue with --resume {resume}" if resume is not None else "nothing was kept"
            print_stderr(f"interrupted: {kept}")
            raise
    write.emit(done.tables[table])
    first = done.experts.iloc[0]
    print_stderr(
        f"{plural(len(done.experts), 'expert')}, {first.tokens:,} tokens of "
        f"{plural(int(first.documents), 'document')}, {done.passes:,} forward passes: "
        f"the whole model has a loss of {first.loss:.3f} nats per token"
    )
    if done.measured < done.batches:
        print_stderr(
            f"measured on {done.measured} of {done.batches} batches of the text"
            + (f": run it again to continue from {resume}" if resume is not None else "")
        )

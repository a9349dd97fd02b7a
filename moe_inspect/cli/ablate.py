"""What experts are worth: `moe-inspect ablate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_inspect.cli.capture import (
    HeldOutText,
    ModelArgument,
    ModelOptions,
    check_model_and_text,
    prepare,
    ranges_of,
)
from moe_inspect.cli.options import Layers, selection_option
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions, table_option
from moe_inspect.text import print_stderr


@dataclass(frozen=True, kw_only=True)
class AblateOptions(ShowOptions):
    table: str | None = table_option(
        "One table instead of the text: experts, or domains (experts by domain)."
    )


def ablate(
    *,
    model: ModelArgument,
    layers: Layers = None,
    experts: list[str] | None = selection_option(
        "Only these experts of each layer, e.g. 0-3,7.", "EXPERTS"
    ),
    most_passes: int | None = selection_option(
        "Run at most this many forward passes, each on less text.", "N", min=2
    ),
    resume: Path | None = selection_option(
        "Store every loss in this directory, and continue from the losses already there.", "DIR"
    ),
    show: AblateOptions,
    text: HeldOutText,
    load: ModelOptions,
) -> None:
    """Measure the loss on held-out text without each expert.

    Drops each expert in turn; its router chooses among the rest. Differences are in nats per token,
    with 95 % intervals over documents.

    Examples:
    moe-inspect ablate demo --layers 1
    moe-inspect ablate ./model --data held_out.jsonl --resume kept -o worth.csv
    moe-inspect ablate ./model --data held_out/ --table domains --most-passes 900"""
    show.chosen(("experts", "domains"), "experts")  # usage errors come first
    check_model_and_text(model, load.revision, text)
    prepare()
    from moe_inspect.recording import ablate as run

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
    show.show(done)
    if done.measured < done.batches:
        print_stderr(
            f"measured on {done.measured} of {done.batches} batches of the text"
            + (f": run it again to continue from {resume}" if resume is not None else "")
        )

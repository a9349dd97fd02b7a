"""What experts are worth: `moe-inspect ablate`; a model without the least of them: `moe-inspect
prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_inspect.cli.capture import HeldOutText, ModelArgument, ModelOptions, prepare, ranges_of
from moe_inspect.cli.emit import Format, emit
from moe_inspect.cli.help import traces
from moe_inspect.cli.options import Layers, in_panel, selection_option
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import SafeCsv, TableOptions, output_option
from moe_inspect.text import plural, print_stderr

By = Literal["reap", "gate", "frequency", "ean", "mean-norm", "aimer", "ablation", "random"]
AblateTable = Literal["experts", "domains"]
PruneTable = Literal["losses", "scores", "findings"]
run_option, experts_option = in_panel("Run"), in_panel("Experts")


def ablate(
    *,
    model: ModelArgument = None,
    layers: Layers = None,
    experts: Annotated[
        list[str] | None,
        selection_option(metavar="EXPERTS", help="Only these experts of each layer, e.g. 0-3,7."),
    ] = None,
    most_passes: Annotated[
        int | None,
        run_option(
            metavar="N",
            min=2,
            help="Run at most this many forward passes, so that every expert is judged on less "
            "text. With --resume, a later run continues.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        run_option(
            metavar="DIR",
            help="Store every loss in this directory, and continue from the losses already there.",
        ),
    ] = None,
    table: Annotated[
        AblateTable,
        output_option(help="experts: a row per expert. domains: one per expert and domain."),
    ] = "experts",
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
    named = load.check(model)
    prepare()
    from moe_inspect.api import ablate as run

    with shown() as bar:
        try:
            done = run(
                named,
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


def prune(
    *,
    trace: Annotated[
        str,
        experts_option(
            metavar="TRACE",
            help="A trace of this model on calibration text; for reap, ean and mean-norm one with "
            "--output-norms.",
            autocompletion=traces,
        ),
    ],
    model: ModelArgument = None,
    output: Annotated[
        Path | None,
        output_option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write the pruned checkpoint to this new directory.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, output_option(help="Score and measure only; write no checkpoint.")
    ] = False,
    by: Annotated[
        By,
        experts_option(
            help="Score of an expert; the lowest are dropped. reap: mean of gate weight × output "
            "norm. gate: sum of gate weights. frequency: assignments. ean: sum of output "
            "norms. mean-norm: mean of output norms. aimer: from the weights alone. ablation: "
            "rise of the loss on the calibration text without this expert."
        ),
    ] = "reap",
    keep: Annotated[
        float,
        experts_option(help="Share of the experts of each layer (or group) to keep, at least."),
    ] = 0.75,
    draws: Annotated[
        int, experts_option(metavar="N", min=1, help="How many random choices to compare with.")
    ] = 5,
    seed: Annotated[int, experts_option(metavar="SEED", help="Seed of the random choices.")] = 0,
    resume: Annotated[
        Path | None,
        experts_option(
            metavar="DIR",
            help="With --by ablation: store every loss in this directory, and continue from those "
            "already there.",
        ),
    ] = None,
    table: Annotated[
        PruneTable,
        output_option(
            help="losses: by plan and domain. scores: a row per expert. findings: the warnings."
        ),
    ] = "losses",
    format: Annotated[Format, output_option(help="json: one object per line.")] = Format.table,
    safe_csv: SafeCsv = False,
    text: HeldOutText,
    load: ModelOptions,
) -> None:
    """Drop the least valuable experts, and measure the loss.

    Measures the loss on held-out text without them, by domain, and compares it with dropping the
    same number by frequency and at random; warns about doubtful choices. Every layer loses the same
    number of experts. transformers loads the checkpoint. Only the loss is measured, not other
    abilities.

    Examples:
    moe-inspect prune demo --trace runs/demo --by gate --dry-run
    moe-inspect prune ./model --trace runs/a --data held_out/ --keep 0.5 -o pruned
    moe-inspect prune demo --trace runs/demo --by gate --dry-run --table scores"""
    if (output is None) != dry_run:
        raise typer.BadParameter("give -o DIR for the checkpoint, or --dry-run for none")
    named = load.check(model)
    prepare()
    from moe_inspect.api import prune as run

    with shown() as bar:
        try:
            done = run(
                named,
                trace=trace,
                keep=keep,
                by=by,
                output=output,
                draws=draws,
                seed=seed,
                resume=resume,
                progress=bar.counted("measuring", "passes") if bar else None,
                **text.keywords(),
                **load.keywords(),
            )
        except KeyboardInterrupt:
            kept = f"; continue with --resume {resume}" if resume is not None else ""
            print_stderr(f"interrupted: no checkpoint was written{kept}")
            raise
    emit(done.tables[table], format, None, safe_csv)
    for warning in done.findings.text:
        print_stderr(f"warning: {warning}")
    whole = done.losses.iloc[0]
    print_stderr(
        f"without {plural(int(done.scores.dropped.sum()), 'expert')} of {len(done.scores):,} the "
        f"loss is {done.loss:.3f} nats per token, {whole.loss:.3f} with all"
    )
    if output is not None:
        print_stderr(f"wrote {output}; reloaded, it has this loss")

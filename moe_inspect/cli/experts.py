"""What experts are worth: `moe-inspect ablate`; a model without the least of them: `moe-inspect
prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from moe_inspect.cli.capture import HeldOutText, ModelArgument, ModelOptions, prepare, ranges_of
from moe_inspect.cli.emit import Format, emit
from moe_inspect.cli.help import traces
from moe_inspect.cli.options import REQUIRED, Layers, in_panel, selection_option
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import SafeCsv, TableOptions, output_option
from moe_inspect.text import plural, print_stderr

By = Literal[
    "reap", "gate", "frequency", "ean", "mean-norm", "saliency", "aimer", "ablation", "random"
]
AblateTable = Literal["experts", "domains"]
PruneTable = Literal["losses", "scores", "findings"]
run_option, experts_option = in_panel("Run"), in_panel("Experts")


def ablate(
    *,
    model: ModelArgument = None,
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
    trace: str = experts_option(
        "A trace of this model on calibration text; for reap, ean and mean-norm one with "
        "--output-norms.",
        "TRACE",
        autocompletion=traces,
        default=REQUIRED,
    ),
    model: ModelArgument = None,
    output: Path | None = output_option(
        "Write the pruned checkpoint to this new directory.", "DIR", flags=("-o", "--output")
    ),
    dry_run: bool = output_option("Score and measure only; write no checkpoint.", default=False),
    by: By = experts_option(
        "Score of an expert; the lowest are dropped. reap: mean of gate weight × output "
        "norm. gate: sum of gate weights. frequency: assignments. ean: sum of output "
        "norms. mean-norm: mean of output norms. saliency: that of imported counts. aimer: "
        "from the weights alone. ablation: rise of the loss on the calibration text without "
        "this expert.",
        default="reap",
    ),
    keep: float = experts_option(
        "Share of the experts of each layer (or group) to keep, at least.", default=0.75
    ),
    draws: int = experts_option("How many random choices to compare with.", "N", min=1, default=5),
    seed: int = experts_option("Seed of the random choices.", "SEED", default=0),
    resume: Path | None = experts_option(
        "With --by ablation: store every loss in this directory, and continue from those "
        "already there.",
        "DIR",
    ),
    table: PruneTable = output_option(
        "losses: by plan and domain. scores: a row per expert. findings: the warnings.",
        default="losses",
    ),
    format: Format = output_option("json: one object per line.", default=Format.table),
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

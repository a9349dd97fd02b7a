"""`moe-inspect prune`: a model without its least valuable experts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import Format, SafeCsv, emit
from moe_inspect.cli.experts import options as of
from moe_inspect.cli.help.complete import traces
from moe_inspect.cli.needs import need_torch, quiet, stop_cleanly
from moe_inspect.cli.options import Dequantize, Loader, RandomInit, Routers
from moe_inspect.cli.progress import shown
from moe_inspect.cli.trace.arguments import routers_of
from moe_inspect.text import plural, print_stderr


class Table(StrEnum):
    losses = "losses"
    scores = "scores"
    findings = "findings"


def prune(
    trace: Annotated[
        str,
        typer.Option(
            metavar="TRACE",
            help=(
                "A trace of this model on calibration text; for reap, ean and mean-norm one with "
                "--output-norms."
            ),
            show_default=False,
            autocompletion=traces,
        ),
    ],
    model: of.Model = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write the pruned checkpoint to this new directory.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Score and measure only; write no checkpoint.")
    ] = False,
    by: Annotated[
        of.By,
        typer.Option(
            help=(
                "Score of an expert; the lowest are dropped. reap: mean of gate weight × output "
                "norm. gate: sum of gate weights. frequency: assignments. ean: sum of output "
                "norms. mean-norm: mean of output norms. aimer: from the weights alone. ablation: "
                "rise of the loss on the calibration text without this expert."
            )
        ),
    ] = of.By.reap,
    keep: Annotated[
        float,
        typer.Option(help="Share of the experts of each layer (or group) to keep, at least."),
    ] = 0.75,
    draws: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many random choices to compare with.")
    ] = 5,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of the random choices.")] = 0,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help=(
                "With --by ablation: store every loss in this directory, and continue from those "
                "already there."
            ),
            show_default=False,
        ),
    ] = None,
    data: of.Data = None,
    table: Annotated[
        Table,
        typer.Option(
            help="losses: by plan and domain. scores: a row per expert. findings: the warnings."
        ),
    ] = Table.losses,
    format: Annotated[Format, typer.Option(help="json: one object per line.")] = Format.table,
    safe_csv: SafeCsv = False,
    text_field: of.TextField = "text",
    domain_field: of.DomainField = None,
    max_tokens: of.MaxTokens = None,
    max_length: of.MaxLength = None,
    batch_tokens: of.BatchTokens = 2048,
    device: of.Device = "auto",
    device_map: of.DeviceMap = None,
    dtype: of.OfDtype = of.Dtype.auto,
    revision: of.Revision = None,
    trust_remote_code: of.TrustRemoteCode = False,
    dequantize: Dequantize = False,
    random_init: RandomInit = None,
    loader: Loader = None,
    routers: Routers = None,
) -> None:
    """Drop the least valuable experts, and measure the loss.

    Measures the loss on held-out text without them, by domain, and compares it with dropping the
    same number by frequency and at random; warns about doubtful choices. Every layer loses the same
    number of experts. transformers loads the checkpoint. Only the loss is measured, not other
    abilities."""
    if (output is None) != dry_run:
        raise typer.BadParameter("give -o DIR for the checkpoint, or --dry-run for none")
    named = of.model_of(model, loader)
    need_torch()
    stop_cleanly()
    quiet()
    from moe_inspect.api import prune as run
    from moe_inspect.model.own import load_object

    with shown(("measuring", 1)) as bar:
        try:
            done = run(
                named,
                trace=trace,
                keep=keep,
                by=str(by),
                output=output,
                draws=draws,
                seed=seed,
                resume=resume,
                progress=bar.counted("measuring", "passes") if bar else None,
                data=data or (),
                text_field=text_field,
                domain_field=domain_field,
                max_tokens=max_tokens,
                max_length=max_length,
                batch_tokens=batch_tokens,
                device=device,
                device_map=device_map,
                dtype=str(dtype),
                revision=revision,
                trust_remote_code=trust_remote_code,
                dequantize=dequantize,
                random_init=random_init,
                loader=load_object(loader) if loader is not None else None,
                routers=routers_of(routers),
            )
        except KeyboardInterrupt:
            kept = f"; continue with --resume {resume}" if resume is not None else ""
            print_stderr(f"interrupted: no checkpoint was written{kept}")
            raise
    emit(done.tables[str(table)], format, None, safe_csv)
    for text in done.findings.text:
        print_stderr(f"warning: {text}")
    whole = done.losses.iloc[0]
    print_stderr(
        f"without {plural(int(done.scores.dropped.sum()), 'expert')} of {len(done.scores):,} the "
        f"loss is {done.loss:.3f} nats per token, {whole.loss:.3f} with all"
    )
    if output is not None:
        print_stderr(f"wrote {output}; reloaded, it has this loss")

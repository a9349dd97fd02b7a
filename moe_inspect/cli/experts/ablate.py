"""`moe-inspect ablate`: the loss of a model without each of its experts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import Format, SafeCsv, emit, format_of
from moe_inspect.cli.experts import options as of
from moe_inspect.cli.needs import need_torch, quiet, stop_cleanly
from moe_inspect.cli.options import Dequantize, Layers, Loader, Output, RandomInit, Routers
from moe_inspect.cli.progress import shown
from moe_inspect.cli.trace.arguments import ranges_of, routers_of
from moe_inspect.text import plural, print_stderr


class Table(StrEnum):
    experts = "experts"
    domains = "domains"


def ablate(
    model: of.Model = None,
    data: of.Data = None,
    layers: Layers = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPERTS",
            help="Only these experts of each layer, e.g. 0-3,7.",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        Table, typer.Option(help="experts: a row per expert. domains: one per expert and domain.")
    ] = Table.experts,
    most_passes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help=(
                "Run at most this many forward passes, so that every expert is judged on less "
                "text. With --resume, a later run continues."
            ),
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Store every loss in this directory, and continue from the losses already there.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="json: one object per line. Default: by the ending of the file, else table.",
            show_default=False,
        ),
    ] = None,
    output: Output = None,
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
    """Measure the loss on held-out text without each expert.

    Drops each expert in turn; its router chooses among the rest. Differences are in nats per token,
    with 95 % intervals over documents. Layers below the dropped expert are computed only once."""
    form = format or format_of(output)
    if form is None:
        raise typer.BadParameter(
            f"-o {output}: no format has this ending, add --format {', '.join(Format)}"
        )
    named = of.model_of(model, loader)
    need_torch()
    stop_cleanly()
    quiet()
    from moe_inspect.api import ablate as run
    from moe_inspect.model.own import load_object

    with shown(("ablating", 1)) as bar:
        try:
            done = run(
                named,
                experts=ranges_of(experts, "experts"),
                most_passes=most_passes,
                resume=resume,
                progress=bar.counted("ablating", "passes") if bar else None,
                data=data or (),
                layers=ranges_of(layers),
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
            kept = f"continue with --resume {resume}" if resume is not None else "nothing was kept"
            print_stderr(f"interrupted: {kept}")
            raise
    emit(done.tables[str(table)], form, output, safe_csv)
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

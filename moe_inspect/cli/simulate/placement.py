"""`moe-inspect simulate placement`: which GPU should hold which expert."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import SafeCsv
from moe_inspect.cli.simulate.show import (
    DomainOption,
    FormatOption,
    HtmlOption,
    LayersOption,
    PhaseOption,
    PlotsOption,
    TableOption,
    TraceArgument,
    show,
    split,
)
from moe_inspect.text import say


class Minimize(StrEnum):
    ranks = "ranks"


def placement(
    trace: TraceArgument,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="G", help="GPUs that share the experts. Default: up to 8.", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes that the GPUs are in.")] = 1,
    physical_experts: Annotated[
        int | None, typer.Option(min=1, metavar="P", help="All slots, replicas included. Default: one an expert.", show_default=False)
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Groups of experts, for EPLB. Default: those of the model's config.", show_default=False)
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="contiguous, round-robin, greedy, eplb, eplb-global, ours; repeated or comma-separated. Default: all.", show_default=False
        ),
    ] = None,
    fit_share: Annotated[float, typer.Option(min=0, max=1, help="Fit on this first part of the trace, judge on the rest.")] = 0.5,
    window: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also by windows of N tokens. Default: 16 windows.", show_default=False)
    ] = None,
    minimize: Annotated[
        Minimize | None,
        typer.Option(help="ranks: ours gives up what it gains over EPLB's balance to reach fewer GPUs a token.", show_default=False),
    ] = None,
    slack: Annotated[float, typer.Option(min=0, help="With --minimize: load a GPU by this share more than EPLB would.")] = 0.0,
    layers: LayersOption = None,
    domain: DomainOption = None,
    phase: PhaseOption = None,
    table: TableOption = None,
    format: FormatOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the plan: .json for SGLang, .yaml for TensorRT-LLM. With --table, write that table.",
            show_default=False,
        ),
    ] = None,
    safe_csv: SafeCsv = False,
    plots: PlotsOption = None,
    html: HtmlOption = None,
) -> None:
    """Say which GPU should hold which expert.

    Balance, ranks a token reaches, how a plan ages. Fitted on the first part of the trace and judged on the rest. The plan written is that of "ours", where it is among the
    policies, else of the first."""
    from moe_inspect.simulate.placement import simulate_placement
    from moe_inspect.simulate.plan import ENDINGS, write_plan

    simulation = simulate_placement(
        trace,
        gpus=gpus,
        nodes=nodes,
        physical_experts=physical_experts,
        groups=groups,
        policies=split(policy),
        fit_share=fit_share,
        window=window,
        minimize="ranks" if minimize else None,
        slack=slack,
        layers=layers,
        domains=split(domain),
        phase=phase and phase.value,
    )
    is_plan = output is not None and output.suffix.lower() in ENDINGS and (table is None or output.suffix.lower() != ".json")
    if output is not None and is_plan:
        say(f"wrote {output}: {write_plan(simulation, output)}")
        output = None
    show(simulation, table=table, format=format, output=output, safe_csv=safe_csv, plots=plots, html=html)

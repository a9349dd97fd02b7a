"""`moe-inspect simulate placement`: which GPU should hold which expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.options import Domains, Layers, OfPhase, with_options
from moe_inspect.cli.progress import shown
from moe_inspect.cli.progress.phases import simulating
from moe_inspect.cli.simulate.show import (
    ShowOptions,
    TraceArgument,
    opened,
    show,
)
from moe_inspect.text import print_stderr


class Minimize(StrEnum):
    ranks = "ranks"


class Dispatch(StrEnum):
    even = "even"
    lp = "lp"


class Engine(StrEnum):
    sglang = "sglang"
    tensorrt_llm = "tensorrt-llm"
    vllm_ascend = "vllm-ascend"


@dataclass(frozen=True)
class PlanOptions(ShowOptions):
    """And how a plan is written."""

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help=(
                "Write the recommended plan: .json for SGLang, .yaml for TensorRT-LLM. With "
                "--table, write that table."
            ),
            show_default=False,
        ),
    ] = None
    plan_for: Annotated[
        Engine | None,
        typer.Option(
            help="Engine that -o writes the plan for. Default: by file extension.",
            show_default=False,
        ),
    ] = None


@with_options(PlanOptions)
def placement(
    trace: TraceArgument,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="G",
            help="GPUs that share the experts. Default: up to 8.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes that the GPUs are on.")] = 1,
    physical_experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="P",
            help="Slots per layer, replicas included. Default: one per expert.",
            show_default=False,
        ),
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Groups of experts, for EPLB. Default: those of the model's config.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POLICY",
            help=(
                "contiguous, round-robin, greedy, eplb, eplb-global, local-search. Default: all."
            ),
            show_default=False,
        ),
    ] = None,
    fit_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Fit on this share of the trace, from its start; judge on the rest.",
        ),
    ] = 0.5,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Report the balance per window of N tokens. Default: 16 windows.",
            show_default=False,
        ),
    ] = None,
    minimize: Annotated[
        Minimize | None,
        typer.Option(
            help=(
                "ranks: local-search trades its better balance over EPLB for fewer GPUs per token."
            ),
            show_default=False,
        ),
    ] = None,
    slack: Annotated[
        float,
        typer.Option(
            min=0,
            help="With --minimize: how much more a GPU may be loaded than under EPLB, as a share.",
        ),
    ] = 0.0,
    dispatch: Annotated[
        Dispatch,
        typer.Option(
            help=(
                "lp: also report the balance under optimal dispatch among the replicas of an "
                "expert (a linear program per window)."
            )
        ),
    ] = Dispatch.even,
    layers: Layers = None,
    domain: Domains = None,
    phase: OfPhase = None,
    *,
    options: PlanOptions,
) -> None:
    """Compare placements of experts on GPUs.

    Reports balance, GPUs reached per token, and how a plan ages. Plans are fitted on the first part
    of the trace and judged on the rest. -o writes the recommended plan: that of the fastest policy
    on the judged part, with --minimize that of local-search. EPLB matches the published code slot
    for slot, except for equal loads, whose order it leaves open: here the lower number goes
    first."""
    from moe_inspect.simulate.placement.placement import simulate_placement
    from moe_inspect.simulate.placement.plan import ENDINGS, write_plan

    on = opened(trace, options)
    with shown(*simulating(on, "placement", minimize is not None)):
        simulation = simulate_placement(
            on,
            gpus=gpus,
            nodes=nodes,
            physical_experts=physical_experts,
            groups=groups,
            policies=policy or (),
            fit_share=fit_share,
            window=window,
            minimize="ranks" if minimize else None,
            slack=slack,
            dispatch="lp" if dispatch is Dispatch.lp else "even",
            layers=layers,
            domains=domain or (),
            phase=phase and phase.value,
        )
    output, plan_for = options.output, options.plan_for
    ending = output.suffix.lower() if output is not None else ""
    if output is None and plan_for is not None:
        raise typer.BadParameter(f"--plan-for {plan_for}: give the file with -o")
    if output is not None and (
        plan_for or (ending in ENDINGS and (options.table is None or ending != ".json"))
    ):
        print_stderr(
            f"wrote {output}: {write_plan(simulation, output, plan_for and plan_for.value)}"
        )
        options = replace(options, output=None)
    show(simulation, options)

"""`moe-inspect simulate …`: a trace replayed under other assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from typer import Option

from moe_inspect.cli.options import Layers, Scheduler, SelectionOptions, TraceArgument, in_panel
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions
from moe_inspect.text import no_such, print_stderr

if TYPE_CHECKING:
    from moe_inspect.simulate.result import Simulation
    from moe_inspect.trace.reader import Trace

N = TypeVar("N", int, float)


Order = Literal["arrival", "token", "weight"]
Minimize = Literal["ranks"]
Dispatch = Literal["even", "lp"]
Engine = Literal["sglang", "tensorrt-llm", "vllm-ascend"]
gpu_option, policy_option, plan_option = map(in_panel, ("GPUs", "Policy", "Plan"))


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(ShowOptions):
    """Where a simulation runs and how it is shown."""

    scheduler: Scheduler = None

    def opened(self, trace: str) -> Trace:
        from moe_inspect.trace.reader import open_trace

        return open_trace(trace, scheduler=self.scheduler)

    def simulation(self, made: Simulation) -> None:
        """Shows it: as text, or one table where --table, --format or the ending of the file asks
        for it."""
        if self.table is not None and self.table not in made.tables:
            raise typer.BadParameter(no_such("table", self.table, made.tables))
        main = next(iter(made.tables))
        table, form = self.chosen(made.tables, main)
        self.save(made)
        self.write(made, table or (main if self.of_table else None), form)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SimulateOptions):
    """And how a plan is written."""

    output: Annotated[
        Path | None,
        plan_option(
            "-o",
            "--output",
            help="Write the recommended plan: .json for SGLang, .yaml for TensorRT-LLM. With "
            "--table, write that table.",
        ),
    ] = None
    plan_for: Annotated[
        Engine | None,
        plan_option(help="Engine that -o writes the plan for. Default: by file extension."),
    ] = None


def numbers(values: Sequence[str], option: str, kind: type[N], least: float = 1) -> list[N]:
    """["1", "8"] → [1, 8], each at least `least`; what is no such number is a usage error that
    names the option."""
    found: list[N] = []
    for text in values:
        try:
            found.append(kind(text))
        except ValueError:
            raise typer.BadParameter(
                f"{option}: {text!r} is not a {'whole ' if kind is int else ''}number"
            ) from None
        if not found[-1] >= least:
            raise typer.BadParameter(f"{option}: {text} is below {least:g}")
    return found


def capacity(
    *,
    trace: TraceArgument,
    capacity_factor: Annotated[
        list[str] | None,
        Option(
            metavar="FACTOR",
            help="Capacity = ceil(factor · G · k / E) per expert and group of G tokens.",
        ),
    ] = None,
    group_tokens: Annotated[
        str,
        Option(
            metavar="N|batch|sequence",
            help="A group is a forward pass, at most N tokens of one, or a sequence.",
        ),
    ] = "batch",
    order: Annotated[
        Order | None,
        Option(
            help="Order of service: all first choices first (arrival, GShard), token by token "
            "(token, Switch), highest gate weight first (weight). "
            "Default: arrival, or token where the trace does not say which choice was the first."
        ),
    ] = None,
    target_drop: Annotated[
        float,
        Option(min=0, max=1, help="Report the smallest factor that drops at most this share."),
    ] = 0.01,
    layers: Layers = None,
    show: SimulateOptions,
) -> None:
    """Simulate the drops that a capacity factor would cause.

    Reports drops by layer, domain and position, and the smallest factor that meets a target drop
    rate. The effect of dropped tokens on later layers is not simulated.

    Examples:
    moe-inspect simulate capacity runs/a --capacity-factor 1.0,1.25,2.0"""
    if group_tokens not in ("batch", "sequence") and not group_tokens.isdecimal():
        raise typer.BadParameter(
            f"--group-tokens: {group_tokens!r} is not a whole number, batch or sequence"
        )
    from moe_inspect.simulate.capacity import simulate_capacity

    with shown():
        simulation = simulate_capacity(
            show.opened(trace),
            capacity_factors=numbers(
                capacity_factor or ["1.0", "1.25", "2.0"], "--capacity-factor", float, 0
            ),
            group_tokens=int(group_tokens) if group_tokens.isdecimal() else group_tokens,  # type: ignore[arg-type]
            order=order,
            target_drop=target_drop,
            layers=layers,
        )
    show.simulation(simulation)


def placement(
    *,
    trace: TraceArgument,
    gpus: Annotated[
        int | None,
        gpu_option(min=1, metavar="G", help="GPUs that share the experts. Default: up to 8."),
    ] = None,
    nodes: Annotated[int, gpu_option(min=1, metavar="N", help="Nodes that the GPUs are on.")] = 1,
    physical_experts: Annotated[
        int | None,
        gpu_option(
            min=1, metavar="P", help="Slots per layer, replicas included. Default: one per expert."
        ),
    ] = None,
    groups: Annotated[
        int | None,
        gpu_option(
            min=1, help="Groups of experts, for EPLB. Default: those of the model's config."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        policy_option(
            metavar="POLICY",
            help="contiguous, round-robin, greedy, eplb, eplb-global, local-search. Default: all.",
        ),
    ] = None,
    fit_share: Annotated[
        float,
        policy_option(
            min=0, max=1, help="Fit on this share of the trace, from its start; judge on the rest."
        ),
    ] = 0.5,
    window: Annotated[
        int | None,
        policy_option(
            min=1,
            metavar="N",
            help="Report the balance per window of N tokens. Default: 16 windows.",
        ),
    ] = None,
    minimize: Annotated[
        Minimize | None,
        policy_option(
            help="ranks: local-search trades its better balance over EPLB for fewer GPUs per token."
        ),
    ] = None,
    slack: Annotated[
        float,
        policy_option(
            min=0,
            help="With --minimize: how much more a GPU may be loaded than under EPLB, as a share.",
        ),
    ] = 0.0,
    dispatch: Annotated[
        Dispatch,
        policy_option(
            help="lp: also report the balance under optimal dispatch among the replicas of an "
            "expert (a linear program per window)."
        ),
    ] = "even",
    selection: SelectionOptions,
    show: PlanOptions,
) -> None:
    """Compare placements of experts on GPUs.

    Reports balance, GPUs reached per token, and how a plan ages. Plans are fitted on the first part
    of the trace and judged on the rest. -o writes the recommended plan: that of the fastest policy
    on the judged part, with --minimize that of local-search. EPLB matches the published code slot
    for slot, except for equal loads, whose order it leaves open: here the lower number goes
    first.

    Examples:
    moe-inspect simulate placement runs/a --gpus 8 --physical-experts 72
    moe-inspect simulate placement runs/a --gpus 8 -o plan.json"""
    from moe_inspect.simulate.placement.placement import simulate_placement
    from moe_inspect.simulate.placement.plan import ENDINGS

    with shown():
        simulation = simulate_placement(
            show.opened(trace),
            gpus=gpus,
            nodes=nodes,
            physical_experts=physical_experts,
            groups=groups,
            policies=policy or (),
            fit_share=fit_share,
            window=window,
            minimize=minimize,
            slack=slack,
            dispatch=dispatch,
            **selection.keywords(),
        )
    output, plan_for = show.output, show.plan_for
    ending = output.suffix.lower() if output is not None else ""
    if output is None and plan_for is not None:
        raise typer.BadParameter(f"--plan-for {plan_for}: give the file with -o")
    if output is not None and (
        plan_for or (ending in ENDINGS and (show.table is None or ending != ".json"))
    ):
        print_stderr(f"wrote {output}: {simulation.write_plan(output, plan_for)}")
        show = replace(show, output=None)
    show.simulation(simulation)


def decode(
    *,
    trace: TraceArgument,
    batch: Annotated[
        list[str] | None,
        Option(
            metavar="TOKENS",
            help="Sequences decoded together (batch size).",
            show_default="1,8,32,128",
        ),
    ] = None,
    expert_mb: Annotated[
        float | None,
        Option(min=0, help="Size of one expert, in 10^6 bytes. Default: from the model's config."),
    ] = None,
    flops_per_byte: Annotated[
        float,
        Option(
            min=0, help="Arithmetic intensity at which the GPU is compute-bound (FLOPs per byte)."
        ),
    ] = 295.0,
    selection: SelectionOptions,
    show: SimulateOptions,
) -> None:
    """Count the distinct experts that a decode step reads.

    Reports them by batch size. Documents stand in for requests: a step is the tokens at one
    position of B documents. On a cluster (--scheduler), each worker simulates whole layers: more
    workers than layers do not help.

    Examples:
    moe-inspect simulate decode runs/a --batch 1,8,32"""
    from moe_inspect.simulate.decode import simulate_decode

    with shown():
        simulation = simulate_decode(
            show.opened(trace),
            batches=numbers(batch or ["1", "8", "32", "128"], "--batch", int),
            expert_mb=expert_mb,
            flops_per_byte=flops_per_byte,
            **selection.keywords(),
        )
    show.simulation(simulation)


def cache(
    *,
    trace: TraceArgument,
    slots: Annotated[
        list[str] | None,
        Option(
            metavar="SLOTS", help="Experts per layer that fit in fast memory. Default: k, 2k, 4k."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        Option(
            metavar="POLICY",
            help="Eviction policy: lru, lfu or belady (the upper bound). Default: all.",
        ),
    ] = None,
    expert_mb: Annotated[float | None, Option(help="Size of one expert, in 10^6 bytes.")] = None,
    gb_per_s: Annotated[
        float | None, Option(help="Bandwidth of the link, in 10^9 bytes per second.")
    ] = None,
    gguf: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Take the size of each layer's experts, as quantised, from a GGUF of the model.",
        ),
    ] = None,
    layers: Layers = None,
    show: SimulateOptions,
) -> None:
    """Simulate a cache of offloaded experts.

    Reports the hit rate at batch size 1, and the cost of loading missing experts. Each layer has
    its own cache, empty at first; the experts of a decision are requested together; sequences run
    one after the other. On a cluster (--scheduler), each worker simulates whole layers: more
    workers than layers do not help.

    Examples:
    moe-inspect simulate cache runs/a --slots 2,4 --expert-mb 90 --gb-per-s 25"""
    from moe_inspect.simulate.cache import POLICIES, simulate_cache

    with shown():
        simulation = simulate_cache(
            show.opened(trace),
            slots=numbers(slots, "--slots", int) if slots else None,
            policies=policy or tuple(POLICIES),
            expert_mb=expert_mb,
            gb_per_s=gb_per_s,
            gguf=gguf,
            layers=layers,
        )
    show.simulation(simulation)


def routing(
    *,
    trace: TraceArgument,
    algorithm: Annotated[
        list[str] | None,
        Option(metavar="NAME", help='Simulate only these algorithms, e.g. "top-k,loss-free bias".'),
    ] = None,
    top_k: Annotated[
        list[str] | None,
        Option(metavar="K", help="Experts per token, for top-k. Default 1, k and 2k."),
    ] = None,
    top_p: Annotated[
        list[str] | None,
        Option(metavar="P", help="Cumulative probability, for top-p. Default 0.7."),
    ] = None,
    capacity_factor: Annotated[
        list[str] | None,
        Option(
            metavar="FACTOR",
            help="Capacity factor, for next best, which re-routes overflow. Default 1.0 and 1.25.",
        ),
    ] = None,
    uneven: Annotated[
        float | None,
        Option(
            min=0, help="max_vio from which a router counts as unbalanced. Default as in report."
        ),
    ] = None,
    layers: Layers = None,
    show: SimulateOptions,
) -> None:
    """Simulate other routing algorithms on the recorded logits.

    Needs a trace with --logits. Reports balance, probability mass kept, agreement with the model's
    own choices, whether a token's routing depends on later tokens, and when to use each.

    Examples:
    moe-inspect simulate routing runs/a --top-k 1,2,4"""
    from moe_inspect.simulate.routing import simulate_routing

    with shown():
        simulation = simulate_routing(
            show.opened(trace),
            algorithms=algorithm,
            top_k=numbers(top_k, "--top-k", int) if top_k else None,
            top_p=numbers(top_p or ["0.7"], "--top-p", float, 0),
            capacity_factor=numbers(
                capacity_factor or ["1.0", "1.25"], "--capacity-factor", float, 0
            ),
            layers=layers,
            **({} if uneven is None else {"uneven": uneven}),
        )
    show.simulation(simulation)

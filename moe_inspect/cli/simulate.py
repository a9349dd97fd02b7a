"""`moe-inspect simulate …`: a trace replayed under other assumptions. An option has the name of the
keyword of `trace.simulate`; what is not given is left to that function's defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moe_inspect.cli.help import traces
from moe_inspect.cli.options import (
    Layers,
    Options,
    Phase,
    SelectionOptions,
    TraceArgument,
    argument,
    in_panel,
    option,
)
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    from moe_inspect.simulate.result import Simulation

Order = Literal["arrival", "token", "weight"]
Dispatch = Literal["even", "lp"]
Engine = Literal["sglang", "tensorrt-llm", "vllm-ascend"]
gpu_option, policy_option, times_option = map(in_panel, ("GPUs", "Policy", "Times"))
Gpus = Annotated[
    int | None, gpu_option("GPUs that share the experts. Default: up to 8.", "G", min=1)
]
Nodes = Annotated[int, gpu_option("Nodes that the GPUs are on.", "N", min=1)]


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(ShowOptions):
    """How a simulation is shown."""

    def simulation(
        self, name: str, trace: str, *groups: Options, others: Sequence[str] = ()
    ) -> Simulation:
        """The simulation of this name, with the options of these groups; of other traces too."""
        from moe_inspect.public import open_trace

        given = {
            keyword: value
            for group in groups
            for keyword, value in group.keywords().items()
            if value is not None
        }
        with shown():
            simulate = getattr(open_trace(trace).simulate, name)
            return simulate(*others, **given)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SimulateOptions):
    """And how a plan is written."""

    output: Path | None = option(
        "Write the plan (.json, .yaml), or the table of --table.", flags=("-o", "--output")
    )
    plan_for: Engine | None = option("Engine of the plan. Default: by file extension.")


def group_tokens_of(text: str) -> int | str:
    """ "512", "batch" or "sequence"."""
    if text not in ("batch", "sequence") and not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is not a whole number, batch or sequence")
    return int(text) if text.isdecimal() else text


@dataclass(frozen=True, kw_only=True)
class TimesOptions(Options):
    """Whose measured times what is simulated is priced with."""

    panel = "Times"

    hardware: str | None = times_option("GPU whose measured times are used, e.g. h200.", "NAME")
    engine: str | None = times_option("Engine that they were measured in, e.g. vllm.", "NAME")
    dtype: str | None = times_option("Data type of the experts' weights, e.g. fp8.", "NAME")
    kernel: str | None = times_option("Kernel, where several were measured.", "NAME")
    latency: Path | None = times_option(
        "Own times: constants (.json), or tokens per expert and ms (.csv).", "FILE"
    )


@dataclass(frozen=True, kw_only=True)
class PlacementOptions(Options):
    panel = "Options"

    gpus: Gpus = None
    nodes: Nodes = 1
    physical_experts: int | None = gpu_option(
        "Slots per layer, replicas included. Default: one per expert.", "P", min=1
    )
    groups: int | None = gpu_option(
        "Groups of experts, for EPLB. Default: those of the model's config.", min=1
    )
    policies: list[str] | None = policy_option(
        "contiguous, round-robin, greedy, eplb, eplb-global, local-search. Default: all.",
        "POLICY",
        flags=("--policy",),
    )
    placement: Path | None = policy_option(
        "Plan in use, an engine's file: the policy current.", "FILE"
    )
    fit_share: float | None = policy_option(
        "Fit on this first share alone. Default: 0.5.", min=0, max=1
    )
    judge: list[str] | None = policy_option("Judge on this trace.", "TRACE", autocompletion=traces)
    fit_domains: list[str] | None = policy_option(
        "Fit on these domains, judge on the others.", "NAMES"
    )
    fit_phase: Phase | None = policy_option("Fit on this phase, judge on the others.")
    fit_weights: list[float] | None = policy_option("Weight of each trace or domain.", "NUMBER")
    dispatch: Dispatch = policy_option("lp: also optimal dispatch among replicas.", default="even")
    batch_tokens: list[int] | None = times_option(
        "Tokens of a step, over all GPUs.", "TOKENS", show_default="64,512,4096"
    )
    sweep: list[int] | None = times_option("Price these slots per layer, e.g. 256,288.", "SLOTS")


def placement(
    *,
    trace: TraceArgument,
    others: list[str] | None = argument(
        "Others of the same model, for one plan that is fitted on all.",
        "MORE",
        autocompletion=traces,
    ),
    options: PlacementOptions,
    times: TimesOptions,
    selection: SelectionOptions,
    show: PlanOptions,
) -> None:
    """Compare placements of experts on GPUs.

    Reports balance, GPUs reached per token, and how a plan ages. Plans are fitted on the first part
    of the trace and judged on the rest, or fitted on traces, domains or a phase. -o writes the
    recommended plan: the first in the order of --policy that is no slower than the fastest by 1%,
    or beyond chance. With --hardware, also the milliseconds of the MoE layers of a step, and how
    much of that imbalance costs (--table steps; of the placement in use --table imbalance).

    Examples:
    moe-inspect simulate placement runs/a --physical-experts 72 -o plan.json
    moe-inspect simulate placement runs/a --gpus 8 --fit-phase decode
    moe-inspect simulate placement runs/a runs/b --gpus 8 --judge runs/c
    moe-inspect simulate placement run --hardware h200 --engine vllm --dtype fp8"""
    from moe_inspect.simulate.placement.plan import ENDINGS

    output, plan_for = show.output, show.plan_for
    if output is None and plan_for is not None:
        raise typer.BadParameter(f"--plan-for {plan_for}: give the file with -o")
    made = show.simulation("placement", trace, options, times, selection, others=others or ())
    ending = output.suffix.lower() if output is not None else ""
    if output is not None and (
        plan_for or (ending in ENDINGS and (show.table is None or ending != ".json"))
    ):
        print_stderr(f"wrote {output}: {made.write_plan(output, plan_for)}")
        show = replace(show, output=None)
    show.show(made)


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Options):
    panel = "Options"

    batches: list[int] | None = option(
        "Sequences decoded together (batch size).",
        "TOKENS",
        flags=("--batch",),
        show_default="1,8,32,128",
    )
    drafts: list[int] | None = option(
        "Draft tokens per sequence that a step verifies (speculative decoding).",
        "TOKENS",
        flags=("--draft",),
    )
    expert_mb: float | None = option(
        "Size of one expert, in 10^6 bytes. Default: from the model's config.", min=0
    )


def decode(
    *,
    trace: TraceArgument,
    options: DecodeOptions,
    selection: SelectionOptions,
    show: SimulateOptions,
) -> None:
    """Count the distinct experts that a decode step reads.

    Reports them by batch size. Documents stand in for requests: a step is the tokens at one
    position of B documents. With --draft, also of steps that verify drafts: what they read, from
    which acceptance they pay, and the best draft length.

    Examples:
    moe-inspect simulate decode runs/a --batch 1,8,32
    moe-inspect simulate decode runs/a --draft 1,2,4,8"""
    show.show(show.simulation("decode", trace, options, selection))


@dataclass(frozen=True, kw_only=True)
class CacheOptions(Options):
    panel = "Options"

    slots: list[int] | None = option(
        "Experts per layer that fit in fast memory. Default: k, 2k, 4k.", "SLOTS"
    )
    policies: list[str] | None = option(
        "Eviction policy: lru, lfu or belady (the upper bound). Default: all.",
        "POLICY",
        flags=("--policy",),
    )
    expert_mb: float | None = option("Size of one expert, in 10^6 bytes.")
    gb_per_s: float | None = option("Bandwidth of the link, in 10^9 bytes per second.")
    gguf: Path | None = option(
        "Take the size of each layer's experts, as quantised, from a GGUF of the model.", "FILE"
    )
    layers: Layers = None


def cache(*, trace: TraceArgument, options: CacheOptions, show: SimulateOptions) -> None:
    """Simulate a cache of offloaded experts.

    Reports the hit rate at batch size 1, and the cost of loading missing experts. Each layer has
    its own cache, empty at first; the experts of a decision are requested together; sequences run
    one after the other.

    Examples:
    moe-inspect simulate cache runs/a --slots 2,4 --expert-mb 90 --gb-per-s 25"""
    show.show(show.simulation("cache", trace, options))


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(Options):
    panel = "Options"

    algorithms: list[str] | None = option(
        'Simulate only these algorithms, e.g. "top-k,expert choice".',
        "NAME",
        flags=("--algorithm",),
    )
    top_k: list[int] | None = option("Experts per token, for top-k. Default 1, k and 2k.", "K")
    top_p: list[float] | None = option("Cumulative probability, for top-p. Default 0.7.", "P")
    capacity_factors: list[float] | None = option(
        "Capacity = ceil(factor · G · k / E) per expert and group of G tokens. Default: 1.0, 1.25 "
        "and 2.0.",
        "FACTOR",
        flags=("--capacity-factor",),
    )
    group_tokens: Any = option(
        "A group is a forward pass, at most N tokens of one, or a sequence.",
        "N|batch|sequence",
        parser=group_tokens_of,
        default="batch",
    )
    order: Order | None = option(
        "Who is served first: all first choices (arrival), token by token, or the highest gate "
        "weight. Default: arrival, or token where first choices are not known."
    )
    target_drop: float = option(
        "Report the smallest factor that drops at most this share.", min=0, max=1, default=0.01
    )
    uneven: float | None = option(
        "max_vio from which a router counts as unbalanced. Default as in report.", min=0
    )
    layers: Layers = None


def routing(*, trace: TraceArgument, options: RoutingOptions, show: SimulateOptions) -> None:
    """Simulate other routing: capacity factors, and other algorithms.

    Reports what token choice drops under a capacity, by layer, domain and position, and the
    smallest factor that meets a target drop rate. Of a trace with --logits also balance,
    probability mass kept, agreement with the model's own choices, and when to use each algorithm.
    The effect on later layers is not simulated.

    Examples:
    moe-inspect simulate routing runs/a --capacity-factor 1.0,1.25,2.0
    moe-inspect simulate routing runs/a --top-k 1,2,4"""
    show.show(show.simulation("routing", trace, options))

"""The public `Trace`, with the questions that it answers as methods, and the functions that return
one. This file stands above all rooms: their functions take a stored trace, and none imports it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from moe_inspect.trace import reader

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.checking.check import check_trace as _check
    from moe_inspect.comparison.compare import compare as _compare
    from moe_inspect.exporters.run import export_trace as _export
    from moe_inspect.reporting.report import Report
    from moe_inspect.simulate import cache as _cache
    from moe_inspect.simulate import decode as _decode
    from moe_inspect.simulate import routing as _routing
    from moe_inspect.simulate.placement.placement import simulate_placement as _placement
    from moe_inspect.trace import texts as _texts

Options = ParamSpec("Options")
Result = TypeVar("Result")


def report(
    trace: reader.Trace | str | Path,
    *,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    top: int = 20,
    window: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    scheduler: object = None,
    progress: Callable[[int], None] | None = None,
    baseline: reader.Trace | str | Path | None = None,
    times: Mapping[str, Any] | None = None,
) -> Report:
    """Return the report on a trace, or on a part of it.

    Args:
        layers: "0-3,7", a number or several. Default: all.
        domains: a domain or several. Default: all.
        phase: "prefill", "decode", "encode" or "draft". Default: all.
        top: token ids per expert in the table `vocabulary`, and partners per expert in tables of
            pairs. 0: all.
        window: tokens per window. Default: a 64th of the trace.
        thresholds: of the verdict, such as {"uneven": 0.3}.
        scheduler: of a dask.distributed cluster, as `Trace.on` takes it.
        progress: called with the number of decisions read.
        baseline: a trace of an untrained or earlier model over the same or similar text. The table
            `specialization` and the verdict then say what is beyond it.
        times: options of `trace.simulate.placement`, such as {"hardware": "h200", "engine": "vllm",
            "dtype": "fp8"}. The verdict and the page then say what imbalance costs, in
            milliseconds.

    Raises:
        MoeInspectError: there is no such trace, layer, domain or threshold; the baseline has other
            routers or domains, or counts only; or those times cannot be used.
    """
    from moe_inspect.analysis.counting.select import select
    from moe_inspect.errors import MoeInspectError
    from moe_inspect.reporting.report import Report
    from moe_inspect.reporting.shown import python_call

    opened, its = open_trace(trace, scheduler=scheduler), None
    part: dict[str, Any] = {"layers": layers, "domains": domains, "phase": phase}
    selection = select(opened, **part)
    if baseline is not None:
        other = open_trace(baseline, scheduler=scheduler)
        if other.counts_only:
            raise MoeInspectError(f"the baseline {other.path} holds counts only, no documents")
        its = Report(other, select(other, **part))
    made = Report(
        opened,
        selection,
        top=top,
        window=window,
        thresholds=thresholds,
        progress=progress,
        baseline=its,
    )
    if times:
        from moe_inspect.simulate.step import imbalance_costs

        lines = python_call("simulate.placement", [opened], part | {**times})
        made.costs = replace(imbalance_costs(opened, selection, **times), python=lines)
    if opened.is_history:
        from moe_inspect.watch.state import alarms_of_history

        made.history = alarms_of_history(opened)
    return made


class LazyMethod(Generic[Options, Result]):
    """A method whose function is imported when it is first used: `name` of the module `home`."""

    def __init__(self, home: str, name: str):
        self.home, self.name = home, name

    def __get__(self, asked: object, owner: type | None = None) -> Callable[Options, Result]:
        function = getattr(importlib.import_module(f"moe_inspect.{self.home}"), self.name)
        return function if asked is None else MethodType(function, getattr(asked, "trace", asked))


if TYPE_CHECKING:

    def method(
        function: Callable[Concatenate[Any, Options], Result],
    ) -> LazyMethod[Options, Result]:
        """The method as type checkers see it: with the options of its function."""
        ...


def table(
    name: str, of: Callable[Concatenate[Any, Options], Report]
) -> Callable[Concatenate[Any, Options], pd.DataFrame]:
    """The method that returns a table of the report, with the options of the report."""

    def method(trace: Trace, *args: Options.args, **options: Options.kwargs) -> pd.DataFrame:
        return of(trace, *args, **options).tables[name]

    method.__name__, method.__qualname__ = name, f"Trace.{name}"
    method.__doc__ = f"Return the table `{name}` of the report. The options are those of `report`."
    return method


class Trace(reader.Trace):
    """A trace on disk. Tables are pandas DataFrames. Read large ones by layer
    (`routing(layers=3)`) or by shard (`for shard in trace.shards`), which keeps memory independent
    of the trace's length. `scheduler`: of the dask.distributed cluster that passes over it run on,
    see `on`."""

    report = report
    summary, verdict = table("summary", report), table("verdict", report)
    balance, load = table("balance", report), table("load", report)
    windows, drift = table("windows", report), table("drift", report)
    coverage, worth = table("coverage", report), table("worth", report)
    domains, specialization = table("domains", report), table("specialization", report)
    coactivation, transitions = table("coactivation", report), table("transitions", report)
    repetition, router = table("repetition", report), table("router", report)

    if TYPE_CHECKING:
        check, compare, export = method(_check), method(_compare), method(_export)
        document, requests = method(_texts.document), method(_texts.requests)
        text, tokens_of = method(_texts.text), method(_texts.tokens_of)
    else:
        check = LazyMethod("checking.check", "check_trace")
        compare = LazyMethod("comparison.compare", "compare")
        document = LazyMethod("trace.texts", "document")
        export = LazyMethod("exporters.run", "export_trace")
        requests = LazyMethod("trace.texts", "requests")
        text = LazyMethod("trace.texts", "text")
        tokens_of = LazyMethod("trace.texts", "tokens_of")

    @classmethod
    def from_stored(cls, stored: reader.Trace) -> Self:
        """The same trace with the public methods, without reading its files again."""
        trace = cls.__new__(cls)
        trace.__dict__.update(stored.__dict__)
        return trace

    @property
    def simulate(self) -> Simulations:
        """The trace replayed under other assumptions: `.placement(gpus=8)`,
        `.routing()`, `.decode()`, `.cache()`."""
        return Simulations(self)


class Simulations:
    """`trace.simulate`: the functions of these names of `moe_inspect.simulate`, of this trace."""

    def __init__(self, trace: Trace):
        self.trace = trace

    if TYPE_CHECKING:
        cache, decode = method(_cache.simulate_cache), method(_decode.simulate_decode)
        placement, routing = method(_placement), method(_routing.simulate_routing)
    else:
        cache = LazyMethod("simulate.cache", "simulate_cache")
        decode = LazyMethod("simulate.decode", "simulate_decode")
        placement = LazyMethod("simulate.placement.placement", "simulate_placement")
        routing = LazyMethod("simulate.routing", "simulate_routing")


def open_trace(trace: str | Path | reader.Trace, *, scheduler: reader.Scheduler = None) -> Trace:
    """Open a trace directory, of this machine or by a URL that fsspec can read
    (`s3://bucket/trace`). A Trace is returned as it is.

    Args:
        scheduler: of a dask.distributed cluster, as `Trace.on` takes it.

    Raises:
        MoeInspectError: there is no trace, or it is damaged or of a newer format.
    """
    if isinstance(trace, Trace):
        opened = trace
    elif isinstance(trace, reader.Trace):
        opened = Trace.from_stored(trace)
    else:
        opened = Trace(trace)
    return opened.on(scheduler) if scheduler is not None else opened

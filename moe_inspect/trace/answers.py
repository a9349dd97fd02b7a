"""What a trace is asked, as methods of `Trace`: functions of rooms that stand on the trace. Each is
imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    from moe_inspect.comparison.compare import compare as _compare
    from moe_inspect.exporters.run import export_trace
    from moe_inspect.query import sql as _sql
    from moe_inspect.reporting.report import report as _report
    from moe_inspect.simulate.cache import simulate_cache
    from moe_inspect.simulate.capacity import simulate_capacity
    from moe_inspect.simulate.decode import simulate_decode
    from moe_inspect.simulate.placement.placement import simulate_placement
    from moe_inspect.simulate.routing import simulate_routing
    from moe_inspect.trace.derived.sample import sample as _sample
    from moe_inspect.trace.texts import document as _document
    from moe_inspect.trace.texts import requests as _requests
    from moe_inspect.trace.texts import text as _text
    from moe_inspect.trace.texts import tokens_of as _tokens_of
    from moe_inspect.trace.verify import verify as _verify

    def of(function: Callable[Concatenate[Any, Options], Result]) -> TraceMethod[Options, Result]:
        """A function as type checkers see it: with its options, and without the trace."""
        ...


Options = ParamSpec("Options")
Result = TypeVar("Result")


class TraceMethod(Generic[Options, Result]):
    """A method: the function `name` of the module `home`, called with the trace."""

    def __init__(self, home: str, name: str):
        self.home, self.name = home, name

    def __get__(self, asked: Any, owner: type | None = None) -> Callable[Options, Result]:
        function = getattr(importlib.import_module(f"moe_inspect.{self.home}"), self.name)
        return function if asked is None else MethodType(function, getattr(asked, "trace", asked))


class Answers:
    """The functions of these names, of this trace."""

    if TYPE_CHECKING:
        compare = of(_compare)
        document = of(_document)
        export = of(export_trace)
        report = of(_report)
        requests = of(_requests)
        sample = of(_sample)
        sql = of(_sql)
        text = of(_text)
        tokens_of = of(_tokens_of)
        verify = of(_verify)
    else:
        compare = TraceMethod("comparison.compare", "compare")
        document = TraceMethod("trace.texts", "document")
        export = TraceMethod("exporters.run", "export_trace")
        report = TraceMethod("reporting.report", "report")
        requests = TraceMethod("trace.texts", "requests")
        sample = TraceMethod("trace.derived.sample", "sample")
        sql = TraceMethod("query", "sql")
        text = TraceMethod("trace.texts", "text")
        tokens_of = TraceMethod("trace.texts", "tokens_of")
        verify = TraceMethod("trace.verify", "verify")

    @property
    def simulate(self) -> Simulations:
        """The trace replayed under other assumptions: `.placement(gpus=8)`, `.capacity()`,
        `.decode()`, `.cache()`, `.routing()`."""
        return Simulations(self)


class Simulations:
    """`trace.simulate`: the functions of these names of `moe_inspect.simulate`, of this trace."""

    def __init__(self, trace: Any):
        self.trace = trace

    if TYPE_CHECKING:
        cache = of(simulate_cache)
        capacity = of(simulate_capacity)
        decode = of(simulate_decode)
        placement = of(simulate_placement)
        routing = of(simulate_routing)
    else:
        cache = TraceMethod("simulate.cache", "simulate_cache")
        capacity = TraceMethod("simulate.capacity", "simulate_capacity")
        decode = TraceMethod("simulate.decode", "simulate_decode")
        placement = TraceMethod("simulate.placement.placement", "simulate_placement")
        routing = TraceMethod("simulate.routing", "simulate_routing")

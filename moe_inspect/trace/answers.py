"""What a trace is asked, as methods of `Trace`: functions of rooms that stand on the trace. Each is
imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

Options = ParamSpec("Options")
Result = TypeVar("Result")

if TYPE_CHECKING:
    from moe_inspect.checking.check import check_trace as _check
    from moe_inspect.comparison.compare import compare as _compare
    from moe_inspect.exporters.run import export_trace as _export
    from moe_inspect.reporting.report import report as _report
    from moe_inspect.simulate import cache as _cache
    from moe_inspect.simulate import decode as _decode
    from moe_inspect.simulate import routing as _routing
    from moe_inspect.simulate.placement.placement import simulate_placement as _placement
    from moe_inspect.trace import texts as _texts

    def of(function: Callable[Concatenate[Any, Options], Result]) -> TraceMethod[Options, Result]:
        """A function as type checkers see it: with its options, and without the trace."""
        ...


class TraceMethod(Generic[Options, Result]):
    """A method: the function `name` of the module `home`, called with the trace."""

    def __init__(self, home: str, name: str):
        self.home, self.name = home, name

    def __get__(self, asked: object, owner: type | None = None) -> Callable[Options, Result]:
        function = getattr(importlib.import_module(f"moe_inspect.{self.home}"), self.name)
        return function if asked is None else MethodType(function, getattr(asked, "trace", asked))


class Answers:
    """The functions of these names, of this trace."""

    if TYPE_CHECKING:
        check, compare = of(_check), of(_compare)
        export, report = of(_export), of(_report)
        document, requests, text = of(_texts.document), of(_texts.requests), of(_texts.text)
        tokens_of = of(_texts.tokens_of)
    else:
        check = TraceMethod("checking.check", "check_trace")
        compare = TraceMethod("comparison.compare", "compare")
        document = TraceMethod("trace.texts", "document")
        export = TraceMethod("exporters.run", "export_trace")
        report = TraceMethod("reporting.report", "report")
        requests = TraceMethod("trace.texts", "requests")
        text = TraceMethod("trace.texts", "text")
        tokens_of = TraceMethod("trace.texts", "tokens_of")

    @property
    def simulate(self) -> Simulations:
        """The trace replayed under other assumptions: `.placement(gpus=8)`,
        `.routing()`, `.decode()`, `.cache()`."""
        return Simulations(self)


class Simulations:
    """`trace.simulate`: the functions of these names of `moe_inspect.simulate`, of this trace."""

    def __init__(self, trace: Answers):
        self.trace = trace

    if TYPE_CHECKING:
        cache = of(_cache.simulate_cache)
        decode, placement = of(_decode.simulate_decode), of(_placement)
        routing = of(_routing.simulate_routing)
    else:
        cache = TraceMethod("simulate.cache", "simulate_cache")
        decode = TraceMethod("simulate.decode", "simulate_decode")
        placement = TraceMethod("simulate.placement.placement", "simulate_placement")
        routing = TraceMethod("simulate.routing", "simulate_routing")

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
    from moe_inspect.trace.verify import verify as _verify

    def of(function: Callable[Concatenate[Any, Options], Result]) -> Answer[Options, Result]:
        """A function as type checkers see it: with its options, and without the trace."""
        ...


Options = ParamSpec("Options")
Result = TypeVar("Result")


class Answer(Generic[Options, Result]):
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
        export = of(export_trace)
        report = of(_report)
        sample = of(_sample)
        sql = of(_sql)
        verify = of(_verify)
    else:
        compare = Answer("comparison.compare", "compare")
        export = Answer("exporters.run", "export_trace")
        report = Answer("reporting.report", "report")
        sample = Answer("trace.derived.sample", "sample")
        sql = Answer("query", "sql")
        verify = Answer("trace.verify", "verify")

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
        cache = Answer("simulate.cache", "simulate_cache")
        capacity = Answer("simulate.capacity", "simulate_capacity")
        decode = Answer("simulate.decode", "simulate_decode")
        placement = Answer("simulate.placement.placement", "simulate_placement")
        routing = Answer("simulate.routing", "simulate_routing")

"""What a trace is asked, as methods of `Trace`: functions of rooms that stand on the trace. Each is
imported when it is first asked for."""

from __future__ import annotations

import importlib
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any


class _Answer:
    """A method: the function `name` of the module `home`, called with the trace."""

    def __init__(self, home: str, name: str):
        self.home, self.name = home, name

    def __get__(self, trace: Any, owner: type | None = None) -> Any:
        function = getattr(importlib.import_module(f"moe_inspect.{self.home}"), self.name)
        return function if trace is None else MethodType(function, trace)


class Answers:
    """The functions of these names, of this trace."""

    if TYPE_CHECKING:  # type checkers see the functions, and so their options
        from moe_inspect.comparison.compare import compare
        from moe_inspect.exporters.run import export_trace as export
        from moe_inspect.query import sql
        from moe_inspect.reporting.report import report
        from moe_inspect.trace.derived.sample import sample
        from moe_inspect.trace.verify import verify
    else:
        compare = _Answer("comparison.compare", "compare")
        export = _Answer("exporters.run", "export_trace")
        report = _Answer("reporting.report", "report")
        sample = _Answer("trace.derived.sample", "sample")
        sql = _Answer("query", "sql")
        verify = _Answer("trace.verify", "verify")

    @property
    def simulate(self) -> Simulations:
        """The trace replayed under other assumptions: `.placement(gpus=8)`, `.capacity()`,
        `.decode()`, `.cache()`, `.routing()`."""
        return Simulations(self)


class Simulations:
    """`trace.simulate`: each is the function of `moe_inspect.simulate`, of this trace."""

    def __init__(self, trace: Any):
        self.trace = trace

    @property
    def cache(self):
        from moe_inspect.simulate.cache import simulate_cache

        return partial(simulate_cache, self.trace)

    @property
    def capacity(self):
        from moe_inspect.simulate.capacity import simulate_capacity

        return partial(simulate_capacity, self.trace)

    @property
    def decode(self):
        from moe_inspect.simulate.decode import simulate_decode

        return partial(simulate_decode, self.trace)

    @property
    def placement(self):
        from moe_inspect.simulate.placement.placement import simulate_placement

        return partial(simulate_placement, self.trace)

    @property
    def routing(self):
        from moe_inspect.simulate.routing import simulate_routing

        return partial(simulate_routing, self.trace)

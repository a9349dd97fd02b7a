"""Decode steps one after the other, which differ only in what they are fed: they are recognised,
read and kept in few steps. (During decoding neither Python's code nor our data is in the
processor's caches: what a pass costs is the number of places in memory that it looks at.)

B batch rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import ref

from moe_inspect.capture.hook.inputs.given import copies_of
from moe_inspect.capture.hook.inputs.rows import Cached, CachedRows, CallInputs, Rows

if TYPE_CHECKING:
    from threading import RLock

    from moe_inspect.capture.hook.pass_buffer import PassBuffer
    from moe_inspect.capture.hook.sink import Scope
    from moe_inspect.capture.hook.stack import Stack


def locked(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a recorder, run by one thread at a time."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return run


class DecodeStep:
    """A decode step on a CPU, as it was read: of the arguments `kwargs`, one of which is `cache`,
    that will hold `cached` once the step has run, and one the token ids, if not alone in `args`."""

    def __init__(
        self,
        call: CallInputs,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: Any,
        cached: Cached,
    ):
        self.call, self.cached = call, cached
        self.args, self.names = len(args), tuple(kwargs)
        self.shape = (args[0] if args else kwargs["input_ids"]).shape
        self.cache = ref(cache)
        self.cache_name = next(name for name, value in kwargs.items() if value is cache)


class Room(NamedTuple):
    """How many forward passes, and until when (`time.monotonic`), can be kept in a buffer before
    anything else has to be done."""

    buffer: PassBuffer
    passes: int
    until: float


class Passes(Protocol):
    """What becomes of forward passes: `HandOver` or `CountedPasses`. `number`: of the first."""

    def add_staged(self, stack: Stack, rows: Rows | CallInputs) -> None: ...
    def feed(self, stack: Stack, fed: Rows | CallInputs, keep: bool) -> None: ...
    def keep_no_more(self, stack: Stack) -> None: ...
    def end(self, fed: Sequence[Stack], number: int) -> bool: ...
    def room_for_steps(self, stack: Stack, T: int) -> Room | None: ...
    def add_steps(self, stack: Stack, fed: list[CallInputs], number: int) -> None: ...
    def resume(self, stack: Stack, fed: CallInputs, number: int) -> None: ...
    def drain_when_due(self) -> None: ...
    def count_tokens(self) -> int: ...


class DecodeSteps:
    """The steps after `first`, while there is `room`.

    fed      the inputs of those that have been kept
    current  and of the one that is running, or has failed
    busy     a step is just being begun or kept: a signal handler that asks the recorder something
             must leave them as they are
    over     no step is begun or kept any more
    end      called when there is no more room, or where a router has not seen each row once
    lock     held while these change, as another thread may ask the recorder what there is
    """

    __slots__ = (
        "_B",
        "_args",
        "_buffer",
        "_cache",
        "_cache_name",
        "_cached",
        "_end",
        "_labels",
        "_lock",
        "_most",
        "_names",
        "_scope",
        "_shape",
        "_until",
        "busy",
        "current",
        "fed",
        "over",
    )

    def __init__(
        self,
        first: DecodeStep,
        scope: Scope,
        room: Room,
        end: Callable[[], None],
        lock: RLock,
    ):
        self._args, self._names, self._shape = first.args, first.names, first.shape
        self._labels = first.call.labels
        self._cache_name, self._cache, self._cached = first.cache_name, first.cache, first.cached
        self._B, self._scope, self._end = first.call.B, scope, end
        self._buffer, self._most, self._until = room
        self.fed: list[CallInputs] = []
        self.current: CallInputs | None = None
        self.busy = self.over = False
        self._lock = lock

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Begins a forward pass, if it is the next step. Returns whether it is."""
        with self._lock:
            if self.over or self.current is not None:
                return False
            self.busy = True
            try:
                return self._begin(args, kwargs)
            finally:
                self.busy = False

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        cache, before, B = kwargs.get(self._cache_name), self._cached.rows, self._B
        if (
            len(args) != self._args
            or cache is None
            or cache is not self._cache()
            or tuple(kwargs) != self._names
            or (ids := args[0] if args else kwargs["input_ids"]) is None
            or ids.shape != self._shape
            or cache.get_seq_length() != before.length
        ):
            return False
        token_B1, mask_B1, position = copies_of(ids, kwargs, B, 1, before.length)
        after = CachedRows(before.length + 1)
        self.current = CallInputs(B, 1, B, token_B1, mask_B1, position, self._labels, before, after)
        self._scope.kept = []
        self._scope.start()
        return True

    def keep(self) -> bool:
        """Keeps the step, which has run. False where it is not kept."""
        with self._lock:
            if self.over or self.current is None:
                return not self.over
            self.busy = True
            try:
                is_kept = self._keep(self.current)
            finally:
                self.busy = False
            if not is_kept or len(self.fed) >= self._most or monotonic() > self._until:
                self._end()
            return is_kept

    def _keep(self, step: CallInputs) -> bool:
        whole = self._buffer.whole(self._scope.kept or (), self._B)
        if whole is None:
            return False
        self._buffer.keep(whole, self._B)
        self.fed.append(step)
        self.current = self._scope.kept = None
        self._cached.rows = step.after
        return True

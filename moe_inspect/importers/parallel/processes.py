"""Processes of this machine that do tasks, and what any kind of workers is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import wait
from typing import Any, Protocol

from moe_inspect.errors import MoeInspectError


class Workers(Protocol):
    """Who does tasks: processes of this machine, or the workers of a cluster. `each`: what
    function(*shared, *task) returns for each task, in order."""

    def each(
        self,
        function: Callable[..., Any],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Any]: ...


class Processes:
    """`width`: how many at once. They start with the first task, and end with the `with` block or
    with this process, however it ends."""

    def __init__(self, width: int):
        self.width = width
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def each(
        self,
        function: Callable[..., Any],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Any]:
        if self._pool is None:
            # not forked: threads of this process may hold locks
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.width, context, _begin)
        # as few as keep all at work: what they return waits in memory
        ahead = deque[Future[Any]]()
        try:
            for task in tasks:
                ahead.append(self._pool.submit(function, *shared, *task))
                if len(ahead) > self.width:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise MoeInspectError(
                "a process that parses lines was killed, often out of memory: give fewer "
                "--workers (workers=)"
            ) from None


def at_work(workers: int | Workers) -> AbstractContextManager[Workers | None]:
    """So many processes of this machine, or the workers that are given; None: this process reads
    alone."""
    if isinstance(workers, int):
        return Processes(workers) if workers > 1 else nullcontext()
    return nullcontext(workers)


def _begin() -> None:
    """In a process that begins: Ctrl-C is for its parent, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:

        def follow(sentinel: int) -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()

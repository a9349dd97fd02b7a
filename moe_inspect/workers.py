"""Workers do tasks, several at once: threads or processes of this machine; those of a cluster are
in `analysis.tasks`. Results come back in the order of their tasks, whoever does them."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from moe_inspect.errors import MoeInspectError

Result = TypeVar("Result")
Given = tuple[object, ...]  # arguments of a function


class Workers(Protocol):
    """`width`: how many tasks they do at once. `each`: what function(*shared, *task) returns for
    each task, in order; `shared` is sent once."""

    width: int

    def each(
        self, function: Callable[..., Result], shared: Given, tasks: Iterable[Given]
    ) -> Iterator[Result]: ...


def in_order(
    submit: Callable[[Given], Future[Result]], tasks: Iterable[Given], most: int
) -> Iterator[Result]:
    """The results of tasks, of which `most` are submitted at a time: what they return waits in
    memory."""
    ahead = deque[Future[Result]]()
    for task in tasks:
        ahead.append(submit(task))
        if len(ahead) >= most:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


@dataclass
class Threads:
    width: int

    def each(
        self, function: Callable[..., Result], shared: Given, tasks: Iterable[Given]
    ) -> Iterator[Result]:
        if self.width == 1:
            yield from (function(*shared, *task) for task in tasks)
            return
        with ThreadPoolExecutor(self.width) as pool:
            yield from in_order(
                lambda task: pool.submit(function, *shared, *task), tasks, self.width + 1
            )


class Processes:
    """They start with the first task, and end with the `with` block or with this process, however
    it ends. What they are given and return is pickled."""

    def __init__(self, width: int):
        self.width = width

    def __enter__(self) -> Processes:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        # not forked: threads of this process may hold locks
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.width, context, _begin)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def each(
        self, function: Callable[..., Result], shared: Given, tasks: Iterable[Given]
    ) -> Iterator[Result]:
        try:
            yield from in_order(
                lambda task: self._pool.submit(function, *shared, *task), tasks, self.width + 1
            )
        except BrokenExecutor:
            raise MoeInspectError(
                "a process that parses lines was killed, often out of memory: give fewer "
                "--workers (workers=)"
            ) from None


def _begin() -> None:
    """In a process that begins: Ctrl-C is for its parent, with which it ends."""
    import multiprocessing
    from multiprocessing.connection import wait

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:

        def follow(sentinel: int) -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()

"""Who does tasks: what all kinds of workers are, and the threads of this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol


class Workers(Protocol):
    """`width`: how many tasks they do at once. `each`: what function(*shared, *task) returns for
    each task, in order; `shared` is sent once."""

    width: int

    def each(
        self,
        function: Callable[..., Any],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Any]: ...


@dataclass
class Threads:
    width: int

    def each(
        self,
        function: Callable[..., Any],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Any]:
        if self.width == 1:
            yield from (function(*shared, *task) for task in tasks)
            return
        with ThreadPoolExecutor(self.width) as pool:
            yield from in_order(
                lambda task: pool.submit(function, *shared, *task), tasks, self.width + 1
            )


def in_order(
    submit: Callable[[tuple[Any, ...]], Any], tasks: Iterable[tuple[Any, ...]], most: int
) -> Iterator[Any]:
    """The results of tasks, of which `most` are submitted at a time."""
    ahead = deque[Any]()
    for task in tasks:
        ahead.append(submit(task))
        if len(ahead) >= most:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()

"""Work shared out to the workers of a dask.distributed cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line


def on_cluster(
    scheduler: Any, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
) -> Iterator[Any]:
    """What `function` returns for each tuple of arguments, in their order; twice as many at once as
    the cluster has threads. `scheduler`: a dask.distributed client, or its address."""
    try:
        from distributed import Client
    except ImportError:
        raise MoeInspectError(
            "counting on a cluster needs dask: pip install 'moe-inspect[dask]'"
        ) from None
    if isinstance(scheduler, str):
        try:
            client: Any = Client(scheduler, timeout="10s")
        except (OSError, TimeoutError, ValueError) as error:
            raise MoeInspectError(
                f"no dask scheduler answers at {scheduler}: {first_line(error)}"
            ) from None
    else:
        client = scheduler
    try:
        workers: Any = client.nthreads()
        most = 2 * max(1, sum(workers.values()))
        ahead: deque[Any] = deque()
        for arguments in tasks:
            ahead.append(client.submit(function, *arguments, pure=False))
            if len(ahead) >= most:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        if client is not scheduler:
            client.close()

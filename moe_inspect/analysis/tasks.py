"""A pass over a trace, as tasks: for this process, for threads of it, or for the workers of a
dask.distributed cluster (`Trace.on`). The same functions do them everywhere, and what they return
comes back in the same order: sums are the same, to the last digit.

Two ways to cut a pass: by shards, or, on a cluster, by routers: tables by token id are larger than
what they are counted from.
"""

# distributed has no types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial, reduce
from hashlib import sha256
from itertools import chain
from typing import Any, TypeVar

from moe_inspect.errors import MoeInspectError
from moe_inspect.progress import phase
from moe_inspect.text import first_line
from moe_inspect.trace.files.location import location
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.reader import Trace
from moe_inspect.workers import Threads, Workers, in_order

T = TypeVar("T")
R = TypeVar("R")
Task = tuple[object, ...]
WORTH_A_TASK = 100_000_000  # assignments; a second or more
FEWEST_RUNS, MOST_RUNS = 8, 512  # tasks of a pass, about: no more than twice as many


def workers(*traces: Trace, threads: int = 1) -> AbstractContextManager[Workers]:
    """Those of the cluster that a pass over these traces runs on, else threads of this process."""
    scheduler = next((t.scheduler for t in traces if t.scheduler is not None), None)
    if scheduler is None:
        return nullcontext(Threads(threads))
    return cluster(scheduler, traces)


def runs_of(trace: Trace, shards: int | None = None) -> list[range]:
    """Consecutive shards that one task reads, by their numbers: so many that sending what comes of
    them is little beside counting them, and that the number of tasks does not grow with the trace.
    `shards`: as many as there are of it, by default all."""
    n = trace.n_shards if shards is None else shards
    assignments = trace.n_tokens * sum(router.top_k for router in trace.routers)
    worth_sending = WORTH_A_TASK * trace.n_shards // max(1, assignments)
    size = max(1, min(worth_sending, n // FEWEST_RUNS), n // MOST_RUNS)
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def by_shard(
    trace: Trace, name: str | None, function: Callable[..., T], *arguments: object
) -> Iterator[T]:
    """function(shard, *arguments) of every shard, in order. `name`: of the phase, as progress is
    told; None where it is too short for one."""
    here = trace.scheduler is None
    runs = [range(n, n + 1) for n in range(trace.n_shards)] if here else runs_of(trace)
    return chain.from_iterable(_by_run(trace, runs, name, list[T], function, arguments))


def summed(
    trace: Trace,
    name: str | None,
    add: Callable[[T, T], T],
    function: Callable[..., T],
    *arguments: object,
) -> Iterator[T]:
    """What function(shard, *arguments) returns, added up within runs of shards, in order; the runs
    are the same here and on a cluster, so that sums of floats are too. add(total, other): may
    change `total`, and returns the sum."""
    return _by_run(trace, runs_of(trace), name, partial(reduce, add), function, arguments)


def _by_run(
    trace: Trace,
    runs: Sequence[range],
    name: str | None,
    gather: Callable[[Iterator[T]], R],
    function: Callable[..., T],
    arguments: tuple[object, ...],
) -> Iterator[R]:
    """gather(what function returns of its shards) of each run."""
    advance = phase(name, trace.n_tokens, "tokens") if name else None
    with workers(trace) as at:
        found = at.each(_of_run, (trace, gather, function, arguments), ((run,) for run in runs))
        for run, part in zip(runs, found, strict=True):
            yield part
            if advance:
                advance(sum(trace.shard(number).files.tokens for number in run))


def _of_run(
    trace: Trace,
    gather: Callable[[Iterator[T]], R],
    function: Callable[..., T],
    arguments: tuple[object, ...],
    run: range,
) -> R:
    return gather(function(trace.shard(number), *arguments) for number in run)


def shares(routers: Sequence[int], n: int) -> list[Sequence[int]]:
    """The routers in n consecutive parts of about one size."""
    return [routers[len(routers) * i // n : len(routers) * (i + 1) // n] for i in range(n)]


def by_router(
    trace: Trace,
    routers: Sequence[int],
    name: str,
    function: Callable[..., dict[int, T]],
    *arguments: object,
) -> dict[int, T]:
    """On the cluster of a trace, function(trace, routers, *arguments), which goes through all
    shards in order and returns something of each of the routers."""
    with cluster(trace.scheduler, [trace]) as at:
        parts, whole = shares(routers, min(at.width, len(routers))), dict[int, T]()
        advance = phase(name, len(routers), "routers")
        tasks = ((share, *arguments) for share in parts)
        for share, part in zip(parts, at.each(function, (trace,), tasks), strict=True):
            whole |= part
            advance(len(share))
    return whole


WAIT_S = 10  # for the scheduler to answer, and for its first worker
ALIKE = ("moe-inspect", "numpy")  # what must be of the same version everywhere


# --- the workers of a cluster, who see the traces at the same path


@contextmanager
def cluster(scheduler: Any, traces: Sequence[Trace]) -> Generator[Cluster]:
    """`scheduler`: a dask.distributed client, or its address. MoeInspectError where no scheduler
    answers, where it has no workers or workers of another version, and where it is lost."""
    try:
        from distributed import Client
        from distributed.comm.core import CommClosedError
        from distributed.scheduler import KilledWorker
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt
    except ImportError:
        raise MoeInspectError(
            "counting on a cluster needs dask: pip install 'moe-inspect[dask]'"
        ) from None
    client: Any = scheduler
    if isinstance(scheduler, str):
        try:
            # distributed asserts that the thread of a client starts within ten seconds, which a
            # busy machine may not give it
            start_failed = retry_if_exception_type(AssertionError)
            again = Retrying(retry=start_failed, stop=stop_after_attempt(3), reraise=True)
            client = again(Client, scheduler, timeout=f"{WAIT_S}s")
        except (OSError, TimeoutError, ValueError) as error:
            said = f"no dask scheduler answers at {scheduler}: {first_line(error)}"
            raise MoeInspectError(said) from None
    address = client.scheduler.address
    try:
        try:
            client.wait_for_workers(1, timeout=WAIT_S)
        except TimeoutError:
            raise MoeInspectError(f"the dask scheduler at {address} has no workers") from None
        try:
            check_versions(client.run(installed), installed())
        except ImportError as error:
            raise MoeInspectError(
                f"a worker of the dask scheduler at {address} has no moe-inspect "
                f"{installed()['moe-inspect']}: {first_line(error)}"
            ) from None
        yield Cluster(client, traces)
    except KilledWorker as error:
        raise MoeInspectError(
            f"workers of {address} died repeatedly on the same part of the trace, often out of "
            f"memory (fewer threads per worker need less): {first_line(error)}"
        ) from None
    except (CancelledError, CommClosedError) as error:
        raise MoeInspectError(
            f"the dask scheduler at {address} was lost: {first_line(error)}"
        ) from None
    finally:
        if client is not scheduler:
            client.close()


class Cluster:
    """As `workers.Threads`; `width` is the threads of all workers."""

    def __init__(self, client: Any, traces: Sequence[Trace]):
        self.client = client
        self.width = max(1, sum(client.nthreads().values()))
        self.seen = [(str(trace.path.resolve()), _identity(trace.manifest)) for trace in traces]

    def each(
        self, function: Callable[..., T], shared: tuple[object, ...], tasks: Iterable[Task]
    ) -> Iterator[T]:
        from dask import config

        # a task too: where a worker dies that has it, another makes it again
        bytes_of_shared = pickle.dumps(shared, protocol=5)
        with config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            given = self.client.submit(pickle.loads, bytes_of_shared, pure=False)
        # to all workers at once: dask would leave the tasks to the one that has it
        self.client.replicate([given])

        def submit(task: Task) -> Any:
            return self.client.submit(at_worker, self.seen, function, given, task, pure=False)

        return in_order(submit, tasks, 2 * self.width)


def at_worker(
    seen: Sequence[tuple[str, str]],
    function: Callable[..., T],
    shared: tuple[object, ...],
    task: Task,
) -> T:
    """What a worker does. `seen`: path and identity of the traces."""
    for path, identity in seen:
        _check_seen(path, identity)
    return function(*shared, *task)


@lru_cache
def _check_seen(path: str, identity: str) -> None:
    from distributed import get_worker

    me = f"the worker {get_worker().address}"
    try:
        there = _identity(read_manifest(location(path)))
    except MoeInspectError as error:
        raise MoeInspectError(
            f"{me} cannot read the trace, which every worker needs at the same path: {error}"
        ) from None
    if there != identity:
        raise MoeInspectError(f"{me} has a different trace at {path}")


def _identity(manifest: Mapping[str, object]) -> str:
    """A hash of what does not change while a trace is written."""
    kept = [manifest.get(name) for name in ("model", "routers", "corpus")]
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def installed() -> dict[str, str]:
    from importlib.metadata import distributions

    there = {package: list(distributions(name=package)) for package in ALIKE}
    return {package: found[0].version if found else "none" for package, found in there.items()}


def check_versions(at: dict[str, dict[str, str]], here: dict[str, str]) -> None:
    """MoeInspectError where a worker's versions are not those here."""
    for address, versions in at.items():
        for package, there in versions.items():
            if there != here[package]:
                raise MoeInspectError(
                    f"the worker {address} has {package} {there}, this process {here[package]}: "
                    "install the same on both"
                )

"""Cluster: the workers of a dask.distributed cluster, who see the traces at the same path."""

# distributed has no types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line
from moe_inspect.trace.files.location import location
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.reader import Trace
from moe_inspect.workers import in_order

WAIT_S = 10  # for the scheduler to answer, and for its first worker
ALIKE = ("moe-inspect", "numpy")  # what must be of the same version everywhere


@contextmanager
def cluster(scheduler: Any, traces: Sequence[Trace]) -> Generator[Cluster]:
    """`scheduler`: a dask.distributed client, or its address. MoeInspectError where no scheduler
    answers, where it has no workers or workers of another version, and where it is lost."""
    try:
        from distributed import Client
        from distributed.comm.core import CommClosedError
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise MoeInspectError(
            "counting on a cluster needs dask: pip install 'moe-inspect[dask]'"
        ) from None
    client: Any = scheduler
    if isinstance(scheduler, str):
        try:
            client = Client(scheduler, timeout=f"{WAIT_S}s")
        except (OSError, TimeoutError, ValueError) as error:
            raise MoeInspectError(
                f"no dask scheduler answers at {scheduler}: {first_line(error)}"
            ) from None
    address = client.scheduler.address
    try:
        try:
            client.wait_for_workers(1, timeout=WAIT_S)
        except TimeoutError:
            raise MoeInspectError(f"the dask scheduler at {address} has no workers") from None
        check_versions(_versions_at(client), installed())
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
        self,
        function: Callable[..., Any],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Any]:
        from dask import config

        # a task too: where a worker dies that has it, another makes it again
        bytes_of_shared = pickle.dumps(shared, protocol=5)
        with config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            given = self.client.submit(pickle.loads, bytes_of_shared, pure=False)
        # to all workers at once: dask would leave the tasks to the one that has it
        self.client.replicate([given])

        def submit(task: tuple[Any, ...]) -> Any:
            return self.client.submit(at_worker, self.seen, function, given, task, pure=False)

        return in_order(submit, tasks, 2 * self.width)


def at_worker(
    seen: Sequence[tuple[str, str]],
    function: Callable[..., Any],
    shared: tuple[Any, ...],
    task: tuple[Any, ...],
) -> Any:
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


def _identity(manifest: dict[str, Any]) -> str:
    """A hash of what does not change while a trace is written."""
    kept = [manifest.get(name) for name in ("model", "routers", "corpus")]
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def installed() -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    return {package: of(package) for package in ALIKE}


def _versions_at(client: Any) -> dict[str, dict[str, str]]:
    """By address of a worker."""
    try:
        return client.run(installed)
    except ImportError as error:
        raise MoeInspectError(
            f"a worker of the dask scheduler at {client.scheduler.address} has no moe-inspect "
            f"{installed()['moe-inspect']}: {first_line(error)}"
        ) from None


def check_versions(at: dict[str, dict[str, str]], here: dict[str, str]) -> None:
    """MoeInspectError where a worker's versions are not those here."""
    for address, versions in at.items():
        for package, there in versions.items():
            if there != here[package]:
                raise MoeInspectError(
                    f"the worker {address} has {package} {there}, this process {here[package]}: "
                    "install the same on both"
                )

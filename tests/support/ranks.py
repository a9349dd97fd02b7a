"""The processes that a torchrun would start, forked from one that has imported everything: imports
take many times what most of these runs do. Whether torchrun itself does, test_ranks tests too."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
# the model's and the trainer's own modules too, which are found by name when a model is loaded
CONTEXT.set_forkserver_preload(
    [
        "tests.support.ranks",
        "moe_inspect.making",
        "moe_inspect.capture.run",
        "moe_inspect.cli.trace",
        "torch.distributed",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    ]
)
SECONDS = 120


class Ranks:
    """`world` processes in `path`, each of which runs `module` or the program `code` with these
    arguments; their standard error in err-0, err-1, …"""

    def __init__(
        self,
        path: Path,
        world: int,
        arguments: Sequence[object],
        module: str = "moe_inspect",
        code: str = "",
    ):
        self.path = path
        # as torchrun's agent: it outlives the first rank
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[BaseProcess] = []
        for rank in range(world):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
            }
            given = [*map(str, arguments)]
            process = CONTEXT.Process(target=_run, args=(path, environment, module, code, given))
            process.start()
            self.processes.append(process)

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, number)

    def wait(self) -> list[int | None]:
        """The exit code of each; None for one that did not end by itself, and was killed."""
        until = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.signal(signal.SIGKILL)
        return codes

    @property
    def errors(self) -> str:
        """What they wrote to standard error."""
        return "".join(file.read_text() for file in sorted(self.path.glob("err-*")))


def _run(
    path: Path, environment: dict[str, object], module: str, code: str, arguments: list[str]
) -> None:
    os.chdir(path)
    os.environ.update({name: str(value) for name, value in environment.items()})
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{name}-{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(d, "w", buffering=1, closefd=False) for d in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    if code:
        exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)

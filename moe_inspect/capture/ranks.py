"""The processes of one `torchrun`, which share a corpus: batch n goes to rank n mod world. They
exchange strings through the launcher's key-value store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from moe_inspect.errors import MoeInspectError


class Ranks:
    """`rank` of `world`; 0 of 1 without a launcher, or `alone`."""

    def __init__(self, alone: bool = False) -> None:
        self.world = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.world > 1 else 0
        self._store: Any = None
        if self.world > 1:
            needed = "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
            if missing := [name for name in needed if name not in os.environ]:
                raise MoeInspectError(
                    f"WORLD_SIZE is {self.world}, but {missing[0]} is not set: start the "
                    "processes with torchrun"
                )
            from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(rendezvous("env://"))
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            self._store = PrefixStore(f"moe-inspect-{restart}", store)

    def takes(self, batch: int) -> bool:
        """Whether batch number `batch` is for this rank."""
        return batch % self.world == self.rank

    def publish(self, key: str, value: str = "") -> None:
        """Sets a key of the store."""
        if self._store is not None:
            self._store.set(key, value)

    def wait_for(self, key: str) -> str:
        """The value of a key, once a rank has published it. No timeout: the launcher ends all ranks
        when one fails. Polls, so that Ctrl-C works."""
        while not self._store.check([key]):
            time.sleep(0.05)
        return self._store.get(key).decode()

    def agree(self, key: str, decide: Callable[[], bool]) -> bool:
        """The decision of rank 0, on all ranks; where it raises a MoeInspectError all do."""
        if self.rank:
            decided, _, message = self.wait_for(key).partition(":")
            if message:
                raise MoeInspectError(message)
            return bool(int(decided))
        try:
            decided = decide()
        except MoeInspectError as error:
            self.publish(key, f":{error}")
            raise
        self.publish(key, f"{int(decided)}:")
        return decided

    def status(self, own: str) -> str:
        """The status of the whole trace: complete where all ranks are. An interrupted rank waits
        for no other."""
        if own != "complete":
            self.publish(f"closed-{self.rank}", own)
            return own
        return own if set(self.gather("closed", own)) == {own} else "interrupted"

    def gather(self, key: str, value: str) -> list[str]:
        """On rank 0 the values of all ranks, in order; on the others only their own, without
        waiting."""
        self.publish(f"{key}-{self.rank}", value)
        others = range(1, self.world) if self.rank == 0 else ()
        return [value, *(self.wait_for(f"{key}-{r}") for r in others)]

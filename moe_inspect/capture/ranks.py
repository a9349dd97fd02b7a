"""The processes of one `torchrun`, which share a corpus: batch n is for rank n mod world. They
agree through the launcher's store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from moe_inspect.errors import MoeInspectError


class Ranks:
    """`rank` of `world`; 0 of 1 where no launcher says otherwise."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.world > 1 else 0
        self._store: Any = None
        if self.world > 1:
            if missing := [
                name
                for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
                if name not in os.environ
            ]:
                raise MoeInspectError(
                    f"WORLD_SIZE is {self.world}, but {missing[0]} is not set: start the "
                    "processes with torchrun"
                )
            from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(rendezvous("env://"))
            self._store = PrefixStore(
                f"moe-inspect-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )

    def takes(self, batch: int) -> bool:
        return batch % self.world == self.rank

    def say(self, what: str, value: str = "") -> None:
        if self._store is not None:
            self._store.set(what, value)

    def hear(self, what: str) -> str:
        """What a rank said or will say. Waits for it as long as that works (the launcher ends all
        when one fails), and can be interrupted meanwhile."""
        while not self._store.check([what]):
            time.sleep(0.05)
        return self._store.get(what).decode()

    def agree(self, what: str, decide: Callable[[], bool]) -> bool:
        """What rank 0 decides; where it raises a MoeInspectError all do."""
        if self.rank:
            verdict, _, message = self.hear(what).partition(":")
            if message:
                raise MoeInspectError(message)
            return bool(int(verdict))
        try:
            decided = decide()
        except MoeInspectError as error:
            self.say(what, f":{error}")
            raise
        self.say(what, f"{int(decided)}:")
        return decided

    def status(self, own: str) -> str:
        """How the trace ended: complete where all ranks say so. One that was interrupted waits for
        nobody."""
        if own != "complete":
            self.say(f"closed-{self.rank}", own)
            return own
        return own if set(self.gather("closed", own)) == {own} else "interrupted"

    def gather(self, what: str, value: str) -> list[str]:
        """Rank 0 waits for every rank's value, the others for nothing; theirs is a list of their
        own."""
        self.say(f"{what}-{self.rank}", value)
        return (
            [value, *(self.hear(f"{what}-{r}") for r in range(1, self.world))]
            if self.rank == 0
            else [value]
        )

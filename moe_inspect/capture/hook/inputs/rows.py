"""What forward passes are fed, as it is read, and as rows.

B batch rows, S positions, T = B·S rows a router sees (padding included).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moe_inspect.trace.writer import Document


@dataclass(frozen=True)
class Rows:
    """What one forward pass is fed. `real` bool [T] is False for padding, in the order in which the
    routers see the rows; the other arrays have one entry per real row, `domain` as codes into
    `RowReader.domains`. `stack` says which stack of an encoder-decoder is fed."""

    real: np.ndarray
    token_id: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    documents: list[Document] = field(default_factory=list)
    phase: str = "prefill"
    number: int | None = None  # of the forward pass, where it was planned
    group: int | None = None  # passes of one group are committed together or not at all
    stack: str = ""

    @property
    def T(self) -> int:
        return len(self.real)

    # a plan says nothing of the shape
    B = 1
    S = T


# document, sequence and domain code of each batch row, [B] each
State = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(slots=True, eq=False)
class CachedRows:
    """What a key-value cache holds: `length` positions per row and, once the rows have been read,
    the sequences they belong to."""

    length: int
    state: State | None = None


@dataclass(slots=True, eq=False)
class Cached:
    """What a key-value cache holds now."""

    rows: CachedRows


@dataclass(slots=True, eq=False)
class CallInputs:
    """The inputs of a forward pass, copied to the host without waiting: the copies are complete
    once the pass has run."""

    B: int
    S: int
    T: int  # rows that a router sees
    token_BS: torch.Tensor | None
    mask_BS: torch.Tensor | None
    position: torch.Tensor | None  # [B, S] or [S]; None: they continue what came before
    labels: dict[str, Sequence[Any] | None]
    before: CachedRows | None  # what its cache held, or what the encoder read
    after: CachedRows
    stack: str = ""
    copied: Any = None  # the CUDA event after which the copies are complete
    order: np.ndarray | None = None  # the token b·S + s of each row; None: row b·S + s

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of its tensors."""
        return (
            self.B,
            self.S,
            *(
                t.shape if t is not None else None
                for t in (self.token_BS, self.mask_BS, self.position)
            ),
        )


def steps_at(fed: Iterable[Rows | CallInputs]) -> list[CallInputs]:
    """The first of these passes, as long as each feeds one token to each of the same sequences."""
    found: list[CallInputs] = []
    for call in fed:
        if (
            not isinstance(call, CallInputs)
            or call.S != 1
            or call.stack == "encoder"
            or call.order is not None
        ):
            break
        if not found:
            state = call.before.state if call.before is not None else None
            if state is None or len(state[0]) != call.B or call.after.length < 2:
                break
        elif call.before is not found[-1].after or call.shape != found[0].shape:
            break
        found.append(call)
    return found

"""Forward passes on their way from the rings to the writer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_inspect.capture.hook.inputs.rows import Rows
from moe_inspect.capture.hook.inputs.sequences import DRAFT
from moe_inspect.capture.hook.stack import StackPass
from moe_inspect.capture.token_loss.losses import PassLosses


class Forward(NamedTuple):
    """A forward pass on its way to the writer. `passes`: one per stack that ran; the encoder comes
    before the decoder. `losses`: of the tokens of the last stack."""

    number: int
    passes: list[StackPass]
    losses: PassLosses | None = None

    def arrived(self, wait: bool) -> bool:
        if self.losses is not None and not self.losses.complete:
            return False  # the next pass completes them
        if not all(isinstance(p.fed, Rows) or p.fed.is_settled for p in self.passes):
            return False
        return all(
            p.stack.rings is not None and p.stack.rings.is_on_host(p.start + p.fed.T, wait)
            for p in self.passes
        )


class Arrived(NamedTuple):
    """Forward passes on the host: one, or several that are one stack's consecutive decode steps.
    `rows` of each stack that ran, those of all passes."""

    forwards: list[Forward]
    rows: list[Rows]

    def continues(self, before: Arrived) -> bool:
        """Whether the two can be one batch: whole passes of one stack, of one kind."""
        if len(self.rows) > 1 or len(before.rows) > 1:
            return False
        (a,), (b,) = before.forwards[-1].passes, self.forwards[-1].passes
        (x,), (y,) = before.rows, self.rows
        return (
            a.stack is b.stack
            and a.kept == a.fed.T
            and b.kept == b.fed.T
            and x.phase == y.phase != "encode"
            and x.group == y.group
        )


def losses_of(batch: Sequence[Arrived], sizes: Sequence[int]) -> np.ndarray:
    """Losses and entropies of the tokens, float32 [2, tokens], NaN where there is none. `sizes`:
    how many tokens there are of each stack's rows."""
    found: list[np.ndarray] = []
    for arrived in batch:
        for rows in arrived.rows[:-1]:  # an encoder's
            found.append(np.full((2, len(rows.token_id)), np.nan, np.float32))
        found.append(
            np.concatenate(
                [
                    forward.losses.values()
                    if forward.losses is not None
                    else np.full((2, forward.passes[-1].fed.T), np.nan, np.float32)
                    for forward in arrived.forwards
                ],
                axis=1,
            )[:, arrived.rows[-1].real]
        )
        # what follows the last token before a rejected draft was not known when it was fed
        is_draft = arrived.rows[-1].phase_codes() == DRAFT
        found[-1][:, :-1][:, is_draft[1:] & ~is_draft[:-1]] = np.nan
    return np.concatenate([v[:, :n] for v, n in zip(found, sizes, strict=True)], axis=1)


def numbers_of(batch: Sequence[Arrived], kept: Sequence[np.ndarray]) -> np.ndarray | None:
    """The number of the forward pass that each token is of, int32; None where all are of one.
    `kept`: per pass, or consecutive steps, which rows are no padding."""
    if len(batch) == len(batch[0].forwards) == 1:
        return None
    numbers: list[int] = []
    sizes: list[int] = []
    for arrived, real in zip(batch, kept, strict=True):
        numbers += [forward.number for forward in arrived.forwards]
        sizes += real.reshape(len(arrived.forwards), -1).sum(1).tolist()
    return np.repeat(np.array(numbers, np.int32), sizes)

"""The passes of an ablation: the whole model, then without each expert, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions.ablation.below import Below
from moe_inspect.interventions.ablation.store import WHOLE, Store
from moe_inspect.interventions.held_out import HeldOut
from moe_inspect.interventions.intervene import Intervention

Progress = Callable[[int, int], None]  # (passes done, passes in all)


@dataclass
class Measured:
    """`batches`: those measured with every expert. `passes`: forward passes of this run."""

    batches: list[int]
    passes: int


def measure(
    held_out: HeldOut,
    asked: Sequence[tuple[int, int]],
    store: Store,
    most_passes: int | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measures each batch without each of the (router, expert) `asked`. With `most_passes` it stops
    before the batch that would exceed them."""
    sites = held_out.sites
    below = Below(held_out.network, [sites[r] for r in sorted({r for r, _ in asked})])
    order = sorted(asked)
    left = {
        b: [pair for pair in order if not store.has(b, *pair)] for b in range(len(held_out.batches))
    }
    total = sum(len(pairs) + 1 for pairs in left.values() if pairs)
    done = Measured([], 0)
    checked = False
    for b, pairs in left.items():
        if pairs and most_passes is not None and done.passes + len(pairs) + 1 > most_passes:
            if not done.batches:
                raise MoeInspectError(
                    f"--most-passes {most_passes} is not enough for one batch, which takes "
                    f"{len(pairs) + 1}: ask for fewer experts or layers, or allow more"
                )
            break
        if pairs:
            with below.remembered():
                whole = held_out.losses(b)
            if not checked:
                checked = True
                _check_below(below, held_out, b, pairs, whole)
            store.add(b, *WHOLE, whole.tolist())
            done.passes += 1
        for r, expert in pairs:
            dropped = Intervention(
                held_out.network, drop={sites[r].path: expert}, routers=held_out.routers
            )
            with dropped, below.skipped(sites[r]):
                store.add(b, r, expert, held_out.losses(b).tolist())
            done.passes += 1
            if progress is not None:
                progress(done.passes, total)
        done.batches.append(b)
    return done


def _check_below(
    below: Below, held_out: HeldOut, b: int, pairs: Sequence[tuple[int, int]], whole: np.ndarray
) -> None:
    """Nothing is skipped in a model whose losses would not stay the same to the bit, wherever it
    begins, and the second time too."""
    routers = sorted({r for r, _ in pairs})
    for r in [*routers, routers[-1]]:
        with below.skipped(held_out.sites[r]):
            if below.usable and not np.array_equal(held_out.losses(b), whole):
                below.usable = False

"""The routing of a trace, looked up for the tokens that a model is fed.

T rows of a forward pass, N tokens of the trace that a stack sees, K slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_inspect.capture.hook.numbering import Rows
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site
from moe_inspect.trace.reader import Trace


class DecisionReplay:
    """The decisions of `trace`, in memory, for a model with the routers `sites`.

    A sequence is recognised by its token ids when it is first fed, whole or from its beginning on,
    in any order. Of sequences with the same tokens each is used once before one is used again. In
    an encoder-decoder each stack has its own. MoeInspectError where a router of the trace has no
    counterpart, and for a sequence that is not in it."""

    def __init__(self, trace: Trace, sites: Sequence[Site]):
        if trace.counts_only:
            raise MoeInspectError(f"{trace.path} holds counts only, no decisions to replay")
        self.trace = trace
        self._router_of = _counterparts(trace, sites)
        self._routes: dict[int, tuple[Tensor, Tensor | None]] = {}
        tokens = trace.tokens()
        encoded = (tokens["phase"] == "encode").to_numpy()
        self._of = {
            stack: Sequences(
                trace.path, tokens[encoded == (stack == "encoder")] if stack else tokens
            )
            for stack in sorted({site.stack for site in sites})
        }

    @property
    def beyond(self) -> int:
        """Tokens fed behind the end of their sequence in the trace."""
        return sum(of.beyond for of in self._of.values())

    def at(self, rows: Rows) -> Tensor:
        """By row of a pass its token in the trace, int64 [T]; -1: padding, or past its end."""
        # a decoder's sequences often begin alike: it continues what its encoder read
        read = self._of["encoder"].found if rows.stack == "decoder" else {}
        found = np.full(rows.T, -1, np.int64)
        found[rows.real] = self._of[rows.stack].at(rows, read)
        return torch.from_numpy(found)

    def routes(self, r: int, time: int, at_T: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """(ids, weights) [T, K] of these tokens in the `time`-th run of the router at site r: ids
        -1 where the trace has none. None where it does not have the router."""
        router = self._router_of.get((r, time))
        if router is None:
            return None
        if router not in self._routes:
            self._routes[router] = self._load(router)
        ids_NK, weights_NK = self._routes[router]
        n_T = at_T.clamp(min=0)
        return ids_NK[n_T].long(), weights_NK[n_T] if weights_NK is not None else None

    def _load(self, router: int) -> tuple[Tensor, Tensor | None]:
        of = self.trace.routers[router]
        table = self.trace.routing(router=router).set_index("token")
        table = table.reindex(self._of[of.stack].token_N)

        def slots(name: str, none: int, kind: type[np.generic]) -> Tensor:
            columns = [table[f"{name}_{k}"].fillna(none).to_numpy(kind) for k in range(of.top_k)]
            return torch.from_numpy(np.stack(columns, 1))

        weights_NK = slots("weight", 0, np.float32) if self.trace.has_weights else None
        return slots("expert", -1, np.int32), weights_NK


def _counterparts(trace: Trace, sites: Sequence[Site]) -> dict[tuple[int, int], int]:
    """Site and run of its layer → the trace's router: by path, else by its place in its layer."""
    found: dict[tuple[int, int], int] = {}
    by_path = {router.path: n for n, router in enumerate(trace.routers)}
    for r, site in enumerate(sites):
        time, path = 0, site.path
        while path in by_path:
            found[r, time], time = by_path[path], time + 1
            path = f"{site.path} (run {time + 1})"
    if not found:
        left = [(site.layer, r) for r, site in enumerate(sites)]
        for n, router in enumerate(trace.routers):
            if first := next((at for at in left if at[0] == router.layer), None):
                left.remove(first)
                found[first[1], 0] = n
    site_of = {n: sites[r] for (r, _), n in found.items()}
    for n, router in enumerate(trace.routers):
        site = site_of.get(n)
        if site is not None and site.stack != router.stack:
            raise MoeInspectError(
                f"{router.path} of {trace.path} is in "
                f"{f'the {router.stack}' if router.stack else 'a model of one stack'}, and in "
                f"{site.stack or 'one stack'} here: a trace is replayed on the model it is of"
            )
        if site is None or site.experts != router.experts:
            has = f"{site.experts}" if site is not None else "no router there"
            raise MoeInspectError(
                f"{router.path} of {trace.path} has {router.experts} experts in layer "
                f"{router.layer}, this model {has}: a trace is replayed on the model it is of"
            )
    return found


START = 8  # tokens by which sequences are looked up that are not fed whole


class Sequences:
    """Those of the trace `path` whose `tokens` (rows of its table) one stack sees. token_N: their
    numbers in the trace. beyond: tokens fed behind the end of their sequence so far."""

    def __init__(self, path: object, tokens: pd.DataFrame):
        self._path, self.beyond = path, 0
        token_N, sequence_N = (tokens[c].to_numpy() for c in ("token", "sequence"))
        order = np.lexsort((token_N, sequence_N))
        self.token_N = token_N[order]
        self._ids_N = tokens["token_id"].to_numpy()[order]
        self._has_text = bool((self._ids_N >= 0).any())
        starts = np.flatnonzero(np.diff(sequence_N[order], prepend=-1))
        self._number = sequence_N[order][starts].tolist()
        self._bounds = [*starts.tolist(), len(order)]
        self._used = [0] * len(starts)
        # sequence that is being fed → the trace's sequence, and the position of its first token
        self._fed: dict[int, tuple[int, int]] = {}
        self._begun_by = defaultdict[bytes, list[int]](list)
        for s in range(len(starts)):
            self._begun_by[self._sequence(s)[:START].tobytes()].append(s)

    @property
    def found(self) -> dict[int, int]:
        """Sequence that is being fed → its number in the trace."""
        return {number: self._number[s] for number, (s, _) in self._fed.items()}

    def at(self, rows: Rows, read: Mapping[int, int]) -> np.ndarray:
        """By real row of a pass the place of its token, int64; -1 beyond the end of its sequence.
        `read`: sequence that is being fed → the number in the trace of what its encoder read."""
        at = np.full(len(rows.token_id), -1, np.int64)
        for number in np.unique(rows.sequence).tolist():
            of = np.flatnonzero(rows.sequence == number)
            ids, position = rows.token_id[of], rows.position[of]
            if number not in self._fed:
                self._fed[number] = self._match(ids, read.get(number)), int(position[0])
            sequence, first = self._fed[number]
            here = position - first
            start, end = self._bounds[sequence], self._bounds[sequence + 1]
            inside = (here >= 0) & (here < end - start)
            of, ids, here = of[inside], ids[inside], here[inside] + start
            if self._has_text and (wrong := np.flatnonzero(self._ids_N[here] != ids)).size:
                n = wrong[0]
                raise MoeInspectError(
                    f"position {int(here[n]) - start} of sequence {sequence} is token "
                    f"{self._ids_N[here[n]]} in {self._path}, but the model is fed {ids[n]}: only "
                    "the text of the trace can be replayed"
                )
            at[of] = here
        self.beyond += int((at < 0).sum())
        return at

    def _sequence(self, s: int) -> np.ndarray:
        return self._ids_N[self._bounds[s] : self._bounds[s + 1]]

    def _match(self, ids: np.ndarray, read: int | None) -> int:
        """The trace's sequence of these tokens, the first of one that is being fed: the whole, or
        else a beginning, of one or of the other; of several, that of the number `read`."""
        like: Sequence[int] = range(len(self._used))
        begun = self._begun_by.get(ids[:START].astype(np.int32).tobytes())
        if self._has_text and begun:
            like = begun
        elif self._has_text and len(ids) >= START:  # those that are shorter themselves
            like = [s for start, of in self._begun_by.items() if len(start) < 4 * START for s in of]

        def begins(s: int) -> bool:
            own = self._sequence(s)
            n = min(len(own), len(ids))
            return not self._has_text or bool((own[:n] == ids[:n]).all())

        found = [s for s in like if begins(s)]
        found = [s for s in found if len(self._sequence(s)) == len(ids)] or found
        if not found:
            shown = ", ".join(map(str, ids[:6].tolist()))
            raise MoeInspectError(
                f"no sequence of {self._path} begins with the {len(ids)} tokens {shown}"
                f"{' …' if len(ids) > 6 else ''} that the model is fed: only the text of the trace "
                "can be replayed, with its special tokens and sequence length"
            )
        best = min(found, key=lambda s: (self._number[s] != read, self._used[s]))
        if read is not None and self._number[best] != read and len(found) > 1:
            raise MoeInspectError(
                f"{self._path} does not state which of {len(found)} replies follows the text that "
                "the encoder has read: replies by beams cannot be replayed"
            )
        self._used[best] += 1
        return best

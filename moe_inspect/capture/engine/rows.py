"""The choices of an engine's routers in a step: kept in the forward pass, then counted and taken.

L routers, N rows of a step (padding follows them), K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.rows import (
    PHYSICALS,
    Calls,
    RouterRows,
    ShownRouter,
    TakenPass,
    Values,
    names_of,
)
from moe_inspect.errors import MoeInspectError

PLACES = "tokens", "positions"  # names of the values that a row has once, not per router
PARTS = {"": (0, 1), "logits": (2,), PHYSICALS: (3,)}  # by kind: what it records of a choice
REPLICAS, SAMPLED = "replicas", "sampled"  # names of the values that a step has once


class Load:
    """Tokens so far, and their assignments per router and expert, summed on the routers' device."""

    def __init__(self, L: int, E: int, device: torch.device):
        self.tokens = 0
        # each router has a place before and a place after its experts for slots without an expert
        self._sums = torch.zeros(L, E + 2, dtype=torch.int64, device=device)
        self._first_L11 = (torch.arange(L, device=device) * (E + 2) + 1).view(L, 1, 1)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._lock = Lock()
        self.handed_over = self.so_far()  # to the process that counts

    def add(self, ids_LNK: Tensor) -> None:
        """Count rows as they are stored: slots without an expert have −1, or an id above all."""
        place = (ids_LNK.clamp(max=self._sums.shape[1] - 2) + self._first_L11).view(-1)
        with self._lock:
            self.tokens += ids_LNK.shape[1]
            self._sums.view(-1).scatter_add_(0, place, self._one.expand(place.shape))

    def so_far(self) -> tuple[int, np.ndarray]:
        """Return the tokens, and the assignments int64 [L, E]. On a GPU these may include the next
        step."""
        with self._lock:
            tokens, sums = self.tokens, self._sums[:, 1:-1].clone()
        return tokens, sums.cpu().numpy()


class EngineRows:
    """The rows of one step at a time, of L alike routers.

    T         the most rows of a step, if they go to buffers: on a GPU, or if `compiled`
    extras    what is recorded besides ids and weights: "logits", and PHYSICALS if experts have
              replicas
    compiled  whether torch.compile may compile the routers

    The buffers are allocated here, before the engine measures how much memory is left for its
    cache, and their addresses never change: a CUDA graph repeats the writes when it is replayed.
    On a CPU the tensors that a router returns are kept until the step is over, as no engine writes
    into them (vLLM 0.32, SGLang 0.5.23)."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        E: int,
        device: torch.device,
        extras: Sequence[str] = (),
        compiled: bool = False,
    ):
        self.L, T, self.K = shape
        # as tensors on it state it: an engine may leave out the index of a GPU
        device = torch.empty(0, device=device).device
        self.E, self.device, self.kinds = E, device, ("", *extras)
        self._router = ShownRouter(device, self.K, E, E)
        routers = [self._router] * self.L
        self._rows = RouterRows(routers, range(self.L), self.kinds, torch.float16, appends=False)
        self.load = Load(self.L, E, device)
        self._choices: list[tuple[Any, ...] | None] = []
        self.forget()
        self.has_buffers = compiled or not self._rows.keeps_calls
        if self.has_buffers:
            self._rows.grow(T)
            self._keep_one()

    def _keep_one(self) -> None:
        """Keep a row that nobody takes: kernels are compiled, and compared with their references,
        before the engine measures its memory."""
        ids, logits = (torch.zeros(1, n, device=self.device) for n in (self.K, self.E))
        self.keep(0, ids.int(), ids, logits, ids.int())

    @property
    def names(self) -> list[str]:
        """Names of the values that are recorded."""
        return [name for kind in self.kinds for name in names_of(kind)]

    @property
    def bytes_per_row(self) -> int:
        """Size of a row of all routers on the host."""
        stored = ((self._router.width(n), self._router.dtype(n, torch.float16)) for n in self.names)
        return self.L * sum(width * dtype.itemsize for width, dtype in stored)

    @property
    def nbytes(self) -> int:
        """Size of the buffers."""
        return self._rows.nbytes

    # --- in the forward pass

    def keep(
        self,
        router: int,
        ids_NK: Tensor,
        weights_NK: Tensor,
        logits_NE: Tensor,
        physicals_NK: Tensor | None = None,
    ) -> None:
        """Keep a router's choice, and the replicas that serve it. Columns after the routed
        experts belong to shared experts, which are not recorded."""
        # logits that are not recorded are the engine's to free
        kept = logits_NE if "logits" in self.kinds else None
        choice = ids_NK, weights_NK, kept, physicals_NK
        if self.has_buffers:
            for kind in self.kinds:
                self._write(router, kind, self._parts(choice, kind))
        else:  # a step is put together at once, which takes less time
            self._choices[router] = choice

    def _parts(self, choice: tuple[Any, ...], kind: str) -> tuple[Tensor, ...]:
        width = self.E if kind == "logits" else self.K
        parts = (choice[n] for n in PARTS[kind])
        return tuple(v if v.shape[1] == width else v[:, :width] for v in parts)

    def _write(self, router: int, kind: str, call: tuple[Tensor, ...]) -> None:
        tape, (ids, values) = self._rows.tapes[kind][router], call if not kind else (None, *call)
        if torch.compiler.is_compiling():
            torch.ops.moe_inspect.record_in_engine(ids, values, *kernels.tape_parts(tape))
        else:
            kernels.record(tape, ids, values)

    def take_fault(self) -> Exception | None:
        """Return the exception that a compiled graph raised since the last call, if any."""
        tapes = self._rows.tapes.get("")
        return FAULTS.pop(tapes[0].enabled.data_ptr(), None) if tapes else None

    # --- after the forward pass

    def forget(self) -> None:
        """Let go of the tensors of a step."""
        self._choices = [None] * self.L

    def written(self, N: int) -> Values:
        """Return the step's N rows of each router, in the types in which they are stored. The next
        forward pass overwrites them. MoeInspectError if a router did not choose for all of them."""
        if self.has_buffers:
            if N > self._rows.P:
                raise MoeInspectError(
                    f"a forward pass of {N:,} tokens: there is room for {self._rows.P:,}"
                )
            return self._rows.written(N)
        taken = self._rows.whole(self._kept(N), N)
        if taken is None:
            raise MoeInspectError(
                f"a router did not choose {self.K} experts for each of {N} tokens of a forward pass"
            )
        return taken.values

    def _kept(self, N: int) -> Calls:
        """Return the calls of the step, without padding."""
        kept: Calls = {kind: [] for kind in self.kinds}
        for router, choice in enumerate(self._choices):
            if choice is None:
                raise MoeInspectError(f"router {router} chose no experts in a forward pass")
            for kind, calls in kept.items():
                values = self._parts(choice, kind)
                if values[0].shape[0] != N:
                    values = tuple(v[:N] for v in values)
                calls.append((router, values))
        return kept

    def take(
        self,
        values: Values,
        rows: np.ndarray | None,
        tokens: Tensor,
        positions: Tensor,
        replicas: Tensor | None,
    ) -> TakenPass:
        """Copy `written` values to the host, at the indices `rows` or all of them. `tokens`,
        `positions`: the engine's tensors, at least one value per row; `replicas`: the expert of
        each physical expert, [L, P]."""
        N = values["ids"][0].shape[1]
        places = (place[None, :N] for place in (tokens, positions))
        if not self.has_buffers:  # nothing is copied then, and the engine reuses its tensors
            places = (place_1N.clone() for place_1N in places)
        values = values | {name: [place_1N] for name, place_1N in zip(PLACES, places, strict=True)}
        if rows is not None:
            index = self.on_device(rows)
            values = {name: [t.index_select(1, index) for t in of] for name, of in values.items()}
        if replicas is not None:
            values[REPLICAS] = [replicas.to(torch.int16, copy=True)]
        return self.copy(values)

    def copy(self, values: Values) -> TakenPass:
        """Copy tensors to the host."""
        return self._rows.copy(values)

    def on_device(self, indices: np.ndarray) -> Tensor:
        index = torch.from_numpy(indices)
        if self.device.type == "cpu":
            return index
        return index.pin_memory().to(self.device, non_blocking=True)


# --- in compiled graphs

FAULTS: dict[int, Exception] = {}  # by the address of `enabled` of the tapes


def _record_in_engine(ids: Tensor | None, values: Tensor | None, *tape: Any) -> None:
    """Record without ending the engine's forward pass if that fails."""
    try:
        kernels.record_parts(ids, values, *tape)
    except Exception as error:
        FAULTS[tape[3].data_ptr()] = error


kernels.register_operator(
    "record_in_engine", "Tensor? ids, Tensor? weights", 0, _record_in_engine, lambda *_: None
)
SCHEMA = str(torch.ops.moe_inspect.record_in_engine.default._schema)

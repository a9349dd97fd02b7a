"""Traced ÷ untraced: the time of a model's forward passes with and without a recorder, in turn.

B rows, S positions.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_inspect.capture.feed import cache_of, last_logits
from moe_inspect.capture.options import RecordOptions
from moe_inspect.capture.recorder import Recorder
from moe_inspect.errors import MoeInspectError

CAPTURES = ("tap", "dispatch", "counts only")
ROUNDS = 9  # in each, every capture has its turn; the least of them counts
BLOCK_SECONDS = 0.1  # of passes that are timed together
MOST_STEPS = 64
PROMPT = 16  # positions before the first decoded one

Step = Callable[[], None]


@dataclass(frozen=True)
class Phase:
    """`start` prepares and returns what runs a forward pass of `tokens` tokens."""

    name: str
    tokens: int
    start: Callable[[], Step]


@dataclass(frozen=True)
class Seconds:
    """Of one forward pass: by the clock, and of the processor, all threads together."""

    wall: float
    cpu: float


def phases(network: Any, ids_N: Tensor) -> list[Phase]:
    """Prefill of 4 × 512 tokens, or as many as the model takes, and decode steps of 1 and of 8
    rows. `ids_N`: a text."""
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None) or 512
    S = min(512, longest)
    found = [prefill_phase(network, _rows(ids_N, 4, S))]
    if not getattr(network.config, "is_encoder_decoder", False):
        found += [decode_phase(network, _rows(ids_N, B, min(PROMPT, S // 2))) for B in (1, 8)]
    return found


def _rows(ids_N: Tensor, B: int, S: int) -> Tensor:
    return ids_N.repeat(-(-B * S // len(ids_N)))[: B * S].view(B, S)


def prefill_phase(network: Any, ids_BS: Tensor) -> Phase:
    """Forward passes over the same rows."""
    ids_BS = ids_BS.to(next(network.parameters()).device)
    options = {"use_cache": False, **last_logits(network)}
    if getattr(network.config, "is_encoder_decoder", False):
        options = {"decoder_input_ids": ids_BS}

    def start() -> Step:
        return lambda: network(input_ids=ids_BS, **options)

    B, S = ids_BS.shape
    return Phase(f"prefill, {B} × {S}", B * S, start)


def decode_phase(network: Any, prompt_BS: Tensor) -> Phase:
    """Steps of one token per row, each with the cache of the step before."""
    prompt_BS = prompt_BS.to(next(network.parameters()).device)
    B = len(prompt_BS)
    options = {"use_cache": True, **last_logits(network)}

    def start() -> Step:
        kept = cache_of(network, network(input_ids=prompt_BS, **options))

        def step() -> None:
            nonlocal kept
            kept = cache_of(network, network(input_ids=prompt_BS[:, -1:], **options, **kept))

        return step

    return Phase(f"decode, {B} × 1", B, start)


def timed(network: Any, phase: Phase, captures: Sequence[str] = CAPTURES) -> dict[str, Seconds]:
    """ "untraced", and each capture → time per forward pass: the least of ROUNDS, in turn. Not in
    it is what is written when a trace is closed. On a CPU one thread computes."""
    found: dict[str, list[Seconds]] = {name: [] for name in ("untraced", *captures)}
    with torch.inference_mode(), _one_thread(), _out_of_memory(network):
        steps = _steps_of(network, phase)
        for _ in range(ROUNDS):
            for name, times in found.items():
                with _recording(network, name):
                    times.append(_block(network, phase, steps))
    return {
        name: Seconds(min(t.wall for t in times), min(t.cpu for t in times))
        for name, times in found.items()
    }


def _steps_of(network: Any, phase: Phase) -> int:
    """How many passes fill a block."""
    _block(network, phase, 1)
    once = _block(network, phase, 1).wall
    return max(1, min(MOST_STEPS, math.ceil(BLOCK_SECONDS / once)))


def _block(network: Any, phase: Phase, steps: int) -> Seconds:
    """Time per pass of `steps` passes, after one that is not timed: the first of a recording is
    staged. On a GPU, which runs behind the host, all of them together; on a CPU the
    least of them."""
    step, wait = phase.start(), _wait_for(network)
    step()
    if any(p.device.type == "cuda" for p in network.parameters()):
        wait()
        together = _elapsed(lambda: [*(step() for _ in range(steps)), wait()])
        return Seconds(together.wall / steps, together.cpu / steps)
    times = [_elapsed(step) for _ in range(steps)]
    return Seconds(min(t.wall for t in times), min(t.cpu for t in times))


def _elapsed(call: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def _wait_for(network: Any) -> Callable[[], None]:
    """Waits until every GPU of the model has done its work."""
    gpus = {p.device for p in network.parameters() if p.device.type == "cuda"}

    def wait() -> None:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)

    return wait


@contextmanager
def _recording(network: Any, capture: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as scratch, _recorder(network, capture, Path(scratch)):
        yield


def _recorder(network: Any, capture: str, scratch: Path) -> Any:
    if capture == "untraced":
        return nullcontext()
    if capture == "counts only":
        return Recorder(network, options=RecordOptions(counts_only=True))
    return Recorder(network, scratch / "trace", RecordOptions(capture=capture))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch: idle threads spin, and count as CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _out_of_memory(network: Any) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MoeInspectError(
            f"{next(network.parameters()).device} is out of memory in a forward pass: give another "
            "--device or --dtype"
        ) from error

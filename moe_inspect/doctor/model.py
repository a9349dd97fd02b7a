"""What can be recorded of one model, and traced ÷ untraced on it: the time of its forward passes
with and without a recorder, in turn.

B rows, S positions.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_inspect.capture.feed import cache_of, last_logits
from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.selfcheck import summary
from moe_inspect.capture.mode import mode_of
from moe_inspect.capture.options import RecordOptions
from moe_inspect.capture.recorder import Recorder
from moe_inspect.demo import CORPUS_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from moe_inspect.model.load import load_config, load_model, load_tokenizer
from moe_inspect.model.routers import Site, top_k_of
from moe_inspect.progress import phase

CAPTURES = ("tap", "dispatch", "counts only")
ROUNDS = 9  # in each, every capture has its turn; the least of them counts
BLOCK_SECONDS = 0.1  # of passes that are timed together
MOST_STEPS = 64
PROMPT = 16  # positions before the first decoded one

Step = Callable[[], object]


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

    B, S = ids_BS.shape
    step = partial(network, input_ids=ids_BS, **options)
    return Phase(f"prefill, {B} × {S}", B * S, lambda: step)


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
    with tempfile.TemporaryDirectory() as scratch:
        if capture == "untraced":
            recorder = nullcontext()
        elif capture == "counts only":
            recorder = Recorder(network, options=RecordOptions(counts_only=True))
        else:
            recorder = Recorder(network, Path(scratch) / "trace", RecordOptions(capture=capture))
        with recorder:
            yield


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


def examined(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_init: int | None = None,
    measure: bool = True,
) -> dict[str, Any]:
    """Facts about the model, the captures that are possible on it, and with `measure` what each
    costs."""
    phase("loading the model")
    of_hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config, tokenizer = load_config(name, **of_hub), load_tokenizer(name, **of_hub)
    network = load_model(
        name, config, device=device, dtype=dtype, random_init=random_init, **of_hub
    )
    sites = find_routers(network)
    possible = captures_of(network, sites)
    facts = {
        **_facts(name, network, sites),
        "auto": mode_of(network, sites, "auto"),
        "captures": possible,
        "selfcheck": {},
    }
    if not measure:
        return facts
    able = [row["capture"] for row in possible if row["possible"] and row["capture"] != "logits"]
    text = "\n".join(file.read_text("utf-8") for file in sorted(CORPUS_DIR.rglob("*.txt")))
    ids_N = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    listed = phases(network, ids_N)
    advance, speed = phase("measuring the model", len(listed), "shapes"), list[Any]()
    for shape in listed:
        speed.append(_speed(network, shape, able))
        advance(1)
    return {**facts, "speed": speed, "selfcheck": summary(kernels.SELF_CHECK.found)}


def _facts(name: str, network: Any, sites: Sequence[Site]) -> dict[str, Any]:
    parameter = next(network.parameters())
    return {
        "id": None if Path(name).exists() else name,  # a path may name its owner
        "class": type(network).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "routers": len(sites),
        "experts": max(site.experts for site in sites),
        "top_k": max(top_k_of(site, network) for site in sites),
    }


def captures_of(network: Any, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """{capture, possible, note} of each capture."""
    rows = [("tap", ""), ("dispatch", ""), ("counts only", ""), ("logits", "")]
    try:
        mode_of(network, sites, "dispatch")
    except MoeInspectError as error:
        rows[1] = ("dispatch", str(error))
    if any(site.logits_module is None for site in sites):
        rows[3] = ("logits", "the model does not expose its router logits")
    return [{"capture": name, "possible": not note, "note": note} for name, note in rows]


def _speed(network: Any, phase: Phase, captures: Sequence[str]) -> dict[str, Any]:
    """Seconds per pass, untraced and traced, and the ratios; or why they were not measured."""
    shape = {"phase": phase.name, "tokens": phase.tokens}
    try:
        found = timed(network, phase, captures)
    except MoeInspectError as error:
        return {**shape, "not_measured": str(error)}
    untraced = found["untraced"]
    return {
        **shape,
        "seconds": {name: asdict(seconds) for name, seconds in found.items()},
        "traced_over_untraced": {
            name: {"wall": untraced.wall / s.wall, "cpu": untraced.cpu / s.cpu}
            for name, s in found.items()
            if name != "untraced"
        },
    }

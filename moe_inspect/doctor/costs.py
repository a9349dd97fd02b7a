"""What recording costs: the host, whatever the model (a launch of each Triton kernel, a router call
on the CPU, a copy to pinned memory); and one model, traced ÷ untraced, in turn.

B rows, S positions, T tokens, K slots, E experts, H hidden width.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.feed import cache_of, last_logits
from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.experts import mode_of
from moe_inspect.capture.hook.ring import PAGE_ROWS, PassShape, Rings
from moe_inspect.capture.hook.selfcheck import Variant, device_name, summary, wrong_with
from moe_inspect.capture.options import RecordOptions
from moe_inspect.capture.recorder import Recorder
from moe_inspect.demo import CORPUS_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from moe_inspect.model.load import load_config, load_model, load_tokenizer
from moe_inspect.model.routers import Site, top_k_of
from moe_inspect.progress import phase, tracked
from moe_inspect.reporting.verdict.findings import finding
from moe_inspect.training.audit import audit_loss
from moe_inspect.training.passes import coefficient_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAPTURES = {
    "tap": RecordOptions(capture="tap"),
    "dispatch": RecordOptions(capture="dispatch"),
    "counts only": RecordOptions(counts_only=True),
}
ROUNDS = 9  # in each, every capture has its turn; the least of them counts
BLOCK_SECONDS = 0.1  # of passes that are timed together
MOST_STEPS = 64
AUDITED = 128  # positions of each row on which a balancing loss is audited
PROMPT = 16  # positions before the first decoded one

Step = Callable[[], object]
Facts = dict[str, Any]  # plain JSON values


class Phase(NamedTuple):
    """`start` prepares and returns what runs a forward pass of `tokens` tokens."""

    name: str
    tokens: int
    start: Callable[[], Step]


class Seconds(NamedTuple):
    """Of one forward pass: by the clock, and of the processor, all threads together."""

    wall: float
    cpu: float


def phases(network: PreTrainedModel, ids_N: Tensor) -> list[Phase]:
    """Prefill of 4 × 512 tokens, or what the model takes, and decode of 1 and 8 rows of a text."""
    S = _positions(network)

    def rows(B: int, S: int) -> Tensor:
        return ids_N.repeat(-(-B * S // len(ids_N)))[: B * S].view(B, S)

    found = [prefill_phase(network, rows(4, S))]
    if not getattr(network.config, "is_encoder_decoder", False):
        found += [decode_phase(network, rows(B, min(PROMPT, S // 2))) for B in (1, 8)]
    return found


def _positions(network: PreTrainedModel) -> int:
    """That it takes, 512 at most."""
    config = network.config.get_text_config()
    return min(512, getattr(config, "max_position_embeddings", None) or 512)


def prefill_phase(network: PreTrainedModel, ids_BS: Tensor) -> Phase:
    """Forward passes over the same rows."""
    ids_BS = ids_BS.to(network.device)
    options = {"use_cache": False, **last_logits(network)}
    if getattr(network.config, "is_encoder_decoder", False):
        options = {"decoder_input_ids": ids_BS}
    B, S = ids_BS.shape
    step = partial(network, input_ids=ids_BS, **options)
    return Phase(f"prefill, {B} × {S}", B * S, lambda: step)


def decode_phase(network: PreTrainedModel, prompt_BS: Tensor) -> Phase:
    """Steps of one token per row, each with the cache of the step before."""
    prompt_BS, B = prompt_BS.to(network.device), len(prompt_BS)
    options = {"use_cache": True, **last_logits(network)}

    def start() -> Step:
        kept = cache_of(network, network(input_ids=prompt_BS, **options))

        def step() -> None:
            nonlocal kept
            kept = cache_of(network, network(input_ids=prompt_BS[:, -1:], **options, **kept))

        return step

    return Phase(f"decode, {B} × 1", B, start)


def timed(
    network: PreTrainedModel, phase: Phase, captures: Iterable[str] = CAPTURES
) -> dict[str, Seconds]:
    """ "untraced", and each capture → the least time per forward pass, as in `rounds`."""
    found = rounds(network, phase, captures)
    return {name: _least(times) for name, times in found.items()}


def rounds(
    network: PreTrainedModel, phase: Phase, captures: Iterable[str] = CAPTURES
) -> dict[str, list[Seconds]]:
    """ "untraced", and each capture → time per forward pass in each of ROUNDS, in turn. Not in it
    is what is written when a trace is closed. On a CPU one thread computes."""
    found = {name: list[Seconds]() for name in ("untraced", *captures)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # idle threads spin, and count as CPU time
    try:
        with torch.inference_mode():
            _block(network, phase, 1)
            once = _block(network, phase, 1).wall
            steps = max(1, min(MOST_STEPS, math.ceil(BLOCK_SECONDS / once)))
            for _ in range(ROUNDS):
                for name, times in found.items():
                    with _recording(network, name):
                        times.append(_block(network, phase, steps))
    except torch.OutOfMemoryError as error:
        raise MoeInspectError(
            f"{network.device} is out of memory in a forward pass: give another --device or --dtype"
        ) from error
    finally:
        torch.set_num_threads(threads)
    return found


def _block(network: PreTrainedModel, phase: Phase, steps: int) -> Seconds:
    """Time per pass of `steps` passes, after the first, which a recording stages: the least of them
    on a CPU; on a GPU, which runs behind the host, all of them together."""
    step = phase.start()
    step()
    gpus = {p.device for p in network.parameters() if p.device.type == "cuda"}
    if not gpus:
        return _least([_elapsed(step) for _ in range(steps)])

    def wait() -> None:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)

    wait()
    together = _elapsed(lambda: [*(step() for _ in range(steps)), wait()])
    return Seconds(together.wall / steps, together.cpu / steps)


def _least(times: Sequence[Seconds]) -> Seconds:
    return Seconds(*map(min, zip(*times, strict=True)))


def _elapsed(call: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


@contextmanager
def _recording(network: PreTrainedModel, capture: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as recording:
        if (options := CAPTURES.get(capture)) is not None:  # of "untraced" there are none
            path = None if options.counts_only else Path(scratch) / "trace"
            recording.enter_context(Recorder(network, path, options))
        yield


def examined(name: str, measure: bool = True, **options: Any) -> Facts:
    """The model, its captures, and with `measure` their costs. `options`: of `load_model`."""
    phase("loading the model")
    of_hub = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    config, tokenizer = load_config(name, **of_hub), load_tokenizer(name, **of_hub)
    network = load_model(name, config, **options)
    sites = find_routers(network)
    possible = captures_of(network, sites)
    parameter = next(network.parameters())
    facts: Facts = {
        "id": None if Path(name).exists() else name,  # a path may name its owner
        "class": type(network).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "routers": len(sites),
        "experts": max(site.experts for site in sites),
        "top_k": max(top_k_of(site, network) for site in sites),
        "auto": mode_of(network, sites, "auto"),
        "captures": possible,
        "selfcheck": {},
    }
    if not measure:
        return facts
    able = [row["capture"] for row in possible if row["possible"] and row["capture"] != "logits"]
    text = "\n".join(file.read_text("utf-8") for file in sorted(CORPUS_DIR.rglob("*.txt")))
    ids_N = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    shapes = tracked(phases(network, ids_N), "measuring the model", "shapes")
    speed = [speed_of(network, shape, able) for shape in shapes]
    facts |= {"speed": speed, "selfcheck": summary(kernels.SELF_CHECK.found)}
    if coefficient_of(network) is not None:
        phase("auditing the balancing loss")
        facts["balancing_loss"] = loss_findings(network, ids_N)
    return facts


def loss_findings(network: PreTrainedModel, ids_N: Tensor) -> list[Facts]:
    """{kind, severity, text} of what `audit_loss` finds on four stretches of the text."""
    S = min(AUDITED, len(ids_N) // 4, _positions(network))
    starts = [n * (len(ids_N) // 4) for n in range(4)]
    ids_BS = torch.stack([ids_N[start : start + S] for start in starts]).to(network.device)
    batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    if getattr(network.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids_BS
    try:
        found = audit_loss(network, batch).findings
    except MoeInspectError as error:
        found = [finding("loss_unknown", "note", f"Not audited: {error}")]
    except torch.OutOfMemoryError:
        why = f"{network.device} is out of memory: give another --device or --dtype"
        found = [finding("loss_unknown", "note", f"Not audited: {why}")]
    return [{"kind": of.kind, "severity": of.severity, "text": of.text} for of in found]


def captures_of(network: PreTrainedModel, sites: list[Site]) -> list[Facts]:
    """{capture, possible, note} of each capture."""
    notes = dict.fromkeys((*CAPTURES, "logits"), "")
    try:
        mode_of(network, sites, "dispatch")
    except MoeInspectError as error:
        notes["dispatch"] = str(error)
    if any(site.logits_module is None for site in sites):
        notes["logits"] = "the model does not expose its router logits"
    return [{"capture": n, "possible": not note, "note": note} for n, note in notes.items()]


def speed_of(network: PreTrainedModel, phase: Phase, captures: Sequence[str]) -> Facts:
    """Seconds per pass, untraced and traced, and the ratios; or why they were not measured."""
    shape = {"phase": phase.name, "tokens": phase.tokens}
    try:
        found = timed(network, phase, captures)
    except MoeInspectError as error:
        return {**shape, "not_measured": str(error)}
    seconds = {name: of._asdict() for name, of in found.items()}
    wall, cpu = found.pop("untraced")
    ratios = {name: {"wall": wall / of.wall, "cpu": cpu / of.cpu} for name, of in found.items()}
    return {**shape, "seconds": seconds, "traced_over_untraced": ratios}


# --- what recording costs the host, whatever the model

SHAPES = ((64, 8), (256, 8))  # E, K
LAUNCHES = 200  # the queue of a GPU holds more
REPEATS = 5
COPY_BYTES = 64 << 20
LAYERS = 24


def gpus() -> list[torch.device]:
    """Where the kernels run."""
    count = 0 if kernels.triton is None else torch.cuda.device_count()
    return [torch.device("cuda", n) for n in range(count)]


def selfchecks_of(device: torch.device) -> Iterator[Facts]:
    """Each kernel on a GPU, checked now. `wrong`: None, or what is wrong, by variant."""
    for kernel in ("record", "dispatch", "combine"):
        variants = [v for E, K in SHAPES for v in _variants(kernel, device, E, K)]
        began = time.perf_counter()
        found = {str(v): wrong_with(kernels, v, by_torch=False) for v in variants}
        yield {
            "device": device_name(device),
            "kernel": kernel,
            "variants": len(variants),
            "ms": (time.perf_counter() - began) * 1e3,
            "wrong": {name: wrong for name, wrong in found.items() if wrong} or None,
        }


def _variants(kernel: str, device: torch.device, E: int, K: int) -> Iterator[Variant]:
    """Those of a bfloat16 model."""
    of = partial(Variant, kernel, device, E, K, torch.int64, torch.bfloat16)
    if kernel == "record":
        yield from (of(torch.bfloat16, PAGE_ROWS["cuda"], launches=n) for n in (1, 2))
    elif kernel == "dispatch":
        for slots in (64, 2048, 4096 * K):  # in 1, 1, 2 or 3 launches
            launches, block = kernels.dispatch_plan(slots, E)
            yield of(torch.bfloat16, PAGE_ROWS["cuda"], launches=launches, block=block)
    else:
        of = partial(of, y=torch.bfloat16, out=torch.bfloat16)
        yield of(torch.bfloat16, PAGE_ROWS["cuda"])
        for norms, columns in ((False, 0), (True, kernels.measuring_columns(2048))):
            yield of(None, 0, grouped=True, norms=norms, columns=columns)


def calls(device: torch.device) -> dict[str, Step]:
    """What the hooks call on a GPU, with a decode step's 8 tokens or, in several launches, 8192."""
    E, K, H = 64, 8, 2048
    tape = Rings(PassShape([(device, K, E)], [0]), torch.bfloat16, 8192).tapes[""][0]

    def choice(T: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, E, (T, K), device=device)
        return ids, torch.rand(T, K, device=device).to(torch.bfloat16)

    def dispatch(T: int, launches: int) -> Step:
        ids, weights = choice(T)
        return lambda: kernels.dispatch_triton(ids, weights, E, tape, launches=launches)

    ids, weights = choice(8)
    y_SH = torch.rand(8 * K, H, device=device).to(torch.bfloat16)
    return {
        "record": lambda: kernels.record_triton(tape, ids, weights),
        "dispatch + record, 1 launch": dispatch(8, 1),
        "dispatch + record, 2 launches": dispatch(8192, 2),
        "dispatch + record, 3 launches": dispatch(8192, 3),
        "combine": lambda: kernels.combine_triton(y_SH, ids, weights, None, torch.bfloat16, E),
    }


def measured() -> Facts:
    """Microseconds per launch by kernel, on the first GPU, and per router call on the CPU by
    capture; bytes per second of a copy. What needs a GPU is empty or None without one."""
    return {
        "record_on_cpu_us": _record_on_cpu(),
        "launch_us": {
            name: min(_host_us(call, device) for _ in range(REPEATS))
            for device in gpus()[:1]
            for name, call in calls(device).items()
        },
        "copy_bytes_per_s": _copy_bandwidth(),
    }


def _host_us(call: Step, device: torch.device) -> float:
    call()
    torch.cuda.synchronize(device)
    took = _elapsed(lambda: [call() for _ in range(LAUNCHES)]).wall
    torch.cuda.synchronize(device)
    return took / LAUNCHES * 1e6


def _record_on_cpu() -> dict[str, list[float]]:
    """Capture → µs of CPU time per router call, in a decode step of many narrow layers: quartiles
    of the rounds, each beside its untraced passes."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: Facts = {
        **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
        **dict.fromkeys(("moe_intermediate_size", "head_dim", "num_experts"), 16),
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 8},
        **{"num_hidden_layers": LAYERS, "vocab_size": 256, "pad_token_id": 0},
    }
    network = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()
    found = rounds(network, decode_phase(network, torch.arange(16).view(1, 16)))
    untraced = found.pop("untraced")
    quartiles = dict[str, list[float]]()
    for name, times in found.items():
        beyond = [of.cpu - none.cpu for of, none in zip(times, untraced, strict=True)]
        quartiles[name] = np.quantile(np.array(beyond) / LAYERS * 1e6, [0.25, 0.5, 0.75]).tolist()
    return quartiles


def _copy_bandwidth() -> float | None:
    """Bytes per second from the GPU to pinned memory; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)

    def copy() -> None:
        host.copy_(device, non_blocking=True)
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return COPY_BYTES / min(_elapsed(copy).wall for _ in range(REPEATS))

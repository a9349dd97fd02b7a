"""Recorder: attaches to a model, sees every router's choice in every forward pass, writes the trace, detaches (always).

T rows a router sees (padding included), K slots, E experts.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from moe_inspect.capture import experts as experts_implementation
from moe_inspect.capture.counts import DeviceCounts
from moe_inspect.capture.models import config_record, vocabulary_table
from moe_inspect.capture.ring import Page, Ring
from moe_inspect.capture.routers import Site, choice_among, find_routers, logits_among
from moe_inspect.capture.rows import RowReader, Rows
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import schema
from moe_inspect.trace.reader import read_manifest, refuse_while_written
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import SHARD_TOKENS, ResumePoint, RoutedBatch, TraceWriter, clear_trace, refuse_unless_trace

CAPTURES = ("auto", "dispatch", "tap")


class Recorder:
    """Records every forward pass of `model` within the `with` block: `with record(model, "runs/a", tokenizer=tok): …`.

    Each batch row is a sequence of its own document, unless `documents` and `domains` (one value a batch row) say
    otherwise, here for every forward pass or with the recorder's `label` for the next; `attention_mask` is honoured, a reset
    of `position_ids` starts a new sequence, and a forward pass with a key-value cache goes on with its rows' sequences.
    What the model executes is what is recorded: `generate` feeds padding to rows that have ended, and its beams are rows
    like others.

    tokenizer     its vocabulary goes into the trace
    capture       "dispatch": our experts implementation routes and records; "tap": the model's own is left alone and its
                  calls are watched; "auto": dispatch where the model would run the stock grouped_mm on a GPU
    layers        only these block indices
    weights, logits     whether the gate weights, the router logits are recorded
    counts_only   keeps only counts on the device ([routers, domains, experts]); with `every=N` of each N-th forward pass.
                  `path` may be None then, and the recorder's `balance()` gives the table
    overwrite     replaces a trace at `path`; without it an existing one is refused

    `resume`, `manifest` and `shard_tokens` are for who plans the batches (`trace_model`).

    Raises MoeInspectError for a dense model, a place that cannot be written, and, in a forward pass, where a router has not
    seen every token exactly once."""

    def __init__(
        self,
        model: Any,
        path: str | Path | None = None,
        *,
        tokenizer: Any = None,
        capture: str = "auto",
        layers: Sequence[int] | None = None,
        weights: bool = True,
        logits: bool = False,
        counts_only: bool = False,
        every: int = 1,
        documents: Sequence[Any] | None = None,
        domains: Sequence[str] | None = None,
        overwrite: bool = False,
        resume: ResumePoint | None = None,
        manifest: dict[str, Any] | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ):
        if capture not in CAPTURES:
            raise MoeInspectError(f"no capture {capture!r}: choose from {', '.join(CAPTURES)}")
        if path is None and not counts_only:
            raise MoeInspectError("record needs a path for the trace (only counts_only=True works without)")
        if every != 1 and not counts_only:
            raise MoeInspectError("every=N samples counts: give counts_only=True with it")
        if not isinstance(resume, ResumePoint | None):
            raise MoeInspectError("only trace_model can resume: it knows which batch comes next")
        if counts_only and logits:
            raise MoeInspectError("counts_only keeps no logits: drop one of the two")
        self.model, self.path, self.tokenizer = model, Path(path) if path is not None else None, tokenizer
        self.weights, self.logits, self.counts_only, self.every = weights, logits, counts_only, every
        self.shard_tokens, self.resume, self.overwrite, self._extra = shard_tokens, resume, overwrite, manifest or {}
        self.sites = self._chosen(find_routers(model), layers)
        self.mode = self._mode(capture)
        if logits and any(s.logits_module is None for s in self.sites):
            raise MoeInspectError(f"{type(model).__name__} does not show its router logits: trace without --logits")
        if self.path is not None and resume is None:
            check_directory(self.path, overwrite)
        self.routers: list[Router] = []
        self.writer: TraceWriter | None = None
        self.tokens = 0
        self.reader = RowReader(documents, domains)
        self._planned: Rows | None = None
        self._entered = False
        self._forwards = resume.next_batch if resume else 0
        self._stack = ExitStack()
        self._staged: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] | None = {}
        self._staged_logits: dict[int, list[torch.Tensor]] = {}
        self._rings: dict[torch.device, Ring] = {}
        self._ring_of: list[tuple[Ring, int]] = []
        self._counts: DeviceCounts | None = None
        self._current: Rows | None = None
        self._leaving: list[tuple[int, Rows]] = []
        self._logit_rows: list[int] = []
        self._seen: list[int] = [0] * len(self.sites)

    # --- attach and detach

    def __enter__(self) -> Recorder:
        if self._entered:
            raise MoeInspectError("this recording is over: call record again for another")
        self._entered = True
        try:
            self._attach()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _attach(self) -> None:
        def keep(hook: Any) -> None:
            self._stack.callback(hook.remove)

        keep(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        keep(self.model.register_forward_hook(self._after))
        for r, site in enumerate(self.sites):
            if site.adapter is not None:
                keep(site.module.register_forward_hook(self._adapted(r, site.adapter.choice)))
            elif self.mode == "tap":
                keep(site.module.register_forward_pre_hook(self._tapped(r), with_kwargs=True))
            if self.logits and site.logits_module is not None:
                keep(site.logits_module.register_forward_hook(self._logits_seen(r, site)))
        if self.mode == "dispatch":
            self._take_over()

    def _take_over(self) -> None:
        if any(hasattr(site.module, experts_implementation.SINK) for site in self.sites):
            raise MoeInspectError("this model is being recorded with dispatch already: record it a second time with tap")
        experts_implementation.register()
        self._stack.callback(self.model.set_experts_implementation, self.model.get_experts_implementation())
        self.model.set_experts_implementation(experts_implementation.NAME)
        for r, site in enumerate(self.sites):
            if site.adapter is None:
                setattr(site.module, experts_implementation.SINK, self._sink(r))
                self._stack.callback(delattr, site.module, experts_implementation.SINK)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._stack.close()
            if kind is None:
                self._drain(everything=True)
            # an interrupt may have cut a hand-over short: what is still in the ring is left out, so that no batch is missing
            # between others, and --resume feeds it again
            self._flush_counts()
        finally:
            if self.writer is not None:
                self.writer.close("complete" if kind is None else "interrupted", quiet=kind is not None)

    def _mode(self, capture: str) -> str:
        on_interface = all(hasattr(s.module, "is_transposed") and hasattr(s.module, "has_gate") for s in self.sites if s.adapter is None)
        can = on_interface and any(s.adapter is None for s in self.sites) and hasattr(self.model, "set_experts_implementation")
        if capture == "dispatch" and not can:
            raise MoeInspectError(f"{type(self.model).__name__} is not on transformers' experts interface: use --capture tap")
        if capture != "auto":
            return capture
        stock = can and set(self.model.get_experts_implementation().values()) == {"grouped_mm"}
        return "dispatch" if stock and next(self.model.parameters()).is_cuda else "tap"

    def _chosen(self, sites: list[Site], layers: Sequence[int] | None) -> list[Site]:
        if layers is None:
            return sites
        unknown = sorted(set(layers) - {s.layer for s in sites})
        if unknown:
            raise MoeInspectError(f"no router in layer {unknown[0]}: the MoE layers are {', '.join(str(s.layer) for s in sites)}")
        return [s for s in sites if s.layer in set(layers)]

    # --- what the hooks see

    def label(self, *, documents: Sequence[Any] | None = None, domains: Sequence[str] | None = None) -> None:
        """The document and the domain of each batch row of the next forward pass."""
        self.reader.label(documents, domains)

    def expect(self, rows: Rows) -> None:
        """What the next forward pass is fed, from who planned it."""
        self._planned = rows

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = self._planned or self.reader.read(args, kwargs)
        self._planned = None
        self._seen = [0] * len(self.sites)
        self._logit_rows = [0] * len(self.sites)
        self._staged_logits = {}
        if self._staged is not None:
            self._staged = {}
        elif self._counts is not None:
            if self._forwards % self.every == 0:
                self._counts.begin(self._current, len(self.reader.domains))
        else:
            self._drain()
            for ring in self._rings.values():
                ring.begin(len(self._current.real))

    def _sink(self, r: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def sink(ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
            if self._current is not None:  # outside the model's own forward: a recomputation, and not recorded twice
                self._write(r, ids_TK.detach(), weights_TK.detach())

        return sink

    def _write(self, r: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        row, self._seen[r] = self._seen[r], self._seen[r] + len(ids_TK)
        if self._staged is not None:
            self._staged.setdefault(r, []).append((ids_TK.clone(), weights_TK.clone()))
        elif self._counts is not None:
            if self._forwards % self.every == 0:
                self._counts.add(r, row, ids_TK, weights_TK)
        else:
            ring, local = self._ring_of[r]
            ring.write(local, ids_TK, weights_TK)

    def _tapped(self, r: int) -> Callable[..., None]:
        sink = self._sink(r)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            choice = choice_among([*args, *kwargs.values()])
            if choice is not None:  # else the completeness check names the module
                sink(*choice)

        return hook

    def _adapted(self, r: int, adapter: Callable[..., Any]) -> Callable[..., None]:
        sink = self._sink(r)
        return lambda module, args, output: sink(*adapter(module, output))

    def _logits_seen(self, r: int, site: Site) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            logits_TE = logits_among(output, site)
            if self._current is None or logits_TE is None:  # the completeness check speaks of missing ones
                return
            row, self._logit_rows[r] = self._logit_rows[r], self._logit_rows[r] + len(logits_TE)
            if self._staged is not None:
                self._staged_logits.setdefault(r, []).append(logits_TE.clone())
            else:
                ring, local = self._ring_of[r]
                ring.write_logits(local, row, logits_TE)

        return hook

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rows, self._current = self._current, None
        assert rows is not None
        self._check_complete(len(rows.real))
        if self._staged is not None:
            self._begin_with(rows)
        if self._counts is not None:
            if self._forwards % self.every == 0:
                self._counts.end(rows, self._forwards)
                if self._counts.tokens >= self.shard_tokens:
                    self._flush_counts()
        else:
            for ring in self._rings.values():
                ring.end()
            self._leaving.append((self._forwards, rows))
            self._drain(everything=all(not ring.on_gpu for ring in self._rings.values()))
        self.reader.confirm(output)
        self._forwards += 1
        self.tokens += int(rows.real.sum())

    def _check_complete(self, T: int) -> None:
        """Every router must have seen every token exactly once, or the trace would be silently wrong."""
        for site, seen, logits in zip(self.sites, self._seen, self._logit_rows, strict=True):
            if seen != T:
                raise MoeInspectError(
                    f"{site.path} routed {seen} rows in a forward pass of {T}: this model's routing cannot be seen "
                    "(fused experts, or a layer that runs several times)"
                )
            if self.logits and logits != T:
                raise MoeInspectError(f"{site.path} showed logits of {logits} rows in a forward pass of {T}: trace without --logits")

    # --- the first forward pass says what the pages and the table look like

    def _begin_with(self, rows: Rows) -> None:
        """Top-k, dtypes and devices are what the first forward pass showed, not what a config claims. Its decisions were
        kept aside (`_staged`), and are written now."""
        staged, self._staged = self._staged, None
        assert staged is not None
        first = [staged[r][0] for r in range(len(self.sites))]
        self.routers = [
            Router(s.layer, s.path.split(".", 1)[-1], s.path, s.experts, ids.shape[1], s.scoring, s.shared_experts)
            for s, (ids, _) in zip(self.sites, first, strict=True)
        ]
        for r, logits in self._staged_logits.items():
            self._refuse_probabilities(r, logits[0])
        bf16 = all(w.dtype == torch.bfloat16 for _, w in first)
        if self.path is not None:
            self.writer = self._open_writer("bfloat16" if bf16 else "float16")
        if self.counts_only:
            self._counts = DeviceCounts(self.routers, [ids.device for ids, _ in first], self.weights)
            self._counts.begin(rows, len(self.reader.domains))
        else:
            self._make_rings([ids.device for ids, _ in first], torch.bfloat16 if bf16 else torch.float16, len(rows.real))
        self._seen = [0] * len(self.sites)
        for r in range(len(self.sites)):
            for ids, weights in staged[r]:
                self._write(r, ids, weights)
            row = 0
            for logits in self._staged_logits.get(r, []):
                ring, local = self._ring_of[r]
                ring.write_logits(local, row, logits)
                row += len(logits)
        self._staged_logits = {}

    def _refuse_probabilities(self, r: int, logits_TE: torch.Tensor) -> None:
        values = logits_TE.float()
        if bool((values >= 0).all()) and torch.allclose(values.sum(1), torch.ones(len(values), device=values.device), atol=1e-2):
            raise MoeInspectError(f"{self.sites[r].path} shows probabilities where its family declares logits: trace without --logits")

    def _make_rings(self, devices: list[torch.device], weight_dtype: torch.dtype, T: int) -> None:
        self._ring_of = [None] * len(self.sites)  # type: ignore[list-item]
        for device in dict.fromkeys(devices):
            local = [r for r, d in enumerate(devices) if d == device]
            ring = Ring(
                device,
                [self.routers[r].top_k for r in local],
                [self.routers[r].experts for r in local],
                weight_dtype if self.weights else None,
                self.logits,
            )
            ring.begin(T)
            self._rings[device] = ring
            for n, r in enumerate(local):
                self._ring_of[r] = (ring, n)

    def _open_writer(self, weight_dtype: str) -> TraceWriter:
        assert self.path is not None
        if self.resume is None:
            check_directory(self.path, self.overwrite)  # another recording may have begun there meanwhile
            if self.overwrite and (self.path / schema.MANIFEST).exists():
                clear_trace(self.path)
        text = self.model.config.get_text_config()
        manifest = {
            "model": {"id": getattr(self.model.config, "_name_or_path", ""), "revision": None, "class": type(self.model).__name__},
            **self._extra,
        }
        manifest["model"]["config"] = config_record(self.model.config)
        manifest["capture"] = {**capture_facts(self.model, self.mode), "weight_dtype": weight_dtype if self.weights else None}
        vocabulary: pa.Table | None = None
        if self.tokenizer is not None:
            vocabulary = vocabulary_table(self.tokenizer, getattr(text, "vocab_size", 0) or 0)
        return TraceWriter(
            self.path,
            manifest,
            self.routers,
            weights=self.weights,
            logits=self.logits,
            counts_only=self.counts_only,
            vocabulary=vocabulary,
            resume=self.resume,
            shard_tokens=self.shard_tokens,
        )

    # --- from pages to the writer

    def _drain(self, everything: bool = False) -> None:
        """Hands the pages that have arrived to the writer; waits for one where the ring is full."""
        while self._leaving:
            rings = list(self._rings.values())
            wait = everything or any(ring.full for ring in rings)
            if not all(ring.arrived(wait) for ring in rings):
                return
            number, rows = self._leaving[0]
            pages = [ring.oldest() for ring in rings]
            page_of = {id(ring): page for ring, page in zip(rings, pages, strict=True)}
            self._hand_over(number, rows, [(page_of[id(ring)], local) for ring, local in self._ring_of])
            for ring in rings:
                ring.take()
            self._leaving.pop(0)

    def _hand_over(self, number: int, rows: Rows, pages: list[tuple[Page, int]]) -> None:
        keep = None if rows.real.all() else np.flatnonzero(rows.real)
        every = range(len(self.sites))
        assert self.writer is not None
        self.writer.write(
            RoutedBatch(
                number,
                rows.token_id,
                rows.document,
                rows.sequence,
                rows.position,
                rows.domain,
                list(self.reader.domains),
                ids=[_rows_of(*pages[r], "ids", keep) for r in every],
                weights=[_rows_of(*pages[r], "weights", keep) for r in every] if self.weights else None,
                logits=[_rows_of(*pages[r], "logits", keep) for r in every] if self.logits else None,
                documents=rows.documents,
                phase=rows.phase,
            )
        )

    def _flush_counts(self) -> None:
        if self._counts is not None and self.writer is not None and self._counts.tokens:
            self.writer.write(self._counts.take(list(self.reader.domains)))

    def balance(self, all_ranks: bool = False) -> Any:
        """The balance table of what has been counted since the recording began (`counts_only=True`); with `all_ranks`
        summed over the processes of torch.distributed."""
        if self._counts is None:
            raise MoeInspectError("balance() reads counts on the device: record with counts_only=True, after a forward pass")
        from moe_inspect.analysis.aggregate import Counts, RouterCounts
        from moe_inspect.report.tables import balance_of

        load, tokens = self._counts.totals(all_ranks)
        counts = Counts(self.routers, tuple(range(len(self.routers))), [""], [("", 0)], np.array([tokens]), counts_only=True)
        for r, load_E in enumerate(load):
            counts.of[r] = RouterCounts(load_E[None], load_E[None] * 0, None)
        return balance_of(counts)


record = Recorder  # the public name: `with moe_inspect.record(model, path): …`


def _rows_of(page: Page, r: int, kind: str, keep: np.ndarray | None) -> np.ndarray:
    """A copy of the rows that are no padding; the page may be written again afterwards."""
    rows = page.of(kind, r)
    assert rows is not None
    if rows.dtype == torch.bfloat16:  # numpy has none; float32 holds it exactly
        bits = rows.view(torch.int16).numpy()
        bits = bits[keep] if keep is not None else bits
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    values = rows.numpy()
    values = values[keep] if keep is not None else values.copy()
    return values.view(np.uint16) if values.dtype == np.int16 else values


def capture_facts(model: Any, mode: str) -> dict[str, Any]:
    """Who recorded what with which versions: what the manifest says of the capture."""
    import transformers

    from moe_inspect.capture.kernels import triton

    parameter = next(model.parameters())
    return {
        "mode": mode,
        "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": {
            "moe-inspect": _own_version(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": triton.__version__ if triton is not None else None,
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "pid": os.getpid(),
        "process_start": schema.process_start(os.getpid()),
        "host": socket.gethostname(),
    }


def _own_version() -> str:
    from importlib.metadata import version

    return version("moe-inspect")


def check_directory(path: Path, overwrite: bool) -> None:
    """Sees to it that a new trace can be written at `path`, or refuses: an existing trace is replaced only with `overwrite` (when the first
    forward pass is over, not before), anything else never."""
    try:
        if path.exists() and not path.is_dir():
            raise MoeInspectError(f"{path} is a file: give a directory for the trace")
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                kind = "a trace" if (path / schema.MANIFEST).exists() else "something"
                raise MoeInspectError(
                    f"there is {kind} at {path}: choose another place, or replace a trace with --overwrite (overwrite=True), "
                    "or go on with it by --resume"
                )
            refuse_unless_trace(path)
            if (manifest := _readable_manifest(path)) is not None:
                refuse_while_written(path, manifest)
        new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{schema.MANIFEST}.tmp"
        probe.touch()
        probe.unlink()
        if new:  # nothing is left behind where no trace comes of it
            path.rmdir()
    except OSError as error:
        raise MoeInspectError(f"cannot write {path}: {error.strerror}") from None


def _readable_manifest(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path)
    except MoeInspectError:  # damaged, or of another format: it can be replaced, and nobody is writing it
        return None

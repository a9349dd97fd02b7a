"""The settings of a trace: fields of frozen dataclasses, and keywords of the public functions
`trace_model`, `trace_engine` and `record`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.spec import RouterSpec

if TYPE_CHECKING:
    from moe_inspect.capture.hook.inputs.arguments import InputsOf


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """The corpus and how it is fed, and which layers are recorded.

    data               files, folders, quoted globs, fsspec URLs, each optionally behind DOMAIN=;
                       default: the bundled corpus
    text_field         field of .jsonl, .csv and .parquet rows that holds the text
    domain_field       field that holds the domain; None: "domain", if present
    max_tokens         stop after this many tokens
    max_length         split longer documents; None: what fits the model and an engine, at most 2048
    batch_tokens       tokens per forward pass, padding included
    special_tokens     add the tokenizer's special tokens (<s> …) to each text
    text               record which token each is; without, token ids are -1 and there is no
                       vocabulary
    generate           decode N tokens after each document
    temperature, seed  of sampling; temperature 0 is greedy
    revision           branch, tag or commit on the hub
    trust_remote_code  allow code from the model's repository
    layers             record only these block indices; None: all
    resume             continue an interrupted trace of the same corpus, model and options
    overwrite          replace an existing trace
    commit_every       seconds after which what was recorded is committed early, for those who read
                       the trace while it is written; None: when a shard is full
    """

    data: Sequence[str] = ()
    text_field: str = "text"
    domain_field: str | None = None
    max_tokens: int | None = None
    max_length: int | None = None
    batch_tokens: int = 8192
    special_tokens: bool = True
    text: bool = True
    generate: int = 0
    temperature: float = 0.0
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    layers: Sequence[int] | None = None
    resume: bool = False
    overwrite: bool = False
    commit_every: float | None = None


@dataclass(frozen=True, kw_only=True)
class TraceOptions(CorpusOptions):
    """Settings of `trace_model`: those of the corpus (`CorpusOptions`), and

    capture      "dispatch": replace the experts implementation by one that records; "tap": record
                 the calls of the model's own; "auto": dispatch where the model would run the stock
                 grouped_mm on a GPU, else tap
    device       "auto" (cuda where there is one), "cpu", "cuda:1", …
    device_map   spread the model over devices: "auto", "balanced", … (accelerate)
    dtype        "float32", "bfloat16", "float16"; "auto": as stored in the checkpoint
    random_init  initialise the weights with this seed instead of reading them: the untrained
                 baseline
    dequantize   dequantise MXFP4, FP8 or compressed-tensors weights while reading them
    weights      record the gate weights
    logits       record the router logits
    output_norms, output_peaks
                 record how large each expert's output is before the gate weight: its Euclidean
                 norm, its largest |value|. Needs dispatch, which "auto" then takes
    token_loss   record the loss of predicting each token's successor in its sequence, and the
                 entropy of that prediction
    counts_only  record only counts by layer, domain and expert
    routers      the routers of a custom model, as `RouterSpec`s
    loader       loads a model that is not transformers': a function, called with the model's name
                 if it takes an argument, that returns (model, tokenizer) or (model, tokenizer,
                 forward), `forward(model, ids)` → logits for a model that takes more than token ids
    """

    capture: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    random_init: int | None = None
    dequantize: bool = False
    weights: bool = True
    logits: bool = False
    output_norms: bool = False
    output_peaks: bool = False
    token_loss: bool = False
    counts_only: bool = False
    routers: Sequence[RouterSpec] | None = None
    loader: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Settings of a recorder; `moe_inspect.record` describes them."""

    capture: str = "auto"
    layers: Sequence[int] | None = None
    weights: bool = True
    logits: bool = False
    output_norms: bool = False
    output_peaks: bool = False
    token_loss: bool = False
    counts_only: bool = False
    every: int = 1
    flush_steps: int | None = None
    overwrite: bool = False
    drop: bool = False
    ring_tokens: int | None = None
    commit_every: float | None = None
    text: bool = True
    routers: Sequence[RouterSpec] | None = None
    inputs: InputsOf | None = None
    discover: bool = False

    @property
    def specs(self) -> Sequence[RouterSpec] | None:
        """Of the routers to look for; None: those that are known."""
        return () if self.discover else self.routers

    @property
    def extras(self) -> tuple[str, ...]:
        """What is recorded of a decision beside its choice, of `schema.EXTRAS`."""
        from moe_inspect.trace.schema import EXTRAS  # which needs pyarrow

        return tuple(name for name, extra in EXTRAS.items() if getattr(self, extra.option))

    @property
    def of_outputs(self) -> bool:
        """Whether some of it is of what the experts return."""
        return self.extras not in ((), ("logits",))

    @property
    def takes_graphs(self) -> bool:
        """Whether passes can be recorded that a CUDA graph replays."""
        return not self.counts_only and not self.token_loss

    def check(self, writes: bool) -> None:
        """MoeInspectError for options that contradict each other. `writes`: there is a path."""
        if not writes and not self.counts_only:
            raise MoeInspectError(
                "record needs a path for the trace (only counts_only=True works without)"
            )
        if self.every != 1 and not self.counts_only:
            raise MoeInspectError("every=N samples counts: give counts_only=True with it")
        if self.flush_steps is not None:
            if not writes or not self.counts_only:
                raise MoeInspectError(
                    "flush_steps commits counts to a trace: give a path and counts_only=True"
                )
            if self.flush_steps < 1:
                raise MoeInspectError(
                    f"flush_steps is {self.flush_steps}: give a number of passes, 1 or more"
                )
            if self.commit_every is not None:
                raise MoeInspectError(
                    "flush_steps and commit_every both set when counts are committed: give one"
                )
        if self.counts_only and (self.extras or self.token_loss):
            kind = "output norms or peaks" if self.extras else "token losses"
            kind = "logits" if self.logits else kind
            raise MoeInspectError(f"counts_only keeps no {kind}: drop one of the two")
        if self.discover and (self.routers is not None or self.extras):
            raise MoeInspectError(
                "discover=True finds routers itself, and records neither logits nor outputs"
            )


@dataclass(frozen=True, kw_only=True)
class EngineOptions(CorpusOptions):
    """Settings of `trace_engine`: those of the corpus (`CorpusOptions`), and

    concurrency  sequences in flight at once
    timeout_s    total time per request, from connecting to the last byte; then it is retried
    api_key      sent as a bearer token; never stored
    """

    concurrency: int = 8
    timeout_s: float = 600.0
    api_key: str | None = field(default=None, repr=False)


# The same names and types as keywords, for type checkers (a test compares the two).


class CorpusKeywords(TypedDict, total=False):
    data: Sequence[str]
    text_field: str
    domain_field: str | None
    max_tokens: int | None
    max_length: int | None
    batch_tokens: int
    special_tokens: bool
    text: bool
    generate: int
    temperature: float
    seed: int
    revision: str | None
    trust_remote_code: bool
    layers: Sequence[int] | None
    resume: bool
    overwrite: bool
    commit_every: float | None


class TraceKeywords(CorpusKeywords, total=False):
    capture: str
    device: str
    device_map: str | None
    dtype: str
    random_init: int | None
    dequantize: bool
    weights: bool
    logits: bool
    output_norms: bool
    output_peaks: bool
    token_loss: bool
    counts_only: bool
    routers: Sequence[RouterSpec] | None
    loader: Callable[..., Any] | None


class EngineKeywords(CorpusKeywords, total=False):
    concurrency: int
    timeout_s: float
    api_key: str | None

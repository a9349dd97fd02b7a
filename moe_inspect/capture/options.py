"""The settings of a trace, each declared once: its name, type, default and what it does. They are
fields of frozen dataclasses, keywords of `trace_model` and `record`, options of
`moe-inspect trace`, and what the documentation of all these lists."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, get_type_hints

from moe_inspect.errors import MoeInspectError, check_whole
from moe_inspect.model.custom.spec import RouterSpec

# (args, kwargs) of the model's call → any of `hook.arguments.KEYS`
InputsOf = Callable[[tuple[Any, ...], dict[str, Any]], Mapping[str, Any]]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
T = TypeVar("T")


class Setting(NamedTuple):
    """What is said of a setting: `help` by the command line, and by the documentation of the API,
    which adds `more`. `panel`: its title in --help, where it is not its group's."""

    help: str
    metavar: str | None = None
    min: float | None = None
    panel: str | None = None
    more: str = ""


def setting(default: Any, *said: Any, **more: Any) -> Any:
    """A field of a dataclass, with what is said of it: as `Setting` takes it."""
    return field(default=default, metadata={"option": Setting(*said, **more)})


def documented(options: type | None = None) -> Callable[[T], T]:
    """Puts what is said of these settings, by default its own, in the place of "{options}" in a
    docstring."""

    def add(subject: T) -> T:
        of: Any = options or subject
        types, listed = get_type_hints(of, include_extras=True), {}
        for each in fields(of):
            about = each.metadata.get("option") or types[each.name].__metadata__[0]
            listed[each.name] = f"{about.help} {about.more}"
        width = max(map(len, listed)) + 1
        wrap = textwrap.TextWrapper(96, subsequent_indent=" " * width, break_on_hyphens=False)
        rows = [wrap.fill(f"{name:{width}}{text.strip()}") for name, text in listed.items()]
        said = textwrap.indent("\n".join(rows), "    ")
        subject.__doc__ = (subject.__doc__ or "").replace("    {options}", said)
        return subject

    return add


BatchTokens = Annotated[int, Setting("Tokens per forward pass, padding included.", "N", 1)]
Device = Annotated[str, Setting("auto, cpu, cuda, cuda:1, …", "DEVICE", panel="Model")]
OfDtype = Annotated[
    Dtype, Setting("auto (as stored), float32, bfloat16 or float16.", panel="Model")
]
Revision = Annotated[
    str | None, Setting("Branch, tag or commit on the hub.", "REVISION", panel="Model")
]
TrustRemoteCode = Annotated[bool, Setting("Run code from the model's repository.", panel="Model")]
RandomInit = Annotated[
    int | None,
    Setting(
        "Initialise the weights at random with this seed: the untrained baseline.",
        "SEED",
        panel="Model",
    ),
]
Text = Annotated[
    bool,
    Setting(
        "Record which token each is. Without it, the trace is smaller but not anonymous: routes "
        "alone reveal most of the text (arXiv:2602.04105).",
        panel="Record",
        more="Token ids are -1 then, and there is no vocabulary.",
    ),
]
Resume = Annotated[
    bool, Setting("Resume an interrupted trace of the same corpus, model and options.")
]
Capture = Annotated[
    Literal["auto", "dispatch", "tap"],
    Setting(
        "tap: record the calls of the model's own experts; dispatch: run and record moe-inspect's "
        "experts; auto: dispatch where the model would run the stock grouped_mm on a GPU, else "
        "tap.",
        panel="Model",
    ),
]
Routers = Annotated[
    Sequence[RouterSpec] | None,
    Setting(
        "Where the routers are and how their choices are read, by `RouterSpec`s; by default they "
        "are found, and where none is known, the calls of `probe` in the first forward pass show "
        "them. An empty list: the probes alone."
    ),
]


@dataclass(frozen=True, kw_only=True)
class TextFields:
    """The text that is fed to a model."""

    data: Sequence[str] = setting(
        (),
        "A .txt, .jsonl, .csv or .parquet file, a folder (subfolders are domains), a quoted "
        "glob, or a URL (hf:// s3:// …). Default: the bundled corpus.",
        "[DOMAIN=]SRC",
    )
    text_field: str = setting("text", "The field that holds the text.", "FIELD")
    domain_field: str | None = setting(
        None, 'The field that holds the domain (default: "domain", if present).', "FIELD"
    )
    max_tokens: int | None = setting(None, "Stop after this many tokens.", "N", 1)
    max_length: int | None = setting(
        None, "Split longer documents (default: as the model takes them, at most 2048).", "N", 1
    )
    batch_tokens: BatchTokens = 8192


@dataclass(frozen=True, kw_only=True)
class FedFields(TextFields):
    """The text, how it goes on, and whether the trace says which token each is."""

    special_tokens: bool = setting(True, "Add the tokenizer's special tokens to each text (<s> …).")
    text: Text = True
    generate: int = setting(
        0,
        "Continue each document by N tokens, decoded one at a time, and trace them too; "
        "an encoder-decoder decodes them after its start token.",
        "N",
        0,
        "Decoding",
    )
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", min=0, panel="Decoding")
    seed: int = setting(0, "Seed of the sampling.", panel="Decoding")


@dataclass(frozen=True, kw_only=True)
class ModelFields:
    """How a model is loaded."""

    device: Device = "auto"
    device_map: str | None = setting(
        None, "Spread the model over devices: auto, balanced, … (needs accelerate).", "MAP"
    )
    dtype: OfDtype = "auto"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    dequantize: bool = setting(
        False, "Dequantise MXFP4, FP8 or compressed-tensors weights while reading them."
    )
    random_init: RandomInit = None


@dataclass(frozen=True, kw_only=True)
class RecordedFields:
    """What is recorded."""

    weights: bool = setting(True, "Record the gate weights.")
    logits: bool = setting(False, "Record the router logits too.")
    output_norms: bool = setting(
        False,
        "Record the norm of each expert's output for its token (with --capture dispatch).",
        more="It is the Euclidean norm before the gate weight. It needs dispatch, which "
        '"auto" then selects, also on a CPU.',
    )
    counts_only: bool = setting(
        False,
        "Record counts by layer, domain and expert instead of decisions.",
        more="The `balance()` of a recorder returns the balance table at any time.",
    )
    by_document: bool = setting(
        False,
        "With --counts-only: counts of each document instead of each domain.",
        more="A document is fed whole, and nothing is generated from it.",
    )

    @property
    def extras(self) -> tuple[str, ...]:
        """What is recorded of a decision beside its choice, of `schema.EXTRAS`."""
        from moe_inspect.trace.schema import EXTRAS  # which needs pyarrow

        return tuple(name for name, extra in EXTRAS.items() if getattr(self, extra.option))


@dataclass(frozen=True, kw_only=True)
class WrittenFields:
    """What of a trace is written, and how."""

    layers: Sequence[int] | None = setting(None, "Record only these block indices.")
    overwrite: bool = setting(False, "Replace an existing trace, which is refused otherwise.")
    commit_every: float | None = setting(
        None,
        "Commit at this interval, in seconds, to read the trace while it is written "
        "(`moe-inspect watch`). By default a shard is committed at 65,536 tokens or 60 seconds. "
        "`moe-inspect merge` joins small shards.",
    )


@documented()
@dataclass(frozen=True, kw_only=True)
class TraceOptions(FedFields, WrittenFields, ModelFields, RecordedFields):
    """Settings of `trace_model`.

    {options}
    """

    resume: Resume = False
    capture: Capture = "auto"
    routers: Routers = None
    loader: Callable[..., Any] | None = setting(
        None,
        "Loads a model that is not transformers': a function, called with the model's name if "
        "it takes an argument, that returns (model, tokenizer) or (model, tokenizer, forward), "
        "`forward(model, ids)` → logits for a model that takes more than token ids.",
    )


@dataclass(frozen=True, kw_only=True)
class RecordOptions(RecordedFields, WrittenFields):
    """Settings of a recorder."""

    capture: Capture = "auto"
    every: int = setting(1, "With `counts_only`: count every N-th forward pass.")
    flush_steps: int | None = setting(
        None,
        "With `counts_only` and a path: commit the counts every N counted passes, to read the "
        "trace while it is written; each commit is one step of `windows` and `drift`. By "
        "default they are committed every 65,536 tokens.",
    )
    drop: bool = setting(
        False, "If the writer cannot keep up, drop forward passes and count them, do not wait."
    )
    ring_tokens: int | None = setting(
        None,
        "Rows of the largest forward pass to allocate device memory for. By default the buffer "
        "grows as needed, which it cannot once CUDA graphs write into it.",
    )
    text: Text = True
    routers: Routers = None
    inputs: InputsOf | None = setting(
        None,
        "(args, kwargs) of the model's forward → a dict of what it is fed: `input_ids` (int "
        "[B, S], or [S] for one packed row), `position_ids`, `attention_mask` (true for "
        "tokens, false for padding), `documents` and `domains` (a label for each row), "
        "`sequences` (a value for each row, or [B, S]: which sequence each token goes on "
        "with), any of them. By default the arguments' names tell.",
    )

    def check(self, writes: bool) -> None:
        """MoeInspectError for options that contradict each other. `writes`: there is a path."""
        if not writes and not self.counts_only:
            raise MoeInspectError(
                "record needs a path for the trace (only counts_only=True works without)"
            )
        check_whole("every", self.every, 1)
        if self.every != 1 and not self.counts_only:
            raise MoeInspectError("every=N samples counts: give counts_only=True with it")
        if self.flush_steps is not None:
            if not writes or not self.counts_only:
                raise MoeInspectError(
                    "flush_steps commits counts to a trace: give a path and counts_only=True"
                )
            check_whole("flush_steps", self.flush_steps, 1)
            if self.commit_every is not None:
                raise MoeInspectError(
                    "flush_steps and commit_every both set when counts are committed: give one"
                )
        if self.counts_only and self.extras:
            kind = "logits" if self.logits else "output norms"
            raise MoeInspectError(f"counts_only keeps no {kind}: drop one of the two")
        if self.by_document and not (self.counts_only and writes):
            raise MoeInspectError(
                "by_document is how counts are written: give a path and counts_only=True with it"
            )
        if self.by_document and (self.every != 1 or self.flush_steps is not None):
            raise MoeInspectError(
                "by_document counts every pass, and commits whole documents: leave out every and "
                "flush_steps"
            )


# The same names and types as keywords, for type checkers (a test compares the two).


class RecordedKeywords(TypedDict, total=False):
    weights: bool
    logits: bool
    output_norms: bool
    counts_only: bool
    by_document: bool
    capture: Literal["auto", "dispatch", "tap"]
    layers: Sequence[int] | None
    overwrite: bool
    commit_every: float | None
    text: bool
    routers: Sequence[RouterSpec] | None


class RecordKeywords(RecordedKeywords, total=False):
    every: int
    flush_steps: int | None
    drop: bool
    ring_tokens: int | None
    inputs: InputsOf | None


class TraceKeywords(RecordedKeywords, total=False):
    data: Sequence[str]
    text_field: str
    domain_field: str | None
    max_tokens: int | None
    max_length: int | None
    batch_tokens: int
    special_tokens: bool
    generate: int
    temperature: float
    seed: int
    revision: str | None
    trust_remote_code: bool
    resume: bool
    device: str
    device_map: str | None
    dtype: Dtype
    random_init: int | None
    dequantize: bool
    loader: Callable[..., Any] | None

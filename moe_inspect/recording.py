"""`record`, `intervene` and `ablate`: the functions that work on a model. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from moe_inspect.capture.options import (
    InputsOf,
    RecordKeywords,
    RecordOptions,
    TraceKeywords,
    TraceOptions,
    documented,
)

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.capture.counted import Totals
    from moe_inspect.capture.recorder import Recorder
    from moe_inspect.interventions.ablation import Ablation
    from moe_inspect.interventions.intervene import Intervention
    from moe_inspect.model.custom.spec import RouterSpec
    from moe_inspect.public import Trace


@documented(RecordOptions)
def record(
    model: Any,
    path: str | Path | None = None,
    *,
    tokenizer: Any = None,
    documents: Sequence[Any] | None = None,
    domains: Sequence[str] | None = None,
    **options: Unpack[RecordKeywords],
) -> Recorder:
    """Records every forward pass of `model` within a `with` block as a trace at `path`:

        with moe_inspect.record(model, "runs/a", tokenizer=tokenizer) as recorder:
            model(**batch)

    Each batch row is a sequence of its own document unless `documents` and `domains` (one value per
    batch row) say otherwise: here for every forward pass, or with `recorder.label` for the next
    one. `attention_mask` is honoured, a gap or a reset in `position_ids` starts a new sequence, and
    a forward pass with a key-value cache continues the sequences of its rows. What the model
    executes is what is recorded: `generate` feeds padding to rows that have ended, and beams are
    rows like any other. Drafts that were fed and rejected (assisted decoding) get the phase
    "draft". For an encoder-decoder the tokens of both stacks are recorded (those of the encoder in
    phase "encode"), each with its own mask: labels padded with -100 are tokens to a decoder that
    gets no `decoder_attention_mask`.

    model        any MoE, torch.compile'd or not, also within a training loop: of transformers, of a
                 training framework, or one's own with `probe` in its forward or with `routers`
    path         directory of the trace; may be None with `counts_only`
    tokenizer    its vocabulary is written into the trace
    documents    document of each batch row, any hashable value
    domains      domain label of each batch row

    {options}

    To record a CUDA graph that is replayed by hand: record two forward passes of its shape (the
    first shows what there is to record, the second loads the kernels), capture the graph in a third
    one, then call `recorder.step` before each replay.

    Raises MoeInspectError for a dense model, for a path that cannot be written, and in a forward
    pass where a router has not seen every token exactly once."""
    from moe_inspect.capture.recorder import Recorder

    return Recorder(
        model,
        path,
        RecordOptions(**options),
        tokenizer=tokenizer,
        documents=documents,
        domains=domains,
        balance_of=_balance_table,
    )


def intervene(
    model: Any,
    *,
    drop: Mapping[int | str, int | Iterable[int]] | None = None,
    force: Mapping[int | str, int | Iterable[int]] | None = None,
    replay: Trace | str | Path | None = None,
    shuffle: int | None = None,
    routers: Sequence[RouterSpec] | None = None,
    inputs: InputsOf | None = None,
) -> Intervention:
    """Changes which experts the tokens of `model` go to within a `with` block:

        with moe_inspect.intervene(model, drop={3: [5]}) as done:
            model(**batch)
        done.table()  # what was changed, a row per router

    Afterwards, also after an exception, the model is as it was. A recording within the block, or
    around it, records what was executed.

    model    any MoE that `record` can record, except by probes
    drop     layer → experts that no token goes to (if a layer has two routers, give a router's
             module path instead of the layer). If the router logits are visible (in nearly every
             family), the router chooses among the rest by its own code, as if it had no row for
             them; else the gate weight of a dropped expert is shared among the token's other
             experts. `table()` shows which of the two
    force    layer → experts that every token goes to, at most K: one that the router did not choose
             takes the slot and the gate weight of the token's last choice
    replay   a trace, or its path: each token goes to the same experts as in the trace. An expert
             that the router chooses too keeps the router's gate weight, with its gradient; the
             others get the trace's, which `table()` counts. Sequences are recognised by their
             token ids, in any order and batches; MoeInspectError for one that is not in the trace.
             A token beyond the end of its sequence in the trace keeps the router's choice
    shuffle  a seed: the tokens of each forward pass exchange their choices at random, which keeps
             the load of every expert
    routers  the routers, as `RouterSpec`s; by default they are found
    inputs   what a forward pass is fed, as in `record`

    `drop` and `force` can be combined, for different layers. A compiled model runs eagerly within
    the block. Raises MoeInspectError for a layer or an expert that the model does not have, and, in
    a forward pass, for a router whose choice cannot be replaced."""
    from moe_inspect.interventions.intervene import Intervention

    return Intervention(
        model,
        drop=drop,
        force=force,
        replay=replay,
        shuffle=shuffle,
        routers=routers,
        inputs=inputs,
    )


def ablate(
    model: str,
    options: TraceOptions | None = None,
    *,
    experts: Sequence[int] | None = None,
    most_passes: int | None = None,
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    # the trace's own keyword `resume` is another: no trace is written
    **changes: Unpack[TraceKeywords],  # pyright: ignore[reportGeneralTypeIssues]
) -> Ablation:
    """Measures the value of each expert of a model: the loss on held-out text without it (its
    router chooses among the rest), beside the loss of the whole model.

    model        a hub id, a directory, or "demo" (bundled, offline)
    options      settings of the text and of the model; each field of `TraceOptions` may also be
                 given as a keyword: `ablate("demo", data=["held_out/"], layers=[1])`. Fields about
                 what is recorded have no effect here
    experts      only these experts of each layer; None: all
    most_passes  run at most this many forward passes, so that every expert is judged on less text
    resume       a directory that stores every loss, and from which a later call continues
    progress     called with (forward passes done, in total) after each

    Raises MoeInspectError for errors the caller can fix."""
    from moe_inspect.interventions.ablation import ablate_held_out, open_held_out, pairs

    settings = replace(options or TraceOptions(batch_tokens=2048), **changes)
    held_out = open_held_out(model, settings)
    return ablate_held_out(
        held_out,
        pairs(held_out.sites, settings.layers, experts),
        most_passes=most_passes,
        resume=Path(resume) if resume is not None else None,
        progress=progress,
    )


def _balance_table(totals: Totals) -> pd.DataFrame:
    """The balance table of what a recorder has counted so far."""
    import numpy as np

    from moe_inspect.analysis.counting.counts import Counts
    from moe_inspect.analysis.counting.router_counts import RouterCounts
    from moe_inspect.reporting.tables.load import balance_of

    counts = Counts(
        totals.routers,
        tuple(range(len(totals.routers))),
        [""],
        [("", 0)],
        np.array([totals.tokens]),
        counts_only=True,
    )
    counts.tokens_SU = {
        router.stack: totals.tokens_R[r : r + 1]
        for r, router in enumerate(totals.routers)
        if router.stack
    }
    for r, load_E in enumerate(totals.load):
        counts.of[r] = RouterCounts(load_E[None], load_E[None] * 0, None)
    return balance_of(counts)

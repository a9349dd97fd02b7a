"""The kinds of findings: what each means, which published bugs look like it, and what mends it.
docs/compare.md lists them."""

from __future__ import annotations

from dataclasses import dataclass

from moe_inspect.reporting.verdict.findings import (
    DROP_LAST,
    DROP_ZERO_FILLED,
    LAYERS,
    NEVER_FED,
    OF_ANOTHER_ROUTER,
    SHIFT_LAYERS,
    SHIFT_ROUTES,
    Severity,
)


@dataclass(frozen=True)
class Kind:
    """`sign`: what is looked for. `means`: what has happened. `mend`: what to do, a sentence;
    `option`: of compare or import. `bugs`: published ones that look like it."""

    sign: str
    means: str
    mend: str = ""
    option: str = ""
    bugs: tuple[str, ...] = ()
    severity: Severity = "critical"


LOST_TOKEN = ("NeMo-RL #3208", "prime-rl #1807")
DRAFT = ("vLLM #48622",)
RETRACTED = ("miles #3277",)
KINDS: dict[str, Kind] = {
    "broken_file": Kind(
        "a file that breaks a rule of the format",
        "A byte has changed, a file is missing, or another program wrote it.",
        "Copy the file again, or record again.",
    ),
    "unfinished": Kind(
        "a writer that has not ended", "Readers see what is committed.", severity="note"
    ),
    "unlinked": Kind(
        "sequences whose beginning was not recorded",
        "They continue the copy of a cache, beams of an encoder's output, or what came before.",
        severity="note",
    ),
    "lengths": Kind(
        "another number of rows than of tokens",
        "From a missing row on, routes are other tokens'.",
        f"If only the last token of each sequence lacks, which is never fed: compare {DROP_LAST}.",
        f"compare {DROP_LAST}",
        (*LOST_TOKEN, *RETRACTED),
    ),
    "zero_filled": Kind(
        "expert 0 in every slot of every layer",
        f"These are {NEVER_FED}, filled with zeros.",
        f"Leave them out: compare {DROP_ZERO_FILLED}.",
        f"compare {DROP_ZERO_FILLED}",
        ("tpu-inference #3583", "vLLM #49184", "SkyRL #1908", "verl #7075"),
    ),
    "constant_filled": Kind(
        "the same slots in every layer, or experts 0 to k − 1 in all of one",
        "A buffer was filled and not written, or padded; or all logits of a router are equal.",
        "Padding at the end of responses is left out by import.",
        "import",
    ),
    "not_recorded": Kind(
        "no expert in any slot of any layer",
        "The routes of these tokens were forgotten, or the tail was never written.",
        "Leave them out, as import does.",
        "import",
        severity="warning",
    ),
    "layers_filled": Kind(
        "one number in every slot of a layer",
        "This is a dense layer, or one that was never written.",
        "Dense layers are left out by import --model.",
        "import --model",
    ),
    "out_of_range": Kind(
        "ids that are no expert's",
        "Memory was never written, or the model has another number of experts.",
    ),
    "physical_ids": Kind(
        "ids from E on, few, and each often",
        "These may be physical ids of replicas, not experts.",
        "Record logical ids: a plan of placement maps one to the other.",
    ),
    "twice": Kind(
        "an expert twice in a decision",
        "No router chooses that: rows are not aligned to slots, or partly written.",
    ),
    "repeated_rows": Kind(
        "the same row from token to token",
        "A buffer that nobody wrote was read again (stale), or a tail was never written.",
    ),
    "repeated_block": Kind(
        "a stretch of rows again, at another text",
        "A sequence is there twice, as after a retraction, or a buffer is stale.",
        bugs=RETRACTED,
    ),
    "layer_copied": Kind(
        "a layer that equals another",
        "One layer was written over another.",
        f"Leave it out: compare {LAYERS}.",
        f"compare {LAYERS}",
        DRAFT,
    ),
    "sorted_ids": Kind(
        "ids that ascend in every decision",
        "The order of the slots is lost: slot 0 is not the first choice.",
        severity="note",
    ),
    "missing_ranks": Kind(
        "only the experts of some ranks",
        "Ranks are missing, or these are local ids.",
        "Record global ids, or give import the files of all ranks.",
        "import",
    ),
    "fewer_assignments": Kind(
        "counts that are not k assignments of each token in every layer",
        "Top-k is another, assignments were dropped, or layers count other tokens.",
        "If the model uses another number of experts per token: import --top-k.",
        "import --top-k",
        severity="note",
    ),
    "even_load": Kind(
        "a load more even than chance allows",
        "Routing was simulated or forced to balance, as for a benchmark; or experts choose tokens.",
        severity="warning",
    ),
    "groups": Kind(
        "more groups in a decision than the config allows",
        "The ids are not the config's: physical ids, a permutation, or another model.",
    ),
    "weight_sums": Kind(
        "weights that do not sum as the config says",
        "Outputs of experts were multiplied by others, or the config is another model's.",
        severity="warning",
    ),
    "routes_shifted": Kind(
        "routes follow the text best some tokens on",
        "The routes are other tokens': another span, or a token was lost at a boundary.",
        f"Move them back: compare {SHIFT_ROUTES} N.",
        f"compare {SHIFT_ROUTES}",
        ("vLLM #37094", *LOST_TOKEN),
    ),
    "layer_shifted": Kind(
        "one layer follows the text best some tokens on",
        "A draft model's (MTP) layer, which reads the next token, was written over it.",
        f"Leave it out: compare {LAYERS}.",
        f"compare {LAYERS}",
        DRAFT,
    ),
    "layers_moved": Kind(
        "a layer chooses as another one of the known trace",
        "Layers are in another order, or counted otherwise.",
        f"If all are moved alike: compare {SHIFT_LAYERS} N.",
        f"compare {SHIFT_LAYERS}",
        DRAFT,
    ),
    "routes_of_another_router": Kind(
        "a layer chooses as none of the known trace",
        f"These routes belong to a router that the known trace lacks, {OF_ANOTHER_ROUTER}; or "
        "experts are numbered differently.",
        f"Leave it out: compare {LAYERS}.",
        f"compare {LAYERS}",
        DRAFT,
    ),
}

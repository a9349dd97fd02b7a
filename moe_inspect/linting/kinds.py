"""The kinds of findings: what each means, which published bugs look like it, and what mends it.
`docs/lint.md` has them as a table."""

from __future__ import annotations

from dataclasses import dataclass

from moe_inspect.reporting.verdict.findings import Severity
from moe_inspect.reporting.verdict.misrecorded import MENDS, NEVER_FED, OF_ANOTHER_ROUTER, REPLICAS


@dataclass(frozen=True)
class Kind:
    """`sign`: what is looked for, for the table. `certain`: whether no router can do that; else
    there is a p-value. `means`: what has happened, a sentence. `option`: of compare or import;
    `mend`: the sentence on what to do."""

    severity: Severity
    sign: str
    certain: bool
    means: str
    bugs: tuple[str, ...] = ()
    option: str = ""
    advice: str = ""

    @property
    def mend(self) -> str:
        if self.advice or not self.option:
            return self.advice
        return f"Mend: {self.option}."


KINDS: dict[str, Kind] = {
    "lengths": Kind(
        "critical",
        "another number of rows than of tokens",
        True,
        "Routes that lack a token, or have one too many, belong to other tokens from there on.",
        ("NeMo-RL #3208", "prime-rl #1807", "miles #3277"),
        f"compare {MENDS['last_token']}",
        f"If only the last token of each sequence is missing, which is never fed, compare "
        f"{MENDS['last_token']}; else record again.",
    ),
    "zero_filled": Kind(
        "critical",
        "expert 0 in every slot of every layer",
        True,
        f"These are {NEVER_FED}, filled with zeros.",
        ("tpu-inference #3583", "vLLM #49184", "SkyRL #1908", "verl #7075"),
        f"compare {MENDS['zero_filled']}",
    ),
    "constant_filled": Kind(
        "critical",
        "the same slots in every layer",
        False,
        "A buffer was filled and not written, or padded; or all logits of these routers are equal.",
        ("SkyRL #1908", "verl #7075"),
        "import",
        "`import` leaves out padding at the end of responses.",
    ),
    "not_recorded": Kind(
        "warning",
        "no expert in any slot of any layer",
        True,
        "The routes of these tokens were forgotten, or a tail was never written.",
        ("vLLM #49184",),
        "import",
        "`import` leaves them out.",
    ),
    "layers_filled": Kind(
        "critical",
        "one number in every slot of a layer",
        True,
        "This is a dense layer, or one that was never written.",
        (),
        "import --model",
        "`import --model` leaves dense layers out.",
    ),
    "physical_ids": Kind(
        "critical",
        "ids from E on, few, each often",
        True,
        f"These may be {REPLICAS}, not logical experts.",
        (),
        "",
        "Record logical ids: a plan of placement maps one to the other.",
    ),
    "out_of_range": Kind(
        "critical",
        "ids that are no expert's",
        True,
        "Memory that was never written, or another model's `experts`.",
        (),
        "",
    ),
    "twice": Kind(
        "critical",
        "an expert twice in a decision",
        True,
        "No router chooses an expert twice: rows are not aligned to slots, or partly written.",
        (),
        "",
    ),
    "repeated_rows": Kind(
        "critical",
        "the same row again and again, whatever the token",
        False,
        "A buffer was read again that nobody wrote (stale), or a tail was never written.",
        ("vLLM #49184",),
        "",
    ),
    "repeated_block": Kind(
        "critical",
        "a stretch of rows again, at other text",
        False,
        "A sequence is there twice, as after a retraction, or a buffer is stale.",
        ("miles #3277",),
        "",
    ),
    "layer_copied": Kind(
        "critical",
        "a layer that equals another",
        False,
        "One layer was written over another.",
        ("vLLM #48622",),
        "compare --layers",
        "Leave it out: `compare --layers`.",
    ),
    "layer_shifted": Kind(
        "critical",
        "one layer belongs to the next token",
        False,
        "It holds the routes of a draft model's (MTP) layer, which reads the next token.",
        ("vLLM #48622",),
        "compare --layers",
        "Leave it out: `compare --layers`.",
    ),
    "routes_shifted": Kind(
        "critical",
        "routes follow the text better some tokens on",
        False,
        "The routes belong to other tokens: another span, or a lost token at a boundary.",
        ("vLLM #37094", "NeMo-RL #3208", "prime-rl #1807"),
        f"compare {MENDS['routes_shifted']}",
    ),
    "layers_moved": Kind(
        "critical",
        "a layer has the habits of another one of the known trace",
        False,
        "Layers are in another order, or counted otherwise.",
        ("vLLM #48622",),
        f"compare {MENDS['layers_shifted']}",
        f"If all are moved alike, `compare {MENDS['layers_shifted']}`.",
    ),
    "routes_of_another_router": Kind(
        "critical",
        "a layer has none of the habits of the known trace",
        False,
        f"Its routes belong to {OF_ANOTHER_ROUTER}; or experts are numbered differently.",
        ("vLLM #48622",),
        f"compare {MENDS['routes_of_another_router']}",
    ),
    "sorted_ids": Kind(
        "note",
        "ids ascend in every decision",
        False,
        "The order of the slots is lost: slot 0 is not the first choice.",
    ),
    "first_choice": Kind(
        "critical",
        "slot 0 has not the largest weight",
        True,
        "Ids and weights are in different orders, or the order of slots is not the stated one.",
    ),
    "weight_sums": Kind(
        "warning",
        "weights that do not sum as the config says",
        True,
        "The weights are others than those that the experts' outputs were multiplied by.",
    ),
    "groups": Kind(
        "critical",
        "more groups in a decision than the config allows",
        True,
        "The ids are not those of the config's experts: physical ids, a permutation, or another "
        "model.",
    ),
    "missing_ranks": Kind(
        "critical",
        "only the experts of some ranks",
        False,
        "These look like the routes to the experts of some ranks, or local ids.",
        (),
        "import",
        "Record global ids, or give `import` the files of all ranks.",
    ),
    "even_load": Kind(
        "warning",
        "a load more even than chance allows",
        False,
        "Routing was simulated or forced to balance, as in a benchmark; or experts choose tokens.",
    ),
}

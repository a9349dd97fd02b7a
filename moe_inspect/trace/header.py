"""TraceHeader: the manifest of a trace (trace.json), and what follows from it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pyarrow as pa

from moe_inspect.errors import MoeInspectError, check_whole
from moe_inspect.text import did_you_mean, ranges
from moe_inspect.trace import parts, schema
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.files.location import Remote, inside
from moe_inspect.trace.schema import Layers, Router, layers_text, parse_layers


class TraceHeader:
    """`stated_routers`: the routers as in the manifest. `routers`: the same with the slot order
    filled in where the manifest does not state it."""

    def __init__(self, path: Path | Remote, manifest: Json):
        self.path, self.manifest = path, manifest
        self.stated_routers = [Router(**router) for router in manifest["routers"]]
        # where nobody stated it, the first choice is known by the weights, or since a source of
        # counts said it (where it did not, it is null)
        known = self.imported if self.counts_only else self.has_weights
        self.routers = [
            router if router.slot_order else router.with_slot_order(known)
            for router in self.stated_routers
        ]

    @property
    def status(self) -> str:
        return self.manifest["status"]

    @property
    def tables(self) -> list[str]:
        return self.manifest["tables"]

    @property
    def counts_only(self) -> bool:
        return "routing" not in self.tables

    @property
    def by_document(self) -> bool:
        """Whether its counts are by document."""
        return self.counts_only and self.manifest["capture"].get("by_document") is True

    @property
    def is_history(self) -> bool:
        """Whether it is the history of a training run: its shards are windows of steps."""
        return self.counts_only and "training" in self.manifest

    @property
    def followed_by(self) -> Path | None:
        """The trace beside it in which the same engine goes on."""
        name = self.manifest["capture"].get("followed_by")
        return self.path.parent / Path(name).name if name and isinstance(self.path, Path) else None

    @property
    def has_weights(self) -> bool:
        return bool(self.manifest["capture"]["weights"])

    @property
    def slot_values(self) -> list[str]:
        """What the routing table holds of each slot beside its expert, of `schema.SLOT_VALUES`."""
        capture = self.manifest["capture"]
        return [value for value in schema.SLOT_VALUES if capture.get(f"{value}s")]

    @property
    def has_norms(self) -> bool:
        """Whether there are the norms of the experts' outputs (`--output-norms`)."""
        return "norm" in self.slot_values

    @property
    def has_dropped(self) -> bool:
        """Whether there are the experts that dropped assignments were meant for."""
        return schema.DROPPED in self.slot_values

    @property
    def drops(self) -> bool:
        """Whether a slot that routed nowhere is a dropped assignment, at every router."""
        return self.manifest["capture"].get("drops") is True

    @property
    def stated_blocks(self) -> int | None:
        """Blocks of the model, those without a router too, by its config; None where it states no
        number."""
        config = (self.manifest.get("model") or {}).get("config") or {}
        inner = (config.get(f"{name}_config") for name in ("text", "llm", "language", "thinker"))
        parts = [*(part for part in inner if isinstance(part, dict)), config]
        for name in ("num_layers", "num_hidden_layers", "n_layers", "n_layer", "layers_block_type"):
            # num_layers first: what LongCat calls hidden layers are attentions, two per block
            for stated in (part.get(name) for part in parts):
                blocks = len(stated) if isinstance(stated, list) else stated
                if type(blocks) is int and blocks > 0:
                    return blocks
        return None

    @property
    def blocks(self) -> int:
        """Blocks of the model, as its config states, else up to the last recorded router."""
        return max(self.stated_blocks or 0, 1 + max(router.layer for router in self.routers))

    @property
    def sums(self) -> list[str]:
        """What its counts have beside assignments, of `schema.SUMS`."""
        capture = self.manifest["capture"]
        return [name for name, of in schema.SUMS.items() if capture.get(of.stated) is True]

    def columns_of(self, table: str) -> pa.Schema:
        """The columns that a table of it has."""
        match table:
            case "routing":
                return schema.routing_schema(self.routers, self.slot_values)
            case "counts":
                return schema.counts_schema(self.sums, self.by_document)
            case "logits":
                return schema.logits_schema(max(r.experts for r in self.routers))
            case "tokens":
                return schema.TOKENS
        return schema.DOCUMENTS

    def slots_to_order(self, router: int) -> list[list[str]] | None:
        """The columns of experts, of weights and of what else there is, whose slots have to be
        sorted while they are read; None where the manifest states their order."""
        listed = self.stated_routers[router]
        if listed.slot_order or not self.has_weights or listed.top_k == 1:
            return None
        names, slots = ("expert", *self.slot_values), range(listed.top_k)
        return [[f"{name}_{j}" for j in slots] for name in names]

    @cached_property
    def vocabulary_table(self) -> pa.Table:
        """token_id, token; empty where the trace was recorded without a tokenizer."""
        path = inside(self.path, schema.VOCABULARY)
        stated = self.manifest.get("vocabulary")
        if stated is None and not path.exists():
            return schema.VOCABULARY_SCHEMA.empty_table()
        facts = {name: (stated or {}).get(name) for name in ("bytes", "sha256")}
        return parts.read_vocabulary(path, parts.Stated(**facts))

    @property
    def without_text(self) -> bool:
        """Whether it has decisions but no token ids, which were left out (`--no-text`)."""
        return not self.counts_only and self.manifest["capture"].get("text") is False

    @property
    def imported(self) -> bool:
        return self.manifest.get("capture", {}).get("mode") == "import"

    @property
    def more_than_counts(self) -> str:
        """For error messages: how to make a trace with decisions instead of this one of counts."""
        recorded = "trace without --counts-only"
        return "import a recording of every token" if self.imported else recorded

    def router_index(self, layers: Layers = None, router: int | None = None) -> list[int]:
        """Return the indices of the routers of these layers, ascending; only `router` if it is
        given. Raises MoeInspectError if there are none."""
        if router is not None:
            check_whole("router", router)
        chosen = [i for i in parse_layers(layers, self.routers) if router in (None, i)]
        if not chosen:
            existing = sorted({r.layer for r in self.routers})
            asked = f"router {router}" if layers is None else f"layer {layers_text(layers)}"
            near = did_you_mean(asked.split()[1], map(str, existing)) if layers is not None else ""
            raise MoeInspectError(
                f"no {asked} in {self.path}{near}: it has layers {ranges(existing)} and routers "
                f"0-{len(self.routers) - 1}"
            )
        return chosen

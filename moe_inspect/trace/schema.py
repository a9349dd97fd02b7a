"""The trace format's tables, columns and routers, as docs/trace-format.md specifies them; and the
check of trace.json and of the lines of shards-*.jsonl against the JSON Schemas of this folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.files.checksums import Json

FORMAT = 1
MANIFEST = "trace.json"
VOCABULARY = "vocabulary.parquet"
TABLES = ("documents", "tokens", "routing", "logits", "counts")
# encode: fed to the encoder of an encoder-decoder; draft: proposed, and rejected
PHASES = ("prefill", "decode", "encode", "draft")
# of forward passes whose documents are sorted by length together: less padding, bounded memory
SORTED_BATCHES = 16
RANK_STRIDE = 2**40  # tokens of process r are numbered from r · 2^40
LABEL = pa.dictionary(pa.int32(), pa.string())
DECISION = [("token", pa.int64()), ("layer", pa.uint16()), ("router", pa.uint16())]
Layers = str | int | Iterable[int | str] | None  # "0-3,7", 3, [0, 7] or None for all
OF_TEXT = ("token_id", "document", "sequence", "position")
TOKENS = pa.schema(
    [("token", pa.int64())]
    + [(name, pa.int32()) for name in OF_TEXT]
    + [("domain", LABEL), ("phase", LABEL), ("batch", pa.int32())]
)


class Extra(NamedTuple):
    """What can be recorded of a decision beside its choice: `dtype` [T, K], or [T, E] if
    `per_expert`, where `option` of `record` and `trace_model` asks for it."""

    option: str
    dtype: str
    per_expert: bool = False

    def width(self, K: int, E: int) -> int:
        return E if self.per_expert else K


EXTRAS = {
    "logits": Extra("logits", "float16", per_expert=True),
    "norms": Extra("output_norms", "float32"),
}
# of an empty slot: the expert that dropped it
DROPPED = "dropped_expert"
# where an engine balances the load over replicas of experts: the one that a slot was served by
PHYSICAL = "physical"
# of a slot, beside its expert: recorded where capture.weights, capture.norms … is true
SLOT_VALUES = ("weight", "norm", PHYSICAL, DROPPED)
DOCUMENTS = pa.schema(
    [("document", pa.int32()), ("domain", LABEL), ("source", LABEL), ("tokens", pa.int32())]
)
MOST_SHARD_TOKENS = 2**24  # our shards hold at most 2**19 tokens, or one batch
MOST_TOKEN_IDS = 2**22  # no vocabulary is near; what a hostile file could ask for
VOCABULARY_SCHEMA = pa.schema([("token_id", pa.int32()), ("token", pa.string())])


@dataclass(frozen=True)
class Router:
    """A router of the model, as `trace.json` lists it. `layer` is the block index, `experts` and
    `top_k` count routed experts only, `scoring` is how logits become scores ("softmax", "sigmoid",
    or "" where unknown). `stack` is "encoder" or "decoder" in a model that has both, else "": which
    tokens reach the router. `slot_order` is "weight" (slots are in descending gate weight: slot 0
    is the first choice), "unknown", or "" in a trace written before it was stated."""

    layer: int
    name: str
    path: str
    experts: int
    top_k: int
    scoring: str = ""
    shared_experts: int = 0
    stack: str = ""
    slot_order: str = ""

    @property
    def first_choice_known(self) -> bool:
        """Whether slot 0 is the first choice, the expert with the largest gate weight."""
        return self.slot_order == "weight"

    def with_slot_order(self, known: bool) -> Router:
        """A copy with its slot order set. A single slot is always in order."""
        return replace(self, slot_order="weight" if known or self.top_k == 1 else "unknown")

    def sees(self, phase: str) -> bool:
        """Whether tokens of this phase reach the router."""
        return sees(self.stack, phase)


def sees(stack: str, phase: str) -> bool:
    """Whether tokens of this phase reach the routers of a stack: the encoder's see those of
    "encode", the decoder's the others."""
    return not stack or (stack == "encoder") == (phase == "encode")


def descending_slots(
    weights_KT: np.ndarray, nowhere_KT: np.ndarray | None = None
) -> np.ndarray | None:
    """The slots of each decision from the largest weight to the smallest, int64 [K, T]; None if all
    decisions are in that order already. Many routers return their choices in another order
    (`topk(sorted=False)`, selection biases, engines that sort by expert id). Equal weights keep
    theirs; slots that routed nowhere (bool [K, T]) come last."""
    key_KT = (
        weights_KT if nowhere_KT is None else np.where(nowhere_KT, np.float32(-np.inf), weights_KT)
    )
    if (key_KT[:-1] >= key_KT[1:]).all():
        return None
    return np.argsort(-key_KT, axis=0, kind="stable")


def id_dtype(routers: Iterable[Router]) -> pa.DataType:
    """Type of the expert columns: uint8 up to 256 experts, else uint16, by the largest router."""
    return pa.uint16() if any(r.experts > 256 for r in routers) else pa.uint8()


def value_type(value: str) -> pa.DataType:
    """Type of the columns of one of SLOT_VALUES but DROPPED."""
    return pa.uint16() if value == PHYSICAL else pa.float32()


def routing_schema(
    routers: Sequence[Router], values: Sequence[str], nullable: bool = True
) -> pa.Schema:
    """Columns of the routing table. `values`: of SLOT_VALUES. `nullable`: whether a slot may have
    routed nowhere. Where none has, columns that are not nullable save a sixth of the writer's
    time."""
    slots, ids = range(max(r.top_k for r in routers)), id_dtype(routers)
    fields = [pa.field(*key, nullable=False) for key in DECISION]
    fields += [pa.field(f"expert_{j}", ids, nullable) for j in slots]
    others = [value for value in values if value != DROPPED]
    fields += [pa.field(f"{v}_{j}", value_type(v), nullable) for v in others for j in slots]
    fields += [pa.field(f"{DROPPED}_{j}", ids) for j in slots if DROPPED in values]
    return pa.schema(fields)


class Sum(NamedTuple):
    """A column of the counts table, float64: what is summed over an expert's assignments, from
    `least` on. There where capture.`stated` is true."""

    stated: str
    meaning: str
    least: float = -math.inf


SUMS = {
    "weight_sum": Sum("weights", "sum of the gate weights of the expert's assignments"),
    "energy": Sum(
        "energy", "sum of the squares of the expert's inner activations over its assignments", 0
    ),
    "saliency_sum": Sum(
        "saliency", "sum over the expert's assignments of the score that the source gives each"
    ),
}


def counts_schema(sums: Iterable[str], by_document: bool = False) -> pa.Schema:
    fields = [*DECISION[1:], *[("document", pa.int32())] * by_document]
    fields += [("domain", LABEL), ("expert", pa.uint16())]
    fields += [("assignments", pa.int64()), ("first_choice", pa.int64())]
    return pa.schema([*fields, *((name, pa.float64()) for name in sums)])


def logits_schema(experts: int) -> pa.Schema:
    return pa.schema([*DECISION, ("logits", pa.list_(pa.float16(), experts))])


GLOSSARY = {  # goes into the manifest: a trace says what its columns are
    "token": "unique in the trace, in execution order; process r numbers from r·2^40",
    "token_id": "vocabulary id",
    "document": "an input text",
    "sequence": (
        "a document longer than --max-length is several sequences; consecutive tokens are paired "
        "only within one"
    ),
    "position": "the model's position within the sequence, special tokens included",
    "domain": "the document's label",
    "phase": (
        "prefill: fed as a prompt; decode: generated; encode: fed to the encoder, whose routers "
        "alone see it; draft: proposed while generating, fed, and rejected"
    ),
    "batch": "the forward pass",
    "layer": "the model's block index, not the ordinal of the MoE layers",
    "router": "index into routers in trace.json: a block may have several",
    "expert_j": (
        "routed expert in slot j; null where the slot routed nowhere. Slots are in descending gate "
        "weight where the router's slot_order is weight"
    ),
    "weight_j": "gate weight handed to the expert in slot j",
}
OPTIONAL_GLOSSARY = {  # by what capture states
    "norms": {
        "norm_j": "Euclidean norm of the output of the expert in slot j, before the gate weight"
    },
    "physicals": {
        "physical_j": "physical expert that slot j was served by: a replica of expert_j, as "
        "replicas in the metadata of the file says"
    },
    "dropped_experts": {
        "dropped_expert_j": "the expert that slot j was meant for, and whose capacity dropped it"
    },
    **{of.stated: {name: of.meaning} for name, of in SUMS.items() if of.stated != "weights"},
    "by_document": {"document": "the input text whose assignments a row counts"},
}


def fingerprint(value: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace")
    ).hexdigest()


def parse_layers(layers: Layers, routers: Sequence[Router]) -> list[int]:
    """Return the indices of the routers of "0-3,7", of 3 or of ["0-3", "7"]; of all for None. A
    range takes the layers that exist in it (dense blocks have no router); a single layer must
    exist."""
    if layers is None:
        return list(range(len(routers)))
    text, existing = layers_text(layers), {r.layer for r in routers}
    parse_ranges(text)  # so that an error names the whole text
    parts = [existing.intersection(parse_ranges(part)) for part in text.split(",")]
    return [i for i, r in enumerate(routers) if all(parts) and any(r.layer in p for p in parts)]


def layers_text(layers: str | int | Iterable[int | str]) -> str:
    """Return layers as text, like "0-3,7"."""
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        return ",".join(map(str, layers))
    return str(layers)


def parse_ranges(text: str, what: str = "layers") -> list[int]:
    """ "0-3,7" → [0, 1, 2, 3, 7]."""
    values: set[int] = set()
    unread = f"cannot read {what} {text!r}"
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = [first, last] if dash else [first]
        if not all(n.isascii() and n.isdecimal() and len(n) < 5 for n in numbers):
            raise MoeInspectError(f"{unread}: write them like 0-3,7")
        if dash and int(last) < int(first):
            raise MoeInspectError(f"{unread}: a range goes from low to high, like 0-3,7")
        values.update(range(int(first), int(last or first) + 1))
    return sorted(values)


# --- JSON, which is untrusted input: of JSON Schema (draft 2020-12) the keywords that our two
# schemas use are known, others are refused, so that none is passed over. Stricter than the standard
# in one point: 5.0 is no integer


def parsed(data: bytes) -> Any:
    """Parses JSON. ValueError, in one line, if it is invalid or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


TYPES = {
    "object": (dict, "an object"),
    "array": (list, "a list"),
    "string": (str, "text"),
    "integer": (int, "a whole number"),
    "boolean": (bool, "true or false"),
    "null": (type(None), ""),
}
KEYWORDS = {"type", "const", "enum", "minimum", "maximum", "pattern", "examples", "items"}
KEYWORDS |= {"minItems", "maxItems", "properties", "required", "additionalProperties"}
KEYWORDS |= {"$schema", "$id", "$defs", "title", "description"}


@cache
def read_schema(name: str) -> Json:
    """The JSON Schema of "trace_json" or "shard_line"."""
    return json.loads(Path(__file__).with_name(f"{name}.schema.json").read_text(encoding="utf-8"))


def check_schema(name: str, value: object) -> None:
    """ValueError in one line where a value does not follow a schema (see `read_schema`). It names
    what is wrong by its path from the root (`capture.weights`, `routers[3].top_k`)."""
    check_value(value, read_schema(name), read_schema(name))


def check_value(value: object, rule: Json, root: Json, path: str = "") -> None:
    """As `check_schema`, by a part of a schema. `root`: the schema, which `$ref` refers to."""
    if "$ref" in rule:
        rule = root["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    if unknown := rule.keys() - KEYWORDS:
        raise NotImplementedError(f"JSON Schema's {min(unknown)}")
    if said := _refusal(value, rule):
        raise ValueError(f"{path or 'it'} {said}")
    if "items" in rule and isinstance(value, list):
        for n, item in enumerate(value):
            check_value(item, rule["items"], root, f"{path}[{n}]")
    if "properties" in rule and isinstance(value, dict):
        before = f"{path}." if path else ""
        for name in rule.get("required", []):
            if name not in value:
                raise ValueError(f"{before}{name} is missing")
        for name, one in value.items():
            if name in rule["properties"]:
                check_value(one, rule["properties"][name], root, before + name)
            elif rule.get("additionalProperties") is False:
                raise ValueError(f"{before}{shown(name)} is not a known key")


def _refusal(value: object, rule: Json) -> str:
    """What is wrong with a value, but for what is in it: "" where nothing is."""
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and type(value) not in [TYPES[kind][0] for kind in kinds]:  # a bool is no int
        wanted = " or ".join(TYPES[kind][1] for kind in kinds if kind != "null")
        return f"is {shown(value)}, not {wanted}"
    allowed = [rule["const"]] if "const" in rule else rule.get("enum")
    if allowed and (value not in allowed or isinstance(value, (bool, float))):
        names = [", ".join(a) if isinstance(a, list) else str(a) for a in allowed if a != ""]
        said = ("; " if isinstance(allowed[0], list) else ", ").join(names)
        return f"is {shown(value)}, not {'one of ' * (len(allowed) > 1)}{said}"
    if type(value) is int and "minimum" in rule:
        if not rule["minimum"] <= value <= rule["maximum"]:
            return f"is {shown(value)}: {rule['minimum']} to {rule['maximum']} are possible"
    elif isinstance(value, str) and "pattern" in rule:
        if not re.search(rule["pattern"].replace("$", r"\Z"), value, re.ASCII):
            return f"is {shown(value)}, not like {rule['examples'][0]}"
    elif isinstance(value, list) and "items" in rule:
        least, most = rule["minItems"], rule["maxItems"]
        if not least <= len(value) <= most:
            return f"lists {len(value):,}: {least:,} to {most:,} are possible"
    return ""


def shown(value: object) -> str:
    """A value of unknown size and content, short and in one line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value):,}"
    if type(value) is int and abs(value) >= 10**30:
        return "a number of over 30 digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

"""The table `summary`: what was traced and how, how the weights are quantised, the main results,
and why columns are empty."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import cast

from moe_inspect.analysis.counting import token_ids as tokenids
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS
from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import ReportData, Row, once, whole_batches, worst_of
from moe_inspect.reporting.tables.registry import table
from moe_inspect.text import plural, ranges, storable

# of a trace without its text
ROUTES_TELL = (
    "Routes alone reveal most of the text: 91% of the tokens were recovered from expert "
    "selections (arXiv:2602.04105). Keep this trace as private as the text."
)


@table()
def summary(data: ReportData) -> pd.DataFrame:
    """One row per fact: key, value (text)."""
    frame = pd.DataFrame(facts(data), columns=["key", "value"])
    return frame.astype({"key": "str", "value": "str"})


# facts that are left out where there is nothing to say
OPTIONAL = ("warning", "baseline", "quantization", "adapter", "domains_selected", "phase_selected")


@once
def facts(data: ReportData) -> list[tuple[str, str]]:
    """The rows of `summary`."""
    return [
        (storable(key), "unknown" if value is None else storable(str(value)))
        for key, value in _facts(data)
        if value or key not in OPTIONAL
    ]


def title_of(data: ReportData) -> str:
    """The model, as the title of a report."""
    model = dict(facts(data))["model"]
    return "Unknown model" if model == "unknown" else model


def _facts(data: ReportData) -> Iterator[tuple[str, object]]:
    trace, selection, counts = data.trace, data.selection, data.counts
    routers = selection.routers
    capture, model = trace.manifest.get("capture", {}), trace.manifest.get("model", {})
    yield "status", trace.status
    yield "warning", data.warning
    yield "baseline", data.baseline and data.baseline.trace.path
    yield "model", model.get("id") or model.get("class")
    yield "capture_mode", capture.get("mode")
    yield "device", capture.get("device")
    yield "dtype", capture.get("dtype")
    yield "quantization", quantization(trace.manifest)
    yield "adapter", adapter(trace.manifest)
    yield "layers", ranges({trace.routers[r].layer for r in routers})
    yield "routers", len(routers)
    yield "domains_selected", ", ".join(sorted(selection.domains or ()))
    yield "phase_selected", selection.phase
    yield "tokens", counts.tokens
    yield "documents", None if counts.documents_unknown else counts.documents
    for domain, n in zip(counts.domains, counts.tokens_D.tolist(), strict=True):
        yield f"tokens_in_{domain}", n
    yield "decisions", counts.decisions
    yield "assignments", sum(int(counts.load_E(r).sum()) for r in routers)
    yield "null_slots", sum(counts.of[r].null_slots for r in routers)
    yield "dropped", data.dropped
    yield "dead_experts", sum(int(row["dead_experts"]) for row in data.loaded)
    if worst := worst_of(data.loaded):
        yield "worst_layer", worst["layer"]
        yield "worst_router", worst["router"]
        yield "worst_max_over_mean", f"{worst['max_over_mean']:.6g}"
        yield "worst_expected_by_chance", f"{worst['expected_by_chance']:.6g}"
    if (pooled := data.pooled_max_over_mean()) is not None:
        yield "pooled_max_over_mean", f"{pooled:.6g}"
    yield from data.thresholds.facts()
    yield from (("note", note) for note in notes(data))


@once
def notes(data: ReportData) -> list[str]:
    """Why columns are NaN, and what numbers are limited to."""
    parts = (_recording_notes, _document_notes, _column_notes, _batch_notes)
    found = [note for part in parts for note in part(data)]
    return found if data.counts.counts_only else [*found, *_token_id_notes(data)]


def _recording_notes(data: ReportData) -> Iterator[str]:
    """Notes on how the trace was recorded."""
    if data.trace.without_text:
        yield ROUTES_TELL
    stated = mapping(data.trace.manifest.get("corpus")).get("notes")
    yield from map(str, cast("list[object]", stated) if isinstance(stated, list) else [])
    if data.counts.counts_only:
        lacks = "intervals, batches, nulls" if data.counts.documents_unknown else "batches"
        yield f"counts only: no {lacks} or token ids; {data.trace.more_than_counts} for those"


def _document_notes(data: ReportData) -> Iterator[str]:
    """Notes on what needs more documents, or more domains."""
    n = len(data.counts.units)
    if not data.counts.documents_unknown and n < FEWEST_DOCUMENTS:
        yield (
            f"{plural(n, 'document')}: intervals, design effect and domain nulls need "
            f"{FEWEST_DOCUMENTS}"
        )
    if len(data.counts.domains) < 2:
        label = "" if data.selection.domains else "; label sources as DOMAIN=SRC when tracing"
        yield f"one domain: domain_mi_* needs two{label}"


def _column_notes(data: ReportData) -> Iterator[str]:
    """Notes on columns that need gate weights, load, or logits."""
    trace, routers = data.trace, data.selection.routers
    if not trace.has_weights:
        yield "no weights recorded: weight_sum and weight_* are NaN"
    if unknown := sum(not trace.routers[r].first_choice_known for r in routers):
        which = "" if unknown == len(routers) else f" of {plural(unknown, 'router')}"
        yield (
            f"first choices{which} are unknown: no gate weights say which expert came first; "
            "columns that need them are NaN"
        )
    if not all(data.counts.load_E(r).any() for r in routers):
        yield "a router without any assignments has no balance"
    if "logits" not in trace.tables:
        record = "" if trace.imported else "; trace with --logits for those"
        yield f"no logits recorded: aux_loss, z_loss, gate entropy and margins are NaN{record}"


def _batch_notes(data: ReportData) -> Iterator[str]:
    """A note if many batches are too small for max_vio_batch."""
    sizes = max((data.counts.of[r].batches for r in data.selection.routers), key=len)
    batches, large = (sum(n for n, _ in of.values()) for of in (sizes, whole_batches(sizes)))
    if batches - large > 1:
        yield (
            f"max_vio_batch covers {large:,} of {batches:,} batches: the others have under half "
            "the tokens of the largest; --phase decode selects decode steps alone"
        )


def _token_id_notes(data: ReportData) -> Iterator[str]:
    widest = max(data.trace.routers[r].experts for r in data.selection.routers)
    judged = tokenids.frequent(data.counts, tokenids.MIN_COUNT, tokenids.CELLS // widest)
    if not len(judged.ids_V):
        yield (
            f"no token id occurs {tokenids.MIN_COUNT} times: token_mi_*, domain_mi_given_token_*, "
            "vocabulary_specialization are NaN"
        )
        return
    yield (
        f"token ids are judged from {tokenids.MIN_COUNT} occurrences: "
        f"{plural(len(judged.ids_V), 'id')}, {judged.coverage:.1%} of the tokens"
    )
    if not data.trace.vocabulary().size:
        yield "no vocabulary in the trace: token is missing, give a tokenizer when tracing"
    elif not data.trace.manifest.get("vocabulary"):
        yield "trace.json states no checksum of vocabulary.parquet: its text is not checked"
    if len(data.counts.domains) > 1:
        counted, clusters = tokenids.unit_ids_of(data.counts)
        if counted.coverage < judged.coverage:
            yield (
                f"domain_mi_given_token_bits covers the {len(counted.ids_V):,} most frequent token "
                f"ids ({counted.coverage:.1%} of the tokens), documents in {clusters} clusters per "
                "domain, to bound its memory"
            )


# what quantisers call the number of bits
BITS = ("bits", "w_bit", "nbits", "weight_bits", "num_bits")
NUMBER = re.compile(r"(u?int|float|fp)_?(\d+)", re.IGNORECASE)


def quantization(manifest: Row) -> str:
    """E.g. "mxfp4", "bitsandbytes 4 bit", "torchao int8"; "" where the weights are not
    quantised, or the trace does not say."""
    model = mapping(manifest.get("model"))
    if stored := mapping(model.get("dequantized_from")):
        dtype = mapping(manifest.get("capture")).get("dtype")
        return f"{_named(stored)} dequantized" + (f" to {dtype}" if dtype else "")
    config = mapping(model.get("config"))
    found = config.get("quantization_config")
    for inner in config.values():  # of a multimodal model's language model
        found = found or mapping(inner).get("quantization_config")
    return _named(mapping(found))


def adapter(manifest: Row) -> str:
    """E.g. "LORA adapter of allenai/OLMoE-1B-7B-0924"; "" where there is none."""
    about = mapping(mapping(manifest.get("model")).get("adapter"))
    if not about:
        return ""
    base = about.get("base")
    return f"{about.get('kind') or 'PEFT'} adapter" + (f" of {base}" if base else "")


def _named(config: Row) -> str:
    method = str(config.get("quant_method") or config.get("quant_algo") or "").lower()
    for bits in (4, 8):
        if any(config.get(f"{private}load_in_{bits}bit") is True for private in ("", "_")):
            return f"{method or 'bitsandbytes'} {bits} bit"
    if method == "torchao":
        # Int8DynamicActivationInt4WeightConfig: the weights come last
        stated = config.get("quant_type")
        kind = mapping(mapping(stated).get("default", stated)).get("_type", stated)
        kinds = NUMBER.findall(str(kind))
        return " ".join([method, *("".join(kind).lower() for kind in kinds[-1:])])
    weights = config
    for group in mapping(config.get("config_groups")).values():  # compressed-tensors
        weights = mapping(mapping(group).get("weights")) or weights
    bits = next((weights[b] for b in BITS if type(weights.get(b)) is int), None)
    if bits is None or not method:
        return method
    return f"{method} {weights['type']}{bits}" if weights.get("type") else f"{method} {bits} bit"


def mapping(value: object) -> Row:
    """A part of a manifest; nothing where it is no mapping."""
    return cast("Row", value) if isinstance(value, Mapping) else {}

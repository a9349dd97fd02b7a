"""The table `summary`: what was traced and how, how the weights are quantised, the main results,
and why columns are empty."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import pandas as pd

from moe_inspect.analysis.counting import token_ids as tokenids
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS
from moe_inspect.reporting.tables.data import ReportData, once, whole_batches, worst_router
from moe_inspect.reporting.tables.registry import table
from moe_inspect.text import plural, ranges, storable
from moe_inspect.trace.manifest import holds_samples
from moe_inspect.trace.texts import ROUTES_TELL


@table()
def summary(data: ReportData) -> pd.DataFrame:
    """One row per fact: key, value (text)."""
    frame = pd.DataFrame(facts(data), columns=["key", "value"])
    return frame.astype({"key": "str", "value": "str"})


@once
def facts(data: ReportData) -> list[tuple[str, str]]:
    """The rows of `summary`."""
    rows = [
        *_recording(data),
        *_amounts(data),
        *_worst(data),
        *data.thresholds.facts(),
        *(("note", note) for note in notes(data)),
    ]
    return [
        (storable(key), "unknown" if value is None else storable(str(value))) for key, value in rows
    ]


def _recording(data: ReportData) -> list[tuple[str, object]]:
    """What was traced and how, and the selection."""
    trace, selection = data.trace, data.selection
    capture, model = trace.manifest.get("capture", {}), trace.manifest.get("model", {})
    rows: list[tuple[str, object]] = [("status", trace.status)]
    rows += [("warning", data.warning)] if data.warning else []
    rows += [("baseline", data.baseline.trace.path)] if data.baseline else []
    rows += [
        ("model", model.get("id") or model.get("class")),
        ("capture_mode", capture.get("mode")),
        ("device", capture.get("device")),
        ("dtype", capture.get("dtype")),
        *(
            (key, said)
            for key, said in (
                ("quantization", quantization(trace.manifest)),
                ("adapter", adapter(trace.manifest)),
            )
            if said
        ),
        ("layers", ranges({trace.routers[r].layer for r in selection.routers})),
        ("routers", len(selection.routers)),
    ]
    if selection.domains:
        rows.append(("domains_selected", ", ".join(sorted(selection.domains))))
    if selection.phase:
        rows.append(("phase_selected", selection.phase))
    return rows


def _amounts(data: ReportData) -> list[tuple[str, object]]:
    """Tokens, documents, decisions and assignments."""
    counts, routers = data.counts, data.selection.routers
    return [
        ("tokens", counts.tokens),
        ("documents", counts.documents),
        *(
            (f"tokens_in_{domain}", int(n))
            for domain, n in zip(counts.domains, counts.tokens_D, strict=True)
        ),
        ("decisions", counts.decisions),
        ("assignments", sum(int(counts.load_E(r).sum()) for r in routers)),
        ("null_slots", sum(counts.of[r].null_slots for r in routers)),
        ("dropped", data.dropped),
    ]


def _worst(data: ReportData) -> list[tuple[str, object]]:
    """Dead experts, the router with the most uneven load, and the load summed over routers."""
    rows: list[tuple[str, object]] = [
        ("dead_experts", sum(int(row["dead_experts"]) for row in data.loaded))
    ]
    if worst := worst_router(data):
        rows += [
            ("worst_layer", worst["layer"]),
            ("worst_router", worst["router"]),
            ("worst_max_over_mean", f"{worst['max_over_mean']:.6g}"),
            ("worst_expected_by_chance", f"{worst['expected_by_chance']:.6g}"),
        ]
    if (pooled := data.pooled_max_over_mean()) is not None:
        rows.append(("pooled_max_over_mean", f"{pooled:.6g}"))
    return rows


@once
def notes(data: ReportData) -> list[str]:
    """Why columns are NaN, and what numbers are limited to."""
    found = (
        ROUTES_TELL if data.trace.without_text else None,
        _few_documents(data),
        _one_domain(data),
        _no_weights(data),
        _unknown_first_choices(data),
        _no_load(data),
        _no_logits(data),
        _sampled(data),
        _partial_batches(data),
    )
    return [note for note in found if note] + (
        [] if data.counts.counts_only else _token_id_notes(data)
    )


def _few_documents(data: ReportData) -> str | None:
    if data.counts.counts_only:
        return (
            "counts only: no intervals, batches, nulls or token ids; "
            f"{data.trace.more_than_counts} for those"
        )
    n = len(data.counts.units)
    if n >= FEWEST_DOCUMENTS:
        return None
    return (
        f"{plural(n, 'document')}: intervals, design effect and domain nulls need "
        f"{FEWEST_DOCUMENTS}"
    )


def _one_domain(data: ReportData) -> str | None:
    if len(data.counts.domains) > 1:
        return None
    way_out = "" if data.selection.domains else "; label sources as DOMAIN=SRC when tracing"
    return f"one domain: domain_mi_*, jsd_bits, committee and signature need two{way_out}"


def _no_weights(data: ReportData) -> str | None:
    if data.trace.has_weights:
        return None
    return "no weights recorded: weight_sum, importance_cv, gate_score, weight_* are NaN"


def _unknown_first_choices(data: ReportData) -> str | None:
    routers = data.selection.routers
    unknown = sum(not data.trace.routers[r].first_choice_known for r in routers)
    if not unknown:
        return None
    which = "" if unknown == len(routers) else f" of {plural(unknown, 'router')}"
    return (
        f"first choices{which} are unknown: no gate weights say which expert came first; columns "
        "that need them are NaN"
    )


def _no_load(data: ReportData) -> str | None:
    if all(data.counts.load_E(r).any() for r in data.selection.routers):
        return None
    return "a router without any assignments has no balance"


def _no_logits(data: ReportData) -> str | None:
    if "logits" in data.trace.tables:
        return None
    way_out = "" if data.trace.imported else "; trace with --logits for those"
    return f"no logits recorded: aux_loss, z_loss, gate entropy and margins are NaN{way_out}"


def _sampled(data: ReportData) -> str | None:
    if not (sample := data.trace.manifest.get("sample")):
        if not holds_samples(data.trace.manifest):
            return None
        return "merged from samples of other traces: batches hold only the sampled documents"
    documents, of = data.trace.manifest["corpus"]["documents"], sample["of"]["documents"]
    return (
        f"a sample of {documents:,} of {plural(of, 'document')}: batches hold only these documents"
    )


def _partial_batches(data: ReportData) -> str | None:
    sizes = max((data.counts.of[r].batches for r in data.selection.routers), key=len)
    batches, whole = (sum(n for n, _ in of.values()) for of in (sizes, whole_batches(sizes)))
    if batches - whole <= 1:
        return None
    return (
        f"max_vio_batch covers {whole:,} of {batches:,} batches: the others have under half the "
        "tokens of the largest; --phase decode selects decode steps alone"
    )


def _token_id_notes(data: ReportData) -> list[str]:
    widest = max(data.trace.routers[r].experts for r in data.selection.routers)
    judged = tokenids.frequent(data.counts, tokenids.MIN_COUNT, tokenids.CELLS // widest)
    if not len(judged.ids_V):
        return [
            f"no token id occurs {tokenids.MIN_COUNT} times: token_mi_*, domain_mi_given_token_*, "
            "vocabulary_specialization are NaN"
        ]
    notes = [
        f"token ids are judged from {tokenids.MIN_COUNT} occurrences: "
        f"{plural(len(judged.ids_V), 'id')}, {judged.coverage:.1%} of the tokens"
    ]
    if data.trace.vocabulary().size and not data.trace.manifest.get("vocabulary"):
        notes.append("trace.json states no checksum of vocabulary.parquet: its text is not checked")
    if not data.trace.vocabulary().size:
        notes.append("no vocabulary in the trace: token is missing, give a tokenizer when tracing")
    if len(data.counts.domains) > 1:
        counted, clusters = tokenids.unit_ids_of(data.counts)
        if counted.coverage < judged.coverage:
            notes.append(
                f"domain_mi_given_token_bits covers the {len(counted.ids_V):,} most frequent token "
                f"ids ({counted.coverage:.1%} of the tokens), documents in {clusters} clusters per "
                "domain, to bound its memory"
            )
    return notes


# what quantisers call the number of bits
BITS = ("bits", "w_bit", "nbits", "weight_bits", "num_bits")
NUMBER = re.compile(r"(u?int|float|fp)_?(\d+)", re.IGNORECASE)


def quantization(manifest: Mapping[str, Any]) -> str:
    """E.g. "mxfp4", "bitsandbytes 4 bit", "torchao int8"; "" where the weights are not
    quantised, or the trace does not say."""
    model = _mapping(manifest.get("model"))
    if stored := _mapping(model.get("dequantized_from")):
        dtype = _mapping(manifest.get("capture")).get("dtype")
        return f"{_named(stored)} dequantized" + (f" to {dtype}" if dtype else "")
    config = _mapping(model.get("config"))
    found = config.get("quantization_config")
    for inner in config.values():  # of a multimodal model's language model
        found = found or _mapping(inner).get("quantization_config")
    return _named(_mapping(found))


def adapter(manifest: Mapping[str, Any]) -> str:
    """E.g. "LORA adapter of allenai/OLMoE-1B-7B-0924"; "" where there is none."""
    about = _mapping(_mapping(manifest.get("model")).get("adapter"))
    if not about:
        return ""
    base = about.get("base")
    return f"{about.get('kind') or 'PEFT'} adapter" + (f" of {base}" if base else "")


def _named(config: Mapping[str, Any]) -> str:
    method = str(config.get("quant_method") or config.get("quant_algo") or "").lower()
    if method == "gguf":
        return " ".join([method, *(kind.lower() for kind in _mapping(config.get("tensors")))])
    if config.get("load_in_4bit") is True or config.get("_load_in_4bit") is True:
        return f"{method or 'bitsandbytes'} 4 bit"
    if config.get("load_in_8bit") is True or config.get("_load_in_8bit") is True:
        return f"{method or 'bitsandbytes'} 8 bit"
    if method == "torchao":
        # Int8DynamicActivationInt4WeightConfig: the weights come last
        stated = config.get("quant_type")
        kind = _mapping(_mapping(stated).get("default", stated)).get("_type", stated)
        kinds = NUMBER.findall(str(kind))
        return " ".join([method, *("".join(kind).lower() for kind in kinds[-1:])])
    weights = config
    for group in _mapping(config.get("config_groups")).values():  # compressed-tensors
        weights = _mapping(_mapping(group).get("weights")) or weights
    bits = next((weights[b] for b in BITS if type(weights.get(b)) is int), None)
    if bits is None or not method:
        return method
    return f"{method} {weights['type']}{bits}" if weights.get("type") else f"{method} {bits} bit"


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}

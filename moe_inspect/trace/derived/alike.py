"""Whether traces can become one: of one model, with the same columns, of one vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import cut, plural
from moe_inspect.trace.files import checksums
from moe_inspect.trace.reader import Trace

# entries of a config that say how the weights are run or who wrote the file, not what the model is
OF_A_RUN = {
    "_name_or_path",
    "dtype",
    "output_router_logits",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def check_alike(traces: Sequence[Trace]) -> None:
    """MoeInspectError where two traces are of different models, or hold different columns."""
    for a, b in pairwise(traces):
        _check_tables(a, b)
        _check_columns(a, b)
    for a, b in [(a, b) for i, b in enumerate(traces) for a in traces[:i]]:
        for name, of_a, of_b in _model_facts(a, b):
            if of_a != of_b:
                free = name in checksums.FREE_TEXT
                edit = "; if they are the same, edit trace.json" if free else ""
                raise MoeInspectError(
                    f"{a.path} and {b.path} are of different models: {name} is "
                    f"{cut(str(of_a), 60)} and {cut(str(of_b), 60)}{edit}"
                )


def _check_tables(a: Trace, b: Trace) -> None:
    if a.counts_only != b.counts_only:
        counts, decisions = (a, b) if a.counts_only else (b, a)
        raise MoeInspectError(
            f"{counts.path} holds counts only, {decisions.path} decisions: they cannot be merged"
        )
    for trace in (a, b):
        if trace.is_history:
            raise MoeInspectError(
                f"{trace.path} is the history of a training run: its windows cannot be merged"
            )


def _columns(trace: Trace) -> list[str]:
    """What a trace may hold or not: columns, and the table of logits."""
    if trace.counts_only:
        weights, values = ["weight_sum"] if trace.has_weights else [], []
    else:
        weights, values = [], [f"{value}_j" for value in trace.slot_values]
    return [
        *weights,
        *values,
        *(["energy"] if trace.has_energy else []),
        *(["loss_nats"] if trace.has_loss else []),
        *(["logits"] if "logits" in trace.tables else []),
    ]


def _check_columns(a: Trace, b: Trace) -> None:
    for one, other in ((a, b), (b, a)):
        if more := [name for name in _columns(one) if name not in _columns(other)]:
            raise MoeInspectError(
                f"{one.path} has {more[0]}, {other.path} does not: trace both the same way"
            )


def _model_facts(a: Trace, b: Trace) -> Iterator[tuple[str, Any, Any]]:
    """What has to be the same of both: its name, a's value, b's value. What only one states is no
    difference, unless its absence says something."""
    sections = [
        {
            "model": trace.manifest.get("model") or {},
            "capture": trace.manifest["capture"],
            "plan": (trace.manifest.get("corpus") or {}).get("plan") or {},
        }
        for trace in (a, b)
    ]
    for section, key in (
        ("model", "id"),
        ("model", "revision"),
        ("model", "class"),
        ("capture", "dtype"),
        ("capture", "weight_dtype"),
    ):
        of_a, of_b = (each[section].get(key) for each in sections)
        if of_a is not None and of_b is not None:
            yield f"{section}.{key}", of_a, of_b
    for section, key in (
        ("model", "adapter"),
        ("model", "dequantized_from"),
        ("model", "note"),
        ("plan", "random_init"),
    ):
        yield f"{section}.{key}", *(each[section].get(key) for each in sections)
    configs = [each["model"].get("config") or {} for each in sections]
    for key in sorted(configs[0].keys() & configs[1].keys() - OF_A_RUN):
        yield f"config.{key}", *(config[key] for config in configs)
    yield (
        "the routers",
        plural(len(a.routers), "router"),
        plural(len(b.routers), "router"),
    )
    for r, (of_a, of_b) in enumerate(zip(a.routers, b.routers, strict=True)):
        for key, value in asdict(of_a).items():
            yield f"routers[{r}].{key}", value, getattr(of_b, key)


def united_vocabulary(traces: Sequence[Trace]) -> pa.Table | None:
    """token_id, token: the longest vocabulary, of which the others are the beginning; None where no
    trace has one. MoeInspectError where they are not."""
    longest = max(traces, key=lambda trace: len(trace.vocabulary_table))
    words = longest.vocabulary_table
    for trace in traces:
        found = trace.vocabulary_table["token"]
        expected = words["token"].slice(0, len(found))
        if found.equals(expected):
            continue
        pairs = zip(found.to_pylist(), expected.to_pylist(), strict=True)
        at, (here, there) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
        raise MoeInspectError(
            f"{trace.path} and {longest.path} have different vocabularies: token {at} is "
            f"{cut(repr(here))} and {cut(repr(there))}"
        )
    return words if len(words) else None

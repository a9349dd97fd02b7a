"""Load by expert and domain, as CSV, JSON or Parquet; and the sums that others write as well.

T tokens, K slots, E experts, D domains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import safe_cell
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import SUMS
from moe_inspect.trace.shard import Shard

# of one router: domain → column → [E]
Sums = dict[str, dict[str, np.ndarray]]
OPTIONAL = ("first_choice", *SUMS)


def sums_by_domain(trace: Trace) -> list[Sums]:
    """Of each router: domain → column → [E]. weight_sum is missing without weights, the other
    OPTIONAL columns where the source did not say."""
    made: list[Sums] = [{} for _ in trace.routers]
    for shard in trace.shards:
        for r, domain, sums in _counted(shard) if trace.counts_only else _summed(shard):
            total = made[r].setdefault(domain, {})
            for name, values_E in sums.items():
                total[name] = total[name] + values_E if name in total else values_E
    return made


def _summed(shard: Shard) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
    domain_T = np.array(shard.tokens(["domain"])["domain"].to_pylist(), object)
    labels, code_T = np.unique(domain_T.astype(str), return_inverse=True)
    for r, router in enumerate(shard.trace.routers):
        E, seen_T, ids_TK = router.experts, shard.seen(r), shard.ids(r).astype(np.int64)
        cell_TK = (code_T if seen_T is None else code_T[seen_T])[:, None] * E + ids_TK
        there_TK = ids_TK >= 0
        parts: dict[str, tuple[np.ndarray, ...]] = {"count": (cell_TK[there_TK],)}
        if router.first_choice_known:
            parts["first_choice"] = (cell_TK[:, 0][there_TK[:, 0]],)
        if shard.trace.has_weights:
            parts["weight_sum"] = cell_TK[there_TK], shard.weights(r)[there_TK]
        sums = {
            name: np.bincount(*part, minlength=len(labels) * E).reshape(-1, E)
            for name, part in parts.items()
        }
        for d, label in enumerate(labels):
            yield r, str(label), {name: of_DE[d] for name, of_DE in sums.items()}


def _counted(shard: Shard) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
    table = shard.counts()
    router_N, expert_N = table["router"].to_numpy(), table["expert"].to_numpy()
    domain_N = np.array(table["domain"].to_pylist(), object)
    columns = {"count": "assignments", **{name: name for name in OPTIONAL}}
    there = {
        name: table[column].to_numpy()
        for name, column in columns.items()
        if column in table.column_names and not table[column].null_count
    }
    for r, router in enumerate(shard.trace.routers):
        for domain in dict.fromkeys(domain_N[router_N == r]):
            rows, made = (router_N == r) & (domain_N == domain), dict[str, np.ndarray]()
            for name, values_N in there.items():
                if name != "first_choice" or router.first_choice_known:
                    sum_E = np.bincount(expert_N[rows], values_N[rows], router.experts)
                    whole = name in ("count", "first_choice")
                    made[name] = sum_E.astype(np.int64) if whole else sum_E
            yield r, domain, made


INT32, INT64, FLOAT64 = pa.int32(), pa.int64(), pa.float64()
KEYS = {"layer": INT32, "router": INT32, "domain": pa.string(), "expert": INT32}
VALUES = {"count": INT64, "first_choice": INT64, **dict.fromkeys(SUMS, FLOAT64)}
COUNTS = pa.schema(KEYS | VALUES | {"experts": INT32, "top_k": INT32})


def counts(trace: Trace, output: Path, safe_csv: bool = False) -> None:
    """A row per expert, router and domain, also of experts without load."""
    if output.suffix not in (".csv", ".json", ".jsonl", ".parquet"):
        raise MoeInspectError(f"-o {output}: counts are written as .csv, .json or .parquet")
    columns: dict[str, list[object]] = {name: [] for name in COUNTS.names}
    for r, (router, of_domain) in enumerate(zip(trace.routers, sums_by_domain(trace), strict=True)):
        E, fixed = router.experts, {"layer": router.layer, "router": r, "top_k": router.top_k}
        for domain, sums in sorted(of_domain.items()):
            label = safe_cell(domain) if safe_csv and output.suffix == ".csv" else domain
            for name, value in (fixed | {"domain": label, "experts": E}).items():
                columns[name] += [value] * E
            columns["expert"] += range(E)
            for name in VALUES:
                columns[name] += sums[name].tolist() if name in sums else [None] * E
    table = pa.table(columns, schema=COUNTS)
    table = table.drop_columns([n for n in OPTIONAL if table[n].null_count == len(table)])
    with draft_of(output) as draft, open(draft, "wb") as file:
        if output.suffix == ".csv":
            pyarrow.csv.write_csv(table, file)
        elif output.suffix == ".parquet":
            pq.write_table(table, file, compression="zstd")
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
            file.write("".join(lines).encode())

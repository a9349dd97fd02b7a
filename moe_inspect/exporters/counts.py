"""Load by expert and domain, as CSV, JSON or Parquet.

E experts, D domains, U units of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import safe_cell
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import SUMS

OPTIONAL = ("first_choice", *SUMS)
INT32, INT64, FLOAT64 = pa.int32(), pa.int64(), pa.float64()
KEYS = {"layer": INT32, "router": INT32, "domain": pa.string(), "expert": INT32}
VALUES = {"count": INT64, "first_choice": INT64, **dict.fromkeys(SUMS, FLOAT64)}
COUNTS = pa.schema(KEYS | VALUES | {"experts": INT32, "top_k": INT32})


def counts(trace: Trace, output: Path) -> None:
    """A row per expert, router and domain, also of experts without load."""
    if output.suffix not in (".csv", ".json", ".jsonl", ".parquet"):
        raise MoeInspectError(f"-o {output}: counts are written as .csv, .json or .parquet")
    columns: dict[str, list[object]] = {name: [] for name in COUNTS.names}
    counted = count_trace(trace, select(trace), BASE | {"worth"})
    csv, D = output.suffix == ".csv", len(counted.domains)
    labels = [safe_cell(domain) if csv else domain for domain in counted.domains]
    for r, router in enumerate(trace.routers):
        E, fixed = router.experts, {"layer": router.layer, "router": r, "top_k": router.top_k}
        for name, value in (fixed | {"experts": E}).items():
            columns[name] += [value] * D * E
        columns["domain"] += [label for label in labels for _ in range(E)]
        columns["expert"] += [*range(E)] * D
        for name, sum_DE in _sums(counted, r).items():
            columns[name] += [None] * D * E if sum_DE is None else sum_DE.reshape(-1).tolist()
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


def _sums(counted: Counts, r: int) -> dict[str, np.ndarray | None]:
    """The VALUES of a router, [D, E]; None where the trace does not say."""
    of = counted.of[r]
    by_unit = {"energy": of.energy_UE, "saliency_sum": of.saliency_sum_UE}
    return {
        "count": counted.assignments_DE(r),
        "first_choice": of.first_choice_DE,
        "weight_sum": of.weight_sum_DE,
        **{n: None if of_UE is None else counted.by_domain(of_UE) for n, of_UE in by_unit.items()},
    }

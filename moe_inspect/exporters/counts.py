"""Load by expert and domain, as CSV, JSON or Parquet; and the sums that others write as well.

E experts, D domains, U units of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import safe_cell
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import SUMS

# of one router: domain → column → [E]
Sums = dict[str, dict[str, np.ndarray]]
OPTIONAL = ("first_choice", *SUMS)


def sums_by_domain(trace: Trace) -> list[Sums]:
    """Of each router: domain → column → [E]. weight_sum is missing without weights, the other
    OPTIONAL columns where the source did not say."""
    counted, made = count_trace(trace, select(trace), BASE | {"worth"}), list[Sums]()
    for of in counted.of.values():
        by_unit = {"count": of.assignments_UE, "energy": of.energy_UE}
        by_unit["saliency_sum"] = of.saliency_sum_UE
        sums = {"first_choice": of.first_choice_DE, "weight_sum": of.weight_sum_DE}
        sums |= {n: None if v is None else counted.by_domain(v) for n, v in by_unit.items()}
        there = {name: of_DE for name, of_DE in sums.items() if of_DE is not None}
        domains = enumerate(counted.domains)
        made.append({domain: {n: of_DE[d] for n, of_DE in there.items()} for d, domain in domains})
    return made


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

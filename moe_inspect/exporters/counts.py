"""Load by expert and domain, as CSV, JSON or Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError
from moe_inspect.exporters.registry import exporter
from moe_inspect.exporters.sums import sums_by_domain
from moe_inspect.text import safe_cell
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace

COUNTS = pa.schema(
    [
        ("layer", pa.int32()),
        ("router", pa.int32()),
        ("domain", pa.string()),
        ("expert", pa.int32()),
        ("count", pa.int64()),
        ("first_choice", pa.int64()),
        ("weight_sum", pa.float64()),
        ("energy", pa.float64()),
        ("experts", pa.int32()),
        ("top_k", pa.int32()),
    ]
)
OPTIONAL = ("first_choice", "weight_sum", "energy")


@exporter("counts")
def counts(trace: Trace, output: Path, safe_csv: bool = False) -> None:
    """A row per expert, router and domain, also of experts without load: the input of pruning by
    load or by gate weight."""
    columns: dict[str, list[Any]] = {name: [] for name in COUNTS.names}
    for r, (router, of_domain) in enumerate(zip(trace.routers, sums_by_domain(trace), strict=True)):
        for domain, sums in sorted(of_domain.items()):
            fixed = {
                "layer": router.layer,
                "router": r,
                "domain": safe_cell(domain) if safe_csv and output.suffix == ".csv" else domain,
                "experts": router.experts,
                "top_k": router.top_k,
            }
            for name, value in fixed.items():
                columns[name] += [value] * router.experts
            columns["expert"] += range(router.experts)
            for name in ("count", *OPTIONAL):
                columns[name] += sums[name].tolist() if name in sums else [None] * router.experts
    table = pa.table(columns, schema=COUNTS)
    table = table.drop_columns([n for n in OPTIONAL if table[n].null_count == len(table)])
    with draft_of(output) as draft:
        if output.suffix == ".csv":
            with open(draft, "wb") as file:
                pyarrow.csv.write_csv(table, file)
        elif output.suffix == ".parquet":
            with open(draft, "wb") as file:
                pq.write_table(table, file, compression="zstd")
        elif output.suffix in (".json", ".jsonl"):
            draft.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()),
                encoding="utf-8",
            )
        else:
            raise MoeInspectError(f"-o {output}: counts are written as .csv, .json or .parquet")

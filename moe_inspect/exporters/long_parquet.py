"""A row per assignment, with all that is known of its token.

T tokens, K slots, N assignments.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moe_inspect.exporters.registry import exporter, need_decisions
from moe_inspect.trace import schema
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace


@exporter("long-parquet", writes="one row per assignment")
def long_parquet(trace: Trace, output: Path) -> None:
    """A row per assignment, with all that is known of its token, for a quick look in any tool.
    Several times the trace's size."""
    need_decisions(trace, "long-parquet")
    facts = [f for f in schema.tokens_schema(trace.has_loss) if f.name != "token"]
    kinds = [
        ("token", pa.int64()),
        ("layer", pa.uint16()),
        ("router", pa.uint16()),
        ("slot", pa.uint16()),
        ("expert", pa.uint16()),
    ]
    columns = pa.schema([*kinds, *((value, pa.float32()) for value in trace.slot_values), *facts])
    with draft_of(output) as draft, ExitStack() as stack:
        file = stack.enter_context(open(draft, "wb"))
        writer = stack.enter_context(
            pq.ParquetWriter(file, columns, compression="zstd", compression_level=1)
        )
        for shard in trace.shards:
            tokens = shard.tokens()
            for r, router in enumerate(trace.routers):
                seen_T = shard.seen(r)
                of_token = tokens if seen_T is None else tokens.filter(pa.array(seen_T))
                ids_TK = shard.ids(r)
                there_TK = ids_TK >= 0
                row_N, slot_N = np.nonzero(there_TK)
                part = of_token.take(pa.array(row_N))
                n = len(part)
                arrays = [
                    part["token"],
                    *(pa.array(np.full(n, v, np.uint16)) for v in (router.layer, r)),
                ]
                arrays += [
                    pa.array(slot_N.astype(np.uint16)),
                    pa.array(ids_TK[there_TK].astype(np.uint16)),
                ]
                arrays += [
                    pa.array(np.stack(shard.slot_values(r, value)).T[there_TK])
                    for value in trace.slot_values
                ]
                writer.write_table(
                    pa.Table.from_arrays([*arrays, *(part[f.name] for f in facts)], schema=columns)
                )

"""A row per assignment, with all that is known of its token.

T tokens, K slots, N assignments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.exporters import need_decisions
from moe_inspect.trace import schema
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard


def long_parquet(trace: Trace, output: Path) -> None:
    """For a quick look in any tool; several times the trace's size."""
    need_decisions(trace, "long-parquet")
    routers, settings = range(len(trace.routers)), {"compression": "zstd", "compression_level": 1}
    with (
        draft_of(output) as draft,
        open(draft, "wb") as file,
        pq.ParquetWriter(file, long_schema(trace), **settings) as writer,
    ):
        for shard in trace.shards:
            for table in long_tables(trace, shard, routers):
                writer.write_table(table)


def long_schema(trace: Trace) -> pa.Schema:
    """The key, the expert, what was recorded of the slot, and the facts of its token."""
    kinds = [(name, pa.uint16()) for name in ("layer", "router", "slot", "expert")]
    values = [(value, schema.value_type(value)) for value in _values(trace)]
    facts = [f for f in schema.tokens_schema(trace.has_loss) if f.name != "token"]
    return pa.schema([("token", pa.int64()), *kinds, *values, *facts])


def _values(trace: Trace) -> list[str]:
    return [value for value in trace.slot_values if value != schema.DROPPED]


def long_tables(trace: Trace, shard: Shard, routers: Iterable[int]) -> Iterator[pa.Table]:
    """A table per router: its tokens in order, without slots that routed nowhere."""
    tokens, columns = shard.tokens(), long_schema(trace)
    for r in routers:
        seen_T, ids_TK = shard.seen(r), shard.ids(r)
        there_TK = ids_TK >= 0
        row_N, slot_N = np.nonzero(there_TK)
        of_token = tokens if seen_T is None else tokens.filter(pa.array(seen_T))
        part = of_token.take(pa.array(row_N))
        made = {"layer": trace.routers[r].layer, "router": r}
        made = {name: np.full(len(part), value, np.uint16) for name, value in made.items()}
        made |= {"slot": slot_N.astype(np.uint16), "expert": ids_TK[there_TK].astype(np.uint16)}
        made |= {v: np.stack(shard.slot_values(r, v)).T[there_TK] for v in _values(trace)}
        arrays = [pa.array(made[n]) if n in made else part[n] for n in columns.names]
        yield pa.Table.from_arrays(arrays, schema=columns)

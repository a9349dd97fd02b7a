"""moe-policylang's traces (`record_trace(…, output_path="trace.parquet")`): Parquet, a row per
token and layer.

Form: moe-policylang 1.15, integrations/trace_recorder.py. Its `router_scores` are the softmax of
the router logits before they are normalised: no gate weights, but in their order.
N rows, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import NO_ID, Numbering
from moe_inspect.importers.context import ImportContext, Imported, ImportSource
from moe_inspect.importers.registry import importer, named
from moe_inspect.importers.rows.pivot import Choices, batches_of, choices_of
from moe_inspect.importers.values import check_range
from moe_inspect.text import first_line
from moe_inspect.trace.schema import MOST_TOKEN_IDS
from moe_inspect.trace.slot_order import stated
from moe_inspect.trace.writer import RoutedBatch

MOST_ROWS = 2**27  # read at once, a gigabyte of ids per slot
READ = (
    *("prompt_id", "token_idx", "layer_idx", "selected_experts", "router_scores"),
    *("token_id", "phase", "domain_tag"),
)
WIDE = ("router_softmax", "router_logits")  # [E] a row: read for E alone
NOTE = "choices were computed anew from the softmax of the router logits"


def _has_columns(name: str, head: bytes) -> bool:
    return head[:4] == b"PAR1" and b"selected_experts" in head and b"prompt_id" in head


@importer(
    "moe-policylang",
    gives="decisions by prompt; its domain_tag is the domain",
    sniff=_has_columns,
)
def policylang(context: ImportContext) -> Imported:
    read = [_read(context, *f) for f in context.files(r".*\.parquet", "trace.parquet")]
    where, first = context.sources[0].path, read[0].choices
    seen = {f.experts for f in read if f.experts}
    experts = seen.pop() if len(seen) == 1 else context.known_experts(where)
    k = first.ids_LTK.shape[2]
    for f in read:
        if (f.choices.layers, f.choices.ids_LTK.shape[2]) != (first.layers, k):
            raise MoeInspectError(f"{f.path} has other layers or another k than {read[0].path}")
    routers = context.routers_of(first.layers, experts, k, where)
    routers = [stated(router, known=all(f.ordered for f in read)) for router in routers]

    def batches() -> Iterator[RoutedBatch]:
        numbers = Numbering()
        for f in read:
            yield from batches_of(str(f.path), f.choices, routers, f.labels, numbers)

    return Imported(routers, batches(), notes=[NOTE])


class _File:
    """A file's choices; ordered: whether its scores say that slot 0 is the first choice; experts: E
    where it says so."""

    def __init__(self, path: Path, source: ImportSource, table: pa.Table, experts: int):
        where = str(path)
        ids_NK = _matrix(table["selected_experts"], f"{where}: selected_experts", np.int64)
        N, K = ids_NK.shape
        check_range(ids_NK, f"{where}: selected_experts", 0, 2**16 - 2)
        columns = {
            "document": _column(table, "prompt_id", where, 0, 2**31 - 1),
            "position": _column(table, "token_idx", where, 0, 2**31 - 1),
            "layer": _column(table, "layer_idx", where, 0, 2**16 - 1),
        }
        if "phase" in table.column_names:
            decoded = pc.equal(table["phase"].cast(pa.string()), "decode").fill_null(False)  # pyright: ignore[reportAttributeAccessIssue]
            columns["decoded"] = decoded.to_numpy().astype(np.int64)
        if "token_id" in table.column_names:
            columns["token_id"] = _column(table, "token_id", where, NO_ID, MOST_TOKEN_IDS - 1)
        self.path, self.experts = path, experts
        self.labels = _labels(table, columns["document"], source.domain, named(path))
        repeated = {name: values_N.repeat(K) for name, values_N in columns.items()}
        slots = {"slot": np.tile(np.arange(K), N), "expert": ids_NK.reshape(-1)}
        self.choices: Choices = choices_of(where, repeated | slots, K)
        self.ordered = False
        if "router_scores" in table.column_names and not table["router_scores"].null_count:
            scores_NK = _matrix(table["router_scores"], f"{where}: router_scores", np.float64)
            self.ordered = bool((scores_NK[:, 1:] <= scores_NK[:, :-1]).all())


def _read(context: ImportContext, path: Path, source: ImportSource) -> _File:
    try:
        with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if missing := [name for name in READ[:4] if names.count(name) != 1]:
                raise MoeInspectError(f"{path} has no column {missing[0]}, or several")
            if (rows := file.metadata.num_rows) > MOST_ROWS:
                raise MoeInspectError(f"{path} has {rows:,} rows, over {MOST_ROWS:,}: import parts")
            table = file.read([name for name in READ if name in names], use_threads=False)
            wide = [name for name in WIDE if name in names]
            first = next(file.iter_batches(1, [0], wide), None) if wide and len(table) else None
    except (pa.ArrowException, UnicodeError) as error:
        raise MoeInspectError(f"{path}: {first_line(error)}") from None
    context.read(path.stat().st_size)
    if not len(table):
        raise MoeInspectError(f"{path} holds no decisions")
    try:
        return _File(path, source, table, _width(first))
    except (pa.ArrowException, UnicodeError) as error:
        raise MoeInspectError(f"{path}: {first_line(error)}") from None


def _width(first: pa.RecordBatch | None) -> int:
    """E, by the lists of a row; 0 where it has none."""
    rows = first.to_pylist() if first is not None else []
    return max((len(v) for row in rows for v in row.values() if isinstance(v, list)), default=0)


def _column(table: pa.Table, name: str, where: str, low: int, high: int) -> np.ndarray:
    values = table[name].cast(pa.int64())
    values = values.fill_null(low) if low < 0 else values
    if values.null_count:
        raise MoeInspectError(f"{where}: {name} is empty in some rows")
    check_range(found := values.to_numpy(), f"{where}: {name}", low, high)
    return found


def _matrix(column: Any, where: str, dtype: type) -> np.ndarray:
    """[N, K] of a column of lists, which must be of one length."""
    lists = column.combine_chunks()
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise MoeInspectError(f"{where} is of {lists.type}, not of lists")
    flat, lengths = lists.flatten(), np.unique(pc.list_value_length(lists).to_numpy(False))  # pyright: ignore[reportAttributeAccessIssue]
    if len(lengths) != 1 or not lengths[0] >= 1 or flat.null_count:
        raise MoeInspectError(f"{where} has lists of different lengths, or without values")
    kind = pa.int64() if dtype is np.int64 else pa.float64()
    return flat.cast(kind).to_numpy(False).reshape(len(lists), -1)


def _labels(
    table: pa.Table, document_N: np.ndarray, given: str | None, name: str
) -> dict[int, str]:
    """Prompt → its domain: what the user gave, else its domain_tag, else the file's name."""
    labels = dict.fromkeys(np.unique(document_N).tolist(), given or name)
    if given is None and "domain_tag" in table.column_names:
        first, rows = np.unique(document_N, return_index=True)
        tags = table["domain_tag"].cast(pa.string()).take(pa.array(rows)).to_pylist()
        labels |= {d: tag for d, tag in zip(first.tolist(), tags, strict=True) if tag}
    return labels

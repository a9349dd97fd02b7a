"""Makes the Arrow tables of a shard from batches, and writes Parquet files: under a temporary name,
flushed to disk, then renamed. Only encodings that every reader supports: DuckDB reads
BYTE_STREAM_SPLIT of float32, but not of float16.

T tokens, K slots, E experts, D domains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.text import storable
from moe_inspect.trace import replicas, schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import draft_of, sync
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer.batches import CountedBatches, Document, RoutedBatch

# --- tokens and documents


def tokens_table(batches: list[RoutedBatch], token: pa.Array, trace: TraceHeader) -> pa.Table:
    domains = max((b.domains for b in batches), key=len)
    phase_T = np.concatenate([_phases(b) for b in batches])
    known = max(2 + any(r.stack for r in trace.stated_routers), int(phase_T.max(initial=0)) + 1)
    made: dict[str, pa.Array] = {"token": token}
    for name in schema.OF_TEXT:
        values_T = np.concatenate([getattr(b, name) for b in batches])
        made[name] = pa.array(values_T.astype(np.int32, copy=False))
    made["domain"] = _labels(np.concatenate([b.domain for b in batches]), domains)
    made["phase"] = _labels(phase_T, schema.PHASES[:known])
    made["batch"] = pa.array(np.concatenate([b.numbers for b in batches]))
    return pa.table(made, schema=schema.TOKENS)


def documents_table(documents: list[Document]) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for field in schema.DOCUMENTS:
        values = [getattr(d, field.name) for d in documents]
        if pa.types.is_dictionary(field.type):
            columns[field.name] = pa.array(map(storable, values), pa.string()).dictionary_encode()
        else:
            columns[field.name] = pa.array(values, field.type)
    return pa.table(columns, schema=schema.DOCUMENTS)


# --- decisions


def routing_columns(trace: TraceHeader, batches: list[RoutedBatch]) -> pa.Schema:
    """The columns of the routing table, nullable only where a slot of these batches is null."""
    slots = max(r.top_k for r in trace.stated_routers)
    nullable = any(r.top_k < slots for r in trace.stated_routers) or any(
        _holds_nowhere(ids, r.experts)
        for b in batches
        for ids, r in zip(b.ids, trace.stated_routers, strict=True)
    )
    columns = schema.routing_schema(trace.stated_routers, trace.slot_values, nullable=nullable)
    if schema.PHYSICAL not in trace.slot_values:
        return columns
    maps = [one for batch in batches for one in batch.replicas.items()]
    return columns.with_metadata(replicas.metadata(replicas.of_passes(maps)))


def routing_table(
    trace: TraceHeader, r: int, batches: list[RoutedBatch], token: pa.Array, columns: pa.Schema
) -> pa.Table:
    """The decisions of router r, its slots in the order that the manifest states."""
    router, parts = trace.stated_routers[r], [b.ids[r] for b in batches]
    ids_KT = _slot_major(parts, max((p.dtype for p in parts if len(p)), default=parts[0].dtype))
    assert len(ids_KT) == router.top_k
    nowhere_KT, E = None, router.experts
    if _holds_nowhere(ids_KT, E):
        keeps = schema.DROPPED in trace.slot_values
        nowhere_KT = ids_KT >= E if keeps else ids_KT == np.iinfo(ids_KT.dtype).max
    experts_KT = ids_KT.astype(schema.id_dtype(trace.stated_routers).to_pandas_dtype(), copy=False)
    weights_KT = _values(batches, r, "weight")
    order_KT, key_KT = None, weights_KT  # None: they are in order already
    if router.first_choice_known and key_KT is None and "logits" in trace.tables:
        key_KT = _chosen_logits(_logits(batches, r), experts_KT, nowhere_KT)
    if router.first_choice_known and key_KT is not None:
        order_KT = schema.descending_slots(key_KT, nowhere_KT)
    if order_KT is not None:
        ids_KT = np.take_along_axis(ids_KT, order_KT, 0)
        experts_KT = np.take_along_axis(experts_KT, order_KT, 0)
        nowhere_KT = None if nowhere_KT is None else np.take_along_axis(nowhere_KT, order_KT, 0)
    seen = _seen(router, batches, token)
    arrays = [seen, *_router_columns(router, r, len(seen))]
    arrays += _slots(experts_KT, nowhere_KT, columns, "expert")
    for value in trace.slot_values:
        if value == schema.DROPPED:
            null_KT = (ids_KT < E) | (ids_KT >= min(2 * E, np.iinfo(ids_KT.dtype).max))
            arrays += _slots((ids_KT - E).astype(experts_KT.dtype), null_KT, columns, value)
            continue
        values_KT = weights_KT if value == "weight" else _values(batches, r, value)
        assert values_KT is not None
        if order_KT is not None:
            values_KT = np.take_along_axis(values_KT, order_KT, 0)
        arrays += _slots(values_KT, nowhere_KT, columns, value)
    return pa.Table.from_arrays(arrays, schema=columns)


def _values(batches: list[RoutedBatch], r: int, value: str) -> np.ndarray | None:
    """One of `schema.SLOT_VALUES`, [K, T], sizes rounded; None where the batches have none."""
    is_weight = value == "weight"
    found = [b.weights if is_weight else b.extras.get(f"{value}s") for b in batches]
    parts = [of_routers[r] for of_routers in found if of_routers is not None]
    if not parts:
        return None
    if value == schema.PHYSICAL:
        return _slot_major([part.astype(np.uint16) for part in parts], np.uint16)
    parts = [_widened(part) for part in parts]
    values_KT = _slot_major(parts, np.float32)
    return values_KT if is_weight else _rounded(values_KT)


def _rounded(sizes: np.ndarray) -> np.ndarray:
    """float32, not negative, to 9 significant bits: a relative error of at most 2⁻⁹, and the range
    of float32, which float16 does not have. What is stored takes a third of the space."""
    bits = sizes.view(np.uint32)
    return ((bits + 0x3FFF + (bits >> 15 & 1)) & 0xFFFF8000).astype(np.uint32).view(np.float32)


def _logits(batches: list[RoutedBatch], r: int) -> np.ndarray:
    return np.concatenate([b.extras["logits"][r] for b in batches])


def _chosen_logits(
    logits_TE: np.ndarray, ids_KT: np.ndarray, nowhere_KT: np.ndarray | None = None
) -> np.ndarray:
    """The router logits of the experts chosen, float32 [K, T]: a larger logit is a larger
    weight."""
    expert_KT = ids_KT if nowhere_KT is None else np.where(nowhere_KT, 0, ids_KT)
    return np.take_along_axis(logits_TE, expert_KT.T.astype(np.int64), axis=1).T.astype(np.float32)


def logits_table(
    trace: TraceHeader, r: int, batches: list[RoutedBatch], token: pa.Array, columns: pa.Schema
) -> pa.Table:
    """The router logits of router r. One of fewer experts than the widest is padded with NaN: a
    table has one width."""
    width, router = columns.field("logits").type.list_size, trace.stated_routers[r]
    logits_TE = _logits(batches, r).astype(np.float16, copy=False)
    padded_TE = np.pad(logits_TE, ((0, 0), (0, width - logits_TE.shape[1])), constant_values=np.nan)
    values = pa.FixedSizeListArray.from_arrays(pa.array(padded_TE.reshape(-1)), width)
    seen = _seen(router, batches, token)
    arrays = [seen, *_router_columns(router, r, len(seen)), values]
    return pa.Table.from_arrays(arrays, schema=columns)


# --- counts


def counts_table(trace: TraceHeader, r: int, counted: CountedBatches) -> pa.Table:
    D, E = counted.assignments[r].shape
    number_D = np.array([d.document for d in counted.documents] * trace.by_document, np.int32)
    code_of = {label: d for d, label in enumerate(dict.fromkeys(counted.domains))}
    code_D = np.array([code_of[label] for label in counted.domains])
    first, assigned = counted.first_choice, counted.assignments[r].reshape(-1)
    arrays = [
        *_router_columns(trace.stated_routers[r], r, D * E),
        *[pa.array(np.repeat(number_D, E))] * trace.by_document,
        _labels(np.repeat(code_D, E), [*code_of]),
        pa.array(np.tile(np.arange(E, dtype=np.uint16), D)),
        pa.array(assigned.astype(np.int64)),
        pa.nulls(D * E, pa.int64())
        if first is None
        else pa.array(first[r].reshape(-1).astype(np.int64)),
    ]
    arrays += [pa.array(counted.sums[name][r].reshape(-1)) for name in trace.sums]
    return pa.Table.from_arrays(arrays, schema=trace.columns_of("counts"))


# --- columns


def _seen(router: Router, batches: list[RoutedBatch], token: pa.Array) -> pa.Array:
    """The tokens that reach a router."""
    if not router.stack:
        return token
    parts, start = [], 0
    for batch in batches:
        parts.append(token[start : start + len(batch.token_id)][batch.seen(router)])
        start += len(batch.token_id)
    return pa.concat_arrays(parts)


def _router_columns(router: Router, r: int, rows: int) -> list[pa.Array]:
    return [pa.array(np.full(rows, value, np.uint16)) for value in (router.layer, r)]


def _phases(batch: RoutedBatch) -> np.ndarray:
    if batch.phases is not None:
        return batch.phases
    codes_T = np.full(len(batch.token_id), schema.PHASES.index(batch.phase))
    codes_T[: batch.encoded] = schema.PHASES.index("encode")
    return codes_T


def _labels(codes: np.ndarray, labels: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int32, copy=False)), pa.array(map(storable, labels), pa.string())
    )


def _holds_nowhere(ids: np.ndarray, experts: int) -> bool:
    return bool(ids.size) and int(ids.max()) >= experts


def _slot_major(parts_TK: Sequence[np.ndarray], dtype: npt.DTypeLike) -> np.ndarray:
    """[K, T], each slot contiguous: what a column is made of without another copy."""
    values_KT = np.empty((parts_TK[0].shape[1], sum(map(len, parts_TK))), dtype)
    return np.concatenate([part.T for part in parts_TK], axis=1, out=values_KT)


def _widened(weights_TK: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16 (uint16); other weights as they are."""
    if weights_TK.dtype != np.uint16:
        return weights_TK
    return (weights_TK.astype(np.uint32) << 16).view(np.float32)


def _slots(
    values_KT: np.ndarray, nowhere_KT: np.ndarray | None, columns: pa.Schema, prefix: str
) -> list[pa.Array]:
    fields = [f for f in columns if f.name.startswith(prefix)]
    masks = nowhere_KT if nowhere_KT is not None else [None] * len(values_KT)
    arrays = [_array(v, m, f.type) for v, m, f in zip(values_KT, masks, fields, strict=False)]
    # slots beyond this router's own top-k
    return arrays + [pa.nulls(values_KT.shape[1], f.type) for f in fields[len(arrays) :]]


def _array(values_T: np.ndarray, null_T: np.ndarray | None, kind: pa.DataType) -> pa.Array:
    if null_T is not None:
        return pa.array(values_T, type=kind, mask=null_T)
    assert values_T.flags.c_contiguous
    return pa.Array.from_buffers(kind, len(values_T), [None, pa.py_buffer(values_T)])


DICTIONARY = {"layer", "router", *schema.TOKENS.names, *schema.DOCUMENTS.names}
DICTIONARY -= {"token", "tokens"}  # all different, or nearly so
STATISTICS = {"token", "layer", "router", "document", "batch"}


def write_part(
    path: Path, columns: pa.Schema, groups: Sequence[Callable[[], pa.Table]], bf16: bool = False
) -> Json:
    """Writes a Parquet file, a row group at a time. `bf16`: its weights are values of bfloat16.
    Returns what its line in shards-<rank>.jsonl states: rows, bytes, footer_crc32, sha256."""
    # expert ids leave the dictionary encoding bit-packed and near their entropy: a codec only costs
    # time on them. Of the bytes of a bf16 weight two are zero and one is nearly always the same:
    # lz4 takes a third of zstd's time to read and half to write, for a fifth more of space; fp16's
    # third byte has 3 bits of use, which only an entropy coder finds
    codec_of = {"expert": "none", "physical": "none", "weight": "lz4" if bf16 else "zstd"}
    codecs = {f.name: codec_of.get(f.name.partition("_")[0], "zstd") for f in columns}
    ids = ("expert", schema.PHYSICAL)
    labels = [f.name for f in columns if f.name in DICTIONARY or f.name.startswith(ids)]
    encodings = {f.name: "BYTE_STREAM_SPLIT" for f in columns if pa.types.is_float32(f.type)}
    if "token" in columns.names:
        encodings["token"] = "DELTA_BINARY_PACKED"
    rows = 0
    with draft_of(path) as draft:
        # (pyarrow's stubs know only one value for all columns)
        with (
            open(draft, "wb", buffering=2**20) as file,
            pq.ParquetWriter(
                file,
                columns,
                compression=codecs,  # pyright: ignore[reportArgumentType]
                compression_level={name: 1 for name, codec in codecs.items() if codec == "zstd"},
                use_dictionary=labels,  # pyright: ignore[reportArgumentType]
                column_encoding=encodings,
                write_statistics=[f.name for f in columns if f.name in STATISTICS],  # pyright: ignore[reportArgumentType]
                write_page_checksum=True,
            ) as writer,
        ):
            for make in groups:
                part = make()
                rows += len(part)
                writer.write_table(part, row_group_size=max(len(part), 1))
        with open(draft, "rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            size, footer_crc32 = written.tell(), checksums.footer_crc32(pa.PythonFile(written))
    return {"rows": rows, "bytes": size, "footer_crc32": footer_crc32, "sha256": sha256}


def write_shard(
    root: Path,
    rank: int,
    number: int,
    columns: Mapping[str, pa.Schema],
    groups: Mapping[str, Sequence[Callable[[], pa.Table]]],
    bf16: bool,
) -> list[Json]:
    """Writes the tables of a shard, of each its columns and its row groups, as `write_part` does.
    Returns what their lines state of each."""
    lines = list[Json]()
    for table, of_table in columns.items():
        path = f"{table}/part-{rank}-{number}.parquet"
        written = write_part(root / path, of_table, groups[table], bf16)
        lines.append({"table": table, "path": path, **written})
    for table in columns:
        sync(root / table)
    return lines


def vocabulary_bytes(vocabulary: pa.Table) -> bytes:
    """The file vocabulary.parquet of token_id, token."""
    sink = pa.BufferOutputStream()
    words = vocabulary.cast(schema.VOCABULARY_SCHEMA)
    pq.write_table(words, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()

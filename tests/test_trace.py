"""The trace format: what is written is what is read, by every reader, whatever the shards; damage
is one clear line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect.errors import MoeInspectError
from moe_inspect.public import open_trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import run_edges
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter, resume_point
from moe_inspect.trace.writer.batches import SHARD_TOKENS, ShardLimits
from tests.support.damage import disk_of, edit_manifest
from tests.support.synthetic import a_pass, write_passes


def a_batch(
    rng: np.random.Generator, number: int, T: int, routers: list[Router], nowhere: bool = False
) -> RoutedBatch:
    ids, weights = [], []
    for r in routers:
        kind = np.uint8 if r.experts < 256 else np.uint16
        chosen = rng.integers(0, r.experts, (T, r.top_k)).astype(kind)
        if nowhere:  # in the last slots
            chosen[np.sort(rng.random(chosen.shape), axis=1) > 0.7] = np.iinfo(kind).max
        ids.append(chosen)
        weights.append(-np.sort(-rng.random((T, r.top_k)).astype(np.float16), axis=1))
    of = {"document": number, "domain": number % 3}
    given: dict[str, Any] = {name: np.full(T, value, np.int32) for name, value in of.items()}
    given |= {"token_id": np.arange(T, dtype=np.int32) % 50, "domains": ["d0", "d1", "d2"]}
    documents = [Document(number, f"d{number % 3}", "made", T)]
    return a_pass(number, ids, T, weights=weights, documents=documents, **given)


def written(
    root: Path,
    batches: Iterable[RoutedBatch],
    routers: list[Router],
    shard_tokens: int = SHARD_TOKENS,
    shard_seconds: float = 60,
    **options: Any,
) -> None:
    limits = ShardLimits(shard_tokens, shard_seconds)
    with TraceWriter(root, {"model": {"id": "made"}}, routers, limits=limits, **options) as writer:
        for batch in batches:
            writer.write(batch)


ROUTERS = [
    Router(1, "a", "layers.1.a", 8, 2),
    Router(1, "b", "layers.1.b", 60, 4),
    Router(3, "a", "layers.3.a", 8, 2),
]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.sampled_from([1, 30, 65_536]),
    st.booleans(),
    st.sampled_from([8, 255, 256, 257, 512]),
)
def test_rows_come_back_whatever_the_shards(
    tmp_path_factory: Any, sizes: list[int], shard_tokens: int, nowhere: bool, experts: int
) -> None:
    root, rng = tmp_path_factory.mktemp("trace"), np.random.default_rng(len(sizes))
    routers = [*ROUTERS, Router(5, "a", "layers.5.a", experts, 3)]
    batches = [a_batch(rng, n, T, routers, nowhere) for n, T in enumerate(sizes)]
    written(root, batches, routers, shard_tokens=shard_tokens)
    trace, T = open_trace(root), sum(sizes)
    assert trace.n_tokens == T
    assert trace.manifest["counts"] == {"tokens": T, "decisions": T * 4, "dropped": 0}
    tokens = trace.tokens()
    assert (tokens["token"] == range(T)).all()
    assert (tokens["domain"] == [f"d{n % 3}" for n, T in enumerate(sizes) for _ in range(T)]).all()
    for r, router in enumerate(routers):
        table, slots = trace.routing(router=r), range(router.top_k)
        expected = np.concatenate([b.ids[r] for b in batches]).astype(float)
        expected[expected == np.iinfo(batches[0].ids[r].dtype).max] = np.nan
        weights = np.concatenate([b.weights[r] for b in batches if b.weights]).astype(np.float32)
        weights[np.isnan(expected)] = np.nan
        for name, values in (("expert", expected), ("weight", weights)):
            got = table[[f"{name}_{j}" for j in slots]].to_numpy(float)
            np.testing.assert_array_equal(got, values)
        assert set(table["layer"]) <= {router.layer}
        unused = [c for c in table if c.startswith("expert_") and int(c[7:]) >= router.top_k]
        assert table[unused].isna().all(axis=None)
        ids = np.concatenate([s.ids(r) for s in trace.shards])
        np.testing.assert_array_equal(ids, np.nan_to_num(expected, nan=-1))


def test_columns_and_encodings(tmp_path: Path) -> None:
    written(tmp_path / "t", [a_batch(np.random.default_rng(0), 0, 500, ROUTERS)], ROUTERS)
    file = pq.ParquetFile(tmp_path / "t/routing/part-0-0.parquet")
    slots = [f"{kind}_{j}" for kind in ("expert", "weight") for j in range(4)]
    assert file.schema_arrow.names == ["token", "layer", "router", *slots]
    assert file.schema_arrow.field("expert_0").type == pa.uint8()
    assert file.schema_arrow.field("weight_0").type == pa.float32()
    assert file.metadata.num_row_groups == len(ROUTERS)
    group = file.metadata.row_group(0)
    of = {c.path_in_schema: c for c in map(group.column, range(group.num_columns))}
    for name, encoding, codec in (
        ("token", "DELTA_BINARY_PACKED", "ZSTD"),
        ("weight_0", "BYTE_STREAM_SPLIT", "ZSTD"),
        ("expert_0", "RLE_DICTIONARY", "UNCOMPRESSED"),
    ):
        assert encoding in of[name].encodings
        assert of[name].compression == codec
    wide = [Router(0, "a", "layers.0.a", 257, 2)]
    written(tmp_path / "wide", [a_batch(np.random.default_rng(0), 0, 5, wide)], wide, weights=False)
    names = pq.read_schema(tmp_path / "wide/routing/part-0-0.parquet")
    assert names.field("expert_0").type == pa.uint16()
    assert not any(n.startswith("weight") for n in names.names)


def test_uncommitted_files_are_ignored_and_resume_deletes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    written(tmp_path, [a_batch(rng, n, 20, ROUTERS) for n in range(5)], ROUTERS, shard_tokens=40)
    lines = (tmp_path / "shards-0.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 9
    # the last shard's lines are torn: its files are there, but nothing says they are whole
    (tmp_path / "shards-0.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    edit_manifest(tmp_path, status="recording", counts={"tokens": 80, "decisions": 240})
    trace = open_trace(tmp_path)
    assert trace.n_tokens == 80
    assert len(trace.routing(router=0)) == 80
    point = resume_point(tmp_path)
    assert (point.next_token, point.next_batch, point.shards) == (80, 4, 2)
    names = sorted(p.name for p in (tmp_path / "routing").iterdir())
    assert names == ["part-0-0.parquet", "part-0-1.parquet"]
    with TraceWriter(tmp_path, {}, ROUTERS, resume=point, limits=ShardLimits(40)) as writer:
        writer.write(a_batch(np.random.default_rng(2), 4, 20, ROUTERS))
    assert open_trace(tmp_path).n_tokens == 100
    assert (open_trace(tmp_path).tokens()["token"] == range(100)).all()


def test_a_slow_model_commits_by_time(tmp_path: Path) -> None:
    batches = [a_batch(np.random.default_rng(3), n, 5, ROUTERS) for n in range(3)]
    for seconds, shards in ((0.0, 3), (60.0, 1)):
        written(tmp_path / str(seconds), batches, ROUTERS, shard_seconds=seconds)
        assert open_trace(tmp_path / str(seconds)).n_shards == shards


@pytest.mark.parametrize("complete", [True, False])
def test_a_group_is_committed_together_or_not_at_all(complete: bool, tmp_path: Path) -> None:
    """A prompt and what was generated from it: passes 0 to 2, and 3 to 5, of which the last is yet
    to come where a run is cut short."""
    rng = np.random.default_rng(3)
    writer = TraceWriter(tmp_path / "t", {}, ROUTERS, limits=ShardLimits(25))
    for n in range(6 if complete else 5):
        writer.write(replace(a_batch(rng, n, 20, ROUTERS), group=n // 3))
    writer.close("complete" if complete else "interrupted")
    files = [shard.files for shard in open_trace(tmp_path / "t").shards]
    batches = [(of.first_batch, of.last_batch) for of in files]
    assert batches == ([(0, 2), (3, 5)] if complete else [(0, 2)])
    assert resume_point(tmp_path / "t").next_batch == (6 if complete else 3)


def test_everything_is_on_disk_before_anything_speaks_of_it(tmp_path: Path) -> None:
    """A file is synchronised before it gets its name. The name lasts once its directory is
    synchronised: of each part file before the lines that list it are, of the manifest at once."""
    named: list[tuple[int, Path, bool]] = []
    done: list[tuple[int, int]] = []  # files and directories, as they are synchronised
    replace_file, fsync = os.replace, os.fsync

    def identity(of: Any) -> tuple[int, int]:
        found = os.stat(of)
        return found.st_dev, found.st_ino

    def replaced(old: Path, new: Path) -> None:
        named.append((len(done), Path(new), identity(old) in done))
        replace_file(old, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        patch.setattr(os, "fsync", lambda handle: (fsync(handle), done.append(identity(handle))))
        batches = [a_batch(np.random.default_rng(0), n, 20, ROUTERS) for n in range(3)]
        written(tmp_path / "t", batches, ROUTERS, shard_tokens=30)
    assert len([path for _, path, _ in named if path.suffix == ".parquet"]) == 3 * 3
    lines = identity(tmp_path / "t/shards-0.jsonl")
    for at, path, is_whole in named:
        assert is_whole, path
        of_part = path.suffix == ".parquet" and lines in done[at:]
        assert identity(path.parent) in done[at : done.index(lines, at) if of_part else at + 1], (
            path
        )


@pytest.mark.parametrize("full_from", [20, 58])  # in the middle, and at the last commit
def test_a_full_disk_is_one_clear_line_and_what_was_committed_is_safe(
    full_from: int, tmp_path: Path
) -> None:
    def batches() -> Iterator[RoutedBatch]:
        for n in range(60):
            if n == full_from:
                full.enter_context(disk_of(20_000))
            yield a_batch(np.random.default_rng(n), n, 1000, ROUTERS)

    said = r"^[^\n]*File too large[^\n]*--resume[^\n]*$"
    with ExitStack() as full, pytest.raises(MoeInspectError, match=said):
        written(tmp_path, batches(), ROUTERS, shard_tokens=2000)
    trace = open_trace(tmp_path)
    assert trace.status == "interrupted"
    assert 0 < trace.n_tokens < 60_000
    assert len(trace.routing(router=2)) == trace.n_tokens
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("bf16", [False, True])
def test_pandas_polars_and_duckdb_read_the_same_rows(bf16: bool, tmp_path: Path) -> None:
    import duckdb
    import polars as pl

    rng = np.random.default_rng(4)
    even = [Router(layer, "a", f"layers.{layer}.a", 8, 2) for layer in range(3)]
    # some shards have slots that routed nowhere, some have none
    batches = [a_batch(rng, n, 300, even, nowhere=n in (1, 2)) for n in range(6)]
    bits = [
        [
            np.sort(rng.integers(0x3000, 0x3F80, w.shape, np.uint16))[:, ::-1]
            for w in b.weights or []
        ]
        for b in batches
    ]
    if bf16:
        batches = [replace(b, weights=of) for b, of in zip(batches, bits, strict=True)]
    written(tmp_path, batches, even, shard_tokens=600)
    part = pq.ParquetFile(tmp_path / "routing/part-0-2.parquet")
    weight = part.metadata.row_group(0).column(part.schema.names.index("weight_0"))
    assert weight.compression == ("LZ4" if bf16 else "ZSTD")
    if bf16:
        read = part.read_row_group(0)["weight_0"].to_numpy().view(np.uint32)
        assert (
            read == np.concatenate([of[0][:, 0] for of in bits[4:]]).astype(np.uint32) << 16
        ).all()
    parts = sorted((tmp_path / "routing").iterdir())
    nullable = [pq.read_schema(path).field("expert_0").nullable for path in parts]
    assert nullable == [True, True, False]
    for table in ("routing", "tokens", "documents"):
        files = str(tmp_path / table / "*.parquet")
        keys = {"routing": ["router", "token"], "tokens": ["token"]}.get(table, ["document"])
        by_pandas = pd.read_parquet(tmp_path / table).sort_values(keys).reset_index(drop=True)
        ours = getattr(open_trace(tmp_path), table)().sort_values(keys).reset_index(drop=True)
        by_polars = pl.read_parquet(files).sort(keys)
        by_duckdb = duckdb.sql(f"select * from read_parquet('{files}') order by {', '.join(keys)}")
        assert list(by_pandas) == by_polars.columns == by_duckdb.columns
        for name in by_pandas:
            expected, here = (
                of[name].astype(object).where(of[name].notna(), None).tolist()
                for of in (by_pandas, ours)
            )
            assert here == expected
            assert by_polars[name].to_list() == expected
            assert [row[0] for row in by_duckdb.select(name).fetchall()] == expected


def test_a_router_has_rows_of_the_tokens_that_it_sees(tmp_path: Path) -> None:
    """Of an encoder-decoder: batches of both kinds of tokens, of one alone, and one that nothing of
    is decoded."""
    listed = [
        Router(1, "gate", f"{stack}.1", 4, 1, stack=stack) for stack in ("encoder", "decoder")
    ]
    fed = [(3, 2), (2, 0), (0, 2), (1, 1)]  # tokens of the encoder, of the decoder
    ids, tokens = np.arange(11, dtype=np.uint8) % 4, 0
    passes = []
    for number, (encoded, decoded) in enumerate(fed):
        where = ids[tokens : tokens + encoded + decoded, None]
        of = {"phase": "decode" if number == 2 else "prefill", "encoded": encoded}
        passes.append(a_pass(number, [where[:encoded], where[encoded:]], len(where), **of))
        tokens += len(where)
    trace = write_passes(tmp_path, listed, passes, shard_tokens=7)
    phases = trace.tokens().phase.to_numpy(str)
    fed_as = "encode encode encode prefill prefill encode encode decode decode encode prefill"
    assert list(phases) == fed_as.split()
    for r, sees in enumerate((phases == "encode", phases != "encode")):
        routing = trace.routing(router=r)
        assert list(routing.token) == list(np.flatnonzero(sees))
        assert list(routing.expert_0) == list(ids[sees])
    assert len(list(trace.shards)) > 1
    for shard in trace.shards:
        for r in range(2):
            seen = shard.seen(r)
            assert seen is not None
            assert len(shard.ids(r)) == seen.sum()
    assert trace.manifest["counts"] == {"tokens": 11, "decisions": 11, "dropped": 0}
    assert trace.n_decisions == 11


def test_routers_of_a_shard_are_read_from_several_threads(tmp_path: Path) -> None:
    """As the last shards of a trace are counted: each thread reads other routers of one file that is
    open once."""
    routers = [Router(layer, "a", f"layers.{layer}.a", 128, 8) for layer in range(24)]
    written(tmp_path, [a_batch(np.random.default_rng(0), 0, 16_000, routers)], routers)

    def read(r: int) -> float:
        return float(shard.slots(r)[0].sum() + shard.slot_weights(r)[0].sum())

    (shard,) = open_trace(tmp_path).shards
    alone = [*map(read, range(24))]
    for _ in range(5):
        (shard,) = open_trace(tmp_path).shards
        with ThreadPoolExecutor(4) as pool:
            assert [*pool.map(read, range(24))] == alone


@pytest.mark.parametrize(
    ("keys_KT", "edges"),
    [
        ([[]], [0]),
        ([[7]], [0, 1]),
        ([[3, 3, 3]], [0, 3]),
        ([[0, 0, 1, 0]], [0, 2, 3, 4]),
        ([[0, 0, 1, 1], [5, 6, 6, 6]], [0, 1, 2, 4]),
    ],
)
def test_a_run_ends_where_any_key_changes(keys_KT: list[list[int]], edges: list[int]) -> None:
    keys = [np.array(key_T, np.int64) for key_T in keys_KT]
    assert run_edges(*keys).tolist() == edges
    assert run_edges(np.column_stack(keys)).tolist() == edges
    assert run_edges(np.ones(4, np.uint32), np.arange(4) < 3).tolist() == [0, 3, 4]

"""commit_every: recorded batches become a shard early, and it stays; whenever its writer dies."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.public import open_trace
from moe_inspect.trace.merge import merge
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import (
    CountedBatches,
    RoutedBatch,
    ShardLimits,
    TraceWriter,
    resume_point,
)
from tests.support.damage import edit_lines
from tests.support.sweep import WHOLE
from tests.support.watched import committed, waited
from tests.test_trace import ROUTERS, a_batch

AT_ONCE = 1e-9  # seconds: after every batch
TOKENS = 20
EVERY = 1 if WHOLE else 5  # of the steps to die at


def some_batches(n: int = 7, group: int = 0) -> list[RoutedBatch]:
    rng = np.random.default_rng(5)
    made = [a_batch(rng, number, TOKENS, ROUTERS) for number in range(n)]
    for batch in made:
        for r, router in enumerate(ROUTERS):  # no expert twice in a decision
            order = np.argsort(rng.random((TOKENS, router.experts)), axis=1)[:, : router.top_k]
            batch.ids[r][:] = order
            if batch.batch % 2:
                batch.ids[r][::3, -1] = 255  # routed nowhere
    return [replace(b, group=b.batch // group) for b in made] if group else made


def writer(root: Path, commit_every: float | None = None, **options: Any) -> TraceWriter:
    limits = ShardLimits(60, commit_every=commit_every)
    return TraceWriter(root, {"model": {"id": "made"}}, ROUTERS, limits=limits, **options)


def write(root: Path, batches: list[RoutedBatch], **options: Any) -> None:
    with writer(root, **options) as writes:
        for batch in batches:
            writes.write(batch)


def rows(root: Path) -> list[pd.DataFrame]:
    """The tables of a trace."""
    trace = open_trace(root)
    routing = [trace.routing(router=r) for r in range(len(ROUTERS))]
    return [trace.tokens(), trace.documents(), *routing]


def check_same_rows(root: Path, expected: list[pd.DataFrame]) -> None:
    for table, of_plain in zip(rows(root), expected, strict=True):
        pd.testing.assert_frame_equal(table, of_plain)


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("seconds", [AT_ONCE, 0.02])
def test_its_rows_are_those_of_a_trace_of_full_shards(
    tmp_path: Path, seconds: float, group: int
) -> None:
    batches = some_batches(group=group)
    with writer(tmp_path / "plain") as plain:
        for batch in batches[:2]:
            plain.write(batch)
        time.sleep(0.05)
        assert open_trace(tmp_path / "plain").n_tokens == 0  # before a shard is full
        for batch in batches[2:]:
            plain.write(batch)
    with writer(tmp_path / "early", commit_every=seconds) as early:
        for batch in batches:
            early.write(batch)
            time.sleep(0.03)
    check_same_rows(tmp_path / "early", rows(tmp_path / "plain"))
    # control: there are more shards, which stay
    shards = {line["shard"] for line in edit_lines(tmp_path / "early")}
    assert len(shards) > len({line["shard"] for line in edit_lines(tmp_path / "plain")})
    assert shards == {*range(len(shards))}
    found = verify(tmp_path / "early")
    assert (found.ok, found.status, found.uncommitted) == (True, "complete", [])
    merge([tmp_path / "early"], tmp_path / "merged")
    check_same_rows(tmp_path / "merged", rows(tmp_path / "plain"))
    assert len({line["shard"] for line in edit_lines(tmp_path / "merged")}) == 1


def test_what_was_recorded_can_be_read_while_the_recording_goes_on(tmp_path: Path) -> None:
    batches, root = some_batches(), tmp_path / "t"
    with writer(root, commit_every=0.01) as early:
        for n in committed(root, early, batches, TOKENS):
            # also what came last, while nothing else comes
            trace = open_trace(root)
            expected = np.concatenate([b.ids[0] for b in batches[:n]]).astype(float)
            expected[expected == 255] = np.nan
            got = trace.routing(router=0)[["expert_0", "expert_1"]].to_numpy(float)
            assert np.array_equal(got, expected, equal_nan=True)
            assert verify(root).ok
            assert {line["shard"] for line in edit_lines(root)} == {*range(n)}


def test_passes_of_one_group_are_committed_together(tmp_path: Path) -> None:
    """A prompt and what was generated from it: committed when the next prompt comes, not before."""
    with writer(tmp_path / "t", commit_every=AT_ONCE) as early:
        for batch in some_batches(n=3, group=2):
            early.write(batch)
        waited(lambda: open_trace(tmp_path / "t").n_tokens > 0)
        time.sleep(0.05)
        assert open_trace(tmp_path / "t").n_tokens == 2 * TOKENS
    assert open_trace(tmp_path / "t").n_tokens == 3 * TOKENS


def test_an_interrupted_trace_resumes_after_its_last_batch(tmp_path: Path) -> None:
    batches, root = some_batches(), tmp_path / "t"
    with pytest.raises(KeyboardInterrupt), writer(root, commit_every=AT_ONCE) as early:  # noqa: PT012
        for batch in batches[:5]:
            early.write(batch)
        raise KeyboardInterrupt
    assert (open_trace(root).status, open_trace(root).n_tokens) == ("interrupted", 5 * TOKENS)
    point = resume_point(root)
    assert point.next_batch == 5
    write(root, batches[5:], resume=point, commit_every=AT_ONCE)
    assert verify(root).ok
    assert (open_trace(root).tokens()["token"] == range(7 * TOKENS)).all()


def test_a_trace_whose_last_shards_were_to_be_replaced_reads_and_resumes(tmp_path: Path) -> None:
    """Earlier versions marked such shards, and left files that no line names when killed."""
    root, batches = tmp_path / "t", some_batches()
    with pytest.raises(KeyboardInterrupt), writer(root, commit_every=AT_ONCE) as early:  # noqa: PT012
        for _ in committed(root, early, batches[:5], TOKENS):
            pass
        raise KeyboardInterrupt
    lines = edit_lines(root)
    edit_lines(root, [line | ({"early": True} if line["shard"] > 2 else {}) for line in lines])
    (root / "tokens" / "part-0-9.parquet").write_bytes(b"of a shard that was replaced")
    assert verify(root).uncommitted == ["tokens/part-0-9.parquet"]
    assert open_trace(root).n_tokens == 5 * TOKENS
    write(root, batches[5:], resume=resume_point(root))
    write(tmp_path / "plain", batches)
    check_same_rows(root, rows(tmp_path / "plain"))
    found = verify(root)
    assert (found.ok, found.status, found.uncommitted) == (True, "complete", [])


def died_at(root: Path, step: int, batches: list[RoutedBatch]) -> bool:
    """Writes in a process that dies as by kill -9 at its n-th step on the disk. Whether it did."""
    pid = os.fork()
    if pid == 0:
        left = step

        def dying(function: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return function(*args, **options)

            return call

        try:
            for name in ("fsync", "replace", "unlink"):
                setattr(os, name, dying(getattr(os, name)))
            point = resume_point(root) if (root / "trace.json").exists() else None
            start = point.next_batch if point else 0
            write(root, batches[start:], resume=point, commit_every=AT_ONCE)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def test_killed_at_any_step_it_reads_verifies_and_resumes(tmp_path: Path) -> None:
    batches = some_batches(n=3)
    write(tmp_path / "plain", batches)
    expected = rows(tmp_path / "plain")
    step, committed_shards, uncommitted = 0, 0, 0
    while True:
        root = tmp_path / f"t{step}"
        if not died_at(root, step, batches):
            break
        if (root / "trace.json").exists():
            trace = open_trace(root)
            committed_shards += trace.n_tokens > 0
            found = verify(root)
            assert found.ok, (step, found.violation)
            # of the last steps only the lock is left to remove
            done = trace.status == "complete"
            assert found.status == ("complete" if done else "interrupted"), step
            uncommitted += bool(found.uncommitted)
            assert (trace.tokens()["token"] == range(trace.n_tokens)).all()
            assert len(trace.routing(router=1)) == trace.n_tokens
        # a second death, while it is resumed
        died_at(root, step // 3, batches)
        if (root / "trace.json").exists():
            open_trace(root)
        died_at(root, 10**6, batches)
        found = verify(root)
        assert (found.ok, found.status, found.uncommitted) == (True, "complete", []), step
        check_same_rows(root, expected)
        step += EVERY
    check_same_rows(root, expected)
    # control: it died when shards were committed, and while the files of the next were written
    assert step > 30
    assert committed_shards > 10 / EVERY
    assert uncommitted > 10 / EVERY


# --- counts


def counted(n: int, domains: int) -> CountedBatches:
    rng = np.random.default_rng(n)
    load = [rng.integers(0, 3, (domains, r.experts)) for r in ROUTERS]
    names = ["a", "b", "c"][:domains]
    return CountedBatches(
        n, 100, names, load, [x // 2 for x in load], {"weight_sum": [x * 0.5 for x in load]}
    )


def test_counts_are_committed_as_they_come(tmp_path: Path) -> None:
    root, parts = tmp_path / "t", [counted(n, min(3, n + 1)) for n in range(5)]
    with TraceWriter(
        root, {}, ROUTERS, counts_only=True, limits=ShardLimits(commit_every=AT_ONCE)
    ) as writer:
        assert [*committed(root, writer, parts, 100)] == [1, 2, 3, 4, 5]
    trace = open_trace(root)
    assert [shard.files.tokens for shard in trace.shards] == [100] * 5
    assert verify(root).ok
    table = trace.counts()
    for r, router in enumerate(ROUTERS):
        for d, name in enumerate("abc"):
            cells = table[(table["router"] == r) & (table["domain"] == name)]
            got = cells.groupby("expert")[["assignments", "weight_sum"]].sum()
            expected = sum(p.assignments[r][d] for p in parts if d < len(p.assignments[r]))
            assert (got["assignments"] == expected).all()
            assert (got["weight_sum"] == expected * 0.5).all()
            assert len(got) == router.experts


def test_times_of_the_command_line() -> None:
    import typer

    from moe_inspect.cli.options import seconds

    times = {"5s": 5, "500ms": 0.5, "2m": 120, "1.5": 1.5, "1h": 3600}
    assert {text: seconds(text) for text in times} == times
    for text in ("0", "0s", "-1s", "5 days", "s", "nan", "1e9999"):
        with pytest.raises(typer.BadParameter, match="write a time like"):
            seconds(text)

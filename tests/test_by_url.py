"""A trace is read by a URL as from a disk, here from memory; and is written to a disk alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_inspect import compare, import_trace, merge, open_trace, record, trace_model
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace, report
from moe_inspect.trace.files.location import Remote, output_location
from moe_inspect.trace.verify import verify
from tests.support import own
from tests.support.damage import edit_manifest
from tests.support.synthetic import uniform_ids, write_trace

fsspec = pytest.importorskip("fsspec")
E = 8


@pytest.fixture
def there(tmp_path: Path) -> Iterator[str]:
    """A place in memory that no other test has."""
    url = f"memory://{tmp_path.name}-{os.getpid()}"
    yield url
    files = fsspec.filesystem("memory")
    if files.exists(Remote(url).path):
        files.rm(Remote(url).path, recursive=True)


def of_six_documents(path: Path, seed: int) -> Trace:
    ids = [uniform_ids(np.random.default_rng([seed, r]), 60, E, 2) for r in range(2)]
    document = np.repeat(np.arange(6), 10)
    return write_trace(path, ids, E, words=3, document=document, batch_tokens=10)


def copied(trace: Path, url: str) -> str:
    Remote(url).filesystem.put(str(trace), Remote(url).path, recursive=True)
    return url


def same(ours: Trace, theirs: Trace) -> None:
    for name in ("routing", "tokens", "documents", "vocabulary"):
        pd.testing.assert_frame_equal(getattr(ours, name)(), getattr(theirs, name)())


def test_read_as_from_a_disk(there: str, tmp_path: Path) -> None:
    here = of_six_documents(tmp_path / "t", 0)
    url = copied(tmp_path / "t", f"{there}/t")
    assert str(open_trace(url).path) == url
    same(open_trace(url), here)
    found = verify(url)
    assert found.ok, found
    assert (found.status, found.shards) == ("complete", here.n_shards)
    expected = report(here)
    for place in (url, f"file://{tmp_path / 't'}"):
        tables = report(place).tables
        assert {*tables} == {*expected.tables}
        for name in tables:
            pd.testing.assert_frame_equal(tables[name], expected.tables[name])
    with pytest.raises(MoeInspectError, match="cannot open strange://t"):
        open_trace("strange://t")
    with pytest.raises(MoeInspectError, match="no trace at memory://"):
        open_trace(f"{there}/u")


def test_compared_and_merged_from_there(there: str, tmp_path: Path) -> None:
    a, b = (of_six_documents(tmp_path / name, n).path for n, name in enumerate("ab"))
    at_a, at_b = (copied(tmp_path / name, f"{there}/{name}") for name in "ab")
    found, expected = compare(at_a, at_b), compare(a, b)
    for name in ("overall", "depth", "documents", "load_shift"):
        pd.testing.assert_frame_equal(found.tables[name], expected.tables[name])
    same(merge([at_a, at_b], tmp_path / "m"), merge([a, b], tmp_path / "n"))


def test_what_was_not_completed_is_read_too(there: str, tmp_path: Path) -> None:
    """Nobody can tell whether its writer goes on."""
    of_six_documents(tmp_path / "t", 0)
    edit_manifest(tmp_path / "t", status="recording")
    found = verify(copied(tmp_path / "t", f"{there}/t"))
    assert (found.ok, found.status, found.tokens) == (True, "recording", 60), found


def test_nothing_is_written_to_a_url(there: str, tmp_path: Path) -> None:
    a = of_six_documents(tmp_path / "a", 0).path
    (tmp_path / "loads.csv").write_text("layer,expert,count\n0,0,5\n0,1,7\n")
    writes: list[Callable[[str], object]] = [
        lambda url: merge([a], url),
        lambda url: import_trace("counts", [tmp_path / "loads.csv"], url, top_k=1),
        lambda url: record(own.gpt(), url),
        lambda url: trace_model("demo", url),
    ]
    for write in writes:
        for url in (f"{there}/t", "strange://t"):
            with pytest.raises(MoeInspectError) as error:
                write(url)
            expected = f"{url} is a URL: write to a local directory, then copy it there"
            assert str(error.value) == expected
    assert not Remote(there).exists()
    assert output_location(f"file://{tmp_path}/t") == tmp_path / "t"

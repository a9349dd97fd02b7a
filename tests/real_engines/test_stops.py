"""A real engine that goes away in the middle of a trace, and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

import moe_inspect
from moe_inspect.capture.server import serve
from tests.real_engines.server import INSTALLED, serving
from tests.real_engines.test_traces import SMALL, Property, begun, compared, run, traced_locally


@pytest.mark.parametrize("engine", INSTALLED)
def test_the_server_stops_and_another_goes_on(
    engine: str,
    corpus: Path,
    tmp_path: Path,
    record_property: Property,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # at once: SGLang would go on until it has answered everything
    monkeypatch.setattr(serve, "GRACE_S", 0.0)
    name, out, options = "bundled Mixtral", tmp_path / "t", ("--data", corpus, *SMALL)
    with serving(engine, name, tmp_path) as first:
        running = begun(first, out, options)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 1, said
    last = said.splitlines()[-1]
    assert last.startswith(f"error: {first.url}: no answer after 6 attempts")
    assert last.endswith("continue with --resume")
    cut = moe_inspect.open_trace(out)
    assert cut.status == "interrupted"
    with serving(engine, name, tmp_path) as second:
        run(second, out, *options, "--resume")
        local = traced_locally(second, tmp_path / "local", corpus, batch_tokens=1000)
    trace = moe_inspect.open_trace(out)
    assert 0 < cut.n_tokens < trace.n_tokens
    compared(record_property, second, "server stopped, trace resumed with another", trace, local)

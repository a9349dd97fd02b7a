"""Fixtures of pytest for an engine's own tests:

pytest_plugins = ["moe_inspect.conformance.fixtures"]

@pytest.fixture(scope="session")
def conformance_url(conformance_model):
    with serve(conformance_model) as url:  # with what makes the engine return its experts
        yield url

def test_routes(conformance_result):
    assert conformance_result.ok, conformance_result.findings
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_inspect.conformance.check import Conformance, check
from moe_inspect.conformance.models import MODELS, save


@pytest.fixture(scope="session", params=list(MODELS))
def conformance_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of a tiny model, one after the other of MODELS."""
    return save(request.param, tmp_path_factory.mktemp("conformance") / request.param)


@pytest.fixture(scope="session")
def conformance_result(conformance_model: Path, conformance_url: str) -> Conformance:
    """A server of the model, judged by all cases."""
    return check(conformance_url, conformance_model)

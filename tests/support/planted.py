"""Traces in which it is known what is to be found, and the report on them as text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from moe_inspect.public import Trace, report
from moe_inspect.reporting.render import terminal
from moe_inspect.reporting.report import Report
from tests.support.synthetic import uniform_ids, write_trace

T, E, K = 6_000, 8, 2
DOCUMENT = np.arange(T) // 100
DOMAINS = [("code", "law", "math", "prose")[d % 4] for d in range(60)]


def planted(root: Path, **changes: object) -> Trace:
    """Layer 0: chance. Layer 1: by token id. Layer 2: code goes to expert 3. Layer 3: half of
    everything to expert 5, none to expert 6."""
    rng = np.random.default_rng(0)
    token_id = np.minimum(rng.zipf(1.3, T), 499)
    ids = [uniform_ids(rng, T, E, K) for _ in range(4)]
    ids[1][:] = np.stack([token_id % E, (token_id % E + rng.integers(1, E, T)) % E], axis=1)
    code = np.array([DOMAINS[d] == "code" for d in DOCUMENT]) & (rng.random(T) < 0.8)
    ids[2][code] = np.stack([np.full(T, 3), (3 + rng.integers(1, E, T)) % E], axis=1)[code]
    five = rng.random(T) < 0.5
    ids[3][five] = [5, 2]
    ids[3][ids[3] == 6] = 7
    weights = [np.sort(rng.dirichlet([1, 1], T))[:, ::-1].astype(np.float32) for _ in range(4)]
    settings = {"document": DOCUMENT, "domain_of_document": DOMAINS, "token_id": token_id}
    settings |= {"weights": weights, "words": 500}
    return write_trace(root, ids, E, **settings | changes)  # type: ignore[arg-type]


def uniform(root: Path, T: int = T, E: int = E, K: int = K, L: int = 3, seed: int = 1) -> Report:
    rng = np.random.default_rng(seed)
    ids = [uniform_ids(rng, T, E, K) for _ in range(L)]
    given = {"document": np.arange(T) // 100, "token_id": rng.integers(0, 100, T)}
    return report(write_trace(root, ids, E, domain_of_document=DOMAINS, **given))


def text_of(made: Report) -> str:
    """The report in a file, with every finding and note."""
    file = io.StringIO()
    terminal.print_report(made, file)
    return "\n".join([file.getvalue(), *sentences(made), *made.notes()])


def sentences(made: Report) -> list[str]:
    """The verdict, as a reader of the terminal has it."""
    return [finding.text for finding in made.verdict()]

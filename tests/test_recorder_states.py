"""Whatever is done within a recording, in any order, the trace holds what was fed and what each
router chose, token by token, as a witness on the model sees it."""

from __future__ import annotations

import io
import tempfile
import threading
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import DynamicCache

import moe_inspect
from tests.support.families import build
from tests.support.witness import agreed, padded_left, witnessed
from tests.support.zoo import token_batch

MODEL = build("mixtral")
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


class Recording(RuleBasedStateMachine):
    """`fed`: a row (position, document, domain) per token; the witness knows the rest."""

    @initialize(
        capture=st.sampled_from(["tap", "dispatch"]),
        logits=st.booleans(),
        commit_every=st.sampled_from([None, 1e-9]),
    )
    def begin(self, **options: Any) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.fed: list[tuple[int, int, str]] = []
        self.documents = 0
        self.decoding: dict[str, Any] | None = None
        self.witnessed = witnessed(MODEL)
        self.seen = self.witnessed.__enter__()
        self.recorder = moe_inspect.record(MODEL, Path(self.folder.name) / "t", **options)
        self.recorder.__enter__()

    def run_text(self, batch: dict[str, torch.Tensor], text: dict[str, Any]) -> None:
        """Expects every token of the rows of a batch, and counts their `lengths` on."""
        with torch.no_grad():
            MODEL(**batch, past_key_values=text["cache"])
        S = batch["input_ids"].shape[1]
        for b, _ in batch["attention_mask"][:, -S:].nonzero().tolist():
            self.fed.append((text["lengths"][b], text["rows"][b], text["domain"]))
            text["lengths"][b] += 1

    @rule(lengths=LENGTHS, seed=st.integers(0, 99), left=st.booleans(), label=st.booleans())
    def prompt(self, lengths: list[int], seed: int, left: bool, label: bool) -> None:
        """A batch of new documents, padded on either side, which can be gone on with."""
        batch = (padded_left if left else token_batch)(lengths, seed)
        if label:
            self.recorder.label(domains=["law"] * len(lengths))
        rows = range(self.documents, self.documents + len(lengths))
        self.documents += len(lengths)
        text = {"cache": DynamicCache(config=MODEL.config), "mask": batch["attention_mask"]}
        text |= {"rows": rows, "lengths": [0] * len(lengths), "domain": "law" if label else ""}
        self.run_text(batch, text)
        # else the padding would be in the middle
        self.decoding = text if left or len(set(lengths)) == 1 else None

    @precondition(lambda self: self.decoding is not None)
    @rule(tokens=st.integers(1, 3), steps=st.integers(1, 4), seed=st.integers(0, 99))
    def go_on(self, tokens: int, steps: int, seed: int) -> None:
        """Passes of a few tokens with the cache of the last prompt."""
        at: Any = self.decoding
        for step in range(steps):
            B = len(at["rows"])
            ids = torch.from_numpy(np.random.default_rng(seed + step).integers(2, 90, (B, tokens)))
            at["mask"] = torch.cat([at["mask"], torch.ones_like(ids)], 1)
            position = torch.tensor(at["lengths"])[:, None] + torch.arange(tokens)
            batch = {"input_ids": ids, "attention_mask": at["mask"], "position_ids": position}
            self.run_text(batch, at)

    @rule(lengths=LENGTHS)
    def pause(self, lengths: list[int]) -> None:
        with self.recorder.paused(), self.seen.paused(), torch.no_grad():
            MODEL(**token_batch(lengths))

    @rule(lengths=LENGTHS, layer=st.integers(0, 1))
    def fail(self, lengths: list[int], layer: int) -> None:
        """A pass that ends with an exception, which the caller catches."""
        failing = MODEL.model.layers[layer].mlp.register_forward_hook(lambda *_: 1 / 0)
        with failing, pytest.raises(ZeroDivisionError), torch.no_grad():
            MODEL(**token_batch(lengths))
        self.decoding = None

    @invariant()
    def another_thread_may_ask(self) -> None:
        if hasattr(self, "recorder"):
            asked = list[int]()
            thread = threading.Thread(target=lambda: asked.append(self.recorder.tokens))
            thread.start()
            thread.join()
            assert asked == [len(self.fed)]

    def teardown(self) -> None:
        if not hasattr(self, "recorder"):
            return
        self.witnessed.__exit__(None, None, None)
        with self.folder:
            with redirect_stderr(io.StringIO()):  # that nothing was recorded
                self.recorder.__exit__(None, None, None)
            if self.fed:
                tokens = agreed(Path(self.folder.name) / "t", self.seen)
                columns = tokens[["position", "document", "domain"]]
                assert list(columns.itertuples(index=False, name=None)) == self.fed
                assert tokens["batch"].nunique() == self.seen.passes


def test_any_order_of_passes() -> None:
    few = settings(max_examples=15, stateful_step_count=12, deadline=None, derandomize=True)
    run_state_machine_as_test(Recording, settings=settings(few, phases=[Phase.generate]))

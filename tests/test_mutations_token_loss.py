"""The tests of token losses can fail: each mistake of this list, put in on purpose, makes one of
them do so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_inspect.capture import token_loss
from moe_inspect.capture.hook.inputs.rows import Rows
from tests import test_token_loss
from tests.support.mutation import fails, mutation

pytestmark = pytest.mark.slow


def patching(test: Callable[..., None], *given: str) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            test(*given, path, monkeypatch)

    return check


padded = patching(test_token_loss.test_it_is_the_cross_entropy_of_the_models_own_logits, "olmoe")
beams = patching(test_token_loss.test_of_beams_a_token_that_another_row_goes_on_from_has_none)
chunks = patching(test_token_loss.test_no_more_logits_than_a_chunk_are_made)


def masked(path: Path) -> None:
    """A token that cannot follow."""
    values = token_loss.nats(torch.tensor([[0.0, float("-inf"), 0.0]]), torch.tensor([2]))
    assert torch.allclose(values, torch.full((2, 1), 2.0).log())


def planned(path: Path) -> None:
    """A pass of two sequences, one after the other, and the pass that follows."""

    def rows(real: list[int], token: list[int], sequence: list[int], position: list[int]) -> Rows:
        of: list[Any] = [np.array(a) for a in (token, [0] * len(token), sequence, position)]
        return Rows(np.array(real, bool), *of, domain=np.zeros(len(token)))

    first = rows([1, 1, 0, 1, 1, 1], [5, 6, 7, 8, 9], [0, 0, 1, 1, 1], [0, 1, 0, 1, 2])
    assert token_loss.next_tokens(first).tolist() == [6, -1, -1, 8, 9, -1]
    after = rows([1, 1], [3, 4], [0, 1], [2, 3])
    assert token_loss.first_tokens(first, after, 2).tolist() == [-1, 4], "a padded row ended"
    skipped = rows([1, 1], [3, 4], [0, 1], [2, 4])
    assert token_loss.first_tokens(first, skipped, 2).tolist() == [-1, -1]


def twice(path: Path) -> None:
    """Rows that change places twice, and back."""

    class Cache:
        def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...

    watched, cache = token_loss.Places(), Cache()
    watched.watch(cache)
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    assert not watched.kept(3).any()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert watched.kept(3).all()
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert watched.kept(3).tolist() == [False, False, True]
    watched.watch(cache)
    assert watched.kept(3).all()


following = test_token_loss.test_what_follows_may_come_with_the_next_pass
another_head = test_token_loss.test_a_head_that_does_not_give_the_models_logits_is_not_used
MUTATIONS = {
    "a token predicts itself": (token_loss, "= token_BS[:, 1:][follows_BS]", "= token_BS[:, :-1][follows_BS]", padded),
    "padding follows": (token_loss, "follows_BS = real_BS[:, 1:] & real_BS[:, :-1]", "follows_BS = real_BS[:, :-1]", padded),
    "the next packed sequence follows": (token_loss, "position_BS[:, 1:] == position_BS[:, :-1] + 1", "position_BS[:, 1:] != position_BS[:, :-1]", following),
    "the next planned sequence follows": (token_loss, "same = fed.sequence[1:] == fed.sequence[:-1]", "same = fed.sequence[1:] >= fed.sequence[:-1]", planned),
    "padding ends no planned row": (token_loss, "row = np.flatnonzero(fed.real)", "row = np.arange(len(fed.token_id))", planned),
    "a planned row goes on from anywhere": (token_loss, "== before.position[at_B] + 1", ">= before.position[at_B] + 1", planned),
    "a pass of other text follows": (token_loss, "if fed.before is before.after and joins and", "if", following),
    "a pass that was not recorded is none": (token_loss, "joins = fed.after.length - fed.S == before.after.length", "joins = True", following),
    "the first position of a row is continued": (token_loss, "rows_N * S + S - 1", "rows_N * S", following),
    "the next pass adds none": (token_loss, "held, self._held = self._held, None", "held, self._held = None, None", following),
    "chunks are given others' tokens": (token_loss, "next_N.split(C)", "next_N.flip(0).split(C)", padded),
    "all tokens in one chunk": (token_loss, "C = max(1, CHUNK_LOGITS // V)", "C = fed.T", chunks),
    "a logit is no log-probability": (token_loss, "loss_C + sum_C.log()", "loss_C", padded),
    "the entropy with the other sign": (token_loss, "sum_C.log() - mean_C", "sum_C.log() + mean_C", padded),
    "what cannot follow makes no number": (token_loss, "below_CV.clamp_(min=NO_CHANCE)", "pass", masked),
    "the end of a sequence has a loss of 0": (token_loss, "np.full((len(LOSS), self.T), np.nan, np.float32)", "np.zeros((len(LOSS), self.T), np.float32)", padded),
    "any head is taken": (token_loss, "if not head.checked and not head.agrees(hidden, logits[:, -1]):", "if False:", another_head),
    "a head that is far off agrees": (token_loss, "<= TOLERANCE * most", "<= most + most", another_head),
    "beams stay where they are": (token_loss, "kept_B = self._places.kept(B)", "kept_B = np.ones(B, bool)", beams),
    "all beams change places": (token_loss, "return np.ones(B, bool)", "return np.zeros(B, bool)", following),
    "beams are said in every step": (token_loss, "self._told = True", "pass", beams),
    "the cache keeps what watches it": (token_loss, 'vars(self._cache).pop("reorder_cache", None)', "pass", beams),
    "rows change places once": (token_loss, "self._from_B = from_B if self._from_B is None else self._from_B[from_B]", "self._from_B = from_B", twice),
}  # fmt: skip


def test_unmutated_all_is_well(tmp_path: Path) -> None:
    checks: dict[Callable[[Path], None], None] = dict.fromkeys(c for *_, c in MUTATIONS.values())
    for n, check in enumerate(checks):
        (tmp_path / str(n)).mkdir()
        check(tmp_path / str(n))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    module, old, new, check = MUTATIONS[name]
    put = mutation(module, old, new)

    def mutated() -> None:
        put()
        check(tmp_path)

    assert fails(mutated)

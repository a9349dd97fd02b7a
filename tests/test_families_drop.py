"""What routers of transformers drop by capacity: of which expert, against the logits that a hook of
the test's own has seen, before the capacity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.model.choices import switch_dropped
from moe_inspect.model.find import find_routers
from moe_inspect.public import Trace
from moe_inspect.trace.schema import DROPPED
from moe_inspect.trace.verify import verify
from tests.support import zoo
from tests.test_dropped import of

CAPACITY, E = 4, 8
pytestmark = pytest.mark.skipif(
    tuple(map(int, zoo.hf.__version__.split(".")[:2])) < (5, 18),
    reason="there Switch counts each token by itself, and drops none",
)


def switch(capacity: int = CAPACITY) -> Any:
    return zoo.build("switch_transformers", expert_capacity=capacity, router_jitter_noise=0.1)


def routers_of(model: Any) -> list[Any]:
    found = [site.logits_module for site in find_routers(model)]
    assert len(found) == 4
    return found


@contextmanager
def logits_of(model: Any) -> Iterator[list[torch.Tensor]]:
    """Of each router in its first call from now on."""
    routers, logits = routers_of(model), list[torch.Tensor]()
    seen: list[list[torch.Tensor]] = [[] for _ in routers]

    def keep(r: int, *call: Any) -> None:
        seen[r].append(call[-1].detach().clone())

    hooks = [m.classifier.register_forward_hook(partial(keep, r)) for r, m in enumerate(routers)]
    yield logits
    for hook in hooks:
        hook.remove()
    logits += [calls[0] for calls in seen]


def chosen_and_kept(
    logits: list[torch.Tensor], inputs: dict[str, torch.Tensor]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The experts that its tokens chose [T], and which had room: the first of each sequence."""
    found = []
    for r, logits_BSE in enumerate(logits):
        ids_BS = logits_BSE.argmax(-1).numpy()
        so_far_BSE = np.eye(E, dtype=int)[ids_BS].cumsum(1)
        kept_BS = np.take_along_axis(so_far_BSE, ids_BS[..., None], 2)[..., 0] <= CAPACITY
        real_BS = inputs["attention_mask"].bool().numpy() if r < 2 else np.ones_like(kept_BS)
        found.append((ids_BS[real_BS], kept_BS[real_BS]))
    return found


def check(trace: Trace, truth: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Each decision and each count."""
    verified, tables = verify(trace.path), moe_inspect.report(trace).tables
    assert verified.ok, verified
    assert verified.dropped == sum((~kept_T).sum() for _, kept_T in truth)
    for r, (ids_T, kept_T) in enumerate(truth):
        for name, there_T in (("expert_0", kept_T), (f"{DROPPED}_0", ~kept_T)):
            found_T = trace.routing(router=r).sort_values("token")[name].to_numpy(float)
            assert np.array_equal(found_T, np.where(there_T, ids_T, np.nan), equal_nan=True)
        before_E, lost_E = (np.bincount(ids, minlength=E) for ids in (ids_T, ids_T[~kept_T]))
        rows = tables["load"].query("router == @r")
        assert (rows["assignments"] + rows["dropped"]).tolist() == before_E.tolist()
        assert rows["dropped"].tolist() == lost_E.tolist()
        row = tables["balance"].iloc[r]
        assert row["dropped"] == row["empty_slots"] == lost_E.sum()


@pytest.mark.parametrize("how", ["eval", "compiled", "checkpointed"])
def test_switch_says_which_expert_dropped_a_token(how: str, tmp_path: Path) -> None:
    """Also in training, where the router's logits are of a jittered input."""
    model, inputs = switch(), zoo.inputs("switch_transformers", [60, 33, 5])
    if how == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with logits_of(model) as logits:
        run = torch.compile(model, backend="eager") if how == "compiled" else model
        with moe_inspect.record(run, tmp_path / "t"), torch.set_grad_enabled(how == "checkpointed"):
            output = run(**inputs)
            if how == "checkpointed":
                output.logits.sum().backward()
    truth = chosen_and_kept(logits, inputs)
    assert all(20 < (~kept_T).sum() < len(kept_T) - 20 for _, kept_T in truth)
    trace = moe_inspect.open_trace(tmp_path / "t")
    check(trace, truth)
    assert "before drops" in of(trace, "dropped").text  # pyright: ignore[reportOptionalMemberAccess]


def test_counts_are_of_what_was_kept(tmp_path: Path) -> None:
    model, inputs = switch(), zoo.inputs("switch_transformers", [60])
    with logits_of(model) as logits:
        counted = zoo.recorded(model, tmp_path / "t", inputs, counts_only=True)
    load = moe_inspect.report(counted).tables["load"].groupby("router")["assignments"].apply(list)
    for r, (ids_T, kept_T) in enumerate(chosen_and_kept(logits, inputs)):
        assert load[r] == np.bincount(ids_T[kept_T], minlength=E).tolist()


def test_where_nothing_is_dropped_nothing_is_said(tmp_path: Path) -> None:
    """With room for all; and of a family without capacity, whose traces have no such column."""
    roomy = zoo.recorded(switch(60), tmp_path / "t", zoo.inputs("switch_transformers", [60]))
    assert roomy.routing()[f"{DROPPED}_0"].isna().all()
    assert of(roomy, "dropped") is None
    other = zoo.recorded(zoo.build("olmoe"), tmp_path / "u", zoo.inputs("olmoe", [9]))
    assert not other.has_dropped
    assert not other.drops
    assert other.routing().filter(like=DROPPED).empty


def test_it_is_the_routers_own_choice_where_scores_tie() -> None:
    """In bfloat16 scores are equal whose logits are not."""
    router = routers_of(switch())[0].to(torch.bfloat16)
    hidden = torch.randn(1, 500, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    router.expert_capacity = 500
    chosen, _, logits = router(hidden.bfloat16())
    router.expert_capacity = 0
    dropped = switch_dropped(router, router(hidden.bfloat16()))
    assert torch.equal(dropped[:, 0], chosen[0].argmax(-1))
    assert not torch.equal(dropped[:, 0], logits[0].argmax(-1)), "control"
    assert (switch_dropped(router, (chosen, logits)) == -1).all()
    weights = chosen.sum(-1, keepdim=True).float()  # as in transformers 5.17, without logits
    assert (switch_dropped(router, (weights, chosen, weights)) == -1).all()


def test_what_an_intervention_sends_nowhere_is_dropped_by_no_expert(tmp_path: Path) -> None:
    model, inputs = switch(), zoo.inputs("switch_transformers", [60])
    trace = zoo.recorded(model, tmp_path / "a", inputs)
    with moe_inspect.intervene(model, replay=trace):
        again = zoo.recorded(model, tmp_path / "b", inputs)
    assert again.routing().equals(trace.routing())
    for router in routers_of(model):
        router.expert_capacity = 60
    with moe_inspect.intervene(model, replay=trace):
        kept = zoo.recorded(model, tmp_path / "c", inputs).routing()
    assert kept["expert_0"].equals(trace.routing()["expert_0"])
    assert kept[f"{DROPPED}_0"].isna().all()


# --- NLLB: experts 1 and 0 run whatever its routers choose


NARROW: dict[str, Any] = {"moe_eval_capacity_token_fraction": 0.1}


def test_nllb_says_how_many_choices_were_dropped_not_of_which_expert(tmp_path: Path) -> None:
    """The experts that its routers chose are not those that run."""
    model, inputs = zoo.build("nllb_moe", **NARROW), zoo.inputs("nllb_moe", [60])
    with logits_of(model) as logits:
        trace = zoo.recorded(model, tmp_path / "t", inputs)
    table = moe_inspect.report(trace).tables["balance"]
    for r, logits_TE in enumerate(logits):
        ids_TK = logits_TE.topk(2, dim=1).indices.numpy()
        first_E, both_E = (np.bincount(ids.ravel(), minlength=E) for ids in (ids_TK[:, 0], ids_TK))
        room = -(-len(ids_TK) // 10)
        # second choices come after all first ones
        lost = np.maximum(both_E - room, 0).sum()
        assert first_E.max() > room
        assert table["empty_slots"][r] == lost
        assert table["drop_rate"][r] == pytest.approx(lost / ids_TK.size)
    assert trace.drops
    assert not trace.has_dropped
    found = of(trace, "dropped")
    assert found is not None
    assert "every load here is what was left" in found.text


def test_nllb_may_leave_out_second_choices_which_are_no_drops(tmp_path: Path) -> None:
    model = zoo.build("nllb_moe", second_expert_policy="random", **NARROW)
    trace = zoo.recorded(model, tmp_path / "t", zoo.inputs("nllb_moe", [60]))
    assert not trace.drops
    assert of(trace, "empty_slots") is not None

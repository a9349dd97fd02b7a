"""Hooks of our own on a model and its routers, which see what a recorder should: the tokens of each
forward pass and, from the routers' logits, the experts and weights of each token.

B batch rows, S positions, T rows of a forward pass, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import moe_inspect
from moe_inspect.trace.verify import verify
from tests.support.zoo import token_batch

Routes = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids [T, K], weights [T, K], logits [T, E]


class Witness:
    """`ids`: of the tokens that were fed, padding left out. A pass that fails is not seen, nor a
    call of a router outside a pass (a recomputation of gradient checkpointing)."""

    def __init__(self, model: Any):
        config: Any = getattr(model, "config", None)
        self.K = getattr(config, "num_experts_per_tok", 2)
        # Mixtral normalises, and its config does not state it
        self.normalises = getattr(config, "norm_topk_prob", config is not None)
        self.ids: list[int] = []
        self.parts: dict[int, list[Routes]] = {}
        self.passes, self.inside = 0, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = len(self.ids), self.passes, {layer: [*of] for layer, of in self.parts.items()}
        yield
        n, self.passes, self.parts = before
        del self.ids[n:]

    def begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = torch.ones_like(ids)
        self.real_T = mask[:, -ids.shape[1] :].flatten().bool()
        self.fed = ids.flatten()[self.real_T].tolist()
        self.logits: dict[int, list[Tensor]] = {}
        self.inside = True

    def route(self, layer: int, module: Any, args: Any, output: Any) -> None:
        if self.inside:
            logits = (output[0] if isinstance(output, tuple) else output).detach().float().clone()
            self.logits.setdefault(layer, []).append(logits.flatten(0, -2))

    def end(self, module: Any, args: Any, output: Any) -> None:
        self.inside = False
        self.ids += self.fed
        self.passes += 1
        for layer, parts in self.logits.items():
            logits_TE = torch.cat(parts)[self.real_T]
            weights_TK, ids_TK = logits_TE.softmax(1).topk(self.K)
            if self.normalises:
                weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
            seen = ids_TK.numpy(), weights_TK.numpy(), logits_TE.numpy()
            self.parts.setdefault(layer, []).append(seen)

    def routes(self, layer: int) -> Routes:
        ids, weights, logits = (
            np.concatenate(part) for part in zip(*self.parts[layer], strict=True)
        )
        return ids, weights, logits


@contextmanager
def witnessed(model: Any) -> Iterator[Witness]:
    seen = Witness(model)
    routers = getattr(model, "gates", None) or [layer.mlp.gate for layer in model.model.layers]
    hooks = [
        model.register_forward_pre_hook(seen.begin, with_kwargs=True),
        model.register_forward_hook(seen.end),
        *(r.register_forward_hook(partial(seen.route, n)) for n, r in enumerate(routers)),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def traced(model: Any, path: Path, **options: Any) -> Iterator[Witness]:
    """Recorded, and seen by a witness."""
    with witnessed(model) as seen, moe_inspect.record(model, path, **options):
        yield seen


def agreed(path: Path, seen: Witness) -> pd.DataFrame:
    """The tokens of a trace that `verify` accepts, and that holds what the witness has seen: each
    decision, or their counts."""
    found = verify(path)
    assert found.ok, str(found)
    trace = moe_inspect.open_trace(path)
    assert trace.n_tokens == len(seen.ids)
    layers = {router.layer for router in trace.routers}
    if trace.counts_only:
        counts = trace.counts().groupby(["layer", "expert"])[["assignments", "first_choice"]].sum()
        for layer in layers:
            ids, _, logits = seen.routes(layer)
            for name, chosen in (("assignments", ids), ("first_choice", ids[:, 0])):
                load_E = np.bincount(chosen.ravel(), minlength=logits.shape[1])
                assert counts.loc[layer][name].tolist() == load_E.tolist()
        return pd.DataFrame()
    tokens = trace.tokens()
    assert tokens.token_id.tolist() == seen.ids
    for layer in layers:
        ids, weights, logits = seen.routes(layer)
        table = trace.routing(layers=layer)
        got = table.filter(regex="^expert_").to_numpy()
        order, by_id = np.argsort(got, 1), np.argsort(ids, 1)
        assert (np.take_along_axis(got, order, 1) == np.take_along_axis(ids, by_id, 1)).all()
        if "weight_0" in table:
            got = table.filter(regex="^weight_").to_numpy()
            assert (np.diff(got, axis=1) <= 0).all(), "the first choice is not the first"
            got, weights = (np.take_along_axis(*of, 1) for of in ((got, order), (weights, by_id)))
            np.testing.assert_allclose(got, weights, rtol=2**-10, atol=2**-24)
        if "logits" in trace.tables:
            got = np.stack(trace.logits(layers=layer)["logits"].to_list())
            np.testing.assert_allclose(got, logits, rtol=2**-10, atol=2**-14)
    return tokens


def padded_left(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    batch, most = token_batch(lengths, seed), max(lengths)
    for name, rows in batch.items():
        batch[name] = torch.stack([r.roll(most - n) for r, n in zip(rows, lengths, strict=True)])
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, "position_ids": position_ids}

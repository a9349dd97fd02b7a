"""What a user's code shows as a router's choice, checked.

T rows a router sees, K slots, E experts, B batch rows, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.choices import Args, Called, Choice, Kwargs


class ChoiceReader:
    """Reads the choices and logits of the router `path`, which chooses from `experts` experts. K is
    that of its first call. Without `top_k` it takes no bool maps; `where` says where to give it.
    `order` is how rows are ordered, "bs" or "sb"; "" where something else says so. `scope`, of the
    recorder, says what the current forward pass is fed. `drops`: what went to no expert was dropped
    by the capacity of one. `below`: what ids are below, `experts`, or twice that where it is known
    which expert dropped a choice: id + `experts`.

    Raises MoeInspectError, which names `path`, for what is no choice, another K, an id that is no
    expert's, an expert twice in a decision, and rows of which the shape says that they are not in
    `order`, or does not say which they are. Ids and bool maps on a GPU are looked at once, in the
    first call, as reading them waits for the GPU."""

    def __init__(
        self,
        path: str,
        experts: int,
        top_k: int | None,
        where: str,
        order: str = "bs",
        drops: bool = False,
    ):
        self.path, self.experts, self.top_k, self.where = path, experts, top_k, where
        self.order, self.drops, self.below = order, drops, experts
        self.K: int | None = None
        self.scope: Called = None
        self._looked = False
        self._pass = self._shown = 0  # rows shown so far in the pass of this number

    def choice(self, found: Called, dropped: Tensor | None = None) -> Choice:
        """(ids int [..., K] or bool [..., E], weights of the same shape) → ids, weights [T, K].
        `dropped`: bool, of that shape: what its expert drops, as id + `experts`."""
        pair = tuple(found) if isinstance(found, tuple | list) else (found,)
        if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            said = f"the choice of {self.path} must be two tensors, ids and weights"
            raise MoeInspectError(f"{said}, not {_kinds(pair)}")
        ids, weights = pair
        if ids.shape != weights.shape or not weights.dtype.is_floating_point or not ids.dim():
            raise self._wrong(
                ids,
                f"the choice of {self.path} has ids {list(ids.shape)} and weights "
                f"{list(weights.shape)}: both need the same shape [..., K], ids integer (or bool "
                "[..., E]) and weights floating-point",
            )
        self._check_rows(ids.shape[:-1])
        if ids.dtype == torch.bool:
            ids, weights = self._in_map(ids, weights)
        elif ids.dtype.is_floating_point or ids.dtype.is_complex:
            said = f"the choice of {self.path} has ids of dtype"
            raise MoeInspectError(f"{said} {str(ids.dtype).removeprefix('torch.')}, not integers")
        elif self._may_look(ids) and ids.numel():
            self._check_ids(ids)
        if self.below > self.experts:
            ids = ids.long().masked_fill(ids >= self.experts, -1)
        if dropped is not None:
            if dropped.shape != pair[0].shape or dropped.dtype != torch.bool:
                raise MoeInspectError(
                    f"{self.path} shows dropped {list(dropped.shape)} of {dropped.dtype}, not bool "
                    f"{list(pair[0].shape)} as ids are"
                )
            ids = torch.where(dropped & (ids >= 0), ids + self.experts, ids.long())
        K = ids.shape[-1]
        if self.K is None and not torch.compiler.is_compiling():
            self.K = K
        if self.K is not None and self.K != K:
            raise self._wrong(
                ids,
                f"{self.path} chose {K} experts per token, but {self.K} in its first call: if the "
                "number varies, pad the ids with -1",
            )
        return ids.reshape(-1, K), weights.reshape(-1, K)

    def _wrong(self, ids: Tensor, why: str) -> MoeInspectError:
        """The error `why`; or, where ids are one number per token, one that says so."""
        fed = self.scope.fed if self.scope is not None and self.scope.open else None
        if fed is None or tuple(ids.shape) not in ((fed.B, fed.S), (fed.B * fed.S,)):
            return MoeInspectError(why)
        return MoeInspectError(
            f"{self.path} shows ids {list(ids.shape)}, one for each token: where each goes to one "
            "expert, ids and weights are [..., 1] (ids.unsqueeze(-1))"
        )

    def _check_ids(self, ids: Tensor) -> None:
        if (highest := int(ids.max())) >= self.experts:
            raise MoeInspectError(
                f"{self.path} chose expert {highest} but is declared with {self.experts} experts"
            )
        if ids.dim() == 1:  # one decision, or a number for each of T
            return
        ids_KT = ids.reshape(-1, ids.shape[-1]).T.contiguous()
        same_KKT = ids_KT[:, None] == ids_KT
        if int(same_KKT.count_nonzero()) == ids.numel():
            return
        twice_KT = same_KKT.permute(2, 0, 1).triu(1).any(-1).T & (ids_KT >= 0)
        if bool(twice_KT.any()):
            raise self._wrong(
                ids,
                f"{self.path} chose expert {int(ids_KT[twice_KT][0])} twice for a token: show each "
                "expert of a decision once, with the sum of its weights, and -1 in the slots that "
                "are left",
            )

    def check_input(self, args: Args, kwargs: Kwargs) -> None:
        """MoeInspectError where the hidden states that a router is given are [S, B, D], and nobody
        has said that its rows are sequence-first."""
        fed = self._fed() if self.order == "bs" else None
        if fed is not None and is_sequence_first((*args, *kwargs.values()), *fed):
            raise MoeInspectError(
                f"{self.path} is given [{fed[1]}, {fed[0]}, …] of {fed[0]} rows of {fed[1]} "
                "positions, and is said to be batch-first: give RouterSpec(order='sb'), or rows=… "
                "if it puts them in order"
            )

    def _fed(self) -> tuple[int, int] | None:
        """B and S of the current forward pass, where the order of its rows is to be checked."""
        if torch.compiler.is_compiling() or self.scope is None or not self.scope.open:
            return None
        fed = self.scope.fed
        return (fed.B, fed.S) if self.order and fed is not None and min(fed.B, fed.S) > 1 else None

    def _check_rows(self, lead: Sequence[int]) -> None:
        """`lead`: the shape of the choice without its last dimension."""
        if (fed := self._fed()) is None:
            return
        (B, S), batch_first = fed, self.order == "bs"
        shape = f"[{', '.join(map(str, lead))}, K]"
        if B != S and tuple(lead) == ((S, B) if batch_first else (B, S)):
            said, other = ("batch", "sb") if batch_first else ("sequence", "bs")
            raise MoeInspectError(
                f"{self.path} shows choices {shape} of {B} rows of {S} positions, and is said to "
                f"be {said}-first: transpose ids and weights, or give RouterSpec(order={other!r})"
            )
        if self._pass != self.scope.passes:
            self._pass, self._shown = self.scope.passes, 0
        is_first, n = self._shown % (B * S) == 0, prod(lead)
        self._shown += n
        in_order = batch_first and len(lead) == 2 and lead[1] == S  # whole rows of the batch
        if not (is_first or n == B * S or in_order):
            raise MoeInspectError(
                f"{self.path} shows its choices in pieces {shape}, and nothing says which of {B} "
                f"rows of {S} positions they are of: show all at once, give RouterSpec(rows=…), "
                "or feed one row at a time"
            )

    def logits(self, logits: Tensor) -> Tensor:
        """[..., E] → [T, E]."""
        if not isinstance(logits, Tensor) or logits.shape[-1:] != (self.experts,):
            raise MoeInspectError(
                f"{self.path} shows logits {_kinds((logits,))}, not [..., {self.experts}], one for "
                "each expert"
            )
        return logits.reshape(-1, self.experts)

    def _in_map(self, chosen: Tensor, weights: Tensor) -> Choice:
        if self.top_k is None:
            raise MoeInspectError(
                f"{self.path} gives a bool map and does not state its top-k: {self.where}"
            )
        if chosen.shape[-1] != self.experts:
            raise MoeInspectError(
                f"{self.path} gives a bool map {list(chosen.shape)}, not [..., {self.experts}], "
                "one for each expert"
            )
        most = int(chosen.sum(-1).max()) if self._may_look(chosen) and chosen.numel() else 0
        if most > self.top_k:
            raise MoeInspectError(
                f"{self.path} chose {most} experts for a token in its bool map, and its top-k is "
                f"{self.top_k}"
            )
        return in_map(chosen, weights, self.top_k)

    def _may_look(self, tensor: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return False
        first, self._looked = not self._looked, True
        return first or tensor.is_cpu


def is_sequence_first(values: Iterable[object], B: int, S: int) -> bool | None:
    """Whether hidden states, the first floating-point tensor among these, are [S, B, D] and not
    [B, S, D]; None where they have other dimensions."""
    found = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    if found is None or found.dim() != 3:
        return None
    return min(B, S) > 1 and (S, B) == tuple(found.shape[:2]) != (B, S)


def in_map(chosen: Tensor, weights: Tensor, top_k: int) -> Choice:
    """A bool map of the experts chosen [..., E] and weights of its shape → ids [..., K] in order of
    their weights, −1 where fewer than K were chosen, and weights [..., K], 0 there."""
    nowhere = float("-inf")
    found, ids = weights.detach().float().masked_fill(~chosen, nowhere).topk(top_k, dim=-1)
    none = found == nowhere
    return ids.masked_fill(none, -1), weights.detach().gather(-1, ids).masked_fill(none, 0)


def _kinds(values: Args) -> str:
    kinds = (list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in values)
    return ", ".join(map(str, kinds))

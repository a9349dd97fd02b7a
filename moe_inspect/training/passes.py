"""Passes of one batch in several forms, and what routers show in each: for `audit_loss`.

B batch rows, S positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_inspect.capture.hook.stack import Sinks, are_probabilities
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import no_routers
from moe_inspect.model.routers import selection_bias, text_config
from moe_inspect.text import layer_label, ranges
from moe_inspect.training.formulas import Routed
from moe_inspect.training.sums import RoutingSums

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_inspect.capture.options import InputsOf
    from moe_inspect.model.custom.spec import RouterSpec

Batch = Any  # what the model is called with: a mapping, a tuple, or one argument
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
SWITCH_ON = "output_router_logits"  # transformers compute the loss where this is on
HALVES = ("first half", "second half")


class Pass(NamedTuple):
    output: Any
    routed: list[Routed]  # of each router


class Passes(RoutingSums):
    """Runs passes, and keeps what the routers show of each, in its graph."""

    def __init__(
        self, model: Any, routers: Sequence[RouterSpec] | None, inputs: InputsOf | None
    ) -> None:
        super().__init__(model, routers, None, inputs)
        if any(of.is_inference() for of in (*self.model.parameters(), *self.model.buffers())):
            raise MoeInspectError(
                "the model was made or loaded under torch.inference_mode, and has no gradients: "
                "load it outside"
            )

    def receive(self, r: int, sinks: Sinks) -> None:
        if "logits" in sinks:
            sinks["logits"].keeps_graph = True
        super().receive(r, sinks)

    @contextmanager
    def attached(self) -> Iterator[Passes]:
        """Buffers are put back: a router may count in them."""
        biases = {id(bias) for bias in self.biases().values()}
        with unchanged(self.model.buffers()) as buffers:
            self.counters = [pair for pair in buffers if id(pair[0]) not in biases]
            try:
                self.attachment.attach()
                yield self
            finally:
                self.attachment.detach()

    def begin(self) -> None:
        super().begin()
        self._counting = True
        self._calls: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}

    def take(self, kind: str, r: int, values: Tensor, *more: Tensor) -> None:
        self._seen[kind][r] += len(values)
        self._calls.setdefault((kind, r), []).append((values, *more))

    def end(self) -> None:
        self._check()

    def run(self, batch: Batch, **more: Any) -> Pass:
        """With the same random numbers and buffers in every pass; selection biases are kept."""
        put_back(self.counters)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            if isinstance(batch, Mapping):
                output = self.outer(**{**batch, **more})
            else:
                output = self.outer(*(batch if isinstance(batch, tuple) else (batch,)), **more)
        if not self.sites:
            raise no_routers(self.model)
        return Pass(output, [self._routed(r) for r in range(len(self.sites))])

    def _routed(self, r: int) -> Routed:
        site = self.sites[r]
        ids_TK, weights_TK = (torch.cat(of) for of in zip(*self._calls["", r], strict=True))
        shown = [values for (values,) in self._calls.get(("logits", r), [])]
        logits_TE = torch.cat(shown) if shown else weights_TK.new_zeros(0, site.experts)
        if shown and are_probabilities(logits_TE.detach(), 1e-3):
            logits_TE = logits_TE.clamp(min=1e-30).log()  # what is called logits is a softmax
        S, order_T = self._fed[site.stack]
        real_T, device = self._real[site.stack], ids_TK.device
        T = len(ids_TK)
        token_T = torch.arange(T) if order_T is None else torch.from_numpy(order_T)
        real_T = torch.ones(T, dtype=torch.bool) if real_T is None else real_T
        kind = type(site.logits_module or site.module).__name__
        row_T = (token_T // S).to(device)
        return Routed(logits_TE, ids_TK, weights_TK, real_T.to(device), row_T, site.stack, kind)

    def weights(self, r: int) -> list[Tensor]:
        """Those that make the logits of router r, without what is frozen."""
        of = self.sites[r].logits_module or self.sites[r].module
        return [p for p in of.parameters() if p.requires_grad]

    def labels(self, which: Sequence[int]) -> str:
        """ "layers 1-3"."""
        names = [layer_label(self.sites, r) for r in which]
        numbers = all(name.isdigit() for name in names)
        said = ranges(map(int, names)) if numbers else ", ".join(names)
        return f"layer{'s' * (len(names) > 1)} {said}"

    def biases(self) -> dict[int, Tensor]:
        found = ((r, selection_bias(site, self.model)) for r, site in enumerate(self.sites))
        return {r: bias for r, bias in found if bias is not None}


Kept = list[tuple[Tensor, Tensor]]  # tensors, each with values that it had


def put_back(kept: Kept) -> None:
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[Kept]:
    """After the block they have the values that they have now, which it is given."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield kept
    finally:
        put_back(kept)


# --- what is known of a model's loss


def default_loss(output: Any) -> Any:
    """What a model of transformers reports; of an encoder-decoder the sum of both stacks. None
    where it reports nothing."""
    get = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
    parts = [get(name) for name in ("aux_loss", "encoder_aux_loss", "decoder_aux_loss")]
    parts = [part for part in parts if part is not None]
    return sum(parts[1:], parts[0]) if parts else None


def accepts(model: Any, name: str) -> bool:
    """Whether its forward has this argument, or hands it on to a forward that it replaces, as
    `*args, **kwargs` do; "**": any."""
    replaced = (vars(of).get("forward") for of in type(model).__mro__)
    for forward in (model.forward, *filter(None, replaced)):
        parameters = inspect.signature(forward).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if name in parameters or not any_name or name == "**":
            return name in parameters or (any_name and name == "**")
    return False


def coefficient_of(model: Any) -> float | None:
    """As the config states it."""
    config = text_config(model)
    owners = (config, getattr(config, "ffn_config", None))
    stated = (getattr(owner, name, None) for owner in owners for name in COEFFICIENTS)
    return next((float(value) for value in stated if isinstance(value, int | float)), None)


# --- the forms of a batch


def forms_of(batch: Batch, passes: Passes) -> dict[str, Batch]:
    """The batch as given; its halves, as two accumulation steps have them, where both have tokens;
    with padding at the end of every second row, where it has none; and packed into one row. A model
    of transformers gets labels, as some compute no loss without."""
    model, found = passes.model, dict[str, Batch]()
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    # what is made under torch.inference_mode can be in no graph
    batch = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, batch)
    B = next((len(tensor) for tensor in tensors_of(batch) if tensor.dim() > 1), 0)
    if not B:
        raise MoeInspectError("audit_loss needs a batch with a tensor [rows, positions, …]")

    def half(end: int, value: Tensor) -> Tensor:
        if not value.dim() or len(value) != B:
            return value
        dim = 0 if B > 1 or value.dim() == 1 else 1
        return value.tensor_split(2, dim)[end]

    found["as given"] = batch
    for end, name in enumerate(HALVES):
        found[name] = tree_map_only(Tensor, partial(half, end), batch)
    masks = [of.get("attention_mask") for of in found.values() if isinstance(of, Mapping)]
    if any(torch.is_tensor(mask) and not bool(mask.any()) for mask in masks):
        for name in HALVES:  # half of one row may be padding alone
            del found[name]
    given: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else {}
    ids = given.get("input_ids")
    if not torch.is_tensor(ids) or ids.dim() != 2 or not hasattr(model, "config"):
        return found
    alone = any(site.adapter is not None and site.adapter.alone for site in passes.sites)
    if not alone and accepts(model, "attention_mask"):
        found |= _masked(given, ids, model)
    if accepts(model, "labels") and accepts(model, SWITCH_ON):
        name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
        found = {form: {"labels": of[name], **of} for form, of in found.items()}
    return found


def tensors_of(batch: Batch) -> list[Tensor]:
    return [value for value in tree_leaves(batch) if torch.is_tensor(value)]


def alike(a: Batch, b: Batch) -> bool:
    """Whether every row of one of two batches is among those of the other."""

    def rows_of(batch: Batch) -> list[list[Tensor]]:
        tensors = tensors_of(batch)
        B = next(len(v) for v in tensors if v.dim() > 1)
        return [[v[row] for v in tensors if v.dim() > 1 and len(v) == B] for row in range(B)]

    def within(some: list[list[Tensor]], others: list[list[Tensor]]) -> bool:
        return all(any(all(map(torch.equal, row, of)) for of in others) for row in some)

    rows, others = rows_of(a), rows_of(b)
    return within(rows, others) or within(others, rows)


def _masked(batch: Mapping[str, Any], ids: Tensor, model: Any) -> dict[str, Batch]:
    mask, found = batch.get("attention_mask"), dict[str, Batch]()
    mask = torch.ones_like(ids) if mask is None else mask
    if bool(mask.all()) and ids.shape[1] > 2:
        padded = mask.clone()
        padded[::2, -(ids.shape[1] // 3) :] = 0
        found["padded"] = {**batch, "attention_mask": padded}
    of_text = type(model).__name__.endswith("ForCausalLM") and accepts(model, "position_ids")
    if len(ids) > 1 and of_text and set(batch) <= {"input_ids", "attention_mask"}:
        places = (mask != 0).cumsum(1)[mask != 0] - 1
        found["packed"] = {"input_ids": ids[mask != 0][None], "position_ids": places[None]}
    return found

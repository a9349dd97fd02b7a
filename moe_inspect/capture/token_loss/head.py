"""What a model makes of its last hidden states: its logits, by its own code, for some tokens at a
time.

B rows, S positions, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# of the largest |logit|: by how much logits of the same hidden states may differ in bfloat16
TOLERANCE = 2**-5


def logits_in(output: Any) -> Tensor | None:
    """Logits [B, S, V] in a model's output: a tensor, `logits`, or the first of several outputs;
    None where there are none."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


class Head:
    """The part of a transformers model after its body: the forward of a copy that shares all
    weights, and whose body returns what it is given. So all that the model does to its logits is
    done to these."""

    def __init__(self, model: Any, body: str):
        self.body = model.get_submodule(body)
        self._given = _Given(self.body)
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, body: self._given}
        self._forward = type(model).forward
        takes = inspect.signature(self._forward).parameters
        self._options = {
            name: False for name in ("use_cache", "output_router_logits") if name in takes
        }
        self.checked = False
        self._kept: Any = None  # the body's output in this forward pass
        self._hook: Any = None

    def watch(self) -> None:
        """Keeps the body's output in the forward pass that begins."""
        self.release()
        self._hook = self.body.register_forward_hook(self._keep)

    def release(self) -> None:
        """Ends the watching of a forward pass."""
        if self._hook is not None:
            self._hook.remove()
        self._kept = self._hook = None

    def _keep(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self.body:  # and not a copy of it
            self._kept = output

    @property
    def hidden(self) -> Tensor | None:
        """The last hidden states [B, S, H] of this forward pass."""
        if self._kept is None:
            return None
        hidden = self._kept if isinstance(self._kept, Tensor) else self._kept[0]
        return hidden.detach()

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """[C, V], of hidden states in the forward pass that `watch` saw."""
        hidden = hidden_CH[None]
        kind = type(self._kept)
        self._given.returned = (
            hidden
            if isinstance(self._kept, Tensor)
            else (hidden,)
            if kind is tuple
            else kind(last_hidden_state=hidden)
        )
        unknown = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        output = self._forward(self._model, input_ids=unknown, **self._options)
        logits = logits_in(output)
        assert logits is not None
        return logits[0]

    def agrees(self, logits_BV: Tensor) -> bool:
        """Whether it gives these logits of the last position of each row."""
        hidden = self.hidden
        assert hidden is not None
        own_BV = self.logits(hidden[:, -1])
        if own_BV.shape != logits_BV.shape:
            return False
        most = logits_BV.abs().max().float()
        return bool((own_BV - logits_BV).abs().max().float() <= TOLERANCE * most)


class _Given(torch.nn.Module):
    """In the body's place: returns what it is given, and otherwise is the body."""

    returned: Any = None

    def __init__(self, body: torch.nn.Module):
        super().__init__()
        object.__setattr__(self, "body", body)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["body"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned


def head_of(model: Any) -> Head | None:
    """None where the body is no direct part of the model."""
    children = dict(model.named_children())
    base = getattr(model, "base_model", None)
    found = next((name for name, module in children.items() if module is base), None)
    if found is None:
        found = "model" if "model" in children and hasattr(model, "get_output_embeddings") else None
    return Head(model, found) if found is not None and len(children) > 1 else None

"""Models that a user's own code loads, and their tokenizers."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.choices import Called
from moe_inspect.model.families import Config, stated_size
from moe_inspect.text import first_line
from moe_inspect.trace import schema

if TYPE_CHECKING:
    from torch.nn import Module

# names that configs give to the number of positions a model can take
POSITIONS = (
    *("max_position_embeddings", "block_size", "max_seq_len", "max_sequence_length"),
    *("max_seq_length", "seq_length", "context_length", "n_positions", "n_ctx"),
)
BYTES_PER_TENSOR = 2**16  # at its beginning and at its end, which identify it


@dataclass(frozen=True)
class OwnModel:
    """What a loader returned. `name`: of the model, for the manifest. `forward` (model, token ids
    int64 [B, S]) → logits [B, S or 1, V]; None: the model is called with the ids alone."""

    name: str
    model: Module
    tokenizer: Called
    forward: Callable[[Called, Called], Called] | None = None

    @property
    def is_of_transformers(self) -> bool:
        """Whether it is called, masked and cached as the models of transformers are."""
        config = getattr(self.model, "config", None)
        return hasattr(self.model, "get_input_embeddings") and hasattr(config, "get_text_config")


def load_own(loader: Callable[..., Called], name: str) -> OwnModel:
    """Calls a loader, with the model's name if it takes an argument. It returns model, tokenizer,
    and where the model takes more than ids, a function that calls it (see `OwnModel`)."""
    import torch

    if not callable(loader):
        raise MoeInspectError(
            f"a loader is a function that returns (model, tokenizer), not a {_kind(loader)}"
        )
    given = (name,) if name and inspect.signature(loader).parameters else ()
    name = name or f"{loader.__module__}.{loader.__qualname__}"
    try:
        loaded = loader(*given)
    except MoeInspectError:
        raise
    # whatever the user's code raises
    except (Exception, SystemExit) as error:
        raise MoeInspectError(f"the loader of {name} failed: {_said(error)}") from error
    returned = f"the loader of {name} returned a"
    if not isinstance(loaded, tuple) or len(loaded) not in (2, 3):
        raise MoeInspectError(
            f"the loader of {name} must return (model, tokenizer) or (model, tokenizer, forward), "
            f"not a {_kind(loaded)}"
        )
    model, tokenizer, forward = (*loaded, None)[:3]
    if forward is not None and not callable(forward):
        wanted = "a function forward(model, ids) → logits"
        raise MoeInspectError(f"{returned} {_kind(forward)} in place of {wanted}")
    if not isinstance(model, torch.nn.Module):
        raise MoeInspectError(f"{returned} {_kind(model)} in place of a model")
    model.eval()
    return OwnModel(name, model, as_tokenizer(tokenizer), forward)


def _kind(value: object) -> str:
    return type(value).__name__


def _said(error: BaseException) -> str:
    return f"{_kind(error)}: {first_line(error)}"


def positions_of(config: object) -> int | None:
    """The number of positions that a model can take, if its config states it under a usual name."""
    found = (stated_size([config], [name]) or 0 for name in POSITIONS)
    return next((n for n in found if n > 0), None)


def state_fingerprint(model: Module) -> str:
    """Identifies the weights of a model in memory: name, shape, type, beginning and end of each."""
    import torch

    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        n = BYTES_PER_TENSOR // max(1, tensor.element_size())
        for part in (flat[:n], flat[-n:]):
            found.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return schema.fingerprint(found.hexdigest())


# --- tokenizers


def as_tokenizer(tokenizer: object) -> Called:
    """`tokenizer` if it is transformers', else wrapped: it needs `encode` (text → token ids) and
    `decode` (token ids → text), as those of tiktoken and tokenizers have."""
    if callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokenizer
    if all(callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")):
        return PlainTokenizer(tokenizer)
    raise MoeInspectError(
        f"a {_kind(tokenizer)} is not a tokenizer: it needs encode(text) → token ids and "
        "decode(token ids) → text, or must be one of transformers"
    )


class PlainTokenizer:
    """What is asked of transformers' tokenizers, of one that has `encode` and `decode`. It adds no
    special tokens. Its size is stated as `n_vocab`, `vocab_size` or `get_vocab_size()`, else 0."""

    is_fast = False
    pad_token_id = None
    all_special_tokens: tuple[str, ...] = ()

    def __init__(self, plain: Called):
        self.plain = plain
        self.eos_token_id = stated_size([plain], ("eos_token_id", "eot_token"))

    def __len__(self) -> int:
        if count := getattr(self.plain, "get_vocab_size", None):
            return int(count())
        return stated_size([self.plain], ("n_vocab", "vocab_size")) or 0

    def __call__(self, text: str | Sequence[str], **_: object) -> Config:
        one = isinstance(text, str)
        return {"input_ids": self._encode(text) if one else [self._encode(of) for of in text]}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        def token(i: int) -> str | None:
            # a tokenizer may have holes, and raise whatever it likes for them
            try:
                return str(self.plain.decode([i])).replace(" ", "▁")
            except Exception:
                return None

        return [token(i) for i in ids]

    def get_vocab(self) -> dict[str, int]:
        tokens = self.convert_ids_to_tokens(range(len(self)))
        return {f"{i} {token}": i for i, token in enumerate(tokens) if token is not None}

    def _encode(self, text: str) -> list[int]:
        # that of tiktoken refuses texts with special tokens in them, and has another that does not
        encode = getattr(self.plain, "encode_ordinary", None) or self.plain.encode
        try:
            ids = encode(text)
            return [int(i) for i in np.asarray(getattr(ids, "ids", ids)).reshape(-1)]
        # whatever the user's code raises
        except Exception as error:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            raise MoeInspectError(
                f"the tokenizer ({_kind(self.plain)}) failed on the text {shown!r}: {_said(error)}"
            ) from error

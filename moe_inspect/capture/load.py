"""The model that options ask for: one of transformers, with an adapter or not, or what a user's own
loader returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_inspect.capture.corpus.tokenize import Tokenizer
from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import checked, named
from moe_inspect.model.load import (
    comparable,
    dequantizing,
    load_config,
    load_model,
    load_tokenizer,
    stored_quantization,
    weights_fingerprint,
)
from moe_inspect.model.own import OwnModel, load_own, state_fingerprint
from moe_inspect.model.peft_adapter import PeftAdapter, find_adapter
from moe_inspect.model.vocabulary import tokenizer_fingerprint
from moe_inspect.trace import schema


@dataclass(frozen=True)
class Unloaded:
    """A model whose weights are still to be read, but for what a loader returned (`own`). With an
    `adapter`, `name` names it, and `config` is its base model's."""

    name: str
    options: TraceOptions
    config: Any
    tokenizer: Tokenizer
    own: OwnModel | None = None
    adapter: PeftAdapter | None = None

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def record(self) -> dict[str, object]:
        """What tells whether a later run has the same model."""
        options, weights_hash = self.options, None
        if self.own is not None:
            weights_hash = state_fingerprint(self.own.model)
        elif options.random_init is None:
            weights_hash = weights_fingerprint(*self._base)
        found = {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "model": self.name,
            "revision": options.revision,
            "config": schema.fingerprint(comparable(self.config)),
            "weights_hash": weights_hash,
            "adapter": self.adapter.fingerprint() if self.adapter is not None else None,
            "random_init": options.random_init,
            "dequantize": options.dequantize or None,
            "dtype": options.dtype,
        }
        if options.routers is not None:
            found["routers"] = [named(spec) for spec in checked(options.routers)]
        return found

    @property
    def stored_quantization(self) -> dict[str, object]:
        return {} if self.own is not None else stored_quantization(self._base[0], self.config)

    @property
    def _base(self) -> tuple[str, str | None]:
        """Name and revision of the model without its adapter."""
        if self.adapter is not None:
            return self.adapter.of_base
        return self.name, self.options.revision

    def load(self, device: str | None = None) -> Any:
        """The model, on `device` (default: that of the options)."""
        if self.own is not None:
            return self.own.model
        options, (name, revision) = self.options, self._base
        network = load_model(
            name,
            dequantizing(self.name, self.config) if options.dequantize else self.config,
            revision=revision,
            dtype=options.dtype,
            device=device or options.device,
            device_map=options.device_map,
            trust_remote_code=options.trust_remote_code,
            random_init=options.random_init,
        )
        if self.adapter is not None:
            return self.adapter.put_on(network, self.tokenizer)
        return network


def unloaded(model: str, options: TraceOptions) -> Unloaded:
    """The model of this name, or that the loader of the options returns. MoeInspectError for
    options that it cannot have."""
    if options.loader is not None:
        own = _own_of(options, model)
        config = getattr(own.model, "config", None)
        return Unloaded(own.name, options, config, own.tokenizer, own)
    adapter = find_adapter(model, options.revision)
    if options.random_init is not None and (options.dequantize or adapter is not None):
        needs = "--dequantize" if options.dequantize else f"{model}, an adapter,"
        raise MoeInspectError(f"{needs} needs weights, and --random-init reads none")
    name, revision = adapter.of_base if adapter is not None else (model, options.revision)
    config = load_config(name, revision=revision, trust_remote_code=options.trust_remote_code)
    if adapter is not None and adapter.has_tokenizer():
        name, revision = model, options.revision
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=options.trust_remote_code)
    return Unloaded(model, options, config, tokenizer, None, adapter)


def _own_of(options: TraceOptions, name: str) -> OwnModel:
    """What the loader returns, on the device and in the dtype asked for."""
    for option in ("device_map", "revision", "trust_remote_code", "random_init", "dequantize"):
        if getattr(options, option) not in (None, False):
            raise MoeInspectError(
                f"--{option.replace('_', '-')} is for models of transformers: the loader decides"
            )
    assert options.loader is not None
    own = load_own(options.loader, name)
    if options.device != "auto":
        own.model.to(options.device)
    if options.dtype != "auto":
        own.model.to(getattr(torch, options.dtype))
    return own

"""The model that options ask for: one of transformers, or what a user's own loader returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_inspect.capture.corpus.tokenize import Tokenizer
from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import checked, named
from moe_inspect.model.load import (
    base_of,
    comparable,
    dequantizing,
    load_config,
    load_model,
    load_tokenizer,
    quantization_of,
    weights_fingerprint,
)
from moe_inspect.model.own import OwnModel, load_own, state_fingerprint
from moe_inspect.model.vocabulary import tokenizer_fingerprint
from moe_inspect.trace import schema


@dataclass(frozen=True)
class Unloaded:
    """A model whose weights are still to be read, but for what a loader returned (`own`). `config`
    is that of `base`: the model itself, or the model that an adapter adapts."""

    name: str
    options: TraceOptions
    config: Any
    tokenizer: Tokenizer
    base: tuple[str, str | None]
    own: OwnModel | None = None

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def record(self) -> dict[str, object]:
        """What tells whether a later run has the same model."""
        options, weights_hash = self.options, None
        model = self.name, options.revision
        if self.own is not None:
            weights_hash = state_fingerprint(self.own.model)
        elif options.random_init is None:
            weights_hash = weights_fingerprint(*self.base)
        found = {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "model": self.name,
            "revision": options.revision,
            "config": schema.fingerprint(comparable(self.config)),
            "weights_hash": weights_hash,
            "adapter": weights_fingerprint(*model) if model != self.base else None,
            "random_init": options.random_init,
            "dequantize": options.dequantize or None,
            "dtype": options.dtype,
        }
        if options.routers is not None:
            found["routers"] = [named(spec) for spec in checked(options.routers)]
        return found

    @property
    def stored_quantization(self) -> dict[str, object]:
        return {} if self.own is not None else quantization_of(self.config)

    def load(self, device: str | None = None) -> Any:
        """The model, on `device` (default: that of the options)."""
        if self.own is not None:
            return self.own.model
        options = self.options
        return load_model(
            self.name,
            dequantizing(self.name, self.config) if options.dequantize else self.config,
            revision=options.revision,
            dtype=options.dtype,
            device=device or options.device,
            device_map=options.device_map,
            trust_remote_code=options.trust_remote_code,
            random_init=options.random_init,
        )


def unloaded(model: str, options: TraceOptions) -> Unloaded:
    """The model of this name, or that the loader of the options returns. MoeInspectError for
    options that it cannot have."""
    if options.loader is not None:
        own = _own_of(options, model)
        config = getattr(own.model, "config", None)
        return Unloaded(own.name, options, config, own.tokenizer, (own.name, None), own)
    base = name, revision = base_of(model, options.revision)
    is_adapter = base != (model, options.revision)
    if options.random_init is not None and (options.dequantize or is_adapter):
        needs = "--dequantize" if options.dequantize else f"{model}, an adapter,"
        raise MoeInspectError(f"{needs} needs weights, and --random-init reads none")
    config = load_config(name, revision=revision, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=options.trust_remote_code)
    return Unloaded(model, options, config, tokenizer, base)


def _own_of(options: TraceOptions, name: str) -> OwnModel:
    """What the loader returns, on the device and in the dtype asked for."""
    for option in ("device_map", "revision", "trust_remote_code", "random_init", "dequantize"):
        if getattr(options, option) not in (None, False):
            raise MoeInspectError(f"{option} is for models of transformers: the loader decides")
    assert options.loader is not None
    own = load_own(options.loader, name)
    if options.device != "auto":
        own.model.to(options.device)
    if options.dtype != "auto":
        own.model.to(getattr(torch, options.dtype))
    return own

"""Adapters of PEFT (LoRA and the like), as a directory or on the hub: which base model they adapt,
and how they are put on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.model.choices import Called
from moe_inspect.model.families import Config
from moe_inspect.model.load import blamed, commit_of, weights_fingerprint
from moe_inspect.text import first_line
from moe_inspect.trace import schema


@dataclass(frozen=True)
class PeftAdapter:
    """`config`: its adapter_config.json."""

    name: str
    revision: str | None
    config: Config

    @property
    def kind(self) -> str:
        return str(self.config.get("peft_type") or "PEFT")

    @property
    def of_base(self) -> tuple[str, str | None]:
        """Name (a hub id or a directory) and revision of the model that it adapts."""
        return self.config["base_model_name_or_path"], self.config.get("revision")

    def has_tokenizer(self) -> bool:
        return _file(self.name, "tokenizer_config.json", self.revision) is not None

    def record(self) -> Config:
        """For the trace's manifest."""
        base, revision = self.of_base
        commit = commit_of(base, revision)
        return {"kind": self.kind, "base": base, "base_revision": commit, "config": self.config}

    def fingerprint(self) -> str:
        """Identifies its weights and how they are applied."""
        return schema.fingerprint([weights_fingerprint(self.name, self.revision), self.config])

    def put_on(self, model: Called, tokenizer: Called) -> Called:
        """`model` with the adapter in it, which may bring embeddings of more tokens."""
        if len(tokenizer) > len(model.get_input_embeddings().weight):
            model.resize_token_embeddings(len(tokenizer))
        device = str(next(model.parameters()).device)
        with blamed(f"cannot load adapter {self.name!r}"):
            adapted = import_module("peft").PeftModel.from_pretrained(
                model, self.name, revision=self.revision, torch_device=device
            )
        return adapted.get_base_model().eval()


def adapter_in(model: object) -> Config | None:
    """For the manifest of a recorded model: the first adapter that PEFT has put into it."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    config = next(iter(configs.values()))
    plain = json.dumps(
        config.to_dict(), default=lambda v: list(map(str, v)) if isinstance(v, set) else str(v)
    )
    return {
        "kind": str(getattr(config.peft_type, "value", config.peft_type)),
        "base": config.base_model_name_or_path or None,
        "base_revision": config.revision,
        "config": json.loads(plain),
    }


def find_adapter(name: str, revision: str | None = None) -> PeftAdapter | None:
    """The adapter of that name; None: a whole model. MoeInspectError where it cannot be traced."""
    if (path := _file(name, "adapter_config.json", revision)) is None:
        return None
    try:
        config = json.loads(read_small(path))
        base = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise MoeInspectError(f"{path} is not an adapter's config: {first_line(error)}") from None
    if not isinstance(base, str) or not base:
        said = f"{path} does not say which model it adapts"
        raise MoeInspectError(f"{said} (base_model_name_or_path)")
    adapter = PeftAdapter(name, revision, config)
    if "num_virtual_tokens" in config:
        raise MoeInspectError(
            f"{name} adds its own prompts ({adapter.kind}), which are not tokens: record it with "
            "moe_inspect.record"
        )
    if find_spec("peft") is None:
        raise MoeInspectError(
            f"{name} is an adapter of {base}, which needs peft: pip install 'moe-inspect[peft]'"
        )
    return adapter


def _file(name: str, file: str, revision: str | None) -> Path | None:
    """Of an adapter, in its directory or on the hub; None where it has no such file."""
    directory = Path(name)
    if name == "demo" or directory.is_dir():
        return directory / file if (directory / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from transformers.utils.hub import cached_file

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return None
        quiet = ("gated_repo", "missing_entries", "connection_errors")
        options: Config = {f"_raise_exceptions_for_{what}": False for what in quiet}
        found = cached_file(name, file, revision=revision, **options)
    except (HFValidationError, OSError):  # there is no such repository: said of the model
        return None
    return Path(found) if found else None

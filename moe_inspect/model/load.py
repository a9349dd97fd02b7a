"""Models and tokenizers: a hub id, a directory, or "demo"."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moe_inspect.demo import MODEL_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.model.config import Config, read_config
from moe_inspect.model.gguf import refuse_unless_described
from moe_inspect.text import first_line
from moe_inspect.trace import schema

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from moe_inspect.model.choices import Called


def model_location(name: str) -> str:
    """What transformers loads: for "demo" the bundled model, else `name` itself."""
    return str(MODEL_DIR) if name == "demo" else name


@contextmanager
def blamed(said: str) -> Iterator[None]:
    """Whatever the block raises is for the user to mend: a MoeInspectError says why."""
    try:
        yield
    except Exception as error:
        raise MoeInspectError(f"{said}: {first_line(error)}") from error


HOW_TO_NAME = "give a directory, a hub id (OWNER/NAME) that is cached or can be reached, or demo"


def _not_loaded(name: str, error: Exception, misnamed: bool = True) -> MoeInspectError:
    way_out = f": {HOW_TO_NAME}" if misnamed else ""
    return MoeInspectError(f"cannot load model {name!r}: {first_line(error).rstrip('.')}{way_out}")


def refuse_unless_found(name: str, revision: str | None = None) -> None:
    """MoeInspectError where there is no such model, as far as that shows without the network."""
    location = model_location(name)
    if Path(location).is_dir():
        return
    if location.startswith((".", "~", os.sep)):
        raise MoeInspectError(f"no model at {location}: {HOW_TO_NAME}")
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    try:
        cached = _cached_config(location, revision)
    except HFValidationError as error:
        raise _not_loaded(name, error) from error
    if cached is None and "/" not in location:  # a hub id has an owner
        raise MoeInspectError(f"no model {name!r} in this directory: {HOW_TO_NAME}")
    if constants.HF_HUB_OFFLINE and cached is None:
        raise MoeInspectError(
            f"cannot load model {name!r}: there is no such directory, it is not in the cache, "
            f"and HF_HUB_OFFLINE is set: {HOW_TO_NAME}"
        )


def stated_config(name: str, revision: str | None = None) -> Config | None:
    """The config in a file or a trace, as it is written there; None where `name` is a model, for
    transformers to load. MoeInspectError where it is neither, as far as that shows offline."""
    path, manifest = Path(name), Path(name) / schema.MANIFEST
    if path.suffix == ".gguf":
        refuse_unless_described(path)
    elif path.is_file() or manifest.is_file():
        return read_config(manifest if manifest.is_file() else path)
    else:
        refuse_unless_found(name, revision)
    return None


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The model's config; MoeInspectError where there is no such model."""
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file

    refuse_unless_found(name, revision)
    location = model_location(name)
    try:
        # before transformers builds anything from it
        read_config(Path(cached_file(location, "config.json", revision=revision) or ""))
        of_hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        return of_the_text_model(AutoConfig.from_pretrained(location, **of_hub))
    except MoeInspectError:
        raise
    # whatever a broken config.json makes transformers raise, the file is the user's
    except Exception as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise MoeInspectError(
                f"model {name!r} needs to run code from its own repository: review it, then "
                "give --trust-remote-code"
            ) from None
        raise _not_loaded(name, error, not Path(location).exists()) from error


def of_the_text_model(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the submodel that reads text, where another generates speech (Qwen-Omni)."""
    return getattr(config, "thinker_config", None) or config


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that was loaded from the hub; for a local directory the revision as given."""
    location = model_location(name)
    cached = None if Path(location).exists() else _cached_config(location, revision)
    return cached.parent.name if cached is not None else revision


def base_of(name: str, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter of PEFT adapts: transformers loads it with the
    adapter. `name` and `revision` if it is not an adapter."""
    from transformers.utils.import_utils import is_peft_available
    from transformers.utils.peft_utils import find_adapter_config_file

    location = model_location(name)
    if _has_config(location, revision):
        return name, revision
    with blamed(f"cannot load adapter {name!r}"):
        if (path := find_adapter_config_file(location, revision=revision)) is None:
            return name, revision
        config = json.loads(read_small(Path(path)))
        base, of_base = config["base_model_name_or_path"], config.get("revision")
    if not is_peft_available():
        raise MoeInspectError(
            f"{name} is an adapter of {base}, which needs peft: pip install 'moe-inspect[peft]'"
        )
    return base, of_base


def _has_config(location: str, revision: str | None) -> bool:
    """Whether a model or an adapter has a config.json, in its directory or on the hub."""
    from transformers.utils.hub import cached_file

    quiet = ("gated_repo", "missing_entries", "connection_errors")
    options = {f"_raise_exceptions_for_{what}": False for what in quiet}
    try:
        return cached_file(location, "config.json", revision=revision, **options) is not None
    except OSError:  # there is no such repository
        return False


def _cached_config(location: str, revision: str | None) -> Path | None:
    """The config of a model, or of an adapter, in the cache of the hub."""
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "adapter_config.json")
    found = (try_to_load_from_cache(location, file, revision=revision) for file in files)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with blamed(f"cannot load the tokenizer of {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_location(name), revision=revision, trust_remote_code=trust_remote_code
        )
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        said = f"the tokenizer of {name!r} gives no tokens for a text"
        raise MoeInspectError(f"{said}: are its files complete?")
    return tokenizer


# The auto classes that build a language model, in order of preference: the language model alone
# where the family has a class for that, else with its towers
AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


def auto_class(config: PreTrainedConfig, trust_remote_code: bool = False) -> Called:
    """The auto class of the language model of this config. MoeInspectError where there is none."""
    import transformers

    # by code of the model's own
    brought = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    known = {name for name, of in AUTO_CLASSES.items() if type(config) in getattr(transformers, of)}
    able = [name for name in AUTO_CLASSES if name in brought or name in known]
    if not able:
        raise MoeInspectError(
            f"transformers {transformers.__version__} has no language model for model_type "
            f"{config.model_type!r}"
        )
    classifies = str((config.architectures or [""])[0]).endswith("ForTokenClassification")
    preferred = ["AutoModelForTokenClassification"] if classifies else []
    preferred += ["AutoModelForSeq2SeqLM"] if getattr(config, "is_encoder_decoder", False) else []
    return getattr(transformers, next(name for name in [*preferred, *able] if name in able))


def load_model(
    name: str,
    config: PreTrainedConfig,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    random_init: int | None = None,
) -> Called:
    """The language model in eval mode on `device` ("auto": cuda where there is one), or spread over
    devices as accelerate's `device_map` says ("auto", "balanced", …). With `random_init` its
    weights are initialised with that seed instead of read: the untrained baseline."""
    import torch

    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device_map is not None and (device != "auto" or random_init is not None):
        raise MoeInspectError("--device-map cannot be combined with --device or --random-init")
    if device_map is not None and find_spec("accelerate") is None:
        said = "a device map needs accelerate: pip install 'moe-inspect[accelerate]'"
        raise MoeInspectError(said)
    try:
        torch.ones(1, device=target).item()
    # torch asserts where it was built without that device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MoeInspectError(f"device {target!r} is not available: {first_line(error)}") from error
    options = {"trust_remote_code": trust_remote_code}
    if random_init is not None:
        with blamed(f"cannot load model {name!r}"):
            made: Called = copy.deepcopy(config)
            if hasattr(made, "quantization_config"):  # which is of the weights that are not read
                del made.quantization_config
            wanted = made.dtype if dtype == "auto" else getattr(torch, dtype)
            torch.manual_seed(random_init)
            model = auto_class(made, **options).from_config(made, dtype=wanted, **options)
        return model.to(target).eval()
    stored = quantization_of(config)
    asks = stored.get("quant_method") == "mxfp4" and not stored.get("dequantize")
    hint = " (--dequantize needs no kernels)" if asks else ""
    with blamed(f"cannot load model {name!r}{hint}"):
        model, loaded = auto_class(config, **options).from_pretrained(
            model_location(name),
            config=config,
            revision=revision,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            **options,
            **({"device_map": device_map} if device_map is not None else {}),
        )
    # transformers would initialise them at random, and the trace would be meaningless
    if missing := set(loaded["missing_keys"]):
        lacking = f"{len(missing)} parameters (first: {min(missing)})"
        raise MoeInspectError(f"the weights of {name!r} lack {lacking}: not traced")
    return (model if device_map is not None else model.to(target)).eval()


def quantization_of(config: object) -> Config:
    """The quantization_config that a model's config states; empty where it states none."""
    stated = getattr(config, "quantization_config", None) or {}
    return stated if isinstance(stated, dict) else stated.to_dict()


def dequantizing(name: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config by which transformers dequantises weights while it reads them, if it can."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    stated = quantization_of(config)
    if not stated:
        raise MoeInspectError(f"{name!r} is not quantised: drop --dequantize")
    made = AutoQuantizationConfig.from_dict({**stated, "dequantize": True})
    if not getattr(made, "dequantize", False):
        weights = f"{stated.get('quant_method')} weights while it reads them"
        raise MoeInspectError(f"transformers cannot dequantise {weights}: drop --dequantize")
    config = copy.deepcopy(config)
    config.quantization_config = {**stated, "dequantize": True}
    return config


def weights_fingerprint(name: str, revision: str | None) -> str | None:
    """Identifies weights, and how an adapter is applied: by the commit on the hub, or size,
    beginning and end of each file."""
    place = Path(model_location(name))
    if not place.exists():
        return commit_of(name, revision)
    weights = (f for f in place.iterdir() if f.suffix in (".safetensors", ".bin"))
    parts = []
    for file in sorted([*weights, *place.glob("adapter_config.json")]):
        size = file.stat().st_size
        with open(file, "rb") as data:
            head = data.read(2**20)
            data.seek(max(size - 2**20, 0))
            parts.append([file.name, size, hashlib.sha256(head + data.read()).hexdigest()])
    return schema.fingerprint(parts)


def comparable(config: object) -> Config:
    """A model's config without the version of transformers that wrote it."""
    return {k: v for k, v in config_record(config).items() if k != "transformers_version"}


def config_record(config: Called) -> Config:
    """The config as plain JSON, without its path; its plain values, if not transformers'."""
    if hasattr(config, "to_json_string"):
        stated = json.loads(config.to_json_string(use_diff=False))
        return {k: v for k, v in stated.items() if k != "_name_or_path"}
    stated = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    if is_dataclass(config) and not isinstance(config, Mapping):
        stated = {f.name: getattr(config, f.name, None) for f in fields(config)}
    return {str(k): v for k, v in stated.items() if isinstance(v, str | int | float | bool)}

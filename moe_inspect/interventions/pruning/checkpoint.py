"""A checkpoint without some of its experts, made on disk: tensors are copied by name, and what is
kept of them stays the same to the bit. Memory holds one file of the new checkpoint at a time.

E experts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from moe_inspect.analysis.weights.measure import MTP
from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.model.config import Config
from moe_inspect.model.families import EXPERTS, LANGUAGE_MODEL, LAYER, TOWER
from moe_inspect.model.load import checkpoint_dir, model_location
from moe_inspect.model.peft_adapter import find_adapter
from moe_inspect.model.routers import SELECTION_BIAS
from moe_inspect.text import first_line
from moe_inspect.trace.files.atomic import draft_folder_of
from moe_inspect.trace.manifest import refuse_within_trace

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 4 * 2**30
# files of weights in any format: not copied
OF_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)$|\.index\.json$", re.IGNORECASE
)
EXPERT = re.compile(r"(?<![a-z_])experts\.(?:expert_)?(\d+)\.")
SHARED = re.compile(r"shared?_")
MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
TEMPLATES = "additional_chat_templates"  # of the tokenizer, the one directory of transformers'
ROUTER = re.compile(
    rf"\.(?:gate|router|moe_statics)\.|\.(?:router_bias|{'|'.join(SELECTION_BIAS)})$"
)
BIAS = re.compile(rf"\.(?:{'|'.join(SELECTION_BIAS)})$")
FLAT = re.compile(r"\.experts\.mlp\.[vw]\d$")  # DBRX: the matrices of all experts in one
OF_CHANNELS = re.compile(r"conv|norm")  # which may be as many as the experts


@dataclass(frozen=True)
class Pruned:
    """`drop`: block → its experts that go, as many in each; `experts`: E before; `beyond`: what a
    router chooses from besides (experts that are not routed to, skipping)."""

    drop: Mapping[int, Sequence[int]]
    experts: int
    beyond: int = 0

    @property
    def left(self) -> int:
        return self.experts - len(next(iter(self.drop.values())))

    def kept(self, layer: int) -> list[int]:
        return sorted({*range(self.experts)} - {*self.drop[layer]})


def directory_of(model: str, revision: str | None) -> Path:
    """Where the safetensors of a model are. MoeInspectError for other or quantised weights."""
    if find_adapter(model, revision) is not None:
        merge = "merge it with its base model, and prune that"
        raise MoeInspectError(f"{model} is an adapter: {merge}")
    cached_file(model_location(model), "config.json", revision=revision)
    source = checkpoint_dir(model, revision)
    if not any(source.glob("*.safetensors")):
        raise MoeInspectError(f"the weights of {model} are not in safetensors: not pruned")
    if _read_json(source / "config.json").get("quantization_config"):
        raise MoeInspectError(f"the weights of {model} are quantised: prune the original model")
    return source


def refuse_to_replace(output: Path) -> None:
    refuse_within_trace(output)
    if output.exists() or output.is_symlink():
        raise MoeInspectError(f"{output} exists: give a new directory")


def write(
    source: Path, output: Path, pruned: Pruned, check: Callable[[Path], Mapping[str, object]]
) -> None:
    """Writes the checkpoint at `source` without these experts as the new directory `output`, once
    `check` of it has passed, which returns its pruning.json. On an exception nothing is left."""
    refuse_to_replace(output)
    with draft_folder_of(output) as (draft, _):
        with writing(output):
            config = with_experts(_read_json(source / "config.json"), pruned)
            _write_json(draft / "config.json", config)
            _write_weights(source, draft, pruned)
            for file in sorted(source.iterdir()):
                copied = file.is_file() and not OF_WEIGHTS.search(file.name)
                if copied and file.name[0] != "." and file.name != "config.json":
                    shutil.copyfile(file, draft / file.name)
            if (source / TEMPLATES).is_dir():
                shutil.copytree(source / TEMPLATES, draft / TEMPLATES)
        record = check(draft)
        with writing(output):
            _write_json(draft / "pruning.json", record)
        refuse_to_replace(output)


def with_experts(config: Config, pruned: Pruned) -> Config:
    """The config.json of the model without them. MoeInspectError where it states no such number."""
    stated: list[str] = []

    def changed(part: Config) -> Config:
        here = [name for name in EXPERTS if part.get(name) == pruned.experts]
        stated.extend(here)
        inner = {n: changed(part[n]) for n in LANGUAGE_MODEL if isinstance(part.get(n), dict)}
        without_mtp = dict.fromkeys((name for name in MTP_LAYERS if name in part), 0)
        return {**part, **dict.fromkeys(here, pruned.left), **inner, **without_mtp}

    made = changed(config)
    if not stated:
        raise MoeInspectError(
            f"config.json does not state the number of experts ({pruned.experts}) as any of "
            f"{', '.join(EXPERTS)}: not pruned"
        )
    return made


def _write_weights(source: Path, draft: Path, pruned: Pruned) -> None:
    """Files of at most FILE_BYTES (or of one tensor), with an index where they are several."""
    held: dict[str, Tensor] = {}
    files: list[list[str]] = []
    held_bytes = total = 0

    def flush() -> None:
        nonlocal held, held_bytes
        path = draft / f"{len(files)}.part"
        try:
            save_file(held, path, metadata={"format": "pt"})
        except SafetensorError as error:  # which is no OSError, on a full disk either
            raise OSError(str(error).rpartition(": ")[2]) from error
        files.append(list(held))
        held, held_bytes = {}, 0

    for name, tensor in _kept(source, pruned):
        if held and held_bytes + tensor.nbytes > FILE_BYTES:
            flush()
        held[name] = tensor
        held_bytes, total = held_bytes + tensor.nbytes, total + tensor.nbytes
    flush()
    n = len(files)
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)] if n > 1 else [WEIGHTS]
    for i, name in enumerate(names):
        os.rename(draft / f"{i}.part", draft / name)
        shutil.copymode(draft / "config.json", draft / name)  # safetensors lets only its user read
    if n > 1:
        of = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
        _write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": of})


def _kept(source: Path, pruned: Pruned) -> Iterator[tuple[str, Tensor]]:
    files = [source / WEIGHTS]
    if not files[0].exists():  # transformers, too, reads an index only then
        listed = _read_json(source / INDEX)["weight_map"]
        files = [source / name for name in sorted(set(listed.values()))]
    shapes: dict[str, list[int]] = {}
    for file in files:
        with _weights_in(file) as opened:
            names = [name for name in opened.keys() if not MTP.search(name)]  # noqa: SIM118
            shapes |= {name: opened.get_slice(name).get_shape() for name in names}
    E, beyond = pruned.experts, pruned.beyond
    places = {name: place(name, shape, E, beyond) for name, shape in shapes.items()}
    of_experts = {_block(name) for name, at in places.items() if at is not None}
    stack = _pruned_stack(of_experts, pruned, source)
    for file in files:
        with _weights_in(file) as opened:
            for name in (name for name in opened.keys() if name in places):  # noqa: SIM118
                (of, layer), at = _block(name), places[name]
                if of == stack and (of, layer) in of_experts and layer not in pruned.drop:
                    continue  # of a block beyond the last
                if at is None or of != stack:
                    yield name, opened.get_tensor(name)
                    continue
                kept = pruned.kept(layer)
                if isinstance(at, tuple):
                    axis, width = at
                    rows_E = torch.arange(E * width).view(E, width)
                    # what is behind the experts stays
                    behind = torch.arange(rows_E.numel(), shapes[name][axis])
                    index = torch.cat([rows_E[kept].flatten(), behind])
                    yield name, opened.get_tensor(name).index_select(axis, index)
                elif (e := int(at.group(1))) in kept or e >= E:
                    start, end = at.span(1)
                    now = kept.index(e) if e in kept else e - E + pruned.left
                    yield f"{name[:start]}{now}{name[end:]}", opened.get_tensor(name)


@contextmanager
def _weights_in(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise MoeInspectError(f"cannot read {file}: {first_line(error)}") from error


def _pruned_stack(of_experts: set[tuple[str, int]], pruned: Pruned, source: Path) -> str:
    """The stack of blocks that has experts in all layers where some go. Others, as of a talker
    beside the model that reads, stay as they are. `of_experts`: stack and layer of tensors."""
    stacks, drop = sorted({stack for stack, _ in of_experts}), set(pruned.drop)
    missing = {s: {layer for layer in drop if (s, layer) not in of_experts} for s in stacks}
    able = [stack for stack in stacks if not missing[stack]]
    if not able:
        lacking = min(missing.values(), key=len, default=drop)
        raise MoeInspectError(
            f"no tensors of experts are known by name in layer {min(lacking)} of "
            f"{source}: not pruned"
        )
    if len(able) > 1:
        both = f"{' and '.join(able)} of {source} both have experts in these layers"
        raise MoeInspectError(f"{both}: not pruned")
    return able[0]


def place(
    name: str, shape: Sequence[int], E: int, beyond: int = 0
) -> re.Match[str] | tuple[int, int] | None:
    """Where the experts are in a tensor of a checkpoint: the match of the number in its name, if
    it is of one expert; the axis along which they are, and how many rows each has; None where it
    is of none. `beyond`: see `Pruned`."""
    if LAYER.search(name) is None or TOWER.search(name):
        return None
    if found := EXPERT.search(name):
        return found
    if SHARED.search(name) or OF_CHANNELS.search(name):
        return None
    if FLAT.search(name):
        return 0, shape[0] // E
    if shape[0] == E and (len(shape) == 3 or ".experts." in name):
        return 0, 1
    # a selection bias may be of the experts alone
    for C in (E + beyond, E) if BIAS.search(name) else (E + beyond,):
        if ROUTER.search(name) and C in shape:
            return list(shape).index(C), 1
    return None


def _block(name: str) -> tuple[str, int]:
    """The path of a tensor's stack of blocks, and the number of its block; "" and −1 for none."""
    found = LAYER.search(name)
    return (name[: found.start(1) - 1], int(found.group(1))) if found else ("", -1)


def _read_json(path: Path) -> Config:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

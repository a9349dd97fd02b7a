"""The plan of `simulate placement`: its table, and the files that engines read.

sglang (.json): --init-expert-location, {"physical_to_logical_map": [layers, slots]}; the rows are
all blocks of the model, as SGLang counts them, and a block without a placement has its experts in
order. tensorrt-llm (.yaml): the MoE layers by their number. vllm-ascend (.json): expert_map_path,
the MoE layers counted from 0 in the order of the model, the devices of each. Each is read, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.simulate.placement.policies import shares
from moe_inspect.simulate.placement.windows import PlacementPlans
from moe_inspect.text import plural
from moe_inspect.trace.output_dir import output_file
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router

ENDINGS = {".json": "sglang", ".yaml": "tensorrt-llm", ".yml": "tensorrt-llm"}
Slots = dict[int, list[int]]  # the experts of each layer's slots
Settings = dict[str, Any]


def plan_table(plans: PlacementPlans, policy: str) -> pd.DataFrame:
    """The plan of one policy: a row per router and slot."""
    parts = []
    for r in plans.selection.routers:
        expert_P, layout = plans.of[r, policy], plans.layouts[r]
        slot_P = np.arange(layout.slots)
        gpu_P = slot_P * layout.gpus // layout.slots
        part = {
            "layer": plans.trace.routers[r].layer,
            "router": r,
            "policy": policy,
            "slot": slot_P,
            "gpu": gpu_P,
            "node": gpu_P * layout.nodes // layout.gpus,
            "expert": expert_P,
            "replicas": np.bincount(expert_P)[expert_P],
        }
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def write_plan(table: Any, settings: Settings, path: str | Path, engine: str | None = None) -> str:
    """Writes the table "plan" of a simulation for an engine of ENGINES, by default the one of the
    path's ending. Return a description of the file."""
    path = Path(path)
    engine = engine or ENDINGS.get(path.suffix.lower())
    if engine is None:
        raise MoeInspectError(
            f"no plan has the file ending of {path}: .json is for SGLang, .yaml for TensorRT-LLM"
        )
    if engine not in ENGINES:
        raise MoeInspectError(f"no plan for {engine}: there are {', '.join(ENGINES)}")
    slots: Slots = table.groupby("layer")["expert"].apply(list).to_dict()
    of_layer = table.groupby("layer")["router"]
    if of_layer.nunique().max() > 1 or of_layer.size().nunique() > 1:
        raise MoeInspectError(
            "a plan has one router per layer, with the same number of slots: choose such layers "
            "with --layers"
        )
    text = ENGINES[engine](slots, int(table["expert"].max()) + 1, settings)
    with output_file(path) as draft:
        draft.write_text(text)
    P = len(next(iter(slots.values())))
    return (
        f"{table['policy'].iloc[0]}, {len(slots)} MoE layers of {P} slots on "
        f"{settings['gpus']} GPUs, for {engine}"
    )


def read_plan(path: str | Path, moe_layers: Sequence[int] = ()) -> Slots:
    """The expert of each slot, by layer, in a plan for one of ENGINES. `moe_layers`: layers of the
    model, which a plan for vllm-ascend counts."""
    try:
        slots = _slots_of(Path(path), moe_layers)
        table = np.array([*slots.values()])
    except (ValueError, KeyError, TypeError, AttributeError):
        slots, table = dict[int, list[int]](), np.empty(0)
    if table.ndim != 2 or not table.size or table.dtype.kind != "i" or table.min() < 0:
        raise MoeInspectError(
            f'{path} is no plan for SGLang: {{"physical_to_logical_map": [the expert of each slot, '
            'layer by layer]}, as "simulate placement -o plan.json" writes it; nor one for '
            "TensorRT-LLM (.yaml) or vllm-ascend"
        )
    return slots


def _slots_of(path: Path, moe_layers: Sequence[int]) -> Slots:
    if ENDINGS.get(path.suffix.lower()) == "tensorrt-llm":
        import yaml

        try:
            return yaml.safe_load(read_small(path))["initial_global_assignments"]
        except yaml.YAMLError as error:
            raise ValueError from error
    plan = json.loads(read_small(path))
    if "layer_list" not in plan:
        return dict(enumerate(plan["physical_to_logical_map"]))
    devices = [layer["device_list"] for layer in plan["layer_list"]]
    rows = [[e for device in of for e in device["device_expert"]] for of in devices]
    if moe_layers and len(rows) != len(moe_layers):  # the plan does not state its layers
        raise MoeInspectError(
            f"{path} places {plural(len(rows), 'MoE layer')}, the trace has {len(moe_layers)}"
        )
    return dict(zip(moe_layers or range(len(rows)), rows, strict=True))


def placement_of(path: str | Path, trace: Trace, selection: Selection) -> dict[int, np.ndarray]:
    """The expert of each slot of each router that is selected, int64 [P], as a plan places them.
    MoeInspectError where the routers have different numbers of slots."""
    routers = [trace.routers[r] for r in selection.routers]
    placed = dict(zip(selection.routers, placed_by(path, routers, trace.routers), strict=True))
    if len(slots := {len(expert_P) for expert_P in placed.values()}) > 1:
        raise MoeInspectError(f"{path}: layers of {', '.join(map(str, sorted(slots)))} slots")
    return placed


def placed_by(
    path: str | Path, routers: Iterable[Router], of_model: Iterable[Router]
) -> list[np.ndarray]:
    """The expert of each slot of these of a model's routers, int64 [P], as a plan places them.
    MoeInspectError unless it places each of their experts."""
    plan, placed = read_plan(path, sorted({r.layer for r in of_model})), list[np.ndarray]()
    for router in routers:
        placed.append(np.array(plan.get(router.layer, []), np.int64))
        if {*placed[-1].tolist()} != {*range(router.experts)}:
            said = f"layer {router.layer} does not place its {router.experts} experts"
            raise MoeInspectError(f"{path}: {said}")
    return placed


def placed_over(path: Path, gpus: int, routers: Sequence[Router]) -> list[np.ndarray]:
    """The share of each expert's load that each GPU gets, [E, G], by router, if a plan spreads its
    slots over this number of GPUs. MoeInspectError if the plan does not fit."""
    placed = placed_by(path, routers, routers)
    if uneven := next((len(slots) for slots in placed if len(slots) % gpus), None):
        raise MoeInspectError(f"{path}: its {uneven} slots cannot be split over {gpus} GPUs")
    both = zip(placed, routers, strict=True)
    return [shares(expert_P, router.experts, gpus) for expert_P, router in both]


def _every(layers: Iterable[int], slots: Slots, E: int) -> list[list[int]]:
    """The slots of each of the layers, the experts in order where a layer was not placed."""
    in_order = [p % E for p in range(len(next(iter(slots.values()))))]
    return [slots.get(layer, in_order) for layer in layers]


def _sglang(slots: Slots, E: int, settings: Settings) -> str:
    every = _every(range(settings["layers"]), slots, E)
    return json.dumps({"physical_to_logical_map": every}) + "\n"


def _tensorrt_llm(slots: Slots, E: int, settings: Settings) -> str:
    import yaml

    plan = {
        "num_slots": len(next(iter(slots.values()))),
        "initial_global_assignments": slots,
        "layer_updates_per_iter": 0,
    }
    return yaml.safe_dump(plan, default_flow_style=None, sort_keys=False, width=10_000)


def _vllm_ascend(slots: Slots, E: int, settings: Settings) -> str:
    gpus, layers = settings["gpus"], []
    for number, row in enumerate(_every(settings["moe_layers"], slots, E)):
        room = len(row) // gpus
        devices = [
            {"device_id": g, "device_expert": row[g * room : (g + 1) * room]} for g in range(gpus)
        ]
        layers.append({"layer_id": number, "device_count": gpus, "device_list": devices})
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n"


ENGINES: dict[str, Callable[[Slots, int, Settings], str]] = {
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt_llm,
    "vllm-ascend": _vllm_ascend,
}

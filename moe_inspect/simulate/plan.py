"""Plan files: the placement of `simulate placement` as engines read it.

.json: SGLang's --init-expert-location, {"physical_to_logical_map": [layers, slots]}; the rows are all blocks of the model, as SGLang
counts them, and a block without a placement has its experts in order. .yaml: TensorRT-LLM's, the MoE layers by their number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.simulate.result import Simulation

ENDINGS = (".json", ".yaml", ".yml")


def write_plan(simulation: Simulation, path: str | Path) -> str:
    """Writes the plan (the table "plan") and returns what was written, in words."""
    path = Path(path)
    table: Any = simulation.tables["plan"]
    if path.suffix.lower() not in ENDINGS:
        raise MoeInspectError(f"no plan goes by the ending of {path}: .json is SGLang's, .yaml TensorRT-LLM's")
    slots = {layer: mine["expert"].tolist() for layer, mine in table.groupby("layer")}
    if table.groupby("layer")["router"].nunique().max() > 1 or len({len(row) for row in slots.values()}) > 1:
        raise MoeInspectError("a plan has one router a layer, with the same number of slots: choose such layers with --layers")
    P, E = len(next(iter(slots.values()))), int(table["expert"].max()) + 1
    if path.suffix.lower() == ".json":
        layers = int(str(simulation.settings["layers"]))
        text = json.dumps({"physical_to_logical_map": [slots.get(layer, [p % E for p in range(P)]) for layer in range(layers)]}) + "\n"
    else:
        import yaml

        plan = {"num_slots": P, "initial_global_assignments": slots, "layer_updates_per_iter": 0}
        text = yaml.safe_dump(plan, default_flow_style=None, sort_keys=False, width=10_000)
    with writing(path):
        path.write_text(text)
    return f"{table['policy'].iloc[0]}, {len(slots)} MoE layers of {P} slots on {simulation.settings['gpus']} GPUs"

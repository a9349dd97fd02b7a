"""What can be recorded of one model, and traced ÷ untraced on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.selfcheck.check import summary
from moe_inspect.capture.mode import mode_of
from moe_inspect.demo import CORPUS_DIR
from moe_inspect.doctor.traced_speed import Phase, phases, timed
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from moe_inspect.model.load import load_config, load_model, load_tokenizer
from moe_inspect.model.routers import Site, top_k_of
from moe_inspect.progress import phase


def examined(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_init: int | None = None,
    measure: bool = True,
) -> dict[str, Any]:
    """Facts about the model, the captures that are possible on it, and with `measure` what each
    costs."""
    phase("loading the model")
    of_hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config, tokenizer = load_config(name, **of_hub), load_tokenizer(name, **of_hub)
    network = load_model(
        name, config, device=device, dtype=dtype, random_init=random_init, **of_hub
    )
    sites = find_routers(network)
    possible = captures_of(network, sites)
    facts = {
        **_facts(name, network, sites),
        "auto": mode_of(network, sites, "auto"),
        "captures": possible,
        "selfcheck": {},
    }
    if not measure:
        return facts
    able = [row["capture"] for row in possible if row["possible"] and row["capture"] != "logits"]
    text = "\n".join(file.read_text("utf-8") for file in sorted(CORPUS_DIR.rglob("*.txt")))
    ids_N = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    listed = phases(network, ids_N)
    advance, speed = phase("measuring the model", len(listed), "shapes"), list[Any]()
    for shape in listed:
        speed.append(_speed(network, shape, able))
        advance(1)
    return {**facts, "speed": speed, "selfcheck": summary(kernels.SELF_CHECK.found)}


def _facts(name: str, network: Any, sites: Sequence[Site]) -> dict[str, Any]:
    parameter = next(network.parameters())
    return {
        "id": None if Path(name).exists() else name,  # a path may name its owner
        "class": type(network).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "routers": len(sites),
        "experts": max(site.experts for site in sites),
        "top_k": max(top_k_of(site, network) for site in sites),
    }


def captures_of(network: Any, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """{capture, possible, note} of each capture."""
    rows = [("tap", ""), ("dispatch", ""), ("counts only", ""), ("logits", "")]
    try:
        mode_of(network, sites, "dispatch")
    except MoeInspectError as error:
        rows[1] = ("dispatch", str(error))
    if any(site.logits_module is None for site in sites):
        rows[3] = ("logits", "the model does not expose its router logits")
    return [{"capture": name, "possible": not note, "note": note} for name, note in rows]


def _speed(network: Any, phase: Phase, captures: Sequence[str]) -> dict[str, Any]:
    """Seconds per pass, untraced and traced, and the ratios; or why they were not measured."""
    shape = {"phase": phase.name, "tokens": phase.tokens}
    try:
        found = timed(network, phase, captures)
    except MoeInspectError as error:
        return {**shape, "not_measured": str(error)}
    untraced = found["untraced"]
    return {
        **shape,
        "seconds": {name: asdict(seconds) for name, seconds in found.items()},
        "traced_over_untraced": {
            name: {"wall": untraced.wall / s.wall, "cpu": untraced.cpu / s.cpu}
            for name, s in found.items()
            if name != "untraced"
        },
    }

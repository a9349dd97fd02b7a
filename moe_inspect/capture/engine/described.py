"""What a trace says of the model of an engine, by what transformers knows of it: found by a process
of its own, so that the one that writes imports neither transformers nor torch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, print_stderr
from moe_inspect.trace import schema

Described = tuple[dict[str, Any], list[schema.Router], Any]  # manifest, routers, vocabulary
START = """
import sys
sys.path[:] = sys.argv[1:]
from moe_inspect.capture.engine.described import main
main()
"""


def ask(about: dict[str, Any]) -> Described:
    """By another process. MoeInspectError where that ends without an answer, having said why."""
    run = [sys.executable, "-P", "-c", START, *sys.path]
    done = subprocess.run(run, input=pickle.dumps(about), stdout=subprocess.PIPE)
    if done.returncode:
        raise MoeInspectError(f"what describes the model ended with {done.returncode}")
    return pickle.loads(done.stdout)


def main() -> None:
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is for people
    manifest, routers, vocabulary = describe(pickle.load(sys.stdin.buffer))
    plain = json.loads(json.dumps(manifest))  # a version of torch's own class would import it
    with suppress(BrokenPipeError), os.fdopen(answer, "wb") as file:  # who asked may have ended
        pickle.dump((plain, routers, vocabulary), file)


def describe(about: dict[str, Any]) -> Described:
    """The manifest, the routers and the vocabulary, of what transformers knows of the model. Of one
    that it does not know, of what the engine does."""
    from moe_inspect.capture.open_trace import process_facts
    from moe_inspect.model.load import config_record, load_config, load_tokenizer
    from moe_inspect.model.vocabulary import vocabulary_table

    of_hub = {"revision": about["revision"], "trust_remote_code": about["trust_remote_code"]}
    layers, E, K = about["layers"], about["experts"], about["top_k"]
    model, vocabulary = {"id": about["model"], "revision": about["revision"]}, None
    try:
        config = load_config(about["model"], **of_hub)
        kind, known = _routers_of(config, about["trust_remote_code"])
        of_layer = {router.layer: router for router in known}
        routers = [of_layer[layer] for layer in layers if layer in of_layer]
        if len(routers) < len(layers) or any((r.experts, r.top_k) != (E, K) for r in routers):
            raise MoeInspectError("its config states other routers than the engine runs")
        model |= {"class": kind, "config": config_record(config)}
    except MoeInspectError as error:
        print_stderr(f"moe-inspect: routers are named as the engine does: {error}")
        paths = about["paths"]
        routers = [
            schema.Router(layer, path.rpartition(".")[2], path, E, K)
            for layer, path in zip(layers, paths, strict=True)
        ]
    if about["replay"]:
        said = f"its routers chose what those of {about['replay']} chose, as the engine replayed it"
        model["note"] = f"{said}: this is no routing of the model"
    if about["text"]:
        try:
            tokenizer = load_tokenizer(about["tokenizer"], **of_hub)
            vocabulary = vocabulary_table(tokenizer, about["vocabulary"])
        except MoeInspectError as error:
            print_stderr(f"moe-inspect: the trace has no vocabulary: {error}")
    facts = process_facts() | {"command": []}
    facts["versions"][about["engine"]] = about["version"]
    capture = {
        "mode": "engine",
        "engine": about["engine"],
        "rank": about["rank"],
        "device": about["device"],
        "dtype": about["dtype"],
        "weight_dtype": "float16",
        **({} if about["text"] else {"text": False}),
        **facts,
    }
    return {"model": model, "capture": capture}, routers, vocabulary


def _routers_of(config: Any, trust_remote_code: bool) -> tuple[str, list[schema.Router]]:
    """The model's class, and its routers as a local trace lists them. No weight is read."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe_inspect.capture.hook.stack import router_at
    from moe_inspect.model.find import find_routers
    from moe_inspect.model.routers import top_k_of

    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    # transformers raises anything for a broken config, which is the user's
    except Exception as error:
        raise MoeInspectError(
            f"cannot build a causal language model of the config: {first_line(error)}"
        ) from error
    sites = find_routers(built)
    layers, blocks = [s.layer for s in sites], config.get_text_config().num_hidden_layers
    if len(set(layers)) < len(layers) or max(layers) >= blocks:
        raise MoeInspectError(
            f"{type(built).__name__} has {len(sites)} routers in {blocks} layers: engines return "
            "one per layer"
        )
    return type(built).__name__, [router_at(site, top_k_of(site, built)) for site in sites]

"""Has a model described without torch, in a process of its own."""

# pyright: strict

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_inspect.model.description import Description
from moe_inspect.model.gguf.load import is_gguf
from moe_inspect.model.load import stated_config
from moe_inspect.trace import schema
from moe_inspect.trace.reader import open_trace


def describe_without_torch(
    model: str,
    *,
    context: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Description | None:
    """As `describe`; of a trace of a model that is not transformers', what the trace says. None
    where that takes torch: the model is a GGUF, its code is not
    transformers', or it does what is not known without torch. Also where torch is loaded already:
    it is then quicker. MoeInspectError where there is no such model."""
    if (made := _routers_of_trace(model)) is not None:
        return made
    stated_config(model, revision)
    if "torch" in sys.modules or trust_remote_code or is_gguf(model) or not sys.executable:
        return None
    answers = ask([{"model": model, "context": context, "revision": revision}])
    return answers[0] if answers else None


def _routers_of_trace(model: str) -> Description | None:
    """What a trace without a config of the model tells. None for another trace, or no trace."""
    if not (Path(model) / schema.MANIFEST).is_file():
        return None
    trace = open_trace(model)
    of_model: dict[str, Any] = trace.manifest.get("model", {})
    config: dict[str, Any] = of_model.get("config") or {}
    if config.get("model_type"):
        return None
    routers = trace.routers
    return Description(
        of_model.get("class") or of_model.get("id") or "model",
        0,
        0,
        [(router.layer, router.experts, router.top_k) for router in routers],
        routers[0].scoring,
        routers[0].shared_experts,
    )


def ask(questions: Iterable[dict[str, object]]) -> list[Description | None]:
    """What a new process answers to each; fewer answers where it failed."""
    # -P: modules in the current directory are not ours
    done = subprocess.run(
        [sys.executable, "-P", "-m", "moe_inspect.model.shapes"],
        input="".join(json.dumps(question) + "\n" for question in questions),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        check=False,
    )
    return [_description(json.loads(line)) for line in done.stdout.splitlines()]


def _description(answer: Any) -> Description | None:
    if answer is None:
        return None
    answer["routers"] = [tuple(router) for router in answer["routers"]]
    return Description(**answer)

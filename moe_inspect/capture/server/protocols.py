"""The protocols of serving engines that return routed experts: their requests, and how their
responses are checked.

Read from vLLM 0.33.0 and SGLang 0.5.23. T tokens that were fed, B blocks of the model (dense ones
too), K slots.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import numpy as np

from moe_inspect.capture.hook.stack import router_at
from moe_inspect.capture.server.client import (
    MODELS,
    Json,
    Retry,
    ask,
    ask_once,
    one_line,
    root_of,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.routed import decode_sglang, decode_vllm, select_routers
from moe_inspect.model.find import find_routers
from moe_inspect.model.routers import top_k_of
from moe_inspect.text import first_line, ranges
from moe_inspect.trace.schema import Router

if TYPE_CHECKING:
    from transformers import PretrainedConfig as Config

FLAG = "--enable-return-routed-experts"  # of both engines


@dataclass(frozen=True)
class Request:
    """One sequence: `ids` int32 [prompt]; the last of the `max_tokens` generated ones is never fed.
    `salt` is its name, and gives it its own entries in the engine's prefix cache, so that each of
    its tokens is computed: each attempt has another."""

    ids: np.ndarray
    max_tokens: int
    temperature: float
    seed: int
    salt: str


@dataclass(frozen=True)
class Served:
    """The model by its config. `name`: as the server calls it; `blocks`: number of layers, dense
    ones included; `chosen`: indices of the `routers` that are recorded; `inside`: whether what is
    recorded inside the engine is taken, by the names of the requests, and not what the server
    returns."""

    name: str
    blocks: int
    top_k: int
    vocabulary: int
    routers: Sequence[Router]
    chosen: Sequence[int]
    inside: bool = False


@dataclass(frozen=True)
class RoutedAnswer:
    """`token_ids`: what was generated; `name`: of the request that it answers; `ids`: of each
    router that is recorded the decisions of the T = prompt + generated − 1 tokens that were fed,
    and their weights where they are known, [T, K]."""

    token_ids: np.ndarray
    name: str
    ids: list[np.ndarray]
    weights: list[np.ndarray] = field(default_factory=list)

    def fed(self, prompt: np.ndarray) -> np.ndarray:
        """The tokens that were fed."""
        return np.concatenate([prompt, self.token_ids[:-1]])


@dataclass(frozen=True)
class Reply:
    """An unchecked response: the prompt it repeats, the generated tokens, the finish reason, the
    routing as it is encoded, if there is one, and what an aborted request was aborted for."""

    prompt_ids: object
    prompt_tokens: object
    token_ids: object
    finish: object
    routed: object
    why: str = ""


@dataclass(frozen=True)
class EngineProtocol:
    """`path`: of completions; `body`: (request, model) → its JSON; `read`: JSON of the response →
    Reply; `decode`: (routing as it is encoded, model) → [T, B, K]; `field`: where that stands;
    `command`: that starts the server; `about`, `version_at`: paths that describe the model and the
    version; `read_from`: the release whose source code this follows; `cached_rows`: advice where
    rows of a cached prefix are missing; `reserved`: number of tokens to generate → positions that
    the engine keeps free behind a prompt."""

    path: str
    body: Callable[[Request, Served], Json]
    read: Callable[[Json], Reply]
    decode: Callable[[object, Served], np.ndarray]
    field: str
    command: str
    about: str
    version_at: str
    read_from: str
    cached_rows: str
    reserved: Callable[[int], int]

    def routed(self, reply: Reply, served: Served) -> np.ndarray:
        """The routing of a response [T, B, K]."""
        if reply.routed is None:
            said = f"start the server with {FLAG} ({self.command})"
            raise MoeInspectError(f"the answer has no {self.field}: {said}")
        return self.decode(reply.routed, served)


def _sampling(request: Request, top_k: int, seed: str) -> Json:
    """Every option is explicit: the default of each would be the model's generation_config.
    `top_k`: for all; `seed`: the name of its option."""
    sampling: Json = {"temperature": request.temperature, "top_k": top_k}
    sampling |= dict.fromkeys(("top_p", "repetition_penalty"), 1.0)
    sampling |= dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty"), 0.0)
    return {**sampling, seed: request.seed} if request.temperature else sampling


def _vllm_body(request: Request, served: Served) -> Json:
    return {
        "model": served.name,
        "prompt": request.ids.tolist(),
        "max_tokens": request.max_tokens,
        **_sampling(request, 0, "seed"),
        "return_token_ids": True,
        **({"request_id": request.salt} if served.inside else {"routed_experts_prompt_start": 0}),
        "cache_salt": request.salt,
    }


def _vllm_read(answer: Json) -> Reply:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise MoeInspectError(
            "the answer has no field choices with one choice: is this a vLLM server?"
        )
    choice, usage = choices[0], answer.get("usage")
    fed = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    made, finish = choice.get("token_ids"), choice.get("finish_reason")
    return Reply(choice.get("prompt_token_ids"), fed, made, finish, choice.get("routed_experts"))


def _sglang_body(request: Request, served: Served) -> Json:
    sampling = _sampling(request, -1, "sampling_seed")
    asked = {"return_routed_experts": True, "routed_experts_start_len": 0}
    return {
        "input_ids": request.ids.tolist(),
        "sampling_params": {"max_new_tokens": request.max_tokens, **sampling},
        **({"rid": request.salt} if served.inside else asked),
        "return_prompt_token_ids": True,
        "extra_key": request.salt,
    }


def _sglang_read(answer: Json) -> Reply:
    facts = answer.get("meta_info")
    if not isinstance(facts, dict):
        raise MoeInspectError("the answer has no field meta_info: is this an SGLang server?")
    fed, made = facts.get("prompt_tokens"), answer.get("output_ids")
    finish, why = facts.get("finish_reason"), ""
    if isinstance(finish, dict):
        why = f": {one_line(str(finish['message']))}" if finish.get("message") else ""
        finish = finish.get("type")
    routed = facts.get("routed_experts")
    return Reply(answer.get("prompt_token_ids"), fed, made, finish, routed, why)


ENGINES = {
    "vllm": EngineProtocol(
        "/v1/completions",
        _vllm_body,
        _vllm_read,
        lambda routed, served: decode_vllm(routed, "routed_experts"),
        "choices[0].routed_experts",
        "vllm serve",
        "/v1/models",
        "/version",
        "0.33.0",
        "vLLM 0.31 to 0.33 return them, and do not start with --no-enable-prefix-caching: use "
        "one of these versions",
        # it generates one token at least, and the last is never fed
        lambda generate: generate + 1,
    ),
    "sglang": EngineProtocol(
        "/generate",
        _sglang_body,
        _sglang_read,
        lambda routed, served: decode_sglang(routed, served.blocks, served.top_k, "routed_experts"),
        "meta_info.routed_experts",
        "sglang.launch_server",
        "/model_info",
        "/server_info",
        "0.5.23",
        "start the server with --disable-radix-cache",
        # in a context of C a prompt of P has at most C - 7, and C - P - 2 tokens are generated
        lambda generate: max(generate + 3, 7),
    ),
}


def read_answer(
    engine: EngineProtocol, answer: Json | None, request: Request, served: Served
) -> RoutedAnswer:
    """The checked content of a response, without decisions where those recorded inside the engine
    are taken; MoeInspectError where it is inconsistent, Retry where the server aborted it."""
    if answer is None:
        raise MoeInspectError(f"the server has no {engine.path}: does --engine match the server?")
    reply, P = engine.read(answer), len(request.ids)
    if reply.finish == "abort":  # by the server itself: nobody else knows the request's name
        raise Retry(f"the server aborted a request{reply.why}")
    # older servers do not repeat the prompt, but all say how long it was
    if reply.prompt_tokens != P or (
        reply.prompt_ids is not None and reply.prompt_ids != request.ids.tolist()
    ):
        raise MoeInspectError(
            f"the server ran another prompt ({reply.prompt_tokens} tokens) than the {P} tokens "
            "it was sent"
        )
    made, V = reply.token_ids, served.vocabulary
    if not isinstance(made, list) or not all(type(i) is int and 0 <= i < V for i in made):
        raise MoeInspectError(
            f"the generated token ids are not a list of ids below {V}: {str(made)[:80]}"
        )
    least = {"length": request.max_tokens, "stop": 1}.get(str(reply.finish), sys.maxsize)
    if not least <= len(made) <= request.max_tokens:
        raise MoeInspectError(
            f"{len(made)} of {request.max_tokens} tokens were generated, and it ended by "
            f"{reply.finish!r}"
        )
    if served.inside:
        return RoutedAnswer(np.array(made, np.int32), request.salt, [])
    routed_TBK = engine.routed(reply, served)
    (rows, _, K), expected = routed_TBK.shape, P + len(made) - 1
    if rows != expected:
        raise MoeInspectError(
            f"routed_experts has {rows} rows, not {expected}: one fewer than the {P} tokens of the "
            f"prompt and the {len(made)} generated, the last of which is never fed; if the rows of "
            f"a cached prefix are missing: {engine.cached_rows}"
        )
    if served.top_k != K:
        raise MoeInspectError(
            f"routed_experts has {K} experts per token, the config {served.top_k}: is it this "
            "model's config?"
        )
    ids = select_routers(routed_TBK, served.routers, served.blocks, "routed_experts")
    for block in sorted(set(range(served.blocks)) - {r.layer for r in served.routers}):
        if routed_TBK[:, block].any():
            raise MoeInspectError(
                f"the config has no router in layer {block}, where the server routed tokens: is "
                "it this model's config?"
            )
    return RoutedAnswer(np.array(made, np.int32), request.salt, [ids[r] for r in served.chosen])


def most_bytes(request: Request, served: Served) -> int:
    """Upper bound on the size of a response: base64 of 4 bytes per id, the text and the token
    ids."""
    tokens = len(request.ids) + request.max_tokens
    return 2**20 + tokens * (6 * served.blocks * served.top_k + 128)


def routers_of(config: Config, trust_remote_code: bool = False) -> tuple[str, list[Router]]:
    """The model's class, and its routers as a local trace lists them. No weight is read."""
    import torch
    from transformers import AutoModelForCausalLM

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


def served_model(
    name: str, config: Config, routers: Sequence[Router], layers: Sequence[int] | None
) -> Served:
    """The model that the server calls `name`, recorded in `layers` (None: all)."""
    there, top_k = [r.layer for r in routers], sorted({r.top_k for r in routers})
    if unknown := sorted(set(layers or ()) - set(there)):
        raise MoeInspectError(
            f"no router in layer {unknown[0]}: the MoE layers are {ranges(there)}"
        )
    if len(top_k) > 1:
        raise MoeInspectError(
            f"its routers choose {top_k} experts per token: engines return the same number for "
            "all layers"
        )
    chosen = [n for n, layer in enumerate(there) if layers is None or layer in layers]
    text = config.get_text_config()
    return Served(name, text.num_hidden_layers, top_k[0], text.vocab_size, routers, chosen)


async def ask_about(http: httpx.AsyncClient, engine: EngineProtocol, config: Config) -> Json:
    """What the server says of itself: model, path, version, max_model_len. MoeInspectError where
    its model is not the config's."""
    root, models = root_of(http), await ask_once(http, MODELS)
    listed = (models or {}).get("data")
    listed = listed if isinstance(listed, list) else []
    # a card with a parent is an adapter
    cards = [card for card in listed if isinstance(card, dict) and not card.get("parent")]
    if not cards or not isinstance(cards[0].get("id"), str):
        raise MoeInspectError(
            f"{root}{MODELS} names no model: is it the engine that --engine names?"
        )
    info = await ask(http, engine.about) if engine.about != MODELS else {}
    version = (await ask(http, engine.version_at) or {}).get("version")
    length = cards[0].get("max_model_len")
    about = {
        "model": cards[0]["id"],
        "path": (info or {}).get("model_path") or cards[0].get("root"),
        "version": version if isinstance(version, str) else None,
        "protocol_read_from": engine.read_from,
        "max_model_len": length if isinstance(length, int) and length > 1 else None,
    }
    for key, own in (("model_type", config.model_type), ("architectures", config.architectures)):
        told = (info or {}).get(key)
        if told and own and told != own:
            raise MoeInspectError(
                f"the server's model is {told} ({key}), the one given here {own}: give the config "
                f"of {about['model']}"
            )
    return about

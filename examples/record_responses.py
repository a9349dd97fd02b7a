"""Sends a corpus to a server of vLLM or SGLang, saves its responses with the routed experts, and
imports them as a trace. Start the server with --enable-return-routed-experts.
Run: python examples/record_responses.py http://HOST:PORT MODEL TEXTS.jsonl OUT [GENERATE]"""

from __future__ import annotations

import json
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from transformers import AutoTokenizer

import moe_inspect


def ask(url: str, body: Any = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=600) as response:
        return json.load(response)


def split(model: str, corpus: Path, longest: int) -> list[tuple[list[int], bool, dict[str, Any]]]:
    """The token ids of each prompt, whether its document ends there, and the fields that the import
    reads. Long documents are split where `moe-inspect trace` splits them."""
    tokenizer, prompts = AutoTokenizer.from_pretrained(model), []
    cut = {"truncation": True, "max_length": longest, "return_overflowing_tokens": True}
    for n, document in enumerate(map(json.loads, corpus.read_text("utf-8").strip().split("\n"))):
        about = {"document": f"{corpus}:{n + 1}", "domain": document.get("domain")}
        pieces = tokenizer([document["text"]], **cut)["input_ids"]
        prompts += [(ids, ids is pieces[-1], about) for ids in pieces]
    return prompts


def respond(url: str, card: dict[str, Any], ids: list[int], tokens: int) -> dict[str, Any]:
    """A prefix cache of its own makes the server return the routes of all tokens but the last."""
    salt, sampling = uuid.uuid4().hex, {"temperature": 0, "repetition_penalty": 1}
    if card["owned_by"] == "sglang":
        body = {"input_ids": ids, "sampling_params": {**sampling, "max_new_tokens": tokens}}
        body |= {"return_routed_experts": True, "return_prompt_token_ids": True, "extra_key": salt}
        return ask(f"{url}/generate", body)
    body = {"model": card["id"], "prompt": ids, "max_tokens": tokens, "cache_salt": salt}
    return ask(f"{url}/v1/completions", body | sampling | {"return_token_ids": True})


def record(url: str, model: str, corpus: str, out: str, generate: int = 0) -> moe_inspect.Trace:
    card, responses = ask(f"{url}/v1/models")["data"][0], Path(f"{out}.jsonl")
    prompts = split(model, Path(corpus), min(card["max_model_len"] - max(generate + 3, 7), 2048))
    with ThreadPoolExecutor(8) as pool, responses.open("w") as file:
        sent = [pool.submit(respond, url, card, ids, 1 + generate * end) for ids, end, _ in prompts]
        for (_, _, about), response in zip(prompts, sent, strict=True):
            file.write(json.dumps(response.result() | about) + "\n")
    return moe_inspect.import_trace(f"{card['owned_by']}-routed", [responses], out, model=model)


if __name__ == "__main__":
    print(record(*sys.argv[1:5], *map(int, sys.argv[5:])))

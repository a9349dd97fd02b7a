"""What is asked of a vLLM that runs the plugin: `python -m tests.real_engines.load SETTINGS`, a
JSON object of model, answers (the file to write), engine (arguments of LLM) and generate.
Prompts of many lengths, some of which begin alike."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any


def prompts(requests: int = 24, vocabulary: int = 3072) -> list[list[int]]:
    draw = random.Random(0)
    shared = [draw.randrange(5, vocabulary) for _ in range(200)]
    made = []
    for n in range(requests):
        own = [draw.randrange(5, vocabulary) for _ in range(draw.choice((1, 7, 40, 130, 270)))]
        made.append(shared[: draw.choice((64, 128, 200))] + own if n % 3 == 0 else own)
    return made


def main() -> None:
    from vllm import LLM, SamplingParams

    asked: dict[str, Any] = json.loads(sys.argv[1])
    options = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 128}
    options |= {"enable_prefix_caching": True, "gpu_memory_utilization": 0.2}
    llm = LLM(asked["model"], **options, **asked["engine"])
    sampling = SamplingParams(max_tokens=asked["generate"], temperature=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], sampling)
    lines, whole = [], len(outputs)
    if asked["stop"]:  # each goes on, up to a token that it is known to come to
        answers = [output.outputs[0].token_ids for output in outputs]
        outputs += llm.generate(
            [
                {"prompt_token_ids": [*output.prompt_token_ids, answer[0]]}
                for output, answer in zip(outputs, answers, strict=True)
            ],
            [
                SamplingParams(max_tokens=asked["generate"], temperature=0, stop_token_ids=[a[5]])
                for a in answers
            ],
        )
    for n, output in enumerate(outputs):
        answer = output.outputs[0]
        routed = getattr(answer, "routed_experts", None)
        line = {
            "request": output.request_id,
            "prompt": list(output.prompt_token_ids),
            "answer": list(answer.token_ids),
            "cached": output.num_cached_tokens,
            "routed": None if routed is None else routed.tolist(),
            "stopped": n >= whole,
        }
        lines.append(json.dumps(line) + "\n")
    Path(asked["answers"]).write_text("".join(lines))


if __name__ == "__main__":
    main()

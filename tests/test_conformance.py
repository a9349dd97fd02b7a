"""The conformance of serving engines: a server that is right, the ways in which engines were wrong,
and decisions that cannot be told."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_inspect.conformance.cases import CASES, Ask, Draw
from moe_inspect.conformance.check import Answer, Reference, check, expected, judge
from moe_inspect.conformance.models import MODELS, save
from tests.conftest import Cli
from tests.support.engine import Server, encoded, serving

MODEL = "qwen3-moe"  # of 5 layers, 0 and 2 are dense
QUICK = ("prefill", "prefix", "answers", "stop")


class OfModel(Server):
    """Serves a model by the vLLM or SGLang protocol. `spoil` may change the routes of an answer,
    [T, blocks, K], by what was asked."""

    def __init__(self, model: Path, engine: str) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.engine, self.model = engine, model
        self.network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.spoil: Callable[[np.ndarray, dict[str, Any]], np.ndarray] = lambda routed, _: routed

        self.right = cache(lambda fed: expected(self.network, [fed])[fed].ids_TLK)

    def about(self, path: str) -> dict[str, Any] | None:
        vllm: dict[str, Any] = {"/v1/models": {"data": [{"id": "served", "root": str(self.model)}]}}
        vllm["/version"] = {"version": "0.33.0"}
        about = {"model_path": str(self.model), "model_type": "qwen3_moe"}
        sglang: dict[str, Any] = {"/model_info": about}
        sglang |= {"/v1/models": vllm["/v1/models"], "/server_info": {"version": "0.5.23"}}
        return (vllm if self.engine == "vllm" else sglang).get(path)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        with self.lock:
            sampling = body.get("sampling_params", body)
            answers = [self.one(body, sampling, n) for n in range(sampling.get("n", 1))]
        if self.engine == "vllm":
            usage = {"prompt_tokens": len(body["prompt"])}
            return 200, {"choices": [choice for choice, _ in answers], "usage": usage}
        answers = [answer for _, answer in answers]
        return 200, answers if "n" in sampling else answers[0]

    def one(self, body: dict[str, Any], sampling: dict[str, Any], n: int) -> tuple[Any, Any]:
        prompt = body.get("prompt") or body["input_ids"]
        most = sampling.get("max_tokens") or sampling["max_new_tokens"]
        made, stops = [5 + n], sampling.get("stop_token_ids", ())
        while len(made) < most and made[-1] not in stops:
            made.append(5 + (made[-1] * 31 + len(prompt)) % 3000)
        fed = tuple(prompt + made[:-1])
        routed = np.zeros((len(fed), 5, 4), np.int32)
        routed[:, [1, 3, 4]] = self.right(fed)
        routed = self.spoil(routed, body)
        finish = "length" if len(made) == most else "stop"
        sink = io.BytesIO()
        np.save(sink, routed.astype(np.uint8))
        choice = {"index": n, "finish_reason": finish, "token_ids": made}
        choice |= {"prompt_token_ids": prompt, "routed_experts": encoded(sink.getvalue())}
        facts = {"prompt_tokens": len(prompt), "finish_reason": {"type": finish}}
        facts["routed_experts"] = encoded(routed.astype("<i4").tobytes())
        return choice, {"output_ids": made, "prompt_token_ids": prompt, "meta_info": facts}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(MODEL, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def server(model: Path, request: pytest.FixtureRequest) -> OfModel:
    return OfModel(model, request.param)


@pytest.fixture
def url(server: OfModel) -> Iterator[str]:
    with serving(server) as found:
        yield found


def test_a_server_that_is_right(server: OfModel, url: str) -> None:
    found = check(url, cases=QUICK)
    assert found.ok
    assert found.engine == server.engine
    assert found.version in ("0.33.0", "0.5.23")
    table = found.table.set_index("case")
    assert (table.equal == table.decisions).all()
    assert (table.decisions == 3 * table.tokens).all()
    # rows are those of fed tokens: the last of 16 that were generated is none
    assert table.tokens["answers"] == 3 * (9 + 15 + 70 + 15)
    assert table.answers.to_dict() == {"prefill": 6, "prefix": 4, "answers": 6, "stop": 6}


def shifted(routed: np.ndarray, _: object) -> np.ndarray:
    return np.roll(routed, 1, 0)


def zeros_in_prompts(routed: np.ndarray, body: dict[str, Any]) -> np.ndarray:
    prompt = body.get("prompt") or body["input_ids"]
    return np.where(np.arange(len(routed))[:, None, None] < len(prompt), 0, routed)


def another_layer(routed: np.ndarray, _: object) -> np.ndarray:
    spoiled = routed.copy()
    spoiled[:, 3] = routed[:, 1]
    return spoiled


def cached(routed: np.ndarray, body: dict[str, Any]) -> np.ndarray:
    """Without the rows of a prefix that the cache had: of all shared ones."""
    shared = "shared" in (body.get("cache_salt"), body.get("extra_key"))
    return routed[64:] if shared else routed


def last_lost(routed: np.ndarray, _: object) -> np.ndarray:
    return routed[:-1]


@pytest.mark.parametrize(
    ("spoil", "case", "kind", "said"),
    [
        (shifted, "stop", "wrong", "They are those of the token before."),
        (zeros_in_prompts, "stop", "wrong", "(of the prompt, which begins at 0), router 0"),
        (zeros_in_prompts, "stop", "wrong", "They name one expert in all slots."),
        (another_layer, "stop", "wrong", "They are those of router 0."),
        (cached, "prefix", "rows", "the first is that of token 64"),
        (last_lost, "prefill", "rows", "6 answers of 6 with too few or too many rows: 0 rows for"),
    ],
)
def test_what_is_wrong_is_named(
    server: OfModel, url: str, spoil: Any, case: str, kind: str, said: str
) -> None:
    server.spoil = spoil
    try:
        found = check(url, cases=[case])
    finally:
        server.spoil = lambda routed, _: routed
    (finding,) = found.findings
    assert finding.kind == kind
    assert said in finding.text
    (row,) = found.table.to_dict("records")
    assert row["equal"] + row["undecided"] + row["wrong"] + row["missing"] == row["decisions"]
    assert row["wrong" if kind == "wrong" else "missing"] > 0


def test_who_goes_away_and_who_is_refused(server: OfModel, url: str) -> None:
    server.delay_s = lambda n: 1.0 if n < 6 else 0.0
    server.requests.clear()
    found = check(url, cases=["abort"])
    server.delay_s = lambda n: 0.0
    assert found.ok
    assert list(found.table.answers) == [5]
    assert len(server.requests) == 11
    server.behave = lambda n, *_: (500, {}, b'{"error": "lost"}') if n == 13 else None
    found = check(url, cases=["prefill"])
    server.behave = lambda *_: None
    (finding,) = found.findings
    assert finding.kind == "refused"
    assert "HTTP 500: {'error': 'lost'}" in finding.text
    assert list(found.table.refused) == [1]


def near(logits_E: list[float], got: list[int]) -> dict[str, Any]:
    """The row of one answer of two tokens and two routers of four experts, all with these logits:
    the first router's choice for the first token is `got`, and all that follow are others."""
    right = np.sort(np.argsort(logits_E)[-2:])
    ids_TLK = np.broadcast_to(right, (2, 2, 2))
    of = Reference(ids_TLK, [np.tile(np.array(logits_E, np.float32), (2, 1))] * 2)
    routed = np.tile(np.array([0, 1]), (2, 2, 1))
    routed[0, 0] = got
    ask = Ask((7, 8), 1)
    row, _ = judge("prefill", [Answer(ask, (9,), routed)], {(7, 8): of})
    return row


def test_decisions_that_cannot_be_told() -> None:
    """Experts 2 and 3 lead, 1 is as good as 2: then what follows may differ too. (The first choice
    being right, the wrong ones are judged by themselves.)"""
    assert near([0, 1, 1 + 1e-6, 2], [1, 3])["undecided"] == 4
    assert near([0, 1, 1.1, 2], [1, 3])["wrong"] == 4
    row = near([0, 1, 1.1, 2], [2, 3])
    assert row["equal"] == 1
    assert row["wrong"] == 3


def patterned(T: int, E: int, K: int, spoil: Callable[[np.ndarray, np.ndarray], Any]) -> str:
    """What is said of an answer of two routers. `spoil`: of the routes [T, L, K] and random ones
    that are other ones."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, T, E))
    right = np.sort(np.argsort(logits, 2)[..., -K:].swapaxes(0, 1), 2)
    other = np.sort(np.argsort(logits, 2)[..., :K].swapaxes(0, 1), 2)
    ask = Ask((7,) * T, 1)
    answers = [Answer(ask, (9,), spoil(right, other))]
    _, (finding,) = judge("prefill", answers, {ask.prompt: Reference(right, [*logits])})
    return finding.text


def test_a_pattern_that_chance_makes_is_none() -> None:
    def one(right: np.ndarray, other: np.ndarray) -> np.ndarray:
        """One decision, that of the token before."""
        got = right.copy()
        got[5, 0] = right[4, 0]
        return got

    assert "They are those of the token before." in patterned(
        60, 8, 2, lambda r, _: np.roll(r, 1, 0)
    )
    assert "They are" not in patterned(60, 8, 2, one)
    # with one expert per token each decision is of one expert
    assert "They name" not in patterned(60, 8, 1, lambda right, other: other)
    assert "They name" in patterned(60, 8, 2, lambda right, _: right * 0)


def test_requests_and_answers_are_counted_apart() -> None:
    right = np.tile(np.array([2, 3]), (1, 2, 1))
    of = {(7,): Reference(right, [np.array([[0.0, 1, 2, 3]])] * 2)}
    three = Ask((7,), 1, answers=3)
    read = [Answer(three, (9,), right)] * 3
    row, (finding,) = judge("answers", [*read, Answer(three, said="HTTP 500")], of)
    assert (row["answers"], row["refused"]) == (3, 1)
    assert "1 of 2 requests got no answer" in finding.text


def test_prompts_fit_and_differ() -> None:
    """A small vocabulary and few positions too."""
    for V, longest in ((3072, 510), (50, 64), (4, 12)):
        for name, (_, asked) in CASES.items():
            for asks in asked(Draw(V, longest)):
                for ask in asks:
                    assert ask.prompt, name
                    assert len(ask.prompt) + ask.most <= longest, name
                    assert all(0 <= token < V for token in ask.prompt)


def test_the_command(server: OfModel, url: str, cli_here: Cli, tmp_path: Path) -> None:
    cli_here("conformance", url, "--case", "stop", "-o", "t.csv")
    assert (tmp_path / "t.csv").read_text().startswith("case,answers,tokens,decisions,equal")
    server.spoil = shifted
    done = cli_here("conformance", url, "--case", "stop", check=3)
    server.spoil = lambda routed, _: routed
    assert "critical: stop: " in done.stderr
    done = cli_here("conformance", url, "--case", "stpo", check=1)
    assert "no case 'stpo' (did you mean stop?)" in done.stderr
    for given in ("nowhere", tmp_path):
        done = cli_here("conformance", url, "--model", given, check=1)
        assert (
            done.stderr == f"error: no model at {given}: give its directory, with a config.json\n"
        )
    done = cli_here("conformance", url, "--save", "models", check=2)
    assert "give the URL of a server, or --save DIR" in done.stderr
    assert not (tmp_path / "models").exists()
    nameless = Server()
    nameless.about = lambda path: None
    with serving(nameless) as other:
        done = cli_here("conformance", other, check=1)
    assert done.stderr == f"error: {other} names no model: is it an engine's server?\n"


def test_the_module_writes_the_models(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_inspect.conformance", "--save", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"wrote {tmp_path / name}" for name in MODELS]
    assert all((tmp_path / name / "tokenizer.json").exists() for name in MODELS)


def test_every_model_is_what_it_says(tmp_path: Path) -> None:
    """Its decisions can be referred to, and a bias changes them."""
    from transformers import AutoModelForCausalLM

    prompt = Draw(3072, 100).ask(90, 1).prompt
    for name in MODELS:
        place = save(name, tmp_path / name)
        network = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        of = expected(network, [prompt])[prompt]
        assert len(of.ids_TLK) == 90
        assert len(np.unique(of.ids_TLK)) > network.config.num_experts_per_tok
        if name == "glm4-moe":
            for which, bias in network.named_buffers():
                if which.endswith("e_score_correction_bias"):
                    bias.zero_()
            unbiased = expected(network, [prompt])[prompt]
            assert (unbiased.ids_TLK != of.ids_TLK).any()

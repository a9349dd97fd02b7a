"""Sends the cases to a server, and compares what it returns with the same model in transformers.

T tokens that were fed, L routers, K slots, E experts.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from moe_inspect.capture.server.client import Json, ask_once, client, root_of
from moe_inspect.capture.server.protocols import (
    ENGINES,
    EngineProtocol,
    Request,
    Served,
    ask_about,
    routers_of,
    served_model,
)
from moe_inspect.conformance.cases import CASES, Ask, Draw
from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.text import first_line, no_such, plural

TIMEOUT_S = 600.0
LEAVES_AFTER_S = 0.3
NEAR = 1e-5  # of two logits so close, sums in another order may exchange the experts
STOP_AT = 5  # token of an answer
MOST_WRONG = 0.1  # of decisions that a pattern of wrong ones need not explain
BY_CHANCE = 1e-3  # p-value below which it is said


@dataclass(frozen=True)
class Answer:
    """One answer to a request. made: the tokens that were generated; routed_TLK: what the engine
    returned for the tokens that were fed (the prompt and all generated ones but the last), as far
    as it did; said: why there is none."""

    ask: Ask
    made: tuple[int, ...] = ()
    routed_TLK: np.ndarray | None = field(default=None, repr=False)
    said: str = ""

    @property
    def fed(self) -> tuple[int, ...]:
        return self.ask.prompt + self.made[:-1]


@dataclass(frozen=True)
class Reference:
    """What transformers chooses for a sequence, in ascending order [T, L, K], and its logits, of
    each router [T, E]."""

    ids_TLK: np.ndarray
    logits_LTE: Sequence[np.ndarray]


@dataclass(frozen=True)
class Conformance:
    """A server judged. table: a row per case: answers, tokens (fed), decisions, and of these
    `equal`, `undecided` (differ by experts whose logits are closer than 1e-5, or after such a
    decision of the same answer), `wrong` and `missing`; `refused`: requests without an answer.
    findings: what is wrong, in words; none for a server that conforms."""

    engine: str
    version: str | None
    table: pd.DataFrame
    findings: Sequence[Finding]

    @property
    def ok(self) -> bool:
        return not self.findings


def check(
    url: str,
    model: str | Path | None = None,
    *,
    engine: str | None = None,
    cases: Sequence[str] | None = None,
    api_key: str | None = None,
    progress: Callable[[str], None] = lambda case: None,
) -> Conformance:
    """Compares the experts that a server returns with those of the same model in transformers, in
    float32 on this machine's CPU.

    model    the directory that the server serves; by default the one it names
    engine   "vllm" or "sglang"; by default the server is asked
    cases    names of CASES; by default all
    progress is called with the name of each case that begins

    Decisions are compared as sets of experts. MoeInspectError where no server answers, it returns
    no experts, or its model cannot be loaded."""
    for name in cases or ():
        if name not in CASES:
            raise MoeInspectError(no_such("case", name, CASES))
    return asyncio.run(_check(url, model, engine, tuple(cases or CASES), api_key, progress))


async def _check(
    url: str,
    model: str | Path | None,
    engine: str | None,
    cases: Sequence[str],
    api_key: str | None,
    progress: Callable[[str], None],
) -> Conformance:
    from moe_inspect.model.load import load_config, load_model

    async with client(url, api_key, TIMEOUT_S, 64) as http:
        if engine is None:
            known = await ask_once(http, ENGINES["sglang"].about) is not None
            engine = "sglang" if known else "vllm"
        if engine not in ENGINES:
            raise MoeInspectError(no_such("engine", engine, ENGINES))
        protocol = ENGINES[engine]
        if model is not None and not Path(model, "config.json").is_file():
            raise MoeInspectError(f"no model at {model}: give its directory, with a config.json")
        name = str(model or await _named(http, protocol))
        config = load_config(name)
        about = await ask_about(http, protocol, config)
        served = served_model(about["model"], config, routers_of(config)[1], None)
        network = load_model(name, config, dtype="float32", device="cpu")
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
        taken = min(positions, about["max_model_len"] or positions) - protocol.reserved(0)
        answers_of, asked = dict[str, list[Answer]](), Asked(http, protocol, served)
        for case in cases:
            progress(case)
            answers_of[case] = []
            for asks in CASES[case][1](Draw(served.vocabulary, taken)):
                for found in await asyncio.gather(*map(asked.answers, asks)):
                    answers_of[case] += found
    answers = [*chain.from_iterable(answers_of.values())]
    if all(answer.routed_TLK is None for answer in answers):
        raise MoeInspectError(f"{root_of(http)} answers no request: {answers[0].said}")
    rows, findings = list[dict[str, Any]](), list[Finding]()
    references = expected(network, {answer.fed for answer in answers if answer.made})
    for case, of in answers_of.items():
        row, said = judge(case, of, references)
        rows.append(row)
        findings += said
    return Conformance(engine, about["version"], pd.DataFrame(rows), findings)


async def _named(http: httpx.AsyncClient, protocol: EngineProtocol) -> str:
    """The directory of the model by what the server says of it."""
    about = await ask_once(http, protocol.about) or {}
    cards = about.get("data")
    card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
    name = about.get("model_path") or card.get("root")
    if name is None:
        raise MoeInspectError(f"{root_of(http)} names no model: is it an engine's server?")
    if not isinstance(name, str) or not Path(name).is_dir():
        raise MoeInspectError(
            f"{root_of(http)} serves {name!r}, which is no directory here: give --model DIR"
        )
    return name


@dataclass(frozen=True)
class Asked:
    """A server, how it is asked, and what it serves."""

    http: httpx.AsyncClient
    protocol: EngineProtocol
    served: Served

    async def answers(self, ask: Ask) -> list[Answer]:
        """Of a request that is to stop early, both."""
        if ask.leaves:
            with contextlib.suppress(TimeoutError, MoeInspectError):
                await asyncio.wait_for(self._sent(ask), LEAVES_AFTER_S)
            return []
        found = await self._once(ask)
        if ask.own_stop and len(found[0].made) > STOP_AT:
            found += await self._once(ask, (found[0].made[STOP_AT - 1],))
        return found

    async def _once(self, ask: Ask, stop: Sequence[int] = ()) -> list[Answer]:
        try:
            data = await self._sent(ask, stop)
            return [self._read(Answer(ask), answer) for answer in data]
        except MoeInspectError as error:
            return [Answer(ask, said=str(error))]

    async def _sent(self, ask: Ask, stop: Sequence[int] = ()) -> list[Json]:
        """The JSON of each answer. Nothing is retried: what a server refuses is a finding."""
        salt = ask.salt or uuid.uuid4().hex
        request = Request(np.array(ask.prompt, np.int32), ask.most, ask.temperature, 0, salt)
        body = self.protocol.body(request, self.served)
        sampling: Json = body.get("sampling_params", body)
        sampling |= {"ignore_eos": True} if not stop else {"stop_token_ids": list(stop)}
        sampling |= {"n": ask.answers} if ask.answers > 1 else {}
        try:
            response = await self.http.post(self.protocol.path, json=body)
            data = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise MoeInspectError(f"no answer: {first_line(error)}") from None
        if response.status_code != 200:
            raise MoeInspectError(f"HTTP {response.status_code}: {str(data)[:200]}")
        answers: list[Any] = data if isinstance(data, list) else [data]
        if not (answers and all(isinstance(answer, dict) for answer in answers)):
            raise MoeInspectError(f"no answer: {str(data)[:200]}")
        choices = answers[0].get("choices")
        if isinstance(choices, list) and len(choices) > 1:  # of one prompt
            answers = [{**answers[0], "choices": [choice]} for choice in choices]
        if len(answers) != ask.answers:
            said = f"{plural(len(answers), 'answer')} where {ask.answers} were asked"
            raise MoeInspectError(said)
        return answers

    def _read(self, answer: Answer, data: Json) -> Answer:
        reply, served = self.protocol.read(data), self.served
        made, routed_TBK = reply.token_ids, self.protocol.routed(reply, served)
        if not isinstance(made, list) or not made:
            raise MoeInspectError(f"no generated token ids: {str(made)[:80]}")
        if routed_TBK.shape[1:] != (served.blocks, served.top_k):
            raise MoeInspectError(
                f"routed experts of shape {routed_TBK.shape}, not [tokens, {served.blocks}, "
                f"{served.top_k}]"
            )
        layers = [router.layer for router in served.routers]
        return replace(answer, made=tuple(made), routed_TLK=routed_TBK[:, layers])


def expected(network: Any, sequences: Iterable[tuple[int, ...]]) -> Mapping[Any, Reference]:
    """What the model chooses for each sequence, fed at once."""
    import torch

    from moe_inspect.capture.options import RecordOptions
    from moe_inspect.capture.recorder import Recorder
    from moe_inspect.trace.reader import open_trace

    fed = list(sequences)
    with tempfile.TemporaryDirectory() as place:
        with torch.no_grad(), Recorder(network, Path(place, "t"), RecordOptions(logits=True)):
            for sequence in fed:
                network(input_ids=torch.tensor([sequence], device=network.device))
        trace = open_trace(Path(place, "t"))
        routers = range(len(trace.routers))
        ids_TLK = np.stack([np.concatenate([s.ids(r) for s in trace.shards]) for r in routers], 1)
        logits_L = [np.concatenate([s.logits(r) for s in trace.shards]) for r in routers]
    ends = np.cumsum([len(sequence) for sequence in fed])[:-1]
    parts = [np.split(np.sort(ids_TLK, 2), ends), *(np.split(of, ends) for of in logits_L)]
    return {s: Reference(ids, of) for s, ids, *of in zip(fed, *parts, strict=True)}


class Wrong(NamedTuple):
    """An answer with wrong decisions: those from token `at` on, in ascending order as the right
    ones [T, L, K], and which are wrong [T, L]."""

    answer: Answer
    at: int
    got_TLK: np.ndarray
    right_TLK: np.ndarray
    wrong_TL: np.ndarray


def judge(
    case: str, answers: Sequence[Answer], references: Mapping[Any, Reference]
) -> tuple[dict[str, Any], list[Finding]]:
    """A row of the table, and what is wrong."""
    counts = dict.fromkeys(("decisions", "equal", "undecided", "wrong", "missing"), 0)
    findings, wrong = list[Finding](), list[Wrong]()
    refused = [answer for answer in answers if answer.routed_TLK is None]
    read = [answer for answer in answers if answer.routed_TLK is not None]
    lengths = list[str]()
    for answer in read:
        assert answer.routed_TLK is not None
        of, got_TLK = references[answer.fed], np.sort(answer.routed_TLK.astype(np.int64), 2)
        rows, (T, L, _) = len(got_TLK), of.ids_TLK.shape
        at = _begin(got_TLK, of.ids_TLK)
        got_TLK, right_TLK = got_TLK[: T - at], of.ids_TLK[at : at + rows]
        same_TL = (got_TLK == right_TLK).all(2)
        open_TL = ~same_TL & _undecided(of, at, got_TLK, same_TL)
        wrong_TL = ~same_TL & ~open_TL
        counts["decisions"] += T * L
        counts["equal"] += int(same_TL.sum())
        counts["undecided"] += int(open_TL.sum())
        counts["wrong"] += int(wrong_TL.sum())
        counts["missing"] += (T - len(got_TLK)) * L
        if rows != T:
            where = f", the first is that of token {at}" if at else ""
            lengths.append(f"{rows} rows for {T} tokens that were fed{where}")
        if wrong_TL.any():
            wrong.append(Wrong(answer, at, got_TLK, right_TLK, wrong_TL))
    if refused:
        requests = len(refused) + round(sum(1 / answer.ask.answers for answer in read))
        text = f"{case}: {len(refused)} of {plural(requests, 'request')} got no answer that "
        text += f"can be read: {refused[0].said}"
        findings.append(finding("refused", "critical", text, requests=len(refused)))
    if lengths:
        text = f"{case}: {plural(len(lengths), 'answer')} of {len(read)} with too few or too "
        text += f"many rows: {lengths[0]}"
        findings.append(finding("rows", "critical", text, answers=len(lengths)))
    if wrong:
        text = f"{case}: {counts['wrong']:,} of {counts['decisions']:,} decisions are wrong"
        text += f" ({len(wrong)} of {plural(len(read), 'answer')}). {_first(wrong[0])}"
        text += _pattern(wrong)
        findings.append(finding("wrong", "critical", text, decisions=counts["wrong"]))
    tokens = sum(len(answer.fed) for answer in read)
    row = {"case": case, "answers": len(read), "tokens": tokens, **counts}
    return {**row, "refused": len(refused)}, findings


def _begin(got_TLK: np.ndarray, right_TLK: np.ndarray) -> int:
    """The token of the first row: of an answer with too few rows the last ones may be there."""
    late = len(right_TLK) - len(got_TLK)
    if late <= 0 or not len(got_TLK):
        return 0
    ends = right_TLK[: len(got_TLK)], right_TLK[late:]
    first, last = ((got_TLK == end).all(2).mean() for end in ends)
    return late if last > first else 0


def _undecided(of: Reference, at: int, got_TLK: np.ndarray, same_TL: np.ndarray) -> np.ndarray:
    """Whether a decision may differ: by experts whose logits are close; and whatever follows such
    a one, in later layers and tokens. bool [T, L]"""
    found_TL = np.zeros_like(same_TL)
    for token, layer in np.argwhere(~same_TL):
        mine, right = set(got_TLK[token, layer]), set(of.ids_TLK[at + token, layer])
        apart, logits_E = [*(mine ^ right)], of.logits_LTE[layer][at + token].astype(np.float64)
        inside = len(mine) == len(right) and all(0 <= e < len(logits_E) for e in apart)
        if inside and np.ptp(logits_E[apart]) < NEAR:
            found_TL[token, layer:] = True
            found_TL[token + 1 :] = True
            break
    return found_TL


def _first(of: Wrong) -> str:
    token, router = (int(index) for index in np.argwhere(of.wrong_TL)[0])
    position, P = of.at + token, len(of.answer.ask.prompt)
    part = "of the prompt" if position < P else "of the answer"
    got, right = (ids[token, router].tolist() for ids in (of.got_TLK, of.right_TLK))
    return (
        f"First at position {position} ({part}, which begins at {P if position >= P else 0}), "
        f"router {router}: experts {got}, not {right}."
    )


def _pattern(wrong: Sequence[Wrong]) -> str:
    """What nearly all wrong decisions are, if they are one thing, and are it more often than right
    decisions are by chance."""
    # name → of each answer, which wrong decisions are it, and which right ones
    named: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for _, _, got_TLK, right_TLK, wrong_TL in wrong:
        filled, filled_TL = ((ids == ids[..., :1]).all(2) for ids in (got_TLK, right_TLK))
        parts = {"They name one expert in all slots.": (filled[wrong_TL], filled_TL)}
        like = {
            "They are those of the token before.": np.roll(right_TLK, 1, 0),
            "They are those of the token behind.": np.roll(right_TLK, -1, 0),
        }
        for router in range(right_TLK.shape[1]):
            like[f"They are those of router {router}."] = right_TLK[:, [router]]
        for name, ids_TLK in like.items():
            same_TL, usual_TL = ((ids == ids_TLK).all(2) for ids in (got_TLK, right_TLK))
            if ids_TLK.shape[1] == 1:  # at the router itself all right ones are
                usual_TL = usual_TL[:, ~usual_TL.all(0)]
            parts[name] = same_TL[wrong_TL], usual_TL
        for name, part in parts.items():
            named.setdefault(name, []).append(part)
    n = sum(int(of.wrong_TL.any(1).sum()) for of in wrong)  # layers are wrong together
    shares = dict[str, float]()
    for name, parts_of in named.items():
        same, usual = (
            np.concatenate([of.ravel() for of in each]) for each in zip(*parts_of, strict=True)
        )
        share, chance = float(same.mean()), (usual.sum() + 1) / (len(usual) + 2)
        # Chernoff's bound of the tail of a binomial distribution
        nats = share * np.log(share / chance) if share else 0.0
        nats += (1 - share) * np.log((1 - share) / (1 - chance)) if share < 1 else 0.0
        if share > max(1 - MOST_WRONG, chance) and len(named) * np.exp(-n * nats) < BY_CHANCE:
            shares[name] = share
    return f" {max(shares, key=lambda name: shares[name])}" if shares else ""

"""Documents, sequences, positions and phases of what `record` sees, whoever decodes and however,
as a witness on the model and its routers sees it; and `verify` accepts each of these traces.

B batch rows, S positions.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import moe_inspect
from tests.support.families import build
from tests.support.witness import agreed, traced
from tests.test_cli_trace import save_tokenizer

# as the transformers at hand calls it
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in MoeCausalLMOutputWithPast.__dataclass_fields__
)

IDS = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5], [9, 17, 4, 33, 9, 17, 4, 33, 9]])
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
ROWS: list[list[int]] = IDS.tolist()
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}
GREEDY |= {"pad_token_id": 0, "eos_token_id": None}
Texts = list[list[int]]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def texts_of(tokens: pd.DataFrame) -> Texts:
    """The texts of the documents, without rejected drafts. Each is one sequence."""
    kept = tokens[tokens.phase != "draft"]
    assert (kept.groupby("document").sequence.nunique() == 1).all()
    found = [rows.sort_values("position") for _, rows in kept.groupby("document")]
    for rows in found:
        assert rows.position.tolist() == [*range(rows.position.min(), rows.position.max() + 1)]
    return [rows.token_id.tolist() for rows in found]


def generated(model: Any, ids: Tensor = IDS, **options: Any) -> Texts:
    out = model.generate(ids, **{**GREEDY, **options})
    return [row[:-1] for row in out.tolist()]  # the last token is never fed


def adapted(model: Any) -> Texts:
    """Called through PEFT, which puts adapters into the model, and takes them out."""
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    texts = generated(wrapped)
    wrapped.unload()
    return texts


def prepared(model: Any) -> Texts:
    """Called through accelerate, then with its weights offloaded."""
    import accelerate
    from accelerate.hooks import remove_hook_from_submodules

    outer = accelerate.Accelerator(cpu=True).prepare_model(nn.Sequential(model))
    outer(IDS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model(IDS)
    remove_hook_from_submodules(model)
    return ROWS * 2


def piped(model: Any) -> Texts:
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, pad_token="<s>")
    pipe: Any = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    out = pipe(["a b c d", "e f"], return_tensors=True, **GREEDY)
    return [row["generated_token_ids"][:-1] for [row] in out]


def in_turn(model: Any) -> Texts:
    """Two conversations, each with a cache of its own."""
    texts = [ROWS[0][:4], ROWS[1][:6]]
    caches = [model(input_ids=torch.tensor([text]), use_cache=True)[CACHE] for text in texts]
    for token, n in enumerate((1, 0, 0, 1), 10):
        model(input_ids=torch.tensor([[token]]), **{CACHE: caches[n]})
    return [[*texts[0], 11, 12], [*texts[1], 10, 13]]


def packed(model: Any) -> Texts:
    """A text begins where the positions begin again."""
    model(input_ids=IDS[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]))
    return [ROWS[0][:4], ROWS[0][4:6], ROWS[0][6:]]


def own_drafts(model: Any) -> Texts:
    """Two of four drafts are kept, then none of one, one of two at the end."""
    cache = model(input_ids=IDS[:1, :4], use_cache=True)[CACHE]
    for fed, rejected in (([5, 1, 2, 3, 4], 2), ([7, 8], 1), ([6], 0), ([3, 4, 2], 1)):
        cache = model(input_ids=torch.tensor([fed]), **{CACHE: cache})[CACHE]
        if rejected:
            cache.crop(-rejected)
    return [[*ROWS[0][:4], 5, 1, 2, 7, 6, 3, 4]]


def in_batches(model: Any) -> Texts:
    """Requests of different lengths, in pieces; some end while others go on."""
    prompts = [ROWS[0], ROWS[1][:4], ROWS[0][:5], ROWS[1]]
    settings = transformers.GenerationConfig(**{**GREEDY, "eos_token_id": -1, "max_new_tokens": 5})
    config = transformers.ContinuousBatchingConfig
    page = "page_size" if "page_size" in config.__dataclass_fields__ else "block_size"
    batching = config(num_blocks=8, max_batch_tokens=8, **{page: 4})
    options = {"generation_config": settings, "continuous_batching_config": batching}
    out = model.generate_batch(inputs=prompts, **options)
    assert {tuple(o.prompt_ids) for o in out.values()} == set(map(tuple, prompts))
    texts = [[*o.prompt_ids, *o.generated_tokens[:-1]] for o in out.values()]
    # of the third prompt a page of four tokens was in the cache when it came, and is not fed again;
    # in transformers 5.17 of the second one too, but for its last token
    cached = {5: 4, 4: 3 if page == "block_size" else 0}
    first = [cached.get(len(o.prompt_ids), 0) for o in out.values()]
    texts = [text[n:] for text, n in zip(texts, first, strict=True)]
    # the second prompt fills a page, which is given up for one of the same text: what follows it
    # begins anew
    return [part for text in texts for part in ([text[:4], text[4:]] if len(text) == 8 else [text])]


def assisted(model: Any, **options: Any) -> Texts:
    """By another model, which proposes some of what this one generates."""
    torch.manual_seed(0)
    other = build("mixtral")
    other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight) * 0.1)
    return generated(model, IDS[:1], assistant_model=other, **options)


# name → what is done, which returns the texts; none where rows change places (beam search) or each
# pass begins anew (no cache)
WAYS: dict[str, Callable[[Any], Texts]] = {
    "forward, padding left": lambda m: m(IDS, attention_mask=MASK) and [ROWS[0], ROWS[1][3:]],
    "forward, no cache": lambda m: m(IDS, use_cache=False) and ROWS,
    "greedy": generated,
    "greedy, padding left": lambda m: [
        row[3 * n :] for n, row in enumerate(generated(m, attention_mask=MASK))
    ],
    "greedy, cache of another kind": lambda m: generated(m, cache_implementation="static"),
    "two conversations": in_turn,
    "packed rows": packed,
    "greedy, prompt in chunks": lambda m: generated(m, prefill_chunk_size=4),
    "sampling": lambda m: generated(m, do_sample=True),
    "several sequences": lambda m: generated(m, do_sample=True, num_return_sequences=2),
    "beam search": lambda m: generated(m, num_beams=2) and [],
    "no cache": lambda m: generated(m, use_cache=False) and [],
    "PEFT": adapted,
    "accelerate": prepared,
    "pipeline": piped,
    "assisted": assisted,
    "assisted, sampling": lambda m: assisted(m, do_sample=True),
    "prompt lookup": lambda m: generated(m, IDS[:1], prompt_lookup_num_tokens=3),
    "drafts of the caller's own": own_drafts,
    "continuous batching": in_batches,
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_of_a_model_of_transformers(way: str, model: Any, tmp_path: Path) -> None:
    with traced(model, tmp_path / "t") as fed:
        texts = WAYS[way](model)
    tokens = agreed(tmp_path / "t", fed)
    assert sorted(texts_of(tokens)) == sorted(texts or texts_of(tokens))
    found = {name: int((tokens.phase == name).sum()) for name in ("decode", "draft")}
    if way in PHASES:
        assert (found["decode"], found["draft"]) == PHASES[way]
    # of a request whose page another one has filled, or gives way to another's
    assert unlinked(tmp_path / "t") == (2 if way == "continuous batching" else 0)


# name → decoded tokens and rejected drafts
PHASES = {
    "greedy": (12, 0),
    "assisted": (5, 2),
    "prompt lookup": (6, 3),
    "drafts of the caller's own": (7, 4),
    # two prompts end with a piece of one token, three in transformers 5.17
    "continuous batching": (18 if CACHE == "cache" else 19, 0),
}


@torch.no_grad()
def test_padding_that_only_a_mask_of_what_each_position_sees_shows(
    model: Any, tmp_path: Path
) -> None:
    """A static cache is given one."""
    with moe_inspect.record(model, tmp_path / "t"):
        texts = generated(model, attention_mask=MASK, cache_implementation="static")
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert texts_of(tokens) == [texts[0], texts[1][3:]]
    assert (tokens.phase == "decode").sum() == PHASES["greedy"][0]


@torch.no_grad()
def test_embeddings_in_place_of_ids(model: Any, tmp_path: Path) -> None:
    with moe_inspect.record(model, tmp_path / "t"):
        out = model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **GREEDY)
    assert moe_inspect.check(tmp_path / "t", quick=True).ok
    texts = texts_of(moe_inspect.open_trace(tmp_path / "t").tokens())
    assert texts == [[-1] * 9 + row[:-1] for row in out.tolist()]


@torch.no_grad()
def test_a_cache_cut_by_the_caller(model: Any, tmp_path: Path) -> None:
    """A text goes on from the cache of another: nothing was rejected."""
    with traced(model, tmp_path / "t") as fed:
        cache = model(input_ids=IDS[:1, :4], use_cache=True)[CACHE]
        for ids in (IDS[:1, 4:7], IDS[1:, 4:8]):
            model(input_ids=ids, **{CACHE: cache})
            cache.crop(-ids.shape[1])
    tokens = agreed(tmp_path / "t", fed)
    assert tokens.groupby("sequence").position.apply(list).tolist() == [[*range(7)], [4, 5, 6, 7]]
    assert set(tokens.document) == {0}
    assert set(tokens.phase) == {"prefill"}


@torch.no_grad()
def test_counts_of_drafts(model: Any, tmp_path: Path) -> None:
    """Drafts count as any token."""
    loads = []
    for name, counts_only in (("t", False), ("c", True)):
        with moe_inspect.record(model, tmp_path / name, counts_only=counts_only):
            own_drafts(model)
        assert moe_inspect.check(tmp_path / name, quick=True).ok
        loads.append(moe_inspect.report(tmp_path / name).tables["load"].assignments.tolist())
    assert loads[0] == loads[1]
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert (tokens[tokens.phase == "draft"].groupby("sequence").size().tolist()) == [2, 1, 1]


class Attention(nn.Module):
    """With the keys and values of earlier calls in the module, or (`past`) given by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.kept = torch.zeros(2, 2, 64, 16)

    def forward(self, x_BSD: Tensor, at_S: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(x_BSD).chunk(3, -1)
        if past is not None:
            k, v = (torch.cat([old[:, 0], new], 1) for old, new in zip(past, (k, v), strict=True))
        elif at_S is not None:
            B, end = len(x_BSD), int(at_S[-1]) + 1
            self.kept[0, :B, at_S], self.kept[1, :B, at_S] = k, v
            k, v = self.kept[:, :B, :end]
        S, N = q.shape[1], k.shape[1]
        seen = torch.ones(S, N, dtype=torch.bool).tril(N - S)
        scores = (q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf"))
        return scores.softmax(-1) @ v, (k[:, None], v[:, None])


class Own(nn.Module):
    """Two layers of attention and experts, of which each token takes two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.attention = nn.ModuleList([Attention() for _ in range(2)])
        self.gates = nn.ModuleList([nn.Linear(16, 6) for _ in range(2)])

    def run(self, ids: Tensor, at_S: Any = None, past: Any = None) -> tuple[Tensor, list[Any]]:
        x, kept = self.embed(ids), []
        for layer, (attention, gate) in enumerate(zip(self.attention, self.gates, strict=True)):
            read, kv = attention(x, at_S, past[layer] if past is not None else None)
            x, kept = x + read, [*kept, kv]
            weights, chosen = gate(x).softmax(-1).topk(2)
            moe_inspect.probe(chosen, weights, layer=layer, experts=6)
            x = x + weights.sum(-1, keepdim=True)
        return self.head(x), kept


def with_own_cache(kind: str) -> tuple[Any, Callable[[Tensor, int, Any], Any]]:
    """A model, and how it is fed ids at a position, with what it returned before."""
    model: Any = Own().eval()
    at_S = lambda ids, at: torch.arange(at, at + ids.shape[1])  # noqa: E731
    if kind == "start_pos":  # as DeepSeek-V3's own code
        model.forward = lambda tokens, start_pos=0: model.run(tokens, at_S(tokens, start_pos))[0]
        return model, lambda ids, at, _: model(ids, at)
    if kind == "input_pos":  # as gpt-fast
        model.forward = lambda idx, input_pos=None: model.run(idx, input_pos)[0]
        return model, lambda ids, at, _: model(ids, input_pos=at_S(ids, at))
    model.forward = lambda idx, past_kv=None, position_ids=None: model.run(idx, None, past_kv)
    cut = lambda past, at: [[kept[:, :, :at] for kept in kv] for kv in past] if at else None  # noqa: E731
    return model, lambda ids, at, past: model(ids, cut(past, at), at_S(ids, at))[1]


@pytest.mark.parametrize("kind", ["start_pos", "input_pos", "tuples"])
@torch.no_grad()
def test_of_a_model_with_a_cache_of_its_own(kind: str, tmp_path: Path) -> None:
    """Two texts of two rows, in parts; then the rejected drafts of a single row."""
    (model, feed), past = with_own_cache(kind), None
    steps = ((0, [5, 6, 7]), (3, [1, 2, 3, 4]), (5, [8, 9]), (7, [7]), (8, [3, 3]), (9, [2]))
    with traced(model, tmp_path / "t") as fed:
        for text in (IDS, IDS.flip(1)):
            for at, part in zip((0, 4, 7, 8), text.split([4, 3, 1, 1], dim=1), strict=True):
                past = feed(part, at, past)
        for at, ids in steps:
            past = feed(torch.tensor([ids]), at, past)
    tokens = agreed(tmp_path / "t", fed)
    assert texts_of(tokens) == [*ROWS, *IDS.flip(1).tolist(), [5, 6, 7, 1, 2, 8, 9, 7, 3, 2]]
    found = tokens.groupby(tokens.phase.astype(str)).size().to_dict()
    assert found == {"prefill": 33, "decode": 13, "draft": 3}
    assert model.run(torch.tensor([ROWS[0]]))[0].shape == (1, 9, 64)  # the cache works


@torch.no_grad()
def test_positions_alone_do_not_reject(tmp_path: Path) -> None:
    """Parts of texts: of a rank that holds some, or shifted while training."""
    model: Any = Own()
    model.forward = lambda idx, position_ids=None: model.run(idx)[0]
    with traced(model, tmp_path / "t") as fed:
        for first in (8, 8, 11, 9):
            model(IDS, position_ids=torch.arange(first, first + 9).expand(2, 9))
    tokens = agreed(tmp_path / "t", fed)
    assert texts_of(tokens) == ROWS * 4
    assert set(tokens.phase) == {"prefill"}


@pytest.mark.parametrize("named", [lambda of: of, lambda of: [[f"text {n}" for n in of.tolist()]]])
@torch.no_grad()
def test_a_caller_says_which_sequence_a_token_is_of(named: Any, tmp_path: Path) -> None:
    """An engine that packs requests, by number and by name."""
    model: Any = Own()
    model.forward = lambda idx, of: model.run(idx)[0]
    passes = [([5, 6, 7, 9, 17], [4, 4, 4, 7, 7]), ([33, 8, 4], [7, 4, 7])]
    passes.append(([40, 41, 42], [9, 9, 4]))
    told = lambda args, _: {"input_ids": args[0], "sequences": named(args[1])}  # noqa: E731
    with traced(model, tmp_path / "t", inputs=told) as fed:
        for ids, of in passes:
            model(torch.tensor([ids]), torch.tensor(of))
    texts = texts_of(agreed(tmp_path / "t", fed))
    assert texts == [[5, 6, 7, 8, 42], [9, 17, 33, 4], [40, 41]]


class Returned(Own):
    """Returns the keys and values in a dict, of at most `window` positions."""

    window = 64

    def forward(self, idx: Tensor, past_kv: Any = None) -> dict[str, Any]:
        kept = self.run(idx, None, past_kv)[1]
        return {"kept": [tuple(kv[:, :, -self.window :] for kv in layer) for layer in kept]}


# of each pass: how many ids, and the pass whose cache it is given (None: it begins a text)
TURNS: dict[str, list[tuple[int, int | None]]] = {
    "two texts": [(7, None), (4, None), *((1, n) for n in range(6))],
    "two texts of one length": [(3, None), (3, None), (1, 0), (1, 1)],
    "a window": [(6, None), *((1, n) for n in range(6))],
    "a prefix": [(6, None), (4, 0), (4, 0), (1, 0), (1, 2)],
    "back before the last pass": [(4, None), (2, 0), (3, 1), (1, 1)],
}


@pytest.mark.parametrize("turns", TURNS)
@torch.no_grad()
def test_a_cache_of_tensors_is_known_again(turns: str, tmp_path: Path) -> None:
    model, given = Returned(), [of for _, of in TURNS[turns]]
    model.window = 8 if turns == "a window" else 64
    caches, ends, wanted = list[Any](), list[tuple[int, int]](), list[tuple[int, int, str]]()
    with traced(model, tmp_path / "t") as fed:
        for n, (size, of) in enumerate(TURNS[turns]):
            past = caches[of] if of is not None else None
            caches.append(model((8 * n + torch.arange(size))[None], past_kv=past)["kept"])
            document, first = ends[of] if of is not None else (given[:n].count(None), 0)
            phase = "decode" if size == 1 else "prefill"
            wanted += [(document, at, phase) for at in range(first, first + size)]
            ends.append((document, first + size))
    tokens = agreed(tmp_path / "t", fed)
    assert [*tokens[["document", "position", "phase"]].itertuples(index=False, name=None)] == wanted
    assert not tokens.duplicated(["sequence", "position"]).any()
    # one sequence for each text, and one more for each time that a cache is gone on from again
    again = sum(given.count(of) - 1 for of in {*given} - {None})
    assert tokens.sequence.nunique() == given.count(None) + again


def unlinked(path: Path) -> int:
    """The sequences of which `check` says that their beginning is unknown."""
    checked, counts = moe_inspect.check(path, quick=True), moe_inspect.open_trace(path).manifest
    assert checked.ok
    stated = counts["counts"].get("unlinked", 0)
    assert [f.values["sequences"] for f in checked.findings] == ([stated] if stated else [])
    return stated


@torch.no_grad()
def test_a_copied_cache_begins_a_sequence(tmp_path: Path) -> None:
    """Unless the caller says which it continues."""
    model, calls = Returned(), itertools.count()

    def told(args: Any, kwargs: Any) -> dict[str, Any]:
        at_BS = (4 if next(calls) == 2 else 0) + torch.arange(args[0].shape[1])[None]
        return {"input_ids": args[0], "sequences": [len(args[0][0]) % 3], "position_ids": at_BS}

    def decode() -> None:
        caches = [model(torch.arange(n)[None])["kept"] for n in (4, 6)]
        copies = [tuple(kv.clone() for kv in layer) for layer in caches[0]]
        model(torch.tensor([[9]]), past_kv=copies)

    texts = [[*range(4)], [*range(6)]]
    for path, how, wanted in (
        (tmp_path / "t", {}, [*texts, [9]]),
        (tmp_path / "told", {"inputs": told}, [[*range(4), 9], texts[1]]),
    ):
        with traced(model, path, **how) as fed:
            decode()
        tokens = agreed(path, fed)
        assert texts_of(tokens) == wanted
        assert tokens.phase.tolist() == ["prefill"] * 10 + ["decode"]
        assert unlinked(path) == len(wanted) - 2


@torch.no_grad()
def test_a_copied_cache_of_transformers_begins_a_sequence(model: Any, tmp_path: Path) -> None:
    """Of a prompt that several texts begin with, as of the rows of a batch that are repeated. The
    positions go on."""
    with traced(model, tmp_path / "t") as fed:
        cache = model(input_ids=IDS[:, :4], use_cache=True)[CACHE]
        for part in IDS[:, 4:].split([4, 1], dim=1):
            model(input_ids=part, **{CACHE: copy.deepcopy(cache)})
        cache.batch_repeat_interleave(2)
        model(input_ids=IDS[:, 4:5].repeat_interleave(2, 0), **{CACHE: cache})
    tokens = agreed(tmp_path / "t", fed)
    sequences = [rows.position.tolist() for _, rows in tokens.groupby("sequence")]
    assert sequences == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2 + [[4]] * 6
    assert len(texts_of(tokens)) == 10
    assert unlinked(tmp_path / "t") == 8


@torch.no_grad()
def test_slots_that_are_written_again_forget_their_sequence(tmp_path: Path) -> None:
    """Each pass as `generate_batch` calls a model: the third request is given the first page of the
    second, which took the place of the first request."""
    model: Any = Own()
    model.config = transformers.MixtralConfig()
    model.forward = lambda input_ids, **_: model.run(input_ids)[0]
    cache = type("Paged", (), {})()
    requests = [
        ([], [0, 1, 2, 3]),
        ([], [0, 1, 2, 3, 4]),
        ([0, 1, 2, 3], [5]),
        ([0, 1, 2, 3, 4], [6]),
    ]
    with moe_inspect.record(model, tmp_path / "t"):
        for read, written in requests:
            first, end = len(read), len(read) + len(written)
            model(
                input_ids=torch.arange(first, end)[None],
                position_ids=torch.arange(first, end)[None],
                cu_seq_lens_q=torch.tensor([0, len(written)]),
                cu_seq_lens_k=torch.tensor([0, end]),
                read_index=[torch.tensor([*read, *written])],
                write_index=[torch.tensor(written)],
                cache=cache,
            )
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    assert texts_of(tokens) == [[*range(4)], [*range(6)], [4]]
    assert unlinked(tmp_path / "t") == 1


@torch.no_grad()
def test_a_recording_that_begins_in_the_middle(tmp_path: Path) -> None:
    """Of a model that keeps its cache to itself; then it continues its own sequences. What is
    merged counts them all."""
    model, feed = with_own_cache("start_pos")
    feed(IDS[:, :4], 0, None)
    for name, row in zip("ab", ROWS, strict=True):
        with traced(model, tmp_path / name) as fed:
            for at in (4, 5, 6):
                feed(IDS[:, at : at + 1], at, None)
            feed(torch.tensor([row]), 0, None)
        assert texts_of(agreed(tmp_path / name, fed)) == [*(ids[4:7] for ids in ROWS), row]
        assert unlinked(tmp_path / name) == 2
    moe_inspect.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert unlinked(tmp_path / "both") == 4


@pytest.mark.parametrize("kind", ["copied", "preallocated"])
@torch.no_grad()
def test_of_caches_that_are_given_from_the_first_pass_on(kind: str, tmp_path: Path) -> None:
    """Copied after each pass, as beams are; or one tensor for all positions, which may hold some
    before the first pass."""
    model: Any = Returned()
    kept: Any = [(torch.zeros(1, 1, 0, 16),) * 2] * 2
    if kind == "preallocated":
        kept = [torch.zeros(2, 1, 1, 32, 16) for _ in range(2)]
        model.forward = lambda idx, kv_caches: {"logits": model.run(idx)[0], "kept": kv_caches}
    with traced(model, tmp_path / "t") as fed:
        for ids in ([1, 2, 3], [4], [5]):
            kept = model(torch.tensor([ids]), kept)["kept"]
            if kind == "copied":
                kept = [tuple(kv.clone() for kv in layer) for layer in kept]
    texts, began = ([[1, 2, 3, 4, 5]], 1) if kind == "preallocated" else ([[1, 2, 3], [4], [5]], 2)
    assert texts_of(agreed(tmp_path / "t", fed)) == texts
    assert unlinked(tmp_path / "t") == began

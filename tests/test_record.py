"""`record`: whatever is done with the model inside the block, and whoever wraps, copies, hooks or
compiles it, the trace holds what each router chose, token by token, as a witness of our own sees
it; and the model is left as it was."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, func, nn

import moe_inspect
from moe_inspect.capture.hook.arguments import length_of, mask_of
from moe_inspect.capture.hook.experts import TAKEN
from moe_inspect.capture.hook.numbering import CachedRows
from moe_inspect.capture.rows import RouterRows, ShownRouter, by_site, stored_values
from moe_inspect.errors import MoeInspectError
from tests.support.families import FAMILIES, NO_INTERFACE, build, handed_over, moe_layers, shallow
from tests.support.sweep import WHOLE, sample
from tests.support.watched import waited
from tests.support.witness import agreed, padded_left, traced, witnessed
from tests.support.zoo import recorded, token_batch
from tests.test_own_use import Wrapper

LENGTHS = [9, 5, 12]
DISPATCHED = sorted(set(FAMILIES) - NO_INTERFACE)
CASES = [*((f, "tap") for f in FAMILIES), *((f, "dispatch") for f in DISPATCHED)]
CPU = torch.device("cpu")

# (what has been compiled in this process is compiled no more: a tap would be another)
pytestmark = pytest.mark.usefixtures("nothing_is_compiled")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


# --- of every family, against what the experts' own function receives, to the bit; that the tokens
# are those which change when an expert is disturbed: test_zoo


@pytest.mark.parametrize(("family", "capture"), sample(CASES, 4))
def test_recorded_is_what_executed(family: str, capture: str, tmp_path: Path) -> None:
    model, inputs = build(family), token_batch(LENGTHS)
    if family in DISPATCHED:
        model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        stock = model(**inputs).logits
        with moe_inspect.record(model, tmp_path / "t", capture=capture, logits=True):
            assert torch.equal(model(**inputs).logits, stock)
    trace = moe_inspect.open_trace(tmp_path / "t")
    real = inputs["attention_mask"].flatten().bool().numpy()
    assert [r.layer for r in trace.routers] == moe_layers(family)
    assert trace.n_tokens == sum(LENGTHS)
    for router, layer in enumerate(moe_layers(family)):
        executed_ids, executed_weights = handed_over(model, layer, inputs)
        rounded = executed_weights[real].astype(np.float16).astype(np.float32)
        order = np.argsort(-rounded, axis=1, kind="stable")  # the first choice first
        table = trace.routing(layers=layer)
        for name, executed in (("expert_", executed_ids[real]), ("weight_", rounded)):
            got = table.filter(like=name).to_numpy()
            assert (got == np.take_along_axis(executed, order, 1)).all()
        # the logits are those before any activation: the router's weight × its input
        block = model.model.layers[layer]
        weight_of = {n: p for n, p in block.named_parameters() if p.shape == (8, 32)}
        name, weight = next((n, p) for n, p in weight_of.items() if "shared_expert_gate" not in n)
        gate, seen = block.get_submodule(name.rpartition(".")[0]), list[Tensor]()
        with gate.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0])):
            model(**inputs)
        expected = nn.functional.linear(seen[0], weight, getattr(gate, "bias", None))
        expected = expected.reshape(-1, 8).detach().numpy()[real]
        got = next(trace.shards).logits(router)
        assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


def test_bf16_weights_are_kept_exactly(tmp_path: Path) -> None:
    # Mixtral hands over float32 in any case
    model, inputs = build("olmoe", torch.bfloat16), token_batch(LENGTHS)
    trace = recorded(model, tmp_path / "t", inputs)
    assert trace.manifest["capture"]["weight_dtype"] == "bfloat16"
    _, executed = handed_over(model, 1, inputs)
    real = inputs["attention_mask"].flatten().bool().numpy()
    assert (trace.routing(layers=1).filter(like="weight_").to_numpy() == executed[real]).all()


# --- every way to call a model: what is done before the recording, and after each pass

BATCHES = [
    token_batch([9, 5]),
    token_batch([3], 1),
    padded_left([7, 7, 2], 2),
    token_batch([40], 3),
]
Steps = Iterator[Any]  # yields what calls the model in the next pass, if anything else does
WAYS: dict[str, tuple[Callable[[Any], Steps], dict[str, Any]]] = {}


def way(name: str, **options: Any) -> Callable[[Any], Any]:
    """A way to call a model, which is recorded with these options."""

    def listed(steps: Callable[[Any], Steps]) -> Any:
        WAYS[name] = steps, options
        return steps

    return listed


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


@way("plain", logits=True)
@way("committed at once", commit_every=1e-9)
@way("may drop", drop=True)
@way("a ring of the caller's size", ring_tokens=5000, weights=False)
def plain(model: Any) -> Steps:
    yield


@way("in inference mode, now and then")
def inference(model: Any) -> Steps:
    for modes in itertools.cycle((torch.inference_mode, torch.no_grad, torch.enable_grad)):
        yield lambda modes=modes, **batch: modes()(model)(**batch)


@way("trained, with gradient checkpointing")
def trained(model: Any) -> Steps:
    """Which runs the experts twice: each choice is recorded once."""
    model.train()

    def call(**batch: Any) -> Any:
        with torch.enable_grad():
            output = model(**batch, use_cache=False)
            output.logits.sum().backward()
        return output

    yield call
    model.gradient_checkpointing_enable()
    while True:
        yield call


@way("in other threads, one after the other")
def threads(model: Any) -> Steps:
    def call(**batch: Any) -> None:  # (what it returned is the thread's)
        thread = threading.Thread(target=lambda: model(**batch))
        thread.start()
        thread.join()

    while True:
        yield call


@way("wrapped by accelerate before")
def accelerated(model: Any) -> Steps:
    hooks = pytest.importorskip("accelerate.hooks")
    for module in experts_of(model):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    yield
    model.left_behind = True


@way("wrapped by accelerate within")
def accelerated_within(model: Any) -> Steps:
    yield
    yield from accelerated(model)


@way("wrapped by accelerate within, and taken off")
def accelerated_for_a_while(model: Any) -> Steps:
    hooks = pytest.importorskip("accelerate.hooks")
    yield from accelerated_within(model)
    list(map(hooks.remove_hook_from_module, experts_of(model)))


@way("given other implementations")
def implemented(model: Any) -> Steps:
    before = model.config._experts_implementation
    yield
    for name in ("batched_mm", "eager", before):
        model.set_experts_implementation(name)
        yield


@way("copied")
def copied(model: Any) -> Steps:
    """The experts of a copy compute with their own weights, and are not recorded."""
    yield
    experts = copy.deepcopy(experts_of(model)[0])
    for parameter in experts.parameters():
        parameter.zero_()
    given = torch.rand(3, 32), torch.zeros((3, 4), dtype=torch.long), torch.ones(3, 4)
    assert not experts(*given).any()
    assert experts_of(model)[0](*given).any()
    copy.deepcopy(model)(**BATCHES[0])


@way("layers recorded one by one", layers=[0])
def by_layer(model: Any) -> Steps:
    yield
    folder = Path(model.folder)
    for layers, capture in (([1], "dispatch"), ([1], "tap")):
        with traced(model, folder / capture, layers=layers, capture=capture) as seen:
            yield
        agreed(folder / capture, seen)


def replaced(model: Any, part: str, wrap: Callable[[Any], Any]) -> None:
    """The `forward` of a part of each layer's block is `wrap` of it."""
    for layer in model.model.layers:
        module = layer.mlp.get_submodule(part)
        module.forward = wrap(module.forward)


def changing_in_place(from_call: int = 0) -> Any:
    """Experts that clear the choice they were called with, from a certain call on."""

    def wrap(forward: Any) -> Any:
        calls = itertools.count()

        def run(hidden: Any, ids: Any, weights: Any) -> Any:
            output = forward(hidden, ids, weights)
            if next(calls) >= from_call:
                ids.fill_(1)
                weights.zero_()
            return output

        return run

    return wrap


@way("experts change their choice in place")
def in_place(model: Any) -> Steps:
    replaced(model, "experts", changing_in_place())
    yield
    model.left_behind = True


@way("routers return the same tensors, call after call")
def reusing_buffers(model: Any) -> Steps:
    buffers: dict[Any, Any] = {}

    def buffered(n: int, value: Tensor) -> Tensor:
        return buffers.setdefault((n, value.shape), torch.empty_like(value)).copy_(value)

    replaced(model, "gate", lambda forward: lambda *a: tuple(map(buffered, range(9), forward(*a))))
    yield


@way("a few tokens at a time")
def in_parts(model: Any) -> Steps:
    """The routers see rows in the order of the flattened batch."""

    def wrap(forward: Any) -> Any:
        def run(hidden: Any) -> Any:
            parts = [forward(part) for row in hidden.split(1) for part in row.split(4, 1)]
            return torch.cat(parts, 1).view(hidden.shape)

        return run

    replaced(model, "", wrap)
    yield


RUNS = [("tap", "eager"), ("tap", "grouped_mm"), ("dispatch", "grouped_mm"), ("counts", "eager")]
WAYS_OF_RUNS = [(name, *run) for name, run in itertools.product(WAYS, RUNS)]
# (dispatch is an implementation)
WAYS_OF_RUNS.remove(("given other implementations", "dispatch", "grouped_mm"))


@pytest.mark.parametrize(("name", "capture", "implementation"), WAYS_OF_RUNS)
@torch.no_grad()
def test_recorded_is_what_the_routers_chose(
    name: str, capture: str, implementation: str, tmp_path: Path
) -> None:
    """And the model computes what it did."""
    steps, options = WAYS[name]
    model = build("olmoe")
    model.folder = str(tmp_path)
    model.set_experts_implementation(implementation)
    stock = [model(**batch).logits for batch in BATCHES]
    if capture == "counts":
        left_out = {"logits", "drop", "ring_tokens", "weights"}
        options = {k: v for k, v in options.items() if k not in left_out} | {"counts_only": True}
    else:
        options = {**options, "capture": capture}
    between = steps(model)
    call = next(between)
    with traced(model, tmp_path / "t", **options) as seen:
        for batch, expected in zip(BATCHES, stock, strict=True):
            output = (call or model)(**batch)
            if output is not None:
                torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
            call = next(between, None)
    between.close()
    agreed(tmp_path / "t", seen)
    assert (seen.passes, len(seen.ids)) == (4, 9 + 5 + 3 + 7 + 7 + 2 + 40)
    assert model.config._experts_implementation == implementation
    hooks = [
        h
        for m in model.modules()
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    assert not [h for h in hooks if "moe_inspect" in getattr(h, "func", h).__module__]
    assert hasattr(model, "left_behind") or not any("forward" in vars(m) for m in experts_of(model))
    assert not any(hasattr(m, TAKEN) for m in experts_of(model))
    model(**BATCHES[0])  # and whoever has wrapped it reads no more


def test_code_that_is_not_known_may_change_its_tensors_at_any_time(tmp_path: Path) -> None:
    """What the first pass shows is not relied on there."""
    for known in (True, False):
        model = build("olmoe")
        if not known:
            outside = {"__module__": "transformers_modules.own"}
            model.__class__ = type("OwnModel", (type(model),), outside)
        replaced(model, "experts", changing_in_place(from_call=1))
        with traced(model, tmp_path / f"{known}") as seen, torch.no_grad():
            for batch in BATCHES:
                model(**batch)
        with pytest.raises(AssertionError) if known else nullcontext():  # control: it would show
            agreed(tmp_path / f"{known}", seen)


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_recorded_is_what_a_users_hook_makes_of_it(
    when: str, implementation: str, tmp_path: Path
) -> None:
    """Even if the hook is registered after the recording has begun."""
    model = build("olmoe")
    model.set_experts_implementation(implementation)

    def to_the_first(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, weights = args
        return hidden, torch.arange(ids.shape[1]).expand_as(ids).clone(), weights

    def register() -> None:
        for module in experts_of(model):
            module.register_forward_pre_hook(to_the_first)

    if when == "before":
        register()
    with moe_inspect.record(model, tmp_path / "t", capture="tap"), torch.no_grad():
        if when == "within":
            register()
        for batch in BATCHES:
            model(**batch)
    found = moe_inspect.open_trace(tmp_path / "t").routing().filter(like="expert_")
    assert set(found.to_numpy().ravel()) == set(range(4))


PAIRS = [("tap", "dispatch"), ("dispatch", "tap"), ("tap", "tap")]


@pytest.mark.parametrize("ends_first", [0, 1])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("captures", PAIRS)
def test_two_recorders_end_in_any_order(
    captures: tuple[str, str], implementation: str, ends_first: int, tmp_path: Path
) -> None:
    model = build("olmoe")
    model.set_experts_implementation(implementation)
    with ExitStack() as first, ExitStack() as second, torch.no_grad():
        both = list(zip((first, second), captures, strict=True))
        seen = [
            stack.enter_context(traced(model, tmp_path / str(n), capture=capture))
            for n, (stack, capture) in enumerate(both)
        ]
        for batch in BATCHES:
            model(**batch)
        (first, second)[ends_first].close()
        model(**BATCHES[0])
    for n, witness in enumerate(seen):
        agreed(tmp_path / str(n), witness)
    assert seen[ends_first].passes == seen[1 - ends_first].passes - 1
    assert model.config._experts_implementation == implementation
    assert not any("forward" in vars(m) or hasattr(m, TAKEN) for m in experts_of(model))


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"][: None if WHOLE else 1])
def test_compiled_for_the_first_time_while_it_is_recorded(
    implementation: str, tmp_path: Path
) -> None:
    """The recording has begun with nothing compiled, and so has put a `forward` there."""
    model, counters = shallow("olmoe"), torch._dynamo.utils.counters
    model.set_experts_implementation(implementation)
    expected = recorded(model, tmp_path / "expected", *[BATCHES[0]] * 2).routing()
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager")
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad():
        for _ in range(2):
            compiled(**BATCHES[0])
    assert counters["frames"]["ok"]
    assert moe_inspect.open_trace(tmp_path / "t").routing().equals(expected)


def test_dispatch_has_the_gradients_of_stock(tmp_path: Path) -> None:
    inputs = token_batch(LENGTHS)
    gradients = []
    for capture in ("tap", "dispatch"):
        model = build("qwen3_moe").train()
        model.set_experts_implementation("grouped_mm")
        with moe_inspect.record(model, tmp_path / capture, capture=capture):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("gate.weight" in name and grad.any() for name, grad in gradients[0].items())
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


# --- calls of a CPU are kept until their pass ends


def test_ids_of_no_expert_are_nowhere() -> None:
    """Sentinels of other ranks, and anything that a byte cannot hold."""
    ids = torch.tensor([[0, 7, 8, -1], [255, 256 + 3, -253, 2]])
    weights = torch.rand(2, 4)
    rows = RouterRows([ShownRouter(CPU, 4, 8, 8)] * 2, [0, 1], ("",), torch.float16)
    taken = rows.whole({"": [(0, (ids, weights)), (1, (ids, weights))]}, 2)
    assert taken is not None
    for found, given in zip(
        stored_values([taken], "ids", None),
        stored_values([taken], "weights", None),
        strict=True,
    ):
        assert found.tolist() == [[0, 7, 255, 255], [255, 255, 255, 2]]
        assert (given == weights.half().numpy()).all()


@pytest.mark.parametrize("T", [1, 3])
def test_only_a_whole_pass_is_written(T: int) -> None:
    # the second site is called twice
    of_pass = RouterRows([ShownRouter(CPU, 2, 8, 8)] * 3, [0, 1, 1], ("",), torch.float32)

    def found(*sizes: tuple[int, int], K: int = 2) -> Any:
        """The ids and weights of a pass of calls of these (site, rows); and its calls, by site."""
        calls = [(n, (torch.full((rows, K), n), torch.rand(rows, K))) for n, rows in sizes]
        return of_pass.whole({"": calls}, T), by_site(calls, 2)

    for sizes in (
        [(0, T), (1, T), (1, T)],
        [(1, T), (0, T), (1, T)],
        [(1, T), (0, T - 1), (1, T), (0, 1)],  # in parts
    ):
        taken, calls = found(*sizes)
        (ids,), (weights,) = taken.values["ids"], taken.values["weights"]
        assert ids[..., 0].tolist() == [[0] * T, [1] * T, [1] * T]
        assert weights[0].equal(torch.cat([weights for _, weights in calls[0]]))
    for sizes in (
        [(0, T), (1, T)],
        [(0, T), (1, T), (1, T), (1, T)],
        [(0, T), (1, T), (1, T - 1)],
        [(0, T + 1), (1, T + 1), (1, T + 1)],
        [(0, T), (0, 1), (1, T), (1, T)],
    ):
        assert found(*sizes)[0] is None
    assert found((0, T), (1, T), (1, T), K=3)[0] is None


# --- labels, counts, options


def test_labels_name_documents_and_domains(model: Any, tmp_path: Path) -> None:
    recording = moe_inspect.record(model, tmp_path / "t", domains=["x", "y", "x"])
    with recording as recorder, torch.no_grad():
        recorder.label(documents=["a", "b", "c"])  # the domains stay
        model(**token_batch(LENGTHS))
        recorder.label(documents=["same", "same"], domains=["z", "z"])
        model(**token_batch([3, 3]))
        recorder.label(domains=["one too few"])
        says = "domains has 1 values, the forward pass has 3 rows"
        with pytest.raises(MoeInspectError, match=says):
            model(**token_batch(LENGTHS))
    trace = moe_inspect.open_trace(tmp_path / "t")
    documents = trace.documents()[["source", "domain", "tokens"]].to_numpy().T.tolist()
    assert documents == [["a", "b", "c", "same"], ["x", "y", "x", "z"], [*LENGTHS, 6]]
    sizes = trace.tokens().groupby("domain", observed=True).size()
    assert sizes.to_dict() == {"x": 21, "y": 5, "z": 6}
    assert trace.tokens()["sequence"].nunique() == 5


def test_counts_equal_the_decisions_counted(model: Any, tmp_path: Path) -> None:
    batches = [token_batch(LENGTHS, seed) for seed in range(5)]
    domains = ["x", "y", "x"]
    full = recorded(model, tmp_path / "full", *batches, domains=domains)
    counts = recorded(model, tmp_path / "counts", *batches, domains=domains, counts_only=True)
    assert counts.n_tokens == full.n_tokens
    assert counts.documents().equals(full.documents())
    rows = full.routing().merge(full.tokens(), on="token")
    got = counts.counts().set_index(["router", "domain", "expert"])
    for key, part in rows.groupby(["router", "domain"], observed=True):
        ids_TK, weights_TK = (part.filter(like=of).to_numpy() for of in ("expert_", "weight_"))
        load_E, first_E = (np.bincount(ids.ravel(), minlength=8) for ids in (ids_TK, ids_TK[:, 0]))
        weight_E = np.bincount(ids_TK.ravel(), weights_TK.ravel(), minlength=8)
        assert (got.loc[key, "assignments"] == load_E).all()
        assert (got.loc[key, "first_choice"] == first_E).all()
        np.testing.assert_allclose(got.loc[key, "weight_sum"], weight_E, rtol=2e-3)


@pytest.mark.parametrize(
    ("every", "spans"), [(1, [(0, 2), (3, 5), (6, 8), (9, 10)]), (2, [(0, 4), (6, 10)])]
)
def test_counts_are_committed_after_so_many_counted_passes(
    model: Any, tmp_path: Path, every: int, spans: list[tuple[int, int]]
) -> None:
    """And each is the sum of the sampled passes, as without a trace."""
    batches, root = [token_batch(LENGTHS, seed) for seed in range(11)], tmp_path / "t"
    how: dict[str, Any] = {"counts_only": True, "every": every, "flush_steps": 3}

    def shards() -> list[Any]:
        return list(moe_inspect.open_trace(root).shards)

    with moe_inspect.record(model, root, **how), torch.no_grad():
        for number, batch in enumerate(batches):
            model(**batch)
            whole = [span for span in spans if span[1] <= number and span != (9, 10)]
            # (the writer is a thread)
            waited(lambda: not whole or len(shards()) >= len(whole))  # noqa: B023
            assert len(shards()) == len(whole)
    assert [(shard.files.first_batch, shard.files.last_batch) for shard in shards()] == spans
    for (first, last), shard in zip(spans, shards(), strict=True):
        with moe_inspect.record(model, counts_only=True) as of_span, torch.no_grad():
            for batch in batches[first : last + 1 : every]:
                model(**batch)
        load = of_span.totals().load
        table = shard.counts().to_pandas().sort_values(["router", "expert"])
        assert table["assignments"].tolist() == np.ravel(load).tolist()
        sums = of_span.balance()["assignments"].tolist()
        assert sums == [2 * sum(LENGTHS) * len(batches[first : last + 1 : every])] * 2


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("t", {"capture": "spy"}, "no capture 'spy'"),
    ("t", {"every": 2}, "give counts_only=True"),
    ("t", {"counts_only": True, "logits": True}, "keeps no logits"),
    ("t", {"flush_steps": 3}, "flush_steps commits counts to a trace"),
    ("t", {"flush_steps": 0, "counts_only": True}, "flush_steps is 0: give a whole number"),
    (None, {"every": 0, "counts_only": True}, "every is 0: give a whole number, 1 or more"),
    (None, {"every": "x", "counts_only": True}, "every is 'x': give a whole number"),
    (None, {"every": True, "counts_only": True}, "every is True: give a whole number"),
    (None, {"every": None, "counts_only": True}, "every is None: give a whole number"),
    ("t", {"flush_steps": 3, "counts_only": True, "commit_every": 5.0}, "commit_every both"),
    ("t", {"layers": [0, 7]}, "no router in layer 7: the MoE layers are 0, 1"),
    (None, {}, "needs a path"),
    ("full", {}, "there is something at"),
    ("full", {"overwrite": True}, r"is not a trace \(it holds thesis.tex\): not overwritten"),
    ("full/thesis.tex/below", {}, "cannot write"),
]


def test_what_cannot_be_recorded_is_refused(model: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years")
    for place, options, says in REFUSED:
        with pytest.raises(MoeInspectError, match=says):
            moe_inspect.record(model, place and tmp_path / place, **options)
    for none, name in ((None, "NoneType"), ("mixtral", "str")):
        with pytest.raises(MoeInspectError, match=f"^{name} is no model: give a torch.nn.Module$"):
            moe_inspect.record(none, counts_only=True)
    made = torch.jit.script(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)))
    for script in (made, Wrapper(made)):
        with pytest.raises(MoeInspectError, match=r"Sequential is a ScriptModule, .* made from"):
            moe_inspect.record(script, tmp_path / "t")
    first, second = (moe_inspect.record(model, tmp_path / x, capture="dispatch") for x in "ab")
    refused = pytest.raises(MoeInspectError, match="already being recorded with dispatch")
    with first, refused, second:
        pass
    assert (tmp_path / "full/thesis.tex").read_text() == "years"
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("counts_only", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_pass_that_fails_counts_nowhere_and_may_be_tried_again(
    error: type[BaseException], counts_only: bool, model: Any, tmp_path: Path
) -> None:
    """It fails between two layers: what the first one routed is in no count. Not tried again, it
    ends the recording."""

    def fail(*_: Any) -> None:
        raise error

    options: dict[str, Any] = {"documents": ["a", "b", "c"], "counts_only": counts_only}
    for again in (True, False):
        recording = moe_inspect.record(model, tmp_path / f"{again}", **options)
        with witnessed(model) as seen, suppress(error), recording, torch.no_grad():
            if not again:
                model(**token_batch(LENGTHS))
            caught = pytest.raises(error) if again else nullcontext()
            with model.model.layers[1].register_forward_pre_hook(fail), caught:
                model(**token_batch(LENGTHS))
            model(**token_batch(LENGTHS))
        agreed(tmp_path / f"{again}", seen)
        trace = moe_inspect.open_trace(tmp_path / f"{again}")
        assert trace.n_tokens == sum(LENGTHS)
        assert trace.status == ("complete" if again else "interrupted")
        named = trace.documents()[["document", "source"]].to_numpy().tolist()
        assert named == [[0, "a"], [1, "b"], [2, "c"]]


def test_a_recording_is_entered_once_and_replaces_no_trace(model: Any, tmp_path: Path) -> None:
    first, second = (moe_inspect.record(model, tmp_path / "t") for _ in range(2))
    with first, torch.no_grad():
        model(**token_batch([4]))
    with pytest.raises(MoeInspectError, match="call record again"):
        first.__enter__()
    with pytest.raises(MoeInspectError, match="there is a trace at"), second, torch.no_grad():
        model(**token_batch([9]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 4
    assert recorded(model, tmp_path / "t", token_batch([9]), overwrite=True).n_tokens == 9


def test_a_mask_of_what_each_position_sees_shows_the_padding() -> None:
    full = torch.tensor([[True] * 4, [False, False, True, True]])
    seen = full[:, None, None] & torch.ones(4, 4, dtype=torch.bool).tril()  # [2, 1, 4, 4]
    by_layer = {"sliding_attention": None, "full_attention": full}
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, float("-inf")), by_layer):
        assert torch.equal(mask_of(mask, 2, 4, 0), full)
    assert mask_of({**by_layer, "full_attention": None}, 2, 4, 0) is None
    for mask, kind in ((seen[:, 0], "3-D"), ({"sliding_attention": full}, "dict")):
        with pytest.raises(MoeInspectError, match=f"padding from a {kind} attention mask"):
            mask_of(mask, 2, 4, 0)


def test_a_cache_that_counts_on_its_device_is_asked_when_it_may_have_been_reset() -> None:
    on_device = type("OnDevice", (int,), {"is_cuda": True})
    cache, held = SimpleNamespace(get_seq_length=lambda: on_device(9)), CachedRows(7)
    assert length_of(cache, held, S=1) == 7  # nobody waits for the device in a step of decoding
    assert length_of(cache, held, S=4) == length_of(cache, None, S=1) == 9


def test_probabilities_are_not_taken_for_logits(model: Any, tmp_path: Path) -> None:
    """Refused before anything is written: the trace that is there stays."""
    recorded(model, tmp_path / "t", token_batch(LENGTHS), logits=True)
    gate = model.model.layers[1].mlp.gate
    says = r"layers\.1\.mlp\.experts returns probabilities"
    with (
        gate.register_forward_hook(lambda m, args, output: (output[0].softmax(-1), *output[1:])),
        pytest.raises(MoeInspectError, match=says),
    ):
        recorded(model, tmp_path / "t", token_batch([4]), logits=True, overwrite=True)
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == sum(LENGTHS)


# --- callers that cannot be recorded, or not now

IDS = torch.arange(2, 34).reshape(2, 16)


class Logits(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def gradient(model: Any) -> None:
    values = {name: p.detach() for name, p in model.named_parameters()}
    func.grad(lambda v: func.functional_call(model, v, (IDS,)).logits.sum())(values)


TRANSFORMS: dict[str, Callable[[Any], object]] = {
    "torch.func": gradient,
    "torch.export": lambda model: torch.export.export(Logits(model), (IDS,), strict=False),
    "torch.jit.trace": lambda model: torch.jit.trace(Logits(model), IDS, check_trace=False),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_computes_nothing_with_a_model_is_refused(tmp_path: Path, name: str) -> None:
    model, transform = build("mixtral"), TRANSFORMS[name]
    with moe_inspect.record(model, tmp_path / "t") as recorder:
        for _ in range(2):
            with pytest.raises(MoeInspectError, match=f"{name} cannot take a Mixtral.*paused"):
                transform(model)
            model(IDS)
        with recorder.paused():
            transform(model)
        model(IDS)
    assert recorder.tokens == 3 * 32
    assert moe_inspect.check(tmp_path / "t", quick=True).ok


def test_two_threads_are_told_that_they_share_a_model(tmp_path: Path) -> None:
    """A thread that comes after another is fine, also where its pass has failed."""
    model, inside, over = build("mixtral"), threading.Event(), threading.Event()
    waits = False

    def wait(*_: Any) -> None:
        if waits:
            inside.set()
            assert over.wait(60)

    def fail() -> None:
        with pytest.raises(IndexError):
            model(IDS + 10**6)

    model.model.layers[1].register_forward_pre_hook(wait)
    with moe_inspect.record(model, tmp_path / "t") as recorder:
        model(IDS)
        failing = threading.Thread(target=fail)
        failing.start()
        failing.join()
        model(IDS)
        waits = True
        other = threading.Thread(target=model, args=(IDS,))
        other.start()
        assert inside.wait(60)
        with pytest.raises(MoeInspectError, match="another thread is running this Mixtral"):
            model(IDS)
        waits = False
        over.set()
        other.join()
        model(IDS)
    assert recorder.tokens == 4 * 32
    assert moe_inspect.check(tmp_path / "t", quick=True).ok


@pytest.mark.parametrize("capture", ["tap", "dispatch"])
def test_a_copy_runs_the_models_own_experts_and_is_not_pickled(
    tmp_path: Path, capture: Any
) -> None:
    model = build("qwen3_moe")
    before, expected = model.get_experts_implementation(), model(IDS).logits
    with moe_inspect.record(model, tmp_path / "t", capture=capture):
        model(IDS)
        copied, layers = copy.deepcopy(model), copy.deepcopy(model.model.layers)
        assert copied.get_experts_implementation() == before
        assert layers[0].mlp.experts.config._experts_implementation == before[""]
        with pytest.raises(MoeInspectError, match="cannot be pickled while it is being recorded"):
            pickle.dumps(model)
        with pytest.raises(MoeInspectError, match=r"save its state_dict\(\)"):
            torch.save(model, io.BytesIO())
    assert model.get_experts_implementation() == before
    assert torch.equal(copied(IDS).logits, expected)
    with moe_inspect.record(copied, tmp_path / "u", capture="dispatch"):
        copied(IDS)  # as any other
    assert copied.get_experts_implementation() == before
    assert pickle.loads(pickle.dumps(model))(IDS).logits.equal(expected)

"""The experts implementation: through the kernels (Triton's interpreter) and their torch references
it computes what stock computes, forward and backward, for everything transformers' interface can
carry; compiled and in `generate`; and leaves a model as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers.generation.configuration_utils import CompileConfig
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

import moe_inspect
from moe_inspect.capture.hook import experts
from moe_inspect.capture.hook.experts import mode_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from tests.support.families import FAMILIES, NO_INTERFACE, build, shallow
from tests.support.sweep import WHOLE, sample
from tests.support.zoo import state_of, token_batch

ON_INTERFACE = sorted(set(FAMILIES) - NO_INTERFACE)
LENGTHS = [9, 5]
INPUTS = token_batch(LENGTHS)


@pytest.fixture(autouse=True)
def stable_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock sorts unstably, which shows in the last bit of sums: here it sorts as we do."""
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, **options: sort(x, **{**options, "stable": True}))


def routing(model: Any, path: Path, batches: Any, **options: Any) -> tuple[pd.DataFrame, Any]:
    """What is recorded of the batches, and their logits."""
    with moe_inspect.record(model, path, **options), torch.no_grad():
        logits = [model(**batch).logits for batch in batches]
    return moe_inspect.open_trace(path).routing(), logits


# --- whole models


@pytest.mark.parametrize("family", sample(ON_INTERFACE, 7))
def test_through_the_kernels_a_model_computes_what_stock_does(
    family: str, on_triton: None, tmp_path: Path
) -> None:
    """Recorded, paused and without a recorder, many slots and few."""
    few = token_batch([2])
    model = build(family)
    batches, stock, tapped = [INPUTS, few, INPUTS], list[Any](), list[pd.DataFrame]()
    with torch.no_grad():
        for name, batch in (("grouped_mm", INPUTS), ("batched_mm", few)):
            model.set_experts_implementation(name)
            stock.append(model(**batch).logits)
            tapped.append(routing(model, tmp_path / name, [batch], capture="tap")[0])
        experts.register()
        model.set_experts_implementation("moe_inspect")
        with moe_inspect.record(model, tmp_path / "d", capture="dispatch") as recorder:
            ours = [model(**batch).logits for batch in batches]
            with recorder.paused():
                ours += [model(**few).logits]
        ours += [model(**few).logits]
    assert all(torch.equal(ours[n], stock[0]) for n in (0, 2))
    assert all(torch.equal(ours[n], stock[1]) for n in (1, 3, 4))
    dispatched, begin = moe_inspect.open_trace(tmp_path / "d").routing(), 0
    for n in (0, 1, 0):
        tokens = tapped[n]["token"].nunique()
        rows = dispatched[dispatched["token"].between(begin, begin + tokens - 1)]
        rows = rows.assign(token=rows["token"] - begin).reset_index(drop=True)
        assert rows.equals(tapped[n])
        begin += tokens
    assert (
        len(dispatched)
        == begin * len(find_routers(model))
        == sum(map(len, tapped)) + len(tapped[0])
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("capture", ["tap", "dispatch"])
def test_detached_a_model_is_what_it_was(capture: str, fails: bool, tmp_path: Path) -> None:
    model = build("qwen3_moe")
    before, weights = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.get_experts_implementation()
    recorder = moe_inspect.record(model, tmp_path / "t", capture=capture, logits=True)
    with pytest.raises(ArithmeticError) if fails else nullcontext(), recorder, torch.no_grad():
        model(**INPUTS)
        assert state_of(model) != before
        if fails:
            raise ArithmeticError
    assert state_of(model) == before
    assert model.get_experts_implementation() == implementation
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


# --- one experts module, with every flag the interface has


def module(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    config: Any = SimpleNamespace(
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), 16),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 24),
        **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
        **{"moe_latent_size": None, "hidden_act": "silu", "mlp_hidden_act": "relu2"},
        **{"post_norm_eps": 1e-6, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        _experts_implementation="grouped_mm",
    )
    family, name = KINDS[kind]
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    made = getattr(modeling, name)(config)
    if not (hasattr(made, "_apply_gate") and hasattr(made, "is_transposed")):
        pytest.skip(f"in transformers {transformers.__version__} {name} is not on the interface")
    for parameter in made.parameters():
        parameter.data.normal_(std=0.3)
    return made.to(dtype)


KINDS = {
    "plain": ("mixtral", "MixtralExperts"),
    "bias, transposed, interleaved": ("gpt_oss", "GptOssExperts"),
    "ungated": ("nemotron_h", "NemotronHExperts"),
    "transposed": ("aria", "AriaExperts"),
    "post-expert norm": ("muse_spark", "MuseSparkExperts"),
}


def arguments(
    T: int, dtype: torch.dtype = torch.float32, sentinels: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    hidden = torch.randn(T, 16, generator=generator).to(dtype)
    ids = torch.rand(T, 6, generator=generator).topk(3, 1).indices
    weights = torch.rand(T, 3, generator=generator).to(dtype)
    if sentinels:
        other = torch.rand(T, 3, generator=generator) < 0.4
        ids = ids.masked_fill(other, 6)
    return hidden, ids, weights


def outcome(forward: Any, made: Any, given: Any) -> list[torch.Tensor]:
    """Output, and the gradients of the hidden states, the gate weights and every parameter."""
    hidden, weights = (given[n].clone().requires_grad_() for n in (0, 2))
    made.zero_grad()
    output = forward(made, hidden, given[1], weights)
    (output * torch.linspace(-1, 1, 16)).sum().backward()
    # nobody grouped: no parameter has a part in an empty output
    of_parameters = (p.grad.clone() for p in made.parameters() if p.grad is not None)
    return [output.detach(), hidden.grad, weights.grad, *of_parameters]


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_stock(kind: str, on_triton: None) -> None:
    """Up to E slots are copied, more are grouped. With `sentinels` some are other ranks', which
    take no part."""
    made = module(kind)
    sizes = [(0, False), (1, False), (2, True), (7, False), (20, True)]
    for T, sentinels in [*sizes, (50, False)] if WHOLE else sizes:
        given = arguments(T, sentinels=sentinels)
        made._is_expert_parallel = sentinels
        forwards = grouped_mm_experts_forward, experts.experts_forward
        theirs, ours = (outcome(forward, made, given) for forward in forwards)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), T
        assert all(a.isfinite().all() for a in ours)
        with torch.no_grad():  # the fused sum
            stock = batched_mm_experts_forward if T <= 2 else grouped_mm_experts_forward
            assert torch.equal(experts.experts_forward(made, *given), stock(made, *given)), T


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TYPES = [(F16, F16, F16, 0.0), (BF16, BF16, BF16, 0.02), (BF16, F32, F32, 0.0)]


@pytest.mark.parametrize(("weights", "given", "result", "slack"), TYPES)
def test_in_other_types(
    weights: Any, given: Any, result: Any, slack: float, on_triton: None
) -> None:
    """The last is autocast, where the norm before the experts gives float32. The interpreter rounds
    float32 to bfloat16 otherwise than torch."""
    made, fed_with = module("plain", weights), arguments(20, given)
    both = experts.experts_forward, grouped_mm_experts_forward
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=given != weights):
        ours, theirs = (f(made, *fed_with) for f in both)
    assert ours.dtype == theirs.dtype == result
    assert (ours - theirs).abs().max() <= slack * theirs.abs().max()


def test_few_slots_are_copied(on_triton: None) -> None:
    """With a gradient it would keep a copy of the experts' weights a slot: gigabytes."""
    made = module("plain")
    sizes = ((64, 64), (65, 128), (16, 8), (8, 8))
    assert [experts.are_few(*size) for size in sizes] == [True, False, False, True]

    def copies(T: int) -> bool:
        with torch.profiler.profile() as profile:
            experts.experts_forward(made, *arguments(T))
        return any(event.name == "aten::bmm" for event in profile.events())

    assert not copies(2)
    with torch.no_grad():
        assert copies(2)
        assert not copies(3)  # 9 slots of 6 experts


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_on_a_cpu_few_slots_are_left_to_the_models_own_implementation(
    implementation: str, tmp_path: Path
) -> None:
    model, few, many = build("olmoe"), token_batch([3]), token_batch([40, 9])
    slots = list[int]()

    def watched(self: Any, hidden: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        slots.append(ids.numel())
        return stock(self, hidden, ids, *rest)

    named = implementation
    if (stock := ALL_EXPERTS_FUNCTIONS.get(implementation)) is not None:
        ALL_EXPERTS_FUNCTIONS.register(named := f"watched {implementation}", watched)
    model.set_experts_implementation(named)
    with torch.no_grad():
        bare = model(**few).logits
        slots.clear()
    in_turn = (few, many, few)
    found, outputs = routing(model, tmp_path / "d", in_turn, capture="dispatch")
    eager = implementation == "eager"  # its loop is no entry of the registry
    assert slots == ([] if eager else [12] * 4)  # two layers, two passes
    if not eager:
        assert all(torch.equal(bare, outputs[n]) for n in (0, 2))
    assert set(model.get_experts_implementation().values()) == {named}
    assert not any(hasattr(s.module, experts.TAKEN) for s in find_routers(model))
    tapped, _ = routing(model, tmp_path / "t", in_turn, capture="tap")
    # the sums of a loop and of ours differ in their last bits: so do weights, kept as float16
    pd.testing.assert_frame_equal(found, tapped, check_exact=not eager, rtol=1e-3)


# --- what is left to the tap


def test_what_dispatch_cannot_take_over_is_tapped() -> None:
    model = build("olmoe")
    sites = find_routers(model)
    module = sites[1].module
    assert mode_of(model, sites, "dispatch") == "dispatch"

    def refuses(why: str) -> None:
        assert mode_of(model, sites, "auto") == "tap"
        with pytest.raises(MoeInspectError, match=f"OlmoeForCausalLM {why}: use --capture tap"):
            mode_of(model, sites, "dispatch")

    module._is_expert_parallel = True
    refuses("runs expert-parallel")
    module._is_expert_parallel = False
    module.__class__ = type("FP8Experts", (type(module),), {})
    refuses("has FP8 experts")
    for site in sites:  # as in a release that hands over local ids
        vars(site.module).pop("_is_expert_parallel", None)
    model.config.distributed_config = SimpleNamespace(enable_expert_parallel=True)
    with pytest.raises(MoeInspectError, match="gives experts local ids under expert parallelism"):
        mode_of(model, sites, "auto")


def test_experts_that_llm_compressor_has_split_are_traced_alike(tmp_path: Path) -> None:
    """They are modules of their own, with the flags of the interface, but not its config."""
    model = build("olmoe")
    whole, _ = routing(model, tmp_path / "whole", [INPUTS], capture="tap")
    for site in find_routers(model):
        flags = {"is_transposed": False, "has_gate": True, "num_experts": 8}
        flags["forward"] = lambda self, *call, stacked=site.module: stacked(*call)
        split = type("LinearExperts2D", (torch.nn.ModuleList,), flags)()
        model.set_submodule(site.path, split)
    assert routing(model, tmp_path / "split", [INPUTS])[0].equals(whole)


# --- compiled, and in generate


@pytest.mark.parametrize("capture", ["tap", "dispatch"][0 if WHOLE else 1 :])
def test_compiled_whole(capture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """fullgraph: a graph break would raise. dynamic: other lengths need no other graph."""
    lengths = [[4, 3], [3, 5], [7, 2], [4, 3]]
    batches = [token_batch(of_rows, n) for n, of_rows in enumerate(lengths)]
    if capture == "dispatch":
        request.getfixturevalue("on_triton")
    model = shallow("olmoe")
    eager, wanted = routing(model, tmp_path / "e", batches, capture=capture)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    counters.clear()
    found, outputs = routing(compiled, tmp_path / "c", batches, capture=capture)
    assert found.equals(eager)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, outputs, strict=True))


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def layer_by_layer(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def for_decoding(model: Any) -> Any:
    """As `generate` compiles a model."""
    how = CompileConfig(fullgraph=True, dynamic=True, backend="eager", mode=None)
    return lambda **inputs: model.get_compiled_call(how)(**inputs)


def around_a_step(model: Any) -> Any:
    return torch.compile(lambda **inputs: model(**inputs).logits.sum(), backend="eager")


from_outside = partial(torch.compile, backend="eager")
COMPILED = [(in_place, True), (for_decoding, False), (around_a_step, False)]
COMPILED += [(layer_by_layer, True), (from_outside, True), (from_outside, False)] * WHOLE


@pytest.mark.parametrize(("compiled", "before"), COMPILED)
def test_compiled_in_part(compiled: Callable[[Any], Any], before: bool, tmp_path: Path) -> None:
    """`before` it is recorded, or behind the recorder's back, at the cost of a graph break."""
    model = (build if compiled is layer_by_layer else shallow)("olmoe")
    capture = "dispatch" if compiled is for_decoding else "auto"
    eager, _ = routing(model, tmp_path / "e", [INPUTS] * 2, capture=capture)
    with torch.no_grad():
        called = compiled(model) if before else None
        if called is not None:
            called(**INPUTS)
        with moe_inspect.record(model, tmp_path / "c", capture=capture):
            if called is None:
                called = compiled(model)
            for _ in range(2):
                called(**INPUTS)
        called(**INPUTS)  # detached, it records no more
    assert moe_inspect.open_trace(tmp_path / "c").routing().equals(eager)
    assert "get_compiled_call" not in vars(model)

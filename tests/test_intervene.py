"""Interventions: what is executed is what was asked for, and afterwards the model is as it was."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect import MoeInspectError, intervene, open_trace, record
from moe_inspect.interventions import rules
from moe_inspect.model.find import find_routers
from tests.support import families, own, zoo
from tests.support.zoo import outputs, recorded, token_batch

LENGTHS = [13, 9, 5]


def load(trace: moe_inspect.Trace, layer: int) -> np.ndarray:
    ids = trace.routing(layers=layer).filter(like="expert_").to_numpy().astype(int)
    return np.bincount(ids.flatten(), minlength=next(r.experts for r in trace.routers))


def test_text_is_recognised_in_any_order_and_in_generated_steps(tmp_path: Path) -> None:
    model, inputs = families.build("olmoe"), token_batch([20, 16, 12, 8])
    with record(model, tmp_path / "a"), torch.no_grad():
        model(**inputs)
        prompt = token_batch([4, 4], 5)["input_ids"]
        generated = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    trace, other = open_trace(tmp_path / "a"), families.build("olmoe", seed=1)
    turned = {name: value.flip(0) for name, value in inputs.items()}
    with intervene(other, replay=trace) as done, record(other, tmp_path / "b"), torch.no_grad():
        cache = None
        for at in range(4, generated.shape[1]):  # the same tokens, forced, with a cache
            fed = generated[:, :4] if cache is None else generated[:, at - 1 : at]
            cache = other(input_ids=fed, past_key_values=cache, use_cache=True).past_key_values
        other(**turned)
    again = open_trace(tmp_path / "b")

    def decisions(of: moe_inspect.Trace) -> list[tuple[int, int, list[int]]]:
        routing = of.routing(layers=1).merge(of.tokens(), on="token")
        sets = map(sorted, routing.filter(like="expert_").to_numpy().tolist())
        return sorted(zip(routing.token_id, routing.position, sets, strict=True))

    assert decisions(trace) == decisions(again)
    counted = done.table()
    assert 0 < counted.weights.sum() == counted.assignments.sum(), "control: it chose otherwise"

    unknown = {"input_ids": inputs["input_ids"] + 1}
    with intervene(model, replay=trace), pytest.raises(MoeInspectError, match="no sequence of"):
        outputs(model, unknown)
    longer = torch.cat([inputs["input_ids"][:1], torch.full((1, 2), 7)], 1)
    with intervene(model, replay=trace) as done:
        outputs(model, {"input_ids": longer})
    assert done.replay is not None
    assert done.replay.beyond == 2


def test_a_training_step_under_replay_has_the_gradient_of_its_own_weights(tmp_path: Path) -> None:
    model, inputs = families.build("qwen3_moe"), {"input_ids": token_batch([13] * 3)["input_ids"]}
    trace = recorded(model, tmp_path / "a", inputs)
    router = model.get_submodule("model.layers.0.mlp.gate").weight

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return router.grad.clone()

    before = gradient()
    with intervene(model, replay=trace):
        assert torch.equal(gradient(), before)
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        assert torch.equal(gradient(), before)
        model.eval().gradient_checkpointing_disable()
    with intervene(model, shuffle=0):
        assert not torch.equal(gradient(), before)  # control


def test_forced_experts_are_in_every_decision_and_a_shuffle_keeps_the_load(tmp_path: Path) -> None:
    model, inputs = families.build("olmoe"), token_batch(LENGTHS)
    own = load(recorded(model, tmp_path / "a", inputs), 0)
    with intervene(model, force={0: [2, 5]}) as done:
        forced = load(recorded(model, tmp_path / "b", inputs), 0)
    assert forced[[2, 5]].tolist() == [sum(LENGTHS)] * 2
    assert forced.sum() == own.sum()
    assert done.table().how.tolist() == ["forced", ""]
    with intervene(model, shuffle=3):
        shuffled = recorded(model, tmp_path / "c", inputs)
    assert (load(shuffled, 0) == own).all()


def test_the_model_is_as_it_was_also_after_an_exception_and_when_compiled(tmp_path: Path) -> None:
    model, inputs = families.build("mixtral"), token_batch(LENGTHS)
    unchanged = zoo.state_of(model)
    before = outputs(model, inputs)
    with pytest.raises(ZeroDivisionError), intervene(model, drop={0: 1}):
        raise ZeroDivisionError
    router = model.get_submodule("model.layers.0.mlp.gate")
    broken = router.register_forward_pre_hook(lambda m, a: 1 / 0)
    with intervene(model, drop={0: 1}):
        with pytest.raises(ZeroDivisionError):
            outputs(model, inputs)
        broken.remove()
        assert torch.zeros(2, 8).topk(8).values.isfinite().all(), "nothing is masked outside"
        dropped = outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), before)
    assert zoo.state_of(model) == unchanged
    compiled = torch.compile(model, backend="eager")
    with intervene(compiled, drop={0: 1}):
        assert torch.equal(outputs(compiled, inputs), dropped)
    assert torch.equal(outputs(compiled, inputs), before)
    # a recording that is open already sees the intervention, and says so
    with record(model, tmp_path / "a"):
        with intervene(model, drop={0: 1}):
            outputs(model, inputs)
        with intervene(model, drop={0: 1}), pytest.raises(MoeInspectError, match="already"):
            intervene(model, drop={1: 1}).__enter__()
    assert load(open_trace(tmp_path / "a"), 0)[1] == 0
    assert "dropped in model.layers.0" in str(open_trace(tmp_path / "a").manifest["model"]["note"])


def own_model(as_map: bool) -> Any:
    """A model whose router gives ids and weights, or a bool map of them."""

    def choose(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (x @ self.gate.T).softmax(-1)
        weights, ids = scores.topk(2)
        if not as_map:
            return weights, ids
        zeros = torch.zeros_like(scores)
        return zeros.scatter(-1, ids, weights), zeros.scatter(-1, ids, 1).bool()

    def forward(self: Any, input_ids: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.layers[0](self.embed(input_ids))
        if as_map:
            return (weights * chosen) @ self.experts
        return (weights.unsqueeze(-1) * self.experts[chosen]).sum(-2)

    torch.manual_seed(0)
    gate, experts = torch.nn.Parameter(torch.randn(4, 8)), torch.nn.Parameter(torch.randn(4, 8))
    router = own.module("Chooser", choose, gate=gate, num_experts=4, top_k=2)
    layers, embed = torch.nn.ModuleList([router]), torch.nn.Embedding(300, 8)
    return own.module("Own", forward, layers=layers, embed=embed, experts=experts)


@pytest.mark.parametrize("as_map", [False, True])
def test_routers_given_by_a_spec(as_map: bool, tmp_path: Path) -> None:
    model, ids = own_model(as_map), token_batch([13] * 3)["input_ids"]
    spec = moe_inspect.RouterSpec(module="layers.*", choice=lambda m, a, k, out: (out[1], out[0]))
    changed = intervene(model, drop={0: 3}, routers=[spec])
    with changed as done, record(model, tmp_path / "a", routers=[spec]), torch.no_grad():
        y = model(ids)
    scores = (model.embed(ids) @ model.layers[0].gate.T)[..., :3].softmax(-1).topk(2)
    expected = (scores.values.unsqueeze(-1) * model.experts[scores.indices]).sum(-2)
    assert torch.allclose(y, expected, atol=1e-5)
    assert done.table().how.tolist() == ["chose among the rest"]
    assert load(open_trace(tmp_path / "a"), 0)[3] == 0
    if as_map:
        return
    copied = dataclasses.replace(spec, choice=lambda m, a, k, out: (out[1].clone(), out[0].clone()))
    refused = pytest.raises(MoeInspectError, match="replace=")
    with intervene(model, force={0: 1}, routers=[copied]), refused:
        model(ids)


def test_weights_are_shared_out_where_no_logits_are_seen() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 2, 5], [7, -1, 1]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.6, 0.0, 0.4]])
    dropped = torch.zeros(8, dtype=torch.bool)
    dropped[[1, 2]] = True
    made = rules.without(ids, weights, dropped)
    assert made.ids_TK.tolist() == [[0, 3, 4], [3, 4, 5], [0, 3, 5], [7, -1, 0]]
    shared = torch.tensor([[1.0, 0, 0], [0.6, 0.3, 0.1], [0, 0, 1.0], [1.0, 0, 0]])
    assert torch.allclose(made.weights_TK, shared)
    assert made.moved_T.tolist() == [2, 0, 2, 1]
    # a dropped expert stays, of no weight, where no other is free
    ids, weights = torch.tensor([[1, 0, 2, 3]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    made = rules.without(ids, weights, torch.arange(4) > 1)
    assert sorted(made.ids_TK[0].tolist()) == [0, 1, 2, 3]
    assert made.weights_TK[0, 2:].tolist() == [0, 0]


def test_replayed_choices_keep_the_slots_and_the_weights_that_agree() -> None:
    ids = torch.tensor([[4, 1, 2], [0, 1, 2], [0, 9, 2]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    wanted = torch.tensor([[2, 7, 4], [0, -1, 2], [2, -1, 5]])
    given = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.0, 0.7], [0.9, 0.0, 0.7]])
    made = rules.replayed(ids, weights, wanted, given, experts=8)
    assert made.ids_TK.tolist() == [[4, 7, 2], [0, -1, 2], [5, 9, 2]]
    kept = torch.tensor([[0.5, 0.8, 0.2], [0.6, 0.0, 0.1], [0.7, 0.5, 0.3]])
    assert torch.equal(made.weights_TK, kept)
    assert made.given_T.tolist() == [1, 1, 1]
    without = rules.replayed(ids, weights, wanted, None, experts=8)
    assert without.weights_TK[0].tolist() == weights[0].tolist()
    assert without.given_T.sum() == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give it drop"),
        ({"drop": {0: 1}, "shuffle": 1}, "contradict"),
        ({"drop": {9: 1}}, "no router in layer 9"),
        ({"drop": {0: 8}}, "no expert 8 in layer 0"),
        ({"drop": {0: range(8)}}, "leaves no expert"),
        ({"force": {0: [1, 2, 3]}}, "whose tokens choose 2"),
        ({"drop": {0: 1}, "force": {0: 2}}, "in both drop and force"),
    ],
)
def test_what_cannot_be_done_is_said(given: dict[str, Any], says: str) -> None:
    with pytest.raises(MoeInspectError, match=says):
        intervene(families.build("mixtral"), **given)


SIZES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
DROPPED = [1, 5, 10, 15]  # of 16: one in each of four groups
KEPT = [e for e in range(16) if e not in DROPPED]


def with_experts(family: str, E: int) -> Any:
    config = zoo.config(family)
    for part in (config, *(vars(config)[name] for name in config.sub_configs)):
        for name in SIZES:
            if hasattr(part, name):
                setattr(part, name, E)
    torch.manual_seed(0)
    kind = zoo.model_class(family)
    return zoo._with_choices(kind._from_config(config, dtype=torch.float32), spread=0.5)


def pruned(model: Any, family: str) -> Any:
    """The family's model with 12 experts, whose parameters are the kept ones of `model`."""
    small = with_experts(family, len(KEPT))
    large = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        found = large[name]
        for dim in range(found.dim()):
            if found.shape[dim] != tensor.shape[dim]:
                width = (found.shape[dim] - tensor.shape[dim]) // len(DROPPED)
                rows = (torch.tensor(KEPT)[:, None] * width + torch.arange(width)).flatten()
                beyond = torch.arange(16 * width, found.shape[dim])  # of no routed expert
                found = found.index_select(dim, torch.cat([rows, beyond]))
        tensor.data.copy_(found)
    return small


@pytest.mark.parametrize(
    "family",
    [
        *("mixtral", "dbrx", "phimoe", "jetmoe", "bailing_hybrid", "deepseek_v3", "nemotron_h"),
        *("inkling2_loop", "longcat_flash", "zaya", "inkling"),
    ],
)
def test_dropping_is_what_a_model_without_these_experts_does(family: str) -> None:
    if family not in zoo.FAMILIES:
        pytest.skip("not in this release of transformers")
    model, inputs = with_experts(family, 16), token_batch([11, 7])
    real = inputs["attention_mask"].bool()
    before, expected = outputs(model, inputs), outputs(pruned(model, family), inputs)
    with intervene(model, drop={s.path: DROPPED for s in find_routers(model)}) as done:
        found = outputs(model, inputs)
    assert set(done.table().how) == {"chose among the rest"}
    assert done.table().assignments.sum() == 0, "no dropped expert was chosen"
    assert (found - expected)[real].abs().max() < 1e-4
    assert (found - before)[real].abs().max() > 1e-2, "control"


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_fewer_experts_than_slots_have_the_whole_weight(family: str, tmp_path: Path) -> None:
    model, inputs = families.build(family), token_batch(LENGTHS)
    layer = families.moe_layers(family)[-1]
    own_sum = recorded(model, tmp_path / "a", inputs).routing(layers=layer).filter(like="weight")
    with intervene(model, drop={layer: range(7)}):
        trace = recorded(model, tmp_path / "b", inputs)
    table: Any = trace.routing(layers=layer)
    ids, weights = (table.filter(like=f"{name}_").to_numpy() for name in ("expert", "weight"))
    assert (weights[ids != 7] == 0).all()
    assert moe_inspect.check(tmp_path / "b", quick=True).ok, "no expert is twice in a decision"
    # the sum of OLMoE's weights is not fixed
    expected = 1 if family == "olmoe" else own_sum.sum(axis=1).to_numpy()
    assert weights.sum(1) == pytest.approx(expected, abs=2e-3)


def test_a_layer_that_routes_by_token_id_shares_weights_out(capsys: Any) -> None:
    model, inputs = zoo.build("deepseek_v4"), token_batch(LENGTHS)
    paths = [site.path for site in find_routers(model)]
    for _ in range(2):
        with intervene(model, drop=dict.fromkeys(paths, 0)) as done:
            outputs(model, inputs)
    table = done.table()
    assert table.how.tolist() == ["weights shared out", *["chose among the rest"] * 3]
    assert table.assignments[0] > 0
    assert capsys.readouterr().err.count("cannot be seen") == 1, "said once of a model"


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    model, inputs = families.build("olmoe"), token_batch([30, 26])
    trace = recorded(model, tmp_path / "a", inputs)
    with intervene(model, drop={0: [0, 3], 1: 2}):
        expected = outputs(model, inputs)
    with intervene(model, drop={0: [0, 3], 1: 2}) as done, ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: outputs(model, inputs), range(60)))
    assert all(torch.equal(one, expected) for one in found)
    assert done.table().rows.tolist() == [60 * 2 * 30] * 2

    # replay follows one pass at a time: what another thread runs within it is not another's rows
    said: list[str] = []

    def from_another_thread(*_: Any) -> None:
        hook.remove()
        with ThreadPoolExecutor(1) as threads:
            said.append(str(threads.submit(model.model, **inputs).exception()))

    with intervene(model, replay=trace), torch.no_grad():
        hook = model.model.layers[0].register_forward_pre_hook(from_another_thread)
        model(**inputs)
        assert "two threads call it" in said[0]
        for fed in (inputs, token_batch(LENGTHS, 1)):  # not the rows of the pass before
            with pytest.raises(MoeInspectError, match="a part was called alone"):
                model.model(**fed)


def test_experts_that_ran_unseen_are_an_error() -> None:
    model, inputs = families.build("mixtral"), token_batch(LENGTHS)
    block = model.get_submodule("model.layers.0.mlp")
    block.forward = lambda hidden: hidden
    with intervene(model, drop={0: 1}), pytest.raises(MoeInspectError, match="was not seen"):
        outputs(model, inputs)
    with intervene(model, drop={1: 1}):
        outputs(model, inputs)


def test_doge_chooses_among_the_other_pairs_of_keys() -> None:
    if "doge" in zoo.WHY_NOT:
        pytest.skip(zoo.WHY_NOT["doge"])
    model, inputs = zoo.build("doge"), zoo.inputs("doge", [9])
    mixture = model.get_submodule("model.layers.3.mlp")
    seen: list[Any] = []
    hook = mixture.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    before = outputs(model, inputs)
    with intervene(model, drop={3: DROPPED}) as done:
        assert not torch.equal(outputs(model, inputs), before)
    with intervene(model, drop={3: [e for e in range(16) if e != 6]}):
        outputs(model, inputs)
    hook.remove()
    (x, (own, router_logits)), (_, (found, _)), (_, (only_6, _)) = seen
    # all pairs of a key of the first and one of the second set
    scores = router_logits[0][:, :, None] + router_logits[1][:, None]
    scores = scores.flatten(1).index_fill(1, torch.tensor(DROPPED), float("-inf"))
    values, ids = scores.topk(mixture.top_k)

    def mixed(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        part = (mixture.down_embed(ids) * x.view(-1, 1, x.shape[-1])).sum(-1)
        routed = ((mixture.act_fn(part) * weights)[..., None] * mixture.up_embed(ids)).sum(1)
        gate = mixture.act_fn(mixture.gate_proj(x)) * mixture.up_proj(x)
        return mixture.down_proj(gate) + routed.view(x.shape)

    with torch.no_grad():
        assert torch.allclose(found, mixed(ids, values.softmax(-1)), atol=1e-4)
        assert not torch.allclose(own, found, atol=1e-2), "control"
        one = torch.full((len(ids), 1), 6)
        assert torch.allclose(only_6, mixed(one, torch.ones(len(ids), 1)), atol=1e-4)
    assert done.table().how.tolist()[-1] == "chose among the rest"


def test_nllb_runs_the_experts_it_is_given(tmp_path: Path) -> None:
    """By itself it runs experts 1 and 0 whatever its routers choose."""
    model, inputs = zoo.build("nllb_moe"), zoo.inputs("nllb_moe", [9])
    path = find_routers(model)[0].path
    experts = model.get_submodule(path)
    seen: list[Any] = []
    hook = experts.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    trace = recorded(model, tmp_path / "a", inputs)
    with intervene(model, force={path: [5, 6]}):
        forced = recorded(model, tmp_path / "b", inputs)
    with intervene(model, drop={path: 1}):
        outputs(model, inputs)
    hook.remove()
    (x, _), (_, found), (_, without_1) = seen

    def mixed(first: int, second: int, weights: torch.Tensor) -> torch.Tensor:
        outputs = torch.stack([experts[f"expert_{e}"](x) for e in (first, second)], 1)
        return (outputs * weights[..., None]).sum(1) * (1 - experts.moe_token_dropout)

    table = trace.routing(router=0)[["weight_0", "weight_1"]]
    weights = torch.tensor(table.fillna(0).to_numpy(np.float32))
    with torch.no_grad():
        assert torch.allclose(found, mixed(6, 5, weights), atol=1e-2)
        whole = torch.stack([weights.sum(1), torch.zeros(len(weights))], 1)
        both = (weights > 0).all(1)
        assert torch.allclose(without_1[both], mixed(0, 1, whole)[both], atol=1e-2)
        assert both.any()
    assert set(forced.routing(router=0).filter(like="expert_").dropna().to_numpy().flat) == {5, 6}


def test_a_reply_is_replayed_in_an_encoder_decoder(tmp_path: Path) -> None:
    family = "switch_transformers"
    model, inputs = zoo.build(family), zoo.inputs(family, [9, 5])
    given = {name: values for name, values in inputs.items() if "decoder" not in name}
    options = {"decoder_start_token_id": 0, "max_new_tokens": 5, "eos_token_id": None}

    def generated(model: Any) -> Any:
        with torch.no_grad():
            made = model.generate(**given, **options, return_dict_in_generate=True, output_logits=1)
        return torch.stack(made.logits), made.sequences

    with record(model, tmp_path / "a"):
        scores, replies = generated(model)
    with intervene(model, replay=tmp_path / "a") as done:
        assert torch.equal(generated(model)[0], scores)
    assert done.table().assignments.sum() == 0
    # both replies begin with the same token: each follows what its own encoder read, in any order
    other = zoo.build(family, seed=1)
    with intervene(other, replay=tmp_path / "a") as done, record(other, tmp_path / "b"):
        for row in (1, 0):
            n = int(given["attention_mask"][row].sum())
            fed = {"input_ids": given["input_ids"][row : row + 1, :n]}
            with torch.no_grad():
                other(**fed, decoder_input_ids=replies[row : row + 1, :-1])
    assert done.table().assignments.sum() > 0, "control: it chose otherwise"
    tables = [
        t.routing(router=2).merge(t.tokens(), on="token").sort_values(["sequence", "position"])
        for t in (open_trace(tmp_path / "a"), open_trace(tmp_path / "b"))
    ]
    a, b = (table.expert_0.to_numpy().reshape(2, -1) for table in tables)
    assert (a[::-1] == b).all()
    assert (a != b).any(), "control"

    with record(model, tmp_path / "beams"), torch.no_grad():
        model.generate(**given, **options, num_beams=2, do_sample=False)
    refused = pytest.raises(MoeInspectError, match=r"which of 4 replies follows .* by beams cannot")
    with intervene(model, replay=tmp_path / "beams"), refused:
        generated(model)


def test_a_probe_shows_a_choice_and_a_spec_changes_it(tmp_path: Path) -> None:
    model, ids = own.gpt(), own.tokens()
    with pytest.raises(MoeInspectError, match=r"a probe shows a choice, and cannot replace it"):
        intervene(model, drop={0: 1})
    inside = dataclasses.replace(own.example().ROUTERS[0], top_k=2)
    refused = pytest.raises(MoeInspectError, match="of the module in it that makes the logits")
    with intervene(model, force={0: 1}, routers=[inside]), refused:
        model(ids)

    def choice(router: Any, args: Any, kwargs: Any, logits: Any) -> Any:
        weights, chosen = logits.softmax(-1).topk(2)
        return chosen, weights / weights.sum(-1, keepdim=True)

    def replace(router: Any, args: Any, kwargs: Any, logits: Any, ids: Any, weights: Any) -> Any:
        return torch.full_like(logits, float("-inf")).scatter(-1, ids, weights.log())

    spec = moe_inspect.RouterSpec(
        module="blocks.*.experts.router", choice=choice, replace=replace, experts=8, top_k=2
    )
    recorded = record(model, tmp_path / "t")  # by its probes
    changed = intervene(model, force={0: 6}, drop={1: [1, 2]}, routers=[spec])
    with changed, own.watched(model) as seen, torch.no_grad(), recorded:
        model(ids)
    assert all(6 in chosen for chosen in seen[0][0])
    assert not any(chosen & {1, 2} for chosen in seen[1][0])
    assert own.same(open_trace(tmp_path / "t"), seen) == 4 * ids.numel()
    with torch.no_grad(), record(model, tmp_path / "own"):
        before = model(ids)
    with torch.no_grad(), intervene(model, replay=tmp_path / "own", routers=[spec]) as done:
        assert torch.equal(model(ids), before)
    assert np.all(done.table().assignments == 0)

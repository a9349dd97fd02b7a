"""GPT-OSS in MXFP4: what is recorded is what the experts were given, with a stand-in for the
kernels on the CPU."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations import hub_kernels, mxfp4

import moe_inspect
from moe_inspect.capture import load
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from tests.conftest import Cli
from tests.support import zoo
from tests.support.families import build
from tests.support.zoo import state_of, token_batch
from tests.test_cli_trace import save, save_tokenizer, write_jsonl


class Kernels:
    """`given`: by call, (expert, input row [H], gate weight) of each assignment."""

    def __init__(self) -> None:
        self.given: list[list[tuple[int, Tensor, float]]] = []
        self.routing = SimpleNamespace(
            GatherIndx=_Indices,
            ScatterIndx=_Indices,
            RoutingData=_Routing,
            compute_expt_data_torch=lambda *_: None,
            routing=_route,
        )
        self.matmul_ogs = SimpleNamespace(
            FnSpecs=lambda *_: None,
            FusedActivation=lambda specs, parameters, n: parameters,
            matmul_ogs=self._matmul,
        )
        self.swiglu = SimpleNamespace(swiglu_fn=None)

    def _matmul(self, x: Tensor, w: Tensor, bias: Tensor, routing: _Routing, **of: Any) -> Tensor:
        """The first product gathers rows and activates, the second adds them up by token."""
        experts = torch.arange(len(w)).repeat_interleave(routing.expt_hist)
        n, gather, scatter = len(experts), of.get("gather_indx"), of.get("scatter_indx")
        if gather is not None:
            x = x[gather.src_indx[:n] // routing.n_expts_act]
            weights = routing.gate_scal[:n].tolist()
            self.given.append(list(zip(experts.tolist(), x.clone(), weights, strict=True)))
        y = torch.einsum("nh,nho->no", x, w[experts]) + bias[experts].to(x.dtype)
        if of.get("fused_activation") is not None:
            alpha, limit = of["fused_activation"]
            gate, up = y[:, ::2].clamp(max=limit), y[:, 1::2].clamp(-limit, limit)
            y = (up + 1) * gate * torch.sigmoid(gate * alpha)
        if scatter is None:
            return y
        slots = torch.zeros(len(scatter.src_indx), y.shape[1], dtype=y.dtype)
        slots[scatter.dst_indx[:n]] = y * of["gammas"][:n, None]
        return slots.view(-1, routing.n_expts_act, y.shape[1]).sum(1)


class _Indices(NamedTuple):
    src_indx: Tensor
    dst_indx: Tensor


class _Routing(NamedTuple):
    gate_scal: Tensor
    expt_hist: Tensor
    n_expts_tot: int
    n_expts_act: int
    data: Any


def _route(logits_TE: Tensor, K: int) -> tuple[_Routing, _Indices, _Indices]:
    values, ids = logits_TE.topk(K)
    ids, order = ids.sort(1)  # the kernel's slots ascend by expert
    weights = values.softmax(-1).gather(1, order).flatten()
    by_expert = ids.flatten().argsort(stable=True)
    place = by_expert.argsort()
    E = logits_TE.shape[1]
    routing = _Routing(weights[by_expert], ids.flatten().bincount(minlength=E), E, K, None)
    return routing, _Indices(by_expert.int(), place.int()), _Indices(place.int(), by_expert.int())


RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
LENGTHS = [9, 5, 7]
INPUTS = token_batch(LENGTHS)
REAL = INPUTS["attention_mask"].flatten().bool()
Made = tuple[Any, Any, Kernels]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """(GPT-OSS in MXFP4, the same with experts of its own, the kernels)."""
    kernels, histc = Kernels(), torch.histc
    for owner, name, stand_in in (
        (hub_kernels, "get_kernel", lambda *_, **__: kernels),
        (mxfp4, "triton_kernels_hub", None),
        # a CPU's takes no integers
        (torch, "histc", lambda x, **options: histc(x.float(), **options).int()),
    ):
        monkeypatch.setattr(owner, name, stand_in, raising=False)
    plain, model = build("gpt_oss"), build("gpt_oss")
    mxfp4.replace_with_mxfp4_linear(model, quantization_config=Mxfp4Config())
    for of_plain, layer in zip(plain.model.layers, model.model.layers, strict=True):
        for name, value in of_plain.mlp.experts.state_dict().items():
            if not name.endswith("_bias"):  # the kernels' own kind of tensor
                del layer.mlp.experts._parameters[name]
                setattr(layer.mlp.experts, name, value.clone())
            else:
                setattr(layer.mlp.experts, name, torch.nn.Parameter(value.float()))
    return model.eval(), plain, kernels


def routing(model: Any, path: Path) -> pd.DataFrame:
    return zoo.recorded(model, path, INPUTS).routing()


def test_every_decision_is_what_the_experts_were_given(made: Made, tmp_path: Path) -> None:
    """The rows that each call's block was called with tell the experts' rows apart."""
    model, _, kernels = made
    hidden: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, args: hidden.append(args[0].flatten(0, 1)))
    table = routing(model, tmp_path / "t").sort_values(["router", "token"])
    slots = zip(*(table.filter(like=c).to_numpy() for c in ("expert_", "weight_")), strict=True)
    found = [dict(zip(ids.tolist(), weights.tolist(), strict=True)) for ids, weights in slots]
    truth: list[dict[int, float]] = []
    for rows, assignments in zip(hidden, kernels.given, strict=True):
        of_tokens: list[dict[int, float]] = [{} for _ in rows]
        for expert, row, weight in assignments:
            (t,) = (rows == row).all(1).nonzero().flatten().tolist()[:1]
            of_tokens[t][expert] = weight
        truth += [of for of, real in zip(of_tokens, REAL, strict=True) if real]
    assert len(found) == len(truth) == sum(LENGTHS) * 2
    for ours, theirs in zip(found, truth, strict=True):
        assert list(ours) == sorted(theirs, key=theirs.__getitem__, reverse=True)
        assert ours == pytest.approx(theirs, rel=2**-11)
    with pytest.raises(AssertionError):  # a control: another token's
        assert found[0] == pytest.approx(truth[1], rel=2**-11)


def test_it_is_what_the_model_with_experts_of_its_own_chooses(made: Made, tmp_path: Path) -> None:
    model, plain, _ = made
    paths = tmp_path / "mxfp4", tmp_path / "plain"
    for of, path in zip((model, plain), paths, strict=True):
        with moe_inspect.record(of, path, logits=True), torch.no_grad():
            prompt = of(**INPUTS, use_cache=True)
            of.generate(INPUTS["input_ids"][:1], max_new_tokens=4, do_sample=False)
            assert torch.isfinite(prompt.logits).all()
    ours, theirs = (moe_inspect.open_trace(path) for path in paths)
    pd.testing.assert_frame_equal(ours.routing(), theirs.routing(), rtol=1e-3)
    assert ours.manifest["routers"] == theirs.manifest["routers"]
    logits = [pd.read_parquet(path / "logits").logits.explode().astype(float) for path in paths]
    pd.testing.assert_series_equal(*logits, atol=2e-3)


def test_it_may_be_recorded_by_two_and_copied_and_is_left_as_it_was(
    made: Made, tmp_path: Path
) -> None:
    model, *_ = made
    before = state_of(model)
    first, second = (moe_inspect.record(model, tmp_path / name) for name in "ab")
    with torch.no_grad():
        first.__enter__()
        with second:
            model(**INPUTS)
            copied = copy.deepcopy(model.model.layers)
            first.__exit__(None, None, None)  # not the last to come
            model(**INPUTS)
        assert state_of(model) == before
        hidden, mlp = torch.randn(2, 3, model.config.hidden_size), copied[0].mlp
        before_change = mlp(hidden)[0]
        mlp.experts.down_proj.mul_(2)
        assert not torch.equal(mlp(hidden)[0], before_change)  # the copy runs its own weights
        assert torch.equal(model.model.layers[0].mlp(hidden)[0], before_change)
    counts = [moe_inspect.open_trace(tmp_path / name).n_tokens for name in "ab"]
    assert counts == [sum(LENGTHS), 2 * sum(LENGTHS)]


def test_another_replacement_of_the_method_is_called_and_left(made: Made, tmp_path: Path) -> None:
    model, *_ = made
    site = find_routers(model)[0]
    if not site.method:
        pytest.skip("this release of transformers calls the experts module")
    own = site.module.forward_routed = Mock(wraps=site.module.forward_routed)
    assert len(routing(model, tmp_path / "t")) == 2 * sum(LENGTHS)
    assert own.call_count == 1
    assert site.module.forward_routed is own


def test_under_expert_parallelism_global_ids_are_recorded(made: Made, tmp_path: Path) -> None:
    """This rank has half of the experts; routes to the others are skipped."""
    model, plain, _ = made
    if not hasattr(mxfp4, "routing_from_top_k"):
        assert not any(hasattr(s.module, "_is_expert_parallel") for s in find_routers(model))
        model.config.distributed_config = type("D", (), {"enable_expert_parallel": True})()
        with pytest.raises(MoeInspectError, match="gives experts local ids"):
            moe_inspect.record(model, tmp_path / "t")
        return
    for site in find_routers(model):
        part = site.module
        part._is_hooked = part._is_expert_parallel = True
        part.num_experts = 4
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            value = part._parameters.pop(name, getattr(part, name))
            setattr(part, name, value.data[:4])
    ours, theirs = routing(model, tmp_path / "part"), routing(plain, tmp_path / "whole")
    first = ours.layer == 0  # what follows the first layer lacks the other rank's share
    pd.testing.assert_frame_equal(ours[first], theirs[first])
    assert moe_inspect.open_trace(tmp_path / "part").routers[0].experts == 8


def test_assignments_that_go_nowhere_are_null(made: Made) -> None:
    """transformers' own structures, of ids some of which are another rank's."""
    if not hasattr(mxfp4, "routing_from_top_k"):
        pytest.skip("this release of transformers builds them from the logits")
    model, *_ = made
    site = find_routers(model)[0]
    assert site.adapter is not None
    generator = torch.Generator().manual_seed(0)
    for T in (0, 1, 7, 371):
        weights, ids = torch.rand(T, 8, generator=generator).topk(3)
        ids = torch.where(torch.rand(T, 3, generator=generator) < 0.3, ids + 8, ids)
        structures = mxfp4.routing_from_top_k(ids, weights, 8)
        choice = site.adapter.choice(site.module, (torch.empty(T, 4), *structures), {}, None)
        assert choice is not None
        assert choice[0].shape == choice[1].shape == (T, 3)
        rows = zip(ids.tolist(), weights.tolist(), *(c.tolist() for c in choice), strict=True)
        for e, w, of_e, of_w in rows:
            kept = {i: v for i, v in zip(e, w, strict=True) if i < 8}
            assert {i: v for i, v in zip(of_e, of_w, strict=True) if i >= 0} == kept
            assert all(v == 0 for i, v in zip(of_e, of_w, strict=True) if i < 0)


def test_compiled_it_is_recorded(made: Made, tmp_path: Path) -> None:
    model, plain, _ = made
    for of in (model, plain):  # one layer: a compiler takes long
        del of.model.layers[1:]
        of.config.num_hidden_layers = 1
    compiled = torch.compile(model, backend="eager")
    for of, name in ((plain, "plain"), (compiled, "t")):
        with moe_inspect.record(of, tmp_path / name), torch.no_grad():
            of(**INPUTS)
            of(**INPUTS)
    found, expected = (moe_inspect.open_trace(tmp_path / n).routing() for n in ("t", "plain"))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3)


# --- from the command line


def checkpoint(path: Path) -> Path:
    """GPT-OSS as it is released: experts as blocks of 32 four-bit values with a scale."""
    save_tokenizer(path)
    model = zoo.build("gpt_oss", torch.bfloat16, hidden_size=64, intermediate_size=64)
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    drawn = partial(torch.randint, dtype=torch.uint8, generator=generator)
    for name in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, inside, outside = weights.pop(name).shape
        weights[f"{name}_blocks"] = drawn(256, (E, outside, inside // 32, 16))
        weights[f"{name}_scales"] = drawn(118, 122, (E, outside, inside // 32))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = Mxfp4Config().to_dict()
    (path / "config.json").write_text(json.dumps(config, default=str))
    return path


def test_a_checkpoint_is_traced_dequantized(cli_here: Cli, tmp_path: Path) -> None:
    """Up to transformers 5.24 a CPU always dequantizes; since 5.25 it needs kernels from a hub."""
    where, corpus = checkpoint(tmp_path / "m"), write_jsonl(tmp_path / "c.jsonl", 9, 30)
    options = ("trace", where, "--data", corpus)
    cli_here(*options, "-o", "asked", "--dequantize")
    asked = moe_inspect.open_trace(tmp_path / "asked")
    assert asked.manifest["model"]["dequantized_from"]["quant_method"] == "mxfp4"
    if RELEASE < (5, 25):
        cli_here(*options, "-o", "plain")
        plain = moe_inspect.open_trace(tmp_path / "plain")
        pd.testing.assert_frame_equal(plain.routing(), asked.routing())
        assert plain.manifest["model"] == asked.manifest["model"]
    else:
        said = cli_here(*options, "-o", "plain", check=1).stderr
        assert "(--dequantize needs no kernels): " in said
        assert "gpt-oss-triton-kernels" in said
    said = cli_here("report", "asked").stdout
    assert "weights: mxfp4 dequantized to bfloat16." in " ".join(said.split())
    refused = cli_here(*options, "-o", "asked", "--resume", check=1).stderr
    assert "was made with dequantize True, not None: resume with the same" in refused
    # the model that transformers makes of it, given the same tokens
    network = AutoModelForCausalLM.from_pretrained(
        where, quantization_config=Mxfp4Config(dequantize=True)
    )
    first = asked.tokens().query("sequence == 0")
    ids = torch.tensor([first.token_id.tolist()])
    with moe_inspect.record(network, tmp_path / "own"), torch.no_grad():
        network(input_ids=ids)
    own = moe_inspect.open_trace(tmp_path / "own").routing().filter(like="expert_").to_numpy()
    rows = asked.routing()
    rows = rows[rows.token.isin(first.token)].sort_values(["router", "token"])
    assert (rows.filter(like="expert_").to_numpy() == own).mean() > 0.98  # bfloat16, other batches


def test_dequantize_is_refused_where_it_means_nothing(cli_here: Cli, tmp_path: Path) -> None:
    where, corpus = save("olmoe", tmp_path / "m"), write_jsonl(tmp_path / "c.jsonl", 2, 9)
    asked = ("trace", where, "-o", "t", "--data", corpus, "--dequantize")
    assert "is not quantised: drop --dequantize" in cli_here(*asked, check=1).stderr
    said = cli_here(*asked, "--random-init", 0, check=1).stderr
    assert "--dequantize needs weights, and --random-init reads none" in said
    config = json.loads((where / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (where / "config.json").write_text(json.dumps(config))
    assert "cannot dequantise bitsandbytes weights" in cli_here(*asked, check=1).stderr


def test_with_kernels_it_is_traced_as_it_runs(
    made: Made, monkeypatch: pytest.MonkeyPatch, cli_here: Cli, tmp_path: Path
) -> None:
    model, plain, _ = made
    model.config.quantization_config = Mxfp4Config()
    where, corpus = save("gpt_oss", tmp_path / "m"), write_jsonl(tmp_path / "c.jsonl", 9, 30)
    for name, network in (("ours", model), ("theirs", plain)):
        monkeypatch.setattr(load, "load_model", lambda *_, network=network, **__: network)
        cli_here("trace", where, "-o", name, "--data", corpus, "--generate", 2)
    ours, theirs = (moe_inspect.open_trace(tmp_path / name) for name in ("ours", "theirs"))
    pd.testing.assert_frame_equal(ours.routing(), theirs.routing(), rtol=1e-3)
    assert "weights: mxfp4." in " ".join(cli_here("report", "ours").stdout.split())
    assert "weights:" not in cli_here("report", "theirs").stdout


def test_its_kernels_take_no_other_choice(made: Made, tmp_path: Path) -> None:
    model, *_ = made
    with pytest.raises(MoeInspectError, match="is not on transformers' experts interface: use"):
        moe_inspect.record(model, tmp_path / "t", capture="dispatch")
    for way in ({"drop": {0: 1}}, {"shuffle": 1}):
        with pytest.raises(MoeInspectError, match=r"layers\.0.*take no other choice .*: load the"):
            moe_inspect.intervene(model, **way)

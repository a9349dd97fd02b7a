"""Models that something wraps: what is recorded is what the experts inside were called with, one
pass per call of the model, whatever the wrapper is called with; and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import distributed, nn

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.wrapped import unwrapped
from tests.support.families import build, shallow
from tests.support.own import module
from tests.support.zoo import state_of, token_batch

LENGTHS = [9, 5]
INPUTS = token_batch(LENGTHS)
IDS, MASK = INPUTS["input_ids"], INPUTS["attention_mask"]
Make = Callable[[Any], Any]


def step(net: Any) -> Any:
    """Called with a batch, as a training step is."""

    def forward(self: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net(batch["input_ids"], batch["attention_mask"]).logits.sum()

    return module("Step", forward, net=net)


def two(policy: Any, reference: Any) -> Any:
    def forward(self: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.policy(**batch).logits - self.reference(**batch).logits

    return module("Two", forward, policy=policy, reference=reference)


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def of_peft(model: Any, kind: str = "LoraConfig", **options: Any) -> Any:
    """With adapters that are not zero, as after training."""
    peft = pytest.importorskip("peft", reason="adapters are tested where peft is installed")
    adapted = peft.get_peft_model(model, getattr(peft, kind)(**options))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    return adapted


def fsdp(model: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


MATRICES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": MATRICES},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
}


def lora(model: Any, target: str = "attention") -> Any:
    return of_peft(model, task_type="CAUSAL_LM", **TARGETS[target])


WRAPPED: dict[str, Make] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "FSDP": fsdp,
    "FSDP, parameters as they are": lambda m: fsdp(m, use_orig_params=True),
    "PEFT on attention": lora,
    "PEFT, no task": lambda m: of_peft(m, **TARGETS["attention"]),
    "PEFT on experts": lambda m: lora(m, "experts"),
    "PEFT on the router": lambda m: lora(m, "router"),
    "PEFT in DistributedDataParallel": lambda m: nn.parallel.DistributedDataParallel(lora(m)),
}


def recorded(model: Any, path: Path, call: Callable[[Any], Any], **options: Any) -> pd.DataFrame:
    with moe_inspect.record(model, path, **options), torch.no_grad():
        call(model)
    assert moe_inspect.check(path, quick=True).ok
    return moe_inspect.open_trace(path).routing()


def executed(model: Any, call: Callable[[Any], Any]) -> list[torch.Tensor]:
    """The experts' arguments, in the order of their calls: (ids, weights) of each row."""
    found: list[torch.Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: found.append(torch.cat(args[1:], 1)))
        for m in model.modules()
        if type(m).__name__ == "OlmoeExperts"
    ]
    with torch.no_grad():
        call(model)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("kind", "by"), zip(WRAPPED, cycle(("name", "position"))))
def test_a_wrapped_model_is_recorded(kind: str, by: str, one_rank: None, tmp_path: Path) -> None:
    wrapped = WRAPPED[kind](build("olmoe"))
    call = (lambda m: m(**INPUTS)) if by == "name" else lambda m: m(IDS, MASK)
    truth, before = executed(wrapped, call), state_of(wrapped)
    frame = recorded(wrapped, tmp_path / "t", call, logits=True)
    assert state_of(wrapped) == before
    expected = torch.cat([rows[MASK.flatten().bool()] for rows in truth]).numpy()
    K = expected.shape[1] // 2
    by_router = frame.sort_values(["router", "token"])
    assert (by_router.filter(like="expert_").to_numpy() == expected[:, :K]).all()
    assert by_router.filter(like="weight_").to_numpy() == pytest.approx(expected[:, K:], rel=2**-11)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.n_tokens == sum(LENGTHS)
    assert trace.tokens().token_id.tolist() == IDS[MASK.bool()].tolist()
    about = trace.manifest["model"]
    assert about["class"] == "OlmoeForCausalLM"
    assert about.get("adapter", {}).get("kind") == ("LORA" if "PEFT" in kind else None)
    assert trace.routers[0].path.startswith("model.layers.0.mlp.experts")


def test_a_call_with_a_batch_is_recorded_once_per_call_of_the_model(tmp_path: Path) -> None:
    whole = step(build("olmoe"))
    frame = recorded(whole, tmp_path / "t", lambda m: [m(INPUTS), m(INPUTS)])
    bare = recorded(whole.net, tmp_path / "bare", lambda m: [m(**INPUTS), m(**INPUTS)])
    assert frame.equals(bare)
    assert moe_inspect.open_trace(tmp_path / "t").tokens().batch.nunique() == 2


def test_prompt_tuning_adds_rows_that_are_recorded(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    adapted = of_peft(build("olmoe"), "PromptTuningConfig", **options)
    recorded(adapted, tmp_path / "t", lambda m: m(IDS, MASK))
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == sum(LENGTHS) + 2 * 4


@pytest.mark.parametrize("kind", ["PEFT on attention", "DistributedDataParallel"])
def test_a_training_step_is_recorded_once(kind: str, one_rank: None, tmp_path: Path) -> None:
    """Checkpointing calls the routers a second time."""

    def gradients(recording: bool) -> list[torch.Tensor]:
        model = build("olmoe")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped = WRAPPED[kind](model).train()
        recorder = moe_inspect.record(wrapped, tmp_path / "t", capture="tap") if recording else None
        with recorder or nullcontext():
            wrapped(**INPUTS, labels=IDS).loss.backward()
        return [p.grad for p in wrapped.parameters() if p.grad is not None]

    ours, bare = gradients(True), gradients(False)
    assert bare
    assert all(torch.equal(a, b) for a, b in zip(ours, bare, strict=True))
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == sum(LENGTHS)


compiled = partial(torch.compile, backend="eager")
COMPILED: dict[str, tuple[Make, Callable[[Any], Any]]] = {
    "PEFT": (lambda m: compiled(lora(m)), lambda m: m(IDS, MASK)),
    "inside DistributedDataParallel": (
        lambda m: nn.parallel.DistributedDataParallel(compiled(m)),
        lambda m: m(IDS, MASK),
    ),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_a_wrapped_model_is_recorded(kind: str, one_rank: None, tmp_path: Path) -> None:
    make, call = COMPILED[kind]
    wrapped = make(shallow("olmoe"))
    inside = unwrapped(wrapped)
    expected = recorded(inside, tmp_path / "inside", lambda m: [m(**INPUTS) for _ in range(2)])
    found = recorded(wrapped, tmp_path / "t", lambda m: [call(m) for _ in range(2)])
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3)


def test_of_several_models_that_which_has_routers_is_recorded(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_attention_heads=2, **sizes))
    one, both = two(dense, build("olmoe")), two(build("olmoe"), build("olmoe", seed=1))
    recorded(one, tmp_path / "t", lambda m: m(INPUTS))
    match = "Two holds 2 models with routers: record one of policy, reference"
    with pytest.raises(MoeInspectError, match=match):
        moe_inspect.record(both, tmp_path / "both")
    recorded(both.policy, tmp_path / "policy", lambda m: both(INPUTS))
    for name in ("t", "policy"):
        assert moe_inspect.open_trace(tmp_path / name).n_tokens == sum(LENGTHS)


def test_after_two_recorders_of_a_model_compiled_code_runs_compiled(tmp_path: Path) -> None:
    """Their passes begin and end together; while they have no tape code runs eagerly."""
    ran: list[int] = []
    backend = lambda graph, _: ran.append(1) or graph.forward  # noqa: E731
    doubled = torch.compile(lambda x: x * 2, backend=backend)
    doubled(torch.ones(2))  # from here on a model may have compiled parts
    model = build("olmoe")
    first, second = (moe_inspect.record(model, tmp_path / name) for name in "ab")
    with first, second, torch.no_grad():
        model(**INPUTS)
    ran.clear()
    torch.compiler.reset()
    doubled(torch.ones(2))
    assert ran

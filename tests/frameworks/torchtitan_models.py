"""torchtitan's debug models, small enough for a CPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.distributed.parallel_dims as parallel_dims
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.moe import GroupedExperts, MoE
from torchtitan.models.deepseek_v3.parallelize import parallelize_deepseekv3
from torchtitan.models.deepseek_v3.sharding import set_deepseek_v3_sharding_config

from tests.frameworks import ranks
from tests.frameworks.truth import Watch, by_layer, token_ids

MODELS = {
    "qwen3": ("qwen3_configs", "debugmodel_moe"),
    "deepseek_v3": ("deepseekv3_configs", "debugmodel"),
    "gpt_oss": ("gptoss_configs", "debugmodel"),
}
LAYERS = 3
B, S = 3, 16


class PlainAttention(ScaledDotProductAttention):
    """Causal attention in plain operations: flex attention has no backward pass on a CPU, and SDPA
    does not return the log-sum-exp that gpt_oss asks for."""

    @dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):
        pass

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        scale: float | None = None,
        out_transform: Any = None,
        **_: Any,
    ) -> Tensor:
        repeats = q_BLNH.shape[2] // k_BLNH.shape[2]
        k_BLNH, v_BLNH = (t.repeat_interleave(repeats, dim=2) for t in (k_BLNH, v_BLNH))
        score = torch.einsum("bqnh,bknh->bnqk", q_BLNH, k_BLNH)
        score = score * (scale if scale is not None else q_BLNH.shape[-1] ** -0.5)
        L = q_BLNH.shape[1]
        score = score.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), float("-inf"))
        out = torch.einsum("bnqk,bknh->bqnh", score.softmax(-1), v_BLNH)
        if out_transform is None:
            return out
        return out_transform(out, score.logsumexp(-1).transpose(1, 2))


def config(name: str) -> Any:
    """The debug model of this name with its first layers. deepseek_v3: with groups of experts,
    sigmoid scores and a selection bias, as the large one has them."""
    table, flavor = MODELS[name]
    made = getattr(importlib.import_module(f"torchtitan.models.{name}"), table)[flavor](
        attn_backend="flex", moe_comm_backend="standard"
    )
    made.layers = made.layers[:LAYERS]
    for layer in made.layers:
        layer.attention.inner_attention = PlainAttention.Config()
        if name == "deepseek_v3" and layer.moe is not None:
            router = layer.moe.router
            router.score_func, router.route_norm, router.route_scale = "sigmoid", True, 2.5
            router.num_expert_groups, router.num_limited_groups = 4, 2
    return made


def initialise(model: Any, name: str) -> Any:
    model.init_states(buffer_device=torch.device("cpu"))
    if name == "gpt_oss":
        model.to(torch.bfloat16)  # which its experts return, whatever they are given
    if name == "deepseek_v3":
        for layer in model.layers.values():
            if layer.moe_enabled:
                layer.moe.expert_bias_E.copy_(torch.linspace(-0.2, 0.2, 8))
    return model


def build(name: str) -> Any:
    torch.manual_seed(0)
    return initialise(config(name).build(), name)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and positions, [B, S] each; the second row holds two documents."""
    ids_BS = token_ids(seed, most=2048)
    positions_BS = torch.arange(S).expand(B, S).clone()
    positions_BS[1, 6:] = torch.arange(S - 6)
    return ids_BS, positions_BS


def blocks(model: nn.Module) -> dict[int, MoE]:
    """Layer → MoE block."""
    return by_layer(model, MoE)


def watch(model: nn.Module, first_expert: int = 0) -> Watch:
    found = Watch()
    for layer, moe in blocks(model).items():
        found.block(moe, layer)
        found.routed(moe.routed_experts, layer)
        experts = moe.routed_experts.inner_experts
        assert isinstance(experts, GroupedExperts)
        experts.register_forward_pre_hook(
            lambda _, args, layer=layer: found.grouped(layer, args[0], args[1], first_expert)
        )
    return found


def run_expert(model: nn.Module, layer: int, expert: int, rows_RD: Tensor) -> Tensor:
    """One expert, by the framework's own code."""
    experts = blocks(model)[layer].routed_experts.inner_experts
    counts_E = torch.zeros(experts.num_experts, dtype=torch.int64)
    counts_E[expert] = len(rows_RD)
    return type(experts).forward(experts, rows_RD, counts_E)


def train_on_rank(rank: int, port: int, path: Path, parallel: str) -> None:
    """A training step on one of two ranks, by torchtitan's own parallelize_deepseekv3: FSDP2, or
    with half of the experts on each rank."""
    ranks.begin(rank, port)
    dist.init_process_group("gloo")
    expert_parallel = parallel == "expert parallel"
    ep = ranks.WORLD if expert_parallel else 1
    parallel_dims.device_type = "cpu"
    dims = parallel_dims.ParallelDims(
        dp_replicate=1,
        dp_shard=ranks.WORLD,
        cp=1,
        tp=1,
        pp=1,
        ep=ep,
        world_size=ranks.WORLD,
        spmd_backend="partial_dtensor",
    )
    dims.build_mesh()
    set_spmd_backend("partial_dtensor")
    torch.manual_seed(0)
    made = config("deepseek_v3")
    set_deepseek_v3_sharding_config(made, enable_sp=False, enable_ep=expert_parallel)
    model = made.build()
    if not expert_parallel:
        initialise(model, "deepseek_v3")
    parallelize_deepseekv3(
        model,
        parallel_dims=dims,
        training=TrainingConfig(mixed_precision_param="float32", mixed_precision_reduce="float32"),
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor",
            expert_parallel_degree=ep,
            data_parallel_shard_degree=ranks.WORLD,
        ),
        compile_config=CompileConfig(enable=False),
        ac_config=None,
        dump_folder=str(path),
    )
    if expert_parallel:
        initialise(model, "deepseek_v3")
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo has no sum that divides
            module.set_force_sum_reduction_for_comms(True)
    ids_BS, positions_BS = inputs(rank)
    watched = watch(model.train(), first_expert=rank * 4 if expert_parallel else 0)
    given = {"ids_BS": ids_BS, "positions_BS": positions_BS}
    with ranks.recorded(model, watched, rank, path, **given):
        with watched.forward():
            out = model(ids_BS, positions_BS)
        out.float().sum().backward()

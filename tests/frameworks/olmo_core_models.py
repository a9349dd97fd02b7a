"""OLMo-core's MoETransformer, small enough for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import olmo_core.ops.moe as ops
import torch
import torch.distributed as dist
from olmo_core.nn.attention.backend import TorchAttentionBackend
from olmo_core.nn.moe.mlp import DroplessMoEMLP, MoEMLP
from olmo_core.nn.moe.moe import MoEBase
from olmo_core.nn.moe.router import MoERouter
from olmo_core.nn.transformer import MoETransformer, TransformerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from tests.frameworks import ranks
from tests.frameworks.truth import Watch, by_layer, token_ids

EXPERTS, LAYERS = 8, 4
B, S = 3, 16


def on_a_cpu(setattr: Callable[[object, str, object], None]) -> None:
    """Replaces the kernels that move rows, which are Triton's, by the same in torch, and lets
    attention on a CPU cross the borders of documents, which it refuses."""
    for made in (gather, scatter, binned_gather, binned_scatter):
        setattr(ops, made.__name__, made)
    plain = TorchAttentionBackend.forward
    setattr(
        TorchAttentionBackend,
        "forward",
        lambda *args, **kwargs: plain(
            *args, **{name: kwargs[name] for name in kwargs if "doc_len" not in name}
        ),
    )


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    return x[indices // top_k]


def scatter(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int
) -> Tensor:
    if weights is not None:
        x = x * weights.reshape(-1)[indices].unsqueeze(1).to(x.dtype)
    return x.new_zeros(len(indices) // top_k, x.shape[1]).index_add(0, indices // top_k, x)


def _bins(indices: Tensor, bins: Tensor, capacity: int) -> list[Tensor]:
    """The rows of each expert that it has room for."""
    starts = [0, *bins.tolist()[:-1]]
    return [
        indices[start : min(end, start + capacity)]
        for start, end in zip(starts, bins.tolist(), strict=True)
    ]


def binned_gather(x: Tensor, indices: Tensor, bins: Tensor, capacity: int, top_k: int) -> Tensor:
    rows = [x[rows // top_k] for rows in _bins(indices, bins, capacity)]
    return torch.stack([nn.functional.pad(r, (0, 0, 0, capacity - len(r))) for r in rows])


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor, bins: Tensor, top_k: int) -> Tensor:
    out = x.new_zeros(len(indices) // top_k, x.shape[2])
    for expert, rows in enumerate(_bins(indices, bins, x.shape[1])):
        weighted = x[expert, : len(rows)] * weights.reshape(-1)[rows].unsqueeze(1)
        out = out.index_add(0, rows // top_k, weighted)
    return out


def build(dropless: bool, router: Any = None, **options: Any) -> MoETransformer:
    config = TransformerConfig.llama_like_moe(
        d_model=64,
        vocab_size=512,
        n_layers=LAYERS,
        n_heads=4,
        num_experts=EXPERTS,
        top_k=2,
        expert_hidden_size=32,
        shared_expert_hidden_size=32,
        dropless=dropless,
        **options,
    )
    if router is not None:
        config.block.feed_forward_moe.router = router
    model = config.build(init_device="cpu")
    torch.manual_seed(0)
    model.init_weights(device=torch.device("cpu"))
    for layer, of_layer in routers(model).items():
        if of_layer.score_bias is not None:
            of_layer.score_bias.copy_(torch.linspace(-0.05, 0.05, EXPERTS).roll(layer))
    return model


def inputs(seed: int = 7) -> Tensor:
    """Token ids [B, S]."""
    return token_ids(seed)


def loss_of(model: MoETransformer, name: str) -> Callable[[Any], Tensor]:
    """What the routers of a pass have recorded as the metric `name`, with the gradient that
    `attach_auxiliary_loss` gives them: whatever is made of the output, it adds that of the loss."""
    model.register_forward_pre_hook(lambda *_: model.reset_auxiliary_metrics())

    def loss(output: Any) -> Tensor:
        made = output if torch.is_tensor(output) else output.loss
        return model.compute_auxiliary_metrics(reset=False)[name][0] + 0 * made.sum()

    return loss


def blocks(model: nn.Module) -> dict[int, MoEBase]:
    """Layer → MoE block."""
    return by_layer(model, MoEBase)


def routers(model: nn.Module) -> dict[int, MoERouter]:
    return by_layer(model, MoERouter)


def watch(model: nn.Module) -> Watch:
    found = Watch()
    for layer, block in blocks(model).items():
        found.block(block, layer)
        found.routed(block.experts, layer)
        block.experts.mlp.register_forward_pre_hook(
            lambda mlp, args, layer=layer: _keep(found, mlp, layer, args)
        )
    return found


def _keep(found: Watch, mlp: nn.Module, layer: int, args: tuple[Any, ...]) -> None:
    if isinstance(mlp, DroplessMoEMLP):  # rows sorted by expert, and how many of each
        found.grouped(layer, *args)
    elif (block := found.at(layer)) is not None:  # [E, capacity, D], filled up with zeros
        assert isinstance(mlp, MoEMLP)
        block.rows += [(e, rows, None) for e, rows in enumerate(args[0].detach().clone())]


def run_expert(model: nn.Module, layer: int, expert: int, rows_RD: Tensor) -> Tensor:
    """One expert, by the framework's own code."""
    mlp = blocks(model)[layer].experts.mlp
    assert isinstance(mlp, DroplessMoEMLP)
    counts_E = torch.zeros(EXPERTS, dtype=torch.int64)
    counts_E[expert] = len(rows_RD)
    return type(mlp).forward(mlp, rows_RD, counts_E)


def train_on_rank(rank: int, port: int, path: Path, parallel: str) -> None:
    """A training step on one of two ranks."""
    ranks.begin(rank, port, NUM_NODES="1")
    on_a_cpu(setattr)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks.WORLD,), mesh_dim_names=("dp",))
    model = build(dropless=True).train()
    if parallel == "FSDP2":
        model.apply_fsdp(mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo has no sum that divides
                module.set_force_sum_reduction_for_comms(True)
    else:
        model.apply_ddp(mesh)
    ids_BS = inputs(seed=7 + rank)
    watched = watch(model)
    with ranks.recorded(model, watched, rank, path, ids_BS=ids_BS):
        with watched.forward():
            out = model(ids_BS, labels=ids_BS)
        out.loss.backward()

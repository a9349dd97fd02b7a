"""Megatron-Core's GPTModel (local layers, no Transformer Engine), small enough for a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import torch_norm
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from tests.frameworks import ranks
from tests.frameworks.truth import Watch, token_ids

EXPERTS = 8
B, S = 3, 16
MOE_LAYERS = [1, 2, 3]  # the first is dense


def without_cuda(setattr: Callable[[object, str, object], None]) -> None:
    """Replaces the calls of CUDA that Megatron makes on a CPU too."""

    @contextlib.contextmanager
    def fork(*_: Any, **__: Any) -> Iterator[None]:
        yield

    setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    setattr(megatron_random.CudaRNGStatesTracker, "fork", fork)
    setattr(megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    setattr(megatron_random, "_set_cuda_rng_state", lambda *_, **__: None)


def start(rank: int = 0, world: int = 1, port: int = 0, **parallel: int) -> None:
    """Starts Megatron's process groups on gloo."""
    if not dist.is_initialized():
        if world > 1:
            ranks.begin(rank, port)
            without_cuda(setattr)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**parallel)


def build(pre_process: bool = True, post_process: bool = True, **options: Any) -> GPTModel:
    config = TransformerConfig(
        **{
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 32,
            "moe_layer_freq": [0, 1, 1, 1],
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.01,
            "moe_shared_expert_intermediate_size": 32,
            "moe_token_dispatcher_type": "allgather",  # alltoall asks for streams of CUDA
            "use_cpu_initialization": True,
            "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32,
            "normalization": "LayerNorm",
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": nn.functional.silu,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            # fused kernels are CUDA's
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "moe_permute_fusion": False,
            "persist_layer_norm": False,
            "bias_activation_fusion": False,
            "apply_rope_fusion": False,
            **options,
        }
    )
    torch.manual_seed(0)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="LayerNorm"
        ),
        pre_process=pre_process,
        post_process=post_process,
        vocab_size=512,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    for layer, block in blocks(model).items():
        if block.router.expert_bias is not None:
            block.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, EXPERTS).roll(layer))
    return model


def inputs(seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B, S], positions [B, S], mask [B, 1, S, S], which is True where masked."""
    ids_BS = token_ids(seed)
    mask_SS = torch.ones(S, S, dtype=torch.bool).triu(1)
    return ids_BS, torch.arange(S).expand(B, S).contiguous(), mask_SS.expand(B, 1, S, S)


def loss_of(model: nn.Module, name: str, coefficient: float) -> Callable[[Tensor], Tensor | None]:
    """What the routers of a pass have recorded as `name`, with the gradient that their
    MoEAuxLossAutoScaler gives them: whatever is made of the output, it adds that of the loss."""
    tracker = get_moe_metrics_tracker()
    model.register_forward_pre_hook(lambda *_: tracker.clear())

    def loss(output: Tensor) -> Tensor | None:
        if name not in tracker.metrics:
            return None
        return coefficient * tracker.metrics[name].values.sum() + 0 * output.sum()

    return loss


def blocks(model: nn.Module) -> dict[int, MoELayer]:
    """Layer → MoE block."""
    return {m.layer_number - 1: m for m in model.modules() if isinstance(m, MoELayer)}


def watch(model: nn.Module, first_expert: int = 0) -> Watch:
    found = Watch()
    for layer, block in blocks(model).items():
        found.block(block, layer, sequence_first=True)
        found.experts(block.experts.local_experts, layer, first_expert)
    return found


def train_on_rank(rank: int, port: int, path: Path, parallel: str) -> None:
    """A training step on one of two ranks, with all experts or half of them on each."""
    ep = ranks.WORLD if parallel == "expert parallel" else 1
    start(rank, ranks.WORLD, port, expert_model_parallel_size=ep)
    model = build(expert_model_parallel_size=ep).train()
    ranks.share(model, lambda name: ".experts." in name)
    ids_BS, *more = inputs(seed=7 + rank)
    watched = watch(model, first_expert=rank * EXPERTS // ep if ep > 1 else 0)
    with ranks.recorded(model, watched, rank, path, ids_BS=ids_BS):
        with watched.forward():
            out = model(ids_BS, *more)
        out.sum().backward()


def sequence_parallel_on_rank(rank: int, port: int, path: Path) -> None:
    """A forward pass with tensor, sequence and expert parallelism on two ranks: both have all
    tokens, and the router of each sees half of the positions."""
    torch_norm.WrappedTorchNorm.__new__ = _layer_norm
    parallel = {
        "tensor_model_parallel_size": ranks.WORLD,
        "expert_tensor_parallel_size": 1,
        "expert_model_parallel_size": ranks.WORLD,
    }
    start(rank, ranks.WORLD, port, **parallel)
    model = build(sequence_parallel=True, **parallel).eval()
    ranks.share(model, lambda name: ".router" not in name and "norm" not in name)
    ids_BS, positions_BS, mask = inputs()
    watched = watch(model, first_expert=rank * EXPERTS // ranks.WORLD)
    part = slice(rank * S // ranks.WORLD, (rank + 1) * S // ranks.WORLD)
    own = {"ids_BS": ids_BS[:, part], "positions_BS": positions_BS[:, part]}
    with ranks.recorded(model, watched, rank, path, **own), torch.no_grad(), watched.forward():
        model(ids_BS, positions_BS, mask)


def pipeline_on_rank(rank: int, port: int, path: Path) -> None:
    """A forward pass through two stages of a pipeline: the second is given the hidden states of the
    first, and labels, but no token ids."""
    start(rank, ranks.WORLD, port, pipeline_model_parallel_size=ranks.WORLD)
    model = build(
        pipeline_model_parallel_size=ranks.WORLD,
        pre_process=rank == 0,
        post_process=rank == ranks.WORLD - 1,
    ).eval()
    ids_BS, positions_BS, mask = inputs()
    watched = watch(model)
    seen = {"ids_BS": ids_BS if rank == 0 else torch.full_like(ids_BS, -1)}
    with ranks.recorded(model, watched, rank, path, **seen), torch.no_grad(), watched.forward():
        if rank == 0:
            dist.send(model(ids_BS, positions_BS, mask).contiguous(), 1)
        else:
            hidden_SBD = torch.empty(S, B, 64)
            dist.recv(hidden_SBD, 0)
            model.set_input_tensor(hidden_SBD)
            model(None, None, mask, labels=ids_BS.roll(-1, 1))


def _layer_norm(
    cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
) -> nn.LayerNorm:
    """torch's, which Megatron refuses with sequence parallelism; it is the same for each token."""
    made = nn.LayerNorm(hidden_size, eps=eps)
    for parameter in made.parameters():
        parameter.sequence_parallel = True
    return made

"""`record(discover=True)` on MoE layers that others have published: every decision right, compared
with what the experts were given, or the model refused. Two are read from clones in the folder
FOREIGN_CODE: davidmrau/mixture-of-experts and laekov/fastmoe.

B batch rows, S positions, D hidden size, E experts.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_inspect
from moe_inspect.errors import MoeInspectError
from tests.frameworks.conftest import Check
from tests.frameworks.truth import Watch, compare

CODE = Path(os.environ.get("FOREIGN_CODE", "."))
B, S, D, E, LAYERS = 3, 16, 32, 6, 2


class Block(nn.Module):
    def __init__(self, moe: nn.Module):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(D), moe
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(x_BSD, x_BSD, x_BSD, need_weights=False)[0]
        out = self.moe(self.norm(x_BSD))
        return x_BSD + (out[0] if isinstance(out, tuple) else out)


class Host(nn.Module):
    """A small transformer of these layers."""

    def __init__(self, moe: Callable[[], nn.Module]):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(97, D), nn.Embedding(S, D)
        self.layers = nn.ModuleList(Block(moe()) for _ in range(LAYERS))

    def forward(self, idx: Tensor) -> Tensor:
        x_BSD = self.tokens(idx) + self.positions.weight
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return x_BSD


class Flat(nn.Module):
    """Feeds a layer that takes [T, D]."""

    def __init__(self, moe: nn.Module):
        super().__init__()
        self.inner = moe

    def forward(self, x_BSD: Tensor) -> Tensor:
        out = self.inner(x_BSD.flatten(0, 1))
        return (out[0] if isinstance(out, tuple) else out).view_as(x_BSD)


class Gated(nn.Module):
    """A gate that returns (ids, weights) of [T, D], and its experts, as a list or as one tensor."""

    def __init__(self, gate: nn.Module, as_list: bool):
        super().__init__()
        self.gate = gate
        if as_list:
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        else:
            self.weight = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x_TD: Tensor) -> Tensor:
        ids, weights = (part.reshape(len(x_TD), -1) for part in self.gate(x_TD))
        if not hasattr(self, "experts"):
            return torch.einsum("td,tkdf,tk->tf", x_TD, self.weight[ids], weights)
        out_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            rows, slot = (ids == e).nonzero(as_tuple=True)
            out_TD = out_TD.index_add(0, rows, expert(x_TD[rows]) * weights[rows, slot, None])
        return out_TD


def recorded(moe: Callable[[], nn.Module], path: Path) -> tuple[Watch, Tensor]:
    """`discover=True` on a model of such layers, two forward passes of the tokens returned."""
    torch.manual_seed(0)
    model, watch = Host(moe).train(), Watch()
    for parameter in model.parameters():  # some are made as zeros
        if not parameter.any():
            nn.init.normal_(parameter)
    for layer, block in enumerate(model.layers):
        watch.block(block.get_submodule("moe"), layer)
        for name, experts in block.named_modules():
            if isinstance(experts, nn.ModuleList) and name.split(".")[-1] == "experts":
                watch.experts([*experts], layer)
    ids_BS = torch.randint(0, 97, (B, S), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), moe_inspect.record(model, path, discover=True):
        for _ in range(2):
            with watch.forward():
                model(ids_BS)
    return watch, ids_BS


def of_package(name: str) -> Any:
    return pytest.importorskip(name)


def of_clone(name: str, module: str) -> Any:
    folder = CODE / name
    if not (folder / f"{module.replace('.', '/')}.py").exists():
        pytest.skip(f"FOREIGN_CODE has no clone {name}")
    package = f"clone_of_{name.replace('-', '_')}"
    parts = module.split(".")
    # packages without their __init__, which may import what is compiled for a GPU
    for n in range(len(parts)):
        inner: Any = types.ModuleType(".".join([package, *parts[:n]]))
        inner.__path__ = [str(folder.joinpath(*parts[:n]))]
        sys.modules.setdefault(inner.__name__, inner)
    return importlib.import_module(f"{package}.{module}")


def litgpt() -> nn.Module:
    package = of_package("litgpt")
    sizes = {"n_embd": D, "n_head": 2, "n_layer": LAYERS, "n_expert": E, "n_expert_per_token": 2}
    config = package.Config(**sizes, mlp_class_name="LLaMAMoE", moe_intermediate_size=D)
    return package.model.LLaMAMoE(config)


def mh_moe() -> nn.Module:
    return of_package("mh_moe.main").SparseMoE(D, E, 2)


def st_moe(**settings: Any) -> nn.Module:
    # so that a row is known by its bits
    settings["straight_through_dispatch_tensor"] = False
    return of_package("st_moe_pytorch").MoE(dim=D, num_experts=E, **settings)


def lucidrains(**settings: Any) -> nn.Module:
    return of_package("mixture_of_experts").MoE(dim=D, num_experts=E, **settings)


def of_two_levels(inner: int) -> nn.Module:
    package = of_package("mixture_of_experts")
    return package.HeirarchicalMoE(dim=D, num_experts=(4, inner))


def peer(heads: int) -> nn.Module:
    package = of_package("PEER_pytorch")
    return package.PEER(D, heads=heads, num_experts=64, num_experts_per_head=4)


def product_keys(heads: int) -> nn.Module:
    return of_package("product_key_memory").PKM(D, heads=heads, num_keys=8, topk=4)


def sparse_attention() -> nn.Module:
    settings = {"compress_block_size": 4, "compress_block_sliding_stride": 2}
    settings |= {"selection_block_size": 2, "num_selected_blocks": 2, "sliding_window_size": 4}
    package = of_package("native_sparse_attention_pytorch")
    return package.SparseAttention(dim=D, dim_head=8, heads=2, **settings)


def soft_moe() -> nn.Module:
    return of_package("soft_moe_pytorch").SoftMoE(dim=D, seq_len=S, num_experts=E)


def davidmrau(k: int) -> nn.Module:
    code = of_clone("mixture-of-experts", "moe")
    return Flat(code.MoE(D, D, E, D, k=k))


def fastmoe(gate: str, as_list: bool = True) -> nn.Module:
    code = of_clone("fastmoe", f"fmoe.gates.{gate.lower()}_gate")
    return Flat(Gated(getattr(code, f"{gate}Gate")(D, E, 1, 2), as_list))


@pytest.mark.parametrize(
    ("name", "moe"),
    [
        ("litgpt", litgpt),
        ("mh-moe", mh_moe),
        ("st-moe-pytorch", lambda: st_moe(threshold_train=0.0, capacity_factor_train=100.0)),
        ("fastmoe", lambda: fastmoe("Naive")),
    ],
)
def test_what_is_found_is_what_the_experts_are_given(
    tmp_path: Path, name: str, moe: Callable[[], nn.Module], check: Check
) -> None:
    watch, ids_BS = recorded(moe, tmp_path / "t")
    found = compare(moe_inspect.open_trace(tmp_path / "t"), watch.passes, ids_BS)
    check(name, "discovered, 2 forward passes", found, 2 * LAYERS * B * S)


@pytest.mark.parametrize(
    ("moe", "why"),
    [
        (lambda: st_moe(threshold_train=0.0), r"\.experts\.\d is given"),  # drops by capacity
        (
            lambda: st_moe(threshold_train=0.9, capacity_factor_train=100.0),
            r"\.experts\.\d is given",
        ),
        (lucidrains, "over 6 values 2 times"),
        (lambda: lucidrains(second_policy_train="all"), "over 6 values 2 times"),
        (lambda: of_two_levels(4), "over 4 values 2 times"),
        (lambda: of_two_levels(3), "over 4 values 2 times"),
        (lambda: davidmrau(2), r"\.experts\.\d is given"),  # of three
        (lambda: davidmrau(5), "no block of Host called"),  # of all
        (lambda: fastmoe("Noisy"), r"\.experts\.\d is given"),
        (lambda: fastmoe("Noisy", as_list=False), "takes a slice"),
        (lambda: peer(1), "nothing in layer 0 has 16 experts"),
        (lambda: peer(2), "nothing in layer 0 has 16 experts"),
        (lambda: product_keys(1), "nothing in layer 0 has 16 experts"),
        (lambda: product_keys(2), "nothing in layer 0 has 16 experts"),
        (sparse_attention, "nothing in layer 0 has 8 experts"),
        (soft_moe, "no block of Host called"),
    ],
)
def test_what_cannot_be_told_is_refused(
    tmp_path: Path, moe: Callable[[], nn.Module], why: str
) -> None:
    with pytest.raises(MoeInspectError, match=why):
        recorded(moe, tmp_path / "t")

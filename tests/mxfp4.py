"""A stand-in, in torch on the CPU, for the kernels that transformers runs GPT-OSS's MXFP4 experts
with (`kernels-community/gpt-oss-triton-kernels`): the same structures, and experts that note which
rows they were given. transformers' own code puts it into a model.

T tokens, K slots, E experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Mxfp4Config
from transformers.integrations import hub_kernels, mxfp4

from tests.families import build


class Kernels:
    """`given`: of each experts call so far, in order, (expert, input row [H], gate weight) of each
    assignment."""

    def __init__(self) -> None:
        self.given: list[list[tuple[int, torch.Tensor, float]]] = []
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

    def _matmul(  # noqa: PLR0913
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor,
        routing: _Routing,
        gather_indx: _Indices | None = None,
        scatter_indx: _Indices | None = None,
        precision_config: Any = None,
        gammas: torch.Tensor | None = None,
        fused_activation: tuple[float, float] | None = None,
    ) -> torch.Tensor:
        """The first product gathers rows, the second adds them up by token."""
        experts = torch.arange(len(w)).repeat_interleave(routing.expt_hist)
        if gather_indx is not None:
            K = routing.n_expts_act
            x = x[gather_indx.src_indx[: len(experts)] // K]
            weights = routing.gate_scal[: len(experts)].tolist()
            self.given.append(list(zip(experts.tolist(), x.clone(), weights, strict=True)))
        y = torch.einsum("nh,nho->no", x, w[experts]) + bias[experts].to(x.dtype)
        if fused_activation is not None:
            alpha, limit = fused_activation
            gate, up = y[:, ::2].clamp(max=limit), y[:, 1::2].clamp(-limit, limit)
            y = (up + 1) * gate * torch.sigmoid(gate * alpha)
        if scatter_indx is None:
            return y
        assert gammas is not None
        slots = torch.zeros(len(scatter_indx.src_indx), y.shape[1], dtype=y.dtype)
        slots[scatter_indx.dst_indx[: len(experts)]] = y * gammas[: len(experts), None]
        return slots.view(-1, routing.n_expts_act, y.shape[1]).sum(1)


class _Indices(NamedTuple):
    src_indx: torch.Tensor
    dst_indx: torch.Tensor


class _Routing(NamedTuple):
    gate_scal: torch.Tensor
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int
    data: Any


def _route(logits_TE: torch.Tensor, K: int) -> tuple[_Routing, _Indices, _Indices]:
    values, ids = logits_TE.topk(K)
    ids, order = ids.sort(1)  # the kernel's slots ascend by expert
    weights = values.softmax(-1).gather(1, order).flatten()
    by_expert = ids.flatten().argsort(stable=True)
    place = by_expert.argsort()
    E = logits_TE.shape[1]
    routing = _Routing(weights[by_expert], ids.flatten().bincount(minlength=E), E, K, None)
    return routing, _Indices(by_expert.int(), place.int()), _Indices(place.int(), by_expert.int())


def model_with_kernels(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, Kernels]:
    """(GPT-OSS as transformers runs it in MXFP4, the same model with experts of its own, the
    kernels). The weights of the two are equal."""
    kernels = Kernels()
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: kernels)
    monkeypatch.setattr(mxfp4, "triton_kernels_hub", None, raising=False)
    plain, model = build("gpt_oss", dtype), build("gpt_oss", dtype)
    mxfp4.replace_with_mxfp4_linear(model, quantization_config=Mxfp4Config())
    for of_plain, layer in zip(plain.model.layers, model.model.layers, strict=True):
        for name, value in of_plain.mlp.experts.state_dict().items():
            if not name.endswith("_bias"):  # the kernels' own kind of tensor
                del layer.mlp.experts._parameters[name]
                setattr(layer.mlp.experts, name, value.clone())
            else:
                setattr(layer.mlp.experts, name, torch.nn.Parameter(value.float()))
    return model.eval(), plain, kernels

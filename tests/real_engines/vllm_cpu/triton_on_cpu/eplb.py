"""What keeps vLLM from balancing the load over replicas of experts (EPLB) on a CPU: two checks that
it runs on a GPU, which are lifted; streams and events of a GPU; and its kernel for experts on CPUs,
which knows none of other ranks. A plugin of vLLM."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


def register() -> None:
    if find_spec("triton") is None:
        return
    import torch
    from triton.runtime.interpreter import InterpreterBuilder
    from vllm.config import parallel
    from vllm.distributed.eplb import eplb_communicator, eplb_state
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.router import base_router
    from vllm.platforms import current_platform

    parallel.current_platform = Instead(current_platform, is_cuda_alike=lambda: True)
    # for GPUs it has a kernel that maps experts to their replicas, else a function without effect
    again = module_from_spec(spec := find_spec(base_router.__name__))
    with patch.object(type(current_platform), "is_cuda_alike", lambda _: True):
        spec.loader.exec_module(again)
    base_router.eplb_map_to_physical_and_record = again.eplb_map_to_physical_and_record
    InterpreterBuilder.create_atomic_rmw = masked(InterpreterBuilder.create_atomic_rmw)
    CPUUnquantizedExperts.apply = of_this_rank(CPUUnquantizedExperts.apply)

    done = SimpleNamespace(record=none, synchronize=none, elapsed_time=lambda _: 0.0)
    accelerator = Instead(torch.accelerator, current_stream=lambda: done)
    eplb_communicator.torch = Instead(torch, accelerator=accelerator)
    eplb_state.torch = Instead(torch, Event=lambda **_: done)


def none() -> None:
    pass


class Instead:
    """What something is, but for some of its attributes."""

    def __init__(self, of: Any, **instead: Any):
        self.of = of
        vars(self).update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


def masked(create: Any) -> Any:
    """Triton's interpreter may be given a mask of int8, which it takes only as bool."""

    def created(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *more: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return create(self, operation, pointer, value, mask, *more)

    return created


def of_this_rank(apply: Any) -> Any:
    """In the place of an expert of another rank is one of this rank, with a weight of 0."""

    def applied(self: Any, **given: Any) -> Any:
        if (expert_map := given["expert_map"]) is not None:
            ids = expert_map[given["topk_ids"].long()].to(given["topk_ids"].dtype)
            given["topk_weights"] = given["topk_weights"].where(ids >= 0, 0)
            given["topk_ids"] = ids.clamp(min=0)
        return apply(self, **given)

    return applied

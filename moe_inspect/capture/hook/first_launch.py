"""Runs Triton kernels. The first launch of a kernel on a device is compared with the kernel's twin
in torch. If they differ, or if the kernel cannot run, the twin does its work in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moe_inspect.text import first_line, print_stderr

# (kernel, device) → "" if the kernel is right on the device, else what is wrong
FOUND: dict[tuple[str, torch.device], str] = {}


def run(
    name: str, device: torch.device, written: Iterable[Tensor | None],
    kernel: Callable[..., Any], twin: Callable[..., Any], *arguments: object,
) -> Any:  # fmt: skip
    """Return `kernel(*arguments)`, or `twin(*arguments)` if the kernel is wrong on the device.
    `written`: the tensors that both change. Nothing is compared while a CUDA graph is captured."""
    wrong = FOUND.get((name, device))
    if wrong is not None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return (twin if wrong else kernel)(*arguments)
    changed, wrong, made = [t for t in written if t is not None], "", None
    before = [t.clone() for t in changed]
    try:
        made = kernel(*arguments)
    except Exception as error:  # whatever a compiler or a driver raises
        wrong = f"cannot be run: {first_line(error)}"
    after = [t.clone() for t in changed]
    for tensor, value in zip(changed, before, strict=True):
        tensor.copy_(value)
    wanted = twin(*arguments)
    if not wrong:
        same = [_is_same(*of, of[0].itemsize == 4) for of in zip(after, changed, strict=True)]
        same += [_is_same(*of, True) for of in zip(_tensors(made), _tensors(wanted), strict=True)]
        wrong = "" if all(same) else "gives a wrong result"
    FOUND[name, device] = wrong
    if wrong:
        print_stderr(
            f"warning: {name} on {device}: the kernel {wrong}: torch runs instead, more slowly; "
            'please report it with the output of "moe-inspect doctor"'
        )
    return wanted if wrong else made


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result or () if t is not None]


def _is_same(made: Tensor, wanted: Tensor, is_sum: bool) -> bool:
    """Sums may be rounded otherwise: by at most a share of themselves and of their mean size."""
    slack, wanted = 0.0, wanted.to(made.dtype)
    if is_sum and made.is_floating_point():
        slack = max(1e-4, 16 * torch.finfo(made.dtype).eps)
    size = wanted.float().nan_to_num(0.0, 0.0, 0.0).abs().mean().item() if slack else 0.0
    return torch.allclose(made, wanted, slack, slack * size, equal_nan=True)

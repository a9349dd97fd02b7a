"""The Triton kernels and, beside each, its torch twin: the same result to the bit, and what a CPU runs.

T tokens, K slots. A page holds the rows of one forward pass; `NOWHERE` (255, or −1 in an int16 page) marks a slot whose id
is no expert's: a sentinel, a skip expert.
"""

from __future__ import annotations

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# (pyright sees neither what @triton.jit makes of a signature nor that the kernels exist only with triton)
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the twins do the work
    triton = None


def nowhere(page_ids: torch.Tensor) -> int:
    """The mark of a slot that routed nowhere, in this page's dtype."""
    return 255 if page_ids.dtype == torch.uint8 else -1


def record(
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    page_ids_PK: torch.Tensor,
    page_weights_PK: torch.Tensor | None,
    row: int,
    experts: int,
) -> None:
    """Writes a decision a row into the page from `row` on: ids as uint8 (E < 256) or int16, weights rounded to the page's
    dtype. `ids_TK`: int32 or int64; `weights_TK`: any float, or None with `page_weights_PK`. Asynchronous on a GPU."""
    if ids_TK.is_cuda and triton is not None:
        with torch.cuda.device(ids_TK.device):  # Triton launches on the current device, which may be another
            record_triton(ids_TK, weights_TK, page_ids_PK, page_weights_PK, row, experts)
    else:
        record_torch(ids_TK, weights_TK, page_ids_PK, page_weights_PK, row, experts)


def record_torch(
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    page_ids_PK: torch.Tensor,
    page_weights_PK: torch.Tensor | None,
    row: int,
    experts: int,
) -> None:
    rows = slice(row, row + len(ids_TK))
    page_ids_PK[rows] = ids_TK
    outside_TK = (ids_TK < 0) | (ids_TK >= experts)
    page_ids_PK[rows].masked_fill_(outside_TK, nowhere(page_ids_PK))
    if page_weights_PK is not None and weights_TK is not None:
        page_weights_PK[rows] = weights_TK


if triton is not None:

    @triton.jit
    def _record(ids, weights, page_ids, page_weights, first, slots, experts, mark, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < slots
        expert = tl.load(ids + i, mask=inside, other=0).to(tl.int32)
        expert = tl.where((expert < 0) | (expert >= experts), mark, expert)
        tl.store(page_ids + first + i, expert.to(page_ids.dtype.element_ty), mask=inside)
        if HAS_WEIGHTS:
            weight = tl.load(weights + i, mask=inside, other=0.0)
            tl.store(page_weights + first + i, weight.to(page_weights.dtype.element_ty), mask=inside)

    def record_triton(
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor | None,
        page_ids_PK: torch.Tensor,
        page_weights_PK: torch.Tensor | None,
        row: int,
        experts: int,
        block: int = 1024,
    ) -> None:
        """One launch, one element a lane: ids and weights are contiguous in the call and in the page alike."""
        slots, K = ids_TK.numel(), ids_TK.shape[1]
        if slots == 0:
            return
        has_weights = page_weights_PK is not None and weights_TK is not None
        ids_TK = ids_TK.contiguous()
        _record[(triton.cdiv(slots, block),)](
            ids_TK,
            weights_TK.contiguous() if has_weights else ids_TK,
            page_ids_PK,
            page_weights_PK if has_weights else page_ids_PK,
            row * K,
            slots,
            experts,
            nowhere(page_ids_PK),
            HAS_WEIGHTS=has_weights,
            BLOCK=block,
        )


def dispatch(ids_TK: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token → expert dispatch: `offsets` int32 [E + 1], `permutation` int64 [T·K] (the slots, by expert, in token order
    within one) and its inverse. Ids outside 0…E−1 come last, beyond offsets[E]."""
    flat = ids_TK.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    ordered, permutation = torch.sort(flat, stable=True)
    bounds = torch.arange(experts + 1, device=flat.device, dtype=flat.dtype)
    offsets = torch.searchsorted(ordered, bounds).to(torch.int32)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=flat.device)
    return offsets, permutation, inverse

"""SGLang's kernels for a CPU that its speculative decoding calls, and the attention of its backend
intel_amx, which can be over a tree of drafts: in torch.

B requests, n tokens of each that are verified, H heads, D their size, C places in the cache.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def windows(begin_B: Tensor, end_B: Tensor) -> list[tuple[int, int]]:
    return list(zip(begin_B.tolist(), end_B.tolist(), strict=True))


def assign_req_to_token_pool_cpu(
    request_B: Tensor, table: Tensor, begin_B: Tensor, end_B: Tensor, places: Tensor, width: int
) -> None:
    at = 0
    for request, (begin, end) in zip(request_B.tolist(), windows(begin_B, end_B), strict=True):
        table[request, begin:end] = places[at : at + end - begin].to(table.dtype)
        at += end - begin


def assign_extend_cache_locs_cpu(
    request_B: Tensor, table: Tensor, begin_B: Tensor, end_B: Tensor, places: Tensor, width: int
) -> None:
    at = 0
    for request, (begin, end) in zip(request_B.tolist(), windows(begin_B, end_B), strict=True):
        places[at : at + end - begin] = table[request, begin:end]
        at += end - begin


def assign_draft_cache_locs_contiguous_cpu(
    request_B: Tensor, table: Tensor, size_B: Tensor, places: Tensor, _: int, topk: int, steps: int
) -> None:
    assign_extend_cache_locs_cpu(request_B, table, size_B, size_B + topk * steps, places, 0)


def fill_accept_out_cache_loc_cpu(accepted: Tensor, places: Tensor, to: Tensor) -> None:
    accepted = accepted[accepted >= 0]
    to[: len(accepted)] = places[accepted.long()]


def fill_bonus_tokens_cpu(accepted: Tensor, size_B: Tensor, bonus_B: Tensor, stride: int) -> None:
    at_B = torch.arange(len(size_B)) * stride + size_B.long() - 1
    bonus_B.copy_(accepted.view(-1)[at_B])


def copy_all_layer_kv_cache_cpu(
    pointers: Tensor, strides: Tensor, to_places: Tensor, from_places: Tensor
) -> None:
    for pointer, stride in zip(pointers.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(pointer + at * stride, stride) for at in from_places.tolist()]
        for at, row in zip(to_places.tolist(), rows, strict=True):
            ctypes.memmove(pointer + at * stride, row, stride)


def link(parents: list[int], next_token: Tensor, next_sibling: Tensor) -> None:
    """parents: of each token but the root, 0."""
    for child in range(len(parents), 0, -1):
        parent = parents[child - 1]
        next_sibling[child] = next_token[parent]
        next_token[parent] = child


def reconstruct_indices_from_tree_mask(
    mask: Tensor, size_B: Tensor, position: Tensor, index_Bn: Tensor, next_token_Bn: Tensor,
    next_sibling_Bn: Tensor, B: int, n: int,
) -> None:  # fmt: skip
    ancestor_Bnn = mask[: B * n * n].view(B, n, n).tril(-1)
    position.view(B, n).copy_(ancestor_Bnn.sum(2) + size_B[:, None])
    index_Bn.copy_(torch.arange(B * n).view(B, n))
    next_token_Bn.fill_(-1)
    next_sibling_Bn.fill_(-1)
    for b in range(B):
        parents = [int(of.nonzero().max()) for of in ancestor_Bnn[b, 1:] if of.any()]
        assert len(parents) == n - 1
        link(parents, next_token_Bn[b], next_sibling_Bn[b])


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor, selected: Tensor, size_B: Tensor, mask: Tensor, position: Tensor,
    index_Bn: Tensor, next_token_Bn: Tensor, next_sibling_Bn: Tensor, topk: int, steps: int,
    n: int, mode: int,
) -> None:  # fmt: skip
    assert int(mode) == 1  # the drafts alone
    B = len(size_B)
    index_Bn.copy_(torch.arange(B * n).view(B, n))
    seen_Bnn = mask[: B * n * n].view(B, n, n)
    seen_Bnn.copy_(torch.eye(n, dtype=torch.bool))
    for b in range(B):
        chosen, parents = selected[b].tolist(), list[int]()
        for one in chosen:
            parent = one // topk
            parents.append(1 + chosen.index(int(parent_list[b, parent])) if parent else 0)
            seen_Bnn[b, len(parents)] |= seen_Bnn[b, parents[-1]]
        link(parents, next_token_Bn[b], next_sibling_Bn[b])
    position.view(B, n).copy_(seen_Bnn.sum(2) - 1 + size_B[:, None])


def verify_tree_greedy_cpu(
    predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor,
    retrive_index: Tensor, retrive_next_token: Tensor, retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:  # fmt: skip
    target, most = target_predict.view(-1), accept_index.shape[1]
    for b in range(len(candidates)):
        last, node, n = int(retrive_index[b, 0]), int(retrive_next_token[b, 0]), 0
        accept_index[b, 0] = last
        while node >= 0 and n + 1 < most:
            if candidates[b, node] != target[last]:
                node = int(retrive_next_sibling[b, node])
                continue
            predicts[last] = target[last]
            last, n = int(retrive_index[b, node]), n + 1
            accept_index[b, n] = last
            node = int(retrive_next_token[b, node])
        accept_token_num[b] = n
        predicts[last] = target[last]


def build_draft_decode_metadata_cpu(
    table: Tensor, request_B: Tensor, size_B: Tensor, topk: int, steps: int, width: int
) -> Tensor:
    """Of each branch of each request: its prompt, and its drafts behind that."""
    of_branches = table[request_B].repeat_interleave(topk, 0)
    for row, (b, size) in enumerate(
        (b, s) for b, s in enumerate(size_B.tolist()) for _ in range(topk)
    ):
        begin = size + row % topk * steps
        of_branches[row, size : size + steps] = table[request_B[b], begin : begin + steps]
    return of_branches


def attend(
    q_nHD: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    q, k, v = (x.movedim(0, 1)[None] for x in (q_nHD, keys, values))
    more = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **more)
    return out[0].movedim(0, 1)


def extend_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, key_cache: Tensor, value_cache: Tensor, _k: float,
    _v: float, table: Tensor, request_B: Tensor, size_B: Tensor, new_B: Tensor, begin_B: Tensor,
    most: int, scale: float, *others: Any,
) -> None:  # fmt: skip
    """New tokens see those before them, which the cache has; of a tree only their ancestors."""
    tree = others[-2]
    for b, (size, new) in enumerate(windows(size_B, new_B)):
        at, old = slice(int(begin_B[b]), int(begin_B[b]) + new), table[request_B[b], : size - new]
        keys, values = k[at].view(new, -1, q.shape[2]), v[at].view(new, -1, out.shape[2])
        if len(old):  # else they may be of another shape there
            keys = torch.cat([key_cache[old.long()], keys])
            values = torch.cat([value_cache[old.long()], values])
        seen = torch.ones(new, size, dtype=torch.bool).tril(size - new)
        if tree is not None:
            seen[:, size - new :] = tree.view(-1, new, new)[b]
        out[at] = attend(q[at], keys, values, seen, scale)


def decode_attention_cpu(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, _k: float, _v: float, out: Tensor, k: Tensor,
    v: Tensor, places: Tensor, logits: Tensor, table: Tensor, request_B: Tensor, size_B: Tensor,
    scale: float, *others: Any,
) -> None:  # fmt: skip
    """One token of each request, whose key and value are stored first."""
    key_cache[places] = k.view(-1, *key_cache.shape[1:])
    value_cache[places] = v.view(-1, *value_cache.shape[1:])
    for b, size in enumerate(size_B.tolist()):
        of = table[request_B[b], :size].long()
        out[b : b + 1] = attend(q[b : b + 1], key_cache[of], value_cache[of], None, scale)


torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu
torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu

"""A small GPT with experts, written from scratch. One line in its forward, `moe_inspect.probe`, is
all it takes to record it.

    python examples/your_own_moe.py build/own  # train for a minute, trace, report

`ROUTERS` records it without the line, if the code of a model cannot be edited:

    moe_inspect.trace_model("build/own/model.pt", "build/by-spec", loader=load, routers=ROUTERS)"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_inspect
from moe_inspect.demo import CORPUS_DIR

LAYERS, WIDTH, HEADS, EXPERTS, TOP_K, CONTEXT = 4, 64, 4, 8, 2, 128
torch.set_num_threads(1)  # so small a model is slower on several


class Bytes:
    """A tokenizer needs no more than this: one token per byte of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Experts(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        weights, ids = F.softmax(self.router(x), -1).topk(TOP_K)
        weights = weights / weights.sum(-1, keepdim=True)
        moe_inspect.probe(ids, weights, layer=self.layer, experts=EXPERTS)  # the one line
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            rows, slot = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, rows, weights[rows, slot, None] * mlp(x[rows]))
        return out


class Block(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = Experts(layer)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, S, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, S, WIDTH))
        return x + self.experts(self.norm_2(x)).view_as(x)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(block_size=CONTEXT)  # texts are split to fit
        self.tokens = nn.Embedding(Bytes.vocab_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(layer) for layer in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, Bytes.vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def choice(experts: Experts, args: tuple, kwargs: dict, output: Tensor) -> tuple[Tensor, Tensor]:
    """What the router chose, from the experts' input."""
    weights, ids = F.softmax(experts.router(args[0].flatten(0, 1)), -1).topk(TOP_K)
    return ids, weights / weights.sum(-1, keepdim=True)


ROUTERS = [moe_inspect.RouterSpec(module="blocks.*.experts", choice=choice, experts=EXPERTS)]


def load(checkpoint: str) -> tuple[GPT, Bytes]:
    """The loader that `trace_model` calls."""
    model = GPT()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model, Bytes()


def train(model: GPT, steps: int) -> float:
    """On the bundled corpus, without a balancing loss. Returns the last loss."""
    text = b"".join(file.read_bytes() for file in sorted(CORPUS_DIR.rglob("*.txt")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.zeros(())
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT - 1, (16,))
        rows = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def main(out: Path, steps: int) -> None:
    torch.manual_seed(0)
    model = GPT()
    print(f"loss {train(model, steps):.2f} after {steps} steps")
    out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), out / "model.pt")
    moe_inspect.trace_model(
        str(out / "model.pt"), out / "trace", loader=load, max_tokens=20_000, overwrite=True
    )
    balance = moe_inspect.report(out / "trace").tables["balance"]
    print(
        balance[["layer", "max_over_mean", "expected_by_chance", "dead_experts"]].to_string(
            index=False
        )
    )

    # the same without the line in the forward
    with moe_inspect.record(model, out / "by-spec", routers=ROUTERS, overwrite=True):
        model(torch.arange(CONTEXT)[None])
    with moe_inspect.record(model, out / "by-probe", overwrite=True):
        model(torch.arange(CONTEXT)[None])
    compared = moe_inspect.compare(out / "by-probe", out / "by-spec")
    print(
        compared.tables["agreement"][["layer", "decisions", "set_mismatch"]].to_string(index=False)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 300)

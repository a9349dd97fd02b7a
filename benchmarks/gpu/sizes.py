"""How large everything is that the GPU benchmark runs: on a GPU (FULL), and in a dry run (DRY)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# E, K of models there are
ROUTERS = ((8, 2), (60, 4), (64, 8), (128, 8), (256, 8), (384, 8), (512, 10))
SKEWS = ("uniform", "zipf", "one-hot")
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
}
SMALL |= {"num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2, "vocab_size": 1024}
TOY = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "head_dim": 8,
    "vocab_size": 64,
}
TOY |= {"num_experts": 8, "num_experts_per_tok": 4}


# As deep as Qwen3-30B-A3B, with all its experts, and so narrow (4.9e9 parameters) that it is made
# in seconds, and that launching a step takes the host longer than running it takes the device
DEEP = {
    "hidden_size": 1024,
    "moe_intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 48,
    "vocab_size": 32000,
}


@dataclass(frozen=True)
class Sizes:
    copy_bytes: int
    T: tuple[int, ...]
    routers: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]
    repeats: int
    dispatches: tuple[tuple[int, int, int], ...]  # T, E, K
    combines: tuple[tuple[int, int, int, int], ...]  # T, E, K, H
    calls: int  # in a graph
    samples: int  # of a timing
    families: tuple[str, ...]
    width: dict[str, Any]  # in place of a family's
    deep: dict[str, Any]  # in place of Qwen3-MoE's, where 48 layers decode
    decode_steps: int  # there, timed per round
    prefill: tuple[int, int]  # B, positions
    decode: tuple[int, ...]  # B
    few: tuple[int, ...]  # B of the sweep of FEW_SLOTS
    cache: int  # positions
    rounds: tuple[int, int]  # at least, at most
    steps: int  # to warm a rival up, and the least of a turn
    turn_s: float  # of a rival in a round
    # B, positions where recorded rows are checked: many slots, and few
    batches: tuple[tuple[int, int], ...]
    ring_tokens: int  # there: a ring so large that a copy of it shows
    engine: tuple[tuple[int, int, int, int, int], ...]  # T of a graph, of them real, E, K, routers
    # B, positions, and the seconds that the writer sleeps per batch
    throttled: tuple[int, int, float]


FULL = Sizes(
    copy_bytes=2**30,
    T=(1, 8, 64, 512, 4096, 8192, 16384),
    routers=ROUTERS,
    blocks=(256, 512, 1024),
    repeats=20,
    dispatches=(
        (1, 64, 8),
        (64, 64, 8),
        (512, 60, 4),
        (8192, 8, 2),
        (8192, 64, 8),
        (8192, 128, 8),
        (16384, 256, 8),
        (16384, 512, 10),
    ),
    combines=((64, 64, 8, 2048), (8192, 8, 2, 4096), (8192, 64, 8, 2048), (16384, 128, 8, 2048)),
    calls=50,
    samples=15,
    families=("Mixtral", "Qwen3-MoE", "OLMoE"),
    width={"vocab_size": 32000},
    deep=DEEP,
    decode_steps=20,
    prefill=(8, 2048),
    decode=(1, 8, 64),
    few=(1, 2, 4, 8, 16, 32, 64, 128),
    cache=512,
    rounds=(3, 9),
    steps=3,
    turn_s=0.3,
    batches=((4, 100), (2, 4)),
    ring_tokens=6_000_000,
    engine=((64, 50, 128, 8, 48), (512, 500, 128, 8, 48), (8192, 8000, 256, 8, 58)),
    throttled=(8, 512, 0.2),
)
DRY = Sizes(
    copy_bytes=2**16,
    T=(1, 140),
    routers=((8, 2),),
    blocks=(256,),
    repeats=2,
    dispatches=((64, 64, 8), (140, 8, 2)),
    combines=((4, 8, 2, 40),),
    calls=1,
    samples=1,
    families=("OLMoE",),
    width={**TOY, "num_hidden_layers": 1},
    deep={**TOY, "num_hidden_layers": 2},
    decode_steps=1,
    prefill=(2, 8),
    decode=(1,),
    few=(1, 2),
    cache=32,
    rounds=(1, 1),
    steps=1,
    turn_s=0.0,
    batches=((2, 20),),
    ring_tokens=64,
    engine=((24, 19, 8, 2, 2),),
    throttled=(2, 16, 0.1),
)

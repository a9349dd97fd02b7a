"""The truth about a forward pass, taken from what the experts were called with: their rows are
matched, by their bits, to the hidden vectors that the MoE block was called with.

B batch rows, S positions, T = B·S tokens (token b·S + s), D hidden size, R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import moe_inspect
from moe_inspect.public import Trace
from moe_inspect.training import LossAudit

# of a small model, by the names of transformers' configs
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
}
WEIGHT_ERROR = 2**-10  # relative: a trace keeps gate weights as fp16 does


@dataclass
class Block:
    """One MoE block in one forward pass. `rows`: expert, the rows it was called with [R, D], their
    gate weights [R] where the framework hands them to its experts."""

    hidden_TD: Tensor | None = None
    output_TD: Tensor | None = None
    shared_TD: Tensor | None = None  # what shared experts have added to the output
    rows: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)

    def hidden(self) -> Tensor:
        assert self.hidden_TD is not None, "the block was not called"
        return self.hidden_TD

    def chosen(self) -> list[dict[int, float]]:
        """Of each token: expert → gate weight (NaN where unknown)."""
        token_of = {bits(row): t for t, row in enumerate(self.hidden())}
        assert len(token_of) == len(self.hidden()), "two tokens with the same hidden vector"
        found: list[dict[int, float]] = [{} for _ in token_of]
        for expert, rows_RD, weights_R in self.rows:
            for r, row in enumerate(rows_RD):
                token = token_of.get(bits(row))
                if token is None:
                    assert not row.any(), "an expert was given a row of no token"
                    continue  # fills an expert up to its capacity
                assert expert not in found[token], "an expert was given a token twice"
                weight = float("nan") if weights_R is None else float(weights_R[r])
                if weight != 0:  # a row of weight 0 fills an expert up to its capacity
                    found[token][expert] = weight
        return found


def uneven(model: nn.Module, times: float = 20) -> nn.Module:
    """The model with larger router weights, as new ones are so small that every load is even."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter *= times
    return model


def by_layer(model: nn.Module, kind: type[nn.Module] | str) -> dict[int, Any]:
    """Layer → module of this class (or name of a class): the first number in its path."""
    is_one = lambda m: type(m).__name__ == kind if isinstance(kind, str) else isinstance(m, kind)  # noqa: E731
    paths = {path: m for path, m in model.named_modules() if is_one(m)}
    return {int(next(filter(str.isdigit, path.split(".")))): m for path, m in paths.items()}


def token_ids(seed: int = 7, most: int = 512, least: int = 0, B: int = 3, S: int = 16) -> Tensor:
    return torch.randint(least, most, (B, S), generator=torch.Generator().manual_seed(seed))


def recorded(
    model: Any, watched: Watch, path: Path, call: Callable[[], Any], steps: int = 0, **options: Any
) -> Trace:
    """The trace of a forward pass, or of training steps, where `call` returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with moe_inspect.record(model, path, **options), torch.set_grad_enabled(steps > 0):
        for step in range(max(steps, 1)):
            with watched.forward():
                loss = call()
            if steps:
                loss.backward()
            if step + 1 < steps:  # an expert is computed again with the weights of the last pass
                optimizer.step()
    return moe_inspect.open_trace(path)


def assert_listed(
    trace: Trace,
    layers: list[int],
    top_k: int,
    scoring: str,
    shared: int | None = 1,
    experts: int = 8,
) -> None:
    """What the trace says of its routers."""
    assert [r.layer for r in trace.routers] == layers
    for r in trace.routers:
        assert (r.experts, r.top_k, r.scoring) == (experts, top_k, scoring)
        assert shared is None or r.shared_experts == shared


def chosen_in(trace: Trace, layer: int, tokens: Any = None) -> Tensor:
    """int64 [T, K]: the experts of each token."""
    rows = trace.routing(layers=layer).set_index("token").filter(regex="^expert_")
    rows = rows if tokens is None else rows.loc[tokens]
    return torch.tensor(rows.to_numpy().astype("int64"))


def counted(trace: Trace, layer: int, experts: int = 8, tokens: Any = None) -> Tensor:
    """Load of each expert of a layer."""
    return torch.bincount(chosen_in(trace, layer, tokens).flatten(), minlength=experts)


def text(audit: LossAudit, kind: str) -> str:
    return " ".join(f.text for f in audit.findings if f.kind == kind)


def bits(row: Tensor) -> bytes:
    """By which a row is known again."""
    return row.contiguous().view(torch.uint8).numpy().tobytes()


Pass = dict[int, Block]  # by layer


class Watch:
    """Hooks that keep what blocks and experts are called with inside `forward()`, and nothing in a
    recomputation."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self._is_open = False

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One forward pass."""
        self.passes.append({})
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def at(self, layer: int) -> Block | None:
        """The block of this layer in the current forward pass; None outside of one."""
        return self.passes[-1].setdefault(layer, Block()) if self._is_open else None

    def block(self, module: nn.Module, layer: int, sequence_first: bool = False) -> None:
        """Keeps input and output of an MoE block: [B, S, D], [S, B, D] or [T, D]."""

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if (block := self.at(layer)) is not None:
                hidden = args[0] if args else next(iter(kwargs.values()))
                block.hidden_TD = _rows(hidden, sequence_first)
                if block.output_TD is None:
                    block.output_TD = _rows(output, sequence_first)

        module.register_forward_hook(after, with_kwargs=True)

    def routed(self, module: nn.Module, layer: int) -> None:
        """Keeps the output of a module inside the block: the weighted sum of the experts."""
        module.register_forward_hook(partial(self._keep, "output_TD", layer))

    def shared(self, module: nn.Module, layer: int) -> None:
        """Keeps what shared experts add to the output of the block."""
        module.register_forward_hook(partial(self._keep, "shared_TD", layer))

    def _keep(self, name: str, layer: int, _: nn.Module, args: object, output: Any) -> None:
        if (block := self.at(layer)) is not None:
            setattr(block, name, _rows(output))

    def experts(self, modules: Sequence[nn.Module], layer: int, first: int = 0) -> None:
        """Keeps what each of these experts is called with: rows, and gate weights if there is a
        second tensor. `first`: the id of the first one."""

        def before(expert: int, args: tuple[Any, ...]) -> None:
            if (block := self.at(layer)) is not None:
                rows_RD = args[0].detach().clone().reshape(-1, args[0].shape[-1])
                weights_R = args[1].detach().clone() if len(args) > 1 else None
                block.rows.append((expert, rows_RD, weights_R))

        for e, module in enumerate(modules, start=first):
            module.register_forward_pre_hook(lambda _, args, e=e: before(e, args))

    def grouped(self, layer: int, rows_RD: Tensor, counts_E: Tensor, first: int = 0) -> None:
        """Keeps rows that are sorted by expert, `counts_E` of each; what is beyond is padding."""
        if (block := self.at(layer)) is not None:
            counts = [int(n) for n in counts_E]
            parts = _local(rows_RD).detach().clone()[: sum(counts)].split(counts)
            block.rows += [(e, part, None) for e, part in enumerate(parts, start=first)]


def _rows(output: Any, sequence_first: bool = False) -> Tensor:
    tensor = _local(output[0] if isinstance(output, tuple) else output)
    if sequence_first:
        tensor = tensor.transpose(0, 1)
    return tensor.detach().clone().reshape(-1, tensor.shape[-1])


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def assert_chosen_by_logits(trace: Trace) -> None:
    """The experts of each decision are those of its largest router logits."""
    for router in trace.routers:
        logits_TE = np.stack(trace.logits(layers=router.layer)["logits"].to_list()).astype(float)
        ids_TK = trace.routing(layers=router.layer).filter(regex="^expert_").to_numpy().astype(int)
        lowest_T = np.take_along_axis(logits_TE, ids_TK, 1).min(1)
        np.put_along_axis(logits_TE, ids_TK, -np.inf, 1)
        assert (lowest_T >= logits_TE.max(1) - 1e-3).all()  # a trace has them in float16
        assert (lowest_T > logits_TE.max(1)).mean() > 0.9


@dataclass
class Compared:
    """Decisions of a trace that are equal to the truth, of how many, and the largest relative error
    of a gate weight (NaN where the experts are not told)."""

    equal: int = 0
    total: int = 0
    weight_error: float = float("nan")

    def __add__(self, other: Compared) -> Compared:
        errors = [e for e in (self.weight_error, other.weight_error) if e == e]
        return Compared(
            self.equal + other.equal, self.total + other.total, max(errors, default=float("nan"))
        )


Run = Callable[[int, int, Tensor], Tensor]  # layer, expert, rows [R, D] → its output [R, D]


def compare(
    trace: Trace,
    passes: Sequence[Mapping[int, Block]],
    ids_BS: Tensor,
    *,
    positions_BS: Tensor | None = None,
    real_BS: Tensor | None = None,
    run: Run | None = None,
) -> Compared:
    """Compares a trace of these forward passes, each of the tokens `ids_BS`, with what the experts
    were given: experts, gate weights, token ids and positions. `real_BS`: False for padding.
    `run`: computes an expert, where experts are not given their gate weights: those of the trace
    must then give the output of the block (without that of shared experts)."""
    B, S = ids_BS.shape
    if positions_BS is None:
        positions_BS = torch.arange(S).expand(B, S)
    real_T = torch.ones(B * S, dtype=torch.bool) if real_BS is None else real_BS.flatten()
    tokens = trace.tokens().sort_values(["sequence", "position"])
    assert sorted(tokens.batch.unique()) == list(range(len(passes)))
    assert moe_inspect.check(trace.path, quick=True).ok
    found = Compared()
    for number, blocks in enumerate(passes):
        of_pass = tokens[tokens.batch == number]
        assert of_pass.token_id.tolist() == ids_BS.flatten()[real_T].tolist()
        assert of_pass.position.tolist() == positions_BS.flatten()[real_T].tolist()
        assert {router.layer for router in trace.routers} == set(blocks)
        for layer, block in blocks.items():
            rows = trace.routing(layers=layer).set_index("token").loc[of_pass.token]
            ids_TK, weights_TK = (
                torch.tensor(rows.filter(regex=f"^{name}_").astype(float).to_numpy())
                for name in ("expert", "weight")
            )
            found += _compare_block(block, real_T, ids_TK, weights_TK)
            if run is not None:
                error = _output_error(block, layer, real_T, ids_TK, weights_TK, run)
                found += Compared(weight_error=error)
    return found


def _compare_block(block: Block, real_T: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Compared:
    found = Compared()
    truth = [chosen for chosen, real in zip(block.chosen(), real_T, strict=True) if real]
    for chosen, ids_K, weights_K in zip(truth, ids_TK, weights_TK, strict=True):
        slots = {int(e): float(w) for e, w in zip(ids_K, weights_K, strict=True) if e == e}
        errors = [abs(w - chosen[e]) / chosen[e] for e, w in slots.items() if e in chosen]
        found += Compared(slots.keys() == chosen.keys(), 1, max(errors, default=float("nan")))
    return found


@torch.no_grad()
def _output_error(
    block: Block, layer: int, real_T: Tensor, ids_TK: Tensor, weights_TK: Tensor, run: Run
) -> float:
    """Largest error of the block's output [T, D] as the trace gives it, relative to its largest
    value."""
    assert block.output_TD is not None
    hidden_TD, output_TD = block.hidden()[real_T], block.output_TD[real_T].double()
    if block.shared_TD is not None:
        output_TD -= block.shared_TD[real_T].double()
    made_TD = torch.zeros_like(output_TD)
    for expert in ids_TK[~ids_TK.isnan()].unique().int().tolist():
        weight_T = (weights_TK.nan_to_num() * (ids_TK == expert)).sum(1)
        made_TD += weight_T[:, None] * run(layer, expert, hidden_TD).double()
    return float((made_TD - output_TD).abs().max() / output_TD.abs().max())

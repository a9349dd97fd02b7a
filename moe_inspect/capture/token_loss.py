"""The loss of predicting each token's successor, and the entropy of that prediction, computed in
the forward passes that are recorded: which token follows each row, in the same pass or first in the
next one; and the logits that the model's own code makes of its last hidden states.

B batch rows, S positions, T = B·S rows of a pass, N rows that a token follows, C of them at a time,
H hidden, V vocabulary, X values of `schema.LOSS`. −1 stands for no row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.inputs.arguments import cache_among, host_copy
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, is_of_transformers
from moe_inspect.model.wrapped import is_compiled
from moe_inspect.text import print_stderr
from moe_inspect.trace.schema import LOSS


def next_tokens(fed: Rows | CallInputs) -> np.ndarray:
    """int64 [T]: the token that follows in the same pass. A sequence ends where `PassInputs` has
    another begin: with the batch row, with padding, where a position is not the one before + 1."""
    next_T = np.full(fed.T, -1, np.int64)
    if isinstance(fed, Rows):
        row = np.flatnonzero(fed.real)
        same = fed.sequence[1:] == fed.sequence[:-1]
        next_T[row[:-1][same]] = fed.token_id[1:][same]
        return next_T
    token_BS, real_BS, position_BS = _tokens(fed), fed.real_BS(), fed.position_BS()
    follows_BS = real_BS[:, 1:] & real_BS[:, :-1]
    follows_BS &= position_BS[:, 1:] == position_BS[:, :-1] + 1
    if (keys := fed.keys.of_tokens) is not None:
        before_BS, key_BS = keys.numpy()
        follows_BS &= before_BS[:, 1:] == key_BS[:, :-1]
    next_T.reshape(token_BS.shape)[:, :-1][follows_BS] = token_BS[:, 1:][follows_BS]
    return next_T


def first_tokens(before: Rows | CallInputs, fed: Rows | CallInputs, B: int) -> np.ndarray:
    """int64 [B]: the token of the pass `fed` that follows the last position of each batch row of
    the pass `before`."""
    next_B = np.full(B, -1, np.int64)
    if isinstance(before, Rows) and isinstance(fed, Rows):
        if not len(fed.token_id):
            return next_B
        last_B = before.real.reshape(B, -1)[:, -1]
        at_B = (np.cumsum(before.real).reshape(B, -1)[:, -1] - 1)[last_B]
        sequences, first = np.unique(fed.sequence, return_index=True)
        found = np.searchsorted(sequences, before.sequence[at_B]).clip(max=len(sequences) - 1)
        same = (sequences[found] == before.sequence[at_B]) & (
            fed.position[first[found]] == before.position[at_B] + 1
        )
        next_B[np.flatnonzero(last_B)[same]] = fed.token_id[first[found][same]]
    elif isinstance(before, CallInputs) and isinstance(fed, CallInputs):
        joins = fed.after.length - fed.S == before.after.length
        if fed.before is before.after and joins and fed.B == before.B == B and fed.S:
            token_BS = _tokens(fed)
            follows_B = fed.real_BS()[:, 0] & before.real_BS()[:, -1]
            next_B[follows_B] = token_BS[:, 0][follows_B]
    return next_B


def _tokens(call: CallInputs) -> np.ndarray:
    """[B, S], −1 where unknown, once all of the call has been copied to the host, which is before
    its own forward pass begins."""
    call.wait()
    return call.token_BS.numpy() if call.token_BS is not None else np.full((call.B, call.S), -1)


class CachePlaces:
    """Where the batch rows of a key-value cache went between passes: watches the `reorder_cache` of
    one cache at a time, which transformers calls."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._from_B: np.ndarray | None = None  # the place that each row had

    def watch(self, cache: Any) -> None:
        """From now on."""
        self._from_B = None
        if cache is self._cache:
            return
        self.release()
        if hasattr(cache, "reorder_cache"):
            self._cache, stock = cache, cache.reorder_cache

            def reordered(beam_idx: Any, *args: Any, **kwargs: Any) -> Any:
                from_B = beam_idx.cpu().numpy()
                self._from_B = from_B if self._from_B is None else self._from_B[from_B]
                return stock(beam_idx, *args, **kwargs)

            cache.reorder_cache = reordered

    def kept(self, B: int) -> np.ndarray:
        """bool [B]: the rows that are where they were."""
        if self._from_B is None:
            return np.ones(B, bool)
        return np.arange(B) == self._from_B if len(self._from_B) == B else np.zeros(B, bool)

    def release(self) -> None:
        if self._cache is not None:
            vars(self._cache).pop("reorder_cache", None)
        self._cache = self._from_B = None


# of the largest |logit|: by how much logits of the same hidden states may differ in bfloat16
TOLERANCE = 2**-5


def logits_in(output: Any) -> Tensor | None:
    """Logits [B, S, V] in a model's output: a tensor, `logits`, or the first of several outputs;
    None where there are none."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


class Head:
    """The part of a transformers model after its body: the forward of a copy that shares all
    weights, and whose body returns what it is given. So all that the model does to its logits is
    done to these. `body`: the name of the body among the model's children."""

    def __init__(self, model: Any, body: str):
        self.body = model.get_submodule(body)
        self._given = _Given(self.body)
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, body: self._given}
        takes = inspect.signature(type(model).forward).parameters
        unneeded = {"use_cache", "output_router_logits"} & takes.keys()
        self._options = dict.fromkeys(unneeded, False)
        self.checked = False
        self._kept: Any = None  # the body's output in this forward pass
        self._hook: Any = None

    def watch(self) -> None:
        """Keeps the body's output in the forward pass that begins."""
        self.release()
        self._hook = self.body.register_forward_hook(self._keep)

    def release(self) -> None:
        """Ends the watching of a forward pass."""
        if self._hook is not None:
            self._hook.remove()
        self._kept = self._hook = None

    def _keep(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self.body:  # and not a copy of it
            self._kept = output

    @property
    def hidden(self) -> Tensor | None:
        """The last hidden states [B, S, H] of this forward pass."""
        if self._kept is None:
            return None
        return (self._kept if isinstance(self._kept, Tensor) else self._kept[0]).detach()

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """[C, V], of hidden states in the forward pass that `watch` saw."""
        hidden, kind = hidden_CH[None], type(self._kept)
        if isinstance(self._kept, Tensor):
            self._given.returned = hidden
        else:
            self._given.returned = (hidden,) if kind is tuple else kind(last_hidden_state=hidden)
        unknown = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        output = type(self._model).forward(self._model, input_ids=unknown, **self._options)
        return cast(Tensor, logits_in(output))[0]

    def agrees(self, hidden: Tensor, logits_BV: Tensor) -> bool:
        """Whether it gives these logits of the last position of each row."""
        own_BV = self.logits(hidden[:, -1])
        if own_BV.shape != logits_BV.shape:
            return False
        most = logits_BV.abs().max().float()
        return bool((own_BV - logits_BV).abs().max().float() <= TOLERANCE * most)


class _Given(torch.nn.Module):
    """In the body's place: returns what it is given, and otherwise is the body."""

    returned: Any = None

    def __init__(self, body: torch.nn.Module):
        super().__init__()
        object.__setattr__(self, "body", body)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["body"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned


def head_of(model: Any) -> Head | None:
    """None where the body is no direct part of the model."""
    children, base = dict(model.named_children()), getattr(model, "base_model", None)
    named = "model" if hasattr(model, "get_output_embeddings") else ""
    body = next((name for name, module in children.items() if module is base), named)
    return Head(model, body) if body in children and len(children) > 1 else None


CHUNK_LOGITS = 2**25  # float32 values that are held at a time: 128 MiB
NO_CHANCE = -1e4  # of which the exponential is 0
# their logits are not of the token that follows
OTHER_TASKS = ("ForTokenClassification", "ForBlockDiffusion")


class PassLosses:
    """Those of one forward pass of T rows, on their way to the host. `complete`: no later pass adds
    any."""

    def __init__(self, T: int, complete: bool = False):
        self.T, self.complete = T, complete
        self._parts: list[tuple[np.ndarray, Tensor, Any]] = []

    def add(self, rows_N: np.ndarray, values_XN: Tensor) -> None:
        """Losses and entropies of these rows."""
        values, copied = host_copy(values_XN), None
        if values_XN.is_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(values_XN.device))
        self._parts.append((rows_N, values, copied))

    def values(self) -> np.ndarray:
        """Losses and entropies in nats, float32 [X, T], NaN where no token follows."""
        values_XT = np.full((len(LOSS), self.T), np.nan, np.float32)
        for rows_N, values, copied in self._parts:
            if copied is not None:
                copied.synchronize()
            values_XT[:, rows_N] = values.numpy()
        return values_XT


class Held(NamedTuple):
    """What the next forward pass may continue: the logits [B, V] of each row's last position."""

    fed: Rows | CallInputs
    logits_BV: Tensor
    losses: PassLosses


class TokenLosses:
    """Follows the forward passes of a recording. A model that returns the logits of all positions
    holds them anyway: these are used, and so are those of the last few that were asked for. The
    others its own head makes from the last hidden states, a chunk of tokens at a time.

    Where a pass has a key-value cache, what follows its last position is the first token of the
    next pass that has the same cache: `pass_losses` of it are complete by then. A row of it that
    another row goes on with (beam search) has none."""

    def __init__(self, outer: Any, model: Any, sites: Sequence[Site]):
        """`outer`: the model as it is called; `model`: the one with the routers, at `sites`, in
        it. MoeInspectError where its logits are not of the token that follows, or cannot be told
        apart by token."""
        name = type(model).__name__
        if is_of_transformers(model) and name.endswith(OTHER_TASKS):
            raise MoeInspectError(f"{name} does not predict the next token: it has no token losses")
        if any(site.order != "bs" or site.rows is not None for site in sites):
            raise MoeInspectError(
                f"the routers of {name} see their rows in a different order than its logits: "
                "record it without token losses"
            )
        self._model = model
        self.head = None if is_compiled(outer) else head_of(model)
        self._fed: Rows | CallInputs | None = None
        self._current: PassLosses | None = None
        self._held: Held | None = None
        self._places, self._told = CachePlaces(), False

    def begin(self) -> None:
        """A forward pass begins; the one before it may have failed."""
        self._fed = self._current = None
        if self.head is not None:
            self.head.watch()

    def feed(self, fed: Rows | CallInputs) -> None:
        """The model, or one stack of an encoder-decoder, is fed this."""
        self._close(fed)
        if fed.stack != "encoder":
            self._fed = fed

    def close(self) -> None:
        """No pass follows."""
        self._close(None)
        self._places.release()
        if self.head is not None:
            self.head.release()

    def take(self, T: int) -> PassLosses:
        """Those of the forward pass of T rows that ends; it has none where it fed the encoder
        alone."""
        losses, self._current = self._current, None
        return losses or PassLosses(T, complete=True)

    @torch.no_grad()
    def returned(self, output: Any) -> None:
        """The model's output in the forward pass that began."""
        fed, self._fed = self._fed, None
        if fed is None:
            return
        if (logits := logits_in(output)) is None:
            raise MoeInspectError(
                f"{type(self._model).__name__} returned no logits [rows, positions, vocabulary]: "
                "record it without token losses"
            )
        logits = logits.detach()
        losses = self._current = PassLosses(fed.T)
        if fed.T:
            self._within(fed, logits, losses)
        cache = None
        if isinstance(fed, CallInputs) and not isinstance(output, Tensor):
            cache = cache_among(output.values() if isinstance(output, Mapping) else output)
        if fed.T and (cache is not None or (isinstance(fed, Rows) and fed.group is not None)):
            # another pass may feed what follows
            self._places.watch(cache)
            last_BV = logits[:, -1]
            # (not a view of the logits of all positions)
            self._held = Held(fed, last_BV if logits.shape[1] == 1 else last_BV.clone(), losses)
        else:
            losses.complete = True
        if self.head is not None:
            self.head.release()

    def _within(self, fed: Rows | CallInputs, logits: Tensor, losses: PassLosses) -> None:
        """Of the rows that are followed by another of the same pass."""
        next_T = next_tokens(fed)
        rows_N = np.flatnonzero(next_T >= 0)
        if not len(rows_N):
            return
        B, S, V = logits.shape
        P, asked = fed.T // B, fed.asked if isinstance(fed, CallInputs) else 0
        # positions of a row without logits; P where it is not known that theirs are the last S
        before = P - S if B * S == fed.T or asked == S else P
        made_N, C = rows_N % P >= before, max(1, CHUNK_LOGITS // V)
        for made, of_N in ((True, rows_N[made_N]), (False, rows_N[~made_N])):
            if not len(of_N):
                continue
            of_rows = logits.reshape(-1, V).__getitem__ if made else self._by_head(fed, logits)
            at_N = of_N - (of_N // P + 1) * before if made else of_N
            on_device = (torch.from_numpy(n).to(logits.device) for n in (at_N, next_T[of_N]))
            chunks = zip(*(n.split(C) for n in on_device), strict=True)
            losses.add(of_N, torch.cat([nats(of_rows(at_C), next_C) for at_C, next_C in chunks], 1))

    def _by_head(self, fed: Rows | CallInputs, logits: Tensor) -> Callable[[Tensor], Tensor]:
        """Logits [C, V] of these rows, for a model that returned fewer."""
        head, (B, S, _) = self.head, logits.shape
        hidden = head.hidden if head is not None else None
        if head is None or hidden is None or hidden.shape[0] * hidden.shape[1] != fed.T:
            raise MoeInspectError(
                f"{type(self._model).__name__} returned logits of {B * S} positions in a forward "
                f"pass of {fed.T}: call it without logits_to_keep, or record without token losses"
            )
        if not head.checked and not head.agrees(hidden, logits[:, -1]):
            raise MoeInspectError(
                f"the logits of {type(self._model).__name__} are not those of its last hidden "
                "states alone: call it without logits_to_keep, or record without token losses"
            )
        head.checked = True
        hidden_TH = hidden.flatten(0, 1)
        return lambda at_C: head.logits(hidden_TH[at_C.to(hidden_TH.device)])

    def _close(self, fed: Rows | CallInputs | None) -> None:
        """Completes the pass that was held. `fed`: what comes next."""
        held, self._held = self._held, None
        if held is None:
            return
        B = len(held.logits_BV)
        next_B = first_tokens(held.fed, fed, B) if fed is not None else np.full(B, -1)
        kept_B = self._places.kept(B)
        if fed is not None and not kept_B.all() and not self._told:
            self._told = True
            print_stderr(
                "the rows of a forward pass changed places (beam search): a token continued by "
                "another row has no loss"
            )
        rows_N = np.flatnonzero((next_B >= 0) & kept_B)
        if len(rows_N):
            with torch.no_grad():
                device, S = held.logits_BV.device, held.losses.T // B
                at_N = torch.from_numpy(rows_N).to(device)
                next_N = torch.from_numpy(next_B[rows_N]).to(device)
                values_XN = nats(held.logits_BV[at_N], next_N)
            held.losses.add(rows_N * S + S - 1, values_XN)
        held.losses.complete = True


def nats(logits_CV: Tensor, next_C: Tensor) -> Tensor:
    """float32 [X, C]: the negative log-probability of the token that follows, the entropy
    of the prediction …, at temperature 1."""
    most_C1 = logits_CV.amax(1, keepdim=True).float()
    below_CV = logits_CV.float() - most_C1
    loss_C = -below_CV.gather(1, next_C.to(logits_CV.device)[:, None])[:, 0]
    # (−∞ times a probability of 0 would be no number)
    below_CV.clamp_(min=NO_CHANCE)
    share_CV = below_CV.exp()
    sum_C = share_CV.sum(1)
    mean_C = torch.linalg.vecdot(share_CV, below_CV) / sum_C
    values = {
        "loss_nats": loss_C + sum_C.log(),
        "entropy_nats": sum_C.log() - mean_C,
    }
    return torch.stack([values[name] for name in LOSS])

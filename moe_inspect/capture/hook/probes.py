"""`moe_inspect.probe`, a line in a model's own forward that shows a router's choice; probes as the
routers of a recorder; and routers found by what they do: the calls of `torch.topk`.

T tokens of a forward pass, S positions, K slots, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from moe_inspect.capture.hook.stack import Scope, Sinks
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.choice import ChoiceReader, is_sequence_first
from moe_inspect.model.find import NUMBER, lists_in_blocks, states_experts
from moe_inspect.model.routers import Site, layer_of, layer_path
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    from moe_inspect.model.choices import Args

# (layer, ids, weights, E or None, logits or None, dropped or None), of each recorder that is open
Seen = Callable[[int, Tensor, Tensor, "int | None", "Tensor | None", "Tensor | None"], None]
_recorders: list[Seen] = []


def probe(
    ids: Tensor,
    weights: Tensor,
    *,
    layer: int,
    experts: int | None = None,
    logits: Tensor | None = None,
    dropped: Tensor | None = None,
) -> None:
    """Shows the choice of one router to an open recorder. Does nothing while there is none, and
    breaks no graph of torch.compile.

        weights, ids = scores.topk(2)
        moe_inspect.probe(ids, weights, layer=self.layer, experts=8)

    ids      expert ids, int [..., K], rows batch-first; -1 in a slot that went to no expert
    weights  gate weights, float, of the same shape
    layer    block index
    experts  E, the number of experts; may be left out where there are `logits`
    logits   router logits, float [..., E], recorded with `logits=True`
    dropped  bool, of the shape of ids: chosen, but dropped by the capacity of the expert. The slot
             is empty then, as one of -1 is, and the trace says that its empty slots are drops, and
             of which expert. To be shown from the first pass on

    Raises MoeInspectError for shapes or dtypes that are not a choice, and for a layer that the
    first forward pass did not show."""
    for seen in _recorders:
        seen(layer, ids, weights, experts, logits, dropped)


def listen(seen: Seen) -> Callable[[], None]:
    """Passes the probes to `seen` until the function returned is called."""
    _recorders.append(seen)
    return lambda: _recorders.remove(seen)


class Probes:
    """The probes in a model's forward as the routers of a recorder, while one of `scopes` is open.
    `add`: makes the sinks of a new router; None where a recorder knows them without probes.
    `layers`: to be recorded; None: all. `need_logits`: each must show logits that are recorded."""

    def __init__(
        self,
        scopes: Mapping[str, Scope],
        add: Callable[[Site], Sinks] | None,
        model: Module,
        layers: Sequence[int] | None,
        need_logits: bool = True,
    ):
        self.need_logits = need_logits
        self.scopes, self.add, self.model, self.layers = list(scopes.values()), add, model, layers
        # by layer; None: not recorded
        self.sinks: dict[int, tuple[ChoiceReader, Sinks] | None] = {}
        self._checked = add is None or layers is None

    def __call__(
        self,
        layer: int,
        ids: Tensor,
        weights: Tensor,
        experts: int | None,
        logits: Tensor | None,
        dropped: Tensor | None = None,
    ) -> None:
        if not any(scope.open for scope in self.scopes):
            return
        # another model may run in another thread meanwhile
        if not torch.compiler.is_compiling() and self.scopes[0].thread != get_ident():
            return
        if layer not in self.sinks:
            self.sinks[layer] = self._new(layer, experts, logits, dropped is not None)
        if (found := self.sinks[layer]) is None:
            return
        reader, sinks = found
        if experts is not None and experts != reader.experts:
            raise MoeInspectError(
                f"{reader.path} was called with experts={experts} and with {reader.experts}"
            )
        sinks[""].record(*reader.choice((ids, weights), dropped))
        if "logits" not in sinks:
            return
        if logits is not None:
            sinks["logits"].record(None, reader.logits(logits))
        elif self.need_logits:
            what = f"{reader.path} shows no router logits"
            raise MoeInspectError(f"{what}: give it logits=, or record without logits=True")

    def check_layers(self) -> None:
        """MoeInspectError where the first pass has shown no probe in a layer to be recorded."""
        if self._checked or not self.sinks:
            return
        self._checked = True
        if missing := sorted(set(self.layers or ()) - set(self.sinks)):
            called = ", ".join(map(str, sorted(self.sinks)))
            raise MoeInspectError(
                f"no probe in layer {missing[0]}: those called have the layers {called}"
            )

    def _new(
        self, layer: int, experts: int | None, logits: Tensor | None, drops: bool
    ) -> tuple[ChoiceReader, Sinks] | None:
        name = f"probe(layer={layer})"
        if self.add is None:
            raise MoeInspectError(
                f"{name} was called in {type(self.model).__name__}, whose routers record finds "
                "without it: remove it, or give routers=[] to record the probes alone"
            )
        if not isinstance(layer, Integral) or layer < 0:
            raise MoeInspectError(f"{name}: the layer is a number of 0 or more")
        if self.layers is not None and layer not in self.layers:
            return None
        experts = logits.shape[-1] if experts is None and logits is not None else experts
        if experts is None:
            raise MoeInspectError(
                f"{name} does not say how many experts there are: give it experts= or logits="
            )
        if not isinstance(experts, Integral) or experts < 1:
            raise MoeInspectError(f"{name} has experts={experts!r}: give it a number of 1 or more")
        reader = ChoiceReader(name, int(experts), None, "give it ids", drops=drops)
        reader.below = (1 + (drops and experts < 2**15)) * int(experts)
        site = Site(self.model, name, int(layer), int(experts), "", 0, told=reader)
        return reader, self.add(site)


UNSEEN = (
    "what the model drops from the choice later (by capacity, a threshold or a slice) is seen only "
    "where a list of modules, one per expert, is given other rows than were chosen"
)
NOT_THE_MODELS = (str(Path(torch.__file__).parent), __file__)  # files of code
# for the manifest
NOTE = (
    "weights are what torch.topk chose by, which the router may scale before it uses them; rows "
    f"were taken for batch-first; {UNSEEN}"
)


class TopkCall(NamedTuple):
    """A call of topk over E values, in a module's forward, at a line of a file."""

    path: str
    layer: int
    E: int
    ids: Tensor
    values: Tensor
    line: str

    @property
    def K(self) -> int:
        return self.ids.shape[-1]


class Discovery(TorchFunctionMode):
    """Shows `probes` the choices of topk in a model's forward. Of several calls in the forward of
    one module, that over the most values counts: grouped routers choose groups first. A layer that
    has a probe already is left to it.

    MoeInspectError for what cannot be told: several such calls, two modules in a layer, values that
    nothing there has as many experts as; and where the experts of a list were given other rows than
    were chosen."""

    def __init__(self, model: Module, probes: Probes):
        super().__init__()
        self.model, self.probes = model, probes
        self._path_of = {module: path for path, module in model.named_modules()}
        self._lists = lists_in_blocks(model)
        # the list and the index of each module in one
        self._place_of = {
            module: (path, e)
            for path, modules in self._lists.items()
            for e, module in enumerate(modules)
        }
        # in the current pass: path of a list → for each module, rows given and rows that are not 0
        self._given: dict[str, list[tuple[int, int]]] = {}
        self._found: list[TopkCall] = []
        self._slots: dict[int, int] = {}  # by `id` of ids found, the slots in slices of them
        self._sequence_first: dict[str, bool] = {}  # modules that are given [S, B, D]: True
        self._probed: set[int] = set()  # layers with a probe of the model's own
        self._told = False
        self._watching = ExitStack()

    def begin(self) -> None:
        """A forward pass begins."""
        self._watching.close()
        self._found, self._slots = [], {}
        self._given = {path: [(0, 0)] * len(modules) for path, modules in self._lists.items()}
        self._watching.enter_context(self)
        self._watching.callback(register_module_forward_pre_hook(self._count).remove)

    def close(self) -> None:
        """It is over, or has failed."""
        self._watching.close()

    def end(self) -> None:
        """The model's forward has returned."""
        self._watching.close()
        calls: dict[str, list[TopkCall]] = {}
        for found in self._found:
            if found.layer not in self._probed:
                calls.setdefault(found.path, []).append(found)
        chosen, self._found = [self._widest(of_module) for of_module in calls.values()], []
        of_layer: dict[int, TopkCall] = {}
        for found in chosen:  # one of two in a layer may be a sparse attention, or another stack's
            if (other := of_layer.setdefault(found.layer, found)) is not found:
                _refuse(
                    f"{other.path} and {found.path}",
                    f"both call torch.topk, over {other.E} and {found.E} values "
                    f"({other.line}, {found.line})",
                    "which chooses experts",
                )
        for found in chosen:
            self._check(found)
            self.probes(found.layer, found.ids.detach(), found.values.detach(), found.E, None)
        if not self._told:
            self._told = True
            self._tell(chosen)

    def _widest(self, calls: list[TopkCall]) -> TopkCall:
        """MoeInspectError where there are several."""
        E = max(found.E for found in calls)
        widest = [found for found in calls if found.E == E]
        if len(widest) > 1:
            lines = ", ".join(dict.fromkeys(found.line for found in widest))
            _refuse(
                widest[0].path,
                f"calls torch.topk over {E} values {len(widest)} times in a forward pass ({lines})",
                "which of them chooses the experts of which tokens",
            )
        return widest[0]

    def _check(self, found: TopkCall) -> None:
        """MoeInspectError where it is not what the experts are given, or may be of no experts."""
        nearest = next((p for p in _up(found.path) if p in self._sequence_first), "")
        if self._sequence_first.get(nearest):
            _refuse(nearest, "is given [positions, rows, …]", "the order of the rows")
        what = f"chooses {found.K} of {found.E} values ({found.line})"
        compared = [self._compare(found, what, path) for path in self._lists_of(found)]
        if any(compared):
            return
        if self._slots.get(id(found.ids), found.K) < found.K:
            _refuse(found.path, f"{what} and takes a slice of them", "which it uses")
        if self._told:
            return
        if not states_experts(self.model, found.path, found.E):
            _refuse(
                found.path,
                f"{what}, and nothing in layer {found.layer} has {found.E} experts",
                "whether it chooses experts",
            )
        fed = self.probes.scopes[0].fed
        assert fed is not None
        if found.E in (fed.S, fed.T):
            _refuse(
                found.path,
                f"{what}, as many as there are tokens",
                "whether it chooses experts or tokens, before a pass of another number of tokens",
            )

    def _lists_of(self, found: TopkCall) -> list[str]:
        """The lists of E modules nearest to the module that chooses, in its layer."""
        for path in _up(found.path):
            beside = [p for p in self._lists if p.startswith(f"{path}.")]
            if of_experts := [p for p in beside if len(self._lists[p]) == found.E]:
                inner = tuple(f"{p}." for p in of_experts)  # what an expert consists of
                return [p for p in of_experts if not p.startswith(inner)]
        return []

    def _compare(self, found: TopkCall, what: str, path: str) -> bool:
        """Whether the rows given to the modules of a list show that `found` chooses among them.
        MoeInspectError, which says `what` it chooses, where other rows were given."""
        given, T = self._given[path], found.ids.numel() // found.K
        ids = found.ids.flatten()
        # (a model may mark dropped slots by an id out of range)
        ids = ids[(ids >= 0) & (ids < found.E)]
        chosen_E = torch.bincount(ids, minlength=found.E).tolist()
        rows_E, not_0_E = ([n[i] for n in given] for i in (0, 1))
        if not any(rows_E):  # the model uses their weights without calling them
            return False
        # each expert that was chosen is given all tokens, and gate weights tell which count
        is_dense = len(set(given) - {(0, 0)}) == 1 and max(rows_E) == T
        if is_dense and all(n or not c for n, c in zip(rows_E, chosen_E, strict=True)):
            return False
        # rows of zeros fill experts up to their capacity
        if chosen_E not in (rows_E, not_0_E):
            e = next(e for e, c in enumerate(chosen_E) if c != not_0_E[e])
            _refuse(
                found.path,
                f"{what}, expert {e} {chosen_E[e]} times, and {path}.{e} is given {not_0_E[e]} "
                "rows",
                "what the model drops or adds",
            )
        return True

    def _count(self, module: Module, args: Args) -> None:
        """A module is about to be called."""
        path, fed = self._path_of.get(module), self.probes.scopes[0].fed
        if path is not None and fed is not None:
            is_it = is_sequence_first(args, fed.B, fed.S)
            if is_it is not None:
                self._sequence_first[path] = is_it
        if (place := self._place_of.get(module)) is None:
            return
        rows = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        if rows is not None and rows.dim():
            (path, e), rows = place, rows.detach().reshape(-1, rows.shape[-1])
            n, not_0 = self._given[path][e]
            self._given[path][e] = n + len(rows), not_0 + int((rows != 0).any(1).sum())

    def probed(self, layer: int, *shown: Any) -> None:
        """A probe in the model's own code."""
        self._probed.add(layer)
        self.probes(layer, *shown)

    def __torch_function__(
        self, func: Any, types: object, args: Args = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sees every topk of K of E values, E > K, and every part that is taken of its ids."""
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "topk":
            given = args[0] if args else (kwargs or {})["input"]
            E, K = given.shape[-1], output[1].shape[-1]
            if output[1].dim() > 1 and E > K and given.shape[:-1] == output[1].shape[:-1]:
                self._seen(output[1], output[0], E)
        elif name == "__getitem__" and any(args[0] is found.ids for found in self._found):
            ids, part = args[0], output
            if part.dim() == ids.dim() and part.shape[:-1] == ids.shape[:-1]:
                self._slots[id(ids)] = self._slots.get(id(ids), 0) + part.shape[-1]
        return output

    def _seen(self, ids: Tensor, values: Tensor, E: int) -> None:
        """Notes the call, if it is in a block: elsewhere it samples a token. Its line is that
        of the model's module whose method runs or, where that is torch's own, of what it runs."""
        frame, line = sys._getframe(), ""
        while frame is not None:
            if not frame.f_code.co_filename.startswith(NOT_THE_MODELS):
                line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            owner = frame.f_locals.get(names[0]) if names else None  # `self`, of a method
            path = self._path_of.get(owner) if isinstance(owner, Module) else None
            if path is not None:
                if layer_path(path) is not None:
                    self._found.append(TopkCall(path, layer_of(path), E, ids, values, line))
                return
            frame = frame.f_back

    def _tell(self, chosen: list[TopkCall]) -> None:
        """The lines that make the discovery unnecessary."""
        lines: dict[tuple[str, str], TopkCall] = {}
        for found in chosen:
            lines.setdefault((NUMBER.sub(".*", found.path), found.line), found)
        for (pattern, line), found in lines.items():
            print_stderr(
                f"found routers in {pattern}: {line} chooses {found.K} of {found.E}. "
                "To record them without looking for them, write after that line:"
            )
            print_stderr(f"    moe_inspect.probe(ids, weights, layer=…, experts={found.E})")
        if lines:
            print_stderr(f"note: {UNSEEN}")


def _up(path: str) -> Iterator[str]:
    """The path of a module and of those it is in, up to its layer's."""
    while layer_path(path) is not None:
        yield path
        path = path.rpartition(".")[0]


def _refuse(path: str, what: str, unknown: str) -> NoReturn:
    raise MoeInspectError(
        f"{path} {what}: discover=True cannot tell {unknown}. After the line that makes the final "
        "choice, call moe_inspect.probe(ids, weights, layer=…, experts=…)"
    )

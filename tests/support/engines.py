"""Stand-ins for vLLM and SGLang, with the modules, objects and calls that the plugin hooks into.
They schedule requests as engines do and choose experts at random. `Engine.expected` holds every
decision that a trace must have, by plain bookkeeping of that schedule.

L layers, N rows of a step (padding behind them), K slots, E experts, P physical experts.
"""

from __future__ import annotations

import random
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from prometheus_client.multiprocess import MultiProcessCollector

from moe_inspect import Trace, open_trace
from moe_inspect.capture.engine import sender, sglang, vllm
from moe_inspect.capture.engine.described import describe
from moe_inspect.capture.engine.sidecar import Traces
from moe_inspect.capture.engine.steps import join_rows
from moe_inspect.demo import MODEL_DIR
from moe_inspect.trace.verify import verify

PLACES = ["source", "document", "sequence", "position", "batch", "phase", "token_id"]
CHOICE = ["experts", "weights", "logits", "physicals"]


@dataclass(frozen=True)
class Span:
    """Rows of a request in a step. `accepted`: those that are no rejected drafts."""

    request: str
    positions: np.ndarray
    drafts: int
    accepted: np.ndarray


def span(request: str, first: int, end: int, drafts: int = 0, accepted: int = 0) -> Span:
    rows = np.arange(end - first)
    return Span(request, first + rows, drafts, rows[: len(rows) - drafts + accepted])


def tree(request: str, first: int, drafts: int, path: Sequence[int], draw: random.Random) -> Span:
    """A tree of drafts, of which `path` are the rows that are accepted."""
    positions = first + np.array([0, *(draw.randint(1, drafts) for _ in range(drafts))])
    accepted = np.array([0, *path])
    positions[accepted] = first + np.arange(len(accepted))
    return Span(request, positions, drafts, accepted)


class Engine(ABC):
    """`how`: some of the attributes below, and variables of the environment. `unrouted`: share of
    slots without an expert; `shared`: whether a shared expert's column is behind the routed ones;
    `replicas`: physical experts beyond E; `instead`: an attribute and its value
    before the model is loaded."""

    package = ""
    mixed = True  # whether one step may have prompts and answers
    shape = 4, 8, 2  # L, E, K: of the bundled model
    T, drafts, replicas, rank, unrouted, shared = 64, 0, 0, 0, 0.0, False
    instead: tuple[str, object] | None = None
    recorder: Any

    def __init__(self, patch: pytest.MonkeyPatch, place: Path, **how: Any):
        self.patch, variables = patch, {"TRACE": place / "runs"}
        for name, value in how.items():
            (vars(self) if hasattr(self, name) else variables)[name] = value
        shape, T, self.random = self.shape, self.T, np.random.default_rng(self.rank)
        self.model = str(MODEL_DIR) if shape == (4, 8, 2) else str(place / "no model")
        self.asked: dict[str, tuple[int, int]] = {}  # tokens of the prompt, of the answer at most
        self.steps, self.on, self.counting, self.share = 0, True, True, 1.0
        self.known = set[tuple[str, int]]()  # requests that were scheduled before
        self.decided = dict[tuple[str, int], bool]()  # whether a request is recorded
        self.finishing = set[str]()
        self.rows: list[dict[str, Any]] = []
        self.maps = dict[int, np.ndarray]()  # the replicas at each step
        self.ended, self.lives = set[str](), dict[str, int]()
        self.load_LE = np.zeros(shape[:2], np.int64)
        self.logits_seen: list[weakref.ref[torch.Tensor]] = []
        self.map_LP = self.spread(self.replicas) if self.replicas else None
        self.places = torch.full((2, 2 * T), -1)  # tokens and positions, always at one place
        for name, value in variables.items():
            if value is not None:
                patch.setenv(f"MOE_INSPECT_{name}", str(value))
        # it is installed, as far as its version is asked for
        facts = place / f"{self.package}-0.dist-info"
        facts.mkdir(parents=True, exist_ok=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self.package}\nVersion: 0")
        patch.syspath_prepend(place)

    def path_of(self, layer: int) -> str:
        """Of a router, as the engine names it."""
        return f"model.layers.{layer}.mlp"

    def module(self, name: str, **holds: Any) -> None:
        """Makes a module of the engine, which is not installed."""
        module = ModuleType(name)
        vars(module).update(holds)
        self.patch.setitem(sys.modules, name, module)

    def change(self) -> None:
        if self.instead is not None:
            exec(f"engine.{self.instead[0]} = value", {"engine": self, "value": self.instead[1]})

    def spread(self, replicas: int) -> torch.Tensor:
        """A map of physical experts, [L, P]: some experts have two replicas."""
        L, E, _ = self.shape
        experts = [*range(E), *range(1, replicas + 1)]
        return torch.from_numpy(np.array([self.random.permutation(experts) for _ in range(L)]))

    def choose(self, layer: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, ids) of the rows."""
        _, E, K = self.shape
        weights, ids = logits.softmax(1).topk(K)
        drawn = torch.from_numpy(self.random.random(ids.shape))
        ids[drawn < self.unrouted] = -1
        self.chosen[layer] = {"experts": ids.clone(), "weights": weights, "logits": logits}
        ids[drawn < self.unrouted / 2] = E  # none of its experts either
        if self.shared:
            weights = torch.cat([weights, torch.ones(len(ids), 1)], 1)
            ids = torch.cat([ids, torch.full((len(ids), 1), E)], 1)
        return weights, ids.int()

    def one_of_each(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """A replica of each expert, at random."""
        assert self.map_LP is not None
        same = self.map_LP[layer] == ids[..., None]
        found = (same * torch.from_numpy(self.random.random(same.shape))).argmax(-1)
        self.chosen[layer]["physicals"] = found[:, : self.shape[2]]
        return found.int()

    @abstractmethod
    def route(self, layer: int, logits: torch.Tensor) -> None:
        """Calls the layer's router."""

    def forward(self, rows: int) -> None:
        self.chosen: list[dict[str, torch.Tensor]] = [{} for _ in range(self.shape[0])]
        for layer in range(self.shape[0]):
            logits = self.random.normal(size=(rows, self.shape[1])).astype(np.float32)
            given = torch.from_numpy(logits.astype(np.float16).astype(np.float32))
            self.logits_seen.append(weakref.ref(given))
            self.route(layer, given)

    @abstractmethod
    def run(self, spans: Sequence[Span], N: int, ended: set[str]) -> None:
        """A step of the engine."""

    @abstractmethod
    def do(self, what: str, value: str) -> dict[str, Any]:
        """Gives a command to the engine."""

    def command(self, what: str, value: str = "") -> dict[str, Any]:
        """Through the engine, to the plugin."""
        self.on = what == "on" or (self.on and what != "off")
        self.counting = value == "on" if what == "metrics" else self.counting
        self.share = float(value) if what == "sample" else self.share
        return self.do(what, value)

    def step(self, *spans: Span, ended: Sequence[str] = (), padding: int = 3) -> None:
        self.steps += 1
        sizes = [len(of.positions) for of in spans]
        N, ended_before = sum(sizes), self.ended | set(ended)
        for request in ended_before:
            self.lives[request] = self.lives.get(request, 0) + 1
        self.padded, self.ended = N + padding, set[str]()
        self.places[:] = -1
        for n, of in enumerate(spans):
            rows = slice(sum(sizes[:n]), sum(sizes[: n + 1]))
            self.places[1, rows] = torch.from_numpy(of.positions)
            self.places[0, rows] = (self.places[1, rows] * 7 + len(of.request)) % 3000
        self.run(spans, N, ended_before)
        if self.map_LP is not None:
            self.maps[self.steps] = self.map_LP.numpy()
        edges = np.cumsum([0, *sizes])
        for start, of in zip(edges, spans, strict=False):
            prompt, most = self.asked.get(of.request, (10, 10**6))
            if not self.on:
                continue
            life = self.lives.get(of.request, 0)
            is_recorded = self.decided.setdefault((of.request, life), self.share > 0)
            for row in of.accepted if is_recorded else ():
                position = int(of.positions[row])
                if of.drafts and position >= prompt + most - 1:
                    continue  # accepted, and beyond the end of the answer
                names = CHOICE[: 4 if self.map_LP is not None else 3]
                choice = {m: np.stack([c[m][start + row] for c in self.chosen]) for m in names}
                facts: dict[str, Any] = {"source": of.request, "life": life, "position": position}
                facts |= {
                    "batch": self.steps,
                    "prompt": prompt,
                    "phase": "decode" if position >= prompt else "prefill",
                }
                token = (position * 7 + len(of.request)) % 3000
                self.rows.append({**facts, "token_id": token, **choice})
        for layer in range(self.shape[0] if self.on and self.counting else 0):
            ids = self.chosen[layer]["experts"][:N].reshape(-1)
            self.load_LE[layer] += np.bincount(ids[ids >= 0], minlength=self.shape[1])

    def expected(self) -> pd.DataFrame:
        """A row per token that a trace of everything has, numbered from 0."""
        rows = pd.DataFrame(self.rows)
        rows["document"] = rows.groupby(["source", "life"], sort=False).ngroup()
        before = rows.groupby("document").position.shift()
        begins = ~(rows.position == before + 1)
        nth = begins.groupby(rows.document).cumsum()
        rows["sequence"] = pd.factorize(rows.document * 10**6 + nth)[0]
        for i, of in enumerate(rows[["experts", "weights"]].to_numpy()):  # empty slots come last
            order = np.argsort(of[0] < 0, axis=1, kind="stable")
            ids, weights = (np.take_along_axis(values, order, 1) for values in of)
            rows.at[i, "experts"] = ids
            rows.at[i, "weights"] = np.where(ids < 0, -1, weights.astype(np.float16))
        return rows

    def serve(self, requests: int = 14, seed: int = 0, name: str = "r", events: Any = ()) -> None:
        """Prompts in chunks, some behind a cache; answers with drafts where the engine speculates;
        preempted requests, that are computed again; dummy batches; names that come again; and
        `events`: step → what happens before it."""
        draw, running = random.Random(seed), dict[str, list[int]]()
        waiting = [f"{name}{n % (requests - requests // 4)}" for n in range(requests)]
        events = dict(events)
        while waiting or running:
            events.pop(self.steps, lambda: None)()
            for request in [w for w in dict.fromkeys(waiting) if w not in running]:
                if len(running) == 5:
                    break
                waiting.remove(request)
                self.asked[request] = prompt, _ = draw.randrange(1, 40), draw.randrange(1, 9)
                running[request] = [draw.choice((0, prompt // 2)), prompt]
            busy = [request for request, (at, known) in running.items() if known - at > 1]
            budget, spans = draw.choice((20, self.T - 4)), list[Span]()
            for request in [*running] if self.mixed or not busy else busy:
                (at, known), drafts = running[request], 0
                rows = min(known - at, budget, 13)
                if known - at == 1 and (self.mixed or not busy):
                    drafts = self.drafts if not self.mixed else draw.randint(0, self.drafts)
                if rows + drafts > budget or rows == 0 or (self.mixed and draw.random() < 0.1):
                    continue
                budget -= rows + drafts
                path = sorted(draw.sample(range(1, drafts + 1), draw.randint(0, drafts)))
                if self.mixed or not drafts:
                    spans.append(span(request, at, at + rows + drafts, drafts, len(path)))
                else:
                    spans.append(tree(request, at, drafts, path, draw))
                at += rows + len(path)
                running[request] = [at, max(known, at + 1)]
            self.finishing = set[str]()
            for request, (at, known) in list(running.items()):
                prompt, most = self.asked[request]
                if known - prompt >= most:
                    self.finishing.add(request)
                    del running[request]
                elif at > 3 and draw.random() < 0.03:
                    running[request][0] = 0
            self.step(*spans, padding=draw.choice((0, 3, 12)))
            self.ended |= self.finishing
            if draw.random() < 0.1:
                self.step()
        self.step()


class Vllm(Engine):
    """A worker of vLLM 0.32, by model runner V1 or V2. `placement`: of experts on two ranks of
    expert parallelism, as vLLM places them once."""

    package, placement, simulates = "vllm", "", object
    prepares, samples = "_prepare_inputs", "_sample"  # functions of its runner

    def __init__(self, *given: Any, **how: Any):
        super().__init__(*given, **how)
        layers = "vllm.model_executor.layers.fused_moe"
        self.Runner = type("MoERunner", (torch.nn.Module,), {"is_monolithic": False})
        self.Router = type("BaseRouter", (self.simulates,), {"zero_expert_type": None})
        self.module(f"{layers}.layer", MoERunner=self.Runner)
        self.module(f"{layers}.router.base_router", BaseRouter=self.Router)
        self.module(f"{layers}.expert_map_manager", determine_expert_map=expert_map)
        group = SimpleNamespace(is_first_rank=True)
        self.module("vllm.distributed.parallel_state", get_tp_group=lambda: group)
        L, E, K = self.shape
        moe = SimpleNamespace(num_logical_experts=E, experts_per_token=K, pcp_size=1)
        moe.is_sequence_parallel, moe.ep_size = False, 2 if self.placement else 1
        manager = SimpleNamespace(placement_strategy=self.placement)
        self.network = torch.nn.Module()
        self.layers, self.moe = list[Any](), moe
        for n in range(L)[::-1]:  # the plugin sorts them
            layer: Any = self.Runner()
            layer.moe_config, layer.layer_id, layer.layer_name = moe, n, self.path_of(n)
            layer.do_naive_dispatch_combine, layer.router = False, self.Router()
            layer.routed_experts = SimpleNamespace(expert_map_manager=manager, quant_method=None)
            layer.router.top_k = K
            layer.router._compute_routing = lambda _, logits, n=n: self.choose(n, logits)
            layer.router._apply_eplb_mapping = lambda ids, n=n: self.one_of_each(n, ids)
            self.network.add_module(str(n), layer)
            self.layers.insert(0, layer)
        self.runner = SimpleNamespace(get_model=lambda: self.network, device=torch.device("cpu"))
        self.prepare_runner()
        if self.map_LP is not None:
            maps = {"hash": self, "hash of a draft model": None}
            self.runner.eplb_state = SimpleNamespace(model_states=maps)
        model = {"model": self.model, "tokenizer": self.model, "revision": None}
        model |= {"trust_remote_code": False, "dtype": torch.float32}
        named = SimpleNamespace(**model, compute_hash=lambda: "hash", get_vocab_size=lambda: 3072)
        parallel = {"data_parallel_rank": self.rank, "pipeline_parallel_size": 1}
        self.config = SimpleNamespace(
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=[8, self.T + 12], mode=0),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=self.T),
            parallel_config=SimpleNamespace(**parallel, use_ubatching=False),
            model_config=named,
            speculative_config="some" if self.drafts else None,
            additional_config={},
        )
        self.change()
        self.start()

    @property
    def physical_to_logical_map(self) -> torch.Tensor | None:
        return self.map_LP

    def start(self) -> None:
        worker = SimpleNamespace(load_model=lambda: None, model_runner=self.runner)
        worker.sample_tokens = lambda: self.sample()

        class WorkerWrapperBase:
            def __init__(self, config: Any):
                self.worker, self.vllm_config, self.has_stopped = worker, config, False

            def execute_model(self, scheduled: Any) -> None:
                scheduled.run()

            def shutdown(self) -> None:
                self.has_stopped = True

        self.module("vllm.v1.worker.worker_base", WorkerWrapperBase=WorkerWrapperBase)
        vllm.register()
        vllm.register()  # as in each of its processes
        self.wrapper: Any = WorkerWrapperBase(self.config)
        self.wrapper.load_model()

    @property
    def recorder(self) -> Any:
        return self.wrapper.moe_inspect_seam.recorder

    def route(self, layer: int, logits: torch.Tensor) -> None:
        router = self.layers[layer].router
        compute = getattr(router, "_compute_routing", lambda _, of: self.choose(layer, of))
        weights, ids = compute(logits, logits)
        if not self.chosen[layer]:  # it is replayed
            self.chosen[layer] = {"experts": ids.long(), "weights": weights, "logits": logits}
        if self.map_LP is not None:
            router._apply_eplb_mapping(ids)

    def prepare_runner(self) -> None:
        runner: Any = self.runner
        runner.input_ids, runner.positions = SimpleNamespace(gpu=self.places[0]), self.places[1]
        runner._prepare_inputs = lambda: None
        runner._sample = lambda: SimpleNamespace(sampled_token_ids=self.sampled())

    def sampled(self) -> torch.Tensor:
        """Tokens that each request was given, and −1 for rejected ones."""
        given = torch.full((len(self.spans), self.drafts + 1), -1)
        for row, of in zip(given, self.spans, strict=True):
            row[: len(of.accepted) - (len(of.positions) - of.drafts) + 1] = 5
        return given

    def sample(self) -> None:
        getattr(self.runner, self.samples)()

    def run(self, spans: Sequence[Span], N: int, ended: set[str]) -> None:
        self.spans, asked = spans, {of.request: self.asked.get(of.request) for of in spans}
        lives = {request: (request, self.lives.get(request, 0)) for request in asked}
        scheduled = SimpleNamespace(
            total_num_scheduled_tokens=N,
            num_scheduled_tokens={of.request: len(of.positions) for of in spans},
            finished_req_ids=ended,
            scheduled_spec_decode_tokens={o.request: [0] * o.drafts for o in spans if o.drafts},
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=request,
                    prompt_token_ids=[0] * given[0],
                    sampling_params=SimpleNamespace(max_tokens=given[1]),
                )
                for request, given in asked.items()
                if given and lives[request] not in self.known
            ],
            run=self.execute,
        )
        self.known |= {*lives.values()}
        prompts = {request: given[0] if given else 10 for request, given in asked.items()}
        self.describe_batch(spans, prompts)
        self.wrapper.execute_model(scheduled)
        self.wrapper.sample_tokens()

    def execute(self) -> None:
        getattr(self.runner, self.prepares)()
        self.forward(self.padded)

    def describe_batch(self, spans: Sequence[Span], prompts: dict[str, int]) -> None:
        edges = np.cumsum([0, *(len(of.positions) for of in spans)])
        self.runner.query_start_loc = SimpleNamespace(np=np.concatenate([edges, [edges[-1]] * 3]))
        self.runner.input_batch = SimpleNamespace(req_ids=[of.request for of in spans])
        self.runner.requests = {r: SimpleNamespace(num_prompt_tokens=p) for r, p in prompts.items()}

    def do(self, what: str, value: str) -> dict[str, Any]:
        return self.wrapper.moe_inspect(what, value)

    def close(self) -> None:
        self.wrapper.shutdown()
        assert self.wrapper.has_stopped


class VllmV2(Vllm):
    prepares, samples = "prepare_inputs", "sample"

    def prepare_runner(self) -> None:
        runner: Any = self.runner
        runner.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.zeros(64, np.int64)))
        runner.prepare_inputs = lambda: self.batch
        runner.sample = lambda: (None, (self.sampled() >= 0).sum(1))

    def describe_batch(self, spans: Sequence[Span], prompts: dict[str, int]) -> None:
        slots = self.random.permutation(64)[: len(spans)]
        self.runner.req_states.prompt_len.np[slots] = [*prompts.values()]
        edges = np.cumsum([0, *(len(of.positions) for of in spans)])
        batch = SimpleNamespace(req_ids=[of.request for of in spans], num_reqs=len(spans))
        batch.input_ids, batch.positions = self.places[:, : self.padded].clone()
        batch.query_start_loc_np = np.concatenate([edges, [edges[-1]] * 3])
        batch.idx_mapping_np = slots
        self.batch, self.runner.execute_model_state = batch, SimpleNamespace(input_batch=batch)


def expert_map(ranks: int, rank: int, E: int, strategy: str) -> tuple[int, torch.Tensor]:
    """As vLLM's: the place of each expert on a rank, −1 for those elsewhere."""
    here = np.arange(E) % ranks if strategy == "round_robin" else np.arange(E) * ranks // E
    return 0, torch.from_numpy(np.where(here == rank, 0, -1))


class Sglang(Engine):
    """A scheduler of SGLang 0.5.23."""

    package, mixed = "sglang", False

    def __init__(self, *given: Any, **how: Any):
        super().__init__(*given, **how)
        self.hooks = dict[str, Callable[..., Any]]()
        L, E, K = self.shape

        def hook(target: str, around: Callable[..., Any], _: Any) -> None:
            self.hooks[target.rpartition(".")[2]] = around

        self.module(
            "sglang.srt.plugins.hook_registry",
            HookRegistry=SimpleNamespace(register=hook),
            HookType=SimpleNamespace(AROUND=0),
        )
        replicating = SimpleNamespace(ep_dispatch_algorithm="random" if self.drawn else None)
        self.module(
            "sglang.srt.runtime_context",
            get_parallel=lambda: SimpleNamespace(tp_rank=0, dp_rank=self.rank or None),
            get_exec=lambda: SimpleNamespace(moe=replicating),
        )
        located = lambda: SimpleNamespace(physical_to_logical_map=self.map_LP)  # noqa: E731
        name = "get_global_expert_location_metadata"
        self.module("sglang.srt.eplb.expert_location", **{name: located})
        self.module("sglang.srt.managers.io_struct", SetInternalStateReqOutput=SimpleNamespace)
        network, self.layers = torch.nn.Module(), list[Any]()
        for n in range(L)[::-1]:
            topk: Any = type("TopK", (torch.nn.Module,), {"is_draft": False, "layer_id": n})()
            slots = {"top_k": K + self.shared, "num_shared_topk_slots": int(self.shared)}
            topk.topk_config = SimpleNamespace(**slots)
            network.add_module(str(n), topk)
            self.layers.insert(0, topk)
        server = {"model_path": self.model, "tokenizer_path": None, "revision": None}
        server |= {"trust_remote_code": False, "chunked_prefill_size": self.T, "pp_size": 1}
        server |= {"max_running_requests": 8, "max_prefill_tokens": 0}
        server |= {"speculative_num_draft_tokens": self.drafts + 1 if self.drafts else None}
        server |= {"speculative_algorithm": "NGRAM" if self.drafts else None}
        server |= {"enable_dp_attention": False, "enable_two_batch_overlap": False}
        server |= {"enable_torch_compile": False}
        config = {"hf_text_config": SimpleNamespace(n_routed_experts=E), "context_len": 512}
        config |= {"vocab_size": 3072, "dtype": torch.float32}
        self.runner = SimpleNamespace(
            is_draft_worker=False,
            server_args=SimpleNamespace(**server),
            model_config=SimpleNamespace(**config),
            model=network,
            device="cpu",
        )
        self.change()
        sglang.Here.seam, sglang.Here.refused, sglang.Here.said = None, "", None
        sglang.register()
        self.call("load_model", lambda _: None, self.runner)

    def path_of(self, layer: int) -> str:
        return f"layers.{layer}"

    @property
    def drawn(self) -> bool:
        return self.map_LP is not None

    @property
    def recorder(self) -> Any:
        assert sglang.Here.seam is not None
        return sglang.Here.seam.recorder

    def call(self, name: str, what: Callable[..., Any], *given: Any) -> Any:
        return self.hooks[name](what, *given) if name in self.hooks else what(*given)

    def route(self, layer: int, logits: torch.Tensor) -> None:
        weights, ids = self.choose(layer, logits)

        def post(ids: torch.Tensor, *_: Any) -> Any:
            if not self.drawn:
                return ids
            physicals = self.one_of_each(layer, ids)
            return (physicals + 1000, None, physicals) if self.shared else (physicals, None, None)

        given = ids, weights, SimpleNamespace(), logits, layer
        self.call("_post_process_topk_ids", post, *given)

    def run(self, spans: Sequence[Span], N: int, ended: set[str]) -> None:
        judged = any(of.drafts for of in spans)
        asked = {of.request: self.asked.get(of.request, (10, 10**6)) for of in spans}
        over: Callable[[str], bool] = lambda request: request in self.finishing  # noqa: E731
        requests = [
            SimpleNamespace(
                rid=request,
                origin_input_ids=[0] * prompt,
                sampling_params=SimpleNamespace(max_new_tokens=most),
                finished=lambda request=request: over(request),
            )
            for request, (prompt, most) in asked.items()
        ]
        extends = not judged and any(len(of.positions) > 1 for of in spans)
        mode = {"is_idle": not spans, "is_target_verify": judged, "is_extend": judged or extends}
        batch = SimpleNamespace(
            reqs=requests,
            rids=[*asked],
            forward_mode=SimpleNamespace(**{n: lambda it=it: it for n, it in mode.items()}),
            input_ids=self.places[0, :N].clone(),
            positions=self.places[1, :N].clone(),
            extend_seq_lens_cpu=[len(of.positions) for of in spans],
        )
        forward = lambda *_: self.forward(self.padded)  # noqa: E731
        run = lambda *_: self.call("forward", forward, self.runner, batch)  # noqa: E731
        self.call("run_batch", run, None, batch)
        if judged and not hasattr(self, "sample"):
            accepted = torch.full((len(spans), self.drafts + 1), -1)
            for n, of in enumerate(spans):
                rows = torch.from_numpy(of.accepted)
                accepted[n, : len(rows)] = rows + n * (self.drafts + 1)
            self.call("eagle_sample", lambda: (None, None, accepted))
            self.call("eagle_sample", lambda: (None, None, accepted[:0]))  # of no request
        self.call("process_batch_result", lambda *_: None, None, batch)

    def do(self, what: str, value: str) -> dict[str, Any]:
        number = float(value) if what == "sample" else float(value != "off")
        if what != "status":
            asked = SimpleNamespace(server_args={f"moe_inspect.{what}": number})
            self.call("set_internal_state", lambda *_: None, None, asked)
        answer = SimpleNamespace(internal_state={})
        state = self.call("get_internal_state", lambda *_: answer, None, None)
        return state.internal_state["moe_inspect"]

    def close(self) -> None:
        self.recorder.close()


# --- what is written of it, and read


class Link:
    """In the place of the thread and the process that write: takes what is queued, when asked."""

    def __init__(self, recorder: Any, about: dict[str, Any]):
        self.recorder, self.about, self.error = recorder, about, None
        self.handed = list[Any]()  # as Traces.write takes it

    def take(self) -> None:
        recorder = self.recorder
        if steps := recorder.queue.take():
            arrived = [step.arrived(None) for step in steps]
            arrays = join_rows(steps, recorder.rows.names)
            recorder.queue.release(steps)
            self.handed.append((arrived, arrays, recorder.queue.dropped))

    def write(self, always_next: bool = False) -> list[Path]:
        """The traces. `always_next`: looks at their size behind each write."""
        traces = Traces(self.about, describe)
        traces.described.result()
        for handed in self.handed:
            traces.looked_s -= 1000 * always_next
            traces.write(*handed)
        traces.note_dropped(self.recorder.queue.dropped)
        traces.close("complete")
        return traces.paths

    def close(self) -> None:
        self.take()


def starting(place: Path, patch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Starts engines with the plugin, whose traces are written in this process, when asked."""
    patch.setattr(sender, "Sender", Link)
    return lambda kind=Vllm, at=place, **how: kind(patch, at, **how)


def written(engine: Engine, **how: bool) -> Trace:
    """The engine's only trace, which is verified."""
    engine.recorder.link.take()
    (path,) = engine.recorder.link.write(**how)
    return fine(path)


def fine(path: Path, status: str = "complete") -> Trace:
    found = verify(path)
    assert found.ok, found
    assert found.status == status
    return open_trace(path)


def recorded(path: Path) -> pd.DataFrame:
    """A row per token, read from the Parquet files alone. Of each router its experts, weights,
    logits and physical experts: [L, K] or [L, E]."""

    def read(table: str) -> pd.DataFrame:
        return pd.concat(map(pd.read_parquet, sorted((path / table).glob("*.parquet"))))

    documents = read("documents")[["document", "source"]]
    tokens = read("tokens").merge(documents, on="document", validate="many_to_one")
    tokens = tokens.sort_values("token", ignore_index=True).astype({"source": str, "phase": str})
    routing = read("routing").sort_values(["token", "router"])
    of = {"experts": "expert_", "weights": "weight_", "physicals": "physical_"}
    for name, prefix in of.items():
        columns = [column for column in routing if column.startswith(prefix)]
        values = routing[columns].fillna(-1).to_numpy(np.float64)
        if columns:
            tokens[name] = [*values.reshape(len(tokens), -1, len(columns))]
    if (path / "logits").exists():
        logits = read("logits").sort_values(["token", "router"]).logits
        tokens["logits"] = [
            *np.stack([*logits]).reshape(len(tokens), len(logits) // len(tokens), -1)
        ]
    return tokens


def check(found: pd.DataFrame, expected: pd.DataFrame, text: bool = True) -> None:
    """All is equal: whose each token is, its place, its phase and its step; ids, weights rounded to
    16 bits, logits and replicas, by router and slot."""
    assert len(expected) > 0
    places = PLACES if text else [name for name in PLACES if name != "token_id"]
    pd.testing.assert_frame_equal(found[places], expected[places], check_dtype=False)
    for name in {*CHOICE} & {*found} & {*expected}:
        values = (np.stack([*of[name]]) for of in (found, expected))
        np.testing.assert_array_equal(*values, err_msg=name)


def numbered(rows: pd.DataFrame) -> pd.DataFrame:
    """Documents and sequences by their first token."""
    rows = rows.reset_index(drop=True)
    for name in ("document", "sequence"):
        rows[name] = pd.factorize(rows[name])[0]
    return rows


def metrics_in(folder: Path) -> dict[tuple[str, ...], float]:
    """What a server reads there: (name, values of the labels by their names) → value."""
    found = dict[tuple[str, ...], float]()
    for family in MultiProcessCollector(None, str(folder)).collect():
        for one in family.samples:
            found[one.name, *(value for _, value in sorted(one.labels.items()))] = one.value
    return found

"""The seam to vLLM: where its workers choose experts, run a step and are told to stop. `register`
and `Endpoint` are entry points, which vLLM calls.

Read from vLLM 0.32.0. L routers, T rows, K slots, E experts.
"""

# pyright: reportMissingImports=false
# (vLLM is not installed where types are checked)

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.capture.engine.settings import PATH, Settings, is_asked, tell_unknown, tell_why
from moe_inspect.capture.engine.step import Schedule, edges_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from moe_inspect.capture.engine.steps import Scheduled

log = logging.getLogger("vllm.moe_inspect")


def register() -> None:
    """vLLM calls it in each of its processes, before there are workers."""
    tell_unknown(log)
    if not is_asked():
        return
    try:
        settings = Settings.read()
        if settings.replay is not None:
            from moe_inspect.capture.engine.replay import register_strategy

            register_strategy()
        elif not settings.is_active:
            return
        if settings.metrics and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            log.warning(
                "moe-inspect: MOE_INSPECT_METRICS needs PROMETHEUS_MULTIPROC_DIR, an empty "
                "directory: its counts are in no /metrics"
            )
        _wrap_workers()
    except Exception as error:  # the engine goes on
        Endpoint.refused = tell_why(log, error)


def _wrap_workers() -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase as Wrapper

    if "moe_inspect" in vars(Wrapper):  # of this process already
        return
    execute_model, shutdown = Wrapper.execute_model, Wrapper.shutdown

    def execute(self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        output = execute_model(self, scheduled, *args, **kwargs)
        if (seam := _seam_of(self)) is not None:
            seam.after_step(scheduled)
        return output

    def stop(self: Any) -> None:
        if (seam := _seam_of(self)) is not None:
            seam.recorder.close()
        shutdown(self)

    Wrapper.execute_model, Wrapper.shutdown = execute, stop
    Wrapper.load_model, Wrapper.sample_tokens = _load_model, _sample_tokens
    Wrapper.moe_inspect = _command


def _seam_of(wrapper: Any) -> Seam | None:
    return vars(wrapper).get("moe_inspect_seam")


def _load_model(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.distributed.parallel_state import get_tp_group

    from moe_inspect.capture.engine.rows import SCHEMA

    settings, config = Settings.read(), wrapper.vllm_config
    more = config.additional_config
    if isinstance(more, dict):
        # These become a part of the key of torch.compile's cache: a graph that was compiled without
        # the plugin records nothing, and a graph holds the offsets of the routers in our buffers.
        facts = [f"replays {settings.replay is not None}", f"logits {settings.records_logits}"]
        facts += [f"{largest_step(config)} rows", SCHEMA]
        more["moe_inspect"] = ", ".join(facts)
    loaded = wrapper.worker.load_model(*args, **kwargs)
    runner = wrapper.worker.model_runner
    if settings.replay is not None:  # a benchmark of other routes would be wrong: this may raise
        from moe_inspect.capture.engine.replay import replay

        replay(runner, settings.replay, largest_step(config))
    try:
        if settings.is_active and get_tp_group().is_first_rank:
            wrapper.moe_inspect_seam = Seam(runner, config, settings)
    except Exception as error:  # the engine goes on
        wrapper.moe_inspect_refused = tell_why(log, error)
    return loaded


def _sample_tokens(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    output = wrapper.worker.sample_tokens(*args, **kwargs)
    if (seam := _seam_of(wrapper)) is not None:
        seam.after_sampling()
    return output


def _command(wrapper: Any, what: str, value: str = "") -> Any:
    """What `collective_rpc("moe_inspect", args=(what, value))` answers of each worker: None of
    those that share another's routing."""
    if (seam := _seam_of(wrapper)) is not None:
        return seam.recorder.command(what, value)
    refused = vars(wrapper).get("moe_inspect_refused")
    return None if refused is None else {"refused": refused}


def largest_step(config: Any) -> int:
    """Return the most rows of a step: a CUDA graph may be captured for more tokens than are ever
    scheduled."""
    sizes = config.compilation_config.cudagraph_capture_sizes or []
    return max([config.scheduler_config.max_num_batched_tokens, *sizes])


class Seam:
    """The recorder of one worker, whose model is loaded. `ends`: request → the position at which
    its answer ends at the latest, if drafts are speculated."""

    def __init__(self, runner: Any, config: Any, settings: Settings):
        from moe_inspect.capture.engine.rows import EngineRows
        from moe_inspect.capture.engine.sender import recorder_of
        from moe_inspect.capture.rows import PHYSICALS

        layers = recordable_layers(runner.get_model(), config)
        self.runner, moe = runner, layers[0].moe_config
        self.is_v2 = hasattr(runner, "req_states")  # vLLM's model runner V2
        E, K = moe.num_logical_experts, moe.experts_per_token
        shape, compiled = (len(layers), largest_step(config), K), config.compilation_config.mode
        eplb = eplb_of(runner, config)
        extras = ["logits"] * settings.records_logits + [PHYSICALS] * (eplb is not None)
        rows = EngineRows(shape, E, runner.device, extras, bool(compiled))
        about = _about(config) | {
            "layers": [layer.layer_id for layer in layers],
            "paths": [layer.layer_name for layer in layers],
        }

        maps: dict[str, Callable[[], Any]] = {"placed": lambda: placed(layers, eplb)}
        if eplb is not None:
            maps["replicas"] = lambda: eplb.physical_to_logical_map
        self.recorder = recorder_of(rows, settings, about, **maps)
        self.speculates = config.speculative_config is not None
        self.ends: dict[str, int] = {}
        self.sampled: Tensor | None = None
        if self.speculates:
            self._watch_sampling()
        for n, layer in enumerate(layers):  # last: what has failed before is in no forward pass
            self._watch(layer.router, n, eplb is not None)

    def after_step(self, scheduled: Any) -> None:
        try:
            if self.speculates:
                self._note_ends(scheduled)
            self.sampled = None
            tokens, ended = scheduled.total_num_scheduled_tokens, scheduled.finished_req_ids
        except Exception as error:
            self.recorder.stop(error)
            return
        self.recorder.after_step(tokens, ended, lambda: self._schedule(scheduled))

    def _note_ends(self, scheduled: Any) -> None:
        for new in scheduled.scheduled_new_reqs:
            most = getattr(new.sampling_params, "max_tokens", None)
            if most is not None and new.prompt_token_ids is not None:
                self.ends[new.req_id] = len(new.prompt_token_ids) + most - 1
        for request in scheduled.finished_req_ids:
            self.ends.pop(request, None)

    def after_sampling(self) -> None:
        if self.speculates:
            self.recorder.after_sampling(self.sampled)

    def _schedule(self, scheduled: Any) -> Scheduled:
        """Tokens and positions are those on the device: with asynchronous scheduling the host's
        come too late."""
        runner = self.runner
        if self.is_v2:
            batch = runner.execute_model_state.input_batch
            requests, tokens, positions = list(batch.req_ids), batch.input_ids, batch.positions
            edges = batch.query_start_loc_np[: batch.num_reqs + 1].tolist()
            prompts = runner.req_states.prompt_len.np[batch.idx_mapping_np].tolist()
        else:
            requests = list(runner.input_batch.req_ids)
            tokens, positions = runner.input_ids.gpu, runner.positions
            n, states = len(requests), runner.requests
            edges: Sequence[int] = range(n + 1)
            if scheduled.total_num_scheduled_tokens != n:
                edges = edges_of(map(scheduled.num_scheduled_tokens.__getitem__, requests))
            prompts = [states[request].num_prompt_tokens for request in requests]
        drafts: Sequence[int] = ()
        ends: Sequence[int] = ()
        if speculated := scheduled.scheduled_spec_decode_tokens:
            drafts = [len(speculated.get(request, ())) for request in requests]
            ends = [self.ends.get(request, 2**31) for request in requests]
        return Schedule(requests, edges, prompts, drafts, ends), tokens, positions

    def _watch(self, router: Any, n: int, replicas: bool) -> None:
        """Keeps what a router chooses; with `replicas`, when EPLB has mapped it to physical
        experts."""
        compute: Callable[..., tuple[Tensor, Tensor]] = router._compute_routing
        chosen = list[Any]()  # weights and logits, until experts are mapped

        def watched(hidden: Tensor, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            weights, ids = compute(hidden, logits, *args, **kwargs)
            if replicas:
                chosen[:] = weights, logits
            else:
                self.recorder.keep(n, ids, weights, logits)
            return weights, ids

        router._compute_routing = watched
        if not replicas:
            return
        to_physical: Callable[[Tensor], Tensor] = router._apply_eplb_mapping

        def mapped(ids: Tensor) -> Tensor:
            physicals = to_physical(ids)
            self.recorder.keep(n, ids, *chosen, physicals)
            chosen.clear()
            return physicals

        router._apply_eplb_mapping = mapped

    def _watch_sampling(self) -> None:
        """Keeps how many tokens each request of a step is given."""
        runner = self.runner
        name = "sample" if self.is_v2 else "_sample"
        sample: Callable[..., Any] = getattr(runner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = sample(*args, **kwargs)
            try:
                if isinstance(output, tuple):
                    self.sampled = output[1]
                else:  # −1 stands for what was rejected
                    self.sampled = (output.sampled_token_ids >= 0).sum(1)
            except Exception as error:
                self.recorder.stop(error)
            return output

        setattr(runner, name, watched)


def recordable_layers(model: Any, config: Any) -> list[Any]:
    """The MoE layers, by layer. MoeInspectError where a router does not see each token of this
    worker once, or a kernel chooses the experts itself."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    layers = [m for m in model.modules() if isinstance(m, MoERunner)]
    if not layers:
        raise MoeInspectError(f"{type(model).__name__} has no MoE layer that vLLM's MoERunner runs")
    hidden = {kernel_of(layer) for layer in layers if layer.is_monolithic}
    hidden |= {type(m.router).__name__ for m in layers if not isinstance(m.router, BaseRouter)}
    if hidden:
        raise MoeInspectError(
            f"{', '.join(sorted(hidden))} chooses the experts inside its kernel, where nobody sees "
            "the weights: choose another with vLLM's --moe-backend"
        )
    if any(getattr(layer.router, "zero_expert_type", None) for layer in layers):
        raise MoeInspectError("its routers return expert 0 where they chose a zero expert")
    parallel, moe = config.parallel_config, layers[0].moe_config
    unseen = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "dual batch overlap": getattr(parallel, "use_ubatching", False),
        "sequence parallelism": moe.is_sequence_parallel,
        "prefill context parallelism": moe.pcp_size > 1,
        "dispatch of all ranks' tokens before the router": any(
            layer.do_naive_dispatch_combine for layer in layers
        ),
    }
    if found := [name for name, there in unseen.items() if there]:
        raise MoeInspectError(f"{', '.join(found)}: a router does not see each token once")
    shapes = {(m.moe_config.num_logical_experts, m.moe_config.experts_per_token) for m in layers}
    if len(shapes) > 1 or len({layer.layer_id for layer in layers}) < len(layers):
        raise MoeInspectError("its layers have several routers, or routers of several sizes")
    ((_, K),) = shapes
    if any(layer.router.top_k != K for layer in layers):
        raise MoeInspectError(f"its routers do not choose the {K} experts that the config states")
    return sorted(layers, key=lambda layer: layer.layer_id)


def eplb_of(runner: Any, config: Any) -> Any:
    """EPLB's state of the model, of a draft model it has another; None where there is no EPLB."""
    state = getattr(runner, "eplb_state", None)
    return None if state is None else state.model_states[config.model_config.compute_hash()]


def placed(layers: list[Any], eplb: Any) -> np.ndarray | None:
    """The share of each expert's load that each rank of expert parallelism gets, [L, E, G]: by
    EPLB's map of now, else as vLLM places experts once."""
    moe = layers[0].moe_config
    E, G = moe.num_logical_experts, moe.ep_size
    if G == 1:
        return None
    if eplb is not None:
        return shares_of(eplb.physical_to_logical_map.cpu().numpy(), E, G)
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    strategy = layers[0].routed_experts.expert_map_manager.placement_strategy
    here = [determine_expert_map(G, g, E, strategy)[1].numpy() >= 0 for g in range(G)]
    return np.tile(np.stack(here, 1).astype(float), (len(layers), 1, 1))


def shares_of(map_LP: np.ndarray, E: int, G: int) -> np.ndarray:
    """Return the share of each expert's load that each of G ranks gets, [L, E, G]. `map_LP`: the
    logical expert of each physical one, −1 for none; each rank holds the same number of them, in
    consecutive places."""
    L, P = map_LP.shape
    share_LEG = np.zeros((L, E, G))
    layer_LP, rank_LP = np.indices((L, P))
    is_used_LP = map_LP >= 0
    rank_LP = rank_LP[is_used_LP] * G // P
    np.add.at(share_LEG, (layer_LP[is_used_LP], map_LP[is_used_LP], rank_LP), 1)
    return share_LEG / np.maximum(share_LEG.sum(2, keepdims=True), 1)


def kernel_of(layer: Any) -> str:
    """The name of what runs a layer's experts."""
    method = layer.routed_experts.quant_method
    kernel = getattr(getattr(method, "moe_kernel", None), "impl", None)
    return type(getattr(kernel, "fused_experts", None) or method).__name__


def _about(config: Any) -> dict[str, Any]:
    model = config.model_config
    return {
        "engine": "vllm",
        "model": model.model,
        "revision": model.revision,
        "tokenizer": model.tokenizer,
        "trust_remote_code": model.trust_remote_code,
        "vocabulary": model.get_vocab_size(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rank": config.parallel_config.data_parallel_rank,
    }


class Endpoint:
    """GET and POST {"command", "value"} at PATH. vLLM adds it where VLLM_PLUGINS names us.
    `refused`: why nothing is recorded, as far as this process knows."""

    name = "moe_inspect"
    refused = ""
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        from fastapi import Body

        if not is_asked():  # workers have no such method
            return

        async def answer(what: str, value: str = "") -> dict[str, Any]:
            try:
                return {"engines": await ask_engines(app.state.engine_client, what, value)}
            except Exception as error:  # as where a variable is wrong
                why = f"the engine does not run the plugin ({first_line(error)}): see its log"
                return {"engines": [{"refused": self.refused or why}]}

        async def status() -> dict[str, Any]:
            return await answer("status")

        async def command(command: str = Body(), value: str = Body("")) -> dict[str, Any]:
            return await answer(command, value)

        app.add_api_route(PATH, status, methods=["GET"])
        app.add_api_route(PATH, command, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        pass


async def ask_engines(client: Any, what: str, value: str) -> list[Any]:
    """The answers of all workers of all engines, one after the other."""
    core: Any = getattr(client, "engine_core", None)
    if hasattr(core, "call_utility_all_async"):  # collective_rpc asks the first engine only
        given = "collective_rpc", "moe_inspect", None, (what, value), None
        found = await core.call_utility_all_async(*given)
    else:
        found = [await client.collective_rpc("moe_inspect", args=(what, value))]
    return [state for workers in found for state in workers if state is not None]
